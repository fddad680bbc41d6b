"""`tangram replay mig`: a loss system of cut GPUs, where placement policy shows (benchmarks.md, section 2).

Poisson arrivals of slices, exponential holding times, no queue: what does not fit is lost. Load is the units
offered against the units there are. The first quarter of the arrivals is dropped. All policies meet the same
arrivals, so compare them seed by seed; seeds differ by points.

    arrivals(workload, seed) ──▶ Fleet.decide() ──chooser──▶ a GPU and a start, or lost ──▶ Seed ──▶ Result
"""

from __future__ import annotations

import math
import random
import time
from array import array
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from heapq import heappop, heappush
from statistics import fmean, stdev
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver import pywraplp
from ortools.sat.python import cp_model
from rich.console import Console
from rich.table import Table as Grid

from solver.demand import SliceNeed, Terms
from solver.geometry import Block, Cut, Geometry, Profile, Slice, cut, empty, grid
from solver.goals import Policy, offers
from solver.market import Table, solve_table
from solver.products import PRODUCTS, product
from solver.values import Values

CLASSIC = Geometry(
    8,
    7,
    (
        Profile("1g.10gb", 19, 1, (0, 1, 2, 3, 4, 5, 6), 1, 9856),
        Profile("1g.20gb", 15, 2, (0, 2, 4, 6), 1, 19968),
        Profile("2g.20gb", 14, 2, (0, 2, 4), 2, 19968),
        Profile("3g.40gb", 9, 4, (0, 4), 3, 40192),
        Profile("4g.40gb", 5, 4, (0,), 4, 40192),
        Profile("7g.80gb", 0, 8, (0,), 7, 80384),
    ),
)
"""NVIDIA's grid of eight memory slices, without the media profiles: what published comparisons use."""

SKEW_BIG = (5.0, 10.0, 10.0, 20.0, 25.0, 30.0)

CP_SAT_EFFORT = 0.005
"""Deterministic seconds; where there is a packing it needs less, almost always."""

DROPPED = 4  # one arrival in so many, from the first on


# --- what is asked ---


@dataclass(frozen=True, slots=True)
class Workload:
    """What arrives where: a weight for each of the geometry's profiles, the load, and how many GPUs there are."""

    geometry: Geometry
    weights: tuple[float, ...]
    load: float = 1.0
    gpus: int = 100
    arrivals: int = 12_000

    @property
    def rate(self) -> float:
        """Arrivals per mean holding time."""
        sizes = [profile.size for profile in self.geometry.profiles]
        mean = sum(w * size for w, size in zip(self.weights, sizes, strict=True)) / sum(self.weights)
        return self.load * self.gpus * self.geometry.width / mean

    @property
    def mix(self) -> dict[str, float]:
        """The weights by profile."""
        return {profile.name: w for profile, w in zip(self.geometry.profiles, self.weights, strict=True)}


class Arrival(NamedTuple):
    """A slice of a profile is wanted at a time, and given back at another if it was had."""

    at: float
    profile: Profile
    until: float


def arrivals(workload: Workload, seed: int) -> Iterator[Arrival]:
    """The same for every policy; for each: the time since the last, the profile, the holding time."""
    chance = random.Random(seed)  # noqa: S311  not a secret
    now = 0.0
    for _ in range(workload.arrivals):
        now += chance.expovariate(workload.rate)
        profile = chance.choices(workload.geometry.profiles, workload.weights)[0]
        yield Arrival(now, profile, now + chance.expovariate(1.0))


def geometry_called(name: str) -> Geometry:
    """`classic`, or the key of a product that can be cut."""
    if name == "classic":
        return CLASSIC
    found = product(name).geometry
    if found is None:
        keys = ", ".join(each.key for each in PRODUCTS if each.geometry is not None)
        raise ValueError(f"{name} cannot be cut; there are classic, {keys}")
    return found


def weights_for(geometry: Geometry, words: str) -> tuple[float, ...]:
    """`uniform`, `skew-big` (the classic profiles only), or one number for each profile, in order."""
    names = ", ".join(profile.name for profile in geometry.profiles)
    count = len(geometry.profiles)
    if words == "uniform":
        return (1.0,) * count
    weights: tuple[float, ...] = SKEW_BIG
    if words != "skew-big":
        try:
            weights = tuple(float(number) for number in words.split(","))
        except ValueError:
            raise ValueError(f"{words}: not uniform, skew-big, or numbers with commas between") from None
    if len(weights) != count:
        raise ValueError(f"{words}: {len(weights)} weights for {count} profiles ({names})")
    if any(not 0 <= weight < float("inf") for weight in weights) or not sum(weights):
        raise ValueError(f"{words}: weights are 0 or more, and not all 0")
    return weights


