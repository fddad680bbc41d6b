"""Simulated agents of a whole fleet over plain HTTP: every node reports once, then says "nothing new" at its interval.

    python -m tests.bench.agents --port PORT --mix whole --nodes 5000 [--interval 10]

A process of its own and as lean as can be, since real agents have machines of their own: a few kept connections, one
request in flight on each, bytes made once. Who waits for an answer (the service is frozen, say) sends nothing more, and
beats that were missed are not made up for. Beside real agents this spares the service their TLS, their tokens, their
held requests for orders, and a connection for each.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import cast

import orjson
import uvloop

from app.simulate import report_of
from solver import Node
from solver.samples import sample_node

MIXES = {"whole": ("8xH100",), "mig": ("8xH100-mig", "8xA100-mig")}
"""Kinds of nodes of a fleet, in turn: eight GPUs each, none or all of them in MIG mode."""

CONNECTIONS = 16
RETRY_SECONDS = 0.5


def fleet(mix: str, count: int) -> list[Node]:
    """The nodes of a fleet: the same for everybody who asks."""
    kinds = MIXES[mix]
    return [sample_node(f"node-{number:05d}", kinds[number % len(kinds)]) for number in range(count)]


def reports(mix: str, count: int) -> list[bytes]:
    """Every node's report as JSON. Nodes of one kind differ by names and UUIDs only, so it is written once a kind."""
    nodes = fleet(mix, count)
    written = [_Written(node) for node in nodes[: len(MIXES[mix])]]
    return [kind.about(node) for node, kind in zip(nodes, cycle(written), strict=False)]


class _Written:
    """The report of a node, to be changed into that of another."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._json = report_of(node).model_dump_json(by_alias=True)

    def about(self, node: Node) -> bytes:
        text = self._json.replace(f'"{self._node.name}"', f'"{node.name}"')
        for old, new in zip(self._node.gpus, node.gpus, strict=True):
            text = text.replace(old.uuid, new.uuid)
        return text.encode()


class Agents(asyncio.Protocol):
    """Some of the nodes, on one connection."""

    def __init__(self, port: int, names: Sequence[str], full: Sequence[bytes], *, pause_seconds: float) -> None:
        """`pause_seconds`: from one beat on this connection to the next."""
        self._port = port
        self._full = [_request(body) for body in full]
        self._beats = [_request(orjson.dumps({"node": name, "boot": "simulated", "version": 1})) for name in names]
        self._pause = pause_seconds
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._reply = b""
        self._first_round = True
        self._turn = 0
        self._due = 0.0

    async def connect(self) -> None:
        """Come to the service, however long it takes until it is there."""
        while True:
            try:
                await self._loop.create_connection(lambda: self, "127.0.0.1", self._port)
            except OSError:
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._reply = b""
        self._send(full=self._first_round)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._loop.call_later(RETRY_SECONDS, lambda: self._loop.create_task(self.connect()))

    def data_received(self, data: bytes) -> None:
        self._reply += data
        if not _is_whole(self._reply):
            return
        wanted_again = b'"resend":true' in self._reply
        self._reply = b""
        if wanted_again:
            self._send(full=True)
            return
        self._turn += 1
        self._first_round = self._first_round and self._turn < len(self._beats)
        if self._first_round:
            self._send(full=True)
        else:
            self._due = max(self._due + self._pause, self._loop.time())
            self._loop.call_at(self._due, self._send)

    def _send(self, *, full: bool = False) -> None:
        if self._transport is not None:
            which = self._turn % len(self._beats)
            self._transport.write(self._full[which] if full else self._beats[which])


def _request(body: bytes) -> bytes:
    head = (
        f"POST /v1/reports HTTP/1.1\r\nhost: service\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


def _is_whole(reply: bytes) -> bool:
    """Whether a reply with a content-length has all of its body."""
    head, blank, body = reply.partition(b"\r\n\r\n")
    if not blank:
        return False
    length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
    return len(body) >= int(length)


async def report_for_ever(port: int, mix: str, count: int, interval_seconds: float) -> None:
    """All nodes, spread over the connections and over the interval."""
    names = [node.name for node in fleet(mix, count)]
    full = reports(mix, count)
    connections = min(CONNECTIONS, count)
    shares: Iterable[slice] = (slice(first, None, connections) for first in range(connections))
    agents = [
        Agents(port, names[share], full[share], pause_seconds=interval_seconds / len(names[share])) for share in shares
    ]
    await asyncio.gather(*(each.connect() for each in agents))
    await asyncio.Event().wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Until killed."""
    parser = argparse.ArgumentParser(description="Simulated agents of a whole fleet.")
    parser.add_argument("--port", type=int, required=True, help="the service's public listener")
    parser.add_argument("--mix", choices=MIXES, default="whole", help="kinds of nodes")
    parser.add_argument("--nodes", type=int, default=500, help="how many")
    parser.add_argument("--interval", type=float, default=10.0, help="seconds between two reports of a node")
    options = parser.parse_args(argv)
    uvloop.run(report_for_ever(options.port, options.mix, options.nodes, options.interval))
    return 0


if __name__ == "__main__":
    sys.exit(main())
