"""The agent's loop: look at NVML, keep what is known of the node, tell the service what has changed, do what it orders.

    Reader ──Reading──▶ Agent.look() ──▶ NodeReport (version grows when it changed)
                        Agent.tell() ──▶ full report after a change or when asked; a few bytes where the feed fails
    Reader ◀──orders─── Agent.obey() ◀── Standing ◀── Feed (the held request; a thread)
    Hands ◀──NodeReport─ Agent.look()     Hands ◀── placements ── Feed      Hands ──what was handed──▶ NodeReport

No NVML here (`child`, `nvml`), no HTTP (`service`), no kubelet (`hands`), and what signs of ill health mean is
`health`'s to say.
"""

from __future__ import annotations

import logging
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from app.agent.child import CHANGE_SECONDS, DEADLINE_SECONDS, INSTANCE_SECONDS, Child, InProcess, NoAnswer, Reader
from app.agent.feed import Feed, Orders, Standing, backoff, jittered
from app.agent.giving import Giving
from app.agent.health import Judge, Patience
from app.agent.memory import MemoryFile, boot_id
from app.agent.reading import Reading, remember
from app.agent.service import ReportError, Service
from app.agent.versions import node_versions
from app.report import Failed, Gpu, NodeReport, OrderList, OrdersDone, ReportReply, Unchanged

if TYPE_CHECKING:
    from app.agent.handing import Said
    from app.agent.hands import HandOption, Hands

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
"""Between looks, and so how long a change on the node may stay unknown. A quiet look costs a few milliseconds."""

OBSERVES = "its agent only observes (--mig observe)"

MOST_FAILED = 1024
"""As many as a report may name."""

MigOption = Literal["observe", "make"]


