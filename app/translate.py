"""Every label, annotation and resource name that we read or write: pod → Demand, Placement ↔ annotation.

No decisions. A malformed ask becomes a `Malformed` with words in it; it is refused later, on every node.
Profiles are spelled as Kubernetes resources spell them ('+' becomes '.'), because that is the only form that
a pod can ask in: `1g.10gb+me` is `1g.10gb.me` here and in the placement annotation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache
from typing import Any

import orjson

from app.quantities import MIB, mib, milli, quantity, short, version
from solver import Demand, Device, Slice
from solver.cluster import GPU_MILLI
from solver.demand import Terms
from solver.guests import Guest

GPU_RESOURCE = "nvidia.com/gpu"
MIG_RESOURCE_PREFIX = "nvidia.com/mig-"
OUR_PREFIX = "tangram.gpu/"
SHARE_RESOURCE = "tangram.gpu/share"  # GiB of one GPU's memory
SHARE_MILLI_RESOURCE = "tangram.gpu/share-milli"  # thousandths of one GPU
ASK_RESOURCE = "tangram.gpu/ask"

PRODUCT = "tangram.gpu/product"
ARCHITECTURE = "tangram.gpu/architecture"
COMPUTE_CAPABILITY = "tangram.gpu/compute-capability"
GPU_MEMORY = "tangram.gpu/gpu-memory"
LINK = "tangram.gpu/link"
DRIVER = "tangram.gpu/driver"
CUDA = "tangram.gpu/cuda"
TENANT = "tangram.gpu/tenant"
ISOLATION = "tangram.gpu/isolation"
WORKLOAD = "tangram.gpu/workload"
PLACEMENT_ANNOTATION = "tangram.gpu/placement"
WAKE_ANNOTATION = "tangram.gpu/wake"
FENCE_ANNOTATION = "tangram.gpu/unbound-at"  # new each time, so that writing it changes the pod

OUR_OWN = frozenset({PLACEMENT_ANNOTATION, FENCE_ANNOTATION})
"""Annotations of pods that only we write: they ask for nothing."""

PLACEMENT_VERSION = 1
DEFAULT_SCHEDULER = "default-scheduler"
DEFAULT_GRACE_SECONDS = 30.0  # Kubernetes' own default of terminationGracePeriodSeconds

EVERY_PROFILE = "*"  # no profile has this name: it stands for "whatever it is"
MOST_DEVICES = 1024  # more than any node has; a larger count is a mistake and would only cost time
LARGEST_COUNT = 2**31  # of devices, MiB or thousandths of a CPU; more is a mistake, and too much for a machine word
MIB_IN_GIB = 1024
LONGEST_REMEMBERED = 4096  # bytes of what containers ask for
KUBELET_REFUSES = ("UnexpectedAdmissionError", "TopologyAffinityError")
KUBELET_HAS_TOO_LITTLE = "OutOf"  # and the resource's name: pkg/kubelet/lifecycle/predicate.go of Kubernetes

Json = Mapping[str, Any]

NO_UUIDS: Mapping[Device, str] = {}

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
    """A placement as the annotation says it: for which pod UID, on which node, which devices.

    `uuids` are MIG devices by device in text, sorted.
    """

    uid: str
    node: str
    devices: tuple[Device, ...]
    uuids: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Container:
    """What one container asks for of what we place, by resource name."""

    name: str
    resources: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """What we need to know of a pod. `node` is empty until it is bound.

    `ask` is what it asks of us now; `need` is what it takes once it is bound, by whomever and whatever its
    annotations say. `containers` are those that ask, in the order in which a kubelet admits them. `finished`: its
    containers have ended, as its kubelet said; `refused` has the kubelet's words if it never let them begin, and
    `admitted` is whether it did. `gated`: somebody holds it back from being scheduled. `scheduler` is the one that it
    chose. `fence` is when we last made sure that no Binding of it was under way.
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
    priority: int = 0
    gated: bool = False
    scheduler: str = DEFAULT_SCHEDULER
    containers: tuple[Container, ...] = ()
    refused: str = ""
    admitted: bool = False
    fence: str = ""

    @property
    def is_pending(self) -> bool:
        """Whether it waits for devices of ours and for nothing else."""
        asks = isinstance(self.ask, Demand) and self.ask.takes_devices
        return asks and not (self.node or self.finished or self.terminating or self.gated)

    @property
    def concerns_us(self) -> bool:
        """Whether it asks for what we place, or carries a placement."""
        return isinstance(self.ask, Malformed) or self.need.takes_devices or self.written is not None


