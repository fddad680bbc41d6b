"""`make bench-check`: whether a ratio has become 1.5 times worse than the committed one.

    python -m tests.bench.check [--only verbs,plans] [--update] [--figures out/bench]

Runs the parts that measure ratios and compares each with docs/bench/ratios.json. Ratios only, since times of one
machine say little about another's. A part in which something is worse is run once more, and each ratio counts by its
better turn, so that one bad moment of the machine raises no alarm. `--update` writes what was measured to the committed
file instead, `--figures` takes the JSON of an earlier `make bench` and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.bench.__main__ import PARTS, Part, run_part
from tests.bench.figures import Target, target_of
from tests.bench.machine import machine

COMMITTED = Path("docs/bench/ratios.json")
OUT = Path("out/bench/check")

WORSE = 1.5

MEASURED = ("verbs", "plans")
"""Parts that measure ratios within minutes, and without a control plane."""

Ratios = Mapping[str, Target]


@dataclass(frozen=True, slots=True)
class Compared:
    """A ratio then and now. `now` is None where it was not measured any more."""

    key: str
    what: str
    then: float
    now: float | None
    at_least: bool

    @property
    def factor(self) -> float:
        """How many times worse; below 1 it is better."""
        if self.now is None:
            return float("inf")
        better, worse = (self.now, self.then) if self.at_least else (self.then, self.now)
        return worse / better if better else float("inf")

    @property
    def is_worse(self) -> bool:
        """Whether that fails the check."""
        return self.factor >= WORSE


def ratios_in(part: str, targets: Iterable[Target]) -> dict[str, Target]:
    """Of a part's targets those that are ratios, by a key that begins with the part."""
    named = [
        target if target.key.startswith(f"{part}.") else replace(target, key=f"{part}.{target.key}")
        for target in targets
    ]
    return {target.key: target for target in named if target.ratio}


def compare(committed: Ratios, now: Ratios, parts: Sequence[str]) -> list[Compared]:
    """Every committed ratio of these parts, the worst first."""
    found = [
        Compared(key, then.what, then.measured, now[key].measured if key in now else None, then.at_least)
        for key, then in committed.items()
        if key.partition(".")[0] in parts
    ]
    return sorted(found, key=lambda each: -each.factor)


def better_of(first: Ratios, second: Ratios) -> dict[str, Target]:
    """Of each ratio the better turn."""
    best = dict(first)
    for key, target in second.items():
        known = best.get(key)
        if known is None or (target.measured > known.measured) == target.at_least:
            best[key] = target
    return best


def read(path: Path) -> dict[str, Target]:
    """The committed ratios; none where there is no file yet."""
    said = json.loads(path.read_text())["ratios"] if path.exists() else []
    return {target.key: target for target in map(target_of, said)}


def written(about: Mapping[str, Any], ratios: Ratios) -> str:
    """The committed file; three decimals, so that a new one can be read beside the old."""
    rows = [
        {
            "key": each.key,
            "what": each.what,
            "target": each.target,
            "measured": round(each.measured, 3),
            "unit": each.unit,
            "at_least": each.at_least,
            "ratio": True,
        }
        for _, each in sorted(ratios.items())
    ]
    return json.dumps({"machine": about, "ratios": rows}, indent=1, ensure_ascii=False) + "\n"


def measured(parts: Sequence[Part], console: Console) -> dict[str, Target]:
    """Run them; SystemExit where one fails."""
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, Target] = {}
    for part in parts:
        done = run_part(part, OUT, console, quick=False)
        if done.failed:
            raise SystemExit(f"{part.name} {done.failed}: nothing can be compared")
        found |= ratios_in(part.name, done.targets)
    return found


def earlier(parts: Sequence[Part], folder: Path) -> dict[str, Target]:
    """What `make bench` has left of them."""
    found: dict[str, Target] = {}
    for part in parts:
        said = json.loads((folder / f"{part.name}.json").read_text())
        found |= ratios_in(part.name, [target_of(each) for each in said["targets"]])
    return found


def show(compared: Sequence[Compared], console: Console) -> None:
    """Then, now and the verdict."""
    table = Table(title=f"Ratios; {WORSE:g} times worse fails", title_justify="left")
    table.add_column("What")
    for title in ("Committed", "Now", "Times worse"):
        table.add_column(title, justify="right")
    table.add_column("")
    for each in compared:
        now = "not measured" if each.now is None else f"{each.now:.2f}×"
        verdict = "[bold red]worse[/]" if each.is_worse else ""
        table.add_row(each.what, f"{each.then:.2f}×", now, f"{each.factor:.2f}", verdict)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and compare, or update."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.check", description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(MEASURED), help="parts")
    parser.add_argument("--update", action="store_true", help=f"write {COMMITTED} instead of comparing with it")
    parser.add_argument("--figures", type=Path, help="a folder with an earlier run's JSON: nothing is run")
    parser.add_argument("--committed", type=Path, default=COMMITTED)
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    parts = [part for part in PARTS if part.name in options.only]
    about = machine()
    committed = read(options.committed)
    now = earlier(parts, options.figures) if options.figures else measured(parts, console)
    if options.update:
        kept = {key: each for key, each in committed.items() if key.partition(".")[0] not in options.only}
        options.committed.parent.mkdir(parents=True, exist_ok=True)
        options.committed.write_text(written(about, {**kept, **now}))
        console.print(f"{len(now)} ratios written to {options.committed}")
        return 0
    if not committed:
        raise SystemExit(f"{options.committed} has no ratios yet: `python -m tests.bench.check --update` writes them")
    compared = compare(committed, now, options.only)
    again = {each.key.partition(".")[0] for each in compared if each.is_worse and each.now is not None}
    if again and not options.figures:
        console.print(f"something in {', '.join(sorted(again))} is worse: measured once more")
        now = better_of(now, measured([part for part in parts if part.name in again], console))
        compared = compare(committed, now, options.only)
    show(compared, console)
    worse = [each for each in compared if each.is_worse]
    for each in worse:
        console.print(f"[bold red]worse:[/] {each.what} ({each.key})")
    new = sorted(set(now) - set(committed))
    if new:
        console.print(f"not committed yet: {', '.join(new)}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
