"""A control plane with thousands of nodes, a service that is looked at while it works, and pods that are there already.

Shared by `storm` and `cold_start`. Agents are simulated over plain HTTP (`agents`), and neither KWOK nor controllers
run once the nodes are there: 5,000 nodes' leases alone would take the machine. So pods that are bound stay Pending.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from rich.console import Console

from app.translate import write_placement
from solver import Device, Node, Slice
from tests.bench.agents import fleet
from tests.e2e.cluster import ControlPlane
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, MIG, PLACEMENT, REPOSITORY, Knobs, Service, Stack

Json = dict[str, Any]

INTERVAL_SECONDS = 10.0
IN_ONE_WRITE = 100  # of pods to etcd; it takes 128 at most
LOOK_SECONDS = 0.25
KEPT_LOOKS = 60

KNOBS = Knobs(stale_seconds=60.0, orphan_seconds=20.0, unauthenticated_agents=True)


@contextmanager
def control_plane(mix: str, nodes: int, *, tell_blocked_seconds: float = 0.0) -> Iterator[Stack]:
    """The nodes on a real API server; agents knock already, and the service is to be started."""
    options = {"blind-seconds": "0"}  # as if agents saw which pods use GPUs, as real ones do
    if tell_blocked_seconds:
        options["tell-blocked-seconds"] = str(tell_blocked_seconds)
    knobs = Knobs(
        stale_seconds=KNOBS.stale_seconds,
        orphan_seconds=KNOBS.orphan_seconds,
        unauthenticated_agents=True,
        options=options,
    )
    with Stack(
        fleet(mix, nodes), knobs=knobs, agents=lambda stack, _: Reporters(stack, mix), form=None, service=False
    ) as stack:
        for name in ("kwok", "kube-controller-manager"):
            stack.cluster.processes.kill(name)
        yield stack


class Reporters:
    """The simulated agents, as a process of the stack."""

    NAME = "agents"

    def __init__(self, stack: Stack, mix: str) -> None:
        self._processes = stack.cluster.processes
        port = stack.service.port_for_agents
        self._command = [sys.executable, "-m", "tests.bench.agents", f"--port={port}", f"--mix={mix}"]
        self._command += [f"--nodes={len(stack.nodes)}", f"--interval={INTERVAL_SECONDS:g}"]

    def start(self) -> None:
        """Begin to report."""
        self._processes.start(self.NAME, self._command, environment={"PYTHONPATH": str(REPOSITORY)})

    def stop(self) -> None:
        """End for good."""
        self._processes.kill(self.NAME)

    def freeze(self, node: str) -> None:
        """No single node can fall silent here."""
        raise NotImplementedError(node)

    def thaw(self, node: str) -> None:
        """See `freeze`."""
        raise NotImplementedError(node)

    def use(self, node: str, gpu: str, pod_uids: Sequence[str]) -> None:
        """What these agents say does not change."""
        raise NotImplementedError(node)


# -- pods that are there already ------------------------------------------------------------------------------


def held_pods(cluster: ControlPlane, nodes: Sequence[Node], count: int) -> list[KubernetesObject]:
    """So many pods with placements, some on each node, as the API server has them: it makes the first of a kind itself.

    A GPU each on boards as a whole, a slice each of the smallest profile on boards in MIG mode.
    """
    like: dict[str, KubernetesObject] = {}
    return [_held(cluster, like, number, *place) for number, place in enumerate(islice(_places(nodes), count))]


def _places(nodes: Sequence[Node]) -> Iterator[tuple[str, Device]]:
    """Devices on one node after the other, round by round: no two overlap."""
    for number in range(max(64, *(len(node.gpus) for node in nodes))):
        for node in nodes:
            gpu = node.gpus[number % len(node.gpus)]
            turn = number // len(node.gpus)
            if gpu.geometry is None:
                if not turn:
                    yield node.name, Device(gpu.uuid)
                continue
            profile = min(gpu.geometry.profiles, key=lambda each: (each.size, each.name))
            if turn < len(profile.starts):
                yield node.name, Device(gpu.uuid, Slice(profile.name, profile.starts[turn]))


def _held(
    cluster: ControlPlane, like: dict[str, KubernetesObject], number: int, node: str, device: Device
) -> KubernetesObject:
    resource = GPU if device.slice is None else MIG + device.slice.profile
    if resource not in like:
        name = f"first-{len(like)}"
        cluster.request("POST", "/api/v1/namespaces/default/pods", gpu_pod(name, {resource: 1}))
        like[resource] = cluster.pod(name)
        cluster.delete_pod(name, grace_seconds=0)
    pod = copy.deepcopy(like[resource])
    uid = str(uuid.UUID(int=number + 1))
    pod["metadata"] |= {"name": f"held-{number:05d}", "uid": uid}
    pod["metadata"].pop("resourceVersion", None)
    pod["metadata"]["annotations"] = {PLACEMENT: write_placement(uid, node, [device])}
    pod["spec"]["nodeName"] = node
    pod["status"]["phase"] = "Running"
    return pod


def write_to_etcd(cluster: ControlPlane, pods: Sequence[KubernetesObject]) -> None:
    """Put the pods where the API server keeps them, many at once: creating and annotating each would take minutes."""
    with httpx.Client(base_url=cluster._etcd_url, trust_env=False, timeout=30) as client:
        for first in range(0, len(pods), IN_ONE_WRITE):
            puts = [{"requestPut": _put(pod)} for pod in pods[first : first + IN_ONE_WRITE]]
            client.post("/v3/kv/txn", json={"success": puts}).raise_for_status()


def _put(pod: KubernetesObject) -> Json:
    key = f"/registry/pods/{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    value = json.dumps({"apiVersion": "v1", "kind": "Pod", **pod})
    return {"key": base64.b64encode(key.encode()).decode(), "value": base64.b64encode(value.encode()).decode()}


# -- the service, looked at -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Blocked:
    """How often the event loop was blocked how long, by upper bounds in seconds, and the longest.

    `wall` is what others waited, `own` what of it was the service's own work.
    """

    counts: dict[str, dict[str, float]]
    longest_ms: dict[str, float]

    def since(self, before: Blocked) -> Json:
        """What was since then, for people and JSON; the longest is that since `before` was read."""
        return {
            clock: {
                "longest_ms": round(self.longest_ms[clock], 1),
                "looks": int(counts["+Inf"] - before.counts[clock]["+Inf"]),
                "longer_than_ms": {
                    f"{1000 * float(bound):g}": int(
                        counts["+Inf"] - count - before.counts[clock]["+Inf"] + before.counts[clock][bound]
                    )
                    for bound, count in counts.items()
                    if bound != "+Inf"
                },
            }
            for clock, counts in self.counts.items()
        }


def samples(service: Service) -> list[Sample]:
    """What /metrics says."""
    text = httpx.get(f"{service.url}/metrics", timeout=10, trust_env=False).text
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def blocked(found: Sequence[Sample]) -> Blocked:
    """The loop's part of it. Who reads the metrics sets the longest back."""
    counts: dict[str, dict[str, float]] = {"wall": {}, "own": {}}
    longest = {}
    for sample in found:
        clock = sample.labels.get("clock", "")
        if sample.name == "tangram_loop_blocked_seconds_bucket":
            counts[clock][sample.labels["le"]] = sample.value
        elif sample.name == "tangram_loop_blocked_longest_seconds" and sample.labels["since"] == "scrape":
            longest[clock] = 1000 * sample.value
    return Blocked(counts, longest)


