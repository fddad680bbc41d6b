"""The cluster at one moment, as the solver sees it: nodes, their GPUs and links, and what is taken.

Plain frozen values; no Kubernetes, no clock. Whoever builds a `Snapshot` has checked it; `verify` checks
plans against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from solver.geometry import Geometry, Slice


@dataclass(frozen=True, slots=True)
class Gpu:
    """One physical GPU.

    `geometry` is set when the GPU is in MIG mode (it then serves slices and never whole-GPU asks), else None.
    `instances` are the GPU instances that exist on the board now, held or idle. `withheld` says in words why
    nothing may be newly placed here (unhealthy, lost, perhaps used by a pod we cannot place); empty: usable.
    """

    uuid: str
    index: int
    product: str
    memory_mib: int
    numa: int | None = None
    geometry: Geometry | None = None
    instances: tuple[Slice, ...] = ()
    withheld: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A node's GPUs in index order, and the bandwidth between each two of them.

    `links[i][j]` is GB/s both ways between gpus[i] and gpus[j] (NVLink where there is one, else the PCIe
    path's class), symmetric, 0 on the diagonal. A GPU in MIG mode has no peer-to-peer: its row is ignored.
    """

    name: str
    gpus: tuple[Gpu, ...]
    links: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, order=True)
class Device:
    """What a pod gets: a whole GPU, or a slice of one. Ordered by GPU, then slice."""

    gpu: str
    slice: Slice | None = None

    def __str__(self) -> str:
        return self.gpu if self.slice is None else f"{self.gpu}/{self.slice}"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Every node, and the devices on each that somebody holds or has been promised (by node name)."""

    nodes: tuple[Node, ...]
    taken: Mapping[str, tuple[Device, ...]] = field(default_factory=dict)
