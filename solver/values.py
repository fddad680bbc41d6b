"""What states can still earn: the values that close every decision. Only their differences matter.

    Cut  ──▶ its geometry's table (solver.market) if there is one, else open starts and a convex part
    Host ──▶ the forecast's potential (solver.forecast) if there is one, else convex in what is free
             less, either way, what the next demands would lose in links and NUMA

All in whole milli-GPU. A step's price for tomorrow is the value it takes away, so the prices of several steps
add up to what they take together, in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from solver.cluster import GPU_MILLI
from solver.geometry import Cut, Geometry, empty
from solver.steps import Host, State
from solver.topology import Board, Counts, bandwidth, best_bandwidth, fewest_places, places, subsets, ways

if TYPE_CHECKING:
    from solver.forecast import Forecast
    from solver.market import Table

NUMA_MILLI = 50
"""What one more NUMA node (or NIC) than needed costs each GPU of a demand: 5 % of it. Chosen by feel."""

CONVEX_SHARE = 0.3
"""How much of a cut GPU's value is convex in its free units. From 0.15 to 0.5 the results hardly differ."""

NEXT_ASKS = (2, 4, 8)
"""The sizes of later demands that a node's free GPUs are kept well connected for, besides all of them."""

NEXT_SHARE = 10
"""Such a later demand counts for one in this many. Chosen by feel."""

NEXT_SUBSETS = 100
"""Later demands are looked at while there are at most so many ways to choose them (8 GPUs: 70)."""


@dataclass(frozen=True, slots=True, eq=False)
class Values:
    """What states are worth. `tables` by geometry; without a forecast nodes are valued by best fit."""

    tables: Mapping[Geometry, Table] = field(default_factory=dict)
    forecast: Forecast | None = None

    def of(self, state: State) -> int:
        """What the state can still earn, in milli-GPU."""
        if isinstance(state, Cut):
            table = self.tables.get(state.geometry)
            return table.of(state) if table is not None else _open_starts_and_room(state)
        return self._of_host(state)

    def essence(self, state: State) -> Hashable:
        """What `of` looks at, and what decides about steps: states that are equal in it are worth the same,
        and the same steps lead them to such states again.
        """
        if isinstance(state, Host):
            return state.canonical()
        bare = state.without_idle()
        seen = bare.held if state.geometry in self.tables else (bare.busy, bare.left)
        return state.geometry, seen, state.idle, state.kind, state.guests, bool(state.held)

    def _of_host(self, state: Host) -> int:
        if not state.board.size:
            return 0
        lost = _links_lost_by_the_next(state.board, state.idle)
        if self.forecast is not None:
            return _foreseen(self.forecast, state) - lost
        return _room_for_large_asks(state.board.size, state.idle, state.shared) - lost

    def of_hosts(self, wiring: Board, lefts: Sequence[Left], cpu_milli: Floats, left_of: Ints, cpu_of: Ints) -> Ints:
        """The same for many hosts with one board at once: host i has `lefts[left_of[i]]` of its GPUs and
        `cpu_milli[cpu_of[i]]` of its CPU (infinite where it is not known).
        """
        if not wiring.size:
            return np.zeros(len(left_of), dtype=np.int64)
        left = _by_product(wiring, lefts)
        if self.forecast is not None:
            worth = self.forecast.of_many(left, cpu_milli, left_of, cpu_of)
        else:
            worth = _rooms_for_large_asks(wiring.size, left)[left_of]
        if len(wiring.classes) < 2:
            return worth
        lost = np.array([_links_lost_by_the_next(wiring, idle) for idle, _ in lefts], dtype=np.int64)
        return worth - lost[left_of]


DEFAULT_VALUES = Values()


