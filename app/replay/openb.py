"""`tangram replay openb`: a trace of shared and whole GPUs that fills a cluster (benchmarks.md, section 1).

Nothing departs, one pod at a time, and what does not fit is dropped for good. Allocation is the part of all GPUs
that is in use, at so much arrived load. Every placement of every policy goes through the same `Books`, which
refuse what is not legal.

    arrivals(seed) ──▶ Policy.choose() ──▶ Books.take() ──▶ Policy.changed() ──▶ Run ──▶ Result
                        the decision                         its upkeep

`potential` is Tangram: its decisions are those of `solver.rank.Ranking` with a forecast, the code of the service.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, pstdev
from time import perf_counter_ns
from typing import TYPE_CHECKING, Protocol

from rich.table import Table as Grid

from app.replay.mig import percentile
from app.replay.rules import RULES, AtRandom, Board, Fragmentation, Kinds, rule_called
from app.replay.trace import GPU_MILLI, SIZES, Books, Machine, Pod, arrivals, read_machines, read_pods
from solver.cluster import Allocation, Device, Gpu, Node
from solver.demand import Demand, Terms
from solver.forecast import Forecast, Shape
from solver.goals import Policy as Prices
from solver.rank import Ranking
from solver.values import Values

if TYPE_CHECKING:
    from rich.console import Console

LOADS = (80, 90, 95, 100, 110, 130)
"""Arrived load in % of the cluster's GPUs at which results are told."""

RENEWED_AFTER = 0.02
"""The forecast looks at the cluster again each time this much of its GPUs has been asked for."""

POTENTIAL, RANDOM = "potential", "random"
POLICIES = (POTENTIAL, *RULES, RANDOM)

Choice = tuple[int, tuple[int, ...]]
"""A node, and the GPUs of it."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A cluster and the pods of a list."""

    machines: tuple[Machine, ...]
    pods: tuple[Pod, ...]

    @classmethod
    def read(cls, nodes: Path, pods: Path) -> Trace:
        """From two CSV files; BadInput where they are not what they should be."""
        return cls(read_machines(nodes), read_pods(pods))


class Policy(Protocol):
    """What is compared."""

    def choose(self, pod: Pod) -> Choice | None:
        """Where the pod goes; None where it fits nowhere. Changes nothing."""

    def changed(self, pod: Pod, choice: Choice) -> None:
        """The pod is there now."""

    def renew(self) -> None:
        """Some more load has arrived: look at the cluster as a whole."""


# --- Tangram ---


class Potential:
    """The service's own ranking, with a forecast of the trace's mix."""

    def __init__(self, trace: Trace, books: Books, forecast: Forecast, *, chance: random.Random, fixed_ties: bool):
        self._books, self._chance = books, chance
        self._nodes = [node_of(machine) for machine in trace.machines]
        self._place = {node.name: i for i, node in enumerate(self._nodes)}
        self._fixed_ties = fixed_ties
        self._taken: list[list[Allocation]] = [[] for _ in self._nodes]
        self._demands = {pod: demand_of(pod) for pod in set(trace.pods)}
        self._forecast = forecast
        self._ranking = Ranking(self._renewed())
        for node in chance.sample(self._nodes, len(self._nodes)) if fixed_ties else self._nodes:
            self._ranking.put(node)
        for demand in self._demands.values():
            self._ranking.cheapest(demand)

    def _renewed(self) -> Prices:
        books = self._books
        idle = (books.left == GPU_MILLI).sum(axis=1).tolist()
        rooms = zip([machine.model for machine in books.machines], books.cpu.tolist(), idle, strict=True)
        self._forecast = self._forecast.with_blocks(rooms)
        return Prices(values=Values(forecast=self._forecast))

    def choose(self, pod: Pod) -> Choice | None:
        """The cheapest node, and on it the cheapest devices."""
        demand = self._demands[pod]
        name = self._ranking.cheapest(demand, None if self._fixed_ties else self._chance)
        if name is None:
            return None
        placement = self._ranking.best(demand, name)
        assert placement is not None
        return self._place[name], tuple(int(device.gpu.rpartition("/")[2]) for device in placement.devices)

    def changed(self, pod: Pod, choice: Choice) -> None:
        """Put the node anew, with what is on it now."""
        place, gpus = choice
        node, demand = self._nodes[place], self._demands[pod]
        devices = tuple(Device(node.gpus[gpu].uuid, milli=demand.share_milli) for gpu in gpus)
        self._taken[place].append(Allocation(devices, pod.cpu_milli, pod.memory_mib))
        self._ranking.put(node, self._taken[place])
        self._ranking.settle()

    def renew(self) -> None:
        """Which blocks of GPUs are short now?"""
        self._ranking.renew(self._renewed())


