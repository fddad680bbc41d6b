"""What the service itself costs, as `/v1/costs` shows it: time to answer, memory, how long its loop was blocked.

And the numbers that all of it grows with. Reads counts that are kept anyway: asking costs the same at any size.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import Any

from app.inventory import Inventory
from app.ledger import Ledger, Phase
from app.loop import Late, LoopWatch
from app.metrics import BUCKETS, Metrics
from app.offers import Offers
from app.planner import Planner

Json = dict[str, Any]
Counts = Sequence[int]

VERBS = ("filter", "prioritize", "bind")
LATELY_SECONDS = 10.0  # "lately" is from one to two of these
BLOCKED_SECONDS = 0.02  # longer than this the event loop shall never be blocked
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Mark:
    """What had been counted at a moment, and the longest blocks of the loop since the mark before."""

    at: float
    answered: Mapping[str, Counts]
    updated: int
    wall_seconds: float
    own_seconds: float


class Costs:
    """What it costs since the start, and lately: since the older of two marks. A chore makes one now and then."""

    def __init__(
        self,
        metrics: Metrics,
        loop: LoopWatch,
        ledger: Ledger,
        inventory: Inventory,
        offers: Offers,
        planner: Planner | None,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._loop = loop
        self._ledger = ledger
        self._inventory = inventory
        self._offers = offers
        self._planner = planner
        self._clock = clock
        self._started = clock()
        self._older = self._newer = self._mark()

    def look(self) -> None:
        """Make a mark where the newer one has become old."""
        if self._clock() - self._newer.at >= LATELY_SECONDS:
            self._older, self._newer = self._newer, self._mark()

    def shown(self) -> Json:
        """Everything, for `/v1/costs`."""
        now = self._clock()
        lately = max(now - self._older.at, 0.001)
        answered = self._metrics.answered()
        return {
            "up_seconds": round(now - self._started, 1),
            "lately_seconds": round(lately, 1),
            "verbs": {verb: self._verb(verb, answered.get(verb, NOTHING), lately) for verb in VERBS},
            "memory_mib": {
                "service": memory_mib(os.getpid()),
                "planning": memory_mib(self._planner.child.pid) if self._planner and self._planner.child else None,
            },
            "loop": {
                "looks": sum(self._loop.wall.counts),
                "wall": _blocked(self._loop.wall, self._newer.wall_seconds),
                "own": _blocked(self._loop.own, self._newer.own_seconds),
            },
            "sizes": self._sizes(),
            "rows": self._rows(now, lately),
        }

    def _mark(self) -> Mark:
        wall, own = (late.take_longest_lately("costs") for late in (self._loop.wall, self._loop.own))
        return Mark(self._clock(), self._metrics.answered(), self._offers.updated, wall, own)

    def _verb(self, verb: str, counts: Counts, lately: float) -> Json:
        new = tuple(map(sub, counts, self._older.answered.get(verb, NOTHING)))
        return {
            "answers": sum(counts),
            "p50_seconds": quantile(counts, 0.5),
            "p99_seconds": quantile(counts, 0.99),
            "lately": {
                "per_second": round(sum(new) / lately, 2),
                "p50_seconds": quantile(new, 0.5),
                "p99_seconds": quantile(new, 0.99),
            },
        }

    def _sizes(self) -> dict[str, int]:
        variety = self._offers.variety
        return {
            "nodes": len(self._inventory),
            "nodes_offered": variety.nodes,
            "pods_held": self._ledger.counts()[Phase.HELD],
            "demands": variety.demands,
            "states": variety.states,
            "hosts": variety.hosts,
            "mig_gpus": variety.cuts,
        }

    def _rows(self, now: float, lately: float) -> Json:
        at = self._offers.updated_at
        return {
            "updated": self._offers.updated,
            "per_second": round((self._offers.updated - self._older.updated) / lately, 2),
            "last_seconds_ago": None if at is None else round(now - at, 1),
        }


NOTHING: Counts = (0,) * (len(BUCKETS) + 1)


def quantile(counts: Counts, share: float) -> float | None:
    """So many took no longer than this many seconds, as if those of one bucket were spread evenly over it.

    None where nothing was counted. Of those beyond the last bucket only its bound is known.
    """
    wanted = share * sum(counts)
    if not wanted:
        return None
    reached = list(accumulate(counts))
    i = next(i for i, so_far in enumerate(reached) if so_far >= wanted)
    if i == len(BUCKETS):
        return BUCKETS[-1]
    low = BUCKETS[i - 1] if i else 0.0
    part = 1 - (reached[i] - wanted) / counts[i]
    return round(low + part * (BUCKETS[i] - low), 6)


def memory_mib(pid: int) -> float | None:
    """What a process holds in memory now (its resident set); None where this system does not say, or it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / MIB, 1)


def _blocked(late: Late, before: float) -> Json:
    return {
        "longest_seconds": round(late.longest, 6),
        "longest_lately_seconds": round(max(before, late.longest_lately["costs"]), 6),
        "over_20_ms": late.over(BLOCKED_SECONDS),
    }
