"""What must hold in every small world, tried by Hypothesis against brute force."""

from dataclasses import replace
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from solver.cluster import Node, Snapshot, Taken
from solver.demand import Ask, Demand, Problem
from solver.fits import refusal
from solver.flow import solve
from solver.goals import DEFAULT_POLICY, Policy, allocation_of, plain_prices
from solver.plan import Status
from solver.rank import Ranking, price, quote
from solver.steps import read
from solver.values import DEFAULT_VALUES
from solver.verify import legal_step_exists, verify
from tests import strategies
from tests.solver import brute

TIERED = Policy("links first", ((("links", 1), ("numa", 2)), (("value", 3), ("repartition", 1))))
BY_NODES = Policy(
    "few nodes, then serving",
    ((("fresh_node", 1), ("tenants", 3)), (("value", 1), ("power", 2), ("fresh_gpu", 1))),
    worths=(("serving", 3),),
)
POLICIES = (DEFAULT_POLICY, TIERED, BY_NODES)
World = tuple[Node, tuple[Taken, ...], Demand]
LAW = settings(max_examples=100, deadline=None)


@st.composite
def node_and_demand(draw: st.DrawFn, real: bool) -> World:
    """A node, what is taken on it, and a demand."""
    node = draw(strategies.nodes(real=real))
    return node, draw(strategies.taken_on(node)), draw(strategies.demands(node))


@st.composite
def problems(draw: st.DrawFn, real: bool) -> Problem:
    """Two small nodes and up to four one-step asks."""
    nodes = tuple(draw(strategies.nodes(name=name, largest=3, real=real)) for name in ("a", "b"))
    taken = {node.name: draw(strategies.taken_on(node)) for node in nodes}
    demands = draw(st.lists(strategies.simple_demands(*nodes), max_size=4))
    return Problem(Snapshot(nodes, taken), tuple(Ask(f"ask-{i}", d) for i, d in enumerate(demands)))


@st.composite
def mixed_problems(draw: st.DrawFn, real: bool) -> Problem:
    """Two tiny nodes and up to three asks of any kind, of two priorities."""
    nodes = tuple(draw(strategies.nodes(name=name, largest=2, real=real)) for name in ("a", "b"))
    taken = {node.name: draw(strategies.taken_on(node)) for node in nodes}
    demands = draw(st.lists(strategies.demands(*nodes), max_size=3))
    asks = tuple(Ask(f"ask-{i}", demand, draw(st.sampled_from((0, 0, 7)))) for i, demand in enumerate(demands))
    return Problem(Snapshot(nodes, taken), asks)


@given(st.booleans().flatmap(node_and_demand), st.sampled_from((DEFAULT_POLICY, TIERED)))
@LAW
def test_no_legal_placement_on_a_node_is_cheaper_than_the_one_quoted(world: World, policy: Policy) -> None:
    """The one-pod answer is the optimum of its node, for whole GPUs, slices, and both together."""
    node, taken, demand = world
    found = quote(node, taken, demand, policy)
    least = brute.cheapest(node, taken, demand, policy)

    assert price(node, taken, demand, policy) == least
    if found is None:
        assert least is None
    else:
        alone = Problem(Snapshot((node,), {node.name: taken}), (Ask("one", demand),))
        assert policy.total(found.prices) == least
        assert found.devices in set(brute.placements(node, taken, demand))
        assert found.prices == plain_prices(alone, "one", found, policy.values)


@given(st.booleans().flatmap(node_and_demand))
@LAW
def test_a_refusal_is_given_exactly_where_nothing_is_legal(world: World) -> None:
    """Four ways to ask whether it fits agree, one of them knowing neither steps nor prices."""
    node, taken, demand = world
    fits = quote(node, taken, demand) is not None

    assert fits == (refusal(node, taken, demand) is None)
    assert fits == legal_step_exists(Snapshot((node,), {node.name: taken}), demand)
    refused = refusal(node, taken, demand)
    if refused is not None:
        assert refused.reason
        assert refused.resolvable == (quote(node, (), demand) is not None)


@given(st.booleans().flatmap(problems), st.sampled_from((DEFAULT_POLICY, TIERED)))
@LAW
def test_the_joint_plan_is_the_best_of_all_plans(problem: Problem, policy: Policy) -> None:
    """Flow and brute force agree on cost; the plan is legal and its prices are the plain counts."""
    plan = solve(problem, policy)

    assert verify(problem, plan) == []
    assert plan.status is Status.OPTIMAL
    assert plan.cost == brute.least_cost(problem, policy)


