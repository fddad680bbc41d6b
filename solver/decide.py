"""Everything that is pending, counted: how many units of each state serve which bundle of demands.

    stock    so many units in each state         pending  so many of each demand, by priority
    columns  what a unit in that state can serve, at its least price
    choices  how many units take each column; how many of each demand stay unplaced
    rules    a demand is served or unplaced; a unit takes one column
    tiers    worth of the unplaced by priority, then the policy's own

Its size is that of the different states and demands, not of nodes or pods. A column is a path of the flow of
units through states, and a path costs what its steps add up to, so one variable for each bundle says all that
a variable for each step could. Measured (500 empty nodes, 1,000 asks, nine kinds, one core): steps 12 s
(986 variables), columns 13 ms (72 variables), the same optimum.

Where some unit has too many columns to list, those of the one-by-one plan are taken, and then the ones that the
linear program finds worthwhile; bounds come from `relaxed`. The plan is then seldom proven, and never worse
than one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from solver.cluster import GPU_MILLI
from solver.columns import BITS, MASK, Catalogue, Column, Packed, Way, counts_of, in_order, is_loose, packed
from solver.demand import Demand
from solver.geometry import Cut
from solver.goals import WORST_MILLI, Policy
from solver.greedy import Mover, Position, place_all
from solver.plan import Status, Tier
from solver.pools import Pool, Pools
from solver.program import NOTHING, Floors, Limits, Program, minimise_in_order
from solver.relaxed import Relaxation
from solver.steps import Host, RoomState
from solver.units import Lens, Scale, Unit, UnitState, Worth

POOLS = 40
"""Whole nodes with too many bundles to list that are said in parts. Each takes a thousand variables or so; with
more of them columns are generated, and the bound comes from all nodes in one state together."""

ROUNDS = 30
"""How often columns are generated at most. Most of what is to be won comes in the first few rounds."""

LISTING = 0.5
"""The part of a plan's time, by its clock, in which columns are listed at most."""

LATE_SECONDS = 3.0
"""How long after its end one by one may still go on: it is what a plan falls back on. The rest stays unplaced."""

UNPLACED_WEIGHT = 1_000
"""What a milli-GPU unplaced counts against one of price while columns are generated."""


BEAM, WIDEST = 8, 128
"""Positions that such a walk keeps after each demand: at first, and where nothing more is found with fewer."""

KEPT = 4
"""Columns that it may add for one unit in one round."""

MOVES, WALKED = 20_000, 500_000
"""Steps that may be worked out while columns are generated, and that may be walked, known ones included: some
seconds each."""

TINY = 1e-6
"""What a column must promise at least, beyond rounding."""


class Wish(NamedTuple):
    """A demand and how urgent it is."""

    demand: Demand
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Take:
    """So many units that start in this state serve this, in this way. `loose`: a demand that takes nothing that
    can run out there; it goes so many times to any one of them, whatever else that serves.
    """

    unit: Unit
    way: Way
    times: int
    loose: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """A counted plan. `demands` numbers the demands that the ways speak of."""

    status: Status
    demands: tuple[Demand, ...]
    takes: tuple[Take, ...]
    unplaced: Mapping[Wish, int]
    tiers: tuple[Tier, ...]
    seconds: float


class Question:
    """What is asked, made ready: demands by number, what can be told apart, prices and worths."""

    def __init__(self, pending: Mapping[Wish, int], policy: Policy, worth: Worth) -> None:
        self.policy = policy
        self.demands = tuple(sorted({wish.demand for wish in pending}))
        self.wishes = sorted(pending, key=lambda wish: (-wish.priority, wish.demand))
        self.pending = pending
        number = {demand: d for d, demand in enumerate(self.demands)}
        self.number = number
        self.counts = [0] * len(self.demands)
        for wish, count in pending.items():
            self.counts[number[wish.demand]] += count
        self.worths = [worth.of(demand) for demand in self.demands]
        self.lens = Lens(self.demands, self.counts, policy)
        self.scale = Scale(policy, sum(self.counts))
        self.priorities = sorted({wish.priority for wish in pending}, reverse=True)

    def tier_names(self) -> list[str]:
        """What is minimised, in order."""
        several = len(self.priorities) > 1
        unplaced = [f"unplaced, priority {priority}" if several else "unplaced" for priority in self.priorities]
        return unplaced + ["+".join(name for name, _ in tier) for tier in self.policy.tiers]


