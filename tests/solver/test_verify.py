"""The checker finds what is wrong: each promise broken once."""

from dataclasses import replace

import pytest

from solver.cluster import Device, Snapshot
from solver.demand import Demand
from solver.flow import solve
from solver.plan import Placement, Plan, Status, Unplaced
from solver.verify import legal_step_exists, nodes_with_a_legal_step, verify
from tests.builders import mig_node, node, one, part, problem, whole

ASKED = problem(
    [node("n", 3), mig_node("m", 2)],
    [Demand.of(1), one("3g.40gb")],
    {"n": whole("n", 0), "m": (part("m", 0, "1g.10gb", 1),)},
)
GOOD = solve(ASKED)


def with_devices(ask: str, node: str, *devices: Device) -> Plan:
    """The good plan with another answer for one ask."""
    outcomes = tuple(
        (id_, Placement(node, devices, outcome.prices) if id_ == ask and isinstance(outcome, Placement) else outcome)
        for id_, outcome in GOOD.outcomes
    )
    return replace(GOOD, outcomes=outcomes)


def test_a_good_plan_has_nothing_wrong() -> None:
    """Or the tests below would prove nothing."""
    assert verify(ASKED, GOOD) == []
    assert len(GOOD.placements) == 2


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (replace(GOOD, outcomes=GOOD.outcomes[:1]), "has no outcome"),
        (replace(GOOD, outcomes=(*GOOD.outcomes, GOOD.outcomes[0])), "has 2 outcomes"),
        (replace(GOOD, outcomes=(*GOOD.outcomes, ("x", Unplaced("?")))), "x was not asked"),
        (replace(GOOD, outcomes=GOOD.outcomes[::-1]), "not in the order"),
        (with_devices("ask-0", "nowhere", *whole("n", 1)), "there is no node nowhere"),
        (with_devices("ask-0", "n", *whole("n", 7)), "there is no GPU n-7"),
        (with_devices("ask-0", "n", *whole("n", 0)), "is taken"),
        (with_devices("ask-0", "n", *whole("n", 1, 2)), "asked for 1 GPU, got n-1, n-2"),
        (with_devices("ask-0", "n"), "got nothing"),
        (with_devices("ask-0", "m", *whole("m", 1)), "cannot be given whole"),
        (with_devices("ask-1", "n", part("n", 1, "3g.40gb", 0)), "not in MIG mode"),
        (with_devices("ask-1", "m", part("m", 0, "3g.40gb", 0)), "overlaps"),
        (with_devices("ask-1", "m", part("m", 1, "3g.40gb", 2)), "not a legal start"),
        (with_devices("ask-1", "m", part("m", 1, "4g.40gb", 0)), "asked for 1 × 3g.40gb"),
        (replace(GOOD, bound=GOOD.cost + 1, status=Status.FEASIBLE), "above cost"),
        (replace(GOOD, bound=GOOD.cost - 1), "called optimal"),
        (with_devices("ask-1", "m", part("m", 1, "3g.40gb", 0)), "placements claim"),
    ],
)
def test_each_broken_promise_is_named(plan: Plan, words: str) -> None:
    """In words, so that a failing end-to-end test says what happened."""
    wrong = verify(ASKED, plan)

    assert any(words in line for line in wrong), wrong


def test_a_gpu_given_twice_is_found_across_asks() -> None:
    """Each placement alone looks legal."""
    asked = problem([node("n", 2)], [Demand.of(1), Demand.of(1)])
    first = Placement("n", whole("n", 0))
    plan = Plan(Status.FEASIBLE, (("ask-0", first), ("ask-1", first)), 0, 0)

    assert "n: n-0 given 2 times" in verify(asked, plan)


def test_a_legal_step_is_found_by_brute_force() -> None:
    """For the end-to-end promise that no pending pod could have been placed."""
    world = Snapshot((node("n", 2), mig_node("m")), {"n": whole("n", 0), "m": (part("m", 0, "4g.40gb", 0),)})

    assert nodes_with_a_legal_step(world, Demand.of(1)) == ["n"]
    assert nodes_with_a_legal_step(world, one("3g.40gb")) == ["m"]
    assert not legal_step_exists(world, one("4g.40gb"))
    assert not legal_step_exists(world, Demand.of(1, **{"3g.40gb": 1}))
