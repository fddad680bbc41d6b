"""The counted plan: sizes, limits, priorities and worths; and the ways it goes where columns are too many to list."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver import columns, decide
from solver.cluster import Snapshot, allocations
from solver.decide import Wish
from solver.demand import Ask, Demand, Problem, Terms
from solver.flow import solve
from solver.geometry import empty
from solver.goals import DEFAULT_POLICY, Policy
from solver.guests import NOBODY, Guest
from solver.plan import Status
from solver.program import Limits
from solver.samples import sample_node
from solver.steps import read
from solver.units import UnitState
from solver.verify import verify
from tests import strategies
from tests.builders import H100, mig_node, node, one, problem, slices
from tests.solver import boolean
from tests.solver.test_laws import BY_NODES, POLICIES, mixed_problems

FIXED = Policy(
    "fixed prices", ((("links", 2), ("numa", 1), ("nics", 1)), (("repartition", 1), ("power", 3), ("cpu_only", 1)))
)
FEW = settings(max_examples=40, deadline=None)


@st.composite
def unguarded_problems(draw: st.DrawFn) -> Problem:
    """Three nodes and up to six asks of any kind; nobody minds his neighbours."""
    nodes = tuple(draw(strategies.nodes(name=name, largest=2, real=draw(st.booleans()))) for name in "abc")
    taken = {node.name: draw(strategies.taken_on(node)) for node in nodes}
    for name, there in taken.items():
        taken[name] = tuple(replace(each, guest=NOBODY) for each in allocations(there))
    demands = draw(st.lists(strategies.demands(*nodes), max_size=6))
    plain = [replace(each, terms=replace(each.terms, guest=NOBODY)) for each in demands]
    asks = tuple(Ask(f"ask-{i}", each, draw(st.sampled_from((0, 0, 1)))) for i, each in enumerate(plain))
    return Problem(Snapshot(nodes, taken), asks)


@given(unguarded_problems())
@FEW
def test_the_plan_is_that_of_one_boolean_for_each_choice(asked: Problem) -> None:
    """Counting units, and naming every device, come to the same."""
    plan = solve(asked, FIXED)

    assert [tier.value for tier in plan.tiers] == boolean.least_tiers(asked, FIXED)
    assert plan.status is Status.OPTIMAL


@given(mixed_problems(real=True), st.sampled_from(POLICIES))
@FEW
def test_nodes_said_in_parts_give_the_same_plan(asked: Problem, policy: Policy) -> None:
    """Where a whole node has too many bundles to list, its host and cuts are; that is exact for a node."""
    listed = solve(asked, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "COMBINED", -1)
        in_parts = solve(asked, policy)

    assert verify(asked, in_parts) == []
    assert (in_parts.status, in_parts.cost) == (Status.OPTIMAL, listed.cost)


@given(mixed_problems(real=True), st.sampled_from(POLICIES), st.sampled_from((0, 2)))
@FEW
def test_a_plan_from_some_of_the_columns_is_legal_with_a_true_bound(asked: Problem, policy: Policy, most: int) -> None:
    """Generated columns may miss the best plan, and then the plan does not say otherwise; one by one is no better."""
    best = solve(asked, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BUNDLES", most)
        patch.setattr(columns, "COMBINED", -1)
        patch.setattr(decide, "POOLS", 0)
        plan = solve(asked, policy)
        greedy = solve(asked, policy, time_limit_seconds=0.0)

    assert verify(asked, plan) == []
    assert plan.bound <= best.cost <= plan.cost <= greedy.cost
    assert greedy.bound <= best.cost


def test_a_hundred_thousand_pods_on_fifty_thousand_nodes_are_proven() -> None:
    """The size is that of the different states and demands."""
    whole = read(sample_node("n", "8xH100")).host
    stock: dict[UnitState, int] = {whole: 35_000, replace(whole, idle=(1, 4)).canonical(): 5_000, empty(H100): 80_000}
    wanted = [Demand.of(count) for count in (1, 2, 4, 8)] + [one(p) for p in ("1g.10gb", "2g.20gb", "7g.80gb")]
    found = decide.decide(stock, {Wish(demand): 100_000 // 7 for demand in wanted}, DEFAULT_POLICY)

    assert found.status is Status.OPTIMAL
    assert sum(found.unplaced.values()) == 0
    served = sum(take.times * len(take.way) for take in found.takes)
    assert served == 7 * (100_000 // 7)
    assert len(found.takes) < 50


def test_a_higher_priority_is_served_first_whatever_it_is_worth() -> None:
    """One GPU that is urgent beats eight that are not."""
    asked = Problem(Snapshot((node("n", 8),)), (Ask("large", Demand.of(8)), Ask("urgent", Demand.of(1), priority=5)))
    plan = solve(asked)

    assert list(plan.placements) == ["urgent"]
    assert [(tier.name, tier.value) for tier in plan.tiers[:2]] == [
        ("unplaced, priority 5", 0),
        ("unplaced, priority 0", 8000),
    ]


def test_of_equal_asks_the_urgent_one_is_served() -> None:
    """The same demand with two priorities is one demand to the columns, and two to the books."""
    asks = (Ask("later", Demand.of(2)), Ask("now", Demand.of(2), priority=1))

    assert list(solve(Problem(Snapshot((node("n", 2),)), asks)).placements) == ["now"]


def test_a_class_of_work_that_is_worth_more_is_served_first() -> None:
    """Fairness by worth: three GPUs for serving, counted twice, beat four for training."""
    serving, training = (Terms(guest=Guest("t", work)) for work in ("serving", "training"))
    asks = (Ask("training", Demand(4, terms=training)), Ask("serving", Demand(3, terms=serving)))
    asked = Problem(Snapshot((node("n", 4),)), asks)

    assert list(solve(asked).placements) == ["training"]
    assert list(solve(asked, Policy(worths=(("serving", 2),))).placements) == ["serving"]


def test_each_tier_has_its_own_status() -> None:
    """Opening few nodes comes before value here; both are proven, and the cost has them as digits."""
    asked = problem([node("a", 4), node("b", 4), mig_node("c")], [Demand.of(2), Demand.of(2), one("1g.10gb")])
    plan = solve(asked, BY_NODES)

    assert [tier.name for tier in plan.tiers] == ["unplaced", "fresh_node+tenants", "value+power+fresh_gpu"]
    assert [tier.status for tier in plan.tiers] == [Status.OPTIMAL] * 3
    assert plan.tiers[1].value == 2000
    assert plan.gap == 0.0


def test_without_time_the_tiers_say_that_nothing_is_proven() -> None:
    """What is placed one by one may be the best; a plan says so only where it knows."""
    cluster = [mig_node("a"), mig_node("b")]
    plan = solve(problem(cluster, [one("1g.10gb"), one("3g.40gb")] * 2), time_limit_seconds=0.0)

    assert len(plan.placements) == 4
    assert [tier.status for tier in plan.tiers] == [Status.OPTIMAL, Status.FEASIBLE]
    assert plan.bound < plan.cost
    assert plan.gap > 0


def test_pods_without_devices_go_where_no_gpu_is() -> None:
    """CPU that cannot run out ties nothing to a unit."""
    bare = replace(node("cpu", 0), cpu_milli=4000)
    asked = problem([node("gpus", 8), bare], [Demand(cpu_milli=2000)] * 3)
    plan = solve(asked)

    assert [placement.node for placement in plan.placements.values()].count("cpu") == 2
    assert len(plan.placements) == 3
    assert plan.status is Status.OPTIMAL
    assert verify(asked, plan) == []


def test_rich_nodes_with_asks_of_several_slices_are_proven() -> None:
    """Eight cut GPUs have far too many bundles to list."""
    wanted = [one("1g.10gb"), slices(**{"2g.20gb": 3}), slices(**{"1g.10gb": 2, "3g.40gb": 1}), one("7g.80gb")]
    asked = problem([sample_node("a", "8xA100-mig"), sample_node("b", "8xA100-mig4")], wanted * 5)
    plan = solve(asked)

    assert plan.status is Status.OPTIMAL
    assert verify(asked, plan) == []


def test_limits_count_down() -> None:
    """A plan's seconds are for all of it; with a clock, for all that happens."""
    times = iter((10.0, 10.4, 11.0))
    clocked = Limits(seconds=1.0, clock=lambda: next(times)).started()
    assert clocked.less(99.0).seconds == pytest.approx(0.6)
    assert clocked.none_left(0.0)
    assert not Limits().none_left(1e9)
    assert Limits(seconds=1.0).none_left(1.0)
    assert Limits(deterministic=0.0).none_left(0.0)
    assert Limits(seconds=1.0).less(0.4).seconds == pytest.approx(0.6)


def test_a_plan_ends_near_its_limit_however_many_states_and_demands_there_are() -> None:
    """A clock that runs with what is looked at: the planning process is killed when a plan does not come."""
    cluster = [replace(node(f"n{i}", 4), cpu_milli=20_000 + 7 * i) for i in range(60)]
    asks = [Demand(1 + i % 4, cpu_milli=1000 + 13 * i) for i in range(60)]
    ticks = [0.0]

    def clock() -> float:
        ticks[0] += 0.05
        return ticks[0]

    asked = problem(cluster, asks)
    plan = solve(asked, time_limit_seconds=2.0, clock=clock)

    assert 1.0 < ticks[0] < 2.0 + decide.LATE_SECONDS + 1.0
    assert plan.status is Status.FEASIBLE
    assert verify(asked, plan) == []


def test_as_many_priorities_as_pods_are_planned() -> None:
    """A cost has some digits for each; Python prints no number of more than 4,300."""
    asks = tuple(Ask(f"a{i}", Demand.of(1 + i % 8), priority=i) for i in range(1200))
    plan = solve(Problem(Snapshot((node("n", 8),)), asks), deterministic_limit=0.0)

    assert plan.tiers[0].value == 0
    assert plan.cost > 10**4300