def decide(
    stock: Mapping[UnitState, int], pending: Mapping[Wish, int], policy: Policy, limits: Limits | None = None
) -> Decision:
    """Place what is pending on so many hosts, GPUs in MIG mode, or whole nodes in these states."""
    gpus = [
        (kind, geometry)
        for state in stock
        for kind, geometry in (
            [(state.kind, state.geometry)]
            if isinstance(state, Cut)
            else [(kind, None) for kind in (state.host if isinstance(state, RoomState) else state).board.kinds]
        )
    ]
    gpus += [(cut.kind, cut.geometry) for state in stock if isinstance(state, RoomState) for cut, _ in state.cuts]
    question = Question(pending, policy, Worth.among(policy, gpus))
    units: dict[Unit, int] = {}
    for state, count in stock.items():
        if isinstance(state, RoomState):
            host, cuts = question.lens.units(state.host, [cut for cut, n in state.cuts for _ in range(n)])
            parts = [host, *cuts]
        else:
            parts = [Unit(question.lens.state(state))]
        for unit in parts:
            units[unit] = units.get(unit, 0) + count
    return decide_units(units, question, (limits or Limits()).started())


def decide_units(units: Mapping[Unit, int], question: Question, limits: Limits) -> Decision:
    """The same for units as the question's lens sees them. Demands that cannot compete are decided apart."""
    listing = limits.part(LISTING)
    go_on = lambda: not listing.none_left(0.0)  # noqa: E731
    catalogue = Catalogue(question.demands, question.counts, question.lens, question.scale, go_on)
    mover = Mover(question.demands, question.lens, question.scale)
    answers = [
        _Part(question, demands, mine, catalogue, mover, limits).solve() for demands, mine in _separate(units, question)
    ]
    bounds = [
        Tier(name, 0, sum(answer.tiers[t].bound for answer in answers), Status.UNKNOWN)
        for t, name in enumerate(question.tier_names())
    ]
    tiers = in_status(bounds, [sum(answer.tiers[t].value for answer in answers) for t in range(len(bounds))])
    unplaced: dict[Wish, int] = {}
    for answer in answers:
        unplaced.update(answer.unplaced)
    proven = all(tier.status is Status.OPTIMAL for tier in tiers)
    return Decision(
        Status.OPTIMAL if proven else Status.FEASIBLE,
        question.demands,
        tuple(take for answer in answers for take in answer.takes),
        unplaced,
        tiers,
        sum(answer.seconds for answer in answers),
    )


def in_status(tiers: Sequence[Tier], values: Sequence[int]) -> tuple[Tier, ...]:
    """The tiers with these values: proven down to the first whose bound is not reached."""
    found, status = [], Status.OPTIMAL
    for tier, value in zip(tiers, values, strict=True):
        if status is Status.OPTIMAL:
            status = Status.OPTIMAL if value == tier.bound else Status.FEASIBLE
        else:
            status = Status.UNKNOWN
        found.append(Tier(tier.name, value, tier.bound, status))
    return tuple(found)


def _separate(units: Mapping[Unit, int], question: Question) -> list[tuple[list[int], dict[Unit, int]]]:
    """Demands that can never compete for a unit, apart, with the units that may serve them.

    Each part is solved by itself, which is exact, and much easier to prove than all of them in one program.
    """
    root = list(range(len(question.demands)))

    def find(d: int) -> int:
        while root[d] != d:
            d = root[d]
        return d

    hosted = [d for d, demand in enumerate(question.demands) if not demand.slices]
    served_by: dict[object, list[int]] = {}

    def served(state: UnitState) -> list[int]:
        geometries: frozenset[object] = frozenset()
        if isinstance(state, Cut):
            geometries = frozenset({state.geometry})
        elif isinstance(state, RoomState):
            geometries = frozenset(cut.geometry for cut, _ in state.cuts)
        key = (isinstance(state, Cut), geometries)
        if key not in served_by:
            offered = {profile.name for each in geometries for profile in each.profiles}  # type: ignore[attr-defined]
            found = [] if isinstance(state, Cut) else list(hosted)
            found += [
                d
                for d, demand in enumerate(question.demands)
                if demand.slices and offered.issuperset(profile for profile, _ in demand.slices)
            ]
            served_by[key] = found
            for d in found:
                root[find(d)] = find(found[0])
        return served_by[key]

    of_unit = [(unit, count, served(unit.state)) for unit, count in units.items()]
    parts: dict[int, tuple[list[int], dict[Unit, int]]] = {}
    for d in range(len(question.demands)):
        parts.setdefault(find(d), ([], {}))[0].append(d)
    for unit, count, demands in of_unit:
        if demands:
            parts[find(demands[0])][1][unit] = count
    return list(parts.values())