def pod_of(pod: Json) -> Pod:
    """Read a v1.Pod as JSON (from the wire or from a watch). Raises ValueError where it is no pod at all."""
    meta = _object(pod.get("metadata"), "metadata")
    spec = _object(pod.get("spec"), "spec")
    status = pod.get("status") or {}
    ref = PodRef(_text(meta, "uid"), _text_or(meta, "namespace", "default"), _text(meta, "name"))
    annotations = meta.get("annotations") or {}
    if not isinstance(annotations, Mapping):
        raise ValueError("metadata.annotations is not an object")
    need, wrong, containers = _asked(spec)
    terms = terms_of(annotations, ref.namespace)
    guest = _guest_of(annotations, ref.namespace) if isinstance(terms, Malformed) else terms.guest
    grace = _seconds(spec.get("terminationGracePeriodSeconds"), DEFAULT_GRACE_SECONDS)
    longer = _seconds(meta.get("deletionGracePeriodSeconds"), 0.0)  # whoever deletes may give it more time
    return Pod(
        ref=ref,
        ask=wrong or (terms if isinstance(terms, Malformed) else _on(terms, need)),
        need=_on(Terms(guest=guest), need),
        node=_text_or(spec, "nodeName", ""),
        finished=isinstance(status, Mapping) and _ended(status),
        terminating=meta.get("deletionTimestamp") is not None,
        grace_seconds=max(grace, longer),
        resource_version=_text_or(meta, "resourceVersion", ""),
        written=read_placement(annotations.get(PLACEMENT_ANNOTATION)),
        priority=_whole(spec.get("priority")),
        gated=bool(spec.get("schedulingGates")),
        scheduler=_text_or(spec, "schedulerName", DEFAULT_SCHEDULER),
        containers=containers,
        refused=_refused(status) if isinstance(status, Mapping) else "",
        admitted=isinstance(status, Mapping) and _admitted(status),
        fence=str(annotations.get(FENCE_ANNOTATION, "")),
    )


def has_preferences(pod: Json) -> bool:
    """Whether the pod itself prefers some nodes to others, so that kube-scheduler should see all that fit."""
    spec = pod.get("spec")
    if not isinstance(spec, Mapping):
        return False
    affinity = spec.get("affinity")
    for kind in affinity.values() if isinstance(affinity, Mapping) else ():
        if isinstance(kind, Mapping) and kind.get("preferredDuringSchedulingIgnoredDuringExecution"):
            return True
    spread = spec.get("topologySpreadConstraints") or ()
    return any(isinstance(each, Mapping) and each.get("whenUnsatisfiable") == "ScheduleAnyway" for each in spread)


def _on(terms: Terms, need: Demand) -> Demand:
    return need if terms == NO_TERMS else replace(need, terms=terms)


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


def _refused(status: Json) -> str:
    """The kubelet's words where it refused to run the pod; such a pod stays Failed for good."""
    reason, message = status.get("reason"), status.get("message")
    if status.get("phase") != "Failed" or not isinstance(reason, str):
        return ""
    if reason not in KUBELET_REFUSES and not reason.startswith(KUBELET_HAS_TOO_LITTLE):
        return ""
    return f"{reason}: {message}" if isinstance(message, str) and message else reason


def _admitted(status: Json) -> bool:
    """Whether its kubelet has taken it: one that it refuses never has a container's status."""
    return status.get("phase") in ("Running", "Succeeded") or bool(status.get("containerStatuses"))


def _seconds(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) else otherwise


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


# -- what it needs ------------------------------------------------------------------------------------------


def _asked(spec: Json) -> tuple[Demand, Malformed | None, tuple[Container, ...]]:
    """What the pod needs, what is wrong with that, and which containers ask. Most pods ask as others did."""
    said: dict[str, Any] = {field: spec[field] for field in ("resources", "overhead") if field in spec}
    for field in ("initContainers", "containers"):
        containers = spec.get(field)
        said[field] = [_asking(each) for each in containers] if isinstance(containers, list) else containers
    try:
        text = orjson.dumps(said)
    except TypeError:  # numbers that JSON may have and orjson does not write
        return _read_anew(spec)
    return _read_asked(text) if len(text) <= LONGEST_REMEMBERED else _read_anew(spec)


