"""The joint plan measured: how long it takes to prove, and how much better it is than placing one by one.

    python -m app.replay.plans size [--json]                 up to 100,000 pods on 50,000 nodes of eight GPUs
    python -m app.replay.plans compare [--worlds N] [--json] random half-full clusters with 200 pending pods

Only `decide` is what a planner waits for each time: nodes are read when they change, and placements are made once.
All worlds come from a seed; times are this machine's.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean

from rich.console import Console
from rich.table import Table

from solver.cluster import GPU_MILLI, Allocation, Device, Gpu, Node, Snapshot, Taken
from solver.decide import decide_units
from solver.demand import Ask, Demand, Problem
from solver.flow import Walk, question_of, solve
from solver.geometry import Slice, faults, grid
from solver.goals import DEFAULT_POLICY, Policy, allocation_of
from solver.plan import Placement, Plan
from solver.program import Limits
from solver.rank import Ranking
from solver.samples import parse_samples, sample_node
from solver.steps import read

WHOLE = (1, 2, 4, 8)

PROFILES = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "7g.80gb")

MIG_SHARE = 0.3
"""The part of the nodes whose GPUs are in MIG mode."""

SECONDS = 20.0
"""No plan is given more time in solvers."""


# --- worlds ---


def pods(count: int, demands: Sequence[Demand]) -> Iterator[Demand]:
    """So many pods, all demands equally often."""
    for i in range(count):
        yield demands[i % len(demands)]


def fill(node: Node, rng: random.Random) -> tuple[Taken, ...]:
    """What half-full leaves of a node: whole GPUs and random slices held until half of it is."""
    taken: list[Taken] = []
    whole = [gpu for gpu in node.gpus if gpu.geometry is None]
    rng.shuffle(whole)
    while whole and len(whole) > len(node.gpus) // 2 and rng.random() < 0.93:
        count = min(rng.choice((1, 1, 2, 2, 4)), len(whole))
        taken.append(Allocation(tuple(sorted(Device(gpu.uuid) for gpu in whole[:count]))))
        del whole[:count]
    for gpu in node.gpus:
        if gpu.geometry is not None:
            taken += [Device(gpu.uuid, slice_) for slice_ in _slices(gpu, rng)]
    return tuple(taken)


def _slices(gpu: Gpu, rng: random.Random) -> list[Slice]:
    assert gpu.geometry is not None
    choices = sorted(grid(gpu.geometry).blocks)
    held: list[Slice] = []
    for _ in range(rng.choice((0, 1, 2, 3))):
        fitting = [each for each in choices if each not in held and not faults(gpu.geometry, {*held, each})]
        if fitting:
            held.append(rng.choice(fitting))
    return held


def fleet(nodes: int, *, half_full: bool, seed: int) -> Problem:
    """Two pods for each node of eight H100; of three nodes in ten the GPUs are in MIG mode."""
    rng = random.Random(seed)  # noqa: S311  a seeded workload, nothing secret
    models = (sample_node("whole", "8xH100"), sample_node("cut", "8xH100-mig"))
    made: list[Node] = []
    taken: dict[str, list[Taken]] = {}
    for i in range(nodes):
        model = models[i * MIG_SHARE % 1 >= 1 - MIG_SHARE]
        gpus = tuple(replace(gpu, uuid=f"GPU-{i}-{gpu.index}") for gpu in model.gpus)
        node = replace(model, name=f"node-{i}", gpus=gpus)
        made.append(node)
        if half_full:
            taken[node.name] = list(fill(node, rng))
    wanted = [Demand.of(count) for count in WHOLE] + [Demand.of(**{profile: 1}) for profile in PROFILES]
    asks = tuple(Ask(f"pod-{i}", demand) for i, demand in enumerate(pods(2 * nodes, wanted)))
    return Problem(Snapshot(tuple(made), {name: tuple(held) for name, held in taken.items()}), asks)


OPENB_LIKE = (
    (12, 0, 250, 4, 8), (10, 0, 500, 8, 16), (8, 0, 100, 2, 4), (6, 0, 330, 6, 24), (5, 0, 750, 8, 32),
    (16, 1, 0, 8, 32), (8, 1, 0, 12, 48), (4, 2, 0, 24, 96), (3, 4, 0, 48, 192), (4, 8, 0, 88, 384), (13, 0, 0, 8, 16),
)  # fmt: skip
"""Pods like those of the openb trace: how often, GPUs, milli-GPU of one, CPUs, GiB."""


def shared_fleet(nodes: int, *, half_full: bool, seed: int) -> Problem:
    """Nodes of eight GPUs and 96 CPUs, with shares, CPU and memory asked for; half-full by the same pods."""
    rng = random.Random(seed)  # noqa: S311
    kinds = [
        Demand(gpus, (), milli, 0, cpu * 1000, gib * 1024)
        for often, gpus, milli, cpu, gib in OPENB_LIKE
        for _ in range(often)
    ]
    model = replace(sample_node("whole", "8xL40S"), cpu_milli=96_000, memory_mib=768 * 1024)
    made: list[Node] = []
    taken: dict[str, list[Taken]] = {}
    for i in range(nodes):
        gpus = tuple(replace(gpu, uuid=f"GPU-{i}-{gpu.index}") for gpu in model.gpus)
        made.append(replace(model, name=f"node-{i}", gpus=gpus))
    problem = Problem(Snapshot(tuple(made)), ())
    if half_full:
        asks = tuple(Ask(f"held-{i}", rng.choice(kinds)) for i in range(5 * nodes))
        placed = one_by_one(problem, asks, DEFAULT_POLICY, _anywhere(rng))
        for ask in asks:
            if ask.id in placed and rng.random() < 0.7:
                held = allocation_of(ask.demand, placed[ask.id])
                taken.setdefault(placed[ask.id].node, []).append(held)
    asks = tuple(Ask(f"pod-{i}", rng.choice(kinds)) for i in range(4 * nodes))
    return Problem(Snapshot(tuple(made), {name: tuple(held) for name, held in taken.items()}), asks)


# --- how long ---


@dataclass(frozen=True, slots=True)
class Size:
    """One plan: what it was for, how far it was proven, and the seconds of each part."""

    fleet: str
    nodes: int
    pods: int
    states: int
    status: str
    gap: float
    placed: int
    read_seconds: float
    decide_seconds: float
    decide_again_seconds: float
    walk_seconds: float


def size(name: str, problem: Problem, policy: Policy = DEFAULT_POLICY) -> Size:
    """Plan it once in parts; `decide` twice, since a planner's second look finds steps and prices known."""
    clock = time.perf_counter
    start = clock()
    question = question_of(problem, policy)
    walk = Walk(problem, question)
    units = walk.counted()
    read = clock() - start
    spent = []
    for _ in range(2):
        start = clock()
        decision = decide_units(units, question, Limits(seconds=SECONDS))
        spent.append(clock() - start)
    start = clock()
    for take in decision.takes:
        walk.send(take)
    walked = clock() - start
    plan = Plan(decision.status, (), 0, 0, decision.tiers)
    asked, placed = len(problem.asks), len(walk.placed)
    nodes = len(problem.snapshot.nodes)
    return Size(
        name, nodes, asked, len(units), decision.status.value, plan.gap, placed, read, spent[0], spent[1], walked
    )


