"""The loss system of cut GPUs: the published arrivals to the digit, legal fleets, and a reference that is exact."""

import json
from collections.abc import Iterator
from itertools import product as every

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.replay import mig
from app.replay.mig import (
    CLASSIC,
    POLICIES,
    Cheapest,
    Fleet,
    Packings,
    Repacked,
    Workload,
    arrivals,
    by_table,
    fillings,
    replay,
    seeds_from,
    weights_for,
)
from solver.geometry import Cut, Geometry, Slice, cut, placed_states
from solver.market import solve_table
from tests.app.test_cli import tangram
from tests.builders import A30, RTX

PLACING = [name for name, make in POLICIES.items() if make is not None]
QUICK = 800


@pytest.fixture(autouse=True, scope="module")
def rough_tables() -> Iterator[None]:
    """What is promised here holds for any table, so rough ones will do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mig, "solve_table", lambda geometry, mix: solve_table(geometry, mix, arrivals=QUICK))
        yield


def uniform(geometry: Geometry, **fields: float | int) -> Workload:
    """Every profile alike."""
    return Workload(geometry, weights_for(geometry, "uniform"), **fields)  # type: ignore[arg-type]


# --- what is asked ---


def test_arrivals_are_those_of_the_published_figures() -> None:
    """First-fit has no ties to break, so its figure shows that the random numbers are drawn the same way."""
    result = replay(uniform(CLASSIC), "first-fit", [7])

    assert result.slice_demand == pytest.approx(89.37, abs=0.005)
    assert result.requests == pytest.approx(94.44, abs=0.2)


def test_every_policy_meets_the_same_arrivals() -> None:
    """Seeds differ by points, so policies are compared on the same ones."""
    workload = uniform(A30, arrivals=50)

    assert list(arrivals(workload, 3)) == list(arrivals(workload, 3))
    assert list(arrivals(workload, 3)) != list(arrivals(workload, 4))


def test_load_is_units_offered_against_units_there() -> None:
    """At load 1 a fleet that lost nothing would be full on average."""
    workload = uniform(CLASSIC, load=0.5, gpus=10)

    assert workload.rate * (1 + 2 + 2 + 4 + 4 + 8) / 6 == pytest.approx(0.5 * 10 * 8)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("1,2", "2 weights for 5 profiles"),
        ("skew-big", "6 weights for 5 profiles"),
        ("many", "not uniform, skew-big"),
        ("0,0,0,0,0", "not all 0"),
        ("1,1,1,1,-1", "0 or more"),
        ("1,1,1,1,inf", "0 or more"),
        ("1,1,1,1,nan", "0 or more"),
    ],
)
def test_a_mix_that_means_nothing_is_refused_in_words(words: str, fault: str) -> None:
    """Before anything is played."""
    with pytest.raises(ValueError, match=fault):
        weights_for(A30, words)


def test_seeds_are_ranges_and_numbers() -> None:
    """As people write them."""
    assert seeds_from("7-9,12") == (7, 8, 9, 12)
    for words in ("", "x", "9-7"):
        with pytest.raises(ValueError, match="not seeds"):
            seeds_from(words)


# --- policies ---


@pytest.mark.parametrize("policy", PLACING)
@pytest.mark.parametrize("geometry", [A30, RTX])
def test_fleets_stay_legal_and_lose_only_what_fits_nowhere(policy: str, geometry: Geometry) -> None:
    """No policy may refuse what fits: that would be admission control, and another comparison."""
    workload = uniform(geometry, gpus=3, arrivals=300, load=1.5)
    make = POLICIES[policy]
    assert make is not None
    fleet = Fleet(geometry, 3, make(workload))
    held = []
    for number, arrival in enumerate(arrivals(workload, 1)):
        chosen = fleet.decide(arrival.profile.name)
        assert (chosen is None) == (not any(state.starts(arrival.profile.name) for state in fleet.states))
        if chosen is not None:
            fleet.take(chosen)
            held.append(chosen)
        if number % 2 and held:
            fleet.leave(held.pop(number % len(held)))
        for gpu, state in enumerate(fleet.states):
            assert state == cut(geometry, frozenset(one.slice for one in held if one.gpu == gpu))


def test_the_market_decides_by_the_prices_of_the_service() -> None:
    """Through `goals.offers` with the table: the same start as the table's own look-up, on every state."""
    table = solve_table(A30, arrivals=QUICK)
    chooser = by_table(table)
    assert isinstance(chooser, Cheapest)
    for placed, profile in every(placed_states(A30), A30.profiles):
        state = cut(A30, placed)
        assert isinstance(state, Cut)
        fleet = Fleet(A30, 1, chooser)
        fleet.states[0] = state
        fleet.alike = {chooser.view(state): {0: None}}
        picked = fleet.decide(profile.name)
        starts = state.starts(profile.name)
        if picked is None:
            assert not starts
            continue
        after = {start: table.of(state.add(Slice(profile.name, start))) for start in starts}
        assert picked.slice.start == min(start for start in starts if after[start] == max(after.values()))


