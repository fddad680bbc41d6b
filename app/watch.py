"""List-and-watch loops that keep the truth true: list all, then follow events, and list again after any gap.

The API server drops watchers that are too slow, and connections die; each time the answer is the same. A list
is consistent and says who is missing, so nothing that happened in a gap is lost.

All of it is done in turns, with time for others between them: a list of 40,000 pods is seconds of work, and so are the
events that a busy cluster has ready at once. Events wait until the list has been applied.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable

from app.errors import Gone, KubeError
from app.kube import Event, Json, Kube
from app.loop import Turns, in_turns

log = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0

Items = AsyncIterator[Json]


class Watch:
    """One resource, kept in step. `listed(items, asked_at)` and `event(event)` are called in order.

    `listed` takes the items as they come, and raises what goes wrong with them.
    """

    def __init__(
        self,
        kube: Kube,
        resource: str,
        *,
        listed: Callable[[Items, float], Awaitable[None]],
        event: Callable[[Event], None],
        clock: Callable[[], float],
        resync_seconds: float,
    ) -> None:
        self._kube = kube
        self.resource = resource
        self._listed = listed
        self._event = event
        self._clock = clock
        self._resync_seconds = resync_seconds
        self.lists = 0
        """How many lists have been applied; the first makes us complete."""
        self.interrupted = False
        """Whether the API server cannot be listed or followed right now."""

    async def run(self) -> None:
        """Follow for ever. Faults of the API server are logged and tried again; cancellation ends it."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                version = await self._list()
                pause = FIRST_PAUSE_SECONDS
                await self._follow(version)
            except KubeError as error:
                self.interrupted = True
                log.warning("watching %s: %s; listing again in %.1f s", self.resource, error, pause)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, guards nothing
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _list(self) -> str:
        asked_at = self._clock()
        version = ""

        async def items() -> Items:
            nonlocal version
            async for page in self._kube.pages(self.resource):
                version = page.resource_version
                async for item in in_turns(page.items):
                    yield item

        await self._listed(items(), asked_at)
        self.lists += 1
        self.interrupted = False
        return version

    async def _follow(self, version: str) -> None:
        """Watch until the resync time is over; a watch that ends early goes on from the last version."""
        until = self._clock() + self._resync_seconds
        while (left := until - self._clock()) > 0:
            applied = 0
            turns = Turns()
            try:
                async for event in self._kube.watch(self.resource, resource_version=version, seconds=left):
                    version = event.object["metadata"]["resourceVersion"]
                    if event.type != "BOOKMARK":
                        self._event(event)
                    applied += 1
                    await turns.over()
            except Gone:
                log.info("watching %s: a gap, listing again", self.resource)
                return
            if not applied:
                await asyncio.sleep(FIRST_PAUSE_SECONDS)
