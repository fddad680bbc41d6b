"""`tangram tables`: the value tables that the service would use, and how long they take to find."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as Grid

from solver.geometry import Geometry
from solver.market import Shape, Table, shape_of, solve_table
from solver.products import PRODUCTS


@dataclass(frozen=True, slots=True)
class Solved:
    """A table, the products (or the name) that it is for, and what it took."""

    names: tuple[str, ...]
    table: Table
    seconds: float


def geometries() -> dict[Geometry, tuple[str, ...]]:
    """One geometry of every shape that the products have, with the keys of all that have it."""
    first: dict[Shape, Geometry] = {}
    keys: dict[Geometry, tuple[str, ...]] = {}
    for product in PRODUCTS:
        if product.geometry is not None:
            known = first.setdefault(shape_of(product.geometry)[0], product.geometry)
            keys[known] = (*keys.get(known, ()), product.key)
    return keys


def solve(wanted: Mapping[Geometry, tuple[str, ...]], mixes: Sequence[Mapping[str, float] | None]) -> Iterator[Solved]:
    """One table for each geometry."""
    for (geometry, names), mix in zip(wanted.items(), mixes, strict=True):
        began = time.perf_counter()
        table = solve_table(geometry, mix)
        yield Solved(names, table, time.perf_counter() - began)


def as_json(solved: Sequence[Solved]) -> Mapping[str, object]:
    """Every state's value, for programs; states as blocks [start, units, and what else they take]."""
    return {
        "tables": [
            {
                "products": one.names,
                "method": one.table.method,
                "states": one.table.states,
                "merged": one.table.merged,
                "seconds": round(one.seconds, 3),
                "mix": dict(one.table.mix),
                "values": [
                    {"held": [[block.start, block.size, *block.uses] for block in held], "milli": milli}
                    for held, milli in one.table.values.items()
                ],
            }
            for one in solved
        ]
    }


def show(solved: Sequence[Solved], console: Console) -> None:
    """A row for each table."""
    table = Grid()
    table.add_column("Geometry of")
    for title in ("Units", "Profiles", "States", "Merged", "Lowest value"):
        table.add_column(title, justify="right")
    table.add_column("Method")
    table.add_column("Seconds", justify="right")
    for one in solved:
        geometry = one.table.geometry
        table.add_row(
            ", ".join(one.names),
            str(geometry.width),
            str(len(geometry.profiles)),
            str(one.table.states or "–"),
            str(one.table.merged or "–"),
            str(min(one.table.values.values(), default="–")),
            one.table.method,
            f"{one.seconds:.2f}",
        )
    console.print(table)
    console.print("Values are in milli-GPU against an empty GPU. Boards that differ in names only share a table.")
