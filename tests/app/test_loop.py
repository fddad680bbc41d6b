"""The event loop: how long it is blocked is seen, long work lets others in, garbage is not looked at twice.

No test here asserts a time: blocked means blocked by this test, and turns are counted.
"""

import asyncio
import gc
import logging
import time

import pytest

from app.kube import Json
from app.loop import TURN_SECONDS, LoopWatch, Tidying, in_turns
from app.metrics import Metrics
from app.truth import Truth
from tests.app.world import GPU, World
from tests.fakes import pod_json

BLOCK_SECONDS = 0.05


def block() -> None:
    """Be at work for that long."""
    until = time.thread_time() + BLOCK_SECONDS
    while time.thread_time() < until:
        pass


@pytest.fixture
async def watch():
    watch = LoopWatch()
    watch.start()
    yield watch
    watch.stop()


async def seen(watch: LoopWatch) -> None:
    """Wait until the watch has looked after what was just done."""
    looks = sum(watch.wall.counts)
    while sum(watch.wall.counts) == looks:
        await asyncio.sleep(0)


async def test_a_callback_that_blocks_the_loop_is_seen(watch):
    await seen(watch)
    time.sleep(BLOCK_SECONDS)
    await seen(watch)

    assert watch.wall.longest >= BLOCK_SECONDS / 2


async def test_waiting_for_others_is_not_our_own_work(watch):
    await seen(watch)
    before = watch.own.total
    time.sleep(BLOCK_SECONDS)
    await seen(watch)

    assert watch.own.total - before < BLOCK_SECONDS


async def test_the_longest_is_told_once_to_who_asks_and_kept_from_the_start(watch):
    watch.wall.note(1.5)

    assert watch.wall.take_longest_lately("scrape") >= 1.5
    assert watch.wall.take_longest_lately("scrape") < 1.5
    assert watch.wall.take_longest_lately("costs") >= 1.5, "everybody hears of it"
    assert watch.wall.longest >= 1.5


async def test_metrics_say_how_long_it_was_blocked():
    watch = LoopWatch()
    watch.own.note(0.003)
    watch.own.note(0.03)
    text = Metrics(lambda: (), watch).text().decode()

    assert 'tangram_loop_blocked_seconds_bucket{clock="own",le="0.005"} 1.0' in text
    assert 'tangram_loop_blocked_seconds_bucket{clock="own",le="+Inf"} 2.0' in text
    assert 'tangram_loop_blocked_longest_seconds{clock="own",since="start"} 0.03' in text


async def test_who_asks_to_be_told_reads_where_the_loop_was(caplog):
    watch = LoopWatch(tell_seconds=BLOCK_SECONDS / 10)
    with caplog.at_level(logging.WARNING, "app.loop"):
        watch.start()
        async with asyncio.timeout(60):
            while "block" not in caplog.text:
                block()
                await seen(watch)
                await asyncio.sleep(0.01)
        watch.stop()

    assert "the event loop was blocked" in caplog.text


async def test_others_have_turns_during_long_work():
    others = 0

    async def other() -> None:
        nonlocal others
        while True:
            others += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    done = []
    async for item in in_turns(range(5)):
        done.append(item)
        until = time.perf_counter() + TURN_SECONDS
        while time.perf_counter() < until:
            pass
    beside.cancel()

    assert done == [0, 1, 2, 3, 4]
    assert others >= 5


async def test_a_list_is_applied_before_anybody_is_told_that_we_are_ready():
    """Events wait and nothing is decided while the first list of pods is applied in turns."""
    world = World({"a": "8xH100"})
    for number in range(7):
        world.kube.add_pod(pod_json(f"p{number}", {GPU: 1}, spec={"nodeName": "a"}))
    seen_ready = []
    applied = Truth.pod_listed

    def listed(truth: Truth, item: Json) -> str:
        seen_ready.append(not world.service.waiting_for())
        return applied(truth, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Truth, "pod_listed", listed)
        async with world.running():
            assert len(world.service.truth.pods) == 7

    assert seen_ready == [False] * 7


async def test_what_survives_is_set_aside_and_given_back_at_the_end():
    tidying = Tidying()
    tidying.begin()
    try:
        kept = [[number] for number in range(20_000)]  # enough for collections of the middle generation
        tidying.tidy()
        young = len(gc.get_objects(0)) + len(gc.get_objects(1)) + len(gc.get_objects(2))
        assert young < len(kept)
    finally:
        tidying.end()
    assert gc.get_freeze_count() == 0


async def test_binding_and_reporting_leave_no_garbage_that_refers_to_itself():
    """What is set aside is never looked at again, so nothing may need a collection to go."""
    world = World({"a": "8xH100"})
    async with world.running():
        await bind_one(world, "warm")
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for name in ("x", "y", "z"):
                await bind_one(world, name)
                world.report("a", version=2)
            gc.collect()
            left = [type(each).__name__ for each in gc.garbage if type(each).__module__.startswith(("app", "solver"))]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()

    assert left == []


async def bind_one(world: World, name: str) -> None:
    world.kube.add_pod(pod_json(name, {GPU: 1}))
    error = await world.bind(name, "a")
    assert error == ""