def sizes(console: Console, largest: int = 50_000) -> list[Size]:
    """Whole GPUs and single slices up to 50,000 nodes; then shares with CPU and memory, which are not proven."""
    found = []
    for nodes in (500, 5_000, 50_000):
        for half_full in (False, True):
            if nodes <= largest:
                name = "half-full" if half_full else "empty"
                found.append(size(name, fleet(nodes, half_full=half_full, seed=1)))
                console.print(f"{name}, {nodes} nodes: {found[-1].decide_again_seconds * 1e3:.0f} ms")
    for nodes in (10, 100, 1_000):
        if nodes <= largest:
            name = "shares and CPU, half-full"
            found.append(size(name, shared_fleet(nodes, half_full=True, seed=1)))
            console.print(f"{name}, {nodes} nodes: {found[-1].decide_again_seconds:.1f} s")
    return found


def show_sizes(found: Sequence[Size], console: Console) -> None:
    """As a table."""
    table = Table(title="The joint plan: from counts to a decision, one core")
    for column in ("cluster", "nodes", "pods", "states", "placed", "status", "gap", "read s", "decide ms", "again ms"):
        table.add_column(column, justify="left" if column in ("cluster", "status") else "right")
    table.add_column("place s", justify="right")
    for row in found:
        table.add_row(
            row.fleet,
            f"{row.nodes:,}",
            f"{row.pods:,}",
            f"{row.states}",
            f"{row.placed:,}",
            row.status,
            f"{row.gap:.4f}",
            f"{row.read_seconds:.2f}",
            f"{row.decide_seconds * 1e3:.0f}",
            f"{row.decide_again_seconds * 1e3:.0f}",
            f"{row.walk_seconds:.2f}",
        )
    console.print(table)


# --- how much better ---

Chooser = Callable[[Ranking, Demand, Mapping[str, int], Mapping[str, int]], str]
"""Of the nodes that can take the demand (with their prices, and what is free on each) the one that gets it."""


