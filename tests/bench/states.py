"""How many different states the nodes of a fleet are in, over a week in which pods come and go.

    python -m tests.bench.states [--json FILE] [--openb FOLDER] [--nodes 100,1000,5000] [--days 7] [--only mig]

Everything that is remembered is remembered by state, so all speed rests on this number. Pods arrive at random (Poisson)
so that 0.9 of the fleet is asked for, are placed by Tangram's own ranking on its own devices, stay, and leave; what
does not fit is lost. The fleet is full from the start, with pods that have the rest of their stay before them. For

    whole   8 x H100, one to eight GPUs
    mig     8 x A100 in MIG mode, all six profiles alike (the uniform mix of app.replay.mig)
    mixed   the fleet of the bench: whole GPUs, shares of them, slices of two geometries
    openb   nodes and pods of the openb trace (with --openb): shares in thousandths, CPU and memory

stays are exponential, two days in the mean, but for openb, whose pods stay as they did there. Counted every two hours:
`states` of nodes by their devices alone, and `with_cpu` where CPU and memory are told apart to the last thousandth.
`parts` are what those states are made of: different states of one GPU in MIG mode, and of all the rest of a node.
`seen` are the states since the start, what a memory without end would hold; `new` is the part of the changes that led
to a state that no node was in.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.plan_files import with_tables
from app.replay.openb import demand_of, node_of
from app.replay.trace import GPU_MILLI, Pod, read_machines, read_pods
from app.simulate import GPU_ASKS
from solver import DEFAULT_POLICY, Demand, Node, Policy, Ranking
from solver.cluster import Allocation
from solver.goals import allocation_of
from solver.samples import sample_node
from solver.steps import RoomState, read
from tests.bench.fits import Panel, growth, plot
from tests.bench.machine import machine, words
from tests.bench.world import KINDS

OUT = Path("out/bench/states.json")
PLOT = Path("docs/bench/states.png")

LOAD = 0.9
HOUR = 3600.0
DAY = 24 * HOUR
COUNTED_EVERY = 2 * HOUR
MEAN_STAY = 2 * DAY

DRAWS = 8
"""Cheapest nodes that are tried for CPU and memory before all nodes are looked at."""

PROFILES = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")
SHARES = ((250, 4), (330, 2), (500, 4), (750, 1))
"""Thousandths of a GPU, and how often."""

OPENB_NODES, OPENB_PODS = "openb_node_list_gpu_node.csv", "openb_pod_list_default.csv"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a pod asks for, how much of a GPU that is, and how long it stays (0: exponential, MEAN_STAY in the mean)."""

    demand: Demand
    milli: int
    stay: float = 0.0


@dataclass(frozen=True, slots=True)
class Stream:
    """Pods of some kinds, each as often as its weight says, that ask for LOAD of these thousandths of GPUs."""

    kinds: tuple[Kind, ...]
    weights: tuple[float, ...]
    capacity_milli: int

    @property
    def held(self) -> float:
        """Thousandths times seconds that a pod takes in the mean."""
        pairs = zip(self.kinds, self.weights, strict=True)
        return sum(weight * kind.milli * (kind.stay or MEAN_STAY) for kind, weight in pairs) / sum(self.weights)

    @property
    def rate(self) -> float:
        """Pods a second."""
        return LOAD * self.capacity_milli / self.held


@dataclass(frozen=True, slots=True)
class Workload:
    """A fleet and what comes to it."""

    name: str
    nodes: tuple[Node, ...]
    streams: tuple[Stream, ...]


# --- the workloads ---


def whole(nodes: int) -> Workload:
    """Boards with NVSwitch and whole GPUs."""
    return _generated("whole", ["8xH100"] * nodes)


def mig(nodes: int) -> Workload:
    """Boards in MIG mode."""
    return _generated("mig", ["8xA100-mig"] * nodes)


def mixed(nodes: int) -> Workload:
    """The fleet of the bench."""
    return _generated("mixed", [KINDS[i % len(KINDS)] for i in range(nodes)])


