"""How many users there are when."""

from hypothesis import given
from hypothesis import strategies as st

from loadtests.shapes import SHAPES, burst, soak, steps


@given(st.sampled_from(sorted(SHAPES)), st.floats(0, 1), st.integers(1, 10_000), st.floats(2, 1e6))
def test_there_is_always_a_user_and_never_too_many(name, share, most, seconds):
    assert 1 <= SHAPES[name](share * seconds, most, seconds) <= most


def test_a_burst_is_short_and_comes_again():
    users = [burst(at, 100, 120) for at in range(120)]
    assert set(users) == {10, 100}
    assert users.count(100) == 4 * 5
    assert users[:30] == users[30:60]


def test_a_soak_stays_as_it_is_after_its_ramp():
    users = [soak(at, 50, 36_000) for at in range(0, 36_000, 10)]
    assert users == sorted(users)
    assert all(each == 50 for each in users[6:])


def test_steps_go_up_to_all_users():
    users = [steps(at, 60, 60) for at in range(60)]
    assert sorted(set(users)) == [10, 20, 30, 40, 50, 60]
    assert users == sorted(users)
