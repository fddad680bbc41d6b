"""A process's line to the API server, which is cut at one call of its choice: the process is dead from then on.

The calls that were being made then never arrived, were carried out without anybody reading the answer, or are still on
their way: those arrive when somebody else, later, has made so many calls.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from app.errors import KubeError
from tests.fakes import FakeKube

TURNS_UNDER_WAY = 3  # of the event loop, before a call arrives

Fate = Literal["lost", "unanswered", "late"]
FATES: tuple[Fate, ...] = ("late", "lost", "unanswered")


@dataclass(slots=True)
class Late:
    """A call that is on its way for so many more calls of others."""

    call: Callable[[], Awaitable[Any]]
    after: int


@dataclass(slots=True)
class Post:
    """Everything that is on its way from processes that are dead."""

    late: list[Late] = field(default_factory=list)
    arrived: int = 0

    async def deliver(self, *, all_of_it: bool = False) -> None:
        """Another call has been made: what is due arrives."""
        for each in list(self.late):
            each.after -= 1
            if all_of_it or each.after <= 0:
                self.late.remove(each)
                try:
                    await each.call()
                    self.arrived += 1
                except KubeError:
                    pass  # refused, and nobody is there to read that


class Line:
    """One process's; `cut` once it is dead, `at` so many calls, or so many `of` one verb. Watches and lists are not
    counted."""

    def __init__(self, kube: FakeKube, post: Post, *, at: int, of: str = "", fate: Fate, after: int = 1000) -> None:
        self._kube = kube
        self._post = post
        self.at = at
        self.of = of
        self._fate = fate
        self._after = after
        self._calls = 0
        self.cut = asyncio.Event()

    def __getattr__(self, verb: str) -> Any:
        made = getattr(self._kube, verb)
        return made if verb in ("watch", "pages") else lambda *args, **more: self._call(verb, made, args, more)

    async def _call(self, verb: str, made: Callable[..., Awaitable[Any]], args: Any, more: Any) -> Any:
        if self.cut.is_set():
            await asyncio.Event().wait()
        self._calls += self.of in ("", verb)
        await self._post.deliver()
        if self._calls == self.at and self.of in ("", verb):
            self.cut.set()
        for _ in range(TURNS_UNDER_WAY):
            await asyncio.sleep(0)
        if not self.cut.is_set():
            return await made(*args, **more)
        if self._fate == "unanswered":
            await made(*args, **more)
        elif self._fate == "late":
            self._post.late.append(Late(lambda: made(*args, **more), self._after))
        return await asyncio.Event().wait()
