"""One changed node on a fleet of 5,000, with 50 kinds of demand known: the work that it makes, step by step.

    python -m tests.bench.changed [--json FILE] [--nodes 5000] [--changes 400] [--quick] [--profile 8xA100-mig]

A change is a pod that comes to a random node or leaves it, so that states vary as they would. For each kind of node

    solver   Ranking.put, settle (the prices of all kinds of demand), and prices for one demand and then for all
    app      the ledger is told (assume and confirm, or release), Offers.refresh, then what fits each kind of demand
    report   the node's agent sends a full report with other free memory: Service.report, and the same again

The target is for all of it together: until every kind of demand could be answered again. Value tables are solved first,
as the service's planner does. Most changes lead to states that other nodes are in already, whose prices are copied;
those that do not are told apart (`new state`), since a node that is alone of its kind has only those. `--profile` says
where the time of one kind of node goes.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.main import build
from app.offers import legal
from app.plan_files import with_tables
from app.report import NodeReport
from app.service import Service
from app.settings import Settings
from app.simulate import report_of
from app.translate import PodRef
from solver import DEFAULT_POLICY, Demand, Node, Placement, Policy, Ranking, Refusal, quote
from solver.cluster import Allocation
from solver.demand import Terms
from solver.goals import allocation_of
from solver.samples import sample_node
from solver.steps import read
from tests.bench.figures import Spread, Target, show_targets, spread, write
from tests.bench.machine import machine, words

KINDS = ("8xH100", "8xA100-mig", "8xH100-mig", "8xL40S", "8xA100-mig4")
"""Whole GPUs, MIG of two geometries, a board for shares, and one that is half cut."""

TARGET_MS = 1.0

SHARES_GIB = (4, 5, 8, 10, 12, 16, 20, 24, 30, 40)
SHARES_MILLI = (100, 200, 250, 300, 330, 500, 600, 750)
PROFILES = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
MODELS = ("A100", "H100", "L40S")


def demands() -> list[Demand]:
    """Fifty kinds: whole GPUs with and without a model, slices alone and in pairs, shares in GiB and in thousandths."""
    whole = [Demand.of(count) for count in (1, 2, 3, 4, 5, 6, 7, 8)]
    models = [Demand(gpus=count, terms=Terms(products=(model,))) for model in MODELS for count in (1, 2, 4, 8)]
    slices = [Demand.of(**{profile: count}) for count in (1, 2) for profile in PROFILES]
    shares = [Demand(share_mib=1024 * gib) for gib in SHARES_GIB] + [Demand(share_milli=n) for n in SHARES_MILLI]
    return [*whole, *models, *slices, *shares]


COMING = {
    "8xH100": [Demand.of(count) for count in (1, 1, 1, 2, 2, 4)],
    "8xL40S": [*(Demand(share_mib=1024 * gib) for gib in (4, 8, 10, 16, 24)), Demand.of(1), Demand.of(2)],
}
"""What the pods ask for on a kind of node; on all others slices."""

SLICES = [Demand.of(**{profile: 1}) for profile in ("1g.10gb", "1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb")]

HELD_AT_FIRST = 3


def coming_to(kind: str) -> list[Demand]:
    """What its pods ask for."""
    if kind.endswith("-mig4"):
        return [*SLICES, Demand.of(1), Demand.of(2)]
    return COMING.get(kind, SLICES)


@dataclass(slots=True)
class Steps:
    """Nanoseconds of each step of every change."""

    took: dict[str, list[int]] = field(default_factory=dict)

    def add(self, *steps: tuple[str, int], new: bool = False) -> None:
        """One change: its steps in order, and their sum as `all`; once more by itself for a state that is new."""
        total = sum(took for _, took in steps)
        for name, nanoseconds in (*steps, ("all", total), *((("new state", total),) if new else ())):
            self.took.setdefault(name, []).append(nanoseconds)


def timed(act: Callable[[], Any]) -> int:
    """Nanoseconds that it takes."""
    began = time.perf_counter_ns()
    act()
    return time.perf_counter_ns() - began


# --- the solver alone ---


class Fleet:
    """Nodes, what is taken on them, and the ranking that knows it."""

    def __init__(self, nodes: Sequence[Node], kinds: dict[str, str], policy: Policy, known: Sequence[Demand]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.kinds = kinds
        self.known = known
        self.ranking = Ranking(policy)
        self._policy = policy
        self._rng = random.Random(5)
        self.taken: dict[str, list[Allocation]] = {name: [] for name in self.nodes}
        for node in nodes:
            for _ in range(self._rng.randint(0, HELD_AT_FIRST)):
                self.come(node.name)
            self.ranking.put(node, self.taken[node.name])
        for demand in known:
            self.ranking.prices(demand)

    def come(self, name: str) -> bool:
        """A pod comes to the node if there is room."""
        demand = self._rng.choice(coming_to(self.kinds[name]))
        placed = quote(self.nodes[name], self.taken[name], demand, self._policy)
        if placed is not None:
            self.taken[name].append(allocation_of(demand, placed))
        return placed is not None

    def change(self, name: str) -> None:
        """A pod comes or leaves."""
        held = self.taken[name]
        if len(held) > self._rng.randint(0, 2 * HELD_AT_FIRST) or not self.come(name):
            held.pop(self._rng.randrange(len(held)))

    def measure(self, changed: Sequence[str]) -> Steps:
        """Change these nodes one after another."""
        steps = Steps()
        ranking, last = self.ranking, self.known[-1]
        states = {read(node, self.taken[name]).state for name, node in self.nodes.items()}
        for name in changed:
            self.change(name)
            node, taken = self.nodes[name], self.taken[name]
            took = (
                ("put", timed(lambda node=node, taken=taken: ranking.put(node, taken))),  # type: ignore[misc]
                ("settle", timed(lambda: ranking.settle(0))),
                ("ask one", timed(lambda: ranking.prices(last))),
                ("ask the others", timed(lambda: [ranking.prices(demand) for demand in self.known[:-1]])),
            )
            state = read(node, taken).state  # only now: it is remembered, and would be found again by put
            steps.add(*took, new=state not in states)
            states.add(state)
        return steps


# --- the service's dictionaries ---


class Shell:
    """The service's objects without its listeners and loops, and pods that come and go in its ledger."""

    def __init__(
        self, reports: Sequence[NodeReport], kinds: dict[str, str], policy: Policy, known: Sequence[Demand]
    ) -> None:
        settings = Settings(standalone=True, planning=False)
        self.service: Service = build(settings, kube=None)
        self.kinds = kinds
        self.known = known
        self.reports = {report.node: report for report in reports}
        self._rng = random.Random(6)
        self._uids: dict[str, list[str]] = {name: [] for name in self.reports}
        self._pods = 0
        for report in reports:
            self.service.report(report, lasting=True)
        self.offers = self.service.offers
        self.offers.renew(policy)
        self.refresh()
        while self.offers.settle():
            pass
        for report in reports:
            for _ in range(self._rng.randint(0, HELD_AT_FIRST)):
                self.come(report.node)
        self.refresh()
        self.ask(self.known)

    def refresh(self) -> None:
        """Bring the rows up to date."""
        self.offers.refresh(now=self.service.clock())

    def ask(self, known: Sequence[Demand]) -> None:
        """What filter asks for, for each."""
        for demand in known:
            self.offers.prices(demand, lambda: True)

    def placement(self, name: str) -> tuple[Demand, Placement] | None:
        """Where a new pod would go on this node."""
        demand = self._rng.choice(coming_to(self.kinds[name]))
        best = self.offers.best(demand, name, uid="")
        return None if isinstance(best, Refusal) else (demand, best)

    def come(self, name: str) -> None:
        """A pod that is held, if there is room."""
        found = self.placement(name)
        if found is not None:
            self.assume(name, *found)
            self.refresh()

    def assume(self, name: str, demand: Demand, placement: Placement) -> None:
        """As a bind does, and its confirmation."""
        self._pods += 1
        pod = PodRef(f"uid-{self._pods}", "default", f"pod-{self._pods}")
        now = self.service.clock()
        check = legal(self.offers.view(name)[0])
        refused = self.service.ledger.assume(pod, demand, placement, now=now, legal=check)
        assert refused is None, refused
        self.service.ledger.confirm(pod.uid, now=now)
        self._uids[name].append(pod.uid)

    def measure(self, changed: Sequence[str]) -> Steps:
        """A pod comes to each of these nodes, or leaves it."""
        steps = Steps()
        for name in changed:
            held = self._uids[name]
            found = self.placement(name) if len(held) <= self._rng.randint(0, 2 * HELD_AT_FIRST) else None
            if found is not None:
                told = timed(lambda name=name, found=found: self.assume(name, *found))  # type: ignore[misc]
            elif held:
                uid = held.pop(self._rng.randrange(len(held)))
                told = timed(lambda uid=uid: self.service.ledger.release(uid))  # type: ignore[misc]
            else:
                continue
            self._rest(steps, ("ledger", told))
        return steps

    def measure_reports(self, changed: Sequence[str]) -> Steps:
        """The agent of each of these nodes has something new to say."""
        steps = Steps()
        for name in changed:
            said = self.reports[name]
            gpu = said.gpus[0].model_copy(update={"free_mib": 256 * self._rng.randint(1, 100)})
            said = said.model_copy(update={"version": said.version + 1, "gpus": (gpu, *said.gpus[1:])})
            self.reports[name] = said
            told = timed(lambda said=said: self.service.report(said, lasting=True))  # type: ignore[misc]
            self._rest(steps, ("report", told))
        return steps

    def _rest(self, steps: Steps, told: tuple[str, int]) -> None:
        """After the service has been told: until all kinds of demand could be answered."""
        steps.add(
            told,
            ("refresh", timed(self.refresh)),
            ("ask one", timed(lambda: self.ask(self.known[-1:]))),
            ("ask the others", timed(lambda: self.ask(self.known[:-1]))),
        )


