"""One GPU: who it is, how much memory it has, how it is set, where it sits, and who uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pynvml

from app.agent.nvml.device import A_WHILE_SECONDS, ABSENT, Device, text
from app.agent.nvml.nics import Nics
from app.agent.pods import Pods
from app.report import Gpu, Process

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
BRANDS = {
    pynvml.NVML_BRAND_QUADRO: "Quadro",
    pynvml.NVML_BRAND_TESLA: "Tesla",
    pynvml.NVML_BRAND_NVS: "NVS",
    pynvml.NVML_BRAND_GRID: "GRID",
    pynvml.NVML_BRAND_GEFORCE: "GeForce",
    pynvml.NVML_BRAND_TITAN: "Titan",
    pynvml.NVML_BRAND_NVIDIA_VAPPS: "NVIDIA Virtual Applications",
    pynvml.NVML_BRAND_NVIDIA_VPC: "NVIDIA Virtual PC",
    pynvml.NVML_BRAND_NVIDIA_VCS: "NVIDIA Virtual Compute Server",
    pynvml.NVML_BRAND_NVIDIA_VWS: "NVIDIA RTX Virtual Workstation",
    pynvml.NVML_BRAND_NVIDIA_CLOUD_GAMING: "NVIDIA Cloud Gaming",
    pynvml.NVML_BRAND_QUADRO_RTX: "Quadro RTX",
    pynvml.NVML_BRAND_NVIDIA_RTX: "NVIDIA RTX",
    pynvml.NVML_BRAND_NVIDIA: "NVIDIA",
    pynvml.NVML_BRAND_GEFORCE_RTX: "GeForce RTX",
    pynvml.NVML_BRAND_TITAN_RTX: "Titan RTX",
}
COMPUTE_MODES = {
    pynvml.NVML_COMPUTEMODE_DEFAULT: "default",
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_THREAD: "exclusive-thread",
    pynvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
    pynvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive-process",
}
MEMORY_AFFINITY_WORDS = 16  # 1,024 NUMA nodes, as many as Linux has
AFFINITY_SCOPE_NODE = 0
STEP_MIB = 256
"""Free memory and processes' memory are said in such steps, so that a report does not change with every allocation."""
MOST_PROCESSES = 1024

ProcessKind = Literal["compute", "graphics", "mps"]


def read_gpu(device: Device, *, sys: Path, nics: Nics) -> Gpu:
    """The GPU itself, without MIG, links and processes.

    What stays as it is is asked once; what an operator may set, every minute; memory at every look.
    """
    handle = device.handle
    architecture = device.keep_asking("architecture", pynvml.nvmlDeviceGetArchitecture)
    capability = device.keep_asking("compute capability", pynvml.nvmlDeviceGetCudaComputeCapability)
    brand = device.keep_asking("brand", pynvml.nvmlDeviceGetBrand)
    watts = device.keep_asking("power limit", pynvml.nvmlDeviceGetEnforcedPowerLimit, seconds=A_WHILE_SECONDS)
    ecc = device.keep_asking("ECC mode", pynvml.nvmlDeviceGetEccMode, seconds=A_WHILE_SECONDS)
    compute_mode = device.keep_asking("compute mode", pynvml.nvmlDeviceGetComputeMode, seconds=A_WHILE_SECONDS)
    total, reserved, free = _memory_mib(device)
    return Gpu(
        uuid=device.uuid,
        index=device.index,
        minor=device.keep_asking("minor number", pynvml.nvmlDeviceGetMinorNumber),
        serial=text(device.keep_asking("serial number", pynvml.nvmlDeviceGetSerial)),
        product=device.keep("product", lambda: text(pynvml.nvmlDeviceGetName(handle))),
        brand=BRANDS.get(brand, ""),
        architecture=ARCHITECTURES.get(architecture, "unknown"),
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else "",
        memory_mib=total,
        reserved_mib=reserved,
        free_mib=free // STEP_MIB * STEP_MIB,
        pci=device.bus_id,
        numa=device.keep("NUMA node", lambda: _numa(device, sys)),
        nic=device.keep("network card", lambda: nics.nearest(device.bus_id)),
        watts=(watts or 0) // 1000,
        ecc=None if ecc is None else ecc[0] == 1,
        ecc_pending=None if ecc is None else ecc[1] == 1,
        compute_mode=COMPUTE_MODES.get(compute_mode, ""),
    )


def processes_on(device: Device, handle: Any, pods: Pods) -> tuple[Process, ...]:
    """Processes on a GPU or MIG device, by PID: compute, graphics and MPS clients.

    A list that fails makes the device blind: that it has no processes must not be concluded. Boards and drivers
    may lack the lists of graphics and MPS clients, but not that of compute.
    """
    before = len(device.notes)
    compute = device.ask("processes", pynvml.nvmlDeviceGetComputeRunningProcesses_v3, handle)
    graphics = device.ask("processes", pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, handle)
    mps = device.ask("processes", pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3, handle)
    if compute is None or len(device.notes) > before:
        device.sees_processes = False
    lists: tuple[tuple[ProcessKind, Any], ...] = (("graphics", graphics), ("compute", compute), ("mps", mps))
    found = {
        process.pid: Process(
            pid=process.pid, pod=pods.of(process.pid), kind=kind, used_mib=_used_mib(process.usedGpuMemory)
        )
        for kind, listed in lists
        for process in listed or ()
    }
    return tuple(found[pid] for pid in sorted(found))[:MOST_PROCESSES]


def pods_of(processes: tuple[Process, ...]) -> tuple[str, ...]:
    """UIDs of the pods that have any of these processes, sorted."""
    return tuple(sorted({process.pod for process in processes if process.pod}))


def _used_mib(used: int | None) -> int | None:
    return None if used is None else -(-used // (STEP_MIB << 20)) * STEP_MIB


def _memory_mib(device: Device) -> tuple[int, int | None, int]:
    """Total, reserved (where the driver says it apart) and free."""
    version = device.keep("memory info", lambda: _memory_version(device.handle))
    memory = pynvml.nvmlDeviceGetMemoryInfo(device.handle, version=version)
    reserved = int(memory.reserved) >> 20 if version else None
    return int(memory.total) >> 20, reserved, int(memory.free) >> 20


def _memory_version(handle: Any) -> int | None:
    """The newest of the two structs that this driver takes; None for the first one."""
    try:
        pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError as error:
        if error.value not in (*ABSENT, pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH):
            raise
        return None
    return int(pynvml.nvmlMemory_v2)


def _numa(device: Device, sys: Path) -> int | None:
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
        node = int((sys / "bus/pci/devices" / device.bus_id / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None  # -1: the firmware does not say
