"""Plays kube-scheduler against an extender: its bytes, its order of calls, its queue. For the demo and load tests.

Follows kube-scheduler 1.37.1 as recorded in tests/data/extender (a test compares byte for byte) and as read in
its source (pkg/scheduler/extender.go, schedule_one.go, backend/queue). Its in-tree plugins are played by "every
node passes, every node scores zero". Knows nothing of GPUs.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]

WEIGHT = 1
SCORE_SCALE = 10  # 100/10: MaxNodeScore over MaxExtenderPriority
FIRST_BACKOFF_SECONDS = 1.0
LONGEST_BACKOFF_SECONDS = 10.0
ANSWER_SECONDS = 15.0  # httpTimeout of the shipped configuration

_GO_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_GO_TABLE = str.maketrans(_GO_ESCAPES)


# ------------------------------------------------------------------------------------------------------ the bytes


@dataclass(frozen=True, slots=True)
class PodSpec:
    """What a test or a demo varies of a pod; the API server's defaults make up the rest."""

    name: str
    uid: str
    resources: tuple[tuple[str, int], ...]
    namespace: str = "default"
    created: str = "2026-11-21T05:00:00Z"
    resource_version: int = 1
    token: str = "xxxxx"  # noqa: S105  the random end of the projected volume's name, nothing secret
    image: str = "registry.test/workload:1"
    grace_seconds: int = 30
    node_selector: tuple[tuple[str, str], ...] = ()
    condition: Json | None = None


def pod_object(pod: PodSpec) -> Json:
    """The v1.Pod as kube-scheduler's informer has it: defaulted, in Go's field order, without managedFields."""
    volume = f"kube-api-access-{pod.token}"
    counts = {name: str(count) for name, count in sorted(pod.resources)}
    never = {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    spec: Json = {
        "volumes": [{"name": volume, "projected": {"sources": _token_sources(), "defaultMode": 420}}],
        "containers": [
            {
                "name": "main",
                "image": pod.image,
                "resources": {"limits": counts, "requests": counts},
                "volumeMounts": [
                    {
                        "name": volume,
                        "readOnly": True,
                        "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount",
                    }
                ],
                "terminationMessagePath": "/dev/termination-log",
                "terminationMessagePolicy": "File",
                "imagePullPolicy": "IfNotPresent",
            }
        ],
        "restartPolicy": "Always",
        "terminationGracePeriodSeconds": pod.grace_seconds,
        "dnsPolicy": "ClusterFirst",
        **({"nodeSelector": dict(pod.node_selector)} if pod.node_selector else {}),
        "serviceAccountName": "default",
        "serviceAccount": "default",
        "securityContext": {},
        "schedulerName": "default-scheduler",
        "tolerations": [
            {"key": "node.kubernetes.io/not-ready", **never},
            {"key": "node.kubernetes.io/unreachable", **never},
        ],
        "priority": 0,
        "enableServiceLinks": True,
        "preemptionPolicy": "PreemptLowerPriority",
    }
    return {
        "metadata": {
            "name": pod.name,
            "namespace": pod.namespace,
            "uid": pod.uid,
            "resourceVersion": str(pod.resource_version),
            "generation": 1,
            "creationTimestamp": pod.created,
        },
        "spec": spec,
        "status": {
            "phase": "Pending",
            **({"conditions": [pod.condition]} if pod.condition else {}),
            "qosClass": "BestEffort",
        },
    }


def _token_sources() -> list[Json]:
    return [
        {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {
            "downwardAPI": {
                "items": [
                    {
                        "path": "namespace",
                        "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"},
                    }
                ]
            }
        },
    ]


def refused_condition(message: str, now: str) -> Json:
    """The pod condition that kube-scheduler writes after a cycle without a node; the next cycle sends it along."""
    return {
        "type": "PodScheduled",
        "observedGeneration": 1,
        "status": "False",
        "lastProbeTime": None,
        "lastTransitionTime": now,
        "reason": "Unschedulable",
        "message": message,
    }


def go_json(value: object) -> bytes:
    """JSON as Go's encoding/json writes it: compact, UTF-8, with <, > and & escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.translate(_GO_TABLE).encode()


def args_body(pod: Json, names: Sequence[str]) -> bytes:
    """ExtenderArgs of a nodeCacheCapable extender: the body of filter and of prioritize."""
    return go_json({"Pod": pod, "Nodes": None, "NodeNames": list(names)})


def binding_body(pod: PodSpec, node: str) -> bytes:
    """ExtenderBindingArgs."""
    return go_json(
        {"PodName": pod.name, "PodNamespace": pod.namespace, "PodUID": pod.uid, "Node": node},
    )


def request_bytes(host: str, path: str, body: bytes) -> bytes:
    """The whole HTTP request as Go's client puts it on the wire."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: Go-http-client/1.1\r\n"
        f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
    )
    return head.encode() + body


