"""The agent's loop: look at NVML, keep what is known of the node, tell the service what has changed.

    Reader ──Reading──▶ Agent.look() ──▶ NodeReport (version grows when it changed)
                        Agent.tell() ──▶ full report after a change or when asked, else a few bytes

No NVML here (`child`, `nvml`) and no HTTP (`service`). Orders to make and remove slices will come the same way.
"""

from __future__ import annotations

import logging
import random
import secrets
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from app.agent.child import Child, InProcess, NoAnswer, Reader
from app.agent.reading import Reading, remember
from app.agent.service import ReportError, Service
from app.report import NodeReport, ReportReply, Unchanged

log = logging.getLogger(__name__)

INTERVAL_SECONDS = 5.0
"""Between looks, and so how long a change on the node may stay unknown. A quiet look costs a few milliseconds."""

RETRY_SECONDS = (1.0, 15.0)
"""After a report that failed: the first wait, doubled each time up to the last. The last is what a node stays unknown
for after a long outage of the service; 5,000 agents then ask 300 times a second."""

JITTER = 0.1
"""Part of each wait that is random, so that a thousand agents that start together drift apart."""


class Reports(Protocol):
    """Where reports go: the service, or a test."""

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        """Send it. Raises `ReportError`."""

    def close(self) -> None:
        """Close the connection."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Agent:
    """What one agent knows and has said. `look` and `tell` are its two acts; `run` does them for ever."""

    def __init__(self, *, node: str, reader: Reader, utc_now: Callable[[], datetime] = _utc_now) -> None:
        self._reader = reader
        self._utc_now = utc_now
        self._read_once = False
        self._failing_since = ""
        self._acknowledged: int | None = None
        self.report = NodeReport(node=node, boot=secrets.token_hex(8), version=0, error="NVML has not been read yet")

    def look(self, wait_seconds: float) -> bool:
        """Read the node, waiting at most so long; whether the report has changed."""
        answer = self._reader.look(wait_seconds)
        before = self.report
        if isinstance(answer, NoAnswer):
            if answer.failed:
                self._take(before.model_copy(update={"error": self._stale(answer.reason)}))
        elif answer.error:
            self._take(before.model_copy(update={"error": self._stale(answer.error)}))
        else:
            self._failing_since = ""
            self._read_once = True
            self._take(self._report_of(answer))
        return self.report is not before

    def tell(self, reports: Reports) -> None:
        """Say it: everything if the service may not have it, else that nothing is new. Raises `ReportError`."""
        current = self.report
        if self._acknowledged != current.version:
            self._send_full(reports)
            return
        try:
            reply = reports.post(Unchanged(node=current.node, boot=current.boot, version=current.version))
        except ReportError as error:
            if error.status:  # it was refused, not lost: say everything next time
                self._acknowledged = None
            raise
        if reply.resend:
            self._acknowledged = None
            self._send_full(reports)

    def _send_full(self, reports: Reports) -> None:
        reply = reports.post(self.report)
        self._acknowledged = None if reply.resend else self.report.version

    def _report_of(self, reading: Reading) -> NodeReport:
        known = self.report
        gpus = remember(known.gpus, reading)
        return NodeReport(
            node=known.node,
            boot=known.boot,
            version=known.version,
            driver=reading.driver,
            cuda=reading.cuda,
            nvml=reading.nvml,
            sees_pods=reading.sees_pods,
            gpus=gpus,
            links=reading.links,
        )

    def _stale(self, reason: str) -> str:
        """The report's `error` while NVML does not answer; the time stays that of the first failure."""
        if not self._failing_since:
            self._failing_since = self._utc_now().strftime("%Y-%m-%dT%H:%M:%SZ")
        state = "stale since" if self._read_once else "never read; failing since"
        return f"{state} {self._failing_since}: {reason}"[:500]

    def _take(self, report: NodeReport) -> None:
        if report != self.report:
            self.report = report.model_copy(update={"version": self.report.version + 1})

    def run(self, reports: Reports, *, interval_seconds: float = INTERVAL_SECONDS) -> None:
        """Look and tell until the process ends. Nothing that NVML or the service do ends the loop."""
        failures = 0
        next_tell = 0.0
        said = ""
        while True:
            started = time.monotonic()
            changed = self.look(interval_seconds)
            if time.monotonic() >= next_tell or (changed and not failures):
                try:
                    self.tell(reports)
                    failures = 0
                    if said:
                        log.info("the service takes reports again")
                    said = ""
                except ReportError as error:
                    first, last = RETRY_SECONDS
                    next_tell = time.monotonic() + _jittered(min(last, first * 2 ** min(failures, 16)))
                    failures += 1
                    if str(error) != said:
                        log.warning("report not taken: %s", error)
                    said = str(error)
            due = started + _jittered(interval_seconds)
            if failures:
                due = min(due, max(next_tell, started + 0.1))
            time.sleep(max(0.0, due - time.monotonic()))


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 — spreads load, guards nothing


def run_agent(
    *,
    service: str | None,
    node: str,
    interval_seconds: float = INTERVAL_SECONDS,
    token_file: Path | None = None,
    ca_file: Path | None = None,
    once: bool = False,
    nvml_in_process: bool = False,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
) -> None:
    """Run an agent for this node until SIGTERM or SIGINT, which end it at once (status 0).

    `once`: read once, print the report as JSON, and return; `service` is then not needed. `nvml_in_process`
    does without the child process and so without a deadline (simulated fleets). `proc` and `sys` are where the host's
    /proc and /sys are mounted.
    """
    if not once and service is None:
        raise ValueError("an agent needs the URL of the service (or --once)")
    reader: Reader = InProcess(proc=proc, sys=sys) if nvml_in_process else Child(proc=proc, sys=sys)
    agent = Agent(node=node, reader=reader)
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
        log.info("agent of %s reports to %s every %g s", node, service, interval_seconds)
        agent.run(reports, interval_seconds=interval_seconds)
    finally:
        reader.close()


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(0)
