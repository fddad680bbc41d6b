"""One session with NVML: a look at everything on the node, and order lists carried out.

    read():    devices ──▶ each GPU: itself, MIG, processes, fabric, signals ──▶ links among them ──▶ Reading
    change():  devices ──▶ Changer ──▶ Failed, …

What is costly or does not change is kept over looks (`Device.keep`), and forgotten when the session ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from app.agent.nvml.change import REMEDY, Changer
from app.agent.nvml.device import A_WHILE_SECONDS, ABSENT, Device, Kept, bus_id, text, words
from app.agent.nvml.events import Events
from app.agent.nvml.fabric import read_fabric
from app.agent.nvml.gpu import pods_of, processes_on, read_gpu
from app.agent.nvml.links import read_links
from app.agent.nvml.mig import read_mig
from app.agent.nvml.nics import Nics
from app.agent.nvml.signals import SLOW, read_signals
from app.agent.pods import Pods
from app.agent.reading import Reading, Unreadable
from app.report import Failed, Gpu, OrderList

log = logging.getLogger(__name__)

NO_MIG = "no GPU of this node can do MIG"
NOT_READ = "no GPU of this node can be read"
NOT_LISTED = "this driver shows what can be made only while MIG is on, and it is off on every GPU"


@dataclass(frozen=True, slots=True)
class Versions:
    """Of what is beneath; each empty where it cannot be had."""

    driver: str
    nvml: str
    cuda: str


class Nvml:
    """A session with NVML that reads the node again and again, and changes it when told to.

    `proc` and `sys` are where the host's /proc and /sys are seen. Neither `read` nor `change` raises.
    """

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sys = sys
        self._clock = clock
        self._pods = Pods(proc)
        self._events = Events(clock)
        self._open = False
        self._begun = 0.0
        self._versions = Versions("", "", "")
        self._nics: Nics | None = None
        self._kept: dict[str, dict[str, Kept]] = {}
        self._forbidden = ""

    def read(self) -> Reading:
        """Look at everything once. NVML failing as a whole is a reading with its `error` set."""
        try:
            self._begin()
            reading = self._read()
        except pynvml.NVMLError as error:
            self.close()  # a driver that was reloaded, or replaced under us, wants a new session
            return Reading(error=f"NVML: {words(error)}")
        if reading.unreadable and not reading.gpus and self._clock() - self._begun >= A_WHILE_SECONDS:
            self.close()  # so does one that still lists the GPUs of before
        return reading

    def change(self, orders: OrderList) -> tuple[Failed, ...]:
        """Carry the list out: modes, then what goes, then what is made. What failed is said in words.

        What it has changed is seen by the next `read`.
        """
        try:
            self._begin()
            changer = Changer(find=self._found, release=self._events.close, pods=self._pods)
        except pynvml.NVMLError as error:
            self.close()
            return _all_failed(orders, f"NVML: {words(error)}")
        failed = changer.carry_out(orders)
        self._forbidden = self._forbidden or changer.forbidden
        return failed

    def close(self) -> None:
        """End the session and forget what was kept; the next `read` begins a new one."""
        self._events.close()
        if self._open:
            self._open = False
            try:
                pynvml.nvmlShutdown()
            except pynvml.NVMLError as error:
                log.warning("NVML did not shut down: %s", words(error))
        self._kept.clear()
        self._nics = None
        self._forbidden = ""

    def _begin(self) -> None:
        if not self._open:
            pynvml.nvmlInit()
            self._open = True
            self._begun = self._clock()
            self._versions = _versions()
            self._events.begin()

    # ---- a look ----

    def _read(self) -> Reading:
        for uuid in self._events.take_touched():
            for what in SLOW:
                self._kept.get(uuid, {}).pop(what, None)
        listed, unreadable = self._devices()
        devices: list[Device] = []
        gpus: list[Gpu] = []
        for device in listed:
            try:
                gpu = self._gpu(device)
            except (pynvml.NVMLError, ValueError) as error:
                unreadable.append(_unreadable(device.index, error))
            else:
                devices.append(device)
                gpus.append(gpu)
        nvlinks, links = read_links(devices, gpus)
        self._events.watch(devices)
        makes_slices, makes_none = self._makes(devices, gpus)
        return Reading(
            driver=self._versions.driver,
            nvml=self._versions.nvml,
            cuda=self._versions.cuda,
            sees_pods=self._pods.host_pids() and all(device.sees_processes for device in devices),
            makes_slices=makes_slices,
            makes_none=makes_none,
            xids=self._events.take(),
            gpus=tuple(
                gpu.model_copy(
                    update={
                        "nvlink": nvlink,
                        "signals": tuple(device.signals),
                        "health_reason": "; ".join(device.notes)[:500],
                    }
                )
                for device, gpu, nvlink in zip(devices, gpus, nvlinks, strict=True)
            ),
            unreadable=tuple(sorted(unreadable, key=lambda one: one.index)),
            links=links,
        )

    def _gpu(self, device: Device) -> Gpu:
        """One GPU with all that is its own; raises NVMLError where it is lost."""
        if self._nics is None:
            self._nics = Nics(self._sys)
        gpu = read_gpu(device, sys=self._sys, nics=self._nics)
        mig = read_mig(device, self._pods)
        in_mig_mode = mig is not None and mig.enabled
        processes = () if in_mig_mode else processes_on(device, device.handle, self._pods)
        fabric = read_fabric(device)
        device.signals += read_signals(device)
        return gpu.model_copy(update={"mig": mig, "fabric": fabric, "processes": processes, "pods": pods_of(processes)})

    def _makes(self, devices: list[Device], gpus: list[Gpu]) -> tuple[bool, str]:
        """Whether slices can be made on this node, or why not."""
        capable = [device for device, gpu in zip(devices, gpus, strict=True) if gpu.mig is not None]
        if not capable:
            return False, NO_MIG if devices else NOT_READ
        if self._forbidden or any(device.privileged is False for device in capable):
            return False, self._forbidden or REMEDY
        if not any(device.privileged for device in capable):
            return False, NOT_LISTED
        return True, ""

    # ---- finding GPUs ----

    def _found(self) -> dict[str, Device]:
        """The GPUs that can be had, by UUID, in order of index."""
        return {device.uuid: device for device in self._devices()[0]}

    def _devices(self) -> tuple[list[Device], list[Unreadable]]:
        found: list[Device] = []
        unreadable: list[Unreadable] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                found.append(self._device(index))
            except (pynvml.NVMLError, ValueError) as error:
                unreadable.append(_unreadable(index, error))
        return found, unreadable

    def _device(self, index: int) -> Device:
        """By index, not by UUID: looking for one has been seen to fail for a moment, and to take long under load."""
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        uuid = text(pynvml.nvmlDeviceGetUUID(handle))
        device = Device(handle, uuid, index, self._kept.setdefault(uuid, {}), self._clock())
        device.bus_id = device.keep("PCI address", lambda: _bus_id(handle))
        return device


def _bus_id(handle: Any) -> str:
    pci = pynvml.nvmlDeviceGetPciInfo(handle)
    return bus_id(pci.domain, pci.bus, pci.device)


def _unreadable(index: int, error: pynvml.NVMLError | ValueError) -> Unreadable:
    """A GPU that fails, or whose facts cannot be (no text, a number out of all bounds): the others are read on."""
    if isinstance(error, pynvml.NVMLError):
        return Unreadable(index=index, reason=f"NVML: {words(error)}")
    return Unreadable(index=index, reason=f"what NVML says makes no sense: {' '.join(str(error).split())}"[:500])


def _all_failed(orders: OrderList, reason: str) -> tuple[Failed, ...]:
    places = (*orders.remove, *orders.make)
    return (
        *(Failed(gpu=switch.gpu, reason=reason) for switch in orders.switch),
        *(Failed(gpu=place.gpu, profile=place.profile, start=place.start, reason=reason) for place in places),
    )


def _versions() -> Versions:
    return Versions(
        driver=_system("driver version", pynvml.nvmlSystemGetDriverVersion),
        nvml=_system("NVML version", pynvml.nvmlSystemGetNVMLVersion),
        cuda=_cuda(),
    )


def _cuda() -> str:
    """NVML packs it as major * 1000 + minor * 10."""
    try:
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
    except pynvml.NVMLError:
        return ""
    return f"{version // 1000}.{version % 1000 // 10}"


def _system(what: str, call: Callable[[], Any]) -> str:
    try:
        return text(call())
    except pynvml.NVMLError as error:
        if error.value not in ABSENT:
            log.warning("%s: %s", what, words(error))
    except UnicodeDecodeError:
        log.warning("%s: what NVML says is no text", what)
    return ""
