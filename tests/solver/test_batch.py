"""Prices worked out in one batch are the prices of steps, whatever the node, the demand and the policy."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.cluster import Allocation, Device, Gpu, Node, Taken
from solver.demand import Demand, Terms
from solver.forecast import Forecast, Shape
from solver.goals import DEFAULT_POLICY, DEFAULT_TIER, Policy
from solver.pack import cheapest_on
from solver.rank import Ranking, price
from solver.steps import read
from solver.values import Values
from tests.strategies import demands, nodes, taken_on

MIX = (
    Shape(1000, 1, 250),
    Shape(1000, 1, 500, frequency=3),
    Shape(500, 1, 1000, ("test",)),
    Shape(1500, 2, 1000, frequency=0.2),
    Shape(500, 0, 0),
)
FORECAST = Forecast.from_mix(MIX, {"test": 10, "Other GPU": 30})
POLICIES = (
    DEFAULT_POLICY,
    Policy("foreseen", values=Values(forecast=FORECAST.with_blocks([("test", 1000, 2), ("Other GPU", None, 3)]))),
    Policy("all goals", ((*DEFAULT_TIER, ("fresh_node", 1), ("power", 3)),)),
    Policy("tiers", ((("fresh_node", 2),), (("links", 1), ("power", 1)), (("tenants", 5),), DEFAULT_TIER[:1])),
    Policy("valueless", ((("links", 1),),)),
)
relaxed = settings(deadline=None, max_examples=50)


def plain_node(name: str, gpus: int, product: str = "test", cpu_milli: int | None = None) -> Node:
    """A node of interchangeable GPUs."""
    links = tuple(tuple(0 if a == b else 100 for b in range(gpus)) for a in range(gpus))
    return Node(name, tuple(Gpu(f"{name}-{i}", i, product, 80_000) for i in range(gpus)), links, cpu_milli)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[tuple[Node, tuple[Taken, ...]]], list[Demand]]:
    """A few nodes, what is taken on them, and demands (CPU and memory alone among them)."""
    made = [draw(nodes(f"n{i}")) for i in range(draw(st.integers(1, 3)))]
    asked = draw(st.lists(demands(*made), min_size=1, max_size=5))
    asked += [Demand(cpu_milli=1500, memory_mib=10), Demand(share_milli=300, cpu_milli=500), Demand(gpus=2)]
    return [(node, draw(taken_on(node))) for node in made], asked


@relaxed
@given(worlds(), st.sampled_from(POLICIES))
def test_every_price_in_the_table_is_that_of_the_cheapest_step(
    world: tuple[list[tuple[Node, tuple[Taken, ...]]], list[Demand]], policy: Policy
) -> None:
    """In one batch for a node that changes, alone for a demand that is new: always what `pack` says."""
    there, asked = world
    ranking = Ranking(policy)
    for node, _ in there:
        ranking.put(node)
    for demand in asked:
        ranking.prices(demand)
    for node, taken in there:
        ranking.put(node, taken)

    for demand in [*asked, Demand(gpus=1, cpu_milli=500)]:
        exact = {node.name: cheapest_on(read(node, taken).state, demand, policy) for node, taken in there}
        fitting = {name: milli for name, milli in exact.items() if milli is not None}
        assert ranking.prices(demand) == fitting
        cheapest = ranking.cheapest(demand)
        assert (cheapest is None) == (not fitting)
        if cheapest is not None:
            assert fitting[cheapest] == min(fitting.values())
        for name, milli in fitting.items():
            placement = ranking.best(demand, name)
            assert placement is not None
            assert policy.total(placement.prices) == milli


@relaxed
@given(worlds(), st.sampled_from(POLICIES))
def test_devices_from_the_table_cost_what_the_table_says(
    world: tuple[list[tuple[Node, tuple[Taken, ...]]], list[Demand]], policy: Policy
) -> None:
    """Taken for real, they leave the state whose value the price counted on."""
    there, asked = world
    ranking = Ranking(policy)
    for node, taken in there:
        ranking.put(node, taken)
    for demand in asked:
        for node, taken in there:
            if node.name not in ranking.prices(demand):
                continue
            placement = ranking.best(demand, node.name)
            assert placement is not None
            after = (*taken, Allocation(placement.devices, demand.cpu_milli, demand.memory_mib, demand.terms.guest))
            gone = policy.values.of(read(node, taken).host) - policy.values.of(read(node, after).host)
            if not demand.slices:
                assert dict(placement.prices)["value"] == gone


@relaxed
@given(
    st.lists(
        st.tuples(st.sampled_from(("put", "remove", "ask", "renew", "settle")), st.integers(0, 2), st.integers(0, 3)),
        max_size=25,
    )
)
def test_no_order_of_events_makes_the_table_wrong(events: list[tuple[str, int, int]]) -> None:
    """Nodes come, change and go, demands are new, values are renewed: once settled, all is as if made anew."""
    asked = [
        Demand(gpus=1),
        Demand(share_milli=400, cpu_milli=1000),
        Demand(gpus=2, terms=Terms(products=("test",))),
        Demand(cpu_milli=2000),
    ]
    there: dict[str, tuple[Node, tuple[Taken, ...]]] = {}
    policy = POLICIES[1]
    ranking = Ranking(policy)
    for event, which, number in events:
        name = f"n{which}"
        if event == "put":
            node = plain_node(name, 2 + which, cpu_milli=3000)
            held = tuple(Device(gpu.uuid, milli=250 * number) for gpu in node.gpus[:number] if number)
            there[name] = node, held
            ranking.put(node, held)
        elif event == "remove":
            there.pop(name, None)
            ranking.remove(name)
        elif event == "ask":
            ranking.prices(asked[number])
        elif event == "renew":
            policy = Policy(values=Values(forecast=FORECAST.with_blocks([("test", None, number)])))
            ranking.renew(policy)
        else:
            ranking.settle(number)
    ranking.settle(100)

    for demand in asked:
        exact = {name: price(node, held, demand, policy) for name, (node, held) in there.items()}
        assert ranking.prices(demand) == {name: milli for name, milli in exact.items() if milli is not None}


def test_chance_chooses_among_the_cheapest_only() -> None:
    ranking = Ranking()
    for name, held in (("a", 0), ("b", 1), ("c", 1), ("d", 3)):
        node = plain_node(name, 4)
        ranking.put(node, [Device(gpu.uuid) for gpu in node.gpus[:held]])

    chance = Random(1)
    assert {ranking.cheapest(Demand.of(2), chance) for _ in range(50)} == {"b", "c"}


def test_nodes_keep_their_prices_after_a_renewal_until_they_are_settled() -> None:
    """So that no single decision pays for all of them."""
    ranking = Ranking(POLICIES[1])
    for size in range(1, 4):
        ranking.put(plain_node(f"n{size}", size))
    demand = Demand(share_milli=250)
    before = dict(ranking.prices(demand))
    asked = ranking.quoted

    other = Forecast.from_mix([replace(MIX[0], milli=700)], {"test": 6})
    ranking.renew(Policy(values=Values(forecast=other)))
    assert ranking.prices(demand) == before
    assert ranking.quoted == asked

    ranking.settle(1)
    assert sum(ranking.prices(demand)[name] != milli for name, milli in before.items()) <= 1
    ranking.settle(2)
    assert all(ranking.prices(demand)[name] != milli for name, milli in before.items())


def test_a_ranking_keeps_its_tiers() -> None:
    """Prices by other tiers cannot be compared with those that stand."""
    with pytest.raises(ValueError, match="tiers"):
        Ranking(POLICIES[0]).renew(POLICIES[3])
