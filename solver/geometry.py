"""MIG on one GPU: profiles, legal starts, what is placed and what still fits.

A geometry comes from NVML's report of the very board, never from a product or profile name: the same name
means different shapes on different products. The table in `products` serves simulation only.

    Geometry + slices held + idle instances ──cut()──▶ Cut ──starts(profile)──▶ legal starts ──add()──▶ Cut

No prices here, and no GPU names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from solver.guests import NOBODY, Guest, Guests, join

Version = tuple[int, ...]
"""A version number by its parts: "580.95.05" is (580, 95, 5); empty: not known, or none wanted."""


class Kind(NamedTuple):
    """What a GPU is, as far as one can ask for it. `watts` is its power limit, 0 where it is not known."""

    product: str = ""
    architecture: str = ""
    compute_capability: Version = ()
    memory_mib: int = 0
    watts: int = 0


NO_KIND = Kind()
"""A GPU of which nothing is known."""


@dataclass(frozen=True, slots=True, order=True)
class Slice:
    """A GPU instance, present or promised: a profile at a start (in memory-slice units of the board)."""

    profile: str
    start: int

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}"


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of GPU instance, as NVML lists it for a board.

    `name` is NVML's without the leading "MIG " (`1g.10gb`, `1g.10gb+me`); `id` is the hardware profile id
    that create calls take; `size` and `starts` are in memory-slice units; `engines` are the media engines
    and other countable parts that one instance takes from the board's totals, for example (("ofa", 1),).
    """

    name: str
    id: int
    size: int
    starts: tuple[int, ...]
    compute_slices: int
    memory_mib: int
    engines: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Geometry:
    """How one board can be cut: a grid of `width` memory-slice units and the profiles that tile it.

    `engines` are the board's totals of what profiles take besides grid units (decoder, jpeg, ofa, ...):
    with one OFA per GPU, "one +me per GPU" needs no rule of its own. An engine without a total is not
    limited. The hash is kept, since geometries are long and are looked up at every turn.
    """

    width: int
    compute_slices: int
    profiles: tuple[Profile, ...]
    engines: tuple[tuple[str, int], ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fields = (self.width, self.compute_slices, self.profiles, self.engines)
        object.__setattr__(self, "_hash", hash(fields))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Geometry], tuple[object, ...]]:
        """Pickle by value: hashes of strings differ between processes."""
        return Geometry, (self.width, self.compute_slices, self.profiles, self.engines)


Uses = tuple[int, ...]
"""So much of each capacity that can run out, in the order of `Grid.capacities`."""


class Block(NamedTuple):
    """What a slice takes from a board: units from `start`, and its share of each capacity that can run out.

    Not the profile: 1g.20gb and 2g.20gb at the same start leave the same room, so they are one block.
    """

    start: int
    size: int
    uses: tuple[int, ...]

    @property
    def mask(self) -> int:
        """The units as a bit set."""
        return ((1 << self.size) - 1) << self.start


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """A geometry made ready for counting.

    `capacities` names what can run out besides units (compute slices, engines): one that no set of
    non-overlapping instances can exceed is left out, so that it does not tell equal blocks apart. `totals`
    are theirs, `blocks` has every legal slice, `by_profile` the same by profile in order of start.
    """

    capacities: tuple[str, ...]
    totals: tuple[int, ...]
    blocks: Mapping[Slice, Block]
    by_profile: Mapping[str, tuple[tuple[int, Block, int], ...]]  # (start, block, mask)


@lru_cache(maxsize=1024)
def grid(geometry: Geometry) -> Grid:
    """The geometry made ready; the work is done once for each different geometry."""
    limits = {"compute": geometry.compute_slices, **dict(geometry.engines)}
    scarce = {name: total for name, total in limits.items() if _most_used(geometry, name) > total}
    blocks: dict[Slice, Block] = {}
    by_profile: dict[str, tuple[tuple[int, Block, int], ...]] = {}
    for profile in geometry.profiles:
        uses = tuple(_use(profile, name) for name in scarce)
        rows = []
        for start in sorted(set(profile.starts)):
            if start < 0 or profile.size < 1 or start + profile.size > geometry.width:
                continue
            block = Block(start, profile.size, uses)
            blocks[Slice(profile.name, start)] = block
            rows.append((start, block, block.mask))
        by_profile[profile.name] = tuple(rows)
    return Grid(tuple(scarce), tuple(scarce.values()), blocks, by_profile)


def _use(profile: Profile, capacity: str) -> int:
    if capacity == "compute":
        return profile.compute_slices
    return dict(profile.engines).get(capacity, 0)


