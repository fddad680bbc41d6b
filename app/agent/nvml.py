"""Reads one node's facts through NVML. The only file that imports pynvml.

    Nvml().read() ──▶ Reading

A failure that concerns one GPU is caught at that GPU and said in words; the others are read. A symbol that the
library lacks means an old driver: the fact stays unknown and the reading goes on. Calls may block for ever in a
wedged driver and Python cannot interrupt them, so this runs in a process of its own (`child`). Struct
versions and rules follow nvml.h 13.3; what NVML calls MB is MiB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from ctypes import byref, c_uint
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pynvml

from app.agent.pods import Pods
from app.agent.reading import Reading, Unreadable
from app.report import Gpu, Instance, Link, Mig, Placement, Profile

log = logging.getLogger(__name__)

Common = Literal["internal", "single", "multiple", "hostbridge", "node", "system"]

ARCHITECTURES = {
    pynvml.NVML_DEVICE_ARCH_KEPLER: "kepler",
    pynvml.NVML_DEVICE_ARCH_MAXWELL: "maxwell",
    pynvml.NVML_DEVICE_ARCH_PASCAL: "pascal",
    pynvml.NVML_DEVICE_ARCH_VOLTA: "volta",
    pynvml.NVML_DEVICE_ARCH_TURING: "turing",
    pynvml.NVML_DEVICE_ARCH_AMPERE: "ampere",
    pynvml.NVML_DEVICE_ARCH_ADA: "ada",
    pynvml.NVML_DEVICE_ARCH_HOPPER: "hopper",
    pynvml.NVML_DEVICE_ARCH_BLACKWELL: "blackwell",
    13: "rubin",  # older pynvml has no name for it
}
ANCESTORS: dict[int, Common] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "internal",
    pynvml.NVML_TOPOLOGY_SINGLE: "single",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "multiple",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "hostbridge",
    pynvml.NVML_TOPOLOGY_NODE: "node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "system",
}
REMOTE_GPU = 0
REMOTE_SWITCH = 2
REMOTE_UNKNOWN = 255  # virtual machines hide the switches
FIELD_LINK_SPEED = 164  # per link (scope), MB/s each way
FIELD_COMMON_SPEED = 90
NVLINK_GBS_EACH_WAY = {"pascal": 20.0, "volta": 25.0, "ampere": 25.0, "hopper": 25.0, "blackwell": 50.0}
"""Nominal GB/s each way of one link, where the driver does not tell the speed."""

PROFILE_ENUMS = 64
"""GPU instance profile enums to try. NVML ends the list with INVALID_ARGUMENT (after 17 now, fewer in older
drivers), so a larger number costs nothing and sees what newer drivers add."""
MAX_PLACEMENTS = 64
MEMORY_AFFINITY_WORDS = 16  # 1,024 NUMA nodes, as many as Linux has
AFFINITY_SCOPE_NODE = 0

ABSENT = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
"""The board or the driver does not have this; nothing is wrong."""


@dataclass(frozen=True, slots=True)
class NvLinks:
    """One GPU's active NVLinks: how many lead to each GPU (by bus id), how many to switches, nominal GB/s each way."""

    to_gpu: dict[str, int]
    to_switches: int
    gbs_each_way: float


