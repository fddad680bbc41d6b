"""What a cut GPU can still earn: a value for each of its states, found by a market of GPUs.

A state's value falls with what is held; a step costs the value it takes away. The values come from a fleet on
which demand keeps arriving (prices.md, recipe A; figures there). The *price* of an arrival is what the cheapest
GPU of the fleet would ask for it. One GPU that meets those prices, and takes the offers that pay more than they
cost it, has values of its own; with these the fleet is simulated again, until both agree:

    values ──simulate()──▶ prices of each profile ──best_reply()──▶ values ──▶ … averaged ──guard──▶ Table

All is counted on *classes* of states that no sequence of arrivals and departures can tell apart, and on what
profiles take, not on their names: boards of one family share one solution. No clock, no I/O; the same seed gives
the same table.

Found on the way: on eight units all horizons from 0.1 to 30 end within a tenth of a point of each other, and neither
their mean nor more seeds is better. Only pods that are the same for all candidates show such differences at all: on
streams of their own, 600,000 arrivals still leave a quarter of a point to chance. `options` with a convex part is a
stronger candidate than the policy of that name, whose figure depends on its ties.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from solver.geometry import Block, Cut, Geometry, Slice, empty, grid

MILLI = 1000

STATES = 20_000
"""A geometry with more states than this keeps the `options` formula: counting and merging them takes half a second.
The largest board known has 1,499."""

BLOCKS = 256
"""The same for blocks; the largest board known has 21."""

CLASSES = 600
"""The same for merged states: the linear systems grow with their cube. The largest board known has 260."""

GPUS = 100
"""The simulated fleet. Tables made for it hold from 10 to 400 GPUs."""

ROUNDS, AVERAGED, STEP = 14, 6, 0.4
"""Rounds of simulate and reply; how many of the last are averaged; how far each round goes towards the reply."""

ARRIVALS = 35_000
"""Arrivals simulated in each round; the first quarter is dropped."""

GUARD = 2
"""The guard compares candidates on so many times more arrivals: the same for all of them, so that a difference of
a tenth of a point is seen."""

REPLIES = 5
"""Rounds of policy iteration against the same prices."""

HORIZONS = (0.1, 1.0, 3.0, 10.0)
"""How far ahead a GPU of the market looks, in mean holding times. On eight units they hardly differ; twelve units
(RTX PRO 6000, uniform) gain 0.2 points from 0.1 against 1 and 3, where four (A30) lose 0.1 to 0.5 beyond 1."""

Mix = tuple[tuple[str, float], ...]
"""Profiles with their share of the arrivals, sorted by name."""

Held = tuple[Block, ...]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """The value of every state of one geometry under one mix of demand, in whole milli-GPU; empty is 0.

    `method` says in words where the values come from; `states` and `merged` are their numbers (0 where nothing
    was counted). A state that is not among the values gets that of a formula: best-fit or `options`. Tables are
    compared by identity, so that they can be keys.
    """

    geometry: Geometry
    mix: Mix
    method: str
    states: int = 0
    merged: int = 0
    values: Mapping[Held, int] = field(default_factory=dict, repr=False)
    by_best_fit: bool = False

    def of(self, state: Cut) -> int:
        """What the state can still earn, if every idle instance were destroyed."""
        known = self.values.get(state.held)
        if known is not None:
            return known
        bare = state.without_idle()
        return best_fit_of(bare) if self.by_best_fit else options_of(bare, self.mix)

    def taken(self, state: Cut, profile: str) -> int | None:
        """What serving one more slice of the profile takes away at the best start; None where none is legal."""
        bare = state.without_idle()
        left = [self.of(bare.add(Slice(profile, start))) for start in bare.starts(profile)]
        return self.of(bare) - max(left) if left else None


def solve_table(
    geometry: Geometry,
    mix: Mapping[str, float] | Mix | None = None,
    *,
    seed: int = 0,
    arrivals: int = ARRIVALS,
) -> Table:
    """The best table that the market, or failing it a formula, gives for this geometry and mix.

    Without a mix every profile that the board offers is asked for equally often, variants with media engines or
    graphics too. Profiles that are not in the mix are not asked for, but what they hold is a state like any other.
    A geometry with more than STATES states or CLASSES classes, or a mix in which nothing fits the board, keeps the
    formula; `method` says so.
    """
    shares = mix_for(geometry, mix)
    shape, rows = shape_of(geometry)
    weights = [0.0] * len(shape.rows)
    for profile, share in shares:
        if profile in rows:
            weights[rows[profile]] += share
    if not sum(weights):
        return Table(geometry, shares, "options (nothing in the mix fits)")
    graph = graph_of(shape)
    if isinstance(graph, str):
        return Table(geometry, shares, f"options ({graph})")
    solution = _solve(shape, tuple(weights), seed, arrivals)
    values = {held: solution.values[group] for held, group in zip(graph.states, graph.group, strict=True)}
    return Table(geometry, shares, solution.method, len(values), graph.size, values)


def options_table(geometry: Geometry, mix: Mapping[str, float] | Mix | None = None) -> Table:
    """A table at once, by formula: the legal starts that are still open."""
    return Table(geometry, mix_for(geometry, mix), "options")


def best_fit_table(geometry: Geometry, mix: Mapping[str, float] | Mix | None = None) -> Table:
    """A table at once, by formula: the fuller GPU first."""
    return Table(geometry, mix_for(geometry, mix), "best-fit", by_best_fit=True)


def mix_for(geometry: Geometry, mix: Mapping[str, float] | Mix | None) -> Mix:
    """The mix as shares of one, in order of names, with only this board's profiles; all of them alike for None."""
    names = {profile.name for profile in geometry.profiles}
    given = dict.fromkeys(names, 1.0) if mix is None else dict(mix)
    wrong = [name for name, weight in given.items() if not 0 <= weight < math.inf]
    if wrong:
        raise ValueError(f"the weight of {wrong[0]} is {given[wrong[0]]}; weights are 0 or more, and finite")
    known = {name: weight for name, weight in given.items() if name in names and weight > 0}
    largest = max(known.values(), default=1.0)  # first to a scale where the sum cannot overflow
    scaled = {name: weight / largest for name, weight in known.items()}
    total = sum(scaled.values())
    return tuple(sorted((name, weight / total) for name, weight in scaled.items()))


