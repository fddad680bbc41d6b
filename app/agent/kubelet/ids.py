"""Device ids as the kubelet counts them: one id is one real thing (docs/decisions/0009). No gRPC and no decisions.

```
nvidia.com/gpu               GPU-…               the GPU's UUID
nvidia.com/mig-1g.10gb.me    GPU-…/1g.10gb.me@3  a place for a slice, made already or not; '+' spelled as '.'
tangram.gpu/share            GPU-…::17           one of a GPU's whole GiB
tangram.gpu/share-milli      GPU-…::801          one of a GPU's thousandths
```
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from app.report import DeviceAt, Gpu, Mig, NodeReport

GPU_RESOURCE = "nvidia.com/gpu"
MIG_RESOURCE_PREFIX = "nvidia.com/mig-"
SHARE_RESOURCE = "tangram.gpu/share"
SHARE_MILLI_RESOURCE = "tangram.gpu/share-milli"
# The names are `translate`'s, which imports the solver; an agent would carry OR-Tools for four words.

GPU_MILLI = 1000
MIB_PER_GIB = 1024
LONGEST_ID = 63
"""The device plugin API's limit. A GPU's UUID has 40 characters, the longest profile known 14."""


@dataclass(frozen=True, slots=True)
class Offered:
    """One device id as ListAndWatch says it. `numa` is None where the GPU's NUMA node is not known."""

    id: str
    healthy: bool
    numa: int | None


# ---- names ----


def resource_of(device: DeviceAt) -> str:
    """The resource that a pod asks for to get this device; for a share the one in thousandths, whatever was asked."""
    if device.milli:
        return SHARE_MILLI_RESOURCE
    return MIG_RESOURCE_PREFIX + _as_asked(device.profile) if device.profile else GPU_RESOURCE


def id_of(device: DeviceAt) -> str:
    """The device's id. Raises ValueError for a share, which has an id for each of its parts, and for one too long."""
    if device.milli:
        raise ValueError(f"{device.milli} thousandths of {device.gpu} have as many device ids")
    found = f"{device.gpu}/{_as_asked(device.profile)}@{device.start}" if device.profile else device.gpu
    if len(found) > LONGEST_ID:
        raise ValueError(f"{found} has {len(found)} characters; the kubelet takes {LONGEST_ID}")
    return found


def gpu_of(id_: str) -> str:
    """The UUID of the GPU that an id is about, whether it is there or not."""
    return id_.partition("/")[0].partition("::")[0]


def _as_asked(profile: str) -> str:
    return profile.replace("+", ".")


# ---- ids to devices ----


def devices_of(resource: str, ids: Sequence[str], report: NodeReport) -> tuple[DeviceAt, ...]:
    """What the ids stand for on this node, in their order; the ids of a share become one device per GPU.

    Raises ValueError, in words, where one is no id of this resource, of a GPU that the report does not have, or of a
    place that the board does not have.
    """
    gpus = {gpu.uuid: gpu for gpu in report.gpus}
    if resource in (SHARE_RESOURCE, SHARE_MILLI_RESOURCE):
        return _shares(resource, ids, gpus)
    read = _whole if resource == GPU_RESOURCE else _slice
    return tuple(read(resource, id_, gpus) for id_ in ids)


def _whole(resource: str, id_: str, gpus: Mapping[str, Gpu]) -> DeviceAt:
    return DeviceAt(gpu=_known(resource, id_, id_, gpus).uuid)


def _slice(resource: str, id_: str, gpus: Mapping[str, Gpu]) -> DeviceAt:
    uuid, slash, place = id_.partition("/")
    asked, at, _ = place.rpartition("@")
    if not (slash and at) or resource != MIG_RESOURCE_PREFIX + asked:
        raise ValueError(f"{id_!r} is no device id of {resource}")
    mig = _known(resource, id_, uuid, gpus).mig
    for profile, start in _places(mig) if mig is not None else ():
        if place == f"{_as_asked(profile)}@{start}":
            return DeviceAt(gpu=uuid, profile=profile, start=start)
    raise ValueError(f"{id_!r} of {resource}: the board has no such place")


