"""What is asked: one pod's demand, and a problem of many."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from solver.cluster import GPU_MILLI, Snapshot
from solver.geometry import Version
from solver.guests import NOBODY, Guest


@dataclass(frozen=True, slots=True, order=True)
class Terms:
    """On what terms a pod takes devices: what they must be at least, and who it is.

    `products` and `architectures` list what is allowed (sorted; empty: any). `gpu_memory_mib` is the least that
    a device must have: a whole GPU its own, a slice its profile's; a share counts by its GPU. `nvlink`: every
    two of the whole GPUs are joined by NVLink. `driver` is the oldest that will do. Of `cuda` the major version
    counts: a driver serves every minor version of its own major, and all older majors
    (https://docs.nvidia.com/deploy/cuda-compatibility/).
    """

    products: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    compute_capability: Version = ()
    gpu_memory_mib: int = 0
    nvlink: bool = False
    driver: Version = ()
    cuda: Version = ()
    guest: Guest = NOBODY


ANY_TERMS = Terms()


class HostNeed(NamedTuple):
    """The part of a demand that its node serves as a whole. `sliced`: the pod has slices beside it."""

    gpus: int
    share_milli: int
    share_mib: int
    cpu_milli: int
    memory_mib: int
    sliced: bool
    terms: Terms

    @property
    def takes_devices(self) -> bool:
        """Whether the pod gets any part of a GPU, here or in slices."""
        return bool(self.gpus or self.share_milli or self.share_mib or self.sliced)


class SliceNeed(NamedTuple):
    """A part of a demand that one GPU in MIG mode serves."""

    profile: str
    terms: Terms


@dataclass(frozen=True, slots=True, order=True)
class Demand:
    """What one pod needs, all on one node.

    Whole GPUs; MIG slices by profile name; a share of one GPU, either in thousandths (`share_milli`, below
    1000) or in MiB of its memory (`share_mib`); CPU and memory of the node. `slices` is sorted by profile and
    has no zero counts, so equal demands are equal values; build it with `Demand.of` or `dataclasses.replace`.
    """

    gpus: int = 0
    slices: tuple[tuple[str, int], ...] = ()
    share_milli: int = 0
    share_mib: int = 0
    cpu_milli: int = 0
    memory_mib: int = 0
    terms: Terms = ANY_TERMS
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        numbers = (self.gpus, self.share_milli, self.share_mib, self.cpu_milli, self.memory_mib)
        if min(numbers) < 0 or any(count < 1 for _, count in self.slices):
            raise ValueError("a demand cannot be negative")
        if self.share_milli >= GPU_MILLI:
            raise ValueError("a share is less than a GPU; ask for a whole one")
        if self.share_milli and self.share_mib:
            raise ValueError("a share is asked for either in thousandths or in MiB")
        object.__setattr__(self, "_hash", hash((self.slices, numbers, self.terms)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Demand], tuple[object, ...]]:
        """Pickle by value: hashes of strings differ between processes."""
        numbers = (self.share_milli, self.share_mib, self.cpu_milli, self.memory_mib)
        return Demand, (self.gpus, self.slices, *numbers, self.terms)

    @classmethod
    def of(cls, gpus: int = 0, **slices: int) -> Demand:
        """Build from counts: `Demand.of(2)`, `Demand.of(**{"1g.10gb": 1})`."""
        if gpus < 0 or any(count < 0 for count in slices.values()):
            raise ValueError("a demand cannot be negative")
        return cls(gpus, tuple(sorted((name, count) for name, count in slices.items() if count)))

    def __bool__(self) -> bool:
        return bool(self.takes_devices or self.cpu_milli or self.memory_mib)

    @property
    def takes_devices(self) -> bool:
        """Whether it asks for any part of a GPU."""
        return bool(self.gpus or self.slices or self.share_milli or self.share_mib)

    @property
    def is_shared(self) -> bool:
        """Whether it asks for a share of a GPU."""
        return bool(self.share_milli or self.share_mib)

    @property
    def host_need(self) -> HostNeed:
        """What the node as a whole must serve: GPUs, share, CPU, memory."""
        return _host_need(self)

    def slice_need(self, profile: str) -> SliceNeed:
        """What one GPU in MIG mode must serve."""
        return SliceNeed(profile, self.terms)

    def share_of(self, gpu_memory_mib: int) -> int:
        """The share in thousandths of a GPU with so much memory, rounded up; over 1000 where it cannot do."""
        if not self.share_mib:
            return self.share_milli
        return -(-self.share_mib * GPU_MILLI // gpu_memory_mib) if gpu_memory_mib else GPU_MILLI + 1

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"] if self.gpus else []
        parts += [f"{count} × {profile}" for profile, count in self.slices]
        parts += [f"{self.share_milli} milli of a GPU"] if self.share_milli else []
        parts += [f"{self.share_mib} MiB of a GPU"] if self.share_mib else []
        if not parts:
            parts += [f"{self.cpu_milli / 1000:g} CPU"] if self.cpu_milli else []
            parts += [f"{self.memory_mib} MiB memory"] if self.memory_mib else []
        return " + ".join(parts) or "nothing"


@lru_cache(maxsize=65536)
def _host_need(demand: Demand) -> HostNeed:
    numbers = (demand.gpus, demand.share_milli, demand.share_mib, demand.cpu_milli, demand.memory_mib)
    return HostNeed(*numbers, bool(demand.slices), demand.terms)


@dataclass(frozen=True, slots=True)
class Ask:
    """A demand with the name of who asks (a pod UID, say). A higher `priority` is served first, whatever it costs."""

    id: str
    demand: Demand
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that is pending, on a cluster at one moment."""

    snapshot: Snapshot
    asks: tuple[Ask, ...]
