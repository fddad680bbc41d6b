"""The echo that the verbs are compared with: the service's own server, which reads a request and says what it was told.

    python -m tests.bench.echo --port PORT        PUT: remember this body as a reply; POST: give the oldest of them

uvicorn is configured by the very function that configures it for `tangram serve` (httptools, uvloop, the same
limits), the app is bare ASGI, since any framework could be left out, and the request goes through the same parser.
What is left of Tangram's time beside the echo's is what Tangram does.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, cast

import orjson
import uvicorn
import uvloop

from app.serve import listener_config

Message = dict[str, Any]


class Echo:
    """An ASGI app: replies are given in the order in which they were told, each once."""

    def __init__(self) -> None:
        self._replies: deque[bytes] = deque()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        assert scope["type"] == "http", "there is nothing to start or stop"
        body = await _whole(receive)
        reply = b""
        if scope["method"] == "PUT":
            self._replies.append(body)
        else:
            orjson.loads(body)
            reply = self._replies.popleft()
        headers = [(b"content-length", str(len(reply)).encode()), (b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": reply})


async def _whole(receive: Callable[[], Awaitable[Message]]) -> bytes:
    parts = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def main() -> None:
    """Serve until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.echo", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    config = listener_config(cast(Any, Echo()), "127.0.0.1", parser.parse_args().port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(uvicorn.Server(config).serve())


if __name__ == "__main__":
    main()
