"""States and steps: what is free, and every useful way to serve a demand on it. No prices, no policy.

    Node + what is taken ──read()──▶ Room (names) ──.state──▶ RoomState (canonical, no names)
                                       │
                       one unit each:  ├─ Host: the node's GPUs outside MIG mode, by class of its board,
                                       │        with its CPU and memory and who is on it
                                       └─ Cut:  one GPU in MIG mode

A demand takes one step on the node's host (whole GPUs, a share, CPU and memory, or only a place among its
guests) and one step on a cut for each slice; `pack` puts them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from solver.cluster import GPU_MILLI, Allocation, Gpu, Node, Taken, allocations
from solver.demand import HostNeed, SliceNeed, Terms
from solver.geometry import Cut, Kind, Slice, Version, cut
from solver.guests import Guest, Guests, guests_of, join, may_join
from solver.topology import Board, Counts, board, canonical, joined_by_nvlink, subsets


class Part(NamedTuple):
    """A GPU that is shared: what is left of it in thousandths, and whose pods are on it."""

    milli: int
    guests: Guests = ()


@dataclass(frozen=True, slots=True)
class Host:
    """The state of a node but for its GPUs in MIG mode.

    `idle[c]` GPUs of class c of the board are free, `shared[c]` are those with shares on them and room for
    more (sorted). `cpu_milli` and `memory_mib` are free; None: not known, never binding. `busy`: somebody
    holds devices of the node; `guests` say who. Build it with `read`, or `host()` for one with GPUs only.
    """

    board: Board
    idle: Counts
    shared: tuple[tuple[Part, ...], ...]
    cpu_milli: int | None = None
    memory_mib: int | None = None
    busy: bool = False
    guests: Guests = ()
    driver: Version = ()
    cuda: Version = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rest = (self.cpu_milli, self.memory_mib, self.busy, self.guests, self.driver, self.cuda)
        object.__setattr__(self, "_hash", hash((self.board, self.idle, self.shared, rest)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Host], tuple[object, ...]]:
        """Pickle by value: hashes of strings differ between processes."""
        rest = (self.cpu_milli, self.memory_mib, self.busy, self.guests, self.driver, self.cuda)
        return Host, (self.board, self.idle, self.shared, *rest)

    def canonical(self) -> Host:
        """The same state up to the board's symmetries."""
        return _canonical(self) if len(self.board.symmetries) > 1 else self

    @property
    def free_milli(self) -> int:
        """All that is left of its GPUs, in thousandths of one."""
        return GPU_MILLI * sum(self.idle) + sum(part.milli for parts in self.shared for part in parts)


@lru_cache(maxsize=65536)
def _canonical(state: Host) -> Host:
    best = canonical(state.board, tuple(zip(state.idle, state.shared, strict=True)))
    idle, shared = zip(*best, strict=True) if best else ((), ())
    return replace(state, idle=tuple(idle), shared=tuple(shared))


def host(wiring: Board, idle: Counts) -> Host:
    """A node with these GPUs free by class, none shared, and nothing known of CPU and memory."""
    return Host(wiring, idle, ((),) * len(idle))


State = Host | Cut


@dataclass(frozen=True, slots=True)
class Step:
    """A part of a demand served on one unit: state before, state after, and what is taken.

    On a `Host`: `take` idle GPUs of each class, and of one GPU of class `share_class` `share_milli`
    thousandths; that GPU was `share_on` before (None: idle). On a `Cut`: `slice`, which is made new unless
    `reused`; idle instances in its way go.
    """

    before: State
    after: State
    need: HostNeed | SliceNeed
    take: Counts = ()
    share_class: int = -1
    share_milli: int = 0
    share_on: Part | None = None
    slice: Slice | None = None
    reused: bool = False

    @property
    def gpus(self) -> int:
        """How many whole GPUs it takes."""
        return sum(self.take)

    @property
    def removed(self) -> int:
        """How many more idle instances must go than before. Of several steps it adds up to what must go for all."""
        if not isinstance(self.before, Cut) or not isinstance(self.after, Cut):
            return 0
        return _idle_and_staying(self.before) - _idle_and_staying(self.after) - self.reused

    @property
    def guest(self) -> Guest:
        """Whose step it is."""
        return self.need.terms.guest


