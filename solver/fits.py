"""Why a node cannot take a demand, in words that name what is in the way.

Checks run cheap first and the first refusal is the answer. They look at a `Room` and never change anything.
To add one: a function and an entry in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from solver.cluster import Allocation, Device, Gpu, Node, Taken, allocations, devices_of
from solver.demand import Demand, Terms
from solver.geometry import Profile, Slice, Version, cut
from solver.goals import DEFAULT_POLICY, steps_of
from solver.guests import Guest, Guests, may_join
from solver.pack import cheapest_on
from solver.steps import Room, RoomState, read, slice_steps, terms_allow_kind

SHOWN = 4
"""GPUs named in one refusal; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, in words. `resolvable`: whether evicting pods from this node could help."""

    reason: str
    resolvable: bool = False

    def __str__(self) -> str:
        return self.reason


def has_gpus(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """A node without GPUs takes no demand for one."""
    return None if room.node.gpus or not demand.takes_devices else "has no GPUs"


def new_enough(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """The node's driver is new enough, for itself and for the CUDA major version that is asked for."""
    terms, node = demand.terms, room.node
    if terms.driver and node.driver < terms.driver:
        return f"needs driver {_version(terms.driver)}, has {_version(node.driver)}"
    if terms.cuda and node.cuda[:1] < terms.cuda[:1]:
        driver = f" (driver {_version(node.driver)})" if node.driver else ""
        return f"needs CUDA {_version(terms.cuda)}, its driver serves CUDA {_version(node.cuda)}{driver}"
    return None


