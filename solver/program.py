"""A small integer program and how it is solved: bounded by a linear program, decided by CP-SAT.

    minimise goal · x,  0 ≤ x ≤ most,  some rows equal, some at most        (all whole numbers)

    GLOP ──duals, rounded──▶ a lower bound and each variable's reduced cost, exact in whole numbers
         ──▶ CP-SAT on the variables whose reduced cost is small, minimising what is above the bound
         ──▶ a solution `gap` above the bound; variables with more reduced cost than that cannot be in a better
             one, so if none of the others was left out it is proven; else once more with those

Any duals give a true bound, so nothing rests on floating point. Why not CP-SAT alone: on half-full clusters
(500 to 5,000 nodes, 130 to 290 states, 2,000 to 4,700 courses) it found the optimum in a second and had no
proof after a minute. This way ten such clusters took 0.02 to 1.1 s; the search with quick restarts is part of
that (without it two of the ten had no proof after 20 s).
Knows nothing of GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import gcd

from ortools.linear_solver.python import model_builder
from ortools.sat.python import cp_model

from solver.plan import Status

SAFE_RANGE = 2**31 - 1
"""Σ |coefficient × range| of every row and of every objective stays within this: beyond it OR-Tools 9.15 has
certified wrong optima (or-tools #5293)."""

FIRST_SHARE = 8
"""The first try takes the variables with reduced costs up to this part of the largest coefficient (of 8, 32 and
128 this was the fastest: with fewer variables CP-SAT has less to repair a solution with)."""

Terms = Sequence[tuple[int, int]]
"""Variables by number, with their coefficients."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a solve may use. `seconds` of wall clock and CP-SAT's `deterministic` time are for each solve."""

    seed: int = 0
    workers: int = 1
    seconds: float | None = None
    deterministic: float | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """How a solve ended. `values` by variable (None where none was found), their `cost`, and the `bound`."""

    status: Status
    values: tuple[int, ...] | None
    cost: int
    bound: int
    seconds: float = 0.0


@dataclass(slots=True)
class _Row:
    terms: Terms
    total: int
    equal: bool


@dataclass(slots=True)
class Program:
    """Variables and rows, added one by one; then minimised for one goal after another."""

    most: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    rows: list[_Row] = field(default_factory=list)

    def variable(self, most: int, name: str) -> int:
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

    def with_at_most(self, terms: Terms, total: int) -> Program:
        """The same program with one more such row."""
        more = Program(self.most, self.names, list(self.rows))
        more.at_most(terms, total)
        return more

    def can_hold(self, terms: Terms) -> bool:
        """Whether a row of these terms stays within `SAFE_RANGE`."""
        divisor = gcd(*(coefficient for _, coefficient in terms)) or 1
        return sum(abs(coefficient) * self.most[v] for v, coefficient in terms) // divisor <= SAFE_RANGE

    def _add(self, terms: Terms, total: int, *, equal: bool) -> None:
        divisor = gcd(*(coefficient for _, coefficient in terms), total if equal else 0) or 1
        terms = [(variable, coefficient // divisor) for variable, coefficient in terms if coefficient]
        reach = sum(abs(coefficient) * self.most[variable] for variable, coefficient in terms)
        assert reach <= SAFE_RANGE, "ask can_hold() first: CP-SAT cannot be trusted with such a row"
        self.rows.append(_Row(terms, total // divisor, equal))

    def floor(self, goal: Terms) -> int:
        """A proven lower bound of the goal, rounded up to what its coefficients can add up to."""
        step = gcd(*(coefficient for _, coefficient in goal)) or 1
        return -(-self._price(goal).bound // step) * step

    def minimise(self, goal: Terms, limits: Limits, *, one_try: bool = False) -> Solution:
        """The least the goal can be.

        With `one_try` it ends INFEASIBLE or UNKNOWN where the first choice of variables has no solution.
        """
        priced = self._price(goal)
        wide = max(priced.reduced, default=0)
        threshold = min(wide, max(1, max((abs(c) for _, c in goal), default=0) // FIRST_SHARE))
        left, spent = limits.seconds, 0.0
        while True:
            found = self._decide(goal, priced, threshold, replace(limits, seconds=left))
            spent += found.seconds
            left = None if left is None else left - found.seconds
            if found.status is Status.INFEASIBLE and threshold < wide and not one_try:
                threshold = wide
            elif found.status is Status.OPTIMAL and found.cost - priced.bound > threshold < wide:
                threshold = min(wide, found.cost - priced.bound)
            else:
                break
        unseen = priced.bound + threshold + 1 if threshold < wide else found.bound
        bound = max(priced.bound, min(found.bound, unseen))
        return replace(found, bound=bound, seconds=spent)

    def _price(self, goal: Terms) -> _Priced:
        """A lower bound from rounded duals, and each variable's and each row's reduced cost."""
        costs = [0] * len(self.most)
        for variable, coefficient in goal:
            costs[variable] = coefficient
        duals = self._duals(costs)
        reduced = list(costs)
        bound = 0
        for row, dual in zip(self.rows, duals, strict=True):
            bound += dual * row.total
            if dual:
                for variable, coefficient in row.terms:
                    reduced[variable] -= dual * coefficient
        bound += sum(min(0, cost) * most for cost, most in zip(reduced, self.most, strict=True))
        return _Priced(bound, tuple(reduced), tuple(duals))

    def _duals(self, costs: Sequence[int]) -> list[int]:
        """The linear program's duals, rounded; never positive on a row that is "at most"."""
        model = model_builder.Model()  # type: ignore[no-untyped-call]  # ortools has no types here
        variables = [model.new_num_var(0, most, "") for most in self.most]
        rows = []
        for row in self.rows:
            terms = model_builder.LinearExpr.weighted_sum(
                [variables[variable] for variable, _ in row.terms], [coefficient for _, coefficient in row.terms]
            )
            rows.append(model.add(terms == row.total) if row.equal else model.add(terms <= row.total))
        model.minimize(model_builder.LinearExpr.weighted_sum(variables, list(map(float, costs))))
        solver = model_builder.Solver("GLOP")
        if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
            return [0] * len(rows)
        rounded = [round(solver.dual_value(row)) for row in rows]
        return [dual if row.equal else min(0, dual) for row, dual in zip(self.rows, rounded, strict=True)]

    def _decide(self, goal: Terms, priced: _Priced, threshold: int, limits: Limits) -> Solution:
        """CP-SAT on the variables with reduced costs up to the threshold, the others 0."""
        model = cp_model.CpModel()
        chosen = {
            variable: model.new_int_var(0, most, self.names[variable])
            for variable, most in enumerate(self.most)
            if priced.reduced[variable] <= threshold
        }
        above: list[tuple[cp_model.IntVar, int, int]] = [
            (variable, priced.reduced[number], self.most[number]) for number, variable in chosen.items()
        ]
        constant = priced.bound - sum(min(0, priced.reduced[v]) * self.most[v] for v in range(len(self.most)))
        for row, dual in zip(self.rows, priced.duals, strict=True):
            terms = [(chosen[variable], coefficient) for variable, coefficient in row.terms if variable in chosen]
            expression = cp_model.LinearExpr.weighted_sum([v for v, _ in terms], [c for _, c in terms])
            if row.equal:
                model.add(expression == row.total)
            elif dual:
                lowest = sum(min(0, c) * self.most[v] for v, c in row.terms)
                slack = model.new_int_var(0, row.total - lowest, "slack")
                model.add(expression + slack == row.total)
                above.append((slack, -dual, row.total - lowest))
            else:
                model.add(expression <= row.total)
        coefficients, grain = scaled(above)
        model.minimize(cp_model.LinearExpr.weighted_sum([variable for variable, _, _ in above], coefficients))

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
        status = _STATUS[result]
        if status not in (Status.OPTIMAL, Status.FEASIBLE):
            return Solution(status, None, 0, priced.bound, solver.wall_time)
        values = tuple(
            solver.value(chosen[variable]) if variable in chosen else 0 for variable in range(len(self.most))
        )
        cost = sum(coefficient * values[variable] for variable, coefficient in goal)
        bound = min(cost, constant + grain * round(solver.best_objective_bound))
        if status is Status.OPTIMAL and bound < cost:
            status = Status.FEASIBLE
        return Solution(status, values, cost, bound, solver.wall_time)


@dataclass(frozen=True, slots=True)
class _Priced:
    """A lower bound; what each variable adds above it; and the rows' duals it comes from."""

    bound: int
    reduced: tuple[int, ...]
    duals: tuple[int, ...]


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
