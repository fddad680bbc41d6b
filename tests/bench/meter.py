"""Looks at a control plane while kube-scheduler works, at next to no cost: pods as they get nodes, processor time by
process, requests by kind. No decisions, no tables.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.machine import cpu_seconds
from tests.e2e.cluster import Cluster

PODS = "/api/v1/namespaces/default/pods"
WITH_NODE = f"{PODS}?fieldSelector=spec.nodeName%21%3D"
WITHOUT_NODE = f"{PODS}?watch=1&timeoutSeconds=1800&fieldSelector=spec.nodeName%3D&resourceVersion="
NAMES_ONLY = "application/json;as=PartialObjectMetadata{};g=meta.k8s.io;v=v1"
GONE = b'"type":"DELETED"'
READ_BYTES = 1 << 16
RETRY_SECONDS = 0.1

REQUESTS = "apiserver_request_total"
LABEL = re.compile(r'(verb|resource|subresource)="([^"]*)"')
THIS = "this bench"


class Bound:
    """Counts pods that have got a node, from a watch of those that have none: polling would cost more the longer it
    takes, and is late. Used in a `with` that is entered before there are any pods.
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._connection, self._headers = cluster.connection()
        self._thread = threading.Thread(target=self._run, daemon=True, name="bound pods")
        self._changed = threading.Condition()
        self._closing = False
        self._wanted = 0
        self._times: list[float] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        if self._connection.sock is not None:
            with contextlib.suppress(OSError):
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._connection.close()

    def wait(self, count: int, timeout: float) -> list[float]:
        """When (by time.monotonic) each pod was seen to have a node: all `count`, or those until the timeout."""
        with self._changed:
            self._wanted = count
            self._changed.wait_for(lambda: len(self._times) >= count, timeout)
            return self._times[:count]

    def _run(self) -> None:
        """List and watch, and again where the watch ends: the API server ends those that read too slowly."""
        while not self._closing:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._follow(self._list())
            self._connection.close()
            time.sleep(RETRY_SECONDS)

    def _list(self) -> str:
        listed = json.loads(self._get(WITH_NODE, "List").read())
        self._note(len(listed["items"] or ()) - len(self._times))
        return str(listed["metadata"]["resourceVersion"])

    def _follow(self, version: str) -> None:
        reply = self._get(WITHOUT_NODE + version, "")
        if self._connection.sock is not None:
            self._connection.sock.settimeout(None)
        rest = b""
        while data := reply.read1(READ_BYTES):
            rest += data
            self._note(rest.count(GONE))
            rest = rest[-len(GONE) + 1 :]

    def _get(self, path: str, kind: str) -> http.client.HTTPResponse:
        self._connection.request("GET", path, headers={**self._headers, "Accept": NAMES_ONLY.format(kind)})
        return self._connection.getresponse()

    def _note(self, more: int) -> None:
        with self._changed:
            self._times += [time.monotonic()] * more
            if self._wanted and len(self._times) >= self._wanted:
                self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Reading:
    """Processor time of each process so far, and requests that the API server has answered so far."""

    at: float
    cpu_seconds: Mapping[str, float]
    requests: Mapping[str, float]

    def cpu_ms_since(self, before: Reading, per: float) -> dict[str, float]:
        """Milliseconds by process, of each of `per` things; those that hardly ran are left out."""
        used = {name: 1000 * (now - before.cpu_seconds.get(name, 0.0)) for name, now in self.cpu_seconds.items()}
        return {name: round(ms / per, 3) for name, ms in used.items() if ms > 10.0}

    def requests_since(self, before: Reading, per: float) -> dict[str, float]:
        """Requests to the API server by verb and resource, for each of `per` things; rare ones are left out."""
        made = {kind: (now - before.requests.get(kind, 0.0)) / per for kind, now in self.requests.items()}
        return {kind: round(count, 3) for kind, count in sorted(made.items()) if count > 0.02}


def read(cluster: Cluster, *, with_requests: bool = True) -> Reading:
    """Look. The API server's own counts cost it some milliseconds, so ask for them outside the clock."""
    requests = _requests(cluster) if with_requests else {}
    return Reading(time.monotonic(), _cpu_by_process(cluster), requests)


def _requests(cluster: Cluster) -> dict[str, float]:
    counted: dict[str, float] = defaultdict(float)
    for line in cluster.text("/metrics").splitlines():
        if line.startswith(REQUESTS + "{"):
            labels = dict(LABEL.findall(line))
            what = "/".join(filter(None, (labels.get("resource"), labels.get("subresource"))))
            counted[f"{labels.get('verb')} {what}"] += float(line.rsplit(" ", 1)[1])
    return dict(counted)


def _cpu_by_process(cluster: Cluster) -> dict[str, float]:
    """Each process of the control plane and of ours; a child's time is its own ("tangram's planner")."""
    processes = cluster.processes
    names = {processes.pid(name): name for name in processes.names() if processes.is_running(name)}
    found = {THIS: cpu_seconds(os.getpid())}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pid = int(entry.name)
            if pid in names:
                found[names[pid]] = cpu_seconds(pid)
            elif (parent := _parent(entry)) in names:
                found[f"{names[parent]}'s planner"] = cpu_seconds(pid)
    return found


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])
