"""filter and prioritize over HTTP, beside an echo of the very same bytes: what Tangram adds to being asked at all.

    python -m tests.bench.verbs [--json FILE] [--quick] [--nodes 5000,500] [--most-nodes 0,default] [--seconds 8]
                                [--skip-load] [--asks "1 GPU,1g.10gb"]
    python -m tests.bench.verbs --nodes 5000 --most-nodes 0 --skip-load --seconds 4      while changing the hot path

One client on loopback keeps its connection and asks one thing at a time, as kube-scheduler does, of

    the service   `tangram serve --nodes`, a process of its own with its planner, on a half-full fleet (`world`)
    the echo      the same server (uvicorn, httptools, uvloop), which parses the request with the same parser and
                  answers with the reply that the service has just given to it (`echo`)

They take turns, a block of a few requests each, so that whatever else the machine does hits both, and before each
request to either the client makes its body, so that neither finds warmer caches. For each pod, filter names all nodes
in a random order (kube-scheduler's parallel filters leave them so), or 500 of them at random; then prioritize names
what filter left, or, where filter returns all that fit (`--most-nodes 0`), again everything, since that is what must
be shown. The pod is new each time and deleted afterwards, outside the clock; what a kind of demand needs has been asked
before ("warm").

Then the same once more while another process drives the service at full rate (`driver`): every node reports each 10 s,
pods are bound and end as fast as kube-scheduler could. The echo is not driven: its own tail in the same minutes is what
the machine alone does. On few cores these processes share them; the driver says whether it kept its rate.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from app.driver import args_body, pod_object
from tests.bench.client import Client
from tests.bench.figures import Spread, Target, show_targets, spread, write
from tests.bench.machine import machine, resident_mib, words
from tests.bench.world import (
    ASKS,
    Server,
    echo,
    end_with_parent,
    fill,
    knows_most_nodes,
    new_pod,
    reports_of,
    service,
    write_inventory,
)

SUBSET = 500
"""Of larger fleets also so many names are asked, as where kube-scheduler samples."""

BLOCK = 10
"""Pods of one turn, a twentieth of a second or so. In turns of one pod the echo finds its caches cold as well and the
ratios are better by a fifth (tried): long turns are the stricter measure."""

WARM = 3
"""Pods of each kind before the clock starts."""

RATIO, TAIL = 1.5, 3.0
"""The targets: p50 against the echo, and p99 against the service's own p50 under load."""

REPORT_SECONDS = 10.0
"""Every node reports once in this time."""

POD_RATES = ((1000, 60.0), (0, 200.0))
"""On so many nodes and more, pods a second: what kube-scheduler manages there at best."""

VERBS = ("filter", "prioritize")


@dataclass(frozen=True, slots=True)
class Row:
    """One verb, so many names, all kinds of demand together; `worst` is the kind with the highest ratio."""

    nodes: int
    names: int
    most_nodes: str
    load: bool
    verb: str
    names_sent: float
    reply_bytes: float
    tangram: Spread
    echo: Spread
    ratio: float
    worst: str
    worst_ratio: float
    by_ask: dict[str, tuple[Spread, Spread]]


@dataclass(slots=True)
class Times:
    """What was measured of one verb: nanoseconds by kind of demand, of the service and of the echo."""

    tangram: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    echo: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    names_sent: int = 0
    reply_bytes: int = 0
    count: int = 0


@dataclass(frozen=True, slots=True)
class Asked:
    """A request and the reply that the service gave."""

    verb: str
    ask: str
    pod: dict[str, Any]
    names: list[str]
    reply: bytes