def _idle_and_staying(state: Cut) -> int:
    return len(state.idle) - len(state.surplus())


# --- steps on a host ---


def host_steps(state: Host, need: HostNeed) -> tuple[Step, ...]:
    """Every way to serve this on the host: each set of GPUs by class (up to `topology.SUBSETS`), and for a
    share each GPU that is different.
    """
    cpu, memory = _less(state.cpu_milli, need.cpu_milli), _less(state.memory_mib, need.memory_mib)
    if cpu == SHORT or memory == SHORT:
        return ()
    after = replace(state, cpu_milli=cpu, memory_mib=memory)
    if need.takes_devices:
        if not terms_allow_host(need.terms, state):
            return ()
        guests = join(state.guests, need.terms.guest, occupied=state.busy)
        after = replace(after, busy=True, guests=guests)
    if not (need.gpus or need.share_milli or need.share_mib):
        return (Step(state, after, need, take=(0,) * len(state.idle)),)
    return tuple(_device_steps(state, after, need))


SHORT = -1


def _less(free: int | None, taken: int) -> int | None:
    """What is left, None where that is not known, SHORT where it does not suffice."""
    if free is None or taken <= free:
        return None if free is None else free - taken
    return SHORT


def _device_steps(state: Host, after: Host, need: HostNeed) -> Iterator[Step]:
    allowed = [terms_allow_kind(need.terms, kind) for kind in state.board.kinds]
    idle = tuple([count if fine else 0 for count, fine in zip(state.idle, allowed, strict=True)])
    for take in subsets(state.board, idle, need.gpus):
        if need.terms.nvlink and need.gpus > 1 and not joined_by_nvlink(state.board, take):
            continue
        rest = tuple([free - taken for free, taken in zip(state.idle, take, strict=True)])
        if not (need.share_milli or need.share_mib):
            yield Step(state, replace(after, idle=rest), need, take=take)
            continue
        for c in range(len(rest)):
            if allowed[c]:
                yield from _share_steps(state, replace(after, idle=rest), need, take, c)


def _share_steps(state: Host, after: Host, need: HostNeed, take: Counts, c: int) -> Iterator[Step]:
    milli = share_on_kind(need, state.board.kinds[c])
    guest = need.terms.guest
    parts = after.shared[c]
    for part in dict.fromkeys(parts):
        if part.milli >= milli and may_join(part.guests, guest, "gpu", occupied=True):
            left = Part(part.milli - milli, join(part.guests, guest, occupied=True))
            others = list(parts)
            others.remove(part)
            shared = _with_part(after.shared, c, others, left)
            yield Step(state, replace(after, shared=shared), need, take, c, milli, part)
    if after.idle[c] and milli <= GPU_MILLI:
        left = Part(GPU_MILLI - milli, join((), guest, occupied=False))
        idle = (*after.idle[:c], after.idle[c] - 1, *after.idle[c + 1 :])
        shared = _with_part(after.shared, c, list(parts), left)
        yield Step(state, replace(after, idle=idle, shared=shared), need, take, c, milli, None)


def _with_part(
    shared: tuple[tuple[Part, ...], ...], c: int, others: list[Part], part: Part
) -> tuple[tuple[Part, ...], ...]:
    parts = tuple(sorted([*others, part] if part.milli else others))
    return (*shared[:c], parts, *shared[c + 1 :])


