"""What agents last said about their nodes, and how old it is.

Turns reports into the solver's `Node`; the geometry is the report's, never a table's. Knows nothing of pods
except what agents saw of them (which pod has a process on which device).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from sys import intern

from app.quantities import version_in
from app.report import Gpu, Instance, Link, NodeReport, Process, Unchanged
from app.report import Profile as ReportedProfile
from app.translate import profile_as_asked
from solver import Device, Geometry, Node, Profile, Slice
from solver import Gpu as SolverGpu
from solver.topology import PCIE_GBS

MOST_GEOMETRIES = 64  # several for each product that there is; whoever reports more makes them up
UNKNOWN = "unknown"  # an agent's word for an architecture that its NVML does not tell


@dataclass(slots=True)
class Entry:
    """One node's last report: as said, as the solver sees it, and when we last heard of it."""

    report: NodeReport
    node: Node
    users: dict[Device, frozenset[str]]
    heard: float
    lasting: bool = False
    uuids: dict[Device, str] = field(default_factory=dict)
    """MIG devices by place, of the instances that could be handed to a container now."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """What the Node object says of its MIG: somebody else cuts the boards (`owner`), or is at it (`changing`)."""

    owner: str = ""
    changing: str = ""


NOBODY_ELSE = Ownership()


class Inventory:
    """The last report of every node."""

    def __init__(self, *, stale_seconds: float) -> None:
        self._stale_seconds = stale_seconds
        self._entries: dict[str, Entry] = {}
        self._names: tuple[str, ...] | None = ()
        """Their names, sorted; None where they must be sorted anew."""
        self._homes: dict[str, set[str]] = {}
        self._ownership: dict[str, Ownership] = {}
        self._versions: dict[str, dict[str, str]] = {}
        self.geometries: set[Geometry] = set()
        """How boards in MIG mode can be cut, where somebody does: of every report so far, MOST_GEOMETRIES about."""

    def __iter__(self) -> Iterator[str]:
        if self._names is None:
            self._names = tuple(sorted(self._entries))
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, name: str) -> Entry | None:
        """What is known of a node, stale or not."""
        return self._entries.get(name)

    def accept(self, report: NodeReport, *, now: float, lasting: bool = False) -> bool:
        """Take a full report; False for one that is older than what we have. `lasting`: from a file, never stale."""
        before = self._entries.get(report.node)
        same_agent = before is not None and report.boot and before.report.boot == report.boot
        if before is not None and same_agent and report.version < before.report.version:
            return False
        node = self._node_of(report)
        if before is None:
            self._names = None
        else:
            self._not_at_home(before)
        kept = report.model_copy(update={"links": ()})  # the node has them, and they are half of a report
        self._entries[report.node] = Entry(kept, node, users_of(report), now, lasting, uuids_of(report))
        if len(self.geometries) < MOST_GEOMETRIES and not self.why_no_slices(report.node):
            alike = {id(gpu.geometry): gpu.geometry for gpu in node.gpus if gpu.geometry is not None}
            self.geometries.update(alike.values())  # a geometry takes long to hash
        for gpu in report.gpus:
            self._homes.setdefault(gpu.uuid, set()).add(report.node)
        return True

    def beat(self, unchanged: Unchanged, *, now: float) -> bool:
        """An agent says "nothing new"; False where we do not hold the version that it means."""
        entry = self._entries.get(unchanged.node)
        if entry is None or (entry.report.boot, entry.report.version) != (unchanged.boot, unchanged.version):
            return False
        entry.heard = now
        return True

    def owned(self, name: str, ownership: Ownership) -> bool:
        """The Node object says this of the node's MIG; whether that is new."""
        if self._ownership.get(name, NOBODY_ELSE) == ownership:
            return False
        self._ownership[name] = ownership
        if ownership == NOBODY_ELSE:
            del self._ownership[name]
        entry = self._entries.get(name)
        if entry is not None:
            entry.node = replace(self._node_of(entry.report), links=entry.node.links)
        return True

    def runs(self, name: str, versions: dict[str, str]) -> None:
        """The Node object names the versions of what runs on the node; empty: the node is gone."""
        if versions:
            self._versions[name] = versions
        else:
            self._versions.pop(name, None)

    def versions(self, name: str) -> dict[str, str]:
        """The chain of versions on a node: driver, CUDA and NVML, kernel, container toolkit and runtime, kubelet."""
        entry = self._entries.get(name)
        if entry is None:
            return dict(self._versions.get(name, {}))
        report = entry.report
        chain = {"driver": report.driver, "cuda": report.cuda, "nvml": report.nvml, **report.versions}
        return {each: version for each, version in {**chain, **self._versions.get(name, {})}.items() if version}

    def slices_are_made(self, name: str) -> bool:
        """Whether the node's agent makes and removes slices when we tell it to."""
        entry = self._entries.get(name)
        return entry is not None and entry.report.makes_slices is True and not self._owner(name)

    def why_no_slices(self, name: str) -> str:
        """Why only slices that exist can be had there, in words; empty where they can be made."""
        entry = self._entries.get(name)
        if entry is None or entry.report.makes_slices is not False:
            return self._owner(name)
        return self._owner(name) or entry.report.makes_none or "its agent does not make slices"

    def _owner(self, name: str) -> str:
        return self._ownership.get(name, NOBODY_ELSE).owner

    def _node_of(self, report: NodeReport) -> Node:
        as_it_is = report.makes_slices is False or bool(self._owner(report.node))
        return node_of(report, as_it_is=as_it_is)

    def drop(self, name: str) -> None:
        """Forget a node that is gone."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._names = None
            self._not_at_home(entry)

    def _not_at_home(self, entry: Entry) -> None:
        for gpu in entry.report.gpus:
            homes = self._homes[gpu.uuid]
            homes.discard(entry.report.node)
            if not homes:
                del self._homes[gpu.uuid]

    def homes(self, gpu: str) -> frozenset[str]:
        """The nodes that report this GPU (UUID): one, unless a node was renamed or a board was moved."""
        return frozenset(self._homes.get(gpu, ()))

    def silent_for(self, name: str, *, now: float) -> float:
        """Seconds since the node was last heard of; 0 for lasting entries."""
        entry = self._entries[name]
        return 0.0 if entry.lasting else max(0.0, now - entry.heard)

    def fault(self, name: str, *, now: float) -> str:
        """Why nothing of this node may be offered, in words; empty when all is well."""
        entry = self._entries.get(name)
        if entry is None:
            return "no agent has reported this node's GPUs"
        silent = self.silent_for(name, now=now)
        if silent > self._stale_seconds:
            return f"its agent is silent: not heard for {silent:.0f} s"
        if entry.report.error:
            return f"its agent cannot read NVML: {entry.report.error}"
        return self._ownership.get(name, NOBODY_ELSE).changing


def profiles_in(report: NodeReport) -> frozenset[str]:
    """Every MIG profile that some board of the node could be cut into now."""
    return frozenset(
        profile.name for gpu in report.gpus if gpu.mig is not None and gpu.mig.enabled for profile in gpu.mig.profiles
    )


def node_of(report: NodeReport, *, as_it_is: bool = False) -> Node:
    """The solver's view of a report: GPUs in index order, geometry where MIG is on, link bandwidths, versions.

    A version that is missing or unreadable is unknown, and less than any that can be asked for. `as_it_is`: nobody
    makes or removes slices there, so boards can be cut at the places only where instances are.
    """
    gpus = tuple(sorted(report.gpus, key=lambda gpu: gpu.index))
    return Node(
        report.node,
        tuple(_gpu(gpu, as_it_is=as_it_is) for gpu in gpus),
        _links([gpu.uuid for gpu in gpus], report.links),
        driver=version_in(report.driver),
        cuda=version_in(report.cuda),
    )


def users_of(report: NodeReport) -> dict[Device, frozenset[str]]:
    """Who has processes on which device: pods by UID, and what belongs to none (`PROCESS`, then its PID).

    Where pods cannot be seen, a process on a GPU may well be its holder's, and counts only in a slice, which is
    nobody else's to remove.
    """
    users: dict[Device, frozenset[str]] = {}
    for gpu in report.gpus:
        _note(users, Device(gpu.uuid), gpu.pods, gpu.processes, report.sees_pods)
        for instance in _instances(gpu):
            _note(users, Device(gpu.uuid, _slice(instance)), instance.pods, instance.processes, True)
    return users


PROCESS = "process "


def _note(
    users: dict[Device, frozenset[str]],
    device: Device,
    pods: Iterable[str],
    processes: Iterable[Process],
    counts_strays: bool,
) -> None:
    """Graphics processes (a display server) do not keep a GPU from being used."""
    strays = {
        f"{PROCESS}{each.pid}" for each in processes if counts_strays and not each.pod and each.kind != "graphics"
    }
    found = frozenset({*pods, *strays})
    if found:
        users[device] = found


def uuids_of(report: NodeReport) -> dict[Device, str]:
    """The MIG devices that exist, by place: GPU instances that hold a compute instance."""
    return {
        Device(gpu.uuid, _slice(instance)): instance.uuid
        for gpu in report.gpus
        for instance in _instances(gpu)
        if instance.uuid
    }


def _gpu(gpu: Gpu, *, as_it_is: bool) -> SolverGpu:
    withheld = f"unhealthy: {gpu.health_reason or 'no reason given'}" if gpu.health == "bad" else ""
    hidden = sum(1 for instance in (gpu.mig.instances if gpu.mig else ()) if instance.start is None)
    if hidden:
        withheld = f"{hidden} MIG instances exist whose places its agent may not see (it is not privileged)"
    if gpu.mig is not None and gpu.mig.pending not in (None, gpu.mig.enabled):
        withheld = "MIG mode is about to change with the next reset"
    geometry = _geometry(gpu)
    there = [_slice(instance) for instance in _instances(gpu) if instance.uuid or not as_it_is]
    if geometry is not None and as_it_is:
        geometry = _only_there(geometry, there)
    if geometry is not None and not _is_reckonable(geometry):
        starts = sum(len(profile.starts) for profile in geometry.profiles)
        withheld = (
            f"its MIG geometry ({geometry.width} units, {len(geometry.profiles)} profiles, {starts} placements) "
            f"is more than Tangram reckons with ({MOST_UNITS}, {MOST_PROFILES}, {MOST_PLACEMENTS})"
        )
        geometry = replace(geometry, profiles=())
    return SolverGpu(
        uuid=gpu.uuid,
        index=gpu.index,
        product=intern(gpu.product),
        memory_mib=gpu.memory_mib,
        numa=gpu.numa,
        geometry=geometry,
        instances=tuple(sorted(there)),
        withheld=withheld,
        architecture="" if gpu.architecture == UNKNOWN else intern(gpu.architecture),
        compute_capability=version_in(gpu.compute_capability),
        watts=gpu.watts,
        nic=gpu.nic,
    )


MOST_UNITS, MOST_PROFILES, MOST_PLACEMENTS = 16, 32, 200
"""Boards beyond this are not offered: no board is (12 units, 11 profiles, 30 placements are the most there are), and to
reckon with one would hold up everybody."""


def _is_reckonable(geometry: Geometry) -> bool:
    placements = sum(len(profile.starts) for profile in geometry.profiles)
    return geometry.width <= MOST_UNITS and len(geometry.profiles) <= MOST_PROFILES and placements <= MOST_PLACEMENTS


def _geometry(gpu: Gpu) -> Geometry | None:
    """The board's grid as NVML lists it: as wide as the furthest placement, totals from what one profile takes.

    NVML gives no engine totals; a board has at least what its largest profile takes, and a profile that may
    exist n times needs n of what it takes.
    """
    return _geometry_of(_Same(gpu.mig.profiles)) if gpu.mig is not None and gpu.mig.enabled else None


class _Same:
    """The profiles of a board as reports share them: equal only to the very same, which is quickly seen."""

    __slots__ = ("profiles",)

    def __init__(self, profiles: tuple[ReportedProfile, ...]) -> None:
        self.profiles = profiles

    def __hash__(self) -> int:
        return id(self.profiles)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.profiles is other.profiles


@lru_cache(maxsize=1024)
def _geometry_of(board: _Same) -> Geometry:
    profiles = tuple(
        Profile(
            name=profile_as_asked(profile.name),
            id=profile.id,
            size=profile.placements[0].size,
            starts=tuple(sorted(placement.start for placement in profile.placements)),
            compute_slices=profile.compute_slices,
            memory_mib=profile.memory_mib,
            engines=tuple(sorted((name, count) for name, count in profile.engines.items() if count)),
        )
        for profile in board.profiles
        if profile.placements
    )
    totals: dict[str, int] = {}
    for reported in board.profiles:
        for name, count in reported.engines.items():
            totals[name] = max(totals.get(name, 0), count * max(1, reported.max_instances))
    return _known(
        Geometry(
            width=max((start + profile.size for profile in profiles for start in profile.starts), default=0),
            compute_slices=max((profile.compute_slices for profile in profiles), default=0),
            profiles=profiles,
            engines=tuple(sorted(totals.items())),
        )
    )


def _only_there(geometry: Geometry, slices: Iterable[Slice]) -> Geometry:
    """The same board when it can be cut nowhere else than it is."""
    there = set(slices)
    profiles = tuple(
        replace(profile, starts=tuple(start for start in profile.starts if Slice(profile.name, start) in there))
        for profile in geometry.profiles
    )
    return _known(replace(geometry, profiles=tuple(profile for profile in profiles if profile.starts)))


@lru_cache(maxsize=1024)
def _known(geometry: Geometry) -> Geometry:
    """The same object for equal geometries: a cluster has thousands of boards of a few kinds, and they are sent and
    compared all the time."""
    return geometry


def _instances(gpu: Gpu) -> list[Instance]:
    """The instances whose place is known."""
    return [instance for instance in (gpu.mig.instances if gpu.mig else ()) if instance.start is not None]


def _slice(instance: Instance) -> Slice:
    assert instance.start is not None
    return Slice(profile_as_asked(instance.profile), instance.start)


def _links(uuids: list[str], links: tuple[Link, ...]) -> tuple[tuple[int, ...], ...]:
    place = {uuid: position for position, uuid in enumerate(uuids)}
    size = len(uuids)
    matrix = [[0 if row == column else PCIE_GBS["system"] for column in range(size)] for row in range(size)]
    for link in links:
        a, b = place[link.a], place[link.b]
        matrix[a][b] = matrix[b][a] = link.gbs if link.nvlinks and link.gbs else PCIE_GBS[link.pcie]
    return _known_links(tuple(tuple(row) for row in matrix))


@lru_cache(maxsize=1024)
def _known_links(links: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The same object for equal wirings."""
    return links