class Bench:
    """One client with a connection to each; `most_nodes` is how many nodes filter returns, 0 for all."""

    def __init__(
        self, tangram: Server, echoing: Server, nodes: Sequence[str], *, all_names: bool, seed: int = 2
    ) -> None:
        self._tangram, self._echo = Client(tangram.port), Client(echoing.port)
        self._nodes = list(nodes)
        self._all_names = all_names
        self._rng = random.Random(seed)

    def measure(self, names: int, asks: Sequence[str], seconds: float) -> dict[str, Times]:
        """Blocks of pods in turns until the time is over, every kind equally often."""
        for ask in asks:
            for _ in range(WARM):
                self._turn(names, [ask], {verb: Times() for verb in VERBS})
        times = {verb: Times() for verb in VERBS}
        queue: list[str] = []
        until = time.monotonic() + seconds
        gc.disable()  # our own pauses are nobody's
        while time.monotonic() < until:
            while len(queue) < BLOCK:
                queue += self._rng.sample(asks, len(asks))
            self._turn(names, queue[:BLOCK], times)
            del queue[:BLOCK]
            gc.collect(0)
        gc.enable()
        return times

    def _turn(self, names: int, asks: Sequence[str], times: dict[str, Times]) -> None:
        """A block of the service's, then the same of the echo's."""
        asked = [each for ask in asks for each in self._pod(names, ask, times)]
        for each in asked:
            self._echo.ask("PUT", "/", each.reply)
        for each in asked:
            self._echo.post(f"/{each.verb}", args_body(each.pod, each.names))
            times[each.verb].echo[each.ask].append(self._echo.nanoseconds)

    def _pod(self, names: int, ask: str, times: dict[str, Times]) -> Iterator[Asked]:
        """One pod's filter and prioritize."""
        pod = new_pod(self._rng, ask)
        said = pod_object(pod)
        left = self._rng.sample(self._nodes, names)
        for verb in VERBS:
            reply = self._tangram.post(f"/{verb}", args_body(said, left))
            each = times[verb]
            each.tangram[ask].append(self._tangram.nanoseconds)
            each.names_sent += len(left)
            each.reply_bytes += len(reply)
            each.count += 1
            yield Asked(verb, ask, said, left, reply)
            if verb == "filter":
                fitting = orjson.loads(reply)["NodeNames"]
                if not fitting:
                    break
                left = left if self._all_names else fitting
        self._tangram.ask("DELETE", f"/v1/pods/{pod.uid}")

    def close(self) -> None:
        """Close the connections."""
        self._tangram.close()
        self._echo.close()


def rows_of(times: dict[str, Times], *, nodes: int, names: int, most_nodes: str, load: bool) -> Iterator[Row]:
    """A row for each verb."""
    for verb, each in times.items():
        by_ask = {ask: (spread(each.tangram[ask]), spread(each.echo[ask])) for ask in each.tangram}
        ratios = {ask: mine.p50 / other.p50 for ask, (mine, other) in by_ask.items() if other.p50}
        if not ratios:
            continue
        tangram = spread([took for some in each.tangram.values() for took in some])
        echoed = spread([took for some in each.echo.values() for took in some])
        worst = max(ratios, key=lambda ask: ratios[ask])
        yield Row(
            nodes,
            names,
            most_nodes,
            load,
            verb,
            round(each.names_sent / each.count, 1),
            round(each.reply_bytes / each.count, 1),
            tangram,
            echoed,
            round(tangram.p50 / echoed.p50, 3),
            worst,
            round(ratios[worst], 3),
            by_ask,
        )


# --- the run ---


@dataclass(slots=True)
class Found:
    """All rows, and what the drivers did."""

    rows: list[Row] = field(default_factory=list)
    fleets: list[dict[str, Any]] = field(default_factory=list)


def run(options: argparse.Namespace, console: Console) -> Found:
    """Every fleet, with every number of nodes that filter returns."""
    found = Found()
    with tempfile.TemporaryDirectory(prefix="tangram-bench-") as folder, echo(log=Path(folder) / "echo.log") as echoing:
        for nodes in options.nodes:
            inventory = Path(folder) / f"{nodes}.json"
            reports = reports_of(nodes)
            write_inventory(reports, inventory)
            names = [report.node for report in reports]
            for most in options.most_nodes:
                log = Path(folder) / f"service-{nodes}-{most}.log"
                with service(inventory, log=log, most_nodes=None if most == "default" else int(most)) as tangram:
                    _one_service(found, tangram, echoing, names, inventory, most, options, console)
    return found


def _one_service(
    found: Found,
    tangram: Server,
    echoing: Server,
    names: list[str],
    inventory: Path,
    most: str,
    options: argparse.Namespace,
    console: Console,
) -> None:
    filler = Client(tangram.port)
    held = fill(filler, names)
    filler.close()
    console.print(f"{len(names)} nodes, {held} pods held, filter returns {_returns(most)}: {words(machine())}")
    fleet: dict[str, Any] = {"nodes": len(names), "held": held, "most_nodes": most}
    bench = Bench(tangram, echoing, names, all_names=most == "0")
    counts = [len(names), SUBSET] if len(names) > SUBSET else [len(names)]
    try:
        for load in (False,) if options.skip_load else (False, True):
            with contextlib.ExitStack() as stack:
                driver = stack.enter_context(driven(tangram, inventory, len(names))) if load else {}
                for count in counts:
                    times = bench.measure(count, options.asks, options.seconds)
                    found.rows += rows_of(times, nodes=len(names), names=count, most_nodes=most, load=load)
            if load:
                fleet["driver"] = driver
                console.print(f"driven by {_driver_words(driver)}")
    finally:
        bench.close()
    fleet["service_mib"] = round(resident_mib(tangram.pid, peak=True), 1)
    found.fleets.append(fleet)