def share_on_kind(need: HostNeed, kind: Kind) -> int:
    """The share in thousandths of such a GPU, rounded up; more than 1000 where it is too small."""
    if not need.share_mib:
        return need.share_milli
    return -(-need.share_mib * GPU_MILLI // kind.memory_mib) if kind.memory_mib else GPU_MILLI + 1


# --- terms ---


@lru_cache(maxsize=65536)
def terms_allow_kind(terms: Terms, kind: Kind, *, memory_mib: int | None = None) -> bool:
    """Whether such a GPU (or a slice of one, with its own memory) is what the terms ask for."""
    return (
        (not terms.products or any(product_is(kind.product, asked) for asked in terms.products))
        and (not terms.architectures or kind.architecture.casefold() in map(str.casefold, terms.architectures))
        and kind.compute_capability >= terms.compute_capability
        and (kind.memory_mib if memory_mib is None else memory_mib) >= terms.gpu_memory_mib
    )


@lru_cache(maxsize=4096)
def product_is(product: str, asked: str) -> bool:
    """Whether a product has every word of the name that is asked for: "A100 80GB" is "NVIDIA A100-SXM4-80GB"."""
    words = _words(asked)
    return bool(words) and words <= _words(product)


def _words(name: str) -> set[str]:
    return set("".join(letter if letter.isalnum() else " " for letter in name.casefold()).split())


def terms_allow_host(terms: Terms, state: Host) -> bool:
    """Whether the node's driver and the pods on it suit the terms."""
    return (
        (not terms.driver or state.driver >= terms.driver)
        and (not terms.cuda or state.cuda[:1] >= terms.cuda[:1])
        and may_join(state.guests, terms.guest, "node", occupied=state.busy)
    )


# --- steps on a cut ---


@lru_cache(maxsize=65536)
def slice_steps(state: Cut, need: SliceNeed) -> tuple[Step, ...]:
    """Every way to serve one slice: each idle instance of the profile first, then each other legal start."""
    profile = next((each for each in state.geometry.profiles if each.name == need.profile), None)
    if profile is None or not terms_allow_kind(need.terms, state.kind, memory_mib=profile.memory_mib):
        return ()
    guest = need.terms.guest
    if not may_join(state.guests, guest, "gpu", occupied=bool(state.held)):
        return ()
    idle = state.idle_starts(profile.name)
    found = [(Slice(profile.name, start), True) for start in idle]
    found += [(Slice(profile.name, start), False) for start in state.starts(profile.name) if start not in idle]
    return tuple(Step(state, state.add(at, guest), need, slice=at, reused=reused) for at, reused in found)


# --- a node, read ---


@dataclass(frozen=True, slots=True)
class RoomState:
    """What a node can still do, without names: equal for nodes that can do exactly the same things."""

    host: Host
    cuts: frozenset[tuple[Cut, int]]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.host, self.cuts)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[RoomState], tuple[object, ...]]:
        return RoomState, (self.host, self.cuts)


@dataclass(frozen=True, slots=True)
class Room:
    """What one node has free now, with names.

    `host` is in the board's own order of classes; `idle_gpus[c]` are the idle GPUs of class c, lowest index
    first, `shared_gpus[c]` the shared ones with room left, and `whole_gpus` all GPUs that are not in MIG mode.
    `cuts` are the GPUs in MIG mode that may be used, `shut` those of either kind that may not, with the
    reason in words.
    """

    node: Node
    host: Host
    whole_gpus: tuple[Gpu, ...]
    idle_gpus: tuple[tuple[Gpu, ...], ...]
    shared_gpus: tuple[tuple[tuple[Gpu, Part], ...], ...]
    cuts: tuple[tuple[Gpu, Cut], ...]
    shut: tuple[tuple[Gpu, str], ...]
    state: RoomState


@dataclass(slots=True)
class _Held:
    """What is taken of one GPU."""

    whole: bool = False
    milli: int = 0
    slices: set[Slice] = field(default_factory=set)
    guests: list[Guest] = field(default_factory=list)


_NOTHING = _Held()


