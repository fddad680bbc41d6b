"""A scheduling storm: thousands of nodes, tens of thousands of pods that arrive as fast as the API server takes them.

    python -m tests.bench.storm [--nodes 5000] [--pods 40000] [--mix whole] [--driver] [--minutes 15] [--json FILE]

The API server, etcd and `tangram serve` are real, agents are simulated. Pods are bound by the real kube-scheduler (tens
of pods a second at 5,000 nodes), or with `--driver` by what is shaped like it and does nothing but ask: one cycle after
the other of filter and prioritize with the names of the nodes that have room, binds beside them. Nothing plays kubelet,
so bound pods stay Pending.

At the end the API server's pods alone say whether all are bound, each placement is legal, and no device is given twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import uvloop
from prometheus_client.samples import Sample
from rich.console import Console

from app.driver import choose, go_json
from app.simulate import report_of
from tests.bench.agents import MIXES
from tests.bench.figures import Target, show_targets, spread, write
from tests.bench.fleet import Memory, blocked, control_plane, pid_of, samples, show_blocked
from tests.bench.machine import cpu_seconds, machine
from tests.e2e.checker import Checker
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, MIG, Stack, kubernetes_node

OUT = Path("out") / "bench" / "storm.json"
BINDS_AT_ONCE = 64
CREATORS = 8
WORDS = 3  # of refusals that are shown
SLICES = ("1g.10gb", "2g.20gb", "3g.40gb")
PATIENCE_SECONDS = 1.0  # before a pod that was refused, or whose bind failed, is tried again
LOOK_SECONDS = 0.5
MEMORY_TARGET_MIB, BLOCKED_TARGET_MS = 800.0, 20.0
QUICK_NODES, QUICK_PODS = 200, 1500

Json = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 where not all is as promised."""
    parser = argparse.ArgumentParser(description="A scheduling storm on a real API server.")
    parser.add_argument("--nodes", type=int, default=5000, help="nodes of 8 GPUs")
    parser.add_argument("--pods", type=int, default=40_000, help="pods that arrive")
    parser.add_argument("--mix", choices=MIXES, default="whole", help="kinds of nodes")
    parser.add_argument("--driver", action="store_true", help="play kube-scheduler, as fast as it goes")
    parser.add_argument("--minutes", type=float, default=13.0, help="end the storm after so long, finished or not")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_NODES} nodes and {QUICK_PODS} pods, with --driver"
    )
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--tell-blocked", type=float, default=0.0, metavar="SECONDS", help="log what blocks the loop")
    options = parser.parse_args(argv)
    if options.quick:
        options.nodes, options.pods, options.driver = QUICK_NODES, QUICK_PODS, True
    console = Console()
    found = measure(options, console)
    show_targets(targets(found), console)
    write(options.json, found, targets(found))
    return 0 if found["bound"] == found["pods"] and not found["faults"] else 1


def measure(options: argparse.Namespace, console: Console) -> Json:
    """One storm, and what the API server's pods say after it."""
    about = machine()
    pods = arrivals(options.mix, options.pods, seed=1)
    with control_plane(options.mix, options.nodes, tell_blocked_seconds=options.tell_blocked) as stack:
        stack.service.start()
        stack.service.wait_ready(120)
        stack.wait_reported(120)
        pid = pid_of(stack)
        before, cpu_before = blocked(samples(stack.service)), cpu_seconds(pid)
        console.print(f"{options.nodes} nodes are offered; {len(pods)} pods arrive")
        with Memory(pid) as memory:
            began = time.monotonic()
            until = began + 60 * options.minutes
            verbs = play(stack, pods, until=until) if options.driver else schedule(stack, pods, until=until)
            seconds = time.monotonic() - began
            after = samples(stack.service)
            cpu = cpu_seconds(pid) - cpu_before
        checker = Checker(stack.cluster, map(report_of, stack.nodes))
        there = checker.pods()
        faults = checker.faults(there)
        if options.tell_blocked:
            show_blocked(stack, console)
    bound = sum(1 for pod in there if pod["spec"].get("nodeName"))
    console.print(f"{bound} of {len(there)} pods bound in {seconds:.0f} s: {bound / seconds:.0f} a second")
    return {
        "what": "a scheduling storm",
        "machine": about,
        "mix": options.mix,
        "scheduler": "driver" if options.driver else "kube-scheduler",
        "nodes": options.nodes,
        "pods": len(pods),
        "bound": bound,
        "faults": faults[:20],
        "seconds": round(seconds, 1),
        "pods_per_second": round(bound / seconds, 1),
        "service_cpu_ms_a_pod": round(1000 * cpu / max(1, bound), 2),
        "memory_mib": {"peak": memory.peak},
        "memory_course": memory.thinned(),
        "blocked": blocked(after).since(before),
        "verbs": verbs or by_the_service(after),
    }


