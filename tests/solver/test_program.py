"""The integer program under the joint plan: proven answers, on programs small enough to try everything."""

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from solver.plan import Status
from solver.program import SAFE_RANGE, Limits, Program, scaled


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, list[tuple[int, int]]]:
    """Up to four variables, three rows of either kind, any goal."""
    program = Program()
    variables = [program.variable(draw(st.integers(0, 3)), f"x{i}") for i in range(draw(st.integers(1, 4)))]
    for _ in range(draw(st.integers(0, 3))):
        terms = [(variable, draw(st.integers(-2, 4))) for variable in variables]
        add = draw(st.sampled_from((program.equal, program.at_most)))
        add(terms, draw(st.integers(0, 8)))
    return program, [(variable, draw(st.integers(-50, 200))) for variable in variables]


def by_brute_force(program: Program, goal: list[tuple[int, int]]) -> int | None:
    """The least the goal can be; None if nothing satisfies the rows."""
    costs = []
    for values in product(*(range(most + 1) for most in program.most)):
        sums = [sum(coefficient * values[v] for v, coefficient in row.terms) for row in program.rows]
        if all(
            total == row.total if row.equal else total <= row.total
            for total, row in zip(sums, program.rows, strict=True)
        ):
            costs.append(sum(coefficient * values[v] for v, coefficient in goal))
    return min(costs, default=None)


@given(programs())
@settings(max_examples=150, deadline=None)
def test_the_answer_is_the_least_of_all(made: tuple[Program, list[tuple[int, int]]]) -> None:
    """Leaving out what the bound rules out loses nothing, negative costs and rows included."""
    program, goal = made
    least = by_brute_force(program, goal)
    found = program.minimise(goal, Limits())

    if least is None:
        assert found.status is Status.INFEASIBLE
    else:
        assert (found.status, found.cost, found.bound) == (Status.OPTIMAL, least, least)
        assert program.floor(goal) <= least


def test_a_coarser_grain_keeps_the_range_safe() -> None:
    """Beyond 2³¹ OR-Tools may be wrong and say nothing."""
    terms = [("a", 10**9 + 7, 5), ("b", -(10**9), 5), ("c", 3, 100)]
    coefficients, grain = scaled(terms)

    assert grain > 1
    assert sum(abs(c) * most for c, (_, _, most) in zip(coefficients, terms, strict=True)) <= SAFE_RANGE
    assert all(c * grain <= exact for c, (_, exact, _) in zip(coefficients, terms, strict=True))


def test_a_row_that_reaches_too_far_is_known() -> None:
    """Whoever solves asks first."""
    program = Program()
    wide = [(program.variable(10**6, "x"), 10**4), (program.variable(1, "y"), 3)]

    assert not program.can_hold(wide)
    program.at_most(wide, 5)
    assert not program.is_safe()
