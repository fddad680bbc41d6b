"""What is asked: one pod's demand, and a problem of many."""

from __future__ import annotations

from dataclasses import dataclass

from solver.cluster import Snapshot


@dataclass(frozen=True, slots=True, order=True)
class Demand:
    """What one pod needs, all on one node: whole GPUs, and MIG slices by profile name.

    `slices` is sorted by profile and has no zero counts, so equal demands are equal values; build it with
    `Demand.of`.
    """

    gpus: int = 0
    slices: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, gpus: int = 0, **slices: int) -> Demand:
        """Build from counts: `Demand.of(2)`, `Demand.of(**{"1g.10gb": 1})`."""
        if gpus < 0 or any(count < 0 for count in slices.values()):
            raise ValueError("a demand cannot be negative")
        return cls(gpus, tuple(sorted((name, count) for name, count in slices.items() if count)))

    def __bool__(self) -> bool:
        return self.gpus > 0 or bool(self.slices)

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"] if self.gpus else []
        parts += [f"{count} × {profile}" for profile, count in self.slices]
        return " + ".join(parts) or "nothing"


@dataclass(frozen=True, slots=True)
class Ask:
    """A demand with the name of who asks (a pod UID, say)."""

    id: str
    demand: Demand


@dataclass(frozen=True, slots=True)
class Problem:
    """Everything that is pending, on a cluster at one moment."""

    snapshot: Snapshot
    asks: tuple[Ask, ...]