def _shares(resource: str, ids: Sequence[str], gpus: Mapping[str, Gpu]) -> tuple[DeviceAt, ...]:
    counts: dict[str, int] = {}
    for id_ in ids:
        uuid, colons, number = id_.partition("::")
        if not (colons and _is_number(number)):
            raise ValueError(f"{id_!r} is no device id of {resource}")
        parts = _parts(resource, _known(resource, id_, uuid, gpus))
        if int(number) >= parts:
            raise ValueError(f"{id_!r} of {resource}: the GPU has {parts} of them")
        counts[uuid] = counts.get(uuid, 0) + 1
    return tuple(DeviceAt(gpu=uuid, milli=_milli(resource, count, gpus[uuid])) for uuid, count in counts.items())


def _milli(resource: str, count: int, gpu: Gpu) -> int:
    """Thousandths, rounded up as the service rounds memory that is asked for."""
    return count if resource == SHARE_MILLI_RESOURCE else -(-count * MIB_PER_GIB * GPU_MILLI // gpu.memory_mib)


def _known(resource: str, id_: str, uuid: str, gpus: Mapping[str, Gpu]) -> Gpu:
    if uuid not in gpus:
        raise ValueError(f"{id_!r} of {resource}: this node has no such GPU")
    return gpus[uuid]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 4 and text == str(int(text))


# ---- what is offered ----


def offered(
    report: NodeReport, either: Collection[str], *, share_resources: bool = False
) -> dict[str, tuple[Offered, ...]]:
    """Every id of this node by resource, in order of GPU and place; a resource without ids is not there.

    More than can exist at once: the places of a board overlap, and so do a GPU and its places where the service may
    switch the mode (`either`). The ledger keeps them apart. Nothing is healthy while NVML does not answer.
    """
    found: dict[str, list[Offered]] = {}
    for gpu in sorted(report.gpus, key=lambda gpu: gpu.index):
        healthy = gpu.health != "bad" and not report.error
        numa = None if gpu.numa is None or gpu.numa < 0 else gpu.numa
        for resource, id_ in _ids(gpu, gpu.uuid in either, report.makes_slices is not False, share_resources):
            if len(id_) <= LONGEST_ID:
                found.setdefault(resource, []).append(Offered(id_, healthy, numa))
    return {resource: tuple(ids) for resource, ids in found.items()}


def _ids(gpu: Gpu, either: bool, made: bool, shares: bool) -> Iterator[tuple[str, str]]:
    """The resource and id of each device of one GPU. `made`: slices are made there, so every legal place counts."""
    cut = gpu.mig is not None and gpu.mig.enabled
    if not cut or either:
        yield GPU_RESOURCE, gpu.uuid
    if gpu.mig is not None and (cut or either):
        places = _legal(gpu.mig) if made else _existing(gpu.mig)
        for asked, start in dict.fromkeys((_as_asked(profile), start) for profile, start in places):
            yield MIG_RESOURCE_PREFIX + asked, f"{gpu.uuid}/{asked}@{start}"
    if shares and not cut:
        for resource in (SHARE_RESOURCE, SHARE_MILLI_RESOURCE):
            for number in range(_parts(resource, gpu)):
                yield resource, f"{gpu.uuid}::{number}"


def _places(mig: Mig) -> Iterator[tuple[str, int]]:
    yield from _legal(mig)
    yield from _existing(mig)


def _legal(mig: Mig) -> Iterator[tuple[str, int]]:
    """Every place of every profile that the board could be cut into."""
    for profile in mig.profiles:
        for start in sorted(placement.start for placement in profile.placements):
            yield profile.name, start


def _existing(mig: Mig) -> Iterator[tuple[str, int]]:
    """The places of the instances that a container could have now; one whose place is not seen cannot be promised."""
    for instance in mig.instances:
        if instance.uuid and instance.start is not None:
            yield instance.profile, instance.start


def _parts(resource: str, gpu: Gpu) -> int:
    """How many ids a GPU has of a share resource."""
    return GPU_MILLI if resource == SHARE_MILLI_RESOURCE else gpu.memory_mib // MIB_PER_GIB