def arrivals(mix: str, count: int, *, seed: int) -> list[KubernetesObject]:
    """A GPU each, which fills 5,000 nodes with 40,000 pods to the last one; of boards in MIG mode a slice each."""
    rng = random.Random(seed)
    asks = [{GPU: 1} if mix == "whole" else {MIG + rng.choice(SLICES): 1} for _ in range(count)]
    return [gpu_pod(f"pod-{number:05d}", ask) for number, ask in enumerate(asks)]


def targets(found: Json) -> list[Target]:
    """What was promised."""
    own = found["blocked"]["own"]["longest_ms"]
    return [
        Target("storm_bound", "storm: pods bound", found["pods"], found["bound"], "", at_least=True),
        Target("storm_faults", "devices given twice or wrongly", 0, len(found["faults"]), ""),
        Target("storm_memory", "peak memory", MEMORY_TARGET_MIB, found["memory_mib"]["peak"]["service"], "MiB"),
        Target("storm_blocked", "event loop blocked by its own work", BLOCKED_TARGET_MS, own, "ms"),
    ]


# -- the real kube-scheduler ----------------------------------------------------------------------------------


def schedule(stack: Stack, pods: Sequence[KubernetesObject], *, until: float) -> Json:
    """Create all pods while kube-scheduler is at work; until the last one has a node, or the time is over.

    It does not say how long the verbs took; the service does.
    """
    stack.start_scheduler("first")
    creating = Thread(target=stack.cluster.add_pods, args=(pods,), daemon=True)
    creating.start()
    query = {"fieldSelector": "spec.nodeName=", "limit": "1"}
    headers = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}  # a look costs little
    path = "/api/v1/namespaces/default/pods"
    while time.monotonic() < until:
        created = not creating.is_alive()
        if not stack.cluster.request("GET", path, params=query, headers=headers)["items"] and created:
            break
        time.sleep(LOOK_SECONDS)
    stack.cluster.kill_scheduler()
    return {}


def by_the_service(found: Iterable[Sample]) -> Json:
    """How long each verb took, as the service counts it: upper bounds in milliseconds."""
    counts: dict[str, dict[float, float]] = {}
    for sample in found:
        if sample.name == "tangram_request_seconds_bucket":
            counts.setdefault(sample.labels["verb"], {})[float(sample.labels["le"])] = sample.value
    return {verb: {"count": of[math.inf], "p50": _at(of, 0.5), "p99": _at(of, 0.99)} for verb, of in counts.items()}


def _at(counts: Mapping[float, float], share: float) -> float:
    bound = next(bound for bound, count in sorted(counts.items()) if count >= share * counts[math.inf])
    return -1.0 if bound == math.inf else 1000 * bound


# -- what is shaped like it -----------------------------------------------------------------------------------


def play(stack: Stack, pods: Sequence[KubernetesObject], *, until: float) -> Json:
    """Create and bind all pods; how long the verbs took."""
    return uvloop.run(Player(stack, until=until).run(pods))