# --- the fleet ---

Pick = tuple[int, int]
"""A GPU and a start."""


class OnGpu(NamedTuple):
    """A slice of the fleet's."""

    gpu: int
    slice: Slice


Token = TypeVar("Token")


class System(Protocol[Token]):
    """What the arrivals meet; a token stands for what one of them holds."""

    def decide(self, profile: str) -> Token | None:
        """What it would get; None where it is lost. Changes nothing."""

    def take(self, chosen: Token) -> None:
        """It gets that."""

    def leave(self, held: Token) -> None:
        """It is given back."""


class Chooser(Protocol):
    """A policy: which GPU, and where on it. `view` is what it looks at on a GPU; equal GPUs are one to it."""

    def view(self, state: Cut) -> Hashable:
        """States with equal views are not told apart."""

    def pick(self, fleet: Fleet, profile: str) -> Pick | None:
        """Where it goes; None where it is lost."""


class Fleet:
    """GPUs with their states, and the GPUs of each view that any is in, the view seen first in front."""

    def __init__(self, geometry: Geometry, gpus: int, chooser: Chooser) -> None:
        self.states = [empty(geometry)] * gpus
        self.alike: dict[Hashable, dict[int, None]] = {chooser.view(empty(geometry)): dict.fromkeys(range(gpus))}
        self._chooser = chooser

    def decide(self, profile: str) -> OnGpu | None:
        """Where the policy says; None where it is lost."""
        picked = self._chooser.pick(self, profile)
        return None if picked is None else OnGpu(picked[0], Slice(profile, picked[1]))

    def take(self, chosen: OnGpu) -> None:
        """It is served there."""
        self._turn(chosen.gpu, self.states[chosen.gpu].add(chosen.slice))

    def leave(self, held: OnGpu) -> None:
        """It is given back."""
        gpu, taken = held
        self._turn(gpu, _without(self.states[gpu], grid(self.states[gpu].geometry).blocks[taken]))

    def _turn(self, gpu: int, state: Cut) -> None:
        old, new = self._chooser.view(self.states[gpu]), self._chooser.view(state)
        self.states[gpu] = state
        if old == new:
            return
        del self.alike[old][gpu]
        if not self.alike[old]:
            del self.alike[old]
        self.alike.setdefault(new, {})[gpu] = None


@lru_cache(maxsize=65536)
def _without(state: Cut, gone: Block) -> Cut:
    slices = {block: slice_ for slice_, block in grid(state.geometry).blocks.items()}
    left = cut(state.geometry, frozenset(slices[block] for block in state.held if block != gone))
    assert isinstance(left, Cut)
    return left


# --- policies ---


class Asked(NamedTuple):
    """What a GPU asks for serving, and where it would; the lower is the better."""

    price: float
    start: int


class Cheapest:
    """The GPU that asks least; then the lowest start, then the state seen first. What a state asks is remembered."""

    def __init__(self, ask: Callable[[Cut, str], Asked | None], view: Callable[[Cut], Hashable]) -> None:
        self._ask, self._view = ask, view
        self._known: dict[str, dict[Hashable, Asked | None]] = {}
        self._views: dict[Cut, Hashable] = {}

    def view(self, state: Cut) -> Hashable:
        """As given."""
        if state not in self._views:
            self._views[state] = self._view(state)
        return self._views[state]

    def pick(self, fleet: Fleet, profile: str) -> Pick | None:
        """One look at each different state."""
        known = self._known.setdefault(profile, {})
        best: Asked | None = None
        where: dict[int, None] = {}
        for view, gpus in fleet.alike.items():
            if view not in known:
                known[view] = self._ask(fleet.states[next(iter(gpus))], profile)
            asked = known[view]
            if asked is not None and (best is None or asked < best):
                best, where = asked, gpus
        return None if best is None else (next(iter(where)), best.start)


class FirstFit:
    """The first GPU that takes it, at the lowest start."""

    def view(self, state: Cut) -> Hashable:
        """Every GPU for itself."""
        return None

    def pick(self, fleet: Fleet, profile: str) -> Pick | None:
        """From the first GPU on."""
        for gpu, state in enumerate(fleet.states):
            starts = _starts(state, profile)
            if starts:
                return gpu, starts[0]
        return None


