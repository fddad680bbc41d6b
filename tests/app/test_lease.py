"""One at a time."""

import pytest

from app.errors import Unknown
from app.lease import Lease
from tests.fakes import Clock, FakeKube


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def kube() -> FakeKube:
    return FakeKube()


def lease(kube: FakeKube, clock: Clock, identity: str) -> Lease:
    return Lease(kube, namespace="ns", name="tangram", identity=identity, seconds=15.0, clock=clock)


async def test_the_first_to_come_holds_it(kube, clock):
    ours = lease(kube, clock, "a")
    assert not ours.held()
    await ours._turn()
    assert ours.held()


async def test_a_second_is_not_served_while_the_first_renews(kube, clock):
    first, second = lease(kube, clock, "a"), lease(kube, clock, "b")
    for _ in range(10):
        await first._turn()
        await second._turn()
        clock.advance(5)
    assert not second.held()
    assert second.holder == "a"


async def test_a_newcomer_waits_out_the_old_lease_by_its_own_clock(kube, clock):
    await lease(kube, clock, "dead")._turn()
    ours = lease(kube, clock, "b")
    clock.advance(1000)
    await ours._turn()
    assert not ours.held(), "it has only just begun to watch"
    clock.advance(14)
    await ours._turn()
    assert not ours.held()
    clock.advance(2)
    await ours._turn()
    assert ours.held()


async def test_the_same_identity_need_not_wait(kube, clock):
    """A restarted container of the same pod: its predecessor is dead."""
    await lease(kube, clock, "a")._turn()
    again = lease(kube, clock, "a")
    await again._turn()
    assert again.held()


async def test_a_holder_that_cannot_renew_stops_before_its_lease_ends(kube, clock):
    ours = lease(kube, clock, "a")
    await ours._turn()

    def away() -> None:
        raise Unknown("the API server is away")

    kube.before["get_lease"] = away
    clock.advance(12.5)
    with pytest.raises(Unknown):
        await ours._turn()
    assert not ours.held()


async def test_of_two_that_take_it_at_once_one_holds_it(kube, clock):
    first, second = lease(kube, clock, "a"), lease(kube, clock, "b")
    await lease(kube, clock, "dead")._turn()
    await first._turn()
    await second._turn()
    clock.advance(16)
    await first._turn()
    await second._turn()
    assert [first.held(), second.held()] == [True, False]


async def test_given_back_it_is_free_at_once(kube, clock):
    first, second = lease(kube, clock, "a"), lease(kube, clock, "b")
    await first._turn()
    await first.release()
    assert not first.held()
    await second._turn()
    assert second.held()