# ---------------------------------------------------------------------------------------------------- the calls


class CallFailed(Exception):
    """An extender call that kube-scheduler would count as an error; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """What filter said: the nodes that are left, and why others are not."""

    nodes: tuple[str, ...]
    failed: Mapping[str, str]


@dataclass(slots=True)
class Connections:
    """Keep-alive connections to one address, the last used first, as Go's transport keeps them."""

    host: str
    port: int
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The Host header."""
        return f"{self.host}:{self.port}"

    async def post(self, path: str, body: bytes) -> bytes:
        """Send one request and return the body of a 200; anything else fails as it does in kube-scheduler."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):  # wait_for may lose a cancellation before Python 3.12
                return await self._post(path, body)
        except (OSError, EOFError, TimeoutError, ValueError) as problem:
            raise CallFailed(f"{path}: {problem or type(problem).__name__}") from problem

    async def _post(self, path: str, body: bytes) -> bytes:
        reader, writer = self.idle.pop() if self.idle else await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(request_bytes(self.name, path, body))
            await writer.drain()
            status, keep, answer = await _read_response(reader)
        except BaseException:
            writer.close()
            raise
        if keep:
            self.idle.append((reader, writer))
        else:
            writer.close()
        if status != 200:
            raise CallFailed(f"{path}: the extender answered {status}, only 200 counts")
        return answer

    async def close(self) -> None:
        """Close what is idle."""
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


