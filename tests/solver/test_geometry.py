"""MIG tables and states: counted against NVIDIA's figures and against each other."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.demand import ANY_TERMS, SliceNeed
from solver.geometry import (
    Cut,
    Geometry,
    Profile,
    Slice,
    cut,
    empty,
    faults,
    grid,
    in_the_way,
    is_maximal,
    placed_states,
)
from solver.products import PRODUCTS, Product, product
from solver.steps import slice_steps
from tests.builders import A30, A100, H100, RTX
from tests.solver.brute import fewest_removed
from tests.strategies import REAL, crowded_geometries, geometries

CLASSIC = ["1g.10gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]
CUTTABLE = [found for found in PRODUCTS if found.geometry is not None]
EIGHT_UNITS = {"1g": 7, "1g+me": 1, "1g×2": 4, "2g": 3, "3g": 2, "4g": 1, "7g": 1}
PUBLISHED_MAXIMA = {
    "A30-24": {"1g.6gb": 4, "1g.6gb+me": 1, "2g.12gb": 2, "2g.12gb+me": 1, "4g.24gb": 1},
    "RTXPRO6000-96": {
        "1g.24gb": 4,
        "1g.24gb+me": 1,
        "1g.24gb+gfx": 4,
        "1g.24gb+me.all": 1,
        "1g.24gb-me": 4,
        "2g.48gb": 2,
        "2g.48gb+gfx": 2,
        "2g.48gb+me.all": 1,
        "2g.48gb-me": 2,
        "4g.96gb": 1,
        "4g.96gb+gfx": 1,
    },
}


def counts(geometry: Geometry, profiles: list[str] | None = None) -> tuple[int, int, int, int]:
    """Placed states, maximal ones, and the multisets of each."""
    states = list(placed_states(geometry, profiles))
    maximal = [placed for placed in states if is_maximal(geometry, placed, profiles)]
    return len(states), len(maximal), len(multisets(states)), len(multisets(maximal))


def multisets(states: list[frozenset[Slice]]) -> set[frozenset[tuple[str, int]]]:
    return {frozenset(Counter(slice_.profile for slice_ in placed).items()) for placed in states}


@pytest.mark.parametrize(
    ("geometry", "profiles", "expected"),
    [
        (A100, CLASSIC, (298, 19, 38, 14)),
        (H100, CLASSIC, (298, 19, 38, 14)),
        (A100, None, (2319, 239, 128, 64)),
        (H100, None, (2319, 239, 128, 64)),
        (A30, ["1g.6gb", "2g.12gb", "4g.24gb"], (26, 5, 10, 4)),
        (A30, None, (76, 17, 20, 8)),
        (RTX, ["1g.24gb", "2g.48gb", "4g.96gb"], (26, 5, 10, 4)),
        (RTX, None, (717, 302, 115, 64)),
    ],
)
def test_states_count_to_the_published_figures(
    geometry: Geometry, profiles: list[str] | None, expected: tuple[int, int, int, int]
) -> None:
    """19 is NVIDIA's own figure for the A100; 298 tells a right grid from one where 3g is three units."""
    assert counts(geometry, profiles) == expected


@pytest.mark.parametrize("model", CUTTABLE, ids=lambda model: model.key)
def test_every_product_holds_as_many_instances_as_nvidia_says(model: Product) -> None:
    """Placements and engine totals alone give the published maximum counts."""
    assert model.geometry is not None
    expected = PUBLISHED_MAXIMA.get(model.key)
    if expected is None:
        names = [profile.name for profile in model.geometry.profiles]
        expected = dict(zip(names, EIGHT_UNITS.values(), strict=True))

    assert {profile.name: most(model.geometry, profile.name) for profile in model.geometry.profiles} == expected


def most(geometry: Geometry, profile: str) -> int:
    return max(len(placed) for placed in placed_states(geometry, [profile]))


def test_equal_blocks_are_one_state() -> None:
    """1g.20gb and 2g.20gb leave the same room, so six profiles have 417 states and not 723."""
    six = [profile.name for profile in A100.profiles if not profile.name.endswith("+me")]

    states = {cut(A100, placed) for placed in placed_states(A100, six)}

    assert len(states) == 417


def test_the_same_slices_leave_different_room_at_different_starts() -> None:
    """A state is placements, not counts: with 3g at 0 the board is full, with 3g at 4 a 1g is left."""
    ones = {Slice("1g.10gb", start) for start in (0, 1, 2)}
    full = cut(A100, frozenset({Slice("3g.40gb", 0), *(Slice("1g.10gb", s) for s in (4, 5, 6))}))
    open_ = cut(A100, frozenset({Slice("3g.40gb", 4), *ones}))

    assert isinstance(full, Cut)
    assert isinstance(open_, Cut)
    assert full.starts("1g.10gb") == ()
    assert open_.starts("1g.10gb") == (3,)


def test_one_media_engine_means_one_me_slice() -> None:
    """No rule of its own: the board has one OFA."""
    state = empty(H100).add(Slice("1g.10gb+me", 6))

    assert state.starts("1g.10gb+me") == ()
    assert state.starts("1g.10gb") == (0, 1, 2, 3, 4, 5)