def read(node: Node, taken: Iterable[Taken] = ()) -> Room:
    """What is free on a node where this is held or promised.

    Careful where board and books disagree: a GPU whose held slices cannot all be there, or that is held whole
    or in shares while in MIG mode, is shut. A taken device of a GPU that is not on the node
    is ignored.
    """
    there = allocations(taken)
    held = _held(there)
    positions = [i for i, gpu in enumerate(node.gpus) if gpu.geometry is None]
    whole_gpus = tuple([node.gpus[i] for i in positions])
    if len(positions) == len(node.gpus):
        links = node.links
    else:
        links = tuple(tuple(node.links[i][j] for j in positions) for i in positions)
    wiring = _board_of(links, whole_gpus)

    shut = [(gpu, gpu.withheld) for gpu in node.gpus if gpu.withheld]
    idle_gpus: list[tuple[Gpu, ...]] = []
    shared_gpus: list[tuple[tuple[Gpu, Part], ...]] = []
    for members in wiring.classes:
        open_to_all = [gpu for gpu in [whole_gpus[position] for position in members] if not gpu.withheld]
        idle_gpus.append(tuple([gpu for gpu in open_to_all if gpu.uuid not in held]))
        parts = [(gpu, part) for gpu in open_to_all if (part := _part(held.get(gpu.uuid, _NOTHING)))]
        shared_gpus.append(tuple(sorted(parts, key=lambda each: (each[1], each[0].index))))

    cuts: list[tuple[Gpu, Cut]] = []
    if len(positions) < len(node.gpus):
        for gpu in node.gpus:
            if gpu.geometry is None or gpu.withheld:
                continue
            found = _cut_of(gpu, held.get(gpu.uuid, _NOTHING))
            if isinstance(found, str):
                shut.append((gpu, found))
            else:
                cuts.append((gpu, found))

    now = Host(
        wiring,
        tuple([len(gpus) for gpus in idle_gpus]),
        tuple([tuple([part for _, part in gpus]) for gpus in shared_gpus]),
        _rest(node.cpu_milli, sum([each.cpu_milli for each in there])),
        _rest(node.memory_mib, sum([each.memory_mib for each in there])),
        any(each.devices for each in there),
        guests_of([each.guest for each in there if each.devices]),
        node.driver,
        node.cuda,
    )
    state = RoomState(now.canonical(), frozenset(Counter([cut_ for _, cut_ in cuts]).items()))
    return Room(node, now, whole_gpus, tuple(idle_gpus), tuple(shared_gpus), tuple(cuts), tuple(shut), state)


def _board_of(links: tuple[tuple[int, ...], ...], gpus: tuple[Gpu, ...]) -> Board:
    nics = tuple([gpu.nic for gpu in gpus])
    return board(links, tuple([gpu.numa for gpu in gpus]), tuple([gpu.kind for gpu in gpus]), nics)


def _held(there: Iterable[Allocation]) -> dict[str, _Held]:
    held: dict[str, _Held] = {}
    for each in there:
        for device in each.devices:
            on = held.setdefault(device.gpu, _Held())
            on.guests.append(each.guest)
            if device.slice is not None:
                on.slices.add(device.slice)
            elif device.milli:
                on.milli += device.milli
            else:
                on.whole = True
    return held


def _part(held: _Held) -> Part | None:
    """What is left of a GPU with shares on it; None where that is nothing, or it is not shared."""
    if held.whole or held.slices or not 0 < held.milli < GPU_MILLI:
        return None
    return Part(GPU_MILLI - held.milli, guests_of(held.guests))


def _rest(total: int | None, taken: int) -> int | None:
    return None if total is None else max(0, total - taken)


def _cut_of(gpu: Gpu, held: _Held) -> Cut | str:
    if held.whole or held.milli:
        return f"held {'whole' if held.whole else 'in shares'}, though it is in MIG mode now"
    slices = frozenset(held.slices)
    idle = frozenset(gpu.instances) - slices if gpu.instances else frozenset()
    assert gpu.geometry is not None
    return cut(gpu.geometry, slices, idle, gpu.kind, guests_of(held.guests))
