"""Value tables of cut GPUs: small and exact where it can be exact, laws everywhere else."""

import pickle
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from solver import market
from solver.demand import ANY_TERMS, SliceNeed
from solver.geometry import Cut, Geometry, Profile, Slice, cut, empty, placed_states
from solver.goals import Policy, offers
from solver.market import Demand, Graph, Stream, graph_of, shape_of, solve_table
from solver.values import Values
from tests.builders import A30, A100, H100, RTX
from tests.strategies import geometries

CLASSIC = replace(H100, profiles=tuple(p for p in H100.profiles if not p.name.endswith("+me")))

QUICK = 800  # arrivals: rough tables, but every law must hold for them too


def graph(geometry: Geometry, merge: bool = True) -> Graph:
    """Its states, which must not be too many."""
    found = graph_of(shape_of(geometry)[0], merge)
    assert isinstance(found, Graph)
    return found


def states(geometry: Geometry) -> list[Cut]:
    """Every state without idle instances, several times where profiles take equal blocks."""
    found = [cut(geometry, placed) for placed in placed_states(geometry)]
    assert all(isinstance(state, Cut) for state in found)
    return [state for state in found if isinstance(state, Cut)]


def ones(starts: int) -> Geometry:
    """A board of so many independent units."""
    return Geometry(starts, starts, (Profile("1u", 0, 1, tuple(range(starts)), 1, 1000),))


# --- states ---


@pytest.mark.parametrize(
    ("geometry", "states", "merged"),
    [(CLASSIC, 417, 100), (A30, 76, 23), (A100, 1499, 260), (H100, 1499, 260), (RTX, 304, 73)],
)
def test_states_are_as_many_as_counted_before(geometry: Geometry, states: int, merged: int) -> None:
    """What cannot run out tells no states apart, so boards of seven profiles have 1,499 and not 2,319."""
    found = graph(geometry)

    assert (len(found.states), found.size) == (states, merged)


@given(geometries())
def test_states_are_those_that_cuts_can_be_in(geometry: Geometry) -> None:
    """Each once, as the blocks that a cut holds."""
    found = graph(geometry)

    assert len(set(found.states)) == len(found.states)
    assert set(found.states) == {state.held for state in states(geometry)}


@settings(deadline=None, max_examples=40)
@given(geometries(), st.integers(0, 99))
def test_merging_states_changes_no_value(geometry: Geometry, seed: int) -> None:
    """States of one class are worth the same at any prices, since nothing can tell them apart."""
    assume(shape_of(geometry)[0].rows)
    whole, merged = graph(geometry, merge=False), graph(geometry)
    demand = Demand.of(whole.shape, [1.0] * len(whole.shape.rows))
    chance = np.random.default_rng(seed)
    asked = [chance.uniform(0, size, 50) for size in demand.sizes]

    values = []
    for each in (whole, merged):
        replies = [np.zeros(each.size)]
        for _ in range(6):  # until nothing changes
            replies.append(market._Market(each, demand, 3.0).best_reply(replies[-1], asked))
        values.append(replies[-1])

    assert np.allclose(values[0], values[1][list(merged.group)], atol=1e-6)


def test_independent_units_merge_into_their_count() -> None:
    """Sixteen thousand states, but only how many units are held matters."""
    assert graph(ones(14)).size == 15


def test_classes_of_one_kind_have_as_many_blocks() -> None:
    """Or departures would tell them apart."""
    found = graph(H100)

    assert all(len(held) == len(found.departures[group]) for held, group in zip(found.states, found.group, strict=True))


# --- laws of tables ---


@settings(deadline=None, max_examples=15)
@given(geometries(), st.data())
def test_values_fall_from_nothing_as_blocks_are_held(geometry: Geometry, data: st.DataObject) -> None:
    """Whole numbers, 0 when empty, never higher with a further block, and never out of all proportion."""
    names = [profile.name for profile in geometry.profiles]
    mix = data.draw(st.fixed_dictionaries({name: st.sampled_from((0.0, 0.1, 1.0, 5.0)) for name in names}))
    table = solve_table(geometry, mix, arrivals=QUICK)

    assert table.of(empty(geometry)) == 0
    for state in states(geometry):
        assert type(table.of(state)) is int
        assert -8000 <= table.of(state) <= 0
        for profile in names:
            for start in state.starts(profile):
                assert table.of(state.add(Slice(profile, start))) <= table.of(state)


