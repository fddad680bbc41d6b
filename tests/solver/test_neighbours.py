"""Goals about neighbours, fresh GPUs and nodes, and power: what each wants, on a world where the answer is plain."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.cluster import Allocation, Device, Node, Snapshot, Taken
from solver.demand import Ask, Demand, Problem, Terms
from solver.goals import GOALS, Policy, allocation_of, plain_prices
from solver.guests import Guest
from solver.plan import Placement
from solver.rank import Ranking, quote
from solver.values import DEFAULT_VALUES
from tests import strategies
from tests.builders import mig_node, node, one, part, whole


def only(*goals: str) -> Policy:
    """A policy that looks at nothing else."""
    return Policy("only", tuple(((goal, 1),) for goal in goals))


def chosen(policy: Policy, demand: Demand, *nodes: tuple[Node, tuple[Allocation, ...]]) -> Placement:
    """Where the one-pod path places it, the first node of equally cheap ones."""
    ranking = Ranking(policy)
    for made, taken in nodes:
        ranking.put(made, taken)
    prices = ranking.prices(demand)
    found = ranking.best(demand, min(prices, key=lambda name: (prices[name], name)))
    assert found is not None
    return found


def by(tenant: str, workload: str = "") -> Terms:
    """On no terms but whose it is."""
    return Terms(guest=Guest(tenant, workload))


def held(device: Device, terms: Terms) -> Allocation:
    """One device, held."""
    return Allocation((device,), guest=terms.guest)


def test_a_share_goes_to_its_own_tenants_gpu() -> None:
    """Although another GPU would be the better fit."""
    taken = (held(Device("n-0", milli=500), by("blue")), held(Device("n-1", milli=100), by("red")))
    found = chosen(only("tenants", "value"), Demand(share_milli=400, terms=by("red")), (node("n", 3), taken))

    assert found.devices == (Device("n-1", milli=400),)
    assert dict(found.prices)["tenants"] == 0


def test_a_tenants_slice_goes_to_its_own_node() -> None:
    """A node with two tenants costs, wherever on it they are."""
    blue, red = by("blue"), by("red")
    there = ((mig_node("a", 2), (held(part("a", 0, "1g.10gb", 0), blue),)),
             (mig_node("b", 2), (held(part("b", 0, "3g.40gb", 4), red),)))  # fmt: skip

    assert chosen(only("tenants"), replace(one("1g.10gb"), terms=red), *there).node == "b"


def test_serving_is_kept_apart_from_training_where_the_policy_asks() -> None:
    """On a GPU first, then on a node."""
    training, serving = by("", "training"), by("", "serving")
    there = (held(Device("n-0", milli=500), training),)
    found = chosen(only("classes"), Demand(share_milli=250, terms=serving), (node("n", 2), there))

    assert found.devices == (Device("n-1", milli=250),)
    assert dict(found.prices)["classes"] == 50
    elsewhere = chosen(only("classes"), Demand(1, terms=serving), (node("a", 2), (
        held(Device("a-0"), training),)), (node("b", 2), ()))  # fmt: skip
    assert elsewhere.node == "b"


def test_slices_stay_on_gpus_that_are_cut_already() -> None:
    """Whatever that does to the starts of large profiles."""
    taken = (Allocation((part("n", 1, "1g.10gb", 0),)),)
    found = chosen(only("fresh_gpu"), one("1g.10gb"), (mig_node("n", 2), taken))

    assert found.devices[0].gpu == "n-1"


def test_pods_stay_on_nodes_that_are_open() -> None:
    """A node that nobody uses can be switched off."""
    taken = (Allocation(whole("b", 0)),)

    assert chosen(only("fresh_node"), Demand.of(1), (node("a", 8), ()), (node("b", 2), taken)).node == "b"


def test_power_prefers_the_gpu_that_draws_least() -> None:
    """Watts by the part that is taken."""
    thrifty = replace(node("b", 2), gpus=tuple(replace(gpu, watts=72) for gpu in node("b", 2).gpus))
    hungry = replace(node("a", 2), gpus=tuple(replace(gpu, watts=700) for gpu in node("a", 2).gpus))
    found = chosen(only("power"), Demand(share_milli=500), (hungry, ()), (thrifty, ()))

    assert found.node == "b"
    assert dict(found.prices)["power"] == 36


def test_a_pod_without_gpus_goes_where_there_are_fewest() -> None:
    """So that CPU beside GPUs stays for pods that use them."""
    made = [replace(node(name, gpus), cpu_milli=8000) for name, gpus in (("a", 8), ("b", 2))]

    assert chosen(only("cpu_only"), Demand(cpu_milli=1000), *((each, ()) for each in made)).node == "b"


def test_a_nic_of_its_own_is_not_left_without_need() -> None:
    """Two GPUs of one card rather than of two."""
    made = node("n", 4)
    cards = replace(made, gpus=tuple(replace(gpu, nic=gpu.index % 2) for gpu in made.gpus))
    found = chosen(only("nics"), Demand.of(2), (cards, ()))

    assert {device.gpu for device in found.devices} in ({"n-0", "n-2"}, {"n-1", "n-3"})


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.name)
def test_every_goal_has_a_price_and_a_count(goal) -> None:
    """Neither is left out."""
    assert goal.of_step.__doc__
    assert goal.of_plan.__doc__


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_two_pods_cost_together_does_not_depend_on_who_came_first(data: st.DataObject) -> None:
    """On the very same devices: every goal is a fixed price or a difference of what states have."""
    made = data.draw(strategies.nodes())
    taken = data.draw(strategies.taken_on(made))
    demands = [data.draw(strategies.demands(made)) for _ in range(2)]
    first = quote(made, taken, demands[0])
    second = first and quote(made, (*taken, allocation_of(demands[0], first)), demands[1])
    if not first or not second:
        return

    def alone(demand: Demand, placement: Placement, there: tuple[Taken, ...]) -> dict[str, int]:
        problem = Problem(Snapshot((made,), {made.name: there}), (Ask("one", demand),))
        return dict(plain_prices(problem, "one", placement, DEFAULT_VALUES))

    one_way = [
        alone(demands[0], first, taken),
        alone(demands[1], second, (*taken, allocation_of(demands[0], first))),
    ]
    other_way = [
        alone(demands[1], second, taken),
        alone(demands[0], first, (*taken, allocation_of(demands[1], second))),
    ]
    for goal in GOALS:
        assert sum(prices[goal.name] for prices in one_way) == sum(prices[goal.name] for prices in other_way)