Left = tuple[Counts, Sequence[Sequence[int]]]
"""What is left of a host's GPUs by class: how many are idle, and the milli of each that is shared."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@lru_cache(maxsize=16384)
def _foreseen(forecast: Forecast, state: Host) -> int:
    return forecast.of(state)


def _by_product(wiring: Board, lefts: Sequence[Left]) -> dict[str, Ints]:
    """The milli left of each GPU, by product: a row for each, 0 where nothing is left."""
    classes: dict[str, list[int]] = {}
    for c, kind in enumerate(wiring.kinds):
        classes.setdefault(kind.product, []).append(c)
    made = {}
    for product, members in classes.items():
        width = sum(len(wiring.classes[c]) for c in members)
        rows = []
        for idle, shared in lefts:
            row = [GPU_MILLI] * sum([idle[c] for c in members])
            for c in members:
                row += shared[c]
            rows.append(row + [0] * (width - len(row)))
        made[product] = np.array(rows, dtype=np.int64)
    return made


@lru_cache(maxsize=65536)
def _open_starts_and_room(state: Cut) -> int:
    """`options`: the share of an empty GPU's legal starts that is still open, each weighted by its size, and
    a part that is convex in the free units.

    Counted from what is held: an idle instance can be destroyed. An already cut GPU has lost its large
    starts, so a further small slice costs less there than on an empty one. Measured on the loss system of
    benchmarks.md section 2 (slice-demand accepted at load 1.0, uniform / skew-big, seeds 7 to 11): starts
    alone 88.5 / 89.6, weighted by size 90.9 / 90.5, with the convex part 91.1 / 90.7, convex alone 87.0 / 85.2.
    """
    now, fresh = state.without_idle(), empty(state.geometry)
    if not _open_starts(fresh):
        return 0
    open_share = _open_starts(now) / _open_starts(fresh)
    free_share = (state.geometry.width - now.busy.bit_count()) / state.geometry.width
    return round(GPU_MILLI * ((1 - CONVEX_SHARE) * open_share + CONVEX_SHARE * free_share**2))


@lru_cache(maxsize=65536)
def _open_starts(state: Cut) -> int:
    """The legal starts of all profiles, each counted with the units it would take."""
    return sum(len(state.starts(profile.name)) * profile.size for profile in state.geometry.profiles)


def _room_for_large_asks(size: int, idle: tuple[int, ...], shared: tuple[tuple[tuple[int, object], ...], ...]) -> int:
    """Best fit: convex in the idle GPUs, and in what is left of each shared one."""
    squares = GPU_MILLI**2 * sum(idle) ** 2 + sum(milli**2 for parts in shared for milli, _ in parts)
    return round(squares / (GPU_MILLI * size))


def _rooms_for_large_asks(size: int, left: Mapping[str, Ints]) -> Ints:
    """The same by row."""
    rows = np.concatenate(list(left.values()), axis=1)
    idle = (rows == GPU_MILLI).sum(axis=1)
    squares = GPU_MILLI**2 * idle * (idle - 1) + (rows * rows).sum(axis=1)
    worth: Ints = np.rint(squares / (GPU_MILLI * size)).astype(np.int64)
    return worth


@lru_cache(maxsize=65536)
def _links_lost_by_the_next(wiring: Board, idle: tuple[int, ...]) -> int:
    """What later demands would lose in links and NUMA nodes if the idle GPUs were all they could have."""
    count = sum(idle)
    if count < 2 or len(wiring.classes) < 2:
        return 0
    lost = 0
    for gpus in sorted({*NEXT_ASKS, count}):
        if 1 < gpus <= count and ways(idle, gpus) <= NEXT_SUBSETS:
            lost += min(_set_price(wiring, chosen) for chosen in subsets(wiring, idle, gpus))
    return round(lost / NEXT_SHARE)


@lru_cache(maxsize=65536)
def _set_price(wiring: Board, chosen: tuple[int, ...]) -> int:
    gpus = sum(chosen)
    links = links_price(gpus, bandwidth(wiring, chosen), best_bandwidth(wiring, gpus))
    return links + spread_price(gpus, places(wiring.numa, chosen), fewest_places(wiring, wiring.numa, gpus))


def links_price(gpus: int, got: int, best: int) -> int:
    """A job that loses a share of its bandwidth is taken to lose that share of its GPUs."""
    return round(GPU_MILLI * gpus * max(0, best - got) / best) if best > 0 else 0


def spread_price(gpus: int, touched: int, fewest: int) -> int:
    """More NUMA nodes (or NICs) touched than needed."""
    return NUMA_MILLI * gpus * max(0, touched - fewest)
