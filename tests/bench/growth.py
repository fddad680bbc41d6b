"""What grows with what: latency and memory against nodes, pods held, kinds of demand and different states.

    python -m tests.bench.growth [--json FILE] [--only nodes,pods] [--most-nodes N] [--seconds 2] [--quick]

Each point is two processes of their own, which are asked the same: the service over HTTP, whose memory is taken (less
that of a service with one node, no pods, one kind of demand, one state), and the service's application called directly
in a child of this module, so without a server, sockets or a second process. filter names every node, prioritize what
filter left.

    nodes    the half-full fleet of the bench, of 100 to 20,000 nodes, every kind of demand
    pods     2,000 nodes of eight GPUs, on which up to 15,000 pods hold one each
    demands  2,000 nodes; up to 900 kinds of demand are known (shares of 1, 2, ... thousandths) and asked for in turn
    states   2,000 nodes; the shares that they hold make up to 900 different states of them

Planning is off, since its process is not what is measured. Each line gets a power law, fitted on logarithms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from app.driver import PodSpec, args_body, binding_body, pod_object
from app.main import build
from app.report import NodeReport
from app.settings import Settings
from app.simulate import report_of
from app.verbs import Verbs
from solver.samples import sample_node
from tests.bench.client import Client
from tests.bench.figures import Spread, spread
from tests.bench.fits import Growth, Panel, growth, plot
from tests.bench.machine import machine, resident_mib, words
from tests.bench.world import ASKS, GPU, Asker, end_with_parent, fill, new_pod, reports_of, service, write_inventory

OUT = Path("out/bench/growth.json")
PLOT = Path("docs/bench/growth.png")

SHARE_MILLI = "tangram.gpu/share-milli"

NODES = 2000
POINTS = {
    "nodes": (100, 300, 1000, 3000, 10_000, 20_000),
    "pods": (500, 1000, 2000, 4000, 8000, 15_000),
    "demands": (4, 16, 64, 256, 900),
    "states": (4, 16, 64, 256, 900),
}
QUICK = {"nodes": (50, 100, 200), "pods": (50, 200, 800), "demands": (4, 16, 64), "states": (4, 16, 64)}
BASE = {"nodes": 1, "pods": 0, "demands": 1, "states": 1}
"""Memory is told as what a point takes more than this one of its axis."""

QUICK_NODES = 200

HELD_PER_NODE = 2
"""Tries of pods per node where pods are not what is varied: enough for states to vary, and filled within a minute."""

LEAST = 100
"""Requests of each verb, however long they take."""


class Inside:
    """The service's application in this process, called as the server would."""

    def __init__(self, reports: Sequence[NodeReport], most_nodes: int | None) -> None:
        settings = Settings(standalone=True, planning=False)
        if most_nodes is not None:
            settings = settings.model_copy(update={"most_nodes": most_nodes})
        self._service = build(settings, kube=None)
        for report in reports:
            self._service.report(report, lasting=True)
        self._verbs = Verbs(self._service)
        self._loop = asyncio.new_event_loop()
        self.nanoseconds = 0

    def post(self, path: str, body: bytes) -> bytes:
        """filter and prioritize never wait for anything; bind needs a loop."""
        replies: list[bytes] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            replies.append(message.get("body", b""))

        call = self._verbs({"type": "http", "method": "POST", "path": path, "headers": []}, receive, send)
        began = time.perf_counter_ns()
        if path == "/bind":
            self._loop.run_until_complete(call)
        else:
            _run_through(call)
        self.nanoseconds = time.perf_counter_ns() - began
        return b"".join(replies)

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """DELETE /v1/pods/UID."""
        self._service.release(path.rpartition("/")[2])
        return 200, b""


def _run_through(call: Coroutine[Any, Any, None]) -> None:
    """To its end. A verb may give others a turn now and then; nobody is here to take it, and it waits for nothing."""
    try:
        while call.send(None) is None:
            pass
    except StopIteration:
        return
    raise RuntimeError("a verb has waited for something")


# --- the worlds ---


@dataclass(frozen=True, slots=True)
class World:
    """A fleet, what is done to it first, and the pods that are asked about then, in turn."""

    reports: Sequence[NodeReport]
    prepare: Callable[[Asker], None]
    pods: Sequence[tuple[str, int]]


