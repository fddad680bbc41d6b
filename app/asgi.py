"""The few pieces of bare ASGI for paths that are asked so often that a framework around them would be the main cost.

Measured for one request of 500 names: FastAPI's and Starlette's layers take longer than parsing, deciding and rendering
together (docs/decisions/0013-what-a-pod-costs.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import orjson

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_JSON = (b"content-type", b"application/json")


def beside(own: Mapping[str, App], other: App) -> App:
    """One application: these paths are answered by their own, everything else by the other one."""

    async def both(scope: Message, receive: Receive, send: Send) -> None:
        app = own.get(scope["path"], other) if scope["type"] == "http" else other
        await app(scope, receive, send)

    return both


async def answer(send: Send, content: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
    """A whole answer of JSON."""
    fields = [_JSON, (b"content-length", str(len(content)).encode())]
    fields += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})


async def refuse(send: Send, status: int, words: str, headers: Mapping[str, str] | None = None) -> None:
    """A refusal as FastAPI words it."""
    await answer(send, orjson.dumps({"detail": words}), status=status, headers=headers)
