"""MIG on one GPU: profiles, legal starts, what is placed and what still fits.

A geometry comes from NVML's report of the very board, never from a product or profile name: the same name
means different shapes on different products. The table in `products` serves simulation only.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """A GPU instance, present or promised: a profile at a start (in memory-slice units of the board's grid)."""

    profile: str
    start: int

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}"


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of GPU instance, as NVML lists it for a board.

    `name` is NVML's without the leading "MIG " (`1g.10gb`, `1g.10gb+me`); `id` is the hardware profile id
    that create calls take; `size` and `starts` are in memory-slice units; `engines` are the media engines
    and other countable parts that one instance takes from the board's totals, for example (("ofa", 1),).
    """

    name: str
    id: int
    size: int
    starts: tuple[int, ...]
    compute_slices: int
    memory_mib: int
    engines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one board can be cut: a grid of `width` memory-slice units and the profiles that tile it.

    `engines` are the board's totals of what profiles take besides grid units (decoder, jpeg, ofa, ...):
    with one OFA per GPU, "one +me per GPU" needs no rule of its own.
    """

    width: int
    compute_slices: int
    profiles: tuple[Profile, ...]
    engines: tuple[tuple[str, int], ...] = ()