async def _read_response(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    status = int(head[0].split(" ", 2)[1])
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    if "content-length" not in headers:
        raise ValueError("an answer without Content-Length")
    body = await reader.readexactly(int(headers["content-length"]))
    return status, headers.get("connection", "").lower() != "close", body


class Extender:
    """The three verbs of an extender, each timed."""

    def __init__(self, host: str, port: int, *, prefix: str = "") -> None:
        self._connections = Connections(host, port)
        self._prefix = prefix
        self.seconds: dict[str, list[float]] = {"filter": [], "prioritize": [], "bind": []}

    async def _call(self, verb: str, body: bytes) -> Any:
        clock = asyncio.get_running_loop().time
        began = clock()
        answer = await self._connections.post(f"{self._prefix}/{verb}", body)
        self.seconds[verb].append(clock() - began)
        try:
            return json.loads(answer)
        except ValueError as problem:
            raise CallFailed(f"{verb}: not JSON: {problem}") from problem

    async def filter(self, pod: PodSpec, names: Sequence[str]) -> Filtered:
        """Ask which of these nodes fit."""
        answer = await self._call("filter", args_body(pod_object(pod), names))
        if answer.get("Error"):
            raise CallFailed(f"filter: {answer['Error']}")
        nodes = tuple(answer.get("NodeNames") or ())
        strangers = set(nodes) - set(names)
        if strangers:
            raise CallFailed(f"filter: answered with a node that was not asked about: {min(strangers)}")
        return Filtered(
            nodes, {**(answer.get("FailedNodes") or {}), **(answer.get("FailedAndUnresolvableNodes") or {})}
        )

    async def prioritize(self, pod: PodSpec, names: Sequence[str]) -> dict[str, int]:
        """Ask for scores; an error counts as no scores, as in kube-scheduler."""
        try:
            answer = await self._call("prioritize", args_body(pod_object(pod), names)) or []
            return {entry["Host"]: _int64(entry["Score"]) for entry in answer}
        except (CallFailed, KeyError, TypeError):
            return {}

    async def bind(self, pod: PodSpec, node: str) -> None:
        """Hand over the bind."""
        answer = await self._call("bind", binding_body(pod, node))
        if answer.get("Error"):
            raise CallFailed(f"bind: {answer['Error']}")

    async def close(self) -> None:
        """Close the connections."""
        await self._connections.close()


def _int64(value: object) -> int:
    """Go decodes 5.0 and "5" into an int64 with an error, so these fail here too."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"a score must be a whole number, not {value!r}")
    return value


def choose(names: Sequence[str], scores: Mapping[str, int], rng: random.Random) -> str:
    """The best total; nodes that the extender scored win ties against others, ties among them are random."""
    totals = {name: scores.get(name, 0) * WEIGHT * SCORE_SCALE for name in names}
    best = max(totals.values())
    tied = [name for name in names if totals[name] == best]
    return rng.choice([name for name in tied if name in scores] or tied)


async def find_node(extender: Extender, pod: PodSpec, names: Sequence[str], rng: random.Random) -> str | Filtered:
    """One scheduling cycle up to the chosen node; the filter's answer where none is left."""
    filtered = await extender.filter(pod, names)
    if not filtered.nodes:
        return filtered
    if len(filtered.nodes) == 1:
        return filtered.nodes[0]  # prioritize is not called
    scores = await extender.prioritize(pod, filtered.nodes)
    return choose(filtered.nodes, scores, rng)


def fit_error(failed: Mapping[str, str], nodes: int) -> str:
    """kube-scheduler's summary of a cycle without a node: reasons with their counts, as text-sorted."""
    reasons = sorted(f"{count} {reason}" for reason, count in Counter(failed.values()).items())
    return f"0/{nodes} nodes are available: {', '.join(reasons)}."


# ---------------------------------------------------------------------------------------------------- the queue


class Queue:
    """Pods to try: active in order of arrival, backing off, or refused and asleep until something is deleted.

    `now` is an argument and may be simulated; nothing here waits.
    """

    def __init__(self) -> None:
        self._active: list[tuple[float, int, str]] = []
        self._backoff: list[tuple[float, str]] = []
        self._asleep: set[str] = set()
        self._arrived: dict[str, tuple[float, int]] = {}
        self._tries: Counter[str] = Counter()
        self._ready_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._arrived)

    def __contains__(self, uid: str) -> bool:
        return uid in self._arrived

    def add(self, uid: str, *, now: float) -> None:
        """A new pod."""
        self._arrived[uid] = (now, len(self._tries))
        self._tries[uid] = 0
        self._activate(uid)

    def pop(self, *, now: float) -> str | None:
        """The next pod to try, if any may be tried now."""
        while self._backoff and self._backoff[0][0] <= now:
            self._activate(heapq.heappop(self._backoff)[1])
        while self._active:
            uid = heapq.heappop(self._active)[2]
            if uid in self._arrived:
                self._tries[uid] += 1
                return uid
        return None

    def next_at(self) -> float | None:
        """When the first pod that backs off may be tried."""
        return self._backoff[0][0] if self._backoff else None

    def refused(self, uid: str, *, now: float) -> None:
        """No node fitted: asleep until something is deleted."""
        self._ready_at[uid] = now + self._backoff_seconds(uid)
        self._asleep.add(uid)

    def failed(self, uid: str, *, now: float) -> None:
        """A call failed: tried again after the backoff, whatever happens."""
        heapq.heappush(self._backoff, (now + self._backoff_seconds(uid), uid))

    def done(self, uid: str) -> None:
        """Bound, or deleted."""
        self._arrived.pop(uid, None)
        self._asleep.discard(uid)

    def pod_deleted(self, *, now: float) -> None:
        """A pod with a node was deleted: every refused pod is worth another try once its backoff is over."""
        for uid in sorted(self._asleep):
            if self._ready_at[uid] <= now:
                self._activate(uid)
            else:
                heapq.heappush(self._backoff, (self._ready_at[uid], uid))
        self._asleep.clear()

    def _activate(self, uid: str) -> None:
        if uid in self._arrived:
            heapq.heappush(self._active, (*self._arrived[uid], uid))

    def _backoff_seconds(self, uid: str) -> float:
        return min(FIRST_BACKOFF_SECONDS * 2.0 ** (max(1, self._tries[uid]) - 1), LONGEST_BACKOFF_SECONDS)
