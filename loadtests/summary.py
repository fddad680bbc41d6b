"""What came of a load test: times by call, and how they compare with an echo. Knows nothing of locust.

Locust keeps whole milliseconds; half of what is measured here is below one. So times are kept in buckets that are
one percent wide each, from a microsecond on: as small after a week as after a second, and they can be added up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

Json = dict[str, Any]

FINEST_MS = 0.001
GROWTH = math.log(1.01)

ECHO = "echo "
"""The name of a repeated call is that of the call, after this."""

MOST_ERRORS = 20  # that are told
WIDTH = 124  # of a table, in characters

SET_UP = "(set up)"
"""The name of calls that prepare for others: in locust's tables, not in ours."""


@dataclass(slots=True)
class Histogram:
    """Times in ms: percentiles to one percent, the largest exactly."""

    counts: Counter[int] = field(default_factory=Counter)
    largest: float = 0.0

    def add(self, ms: float) -> None:
        """One more."""
        self.counts[max(0, math.ceil(math.log(max(ms, FINEST_MS) / FINEST_MS) / GROWTH))] += 1
        self.largest = max(self.largest, ms)

    def percentile(self, share: float) -> float:
        """No more than this part of the times is longer."""
        rank, seen = math.ceil(share * self.counts.total()), 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return min(self.largest, FINEST_MS * math.exp(bucket * GROWTH))
        return 0.0

    def as_json(self) -> Json:
        """What a summary says of it."""
        shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
        times = {f"{name}_ms": round(self.percentile(share), 4) for name, share in shares.items()}
        return {**times, "max_ms": round(self.largest, 4)}


@dataclass(slots=True)
class Calls:
    """All calls of one name. `from_due`: counted from when they should have been sent; empty where nobody said."""

    times: Histogram = field(default_factory=Histogram)
    from_due: Histogram = field(default_factory=Histogram)
    sent: int = 0
    failed: int = 0
    refused: int = 0

    def add(self, other: Calls) -> None:
        """Those of another process."""
        for mine, theirs in ((self.times, other.times), (self.from_due, other.from_due)):
            mine.counts.update(theirs.counts)
            mine.largest = max(mine.largest, theirs.largest)
        self.sent, self.failed, self.refused = (
            self.sent + other.sent,
            self.failed + other.failed,
            self.refused + other.refused,
        )


@dataclass(slots=True)
class Recorder:
    """Listens to every call. Failed calls are counted, their times are not."""

    calls: dict[str, Calls] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def record(
        self, name: str, ms: float, *, error: str = "", late_ms: float | None = None, refused: bool = False
    ) -> None:
        """One call is over. `refused`: Tangram said no in good order."""
        calls = self.calls.setdefault(name, Calls())
        calls.sent += 1
        calls.refused += refused
        if error:
            calls.failed += 1
            self.errors[f"{name}: {error}"] += 1
            return
        calls.times.add(ms)
        if late_ms is not None:
            calls.from_due.add(late_ms + ms)

    def take(self) -> Recorder:
        """Everything so far; begins anew."""
        taken = Recorder(self.calls, self.errors)
        self.calls, self.errors = {}, Counter()
        return taken

    def add(self, other: Recorder) -> None:
        """What another process has recorded."""
        for name, calls in other.calls.items():
            self.calls.setdefault(name, Calls()).add(calls)
        self.errors.update(other.errors)

    def wire(self) -> Json:
        """For another process; `read` is the other way."""
        return {
            "calls": {
                name: [each.sent, each.failed, each.refused, *_wire(each.times), *_wire(each.from_due)]
                for name, each in self.calls.items()
            },
            "errors": dict(self.errors),
        }

    @classmethod
    def read(cls, wire: Json) -> Recorder:
        """What another process has sent."""
        calls = {
            name: Calls(
                Histogram(Counter(times), largest),
                Histogram(Counter(due), latest),
                sent=sent,
                failed=failed,
                refused=no,
            )
            for name, (sent, failed, no, times, largest, due, latest) in wire["calls"].items()
        }
        return cls(calls, Counter(wire["errors"]))

    def failures(self) -> list[str]:
        """Why the load test failed, in words; empty where it did not."""
        words = [f"{count} × {error}" for error, count in sorted(self.errors.items(), key=_frequent)[:MOST_ERRORS]]
        if not any(calls.sent for name, calls in self.calls.items() if name != SET_UP):
            words.append("nothing was sent")
        bind = self.calls.get("bind")
        if bind is not None and bind.refused == bind.sent:
            words.append("every bind was refused")
        return words

    def rows(self, seconds: float) -> list[Json]:
        """One for each kind of call, beside its echo where there is one."""
        names = sorted((name for name in self.calls if name != SET_UP), key=_order)
        return [self._row(name, seconds) for name in names]

    def _row(self, name: str, seconds: float) -> Json:
        calls, echo = self.calls[name], self.calls.get(ECHO + name)
        verb, size = _parts(name)
        row = {
            "name": name,
            "verb": verb,
            "nodes": size,
            "sent": calls.sent,
            "failed": calls.failed,
            "refused": calls.refused,
            "per_second": round(calls.sent / seconds, 2) if seconds else 0.0,
            **calls.times.as_json(),
            "from_due": calls.from_due.as_json() if calls.from_due.counts else None,
        }
        median = row["p50_ms"]
        row["p99_to_p50"] = round(row["p99_ms"] / median, 2) if median else None
        row["to_echo"] = _ratios(row, echo.times.as_json()) if echo is not None and echo.times.counts else None
        return row


def _wire(times: Histogram) -> tuple[dict[int, int], float]:
    return dict(times.counts), times.largest


def _ratios(row: Mapping[str, float], echo: Mapping[str, float]) -> Json:
    return {share: round(row[f"{share}_ms"] / echo[f"{share}_ms"], 3) for share in ("p50", "p90", "p99")}


def _parts(name: str) -> tuple[str, int | None]:
    verb, _, size = name.rpartition(" ")
    return (verb, int(size)) if verb and size.isdecimal() else (name, None)


def _frequent(error: tuple[str, int]) -> tuple[int, str]:
    return -error[1], error[0]


def _order(name: str) -> tuple[bool, str, int]:
    verb, size = _parts(name)
    return name.startswith(ECHO), verb, size or 0


TITLES = (
    "sent",
    "failed",
    "refused",
    "per s",
    "p50",
    "p90",
    "p99",
    "max",
    "p99:p50",
    "p50:echo",
    "p99:echo",
    "due p99",
)


def console() -> Console:
    """For tables: wide enough also where nobody says how wide the paper is."""
    return Console(highlight=False, width=max(Console().width, WIDTH))


def table_of(title: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """For a terminal, in milliseconds."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("call", no_wrap=True)
    for each in TITLES:
        table.add_column(each, justify="right", no_wrap=True)
    for row in rows:
        ratios, due = row["to_echo"] or {}, row["from_due"] or {}
        counts = [str(row[name]) for name in ("sent", "failed", "refused")]
        times = [_ms(row[f"{name}_ms"]) for name in ("p50", "p90", "p99", "max")]
        shares = [_ms(share) for share in (row["p99_to_p50"], ratios.get("p50"), ratios.get("p99"), due.get("p99_ms"))]
        table.add_row(row["name"], *counts, f"{row['per_second']:.1f}", *times, *shares)
    return table


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"
