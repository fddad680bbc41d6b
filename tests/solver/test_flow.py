"""Everything that is pending, together: what a joint plan promises, on worlds where the answer is obvious."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from solver.cluster import Node, Snapshot
from solver.demand import Ask, Demand, Problem
from solver.flow import UNPLACED, solve
from solver.goals import GOALS, Policy
from solver.plan import Plan, Status
from solver.program import SAFE_RANGE
from solver.samples import parse_samples
from solver.values import DEFAULT_VALUES
from solver.verify import legal_step_exists, verify
from tests.builders import mig_node, node, one, part, problem, slices, whole


def test_nothing_asked_is_nothing_placed() -> None:
    """An empty problem has an empty plan, and that is proven."""
    plan = solve(problem([node("n")], []))
    assert (plan.status, plan.outcomes, plan.cost, plan.bound) == (Status.OPTIMAL, (), 0, 0)
    assert solve(problem([], [Demand.of(1)])).status is Status.OPTIMAL


def test_planning_together_beats_one_by_one() -> None:
    """First come first served puts the 1g where the last 7g would go; the plan does not."""
    cluster = [mig_node("a"), mig_node("b")]
    plan = solve(problem(cluster, [one("1g.10gb"), one("7g.80gb")], {"a": (part("a", 0, "3g.40gb", 4),)}))

    assert plan.status is Status.OPTIMAL
    assert {ask: placement.node for ask, placement in plan.placements.items()} == {"ask-0": "a", "ask-1": "b"}


def test_more_milli_gpu_placed_comes_before_any_price() -> None:
    """Eight GPUs for one beat four for another, whatever the links cost."""
    plan = solve(problem([node("n", 8)], [Demand.of(4), Demand.of(8)]))

    assert list(plan.placements) == ["ask-1"]
    assert plan.cost // UNPLACED == 4000
    assert plan.unplaced["ask-0"].reason


def test_equal_asks_are_served_in_the_order_of_the_problem() -> None:
    """Which of equal pods goes first does not matter to the plan, so the caller's order decides."""
    plan = solve(problem([node("n", 2)], [Demand.of(1)] * 4))

    assert list(plan.placements) == ["ask-0", "ask-1"]


def test_withheld_and_taken_devices_are_never_planned() -> None:
    """Two GPUs of four are left, and one of them is withheld."""
    made = node("n", 4)
    cluster = replace(made, gpus=(*made.gpus[:3], replace(made.gpus[3], withheld="lost")))
    plan = solve(problem([cluster], [Demand.of(1)] * 4, {"n": whole("n", 0, 1)}))

    assert [placement.devices for placement in plan.placements.values()] == [whole("n", 2)]


def test_an_ask_of_several_parts_is_planned_with_the_others() -> None:
    """Slices and GPUs of one pod are on one node; that takes columns of whole nodes."""
    wanted = [one("1g.10gb"), slices(1, **{"2g.20gb": 2, "1g.10gb": 1})]
    asked = problem([*parse_samples("8xA100-mig4"), mig_node("m")], wanted)
    plan = solve(asked)

    assert plan.status is Status.OPTIMAL
    assert len(plan.placements) == 2
    assert verify(asked, plan) == []


def test_five_hundred_pods_on_forty_nodes() -> None:
    """The end-to-end burst: proven, legal, and nothing left that has a legal step."""
    kinds = "8xH100:8,8xA100:8,8xA100-mig:8,4xA30-mig:4,8xV100:4,8xL40S:4,4xH100NVL:4"
    wanted = [Demand.of(n) for n in (1, 2, 4, 8)] + [
        one(profile) for profile in ("1g.10gb", "2g.20gb", "3g.40gb", "1g.6gb", "2g.12gb")
    ]
    nodes = parse_samples(kinds)
    asked = problem(nodes, [wanted[i % len(wanted)] for i in range(500)])
    plan = solve(asked)
    after = {
        node.name: tuple(d for p in plan.placements.values() if p.node == node.name for d in p.devices)
        for node in nodes
    }

    assert plan.status is Status.OPTIMAL
    assert verify(asked, plan) == []
    left = {ask.demand for ask in asked.asks if ask.id in plan.unplaced}
    assert left
    assert not any(legal_step_exists(Snapshot(tuple(nodes), after), demand) for demand in left)


def test_the_same_seed_gives_the_same_plan() -> None:
    """One worker and a seed: nothing is left to chance."""
    asked = problem(parse_samples("8xH100:3,8xA100-mig:2"), [Demand.of(2), one("2g.20gb"), Demand.of(4)] * 5)

    assert solve(asked, seed=3) == solve(asked, seed=3)


def test_prices_too_large_for_the_solver_are_made_coarser_and_the_plan_stays_honest() -> None:
    """Σ |coefficient × range| must stay below 2³¹ (or-tools #5293); what is rounded away is not claimed."""
    heavy = Policy("heavy", ((("value", 999_983), ("links", 7)),))
    asked = problem(parse_samples("8xH100:40"), [Demand.of(n) for n in (1, 2, 3, 4)] * 20)
    plan = solve(asked, heavy)

    assert verify(asked, plan) == []
    assert plan.bound <= plan.cost
    assert (plan.status is Status.OPTIMAL) == (plan.bound == plan.cost)
    assert plan.cost > SAFE_RANGE


@st.composite
def plans(draw: st.DrawFn) -> tuple[Problem, Plan]:
    """Random bursts on real boards."""
    kinds = draw(
        st.lists(st.sampled_from(("8xV100", "8xL40S", "8xH100", "4xA30-mig2", "8xA100-mig4")), min_size=1, max_size=3)
    )
    nodes: list[Node] = parse_samples(",".join(kinds))
    wanted = [Demand.of(n) for n in (1, 2, 3, 4, 8)] + [one(p) for p in ("1g.6gb", "2g.12gb+me", "1g.10gb", "3g.40gb")]
    demands = draw(st.lists(st.sampled_from(wanted), max_size=12))
    asked = Problem(Snapshot(tuple(nodes)), tuple(Ask(f"ask-{i}", d) for i, d in enumerate(demands)))
    return asked, solve(asked)


@given(plans())
@settings(max_examples=30, deadline=None)
def test_each_goal_counts_the_same_in_the_model_and_on_the_finished_plan(made: tuple[Problem, Plan]) -> None:
    """The expression that was minimised is what it says, on boards with real links."""
    asked, plan = made
    for goal in GOALS:
        claimed = sum(dict(placement.prices)[goal.name] for placement in plan.placements.values())
        assert claimed == goal.of_plan(asked, plan, DEFAULT_VALUES), goal.name
    assert verify(asked, plan) == []
    assert plan.status is Status.OPTIMAL
