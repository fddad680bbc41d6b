"""Which pod the kubelet asks for, what it is to have, and whose device is whose: decisions only, nothing is awaited.

The kubelet names ids, never the pod. What is known meanwhile is a `Scene`: the pods that the service has told of, what
was handed out, and what the kubelet lists. Everything here is a function of a scene (docs/decisions/0009).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from app.agent.kubelet.ids import (
    GPU_MILLI,
    GPU_RESOURCE,
    MIG_RESOURCE_PREFIX,
    SHARE_MILLI_RESOURCE,
    SHARE_RESOURCE,
    devices_of,
    gpu_of,
    id_of,
    resource_of,
)
from app.report import DeviceAt, Gpu, Handed, Handing, Instance, NodeReport, PodAt, Process

SHARES = (SHARE_RESOURCE, SHARE_MILLI_RESOURCE)

NAMELESS_SECONDS = 10.0
"""How long the kubelet may take to list what it was given for a pod that nobody could name: it notes it at once."""

Devices = tuple[DeviceAt, ...]
Ids = tuple[str, ...]


class Held(BaseModel):
    """What one container was handed of one resource. `ids` are what the kubelet counts for it, always.

    Without a `name` it is not known whose it is; the kubelet's next list says. `again`: it was handed a second time, so
    perhaps to a later pod of the same name. `since` is when it was handed, on this process's clock (0: before it
    started).
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    uid: str = ""
    namespace: str = ""
    name: str = ""
    container: str = ""
    resource: str
    devices: Devices
    ids: Ids
    how: Handing
    again: bool = False
    since: float = Field(default=0.0, exclude=True)

    @property
    def place(self) -> Place:
        """Where the kubelet would show it."""
        return Place(self.namespace, self.name, self.container, self.resource)

    def said(self) -> Handed:
        """As the report says it."""
        return Handed(
            uid=self.uid,
            namespace=self.namespace,
            name=self.name,
            container=self.container,
            resource=self.resource,
            devices=self.devices,
            ids=self.ids[:1024] if self.how == "overridden" else (),
            how=self.how,
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Where the kubelet shows devices: PodResources knows names, no UIDs."""

    namespace: str
    name: str
    container: str
    resource: str


@dataclass(frozen=True, slots=True)
class Listed:
    """What the kubelet lists: each pod's containers but for ordinary init containers, and their ids by resource."""

    pods: Mapping[tuple[str, str], Mapping[str, Mapping[str, Ids]]] = field(default_factory=dict)

    def places(self) -> Iterator[tuple[Place, Ids]]:
        """Everything that some container has."""
        for (namespace, name), containers in self.pods.items():
            for container, devices in containers.items():
                for resource, ids in devices.items():
                    if ids:
                        yield Place(namespace, name, container, resource), ids


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known at one moment. `kubelet` is None while it is silent; `refused` are UIDs of pods that were refused
    something, which the kubelet fails for good (and may list for a while)."""

    report: NodeReport
    pods: tuple[PodAt, ...] = ()
    held: tuple[Held, ...] = ()
    kubelet: Listed | None = None
    refused: frozenset[str] = frozenset()

    def containers(self, namespace: str, name: str) -> Mapping[str, Mapping[str, Ids]] | None:
        """A pod's containers as the kubelet lists them; None where it does not list the pod, or is silent."""
        return self.kubelet.pods.get((namespace, name)) if self.kubelet is not None else None

    def held_by(self, uid: str, container: str, resource: str) -> Held | None:
        """What this very container was handed."""
        for one in self.held:
            if (one.uid, one.container, one.resource) == (uid, container, resource):
                return one
        return None


# ---- devices ----


def is_ours(resource: str) -> bool:
    """Whether a resource is one whose ids are ours."""
    return resource == GPU_RESOURCE or resource in SHARES or resource.startswith(MIG_RESOURCE_PREFIX)


def of_resource(devices: Iterable[DeviceAt], resource: str) -> Devices:
    """Those that a container gets by asking for this resource."""
    if resource in SHARES:
        return tuple(device for device in devices if device.milli)
    return tuple(device for device in devices if not device.milli and resource_of(device) == resource)


def overlap(a: DeviceAt, b: DeviceAt, report: NodeReport) -> bool:
    """Whether two devices cannot be different containers' at once. Shares stand side by side; `crowded` counts them.

    Slices of which the report has no size are taken to overlap: it may be that of a board that was cut meanwhile.
    """
    if a.gpu != b.gpu or (a.milli and b.milli):
        return False
    if not (a.profile and b.profile):
        return True
    at, other = _extent(a, report), _extent(b, report)
    return at is None or other is None or (at.start < other.stop and other.start < at.stop)


def _extent(slice_: DeviceAt, report: NodeReport) -> range | None:
    """The memory slices that it covers."""
    for gpu in report.gpus:
        if gpu.uuid == slice_.gpu and gpu.mig is not None:
            for profile in gpu.mig.profiles:
                for placement in profile.placements if profile.name == slice_.profile else ():
                    if placement.start == slice_.start:
                        return range(placement.start, placement.start + placement.size)
            for instance in gpu.mig.instances:
                if (instance.profile, instance.start) == (slice_.profile, slice_.start) and instance.size is not None:
                    return range(slice_.start, slice_.start + instance.size)
    return None


def _crowded(devices: Devices, others: Iterable[DeviceAt]) -> bool:
    """Whether the shares among them are more than a whole GPU beside the others'."""
    milli: dict[str, int] = {}
    for device in (*devices, *others):
        milli[device.gpu] = milli.get(device.gpu, 0) + device.milli
    return any(device.milli and milli[device.gpu] > GPU_MILLI for device in devices)


def _names(id_: str, device: DeviceAt) -> bool:
    """Whether an id stands for this device, or for a part of this share's GPU."""
    return gpu_of(id_) == device.gpu if device.milli else id_ == id_of(device)


# ---- who is it? ----

Rule = Literal["only-one", "count", "ids", "oldest", "waited", "again", "nobody"]


@dataclass(frozen=True, slots=True)
class Match:
    """The container that the kubelet asks for, and the rule that found it. `again`: what it was handed before."""

    pod: PodAt
    container: str
    rule: Rule
    again: Held | None = None


def who(scene: Scene, resource: str, size: int, ids: Collection[str], *, late: bool) -> Match | None:
    """The container that asks for so many of this resource; None where none that is known could.

    A pod that was refused has failed, and one that was handed its devices has them: only where nobody else came in time
    (`late`) are they taken to be asked for anew, as after a kubelet that has lost its checkpoint.
    """
    found = _one_of([pod for pod in scene.pods if pod.uid not in scene.refused], scene, resource, size, ids)
    if found is not None or not late:
        return found
    return _one_of(
        [pod for pod in scene.pods if pod.uid in scene.refused], scene, resource, size, ids
    ) or _handed_before(scene, resource, size, ids)


def _one_of(pods: Sequence[PodAt], scene: Scene, resource: str, size: int, ids: Collection[str]) -> Match | None:
    waiting = {pod.uid: lacking for pod in pods if (lacking := _lacking(scene, pod, resource))}
    by_uid = {pod.uid: pod for pod in pods}
    # The kubelet takes a pod's containers in their order; where that fits nobody, any of them may be meant.
    fitting = {uid: asks[0][0] for uid, asks in waiting.items() if asks[0][1] == size} or {
        uid: next(name for name, count in asks if count == size)
        for uid, asks in waiting.items()
        if any(count == size for _, count in asks)
    }
    if not fitting:
        return None
    uid = next(iter(fitting))
    rule: Rule = "oldest"
    if len(waiting) == 1:
        rule = "only-one"
    elif len(fitting) == 1:
        rule = "count"
    else:
        named = [one for one in fitting if ids and _are_of(ids, of_resource(by_uid[one].devices, resource))]
        if len(named) == 1:
            uid, rule = named[0], "ids"
        elif named:
            uid = named[0]
    return Match(by_uid[uid], fitting[uid], rule)


def _lacking(scene: Scene, pod: PodAt, resource: str) -> list[tuple[str, int]]:
    """The pod's containers that ask for the resource and have none of it yet, in the kubelet's order, and how much.

    Ordinary init containers are not listed: for them there is only what was handed.
    """
    containers = scene.containers(pod.namespace, pod.name)
    if scene.kubelet is not None and containers is None:
        return []
    return [
        (ask.name, ask.resources[resource])
        for ask in pod.containers
        if ask.resources.get(resource)
        and scene.held_by(pod.uid, ask.name, resource) is None
        and not (containers or {}).get(ask.name, {}).get(resource)
    ]


def _are_of(ids: Collection[str], devices: Devices) -> bool:
    return all(any(_names(id_, device) for device in devices) for id_ in ids)


def _handed_before(scene: Scene, resource: str, size: int, ids: Collection[str]) -> Match | None:
    """A container that was handed its devices although the kubelet, which lists its pod, counts none for it.

    While the kubelet is silent only the very same ids say so.
    """
    pods = {pod.uid: pod for pod in scene.pods}
    found = []
    for one in scene.held:
        if one.resource != resource or len(one.ids) != size or one.uid not in pods:
            continue
        containers = scene.containers(one.namespace, one.name)
        listed = containers is not None and one.container in containers
        if set(ids) == set(one.ids) if scene.kubelet is None else listed and not _has(containers, one):
            found.append(one)
    found.sort(key=lambda one: (set(one.ids) != set(ids), bool(_still_running(scene, one.uid, one.devices))))
    return Match(pods[found[0].uid], found[0].container, "again", found[0]) if found else None


def _has(containers: Mapping[str, Mapping[str, Ids]] | None, one: Held) -> bool:
    return bool((containers or {}).get(one.container, {}).get(one.resource))


# ---- what shall it have? ----


@dataclass(frozen=True, slots=True)
class Give:
    """Hand these out, which is this kind of handing."""

    devices: Devices
    how: Handing


@dataclass(frozen=True, slots=True)
class Ask:
    """The kubelet counts `take`, not `give`: ask for an exchange. `both`: what is the container's in any case, and
    whether (`true`) the kubelet counts that."""

    give: Devices
    take: Devices
    both: Devices
    true: bool = True

    def granted(self, *, swapped: bool) -> Give:
        """What follows from a yes."""
        how: Handing = "swapped" if swapped else "free"
        return Give(self.both + self.take, how if self.true else "overridden")

    def refused(self) -> Give:
        """What follows from a no: the placement wins."""
        return Give(self.both + self.give, "overridden")


@dataclass(frozen=True, slots=True)
class Not:
    """Why nothing can be handed out as things are. `may_change`: another list, report or moment may help."""

    why: str
    may_change: bool = True


def decide(scene: Scene, match: Match | None, resource: str, ids: Sequence[str]) -> Give | Ask | Not:
    """What the container is to have, seeing which ids the kubelet has taken for it."""
    try:
        taken = devices_of(resource, ids, scene.report)
    except ValueError as error:
        return Not(str(error))
    if match is not None and match.again is not None:
        return _again(match.again, taken)
    if match is None or not match.pod.devices:
        return Give(taken, "unplaced")
    rest = rest_of(scene, match, resource, len(ids))
    if resource in SHARES:
        return _share(rest, taken, _handed_beside(scene, match, resource), match)
    if len(rest) < len(taken):
        return Not(f"{_of(match)} asks for {len(ids)} of {resource}, and Tangram has placed {len(rest)} for it")
    both = tuple(device for device in taken if device in rest)
    spare = tuple(device for device in rest if device not in both)
    # What the kubelet counts here is another container's of this pod where it counts something else there: no exchange.
    siblings = [device for device in taken if device not in both and device in match.pod.devices]
    strangers = tuple(device for device in taken if device not in both and device not in siblings)
    # What an init container was handed has been used under this pod's name: it is not given away for something else.
    handed = _handed_beside(scene, match, resource)
    used = sum(device in handed for device in spare)
    fixed = min(max(len(siblings), used), len(siblings) + len(strangers))
    both, spare, strangers = both + spare[:fixed], spare[fixed:], strangers[fixed - len(siblings) :]
    if strangers:
        return Ask(give=spare[: len(strangers)], take=strangers, both=both, true=not fixed)
    return Give(both, "overridden" if fixed else "placed")


def asks_beside(match: Match, resource: str) -> dict[str, int]:
    """The other resources that the container asks for, and how much of each."""
    asks = next((ask.resources for ask in match.pod.containers if ask.name == match.container), {})
    return {other: count for other, count in sorted(asks.items()) if other != resource and count and is_ours(other)}


def beside(scene: Scene, match: Match, resource: str) -> dict[str, Devices]:
    """By resource, what the container has or is to have of the other resources that it asks for."""
    found: dict[str, Devices] = {}
    for other, count in asks_beside(match, resource).items():
        held = scene.held_by(match.pod.uid, match.container, other)
        found[other] = held.devices if held else rest_of(scene, match, other, count)[:count]
    return found


def decide_whole(
    scene: Scene, match: Match | None, resource: str, ids: Sequence[str], promised: Devices | None
) -> Give | Ask | Not:
    """`decide`, where each answer must carry all devices of its container (`Giver.whole`).

    Where a container asks for several resources its devices are fixed with the first answer, as `promised` says of the
    later ones: the placement, without an exchange.
    """
    choice = decide(scene, match, resource, ids)
    if match is None or match.again is not None or isinstance(choice, Not) or not asks_beside(match, resource):
        return choice
    if not match.pod.devices:
        return Not(
            f"{_of(match)} asks for several resources, and Tangram has not placed it; one environment variable names "
            "all devices of a container, and the others are not known yet (--hand-over=cdi has no such limit)"
        )
    if promised is not None:
        true = {id_of(device) for device in promised} == set(ids)
        return Give(promised, "placed" if true else "overridden")
    return choice.refused() if isinstance(choice, Ask) else choice


def _again(before: Held, taken: Devices) -> Give:
    if set(taken) == set(before.devices):
        return Give(before.devices, "placed" if before.how == "overridden" else before.how)
    return Give(before.devices, "overridden")


def _share(rest: Devices, taken: Devices, used: Devices, match: Match) -> Give | Ask | Not:
    """Of a share the GPU counts, and how much the service has reckoned it to be."""
    if not rest:
        return Not(f"{_of(match)} asks for a share, and Tangram has placed none for it")
    if {device.gpu for device in taken} == {device.gpu for device in rest}:
        return Give(rest, "placed")
    if any(device in used for device in rest):
        return Give(rest, "overridden")
    return Ask(give=rest, take=taken, both=())


def rest_of(scene: Scene, match: Match, resource: str, size: int) -> Devices:
    """The pod's placed devices that no container beside this one keeps; an ordinary init container's may be used again.

    Which containers are ordinary init containers is seen by the kubelet not listing them. While it is silent all are
    taken to keep theirs: what was handed in the name of this pod may then be another's.
    """
    placed = of_resource(match.pod.devices, resource)
    containers = scene.containers(match.pod.namespace, match.pod.name)
    siblings = _siblings(scene, match, resource)
    kept = [device for one in siblings if containers is None or one.container in containers for device in one.devices]
    left = list(placed)
    for device in kept:
        if device in left:
            left.remove(device)
    if resource in SHARES:
        return _share_of(left, resource, size)
    used = _handed_beside(scene, match, resource)  # the kubelet uses an init container's first
    return tuple(sorted(left, key=lambda device: device not in used))


def _siblings(scene: Scene, match: Match, resource: str) -> list[Held]:
    """What other containers of the pod were handed of this resource."""
    return [
        one
        for one in scene.held
        if one.uid == match.pod.uid and one.resource == resource and one.container != match.container
    ]


def _handed_beside(scene: Scene, match: Match, resource: str) -> Devices:
    return tuple(device for one in _siblings(scene, match, resource) for device in one.devices)


def _share_of(left: Sequence[DeviceAt], resource: str, size: int) -> Devices:
    """A container's part of what is left of its pod's shares: the one that is just as much, or all."""
    exact = [device for device in left if resource == SHARE_MILLI_RESOURCE and device.milli == size]
    return (exact[0],) if exact else tuple(left)


def blocked(scene: Scene, match: Match | None, devices: Devices, ids: Sequence[str], *, placed: bool) -> str:
    """Whose devices stand in the way of these, in words; empty where nobody's do.

    What was handed out to another pod stays with it, whatever anybody says. What others were promised may only be had
    by the service's leave (`placed`).
    """
    uid = match.pod.uid if match is not None else None
    others = [one for one in scene.held if not _is_own(one, uid, ids)]
    for one in others:
        if any(overlap(device, theirs, scene.report) for device in devices for theirs in one.devices):
            return f"{_device_words(devices)}: handed to {_held_words(one)}"
    if _crowded(devices, (device for one in others for device in one.devices)):
        return f"{_device_words(devices)}: too little is left beside the shares that were handed out"
    for one in scene.held:
        if uid is not None and one.uid == uid and _collide_within(one.devices, devices, scene.report):
            return f"{_device_words(devices)}: the pod's container {one.container} has what overlaps it"
    if match is not None and match.again is not None:
        return _still_running(scene, match.pod.uid, devices)
    return "" if placed else _spoken_for(scene, uid, devices)


def counted_wrongly(scene: Scene, match: Match, devices: Devices) -> bool:
    """Whether the kubelet offers these although another pod was handed one of them: the service, which perhaps has not
    heard of that yet, must not be asked to exchange it."""
    others = (one for one in scene.held if one.how == "overridden" and one.uid != match.pod.uid)
    return any(overlap(device, theirs, scene.report) for one in others for theirs in one.devices for device in devices)


def _spoken_for(scene: Scene, uid: str | None, devices: Devices) -> str:
    """Whether others were promised these, or use them already, as what the service does not know of may."""
    pods = [pod for pod in scene.pods if pod.uid != uid]
    for pod in pods:
        if any(overlap(device, theirs, scene.report) for device in devices for theirs in pod.devices):
            return f"{_device_words(devices)}: promised to {pod.namespace}/{pod.name}"
    if _crowded(devices, (device for pod in pods for device in pod.devices)):
        return f"{_device_words(devices)}: too little is left beside the shares that were promised"
    if any(process.pod and process.pod != uid and not device.milli for device, process in _running(scene, devices)):
        return f"{_device_words(devices)}: a process of another pod runs there"
    return ""


def _still_running(scene: Scene, uid: str, devices: Devices) -> str:
    """Whether a container that seems to be started again has not ended: then it is somebody else who asks."""
    if any(process.pod == uid and not device.milli for device, process in _running(scene, devices)):
        return f"{_device_words(devices)}: handed out before, and in use"
    return ""


def _running(scene: Scene, devices: Devices) -> Iterator[tuple[DeviceAt, Process]]:
    """What the last report has seen to run on any of these."""
    for device in devices:
        for gpu in scene.report.gpus:
            if gpu.uuid != device.gpu:
                continue
            for one in gpu.mig.instances if gpu.mig is not None and device.profile else ():
                if (one.profile, one.start) == (device.profile, device.start):
                    yield from ((device, process) for process in one.processes)
            yield from ((device, process) for process in gpu.processes if not device.profile)


def _is_own(one: Held, uid: str | None, ids: Sequence[str]) -> bool:
    """Whether this is the asking pod's. Of a pod that nobody knows: the kubelet reuses ids within a pod only."""
    if uid is not None:
        return one.uid == uid
    return not one.name and not set(one.ids).isdisjoint(ids)


def _collide_within(these: Devices, those: Devices, report: NodeReport) -> bool:
    """Of one pod: the same device may be two containers' (one after the other), overlapping slices cannot be."""
    return any(a != b and overlap(a, b, report) for a in these for b in those)


# ---- which ids would be best? ----


def preferred(
    scene: Scene,
    match: Match | None,
    resource: str,
    available: Collection[str],
    must: Sequence[str],
    size: int,
) -> Ids:
    """The ids that the kubelet should take, best first; fewer where none but bad ones are left.

    The placed ones; then what nobody has and nobody was promised; for a placed pod then also what may be exchanged.
    """
    chosen = [id_ for id_ in dict.fromkeys(must) if id_ in available]
    if match is not None:
        _choose(chosen, _placed_ids(scene, match, resource, available, size), size)
    if len(chosen) < size:
        placed = match is not None and bool(match.pod.devices)
        _choose(chosen, _free_ids(scene, match, resource, available, chosen, placed=placed), size)
    if len(chosen) < size and match is not None and match.pod.devices:
        _choose(chosen, (id_ for id_ in _in_order(scene.report, available) if id_ not in chosen), size)
    return tuple(chosen[:size])


def _choose(chosen: list[str], more: Iterable[str], size: int) -> None:
    chosen.extend(islice((id_ for id_ in more if id_ not in chosen), max(0, size - len(chosen))))


def _placed_ids(scene: Scene, match: Match, resource: str, available: Collection[str], size: int) -> Iterator[str]:
    if match.again is not None:
        yield from (id_ for id_ in _in_order(scene.report, available) if _are_of([id_], match.again.devices))
        return
    rest = rest_of(scene, match, resource, size)
    ordered = _in_order(scene.report, available)
    for device in rest:
        parts = device.milli if resource == SHARE_MILLI_RESOURCE else size
        yield from islice((id_ for id_ in ordered if _names(id_, device)), parts)


def _free_ids(
    scene: Scene,
    match: Match | None,
    resource: str,
    available: Collection[str],
    chosen: Sequence[str],
    *,
    placed: bool,
) -> Iterator[str]:
    """Ids that can be had beside everything that is handed, promised, or chosen so far. What is there comes first; for
    an unplaced pod nothing else, since nobody would make a slice or switch a GPU's mode for it."""
    there = {(gpu.uuid, one.profile, one.start) for gpu, one in _instances(scene.report) if one.uuid}
    cut = {gpu.uuid for gpu in scene.report.gpus if gpu.mig is not None and gpu.mig.enabled}
    candidates: list[tuple[bool, str, DeviceAt]] = []
    for id_, device in _known_devices(resource, _in_order(scene.report, available), scene.report):
        missing = (device.gpu, device.profile, device.start) not in there if device.profile else device.gpu in cut
        if not (missing and not placed):
            candidates.append((missing, id_, device))
    taken = [device for _, device in _known_devices(resource, chosen, scene.report)]
    open_ = {}  # by GPU for shares, whose thousand ids are alike
    for _, id_, device in sorted(candidates, key=lambda one: one[0]):
        key = device.gpu if device.milli else id_
        if key not in open_:
            open_[key] = not blocked(scene, match, (device,), (), placed=False)
        if open_[key] and not any(overlap(device, other, scene.report) for other in taken):
            taken.append(device)
            yield id_


def _known_devices(resource: str, ids: Iterable[str], report: NodeReport) -> Iterator[tuple[str, DeviceAt]]:
    """Each id with what it stands for, but for those that the kubelet still has of a GPU that is lost."""
    for id_ in ids:
        try:
            device = devices_of(resource, [id_], report)[0]
        except ValueError:
            continue
        yield id_, device


def _instances(report: NodeReport) -> Iterator[tuple[Gpu, Instance]]:
    for gpu in report.gpus:
        for one in gpu.mig.instances if gpu.mig is not None else ():
            yield gpu, one


def _in_order(report: NodeReport, ids: Collection[str]) -> list[str]:
    """The same from call to call: by GPU, then by place."""
    index = {gpu.uuid: gpu.index for gpu in report.gpus}
    return sorted(ids, key=lambda id_: (index.get(gpu_of(id_), len(index)), len(id_), id_))


# ---- whose is what was handed? ----


def settle(scene: Scene, asked_at: float, now: float) -> tuple[Held, ...]:
    """What was handed, agreed with a list that the kubelet was asked for at `asked_at`.

    The kubelet's ids say whose a device is: where another container than was thought counts them, it is that one's. A
    record of a pod that neither service nor kubelet knows any more goes. Ids that no record explains (an agent without
    its file, a plugin before this one) are taken as they read.
    """
    kubelet = scene.kubelet
    if kubelet is None:
        return scene.held
    scene = replace(scene, held=with_uids(scene.held, scene.pods))
    uids = {(pod.namespace, pod.name): pod.uid for pod in scene.pods}
    shown = {place: ids for place, ids in kubelet.places() if is_ours(place.resource)}
    explained = {one.place for one in scene.held if _explains(one, shown, uids) or one.since >= asked_at}
    orphans = {(place.resource, frozenset(ids)): place for place, ids in shown.items() if place not in explained}
    kept: list[Held] = []
    for one in scene.held:
        owner = None
        if one.since < asked_at and not _explains(one, shown, uids):
            owner = orphans.pop((one.resource, frozenset(one.ids)), None)
        if owner is not None:
            kept.append(_moved(one, owner, scene))
        elif not one.uid and _explains(one, shown, uids):
            kept.append(_moved(one, one.place, scene))
        elif (
            one.since >= asked_at
            or _is_known(one, scene, uids)
            or (not one.name and now - one.since < NAMELESS_SECONDS)
        ):
            kept.append(one)
    known = {one.place for one in kept}
    adopted = (_adopted(place, shown[place], scene) for place in orphans.values() if place not in known)
    return tuple(sorted((*kept, *(one for one in adopted if one is not None)), key=by_name))


def _explains(one: Held, shown: Mapping[Place, Ids], uids: Mapping[tuple[str, str], str]) -> bool:
    """Whether the kubelet shows just this, of the pod that was handed it: where the service names a later pod of that
    name, the kubelet has not heard of that one yet, unless it has asked again meanwhile."""
    current = uids.get((one.namespace, one.name), "")
    is_its = not current or not one.uid or current == one.uid or not one.again
    return is_its and set(shown.get(one.place, ())) == set(one.ids)


def _is_known(one: Held, scene: Scene, uids: Mapping[tuple[str, str], str]) -> bool:
    """Whether the service or the kubelet still knows the pod. The kubelet knows names: of two pods with one name it has
    the later one as soon as that one has been handed something. A container that it lists without devices has none,
    unless the service knows better.
    """
    current = uids.get((one.namespace, one.name), one.uid)
    containers = scene.containers(one.namespace, one.name) or {}
    counted = containers.get(one.container, {}).get(one.resource, ())
    if counted and set(counted) != set(one.ids) and current == one.uid:
        return False  # this container has something else, so that was handed to somebody taken for it
    if any(pod.uid == one.uid for pod in scene.pods):
        return True
    if one.uid and current != one.uid and (one.again or any(each.uid == current for each in scene.held)):
        return False
    siblings = [each for each in scene.held if one.uid and each.uid == one.uid and each.container in containers]
    shown = [one] if one.container in containers else siblings  # an init container's: while the others' are
    return any(set(containers[each.container].get(each.resource, ())) == set(each.ids) for each in shown)


def _uid_at(place: Place, size: int, scene: Scene) -> str:
    """The UID of the pod that the kubelet shows there. One that asks for something else had the name before it."""
    asks = {
        pod.uid: any(
            ask.name == place.container and ask.resources.get(place.resource) == size for ask in pod.containers
        )
        for pod in scene.pods
        if (pod.namespace, pod.name) == (place.namespace, place.name)
    }
    return next((uid for uid in reversed(asks) if asks[uid]), "")


def _moved(one: Held, owner: Place, scene: Scene) -> Held:
    return one.model_copy(
        update={
            "uid": _uid_at(owner, len(one.ids), scene),
            "namespace": owner.namespace,
            "name": owner.name,
            "container": owner.container,
            "again": False,
        }
    )


def with_uids(held: tuple[Held, ...], pods: Iterable[PodAt]) -> tuple[Held, ...]:
    """The service names some pods only after they were handed devices: it is who has the name, and has just those."""
    named = {(pod.namespace, pod.name): pod for pod in pods}
    return tuple(_with_uid(one, named.get((one.namespace, one.name))) for one in held)


def _with_uid(one: Held, pod: PodAt | None) -> Held:
    if one.uid or pod is None or not set(one.devices) <= set(pod.devices):
        return one
    return one.model_copy(update={"uid": pod.uid})


def _adopted(place: Place, ids: Ids, scene: Scene) -> Held | None:
    try:
        devices = devices_of(place.resource, ids, scene.report)
    except ValueError:
        devices = observed(ids, scene.report)
    if not devices:
        return None
    return Held(
        uid=_uid_at(place, len(ids), scene),
        namespace=place.namespace,
        name=place.name,
        container=place.container,
        resource=place.resource,
        devices=devices,
        ids=ids,
        how="observed",
    )


def by_name(one: Held) -> tuple[str, ...]:
    """The order of the report."""
    return (one.namespace, one.name, one.container, one.resource, one.uid, *one.ids[:1])


# ---- placements ----


def exchanged(pods: Iterable[PodAt], uid: str, give: Devices, take: Devices) -> tuple[PodAt, ...]:
    """The list after an exchange that it does not show yet; the same where it does."""
    return tuple(_with_exchange(pod, give, take) if pod.uid == uid else pod for pod in pods)


def _with_exchange(pod: PodAt, give: Devices, take: Devices) -> PodAt:
    if not set(give) <= set(pod.devices) or set(take) <= set(pod.devices):
        return pod
    return pod.model_copy(update={"devices": (*(one for one in pod.devices if one not in give), *take)})


def in_first_seen_order(pods: Iterable[PodAt], before: Iterable[PodAt]) -> tuple[PodAt, ...]:
    """Those that were known longer come first: pods are bound, and mostly admitted, in that order."""
    place = {pod.uid: number for number, pod in enumerate(before)}
    return tuple(sorted(pods, key=lambda pod: place.get(pod.uid, len(place))))


# ---- another device plugin's ids ----


def observed(ids: Iterable[str], report: NodeReport) -> Devices:
    """What NVIDIA's own plugin's ids stand for: UUIDs of GPUs and of MIG devices, and `uuid::n` for a replica of one.

    A replica is all of its device: time-slicing keeps nobody from using the whole of it. Ids that the report does not
    have (a slice made just now) are left out until it has.
    """
    devices = {gpu.uuid: DeviceAt(gpu=gpu.uuid) for gpu in report.gpus}
    for gpu in report.gpus:
        for one in gpu.mig.instances if gpu.mig is not None else ():
            for uuid in (one.uuid, *(compute.uuid for compute in one.compute)):
                if uuid and one.start is not None:
                    devices[uuid] = DeviceAt(gpu=gpu.uuid, profile=one.profile, start=one.start)
    found = (devices.get(id_.partition("::")[0]) for id_ in ids)
    return tuple(dict.fromkeys(device for device in found if device is not None))


# ---- words ----


def _of(match: Match) -> str:
    return f"container {match.container} of {match.pod.namespace}/{match.pod.name}"


def _held_words(one: Held) -> str:
    return f"{one.namespace}/{one.name} ({one.container})" if one.name else "a pod that nobody has named yet"


def _device_words(devices: Devices) -> str:
    def word(device: DeviceAt) -> str:
        return f"{device.gpu}:{device.milli}m" if device.milli else id_of(device)

    return ", ".join(map(word, devices[:4])) + (" and others" if len(devices) > 4 else "")
