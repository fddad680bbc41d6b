"""Fakes at the seams that we own: a clock, and an API server in memory.

`FakeKube` is held to the real kube-apiserver's behaviour by tests/e2e/test_kube.py, which runs the same
checks (tests/kube_contract.py) against both.
"""

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from app.errors import Conflict, Gone, NotFound, Refused, Unknown
from app.kube import NO_ANNOTATIONS, Event, Json, Listed, Reviewed

Fault = Callable[[str], Awaitable[None] | None]


class Clock:
    """A clock that moves when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class FakeKube:
    """An API server in memory: resourceVersions, preconditions, watches, and faults on demand.

    `before[verb]` and `after[verb]` are called around a call's effect with its name: raise `Unknown` in
    `after` for a call that was made and whose answer got lost, in `before` for one that never arrived.
    """

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Json]] = {"pods": {}, "nodes": {}, "leases": {}, "configmaps": {}}
        self.history: list[tuple[int, str, str, Json]] = []
        self.tokens: dict[str, Reviewed] = {}
        self.events: list[Json] = []
        self.version = 1
        self.oldest = 0
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], None]] = {}
        self.after: dict[str, Callable[[], None]] = {}
        self.hold: dict[str, asyncio.Event] = {}
        self._news = asyncio.Event()

    # -- what tests do to it --------------------------------------------------------------------------

    def add_node(self, name: str, **allocatable: str) -> None:
        status = {"allocatable": allocatable}
        self._put("nodes", name, {"metadata": {"name": name, "uid": f"node-{name}"}, "status": status}, "ADDED")

    def remove_node(self, name: str) -> None:
        self._remove("nodes", name)

    def add_pod(self, pod: Json) -> Json:
        meta = pod["metadata"]
        return self._put("pods", f"{meta.get('namespace', 'default')}/{meta['name']}", pod, "ADDED")

    def change_pod(self, name: str, change: Callable[[Json], None], namespace: str = "default") -> None:
        pod = copy.deepcopy(self.objects["pods"][f"{namespace}/{name}"])
        change(pod)
        self._put("pods", f"{namespace}/{name}", pod, "MODIFIED")

    def remove_pod(self, name: str, namespace: str = "default") -> None:
        self._remove("pods", f"{namespace}/{name}")

    def pod(self, name: str, namespace: str = "default") -> Json:
        return self.objects["pods"][f"{namespace}/{name}"]

    def annotations(self, name: str, namespace: str = "default") -> dict[str, str]:
        return dict(self.pod(name, namespace)["metadata"].get("annotations") or {})

    def add_token(self, token: str, account: str, *, node: str = "", audience: str = "tangram") -> None:
        """A service account's (`namespace:name`) token; with `node`, bound to a pod there."""
        self.tokens[token] = Reviewed(True, f"system:serviceaccount:{account}", (audience,), node)

    def forget_history(self) -> None:
        """As after a compaction: watches from before now are too old."""
        self.oldest = self.version
        self.history.clear()

    # -- the port -------------------------------------------------------------------------------------

    async def list(self, resource: str, *, fields: str = "") -> Listed:
        async with self._around("list"):
            items = list(self.objects[resource].values())
            if fields:
                field, _, value = fields.partition("=")
                assert field == "spec.nodeName"
                items = [item for item in items if item["spec"].get("nodeName") == value]
            return Listed(copy.deepcopy(items), str(self.version))

    async def pages(self, resource: str, *, fields: str = "") -> AsyncIterator[Listed]:
        """Two objects on each."""
        listed = await self.list(resource, fields=fields)
        for first in range(0, len(listed.items) or 1, 2):
            await asyncio.sleep(0)
            yield Listed(listed.items[first : first + 2], listed.resource_version)

    async def watch(self, resource: str, *, resource_version: str, seconds: float) -> AsyncIterator[Event]:
        self.calls.append("watch")
        position = int(resource_version)
        if position < self.oldest:
            raise Gone(f"watch {resource}: too old resource version")
        while True:
            if self.before.get("watch"):
                self.before["watch"]()
            news = self._news
            for version, kind, of, value in [entry for entry in self.history if entry[0] > position]:
                position = version
                if of == resource:
                    yield Event(kind, copy.deepcopy(value))
            try:
                async with asyncio.timeout(seconds):
                    await news.wait()
            except TimeoutError:
                return

    async def get_pod(self, namespace: str, name: str) -> Json:
        async with self._around("get_pod"):
            return copy.deepcopy(self._existing("pods", f"{namespace}/{name}"))

    async def get_node(self, name: str) -> Json:
        async with self._around("get_node"):
            return copy.deepcopy(self._existing("nodes", name))

    async def annotate_pod(
        self,
        namespace: str,
        name: str,
        annotations: Mapping[str, str | None],
        *,
        uid: str,
        resource_version: str = "",
        timeout: float,
    ) -> str:
        async with self._around("annotate_pod", timeout):
            pod = copy.deepcopy(self._existing("pods", f"{namespace}/{name}"))
            if uid != pod["metadata"]["uid"]:
                raise Refused(f"metadata.uid: {uid}: field is immutable")
            self._check(pod, "", resource_version)
            _annotate(pod, annotations)
            if pod == self._existing("pods", f"{namespace}/{name}"):
                return str(pod["metadata"]["resourceVersion"])  # nothing has changed, nobody hears of it
            return str(self._put("pods", f"{namespace}/{name}", pod, "MODIFIED")["metadata"]["resourceVersion"])

    async def annotate_node(self, name: str, annotations: Mapping[str, str | None]) -> None:
        async with self._around("annotate_node"):
            node = copy.deepcopy(self._existing("nodes", name))
            _annotate(node, annotations)
            self._put("nodes", name, node, "MODIFIED")

    async def bind(
        self,
        namespace: str,
        name: str,
        node: str,
        *,
        uid: str,
        resource_version: str,
        annotations: Mapping[str, str] = NO_ANNOTATIONS,
        timeout: float,
    ) -> None:
        async with self._around("bind", timeout):
            pod = copy.deepcopy(self._existing("pods", f"{namespace}/{name}"))
            self._check(pod, uid, resource_version)
            if pod["spec"].get("nodeName"):
                raise Conflict(f"pod {name} is already assigned to node {pod['spec']['nodeName']}")
            if pod["metadata"].get("deletionTimestamp") or pod["spec"].get("schedulingGates"):
                raise Conflict(f"pod {name} is being deleted, or has scheduling gates")
            pod["spec"]["nodeName"] = node
            _annotate(pod, annotations)
            self._put("pods", f"{namespace}/{name}", pod, "MODIFIED")

    async def get_lease(self, namespace: str, name: str) -> Json:
        async with self._around("get_lease"):
            return copy.deepcopy(self._existing("leases", f"{namespace}/{name}"))

    async def create_lease(self, namespace: str, lease: Json) -> Json:
        async with self._around("create_lease"):
            key = f"{namespace}/{lease['metadata']['name']}"
            if key in self.objects["leases"]:
                raise Conflict("the lease exists")
            return copy.deepcopy(self._put("leases", key, lease, "ADDED"))

    async def replace_lease(self, namespace: str, name: str, lease: Json) -> Json:
        async with self._around("replace_lease"):
            self._check(self._existing("leases", f"{namespace}/{name}"), "", lease["metadata"]["resourceVersion"])
            return copy.deepcopy(self._put("leases", f"{namespace}/{name}", lease, "MODIFIED"))

    async def get_config_map(self, namespace: str, name: str) -> Json:
        async with self._around("get_config_map", 5):
            return copy.deepcopy(self._existing("configmaps", f"{namespace}/{name}"))

    async def create_config_map(self, namespace: str, config_map: Json) -> Json:
        async with self._around("create_config_map", 5):
            key = f"{namespace}/{config_map['metadata']['name']}"
            if key in self.objects["configmaps"]:
                raise Conflict("the ConfigMap exists")
            return copy.deepcopy(self._put("configmaps", key, config_map, "ADDED"))

    async def replace_config_map(self, namespace: str, name: str, config_map: Json, *, timeout: float) -> Json:
        async with self._around("replace_config_map", timeout):
            known = self._existing("configmaps", f"{namespace}/{name}")
            self._check(known, "", config_map["metadata"]["resourceVersion"])
            if config_map == known:
                return copy.deepcopy(known)
            return copy.deepcopy(self._put("configmaps", f"{namespace}/{name}", config_map, "MODIFIED"))

    async def review_token(self, token: str, *, audience: str) -> Reviewed:
        async with self._around("review_token", 5):
            known = self.tokens.get(token)
            if known is None or audience not in known.audiences:
                return Reviewed(False, error="invalid bearer token")
            return known

    async def create_event(self, namespace: str, event: Json) -> None:
        async with self._around("create_event", 5):
            if event["regarding"]["namespace"] != namespace or event["metadata"]["namespace"] != namespace:
                raise Refused("metadata.namespace: does not match regarding.namespace")
            self.events.append(copy.deepcopy(event))

    async def close(self) -> None:
        self.calls.append("close")

    # -- inside ---------------------------------------------------------------------------------------

    def _around(self, verb: str, timeout: float | None = None) -> "_Around":
        return _Around(self, verb, timeout)

    def _existing(self, resource: str, key: str) -> Json:
        value = self.objects[resource].get(key)
        if value is None:
            raise NotFound(f"{resource} {key} not found")
        return value

    @staticmethod
    def _check(value: Json, uid: str, version: str) -> None:
        meta = value["metadata"]
        if uid and meta["uid"] != uid:
            raise Conflict(f"uid is {meta['uid']}, the precondition was {uid}")
        if version and meta["resourceVersion"] != version:
            raise Conflict("the object has been modified")

    def _put(self, resource: str, key: str, value: Json, kind: str) -> Json:
        self.version += 1
        value = copy.deepcopy(value)
        value["metadata"]["resourceVersion"] = str(self.version)
        self.objects[resource][key] = value
        self._tell(kind, resource, value)
        return value

    def _remove(self, resource: str, key: str) -> None:
        value = copy.deepcopy(self.objects[resource].pop(key))
        self.version += 1
        value["metadata"]["resourceVersion"] = str(self.version)
        self._tell("DELETED", resource, value)

    def _tell(self, kind: str, resource: str, value: Json) -> None:
        self.history.append((self.version, kind, resource, copy.deepcopy(value)))
        self._news.set()
        self._news = asyncio.Event()


