"""A small integer program and how it is solved: bounded by a linear program, decided by CP-SAT.

    minimise goal · x,  0 ≤ x ≤ most,  some rows equal, some at most        (all whole numbers)

    GLOP ──duals, rounded──▶ a lower bound and each variable's reduced cost, exact in whole parts of one
         ──▶ CP-SAT on the variables whose reduced cost is small, minimising what is above the bound
         ──▶ a solution `gap` above the bound; variables with more reduced cost than that cannot be in a better
             one, so if none of the others was left out it is proven; else once more with those

Several goals in order: the linear bounds of all but the last are tried first, since mostly they can be reached,
and reaching them is a proof; else goal by goal, each with its own status.

Any duals give a true bound, so nothing rests on floating point. Why not CP-SAT alone: on half-full clusters
(500 to 5,000 nodes, 130 to 290 states, 2,000 to 4,700 courses) it found the optimum in a second and had no
proof after a minute. This way ten such clusters took 0.02 to 1.1 s; the search with quick restarts is part of
that (without it two of the ten had no proof after 20 s).
Knows nothing of GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, inf

import numpy as np
from numpy.typing import NDArray
from ortools.linear_solver.python import model_builder
from ortools.sat.python import cp_model

from solver.plan import Status

SAFE_RANGE = 2**31 - 1
"""Σ |coefficient × range| of every row and of every objective stays within this: beyond it OR-Tools 9.15 has
certified wrong optima (or-tools #5293)."""

FIRST_SHARES = (0, 64, 8)
"""CP-SAT first gets the variables with no reduced cost, then those up to these parts of the largest coefficient. The
optimum of a large plan is mostly its linear bound (11 of 12 half-full clusters of 5,000 nodes; the other was 4
milli-GPU off), and then the fewest variables are the fastest: 3 to 29 ms, where a first try at 1/8 took 66 to 920."""

QUICK = 0.05
"""CP-SAT's deterministic time for the first try (some 50 ms), four times as much for each further one but the last.
With the fewest variables a program can be the hardest: there may be only just no solution."""

PARTS = (1, 2, 3, 4, 6, 12, 24, 60, 120, 840)
"""Duals are rounded to whole parts of one, the first of these that gives the linear bound. Those of small programs
are mostly whole or halves and thirds; with 50,000 units behind a row, half a milli-GPU off is 25 GPUs."""

Terms = Sequence[tuple[int, int]]
"""Variables by number, with their coefficients."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a plan may use: `seconds` in all, and CP-SAT's `deterministic` time for each solve.

    The solvers' own clocks count; with a `clock` (seconds, any origin) and `until` so does what happens between
    them. `started` sets `until`.
    """

    seed: int = 0
    workers: int = 1
    seconds: float | None = None
    deterministic: float | None = None
    clock: Callable[[], float] | None = None
    until: float | None = None

    def started(self) -> Limits:
        """From now on."""
        if self.clock is None or self.seconds is None:
            return self
        return replace(self, until=self.clock() + self.seconds)

    def part(self, share: float) -> Limits:
        """Over when so much of what is left by the clock has passed; without one as before."""
        if self.clock is None or self.until is None:
            return self
        now = self.clock()
        return replace(self, until=now + share * max(0.0, self.until - now))

    def longer(self, seconds: float) -> Limits:
        """Over so many seconds later by the clock; without one never."""
        if self.clock is None or self.until is None:
            return Limits(self.seed, self.workers)
        return replace(self, until=self.until + seconds, deterministic=None)

    def none_left(self, spent: float) -> bool:
        """Whether it is over after so many seconds in solvers."""
        if self.deterministic == 0.0:
            return True
        left = self.less(spent).seconds
        return left is not None and left <= 0.0

    def less(self, spent: float) -> Limits:
        """What is left after so many seconds in solvers."""
        if self.seconds is None:
            return self
        if self.clock is not None and self.until is not None:
            return replace(self, seconds=max(0.0, self.until - self.clock()))
        return replace(self, seconds=max(0.0, self.seconds - spent))

    def at_most(self, deterministic: float) -> Limits:
        """With no more of CP-SAT's deterministic time for one solve."""
        known = deterministic if self.deterministic is None else min(self.deterministic, deterministic)
        return replace(self, deterministic=known)


@dataclass(frozen=True, slots=True)
class Solution:
    """How a solve ended. `values` by variable (None where none was found), their `cost`, and the `bound`."""

    status: Status
    values: tuple[int, ...] | None
    cost: int
    bound: int
    seconds: float = 0.0


@dataclass(slots=True)
class Row:
    """Terms that add up to the total, or at most to it."""

    terms: Terms
    total: int
    equal: bool


@dataclass(slots=True)
class Program:
    """Variables and rows, added one by one; then minimised for one goal after another."""

    most: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    limits: Limits = field(default_factory=Limits)
    """By its clock, if there is one, linear programs end too."""

    def variable(self, most: int, name: str = "") -> int:
        """A whole number from 0 to `most`; answers its number."""
        self.most.append(most)
        self.names.append(name)
        return len(self.most) - 1

    def equal(self, terms: Terms, total: int) -> None:
        """The terms add up to the total."""
        self._add(terms, total, equal=True)

    def at_most(self, terms: Terms, total: int) -> None:
        """The terms add up to the total or less."""
        self._add(terms, total, equal=False)

    def copy(self) -> Program:
        """A program of its own with the same variables and rows."""
        return Program(list(self.most), list(self.names), list(self.rows), self.seconds, self.limits)

    def can_hold(self, terms: Terms) -> bool:
        """Whether a row of these terms stays within `SAFE_RANGE`."""
        divisor = gcd(*(coefficient for _, coefficient in terms)) or 1
        return self._reach(terms) // divisor <= SAFE_RANGE

    def is_safe(self) -> bool:
        """Whether every row does."""
        return all(self._reach(row.terms) <= SAFE_RANGE for row in self.rows)

    def _reach(self, terms: Terms) -> int:
        most = self.most
        return sum([abs(coefficient) * most[variable] for variable, coefficient in terms])

    def _add(self, terms: Terms, total: int, *, equal: bool) -> None:
        divisor = gcd(*(coefficient for _, coefficient in terms), total if equal else 0) or 1
        terms = [(variable, coefficient // divisor) for variable, coefficient in terms if coefficient]
        self.rows.append(Row(terms, total // divisor, equal))

    def least(self, goal: Terms) -> int:
        """What the goal cannot be below whatever the rows say."""
        return sum(min(0, coefficient) * self.most[variable] for variable, coefficient in goal)

    def floor(self, goal: Terms) -> int:
        """A proven lower bound of the goal, rounded up to what its coefficients can add up to."""
        return _rounded_up(self.price(goal).least, goal)

    def keep_at(self, goal: Terms, total: int | None = None) -> int:
        """The goal is the total or less, which is to be its proven least value; by default it is `floor`. Answers it.

        Said in reduced costs: what is above the bound. That keeps the row's range small, where the goal's own
        terms would be far beyond `SAFE_RANGE`.
        """
        priced = self.price(goal)
        total = _rounded_up(priced.least, goal) if total is None else total
        spare = total * priced.parts - priced.bound
        terms: list[tuple[int, int]] = []
        for variable, reduced in enumerate(priced.reduced):
            if reduced < 0:  # counted from its upper end: most - x
                stands = self.variable(min(self.most[variable], spare // -reduced), "below")
                self.equal([(variable, 1), (stands, 1)], self.most[variable])
                terms.append((stands, -reduced))
            elif reduced > 0:
                self.most[variable] = min(self.most[variable], spare // reduced)
                terms.append((variable, reduced))
        for i, dual in enumerate(priced.duals):
            row = self.rows[i]
            if dual and not row.equal:
                slack = self.variable(spare // -dual, "slack")
                self.rows[i] = Row([*row.terms, (slack, 1)], row.total, equal=True)
                terms.append((slack, -dual))
        if any(self.most[variable] for variable, _ in terms):
            self.at_most(terms, spare)
        return total

    def minimise(
        self, goal: Terms, limits: Limits, *, one_try: bool = False, hint: Sequence[int] | None = None
    ) -> Solution:
        """The least the goal can be.

        With `one_try` it ends INFEASIBLE or UNKNOWN where the first choice of variables has no solution.
        """
        start = self.seconds
        priced = self.price(goal)
        wide = max(0, *priced.reduced) if priced.reduced else 0
        largest = priced.parts * max((abs(coefficient) for _, coefficient in goal), default=0)
        shares = [largest // share if share else 0 for share in FIRST_SHARES]
        tries = [share for share in shares if share < wide] + ([] if one_try else [wide])
        best = Solution(Status.UNKNOWN, None, 0, priced.least)
        bound = priced.least
        for i, threshold in enumerate(tries or [wide]):
            left = limits.less(self.seconds - start)
            quick = left if threshold == wide else left.at_most(QUICK * 4**i)
            found = self._decide(goal, priced, threshold, quick, hint if best.values is None else best.values)
            gap = found.cost * priced.parts - priced.bound
            if found.status is Status.OPTIMAL and threshold < min(gap, wide):
                threshold, best = min(gap, wide), found
                left = limits.less(self.seconds - start)
                found = self._decide(goal, priced, threshold, left, found.values)
            unseen = found.bound
            if threshold < wide:
                unseen = -(-(priced.bound + threshold + 1) // priced.parts)
            if found.status is Status.INFEASIBLE:
                bound = max(bound, unseen if threshold < wide else bound)
                best = found if best.values is None else best
            else:
                bound = max(bound, min(found.bound, unseen))
                if found.values is not None and (best.values is None or found.cost <= best.cost):
                    best = found
            over = limits.none_left(self.seconds - start) or (i + 1 == len(tries))
            if over or (best.values is not None and bound >= best.cost):
                break
        if best.values is not None:
            best = replace(best, status=Status.OPTIMAL if bound >= best.cost else Status.FEASIBLE)
            bound = min(bound, best.cost)
        elif best.status is Status.INFEASIBLE and not (tries and tries[-1] == wide):
            best = replace(best, status=Status.UNKNOWN)
        return replace(best, bound=bound, seconds=self.seconds - start)

    def price(self, goal: Terms) -> Priced:
        """A lower bound from rounded duals, and each variable's and each row's reduced cost."""
        costs = np.zeros(len(self.most))
        for variable, coefficient in goal:
            costs[variable] += coefficient
        objective, exact = self.duals(costs)
        lengths = [len(row.terms) for row in self.rows]
        at_row = np.repeat(np.arange(len(self.rows)), lengths)
        pairs = np.array([pair for row in self.rows for pair in row.terms], dtype=np.int64).reshape(-1, 2)
        totals = [row.total for row in self.rows]
        best: Priced | None = None
        for parts in PARTS:
            duals = np.rint(exact * parts)
            taken = np.bincount(pairs[:, 0], weights=pairs[:, 1] * duals[at_row], minlength=len(self.most))
            reduced = costs * parts - taken  # whole numbers far below 2^53, so exact
            bound = sum([int(dual) * total for dual, total in zip(duals, totals, strict=True) if dual])
            bound += sum([int(reduced[v]) * self.most[v] for v in np.flatnonzero(reduced < 0)])
            if best is None or bound * best.parts > best.bound * parts:
                best = Priced(bound, [int(each) for each in reduced], [int(dual) for dual in duals], parts)
            if best.least >= objective - SLACK:
                break
        assert best is not None
        return best

    def duals(self, costs: Floats) -> tuple[float, Floats]:
        """The linear program's least value and its duals, never positive on a row that is "at most"."""
        model = model_builder.Model()  # type: ignore[no-untyped-call]  # ortools has no types here
        helper = model.helper
        for most, cost in zip(self.most, costs, strict=True):
            variable = helper.add_var()
            helper.set_var_lower_bound(variable, 0.0)
            helper.set_var_upper_bound(variable, most)
            helper.set_var_objective_coefficient(variable, cost)
        for i, row in enumerate(self.rows):
            helper.add_linear_constraint()
            helper.set_constraint_upper_bound(i, row.total)
            helper.set_constraint_lower_bound(i, row.total if row.equal else -inf)
            for variable, coefficient in row.terms:
                helper.add_term_to_constraint(i, variable, coefficient)
        solver = model_builder.Solver("GLOP")
        if self.limits.clock is not None and self.limits.seconds is not None:
            solver.set_time_limit_in_seconds(max(SHORTEST_SECONDS, self.limits.less(0.0).seconds or 0.0))
        if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
            return -inf, np.zeros(len(self.rows))
        self.seconds += solver.wall_time
        found = np.array([solver.dual_value(model.linear_constraint_from_index(i)) for i in range(len(self.rows))])
        capped = [dual if row.equal else min(0.0, dual) for row, dual in zip(self.rows, found, strict=True)]
        return solver.objective_value, np.array(capped)

    def _decide(
        self, goal: Terms, priced: Priced, threshold: int, limits: Limits, hint: Sequence[int] | None
    ) -> Solution:
        """CP-SAT on the variables with reduced costs up to the threshold, the others 0."""
        model = cp_model.CpModel()
        furthest = max(1, threshold, SAFE_RANGE // (len(self.most) + len(self.rows) + 1))
        chosen: dict[int, cp_model.IntVar] = {}
        above: list[tuple[cp_model.IntVar, int, int]] = []
        most = [0] * len(self.most)
        for number, cost in enumerate(priced.reduced):
            if cost <= threshold:
                most[number] = min(self.most[number], furthest // cost) if cost > 0 else self.most[number]
                chosen[number] = model.new_int_var(0, most[number], self.names[number])
                if cost:
                    above.append((chosen[number], cost, most[number]))
        constant = priced.bound - sum(
            [cost * most for cost, most in zip(priced.reduced, self.most, strict=True) if cost < 0]
        )
        for row, dual in zip(self.rows, priced.duals, strict=True):
            terms = [(variable, coefficient) for variable, coefficient in row.terms if variable in chosen]
            assert sum(abs(c) * most[v] for v, c in terms) <= SAFE_RANGE, "ask is_safe() first"
            expression = cp_model.LinearExpr.weighted_sum([chosen[v] for v, _ in terms], [c for _, c in terms])
            if row.equal:
                model.add(expression == row.total)
            elif dual:
                lowest = sum(min(0, c) * most[v] for v, c in terms)
                reach = min(row.total - lowest, furthest // -dual)
                if reach < 0:
                    return Solution(Status.INFEASIBLE, None, 0, priced.least)
                slack = model.new_int_var(0, reach, "slack")
                model.add(expression + slack == row.total)
                above.append((slack, -dual, reach))
            else:
                model.add(expression <= row.total)
        coefficients, grain = scaled(above)
        model.minimize(cp_model.LinearExpr.weighted_sum([variable for variable, _, _ in above], coefficients))
        if hint is not None:
            for number, variable in chosen.items():
                model.add_hint(variable, min(hint[number], most[number]))

        solver = cp_model.CpSolver()
        solver.parameters.random_seed = limits.seed
        solver.parameters.num_workers = limits.workers
        solver.parameters.linearization_level = 2  # all rows are linear: let the relaxation see them
        solver.parameters.search_branching = cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH
        if limits.seconds is not None:
            solver.parameters.max_time_in_seconds = max(0.0, limits.seconds)
        if limits.deterministic is not None:
            solver.parameters.max_deterministic_time = limits.deterministic
        result = solver.solve(model)
        self.seconds += solver.wall_time
        status = _STATUS[result]
        if status not in (Status.OPTIMAL, Status.FEASIBLE):
            return Solution(status, None, 0, priced.least)
        values = tuple(
            solver.value(chosen[variable]) if variable in chosen else 0 for variable in range(len(self.most))
        )
        cost = sum(coefficient * values[variable] for variable, coefficient in goal)
        bound = min(cost, -(-(constant + grain * round(solver.best_objective_bound)) // priced.parts))
        if status is Status.OPTIMAL and bound < cost:
            status = Status.FEASIBLE
        return Solution(status, values, cost, bound)


Floats = NDArray[np.float64]

SHORTEST_SECONDS = 0.05
"""What a linear program gets when all time is spent: most are solved in it, and a bound is worth having."""

SLACK = 1e-6
"""What the linear program's own value may be off."""


@dataclass(frozen=True, slots=True)
class Priced:
    """A lower bound; what each variable adds above it; and the rows' duals it comes from, all in parts of one."""

    bound: int
    reduced: list[int]
    duals: list[int]
    parts: int

    @property
    def least(self) -> int:
        """The bound in whole numbers."""
        return -(-self.bound // self.parts)


def _rounded_up(bound: int, goal: Terms) -> int:
    """Up to what the goal's coefficients can add up to."""
    step = gcd(*(coefficient for _, coefficient in goal)) or 1
    return -(-bound // step) * step


# --- several goals ---


NOTHING = -(1 << 62)
"""A bound where nothing is known."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """Several goals minimised in order: the values found (None: none), and of each goal its bound and status.

    OPTIMAL: the value is the least with all goals before it at theirs. UNKNOWN: a goal before it was not proven;
    it was minimised all the same, beside what was found for that one, and has no bound.
    """

    values: tuple[int, ...] | None
    bounds: tuple[int, ...]
    statuses: tuple[Status, ...]


Floors = Callable[[int, Sequence[int]], int]
"""A bound of goal i, with the goals before it at these values."""


def minimise_in_order(
    program: Program,
    goals: Sequence[Terms],
    limits: Limits,
    *,
    floors: Floors | None = None,
    hint: Sequence[int] | None = None,
) -> Ordered:
    """Minimise one goal after the other; what is found of one is kept for the next.

    `floors` bounds goals from outside, for programs that leave variables out; without it the program's own bounds
    are true. Counts its seconds on `program`.
    """
    if floors is None:
        quick = _all_at_once(program, goals, limits)
        if quick is not None:
            return quick
    return _goal_by_goal(program, goals, limits, floors, hint)


def _all_at_once(program: Program, goals: Sequence[Terms], limits: Limits) -> Ordered | None:
    """Every goal but the last at its linear bound; None where that cannot be, or was not found."""
    trial = program.copy()
    start, bounds = trial.seconds, []
    for goal in goals[:-1]:
        if limits.none_left(trial.seconds - start):
            break
        bounds.append(trial.keep_at(goal))
    in_time = len(bounds) + 1 == len(goals) and trial.is_safe()
    found = trial.minimise(goals[-1], limits.less(0.0), one_try=True) if in_time else None
    program.seconds = trial.seconds
    if found is None or found.values is None:
        return None
    statuses = [Status.OPTIMAL] * len(bounds)
    values = found.values[: len(program.most)]
    return Ordered(values, (*bounds, found.bound), (*statuses, found.status))


def _goal_by_goal(
    program: Program, goals: Sequence[Terms], limits: Limits, floors: Floors | None, hint: Sequence[int] | None
) -> Ordered:
    start, width = program.seconds, len(program.most)
    trial = program.copy()
    values: tuple[int, ...] | None = None
    bounds, statuses = [NOTHING] * len(goals), [Status.UNKNOWN] * len(goals)
    reached: list[int] = []
    for i, goal in enumerate(goals):
        if i and limits.none_left(trial.seconds - start):
            break
        proven = all(status is Status.OPTIMAL for status in statuses[:i])
        if proven and floors is not None:
            bounds[i] = floors(i, reached)
        found = trial.minimise(goal, limits.less(trial.seconds - start), hint=hint) if trial.is_safe() else None
        if proven and floors is None:
            bounds[i] = found.bound if found is not None else trial.least(goal)
        if found is None or found.values is None:
            break
        values = hint = found.values
        reached.append(found.cost)
        bounds[i] = min(bounds[i], found.cost)
        if proven:
            statuses[i] = Status.OPTIMAL if bounds[i] == found.cost else Status.FEASIBLE
        if found.status is Status.OPTIMAL:
            trial.keep_at(goal, found.cost)
            hint = None
        elif trial.can_hold(goal):
            trial.at_most(goal, found.cost)
        else:
            break
    program.seconds = trial.seconds
    return Ordered(None if values is None else values[:width], tuple(bounds), tuple(statuses))


_STATUS = {
    cp_model.OPTIMAL: Status.OPTIMAL,
    cp_model.FEASIBLE: Status.FEASIBLE,
    cp_model.INFEASIBLE: Status.INFEASIBLE,
    cp_model.UNKNOWN: Status.UNKNOWN,
}


def scaled(terms: Sequence[tuple[object, int, int]]) -> tuple[list[int], int]:
    """Coefficients (of terms with coefficient and range) in the safe range, and what one unit stands for.

    First by their common divisor, which changes nothing. If that is not enough they are rounded down to a
    coarser grain: a bound then still holds, and nothing is called optimal that does not meet it.
    """
    grain = gcd(*(coefficient for _, coefficient, _ in terms)) or 1
    total = sum(abs(coefficient) * most for _, coefficient, most in terms)
    if total // grain > SAFE_RANGE:
        spare = sum(most for _, _, most in terms)  # rounding down can move each coefficient by one
        assert spare < SAFE_RANGE // 2, "too many units and courses for one program"
        grain = -(-total // (SAFE_RANGE - spare))
    coefficients = [coefficient // grain for _, coefficient, _ in terms]
    assert sum(abs(c) * most for c, (_, _, most) in zip(coefficients, terms, strict=True)) <= SAFE_RANGE
    return coefficients, grain