@lru_cache(maxsize=65536)
def _starts(state: Cut, profile: str) -> tuple[int, ...]:
    return state.starts(profile)


def _free(state: Cut) -> Hashable:
    return state.busy, state.left


def market(workload: Workload) -> Cheapest:
    """Ours: what a step takes from the value of the GPU's state, by the very steps and prices of the service."""
    return by_table(solve_table(workload.geometry, workload.mix))


def by_table(table: Table) -> Cheapest:
    """Decisions as the service takes them with this table."""
    policy = Policy(values=Values({table.geometry: table}))

    def ask(state: Cut, profile: str) -> Asked | None:
        found = offers(state, SliceNeed(profile, Terms()), policy)
        if not found:
            return None
        taken = found[0].step.slice
        assert taken is not None
        return Asked(found[0].price, taken.start)

    return Cheapest(ask, lambda state: state.held)


def mfi(workload: Workload) -> Cheapest:
    """Least growth of a fragmentation score: starts that are blocked though the free units would do, by size.

    As we read arXiv 2511.18906; scarce engines count as blocking, which the paper does not have.
    """
    del workload
    return _least_growth(lambda state: sum(_blocked(state, profile) for profile in state.geometry.profiles))


def _blocked(state: Cut, profile: Profile) -> int:
    free = state.geometry.width - state.busy.bit_count()
    if profile.size > free:
        return 0
    return profile.size * (len(grid(state.geometry).by_profile[profile.name]) - len(state.starts(profile.name)))


def options(workload: Workload) -> Cheapest:
    """Most legal starts kept open, each counted by its size and by how often its profile is asked for."""
    kinds = [(profile.name, profile.size * workload.mix[profile.name]) for profile in workload.geometry.profiles]
    return _least_growth(lambda state: -sum(worth * len(state.starts(name)) for name, worth in kinds))


def best_fit(workload: Workload) -> Cheapest:
    """The fullest GPU that takes it."""
    del workload

    def ask(state: Cut, profile: str) -> Asked | None:
        starts = state.starts(profile)
        return Asked(-state.busy.bit_count(), starts[0]) if starts else None

    return Cheapest(ask, _free)


def _least_growth(score: Callable[[Cut], float]) -> Cheapest:
    def ask(state: Cut, profile: str) -> Asked | None:
        now = score(state)
        grown = ((score(state.add(Slice(profile, at))) - now, at) for at in state.starts(profile))
        return min((Asked(round(more, 9), at) for more, at in grown), default=None)

    return Cheapest(ask, _free)


def first_fit(workload: Workload) -> FirstFit:
    """The first GPU that takes it, at the lowest start."""
    del workload
    return FirstFit()


# --- free migration, for reference ---


class Repacked:
    """A fleet on which everything may move whenever something arrives: lost only if no packing holds it all."""

    def __init__(self, geometry: Geometry, packings: Packings) -> None:
        self._rows = {profile.name: i for i, profile in enumerate(geometry.profiles)}
        self._packings = packings
        self._held = [0] * len(self._rows)

    def decide(self, profile: str) -> str | None:
        """The profile if there is any packing of all that is held and one more."""
        row = self._rows[profile]
        wanted = (*self._held[:row], self._held[row] + 1, *self._held[row + 1 :])
        return profile if self._packings.hold(wanted) else None

    def take(self, chosen: str) -> None:
        """It is served, wherever."""
        self._held[self._rows[chosen]] += 1

    def leave(self, held: str) -> None:
        """It is given back."""
        self._held[self._rows[held]] -= 1


