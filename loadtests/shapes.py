"""How many users there are when: plans for `LOAD_SHAPE`, which `locustfile` hands to locust.

burst  ▁▁▁█▁▁▁█▁▁▁█    few, and all at once for a moment, again and again
soak   ▁▂▃▃▃▃▃▃▃▃▃▃    a gentle start, then the same for hours: what grows, what leaks
steps  ▁▁▂▂▃▃▄▄▅▅▆▆    more and more: where does it bend?
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

MOST_RAMP_SECONDS = 60.0
STEPS = 6
BURST_EVERY_SECONDS, BURST_SECONDS = 30.0, 5.0

Plan = Callable[[float, int, float], int]
"""Users after so many seconds, of so many at most, in a test of so many seconds."""


def burst(at: float, most: int, seconds: float) -> int:
    """A tenth of the users; in the last seconds of every half minute all of them."""
    every = min(BURST_EVERY_SECONDS, seconds)
    calm = every * (1 - BURST_SECONDS / BURST_EVERY_SECONDS)
    return most if at % every >= calm else ceil(most / 10)


def soak(at: float, most: int, seconds: float) -> int:
    """All users, after a ramp of a minute or a tenth of the time."""
    ramp = min(MOST_RAMP_SECONDS, seconds / 10)
    return most if at >= ramp else max(1, ceil(most * at / ramp))


def steps(at: float, most: int, seconds: float) -> int:
    """A sixth of the users more in each sixth of the time."""
    step = min(STEPS, 1 + int(STEPS * at / seconds))
    return max(1, ceil(most * step / STEPS))


SHAPES: dict[str, Plan] = {"burst": burst, "soak": soak, "steps": steps}
