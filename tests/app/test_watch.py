"""List and watch: nothing that happened in a gap is lost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.errors import Unknown
from app.kube import Event
from app.watch import Items, Watch
from tests.fakes import FakeKube, pod_json


class Seen:
    """What a watch has said so far."""

    def __init__(self) -> None:
        self.kube = FakeKube()
        self.names: set[str] = set()
        self.watch = self.following(1000.0)

    def following(self, resync_seconds: float) -> Watch:
        clock = asyncio.get_event_loop().time
        return Watch(
            self.kube, "pods", listed=self.listed, event=self.event, clock=clock, resync_seconds=resync_seconds
        )

    async def listed(self, items: Items, asked_at: float) -> None:
        self.names = {item["metadata"]["name"] async for item in items}

    def event(self, event: Event) -> None:
        change = self.names.discard if event.type == "DELETED" else self.names.add
        change(event.object["metadata"]["name"])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.watch.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def become(self, *names: str) -> None:
        async with asyncio.timeout(20):
            while self.names != set(names) or not self.watch.lists:
                await asyncio.sleep(0.005)


@pytest.fixture
async def seen() -> Seen:
    return Seen()


async def test_what_is_there_is_listed_and_what_comes_is_seen(seen):
    seen.kube.add_pod(pod_json("a"))
    async with seen.running():
        await seen.become("a")
        seen.kube.add_pod(pod_json("b"))
        seen.kube.remove_pod("a")
        await seen.become("b")
    assert seen.watch.lists == 1


async def test_a_version_that_is_too_old_means_listing_again(seen):
    seen.kube.add_pod(pod_json("a"))
    async with seen.running():
        await seen.become("a")

        def drop() -> None:
            seen.kube.before.pop("watch")
            del seen.kube.objects["pods"]["default/a"]
            seen.kube.add_pod(pod_json("c"))
            seen.kube.forget_history()
            raise Unknown("connection reset")

        seen.kube.before["watch"] = drop
        seen.kube.add_pod(pod_json("b"))
        await seen.become("b", "c")
    assert seen.watch.lists == 2


async def test_an_api_server_that_is_away_is_tried_again_and_said(seen):
    def away() -> None:
        raise Unknown("connection refused")

    seen.kube.before["list"] = away
    async with seen.running():
        async with asyncio.timeout(20):
            while not seen.watch.interrupted:
                await asyncio.sleep(0.005)
        assert seen.watch.lists == 0
        seen.kube.before.pop("list")
        await seen.become()
    assert not seen.watch.interrupted


async def test_all_is_listed_again_now_and_then(seen):
    seen.watch = seen.following(0.05)
    async with seen.running():
        async with asyncio.timeout(20):
            while seen.watch.lists < 3:
                await asyncio.sleep(0.005)