class _Around:
    def __init__(self, kube: FakeKube, verb: str, timeout: float | None) -> None:
        self._kube = kube
        self._verb = verb
        self._timeout = timeout

    async def __aenter__(self) -> None:
        kube, verb = self._kube, self._verb
        kube.calls.append(verb)
        await asyncio.sleep(0)
        if verb in kube.before:
            kube.before[verb]()
        if verb in kube.hold:
            try:
                async with asyncio.timeout(self._timeout):
                    await kube.hold[verb].wait()
            except TimeoutError:
                raise Unknown(f"{verb} timed out") from None

    async def __aexit__(self, kind: Any, *_: object) -> None:
        if kind is None and self._verb in self._kube.after:
            self._kube.after[self._verb]()


def _annotate(value: Json, annotations: Mapping[str, str | None] | Mapping[str, str]) -> None:
    current = dict(value["metadata"].get("annotations") or {})
    for name, text in annotations.items():
        if text is None:
            current.pop(name, None)
        else:
            current[name] = text
    if current or "annotations" in value["metadata"]:
        value["metadata"]["annotations"] = current


def pod_json(name: str, limits: Mapping[str, object] | None = None, **more: Any) -> Json:
    """A pod as the API server has it; its UID is `uid-<name>`."""
    metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}", **more.pop("metadata", {})}
    spec = {"containers": [{"name": "main", "resources": {"limits": dict(limits or {})}}], **more.pop("spec", {})}
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Pending"}, **more}