# --- formulas: values at once ---

CONVEX_SHARE = 0.3
"""How much of the `options` value is convex in the free units. From 0.15 to 0.5 the results hardly differ."""


@lru_cache(maxsize=65536)
def options_of(state: Cut, mix: Mix) -> int:
    """The units that could be taken at legal starts still open, by the mix, against an empty GPU's; part convex."""
    fresh = _open_units(empty(state.geometry), mix)
    open_share = _open_units(state, mix) / fresh if fresh else 1.0
    return round(MILLI * ((1 - CONVEX_SHARE) * (open_share - 1) + CONVEX_SHARE * (_free_share(state) ** 2 - 1)))


@lru_cache(maxsize=65536)
def best_fit_of(state: Cut) -> int:
    """Convex in the free units, so that the fuller GPU is the cheaper one."""
    return round(MILLI * (_free_share(state) ** 2 - 1))


def _open_units(state: Cut, mix: Mix) -> float:
    sizes = {profile.name: profile.size for profile in state.geometry.profiles}
    return sum(share * sizes.get(name, 0) * len(state.starts(name)) for name, share in mix)


def _free_share(state: Cut) -> float:
    width = state.geometry.width
    return (width - state.busy.bit_count()) / width if width > 0 else 0.0


# --- states, and the classes that nothing can tell apart ---