def _generated(name: str, kinds: Sequence[str]) -> Workload:
    nodes = tuple(sample_node(f"node-{i}", kind) for i, kind in enumerate(kinds))
    gpus = [gpu for node in nodes for gpu in node.gpus]
    cut = next((gpu.geometry for gpu in gpus if gpu.geometry is not None), None)
    streams = []
    uncut = GPU_MILLI * sum(gpu.geometry is None for gpu in gpus)
    if uncut:
        shares = SHARES if name == "mixed" else ()
        streams.append(
            Stream(
                (
                    *(Kind(Demand.of(count), count * GPU_MILLI) for count, _ in GPU_ASKS),
                    *(Kind(Demand(share_milli=milli), milli) for milli, _ in shares),
                ),
                tuple(float(weight) for _, weight in (*GPU_ASKS, *shares)),
                uncut,
            )
        )
    if cut is not None:
        sizes = {profile.name: GPU_MILLI * profile.size // cut.width for profile in cut.profiles}
        asked = tuple(Kind(Demand.of(**{profile: 1}), sizes[profile]) for profile in PROFILES)
        streams.append(Stream(asked, (1.0,) * len(asked), GPU_MILLI * len(gpus) - uncut))
    return Workload(name, nodes, tuple(streams))


def openb(nodes: int, folder: Path) -> Workload:
    """Nodes drawn from the trace's, its pods that ask for GPUs, and their own stays."""
    where = folder / "csv" if (folder / "csv").is_dir() else folder
    machines = read_machines(where / OPENB_NODES)
    drawn = random.Random(1).choices(machines, k=nodes)
    made = tuple(node_of(each._replace(name=f"{each.name}-{i}")) for i, each in enumerate(drawn))
    pods, stays = read_pods(where / OPENB_PODS), list(read_stays(where / OPENB_PODS))
    kinds = tuple(_traced(pod, stay) for pod, stay in zip(pods, stays, strict=True) if pod.gpus and stay > 0)
    capacity = GPU_MILLI * sum(len(node.gpus) for node in made)
    return Workload("openb", made, (Stream(kinds, (1.0,) * len(kinds), capacity),))


def _traced(pod: Pod, stay: float) -> Kind:
    return Kind(demand_of(pod), pod.demand_milli, stay)


def read_stays(path: Path) -> Iterator[float]:
    """Seconds from a pod's start to its end; 0 where the trace does not say."""
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            try:
                yield max(0.0, float(row["deletion_time"]) - float(row["scheduled_time"]))
            except (KeyError, ValueError):
                yield 0.0


# --- the week ---


@dataclass(frozen=True, slots=True)
class Count:
    """At one moment."""

    day: float
    states: int
    with_cpu: int
    parts: int
    seen: int
    held: float
    new: float


@dataclass(frozen=True, slots=True)
class Week:
    """One workload on so many nodes."""

    workload: str
    nodes: int
    counts: tuple[Count, ...]
    changes: int
    lost: int
    seconds: float

    @property
    def last(self) -> Count:
        """At its end."""
        return self.counts[-1]


class Fleet:
    """Who is where, and how many nodes are in each state."""

    def __init__(self, workload: Workload, policy: Policy, seed: int) -> None:
        self._chance = random.Random(f"ties {seed}")
        self._plain = {node.name: replace(node, cpu_milli=None, memory_mib=None) for node in workload.nodes}
        self._left = {node.name: (node.cpu_milli or 0, node.memory_mib or 0) for node in workload.nodes}
        self._cpu_counts = any(node.cpu_milli is not None for node in workload.nodes)
        self._taken: dict[str, list[Allocation]] = {name: [] for name in self._plain}
        self._ranking = Ranking(policy)
        self._in: dict[str, Any] = {}
        self.states: Counter[Any] = Counter()
        self.with_cpu: Counter[Any] = Counter()
        self.parts: Counter[Any] = Counter()
        self.seen: set[int] = set()
        self.changes = self.new = 0
        for name in self._plain:
            self._changed(name)

    def come(self, demand: Demand) -> tuple[str, Allocation, Demand] | None:
        """Place it; None where it fits nowhere."""
        plain = replace(demand, cpu_milli=0, memory_mib=0) if self._cpu_counts else demand
        name = self._cheapest(plain, demand)
        placed = self._ranking.best(plain, name) if name is not None else None
        if name is None or placed is None:
            return None
        allocation = allocation_of(plain, placed)
        self._taken[name].append(allocation)
        self._take(name, demand, 1)
        self._changed(name)
        return name, allocation, demand

    def leave(self, held: tuple[str, Allocation, Demand]) -> None:
        """It is given back."""
        name, allocation, demand = held
        self._taken[name].remove(allocation)
        self._take(name, demand, -1)
        self._changed(name)

    def _cheapest(self, plain: Demand, demand: Demand) -> str | None:
        """As in the service: kube-scheduler has looked at CPU and memory before, and equal prices are a draw."""
        for _ in range(DRAWS):
            name = self._ranking.cheapest(plain, self._chance)
            if name is None or not self._cpu_counts or self._has_room(name, demand):
                return name
        prices, chance = self._ranking.prices(plain).items(), self._chance.random
        fits = ((price, chance(), name) for name, price in prices if self._has_room(name, demand))
        return min(fits, default=(0, 0.0, None))[2]

    def _has_room(self, name: str, demand: Demand) -> bool:
        cpu, memory = self._left[name]
        return cpu >= demand.cpu_milli and memory >= demand.memory_mib

    def _take(self, name: str, demand: Demand, sign: int) -> None:
        cpu, memory = self._left[name]
        self._left[name] = cpu - sign * demand.cpu_milli, memory - sign * demand.memory_mib

    def _changed(self, name: str) -> None:
        node, taken = self._plain[name], self._taken[name]
        self._ranking.put(node, taken)
        state = read(node, taken).state
        full = (state, self._left[name])
        before = self._in.get(name)
        if before is not None:
            self.changes += 1
            self.new += state not in self.states
            _count_out(self.states, before[0])
            _count_out(self.with_cpu, before)
            for part in _parts(before[0]):
                _count_out(self.parts, part)
        self._in[name] = full
        self.states[state] += 1
        self.with_cpu[full] += 1
        self.parts.update(_parts(state))
        self.seen.add(hash(state))


def _parts(state: RoomState) -> list[Any]:
    """The node without its GPUs in MIG mode, and each different one of those."""
    return [state.host, *(cut for cut, _ in state.cuts)]


def _count_out(counts: Counter[Any], gone: Any) -> None:
    counts[gone] -= 1
    if not counts[gone]:
        del counts[gone]


def live(workload: Workload, policy: Policy, days: float, seed: int = 1) -> Week:
    """Play it."""
    began = time.monotonic()
    rng = random.Random(seed)
    fleet = Fleet(workload, policy, seed)
    leaving: list[tuple[float, int, tuple[str, Allocation, Demand]]] = []
    number = lost = 0
    for _, kind, until in _first(workload, rng):
        held = fleet.come(kind.demand)
        number += 1
        if held is not None:
            heapq.heappush(leaving, (until, number, held))
    counts: list[Count] = []
    changes, new = fleet.changes, fleet.new
    for at, kind, until in _coming(workload, days * DAY, rng):
        while leaving and leaving[0][0] <= at:
            fleet.leave(heapq.heappop(leaving)[2])
        while len(counts) * COUNTED_EVERY <= at:
            counts.append(_count(fleet, len(counts) * COUNTED_EVERY, len(leaving), changes, new))
        held = fleet.come(kind.demand)
        number += 1
        if held is None:
            lost += 1
        else:
            heapq.heappush(leaving, (until, number, held))
    counts.append(_count(fleet, days * DAY, len(leaving), changes, new))
    spent = time.monotonic() - began
    return Week(workload.name, len(workload.nodes), tuple(counts), fleet.changes - changes, lost, round(spent, 1))


def _count(fleet: Fleet, at: float, held: int, changes: int, new: int) -> Count:
    since = fleet.changes - changes
    part = (fleet.new - new) / since if since else 0.0
    return Count(
        day=round(at / DAY, 3),
        states=len(fleet.states),
        with_cpu=len(fleet.with_cpu),
        parts=len(fleet.parts),
        seen=len(fleet.seen),
        held=held,
        new=round(part, 4),
    )


Coming = tuple[float, Kind, float]
"""When a pod comes, what it asks for, and when it leaves."""


def _first(workload: Workload, rng: random.Random) -> Iterator[Coming]:
    """Who is there at the start: long stays are met more often, and some part of each is over."""
    found = []
    for stream in workload.streams:
        pairs = zip(stream.kinds, stream.weights, strict=True)
        weights = list(accumulate(weight * (kind.stay or MEAN_STAY) for kind, weight in pairs))
        mean_stay = weights[-1] / sum(stream.weights)
        for kind in rng.choices(stream.kinds, cum_weights=weights, k=round(stream.rate * mean_stay)):
            rest = kind.stay * rng.random() if kind.stay else rng.expovariate(1 / MEAN_STAY)
            found.append((0.0, kind, rest))
    rng.shuffle(found)
    yield from found


def _coming(workload: Workload, seconds: float, rng: random.Random) -> Iterator[Coming]:
    """Who arrives, in order."""
    rates = [stream.rate for stream in workload.streams]
    cumulated = [list(accumulate(stream.weights)) for stream in workload.streams]
    at = rng.expovariate(sum(rates))
    while at < seconds:
        which = rng.choices(range(len(rates)), rates)[0]
        kind = rng.choices(workload.streams[which].kinds, cum_weights=cumulated[which])[0]
        yield at, kind, at + (kind.stay or rng.expovariate(1 / MEAN_STAY))
        at += rng.expovariate(sum(rates))


# --- the run ---


def laws(weeks: Sequence[Week]) -> dict[str, Any]:
    """How the number of states grows with the number of nodes, by workload."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(week.workload for week in weeks):
        points = [(float(week.nodes), float(week.last.states)) for week in weeks if week.workload == name]
        law = growth(points)
        found[name] = None if law is None else asdict(law)
    return found


def panels(weeks: Sequence[Week]) -> list[list[Panel]]:
    """Over time by workload, and over nodes."""
    over_time = []
    for name in dict.fromkeys(week.workload for week in weeks):
        mine = [week for week in weeks if week.workload == name]
        lines = {f"{week.nodes:,} nodes": [(count.day, count.states) for count in week.counts] for week in mine}
        over_time.append(Panel(name, "days", "different states", lines, fitted=False, logarithmic=False))
    at_end: dict[str, list[tuple[float, float]]] = {}
    with_cpu: list[tuple[float, float]] = []
    for week in weeks:
        at_end.setdefault(week.workload, []).append((week.nodes, week.last.states))
        if week.workload in ("mig", "mixed"):
            at_end.setdefault(f"{week.workload}, parts", []).append((week.nodes, week.last.parts))
        if week.workload == "openb":
            with_cpu.append((week.nodes, week.last.with_cpu))
    if with_cpu:
        at_end["openb with CPU and memory"] = with_cpu
    return [[*over_time, Panel("after the last day", "nodes", "different states", at_end)]]


def show(weeks: Sequence[Week], console: Console) -> None:
    """At the end of each."""
    table = Table(title="Different states of nodes", title_justify="left")
    table.add_column("Workload")
    titles = (
        "Nodes",
        "Days",
        "Pods held",
        "Changes",
        "Lost",
        "States",
        "With CPU",
        "Parts",
        "Seen",
        "New states %",
        "s",
    )
    for title in titles:
        table.add_column(title, justify="right")
    for week in weeks:
        last = week.last
        numbers = (
            week.nodes,
            round(last.day),
            last.held,
            week.changes,
            week.lost,
            last.states,
            last.with_cpu,
            last.parts,
            last.seen,
        )
        table.add_row(week.workload, *(f"{n:,}" for n in numbers), f"{100 * last.new:.2f}", f"{week.seconds:.0f}")
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Play, print, write, plot."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.states", description=__doc__.split("\n")[0])
    parser.add_argument("--openb", type=Path, help="folder of the openb trace (with csv/ in it)")
    parser.add_argument("--nodes", type=lambda text: [int(n) for n in text.split(",")], default=[100, 1000, 5000])
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--only", type=lambda text: text.split(","), default=["whole", "mig", "mixed", "openb"])
    parser.add_argument("--quick", action="store_true", help="two days, up to 1,000 nodes")
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--plot", type=Path, help=f"where the plot goes (default {PLOT}; with --quick beside the JSON)")
    options = parser.parse_args(argv)
    if options.quick:
        options.days, options.nodes = 2.0, [n for n in options.nodes if n <= 1000]
    console = Console(width=160) if not sys.stdout.isatty() else Console()
    about = machine()
    console.print(f"a week of churn: {words(about)}")
    if options.openb is None:
        console.print("without the openb trace (OPENB=PATH) its part is left out")
    made = {"whole": whole, "mig": mig, "mixed": mixed}
    weeks = []
    policies: dict[str, Policy] = {}
    for name in options.only:
        for nodes in options.nodes:
            if name == "openb" and options.openb is None:
                continue
            workload = openb(nodes, options.openb) if name == "openb" else made[name](nodes)
            if name not in policies:
                policies[name] = with_tables(DEFAULT_POLICY, workload.nodes)
            weeks.append(live(workload, policies[name], options.days))
            console.print(f"{name}, {nodes:,} nodes: {weeks[-1].last.states} states, {weeks[-1].seconds:.0f} s")
    show(weeks, console)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"machine": about, "growth": laws(weeks), "weeks": [asdict(week) for week in weeks]}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    where = options.plot or (options.json.with_suffix(".png") if options.quick else PLOT)
    console.print(f"written to {options.json} and {plot(panels(weeks), where)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
