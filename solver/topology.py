"""The whole GPUs of a node as a link graph: which are interchangeable, which sets are alike, which are best.

    links, NUMA, kinds, NICs ──board()──▶ Board: twin classes and their symmetries
    Board + free GPUs ──▶ how many are free in each class ──canonical()──▶ the state of a node's whole GPUs

On an NVSwitch board the classes are its NUMA nodes, so a state is a count per NUMA node. On a DGX-1V each
GPU is a class of its own and a state is a set, up to the mirror images of the cube mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from solver.geometry import Kind

PCIE_GBS = {"internal": 64, "single": 64, "multiple": 56, "hostbridge": 48, "node": 32, "system": 20}
"""GB/s both ways to reckon with between two GPUs without NVLink, by NVML's common ancestor of their PCIe
path (board, one switch, several switches, host bridge, NUMA node, across sockets). Generation 4 x16 is 64;
below it only order and rough ratio mean anything (chosen by feel: published figures for NODE and SYS differ
by host), and one table serves all generations, since only GPUs of one node are ever compared."""

SUBSETS = 1_200
"""Ways to choose GPUs by class that are looked at one by one. All boards of 8 have at most 70, 16 GPUs in
bridged pairs 1,107; only boards of more than 12 GPUs that are all wired differently go beyond, and then the
choice is a greedy one (legal always, best not surely)."""

SYMMETRIES = 1_024
"""Symmetries of a board that are used. Beyond (sixteen GPUs in eight equal pairs have 40,320) states that
are alike may be told apart: more work, never a wrong answer."""


@dataclass(frozen=True, slots=True, eq=False)
class Board:
    """The whole GPUs of a node and their links, without names: one value for all nodes wired alike.

    Positions are 0 … size-1 in the node's order of whole GPUs. `classes` are the sets of interchangeable
    positions (same NUMA node, product, and links to all others). `inside[c]` is GB/s between two of a class,
    `between[c][d]` between one of c and one of d. `numa[c]` is the class's NUMA node, renamed 0, 1, … in
    order of appearance (unknown ones count as one node), `nics[c]` its nearest network card likewise, and
    `kinds[c]` what its GPUs are. `symmetries` are permutations of the classes that change nothing; the first
    is the identity. `source` is what `board` was called with.
    """

    size: int
    classes: tuple[tuple[int, ...], ...]
    inside: tuple[int, ...]
    between: tuple[tuple[int, ...], ...]
    numa: tuple[int, ...]
    nics: tuple[int, ...]
    kinds: tuple[Kind, ...]
    symmetries: tuple[tuple[int, ...], ...]
    source: tuple[Matrix, tuple[int | None, ...], tuple[Kind, ...], tuple[int | None, ...]]

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by source, so that boards wired alike are one value in every process."""
        return board, self.source


Counts = tuple[int, ...]
"""How many GPUs of each class."""

Left = tuple[int, tuple[object, ...]]
"""What is left of one class: how many idle GPUs, and the shared ones."""

Matrix = tuple[tuple[int, ...], ...]
"""GB/s both ways between every two GPUs."""


@lru_cache(maxsize=4096)
def board(
    links: Matrix,
    numa: tuple[int | None, ...],
    kinds: tuple[Kind, ...],
    nics: tuple[int | None, ...] = (),
) -> Board:
    """The board of GPUs with these links (GB/s both ways), NUMA nodes, kinds and nearest NICs, by position."""
    size = len(numa)
    cards = nics or (None,) * size
    node_of, card_of = _renamed(numa), _renamed(cards)

    def twins(a: int, b: int) -> bool:
        return (
            node_of[a] == node_of[b]
            and card_of[a] == card_of[b]
            and kinds[a] == kinds[b]
            and all(links[a][other] == links[b][other] for other in range(size) if other not in (a, b))
        )

    classes: list[list[int]] = []
    for position in range(size):
        for members in classes:
            if twins(members[0], position):
                members.append(position)
                break
        else:
            classes.append([position])

    inside = tuple(links[members[0]][members[1]] if len(members) > 1 else 0 for members in classes)
    between = tuple(tuple(links[a[0]][b[0]] if a is not b else 0 for b in classes) for a in classes)
    class_numa = tuple(node_of[members[0]] for members in classes)
    class_nics = tuple(card_of[members[0]] for members in classes)
    colours = [(len(members), kinds[members[0]], inside[c]) for c, members in enumerate(classes)]
    return Board(
        size=size,
        classes=tuple(tuple(members) for members in classes),
        inside=inside,
        between=between,
        numa=class_numa,
        nics=class_nics,
        kinds=tuple(kinds[members[0]] for members in classes),
        symmetries=_symmetries(colours, between, tuple(zip(class_numa, class_nics, strict=True))),
        source=(links, numa, kinds, nics),
    )