class Packings:
    """Which counts of slices so many GPUs can hold, exactly.

    A packing is how many GPUs have each filling. The room of each one that was found is kept, and so are counts
    for which there is none, so that the solver is asked only about what neither settles.
    """

    def __init__(self, geometry: Geometry, gpus: int) -> None:
        self._gpus = gpus
        self._fillings = fillings(geometry)
        self._rooms = _Known(len(geometry.profiles))
        self._too_many = _Known(len(geometry.profiles))

    def hold(self, counts: Sequence[int]) -> bool:
        """Whether there is a packing with room for these counts."""
        asked = np.array(counts)
        if (self._rooms.rows >= asked).all(axis=1).any():
            return True
        if (self._too_many.rows <= asked).all(axis=1).any():
            return False
        room = self._found(counts)
        if room is None:
            self._too_many.add(counts)
        else:
            self._rooms.add(room)
        return room is not None

    def _found(self, counts: Sequence[int]) -> Sequence[int] | None:
        """The room of some packing; None if there is none.

        CP-SAT finds one in a millisecond or two, but can take half a minute to prove that there is none; SCIP
        proves that at once.
        """
        chosen = self._by_cp_sat(counts) or self._by_scip(counts)
        if chosen is None:
            return None
        room = [int(slices) for slices in np.array(chosen) @ np.array(self._fillings)]
        assert sum(chosen) == self._gpus
        assert all(count <= slices for count, slices in zip(counts, room, strict=True))
        return room

    def _by_cp_sat(self, counts: Sequence[int]) -> list[int] | None:
        """How many GPUs have each filling; None also where the effort was not enough."""
        model = cp_model.CpModel()
        used = [model.new_int_var(0, self._gpus, "") for _ in self._fillings]
        model.add(sum(used) == self._gpus)
        for row, count in enumerate(counts):
            model.add(sum(n * filling[row] for n, filling in zip(used, self._fillings, strict=True)) >= count)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.max_deterministic_time = CP_SAT_EFFORT
        found = solver.solve(model) in (cp_model.OPTIMAL, cp_model.FEASIBLE)
        return [solver.value(n) for n in used] if found else None

    def _by_scip(self, counts: Sequence[int]) -> list[int] | None:
        """The same, and None only where there is no packing."""
        solver = pywraplp.Solver.CreateSolver("SCIP")
        used = [solver.IntVar(0, self._gpus, "") for _ in self._fillings]
        solver.Add(sum(used) == self._gpus)
        for row, count in enumerate(counts):
            solver.Add(sum(n * filling[row] for n, filling in zip(used, self._fillings, strict=True)) >= count)
        status = solver.Solve()
        if status == pywraplp.Solver.INFEASIBLE:
            return None
        assert status in (pywraplp.Solver.OPTIMAL, pywraplp.Solver.FEASIBLE), status
        return [round(n.solution_value()) for n in used]


class _Known:
    """Rows of counts, to compare with all at once."""

    def __init__(self, width: int) -> None:
        self._space = np.zeros((64, width), dtype=np.int64)
        self._count = 0

    @property
    def rows(self) -> NDArray[np.int64]:
        return self._space[: self._count]

    def add(self, counts: Sequence[int]) -> None:
        if self._count == len(self._space):
            self._space = np.concatenate((self._space, np.zeros_like(self._space)))
        self._space[self._count] = counts
        self._count += 1


@lru_cache(maxsize=64)
def fillings(geometry: Geometry) -> tuple[tuple[int, ...], ...]:
    """How many slices of each profile one GPU can hold together; those that leave no room for more."""
    names = [profile.name for profile in geometry.profiles]
    found = {(0,) * len(names): {empty(geometry)}}
    queue = list(found)
    full = []
    for counts in queue:
        more = False
        for i, name in enumerate(names):
            after = {state.add(Slice(name, at)) for state in found[counts] for at in state.starts(name)}
            if after:
                more = True
                larger = (*counts[:i], counts[i] + 1, *counts[i + 1 :])
                if larger not in found:
                    found[larger] = set()
                    queue.append(larger)
                found[larger] |= after
        if not more:
            full.append(counts)
    return tuple(full)


# --- the runs ---

POLICIES: Mapping[str, Callable[[Workload], Chooser] | None] = {
    "market": market,
    "options": options,
    "mfi": mfi,
    "best-fit": best_fit,
    "first-fit": first_fit,
    "repack": None,
}


@dataclass(frozen=True, slots=True)
class Seed:
    """One run: accepted, in per cent, by number and by units."""

    seed: int
    requests: float
    slice_demand: float


@dataclass(frozen=True, slots=True)
class Result:
    """One policy over all seeds; how long one decision took."""

    policy: str
    seeds: tuple[Seed, ...]
    p50_us: float
    p99_us: float

    @property
    def requests(self) -> float:
        """Mean over the seeds."""
        return fmean(seed.requests for seed in self.seeds)

    @property
    def slice_demand(self) -> float:
        """Mean over the seeds."""
        return fmean(seed.slice_demand for seed in self.seeds)