class Player:
    """Asks as kube-scheduler does, one cycle at a time, with binds under way beside it."""

    def __init__(self, stack: Stack, *, until: float) -> None:
        files = stack.certificates
        mutual = ssl.create_default_context(cafile=str(files / "ca.crt"))
        mutual.load_cert_chain(files / "client.crt", files / "client.key")
        connection, self._headers = stack.cluster.connection()
        connection.close()
        self._api = Calls(connection.host, connection.port, getattr(connection, "_context", None))
        self._extender = Calls("127.0.0.1", stack.service.extender_port, mutual)
        self._until = until
        self._room = Room([kubernetes_node(node) for node in stack.nodes])
        self._waiting: asyncio.Queue[KubernetesObject] = asyncio.Queue()
        self._free_binds = asyncio.Semaphore(BINDS_AT_ONCE)
        self._rng = random.Random(7)
        self._took: dict[str, list[int]] = {"filter": [], "prioritize": [], "bind": []}
        self._trouble: Counter[str] = Counter()
        self._left = 0
        self._done = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, pods: Sequence[KubernetesObject]) -> Json:
        """Until all are bound, or the time is over."""
        self._left = len(pods)
        self._begin(self._cycle_for_ever())
        for first in range(CREATORS):
            self._begin(self._create(pods[first::CREATORS]))
        try:
            async with asyncio.timeout(self._until - time.monotonic()):
                await self._done.wait()
        except TimeoutError:
            self._trouble["the time was over"] += 1
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._api.close()
        self._extender.close()
        figures = {verb: spread(took) for verb, took in self._took.items()}
        return {
            **{verb: {"count": of.count, "p50": of.p50, "p99": of.p99, "max": of.max} for verb, of in figures.items()},
            "trouble": dict(self._trouble.most_common(WORDS)),
        }

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._trouble[repr(task.exception())[:200]] += 1

    async def _create(self, pods: Iterable[KubernetesObject]) -> None:
        for pod in pods:
            body = json.dumps(pod).encode()
            made = json.loads(await self._api.post("/api/v1/namespaces/default/pods", body, self._headers))
            made["metadata"].pop("managedFields", None)
            self._waiting.put_nowait(made)

    async def _cycle_for_ever(self) -> None:
        while True:
            pod = await self._waiting.get()
            try:
                node = await self._node_for(pod)
            except (OSError, ValueError, EOFError) as error:
                self._try_later(pod, repr(error))
                continue
            if not node:
                self._try_later(pod, "no node")
                continue
            self._room.take(pod, node)
            await self._free_binds.acquire()
            self._begin(self._bind(pod, node))

    async def _node_for(self, pod: KubernetesObject) -> str:
        head = b'{"Pod":' + go_json(pod) + b',"Nodes":null,"NodeNames":['
        filtered = await self._ask("filter", head + self._room.names_for(pod) + b"]}")
        names = filtered.get("NodeNames") or []
        if len(names) < 2:
            return names[0] if names else ""
        ranked = await self._ask("prioritize", head + json.dumps(names, separators=(",", ":")).encode()[1:-1] + b"]}")
        return choose(names, {each["Host"]: each["Score"] for each in ranked}, self._rng)

    async def _bind(self, pod: KubernetesObject, node: str) -> None:
        meta = pod["metadata"]
        body = {"PodName": meta["name"], "PodNamespace": "default", "PodUID": meta["uid"], "Node": node}
        try:
            refused = (await self._ask("bind", go_json(body))).get("Error")
        except (OSError, ValueError, EOFError) as error:
            refused = repr(error)
        finally:
            self._free_binds.release()
        if refused:
            self._room.give_back(pod, node)
            self._try_later(pod, refused)
            return
        self._left -= 1
        if not self._left:
            self._done.set()

    async def _ask(self, verb: str, body: bytes) -> Any:
        began = time.perf_counter_ns()
        said = await self._extender.post(f"/{verb}", body)
        self._took[verb].append(time.perf_counter_ns() - began)
        return json.loads(said)

    def _try_later(self, pod: KubernetesObject, why: str) -> None:
        self._trouble[why[:80]] += 1
        asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._waiting.put_nowait, pod)


class Room:
    """What kube-scheduler's own check leaves over: the nodes with enough of the one resource that a pod asks for."""

    def __init__(self, nodes: Sequence[KubernetesObject]) -> None:
        self._free = {node["metadata"]["name"]: dict(node["status"]["allocatable"]) for node in nodes}
        self._names: dict[str, dict[str, bytes]] = {}
        self._joined: dict[str, bytes] = {}

    def names_for(self, pod: KubernetesObject) -> bytes:
        """Their names as JSON, without the brackets."""
        resource = _resource(pod)
        if resource not in self._names:
            quoted = {name: f'"{name}"'.encode() for name, free in self._free.items() if int(free.get(resource, 0))}
            self._names[resource] = quoted
        if resource not in self._joined:
            self._joined[resource] = b",".join(self._names[resource].values())
        return self._joined[resource]

    def take(self, pod: KubernetesObject, node: str) -> None:
        """The pod goes there."""
        self._change(_resource(pod), node, -1)

    def give_back(self, pod: KubernetesObject, node: str) -> None:
        """It does not after all."""
        self._change(_resource(pod), node, 1)

    def _change(self, resource: str, node: str, number: int) -> None:
        left = int(self._free[node][resource]) + number
        self._free[node][resource] = str(left)
        names = self._names[resource]
        if (left > 0) != (node in names):
            if left > 0:
                names[node] = f'"{node}"'.encode()
            else:
                del names[node]
            self._joined.pop(resource, None)


def _resource(pod: KubernetesObject) -> str:
    (resource,) = pod["spec"]["containers"][0]["resources"]["limits"]
    return str(resource)


class Calls:
    """POST over kept connections; one request in flight on each, as many as are wanted."""

    def __init__(self, host: str, port: int | None, context: ssl.SSLContext | None) -> None:
        self._address = host, port, context
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> bytes:
        """The body of the reply. Raises ValueError with it where it is a refusal."""
        host, port, context = self._address
        reader, writer = (
            self._idle.pop() if self._idle else await asyncio.open_connection(host, port, ssl=context, limit=1 << 20)
        )
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{more}"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            status, said = await _reply(reader)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        if status >= 300:
            raise ValueError(f"{path}: {status} {said[:200].decode(errors='replace')}")
        return said

    def close(self) -> None:
        """Close what is idle."""
        for _, writer in self._idle:
            writer.close()


async def _reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status, length = int(head[9:12]), head.partition("content-length:")[2]
    if length:
        return status, await reader.readexactly(int(length.split("\r\n", 1)[0]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):  # in chunks, as Go sends what is longer than 2 kB
        body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
    return status, body


if __name__ == "__main__":
    sys.exit(main())
