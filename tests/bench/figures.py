"""What every part of the bench says: spreads of times, figures beside their targets, and JSON of both."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of many times, in milliseconds: so many, the middle, the slow ones, the slowest."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float

    @property
    def tail(self) -> float:
        """How much slower the slow ones are than the middle."""
        return self.p99 / self.p50 if self.p50 else 0.0


def spread(nanoseconds: Sequence[int]) -> Spread:
    """Of what perf_counter_ns counted; every percentile is a time that was measured."""
    if not nanoseconds:
        return Spread(0, 0.0, 0.0, 0.0, 0.0)
    ordered = sorted(nanoseconds)
    p50, p90, p99 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] / 1e6 for share in (0.5, 0.9, 0.99))
    return Spread(len(ordered), round(p50, 4), round(p90, 4), round(p99, 4), round(ordered[-1] / 1e6, 4))


@dataclass(frozen=True, slots=True)
class Target:
    """A figure beside what it should be; see the package's docstring."""

    key: str
    what: str
    target: float
    measured: float
    unit: str = "×"
    at_least: bool = False
    ratio: bool = False
    note: str = ""

    @property
    def held(self) -> bool:
        """Whether it is as good as wanted."""
        return self.measured >= self.target if self.at_least else self.measured <= self.target


def target_of(said: Mapping[str, Any]) -> Target:
    """From a part's JSON; what a part leaves out is as if nothing special."""
    return Target(
        key=str(said.get("key") or said["what"]),
        what=str(said["what"]),
        target=float(said["target"]),
        measured=float(said["measured"]),
        unit=str(said.get("unit", "")),
        at_least=bool(said.get("at_least", False)),
        ratio=bool(said.get("ratio", False)),
        note=str(said.get("note", "")),
    )


def in_units(value: float, unit: str) -> str:
    """Three digits and the unit."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}{unit if unit == '×' else ' ' + unit if unit else ''}"


def show_targets(targets: Sequence[Target], console: Console, title: str = "") -> None:
    """What, target, measured, held or not."""
    table = Table(title=title or None, title_justify="left")
    table.add_column("What")
    table.add_column("Target", justify="right")
    table.add_column("Measured", justify="right")
    table.add_column("Held")
    table.add_column("Note")
    for each in targets:
        bound = "at least" if each.at_least else "at most"
        table.add_row(
            each.what,
            f"{bound} {in_units(each.target, each.unit)}",
            in_units(each.measured, each.unit),
            "held" if each.held else "[bold red]not held[/]",
            each.note,
        )
    console.print(table)


def write(path: Path, figures: Json, targets: Sequence[Target]) -> None:
    """A part's JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"targets": [asdict(each) for each in targets], **figures}, indent=1) + "\n")
