"""Random small worlds for Hypothesis: geometries, nodes with odd wiring, what is taken, demands."""

from dataclasses import replace

from hypothesis import strategies as st

from solver.cluster import Device, Node
from solver.demand import Demand
from solver.geometry import Geometry, Profile, Slice, faults, grid
from tests.builders import A30, A100, H100, RTX, gpu

REAL = (A30, A100, H100, RTX)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Boards that no one has built: any width, profiles with odd starts, scarce compute and engines."""
    width = draw(st.integers(1, 6))
    profiles = []
    for number in range(draw(st.integers(1, 3))):
        size = draw(st.integers(1, width))
        starts = draw(st.sets(st.integers(0, width - size), min_size=1, max_size=3))
        profiles.append(
            Profile(
                name=f"{size}u.{number}",
                id=number,
                size=size,
                starts=tuple(sorted(starts)),
                compute_slices=draw(st.integers(0, size)),
                memory_mib=size * 1000,
                engines=(("ofa", 1),) if draw(st.booleans()) else (),
            )
        )
    return Geometry(width, draw(st.integers(1, width)), tuple(profiles), (("ofa", draw(st.integers(1, 2))),))


@st.composite
def nodes(draw: st.DrawFn, name: str = "n", largest: int = 4, real: bool = True) -> Node:
    """A node of a few GPUs, some in MIG mode with idle instances, some withheld, wired at random."""
    size = draw(st.integers(1, largest))
    kinds = st.sampled_from((A30, A100)) if real else geometries()
    geometry = draw(kinds)
    gpus = []
    for i in range(size):
        made = gpu(name, i, numa=draw(st.sampled_from((0, 1, None))))
        if draw(st.integers(0, 9)) == 0:
            made = replace(made, withheld="unhealthy")
        if draw(st.integers(0, 2)) == 0:
            made = replace(made, geometry=geometry, instances=draw(instances(geometry)))
        gpus.append(made)
    gbs = {(a, b): draw(st.sampled_from((20, 100, 100, 200))) for a in range(size) for b in range(a)}
    links = tuple(tuple(0 if a == b else gbs[max(a, b), min(a, b)] for b in range(size)) for a in range(size))
    return Node(name, tuple(gpus), links)


@st.composite
def instances(draw: st.DrawFn, geometry: Geometry) -> tuple[Slice, ...]:
    """Up to two instances that can stand on one board."""
    standing: list[Slice] = []
    for slice_ in draw(st.lists(st.sampled_from(sorted(grid(geometry).blocks)), max_size=2)):
        if slice_ not in standing and not faults(geometry, [*standing, slice_]):
            standing.append(slice_)
    return tuple(standing)


@st.composite
def taken_on(draw: st.DrawFn, node: Node) -> tuple[Device, ...]:
    """What is held on a node: some whole GPUs, some slices, existing ones and promised ones."""
    taken: list[Device] = []
    for gpu_ in node.gpus:
        if draw(st.booleans()):
            continue
        if gpu_.geometry is None:
            taken.append(Device(gpu_.uuid))
            continue
        standing = set(gpu_.instances)
        for slice_ in draw(st.lists(st.sampled_from(sorted(grid(gpu_.geometry).blocks)), max_size=2)):
            device = Device(gpu_.uuid, slice_)
            if device not in taken and not faults(gpu_.geometry, standing | {slice_}):
                standing.add(slice_)
                taken.append(device)
    return tuple(taken)


def profiles_of(*nodes: Node) -> list[str]:
    """The profiles that some GPU of these nodes offers."""
    return sorted(
        {profile.name for node in nodes for gpu in node.gpus if gpu.geometry for profile in gpu.geometry.profiles}
    )


@st.composite
def simple_demands(draw: st.DrawFn, *nodes: Node) -> Demand:
    """Whole GPUs, or one slice."""
    profiles = profiles_of(*nodes)
    if draw(st.booleans()) and profiles:
        return Demand.of(**{draw(st.sampled_from(profiles)): 1})
    return Demand.of(draw(st.integers(1, 4)))


@st.composite
def demands(draw: st.DrawFn, *nodes: Node) -> Demand:
    """Whole GPUs and slices of one or two kinds, alone or together, three parts at most."""
    profiles = profiles_of(*nodes) or ["1g.10gb"]
    parts: list[str] = draw(st.lists(st.sampled_from(profiles), max_size=3))
    gpus = draw(st.integers(0 if parts else 1, 3))
    return Demand.of(gpus, **{profile: parts.count(profile) for profile in parts})
