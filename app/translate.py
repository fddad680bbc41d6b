"""Every label, annotation and resource name that we read or write: pod → Demand, Placement ↔ annotation.

No decisions. A malformed ask becomes a `Malformed` with words in it; it is refused later, on every node.
Profiles are spelled as Kubernetes resources spell them ('+' becomes '.'), because that is the only form that
a pod can ask in: `1g.10gb+me` is `1g.10gb.me` here and in the placement annotation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import orjson

from solver import Demand, Device, Slice

GPU_RESOURCE = "nvidia.com/gpu"
MIG_RESOURCE_PREFIX = "nvidia.com/mig-"
OUR_PREFIX = "tangram.gpu/"
SHARE_RESOURCE = "tangram.gpu/share"
ASK_RESOURCE = "tangram.gpu/ask"
PLACEMENT_ANNOTATION = "tangram.gpu/placement"
WAKE_ANNOTATION = "tangram.gpu/wake"

PLACEMENT_VERSION = 1
DEFAULT_GRACE_SECONDS = 30.0  # Kubernetes' own default of terminationGracePeriodSeconds

_SUFFIXES = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
}  # fmt: skip
EVERY_PROFILE = "*"  # no profile has this name: it stands for "whatever it is"
MOST_DEVICES = 1024  # more than any node has; a larger count is a mistake and would only cost time

Json = Mapping[str, Any]

NOTHING = Demand()
EVERYTHING = Demand(MOST_DEVICES, ((EVERY_PROFILE, MOST_DEVICES),))
"""The need of a bound pod whose resources cannot be read: its whole node is kept back."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """An ask that cannot be read, in words for its owner."""

    reason: str


@dataclass(frozen=True, slots=True)
class PodRef:
    """Which pod: the UID is its identity, the names are for people."""

    uid: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Written:
    """A placement as the annotation says it: for which pod UID, on which node, which devices."""

    uid: str
    node: str
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """What we need to know of a pod. `node` is empty until it is bound.

    `ask` is what it asks of us now; `need` is what it takes once it is bound, by whomever and whatever its
    annotations say. `finished`: its containers have ended, as its kubelet said.
    """

    ref: PodRef
    ask: Demand | Malformed
    need: Demand = NOTHING
    node: str = ""
    finished: bool = False
    terminating: bool = False
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    resource_version: str = ""
    written: Written | Malformed | None = None

    @property
    def concerns_us(self) -> bool:
        """Whether it asks for what we place, or carries a placement."""
        return isinstance(self.ask, Malformed) or bool(self.need) or self.written is not None


def pod_of(pod: Json) -> Pod:
    """Read a v1.Pod as JSON (from the wire or from a watch). Raises ValueError where it is no pod at all."""
    meta = _object(pod.get("metadata"), "metadata")
    spec = _object(pod.get("spec"), "spec")
    status = pod.get("status") or {}
    ref = PodRef(_text(meta, "uid"), meta.get("namespace") or "default", _text(meta, "name"))
    annotations = meta.get("annotations") or {}
    if not isinstance(annotations, Mapping):
        raise ValueError("metadata.annotations is not an object")
    need = need_of(spec)
    grace = _seconds(spec.get("terminationGracePeriodSeconds"), DEFAULT_GRACE_SECONDS)
    longer = _seconds(meta.get("deletionGracePeriodSeconds"), 0.0)  # whoever deletes may give it more time
    return Pod(
        ref=ref,
        ask=ask_of(spec, annotations, need),
        need=EVERYTHING if isinstance(need, Malformed) else need,
        node=spec.get("nodeName") or "",
        finished=isinstance(status, Mapping) and _ended(status),
        terminating=meta.get("deletionTimestamp") is not None,
        grace_seconds=max(grace, longer),
        resource_version=meta.get("resourceVersion") or "",
        written=read_placement(annotations.get(PLACEMENT_ANNOTATION)),
    )


def _ended(status: Json) -> bool:
    """Whether the pod has its final phase because its kubelet says that its containers have ended.

    Pod garbage collection, too, writes phase Failed, for pods of nodes that it believes lost; their containers
    may well be running (pkg/controller/podgc of Kubernetes).
    """
    if status.get("phase") not in ("Succeeded", "Failed"):
        return False
    said = [each for each in status.get("conditions") or () if isinstance(each, Mapping)]
    if any(each.get("reason") == "DeletionByPodGC" for each in said):
        return False
    containers = [each for each in status.get("containerStatuses") or () if isinstance(each, Mapping)]
    return not any(isinstance(each.get("state"), Mapping) and each["state"].get("running") for each in containers)


def _seconds(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def ask_of(spec: Json, annotations: Json, need: Demand | Malformed) -> Demand | Malformed:
    """What the pod asks of us: its need, unless it asks in a way that we do not know."""
    for name in annotations:
        if name.startswith(OUR_PREFIX) and name != PLACEMENT_ANNOTATION:
            return Malformed(f"annotation {name} is not one that this version of Tangram knows")
    if isinstance(need, Malformed):
        return need
    if need.gpus and any(SHARE_RESOURCE in _resources(each) for each in _all_containers(spec)):
        return Malformed(f"{SHARE_RESOURCE}: shares of a GPU are not served by this version of Tangram")
    devices = need.gpus + sum(count for _, count in need.slices)
    if devices > MOST_DEVICES:
        return Malformed(f"asks for {devices} devices; no node has more than {MOST_DEVICES}")
    return need


def need_of(spec: Json) -> Demand | Malformed:
    """The devices that the pod's resources count: per resource, the most that it needs at any one time.

    Init containers run one after another, except that sidecars (init containers with restartPolicy Always)
    stay: the need is the largest of (each init container + the sidecars before it) and (all containers + all
    sidecars), as Kubernetes itself counts. A share of a GPU, which we do not serve, counts as a GPU.
    (https://kubernetes.io/docs/concepts/workloads/pods/init-containers/#resource-sharing-within-containers,
    https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/#resource-sharing-within-containers).
    """
    try:
        need = _most_at_once(spec)
    except ValueError as error:
        return Malformed(str(error))
    gpus = need.pop(GPU_RESOURCE, 0) + bool(need.pop(SHARE_RESOURCE, 0))
    return Demand(gpus, tuple(sorted((name.removeprefix(MIG_RESOURCE_PREFIX), n) for name, n in need.items())))


def resource_of_profile(profile: str) -> str:
    """The extended resource of a MIG profile under the `mixed` strategy, '+' spelled as '.'."""
    return MIG_RESOURCE_PREFIX + profile.replace("+", ".")


def profile_as_asked(profile: str) -> str:
    """NVML's profile name in the spelling that pods can ask in."""
    return profile.replace("+", ".")


def write_placement(uid: str, node: str, devices: Sequence[Device]) -> str:
    """The annotation's text. It names the pod's UID, so that a copy on another pod proves nothing."""
    return orjson.dumps(
        {"v": PLACEMENT_VERSION, "uid": uid, "node": node, "devices": [str(device) for device in devices]}
    ).decode()


def read_placement(text: object) -> Written | Malformed | None:
    """Read the annotation; None where there is none, `Malformed` where we did not write that."""
    if text is None:
        return None
    try:
        value = orjson.loads(text) if isinstance(text, str) else None
        if not isinstance(value, dict) or value.get("v") != PLACEMENT_VERSION:
            return Malformed(f"{PLACEMENT_ANNOTATION} is not of a version that we know")
        uid, node, devices = value["uid"], value["node"], value["devices"]
        if not (isinstance(uid, str) and isinstance(node, str) and isinstance(devices, list) and devices):
            return Malformed(f"{PLACEMENT_ANNOTATION} has fields of the wrong type")
        return Written(uid, node, tuple(sorted((device_of(device) for device in devices), key=str)))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        return Malformed(f"{PLACEMENT_ANNOTATION} cannot be read: {error}")


def device_of(text: object) -> Device:
    """Read `GPU-…` or `GPU-…/3g.40gb@4`. Raises ValueError."""
    if not isinstance(text, str) or not text:
        raise ValueError(f"not a device: {text!r}")
    gpu, slash, rest = text.partition("/")
    if not slash:
        return Device(gpu)
    profile, at, start = rest.rpartition("@")
    if not (gpu and profile and at and start.isascii() and start.isdigit()):
        raise ValueError(f"not a device: {text!r}")
    return Device(gpu, Slice(profile, int(start)))


def _most_at_once(spec: Json) -> dict[str, int]:
    running: dict[str, int] = {}
    most: dict[str, int] = {}
    for container in _containers(spec, "initContainers"):
        own = _resources(container)
        if container.get("restartPolicy") == "Always":
            running = _add(running, own)
            most = _max(most, running)
        else:
            most = _max(most, _add(running, own))
    for container in _containers(spec, "containers"):
        running = _add(running, _resources(container))
    return {name: count for name, count in _max(most, running).items() if count}


def _all_containers(spec: Json) -> Sequence[Json]:
    return [*_containers(spec, "initContainers"), *_containers(spec, "containers")]


def _containers(spec: Json, field: str) -> Sequence[Json]:
    containers = spec.get(field) or []
    if not isinstance(containers, list) or not all(isinstance(each, Mapping) for each in containers):
        raise ValueError(f"spec.{field} is not a list of containers")
    return containers


def _resources(container: Json) -> dict[str, int]:
    resources = container.get("resources") or {}
    if not isinstance(resources, Mapping):
        raise ValueError("a container's resources are not an object")
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if not isinstance(limits, Mapping) or not isinstance(requests, Mapping):
        raise ValueError("a container's limits or requests are not an object")
    wanted: dict[str, int] = {}
    for name, quantity in {**limits, **requests}.items():
        if name in (GPU_RESOURCE, SHARE_RESOURCE) or name.startswith(MIG_RESOURCE_PREFIX):
            wanted[name] = _count(name, quantity)
    return wanted


def _count(name: str, quantity: object) -> int:
    if isinstance(quantity, int) and not isinstance(quantity, bool):
        value = Decimal(quantity)
    elif isinstance(quantity, str):
        digits = quantity.rstrip("kMGTPEi")
        try:
            value = Decimal(digits) * _SUFFIXES[quantity[len(digits) :]]
        except (ArithmeticError, KeyError):
            raise ValueError(f"{name}: {quantity!r} is not a quantity") from None
    else:
        raise ValueError(f"{name}: {quantity!r} is not a quantity")
    if not value.is_finite() or value < 0 or value != value.to_integral_value():
        raise ValueError(f"{name}: {quantity!r} is not a whole number of devices")
    if value > 2**31:
        raise ValueError(f"{name}: {quantity!r} is more than any node has")
    return int(value)


def _add(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


def _max(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}


def _object(value: object, field: str) -> Json:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} is not an object")
    return value


def _text(value: Json, field: str) -> str:
    text = value.get(field)
    if not isinstance(text, str) or not text:
        raise ValueError(f"metadata.{field} is missing")
    return text