@dataclass(slots=True)
class _Answer:
    takes: list[Take]
    unplaced: dict[Wish, int]
    tiers: list[Tier]
    seconds: float


class _Loose(NamedTuple):
    """A demand that such units can serve without end, since it takes nothing that can run out there."""

    demand: int
    unit: Unit
    column: Column


class Taking(NamedTuple):
    """So many units of a state that take a column; `loose`: see `Take`."""

    unit: Unit
    column: Column
    times: int = 0
    loose: bool = False


@dataclass(slots=True)
class _Choices:
    """The variables and rows of a program, by what they mean."""

    program: Program
    unplaced: dict[Wish, int] = field(default_factory=dict)
    taking: list[tuple[Taking, int]] = field(default_factory=list)
    pools: list[Pool] = field(default_factory=list)
    row_of_unit: dict[Unit, int] = field(default_factory=dict)
    row_of_demand: dict[int, int] = field(default_factory=dict)


class _Part:
    """Demands that compete with each other, on the units that may serve them."""

    def __init__(
        self,
        question: Question,
        demands: Sequence[int],
        units: Mapping[Unit, int],
        catalogue: Catalogue,
        mover: Mover,
        limits: Limits,
    ) -> None:
        self.question = question
        self.demands = demands
        self.catalogue = catalogue
        self.mover = mover
        self.limits = limits
        mine = set(demands)
        self.wishes = [wish for wish in question.wishes if question.number[wish.demand] in mine]
        self.columns = {unit: catalogue.of(unit, count) for unit, count in units.items()}
        self.pools = Pools(catalogue, demands)
        self.pooled = self._find_pooled()
        self.complete = all(each.complete or unit in self.pooled for unit, each in self.columns.items())
        self.loose = self._find_loose()
        self.seconds = 0.0
        self.walked = 0

    def _find_pooled(self) -> set[Unit]:
        """Nodes with too many bundles to list, if there are few such nodes: they are said in parts, one by one."""
        large = [unit for unit, each in self.columns.items() if not each.complete and isinstance(unit.state, RoomState)]
        if sum(self.columns[unit].count for unit in large) > POOLS:
            return set()
        return {unit for unit in large if isinstance(unit.state, RoomState) and self.pools.can_make(unit.state)}

    def solve(self) -> _Answer:
        """To proof where all columns are known; else the best of what is found, one by one included."""
        plans: list[list[Taking]] = []
        bounds = [NOTHING] * len(self.question.tier_names())
        if not self.complete or self.limits.none_left(0.0):
            plans.append(self._one_by_one([]))
        if not plans or not self.limits.none_left(0.0):
            if not self.complete:
                for unit, column, _, _ in plans[0]:
                    self.columns[unit].add(column)
                self._generate()
            found, proven, bounds = self._minimise(plans[0] if plans else None)
            if proven:
                plans = [found]
            else:
                plans.append(self._one_by_one(found))
                if found and self.complete:
                    plans.append(self._one_by_one([]))
        return self._answer(min(plans, key=self._tiers), bounds)

    # --- the model: choices, rules, goals ---

    def _minimise(self, greedy: list[Taking] | None) -> tuple[list[Taking], bool, list[int]]:
        """What was found (nothing, if so), whether all of it is proven, and the bound of each tier."""
        choices = self._choose()
        floors = None if self.complete else self._floors()
        hint = None if greedy is None else self._hint(choices, greedy)
        found = minimise_in_order(choices.program, self._goals(choices), self.limits, floors=floors, hint=hint)
        self.seconds += choices.program.seconds
        if found.values is None:
            return [], False, list(found.bounds)
        taken = [taking._replace(times=found.values[v]) for taking, v in choices.taking if found.values[v]]
        for pool in choices.pools:
            column = self.pools.column(pool, found.values)
            if column.bundle:
                taken.append(Taking(pool.unit, column, 1))
        return taken, all(status is Status.OPTIMAL for status in found.statuses), list(found.bounds)

    def _choose(self, *, only_complete: bool = False) -> _Choices:
        """Variables and rules over the columns: a unit takes one column, a demand is served or unplaced."""
        question = self.question
        choices = _Choices(Program(limits=self.limits))
        program = choices.program
        serving: dict[int, list[tuple[int, int]]] = {d: [] for d in self.demands}
        for wish in self.wishes:
            v = program.variable(question.pending[wish], "unplaced")
            choices.unplaced[wish] = v
            serving[question.number[wish.demand]].append((v, 1))
        for unit, columns in self.columns.items():
            if unit in self.pooled:
                for _ in range(columns.count):
                    pool = self.pools.add(program, unit, 1)
                    choices.pools.append(pool)
                    for d, v in pool.serving.items():
                        serving[d].append((v, 1))
                continue
            here = []
            for column in columns.found.values() if columns.complete or not only_complete else ():
                demands = counts_of(column.bundle)
                most = min([columns.count, *[question.counts[d] // n for d, n in demands]])
                if most:
                    v = program.variable(most)
                    choices.taking.append((Taking(unit, column), v))
                    here.append((v, 1))
                    for d, n in demands:
                        serving[d].append((v, n))
            choices.row_of_unit[unit] = len(program.rows)
            program.at_most(here, columns.count)
        for loose in self.loose:
            d = counts_of(loose.column.bundle)[0][0]
            v = program.variable(question.counts[d])
            choices.taking.append((loose, v))
            serving[d].append((v, 1))
        for d, terms in serving.items():
            choices.row_of_demand[d] = len(program.rows)
            program.equal(terms, question.counts[d])
        return choices

    def _goals(self, choices: _Choices) -> list[list[tuple[int, int]]]:
        """Worth of the unplaced by priority, then what the columns cost in each tier of the policy."""
        question = self.question
        unplaced = [
            [
                (v, question.worths[question.number[wish.demand]])
                for wish, v in choices.unplaced.items()
                if wish.priority == priority
            ]
            for priority in question.priorities
        ]
        prices: list[list[tuple[int, int]]] = [[] for _ in question.policy.tiers]
        for taking, v in choices.taking:
            for tier, price in zip(prices, question.scale.tiers(taking.column.price), strict=True):
                if price:
                    tier.append((v, price))
        for v, total in [each for pool in choices.pools for each in pool.prices]:
            for tier, price in zip(prices, question.scale.tiers(total), strict=True):
                if price:
                    tier.append((v, price))
        return [*unplaced, *prices]

    def _hint(self, choices: _Choices, plan: Sequence[Taking]) -> list[int]:
        times: dict[tuple[Unit, Packed], int] = {}
        for each in plan:
            key = (each.unit, each.column.bundle)
            times[key] = times.get(key, 0) + each.times
        values = [0] * len(choices.program.most)
        for taking, v in choices.taking:
            values[v] = 0 if taking.loose else times.get((taking.unit, taking.column.bundle), 0)
        for wish, left in self._unplaced(plan).items():
            values[choices.unplaced[wish]] = left
        return values

    def _floors(self) -> Floors:
        """Bounds from a program that allows more than there is (`relaxed`)."""
        choices = self._choose(only_complete=True)
        program = choices.program
        relaxation = Relaxation(program, self.catalogue, self.question.counts, self.demands)
        for columns in self.columns.values():
            if not columns.complete:
                relaxation.add(columns)
        for d, served_by in relaxation.serving.items():
            program.rows[choices.row_of_demand[d]].terms = [
                *program.rows[choices.row_of_demand[d]].terms,
                *[(v, 1) for v in served_by],
            ]
        goals = self._goals(choices)
        first = len(self.question.priorities)
        for price in relaxation.prices:
            for t, milli in enumerate(price.tiers):
                if milli:
                    goals[first + t].append((price.variable, milli))
        constants = [0] * first + relaxation.constant

        def floor(i: int, reached: Sequence[int]) -> int:
            if i:
                program.keep_at(goals[i - 1], reached[i - 1] - constants[i - 1])
            before = program.seconds
            found = program.floor(goals[i]) + constants[i]
            self.seconds += program.seconds - before
            return found

        return floor

    # --- columns where there are too many to list ---

    def _find_loose(self) -> list[Taking]:
        """Of each demand that takes only what cannot run out somewhere, the cheapest such place."""
        found = []
        for d in self.demands:
            need = self.question.demands[d].host_need
            if not is_loose(need):
                continue
            best: Taking | None = None
            for unit in self.columns:
                host = unit.state.host if isinstance(unit.state, RoomState) else unit.state
                if not isinstance(host, Host):
                    continue
                price = self.catalogue.courses.stays(host, need)
                if price is not None and (best is None or price < best.column.price):
                    best = Taking(unit, Column(packed(d), price, self.catalogue.loose_ways(host, d)), loose=True)
            if best is not None:
                found.append(best)
        return found

    def _generate(self) -> None:
        """Columns that the linear program would take if it had them, found by greedy walks along its duals."""
        question = self.question
        digit = question.scale.digits[0] if question.scale.digits else 1
        open_units = [unit for unit, each in self.columns.items() if not each.complete and unit not in self.pooled]
        width = BEAM
        for _ in range(ROUNDS):
            choices = self._choose()
            costs = np.zeros(len(choices.program.most))
            for wish, v in choices.unplaced.items():
                rank = len(question.priorities) - question.priorities.index(wish.priority)
                costs[v] = UNPLACED_WEIGHT * rank * question.worths[question.number[wish.demand]]
            for taking, v in choices.taking:
                costs[v] = taking.column.price / digit
            for v, price in [each for pool in choices.pools for each in pool.prices]:
                costs[v] = price / digit
            _, duals = choices.program.duals(costs)
            self.seconds += choices.program.seconds
            rewards = {d: float(duals[row]) for d, row in choices.row_of_demand.items()}
            added = 0
            for unit in open_units:
                if self.limits.none_left(self.seconds) or self.mover.looked_at > MOVES or self.walked > WALKED:
                    return
                rent = -float(duals[choices.row_of_unit[unit]])
                for profit, position in self._grow(unit, rewards, digit, width):
                    if profit > rent + TINY:
                        added += self.columns[unit].add(position.column())
            if not added and width >= WIDEST:
                return
            width = width if added else width * 4

    def _grow(self, unit: Unit, rewards: Mapping[int, float], digit: int, width: int) -> list[tuple[float, Position]]:
        """What pays best on such a unit, by a walk that keeps a few positions after each demand, the large first."""
        question = self.question
        worths = question.worths
        order = sorted((d for d in self.demands if rewards[d] > 0), key=lambda d: (-worths[d], d))
        caps = [min(MASK, count) for count in question.counts]
        best_rate = max((rewards[d] / worths[d] for d in order), default=0.0)
        found: list[tuple[float, Position]] = []
        beam = [(0.0, 0, Position(unit, unit.state, 0, 0, 1))]
        while beam:
            after: dict[UnitState, tuple[float, int, Position]] = {}
            for profit, first, here in beam:
                for i in range(first, len(order)):
                    d = order[i]
                    if here.bundle >> BITS * d & MASK >= caps[d]:
                        continue
                    move = self.mover.move(unit, here.state, d)
                    self.walked += 1
                    if move is None or move.after == here.state:
                        continue
                    total = profit + rewards[d] - move.price / digit
                    known = after.get(move.after)
                    if known is None or total > known[0]:
                        bundle, price = here.bundle + packed(d), here.price + move.price
                        after[move.after] = (
                            total,
                            i,
                            Position(unit, move.after, bundle, price, 1, here, (d, move.steps)),
                        )
            beam = sorted(after.values(), key=lambda each: -each[0] - best_rate * _free(each[2].state))[:width]
            found = sorted([*found, *[(profit, here) for profit, _, here in beam]], key=lambda each: -each[0])[:KEPT]
        return found

    # --- one by one, and the answer ---

    def _unplaced(self, plan: Iterable[Taking]) -> dict[Wish, int]:
        """What a plan leaves: of equal demands those with a higher priority are served first."""
        served: dict[int, int] = {}
        for each in plan:
            for d, n in counts_of(each.column.bundle):
                served[d] = served.get(d, 0) + n * each.times
        left = {}
        for wish in self.wishes:
            d = self.question.number[wish.demand]
            here = min(served.get(d, 0), self.question.pending[wish])
            served[d] = served.get(d, 0) - here
            left[wish] = self.question.pending[wish] - here
        return left

    def _one_by_one(self, plan: list[Taking]) -> list[Taking]:
        """The plan with all that still fits, the most urgent and then the worthiest first."""
        question = self.question
        left = self._unplaced(plan)
        if not any(left.values()):
            return plan
        free = {unit: columns.count for unit, columns in self.columns.items()}
        positions = []
        for each in plan:
            if not each.loose:
                free[each.unit] -= each.times
                way = each.column.way()
                after = self._after(each.unit.state, way)
                positions.append(
                    Position(each.unit, after, each.column.bundle, each.column.price, each.times, prefix=way)
                )
        positions += [Position(unit, unit.state, 0, 0, count) for unit, count in free.items()]
        order = sorted(left, key=lambda wish: (-wish.priority, -question.worths[question.number[wish.demand]]))
        waiting = [(question.number[wish.demand], left[wish]) for wish in order if left[wish]]
        late = self.limits.longer(LATE_SECONDS)
        placed = place_all(positions, waiting, self.mover, lambda: not late.none_left(0.0))
        made = [Taking(each.unit, each.column(), each.count) for each in placed if each.count and each.bundle]
        return [*made, *[each for each in plan if each.loose]]

    def _after(self, state: UnitState, way: Way) -> UnitState:
        """The state after a unit has gone this way."""
        look = self.question.lens.state
        if not isinstance(state, RoomState):
            return look(way[-1][2].after)
        host, cuts = state.host, in_order(state)
        for _, _, step in way:
            if isinstance(step.before, Host):
                after = self.question.lens.host(step.after) if isinstance(step.after, Host) else host
                host = after
            else:
                assert isinstance(step.after, Cut)
                cuts[cuts.index(self.question.lens.cut(step.before))] = self.question.lens.cut(step.after)
        return RoomState(host, frozenset(Counter(cuts).items()))

    def _tiers(self, plan: Sequence[Taking]) -> list[int]:
        """The plan's value in each tier."""
        question = self.question
        unplaced = [0] * len(question.priorities)
        for wish, left in self._unplaced(plan).items():
            rank = question.priorities.index(wish.priority)
            unplaced[rank] += left * question.worths[question.number[wish.demand]]
        return [*unplaced, *question.scale.tiers(sum(each.column.price * each.times for each in plan))]

    def _answer(self, plan: Sequence[Taking], bounds: Sequence[int]) -> _Answer:
        values = self._tiers(plan)
        question = self.question
        asks = sum(question.pending[wish] for wish in self.wishes)
        least = [0] * len(question.priorities)
        least += [-WORST_MILLI * asks * sum(weight for _, weight in tier) for tier in question.policy.tiers]
        known = [
            Tier(name, value, max(bound, lowest), Status.UNKNOWN)
            for name, value, bound, lowest in zip(question.tier_names(), values, bounds, least, strict=True)
        ]
        tiers = list(in_status(known, values))
        takes = [Take(each.unit, each.column.way(), each.times, each.loose) for each in plan if each.times]
        return _Answer(takes, self._unplaced(plan), tiers, self.seconds)


def _free(state: UnitState) -> int:
    """Milli-GPU that are free."""
    if isinstance(state, RoomState):
        return state.host.free_milli + sum(count * _free(cut) for cut, count in state.cuts)
    if isinstance(state, Host):
        return state.free_milli
    free = state.geometry.width - state.without_idle().busy.bit_count()
    return GPU_MILLI * free // state.geometry.width