class Reports(Protocol):
    """Where reports go: the service, or a test."""

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        """Send it. Raises `ReportError`."""

    def close(self) -> None:
        """Close the connection."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Agent:
    """What one agent knows and has said. `look`, `tell` and `obey` are its acts; `run` does them for ever."""

    def __init__(
        self,
        *,
        node: str,
        reader: Reader,
        mig: MigOption = "make",
        memory: MemoryFile | None = None,
        patience: Patience | None = None,
        versions: Mapping[str, str] | None = None,
        boot_id: str = "",
        hands: Hands | None = None,
        utc_now: Callable[[], datetime] = _utc_now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._mig = mig
        self._memory = memory
        self._versions = dict(versions or {})
        self._boot_id = boot_id
        self._hands = hands
        self._said: Said | None = None
        self._utc_now = utc_now
        self._clock = clock
        self._judge = Judge(memory.recall() if memory else None, patience=patience, now=clock())
        self._last: Reading | None = None
        self._done: OrdersDone | None = None
        self._failing_since = ""
        self.standing = Standing()
        self.report = NodeReport(node=node, boot=secrets.token_hex(8), version=0, error="NVML has not been read yet")

    # ---- look ----

    def look(self, wait_seconds: float) -> bool:
        """Read the node, waiting at most so long; whether the report has changed."""
        answer = self._reader.look(wait_seconds)
        before, said = self.report, self._hands.said() if self._hands is not None else None
        if isinstance(answer, NoAnswer):
            if answer.failed:
                self._fail(answer.reason)
        elif answer.error:
            self._fail(answer.error)
        elif not self._says_nothing_new(answer):
            self._believe(answer)
        if said != self._said:
            self._said = said
            self._take(self.report.model_copy(update=_hands_fields(said)))
        if self._hands is not None:
            self._hands.reported(self.report)
        return self.report is not before

    def _believe(self, reading: Reading) -> None:
        """Make it the report; what cannot be one (two GPUs with one UUID) is a failure like any other."""
        try:
            report = self._report_of(reading)
        except ValueError as error:
            self._fail(f"what NVML says makes no sense: {' '.join(str(error).split())}")
            return
        self._failing_since = ""
        self._last = reading
        self._take(report)

    def _says_nothing_new(self, reading: Reading) -> bool:
        """A quiet node costs no more than this; building the same report again would be most of an agent's work."""
        return (
            reading is self._last
            and not reading.xids
            and not self._judge.moving
            and not self._failing_since
            and self.report.orders == self._done
        )

    def _report_of(self, reading: Reading) -> NodeReport:
        known = self.report
        makes, none = reading.makes_slices, reading.makes_none
        if self._mig == "observe":
            makes, none = False, OBSERVES
        return NodeReport(
            node=known.node,
            boot=known.boot,
            version=known.version,
            driver=reading.driver,
            cuda=reading.cuda,
            nvml=reading.nvml,
            versions=self._versions,
            sees_pods=reading.sees_pods,
            makes_slices=makes,
            makes_none=none,
            orders=self._done,
            gpus=self._judged(reading),
            links=reading.links,
            **_hands_fields(self._said),
        )

    def _judged(self, reading: Reading) -> tuple[Gpu, ...]:
        known = self.report.gpus or self._judge.known
        gpus = self._judge.judge(remember(known, reading), reading.xids, self._clock())
        if self._memory is not None:
            self._memory.keep(self._judge.memory(node=self.report.node, boot=self._boot_id))
        return gpus

    def _fail(self, reason: str) -> None:
        """NVML does not answer: everything stays as it was last read; the time stays that of the first failure."""
        if not self._failing_since:
            self._failing_since = self._utc_now().strftime("%Y-%m-%dT%H:%M:%SZ")
        state = "never read; failing since" if self._last is None else "stale since"
        words = f"{state} {self._failing_since}: {reason}"[:500]
        self._take(self.report.model_copy(update={"error": words, "orders": self._done}))

    def _take(self, report: NodeReport) -> None:
        if report != self.report:
            self.report = report.model_copy(update={"version": self.report.version + 1})

    # ---- obey ----

    def obey(self, orders: OrderList) -> None:
        """Carry out a list and look again, so that the report has both what failed and what is there now.

        Where NVML hangs or dies meanwhile nobody knows what was done: every order counts as failed, in words, so
        that the service need not wait; the report is stale until a new child has read what is there.
        """
        if self._mig == "observe":
            self._finished(orders, _each(orders, OBSERVES))
        else:
            failed = self._reader.change(orders, _seconds_for(orders))
            if isinstance(failed, NoAnswer):
                self._finished(orders, _each(orders, failed.reason))
                if failed.failed:
                    self._fail(failed.reason)
                    return
            else:
                self._finished(orders, failed)
        self.look(DEADLINE_SECONDS)

    def _finished(self, orders: OrderList, failed: tuple[Failed, ...]) -> None:
        for order in failed:
            log.warning(
                "not done: %s on %s at %d: %s", order.profile or "MIG mode", order.gpu, order.start, order.reason
            )
        self._done = OrdersDone(service=orders.service, version=orders.version, failed=failed[:MOST_FAILED])
        self.standing.untold()  # also where nothing has changed: the service waits for an answer

    # ---- tell ----

    def tell(self, reports: Reports) -> None:
        """Say everything if the service may not have it, else, unless the feed does, that nothing is new.

        Raises `ReportError`.
        """
        current = self.report
        if self.standing.version != current.version:
            self._send_full(reports)
            return
        if self.standing.listening:
            return
        try:
            reply = reports.post(Unchanged(node=current.node, boot=current.boot, version=current.version))
        except ReportError as error:
            if error.status:  # it was refused, not lost: say everything next time
                self.standing.untold()
            raise
        if reply.resend:
            self.standing.untold()
            self._send_full(reports)

    def _send_full(self, reports: Reports) -> None:
        reply = reports.post(self.report)
        if reply.resend:
            self.standing.untold()
        else:
            self.standing.taken(self.report.version, reply.service)

    # ---- for ever ----

    def run(
        self, reports: Reports, *, orders: Orders | None = None, interval_seconds: float = INTERVAL_SECONDS
    ) -> None:
        """Look, tell and obey until the process ends. Nothing that NVML or the service do ends the loop."""
        if self._hands is not None:
            self._hands.start(self.standing.wake)
        if orders is not None:
            placed = self._hands.placements if self._hands is not None else None
            Feed(orders, self.standing, node=self.report.node, boot=self.report.boot, placed=placed).start()
        telling = _Telling()
        while True:
            started = time.monotonic()
            ordered = self.standing.take_orders()
            if ordered is not None:
                self.obey(ordered)
            changed = ordered is None and self.look(interval_seconds)
            if ordered or telling.is_due(time.monotonic()) or (changed and not telling.failures):
                try:
                    self.tell(reports)
                    if telling.failures:
                        self.standing.reached()
                    telling.went_well()
                except ReportError as error:
                    telling.failed(str(error), time.monotonic())
            due = started + jittered(interval_seconds)
            if telling.failures:
                due = min(due, max(telling.not_before, started + 0.1))
            self.standing.wait(due - time.monotonic())


