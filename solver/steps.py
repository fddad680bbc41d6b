"""States and steps: what is free, and every useful way to serve a demand on it. No prices, no policy.

    Node + taken devices ──read()──▶ Room (names) ──.state──▶ RoomState (canonical, no names)
                                       │
                       one unit each:  ├─ Whole: the node's free whole GPUs, by class of its board
                                       └─ Cut:   one GPU in MIG mode

A step serves whole GPUs on a `Whole`, or one slice on a `Cut`. A pod that needs more than that takes several
steps; `pack` finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from solver.cluster import Device, Gpu, Node
from solver.geometry import Cut, Slice, cut
from solver.topology import Board, Counts, board, canonical, subsets


@dataclass(frozen=True, slots=True)
class Whole:
    """The state of a node's whole GPUs: how many are free in each class of its board."""

    board: Board
    free: Counts

    def canonical(self) -> Whole:
        """The same state up to the board's symmetries."""
        return Whole(self.board, canonical(self.board, self.free))


State = Whole | Cut


@dataclass(frozen=True, slots=True)
class Step:
    """A demand (or one part of it) served on one unit: state before, state after, and what is taken.

    On a `Whole`: `take` GPUs of each class. On a `Cut`: `slice`, which is made new unless `reused`.
    """

    before: State
    after: State
    take: Counts = ()
    slice: Slice | None = None
    reused: bool = False

    @property
    def gpus(self) -> int:
        """How many whole GPUs it takes."""
        return sum(self.take)


def whole_steps(state: Whole, gpus: int) -> tuple[Step, ...]:
    """Every way to take that many whole GPUs, by class; one for each choice up to `topology.SUBSETS`."""
    return tuple(
        Step(
            state,
            Whole(state.board, tuple(free - take for free, take in zip(state.free, chosen, strict=True))),
            take=chosen,
        )
        for chosen in subsets(state.board, state.free, gpus)
    )


@lru_cache(maxsize=65536)
def slice_steps(state: Cut, profile: str) -> tuple[Step, ...]:
    """Every way to serve one slice: each idle instance of the profile first, then each legal start."""
    reused = [
        Step(state, state.add(Slice(profile, at)), (), Slice(profile, at), True) for at in state.idle_starts(profile)
    ]
    made = [Step(state, state.add(Slice(profile, at)), (), Slice(profile, at)) for at in state.starts(profile)]
    return (*reused, *made)


@dataclass(frozen=True, slots=True)
class RoomState:
    """What a node can still do, without names: equal for nodes that can do exactly the same things."""

    whole: Whole
    cuts: frozenset[tuple[Cut, int]]
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.whole, self.cuts)))

    def __hash__(self) -> int:
        return self._hash


@dataclass(frozen=True, slots=True)
class Room:
    """What one node has free now, with names.

    `whole` is in the board's own order of classes; `free_gpus[c]` are the free GPUs of class c, lowest index
    first, and `whole_gpus` all GPUs that are not in MIG mode. `cuts` are the GPUs in MIG mode that may be
    used, `shut` those of either kind that may not, with the reason in words.
    """

    node: Node
    whole: Whole
    whole_gpus: tuple[Gpu, ...]
    free_gpus: tuple[tuple[Gpu, ...], ...]
    cuts: tuple[tuple[Gpu, Cut], ...]
    shut: tuple[tuple[Gpu, str], ...]
    state: RoomState


def read(node: Node, taken: Iterable[Device] = ()) -> Room:
    """What is free on a node where these devices are held or promised.

    Careful where board and books disagree: a GPU whose held slices and instances cannot all be there, or
    that is held whole while in MIG mode, is shut. A taken device of a GPU that is not on the node is ignored.
    """
    taken_whole: set[str] = set()
    taken_slices: dict[str, set[Slice]] = {}
    for device in taken:
        if device.slice is None:
            taken_whole.add(device.gpu)
        else:
            taken_slices.setdefault(device.gpu, set()).add(device.slice)

    positions = [i for i, gpu in enumerate(node.gpus) if gpu.geometry is None]
    whole_gpus = tuple(node.gpus[i] for i in positions)
    if len(positions) == len(node.gpus):
        links = node.links
    else:
        links = tuple(tuple(node.links[i][j] for j in positions) for i in positions)
    wiring = board(links, tuple([gpu.numa for gpu in whole_gpus]), tuple([gpu.product for gpu in whole_gpus]))

    shut = [(gpu, gpu.withheld) for gpu in node.gpus if gpu.withheld]
    free_gpus = []
    for members in wiring.classes:
        free_gpus.append(
            tuple(
                gpu
                for gpu in [whole_gpus[position] for position in members]
                if not gpu.withheld and gpu.uuid not in taken_whole and gpu.uuid not in taken_slices
            )
        )
    whole = Whole(wiring, tuple([len(gpus) for gpus in free_gpus]))

    cuts: list[tuple[Gpu, Cut]] = []
    if len(positions) < len(node.gpus):
        for gpu in node.gpus:
            if gpu.geometry is None or gpu.withheld:
                continue
            found = _cut_of(gpu, gpu.uuid in taken_whole, taken_slices.get(gpu.uuid))
            if isinstance(found, str):
                shut.append((gpu, found))
            else:
                cuts.append((gpu, found))

    counts = Counter([cut_ for _, cut_ in cuts])
    state = RoomState(whole.canonical(), frozenset(counts.items()))
    return Room(node, whole, whole_gpus, tuple(free_gpus), tuple(cuts), tuple(shut), state)


def _cut_of(gpu: Gpu, taken_whole: bool, slices: set[Slice] | None) -> Cut | str:
    if taken_whole:
        return "held whole, though it is in MIG mode now"
    held = frozenset(slices) if slices else frozenset()
    idle = frozenset(gpu.instances) - held if gpu.instances else frozenset()
    assert gpu.geometry is not None
    return cut(gpu.geometry, held, idle)
