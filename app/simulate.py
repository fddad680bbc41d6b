"""A simulated fleet and its pods: node reports of sample nodes, arrivals, first-fit, and an auditor of placements.

Nothing here asks the solver for a decision: first-fit and the auditor read the reports only, so that what they
say about Tangram's placements is said independently. Times are simulated seconds.
"""

from __future__ import annotations

import heapq
import itertools
import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from app import inventory, report
from app.driver import Queue
from solver.cluster import Gpu, Node
from solver.geometry import Geometry, Profile, Version
from solver.samples import parse_samples
from solver.topology import PCIE_GBS

FLEET = "8xH100:9,8xA100-mig:9,4xA30-mig:4,8xL40S:10,8xV100:4,4xL4:4"
"""Forty nodes: NVSwitch boards, MIG boards of two grids, PCIe boards, the hybrid cube mesh of a DGX-1V."""

GPU_ASKS = ((1, 8), (2, 5), (4, 4), (8, 3))
"""Whole GPUs asked for, and how often (weights chosen so that each size asks for a like share of the GPUs)."""

SLICE_ASKS = (("1g.10gb", 8), ("2g.20gb", 6), ("3g.40gb", 5), ("7g.80gb", 2), ("2g.12gb", 2))
"""Five MIG profiles of the fleet's boards, and how often each is asked for."""

LOAD = 1.15
"""Offered load: what arrives in a mean stay over what the fleet has. Above one, so that some must wait."""

DRIVER, CUDA = "580.95.05", "13.0"
"""What a sample node has that does not say."""

RUSH_SHARE, RUSH = 0.15, 4.0
"""In the first part of the time pods come more often, so that the fleet is full soon and placement matters."""


# ------------------------------------------------------------------------------------------------- node reports


def sample_reports(samples: str) -> list[report.NodeReport]:
    """Reports of the sample nodes that `8xH100:4,8xA100-mig:2` names."""
    return [report_of(node) for node in parse_samples(samples)]


def report_of(node: Node) -> report.NodeReport:
    """What an agent on this node would say: the inverse of `inventory.node_of`."""
    return report.NodeReport(
        node=node.name,
        boot="simulated",
        version=1,
        driver=_dotted(node.driver) or DRIVER,
        cuda=_dotted(node.cuda) or CUDA,
        nvml="13.580.95.05",
        gpus=tuple(_gpu(gpu) for gpu in node.gpus),
        links=tuple(_links(node)),
    )


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _gpu(gpu: Gpu) -> report.Gpu:
    mig = None
    if gpu.geometry is not None:
        mig = report.Mig(
            enabled=True,
            pending=True,
            profiles=tuple(_profile(profile, gpu.geometry) for profile in gpu.geometry.profiles),
            instances=tuple(
                report.Instance(
                    profile=piece.profile,
                    gi_id=number,
                    start=piece.start,
                    size=next(p.size for p in gpu.geometry.profiles if p.name == piece.profile),
                )
                for number, piece in enumerate(gpu.instances, start=1)
            ),
        )
    return report.Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        product=gpu.product,
        memory_mib=gpu.memory_mib,
        numa=gpu.numa,
        nic=gpu.nic,
        watts=gpu.watts,
        architecture=gpu.architecture or inventory.UNKNOWN,
        compute_capability=_dotted(gpu.compute_capability),
        health="bad" if gpu.withheld else "ok",
        health_reason=gpu.withheld,
        mig=mig,
    )


