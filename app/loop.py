"""The event loop is everybody's: how long it is blocked is measured, long work is done in turns, garbage in pieces.

Knows nothing of pods or nodes. What was found with it, and why garbage is collected as it is, is in
docs/decisions/0012-the-event-loop-is-never-blocked.md.
"""

import asyncio
import gc
import logging
import sys
import threading
import time
import traceback
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TypeVar

log = logging.getLogger(__name__)

TICK_SECONDS = 0.01
TURN_SECONDS = 0.003  # a turn of long work; kube-scheduler's calls wait so long at most, and they take about as long
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
FRAMES = 10  # of the stack that is logged, the innermost
USUAL_THRESHOLDS = gc.get_threshold()
TIDY_SECONDS = 0.1
RARELY = 1_000_000  # young collections between two full ones: never by itself

LISTENERS = ("scrape", "costs")
"""Who asks for the longest since they last asked: Prometheus, and what the page shows."""

T = TypeVar("T")


class Turns:
    """Long work that lets others have the loop between its pieces, as soon as a turn has taken its time."""

    def __init__(self) -> None:
        self._until = time.perf_counter() + TURN_SECONDS

    def lasts(self) -> bool:
        """Whether there is time left in this turn."""
        return time.perf_counter() < self._until

    async def over(self) -> None:
        """A piece is done: if the turn has lasted long enough, it is over."""
        if not self.lasts():
            await asyncio.sleep(0)
            self._until = time.perf_counter() + TURN_SECONDS


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The items one after the other, with turns for others between them."""
    turns = Turns()
    for item in items:
        yield item
        await turns.over()


# -- how long it is blocked -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Late:
    """How late the loop was, counted like a Prometheus histogram, and the worst of it."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0
    longest: float = 0.0
    longest_lately: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LISTENERS, 0.0))
    """Since each of them last took it."""

    def note(self, seconds: float) -> None:
        """Count one look."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds
        for listener, worst in self.longest_lately.items():
            if seconds > worst:
                self.longest_lately[listener] = seconds
                self.longest = max(self.longest, seconds)

    def over(self, bound: float) -> int:
        """How many looks were later than this, which must be one of BUCKETS."""
        return sum(self.counts[BUCKETS.index(bound) + 1 :])

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds and how many were no later, as Prometheus wants them."""
        found, so_far = [], 0
        for bound, count in zip((*map(str, BUCKETS), "+Inf"), self.counts, strict=True):
            so_far += count
            found.append((bound, float(so_far)))
        return found

    def take_longest_lately(self, listener: str) -> float:
        """The worst since the listener's last call."""
        worst, self.longest_lately[listener] = self.longest_lately[listener], 0.0
        return worst


class LoopWatch:
    """Looks every few milliseconds how late it is: by so much was the loop blocked, by one callback or several.

    `wall` is how long others waited, `own` what of that this thread was really at work: the rest the machine has
    given to other processes. A look costs 3 µs while the loop is busy, 40 with the waking while it rests: 0.1 to 0.4 %
    of a core (measured, decision 0012).

    With `tell_seconds` a thread of its own looks on and logs where the loop is when it has worked for so long.
    Inside C code that keeps Python's lock it sees only the line that follows.
    """

    def __init__(self, *, tell_seconds: float = 0.0) -> None:
        self.wall = Late()
        self.own = Late()
        self._tell_seconds = tell_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._next: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._used = 0.0
        self._stopped = threading.Event()

    def start(self) -> None:
        """Watch the running loop."""
        self._loop = asyncio.get_running_loop()
        self._plan()
        if self._tell_seconds:
            loop_thread = threading.get_ident()
            threading.Thread(target=self._look_on, args=(loop_thread,), daemon=True, name="loop watch").start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        if self._next is not None:
            self._next.cancel()

    def _plan(self) -> None:
        assert self._loop is not None
        self._used = time.thread_time()
        self._due = time.perf_counter() + TICK_SECONDS
        self._next = self._loop.call_later(TICK_SECONDS, self._look)

    def _look(self) -> None:
        late = max(0.0, time.perf_counter() - self._due)
        self.wall.note(late)
        self.own.note(min(late, time.thread_time() - self._used))
        self._plan()

    def _look_on(self, loop_thread: int) -> None:
        clock = time.pthread_getcpuclockid(loop_thread)
        while not self._stopped.wait(TICK_SECONDS):
            due, used = self._due, self._used
            if time.clock_gettime(clock) - used <= self._tell_seconds:
                continue
            at = _innermost(sys._current_frames().get(loop_thread))
            while self._due == due and not self._stopped.wait(0.001):
                pass  # until it is over, to say how long it was
            wall, own = time.perf_counter() - due, time.clock_gettime(clock) - used
            log.warning("the event loop was blocked for %.0f ms, of work %.0f ms, in %s", 1000 * wall, 1000 * own, at)


def _innermost(frame: FrameType | None) -> str:
    """Where a thread is, in one line."""
    frames = traceback.extract_stack(frame)[-FRAMES:] if frame is not None else []
    return " ← ".join(f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in reversed(frames))


# -- garbage --------------------------------------------------------------------------------------------------


class Tidying:
    """Collects Python's garbage in pieces that are too small to be noticed.

    A full collection looks at every object: 0.2 to 0.4 s with 5,000 nodes. So none comes by itself. What has outlived
    a collection of young objects is set aside (`gc.freeze`), where none looks at it again; it still goes as soon as
    nothing refers to it. Only what refers to itself when it becomes garbage would stay, and nothing here does: no
    request leaves such garbage (a test promises that), and `python_gc_objects_collected` would show it.
    """

    def begin(self) -> None:
        """What modules have made is set aside, and from now on `tidy` decides."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(*USUAL_THRESHOLDS[:2], RARELY)

    def end(self) -> None:
        """All as it was."""
        gc.set_threshold(*USUAL_THRESHOLDS)
        gc.unfreeze()

    async def run(self) -> None:
        """Be tidy until cancelled."""
        self.begin()
        try:
            while True:
                await asyncio.sleep(TIDY_SECONDS)
                self.tidy()
        finally:
            self.end()

    def tidy(self) -> None:
        """Now and then: once enough is new, look at the young and set all aside."""
        if gc.get_count()[2]:
            gc.collect(1)
            gc.freeze()
