"""Sample nodes with real wiring, and the grammar that names them. For trying things, demos and tests.

Source: topologies.json of the project's shared data (2026-11-20). Matrices were seen on real hosts for
DGX-1V (several dumps), DGX A100 (nccl 1505), HGX H100 (nccl 2150) and GB200 trays; bridged PCIe boards and
L40S are composed. UUIDs are made up from node name and index.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from solver.cluster import Gpu, Node
from solver.products import product
from solver.topology import PCIE_GBS

_NAMESPACE = uuid.UUID("6f1d4f43-5a1c-4b38-9a1e-7a4e6f1e7a90")

Matrix = tuple[tuple[int, ...], ...]

_NODE, _SYS = PCIE_GBS["node"], PCIE_GBS["system"]


def _matrix(size: int, gbs: Callable[[int, int], int]) -> Matrix:
    return tuple(tuple(0 if a == b else gbs(min(a, b), max(a, b)) for b in range(size)) for a in range(size))


def _all_to_all(size: int, gbs: int) -> Matrix:
    """Every pair alike: through NVSwitches a pair can use all links of either GPU."""
    return _matrix(size, lambda a, b: gbs)


def _pairs(size: int, gbs: int) -> Matrix:
    """Neighbours 0-1, 2-3, … at this bandwidth, the half of a socket over NODE, the rest over SYS."""
    half = max(2, size // 2)
    return _matrix(size, lambda a, b: gbs if a // 2 == b // 2 else _NODE if a // half == b // half else _SYS)


def _quads(size: int, gbs: int) -> Matrix:
    """Two four-way bridges, one per socket."""
    return _matrix(size, lambda a, b: gbs if a // 4 == b // 4 else _SYS)


def _sockets(size: int) -> Matrix:
    """No links and no shared switches: NODE within a socket, SYS across."""
    half = max(1, size // 2)
    return _matrix(size, lambda a, b: _NODE if a // half == b // half else _SYS)


_DGX_1V_LINKS = """
X 1 1 2 2 . . .
1 X 2 1 . 2 . .
1 2 X 2 . . 1 .
2 1 2 X . . . 1
2 . . . X 1 1 2
. 2 . . 1 X 2 1
. . 1 . 1 2 X 2
. . . 1 2 1 2 X
"""
"""NVLinks between the eight V100 of a DGX-1V, 50 GB/s each both ways; a dot is SYS."""


def _dgx_1v() -> Matrix:
    rows = [line.split() for line in _DGX_1V_LINKS.split("\n") if line]
    return _matrix(8, lambda a, b: _SYS if rows[a][b] == "." else 50 * int(rows[a][b]))


def _mesh_without(out: int, size: int, gbs: int) -> Matrix:
    """An NVSwitch mesh with one GPU outside it, reached over PCIe."""
    half = size // 2
    return _matrix(size, lambda a, b: gbs if out not in (a, b) else _NODE if a // half == b // half else _SYS)


@dataclass(frozen=True, slots=True)
class _Shape:
    product: str
    numa: tuple[int, ...]
    links: Matrix


_TWO_SOCKETS = (0, 0, 0, 0, 1, 1, 1, 1)

_SHAPES = {
    "8xH100": _Shape("H100-80", _TWO_SOCKETS, _all_to_all(8, 900)),
    "8xH100-one-out": _Shape("H100-80", _TWO_SOCKETS, _mesh_without(2, 8, 900)),
    "8xH200": _Shape("H200-141", _TWO_SOCKETS, _all_to_all(8, 900)),
    "8xB200": _Shape("B200-180", _TWO_SOCKETS, _all_to_all(8, 1800)),
    "8xA100": _Shape("A100-80", (3, 3, 1, 1, 7, 7, 5, 5), _all_to_all(8, 600)),
    "8xA100-40": _Shape("A100-40", (3, 3, 1, 1, 7, 7, 5, 5), _all_to_all(8, 600)),
    "8xA100PCIe": _Shape("A100-80-PCIE", _TWO_SOCKETS, _pairs(8, 600)),
    "4xA100PCIe": _Shape("A100-80-PCIE", (0, 0, 1, 1), _pairs(4, 600)),
    "8xV100": _Shape("V100-32", _TWO_SOCKETS, _dgx_1v()),
    "8xL40S": _Shape("L40S-48", _TWO_SOCKETS, _pairs(8, PCIE_GBS["single"])),
    "4xH100": _Shape("H100-80", (3, 1, 7, 5), _all_to_all(4, 300)),
    "4xH100NVL": _Shape("H100-94", (0, 0, 1, 1), _pairs(4, 600)),
    "8xH200NVL": _Shape("H200-141-NVL", _TWO_SOCKETS, _quads(8, 300)),
    "4xGB200": _Shape("GB200-186", (0, 0, 1, 1), _all_to_all(4, 1800)),
    "4xA30": _Shape("A30-24", (0, 0, 1, 1), _pairs(4, 200)),
    "2xA30": _Shape("A30-24", (0, 1), _sockets(2)),
    "4xL4": _Shape("L4-24", (0, 0, 1, 1), _sockets(4)),
    "4xT4": _Shape("T4-16", (0, 0, 1, 1), _sockets(4)),
    "8xRTXPRO6000": _Shape("RTXPRO6000-96", _TWO_SOCKETS, _sockets(8)),
}

KINDS = tuple(_SHAPES)
"""The boards there are samples of. Where the GPU can do MIG, `-mig` after the kind puts all GPUs of the node
in MIG mode and `-mig2` the last two."""

_KIND = re.compile(r"(?P<board>.+?)(?:-mig(?P<count>\d*))?")


def sample_node(name: str, kind: str) -> Node:
    """A node of this kind (`8xH100`, `8xA100-mig`, `8xA100-mig2`) with nothing on it."""
    match = _KIND.fullmatch(kind)
    shape = _SHAPES.get(match["board"]) if match else None
    if match is None or shape is None:
        raise ValueError(f"no sample node is called {kind!r}; there are {', '.join(KINDS)}, some with -mig")
    model, size = product(shape.product), len(shape.numa)
    in_mig_mode = 0 if match["count"] is None else int(match["count"] or size)
    if in_mig_mode and model.geometry is None:
        raise ValueError(f"{kind!r}: {model.name} has no MIG")
    if in_mig_mode > size:
        raise ValueError(f"{kind!r}: the node has {size} GPUs only")
    gpus = tuple(
        Gpu(
            uuid=gpu_uuid(name, index),
            index=index,
            product=model.name,
            memory_mib=model.memory_mib,
            numa=shape.numa[index],
            geometry=model.geometry if index >= size - in_mig_mode else None,
            architecture=model.architecture,
            compute_capability=model.kind.compute_capability,
            watts=model.watts,
        )
        for index in range(size)
    )
    return Node(name, gpus, shape.links)


def gpu_uuid(node: str, index: int) -> str:
    """A made-up UUID in NVML's form, always the same for a node's name and an index."""
    return f"GPU-{uuid.uuid5(_NAMESPACE, f'{node}/{index}')}"


def parse_samples(text: str) -> list[Node]:
    """Nodes from `kind:count,kind:count`, for example `8xH100:4,8xA100-mig:2`; a count of 1 may be left out.

    They are called after their kind and a running number (`8xh100-0`, …), as Kubernetes wants its names.
    """
    nodes: list[Node] = []
    numbers: dict[str, int] = {}
    for part in text.split(","):
        kind, colon, count = part.strip().partition(":")
        if not kind or (colon and not (count.isascii() and count.isdigit() and int(count) > 0)):
            raise ValueError(f"{part!r} is not kind:count, for example 8xH100:4")
        for _ in range(int(count) if colon else 1):
            number = numbers[kind] = numbers.get(kind, -1) + 1
            nodes.append(sample_node(f"{kind.lower()}-{number}", kind))
    return nodes
