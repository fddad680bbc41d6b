"""Tiny worlds for tests, in one line each. Shared by all tests; nothing random here (see strategies)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from solver.cluster import Device, Gpu, Node, Snapshot
from solver.demand import Ask, Demand, Problem
from solver.geometry import Geometry, Slice
from solver.products import product


def geometry_of(key: str) -> Geometry:
    """How this product can be cut."""
    geometry = product(key).geometry
    assert geometry is not None
    return geometry


A30 = geometry_of("A30-24")
A100 = geometry_of("A100-80")
H100 = geometry_of("H100-80")
RTX = geometry_of("RTXPRO6000-96")


def gpu(name: str, index: int = 0, **fields: object) -> Gpu:
    """A GPU called `name-index`, whole unless a geometry is given."""
    made = Gpu(uuid=f"{name}-{index}", index=index, product="Test GPU", memory_mib=80_000)
    return replace(made, **fields)  # type: ignore[arg-type]


def node(name: str, gpus: int = 8, *, gbs: int = 100, numa: Sequence[int | None] | None = None) -> Node:
    """Whole GPUs, every pair linked alike; NUMA nodes as given, one by default."""
    numa = numa or [0] * gpus
    links = tuple(tuple(0 if a == b else gbs for b in range(gpus)) for a in range(gpus))
    return Node(name, tuple(gpu(name, i, numa=numa[i]) for i in range(gpus)), links)


def mig_node(name: str, gpus: int = 1, geometry: Geometry = A100, idle: Sequence[Slice] = ()) -> Node:
    """GPUs in MIG mode; the first has these instances on it."""
    made = node(name, gpus, gbs=0)
    cut = [replace(gpu, geometry=geometry, instances=tuple(idle) if gpu.index == 0 else ()) for gpu in made.gpus]
    return replace(made, gpus=tuple(cut))


def whole(name: str, *indices: int) -> tuple[Device, ...]:
    """Whole GPUs of a built node."""
    return tuple(Device(f"{name}-{index}") for index in indices)


def part(name: str, index: int, profile: str, start: int) -> Device:
    """A slice of a GPU of a built node."""
    return Device(f"{name}-{index}", Slice(profile, start))


def one(profile: str) -> Demand:
    """A demand for one slice."""
    return slices(**{profile: 1})


def slices(gpus: int = 0, **counts: int) -> Demand:
    """A demand for slices, and whole GPUs beside them."""
    return Demand.of(gpus, **counts)


def problem(
    nodes: Sequence[Node], demands: Sequence[Demand], taken: Mapping[str, tuple[Device, ...]] | None = None
) -> Problem:
    """Asks a, b, c, … on these nodes."""
    asks = tuple(Ask(f"ask-{i}", demand) for i, demand in enumerate(demands))
    return Problem(Snapshot(tuple(nodes), taken or {}), asks)


def indices(node: Node, devices: Sequence[Device]) -> list[int]:
    """The index of each device's GPU."""
    by_uuid = {gpu.uuid: gpu.index for gpu in node.gpus}
    return [by_uuid[device.gpu] for device in devices]
