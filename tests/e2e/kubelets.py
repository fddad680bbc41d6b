"""Plays what kubelets and containers do to GPUs: a pod that is bound and runs has a process on each of its devices.

KWOK gives pods their phases but runs nothing. Here each running pod's processes are put into the fake NVML (by place,
as a container that has the device would be) and their cgroups say whose they are, so an instance under a running
pod cannot be destroyed, and agents see pods as they do on a real node. When a pod ends its processes end a moment
later.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import httpx

from tests.e2e.checker import Piece, client_of, is_live, read_annotation
from tests.e2e.cluster import Cluster
from tests.e2e.nodes import KubernetesObject
from tests.fake_nvml.control import Control
from tests.fake_nvml.fleet import Fleet

LOOK_SECONDS = 0.2
LONGEST_END_SECONDS = 1.0


class Kubelets:
    """One thread for all nodes."""

    def __init__(self, cluster: Cluster, fleet: Fleet, nodes: Mapping[str, Control], *, seed: int) -> None:
        self._cluster = cluster
        self._fleet = fleet
        self._nodes = nodes
        self._rng = random.Random(seed)
        self._pids = itertools.count(10_000)
        self._running: dict[str, tuple[str, list[int]]] = {}
        self._ending: dict[str, float] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="kubelets")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        with client_of(self._cluster) as client:
            while not self._stopping.wait(LOOK_SECONDS):
                with contextlib.suppress(httpx.HTTPError):
                    self._look(client)

    def _look(self, client: httpx.Client) -> None:
        reply = client.get("/api/v1/pods")
        reply.raise_for_status()
        pods = {pod["metadata"]["uid"]: pod for pod in reply.json()["items"]}
        for uid, pod in pods.items():
            if uid not in self._running and _runs(pod):
                self._begin(uid, pod)
        now = time.monotonic()
        for uid in list(self._running):
            if uid in pods and is_live(pods[uid]):
                continue
            end = self._ending.setdefault(uid, now + LONGEST_END_SECONDS * self._rng.random())
            if now >= end:
                self._end(uid)

    def _begin(self, uid: str, pod: KubernetesObject) -> None:
        given = read_annotation(pod)
        if given is None or given.node not in self._nodes:
            return
        pids = []
        for piece in given.pieces:
            pid = next(self._pids)
            self._fleet.add_process(given.node, pid, uid)
            _start(self._nodes[given.node], pid, piece)
            pids.append(pid)
        self._running[uid] = given.node, pids

    def _end(self, uid: str) -> None:
        node, pids = self._running.pop(uid)
        del self._ending[uid]
        for pid in pids:
            self._nodes[node].clear_process(pid)


def _start(control: Control, pid: int, piece: Piece) -> None:
    if piece.profile:
        control.process(pid, gpu=piece.gpu, profile=piece.profile, start=piece.start)
    else:
        control.process(pid, gpu=piece.gpu)


def _runs(pod: KubernetesObject) -> bool:
    return bool(pod["status"].get("phase") == "Running" and pod["spec"].get("nodeName"))