def cheapest(ranking: Ranking, demand: Demand, prices: Mapping[str, int], free: Mapping[str, int]) -> str:
    """Tangram's one-pod path."""
    return min(prices, key=lambda name: (prices[name], name))


def first_fit(ranking: Ranking, demand: Demand, prices: Mapping[str, int], free: Mapping[str, int]) -> str:
    """The first node by name."""
    return min(prices)


def best_fit(ranking: Ranking, demand: Demand, prices: Mapping[str, int], free: Mapping[str, int]) -> str:
    """The node with the least free."""
    return min(prices, key=lambda name: (free[name], name))


CHOOSERS: dict[str, Chooser] = {"one by one": cheapest, "best-fit": best_fit, "first-fit": first_fit}


def _anywhere(rng: random.Random) -> Chooser:
    return lambda ranking, demand, prices, free: rng.choice(sorted(prices))


def one_by_one(problem: Problem, asks: Sequence[Ask], policy: Policy, choose: Chooser) -> dict[str, Placement]:
    """Every pod in its turn on the node that is chosen, there on the devices that cost least."""
    nodes = {node.name: node for node in problem.snapshot.nodes}
    taken: dict[str, list[Taken]] = {name: list(problem.snapshot.taken.get(name, ())) for name in nodes}
    ranking = Ranking(policy)
    free = {}
    for name, node in nodes.items():
        ranking.put(node, taken[name])
        free[name] = _free_milli(node, taken[name])
    placed = {}
    for ask in asks:
        prices = ranking.prices(ask.demand)
        if not prices:
            continue
        name = choose(ranking, ask.demand, prices, free)
        placement = ranking.best(ask.demand, name)
        assert placement is not None
        placed[ask.id] = placement
        taken[name].append(allocation_of(ask.demand, placement))
        ranking.put(nodes[name], taken[name])
        free[name] = _free_milli(nodes[name], taken[name])
    return placed