def world_of(axis: str, value: int, nodes: int) -> World:
    """The point's."""
    if axis == "nodes":
        reports = reports_of(value)
        names = [report.node for report in reports]
        return World(reports, lambda asker: _ignore(fill(asker, names, most=HELD_PER_NODE)), tuple(ASKS.values()))
    whole = [report_of(sample_node(f"node-{i:05d}", "8xH100")) for i in range(nodes)]
    names = [report.node for report in whole]
    if axis == "pods":
        held = [(names[i % nodes], (GPU, 1)) for i in range(value)]
        return World(whole, lambda asker: hold(asker, held), ((GPU, 1), (GPU, 2), (GPU, 4), (GPU, 8)))
    shares = tuple((SHARE_MILLI, milli) for milli in range(1, value + 1))
    if axis == "demands":
        held = [(name, (GPU, 1 + i % 4)) for i, name in enumerate(names)]
        return World(whole, lambda asker: hold(asker, held), shares)
    assert axis == "states", axis
    held = [(name, shares[i % value]) for i, name in enumerate(names)]
    return World(whole, lambda asker: hold(asker, held), ((GPU, 1), (GPU, 2), (GPU, 4), (GPU, 7)))


def _ignore(_: int) -> None:
    return


def hold(asker: Asker, wanted: Sequence[tuple[str, tuple[str, int]]]) -> None:
    """A pod on each of these nodes, with this."""
    rng = random.Random(4)
    for name, resource in wanted:
        pod = pod_that_asks(rng, resource)
        asker.post("/filter", args_body(pod_object(pod), [name]))
        reply = asker.post("/bind", binding_body(pod, name))
        assert reply == b'{"Error":""}', reply


def pod_that_asks(rng: random.Random, resource: tuple[str, int]) -> PodSpec:
    """Of any resource."""
    pod = new_pod(rng, "1 GPU")
    return PodSpec(name=pod.name, uid=pod.uid, resources=(resource,), token=pod.token)


# --- a point ---


@dataclass(frozen=True, slots=True)
class Point:
    """One value on one axis: times by way and verb, and the service's memory."""

    axis: str
    value: int
    nodes: int
    times: dict[str, Spread]
    memory_mib: float


def measured(asker: Asker, world: World, seconds: float) -> dict[str, Spread]:
    """Pods in turn, all known before, until the time is over."""
    rng = random.Random(9)
    names = [report.node for report in world.reports]
    took: dict[str, list[int]] = {"filter": [], "prioritize": []}
    for resource in world.pods:
        _one_pod(asker, pod_that_asks(rng, resource), names, took)
    for some in took.values():
        some.clear()
    until = time.monotonic() + seconds
    asked = 0
    while time.monotonic() < until or asked < LEAST:
        _one_pod(asker, pod_that_asks(rng, world.pods[asked % len(world.pods)]), rng.sample(names, len(names)), took)
        asked += 1
    return {verb: spread(some) for verb, some in took.items()}


def _one_pod(asker: Asker, pod: PodSpec, names: Sequence[str], took: Mapping[str, list[int]]) -> None:
    said = pod_object(pod)
    fitting = orjson.loads(asker.post("/filter", args_body(said, names)))["NodeNames"]
    took["filter"].append(asker.nanoseconds)
    if fitting:
        asker.post("/prioritize", args_body(said, fitting))
        took["prioritize"].append(asker.nanoseconds)
    asker.ask("DELETE", f"/v1/pods/{pod.uid}")


def point(axis: str, value: int, nodes: int, seconds: float, most_nodes: int | None) -> Point:
    """Both ways, one after the other."""
    world = world_of(axis, value, nodes)
    with tempfile.TemporaryDirectory(prefix="tangram-bench-") as folder:
        inventory = Path(folder) / "nodes.json"
        write_inventory(world.reports, inventory)
        with service(inventory, log=Path(folder) / "log", most_nodes=most_nodes, planning=False) as server:
            client = Client(server.port)
            world.prepare(client)
            over_http = measured(client, world, seconds)
            memory = resident_mib(server.pid)
            client.close()
    inside = Inside(world.reports, most_nodes)
    world.prepare(inside)
    in_process = measured(inside, world, seconds)
    times = {f"{verb}, HTTP": took for verb, took in over_http.items()}
    times |= {f"{verb}, in process": took for verb, took in in_process.items()}
    return Point(axis, value, len(world.reports), times, round(memory, 1))


def point_of(said: Mapping[str, Any]) -> Point:
    """From a child's JSON."""
    times = {name: Spread(**took) for name, took in said["times"].items()}
    return Point(said["axis"], said["value"], said["nodes"], times, said["memory_mib"])


# --- the run ---


