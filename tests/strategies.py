"""Random small worlds for Hypothesis: geometries, nodes with odd wiring, what is taken, demands."""

from dataclasses import replace

from hypothesis import strategies as st

from solver.cluster import Allocation, Device, Node, Taken
from solver.demand import Demand, Terms
from solver.geometry import Geometry, Profile, Slice, faults, grid
from solver.guests import NOBODY, Guest
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
def crowded_geometries(draw: st.DrawFn) -> Geometry:
    """Boards with a place at every unit and two engines that run out long before units do."""
    width = draw(st.integers(4, 6))
    amounts = st.integers(0, 2)
    profiles = [
        Profile(f"1u.{i}", i, 1, tuple(range(width)), 0, 1000, (("dec", draw(amounts)), ("enc", draw(amounts))))
        for i in range(draw(st.integers(2, 3)))
    ]
    totals = (("dec", draw(st.integers(2, 4))), ("enc", draw(st.integers(2, 4))))
    return Geometry(width, width, tuple(profiles), totals)


@st.composite
def nodes(draw: st.DrawFn, name: str = "n", largest: int = 4, real: bool = True) -> Node:
    """A node of a few GPUs of two kinds, some in MIG mode with idle instances, some withheld, wired at random.

    CPU and memory of some are known, and short.
    """
    size = draw(st.integers(1, largest))
    kinds = st.sampled_from((A30, A100)) if real else st.one_of(geometries(), crowded_geometries())
    geometry = draw(kinds)
    gpus = []
    for i in range(size):
        made = gpu(name, i, numa=draw(st.sampled_from((0, 1, None))), nic=draw(st.sampled_from((0, 0, None))))
        if draw(st.integers(0, 3)) == 0:
            made = replace(made, product="Other GPU", memory_mib=40_000, compute_capability=(9, 0), watts=300)
        if draw(st.integers(0, 9)) == 0:
            made = replace(made, withheld="unhealthy")
        if draw(st.integers(0, 2)) == 0:
            made = replace(made, geometry=geometry, instances=draw(instances(geometry)))
        gpus.append(made)
    gbs = {(a, b): draw(st.sampled_from((20, 100, 100, 200))) for a in range(size) for b in range(a)}
    links = tuple(tuple(0 if a == b else gbs[max(a, b), min(a, b)] for b in range(size)) for a in range(size))
    made_of = Node(name, tuple(gpus), links)
    if draw(st.booleans()):
        return made_of
    cpu, memory = draw(st.integers(0, 4)) * 1000, draw(st.sampled_from((None, 1000, 8000)))
    return replace(made_of, cpu_milli=cpu, memory_mib=memory, driver=(550, 54), cuda=(12, 4))


@st.composite
def instances(draw: st.DrawFn, geometry: Geometry) -> tuple[Slice, ...]:
    """Up to three instances that can stand on one board."""
    standing: list[Slice] = []
    for slice_ in draw(st.lists(st.sampled_from(sorted(grid(geometry).blocks)), max_size=3)):
        if slice_ not in standing and not faults(geometry, [*standing, slice_]):
            standing.append(slice_)
    return tuple(standing)


GUESTS = (
    NOBODY,
    NOBODY,
    NOBODY,
    Guest("red"),
    Guest("red", "training"),
    Guest("blue", "serving"),
    Guest("blue", "", "gpu"),
    Guest("red", "", "node"),
)


@st.composite
def taken_on(draw: st.DrawFn, node: Node) -> tuple[Taken, ...]:
    """What is held on a node: whole GPUs, shares, slices, by whomever; some CPU.

    The slices are instances that exist, or promised ones, idle instances in their way or not.
    """
    taken: list[Allocation] = []
    guests = st.sampled_from(GUESTS if draw(st.integers(0, 2)) == 0 else GUESTS[:1])
    for gpu_ in node.gpus:
        if draw(st.booleans()):
            continue
        if gpu_.geometry is None:
            shares = draw(st.lists(st.sampled_from((100, 250, 500)), max_size=2))
            devices = [Device(gpu_.uuid, milli=milli) for milli in shares] or [Device(gpu_.uuid)]
            taken += [Allocation((device,), guest=draw(guests)) for device in devices]
            continue
        held: set[Slice] = set()
        places = sorted(grid(gpu_.geometry).blocks)
        for slice_ in draw(st.lists(st.sampled_from([*gpu_.instances, *places]), max_size=2)):
            if slice_ not in held and not faults(gpu_.geometry, held | {slice_}):
                held.add(slice_)
                taken.append(Allocation((Device(gpu_.uuid, slice_),), guest=draw(guests)))
    if draw(st.integers(0, 3)) == 0:
        taken.append(Allocation((), draw(st.integers(0, 2)) * 500, 500))
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
    """Whole GPUs, a share, slices of one or two kinds, alone or together; sometimes with CPU, memory and terms."""
    profiles = profiles_of(*nodes) or ["1g.10gb"]
    parts: list[str] = draw(st.lists(st.sampled_from(profiles), max_size=3))
    gpus = draw(st.integers(0 if parts else 1, 3))
    made = Demand.of(gpus, **{profile: parts.count(profile) for profile in parts})
    if draw(st.integers(0, 2)) == 0:
        made = replace(made, gpus=min(gpus, 1), share_milli=draw(st.sampled_from((100, 250, 500, 999))))
    elif draw(st.integers(0, 4)) == 0:
        made = replace(made, gpus=min(gpus, 1), share_mib=draw(st.sampled_from((1, 10_000, 50_000))))
    if draw(st.booleans()):
        made = replace(
            made, cpu_milli=draw(st.sampled_from((0, 500, 1500))), memory_mib=draw(st.sampled_from((0, 700)))
        )
    if draw(st.integers(0, 3)) == 0:
        made = replace(made, terms=draw(terms()))
    return made


@st.composite
def terms(draw: st.DrawFn) -> Terms:
    """Floors that some GPUs meet, and a guest."""
    choose = st.sampled_from
    return Terms(
        products=draw(choose(((), (), ("test",), ("Other GPU",)))),
        compute_capability=draw(choose(((), (), (9, 0)))),
        gpu_memory_mib=draw(choose((0, 0, 20_000, 50_000))),
        nvlink=draw(choose((False, False, True))),
        driver=draw(choose(((), (), (535,)))),
        cuda=draw(choose(((), (), (12, 9), (13, 0)))),
        guest=draw(choose(GUESTS)),
    )
