"""What a container is given for its devices: environment, CDI names, device files and mounts. No kubelet here.

Two ways, chosen per node (docs/containers.md): `env` names the devices to NVIDIA's container runtime, `cdi` names them to
a runtime that reads CDI specs (`cdi` writes those).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from app.report import DeviceAt, NodeReport


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


class Giver:
    """Turns devices into gifts, as this node's container runtime wants them."""

    def gift(self, devices: Sequence[DeviceAt], report: NodeReport, *, memory_mib: int | None = None) -> Gift:
        """What a container with these devices is given; `memory_mib` where a share was asked for by memory.

        Raises `CannotHand` where a device is not in the report, or a slice has no UUID or device file yet.
        """
        raise CannotHand("not built yet")
