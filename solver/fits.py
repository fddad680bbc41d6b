"""Why a node cannot take a demand, in words that name what is in the way.

Checks run cheap first and the first refusal is the answer. They look at a `Room` and never change anything.
To add one: a function and an entry in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from solver.cluster import Device, Gpu, Node
from solver.demand import Demand
from solver.geometry import Profile, Slice, cut
from solver.goals import DEFAULT_POLICY
from solver.pack import cheapest_on
from solver.steps import Room, read

SHOWN = 4
"""GPUs named in one refusal; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why not, in words. `resolvable`: whether evicting pods from this node could help."""

    reason: str
    resolvable: bool = False

    def __str__(self) -> str:
        return self.reason


def has_gpus(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
    """A node without GPUs takes no demand."""
    return None if room.node.gpus else "has no GPUs"


def offers_the_profiles(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
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


def has_that_many_gpus(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
    """There are enough GPUs outside MIG mode, free or not."""
    total = len(room.whole_gpus)
    if total >= demand.gpus:
        return None
    cut_up = len(room.node.gpus) - total
    return f"needs {_gpus(demand.gpus)}, has {total} in all" + (f" ({cut_up} more in MIG mode)" if cut_up else "")


def enough_free(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
    """There are enough free GPUs."""
    free = sum(room.whole.free)
    if free >= demand.gpus:
        return None
    return f"needs {_gpus(demand.gpus, 'free ')}, has {free}" + _withheld(room, mig=False)


def a_legal_start(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
    """Each profile has a start on some GPU now; otherwise say what is in the way on each GPU."""
    for profile, _ in demand.slices:
        if any(state.starts(profile) or state.idle_starts(profile) for _, state in room.cuts):
            continue
        held = {device for device in taken if device.slice is not None}
        words = [_in_the_way(gpu, profile, held) for gpu, _ in room.cuts]
        words = [word for word in words if word]
        more = f"; {len(words) - SHOWN} more GPUs alike" if len(words) > SHOWN else ""
        return f"no legal start for {profile}: {'; '.join(words[:SHOWN])}{more}" + _withheld(room, mig=True)
    return None


def all_together(demand: Demand, room: Room, taken: tuple[Device, ...]) -> str | None:
    """The parts also fit together."""
    if cheapest_on(room.state, demand, DEFAULT_POLICY) is not None:
        return None
    return f"{demand} do not fit together here" + _withheld(room, mig=True)


CHECKS = (has_gpus, offers_the_profiles, has_that_many_gpus, enough_free, a_legal_start, all_together)


def refusal(node: Node, taken: Iterable[Device], demand: Demand) -> Refusal | None:
    """Why this node cannot take the demand now; None if it can."""
    taken = tuple(taken)
    return refusal_in(read(node, taken), taken, demand)


def refusal_in(room: Room, taken: tuple[Device, ...], demand: Demand) -> Refusal | None:
    """The same where the node has been read already."""
    for check in CHECKS:
        reason = check(demand, room, taken)
        if reason is not None:
            return Refusal(reason, _would_fit_empty(room, demand))
    return None


def _would_fit_empty(room: Room, demand: Demand) -> bool:
    """Whether the demand would fit if nothing were held. What exists on the boards stays, idle."""
    if sum(not gpu.withheld for gpu in room.whole_gpus) < demand.gpus:
        return False
    return not demand.slices or cheapest_on(read(room.node).state, demand, DEFAULT_POLICY) is not None


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
    """What keeps a profile off this GPU, at the start where the least is in the way; empty if not offered."""
    assert gpu.geometry is not None
    profiles = {profile.name: profile for profile in gpu.geometry.profiles}
    profile = profiles.get(name)
    if profile is None:
        return ""
    there = {device.slice: True for device in held if device.gpu == gpu.uuid and device.slice is not None}
    there |= {instance: False for instance in gpu.instances if instance not in there}
    choices = [
        [slice_ for slice_ in sorted(there) if _overlaps(profile, start, slice_, profiles[slice_.profile])]
        for start in profile.starts
    ]
    blocking = min(choices, key=lambda slices: (len(slices), slices), default=[])
    if not blocking:
        holders = [slice_ for slice_ in sorted(there) if _fits_without(gpu, there, slice_, name)]
        by = f" by {', '.join(map(str, holders))}" if holders else ""
        return f"GPU {gpu.index}: media engines or compute slices are used up{by}"
    named = [f"{slice_}{'' if there[slice_] else ' (idle)'}" for slice_ in blocking]
    return f"GPU {gpu.index}: {', '.join(named)} in the way"


def _overlaps(profile: Profile, start: int, slice_: Slice, other: Profile) -> bool:
    return start < slice_.start + other.size and slice_.start < start + profile.size


def _fits_without(gpu: Gpu, there: Iterable[Slice], without: Slice, name: str) -> bool:
    assert gpu.geometry is not None
    state = cut(gpu.geometry, frozenset(there) - {without})
    return not isinstance(state, str) and bool(state.starts(name))
