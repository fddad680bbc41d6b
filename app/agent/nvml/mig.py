"""MIG on one GPU, as it is: mode, profiles with their legal places, instances, and what an operator must do.

Profiles and places are NVML's own, never derived from a name. The privileged see every GPU instance and where it is;
without privileges only instances with a MIG device are seen, without their places.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import byref, c_uint
from dataclasses import dataclass
from typing import Any

import pynvml

from app.agent.nvml.device import A_WHILE_SECONDS, Device, text, words
from app.agent.nvml.gpu import pods_of, processes_on
from app.agent.pods import Pods
from app.report import ComputeInstance, Instance, Mig, Placement, Process, Profile

PROFILE_ENUMS = 64
"""GPU instance profile enums to try. NVML ends the list with INVALID_ARGUMENT (after 17 now, fewer in older
drivers), so a larger number costs nothing and sees what newer drivers add."""
MAX_PLACEMENTS = 64
FIELD_SWITCHES = 184  # whether the mode changes without a reset
SWITCHING = range(pynvml.NVML_DEVICE_ARCH_HOPPER, pynvml.NVML_DEVICE_ARCH_HOPPER + 100)
"""Architectures whose mode changes without a reset, for drivers that do not have the field: Hopper and later."""


@dataclass(frozen=True, slots=True)
class GpuInstance:
    """A GPU instance as NVML lists it to the privileged, with the handle that changes it."""

    handle: Any
    profile: Profile
    gi_id: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class MigDevice:
    """A compute instance as everybody may see it: the MIG device."""

    handle: Any
    gi_id: int
    ci_id: int
    uuid: str


def read_mig(device: Device, pods: Pods) -> Mig | None:
    """Everything about MIG on this GPU; None on boards without it."""
    mode = mode_of(device)
    if mode is None:
        return None
    enabled, pending = mode
    known = profiles_of(device, enabled=enabled)
    switches = switches_without_reset(device)
    return Mig(
        enabled=enabled,
        pending=pending,
        switches=switches,
        note=note(device.bus_id, enabled=enabled, pending=pending, switches=switches),
        profiles=known,
        instances=_instances(device, known, pods) if enabled else (),
    )


def mode_of(device: Device) -> tuple[bool, bool] | None:
    """Whether MIG is on now, and after the next reset; None on boards without it."""
    if not device.keep("MIG capable", lambda: _mode(device) is not None):
        return None
    return _mode(device)


def _mode(device: Device) -> tuple[bool, bool] | None:
    mode = device.ask("MIG mode", pynvml.nvmlDeviceGetMigMode, device.handle)
    return None if mode is None else (mode[0] == 1, mode[1] == 1)


def switches_without_reset(device: Device) -> bool:
    """Whether the mode can be changed on a running node."""
    return device.keep("MIG without reset", lambda: _switches(device))


def _switches(device: Device) -> bool:
    (said,) = device.fields("MIG without reset", FIELD_SWITCHES)
    if said is not None:
        return said == 1
    return device.keep_asking("architecture", pynvml.nvmlDeviceGetArchitecture) in SWITCHING


def note(pci: str, *, enabled: bool, pending: bool, switches: bool) -> str:
    """What an operator must do before the mode can be other than it is; empty where nothing."""
    if pending != enabled:
        turned = "on" if pending else "off"
        return f"MIG goes {turned} when this GPU is reset: drain the node, stop what else uses the GPU, {_reset(pci)}"
    if not enabled and not switches:
        return f"MIG is off, and this board needs a reset for it: {by_hand(pci, enabled=True)}"
    return ""


def by_hand(pci: str, *, enabled: bool) -> str:
    """How an operator turns MIG on or off on a board that needs a reset for it."""
    return f"drain the node, stop what else uses the GPU, nvidia-smi -i {pci} -mig {int(enabled)}, {_reset(pci)}"


def _reset(pci: str) -> str:
    return f"nvidia-smi --gpu-reset -i {pci} (in a virtual machine: reboot it)"


# ---- what can be made ----


def profiles_of(device: Device, *, enabled: bool) -> tuple[Profile, ...]:
    """The board's profiles and their legal places, asked for once in each mode."""
    known, device.privileged = device.keep("MIG profiles", lambda: _read_profiles(device), given=enabled)
    return known