def _asking(container: Any) -> Any:
    """What of a container bears on what it asks for."""
    if not isinstance(container, Mapping):
        return container
    return {field: container[field] for field in ("name", "restartPolicy", "resources") if field in container}


@lru_cache(maxsize=4096)
def _read_asked(said: bytes) -> tuple[Demand, Malformed | None, tuple[Container, ...]]:
    return _read_anew(orjson.loads(said))


def _read_anew(spec: Json) -> tuple[Demand, Malformed | None, tuple[Container, ...]]:
    need, wrong = need_of(spec)
    return need, wrong, _who_ask(spec) if need.takes_devices else ()


def need_of(spec: Json) -> tuple[Demand, Malformed | None]:
    """What the pod's resources count, per resource the most that it needs at any one time; and what is wrong.

    Init containers run one after another, except that sidecars (init containers with restartPolicy Always)
    stay: the need is the largest of (each init container + the sidecars before it) and (all containers + all
    sidecars), as Kubernetes itself counts, and of CPU and memory also the pod's overhead.
    (https://kubernetes.io/docs/concepts/workloads/pods/init-containers/#resource-sharing-within-containers,
    https://kubernetes.io/docs/concepts/workloads/pods/sidecar-containers/#resource-sharing-within-containers).

    A bound pod needs something whatever is wrong with its ask: where its devices cannot be read everything of
    its node, and for a share that is none a whole GPU.
    """
    try:
        devices = _most_at_once(spec, _devices)
    except ValueError as error:
        return EVERYTHING, Malformed(str(error))
    try:
        host, wrong = _host(spec), None
    except ValueError as error:
        host, wrong = {}, Malformed(str(error)) if devices else None
    gpus = devices.pop(GPU_RESOURCE, 0)
    share_mib, share_milli = MIB_IN_GIB * devices.pop(SHARE_RESOURCE, 0), devices.pop(SHARE_MILLI_RESOURCE, 0)
    slices = tuple(sorted((name.removeprefix(MIG_RESOURCE_PREFIX), n) for name, n in devices.items()))
    no_share = _no_share(gpus + len(slices), share_mib, share_milli)
    if no_share:
        gpus, share_mib, share_milli = gpus + max(1, -(-share_milli // GPU_MILLI)), 0, 0
    count = gpus + sum(n for _, n in slices)
    if count > MOST_DEVICES:
        wrong = Malformed(f"asks for {count} devices; no node has more than {MOST_DEVICES}")
    cpu, memory = host.get("cpu", 0), host.get("memory", 0)
    return Demand(gpus, slices, share_milli, share_mib, cpu, memory), no_share or wrong


def _no_share(others: int, share_mib: int, share_milli: int) -> Malformed | None:
    """What is wrong with a share, if one is asked for."""
    if share_mib and share_milli:
        return Malformed(f"asks for {SHARE_RESOURCE} and {SHARE_MILLI_RESOURCE}; a share is said in one of them")
    if share_milli >= GPU_MILLI:
        return Malformed(
            f"{SHARE_MILLI_RESOURCE}: {share_milli} thousandths are not a share of one GPU; ask for 1 to 999 in all "
            f"containers together, or for whole ones as {GPU_RESOURCE}"
        )
    if (share_mib or share_milli) and others:
        what = SHARE_RESOURCE if share_mib else SHARE_MILLI_RESOURCE
        return Malformed(f"asks for {what} beside whole GPUs or MIG slices; a pod gets one or the other")
    if share_mib > LARGEST_COUNT:
        return Malformed(f"{SHARE_RESOURCE}: {share_mib // MIB_IN_GIB} GiB are more than any GPU has")
    return None


def _host(spec: Json) -> dict[str, int]:
    """Requests of CPU (milli) and memory (MiB): those of the whole pod where it names them, and its overhead."""
    resources = _mapping(spec.get("resources"), "spec.resources")
    own = _read(_mapping(resources.get("requests"), "spec.resources.requests"))
    overhead = _read(_mapping(spec.get("overhead"), "spec.overhead"))
    needed = _add({**_most_at_once(spec, _requests), **own}, overhead)
    for name, amount in needed.items():
        if amount > LARGEST_COUNT:
            raise ValueError(f"{name}: the pod requests more of it than any node has")
    return needed


# -- on what terms ------------------------------------------------------------------------------------------


def terms_of(annotations: Json, namespace: str) -> Terms | Malformed:
    """What the pod's annotations say. One of ours that we do not know, or cannot read, is refused in words.

    A pod that wants to be apart and names no tenant is one of its namespace's.
    """
    said: dict[str, Any] = {}
    for name, text in annotations.items():
        if not name.startswith(OUR_PREFIX) or name in OUR_OWN:
            continue
        if name not in TERMS:
            return Malformed(f"annotation {name} is not one that this version of Tangram knows")
        read, right = TERMS[name]
        try:
            if not isinstance(text, str):
                raise ValueError("not text")
            said[name] = read(text.strip())
        except ValueError:
            return Malformed(f"annotation {name}: {short(text)} cannot be read; {right}")
    if not said:
        return NO_TERMS
    return Terms(
        products=said.get(PRODUCT, ()),
        architectures=said.get(ARCHITECTURE, ()),
        compute_capability=said.get(COMPUTE_CAPABILITY, ()),
        gpu_memory_mib=said.get(GPU_MEMORY, 0),
        nvlink=LINK in said,
        driver=said.get(DRIVER, ()),
        cuda=said.get(CUDA, ()),
        guest=_guest(said, namespace),
    )


def _guest(said: Mapping[str, Any], namespace: str) -> Guest:
    isolation = said.get(ISOLATION, "")
    return Guest(said.get(TENANT, namespace if isolation else ""), said.get(WORKLOAD, ""), isolation)


def _guest_of(annotations: Json, namespace: str) -> Guest:
    """Who a pod is, whatever is wrong with its other annotations: once it runs, its wish to be apart stands."""
    said: dict[str, Any] = {}
    for name in (TENANT, ISOLATION, WORKLOAD):
        text = annotations.get(name)
        try:
            if isinstance(text, str):
                said[name] = TERMS[name][0](text.strip())
        except ValueError:
            continue
    return _guest(said, namespace)


NO_TERMS = Terms()


def _names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    if not all(any(letter.isalnum() for letter in name) for name in names):
        raise ValueError(text)
    return tuple(sorted(set(names)))


def _device_memory(text: str) -> int:
    if quantity(text) < MIB:
        raise ValueError(text)
    return mib(text)


def _tenant(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", text, re.ASCII):
        raise ValueError(text)
    return text


def _one_of(**meanings: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in meanings:
            raise ValueError(text)
        return meanings[text]

    return read


TERMS: Mapping[str, tuple[Callable[[str], Any], str]] = {
    PRODUCT: (_names, "name one or more GPU models with commas between them, as H100 or A100 80GB, L40S"),
    ARCHITECTURE: (_names, "name one or more architectures with commas between them, as Hopper, Ada"),
    COMPUTE_CAPABILITY: (version, "say the least that will do, as 9.0"),
    GPU_MEMORY: (_device_memory, "say the least that each device must have, with its unit, as 40Gi"),
    LINK: (_one_of(nvlink="nvlink"), "the one link that can be asked for is nvlink"),
    DRIVER: (version, "say the oldest driver that will do, as 550.54"),
    CUDA: (version, "say the CUDA version that the pod was built with, as 12.4"),
    TENANT: (_tenant, "a tenant is a name of at most 63 letters, digits, dots, dashes and underscores"),
    ISOLATION: (_one_of(none="", gpu="gpu", node="node"), "it is none, gpu or node"),
    WORKLOAD: (_one_of(training="training", batch="batch", serving="serving"), "it is training, batch or serving"),
}
"""Each annotation of a pod's terms: how it is read, and what would be right."""


# -- names --------------------------------------------------------------------------------------------------


def resource_of_profile(profile: str) -> str:
    """The extended resource of a MIG profile under the `mixed` strategy, '+' spelled as '.'."""
    return MIG_RESOURCE_PREFIX + profile.replace("+", ".")


def profile_as_asked(profile: str) -> str:
    """NVML's profile name in the spelling that pods can ask in."""
    return profile.replace("+", ".")


def write_placement(uid: str, node: str, devices: Sequence[Device], uuids: Mapping[Device, str] = NO_UUIDS) -> str:
    """The annotation's text. It names the pod's UID, so that a copy on another pod proves nothing.

    `uuids` are the MIG devices of the slices; they change when a slice is made again (after a reboot, say), while the
    place is what the pod was given.
    """
    said: dict[str, Any] = {
        "v": PLACEMENT_VERSION,
        "uid": uid,
        "node": node,
        "devices": [str(device) for device in devices],
    }
    named = {str(device): uuids[device] for device in devices if device in uuids}
    return orjson.dumps({**said, "uuids": named} if named else said).decode()


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
        read = tuple(sorted((device_of(device) for device in devices), key=str))
        if len(set(read)) < len(read):
            return Malformed(f"{PLACEMENT_ANNOTATION} names a device twice")
        return Written(uid, node, read, _uuids_in(value.get("uuids")))
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        return Malformed(f"{PLACEMENT_ANNOTATION} cannot be read: {error}")


def _uuids_in(value: object) -> tuple[tuple[str, str], ...]:
    """UUIDs by device, sorted; what is not one is left out: places count, and UUIDs are written anew where wrong."""
    if not isinstance(value, dict):
        return ()
    return tuple(sorted((device, uuid) for device, uuid in value.items() if isinstance(uuid, str)))


def device_of(text: object) -> Device:
    """Read `GPU-…`, `GPU-…/3g.40gb@4` or `GPU-…:250m`. Raises ValueError.

    A share asked for in GiB may be all of its GPU, `GPU-…:1000m`.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"not a device: {text!r}")
    gpu, slash, rest = text.partition("/")
    if not slash:
        return _share_of(text) if ":" in text else Device(gpu)
    profile, at, start = rest.rpartition("@")
    if not (gpu and profile and at and start.isascii() and start.isdigit()):
        raise ValueError(f"not a device: {text!r}")
    return Device(gpu, Slice(profile, int(start)))


def _share_of(text: str) -> Device:
    gpu, _, share = text.rpartition(":")
    digits = share.removesuffix("m")
    if not gpu or digits == share or not (digits.isascii() and digits.isdigit() and len(digits) <= 4):
        raise ValueError(f"not a device: {text!r}")
    if not 0 < int(digits) <= GPU_MILLI:
        raise ValueError(f"not a device: {text!r} is no share of a GPU")
    return Device(gpu, milli=int(digits))


# -- containers and their resources ---------------------------------------------------------------------------


def _most_at_once(spec: Json, read: Callable[[Json], dict[str, int]]) -> dict[str, int]:
    """The most that the pod has at any one time, of what `read` finds on a container."""
    running: dict[str, int] = {}
    most: dict[str, int] = {}
    for container in _containers(spec, "initContainers"):
        own = read(container)
        if container.get("restartPolicy") == "Always":
            running = _add(running, own)
            most = _max(most, running)
        else:
            most = _max(most, _add(running, own))
    for container in _containers(spec, "containers"):
        running = _add(running, read(container))
    return {name: count for name, count in _max(most, running).items() if count}


def _containers(spec: Json, field: str) -> Sequence[Json]:
    containers = spec.get(field) or []
    if not isinstance(containers, list) or not all(isinstance(each, Mapping) for each in containers):
        raise ValueError(f"spec.{field} is not a list of containers")
    return containers


def _devices(container: Json) -> dict[str, int]:
    """How many of each of our resources a container asks for."""
    return {
        name: _count(name, amount)
        for name, amount in _wanted(container).items()
        if name in _COUNTED or name.startswith(MIG_RESOURCE_PREFIX)
    }


def _who_ask(spec: Json) -> tuple[Container, ...]:
    """The containers that ask for our resources: init containers first, each list in its own order."""
    found: list[Container] = []
    try:
        for container in (*_containers(spec, "initContainers"), *_containers(spec, "containers")):
            asked = tuple(sorted((name, count) for name, count in _devices(container).items() if count))
            if asked:
                found.append(Container(str(container.get("name") or ""), asked))
    except ValueError:
        return ()  # such a pod needs everything, whatever its containers say
    return tuple(found)


_COUNTED = frozenset({GPU_RESOURCE, SHARE_RESOURCE, SHARE_MILLI_RESOURCE})


def _requests(container: Json) -> dict[str, int]:
    """The CPU (milli) and memory (MiB) that a container requests; a limit without a request is one."""
    return _read(_wanted(container))


def _wanted(container: Json) -> Json:
    resources = container.get("resources") or {}
    if not isinstance(resources, Mapping):
        raise ValueError("a container's resources are not an object")
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if not isinstance(limits, Mapping) or not isinstance(requests, Mapping):
        raise ValueError("a container's limits or requests are not an object")
    return {**limits, **requests}


def _read(amounts: Json) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, unit in (("cpu", milli), ("memory", mib)):
        if name in amounts:
            try:
                found[name] = unit(amounts[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return found


MIG_CONFIG_LABEL = "nvidia.com/mig.config"
MIG_STATE_LABEL = "nvidia.com/mig.config.state"
MIG_MANAGER_LABEL = "nvidia.com/gpu.deploy.mig-manager"


def mig_owner_of(node: Json) -> tuple[str, str]:
    """Whether the GPU Operator's MIG manager owns this v1.Node's boards, and whether it is changing them, in words.

    It does where the node is labelled with a configuration, unless the manager is kept off the node; it would undo
    what others make. While it works its state is "pending" or "rebooting".
    """
    metadata = node.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
    if not isinstance(labels, Mapping) or not labels.get(MIG_CONFIG_LABEL) or labels.get(MIG_MANAGER_LABEL) == "false":
        return "", ""
    state = labels.get(MIG_STATE_LABEL)
    owner = f"the GPU Operator's MIG manager cuts its boards (label {MIG_CONFIG_LABEL}={labels[MIG_CONFIG_LABEL]})"
    changing = f"the GPU Operator's MIG manager is changing its boards ({MIG_STATE_LABEL}={state})"
    return owner, changing if state in ("pending", "rebooting") else ""


NODE_INFO = {"kubeletVersion": "kubelet", "containerRuntimeVersion": "runtime", "kernelVersion": "kernel"}


def versions_of(node: Json) -> dict[str, str]:
    """What a v1.Node says of the software on it: kubelet, container runtime and kernel, where it does."""
    status = node.get("status")
    info = status.get("nodeInfo") if isinstance(status, Mapping) else None
    if not isinstance(info, Mapping):
        return {}
    return {name: info[key] for key, name in NODE_INFO.items() if isinstance(info.get(key), str) and info[key]}


def allocatable_of(node: Json) -> tuple[int, int] | None:
    """CPU (milli) and memory (MiB) that a v1.Node gives to pods; None where it does not say, or not readably.

    More than `LARGEST_COUNT` is no real amount; it counts as so much.
    """
    status = node.get("status")
    amounts = status.get("allocatable") if isinstance(status, Mapping) else None
    try:
        cpu, memory = (amounts["cpu"], amounts["memory"]) if isinstance(amounts, Mapping) else (None, None)
        return _given(1000 * quantity(cpu)), _given(quantity(memory) / MIB)
    except (KeyError, ValueError):
        return None


def _given(amount: Decimal) -> int:
    return min(LARGEST_COUNT, max(0, int(amount)))


def _count(name: str, amount: object) -> int:
    try:
        value = quantity(amount)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if value < 0 or value != value.to_integral_value():
        raise ValueError(f"{name}: {short(amount)} is not a whole number of devices")
    if value > LARGEST_COUNT:
        raise ValueError(f"{name}: {short(amount)} is more than any node has")
    return int(value)


def _add(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: a.get(name, 0) + b.get(name, 0) for name in {**a, **b}}


def _max(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {name: max(a.get(name, 0), b.get(name, 0)) for name in {**a, **b}}


def _mapping(value: object, field: str) -> Json:
    """An object that may be missing."""
    return _object(value or {}, field)


def _object(value: object, field: str) -> Json:
    if not isinstance(value, Mapping):
        raise ValueError(f"{field} is not an object")
    return value


def _text(value: Json, field: str) -> str:
    text = value.get(field)
    if not isinstance(text, str) or not text:
        raise ValueError(f"metadata.{field} is missing")
    return text


def _text_or(value: Json, field: str, otherwise: str) -> str:
    """Text that may be missing."""
    text = value.get(field) or otherwise
    if not isinstance(text, str):
        raise ValueError(f"metadata or spec: {field} is not text")
    return text
