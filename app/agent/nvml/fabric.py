"""The NVLink fabric that reaches beyond the node (GB200 NVL72): which part of it a GPU belongs to, and its health."""

from __future__ import annotations

import uuid
from ctypes import byref
from dataclasses import dataclass
from typing import Any, Literal

import pynvml

from app.agent.nvml.device import ABSENT, Device, words
from app.report import Fabric, Signal

State = Literal["not-started", "in-progress", "completed"]

STATES: dict[int, State] = {
    pynvml.NVML_GPU_FABRIC_STATE_NOT_STARTED: "not-started",
    pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS: "in-progress",
    pynvml.NVML_GPU_FABRIC_STATE_COMPLETED: "completed",
}
STRUCTS = (pynvml.c_nvmlGpuFabricInfo_v3_t, pynvml.c_nvmlGpuFabricInfo_v2_t)
"""Newest first; a driver that knows only the older answers ARGUMENT_VERSION_MISMATCH to the newer."""

SUMMARIES = {
    pynvml.NVML_GPU_FABRIC_HEALTH_SUMMARY_HEALTHY: "healthy",
    pynvml.NVML_GPU_FABRIC_HEALTH_SUMMARY_UNHEALTHY: "unhealthy",
    pynvml.NVML_GPU_FABRIC_HEALTH_SUMMARY_LIMITED_CAPACITY: "limited capacity",
}
TROUBLES = (
    (pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_DEGRADED_BW, "degraded bandwidth"),
    (pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_ROUTE_RECOVERY, "route recovery under way"),
    (pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_ROUTE_UNHEALTHY, "unhealthy route"),
    (pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_ACCESS_TIMEOUT_RECOVERY, "recovery from an access timeout under way"),
)
"""Fields of the health mask that mean trouble where they are true, by their lowest bit."""
MISCONFIGURED = {
    2: "wrong system GUID",
    3: "wrong chassis serial number",
    4: "no partition",
    5: "too few NVLinks",
    6: "incompatible firmware",
    7: "invalid location",
    8: "invalid state of the GPU",
}
CONFIGURATION_SHIFT = pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_INCORRECT_CONFIGURATION
FABRIC_MANAGER_SHIFT = pynvml.NVML_GPU_FABRIC_HEALTH_MASK_SHIFT_GFM_STATE
TRUE, NOT_CONNECTED = 1, 2


@dataclass(frozen=True, slots=True)
class Health:
    """The fabric's health in words, and what is wrong; neither where the driver does not say."""

    summary: str
    troubles: tuple[str, ...]

    @property
    def text(self) -> str:
        """Both together."""
        return ": ".join(part for part in (self.summary, ", ".join(self.troubles)) if part)

    @property
    def is_bad(self) -> bool:
        """Whether something is wrong."""
        return bool(self.troubles) or self.summary not in ("", "healthy")


def read_fabric(device: Device) -> Fabric | None:
    """The GPU's fabric, with a signal where it is unhealthy; None on boards and drivers without one."""
    if not device.keep("has fabric", lambda: _has_fabric(device)):
        return None
    info = _info(device)
    state = STATES.get(info.state) if info is not None else None
    if state is None:
        return None
    if state != "completed":
        return Fabric(state=state)
    if info.status != pynvml.NVML_SUCCESS:
        reason = words(pynvml.NVMLError(info.status))
        device.signals.append(Signal(name="fabric", state="suspect", reason=f"joining the fabric failed: {reason}"))
        return Fabric(state=state, health=f"joining it failed: {reason}")
    health = _health(info)
    if health.is_bad:
        device.signals.append(Signal(name="fabric", state="suspect", reason=f"fabric {health.text}"))
    cluster = bytes(info.clusterUuid)
    if not any(cluster):  # a board whose NVLinks end in the node
        return Fabric(state=state, health=health.text)
    return Fabric(state=state, cluster=str(uuid.UUID(bytes=cluster)), clique=int(info.cliqueId), health=health.text)


def _has_fabric(device: Device) -> bool:
    info = _info(device)
    return info is not None and info.state in STATES


def _info(device: Device) -> Any:
    """The newest struct that the driver fills; None where board or driver have no fabric."""
    for number in range(device.recall("fabric struct", 0), len(STRUCTS)):
        info = STRUCTS[number]()
        try:
            pynvml.nvmlDeviceGetGpuFabricInfoV(device.handle, byref(info))
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value == pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
                continue
            if error.value not in ABSENT:
                device.notes.append(f"fabric: {words(error)}")
            return None
        device.remember("fabric struct", number)
        return info
    return None


def _health(info: Any) -> Health:
    mask = int(info.healthMask)
    troubles = [trouble for shift, trouble in TROUBLES if mask >> shift & 0b11 == TRUE]
    wrong = MISCONFIGURED.get(mask >> CONFIGURATION_SHIFT & 0b1111)
    if wrong:
        troubles.append(f"incorrect configuration ({wrong})")
    if mask >> FABRIC_MANAGER_SHIFT & 0b11 == NOT_CONNECTED:
        troubles.append("fabric manager not connected")
    return Health(SUMMARIES.get(getattr(info, "healthSummary", 0), ""), tuple(troubles))