def test_the_market_serves_more_than_first_fit_by_points() -> None:
    """Rough as this table is."""
    workload = uniform(CLASSIC, arrivals=4000)

    assert replay(workload, "market", [7]).slice_demand > replay(workload, "first-fit", [7]).slice_demand + 2


def test_the_same_seed_gives_the_same_figures() -> None:
    """A figure that cannot be repeated is no figure."""
    workload = uniform(A30, arrivals=400, gpus=10)
    for policy in POLICIES:
        assert replay(workload, policy, [1, 2]).seeds == replay(workload, policy, [1, 2]).seeds


def test_no_policy_of_that_name() -> None:
    """In words."""
    with pytest.raises(ValueError, match="no policy best; there are market, options"):
        replay(uniform(A30), "best", [7])


# --- free migration ---


def test_fillings_are_what_one_gpu_can_hold_and_no_more() -> None:
    """Of 1g, 1g+me, 2g, 2g+me, 4g; at most one with media engines, and 4g takes them too."""
    assert set(fillings(A30)) == {
        (4, 0, 0, 0, 0),
        (3, 1, 0, 0, 0),
        (2, 0, 1, 0, 0),
        (1, 1, 1, 0, 0),
        (2, 0, 0, 1, 0),
        (0, 0, 2, 0, 0),
        (0, 0, 1, 1, 0),
        (0, 0, 0, 0, 1),
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(range(5)), max_size=9))
def test_repacking_loses_only_what_no_packing_holds(asked: list[int]) -> None:
    """Against every way to choose a filling for each of two GPUs."""
    system = Repacked(A30, Packings(A30, 2))
    held = [0] * 5
    for row in asked:
        wanted = [count + (i == row) for i, count in enumerate(held)]
        possible = any(
            all(need <= a + b for need, a, b in zip(wanted, one, other, strict=True))
            for one, other in every(fillings(A30), repeat=2)
        )
        chosen = system.decide(A30.profiles[row].name)
        assert (chosen is not None) == possible
        if chosen is not None:
            system.take(chosen)
            held = wanted


# --- the commands ---


def test_replay_mig_prints_figures_for_people_and_for_programs() -> None:
    """The same run both ways."""
    words = ("replay", "mig", "--policy", "first-fit", "--policy", "options", "--arrivals", "400", "--seeds", "7-8")
    for_people, for_programs = tangram(*words), tangram(*words, "--json")
    found = json.loads(for_programs.stdout)

    assert [each["policy"] for each in found["policies"]] == ["first-fit", "options"]
    for each in found["policies"]:
        assert f"{each['slice_demand_percent']:.2f}" in for_people.stdout


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--policy", "best"), "no policy best"),
        (("--mix", "1,2"), "2 weights for 6 profiles"),
        (("--geometry", "T4-16"), "T4-16 cannot be cut"),
        (("--geometry", "Z"), "no product Z"),
        (("--seeds", "x"), "not seeds"),
    ],
)
def test_replay_mig_says_in_one_line_what_it_cannot_play(words: tuple[str, ...], fault: str) -> None:
    """Misuse, not a traceback."""
    said = tangram("replay", "mig", *words)

    assert said.returncode == 2
    assert fault in said.stderr
    assert len(said.stderr.splitlines()) == 1


def test_tables_says_what_values_were_found() -> None:
    """One board, for programs; its values are those that the solver gives."""
    said = json.loads(tangram("tables", "--geometry", "A30-24", "--json").stdout)["tables"][0]

    assert (said["products"], said["states"], said["merged"]) == (["A30-24"], 76, 23)
    assert said["method"].startswith("market")
    assert {tuple(map(tuple, each["held"])): each["milli"] for each in said["values"]}[()] == 0
    assert len(said["values"]) == 76
