"""The journal of binds: what is sent has been named, many at once, and whoever takes it finds everything."""

import asyncio
import contextlib
import copy
import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from app.errors import Conflict, NotFound, Refused, Unknown
from app.journal import HOLDER, LIMIT_BYTES, LOST, Intent, Journal, Unreadable
from app.translate import PodRef
from solver import Device, Slice
from tests.fakes import Clock, FakeKube

KEY = "ns/tangram-binds"


def intent(name: str, *devices: Device) -> Intent:
    return Intent(PodRef(f"uid-{name}", "default", name), "n1", devices or (Device(f"GPU-{name}"),))


class Desk:
    """A journal on a fake API server, and the binds that are open."""

    def __init__(self, kube: FakeKube | None = None) -> None:
        self.kube = kube or FakeKube()
        self.clock = Clock()
        self.open: set[str] = set()
        self.journal = Journal(
            self.kube, namespace="ns", name="tangram-binds", is_open=self.open.__contains__, clock=self.clock
        )

    async def declare(self, *names: str) -> None:
        self.open |= {f"uid-{name}" for name in names}
        await asyncio.gather(*(self.journal.declare(intent(name)) for name in names))

    def end(self, *names: str) -> None:
        self.open -= {f"uid-{name}" for name in names}

    @asynccontextmanager
    async def running(self, *, first: bool = True) -> AsyncIterator["Desk"]:
        self.found = await self.journal.take(first=first)
        if not isinstance(self.found, Unreadable):
            self.open |= {each.pod.uid for each in self.found}
        self.journal.adopted()
        writer = asyncio.create_task(self.journal.run())
        try:
            yield self
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with Desk().running() as running:
        yield running


async def found_by_the_next(desk: Desk) -> tuple[Intent, ...] | Unreadable:
    return await Desk(desk.kube).journal.take(first=False)


def names(found: tuple[Intent, ...] | Unreadable) -> set[str]:
    assert not isinstance(found, Unreadable), found.reason
    return {each.pod.name for each in found}


def fails(error: Exception, times: int = 1) -> Callable[[], None]:
    left = [times]

    def fail() -> None:
        if left[0]:
            left[0] -= 1
            raise error

    return fail


def writes(desk: Desk) -> int:
    return desk.kube.calls.count("replace_config_map")


# -- naming -------------------------------------------------------------------------------------------


async def test_what_is_declared_is_found_by_the_next_holder_as_it_was(desk):
    sliced = intent("s", Device("GPU-0", Slice("1g.10gb.me", 3)), Device("GPU-1", milli=250))
    desk.open.add("uid-s")
    await desk.journal.declare(sliced)

    assert await found_by_the_next(desk) == (sliced,)


async def test_many_that_are_declared_at_once_share_a_write(desk):
    await desk.declare("first")
    before = writes(desk)
    await desk.declare(*(f"p{number}" for number in range(100)))

    assert writes(desk) - before <= 2
    assert len(names(await found_by_the_next(desk))) == 101


async def test_what_has_ended_is_left_out_of_a_later_write(desk):
    await desk.declare("p", "q")
    desk.end("p")
    await desk.declare("r")

    assert names(await found_by_the_next(desk)) == {"q", "r"}


async def test_a_journal_at_rest_is_tidied(desk):
    await desk.declare("p")
    desk.end("p")
    desk.journal.tidy()
    desk.clock.advance(6)
    desk.journal.tidy()
    async with asyncio.timeout(5):
        while desk.kube.objects["configmaps"][KEY]["data"]["binds"]:
            await asyncio.sleep(0.005)


async def test_a_second_declaration_of_a_pod_takes_the_place_of_the_first(desk):
    desk.open.add("uid-p")
    await desk.journal.declare(intent("p", Device("GPU-0")))
    await desk.journal.declare(intent("p", Device("GPU-1")))

    assert await found_by_the_next(desk) == (intent("p", Device("GPU-1")),)


async def test_what_is_named_already_is_written_again(desk):
    """Somebody may have taken the journal since, fenced the pod and given its devices away."""
    await desk.declare("p")
    await found_by_the_next(desk)
    with pytest.raises(Conflict):
        await desk.declare("p")


async def test_what_does_not_fit_waits_until_others_have_ended(desk):
    large = tuple(Device(f"GPU-{number:0>36}") for number in range(1000))
    count = LIMIT_BYTES // 40_000
    desk.open |= {f"uid-p{number}" for number in range(2 * count)}
    declared = [asyncio.create_task(desk.journal.declare(intent(f"p{n}", *large))) for n in range(2 * count)]
    await asyncio.wait(declared, return_when=asyncio.FIRST_COMPLETED)

    text = desk.kube.objects["configmaps"][KEY]["data"]["binds"]
    assert len(text) <= 1 << 20
    assert not all(each.done() for each in declared)
    desk.open = desk.open.__class__()
    desk.journal._is_open = lambda _: False
    await asyncio.wait_for(asyncio.gather(*declared), 5)


# -- failures -----------------------------------------------------------------------------------------


async def test_a_lost_answer_is_looked_up(desk):
    desk.kube.after["replace_config_map"] = fails(Unknown("reset"))
    before = writes(desk)
    await desk.declare("p")

    assert writes(desk) == before + 1
    assert names(await found_by_the_next(desk)) == {"p"}


async def test_a_write_that_never_arrived_is_made_again(desk):
    desk.kube.before["replace_config_map"] = fails(Unknown("timeout"))
    desk.kube.before["get_config_map"] = fails(Unknown("timeout"), times=2)
    await desk.declare("p")
    assert names(await found_by_the_next(desk)) == {"p"}


