"""What a container is given for its devices: environment, CDI names, device files and mounts. No kubelet here.

Two ways, chosen for a node (docs/containers.md): by environment, which names the devices to NVIDIA's container runtime,
or by the names in a CDI file (`cdi` writes it), for every runtime that reads those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.agent.cdi import CdiFile
from app.agent.device_files import Found, Host, NoFile, common_files, files_of, place_name
from app.report import DeviceAt, NodeReport

MPS_PIPES = "/mps/pipe"
"""Where a container sees the pipe directory of the MPS control daemon."""

SHM = "/dev/shm"  # noqa: S108 — not a temporary file: the shared memory of MPS clients and their server


class CannotHand(Exception):
    """A container cannot have its devices (yet); in words, since the kubelet puts them into the pod's status."""


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device file in the container. `permissions` as cgroups spell them: r, w, m."""

    path: str
    host_path: str
    permissions: str = "rw"


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of the host in the container."""

    container_path: str
    host_path: str
    read_only: bool = True


@dataclass(frozen=True, slots=True)
class Gift:
    """What the device plugin answers for one container and resource; the kubelet joins those of its resources."""

    envs: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    cdi_names: tuple[str, ...] = ()
    device_nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True, slots=True)
class Mps:
    """Where the MPS control daemon's pipe directory and its shared memory are on the host."""

    pipes: str
    shm: str = SHM


class Giver:
    """Turns devices into gifts, as this node's container runtime wants them.

    With `cdi` by CDI names, else by environment. Without `mps` shares are time-sliced.
    """

    def __init__(self, *, host: Host | None = None, cdi: CdiFile | None = None, mps: Mps | None = None) -> None:
        self._host = host or Host()
        self._cdi = cdi
        self._mps = mps

    @property
    def whole(self) -> bool:
        """Whether each answer must carry all devices of its container: the kubelet keeps one value of a variable."""
        return self._cdi is None

    def gift(self, devices: Sequence[DeviceAt], report: NodeReport, *, memory_mib: int | None = None) -> Gift:
        """What a container with these devices is given; `memory_mib` where it asked for a share by memory.

        Raises `CannotHand` where a device is not in the report, a slice has no UUID yet, or (by CDI) a device cannot
        be in the file. By CDI the file is brought up to this report before the answer.
        """
        found = [find(device, report) for device in devices]
        envs, mounts = self._limits(devices, found, memory_mib)
        if self._cdi is not None:
            names = (_cdi_name(self._cdi, device, at, report) for device, at in zip(devices, found, strict=True))
            return Gift(envs=envs, mounts=mounts, cdi_names=tuple(dict.fromkeys(names)))
        visible = ",".join(dict.fromkeys(at.uuid for at in found))
        return Gift({"NVIDIA_VISIBLE_DEVICES": visible, **envs}, device_nodes=self._nodes(found), mounts=mounts)

    def _nodes(self, found: Sequence[Found]) -> tuple[DeviceNode, ...]:
        """The device files that the agent can see, so that the kubelet and the runtime know of them.

        NVIDIA's runtime brings them all in by itself, but behind the back of the OCI runtime, which takes them away
        again when the container's limits are updated (CPU manager, a reload of systemd). An agent in a container may
        see those of its own start only, so what it does not see is left to NVIDIA's runtime.
        """
        wanted = [path for at in found for path in _known_files(self._host, at)]
        own = [path for path in dict.fromkeys(wanted) if self._host.has_device(path)]
        common = common_files(self._host) if own else ()
        return tuple(DeviceNode(path, self._host.device(path)) for path in (*own, *common))

    def _limits(
        self, devices: Sequence[DeviceAt], found: Sequence[Found], memory_mib: int | None
    ) -> tuple[dict[str, str], tuple[Mount, ...]]:
        """What makes an MPS client of a container that has a share; nothing for all others."""
        milli = sum(device.milli for device in devices)
        if not milli:
            return {}, ()
        if len({at.gpu.uuid for at in found}) > 1:
            raise CannotHand("a share is of one GPU; the kubelet took ids of several")
        if self._mps is None:
            return {}, ()
        most_mib = memory_mib if memory_mib is not None else found[0].gpu.memory_mib * milli // 1000
        envs = {
            "CUDA_MPS_PIPE_DIRECTORY": MPS_PIPES,
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={max(1, most_mib)}M",
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(min(100, max(1, milli // 10))),
        }
        return envs, (
            Mount(MPS_PIPES, self._mps.pipes, read_only=False),
            Mount(SHM, self._mps.shm, read_only=False),
        )


def find(device: DeviceAt, report: NodeReport) -> Found:
    """The device in the report. Raises `CannotHand` where it is not there, or a slice has no UUID."""
    gpu = next((gpu for gpu in report.gpus if gpu.uuid == device.gpu), None)
    if gpu is None:
        raise CannotHand(f"{device.gpu} is not among this node's GPUs")
    cut = gpu.mig is not None and gpu.mig.enabled
    if not device.profile:
        if cut:
            raise CannotHand(f"{device.gpu} is in MIG mode and cannot be handed out whole")
        return Found(gpu, gpu.uuid)
    for instance in gpu.mig.instances if gpu.mig else ():
        if (instance.profile, instance.start) == (device.profile, device.start) and instance.uuid:
            return Found(gpu, instance.uuid, instance)
    raise CannotHand(f"{_called(device)}: the slice is not there, or has no UUID yet")


def _cdi_name(cdi: CdiFile, device: DeviceAt, at: Found, report: NodeReport) -> str:
    name = place_name(device) if at.instance else at.uuid
    wrong = cdi.why_not(name, report)
    if wrong:
        raise CannotHand(f"{_called(device)}: {wrong}")
    return f"{cdi.kind}={name}"


def _known_files(host: Host, at: Found) -> tuple[str, ...]:
    try:
        return files_of(host, at)
    except NoFile:
        return ()


def _called(device: DeviceAt) -> str:
    return f"{device.profile} at {device.start} of {device.gpu}" if device.profile else device.gpu
