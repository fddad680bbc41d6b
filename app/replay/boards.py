"""Whole GPUs on boards that are not all alike: is the best set of GPUs taken, each time? By brute force.

For every set of free GPUs of a board and every number of them, what the one-pod path takes is compared with all
sets there are: by price under the policy (must be the least), and by bandwidth alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.table import Table

from solver.cluster import Device, Node, Snapshot
from solver.demand import Ask, Demand, Problem
from solver.goals import DEFAULT_POLICY, Policy, plain_prices
from solver.plan import Placement
from solver.rank import quote
from solver.samples import sample_node

BOARDS = ("8xV100", "8xA100PCIe", "8xH100-one-out", "8xL40S", "8xH200NVL")
"""DGX-1V, bridged pairs, NVSwitch with one GPU out of the mesh, PCIe by switch and socket, four-way bridges."""

LINKS_FIRST = Policy("links first", ((("links", 1),), (("numa", 1),), (("value", 1),)))


@dataclass(frozen=True, slots=True)
class Row:
    """One board under one policy: how many choices there were, and in how many the best set was taken."""

    board: str
    policy: str
    choices: int
    cheapest: int
    widest: int
    empty_board: int
    empty_board_widest: int


def measure(board: str, policy: Policy = DEFAULT_POLICY) -> Row:
    """Every set of free GPUs, every number of GPUs from two."""
    node = sample_node("n", board)
    size = len(node.gpus)
    counts = dict.fromkeys(("choices", "cheapest", "widest", "empty_board", "empty_board_widest"), 0)
    for free in (set(some) for n in range(2, size + 1) for some in combinations(range(size), n)):
        taken = tuple(Device(node.gpus[i].uuid) for i in range(size) if i not in free)
        for gpus in range(2, len(free) + 1):
            found = quote(node, taken, Demand.of(gpus), policy)
            assert found is not None
            chosen = [i for i in free if Device(node.gpus[i].uuid) in found.devices]
            sets = list(combinations(sorted(free), gpus))
            widest = _bandwidth(node, chosen) == max(_bandwidth(node, some) for some in sets)
            counts["choices"] += 1
            counts["widest"] += widest
            if len(free) == size:
                counts["empty_board"] += 1
                counts["empty_board_widest"] += widest
            least = min(_price(node, taken, some, policy) for some in sets)
            counts["cheapest"] += policy.total(found.prices) == least
    return Row(board, policy.name, **counts)


def _bandwidth(node: Node, positions: Iterable[int]) -> int:
    return sum(node.links[a][b] for a, b in combinations(positions, 2))


def _price(node: Node, taken: tuple[Device, ...], positions: tuple[int, ...], policy: Policy) -> int:
    devices = tuple(sorted(Device(node.gpus[i].uuid) for i in positions))
    problem = Problem(Snapshot((node,), {node.name: taken}), (Ask("one", Demand.of(len(positions))),))
    return policy.total(plain_prices(problem, "one", Placement(node.name, devices), policy.values))


def run(console: Console) -> list[dict[str, Any]]:
    """All boards under the default policy and with links first; prints a table, answers rows for JSON."""
    rows = [measure(board, policy) for board in BOARDS for policy in (DEFAULT_POLICY, LINKS_FIRST)]
    table = Table(title="The best set of GPUs, by brute force over every set of free GPUs")
    for title in ("Board", "Policy"):
        table.add_column(title)
    for title in ("Choices", "Cheapest taken", "Widest taken", "Empty board: widest"):
        table.add_column(title, justify="right")
    for row in rows:
        shares = (row.cheapest / row.choices, row.widest / row.choices, row.empty_board_widest / row.empty_board)
        table.add_row(row.board, row.policy, str(row.choices), *(f"{share:.1%}" for share in shares))
    console.print(table)
    return [asdict(row) for row in rows]


if __name__ == "__main__":
    print(json.dumps({"rows": run(Console(stderr=True))}))