@dataclass(frozen=True, slots=True)
class Shape:
    """What matters of a geometry: its width, its scarce capacities, and the blocks that each kind of slice takes.

    Profiles that take the same blocks are one row. No names: boards of one family have equal shapes.
    """

    width: int
    totals: tuple[int, ...]
    rows: tuple[tuple[Block, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The units that a slice of each row takes."""
        return tuple(row[0].size for row in self.rows)


def shape_of(geometry: Geometry) -> tuple[Shape, dict[str, int]]:
    """The shape, and the row of each profile that fits an empty board at all."""
    ready = grid(geometry)
    fresh = empty(geometry)
    blocks = {name: tuple(ready.blocks[Slice(name, at)] for at in fresh.starts(name)) for name in ready.by_profile}
    rows = sorted(set(blocks.values()) - {()})
    return Shape(geometry.width, ready.totals, tuple(rows)), {
        name: rows.index(row) for name, row in blocks.items() if row
    }


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """The classes of states, and where arrivals and departures lead from each. The empty state's class is 0.

    Two states are in one class if for every row the same classes can be reached, and if the same classes are left
    behind when one of their blocks goes (each of them equally often): then they are worth the same.
    `open` counts legal starts by row and `free` free units, averaged over the class; only formulas look at them.
    """

    shape: Shape
    states: tuple[Held, ...]
    group: tuple[int, ...]  # [state], its class
    starts: tuple[tuple[Mapping[int, tuple[int, int]], ...], ...]  # [row][state][class reached], (state, block)
    without: tuple[Mapping[int, int], ...]  # [state][block], the state when it is gone
    successors: Ints  # [row, class, choice], classes, filled up with `size`
    departures: tuple[tuple[int, ...], ...]  # [class]
    open: Floats  # [row, class]
    free: Floats  # [class]

    @property
    def size(self) -> int:
        """The number of classes."""
        return len(self.departures)


@lru_cache(maxsize=64)
def graph_of(shape: Shape, merge: bool = True) -> Graph | str:
    """The states of this shape, merged as far as that is exact; words if they are too many."""
    blocks = sorted({block for row in shape.rows for block in row})
    if len(blocks) > BLOCKS:
        return f"{len(blocks)} different blocks, more than {BLOCKS}"
    number = {block: i for i, block in enumerate(blocks)}
    rows = [[number[block] for block in row] for row in shape.rows]
    found = _states(shape, blocks)
    if isinstance(found, str):
        return found
    without = [{b: found[s & ~(1 << b)] for b in _bits(s)} for s in found]
    onward = [
        [[(found[s | 1 << b], b) for b in row if not s >> b & 1 and s | 1 << b in found] for s in found] for row in rows
    ]
    successors = [[[to for to, _ in choices] for choices in row] for row in onward]
    departures = [list(left.values()) for left in without]
    group = _refine(successors, departures) if merge else list(range(len(found)))
    size = max(group) + 1
    if size > CLASSES and merge:
        return f"{size} merged states, more than {CLASSES}"
    members = np.bincount(group)
    first = {group[i]: i for i in reversed(range(len(found)))}
    opened = [np.bincount(group, weights=[len(to) for to in row]) / members for row in successors]
    busy = [sum(blocks[b].size for b in _bits(s)) for s in found]
    return Graph(
        shape,
        tuple(tuple(blocks[b] for b in _bits(s)) for s in found),
        tuple(group),
        tuple(tuple({group[to]: (to, b) for to, b in reversed(choices)} for choices in row) for row in onward),
        tuple(without),
        _filled([[sorted({group[to] for to in row[first[c]]}) for c in range(size)] for row in successors], size),
        tuple(tuple(sorted(group[to] for to in departures[first[c]])) for c in range(size)),
        np.array(opened).reshape(len(rows), size),
        shape.width - np.bincount(group, weights=busy) / members,
    )


def _states(shape: Shape, blocks: Sequence[Block]) -> dict[int, int] | str:
    """Every set of blocks that can be held together, as a bit set of their numbers, numbered from the empty one."""
    clash = [sum(1 << j for j, other in enumerate(blocks) if block.mask & other.mask) for block in blocks]
    left = {0: shape.totals}
    queue = [0]
    for state in queue:
        for b in range(state.bit_length(), len(blocks)):
            if state & clash[b]:
                continue
            rest = tuple(have - use for have, use in zip(left[state], blocks[b].uses, strict=True))
            if any(have < 0 for have in rest):
                continue
            left[state | 1 << b] = rest
            queue.append(state | 1 << b)
        if len(queue) > STATES:
            return f"more than {STATES} states"
    return {state: i for i, state in enumerate(queue)}


def _filled(ragged: Sequence[Sequence[Sequence[int]]], blank: int) -> Ints:
    most = max((len(inner) for outer in ragged for inner in outer), default=0)
    return np.array([[[*inner, *[blank] * (most - len(inner))] for inner in outer] for outer in ragged])


def _bits(number: int) -> Iterable[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low


def _refine(successors: Sequence[Sequence[Sequence[int]]], departures: Sequence[Sequence[int]]) -> list[int]:
    """The class of each state: the coarsest partition that every arrival and every departure respects."""
    group = [0] * len(departures)
    size = 1
    while True:
        seen: dict[tuple[object, ...], int] = {}
        finer = []
        for i, leaving in enumerate(departures):
            reached = tuple(frozenset([group[to] for to in row[i]]) for row in successors)
            signature = (group[i], reached, tuple(sorted([group[to] for to in leaving])))
            finer.append(seen.setdefault(signature, len(seen)))
        if len(seen) == size:
            return group
        group, size = finer, len(seen)


# --- the market ---


@dataclass(frozen=True, slots=True)
class Solution:
    """The values of a graph's classes in milli-GPU, and where they come from."""

    values: tuple[int, ...]
    method: str


@lru_cache(maxsize=64)
def _solve(shape: Shape, weights: tuple[float, ...], seed: int, arrivals: int) -> Solution:
    """The guard: of all candidates the one that serves most on simulated fleets that none was made on."""
    graph = graph_of(shape)
    assert isinstance(graph, Graph)
    demand = Demand.of(shape, weights)
    candidates = {
        f"market T={horizon:g}": market_values(graph, demand, horizon, seed, arrivals) for horizon in HORIZONS
    }
    candidates["market, mean"] = np.array(list(candidates.values())).mean(axis=0)
    candidates |= formula_values(graph, weights)
    rounded = {name: _milli(graph, values) for name, values in candidates.items()}
    unseen = Stream.of(demand, GUARD * arrivals, (seed, ROUNDS))
    served = {name: served_by(graph, demand, values, unseen) for name, values in rounded.items()}
    best = max(served, key=served.__getitem__)
    return Solution(tuple(rounded[best].astype(int).tolist()), best)


def _milli(graph: Graph, values: Floats) -> Floats:
    milli: Floats = np.round(MILLI * (values - values[0]) / graph.shape.width)
    return milli


@dataclass(frozen=True, slots=True)
class Demand:
    """Arrivals per mean holding time on the simulated fleet, by row: as many units as it has."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...]

    @classmethod
    def of(cls, shape: Shape, weights: Sequence[float]) -> Demand:
        """Load 1.0, whatever the load will be: tables made at lighter loads are worse at every load."""
        units = sum(weight * size for weight, size in zip(weights, shape.sizes, strict=True))
        return cls(shape.sizes, tuple(GPUS * shape.width * weight / units for weight in weights))


def market_values(graph: Graph, demand: Demand, horizon: float, seed: int, arrivals: int = ARRIVALS) -> Floats:
    """Values at which one GPU's best reply to the prices of the fleet leads to these prices again, nearly."""
    width = graph.shape.width
    market = _Market(graph, demand, horizon)
    values: Floats = max(demand.sizes) * ((graph.free / width) ** 2 - 1)
    late = []
    for turn in range(ROUNDS):
        asked = simulate(graph, values, Stream.of(demand, arrivals, (seed, turn, round(1000 * horizon))))
        reply = market.best_reply(values, asked)
        values = (1 - STEP) * values + STEP * (reply - reply[0])
        late.append(values)
    average: Floats = np.array(late[-AVERAGED:]).mean(axis=0)
    return average


def formula_values(graph: Graph, weights: Sequence[float]) -> dict[str, Floats]:
    """The formulas as candidates, averaged over each class."""
    width = graph.shape.width
    convex = (graph.free / width) ** 2
    units = np.array(weights) * graph.shape.sizes @ graph.open
    options = (1 - CONVEX_SHARE) * units / units[0] + CONVEX_SHARE * convex
    return {"options": width * options, "best-fit": width * convex}


def served_by(graph: Graph, demand: Demand, values: Floats, stream: Stream) -> float:
    """The share of the demand, in units, that a fleet with these values serves."""
    fits = [float(np.isfinite(prices).mean()) if len(prices) else 1.0 for prices in simulate(graph, values, stream)]
    units = [rate * size for rate, size in zip(demand.rates, demand.sizes, strict=True)]
    return sum(unit * fit for unit, fit in zip(units, fits, strict=True)) / sum(units)


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Arrivals and departures in the order of their times: arrival i of a row as i, its departure as ~i."""

    rows: list[int]
    events: list[int]

    @classmethod
    def of(cls, demand: Demand, arrivals: int, seed: tuple[int, ...]) -> Stream:
        """Poisson arrivals, exponential holding times. Whatever the policy, the same seed gives the same pods."""
        chance = np.random.default_rng(seed)
        total = sum(demand.rates)
        begins = np.cumsum(chance.exponential(1 / total, arrivals))
        rows = chance.choice(len(demand.rates), arrivals, p=np.array(demand.rates) / total)
        ends = begins + chance.exponential(1.0, arrivals)
        order = np.argsort(np.concatenate((begins, ends[ends < begins[-1]])), kind="stable")
        leaves = np.append(np.arange(arrivals), ~np.flatnonzero(ends < begins[-1]))
        return cls(rows.tolist(), leaves[order].tolist())


def simulate(graph: Graph, values: Floats, stream: Stream) -> list[Floats]:
    """What the cheapest GPU of the fleet asks of each arrival, by row, in order; infinite where it fits nowhere.

    It goes to that GPU whatever it asks. The first quarter is dropped.
    """
    cost, after = _costs(graph, values)
    costs: list[list[float]] = cost.tolist()
    reached: list[list[int]] = after.tolist()
    group, starts, without = graph.group, graph.starts, graph.without
    asked: list[list[float]] = [[] for _ in costs]
    at = [0] * GPUS  # the state of each GPU
    here = {0: list(range(GPUS))}  # the GPUs of each class that any is in
    held: dict[int, tuple[int, int]] = {}  # the GPU and the block of each arrival that is there
    rows = stream.rows
    for event in stream.events:
        if event >= 0:
            row = rows[event]
            cheapest = costs[row]
            old = min(here, key=cheapest.__getitem__)
            asked[row].append(cheapest[old])
            if cheapest[old] == math.inf:
                continue
            gpu = here[old][-1]
            state, block = starts[row][at[gpu]][reached[row][old]]
            held[event] = gpu, block
        elif ~event in held:
            gpu, block = held.pop(~event)
            old = group[at[gpu]]
            state = without[at[gpu]][block]
        else:
            continue
        if len(here[old]) == 1:
            del here[old]
        else:
            here[old].remove(gpu)
        at[gpu] = state
        new = group[state]
        if new in here:
            here[new].append(gpu)
        else:
            here[new] = [gpu]
    return [np.array(prices[len(prices) // 4 :]) for prices in asked]


def _costs(graph: Graph, values: Floats) -> tuple[Floats, Ints]:
    """What serving each row takes from each class (infinite where nothing fits), and the class that it leads to."""
    worth = np.append(values, -np.inf)[graph.successors]
    best = worth.argmax(axis=2)[..., np.newaxis]
    cost = values - np.take_along_axis(worth, best, axis=2)[..., 0]
    return cost, np.take_along_axis(graph.successors, best, axis=2)[..., 0]


class _Market:
    """One GPU of the market, as linear equations in the values of its classes."""

    def __init__(self, graph: Graph, demand: Demand, horizon: float) -> None:
        self._graph, self._demand = graph, demand
        self._still = np.diag([1 / horizon + len(leaving) for leaving in graph.departures])
        for group, leaving in enumerate(graph.departures):
            for left in leaving:
                self._still[group, left] -= 1

    def best_reply(self, values: Floats, asked: Sequence[Floats]) -> Floats:
        """What each class earns for a GPU that takes every offer that pays more than it takes away."""
        offers = [np.sort(np.minimum(prices, size)) for prices, size in zip(asked, self._demand.sizes, strict=True)]
        sums = [np.append(np.cumsum(prices[::-1])[::-1], 0.0) for prices in offers]
        every = np.arange(self._graph.size)
        reply = values
        for _ in range(REPLIES):
            cost, after = _costs(self._graph, reply)
            system, income = self._still.copy(), np.zeros(self._graph.size)
            for row, (rate, prices) in enumerate(zip(self._demand.rates, offers, strict=True)):
                if not len(prices):
                    continue
                refused = np.searchsorted(prices, cost[row], side="right")
                taken = rate * (1 - refused / len(prices))
                income += rate * sums[row][refused] / len(prices)
                system[every, every] += taken
                system[every, after[row] % self._graph.size] -= taken
            reply = _solved(system, income)
        return reply


def _solved(system: Floats, right: Floats) -> Floats:
    """Gaussian elimination without pivots, since the diagonal is larger than the rest of its row.

    Not `numpy.linalg.solve`: it starts threads of its own even for a hundred unknowns, and where other work keeps
    the cores busy they wait for each other ten times longer than the rest of the table takes.
    """
    rows = np.column_stack((system, right))
    size = len(right)
    for k in range(size):
        rows[k, k:] /= rows[k, k]
        below = rows[k + 1 :, k].nonzero()[0] + k + 1  # few: a class has few neighbours
        rows[below, k:] -= rows[below, k, np.newaxis] * rows[k, k:]
    for k in range(size - 1, 0, -1):
        rows[:k, size] -= rows[:k, k] * rows[k, size]
    return rows[:, size]