@contextlib.contextmanager
def driven(tangram: Server, inventory: Path, nodes: int) -> Iterator[dict[str, Any]]:
    """The service under load within the block; what the driver did is in the dictionary afterwards."""
    reports = nodes / REPORT_SECONDS
    pods = next(rate for least, rate in POD_RATES if nodes >= least)
    changes = min(2 * pods, reports / 2)  # each pod's start and end shows on its node
    rates = {"reports": reports - changes, "changes": changes, "pods": pods}
    asked = [part for name, rate in rates.items() for part in (f"--{name}", str(rate))]
    command = [sys.executable, "-m", "tests.bench.driver", "--port", str(tangram.port), "--inventory", str(inventory)]
    did: dict[str, Any] = {"rates": rates}
    with subprocess.Popen([*command, *asked], stdout=subprocess.PIPE, preexec_fn=end_with_parent) as driver:
        try:
            time.sleep(3)  # until it has read the fleet
            yield did
        finally:
            driver.send_signal(signal.SIGTERM)
            said, _ = driver.communicate(timeout=30)
            did.update(json.loads(said or b"{}"))


def _driver_words(did: dict[str, Any]) -> str:
    """Whether it kept its rates."""
    if not did.get("seconds"):
        return "nobody: the driver failed"
    kept = ", ".join(
        f"{did[done] / did['seconds']:.0f} {name}/s of {did['rates'][name]:.0f}"
        for name, done in (("reports", "reports"), ("changes", "changes"), ("pods", "bound"))
    )
    return f"{kept}; {did['refused']} pods found no room, {did['failed']} calls failed, {did['dropped']} left out"


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """Every row beside what it may be."""
    targets = []
    for row in rows:
        what = f"{row.verb}, {row.names:,} names of {row.nodes:,} nodes, {_returns(row.most_nodes)} returned"
        key = f"verbs.{row.verb}.{row.names}of{row.nodes}.most-{row.most_nodes}"
        ours, echoed = row.tangram, row.echo
        times = f"p50 {ours.p50:.2f} ms, p99 {ours.p99:.2f}; the echo's {echoed.p50:.2f}, {echoed.p99:.2f}"
        if row.load:
            note = f"{times}: {row.echo.tail:.1f}× without being driven"
            targets.append(Target(f"{key}.tail", f"{what}: p99 / p50 under load", TAIL, row.tangram.tail, note=note))
        else:
            note = f"{times}; worst {row.worst}: {row.worst_ratio:.2f}×"
            targets.append(Target(key, f"{what}: p50 / echo", RATIO, row.ratio, ratio=True, note=note))
    return targets


def _returns(most: str) -> str:
    return "all" if most == "0" else "the default" if most == "default" else f"at most {most}"


def show(rows: Sequence[Row], console: Console) -> None:
    """Times in milliseconds."""
    table = Table(title="Milliseconds: the service, and the echo of the same bytes", title_justify="left")
    for title in ("Verb", "Nodes", "Names", "Returned", "Load"):
        table.add_column(title)
    for title in (
        "Sent",
        "Reply B",
        "p50",
        "p90",
        "p99",
        "max",
        "echo p50",
        "p90",
        "p99",
        "max",
        "p50 ratio",
        "p99/p50",
    ):
        table.add_column(title, justify="right")
    for row in rows:
        times = [
            f"{value:.2f}" for each in (row.tangram, row.echo) for value in (each.p50, each.p90, each.p99, each.max)
        ]
        table.add_row(
            row.verb,
            f"{row.nodes}",
            f"{row.names}",
            _returns(row.most_nodes),
            "full" if row.load else "none",
            f"{row.names_sent:.0f}",
            f"{row.reply_bytes:.0f}",
            *times,
            f"{row.ratio:.2f}×",
            f"{row.tangram.tail:.1f}×",
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.verbs", description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=_numbers, default=[5000, 500], help="fleets, by their nodes")
    parser.add_argument("--most-nodes", type=_words, default=["0", "default"], help="0: filter returns all that fit")
    parser.add_argument("--asks", type=_words, default=list(ASKS), help="kinds of demand, of: " + ", ".join(ASKS))
    parser.add_argument("--seconds", type=float, default=8.0, help="for each number of names, without load and with")
    parser.add_argument("--skip-load", action="store_true", help="only on a quiet service")
    parser.add_argument("--quick", action="store_true", help="2 s each")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(argv)
    if options.quick:
        options.seconds = 2.0
    console = Console(width=200) if not sys.stdout.isatty() else Console()
    if not knows_most_nodes() and options.most_nodes != ["0"]:
        console.print("this Tangram has no --most-nodes: filter returns all nodes that fit")
        options.most_nodes = ["0"]
    about = machine()
    found = run(options, console)
    targets = targets_of(found.rows)
    show(found.rows, console)
    show_targets(targets, console, "filter and prioritize")
    if options.json is not None:
        write(
            options.json,
            {"machine": about, "rows": [asdict(row) for row in found.rows], "fleets": found.fleets},
            targets,
        )
    return 0


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


if __name__ == "__main__":
    sys.exit(main())