def _renamed(names: Sequence[int | None]) -> list[int]:
    """The same names as 0, 1, … in order of appearance."""
    numbers: dict[int | None, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _symmetries(
    colours: Sequence[object], between: Sequence[Sequence[int]], places: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], ...]:
    """Permutations of the classes that keep colours, links and "same NUMA node, same NIC"; at most SYMMETRIES."""
    count = len(colours)

    def together(c: int, d: int) -> tuple[bool, bool]:
        return places[c][0] == places[d][0], places[c][1] == places[d][1]

    def look(c: int) -> tuple[object, list[tuple[int, tuple[bool, bool]]]]:
        return colours[c], sorted((between[c][d], together(c, d)) for d in range(count) if d != c)

    looks = [look(c) for c in range(count)]
    found: list[tuple[int, ...]] = []

    def extend(chosen: list[int]) -> None:
        here = len(chosen)
        if here == count:
            found.append(tuple(chosen))
            return
        for image in range(count):
            if len(found) >= SYMMETRIES:
                return
            if image in chosen or looks[image] != looks[here]:
                continue
            if all(
                between[here][d] == between[image][chosen[d]] and together(here, d) == together(image, chosen[d])
                for d in range(here)
            ):
                extend([*chosen, image])

    extend([])
    return tuple(found)


def canonical(
    wiring: Board, left: Sequence[tuple[int, tuple[object, ...]]]
) -> tuple[tuple[int, tuple[object, ...]], ...]:
    """What is left in each class (idle GPUs, shared ones), up to the board's symmetries: the smallest image."""
    return min(tuple([left[image] for image in symmetry]) for symmetry in wiring.symmetries)


def everything(wiring: Board) -> Counts:
    """All GPUs of the board."""
    return tuple(len(members) for members in wiring.classes)


def bandwidth(wiring: Board, chosen: Counts) -> int:
    """GB/s both ways inside a set of GPUs: the sum over its pairs."""
    total = 0
    for c, count in enumerate(chosen):
        if not count:
            continue
        total += count * (count - 1) // 2 * wiring.inside[c]
        row = wiring.between[c]
        total += count * sum(row[d] * chosen[d] for d in range(c))
    return total


def places(labels: Sequence[int], chosen: Counts) -> int:
    """How many NUMA nodes (or NICs), given by class, a set of GPUs touches."""
    return len({labels[c] for c, count in enumerate(chosen) if count})


def joined_by_nvlink(wiring: Board, chosen: Counts) -> bool:
    """Whether every two GPUs of a set are joined by NVLink: a bandwidth that is no class of PCIe paths."""
    classes = [c for c, count in enumerate(chosen) if count]
    pairs = [wiring.inside[c] for c in classes if chosen[c] > 1]
    pairs += [wiring.between[c][d] for c in classes for d in classes if c < d]
    return all(gbs > 0 and gbs not in PCIE_GBS.values() for gbs in pairs)


@lru_cache(maxsize=4096)
def best_bandwidth(wiring: Board, gpus: int) -> int:
    """GB/s inside the best set of that many GPUs that this board could ever give."""
    return max((bandwidth(wiring, chosen) for chosen in subsets(wiring, everything(wiring), gpus)), default=0)


@lru_cache(maxsize=4096)
def fewest_places(wiring: Board, labels: tuple[int, ...], gpus: int) -> int:
    """The fewest NUMA nodes (or NICs), given by class, that hold that many GPUs of this board."""
    sizes: dict[int, int] = {}
    for c, members in enumerate(wiring.classes):
        sizes[labels[c]] = sizes.get(labels[c], 0) + len(members)
    held, touched = 0, 0
    for size in sorted(sizes.values(), reverse=True):
        if held >= gpus:
            break
        held, touched = held + size, touched + 1
    return touched


@lru_cache(maxsize=1024)
def subsets(wiring: Board, free: Counts, gpus: int) -> tuple[Counts, ...]:
    """The ways to choose that many of the free GPUs, by class; the greedy ones where there are too many."""
    if gpus < 0 or gpus > sum(free):
        return ()
    if ways(free, gpus) <= SUBSETS:
        return tuple(_all_subsets(free, gpus))
    return tuple(sorted(set(_greedy_subsets(wiring, free, gpus)), reverse=True))


def ways(free: Counts, gpus: int) -> int:
    """How many ways there are to choose that many GPUs by class (the product of Π (1 + x + … + x^free))."""
    counts = [1] + [0] * gpus
    for available in free:
        counts = [sum(counts[max(0, n - available) : n + 1]) for n in range(gpus + 1)]
    return counts[gpus]


def _all_subsets(free: Counts, gpus: int) -> Iterator[Counts]:
    """Every choice, those with GPUs of the first classes first."""
    if not free:
        if gpus == 0:
            yield ()
        return
    rest = sum(free[1:])
    for here in range(min(free[0], gpus), max(0, gpus - rest) - 1, -1):
        for others in _all_subsets(free[1:], gpus - here):
            yield (here, *others)


def _greedy_subsets(wiring: Board, free: Counts, gpus: int) -> Iterator[Counts]:
    """From each class grow a set, always by the GPU with the most bandwidth to it (same NUMA node first)."""
    for first, available in enumerate(free):
        if not available:
            continue
        chosen = [0] * len(free)
        chosen[first] = 1
        while sum(chosen) < gpus:
            nodes = {wiring.numa[c] for c, count in enumerate(chosen) if count}
            candidates = [c for c in range(len(free)) if chosen[c] < free[c]]
            best = max(candidates, key=lambda c: (_gain(wiring, chosen, c), wiring.numa[c] in nodes, -c))
            chosen[best] += 1
        yield tuple(chosen)


def _gain(wiring: Board, chosen: Sequence[int], c: int) -> int:
    to_others = sum(wiring.between[c][d] * count for d, count in enumerate(chosen) if d != c)
    return to_others + wiring.inside[c] * chosen[c]