def _most_used(geometry: Geometry, capacity: str) -> int:
    """The most of a capacity that non-overlapping instances could ask for, by a walk along the units."""
    most = [0] * (geometry.width + 1)
    for end in range(1, geometry.width + 1):
        most[end] = most[end - 1]
        for profile in geometry.profiles:
            if profile.size >= 1 and end - profile.size in profile.starts:
                most[end] = max(most[end], most[end - profile.size] + _use(profile, capacity))
    return most[geometry.width]


@dataclass(frozen=True, slots=True)
class Cut:
    """The state of one GPU in MIG mode: blocks that are held, and idle instances that exist on the board.

    Two GPUs with equal cuts can do exactly the same things. Build it with `cut()`; `held` and `idle` are
    sorted. An idle instance may be handed out again as it is, and otherwise it is not there: a slice that is made
    over it destroys it. So `busy` (bit set of units) and `left` (capacities) count what is held only, and `idle` has
    those that can each still be handed out; where something does not suffice for all of them, `surplus()` goes.
    `kind` is what the GPU is, `guests` whose pods hold its slices.
    """

    geometry: Geometry
    held: tuple[Block, ...]
    idle: tuple[Slice, ...]
    busy: int = field(compare=False, repr=False)
    left: Uses = field(compare=False, repr=False)
    kind: Kind = NO_KIND
    guests: Guests = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.geometry, self.held, self.idle, self.kind, self.guests)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Cut], tuple[object, ...]]:
        return Cut, (self.geometry, self.held, self.idle, self.busy, self.left, self.kind, self.guests)

    def starts(self, profile: str) -> tuple[int, ...]:
        """Where an instance of the profile may stand beside the held ones: made new, or idle already."""
        rows = grid(self.geometry).by_profile.get(profile, ())
        return tuple(start for start, block, mask in rows if not mask & self.busy and _suffices(self.left, block.uses))

    def idle_starts(self, profile: str) -> tuple[int, ...]:
        """Where an idle instance of the profile stands, ready to be handed out."""
        return tuple(idle.start for idle in self.idle if idle.profile == profile)

    def surplus(self) -> tuple[Slice, ...]:
        """The idle instances that must go all the same: each could stay, not all together. They may still be handed out
        (then others go), so that slices may be added in any order.
        """
        return _surplus(self.geometry, self.left, self.idle) if self.idle else ()

    def without_idle(self) -> Cut:
        """The state if every idle instance were destroyed."""
        return replace(self, idle=()) if self.idle else self

    def add(self, taken: Slice, guest: Guest = NOBODY) -> Cut:
        """The state after the slice is held: an idle instance handed out, or made new over those in its way."""
        return _add(self, taken, guest)


@lru_cache(maxsize=65536)
def _add(before: Cut, taken: Slice, guest: Guest) -> Cut:
    geometry = before.geometry
    block = grid(geometry).blocks[taken]
    busy = before.busy | block.mask
    left = tuple(most - use for most, use in zip(before.left, block.uses, strict=True))
    held = tuple(sorted((*before.held, block)))
    guests = join(before.guests, guest, occupied=bool(before.held))
    return Cut(geometry, held, _able_to_stay(geometry, busy, left, before.idle), busy, left, before.kind, guests)


@lru_cache(maxsize=65536)
def cut(
    geometry: Geometry,
    held: frozenset[Slice] = frozenset(),
    idle: frozenset[Slice] = frozenset(),
    kind: Kind = NO_KIND,
    guests: Guests = (),
) -> Cut | str:
    """The state of a GPU with these slices held and these instances idle; words if that cannot be.

    Held slices must be legal together, and so must idle ones, which all exist. Otherwise the board and our books
    disagree, and nothing should be placed until they agree again. A held slice over an idle instance is one that is
    about to be made.
    """
    wrong = faults(geometry, held) or faults(geometry, idle - held)
    if wrong:
        return wrong[0]
    ready = grid(geometry)
    blocks = tuple(sorted(ready.blocks[slice_] for slice_ in held))
    busy, left = _room(geometry, blocks)
    able = _able_to_stay(geometry, busy, left, sorted(idle - held))
    return Cut(geometry, blocks, able, busy, left, kind, guests)


def empty(geometry: Geometry) -> Cut:
    """The state of a GPU in MIG mode with nothing on it."""
    fresh = cut(geometry)
    assert isinstance(fresh, Cut)
    return fresh