# --- the run ---


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of node, one layer, one step."""

    layer: str
    kind: str
    step: str
    took: Spread


def fleet_of(nodes: int) -> tuple[list[Node], dict[str, str]]:
    """As many of each kind, and the kind by name."""
    made = [(f"node-{i:05d}", KINDS[i % len(KINDS)]) for i in range(nodes)]
    return [sample_node(name, kind) for name, kind in made], dict(made)


def run(options: argparse.Namespace, console: Console) -> list[Row]:
    """All layers and kinds."""
    nodes, kinds = fleet_of(options.nodes)
    known = demands()
    console.print(f"{len(nodes)} nodes of {len(KINDS)} kinds, {len(known)} kinds of demand: {words(machine())}")
    policy = with_tables(DEFAULT_POLICY, nodes)
    rows: list[Row] = []
    rng = random.Random(7)
    fleet = Fleet(nodes, kinds, policy, known)
    for kind in KINDS:
        steps = measured(fleet.measure, rng.choices([n for n, k in kinds.items() if k == kind], k=options.changes))
        rows += _rows("solver", kind, steps)
    del fleet
    shell = Shell([report_of(node) for node in nodes], kinds, policy, known)
    for layer, measure in (("app", shell.measure), ("report", shell.measure_reports)):
        for kind in KINDS:
            names = rng.choices([n for n, k in kinds.items() if k == kind], k=options.changes)
            rows += _rows(layer, kind, measured(measure, names))
    return rows


def measured(measure: Callable[[Sequence[str]], Steps], names: Sequence[str]) -> Steps:
    """Without full garbage collections, which the service makes in small pieces of its own."""
    gc.collect()
    gc.freeze()
    try:
        return measure(names)
    finally:
        gc.unfreeze()


def _rows(layer: str, kind: str, steps: Steps) -> Iterator[Row]:
    for step, took in steps.took.items():
        yield Row(layer, kind, step, spread(took))


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """All the work of a change, in the middle, by layer and kind of node."""
    targets = []
    for row in rows:
        if row.step in ("all", "new state"):
            new = row.step == "new state"
            what = f"one changed node, {row.layer}, {row.kind}{', a state that no node was in' if new else ''}"
            note = f"p99 {row.took.p99:.2f} ms of {row.took.count} changes"
            key = f"changed.{row.layer}.{row.kind}{'.new' if new else ''}"
            targets.append(Target(key, what, TARGET_MS, row.took.p50, "ms", note=note))
    return targets


def show(rows: Sequence[Row], console: Console) -> None:
    """Every step."""
    table = Table(title="One changed node: milliseconds by step", title_justify="left")
    for title in ("Layer", "Node", "Step"):
        table.add_column(title)
    for title in ("Changes", "p50", "p90", "p99", "max"):
        table.add_column(title, justify="right")
    for row, after in zip(rows, (*rows[1:], None), strict=True):
        took, last = row.took, after is None or (after.layer, after.kind) != (row.layer, row.kind)
        times = [f"{value:.3f}" for value in (took.p50, took.p90, took.p99, took.max)]
        table.add_row(row.layer, row.kind, row.step, str(took.count), *times, end_section=last)
    console.print(table)


def profile(options: argparse.Namespace, console: Console) -> None:
    """Where the time of one kind of node goes."""
    nodes, kinds = fleet_of(options.nodes)
    fleet = Fleet(nodes, kinds, with_tables(DEFAULT_POLICY, nodes), demands())
    names = random.Random(7).choices([n for n, k in kinds.items() if k == options.profile], k=options.changes)
    profiler = cProfile.Profile()
    profiler.enable()
    fleet.measure(names)
    profiler.disable()
    console.print(f"{options.changes} changes of {options.profile}, the solver alone, with the profiler's own cost")
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(35)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.changed", description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--changes", type=int, default=400, help="of each kind of node, in each layer")
    parser.add_argument("--quick", action="store_true", help="100 changes")
    parser.add_argument("--profile", choices=KINDS, help="say where the time goes, and nothing else")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(argv)
    if options.quick:
        options.changes = 100
    console = Console(width=160) if not sys.stdout.isatty() else Console()
    if options.profile:
        profile(options, console)
        return 0
    about = machine()
    rows = run(options, console)
    targets = targets_of(rows)
    show(rows, console)
    show_targets(targets, console, "One changed node")
    if options.json is not None:
        write(options.json, {"machine": about, "nodes": options.nodes, "rows": [asdict(row) for row in rows]}, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
