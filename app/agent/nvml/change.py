"""Carries out an order list: switches modes, removes instances, makes instances; what failed is said in words.

    make P at S on G ── is there, with a compute instance ───────────────────────────────▶ done
                   │ is there without (an agent died between the two calls) ──────┐
                   └─ is not: remove what the order names ─▶ GPU instance at S ───┴─▶ compute instance ─▶ done
                                                                  ▲ destroyed again ──────┘ failed

Nothing that is not named is ever destroyed, and nothing that has a process. Creating always gives the place: NVML's
own choice would make what fits depend on the order. Members of one group are made together or not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from ctypes import byref, c_uint
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pynvml

from app.agent.nvml.device import Device, words
from app.agent.nvml.gpu import processes_on
from app.agent.nvml.mig import GpuInstance, by_hand, gpu_instances, mode_of, profiles_of, switches_without_reset
from app.agent.pods import Pods
from app.report import Failed, Make, OrderList, Profile, SliceAt, Switch

log = logging.getLogger(__name__)

COMPUTE_PROFILE_ENUMS = 32
"""Compute instance profile enums to try; NVML ends the list with INVALID_ARGUMENT (after 8 now)."""

SHARED_ENGINES = 0
MOST_COMPUTE_INSTANCES = 16  # in one GPU instance; 8 slices are the most there are
REMEDY = (
    "it can see and cannot change: NVML refuses the agent (Insufficient Permissions); "
    "give its container NVIDIA_MIG_CONFIG_DEVICES=all and CAP_SYS_ADMIN"
)
ACTIVATIONS = {
    pynvml.NVML_ERROR_RESET_REQUIRED: "the GPU must be reset first (in a virtual machine: reboot it)",
    pynvml.NVML_ERROR_IN_USE: "something on the node holds the GPU open (DCGM, an exporter, a device plugin)",
}


class Refused(Exception):
    """An order cannot be carried out, in words. It never leaves this file."""


@dataclass(frozen=True, slots=True)
class Made:
    """What one order has made in this turn, by the handles to remove exactly that again; None: it was there before."""

    order: Make
    gpu_instance: Any
    compute_instance: Any


@dataclass(slots=True)
class Group:
    """The orders for one pod so far, and why they cannot all be carried out (empty: they can, so far)."""

    orders: list[Make] = field(default_factory=list)
    made: list[Made] = field(default_factory=list)
    spoiled: str = ""


class Changer:
    """Carries out one list. `find` gives the GPUs that can be read by UUID, with fresh handles.

    `release` lets go of whatever of ours holds a GPU open, before its mode is switched. `forbidden` says afterwards in
    words that NVML has refused for want of privileges.
    """

    def __init__(self, *, find: Callable[[], dict[str, Device]], release: Callable[[], None], pods: Pods) -> None:
        self._find = find
        self._release = release
        self._pods = pods
        self._devices = find()
        self._wanted: frozenset[tuple[str, str, int]] = frozenset()
        self.forbidden = ""

    def carry_out(self, orders: OrderList) -> tuple[Failed, ...]:
        """Work through the list; nothing raises."""
        self._wanted = frozenset((make.gpu, make.profile, make.start) for make in orders.make)
        return (*self._all_switches(orders), *self._all_removals(orders), *self._all_makes(orders))

    def _all_switches(self, orders: OrderList) -> Iterator[Failed]:
        for switch in orders.switch:
            reason = self._try(partial(self._switch, switch))
            if reason:
                yield Failed(gpu=switch.gpu, reason=reason[:500])

    def _all_removals(self, orders: OrderList) -> Iterator[Failed]:
        for place in orders.remove:
            reason = self._try(partial(self._remove, place))
            if reason:
                yield _failed(place, reason)

    def _all_makes(self, orders: OrderList) -> Iterator[Failed]:
        groups: dict[str, Group] = {}
        for number, make in enumerate(orders.make):
            group = groups.setdefault(make.group or f" {number}", Group())
            group.orders.append(make)
            if not group.spoiled:
                reason = self._try(partial(self._make, make, group.made))
                if reason:
                    group.spoiled = reason + self._undo(group.made)
        for group in groups.values():
            if group.spoiled:
                yield from (_failed(make, group.spoiled) for make in group.orders)

    def _try(self, act: Callable[[], None]) -> str:
        """Why it failed, or nothing."""
        try:
            act()
        except (Refused, pynvml.NVMLError) as error:
            return _said(error)
        return ""

    def _do(self, doing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """One call, or a few, in the course of a change; a failure names what was being done. Raises Refused.

        Modes may be for others to switch (CAP_SYS_ADMIN) than instances to make (the mig/config capability).
        """
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                if call is not pynvml.nvmlDeviceSetMigMode:
                    self.forbidden = REMEDY
                raise Refused(f"{doing}: {REMEDY}") from error
            raise Refused(f"{doing}: {_said(error)}") from error

    # ---- one order ----

    def _make(self, make: Make, made: list[Made]) -> None:
        device = self._device(make.gpu)
        profile = self._profile(device, make)
        size = _size(profile, make.start)
        there = self._at(device, make)
        if there is not None:
            if not _computes(there.handle):
                made.append(Made(make, None, self._make_compute(make, profile, there.handle)))
            for place in make.remove:  # in the way of the GPU's other slices; this one is there whatever comes of it
                self._try(partial(self._remove, place))
            return
        for place in make.remove:
            self._remove(place)
        placement = pynvml.c_nvmlGpuInstancePlacement_t(make.start, size)
        create = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement
        try:
            handle = self._do(f"making {_where(make)}", create, device.handle, profile.id, byref(placement))
        except Refused as refused:
            raise Refused(f"{refused}; {self._what_is_there(device)}") from refused
        try:
            compute = self._make_compute(make, profile, handle)
        except Refused as refused:
            raise Refused(f"{refused}{self._undo([Made(make, handle, None)])}") from refused
        made.append(Made(make, handle, compute))
        log.info("made %s on %s", _where(make), make.gpu)

    def _make_compute(self, make: Make, profile: Profile, handle: Any) -> Any:
        """The compute instance that takes all of the GPU instance: with it there is a MIG device and a UUID."""
        doing = f"making the compute instance of {_where(make)}"
        found = self._do(doing, _compute_profiles, handle)
        whole = [info.id for info in found if info.sliceCount == profile.compute_slices]
        if not whole:
            sizes = ", ".join(str(info.sliceCount) for info in found)
            raise Refused(
                f"{_where(make)} takes no compute instance of {profile.compute_slices} slices (only {sizes or 'none'})"
            )
        return self._do(doing, pynvml.nvmlGpuInstanceCreateComputeInstance, handle, whole[0])

    def _undo(self, made: list[Made]) -> str:
        """Remove again what was made in this turn, and nothing else; what is left of it, in words."""
        left = []
        for one in reversed(made):
            computes = [] if one.compute_instance is None else [one.compute_instance]
            try:
                self._destroy(_where(one.order), computes, one.gpu_instance)
            except Refused as refused:
                left.append(f"; not removed again: {refused}")
        made.clear()
        return "".join(left)

    def _remove(self, place: SliceAt) -> None:
        """Remove exactly this instance, if it is there and nobody uses it or will."""
        if (place.gpu, place.profile, place.start) in self._wanted:
            raise Refused(f"{_where(place)} is to be there by the same list")
        device = self._device(place.gpu)
        there = self._at(device, place)
        if there is None:
            return
        computes = self._do(f"looking into {_where(place)}", _computes, there.handle)
        for compute in computes:
            self._refuse_if_used(device, pynvml.nvmlComputeInstanceGetInfo(compute).device, _where(place))
        self._destroy(_where(place), computes, there.handle)
        log.info("removed %s from %s", _where(place), place.gpu)

    def _destroy(self, where: str, computes: list[Any], gpu_instance: Any) -> None:
        for compute in computes:
            self._do(f"removing the compute instance of {where}", pynvml.nvmlComputeInstanceDestroy, compute)
        if gpu_instance is not None:
            self._do(f"removing {where}", pynvml.nvmlGpuInstanceDestroy, gpu_instance)

    def _switch(self, switch: Switch) -> None:
        device = self._device(switch.gpu)
        mode = self._mode(device)
        turned = "on" if switch.enabled else "off"
        if mode is None:
            raise Refused(f"MIG cannot be turned {turned}: this board has no MIG")
        enabled, _ = mode
        if enabled == switch.enabled:
            return
        if not switches_without_reset(device):
            do = by_hand(device.bus_id, enabled=switch.enabled)
            raise Refused(f"MIG cannot be turned {turned} on this board without a reset, an operator's to do: {do}")
        self._refuse_if_occupied(device, enabled=enabled)
        self._release()
        doing = f"turning MIG {turned}"
        status = self._do(doing, pynvml.nvmlDeviceSetMigMode, device.handle, int(switch.enabled))
        device.kept.clear()
        self._devices = self._find()  # the call may have reset the GPU: no handle of before is used again
        after = mode_of(self._device(switch.gpu))
        if status == pynvml.NVML_SUCCESS and after is not None and after[0] == switch.enabled:
            log.info("MIG is %s on %s", turned, switch.gpu)
            return
        why = ACTIVATIONS.get(status, f"the mode did not change (activation status {status})")
        raise Refused(f"{doing} did not take effect: {why}{self._put_back(switch.gpu, enabled=enabled)}")

    def _put_back(self, gpu: str, *, enabled: bool) -> str:
        """So that nothing changes by surprise at the next reset."""
        try:
            self._do("putting the mode back", pynvml.nvmlDeviceSetMigMode, self._device(gpu).handle, int(enabled))
        except Refused as refused:
            return f"; {refused}; it waits for the next reset"
        return "; it was put back"

    def _refuse_if_occupied(self, device: Device, *, enabled: bool) -> None:
        if not enabled:
            self._refuse_if_used(device, device.handle, "the GPU")
            return
        if self._instances(device):
            raise Refused(f"MIG cannot be turned off while there are instances: {self._what_is_there(device)}")

    # ---- what an order is about ----

    def _device(self, gpu: str) -> Device:
        device = self._devices.get(gpu)
        if device is None:
            raise Refused(f"no GPU {gpu} can be read on this node; there are {', '.join(self._devices) or 'none'}")
        return device

    def _profile(self, device: Device, make: Make) -> Profile:
        mode = self._mode(device)
        if mode is None:
            raise Refused(f"{_where(make)} is wanted, and this board has no MIG")
        if not mode[0]:
            raise Refused(f"{_where(make)} is wanted, and MIG is off on this GPU")
        known = profiles_of(device, enabled=True)
        if device.privileged is False:
            self.forbidden = REMEDY
            raise Refused(f"{_where(make)} is wanted, and {REMEDY}")
        for profile in known:
            if profile.name == make.profile:
                return profile
        raise Refused(f"{_where(make)} is wanted, and this board has {', '.join(p.name for p in known) or 'nothing'}")

    def _mode(self, device: Device) -> tuple[bool, bool] | None:
        """As `mode_of`; but that it cannot be read must not pass for a board without MIG."""
        before = len(device.notes)
        mode = mode_of(device)
        if len(device.notes) > before:
            raise Refused("; ".join(device.notes[before:]))
        return mode

    def _at(self, device: Device, place: SliceAt) -> GpuInstance | None:
        """The instance that is exactly there."""
        mode = self._mode(device)
        if mode is None or not mode[0]:
            return None
        for one in self._instances(device):
            if (one.profile.name, one.start) == (place.profile, place.start):
                return one
        return None

    def _instances(self, device: Device) -> list[GpuInstance]:
        """All that are there; that they cannot be listed must not pass for nothing there."""
        before = len(device.notes)
        there = gpu_instances(device, profiles_of(device, enabled=True))
        if device.privileged is False:
            self.forbidden = REMEDY
            raise Refused(f"the instances of this GPU cannot be listed: {REMEDY}")
        if len(device.notes) > before:
            raise Refused(f"the instances of this GPU cannot be listed: {'; '.join(device.notes[before:])}")
        return there

    def _what_is_there(self, device: Device) -> str:
        try:
            there = sorted(gpu_instances(device, profiles_of(device, enabled=True)), key=lambda one: one.start)
        except pynvml.NVMLError as error:
            return f"what is there cannot be listed: {words(error)}"
        return "there is " + (", ".join(f"{one.profile.name} at {one.start}" for one in there) or "nothing")

    def _refuse_if_used(self, device: Device, handle: Any, what: str) -> None:
        before = len(device.notes)
        device.sees_processes = True
        processes = processes_on(device, handle, self._pods)
        if processes:
            pids = ", ".join(str(process.pid) for process in processes[:10])
            more = f" and {len(processes) - 10} more" if len(processes) > 10 else ""
            raise Refused(f"{what} is in use by PID {pids}{more}")
        if not device.sees_processes:
            why = "; ".join(device.notes[before:]) or "the driver is too old"
            raise Refused(f"whether {what} is in use cannot be seen: {why}")


def _compute_profiles(handle: Any) -> list[Any]:
    """NVML's info of each compute instance profile that this GPU instance takes."""
    found = []
    for number in range(COMPUTE_PROFILE_ENUMS):
        try:
            found.append(pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(handle, number, SHARED_ENGINES))
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                break
            if error.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
                raise
    return found


def _computes(handle: Any) -> list[Any]:
    """Handles of the compute instances in a GPU instance."""
    return [compute for info in _compute_profiles(handle) for compute in _computes_of(handle, info.id)]


def _computes_of(handle: Any, profile_id: int) -> list[Any]:
    count = c_uint(MOST_COMPUTE_INSTANCES)
    array = (pynvml.c_nvmlComputeInstance_t * MOST_COMPUTE_INSTANCES)()
    pynvml.nvmlGpuInstanceGetComputeInstances(handle, profile_id, array, byref(count))
    return list(array[: count.value])


def _size(profile: Profile, start: int) -> int:
    for place in profile.placements:
        if place.start == start:
            return place.size
    starts = ", ".join(str(place.start) for place in profile.placements)
    raise Refused(f"{profile.name} cannot start at {start} on this board; it can at {starts or 'none'}")


def _said(error: Refused | pynvml.NVMLError) -> str:
    return str(error) if isinstance(error, Refused) else f"NVML: {words(error)}"


def _where(place: SliceAt) -> str:
    return f"{place.profile} at {place.start}"


def _failed(place: SliceAt, reason: str) -> Failed:
    return Failed(gpu=place.gpu, profile=place.profile, start=place.start, reason=reason[:500])
