"""The cluster at one moment, as the solver sees it: nodes, their GPUs and links, and what is taken.

Plain frozen values; no Kubernetes, no clock. Whoever builds a `Snapshot` has checked it; `verify` checks
plans against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from solver.geometry import Geometry, Kind, Slice, Version
from solver.guests import NOBODY, Guest

GPU_MILLI = 1000
"""A whole GPU, in the unit in which shares and prices are counted."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU.

    `geometry` is set when the GPU is in MIG mode (it then serves slices and never whole-GPU asks), else None.
    `instances` are the GPU instances that exist on the board now, held or idle. `withheld` says in words why
    nothing may be newly placed here (unhealthy, lost, perhaps used by a pod we cannot place); empty: usable.
    `nic` numbers the network card that is nearest to it (GPUs with equal numbers share one).
    """

    uuid: str
    index: int
    product: str
    memory_mib: int
    numa: int | None = None
    geometry: Geometry | None = None
    instances: tuple[Slice, ...] = ()
    withheld: str = ""
    architecture: str = ""
    compute_capability: Version = ()
    watts: int = 0
    nic: int | None = None

    @property
    def kind(self) -> Kind:
        """What it is, without its name and place."""
        return Kind(self.product, self.architecture, self.compute_capability, self.memory_mib, self.watts)


@dataclass(frozen=True, slots=True)
class Node:
    """A node's GPUs in index order, and the bandwidth between each two of them.

    `links[i][j]` is GB/s both ways between gpus[i] and gpus[j] (NVLink where there is one, else the PCIe
    path's class), symmetric, 0 on the diagonal. A GPU in MIG mode has no peer-to-peer: its row is ignored.
    `cpu_milli` and `memory_mib` are what pods may use in all; None: not known, and then they never bind.
    `driver` and `cuda` are the GPU driver's version and the CUDA version that it serves.
    """

    name: str
    gpus: tuple[Gpu, ...]
    links: tuple[tuple[int, ...], ...]
    cpu_milli: int | None = None
    memory_mib: int | None = None
    driver: Version = ()
    cuda: Version = ()


@dataclass(frozen=True, slots=True)
class Device:
    """What a pod gets: a whole GPU, a slice of one, or a share of `milli` thousandths of one.

    Ordered by GPU, then slice, then share. Two pods may hold equal shares of one GPU: what is taken is a
    list of devices, not a set.
    """

    gpu: str
    slice: Slice | None = None
    milli: int = 0

    def __str__(self) -> str:
        if self.slice is not None:
            return f"{self.gpu}/{self.slice}"
        return f"{self.gpu}:{self.milli}m" if self.milli else self.gpu

    def __lt__(self, other: Device) -> bool:
        return self._key() < other._key()

    def _key(self) -> tuple[str, str, int, int]:
        return (self.gpu, *((self.slice.profile, self.slice.start) if self.slice else ("", -1)), self.milli)

    @property
    def whole(self) -> bool:
        """Whether it is all of a GPU."""
        return self.slice is None and not self.milli


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one pod holds on a node or has been promised, and who it is."""

    devices: tuple[Device, ...] = ()
    cpu_milli: int = 0
    memory_mib: int = 0
    guest: Guest = NOBODY


Taken = Device | Allocation
"""Something that is taken. A bare device is held by a pod of which nothing else is known."""


def allocations(taken: Iterable[Taken]) -> tuple[Allocation, ...]:
    """The same as allocations only."""
    return tuple(each if isinstance(each, Allocation) else Allocation((each,)) for each in taken)


def devices_of(taken: Iterable[Taken]) -> tuple[Device, ...]:
    """Every device that is taken, as often as it is."""
    return tuple(device for each in allocations(taken) for device in each.devices)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every node, and what on each (by node name) somebody holds or has been promised."""

    nodes: tuple[Node, ...]
    taken: Mapping[str, tuple[Taken, ...]] = field(default_factory=dict)