def test_beside_all_engines_only_slices_without_any_fit() -> None:
    """nvml.h says so of me.all; the totals give it."""
    state = empty(RTX).add(Slice("1g.24gb+me.all", 9))
    fitting = [profile.name for profile in RTX.profiles if state.starts(profile.name)]

    assert fitting == ["1g.24gb-me", "2g.48gb-me"]


def test_an_idle_instance_serves_its_profile_and_goes_for_any_other() -> None:
    """It may be handed out again; otherwise it is not there."""
    state = cut(A100, idle=frozenset({Slice("2g.20gb", 4)}))

    assert isinstance(state, Cut)
    assert state.idle_starts("2g.20gb") == (4,)
    assert state.starts("3g.40gb") == (0, 4)
    assert state.add(Slice("2g.20gb", 4)) == cut(A100, frozenset({Slice("2g.20gb", 4)}))
    assert state.add(Slice("3g.40gb", 4)) == cut(A100, frozenset({Slice("3g.40gb", 4)}))
    assert state.add(Slice("3g.40gb", 0)).idle == state.idle


def test_only_what_is_in_the_way_goes() -> None:
    """Other pods may want the rest."""
    ones = [Slice("1g.10gb", start) for start in range(7)]

    assert in_the_way(A100, [Slice("3g.40gb", 4)], ones) == tuple(ones[4:])
    assert in_the_way(A100, [Slice("3g.40gb", 4), ones[0]], ones) == tuple(ones[4:])
    assert in_the_way(A100, ones[2:4], ones) == ()
    assert in_the_way(A100, [], ones) == ()


def test_an_idle_instance_with_the_only_media_engine_goes_for_another() -> None:
    """In the way is not only what covers the same units."""
    idle = [Slice("1g.10gb", 2), Slice("1g.10gb+me", 6)]

    assert in_the_way(H100, [Slice("1g.10gb+me", 0)], idle) == (Slice("1g.10gb+me", 6),)
    assert in_the_way(RTX, [Slice("1g.24gb+me.all", 9)], [Slice("1g.24gb", 0), Slice("1g.24gb-me", 3)]) == (
        Slice("1g.24gb", 0),
    )


def test_the_fewest_go_where_something_runs_out() -> None:
    """One that takes two engines rather than two that take one."""
    one_engine = Profile("1u", 0, 1, (0, 1, 2, 3), 0, 1000, (("dec", 1),))
    two_engines = Profile("1u+2", 1, 1, (0, 1, 2, 3), 0, 1000, (("dec", 2),))
    board = Geometry(4, 4, (one_engine, two_engines), (("dec", 4),))
    idle = [Slice("1u", 0), Slice("1u", 1), Slice("1u+2", 2)]

    assert in_the_way(board, [Slice("1u", 3)], idle) == (Slice("1u+2", 2),)
    assert in_the_way(board, [Slice("1u+2", 3)], idle) == (Slice("1u+2", 2),)


def test_a_held_slice_over_an_idle_instance_is_about_to_be_made() -> None:
    """The GPU stays in use meanwhile, without the idle one."""
    held = frozenset({Slice("3g.40gb", 4)})

    assert cut(A100, held, frozenset({Slice("2g.20gb", 4)})) == cut(A100, held)


def test_instances_that_cannot_all_exist_are_said_so() -> None:
    """Then the report is wrong, and nothing may be made over what it says."""
    assert cut(A100, idle=frozenset({Slice("9g.99gb", 0)})) == "9g.99gb@0: this board has no profile 9g.99gb"
    assert cut(A100, idle=frozenset({Slice("3g.40gb", 0), Slice("1g.10gb", 2)})) == (
        "3g.40gb@0 overlaps 1g.10gb@2 at unit 2"
    )


@st.composite
def boards_and_slices(draw: st.DrawFn) -> tuple[Geometry, list[Slice], frozenset[Slice]]:
    """A board, slices that can be held together in the order of their coming, and what stands on it idle."""
    geometry = draw(st.one_of(st.sampled_from(REAL), geometries(), crowded_geometries()))
    places = st.sampled_from(sorted(grid(geometry).blocks))
    there: list[Slice] = []
    for slice_ in draw(st.lists(places, min_size=draw(st.sampled_from((0, 4, 7))), max_size=7)):
        if slice_ not in there and not faults(geometry, [*there, slice_]):
            there.append(slice_)
    wanted: list[Slice] = []
    for slice_ in draw(st.lists(st.one_of(places, st.sampled_from(there)) if there else places, max_size=4)):
        if slice_ not in wanted and not faults(geometry, [*wanted, slice_]):
            wanted.append(slice_)
    return geometry, wanted, frozenset(there)