@settings(deadline=None, max_examples=15)
@given(geometries())
def test_a_table_never_refuses_what_fits(geometry: Geometry) -> None:
    """A price is no admission rule."""
    table = solve_table(geometry, arrivals=QUICK)
    for state in states(geometry):
        for profile in geometry.profiles:
            assert (table.taken(state, profile.name) is None) == (not state.starts(profile.name))


@settings(deadline=None, max_examples=15)
@given(geometries())
def test_the_service_asks_what_the_table_says(geometry: Geometry) -> None:
    """Of two offers of the service's own step and price code the cheapest takes what the table says, and no less."""
    table = solve_table(geometry, arrivals=QUICK)
    policy = Policy(tiers=((("value", 1),),), values=Values({geometry: table}))
    for state in states(geometry):
        for profile in geometry.profiles:
            found = offers(state, SliceNeed(profile.name, ANY_TERMS), policy)
            assert (found[0].price if found else None) == table.taken(state, profile.name)


@pytest.mark.parametrize("geometry", [A30, RTX])
def test_a_rough_table_is_no_worse_than_the_formulas_on_what_it_was_chosen_by(geometry: Geometry) -> None:
    """The guard has them among its candidates."""
    shape, _ = shape_of(geometry)
    found, weights = graph(geometry), [1.0] * len(shape.rows)
    demand = Demand.of(shape, weights)
    unseen = Stream.of(demand, market.GUARD * QUICK, (0, market.ROUNDS))
    solution = np.array(market._solve(shape, tuple(weights), 0, QUICK).values, dtype=float)
    ours = market.served_by(found, demand, solution, unseen)

    for values in market.formula_values(found, weights).values():
        assert ours >= market.served_by(found, demand, market._milli(found, values), unseen)


def test_idle_instances_count_as_free() -> None:
    """They can be destroyed, so they are worth what their room is worth."""
    table = solve_table(A30, arrivals=QUICK)
    held, idle = frozenset({Slice("1g.6gb", 0)}), frozenset({Slice("2g.12gb", 2)})
    with_idle, without = cut(A30, held, idle), cut(A30, held)
    assert isinstance(with_idle, Cut)
    assert isinstance(without, Cut)

    assert table.of(with_idle) == table.of(without)
    assert table.of(cut_of(A30, idle=idle)) == 0


def cut_of(geometry: Geometry, idle: frozenset[Slice]) -> Cut:
    """Only idle instances."""
    found = cut(geometry, frozenset(), idle)
    assert isinstance(found, Cut)
    return found


def test_the_same_seed_gives_the_same_table() -> None:
    """A plan must be repeatable, in another process too."""
    market._solve.cache_clear()
    first = solve_table(A30, arrivals=QUICK, seed=3)
    market._solve.cache_clear()

    assert solve_table(A30, arrivals=QUICK, seed=3).values == first.values


def test_boards_that_differ_in_names_only_share_a_solution() -> None:
    """A100-40 and A100-80 are cut alike."""
    renamed = replace(
        A30, profiles=tuple(replace(profile, name=f"x{profile.name}", memory_mib=1) for profile in A30.profiles)
    )

    assert solve_table(renamed, arrivals=QUICK).values == solve_table(A30, arrivals=QUICK).values


def test_tables_travel_between_processes_and_stay_keys() -> None:
    """They are made in one process and used in another."""
    table = solve_table(A30, arrivals=QUICK)
    copy = pickle.loads(pickle.dumps(table))

    assert [copy.of(state) for state in states(A30)] == [table.of(state) for state in states(A30)]
    assert len({table, copy, table}) == 2


# --- mixes ---