@given(st.booleans().flatmap(mixed_problems), st.sampled_from(POLICIES))
@LAW
def test_the_joint_plan_is_the_best_whatever_is_asked(problem: Problem, policy: Policy) -> None:
    """The same for slices and GPUs together, shares, CPU, memory, terms, guests, priorities and worths."""
    plan = solve(problem, policy)

    assert verify(problem, plan) == []
    assert plan.status is Status.OPTIMAL
    assert plan.cost == brute.least_cost(problem, policy)


@given(mixed_problems(real=True), st.sampled_from(POLICIES))
@LAW
def test_a_plan_made_under_no_time_is_legal_and_leaves_nothing_that_fits(problem: Problem, policy: Policy) -> None:
    """Out of time, the one-pod path fills what the model left, and the bound is true."""
    plan = solve(problem, policy, deterministic_limit=0.0)
    taken = {name: list(devices) for name, devices in problem.snapshot.taken.items()}
    for ask in problem.asks:
        placement = plan.placements.get(ask.id)
        if placement is not None:
            taken[placement.node].append(allocation_of(ask.demand, placement))
    after = Snapshot(problem.snapshot.nodes, {name: tuple(devices) for name, devices in taken.items()})

    assert verify(problem, plan) == []
    assert not any(legal_step_exists(after, ask.demand) for ask in problem.asks if ask.id in plan.unplaced)
    assert plan.bound <= solve(problem, policy).cost <= plan.cost


@given(mixed_problems(real=True))
@LAW
def test_names_and_order_of_nodes_change_no_cost(problem: Problem) -> None:
    """Equal nodes are equal, whatever they are called and wherever they stand."""
    renamed = {node.name: f"z{node.name}" for node in problem.snapshot.nodes}
    nodes = tuple(replace(node, name=renamed[node.name]) for node in reversed(problem.snapshot.nodes))
    taken = {renamed[name]: devices for name, devices in problem.snapshot.taken.items()}

    assert solve(replace(problem, snapshot=Snapshot(nodes, taken))).cost == solve(problem).cost


@given(st.booleans().flatmap(node_and_demand), st.randoms(use_true_random=False))
@LAW
def test_the_order_of_gpus_changes_no_price(world: World, random: Random) -> None:
    """A board is its links, not its numbering."""
    node, taken, demand = world
    order = list(range(len(node.gpus)))
    random.shuffle(order)
    gpus = tuple(replace(node.gpus[old], index=new) for new, old in enumerate(order))
    links = tuple(tuple(node.links[a][b] for b in order) for a in order)

    assert price(replace(node, gpus=gpus, links=links), taken, demand) == price(node, taken, demand)


@given(st.booleans().flatmap(node_and_demand))
@LAW
def test_a_pod_that_is_removed_and_placed_again_costs_the_same(world: World) -> None:
    """A state has no memory: values depend on what is free only."""
    node, taken, demand = world
    first = quote(node, taken, demand)
    if first is None:
        return
    before = read(node, taken)
    after = read(node, (*taken, allocation_of(demand, first)))
    value = DEFAULT_VALUES.of
    given_up = value(before.host) - value(after.host)
    given_up += sum(value(cut) for _, cut in before.cuts) - sum(value(cut) for _, cut in after.cuts)

    assert dict(first.prices)["value"] == given_up
    assert quote(node, taken, demand) == first


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_the_tables_are_what_a_fresh_look_would_give_after_any_changes(data: st.DataObject) -> None:
    """Puts and removals in any order; each changes its own node's entries only."""
    ranking = Ranking()
    world: dict[str, tuple[Node, tuple[Taken, ...]]] = {}
    known: list[Demand] = []
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(st.sampled_from("abc"))
        before = ranking.quoted
        if data.draw(st.integers(0, 3)) == 0:
            world.pop(name, None)
            ranking.remove(name)
            assert ranking.quoted == before
        else:
            node = data.draw(strategies.nodes(name=name))
            world[name] = (node, data.draw(strategies.taken_on(node)))
            ranking.put(*world[name])
            assert ranking.quoted - before <= len(known)
        demand = data.draw(strategies.demands(*(node for node, _ in world.values())))
        ranking.prices(demand)
        known = sorted({*known, demand})
        for demand in known:
            fresh = {name: price(node, taken, demand) for name, (node, taken) in world.items()}
            assert ranking.prices(demand) == {name: cost for name, cost in fresh.items() if cost is not None}
            for name, cost in fresh.items():
                assert (ranking.best(demand, name) is None) == (cost is None)
                assert (ranking.refusal(demand, name) is None) == (cost is not None)