def has_the_kind(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """Some GPU of the node is what the terms ask for."""
    if not demand.takes_devices or any(_is_the_kind(demand, gpu) for gpu in room.node.gpus):
        return None
    here = sorted({gpu.product for gpu in room.node.gpus})
    return f"needs {kind_in_words(demand.terms)}; the GPUs here are {', '.join(here[:SHOWN])}"


def offers_the_profiles(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """Every profile that is asked for is one that some GPU of the node can be cut into."""
    if not demand.slices:
        return None
    offered = {profile.name for gpu in room.node.gpus if gpu.geometry for profile in gpu.geometry.profiles}
    if not offered:
        return f"needs {demand}, no GPU here is in MIG mode"
    missing = [profile for profile, _ in demand.slices if profile not in offered]
    if missing:
        return f"no GPU here offers {' or '.join(missing)}; they offer {', '.join(sorted(offered))}"
    return None


def has_that_many_gpus(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """There are enough GPUs of the kind outside MIG mode, free or not."""
    fitting = [gpu for gpu in room.whole_gpus if _is_the_kind(demand, gpu)]
    total, wanted = len(fitting), demand.gpus + demand.is_shared
    if total >= wanted:
        return None
    cut_up = len(room.node.gpus) - len(room.whole_gpus)
    other = len(room.whole_gpus) - total
    more = [f"{cut_up} more in MIG mode"] if cut_up else []
    more += [f"{other} more that are not {kind_in_words(demand.terms)}"] if other else []
    return f"needs {_gpus(wanted)}, has {total} in all" + (f" ({', '.join(more)})" if more else "")


def has_cpu_and_memory(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """The node's CPU and memory suffice, where they are known."""
    cpu, memory = room.host.cpu_milli, room.host.memory_mib
    if cpu is not None and demand.cpu_milli > cpu:
        return f"needs {demand.cpu_milli / 1000:g} CPU, has {cpu / 1000:g} free"
    if memory is not None and demand.memory_mib > memory:
        return f"needs {demand.memory_mib} MiB of memory, has {memory} free"
    return None


def apart_from_others(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """The pod may stand beside those who are on the node."""
    host, guest = room.host, demand.terms.guest
    if not demand.takes_devices or may_join(host.guests, guest, "node", occupied=host.busy):
        return None
    return f"{_who(guest)} and {_others(host.guests, guest)}, who hold devices here, are not to share a node"


def enough_free(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """There are enough free GPUs."""
    kinds = room.host.board.kinds
    free = sum(n for n, kind in zip(room.host.idle, kinds, strict=True) if terms_allow_kind(demand.terms, kind))
    if free >= demand.gpus:
        return None
    return f"needs {_gpus(demand.gpus, 'free ')}, has {free}" + _withheld(room, mig=False)


def a_place_on_the_host(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """The whole GPUs are joined as asked, and a share fits on some GPU beside those who are there."""
    if steps_of(room.host, demand.host_need):
        return None
    if demand.terms.nvlink and demand.gpus > 1 and not demand.is_shared:
        return f"no {demand.gpus} of the free GPUs here are all joined by NVLink" + _withheld(room, mig=False)
    if demand.is_shared:
        left = max((part.milli for gpus in room.shared_gpus for _, part in gpus), default=0)
        most = f"the shared GPUs have {left} milli left at most" if left else "no GPU here has room for a share"
        apart = ", and not beside other tenants" if demand.terms.guest.isolation else ""
        return f"needs {demand}{apart}; {most}" + _withheld(room, mig=False)
    return f"{demand} does not fit here" + _withheld(room, mig=False)


def a_legal_start(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """Each profile has a start on some GPU now; otherwise say which held slices are in the way on each GPU."""
    for profile, _ in demand.slices:
        if any(slice_steps(state, demand.slice_need(profile)) for _, state in room.cuts):
            continue
        if any(state.starts(profile) for _, state in room.cuts):
            who = "not beside the tenants that hold slices here" if demand.terms.guest.isolation else "on such terms"
            return f"no legal start for {profile} {who}"
        held = {device for device in devices_of(taken) if device.slice is not None}
        words = [_in_the_way(gpu, profile, held) for gpu, _ in room.cuts]
        words = [word for word in words if word]
        more = f"; {len(words) - SHOWN} more GPUs alike" if len(words) > SHOWN else ""
        found = f": {'; '.join(words[:SHOWN])}" if words else ""
        return f"no legal start for {profile}{found}{more}" + _withheld(room, mig=True)
    return None


def all_together(demand: Demand, room: Room, taken: Sequence[Allocation]) -> str | None:
    """The parts also fit together."""
    if cheapest_on(room.state, demand, DEFAULT_POLICY) is not None:
        return None
    return f"{demand} do not fit together here" + _withheld(room, mig=True)


CHECKS = (
    has_gpus,
    new_enough,
    has_the_kind,
    offers_the_profiles,
    has_that_many_gpus,
    has_cpu_and_memory,
    apart_from_others,
    enough_free,
    a_place_on_the_host,
    a_legal_start,
    all_together,
)


def refusal(node: Node, taken: Iterable[Taken], demand: Demand) -> Refusal | None:
    """Why this node cannot take the demand now; None if it can."""
    taken = tuple(taken)
    return refusal_in(read(node, taken), taken, demand)


def refusal_in(
    room: Room, taken: Iterable[Taken], demand: Demand, *, empty: Callable[[], RoomState] | None = None
) -> Refusal | None:
    """The same where the node has been read already. `empty` tells its state if nothing were held, where that is known:
    what exists on the boards is idle then."""
    there = allocations(taken)
    for check in CHECKS:
        reason = check(demand, room, there)
        if reason is not None:
            state = empty() if empty is not None else read(room.node).state
            return Refusal(reason, resolvable=cheapest_on(state, demand, DEFAULT_POLICY) is not None)
    return None


def _is_the_kind(demand: Demand, gpu: Gpu) -> bool:
    """Whether the GPU is what the terms ask for, whole, in shares or in one of the profiles."""
    if not demand.slices or gpu.geometry is None:
        return terms_allow_kind(demand.terms, gpu.kind)
    wanted = {name for name, _ in demand.slices}
    profiles = [profile for profile in gpu.geometry.profiles if profile.name in wanted]
    return not profiles or any(terms_allow_kind(demand.terms, gpu.kind, memory_mib=p.memory_mib) for p in profiles)


def kind_in_words(terms: Terms) -> str:
    """What a GPU must be."""
    parts = [" or ".join(terms.products)] if terms.products else ["a GPU"]
    parts += [f"of architecture {' or '.join(terms.architectures)}"] if terms.architectures else []
    parts += (
        [f"with compute capability {_version(terms.compute_capability)} or more"] if terms.compute_capability else []
    )
    parts += [f"with {terms.gpu_memory_mib} MiB or more"] if terms.gpu_memory_mib else []
    return " ".join(parts)


def _version(version: Version) -> str:
    return ".".join(map(str, version)) or "unknown"


def _who(guest: Guest) -> str:
    return f"tenant {guest.tenant}" if guest.tenant else "this pod"


def _others(guests: Guests, guest: Guest) -> str:
    tenants = sorted({f"tenant {each.tenant}" if each.tenant else "others" for each in guests if each != guest})
    return " and ".join(tenants[:SHOWN]) or "others"


def _gpus(count: int, kind: str = "") -> str:
    return f"{count} {kind}GPU{'s' if count != 1 else ''}"


def _withheld(room: Room, *, mig: bool) -> str:
    """The GPUs of this kind that may not be used, with their reasons; empty if there are none."""
    shut = [(gpu, why) for gpu, why in room.shut if (gpu.geometry is not None) == mig]
    if not shut:
        return ""
    more = f", {len(shut) - SHOWN} more" if len(shut) > SHOWN else ""
    return f"; withheld: {', '.join(f'GPU {gpu.index} ({why})' for gpu, why in shut[:SHOWN])}{more}"


def _in_the_way(gpu: Gpu, name: str, held: set[Device]) -> str:
    """What keeps a profile off this GPU, at the start where the least is in the way; empty if not offered.

    Held slices only: idle instances go where a slice is made.
    """
    assert gpu.geometry is not None
    profiles = {profile.name: profile for profile in gpu.geometry.profiles}
    profile = profiles.get(name)
    if profile is None:
        return ""
    there = sorted(device.slice for device in held if device.gpu == gpu.uuid and device.slice is not None)
    choices = [
        [slice_ for slice_ in there if _overlaps(profile, start, slice_, profiles[slice_.profile])]
        for start in profile.starts
    ]
    blocking = min(choices, key=lambda slices: (len(slices), slices), default=[])
    if not blocking:
        holders = [slice_ for slice_ in there if _fits_without(gpu, there, slice_, name)]
        by = f" by {', '.join(map(str, holders))}" if holders else ""
        return f"GPU {gpu.index}: media engines or compute slices are used up{by}"
    return f"GPU {gpu.index}: {', '.join(map(str, blocking))} in the way"


def _overlaps(profile: Profile, start: int, slice_: Slice, other: Profile) -> bool:
    return start < slice_.start + other.size and slice_.start < start + profile.size


def _fits_without(gpu: Gpu, there: Iterable[Slice], without: Slice, name: str) -> bool:
    assert gpu.geometry is not None
    state = cut(gpu.geometry, frozenset(there) - {without})
    return not isinstance(state, str) and bool(state.starts(name))