def _free_milli(node: Node, taken: Iterable[Taken]) -> int:
    room = read(node, taken)
    cut_up = [(cut.geometry.width - cut.without_idle().busy.bit_count(), cut.geometry.width) for _, cut in room.cuts]
    return room.host.free_milli + sum(GPU_MILLI * free // width for free, width in cut_up)


NODES = (15, 60)
"""How many nodes a world has, each number equally often."""

KINDS = ("8xH100", "8xA100", "8xA100-mig", "8xH100-mig", "8xA100-mig4", "4xA30-mig2", "8xV100", "8xL40S", "4xH100NVL")

MIXES: dict[str, tuple[Demand, ...]] = {
    "GPUs and slices": (
        *(Demand.of(count) for count in WHOLE),
        *(Demand.of(**{profile: 1}) for profile in (*PROFILES, "1g.6gb", "2g.12gb")),
    ),
    "several slices": (
        *(Demand.of(count) for count in WHOLE),
        *(Demand.of(**{profile: 1}) for profile in PROFILES),
        Demand.of(**{"1g.10gb": 2}),
        Demand.of(**{"2g.20gb": 2, "1g.10gb": 1}),
        Demand.of(1, **{"1g.10gb": 1}),
    ),
    "shares and CPU": (
        *(Demand(gpus=count, cpu_milli=count * 8000) for count in WHOLE),
        *(Demand(share_milli=milli, cpu_milli=2000) for milli in (250, 500, 750)),
        Demand(cpu_milli=4000),
        *(Demand.of(**{profile: 1}) for profile in PROFILES[:3]),
    ),
}


def world(seed: int, mix: str, count: int = 200) -> Problem:
    """Random nodes, half-full, and this many pods of the mix in random order: some worlds have room for nearly all
    of them, some for a third.
    """
    rng = random.Random(seed)  # noqa: S311
    counted = Counter(rng.choice(KINDS) for _ in range(rng.randint(*NODES)))
    nodes = parse_samples(",".join(f"{kind}:{many}" for kind, many in sorted(counted.items())))
    if mix == "shares and CPU":
        nodes = [replace(node, cpu_milli=rng.choice((32, 64, 96)) * 1000) for node in nodes]
    taken = {node.name: fill(node, rng) for node in nodes}
    demands = [rng.choice(MIXES[mix]) for _ in range(count)]
    return Problem(Snapshot(tuple(nodes), taken), tuple(Ask(f"pod-{i}", each) for i, each in enumerate(demands)))


@dataclass(frozen=True, slots=True)
class Versus:
    """The joint plan against one other way, over the worlds of a mix.

    `more` / `less`: worlds where it places more, or less, worth; `cheaper` / `dearer`: as much, for less or more.
    `milli_more` is worth placed more, in milli-GPU, and `milli_cheaper` is what it costs less where as much is
    placed, both means over the worlds.
    """

    mix: str
    other: str
    worlds: int
    proven: int
    more: int
    less: int
    cheaper: int
    dearer: int
    milli_more: float
    percent_more: float
    milli_cheaper: float
    mean_seconds: float


def tiers_of(problem: Problem, placed: Mapping[str, Placement], policy: Policy) -> tuple[int, int]:
    """What is not placed, in milli-GPU of worth, and what the rest costs."""
    question = question_of(problem, policy)
    left = sum(question.worths[question.number[ask.demand]] for ask in problem.asks if ask.id not in placed)
    return left, sum(policy.total(placement.prices) for placement in placed.values())


WORLD_SECONDS = 2.0
"""What the service gives a plan, too."""


def compare(
    worlds: int, console: Console, policy: Policy = DEFAULT_POLICY, mixes: Sequence[str] = tuple(MIXES)
) -> list[Versus]:
    """The joint plan on this many worlds against each other way, a third of them of each mix."""
    found = []
    for mix in mixes:
        joint: list[tuple[int, int]] = []
        others: dict[str, list[tuple[int, int]]] = {name: [] for name in CHOOSERS}
        asked, proven, spent = [], 0, 0.0
        for seed in range(-(-worlds // len(MIXES))):
            problem = world(seed, mix)
            start = time.perf_counter()
            plan = solve(problem, policy, time_limit_seconds=WORLD_SECONDS, clock=time.perf_counter)
            spent += time.perf_counter() - start
            proven += plan.gap == 0
            joint.append(tiers_of(problem, plan.placements, policy))
            asked.append(tiers_of(problem, {}, policy)[0])
            for name, choose in CHOOSERS.items():
                placed = one_by_one(problem, problem.asks, policy, choose)
                others[name].append(tiers_of(problem, placed, policy))
        console.print(f"{mix}: {len(joint)} worlds, {spent / len(joint):.2f} s each")
        for name, theirs in others.items():
            pairs = list(zip(joint, theirs, strict=True))
            equal = [(ours[1], other[1]) for ours, other in pairs if ours[0] == other[0]]
            served = [(all_ - ours[0], all_ - other[0]) for all_, (ours, other) in zip(asked, pairs, strict=True)]
            found.append(
                Versus(
                    mix,
                    name,
                    len(pairs),
                    proven,
                    sum(ours[0] < other[0] for ours, other in pairs),
                    sum(ours[0] > other[0] for ours, other in pairs),
                    sum(ours < other for ours, other in equal),
                    sum(ours > other for ours, other in equal),
                    fmean(ours - other for ours, other in served),
                    fmean(100 * (ours / other - 1) for ours, other in served if other),
                    fmean([other - ours for ours, other in equal] or [0]),
                    spent / len(pairs),
                )
            )
    return found


def show_versus(found: Sequence[Versus], console: Console) -> None:
    """As a table."""
    table = Table(
        title="The joint plan against one by one: worlds in which it places more or less, or is cheaper or dearer"
    )
    columns = ("mix", "against", "worlds", "proven", "more", "less", "cheaper", "dearer", "milli-GPU more", "% more")
    for column in (*columns, "milli-GPU cheaper", "s"):
        table.add_column(column, justify="left" if column in ("mix", "against") else "right")
    for row in found:
        numbers = (row.worlds, row.proven, row.more, row.less, row.cheaper, row.dearer)
        means = (
            f"{row.milli_more:.0f}",
            f"{row.percent_more:.2f}",
            f"{row.milli_cheaper:.0f}",
            f"{row.mean_seconds:.2f}",
        )
        table.add_row(row.mix, row.other, *map(str, numbers), *means)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """The table on the terminal (stderr with --json), the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m app.replay.plans", description=__doc__)
    parser.add_argument("what", choices=("size", "compare"))
    parser.add_argument("--worlds", type=int, default=1000, help="random clusters to compare on")
    parser.add_argument("--mix", choices=tuple(MIXES), help="this mix's third of the worlds only")
    parser.add_argument("--largest", type=int, default=50_000, help="no cluster of more nodes")
    parser.add_argument("--json", action="store_true", help="numbers on stdout, the table on stderr")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json, width=160)
    if options.what == "size":
        measured = sizes(console, options.largest)
        show_sizes(measured, console)
        rows = [asdict(row) for row in measured]
    else:
        compared = compare(options.worlds, console, mixes=[options.mix] if options.mix else tuple(MIXES))
        show_versus(compared, console)
        rows = [asdict(row) for row in compared]
    if options.json:
        sys.stdout.write(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