def _profile(profile: Profile, geometry: Geometry) -> report.Profile:
    totals = dict(geometry.engines)
    by_room = _most_at_once(profile)
    by_engines = [totals[name] // count for name, count in profile.engines if name in totals and count]
    return report.Profile(
        name=profile.name,
        id=profile.id,
        compute_slices=profile.compute_slices,
        memory_mib=profile.memory_mib,
        placements=tuple(report.Placement(start=start, size=profile.size) for start in profile.starts),
        engines=dict(profile.engines),
        max_instances=min([by_room, *by_engines]),
    )


def _most_at_once(profile: Profile) -> int:
    """How many of a profile fit beside each other: take each start that is free, from the left."""
    count, end = 0, 0
    for start in sorted(profile.starts):
        if start >= end:
            count, end = count + 1, start + profile.size
    return count


def _links(node: Node) -> Iterable[report.Link]:
    """Pairs better than SYS. A bandwidth that is no PCIe class is NVLink of 50 GB/s a link (25 a direction)."""
    classes = {gbs: name for name, gbs in PCIE_GBS.items() if name != "internal"}
    for a, b in itertools.combinations(range(len(node.gpus)), 2):
        gbs = node.links[a][b]
        ends = {"a": node.gpus[a].uuid, "b": node.gpus[b].uuid}
        if gbs not in classes:
            yield report.Link(**ends, nvlinks=min(64, max(1, gbs // 50)), gbs=gbs)
        elif classes[gbs] != "system":
            yield report.Link.model_validate({**ends, "pcie": classes[gbs]})


# ----------------------------------------------------------------------------------------------- pods to come


@dataclass(frozen=True, slots=True)
class Arrival:
    """A pod: when it comes, what it asks for and how long it stays once it is placed."""

    uid: str
    name: str
    at: float
    holds: float
    gpus: int = 0
    profile: str = ""

    @property
    def resources(self) -> tuple[tuple[str, int], ...]:
        """What its container asks for."""
        if self.profile:
            return ((f"nvidia.com/mig-{self.profile}", 1),)
        return (("nvidia.com/gpu", self.gpus),)

    @property
    def asks(self) -> str:
        """In words."""
        return f"1 × {self.profile}" if self.profile else f"{self.gpus} GPU{'s' if self.gpus != 1 else ''}"


def arrivals(
    reports: Sequence[report.NodeReport],
    *,
    pods: int,
    seconds: float,
    seed: int,
    load: float = LOAD,
    rush: float = RUSH,
    first: int = 0,
) -> list[Arrival]:
    """Poisson arrivals over `seconds` after a rush, exponential stays; MIG and whole GPUs get the same load.

    The stay follows from the load: in one mean stay (after the rush) as much arrives as `load` times what the
    fleet has. Names are numbered from `first`.
    """
    rng = random.Random(seed)  # noqa: S311  a simulation
    fleet = Fleet(reports)
    whole = sum(1 for board in fleet.boards.values() if not board.width)
    units = sum(board.width for board in fleet.boards.values())
    gpus_each = _mean(GPU_ASKS)
    sizes = {name: size for board in fleet.boards.values() for name, (size, _) in board.profiles.items()}
    slice_asks = [(name, weight) for name, weight in SLICE_ASKS if name in sizes]
    units_each = _mean([(sizes[name], weight) for name, weight in slice_asks]) if slice_asks else 1.0
    gpu_pods, slice_pods = whole / gpus_each, (units / units_each if slice_asks else 0.0)
    pods_per_second = pods / seconds / (RUSH_SHARE * rush + 1 - RUSH_SHARE)
    stay = load * (gpu_pods + slice_pods) / pods_per_second
    times = sorted(_arrival_time(rng.random(), rush) * seconds for _ in range(pods))
    coming = []
    for number, at in enumerate(times, first):
        sliced = rng.random() * (gpu_pods + slice_pods) >= gpu_pods
        asks: Sequence[tuple[int | str, int]] = slice_asks if sliced else GPU_ASKS
        ask = rng.choices([ask for ask, _ in asks], [weight for _, weight in asks])[0]
        coming.append(
            Arrival(
                uid=str(uuid.UUID(int=rng.getrandbits(128), version=4)),
                name=f"{'infer' if sliced else 'train'}-{number:03d}",
                at=at,
                holds=rng.expovariate(1 / stay),
                gpus=ask if isinstance(ask, int) else 0,
                profile=ask if isinstance(ask, str) else "",
            )
        )
    return coming


def _arrival_time(chance: float, rush: float) -> float:
    """A uniform draw turned into a moment of the run (0 to 1): earlier moments are likelier, `rush` times as likely."""
    early = RUSH_SHARE * rush
    drawn = chance * (early + 1 - RUSH_SHARE)
    return drawn / rush if drawn < early else RUSH_SHARE + (drawn - early)


def _mean(weighted: Sequence[tuple[int, int]]) -> float:
    return sum(value * weight for value, weight in weighted) / sum(weight for _, weight in weighted)


# ------------------------------------------------------------------------------ who has what, read from reports


class WrongPlacement(Exception):
    """A device that does not exist, may not be there, or is somebody else's; the message says which."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A taken part of a board: grid units from `start`, or the whole board (size 0)."""

    gpu: str
    start: int = 0
    size: int = 0


@dataclass(slots=True)
class Board:
    """One GPU: its grid (width 0: not in MIG mode), legal positions by profile, and who has which part."""

    uuid: str
    node: str
    width: int
    profiles: dict[str, tuple[int, tuple[int, ...]]]
    taken: dict[Piece, str] = field(default_factory=dict)

    def first_start(self, profile: str) -> int | None:
        """The lowest legal start where this profile is free."""
        size, starts = self.profiles.get(profile, (0, ()))
        return next((start for start in starts if not self._in_the_way(start, size)), None)

    @property
    def free_units(self) -> int:
        """Grid units that nobody has."""
        return self.width - sum(piece.size for piece in self.taken)

    def lost_asks(self) -> tuple[int, int]:
        """Of the slices asked for that this board is made for: how many have no place left, of how many."""
        asks = [(name, weight) for name, weight in SLICE_ASKS if name in self.profiles]
        return sum(w for name, w in asks if self.first_start(name) is None), sum(w for _, w in asks)

    def take(self, piece: Piece, uid: str) -> None:
        """Note a taken part; refuses what overlaps."""
        others = self._in_the_way(piece.start, piece.size) if self.width else list(self.taken.values())
        if others:
            raise WrongPlacement(f"{piece.gpu} is given to {uid} while {others[0]} has it")
        self.taken[piece] = uid

    def _in_the_way(self, start: int, size: int) -> list[str]:
        return [uid for p, uid in self.taken.items() if p.start < start + size and start < p.start + p.size]


@dataclass(frozen=True, slots=True)
class Use:
    """How full a fleet is, and how much of what is free is in pieces that asks cannot use.

    A free GPU is lost to an ask for n where its node has fewer than n free; a free MIG unit is lost to a profile
    that has no place left on its board. `lost` is the mean over asks as often as they are made (the measure of
    FGD, ATC'23), `stranded` is for the largest ask alone (on small nodes: for the whole node).
    """

    gpus: int = 0
    gpus_held: int = 0
    gpus_lost: float = 0.0
    gpus_stranded: int = 0
    units: int = 0
    units_held: int = 0
    units_lost: float = 0.0
    units_stranded: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def shares(self) -> dict[str, float]:
        """Held of all, and lost or stranded of what is free."""
        return {
            "gpus_held": _share(self.gpus_held, self.gpus),
            "gpus_lost": _share(self.gpus_lost, self.gpus - self.gpus_held),
            "gpus_stranded": _share(self.gpus_stranded, self.gpus - self.gpus_held),
            "units_held": _share(self.units_held, self.units),
            "units_lost": _share(self.units_lost, self.units - self.units_held),
            "units_stranded": _share(self.units_stranded, self.units - self.units_held),
        }


def _share(part: float, of: int) -> float:
    return part / of if of else 0.0


class Fleet:
    """Boards as the reports describe them, and what was taken: the books of first-fit and of the auditor."""

    def __init__(self, reports: Iterable[report.NodeReport]) -> None:
        self.boards: dict[str, Board] = {}
        self.nodes: dict[str, list[Board]] = {}
        self._held: dict[str, list[Piece]] = {}
        self._uses: dict[str, Use] = {}
        self._total = Use()
        for said in sorted(reports, key=lambda r: r.node):
            for gpu in sorted(said.gpus, key=lambda g: g.index):
                board = _board(said.node, gpu)
                self.boards[board.uuid] = board
                self.nodes.setdefault(said.node, []).append(board)
        self._changed = set(self.nodes)

    def place(self, uid: str, node: str, devices: Sequence[str], arrival: Arrival) -> None:
        """Book what a pod was given; WrongPlacement when it is not exactly what it asked for, legal and free."""
        asked = 1 if arrival.profile else arrival.gpus
        if len(devices) != asked or len(set(devices)) != asked:
            raise WrongPlacement(f"{arrival.name} asks for {arrival.asks} and got {list(devices)}")
        pieces = [self._piece(device, node, arrival) for device in devices]
        for piece in pieces:
            self.boards[piece.gpu].take(piece, uid)
        self._held[uid] = pieces
        self._changed.add(node)

    def release(self, uid: str) -> None:
        """The pod is gone."""
        for piece in self._held.pop(uid, ()):
            board = self.boards[piece.gpu]
            del board.taken[piece]
            self._changed.add(board.node)

    def _piece(self, device: str, node: str, arrival: Arrival) -> Piece:
        gpu, _, position = device.partition("/")
        board = self.boards.get(gpu)
        if board is None or board.node != node:
            raise WrongPlacement(f"{arrival.name} got {device}, which is not on {node}")
        if not position and not arrival.profile and not board.width:
            return Piece(gpu)
        profile, _, start = position.partition("@")
        size, starts = board.profiles.get(profile, (0, ()))
        if profile != arrival.profile or not start.isdigit() or int(start) not in starts:
            raise WrongPlacement(f"{arrival.name} asks for {arrival.asks} and got {device}")
        return Piece(gpu, int(start), size)

    def use(self) -> Use:
        """The whole fleet now; only nodes that changed are counted again."""
        for node in self._changed:
            self._total = _minus(self._total, self._uses[node]) if node in self._uses else self._total
            self._uses[node] = _use_of(self.nodes[node])
            self._total += self._uses[node]
        self._changed.clear()
        return self._total


def _minus(a: Use, b: Use) -> Use:
    return Use(*(getattr(a, f.name) - getattr(b, f.name) for f in fields(a)))


def _use_of(boards: Sequence[Board]) -> Use:
    """One node's part of `Fleet.use`."""
    whole = [board for board in boards if not board.width]
    cut = [board for board in boards if board.width]
    free = sum(1 for board in whole if not board.taken)
    asked = [min(gpus, len(whole)) for gpus, weight in GPU_ASKS for _ in range(weight)]
    return Use(
        gpus=len(whole),
        gpus_held=len(whole) - free,
        gpus_lost=free * _share(sum(1 for gpus in asked if gpus > free), len(asked)),
        gpus_stranded=free if free < max(asked) else 0,
        units=sum(board.width for board in cut),
        units_held=sum(board.width - board.free_units for board in cut),
        units_lost=sum(board.free_units * _share(*board.lost_asks()) for board in cut),
        units_stranded=sum(board.free_units for board in cut if board.taken),
    )


def _board(node: str, gpu: report.Gpu) -> Board:
    if gpu.mig is None or not gpu.mig.enabled:
        return Board(gpu.uuid, node, 0, {})
    profiles = {
        p.name.replace("+", "."): (p.placements[0].size, tuple(sorted(at.start for at in p.placements)))
        for p in gpu.mig.profiles
        if p.placements
    }
    width = max(start + size for size, starts in profiles.values() for start in starts)
    return Board(gpu.uuid, node, width, profiles)


def first_fit(fleet: Fleet, arrival: Arrival) -> tuple[str, list[str]] | None:
    """The lowest node that fits, there the lowest GPUs, on a GPU the lowest start."""
    for node, boards in fleet.nodes.items():
        if arrival.profile:
            for board in boards:
                start = board.first_start(arrival.profile)
                if start is not None:
                    return node, [f"{board.uuid}/{arrival.profile}@{start}"]
        else:
            free = [board.uuid for board in boards if not board.width and not board.taken]
            if len(free) >= arrival.gpus:
                return node, free[: arrival.gpus]
    return None


# ------------------------------------------------------------------------------------------------- the measures


@dataclass(slots=True)
class Tally:
    """What came of a run: pods placed and left, and means over time since `since` (of use, of pods waiting)."""

    since: float
    arrived: int = 0
    placed: int = 0
    left: int = 0
    last: Use = field(default_factory=Use)
    waiting: int = 0
    _at: float = 0.0
    _sums: dict[str, float] = field(default_factory=dict)
    _seconds: float = 0.0

    def observe(self, use: Use, *, waiting: int, now: float) -> None:
        """Count the time since the last change with what held then."""
        seconds = max(0.0, now - max(self._at, self.since))
        if seconds:
            self._seconds += seconds
            for name, value in {**self.last.shares(), "waiting": float(self.waiting)}.items():
                self._sums[name] = self._sums.get(name, 0.0) + value * seconds
        self.last, self.waiting, self._at = use, waiting, now

    def means(self) -> dict[str, float]:
        """Means over the observed time."""
        return {name: total / self._seconds for name, total in self._sums.items()} if self._seconds else {}


def run_first_fit(
    reports: Sequence[report.NodeReport], coming: Sequence[Arrival], *, seconds: float
) -> tuple[Tally, dict[str, str]]:
    """The same arrivals, the same queue, placed by first-fit; ends at `seconds`. Also what still waits, in words."""
    fleet, queue = Fleet(reports), Queue()
    tally = Tally(since=seconds / 3)
    by_uid = {arrival.uid: arrival for arrival in coming}
    events = [(arrival.at, number, arrival.uid) for number, arrival in enumerate(coming)]
    heapq.heapify(events)
    order = itertools.count(len(events))
    held: set[str] = set()
    while True:
        wake = queue.next_at()
        now = min(events[0][0] if events else seconds, seconds if wake is None else wake)
        if now >= seconds:
            break
        if events and events[0][0] <= now:
            uid = heapq.heappop(events)[2]
            if uid in held:
                held.discard(uid)
                fleet.release(uid)
                tally.left += 1
                queue.pod_deleted(now=now)
            else:
                tally.arrived += 1
                queue.add(uid, now=now)
        while (tried := queue.pop(now=now)) is not None:
            arrival = by_uid[tried]
            found = first_fit(fleet, arrival)
            if found is None:
                queue.refused(tried, now=now)
                continue
            fleet.place(tried, *found, arrival)
            queue.done(tried)
            held.add(tried)
            tally.placed += 1
            heapq.heappush(events, (now + arrival.holds, next(order), tried))
        tally.observe(fleet.use(), waiting=len(queue), now=now)
    tally.observe(fleet.use(), waiting=len(queue), now=seconds)
    return tally, {uid: by_uid[uid].asks for uid in by_uid if uid in queue}