@dataclass(slots=True)
class _Telling:
    """How telling goes: failures in a row, when to try again, and what was last said about it in the log."""

    failures: int = 0
    not_before: float = 0.0
    said: str = ""

    def is_due(self, now: float) -> bool:
        return now >= self.not_before

    def went_well(self) -> None:
        if self.said:
            log.info("the service takes reports again")
        self.failures, self.said = 0, ""

    def failed(self, reason: str, now: float) -> None:
        self.failures += 1
        self.not_before = now + backoff(self.failures)
        if reason != self.said:
            log.warning("report not taken: %s", reason)
        self.said = reason


def _hands_fields(said: Said | None) -> dict[str, Any]:
    """What a report says about devices reaching containers."""
    if said is None:
        return {}
    return {"hands": said.hands, "hands_none": said.none, "handed": said.handed, "handing": dict(said.counts)}


def _seconds_for(orders: OrderList) -> float:
    """How long a list may take: idle slices are given up together, fifty of them on a node of eight GPUs."""
    instances = len(orders.remove) + sum(1 + len(make.remove) for make in orders.make)
    return max(CHANGE_SECONDS, INSTANCE_SECONDS * instances)


def _each(orders: OrderList, reason: str) -> tuple[Failed, ...]:
    """Every order of a list as failed for one reason."""
    slices = (
        Failed(gpu=at.gpu, profile=at.profile, start=at.start, reason=reason) for at in (*orders.make, *orders.remove)
    )
    return (*slices, *(Failed(gpu=switch.gpu, reason=reason) for switch in orders.switch))


def run_agent(
    *,
    service: str | None,
    node: str,
    interval_seconds: float = INTERVAL_SECONDS,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    mig: MigOption = "make",
    hand: HandOption = "no",
    giving: Giving | None = None,
    shares: bool = False,
    kubelet_dir: Path = Path("/var/lib/kubelet"),
    state_dir: Path | None = None,
    patience: Patience | None = None,
    once: bool = False,
    nvml_in_process: bool = False,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
) -> None:
    """Run an agent for this node until SIGTERM or SIGINT, which end it at once (status 0).

    `once`: read once, print the report as JSON, and return; `service` is then not needed. `mig="observe"`: carry out no
    orders. `state_dir`: where what was seen of the GPUs' health is kept over restarts. `nvml_in_process` does without
    the child process and so without a deadline (simulated fleets). `proc` and `sys` are where the host's /proc and
    /sys are mounted. `hand`: whether it hands devices to containers, as `giving` says (`shares`: parts of GPUs, too),
    or observes who does; `kubelet_dir` is the host's.
    """
    if not once and service is None:
        raise ValueError("an agent needs the URL of the service (or --once)")
    hands = None
    if hand != "no" and not once:
        assert service is not None
        from app.agent.hands import hands_of  # gRPC comes with it: 15 MiB

        exchanges = Service(service, token_file=token_file, ca_file=ca_file)
        hands = hands_of(
            hand,
            node=node,
            service=exchanges,
            giving=giving or Giving(),
            shares=shares,
            kubelet_dir=kubelet_dir,
            state_dir=state_dir,
            proc=proc,
        )
    boot = boot_id(proc) if state_dir is not None else ""
    reader: Reader = InProcess(proc=proc, sys=sys) if nvml_in_process else Child(proc=proc, sys=sys)
    agent = Agent(
        node=node,
        reader=reader,
        mig=mig,
        memory=MemoryFile(state_dir, node=node, boot=boot),
        patience=patience,
        versions=node_versions(),
        boot_id=boot,
        hands=hands,
    )
    # A handler also where the default would do: process 1 of a container has no default for SIGTERM.
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _end)
    try:
        if once:
            agent.look(float("inf") if nvml_in_process else 600.0)
            print(agent.report.model_dump_json(by_alias=True, indent=2))
            return
        assert service is not None
        reports = Service(service, token_file=token_file, ca_file=ca_file)
        orders = Service(service, token_file=token_file, ca_file=ca_file)
        log.info("agent of %s reports to %s every %g s", node, service, interval_seconds)
        agent.run(reports, orders=orders, interval_seconds=interval_seconds)
    finally:
        if hands is not None:
            hands.close()
        reader.close()


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(0)