@dataclass(slots=True)
class Memory:
    """Resident memory of the service and of its planning process, in MiB: its course and its peak."""

    pid: int
    course: list[Json] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=lambda: {"service": 0.0, "planning": 0.0})
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._run, daemon=True, name="memory")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def now(self) -> dict[str, float]:
        """Of both, at this moment; 0 where the process is not there."""
        return {"service": _resident_mib(self.pid), "planning": sum(map(_resident_mib, _children(self.pid)))}

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(LOOK_SECONDS):
            now = self.now()
            self.peak = {name: round(max(self.peak[name], mib), 1) for name, mib in now.items()}
            self.course.append({"seconds": round(time.monotonic() - began, 1), **{k: round(v) for k, v in now.items()}})

    def thinned(self) -> list[Json]:
        """The course with few enough points to read."""
        return self.course[:: max(1, len(self.course) // KEPT_LOOKS)]


def _resident_mib(pid: int) -> float:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
    return 0.0


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def pid_of(stack: Stack) -> int:
    """The service's process."""
    pid: int = stack.cluster.processes.pid(stack.service.name)
    return pid


def show_blocked(stack: Stack, console: Console) -> None:
    """What the service has logged of what blocked its loop."""
    lines = [line for line in stack.cluster.logs(stack.service.name).splitlines() if "loop was blocked" in line]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