def _read_profiles(device: Device) -> tuple[tuple[Profile, ...], bool | None]:
    """With whether the privileged part was answered. The getter takes NVML's enum; what it gives has the hardware id.

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
                name=text(info.name).removeprefix("MIG "),
                id=info.id,
                compute_slices=info.sliceCount,
                memory_mib=info.memorySizeMB,
                placements=_placements(device, info.id),
                engines=_engines(info),
                max_instances=info.instanceCount,
            )
        )
    return tuple(profiles), device.privileged


def _placements(device: Device, profile_id: int) -> tuple[Placement, ...]:
    """Every placement the profile ever allows, free or not; empty without privileges."""
    count = c_uint(MAX_PLACEMENTS)
    array = (pynvml.c_nvmlGpuInstancePlacement_t * MAX_PLACEMENTS)()
    call = pynvml.nvmlDeviceGetGpuInstancePossiblePlacements
    if device.ask_privileged("MIG placements", call, device.handle, profile_id, array, byref(count)) is None:
        return ()
    return tuple(Placement(start=array[i].start, size=array[i].size) for i in range(count.value))


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


# ---- what exists ----


def gpu_instances(device: Device, profiles: tuple[Profile, ...]) -> list[GpuInstance]:
    """Every GPU instance, with or without a compute instance in it; empty without privileges."""
    return [instance for profile in profiles for instance in _instances_of(device, profile)]


def _instances_of(device: Device, profile: Profile) -> Iterator[GpuInstance]:
    room = max(profile.max_instances, 1)
    count = c_uint(room)
    array = (pynvml.c_nvmlGpuInstance_t * room)()
    call = pynvml.nvmlDeviceGetGpuInstances
    if device.ask_privileged("MIG instances", call, device.handle, profile.id, array, byref(count)) is None:
        return
    for i in range(count.value):
        info = device.ask("MIG instance", pynvml.nvmlGpuInstanceGetInfo, array[i])
        if info is not None:  # None: destroyed while we looked
            yield GpuInstance(array[i], profile, info.id, info.placement.start, info.placement.size)


def _instances(device: Device, profiles: tuple[Profile, ...], pods: Pods) -> tuple[Instance, ...]:
    """The GPU instances that exist, by id."""
    seen: dict[int, list[MigDevice]] = {}
    for mig_device in _mig_devices(device):
        seen.setdefault(mig_device.gi_id, []).append(mig_device)
    listed = {instance.gi_id: instance for instance in gpu_instances(device, profiles)}
    return tuple(
        _instance(device, gi_id, listed.get(gi_id), seen.get(gi_id, []), profiles, pods)
        for gi_id in sorted(listed.keys() | seen.keys())
    )


def _instance(
    device: Device,
    gi_id: int,
    listed: GpuInstance | None,
    devices: list[MigDevice],
    profiles: tuple[Profile, ...],
    pods: Pods,
) -> Instance:
    processes: dict[int, Process] = {}
    for mig_device in devices:
        processes |= {process.pid: process for process in processes_on(device, mig_device.handle, pods)}
    everyone = tuple(processes[pid] for pid in sorted(processes))
    return Instance(
        profile=listed.profile.name if listed else _profile_name(device, devices[0].handle, profiles),
        gi_id=gi_id,
        start=listed.start if listed else None,
        size=listed.size if listed else None,
        uuid=devices[0].uuid or None if devices else None,
        pods=pods_of(everyone),
        compute=tuple(
            _compute(device, mig_device, listed) for mig_device in sorted(devices, key=lambda found: found.ci_id)
        ),
        processes=everyone,
    )


def _mig_devices(device: Device) -> list[MigDevice]:
    """The MIG devices in order of index. Indices may have holes."""
    found = []
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
        ci_id = device.ask("MIG device's compute instance", pynvml.nvmlDeviceGetComputeInstanceId, handle)
        uuid = device.ask("MIG device's UUID", pynvml.nvmlDeviceGetUUID, handle)
        if gi_id is not None:
            found.append(MigDevice(handle, gi_id, ci_id or 0, text(uuid)))
    return found


def _compute(device: Device, mig_device: MigDevice, listed: GpuInstance | None) -> ComputeInstance:
    """Its size and place are kept for a while: they cost three calls, and only change with its UUID or its place."""
    slices, start = device.keep(
        f"compute instance {mig_device.gi_id}/{mig_device.ci_id}",
        lambda: (_compute_slices(device, mig_device), _compute_start(device, mig_device, listed)),
        seconds=A_WHILE_SECONDS,
        given=(mig_device.uuid, listed.start if listed else None),
    )
    return ComputeInstance(id=mig_device.ci_id, slices=slices, start=start, uuid=mig_device.uuid or None)


def _compute_slices(device: Device, mig_device: MigDevice) -> int:
    attributes = device.ask("MIG device's attributes", pynvml.nvmlDeviceGetAttributes, mig_device.handle)
    return 0 if attributes is None else int(attributes.computeInstanceSliceCount)


def _compute_start(device: Device, mig_device: MigDevice, listed: GpuInstance | None) -> int | None:
    if listed is None:
        return None
    find, read = pynvml.nvmlGpuInstanceGetComputeInstanceById, pynvml.nvmlComputeInstanceGetInfo
    compute = device.ask_privileged("compute instance", find, listed.handle, mig_device.ci_id)
    info = None if compute is None else device.ask_privileged("compute instance", read, compute)
    return None if info is None else int(info.placement.start)


def _profile_name(device: Device, handle: Any, profiles: tuple[Profile, ...]) -> str:
    """The profile of an instance of which only a MIG device may be seen: by the device's name, else by its size."""
    name = device.ask("MIG device's name", pynvml.nvmlDeviceGetName, handle)
    label = text(name).rpartition(" MIG ")[2]
    part, dot, rest = label.partition("c.")
    if dot and part.isdigit():  # "1c.3g.20gb": a compute instance that has a part of its GPU instance
        label = rest
    if label in {profile.name for profile in profiles}:
        return label
    size = device.ask("MIG device's attributes", pynvml.nvmlDeviceGetAttributes, handle)
    alike = [
        profile.name
        for profile in profiles
        if size is not None
        and (profile.compute_slices, profile.memory_mib) == (size.gpuInstanceSliceCount, size.memorySizeMB)
    ]
    return alike[0] if alike else label or "unknown"