def node_of(machine: Machine) -> Node:
    """The machine as the solver sees it; nothing is known of its links."""
    gpus = tuple(Gpu(f"{machine.name}/{i}", i, machine.model, 0) for i in range(machine.gpus))
    links = ((0,) * machine.gpus,) * machine.gpus
    return Node(machine.name, gpus, links, machine.cpu_milli, machine.memory_mib)


def demand_of(pod: Pod) -> Demand:
    """The pod as the solver sees it."""
    return Demand(
        gpus=0 if pod.is_share else pod.gpus,
        share_milli=pod.milli if pod.is_share else 0,
        cpu_milli=pod.cpu_milli,
        memory_mib=pod.memory_mib,
        terms=Terms(products=pod.models),
    )


def forecast_of(trace: Trace) -> Forecast:
    """What the trace's own mix says of the pods to come."""
    capacity = Counter[str]()
    for machine in trace.machines:
        capacity[machine.model] += machine.gpus
    shapes = (Shape(pod.cpu_milli, pod.gpus, pod.milli, pod.models) for pod in trace.pods)
    return Forecast.from_mix(shapes, {model: gpus for model, gpus in capacity.items() if gpus})


# --- a rule ---


class ByRule:
    """One of `rules`."""

    def __init__(
        self,
        name: str,
        trace: Trace,
        books: Books,
        fragmentation: Fragmentation,
        chance: random.Random,
        fixed_ties: bool,
    ):
        kinds = Kinds.of(trace.pods)
        if name == RANDOM:
            self._board: Board | AtRandom = AtRandom(books, kinds, chance=chance)
        else:
            self._board = Board(books, kinds, rule_called(name, fragmentation), chance=chance, fixed_ties=fixed_ties)

    def choose(self, pod: Pod) -> Choice | None:
        """The node with the highest score."""
        return self._board.choose(pod)

    def changed(self, pod: Pod, choice: Choice) -> None:
        """Score the node anew."""
        self._board.changed(choice[0])

    def renew(self) -> None:
        """Rules do not look ahead."""


# --- playing ---


@dataclass(frozen=True, slots=True)
class Run:
    """What one seed came to: allocation and fragmentation by load in % of all GPUs, and pods dropped by class."""

    seed: int
    allocation: Mapping[int, float]
    fragmentation: Mapping[int, float]
    rejected: Mapping[str, int]
    arrived: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Result:
    """A policy over all seeds. Nanoseconds of every decision, of the upkeep after every placement, and of every
    look at the cluster as a whole."""

    policy: str
    ties: str
    runs: tuple[Run, ...]
    decisions: array[int]
    upkeep: array[int]
    renewals: array[int]

    def allocation(self, load: int) -> tuple[float, ...]:
        """That at so much arrived load, by seed; a tiny cluster may jump over a load."""
        return tuple(run.allocation[load] for run in self.runs if load in run.allocation)

    def fragmentation(self, load: int) -> tuple[float, ...]:
        """The same of fragmentation."""
        return tuple(run.fragmentation[load] for run in self.runs if load in run.fragmentation)

    def rejected(self, size: str) -> float:
        """The part of a class's pods that were dropped, in %, over all seeds."""
        arrived = sum(run.arrived[size] for run in self.runs)
        return 100 * sum(run.rejected[size] for run in self.runs) / arrived if arrived else 0.0


def replay(trace: Trace, name: str, seeds: Sequence[int], *, fixed_ties: bool | None = None) -> Result:
    """Play a policy. `fixed_ties` None: as its authors do, which for ours is at random."""
    if name not in POLICIES:
        raise ValueError(f"no policy is called {name}; there are {', '.join(POLICIES)}")
    fixed = name not in (POTENTIAL, RANDOM) if fixed_ties is None else fixed_ties
    fragmentation = Fragmentation(trace.pods, sorted({machine.model for machine in trace.machines}))
    forecast = forecast_of(trace) if name == POTENTIAL else None
    times = array("q"), array("q"), array("q")
    runs = []
    for seed in seeds:
        books = Books(trace.machines)
        chance = random.Random(f"ties {seed}")  # noqa: S311  not a secret
        policy: Policy
        if forecast is not None:
            policy = Potential(trace, books, forecast, chance=chance, fixed_ties=fixed)
        else:
            policy = ByRule(name, trace, books, fragmentation, chance, fixed)
        runs.append(_run(trace, books, policy, fragmentation, seed, times))
    return Result(name, "fixed" if fixed else "random", tuple(runs), *times)