def replay(workload: Workload, policy: str, seeds: Sequence[int]) -> Result:
    """Play the arrivals of each seed against one policy."""
    if policy not in POLICIES:
        raise ValueError(f"no policy {policy}; there are {', '.join(POLICIES)}")
    make = POLICIES[policy]
    chooser = None if make is None else make(workload)
    packings = Packings(workload.geometry, workload.gpus)
    runs, took = [], array("q")
    for seed in seeds:
        if chooser is None:
            runs.append(_run(Repacked(workload.geometry, packings), workload, seed, took))
        else:
            runs.append(_run(Fleet(workload.geometry, workload.gpus, chooser), workload, seed, took))
    p50, p99 = (percentile(took, share) / 1000 for share in (0.5, 0.99))
    return Result(policy, tuple(runs), p50, p99)


def _run(system: System[Token], workload: Workload, seed: int, took: array[int]) -> Seed:
    leaving: list[tuple[float, int, Token]] = []
    offered, accepted = [0, 0], [0, 0]  # by number, by units
    first = workload.arrivals // DROPPED
    for number, arrival in enumerate(arrivals(workload, seed)):
        while leaving and leaving[0][0] <= arrival.at:
            system.leave(heappop(leaving)[2])
        began = time.perf_counter_ns()
        chosen = system.decide(arrival.profile.name)
        took.append(time.perf_counter_ns() - began)
        if chosen is not None:
            system.take(chosen)
            heappush(leaving, (arrival.until, number, chosen))
        if number >= first:
            for i, amount in enumerate((1, arrival.profile.size)):
                offered[i] += amount
                accepted[i] += amount if chosen is not None else 0
    requests, units = (100 * part / whole if whole else 100.0 for part, whole in zip(accepted, offered, strict=True))
    return Seed(seed, requests, units)


def percentile(numbers: Sequence[int], share: float) -> float:
    """The number that this share of them does not exceed; 0 of none."""
    return sorted(numbers)[max(0, math.ceil(share * len(numbers)) - 1)] if numbers else 0.0


# --- in words ---


def as_json(workload: Workload, results: Sequence[Result]) -> Mapping[str, object]:
    """Everything, for programs."""
    return {
        "mix": workload.mix,
        "load": workload.load,
        "gpus": workload.gpus,
        "arrivals": workload.arrivals,
        "policies": [
            {
                "policy": result.policy,
                "requests_percent": round(result.requests, 3),
                "slice_demand_percent": round(result.slice_demand, 3),
                "decision_p50_us": round(result.p50_us, 2),
                "decision_p99_us": round(result.p99_us, 2),
                "seeds": [asdict(seed) for seed in result.seeds],
            }
            for result in results
        ],
    }


def show(workload: Workload, results: Sequence[Result], console: Console) -> None:
    """A row for each policy, in the order asked; the difference is to the first, seed by seed."""
    console.print(
        f"{workload.gpus} GPUs of {workload.geometry.width} units, load {workload.load:g}, "
        f"{workload.arrivals} arrivals (a quarter dropped), {len(results[0].seeds)} seeds; "
        + ", ".join(f"{name} {weight:g}" for name, weight in workload.mix.items())
    )
    table = Grid()
    table.add_column("Policy")
    for title in ("Requests %", "Slice-demand %", "Against first", "Lowest", "Highest", "p50 µs", "p99 µs"):
        table.add_column(title, justify="right")
    for result in results:
        demands = [seed.slice_demand for seed in result.seeds]
        table.add_row(
            result.policy,
            f"{result.requests:.2f}",
            f"{result.slice_demand:.2f}",
            _against(result, results[0]),
            f"{min(demands):.2f}",
            f"{max(demands):.2f}",
            f"{result.p50_us:.1f}",
            f"{result.p99_us:.1f}",
        )
    console.print(table)
    if any(result.policy == "repack" for result in results):
        console.print("repack may move everything at every arrival: a reference, not a placement policy.")


def _against(result: Result, first: Result) -> str:
    """The mean difference in slice-demand and its standard error over the seeds."""
    if result is first:
        return ""
    gaps = [mine.slice_demand - other.slice_demand for mine, other in zip(result.seeds, first.seeds, strict=True)]
    error = f" ± {stdev(gaps) / math.sqrt(len(gaps)):.2f}" if len(gaps) > 1 else ""
    return f"{fmean(gaps):+.2f}{error}"


def seeds_from(words: str) -> tuple[int, ...]:
    """`7-16`, `7`, or `1,4,9`."""
    try:
        seeds: list[int] = []
        for part in words.split(","):
            first, _, last = part.partition("-")
            seeds.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        seeds = []
    if not seeds:
        raise ValueError(f"{words}: not seeds such as 7-16 or 1,4,9")
    return tuple(seeds)