def run(options: argparse.Namespace, console: Console) -> Iterator[Point]:
    """Every point in a process of its own, so that none inherits another's memory."""
    points = QUICK if options.quick else POINTS
    for axis in options.only:
        for value in (BASE[axis], *points[axis]):
            command = [sys.executable, "-m", "tests.bench.growth", "--point", f"{axis}={value}"]
            command += ["--seconds", str(options.seconds), "--of", str(QUICK_NODES if options.quick else NODES)]
            command += [] if options.most_nodes is None else ["--most-nodes", str(options.most_nodes)]
            began = time.monotonic()
            said = subprocess.run(
                command, stdout=subprocess.PIPE, check=True, timeout=900, preexec_fn=end_with_parent
            ).stdout
            found = point_of(json.loads(said))
            took = found.times["filter, HTTP"]
            spent = time.monotonic() - began
            console.print(f"{axis} {value:,}: filter {took.p50:.2f} ms, {found.memory_mib:.0f} MiB ({spent:.0f} s)")
            yield found


def lines_of(points: Sequence[Point]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What is drawn and fitted: by axis, the name of the line and its points; the first of each axis is its base."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    bases: dict[str, float] = {}
    for each in points:
        if each.axis not in bases:
            bases[each.axis] = each.memory_mib
            continue
        here = lines.setdefault(each.axis, {})
        for name, took in each.times.items():
            here.setdefault(f"{name}, p50", []).append((each.value, took.p50))
            here.setdefault(f"{name}, p99", []).append((each.value, took.p99))
        here.setdefault("memory, MiB", []).append((each.value, max(0.1, each.memory_mib - bases[each.axis])))
    return lines


def laws_of(lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> dict[str, dict[str, Growth | None]]:
    """A law for each."""
    return {axis: {name: growth(points) for name, points in by_name.items()} for axis, by_name in lines.items()}


def panels(lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> list[list[Panel]]:
    """The middle above, the slow ones below it, then memory."""
    said = {"nodes": "nodes", "pods": "pods held", "demands": "kinds of demand", "states": "different states"}
    middle: list[Panel] = []
    slow: list[Panel] = []
    memory: list[Panel] = []
    for axis, by_name in lines.items():
        for row, which in ((middle, "p50"), (slow, "p99")):
            times = {name.removesuffix(f", {which}"): points for name, points in by_name.items() if which in name}
            row.append(Panel(f"{which} against {said[axis]}", said[axis], "ms", times))
        memory.append(
            Panel(
                f"memory against {said[axis]}",
                said[axis],
                f"MiB more than at {BASE[axis]}",
                {"memory": by_name["memory, MiB"]},
            )
        )
    return [middle, slow, memory]


def show(points: Sequence[Point], laws: Mapping[str, Mapping[str, Growth | None]], console: Console) -> None:
    """Every point, and the laws."""
    table = Table(title="Milliseconds (p50 / p99) and MiB", title_justify="left")
    ways = list(points[0].times)
    for title in ("Against", "Value", "Nodes", *ways, "Memory"):
        table.add_column(title, justify="left" if title == "Against" else "right")
    for each in points:
        times = [f"{each.times[way].p50:.2f} / {each.times[way].p99:.2f}" for way in ways]
        table.add_row(each.axis, f"{each.value:,}", f"{each.nodes:,}", *times, f"{each.memory_mib:.0f}")
    console.print(table)
    for axis, by_name in laws.items():
        for name, law in by_name.items():
            if law is not None and "p99" not in name:
                console.print(f"{axis}: {name} grows as {law}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write, plot."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(POINTS), help=", ".join(POINTS))
    parser.add_argument("--most-nodes", type=int, help="as the service's option; not given: as shipped")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each point and way")
    parser.add_argument("--quick", action="store_true", help="few small points: tries the bench, measures nothing")
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--plot", type=Path, help=f"where the plot goes (default {PLOT}; with --quick beside the JSON)")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--of", type=int, default=NODES, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds = min(options.seconds, 0.5)
    if options.point:
        axis, _, value = options.point.partition("=")
        print(json.dumps(asdict(point(axis, int(value), options.of, options.seconds, options.most_nodes))))
        return 0
    console = Console(width=180) if not sys.stdout.isatty() else Console()
    about = machine()
    console.print(f"growth: {words(about)}")
    points = list(run(options, console))
    lines = lines_of(points)
    laws = laws_of(lines)
    show(points, laws, console)
    fitted = {axis: {n: law and asdict(law) for n, law in by_name.items()} for axis, by_name in laws.items()}
    found = {
        "machine": about,
        "most_nodes": options.most_nodes,
        "growth": fitted,
        "points": [asdict(each) for each in points],
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    where = options.plot or (options.json.with_suffix(".png") if options.quick else PLOT)
    console.print(f"written to {options.json} and {plot(panels(lines), where)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