def test_what_is_asked_for_most_is_kept_room_for() -> None:
    """If only the largest profile is asked for, any slice takes all that an empty GPU is worth."""
    table = solve_table(A30, {"4g.24gb": 1.0}, arrivals=QUICK)

    small, large = (table.taken(empty(A30), profile) for profile in ("1g.6gb", "4g.24gb"))
    second = table.taken(empty(A30).add(Slice("1g.6gb", 0)), "1g.6gb")

    assert small is not None
    assert second is not None
    assert small == pytest.approx(large, abs=10)
    assert second < small / 2


def test_the_mix_is_kept_as_shares() -> None:
    """Twice the weights are the same mix; what this board has not, and what is not asked for, is left out."""
    table = solve_table(A30, {"2g.12gb": 6.0, "1g.6gb": 2.0, "7g.80gb": 5.0, "4g.24gb": 0.0}, arrivals=QUICK)

    assert table.mix == (("1g.6gb", 0.25), ("2g.12gb", 0.75))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_must_be_numbers_that_can_be_weighed(weight: float) -> None:
    """Said at once, since no value would mean anything."""
    with pytest.raises(ValueError, match=r"the weight of 1g\.6gb is"):
        solve_table(A30, {"1g.6gb": weight})


def test_huge_and_tiny_weights_still_give_numbers() -> None:
    """Nothing overflows on the way."""
    table = solve_table(A30, {"1g.6gb": 1e308, "2g.12gb": 1e308, "4g.24gb": 1e-308}, arrivals=QUICK)

    assert all(-8000 <= value <= 0 for value in table.values.values())


# --- formulas ---


@pytest.mark.parametrize(
    ("geometry", "mix", "words"),
    [
        (ones(16), None, "options (more than 20000 states)"),
        (ones(300), None, "options (300 different blocks, more than 256)"),
        (Geometry(4, 4, ()), None, "options (nothing in the mix fits)"),
        (A30, {"1g.6gb": 0.0}, "options (nothing in the mix fits)"),
        (Geometry(2, 2, (Profile("4u", 0, 4, (0,), 4, 1),)), None, "options (nothing in the mix fits)"),
    ],
)
def test_where_no_market_can_be_made_the_formula_stays_and_says_why(
    geometry: Geometry, mix: dict[str, float] | None, words: str
) -> None:
    """A board is used from its first report on, whatever it is."""
    table = solve_table(geometry, mix)

    assert table.method == words
    assert table.of(empty(geometry)) == 0


@given(geometries())
def test_formulas_fall_from_nothing_too(geometry: Geometry) -> None:
    """They stand in for a table until it is there."""
    for table in (market.options_table(geometry), market.best_fit_table(geometry)):
        assert table.of(empty(geometry)) == 0
        for state in states(geometry):
            assert -1000 <= table.of(state) <= 0
            for profile in geometry.profiles:
                assert (table.taken(state, profile.name) is None) == (not state.starts(profile.name))


def test_a_state_that_no_table_knows_gets_the_formula() -> None:
    """It should not happen, and must not stop anyone."""
    table = solve_table(A30, arrivals=QUICK)
    stranger = empty(H100).add(Slice("7g.80gb", 0))

    assert table.of(stranger) == market.options_table(H100, dict(table.mix)).of(stranger)


# --- the simulation ---


def test_a_stream_serves_everything_when_little_is_asked() -> None:
    """A light load fits whatever the values are."""
    shape, _ = shape_of(A30)
    light = Demand(shape.sizes, tuple(0.2 for _ in shape.sizes))

    assert market.served_by(graph(A30), light, np.zeros(graph(A30).size), Stream.of(light, 500, (1,))) == 1.0


def test_departures_come_after_their_arrivals() -> None:
    """And nobody leaves twice."""
    shape, _ = shape_of(A30)
    stream = Stream.of(Demand.of(shape, [1.0] * len(shape.rows)), 1000, (7,))
    order = {event: place for place, event in enumerate(stream.events)}

    assert len(order) == len(stream.events)
    assert all(order[~event] < order[event] for event in stream.events if event < 0)
    assert all(a < b for a, b in pairwise(event for event in stream.events if event >= 0))