async def test_an_earlier_write_of_ours_that_arrives_late_does_not_lose_the_journal(desk):
    original, late = desk.kube.replace_config_map, []

    async def still_under_way(*args: Any, **more: Any) -> Any:
        desk.kube.replace_config_map = arrives_before
        late.append((args, more))
        raise Unknown("timeout")

    async def arrives_before(*args: Any, **more: Any) -> Any:
        desk.kube.replace_config_map = original
        ((early, early_more),) = late
        await original(*early, **early_more)
        return await original(*args, **more)

    desk.kube.replace_config_map = still_under_way
    await desk.declare("p")
    await desk.declare("q")
    assert names(await found_by_the_next(desk)) == {"p", "q"}


async def test_when_somebody_else_has_taken_it_all_that_waits_is_refused(desk):
    await desk.declare("p")
    assert names(await found_by_the_next(desk)) == {"p"}

    with pytest.raises(Conflict, match="somebody else"):
        await desk.declare("q", "r")
    assert not desk.journal.ready
    with pytest.raises(Conflict):
        await desk.declare("s")


@pytest.mark.parametrize("error", [Refused("403"), NotFound("404")])
async def test_when_it_cannot_be_written_at_all_it_is_not_ours(desk, error):
    desk.kube.before["replace_config_map"] = fails(error)
    with pytest.raises(Conflict):
        await desk.declare("p")
    assert not desk.journal.taken


async def test_a_conflict_for_another_reason_than_the_version_is_a_refusal(desk):
    """An admission webhook, say: it would be the same for ever, and nobody would know why no bind is made."""

    def conflict() -> None:
        raise Conflict("409 for a reason of its own")

    desk.kube.before["replace_config_map"] = conflict
    with pytest.raises(Conflict, match="a reason of its own"):
        await asyncio.wait_for(desk.declare("p"), 5)
    assert not desk.journal.taken
    assert writes(desk) <= 3


async def test_declarations_that_are_refused_leave_no_garbage_that_refers_to_itself(desk, caplog):
    """Nobody would collect it (decision 0012)."""
    caplog.set_level(logging.CRITICAL)  # what is captured would keep the errors

    def refuse() -> None:
        raise Refused("403")

    desk.kube.before["replace_config_map"] = refuse
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        with contextlib.suppress(Conflict):
            await desk.journal.declare(intent("p"))
        await asyncio.sleep(0)  # whoever has woken us lets go of it
        gc.collect()
        left = [type(each).__name__ for each in gc.garbage if type(each).__module__.startswith(("app", "solver"))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert left == []


async def test_a_caller_who_gives_up_disturbs_nobody(desk):
    desk.kube.hold["replace_config_map"] = asyncio.Event()
    gone = asyncio.create_task(desk.declare("gone"))
    await asyncio.sleep(0)
    stays = asyncio.create_task(desk.declare("stays"))
    await asyncio.sleep(0)
    gone.cancel()
    desk.kube.hold.pop("replace_config_map").set()
    await asyncio.wait_for(stays, 5)
    assert "stays" in names(await found_by_the_next(desk))


# -- taking it ----------------------------------------------------------------------------------------


async def test_nothing_is_left_out_before_it_has_been_adopted():
    """A process that dies while it starts must leave everything to the next."""
    async with Desk().running() as desk:
        await desk.declare("p")
    second = Desk(desk.kube)
    await second.journal.take(first=False)
    with pytest.raises(Conflict):
        await second.declare("q")
    await second.journal.close()

    assert names(await found_by_the_next(second)) == {"p"}


async def test_a_former_holder_cannot_write_once_it_has_been_taken(desk):
    found = await found_by_the_next(desk)
    assert found == ()
    with pytest.raises(Conflict):
        await desk.declare("p")


async def test_a_missing_journal_is_empty_only_for_the_first_who_ever_serves():
    assert await Desk().journal.take(first=True) == ()
    desk = Desk()
    assert isinstance(await desk.journal.take(first=False), Unreadable)
    assert isinstance(await found_by_the_next(desk), Unreadable), "the one before died before it had fenced anybody"


async def test_a_journal_that_we_had_and_is_gone_is_not_an_empty_one(desk):
    desk.kube._remove("configmaps", KEY)
    assert isinstance(await desk.journal.take(first=True), Unreadable)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {"v": "1"},
        {"v": "2", "binds": ""},
        {"v": "1", "binds": LOST},
        {"v": "1", "binds": "{}"},
        {"v": "1", "binds": "[]"},
        {"v": "1", "binds": '{"uid":"u","namespace":"d","name":"p","node":"n","devices":[]}'},
        {"v": "1", "binds": '{"uid":"u","namespace":"d","name":"p","node":"n","devices":["GPU/x"]}'},
        {"v": "1", "binds": '{"uid":1,"namespace":"d","name":"p","node":"n","devices":["GPU"]}'},
    ],
)
async def test_a_journal_that_cannot_be_read_is_said_to_be_so_and_left_as_it_is(desk, data):
    journal = copy.deepcopy(desk.kube.objects["configmaps"][KEY])
    journal["data"] = data
    desk.kube._put("configmaps", KEY, journal, "MODIFIED")

    assert isinstance(await found_by_the_next(desk), Unreadable)
    assert isinstance(await found_by_the_next(desk), Unreadable), "the one before died before it had fenced anybody"


async def test_closing_leaves_only_what_may_still_arrive(desk):
    await desk.declare("p", "q")
    desk.end("p")
    await desk.journal.close()
    assert names(await found_by_the_next(desk)) == {"q"}


async def test_each_taking_changes_it_even_under_one_name(desk):
    before = desk.kube.objects["configmaps"][KEY]["metadata"]["annotations"][HOLDER]
    await desk.journal.take(first=False)
    assert desk.kube.objects["configmaps"][KEY]["metadata"]["annotations"][HOLDER] != before