@given(boards_and_slices())
@settings(max_examples=300, deadline=None)
def test_what_is_in_the_way_is_the_least_that_makes_all_others_legal(
    world: tuple[Geometry, list[Slice], frozenset[Slice]],
) -> None:
    """By plain arithmetic: without it all can stand, with any one of it back they cannot, and no fewer would do."""
    geometry, wanted, idle = world
    gone = in_the_way(geometry, wanted, idle)
    stay = {*wanted, *idle} - set(gone)

    assert set(gone) <= idle - set(wanted)
    assert faults(geometry, stay) == []
    assert all(faults(geometry, stay | {each}) for each in gone)
    assert len(gone) == fewest_removed(geometry, frozenset(wanted), idle)


@given(boards_and_slices(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_states_know_what_is_in_the_way_in_whatever_order_slices_are_added(
    world: tuple[Geometry, list[Slice], frozenset[Slice]], random: Random
) -> None:
    """So prices of steps, plain counts and orders to agents agree."""
    geometry, wanted, idle = world
    state = cut(geometry, idle=idle)
    assert isinstance(state, Cut)
    removed = 0
    random.shuffle(wanted)
    for slice_ in wanted:
        step = next(each for each in slice_steps(state, SliceNeed(slice_.profile, ANY_TERMS)) if each.slice == slice_)
        assert step.reused == (slice_ in idle)
        assert step.removed >= 0
        assert isinstance(step.after, Cut)
        removed += step.removed
        state = step.after
    left = set(state.idle) - set(state.surplus())

    assert state == cut(geometry, frozenset(wanted), idle)
    assert idle - set(wanted) - left == set(in_the_way(geometry, wanted, idle))
    assert removed == len(in_the_way(geometry, wanted, idle))


@given(boards_and_slices())
@settings(max_examples=200, deadline=None)
def test_where_only_what_exists_may_be_used_nothing_is_ever_in_the_way(
    world: tuple[Geometry, list[Slice], frozenset[Slice]],
) -> None:
    """Nodes on which nobody makes or removes instances have a geometry of the places that exist: enough for that."""
    geometry, _, there = world
    profiles = [
        replace(profile, starts=tuple(sorted(each.start for each in there if each.profile == profile.name)))
        for profile in geometry.profiles
    ]
    fixed = replace(geometry, profiles=tuple(profile for profile in profiles if profile.starts))
    state = cut(fixed, idle=there)
    while there:
        assert isinstance(state, Cut)
        steps = [s for p in fixed.profiles for s in slice_steps(state, SliceNeed(p.name, ANY_TERMS))]
        assert {step.slice for step in steps} == set(state.idle) == there
        assert all(step.reused and not step.removed for step in steps)
        assert steps[0].slice is not None
        state, there = state.add(steps[0].slice), there - {steps[0].slice}


def test_a_board_that_cannot_be_is_said_so() -> None:
    """Then board and books disagree, and the GPU is not used."""
    assert cut(A100, frozenset({Slice("3g.40gb", 0), Slice("1g.10gb", 2)})) == (
        "3g.40gb@0 overlaps 1g.10gb@2 at unit 2"
    )
    assert cut(A100, frozenset({Slice("9g.99gb", 0)})) == "9g.99gb@0: this board has no profile 9g.99gb"


@pytest.mark.parametrize("model", CUTTABLE, ids=lambda model: model.key)
def test_names_mean_what_the_board_says(model: Product) -> None:
    """The same name is two shapes on two products, so nothing may be keyed by name alone."""
    assert model.geometry is not None
    assert len({profile.name for profile in model.geometry.profiles}) == len(model.geometry.profiles)
    assert len({profile.id for profile in model.geometry.profiles}) == len(model.geometry.profiles)
    for profile in model.geometry.profiles:
        assert faults(model.geometry, [Slice(profile.name, profile.starts[0])]) == []
        assert 0 < profile.memory_mib <= model.memory_mib


def test_one_name_two_shapes() -> None:
    """1g.10gb is one unit on an A100-80 and two on an A100-40."""
    forty = product("A100-40").geometry
    assert forty is not None
    sizes = {profile.name: profile.size for profile in forty.profiles}

    assert sizes["1g.10gb"] == 2
    assert {profile.name: profile.size for profile in A100.profiles}["1g.10gb"] == 1


@given(geometries(), st.data())
@settings(max_examples=100, deadline=None)
def test_legal_starts_are_those_that_have_no_fault(geometry: Geometry, data: st.DataObject) -> None:
    """Masks and scarce capacities say the same as plain arithmetic on everything that was reported."""
    placed: set[Slice] = set()
    state = empty(geometry)
    everything = sorted(grid(geometry).blocks)
    for _ in range(4):
        for profile in geometry.profiles:
            plain = tuple(
                start
                for start in sorted(profile.starts)
                if Slice(profile.name, start) not in placed
                and not faults(geometry, placed | {Slice(profile.name, start)})
            )
            assert state.starts(profile.name) == plain
        choices = [slice_ for slice_ in everything if slice_.start in state.starts(slice_.profile)]
        if not choices:
            break
        chosen = data.draw(st.sampled_from(choices))
        placed.add(chosen)
        state = state.add(chosen)
        assert state == cut(geometry, frozenset(placed))
