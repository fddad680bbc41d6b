"""A process's line to the API server, which is cut at one call of its choice: the process is dead from then on.

The call that was being made never arrived, was carried out without anybody reading its answer, or is still on its
way: then it arrives when somebody else, later, has made so many calls.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from app.errors import KubeError
from tests.fakes import FakeKube

Fate = Literal["lost", "unanswered", "late"]


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
    """One process's; `cut` once it is dead. Watches and lists are not counted."""

    def __init__(self, kube: FakeKube, post: Post, *, at: int, fate: Fate, after: int) -> None:
        self._kube = kube
        self._post = post
        self._at = at
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
        self._calls += 1
        await self._post.deliver()
        if self._calls != self._at:
            return await made(*args, **more)
        self.cut.set()
        if self._fate == "unanswered":
            await made(*args, **more)
        elif self._fate == "late":
            self._post.late.append(Late(lambda: made(*args, **more), self._after))
        return await asyncio.Event().wait()
