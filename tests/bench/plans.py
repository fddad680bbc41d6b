"""The joint plan: 10,000 pending pods on 5,000 nodes of eight GPUs, and whether its time stays flat from 500 to 50,000.

    python -m tests.bench.plans [--json FILE] [--nodes 500,5000,50000] [--rounds 3] [--quick]

`app.replay.plans.size` does the measuring: two pods for each node, of nine kinds; empty clusters and half-full ones;
three nodes in ten in MIG mode. What counts is `decide`, the time from counts of states and demands to a plan that is
proven to be the best: nodes are read as they change, and placements are made from the plan once. The first decision
finds nothing known; the second is what a planner meets each time, and what is compared with the target. The process
keeps to one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console

from app.replay.plans import Size, fleet, show_sizes, size
from tests.bench.figures import Target, show_targets, write
from tests.bench.machine import machine, words

TARGET_MS = 100.0

FLAT = 3.0
"""What "flat" may mean: a hundred times the nodes and pods in no more than so many times the time. Chosen by feel."""

OPTIMAL = "optimal"


def run(nodes: Sequence[int], rounds: int, console: Console) -> list[Size]:
    """Each cluster so many times."""
    found = []
    for count in nodes:
        for half_full in (False, True):
            problem = fleet(count, half_full=half_full, seed=1)
            for _ in range(rounds):
                found.append(size("half-full" if half_full else "empty", problem))
            console.print(f"{found[-1].fleet}, {count:,} nodes: {found[-1].decide_again_seconds * 1e3:.0f} ms")
    return found


def targets_of(found: Sequence[Size]) -> list[Target]:
    """The time at each size, proofs, and how it grows from the smallest to the largest."""
    by_cluster: dict[tuple[str, int], list[Size]] = defaultdict(list)
    for each in found:
        by_cluster[each.fleet, each.nodes].append(each)
    again = {cluster: 1e3 * median(each.decide_again_seconds for each in some) for cluster, some in by_cluster.items()}
    targets = []
    for (name, nodes), some in by_cluster.items():
        first = 1e3 * median(each.decide_seconds for each in some)
        what = f"joint plan, {some[0].pods:,} pods on {nodes:,} nodes x 8 GPUs, {name}"
        note = (
            f"{some[0].states} states; {first:.0f} ms the first time; {sum(s.status == OPTIMAL for s in some)} proven"
        )
        targets.append(Target(f"plans.{name}.{nodes}", what, TARGET_MS, again[name, nodes], "ms", note=note))
    for name in dict.fromkeys(name for name, _ in by_cluster):
        counts = sorted(nodes for fleet_name, nodes in by_cluster if fleet_name == name)
        if len(counts) > 1:
            what = f"joint plan, {name}: {counts[-1]:,} nodes against {counts[0]:,}"
            growth = again[name, counts[-1]] / again[name, counts[0]]
            targets.append(Target(f"plans.{name}.growth", what, FLAT, growth, ratio=True))
    proven = 100 * sum(each.status == OPTIMAL for each in found) / len(found)
    targets.append(Target("plans.proven", "joint plans proven optimal", 100, proven, "%", at_least=True))
    return targets


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.plans", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--nodes", type=lambda text: [int(word) for word in text.split(",")], default=[500, 5000, 50_000]
    )
    parser.add_argument("--rounds", type=int, default=3, help="of each, the middle counts")
    parser.add_argument("--quick", action="store_true", help="up to 5,000 nodes, one round")
    parser.add_argument("--json", type=Path, help="where the figures go")
    options = parser.parse_args(argv)
    if options.quick:
        options.nodes, options.rounds = [n for n in options.nodes if n <= 5000], 1
    about = machine()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    console = Console(width=160) if not sys.stdout.isatty() else Console()
    console.print(f"joint plans on one core: {words(about)}")
    found = run(options.nodes, options.rounds, console)
    targets = targets_of(found)
    show_sizes(found, console)
    show_targets(targets, console, "The joint plan")
    if options.json is not None:
        write(options.json, {"machine": about, "rows": [asdict(each) for each in found]}, targets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
