"""Prices: whole milli-GPU, in the order that the policy says."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.demand import ANY_TERMS, Demand, SliceNeed
from solver.geometry import Slice, empty, placed_states
from solver.goals import DEFAULT_POLICY, GOALS, Policy, offers, prices_of
from solver.rank import quote
from solver.samples import KINDS, sample_node
from solver.steps import Host, State, host, host_steps, read, slice_steps
from solver.values import DEFAULT_VALUES
from tests.builders import A100, one
from tests.strategies import REAL, geometries

value = DEFAULT_VALUES.of


def need(profile: str) -> SliceNeed:
    """One slice on any terms."""
    return SliceNeed(profile, ANY_TERMS)


def states(kind: str) -> list[State]:
    """A few states of a sample node."""
    room = read(sample_node("n", kind))
    full = room.host.idle
    return [host(room.host.board, tuple(min(keep, n) for n in full)) for keep in (0, 1, 2, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_whole_and_between_nothing_and_the_node(kind: str) -> None:
    """Milli-GPU, as everything else."""
    for state in states(kind):
        assert isinstance(state, Host)
        assert isinstance(value(state), int)
        assert value(state) <= 1000 * state.board.size


@given(st.one_of(st.sampled_from(REAL), geometries()), st.data())
@settings(max_examples=60, deadline=None)
def test_a_cut_gpu_is_worth_between_nothing_and_one_gpu_and_never_gains(geometry, data) -> None:
    """Whatever board an agent reports, absurd ones included."""
    state = empty(geometry)
    assert value(state) in (0, 1000)
    for _ in range(4):
        steps = [step for profile in geometry.profiles for step in slice_steps(state, need(profile.name))]
        if not steps:
            break
        step = data.draw(st.sampled_from(steps))
        assert 0 <= value(step.after) <= value(state)
        assert all(isinstance(milli, int) for _, milli in prices_of((step,), DEFAULT_VALUES))
        state = step.after


def test_states_that_are_alike_in_essence_have_the_same_value() -> None:
    """The joint flow merges them, so it must be true."""
    from solver.geometry import Cut, cut

    seen: dict[object, int] = {}
    for placed in placed_states(A100):
        state = cut(A100, placed)
        assert isinstance(state, Cut)
        assert seen.setdefault(DEFAULT_VALUES.essence(state), value(state)) == value(state)
    assert len(seen) < 2319


def test_a_slice_costs_more_on_an_empty_gpu_than_on_a_cut_one() -> None:
    """So slices consolidate, and empty GPUs stay whole."""
    fresh = empty(A100)
    cut_up = fresh.add(Slice("1g.10gb", 6))

    assert (
        offers(cut_up, need("1g.10gb"), DEFAULT_POLICY)[0].price
        < offers(fresh, need("1g.10gb"), DEFAULT_POLICY)[0].price
    )


def test_all_slices_of_a_gpu_cost_a_gpu() -> None:
    """The value is what is left of it, so the prices along any way to a full board add up to it."""
    made = quote(sample_node("n", "8xA100-mig"), (), one("7g.80gb"))

    assert made is not None
    assert dict(made.prices)["value"] == 1000


def test_a_better_tier_beats_everything_after_it() -> None:
    """Weights of later tiers cannot add up to one milli-GPU of an earlier one."""
    policy = Policy("tiers", ((("links", 1),), (("value", 1000), ("numa", 5)), (("repartition", 1),)))
    worst = {goal.name: 1_000_000 for goal in GOALS}

    better = policy.total((("links", 0), *((n, m) for n, m in worst.items() if n != "links")))
    assert better < policy.total((("links", 1), ("value", -1_000_000)))


@pytest.mark.parametrize(
    ("tiers", "words"),
    [
        (((("speed", 1),),), "no goal is called speed; there are value, links, numa, nics, repartition, tenants"),
        (((("value", 1),), (("value", 2),)), "named twice"),
        (((("value", -1),),), "negative"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(tiers: tuple[tuple[tuple[str, int], ...], ...], words: str) -> None:
    """When it is made, in words."""
    with pytest.raises(ValueError, match=words):
        Policy("bad", tiers)


def test_equal_states_are_offered_once_and_the_cheapest_first() -> None:
    """Of the 70 ways to take four of a DGX-1V only different ends are kept."""
    room = read(sample_node("n", "8xV100"))
    found = offers(room.host, Demand.of(4).host_need, DEFAULT_POLICY)

    assert len(host_steps(room.host, Demand.of(4).host_need)) == 70
    assert len(found) < 30
    assert [offer.price for offer in found] == sorted(offer.price for offer in found)


def test_a_node_survives_the_way_to_another_process() -> None:
    """The planning child gets pickles, and strings hash differently there."""
    node = sample_node("n", "8xA100-mig2")
    again = pickle.loads(pickle.dumps(node))

    assert again == node
    assert hash(again.gpus[7].geometry) == hash(node.gpus[7].geometry)