def faults(geometry: Geometry, slices: Iterable[Slice]) -> list[str]:
    """Why these slices cannot stand on one board together, in words; empty if they can.

    Plain arithmetic on the geometry as reported (all capacities, no blocks), so that `verify` can use it.
    """
    slices = sorted(slices)
    profiles = {profile.name: profile for profile in geometry.profiles}
    wrong = []
    owner: dict[int, Slice] = {}
    used: dict[str, int] = {}
    for slice_ in slices:
        profile = profiles.get(slice_.profile)
        if profile is None:
            wrong.append(f"{slice_}: this board has no profile {slice_.profile}")
            continue
        if slice_.start not in profile.starts or slice_.start + profile.size > geometry.width:
            wrong.append(f"{slice_}: {slice_.start} is not a legal start")
            continue
        for unit in range(slice_.start, slice_.start + profile.size):
            if unit in owner:
                wrong.append(f"{slice_} overlaps {owner[unit]} at unit {unit}")
                break
            owner[unit] = slice_
        for name, use in (("compute", profile.compute_slices), *profile.engines):
            used[name] = used.get(name, 0) + use
    limits = {"compute": geometry.compute_slices, **dict(geometry.engines)}
    for name, use in used.items():
        if name in limits and use > limits[name]:
            wrong.append(f"{use} {name} used, the board has {limits[name]}")
    return wrong


def in_the_way(geometry: Geometry, wanted: Iterable[Slice], idle: Iterable[Slice]) -> tuple[Slice, ...]:
    """The idle instances that must go so that `wanted` (all that is held or is to be made) can stand with the others.

    `idle` stand on the board now, so together they are legal; those that are wanted themselves stay. First go those
    that cannot stand beside the wanted ones, then the fewest because of which something runs out. None goes
    needlessly. A slice that this board does not have is left out of account.
    """
    blocks = grid(geometry).blocks
    wanted = frozenset(wanted)
    busy, left = _room(geometry, [blocks[slice_] for slice_ in wanted if slice_ in blocks])
    others = tuple(sorted(slice_ for slice_ in set(idle) - wanted if slice_ in blocks))
    able = _able_to_stay(geometry, busy, left, others)
    surplus = _surplus(geometry, left, able)
    return tuple(slice_ for slice_ in others if slice_ not in able or slice_ in surplus)


def _room(geometry: Geometry, blocks: Iterable[Block]) -> tuple[int, tuple[int, ...]]:
    """The units that these blocks cover, and what they leave of what can run out."""
    busy = 0
    left = list(grid(geometry).totals)
    for block in blocks:
        busy |= block.mask
        left = [most - use for most, use in zip(left, block.uses, strict=True)]
    return busy, tuple(left)


def _able_to_stay(geometry: Geometry, busy: int, left: Uses, idle: Iterable[Slice]) -> tuple[Slice, ...]:
    """Those that could stand, each alone, beside what covers and leaves so much."""
    blocks = grid(geometry).blocks
    return tuple(slice_ for slice_ in idle if not blocks[slice_].mask & busy and _suffices(left, blocks[slice_].uses))


def _suffices(left: Uses, uses: Uses) -> bool:
    return all(not use or use <= most for use, most in zip(uses, left, strict=True))


@lru_cache(maxsize=65536)
def _surplus(geometry: Geometry, left: Uses, idle: tuple[Slice, ...]) -> tuple[Slice, ...]:
    """The fewest of these that must go so that what can run out suffices for the others; of equally few those
    that use the most.

    A walk along them keeps, for each use that some of them add up to, the most that could stay at it.
    """
    blocks = grid(geometry).blocks
    staying: dict[Uses, tuple[Slice, ...]] = {(0,) * len(left): ()}
    for slice_ in idle:
        for used, stay in list(staying.items()):
            more = tuple(a + b for a, b in zip(used, blocks[slice_].uses, strict=True))
            if _suffices(left, more) and len(stay) >= len(staying.get(more, ())):
                staying[more] = (*stay, slice_)
    used = min(staying, key=lambda each: (-len(staying[each]), sum(each), staying[each]))
    return tuple(slice_ for slice_ in idle if slice_ not in staying[used])


def placed_states(geometry: Geometry, profiles: Iterable[str] | None = None) -> Iterator[frozenset[Slice]]:
    """Every legal set of slices of these profiles (all by default), the empty one included."""
    names = {profile.name for profile in geometry.profiles} if profiles is None else set(profiles)
    choices = [slice_ for slice_ in sorted(grid(geometry).blocks) if slice_.profile in names]

    def grow(state: Cut, placed: frozenset[Slice], first: int) -> Iterator[frozenset[Slice]]:
        yield placed
        for i in range(first, len(choices)):
            if choices[i].start in state.starts(choices[i].profile):
                yield from grow(state.add(choices[i]), placed | {choices[i]}, i + 1)

    yield from grow(empty(geometry), frozenset(), 0)


def is_maximal(geometry: Geometry, placed: frozenset[Slice], profiles: Iterable[str] | None = None) -> bool:
    """Whether no further instance of any of these profiles fits beside the placed ones."""
    names = [profile.name for profile in geometry.profiles] if profiles is None else list(profiles)
    state = cut(geometry, placed)
    return isinstance(state, Cut) and not any(state.starts(name) for name in names)