@dataclass(slots=True)
class _Device:
    """A GPU while it is being read: its handle, who it is, and what could not be read about it."""

    handle: Any
    uuid: str
    bus_id: str
    notes: list[str] = field(default_factory=list)
    sees_processes: bool = True

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's answer, or None where board or driver lack it, or where it failed (then noted in words).

        Raises NVMLError when the GPU is lost: nothing else about it can be read.
        """
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value not in ABSENT:
                self.notes.append(f"{what}: {words(error)}")
            return None


class Nvml:
    """A session with NVML that reads the node again and again.

    `proc` and `sys` are where the host's /proc and /sys are seen. What is costly and does not change is asked
    once per GPU and kept: NVLink ends (about 33 ms per link on real boards) and PCIe ancestors. A GPU whose MIG mode
    has changed is asked again, since MIG ends peer-to-peer.
    """

    def __init__(self, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self._sys = sys
        self._pods = Pods(proc)
        self._open = False
        self._nvlinks: dict[tuple[str, bool], NvLinks | None] = {}
        self._ancestors: dict[tuple[str, str], Common] = {}
        self._profiles: dict[tuple[str, bool], tuple[Profile, ...]] = {}

    def read(self) -> Reading:
        """Look at everything once. NVML failing as a whole is a reading with its `error` set, never an exception."""
        try:
            if not self._open:
                pynvml.nvmlInit()
                self._open = True
            return self._read()
        except pynvml.NVMLError as error:
            self.close()  # a driver that was reloaded, or replaced under us, wants a new session
            return Reading(error=f"NVML: {words(error)}")

    def close(self) -> None:
        """End the session and forget what was kept; the next `read` begins a new one."""
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.warning("NVML did not shut down: %s", words(error))
        self._nvlinks.clear()
        self._ancestors.clear()
        self._profiles.clear()

    def _read(self) -> Reading:
        gpus: list[Gpu] = []
        devices: list[_Device] = []
        unreadable: list[Unreadable] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                device, gpu = self._gpu(index)
            except pynvml.NVMLError as error:
                unreadable.append(Unreadable(index=index, reason=f"NVML: {words(error)}"))
            else:
                devices.append(device)
                gpus.append(gpu)
        links = self._links(devices, gpus)
        notes = {device.uuid: "; ".join(device.notes)[:500] for device in devices}
        return Reading(
            driver=_system("driver version", pynvml.nvmlSystemGetDriverVersion),
            nvml=_system("NVML version", pynvml.nvmlSystemGetNVMLVersion),
            cuda=_cuda(),
            sees_pods=self._pods.host_pids() and all(device.sees_processes for device in devices),
            gpus=tuple(gpu.model_copy(update={"health_reason": notes[gpu.uuid]}) for gpu in gpus),
            unreadable=tuple(unreadable),
            links=links,
        )

    # ---- one GPU ----

    def _gpu(self, index: int) -> tuple[_Device, Gpu]:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(pynvml.nvmlDeviceGetUUID(handle))
        pci = pynvml.nvmlDeviceGetPciInfo(handle)
        bus_id = _bus_id(pci.domain, pci.bus, pci.device)
        device = _Device(handle, uuid, bus_id)
        architecture = device.ask("architecture", pynvml.nvmlDeviceGetArchitecture, handle)
        capability = device.ask("compute capability", pynvml.nvmlDeviceGetCudaComputeCapability, handle)
        mig = self._mig(device)
        in_mig_mode = mig is not None and mig.enabled
        return device, Gpu(
            uuid=uuid,
            index=index,
            minor=device.ask("minor number", pynvml.nvmlDeviceGetMinorNumber, handle),
            product=_text(pynvml.nvmlDeviceGetName(handle)),
            architecture=ARCHITECTURES.get(architecture, "unknown"),
            compute_capability=f"{capability[0]}.{capability[1]}" if capability else "",
            memory_mib=_memory_mib(handle),
            pci=bus_id,
            numa=self._numa(device),
            mig=mig,
            pods=() if in_mig_mode else self._pods.of(_pids(device, handle)),
        )

    def _numa(self, device: _Device) -> int | None:
        """The CPU NUMA node nearest to the GPU: the driver's memory affinity, else sysfs.

        Not nvmlDeviceGetNumaNodeId, which is the GPU's own memory as a NUMA node (Grace only).
        """
        mask = device.ask(
            "memory affinity",
            pynvml.nvmlDeviceGetMemoryAffinity,
            device.handle,
            MEMORY_AFFINITY_WORDS,
            AFFINITY_SCOPE_NODE,
        )
        nodes = [64 * word + bit for word, bits in enumerate(mask or ()) for bit in range(64) if bits >> bit & 1]
        if len(nodes) == 1:
            return nodes[0]
        try:
            node = int((self._sys / "bus/pci/devices" / device.bus_id / "numa_node").read_text())
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None  # -1: the firmware does not say

    # ---- MIG ----

    def _mig(self, device: _Device) -> Mig | None:
        mode = device.ask("MIG mode", pynvml.nvmlDeviceGetMigMode, device.handle)
        if mode is None:
            return None
        enabled, pending = mode[0] == 1, mode[1] == 1
        known = self._profiles.get((device.uuid, enabled))
        if known is None:
            before = len(device.notes)
            known = self._read_profiles(device)
            if len(device.notes) == before:
                self._profiles[device.uuid, enabled] = known
        instances = self._instances(device, known) if enabled else ()
        return Mig(enabled=enabled, pending=pending, profiles=known, instances=instances)

    def _read_profiles(self, device: _Device) -> tuple[Profile, ...]:
        """The profiles of this board. The getter takes NVML's enum; what it gives has the hardware id.

        An enum the product lacks is NOT_SUPPORTED; INVALID_ARGUMENT is past the last that this driver knows.
        """
        profiles = []
        for number in range(PROFILE_ENUMS):
            try:
                info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device.handle, number, version=2)
            except pynvml.NVMLError as error:
                if error.value == pynvml.NVML_ERROR_NOT_SUPPORTED:
                    continue
                if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                    raise
                if error.value != pynvml.NVML_ERROR_INVALID_ARGUMENT:
                    device.notes.append(f"MIG profiles: {words(error)}")
                break
            profiles.append(
                Profile(
                    name=_text(info.name).removeprefix("MIG "),
                    id=info.id,
                    compute_slices=info.sliceCount,
                    memory_mib=info.memorySizeMB,
                    placements=_placements(device, info.id),
                    engines=_engines(info),
                    max_instances=info.instanceCount,
                )
            )
        return tuple(profiles)

    def _instances(self, device: _Device, profiles: tuple[Profile, ...]) -> tuple[Instance, ...]:
        """The GPU instances that exist, by id. Without privileges: those with a MIG device, without their places."""
        devices = _mig_devices(device)
        placed: dict[int, Instance] = {}
        for profile in profiles:
            for info in _gpu_instances(device, profile):
                start, size = info.placement.start, info.placement.size
                placed[info.id] = Instance(profile=profile.name, gi_id=info.id, start=start, size=size)
        for gi_id, handles in devices.items():
            found = placed.get(gi_id) or _unplaced(device, gi_id, handles[0], profiles)
            uuid = device.ask("MIG device's UUID", pynvml.nvmlDeviceGetUUID, handles[0])
            pids = {pid for handle in handles for pid in _pids(device, handle)}
            placed[gi_id] = found.model_copy(
                update={"uuid": _text(uuid) if uuid else None, "pods": self._pods.of(pids)}
            )
        return tuple(placed[gi_id] for gi_id in sorted(placed))

    # ---- links ----

    def _links(self, devices: list[_Device], gpus: list[Gpu]) -> tuple[Link, ...]:
        """Every pair that is closer than across the sockets or has NVLink, in index order."""
        nvlinks: list[NvLinks | None] = []
        bus_ids = {device.bus_id for device in devices}
        for device, gpu in zip(devices, gpus, strict=True):
            nvlinks.append(self._nvlinks_of(device, gpu, bus_ids))
        links = []
        for i, a in enumerate(devices):
            for j in range(i + 1, len(devices)):
                b = devices[j]
                count, gbs = _between(a, nvlinks[i], b, nvlinks[j])
                pcie = self._ancestor(a, b)
                if count or pcie != "system":
                    links.append(Link(a=a.uuid, b=b.uuid, nvlinks=count, gbs=gbs, pcie=pcie))
        return tuple(links)

    def _nvlinks_of(self, device: _Device, gpu: Gpu, bus_ids: set[str]) -> NvLinks | None:
        key = (device.uuid, gpu.mig is not None and gpu.mig.enabled)
        if key not in self._nvlinks:
            before = len(device.notes)
            try:
                found = _read_nvlinks(device, bus_ids, gpu.architecture)
            except pynvml.NVMLError as error:  # lost while we looked; the next reading says so
                device.notes.append(f"NVLink: {words(error)}")
                return None
            if len(device.notes) > before:
                return found  # not kept: a failure may pass
            self._nvlinks[key] = found
        return self._nvlinks[key]

    def _ancestor(self, a: _Device, b: _Device) -> Common:
        key = (a.uuid, b.uuid)
        if key not in self._ancestors:
            try:
                level = a.ask("PCIe path", pynvml.nvmlDeviceGetTopologyCommonAncestor, a.handle, b.handle)
            except pynvml.NVMLError:
                level = None
            if level is None:
                return "system"
            self._ancestors[key] = ANCESTORS.get(level, "system")
        return self._ancestors[key]


def _read_nvlinks(device: _Device, bus_ids: set[str], architecture: str) -> NvLinks | None:
    to_gpu: dict[str, int] = {}
    to_switches = 0
    first_active: int | None = None
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            active = pynvml.nvmlDeviceGetNvLinkState(device.handle, link)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value not in (*ABSENT, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                device.notes.append(f"NVLink {link}: {words(error)}")
            break  # this board has no further link
        if not active:
            continue
        pci = device.ask(f"far end of NVLink {link}", pynvml.nvmlDeviceGetNvLinkRemotePciInfo, device.handle, link)
        far = _bus_id(pci.domain, pci.bus, pci.device) if pci is not None else ""
        kind = device.ask("kind of NVLink's far end", pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, device.handle, link)
        if far in bus_ids:
            to_gpu[far] = to_gpu.get(far, 0) + 1
        elif kind in (REMOTE_SWITCH, REMOTE_UNKNOWN, None):
            to_switches += 1
        first_active = link if first_active is None else first_active
    if first_active is None:
        return None
    return NvLinks(to_gpu, to_switches, _link_gbs_each_way(device, first_active, architecture))


def _link_gbs_each_way(device: _Device, link: int, architecture: str) -> float:
    """Nominal speed of one link. NVML gives the signalling rate (25.781, 26.562, 53.125): steps of 25 are nominal."""
    fields = [(FIELD_LINK_SPEED, link), (FIELD_COMMON_SPEED, 0)]
    values = device.ask("NVLink speed", pynvml.nvmlDeviceGetFieldValues, device.handle, fields)
    for value in values or ():
        if value.nvmlReturn == pynvml.NVML_SUCCESS and value.value.uiVal:
            gbs = float(value.value.uiVal) / 1000
            return gbs if gbs < 25 else 25.0 * (gbs // 25)
    return NVLINK_GBS_EACH_WAY.get(architecture, 25.0)


def _between(a: _Device, of_a: NvLinks | None, b: _Device, of_b: NvLinks | None) -> tuple[int, int]:
    """NVLinks between two GPUs and their GB/s both ways.

    Direct links count where both ends list them. Through switches a pair can use every link of the GPU that has
    fewer (as nvidia-smi counts; all of a GPU's links are shared by its peers).
    """
    if of_a is None or of_b is None:
        return 0, 0
    direct = min(of_a.to_gpu.get(b.bus_id, 0), of_b.to_gpu.get(a.bus_id, 0))
    count = direct + min(of_a.to_switches, of_b.to_switches)
    return count, int(2 * count * min(of_a.gbs_each_way, of_b.gbs_each_way))


def _placements(device: _Device, profile_id: int) -> tuple[Placement, ...]:
    """Every placement the profile ever allows, free or not; empty without privileges."""
    count = c_uint(MAX_PLACEMENTS)
    array = (pynvml.c_nvmlGpuInstancePlacement_t * MAX_PLACEMENTS)()
    call = pynvml.nvmlDeviceGetGpuInstancePossiblePlacements
    if device.ask("MIG placements", _unless_forbidden, call, device.handle, profile_id, array, byref(count)) is None:
        return ()
    return tuple(Placement(start=array[i].start, size=array[i].size) for i in range(count.value))


def _gpu_instances(device: _Device, profile: Profile) -> list[Any]:
    """NVML's info of every GPU instance of a profile; empty without privileges."""
    room = max(profile.max_instances, 1)
    count = c_uint(room)
    array = (pynvml.c_nvmlGpuInstance_t * room)()
    call = pynvml.nvmlDeviceGetGpuInstances
    if device.ask("MIG instances", _unless_forbidden, call, device.handle, profile.id, array, byref(count)) is None:
        return []
    infos = [device.ask("MIG instance", pynvml.nvmlGpuInstanceGetInfo, array[i]) for i in range(count.value)]
    return [info for info in infos if info is not None]  # None: destroyed while we looked


def _unless_forbidden(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's answer; None where this agent is not privileged: it sees less, and nothing is wrong."""
    try:
        return call(*arguments)
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
            return None
        raise


def _mig_devices(device: _Device) -> dict[int, list[Any]]:
    """Handles of the MIG devices by GPU instance id, in order of index. Indices may have holes."""
    found: dict[int, list[Any]] = {}
    for index in range(device.ask("MIG device count", pynvml.nvmlDeviceGetMaxMigDeviceCount, device.handle) or 0):
        try:
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device.handle, index)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NOT_FOUND:
                continue
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            device.notes.append(f"MIG device {index}: {words(error)}")
            continue
        gi_id = device.ask("MIG device's instance", pynvml.nvmlDeviceGetGpuInstanceId, handle)
        if gi_id is not None:
            found.setdefault(gi_id, []).append(handle)
    return found


def _unplaced(device: _Device, gi_id: int, handle: Any, profiles: tuple[Profile, ...]) -> Instance:
    """An instance of which only its MIG device may be seen: the profile by the device's name, else by its size."""
    name = device.ask("MIG device's name", pynvml.nvmlDeviceGetName, handle)
    label = _text(name).rpartition(" MIG ")[2] if name else ""
    part, dot, rest = label.partition("c.")
    if dot and part.isdigit():  # "1c.3g.20gb": a compute instance that has a part of its GPU instance
        label = rest
    if label not in {profile.name for profile in profiles}:
        size = device.ask("MIG device's attributes", pynvml.nvmlDeviceGetAttributes, handle)
        alike = [
            profile.name
            for profile in profiles
            if size is not None
            and (profile.compute_slices, profile.memory_mib) == (size.gpuInstanceSliceCount, size.memorySizeMB)
        ]
        label = alike[0] if alike else label or "unknown"
    return Instance(profile=label, gi_id=gi_id)


def _engines(info: Any) -> dict[str, int]:
    """Media engines that one instance takes of the board; zero counts are left out.

    Not copy engines: NVIDIA's rules for what fits together name media engines only, and listings of one board
    disagree about copy engines (B200).
    """
    counts = {
        "decoder": info.decoderCount,
        "encoder": info.encoderCount,
        "jpeg": info.jpegCount,
        "ofa": info.ofaCount,
    }
    return {name: count for name, count in counts.items() if count}


def _pids(device: _Device, handle: Any) -> set[int]:
    """Processes on a GPU or MIG device: compute, graphics and MPS clients.

    A list that fails makes the device blind: that it has no processes must not be concluded. Boards and drivers
    may lack the lists of graphics and MPS clients, but not that of compute.
    """
    before = len(device.notes)
    compute = device.ask("processes", pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    graphics = device.ask("processes", pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle)
    mps = device.ask("processes", pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, handle)
    if compute is None or len(device.notes) > before:
        device.sees_processes = False
    return {process.pid for listed in (compute, graphics, mps) for process in listed or ()}


def _memory_mib(handle: Any) -> int:
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError as error:
        if error.value not in (*ABSENT, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH):
            raise
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total) >> 20


def _cuda() -> str:
    """NVML packs it as major * 1000 + minor * 10."""
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    except pynvml.NVMLError:
        return ""
    return f"{version // 1000}.{version % 1000 // 10}"


def _system(what: str, call: Callable[[], Any]) -> str:
    try:
        return _text(call())
    except pynvml.NVMLError as error:
        if error.value not in ABSENT:
            log.warning("%s: %s", what, words(error))
        return ""


def words(error: pynvml.NVMLError) -> str:
    """What NVML said, and its number for looking it up."""
    return f"{error} ({error.value})"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _bus_id(domain: int, bus: int, device: int) -> str:
    """As sysfs writes it: a domain of at least four hex digits, in small letters."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"
