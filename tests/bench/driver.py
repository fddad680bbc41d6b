"""Everything else that happens on a full cluster while kube-scheduler asks: agents report, pods are bound and end.

    python -m tests.bench.driver --port PORT --inventory FILE --reports 500 --changes 100 --pods 60 [--seconds 30]

Open-loop, at stated rates: each event has its time, whatever became of the one before, so that a slow service is
not spared. Reports that say nothing new go round all nodes; changes are full reports (every tenth of them a GPU
that fails or recovers, so that its node's state changes; the others its free memory, as a pod's start shows);
a pod is a filter for one node, a bind there, and the end of the oldest one. It runs until it is ended (SIGTERM) and
then prints what it did as JSON. A process of its own: it must not take the measuring client's turn.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop

from app.driver import CallFailed, Connections, args_body, binding_body, pod_object
from tests.bench.world import ASKS, HELD, new_pod

MOST_AT_ONCE = 256
"""Events that may wait for their answers; beyond it one is dropped and counted: the service is overrun."""

CHANGING_NODES = 500
"""So many nodes send the changes; the others' reports need not be kept."""

SLICES = "nvidia.com/mig-"

STATE_CHANGES = 10
"""Every so manyth change is one of the node's state."""


@dataclass(slots=True)
class Done:
    """What was done; the worst lateness is this process's own, in starting an event."""

    reports: int = 0
    changes: int = 0
    bound: int = 0
    refused: int = 0
    ended: int = 0
    failed: int = 0
    dropped: int = 0
    seconds: float = 0.0
    latest_ms: float = 0.0
    faults: list[str] = field(default_factory=list)


class Load:
    """The events, and what must be remembered between them."""

    def __init__(self, port: int, reports: Sequence[dict[str, Any]], *, seed: int = 3, most_pods: int = 200) -> None:
        self.done = Done()
        self._rng = random.Random(seed)
        self._lines = Connections("127.0.0.1", port)
        self._beats = {said["node"]: _beat(said) for said in reports}
        self._names = list(self._beats)
        self._asks = {said["node"]: asks_for(said) for said in reports}
        self._turn = 0
        self._changing = list(reports[:CHANGING_NODES])
        self._pods: deque[str] = deque()
        self._most_pods = most_pods

    async def report(self) -> None:
        """One agent has nothing new."""
        self._turn = (self._turn + 1) % len(self._names)
        answer = await self._lines.post("/v1/reports", self._beats[self._names[self._turn]])
        if orjson.loads(answer)["resend"]:
            raise CallFailed(f"the service does not hold what {self._names[self._turn]} has reported")
        self.done.reports += 1

    async def change(self) -> None:
        """One agent has something new."""
        said = self._changing[self.done.changes % len(self._changing)]
        said["version"] += 1
        gpu = self._rng.choice(said["gpus"])
        if self.done.changes % STATE_CHANGES:
            gpu["free_mib"] = 256 * self._rng.randint(0, gpu["memory_mib"] // 256)
        else:
            gpu["health"], gpu["health_reason"] = ("ok", "") if gpu["health"] == "bad" else ("bad", "XID 79")
        self.done.changes += 1
        self._beats[said["node"]] = _beat(said)
        await self._lines.post("/v1/reports", orjson.dumps(said))

    async def pod(self) -> None:
        """One pod is bound, and the oldest ends."""
        node = self._rng.choice(self._names)
        pod = new_pod(self._rng, self._rng.choice(self._asks[node]))
        filtered = orjson.loads(await self._lines.post("/filter", args_body(pod_object(pod), [node])))
        if (
            filtered["NodeNames"]
            and not orjson.loads(await self._lines.post("/bind", binding_body(pod, node)))["Error"]
        ):
            self.done.bound += 1
            self._pods.append(pod.uid)
        else:
            self.done.refused += 1
            await self._end(pod.uid)
        if len(self._pods) > self._most_pods:
            await self._end(self._pods.popleft())
            self.done.ended += 1

    async def _end(self, uid: str) -> None:
        """app.driver's connections only post."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._lines.port)
        writer.write(
            f"DELETE /v1/pods/{uid} HTTP/1.1\r\nHost: {self._lines.name}\r\nConnection: close\r\n\r\n".encode()
        )
        await reader.read()
        writer.close()

    async def every(self, rate: float, act: Callable[[], Awaitable[None]]) -> None:
        """Do it so often a second, each time when it is due."""
        clock = asyncio.get_running_loop().time
        began, number, flying = clock(), 0, set[asyncio.Task[None]]()
        while True:
            due = began + number / rate
            await asyncio.sleep(max(0.0, due - clock()))
            self.done.latest_ms = max(self.done.latest_ms, 1000 * (clock() - due))
            number += 1
            if len(flying) >= MOST_AT_ONCE:
                self.done.dropped += 1
                continue
            task = asyncio.create_task(self._counted(act))
            flying.add(task)
            task.add_done_callback(flying.discard)

    async def _counted(self, act: Callable[[], Awaitable[None]]) -> None:
        try:
            await act()
        except (CallFailed, OSError, ValueError, KeyError) as fault:
            self.done.failed += 1
            if len(self.done.faults) < 5:
                self.done.faults.append(str(fault))


def asks_for(said: dict[str, Any]) -> list[str]:
    """What of HELD can run on the node at all: slices on GPUs in MIG mode, the rest on others."""
    modes = {gpu["mig"] is not None for gpu in said["gpus"]}
    return [ask for ask in HELD if (ASKS[ask][0].startswith(SLICES)) in modes]


def _beat(said: dict[str, Any]) -> bytes:
    return orjson.dumps({"node": said["node"], "boot": said["boot"], "version": said["version"]})


async def _run(options: argparse.Namespace) -> None:
    load = Load(options.port, orjson.loads(options.inventory.read_bytes()))
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    began = loop.time()
    rates = ((options.reports, load.report), (options.changes, load.change), (options.pods, load.pod))
    lines = [asyncio.create_task(load.every(rate, act)) for rate, act in rates if rate > 0]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(options.seconds):
            await ended.wait()
    for line in lines:
        line.cancel()
    await asyncio.gather(*lines, return_exceptions=True)
    load.done.seconds = round(loop.time() - began, 3)
    print(json.dumps(asdict(load.done)), flush=True)


def main() -> None:
    """Drive until a signal, or until the seconds are over."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.driver", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--inventory", type=Path, required=True)
    parser.add_argument("--reports", type=float, default=500, help="reports a second that say nothing new")
    parser.add_argument("--changes", type=float, default=100, help="full reports a second")
    parser.add_argument("--pods", type=float, default=60, help="pods a second that are bound, and that end")
    parser.add_argument("--seconds", type=float, default=600, help="no longer than this")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
