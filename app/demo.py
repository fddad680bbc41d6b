"""`tangram demo`: the service, a simulated fleet and a kube-scheduler's part, for half a minute, with a page to watch.

    tangram serve --standalone  ◀── reports ──  one simulated agent per node (app.simulate)
            ▲      ▲
            │      └── /filter /prioritize /bind, byte for byte as kube-scheduler (app.driver)
            └── DELETE /v1/pods/UID when a pod's time is over

Everything goes over HTTP as in a cluster. Placements are audited by `simulate.Fleet`, which reads the reports only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import heapq
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from app.driver import CallFailed, Extender, Filtered, PodSpec, Queue, find_node, fit_error, refused_condition
from app.report import NodeReport, Unchanged
from app.show import Waiting, waiting
from app.simulate import FLEET, Arrival, Fleet, Tally, Use, WrongPlacement, arrivals, run_first_fit, sample_reports

HOST = "127.0.0.1"
PREFERRED_PORT = 8080
SPEED = 60.0  # simulated seconds in one second: half a minute shows half an hour
REPORT_SECONDS = 5.0  # as the real agent
START_SECONDS = 60.0  # importing the solver takes seconds on a cold, slow machine
STOP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1
CANNOT, INTERRUPTED = 1, 130  # exit statuses; Ctrl-C is the usual end of a demo with a page, not of one with --once
LASTING_LOAD = 0.7  # below one, or the queue would grow for as long as somebody looks at the page
EPOCH = datetime(2026, 11, 21, 9, 0, tzinfo=UTC)  # creation times are part of the requests: fixed, to be repeatable


@dataclass(frozen=True, slots=True)
class Options:
    """What `tangram demo` can vary."""

    once: bool = False
    seed: int = 1
    pods: int = 480
    seconds: float = 25.0
    samples: str = FLEET
    port: int = 0
    out: Path = Path("out")


class DemoFailed(Exception):
    """The demo cannot go on; the message says why."""


def run_demo(options: Options, console: Console) -> int:
    """Run it; the exit status: 0, or 1 where a device was given twice or a part of the demo failed."""
    try:
        return asyncio.run(_until_interrupted(options, console))
    except DemoFailed as problem:
        console.print(f"[red]The demo failed:[/] {escape(str(problem))}", highlight=False)
        return CANNOT


async def _until_interrupted(options: Options, console: Console) -> int:
    main = asyncio.current_task()
    assert main is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, main.cancel)
    try:
        return await _demo(options, console)
    except asyncio.CancelledError:
        console.print("Stopped.")
        return INTERRUPTED if options.once else 0


async def _demo(options: Options, console: Console) -> int:
    reports = sample_reports(options.samples)
    horizon = options.seconds * SPEED
    coming = arrivals(reports, pods=options.pods, seconds=horizon, seed=options.seed)
    async with _service(options, console) as address, _agents(address, reports, console):
        host, port = address
        console.print(f"The page: [bold blue underline]http://{host}:{port}/[/]\n", highlight=False)
        world = World(address, reports, seed=options.seed, since=horizon / 3)
        try:
            await _watch(world, coming, horizon, console)
            await world.settle()
            result = await _result(world, coming, reports, horizon, options)
            _show(result, console)
            _write(result, options.out / "demo.json", console)
            if not options.once and not world.wrong:
                await _stay(world, reports, options, console, address)
        finally:
            await world.close()
    return CANNOT if world.wrong else 0


# ------------------------------------------------------------------------------------------- the service, the agents


@contextlib.asynccontextmanager
async def _service(options: Options, console: Console) -> AsyncIterator[tuple[str, int]]:
    """`tangram serve --standalone` as a process of its own, ended with us."""
    port = _free_port(options.port)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "demo-service.log"
    command = [sys.executable, "-m", "app.cli", "serve", "--standalone", "--host", HOST, "--port", str(port)]
    process = _start(command, log)
    try:
        await _answers(process, port, log, console)
        yield HOST, port
    finally:
        _end(process)


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """In a session of its own: Ctrl-C is for us, and we end the service when we are done with it."""
    with log.open("wb") as sink:
        return subprocess.Popen(  # noqa: S603  our own command
            command,
            stdout=sink,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_end_with_parent,
            env={name: value for name, value in os.environ.items() if not name.startswith("TANGRAM_")},
        )


def _end_with_parent() -> None:
    """Have the kernel end the service should we be killed in a way that leaves us no last word (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


async def _answers(process: subprocess.Popen[bytes], port: int, log: Path, console: Console) -> None:
    deadline = time.monotonic() + START_SECONDS
    with console.status("Starting the service …"):
        async with httpx.AsyncClient(trust_env=False) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise DemoFailed(
                        f"the service ended with status {process.returncode}; its last words:\n{_last_words(log)}"
                    )
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(f"http://{HOST}:{port}/healthz", timeout=1)).status_code == 200:
                        return
                await asyncio.sleep(0.1)
    raise DemoFailed(f"the service did not answer within {START_SECONDS:.0f} s; its log is {log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port(wanted: int) -> int:
    """The wanted port, or else the usual one, or else one that is free now."""
    for port in (wanted,) if wanted else (PREFERRED_PORT, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise DemoFailed(f"port {wanted} of {HOST} is not to be had: something listens there, or it is not allowed")


@contextlib.asynccontextmanager
async def _agents(address: tuple[str, int], reports: Sequence[NodeReport], console: Console) -> AsyncIterator[None]:
    """One simulated agent per node: a full report, then "nothing new" every few seconds."""
    url = f"http://{address[0]}:{address[1]}/v1/reports"
    async with httpx.AsyncClient(trust_env=False, limits=httpx.Limits(max_connections=8)) as client:
        for said in reports:
            await _post_report(client, url, said)
        console.print(
            f"{len(reports)} simulated nodes report {sum(len(said.gpus) for said in reports)} GPUs.", highlight=False
        )
        beating = [asyncio.create_task(_beat(client, url, said, number)) for number, said in enumerate(reports)]
        try:
            yield
        finally:
            for beat in beating:
                beat.cancel()
            await asyncio.gather(*beating, return_exceptions=True)


async def _post_report(client: httpx.AsyncClient, url: str, said: NodeReport) -> None:
    body = said.model_dump_json(by_alias=True)
    answer = await client.post(url, content=body, headers={"Content-Type": "application/json"}, timeout=10)
    if answer.status_code != 200:
        raise DemoFailed(f"the report of {said.node} was answered with {answer.status_code}: {answer.text[:300]}")


async def _beat(client: httpx.AsyncClient, url: str, said: NodeReport, number: int) -> None:
    unchanged = Unchanged(node=said.node, boot=said.boot, version=said.version).model_dump_json()
    await asyncio.sleep(REPORT_SECONDS * (number % 10) / 10)
    while True:
        await asyncio.sleep(REPORT_SECONDS)
        with contextlib.suppress(httpx.HTTPError, DemoFailed):
            answer = await client.post(url, content=unchanged, headers={"Content-Type": "application/json"}, timeout=5)
            if answer.status_code == 200 and answer.json().get("resend"):
                await _post_report(client, url, said)


# ------------------------------------------------------------------------------------------------------ the world


@dataclass(slots=True)
class World:
    """The pods' side of a cluster: they come, are placed through the extender, and leave."""

    address: tuple[str, int]
    reports: Sequence[NodeReport]
    seed: int
    since: float
    books: Fleet = field(init=False)
    extender: Extender = field(init=False)
    tally: Tally = field(init=False)
    queue: Queue = field(default_factory=Queue)
    held: set[str] = field(default_factory=set)
    specs: dict[str, PodSpec] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)
    cycles: int = 0
    _by_uid: dict[str, Arrival] = field(default_factory=dict)
    _events: list[tuple[float, int, str]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)
    _errands: set[asyncio.Task[None]] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _rng: random.Random = field(init=False)
    _client: httpx.AsyncClient = field(init=False)
    _began: float = 0.0

    def __post_init__(self) -> None:
        self.books = Fleet(self.reports)
        self.extender = Extender(*self.address)
        self.tally = Tally(since=self.since)
        self._rng = random.Random(self.seed)  # noqa: S311  ties are broken at random, repeatably
        self._client = httpx.AsyncClient(
            base_url=f"http://{self.address[0]}:{self.address[1]}", timeout=10, trust_env=False
        )

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning."""
        return (asyncio.get_running_loop().time() - self._began) * SPEED if self._began else 0.0

    def expect(self, coming: Sequence[Arrival], *, after: float = 0.0) -> None:
        """These pods will come."""
        for arrival in coming:
            self._by_uid[arrival.uid] = arrival
            heapq.heappush(self._events, (after + arrival.at, next(self._order), arrival.uid))

    async def play(self, until: float) -> None:
        """Let the world go on until this simulated time: one cycle at a time, binds beside them."""
        if not self._began:
            self._began = asyncio.get_running_loop().time()
        while self.now < until:
            self._happen()
            uid = self.queue.pop(now=self.now)
            if uid is not None:
                await self._cycle(uid)
            else:
                await self._rest(until)
            self._observe()

    async def settle(self) -> None:
        """Wait for binds and deletes that are under way."""
        while self._errands:
            await asyncio.gather(*self._errands)
        self._observe()

    async def close(self) -> None:
        """Drop what is under way and close the connections."""
        for errand in self._errands:
            errand.cancel()
        await asyncio.gather(*self._errands, return_exceptions=True)
        await self.extender.close()
        await self._client.aclose()

    async def get(self, path: str) -> Any:
        """Read from the public API."""
        answer = await self._client.get(path)
        answer.raise_for_status()
        return answer.json()

    def _observe(self) -> None:
        self.tally.observe(self.books.use(), waiting=len(self.queue), now=self.now)

    def _happen(self) -> None:
        while self._events and self._events[0][0] <= self.now:
            uid = heapq.heappop(self._events)[2]
            if uid in self.held:
                self._errand(self._leave(uid))
            else:
                self._arrive(self._by_uid[uid])

    def _arrive(self, arrival: Arrival) -> None:
        self.tally.arrived += 1
        self.specs[arrival.uid] = PodSpec(
            name=arrival.name,
            uid=arrival.uid,
            resources=arrival.resources,
            created=_stamp(arrival.at),
            resource_version=1000 + self.tally.arrived,
            token=f"{self.tally.arrived:05x}",
        )
        self.queue.add(arrival.uid, now=self.now)

    async def _rest(self, until: float) -> None:
        times = [until, *(event[0] for event in self._events[:1])]
        backoff = self.queue.next_at()
        if backoff is not None:
            times.append(backoff)
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.001, (min(times) - self.now) / SPEED)):
                await self._news.wait()

    async def _cycle(self, uid: str) -> None:
        self.cycles += 1
        try:
            found = await find_node(self.extender, self.specs[uid], list(self.books.nodes), self._rng)
        except CallFailed as problem:
            self._failed(uid, problem)
            return
        if isinstance(found, Filtered):
            message = fit_error(found.failed, len(self.books.nodes))
            self.refusals[uid] = message
            self.specs[uid] = replace(
                self.specs[uid],
                condition=refused_condition(message, _stamp(self.now)),
                resource_version=self.specs[uid].resource_version + 1_000_000,
            )
            self.queue.refused(uid, now=self.now)
        else:
            self._errand(self._bind(uid, found))

    async def _bind(self, uid: str, node: str) -> None:
        try:
            await self.extender.bind(self.specs[uid], node)
        except CallFailed as problem:
            self._failed(uid, problem)
            self.queue.pod_deleted(now=self.now)  # kube-scheduler treats a failed bind as a deleted pod
            return
        arrival = self._by_uid[uid]
        self.held.add(uid)
        self.queue.done(uid)
        self.refusals.pop(uid, None)
        self.tally.placed += 1
        await self._book(uid, node, arrival)
        heapq.heappush(self._events, (self.now + arrival.holds, next(self._order), uid))

    async def _book(self, uid: str, node: str, arrival: Arrival) -> None:
        said = await self.get(f"/v1/pods/{uid}")
        try:
            if said["node"] != node:
                raise WrongPlacement(f"{arrival.name} was bound to {node}, the service says {said['node']}")
            self.books.place(uid, node, said["devices"], arrival)
        except WrongPlacement as problem:
            self.wrong.append(str(problem))

    async def _leave(self, uid: str) -> None:
        self.books.release(uid)  # before the service hears of it: from then on the devices may be given away
        self.held.discard(uid)
        self.tally.left += 1
        answer = await self._client.delete(f"/v1/pods/{uid}")
        if answer.status_code not in (200, 202, 204):
            self.failures[f"DELETE was answered with {answer.status_code}"] += 1
        self.queue.pod_deleted(now=self.now)

    def _failed(self, uid: str, problem: CallFailed) -> None:
        self.failures[str(problem)] += 1
        self.queue.failed(uid, now=self.now)

    def _errand(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errand_done)

    def _errand_done(self, task: asyncio.Task[None]) -> None:
        self._errands.discard(task)
        self._news.set()
        if not task.cancelled() and (problem := task.exception()) is not None:
            self.failures[f"{type(problem).__name__}: {problem}"] += 1


def _stamp(simulated_seconds: float) -> str:
    return (EPOCH + timedelta(seconds=int(simulated_seconds))).strftime("%Y-%m-%dT%H:%M:%SZ")


# ---------------------------------------------------------------------------------------------------- while it runs


async def _watch(world: World, coming: Sequence[Arrival], horizon: float, console: Console) -> None:
    """Play to the end and show how it goes: a live picture on a terminal, a line now and then elsewhere."""
    world.expect(coming)
    playing = asyncio.create_task(world.play(horizon))
    try:
        if console.is_terminal:
            with Live(console=console, refresh_per_second=8) as live:
                while not playing.done():
                    live.update(_picture(world, len(coming), horizon))
                    await asyncio.wait([playing], timeout=0.125)
                live.update(_picture(world, len(coming), horizon))
        else:
            while not (await asyncio.wait([playing], timeout=5))[0]:
                console.print(_line(world, len(coming)), highlight=False)
    finally:
        playing.cancel()
    await playing


def _line(world: World, pods: int) -> str:
    use = world.books.use()
    return (
        f"  {world.tally.arrived} of {pods} pods arrived, {len(world.held)} held, {len(world.queue)} waiting; "
        f"GPUs {_percent(use.gpus_held, use.gpus)}, MIG units {_percent(use.units_held, use.units)} held"
    )


def _picture(world: World, pods: int, horizon: float) -> Group:
    use = world.books.use()
    bars = Table.grid(padding=(0, 2))
    for title, value, of, said in (
        ("Time", world.now, horizon, f"{world.now / 60:4.1f} of {horizon / 60:.0f} simulated minutes"),
        ("Pods arrived", world.tally.arrived, pods, f"{world.tally.arrived} of {pods}"),
        ("Whole GPUs held", use.gpus_held, use.gpus, f"{use.gpus_held} of {use.gpus}"),
        ("MIG units held", use.units_held, use.units, f"{use.units_held} of {use.units}"),
    ):
        bars.add_row(title, ProgressBar(total=of or 1, completed=min(value, of), width=36), said)
    t = world.tally
    counts = (
        (t.placed, "placed"),
        (len(world.held), "held"),
        (t.left, "left"),
        (len(world.queue), "waiting"),
    )
    pods_line = Text(" · ").join(Text.assemble((f"{count}", "bold"), f" {what}") for count, what in counts)
    latency = "   ".join(
        f"{verb} {_milliseconds(seconds, 50)} ms" for verb, seconds in world.extender.seconds.items() if seconds
    )
    return Group(bars, pods_line, Text(latency, style="dim"))


async def _stay(
    world: World, reports: Sequence[NodeReport], options: Options, console: Console, address: tuple[str, int]
) -> None:
    """Pods keep coming and going, so that the page has something to show, until Ctrl-C."""
    console.print(
        f"\nPods keep coming and going: [bold blue underline]http://{address[0]}:{address[1]}/[/]  (Ctrl-C ends it)",
        highlight=False,
    )
    horizon = options.seconds * SPEED
    for seed in itertools.count(options.seed + 1):
        begin = world.now
        more = arrivals(
            reports,
            pods=options.pods,
            seconds=horizon,
            seed=seed,
            load=LASTING_LOAD,
            rush=1.0,
            first=world.tally.arrived,
        )
        world.expect(more, after=begin)
        await world.play(begin + horizon)


# ------------------------------------------------------------------------------------------------------- afterwards


@dataclass(frozen=True, slots=True)
class Side:
    """One column of the table: what came of the arrivals under one way to place them."""

    arrived: int
    placed: int
    pending: int
    means: Mapping[str, float]
    at_end: Use


@dataclass(frozen=True, slots=True)
class Result:
    """Everything the table says, as it goes into demo.json."""

    seed: int
    nodes: int
    gpus: int
    simulated_seconds: float
    tangram: Side
    first_fit: Side
    pending: tuple[Waiting, ...]
    latency_milliseconds: Mapping[str, Mapping[str, float]]
    cycles: int
    failures: Mapping[str, int]
    wrong: tuple[str, ...]


async def _result(
    world: World, coming: Sequence[Arrival], reports: Sequence[NodeReport], horizon: float, options: Options
) -> Result:
    pods = (await world.get("/v1/pods"))["pods"]
    world.wrong.extend(_differences(world, pods))
    tally, first_fit_waits = run_first_fit(reports, coming, seconds=horizon)
    return Result(
        seed=options.seed,
        nodes=len(reports),
        gpus=sum(len(said.gpus) for said in reports),
        simulated_seconds=horizon,
        tangram=_side(world.tally, len(world.queue)),
        first_fit=_side(tally, len(first_fit_waits)),
        pending=tuple(waiting([pod for pod in pods if pod["uid"] in world.queue])),
        latency_milliseconds={
            verb: {"p50": _milliseconds(s, 50), "p99": _milliseconds(s, 99), "calls": float(len(s))}
            for verb, s in world.extender.seconds.items()
            if s
        },
        cycles=world.cycles,
        failures=dict(world.failures),
        wrong=tuple(world.wrong),
    )


def _differences(world: World, pods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the service's last word on who holds what differs from what the demo saw happen."""
    says = {pod["uid"]: pod for pod in pods if pod["phase"] in ("held", "assumed")}
    found = [
        f"{world.specs[uid].name} runs, and the service does not hold its devices" for uid in world.held - set(says)
    ]
    found += [f"the service holds devices for {says[uid]['name']}, which is gone" for uid in set(says) - world.held]
    seen: dict[str, str] = {}
    for uid in sorted(set(says) & world.held):
        for device in says[uid]["devices"]:
            if device in seen:
                found.append(f"{device} is held by {seen[device]} and {uid}")
            seen[device] = uid
    return found


def _side(tally: Tally, pending: int) -> Side:
    return Side(tally.arrived, tally.placed, pending, tally.means(), tally.last)


def _show(result: Result, console: Console) -> None:
    console.print(_comparison(result))
    if result.pending:
        console.print(_pending(result))
    console.print(_latency(result))
    refused = sum(count for words, count in result.failures.items() if words.startswith("bind: "))
    if refused:
        console.print(
            f"{refused} binds were refused, because another pod's bind came first, and tried again.", highlight=False
        )
    for words, count in result.failures.items():
        if not words.startswith("bind: "):
            console.print(f"[yellow]{count} × {escape(words)}[/]", highlight=False)
    for words in result.wrong[:10]:
        console.print(f"[red]WRONG: {escape(words)}[/]", highlight=False)
    if not result.wrong:
        console.print(
            f"[green]Checked apart from the solver:[/] {result.tangram.placed} placements, each what was asked for, "
            "at a legal place, and nobody else's.",
            highlight=False,
        )


MEASURES = (
    ("Whole GPUs held, mean", "gpus_held"),
    ("MIG units held, mean", "units_held"),
    ("Free GPUs lost to the average ask", "gpus_lost"),
    ("Free GPUs lost to the largest ask", "gpus_stranded"),
    ("Free MIG units lost to the average ask", "units_lost"),
    ("Free MIG units lost to the largest ask", "units_stranded"),
)


def _comparison(result: Result) -> Table:
    table = Table(
        title=f"{result.tangram.arrived} pods on {result.nodes} nodes, {result.gpus} GPUs, "
        f"{result.simulated_seconds / 60:.0f} simulated minutes (seed {result.seed})",
        title_justify="left",
        caption="Means are over time, after the first third. A free GPU is lost to an ask for n where its node has "
        "fewer than n free, a free MIG unit to a profile that has no place left on its board; the average ask is the "
        "mean over asks as often as they are made, the largest are 8 GPUs (or the node) and 7g.",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("Tangram", justify="right", style="bold")
    table.add_column("first-fit", justify="right")
    sides = (result.tangram, result.first_fit)
    table.add_row("Pods placed", *(f"{s.placed} of {s.arrived}" for s in sides))
    table.add_row("Pods pending at the end", *(str(s.pending) for s in sides))
    table.add_row("Pods waiting, mean", *(f"{s.means.get('waiting', 0.0):.1f}" for s in sides))
    for title, key in MEASURES:
        table.add_row(title, *(f"{100 * s.means.get(key, 0.0):.1f} %" for s in sides))
    return table


def _pending(result: Result) -> Table:
    table = Table(title="Pending at the end, and why", title_justify="left")
    table.add_column("Pods", justify="right")
    table.add_column("Ask")
    table.add_column("Reason")
    for group in result.pending[:12]:
        table.add_row(str(group.pods), Text(group.asks), Text(group.reason))
    return table


def _latency(result: Result) -> Table:
    table = Table(title="Decisions, as kube-scheduler would see them", title_justify="left")
    table.add_column("Verb")
    for title in ("Calls", "p50", "p99"):
        table.add_column(title, justify="right")
    for verb, figures in result.latency_milliseconds.items():
        table.add_row(verb, f"{figures['calls']:.0f}", f"{figures['p50']} ms", f"{figures['p99']} ms")
    return table


def _write(result: Result, path: Path, console: Console) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n")
    console.print(f"Written to {path}", highlight=False)


def _milliseconds(seconds: Sequence[float], percent: int) -> float:
    if not seconds:
        return 0.0
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 2)


def _percent(part: int, of: int) -> str:
    return f"{100 * part / of:.0f} %" if of else "–"