def _run(
    trace: Trace,
    books: Books,
    policy: Policy,
    fragmentation: Fragmentation,
    seed: int,
    times: tuple[array[int], array[int], array[int]],
) -> Run:
    decisions, upkeep, renewals = times
    capacity = books.capacity_milli
    broken = [fragmentation.of_node(books, node) for node in range(len(books.machines))]
    broken_now = sum(broken)
    asked = used = 0
    renewed = 0.0
    seen: dict[int, list[tuple[float, float]]] = {load: [] for load in LOADS}
    rejected, arrived = Counter[str](), Counter[str]()
    for pod in arrivals(trace.pods, capacity, seed):
        asked += pod.demand_milli
        arrived[pod.size] += 1
        if asked / capacity >= renewed + RENEWED_AFTER:
            renewed = asked / capacity
            began = perf_counter_ns()
            policy.renew()
            renewals.append(perf_counter_ns() - began)
        began = perf_counter_ns()
        choice = policy.choose(pod)
        decisions.append(perf_counter_ns() - began)
        if choice is None:
            rejected[pod.size] += 1
        else:
            books.take(pod, *choice)
            began = perf_counter_ns()
            policy.changed(pod, choice)
            upkeep.append(perf_counter_ns() - began)
            used += pod.demand_milli
            node = choice[0]
            broken_now -= broken[node]
            broken[node] = fragmentation.of_node(books, node)
            broken_now += broken[node]
        load = round(100 * asked / capacity)
        if load in seen:
            seen[load].append((100 * used / capacity, 100 * broken_now / capacity))
    return Run(
        seed,
        {load: fmean(each[0] for each in events) for load, events in seen.items() if events},
        {load: fmean(each[1] for each in events) for load, events in seen.items() if events},
        {size: rejected[size] for size in SIZES},
        {size: arrived[size] for size in SIZES},
    )


# --- in words ---


def as_json(results: Sequence[Result]) -> Mapping[str, object]:
    """Everything, for programs."""
    return {
        "policies": [
            {
                "policy": result.policy,
                "ties": result.ties,
                "allocation_percent": {load: _summary(result.allocation(load)) for load in LOADS},
                "fragmentation_percent": {load: _summary(result.fragmentation(load)) for load in LOADS},
                "rejected_percent": {size: round(result.rejected(size), 3) for size in SIZES},
                "decision_us": _microseconds(result.decisions),
                "upkeep_us": _microseconds(result.upkeep),
                "renewal_us": _microseconds(result.renewals),
                "seeds": [asdict(run) for run in result.runs],
            }
            for result in results
        ]
    }


def _summary(numbers: Sequence[float]) -> Mapping[str, float] | None:
    return {"mean": round(fmean(numbers), 3), "sd": round(pstdev(numbers), 3)} if numbers else None


def _microseconds(times: Sequence[int]) -> Mapping[str, float]:
    return {name: round(percentile(times, share) / 1000, 1) for name, share in (("p50", 0.5), ("p99", 0.99))}


def show(trace: Trace, results: Sequence[Result], console: Console) -> None:
    """Three tables with a row for each policy, in the order asked."""
    gpus = sum(machine.gpus for machine in trace.machines)
    console.print(
        f"{len(trace.machines)} nodes, {gpus} GPUs, {len(trace.pods)} pods in the list, {len(results[0].runs)} seeds"
    )
    filled = Grid(title="GPU allocation in % at so much arrived load, with its deviation over the seeds")
    broken = Grid(title="Pods dropped in % of their class, and fragmentation in % of all GPUs at 100 % load")
    timed = Grid(title="Microseconds")
    for table in (filled, broken, timed):
        table.add_column("Policy")
    for title in ("Ties", *(f"{load} %" for load in LOADS)):
        filled.add_column(title, justify="right")
    for title in (*SIZES, "Fragmentation"):
        broken.add_column(title, justify="right")
    for title in ("Decision p50", "p99", "Upkeep p50", "p99", "Renewal p50", "p99"):
        timed.add_column(title, justify="right")
    for result in results:
        filled.add_row(result.policy, result.ties, *(_told(result.allocation(load)) for load in LOADS))
        broken.add_row(
            result.policy, *(f"{result.rejected(size):.2f}" for size in SIZES), _told(result.fragmentation(100))
        )
        times = (result.decisions, result.upkeep, result.renewals)
        timed.add_row(result.policy, *(f"{each:.1f}" for time in times for each in _microseconds(time).values()))
    for table in (filled, broken, timed):
        console.print(table)


def _told(numbers: Sequence[float]) -> str:
    return f"{fmean(numbers):.2f} ± {pstdev(numbers):.2f}" if numbers else "-"
