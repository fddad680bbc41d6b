"""`make bench`: every part of the bench in a process of its own, and one table of what was wanted and what was found.

    python -m tests.bench [--quick] [--only verbs,plans] [--without throughput] [--out out/bench]

    part (python -m tests.bench.PART --json FILE) ──one after another──▶ out/bench/PART.json ──▶ out/bench/speed.json

A part that fails or takes too long leaves the others alone, and the whole run fails. Nothing else should run on the
machine meanwhile; what it was and how busy it was stands in the JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.bench.figures import Target, show_targets, target_of
from tests.bench.machine import machine, words
from tests.bench.world import end_with_parent


@dataclass(frozen=True, slots=True)
class Part:
    """A module of this package, its arguments in full and in short, and the minutes that each may take at most."""

    name: str
    about: str
    minutes: float = 10.0
    quick_minutes: float = 4.0
    arguments: tuple[str, ...] = ()
    quick_arguments: tuple[str, ...] = ("--quick",)

    @property
    def is_there(self) -> bool:
        """Whether this checkout has it."""
        return find_spec(f"tests.bench.{self.name}") is not None

    def command(self, figures: Path, *, quick: bool) -> list[str]:
        """What is run."""
        arguments = self.quick_arguments if quick else self.arguments
        return [sys.executable, "-m", f"tests.bench.{self.name}", "--json", str(figures), *arguments]


VERBS_IN_SHORT = ("--quick", "--most-nodes", "default")
SMALL_CLUSTER = ("--nodes", "500", "--pods", "4000")

PARTS = (
    Part("verbs", "filter and prioritize beside an echo of the same bytes", quick_arguments=VERBS_IN_SHORT),
    Part("changed", "one changed node"),
    Part("plans", "joint plans"),
    Part("throughput", "pods per second through the real kube-scheduler", 20.0, 6.0, ("--minutes", "10")),
    Part("storm", "a scheduling storm", 20.0, quick_arguments=SMALL_CLUSTER),
    Part("cold_start", "a cold start", quick_arguments=SMALL_CLUSTER),
)
"""In full about half an hour together."""


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a part: `failed` says what went wrong; its figures where there are any."""

    part: str
    seconds: float
    failed: str
    figures: Mapping[str, Any]

    @property
    def targets(self) -> list[Target]:
        """Its rows of the table."""
        return [target_of(said) for said in self.figures.get("targets", ())]


def run_part(part: Part, out: Path, console: Console, *, quick: bool) -> Done:
    """Run it to its end, showing what it says."""
    figures = out / f"{part.name}.json"
    figures.unlink(missing_ok=True)
    console.rule(f"{part.name}: {part.about}")
    began = time.monotonic()
    minutes = part.quick_minutes if quick else part.minutes
    failed = ""
    process = subprocess.Popen(part.command(figures, quick=quick), preexec_fn=end_with_parent)
    try:
        status = process.wait(timeout=60 * minutes)
        failed = f"ended with status {status}" if status else ""
    except subprocess.TimeoutExpired:
        failed = f"took more than {minutes:g} minutes"
    finally:
        _end(process)
    said = json.loads(figures.read_text()) if figures.exists() else {}
    if not said and not failed:
        failed = "left no figures"
    return Done(part.name, round(time.monotonic() - began, 1), failed, said)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGINT first, so that the part ends what it has started."""
    for ask, seconds in ((lambda: process.send_signal(2), 30), (process.terminate, 10), (process.kill, 10)):
        if process.poll() is None:
            ask()
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue


def chosen(only: Sequence[str], without: Sequence[str], console: Console) -> list[Part]:
    """The parts to run; ValueError for a name that is none."""
    unknown = {*only, *without} - {part.name for part in PARTS}
    if unknown:
        raise ValueError(
            f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in PARTS)}"
        )
    wanted = [part for part in PARTS if (not only or part.name in only) and part.name not in without]
    for part in wanted:
        if not part.is_there:
            console.print(f"{part.name} is not in this checkout: left out")
    return [part for part in wanted if part.is_there]


def summary(about: dict[str, Any], done: Sequence[Done], *, quick: bool) -> dict[str, Any]:
    """out/bench/speed.json."""
    return {
        "machine": about,
        "quick": quick,
        "targets": [
            {"part": each.part, **asdict(target), "held": target.held} for each in done for target in each.targets
        ],
        "parts": {
            each.part: {"seconds": each.seconds, "failed": each.failed, "figures": each.figures} for each in done
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print, write; 1 where a part has failed. A target that is not held fails nothing: it is what is measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the short form of each part: tries the bench")
    parser.add_argument(
        "--only", type=_names, default=[], help="these parts: " + ", ".join(part.name for part in PARTS)
    )
    parser.add_argument("--without", type=_names, default=[], help="all but these parts")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="where the figures go")
    options = parser.parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    try:
        wanted = chosen(options.only, options.without, console)
    except ValueError as wrong:
        parser.error(str(wrong))
    about = machine()
    console.print(words(about))
    options.out.mkdir(parents=True, exist_ok=True)
    done = [run_part(part, options.out, console, quick=options.quick) for part in wanted]
    console.rule("all of it")
    show_targets([target for each in done for target in each.targets], console, words(about))
    for each in done:
        console.print(f"{each.part}: {each.seconds:.0f} s{f', [bold red]{each.failed}[/]' if each.failed else ''}")
    speed = options.out / "speed.json"
    speed.write_text(json.dumps(summary(about, done, quick=options.quick), indent=1) + "\n")
    console.print(f"written to {speed}")
    return 1 if any(each.failed for each in done) else 0


def _names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


if __name__ == "__main__":
    sys.exit(main())
