"""Who gets which device, for agents that hand them to containers: placements, exchanges, and what was handed.

    ledger ──── refresh() ──▶ Placements (a version of their own) ──▶ agent, in its held request
    agent ───── exchange() ─▶ the ledger first, then the annotations of all pods concerned, then the answer
    report ──── refresh() ──▶ what containers really have: where the ledger says otherwise, the ledger follows

Decision 0009. Like the order lists, placements are compared and sent anew, never amended; nothing here must survive a
restart. Annotations that the API server has not taken yet are in `unwritten`, and are written until it has.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, permutations

from pydantic import ValidationError

from app.errors import Conflict, KubeError, NotFound
from app.inventory import Entry, Inventory
from app.kube import Kube
from app.ledger import Hold, Ledger, Phase, allocation_of
from app.offers import Offers, legal, on_any_host
from app.report import (
    ContainerAsk,
    DeviceAt,
    Exchange,
    ExchangeReply,
    Handed,
    Mig,
    NodeReport,
    Placements,
    PodAt,
)
from app.translate import PLACEMENT_ANNOTATION, Container, profile_as_asked, write_placement
from app.truth import Truth
from solver import DEFAULT_POLICY, Demand, Device, Node, Placement, Refusal, Slice, quote
from solver.cluster import GPU_MILLI, Allocation, allocations
from solver.geometry import faults
from solver.verify import on_terms

log = logging.getLogger(__name__)

WRITE_SECONDS = 3.0
"""How long an exchange waits for one annotation: the kubelet's whole admission waits with it."""

MOST_WAYS = 24
"""Ways to give devices in return that are tried before an exchange is refused: all, for up to four of them."""

LONGEST_REASON = 500  # characters of a refusal that the wire takes

MOST_START = 63  # the last place on a board that the wire takes

HOWS = ("placed", "free", "swapped", "overridden", "unplaced", "observed", "moved", "refused")
"""What agents count of a container beside the rule: how it was handed its devices, that they were another pod's after
all, that it was handed nothing."""

MOST_RULES = 32  # different names of matching rules that are counted; agents have a handful
OTHER_RULE = "other"
MOST_COUNTED = 1_000_000  # of one kind in one report; more is no count

SAID = 3  # what is absurd in one report is said so often, and then counted

Devices = tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class Unanswered:
    """No yes and no no. `perhaps`: the exchange may have been made; else it certainly was not."""

    reason: str
    perhaps: bool


@dataclass(frozen=True, slots=True)
class Moved:
    """The last exchange of a pod: what it took, who got something in return, and the report that is older than it."""

    take: frozenset[Device]
    swapped: tuple[str, ...]
    before: NodeReport


@dataclass(frozen=True, slots=True)
class Told:
    """A pod as the agent is told of it, and what that was made from."""

    devices: Devices
    containers: tuple[Container, ...]
    pod: PodAt


@dataclass(slots=True)
class Desk:
    """One node's list and what its report says was handed.

    `profiles`: NVML's own names by GPU and name as pods ask. `handed`: devices by pod, by its UID or, where the agent
    has only names, by `namespace/name`, as the report `heard` says; `agreed`: those of the ledger that agree with it.
    `counted` has the agent's counters as they were seen last.
    """

    placements: Placements
    told: dict[str, Told] = field(default_factory=dict)
    profiles: dict[tuple[str, str], str] = field(default_factory=dict)
    heard: NodeReport | None = None
    handed: dict[str, Devices] = field(default_factory=dict)
    agreed: dict[str, Devices] = field(default_factory=dict)
    moved: dict[str, Moved] = field(default_factory=dict)
    boot: str = ""
    counted: Mapping[str, int] | None = None
    differing: int = 0
    overlaps: int = 0


class Handing:
    """The placements of all nodes, and what follows when devices are handed out. `ready`: see `Orders`.

    `can_switch`: whether the policy may switch MIG modes at all. `wake` lets the agent's held request be answered,
    `order` makes a node's order list anew. `binding`: whether a bind of the pod (UID) is being made here.
    `count` takes the name of a counter, its label, and how many.
    """

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        offers: Offers,
        truth: Truth,
        kube: Kube | None,
        *,
        service: str,
        can_switch: bool,
        not_ready: Callable[[], list[str]],
        wake: Callable[[str], None],
        order: Callable[[list[str]], None],
        binding: Callable[[str], bool],
        count: Callable[[str, str, int], None],
        term: Callable[[], int],
    ) -> None:
        self._ledger = ledger
        self._inventory = inventory
        self._offers = offers
        self._truth = truth
        self._kube = kube
        self._service = service
        self._can_switch = can_switch
        self._not_ready = not_ready
        self._wake = wake
        self._order = order
        self._binding = binding
        self._count = count
        self._term = term
        self._desks: dict[str, Desk] = {}
        self._last_version = 0
        self._rules: set[str] = set()
        self.unwritten: dict[str, None] = {}
        """UIDs of pods whose annotation does not yet say what the ledger says."""
        self.followed = 0
        """How often the ledger has followed what a container really had."""

    # -- placements -----------------------------------------------------------------------------------

    def placements_of(self, name: str) -> Placements | None:
        """What this node's agent shall know now; None where it is not the kubelet's device plugin."""
        desk = self._desks.get(name)
        return desk.placements if desk is not None and desk.placements.version else None

    def refresh(self, names: Iterable[str]) -> None:
        """Follow what was handed on these nodes, and make their lists anew."""
        if self._not_ready():
            return
        for name in names:
            entry = self._inventory.get(name)
            if entry is None:
                continue
            if entry.report.hands is not None or entry.report.handed or name in self._desks:
                desk = self._desk(name)
                is_new = desk.heard is not entry.report
                if is_new:
                    self._read(entry, desk)
                if self._follow(entry, desk) or is_new or desk.overlaps:
                    self._make_way(entry, desk)
                    desk.overlaps = len(self.overlaps(name))
                self._put(entry, desk)

    def look_again(self) -> None:
        """At a new term: the ledger was told anew who has what, of some perhaps what they had before an exchange."""
        for desk in self._desks.values():
            desk.heard = None

    def forget(self, name: str) -> None:
        """The node is no more."""
        self._desks.pop(name, None)

    def _desk(self, name: str) -> Desk:
        if name not in self._desks:
            self._desks[name] = Desk(Placements(service=self._service, version=0))
        return self._desks[name]

    def _put(self, entry: Entry, desk: Desk) -> None:
        """Replace the list where it is another. What has not changed is not made again: a node may have many pods."""
        name, before = entry.report.node, desk.placements
        if entry.report.hands != "plugin":
            desk.placements = Placements(service=self._service, version=0)
            return
        told = {hold.pod.uid: self._told(hold, desk) for hold in self._ledger.on(name) if _is_promised(hold)}
        pods = tuple([each.pod for each in told.values() if each is not None])
        either = _either(entry) if self._can_switch and self._inventory.slices_are_made(name) else ()
        desk.told = {uid: each for uid, each in told.items() if each is not None}
        if not before.version or (pods, either) != (before.pods, before.either):
            self._last_version += 1
            desk.placements = Placements(service=self._service, version=self._last_version, pods=pods, either=either)
            self._wake(name)

    def _told(self, hold: Hold, desk: Desk) -> Told | None:
        pod = self._truth.pods.get(hold.pod.uid)
        containers = pod.containers if pod is not None else ()
        known = desk.told.get(hold.pod.uid)
        if known is not None and (known.devices, known.containers) == (hold.devices, containers):
            return known
        try:
            made = PodAt(
                uid=hold.pod.uid,
                namespace=hold.pod.namespace,
                name=hold.pod.name,
                devices=tuple(_devices_at(hold.devices, desk.profiles)),
                containers=tuple(ContainerAsk(name=each.name, resources=dict(each.resources)) for each in containers),
            )
        except ValidationError as error:
            log.error("%s cannot be told to the agent of %s: %s", hold.pod, hold.node, error)
            return None
        return Told(hold.devices, containers, made)

    # -- what was handed ------------------------------------------------------------------------------

    def _read(self, entry: Entry, desk: Desk) -> None:
        """Take from a report what it says was handed; what cannot be is said in the log and left out."""
        report = entry.report
        desk.heard, desk.agreed = report, {}
        desk.differing = sum(map(_differs, report.handed))
        profiles = _profiles_of(report)
        if profiles != desk.profiles:
            desk.profiles, desk.told = profiles, {}
        self._count_handing(report, desk)
        handed: dict[str, list[Handed]] = {}
        absurdities: list[str] = []
        boards = {gpu.uuid: gpu.mig for gpu in report.gpus if self._inventory.homes(gpu.uuid) == {report.node}}
        for each in report.handed:
            absurd = self._absurd(report.node, each, boards)
            if absurd:
                absurdities.append(f"{each.namespace}/{each.name}: {absurd}")
            elif each.devices:
                handed.setdefault(each.uid or f"{each.namespace}/{each.name}", []).append(each)
        desk.handed = {pod: _together(all_of_it) for pod, all_of_it in handed.items()}
        for words in absurdities[:SAID]:
            log.warning("node %s says what cannot be, and nothing follows from it: %s", report.node, words)
        if len(absurdities) > SAID:
            log.warning("node %s says %d more such things", report.node, len(absurdities) - SAID)

    def _absurd(self, node: str, said: Handed, boards: Mapping[str, Mig | None]) -> str:
        """Why nothing can follow from this; empty if something may."""
        hold = self._ledger.get(said.uid) if said.uid else None
        if hold is not None and hold.node != node:
            return f"it has {len(said.devices)} devices there, but it is a pod of node {hold.node}"
        if hold is not None and (hold.pod.namespace, hold.pod.name) != (said.namespace, said.name):
            return f"its UID {said.uid} is that of {hold.pod}"
        for device in said.devices:
            if device.gpu not in boards:
                return f"it has GPU {device.gpu}, which that node does not have (or not alone)"
            if device.profile and not _is_place(boards[device.gpu], device):
                return f"it has {device.profile}@{device.start} of {device.gpu}, where there can be no such slice"
        return ""

    def _follow(self, entry: Entry, desk: Desk) -> bool:
        """Where containers have other devices than the ledger says, the ledger follows; whether it had to."""
        name = entry.report.node
        followed = False
        for hold in self._ledger.on(name) if desk.handed else ():
            if desk.agreed.get(hold.pod.uid) is hold.devices:
                continue
            handed = _of(desk.handed, hold) if hold.firm else ()
            moved = desk.moved.get(hold.pod.uid)
            if not handed or (moved is not None and moved.before is entry.report):
                continue  # nothing is known, or an exchange was granted since that report
            true = _as_handed(hold, handed, entry)
            if not true or Counter(true) == Counter(hold.devices):
                desk.agreed[hold.pod.uid] = hold.devices
                continue
            log.warning("%s on %s has %s, not %s", hold.pod, name, _words(true), _words(hold.devices))
            self.followed += 1
            self._move(hold, true, write=not hold.unknown)
            followed = True
        if followed:
            self._truth.made_room(name)
        return followed

    def _make_way(self, entry: Entry, desk: Desk) -> None:
        """Pods that have not been handed theirs, and were promised what others have, are promised something else.

        So it is, too, after a restart between the annotations of two pods that had exchanged theirs.
        """
        name = entry.report.node
        if entry.report.hands is None or not self.overlaps(name):
            return
        for hold in self._ledger.on(name):
            if not self._may_still_change(hold, desk) or not hold.devices:
                continue
            node, taken = self._offers.view(name, but=[hold.pod.uid])
            if legal(_shut_for(node, set()))(allocations(taken), hold.allocation) is None:
                continue
            other = quote(node, taken, on_any_host(hold.demand), DEFAULT_POLICY)
            if other is None:
                log.warning("%s on %s is promised what others have, and there is nothing else", hold.pod, name)
                continue
            log.warning("%s on %s is promised %s now: others have what it was", hold.pod, name, _words(other.devices))
            self._move(hold, other.devices, write=True)

    def _may_still_change(self, hold: Hold, desk: Desk) -> bool:
        """Whether no container of the pod has any of its devices yet."""
        pod = self._truth.pods.get(hold.pod.uid)
        admitted = pod is not None and pod.admitted
        return _is_promised(hold) and not admitted and not _of(desk.handed, hold)

    def _move(self, hold: Hold, devices: Devices, *, write: bool) -> None:
        uid = hold.pod.uid
        self._ledger.move(uid, devices)
        self._truth.devices_told(uid)
        if write and self._kube is not None:
            self.unwritten[uid] = None

    def _count_handing(self, report: NodeReport, desk: Desk) -> None:
        """Add what is new in the agent's own counters. Those of an agent that was there before us began elsewhere;
        of one that has started since, all is new."""
        before = desk.counted if desk.boot == report.boot else {}
        if desk.counted is not None and before is not None:
            for key, number in report.handing.items():
                new = number - before.get(key, 0)
                if new > 0:
                    self._count_one(key, min(new, MOST_COUNTED))
        desk.boot, desk.counted = report.boot, report.handing

    def _count_one(self, key: str, new: int) -> None:
        name = key.rpartition(":")[2].strip()
        if name in HOWS:
            self._count("handed", name, new)
            return
        if not re.fullmatch(r"[a-z][a-z0-9 _-]{0,39}", name) or len(self._rules | {name}) > MOST_RULES:
            name = OTHER_RULE
        self._rules.add(name)
        self._count("matching", name, new)

    # -- exchanges ------------------------------------------------------------------------------------

    async def exchange(self, asked: Exchange) -> ExchangeReply | Unanswered:
        """Grant or refuse what the kubelet counts for a pod instead of what it was promised."""
        waiting_for = self._not_ready()
        if waiting_for:
            self._count("exchanges", "not_ready", 1)
            return Unanswered(f"Tangram is not ready: waiting for {', '.join(waiting_for)}", perhaps=False)
        term, before = self._term(), self._ledger.get(asked.uid)
        moved = self._exchange(asked)
        if isinstance(moved, Refusal):
            log.info("node %s, pod %s: no exchange: %s", asked.node, asked.uid, moved)
            self._count("exchanges", "denied", 1)
            return ExchangeReply(granted=False, reason=moved.reason[:LONGEST_REASON])
        outcome = "again" if self._ledger.get(asked.uid) is before else "swapped" if moved.swapped else "free"
        await asyncio.gather(*(self._write(uid) for uid in (asked.uid, *moved.swapped) if uid in self.unwritten))
        hold = self._ledger.get(asked.uid)
        if self._not_ready() or self._term() != term or hold is None or not moved.take <= set(hold.devices):
            self._count("exchanges", "lost", 1)
            return Unanswered("the pod has gone, or Tangram has lost its Lease, during the exchange", perhaps=True)
        self._count("exchanges", outcome, 1)
        return ExchangeReply(granted=True, swapped=moved.swapped)

    def _exchange(self, asked: Exchange) -> Moved | Refusal:
        """Decide, and change the ledger, at once."""
        entry = self._inventory.get(asked.node)
        hold = self._ledger.get(asked.uid)
        if entry is None:
            return Refusal(f"no report of {asked.node} has been read")
        if hold is None or hold.node != asked.node or not _is_promised(hold):
            return Refusal(f"pod {asked.uid} is promised nothing on {asked.node}")
        desk = self._desk(asked.node)
        give, take = [_device(each, hold.demand, entry) for each in asked.give], _taken(asked, hold, entry)
        if set(take) <= set(hold.devices):
            last = desk.moved.get(asked.uid)
            return last if last is not None and last.take == set(take) else Moved(frozenset(take), (), entry.report)
        wrong = _unlike(hold, give, take)
        if wrong:
            return Refusal(wrong)
        moves = self._ways_out(entry, desk, hold, give, take)
        if isinstance(moves, Refusal):
            return moves
        for mover, devices in moves:
            self._move(mover, devices, write=True)
        swapped = tuple(mover.pod.uid for mover, _ in moves[1:])
        done = Moved(frozenset(take), swapped, entry.report)
        desk.moved = {uid: each for uid, each in desk.moved.items() if self._ledger.get(uid) is not None}
        desk.moved |= dict.fromkeys(swapped, Moved(frozenset(), (), entry.report)) | {asked.uid: done}
        log.info("%s on %s has %s now, not %s", hold.pod, asked.node, _words(take), _words(give))
        self.refresh([asked.node])
        self._order([asked.node])
        return done

    def _ways_out(
        self, entry: Entry, desk: Desk, hold: Hold, give: Sequence[Device], take: Sequence[Device]
    ) -> list[tuple[Hold, Devices]] | Refusal:
        """Who then has what, the asking pod first: the first way that is legal and keeps everybody's terms."""
        coming = [device for device in take if device not in hold.devices]
        leaving = [device for device in give if device not in take]
        not_to_be_had = self._not_to_be_had(entry, coming)
        if not_to_be_had:
            return not_to_be_had
        owners = self._owners(hold, coming, entry, desk)
        if isinstance(owners, Refusal):
            return owners
        name, movers = entry.report.node, list({hold.pod.uid, *(each.pod.uid for each in owners.values())})
        seen = self._offers.view(name, but=movers)[0]
        there = allocations(self._offers.view(name, but=movers, promised=True)[1])
        refusal = Refusal(f"takes {len(coming)} devices and gives {len(leaving)}")
        ways = permutations(leaving, len(coming)) if owners else combinations(leaving, len(coming))
        for returned in islice(ways, MOST_WAYS):
            moves = [(hold, _with(hold.devices, less=returned, more=coming)), *_in_return(owners, coming, returned)]
            wrong = _wrong(seen, there, moves)
            if wrong is None:
                return moves
            refusal = wrong
        return refusal

    def _owners(self, hold: Hold, coming: Sequence[Device], entry: Entry, desk: Desk) -> dict[Device, Hold] | Refusal:
        """By device that comes: the pod that was promised it, and has not been handed it."""
        owners: dict[Device, Hold] = {}
        for device in coming:
            if device.milli:
                continue  # shares stand beside each other, and whether there is room is seen below
            for other in self._ledger.firmly(entry.report.node, but=[hold.pod.uid]):
                if device not in other.devices:
                    continue
                used = other.pod.uid in entry.users.get(device, ())
                if used or not self._may_still_change(other, desk):
                    return Refusal(f"{device} is {other.pod}'s, which has been handed it or is still ending")
                if device in owners:
                    return Refusal(f"{device} is held by two pods")
                owners[device] = other
        return owners

    def _not_to_be_had(self, entry: Entry, coming: Sequence[Device]) -> Refusal | None:
        """What must not be newly placed now, whoever holds it; and slices that nobody would make."""
        name = entry.report.node
        taken = self._offers.view(name, promised=True)[1]
        going = set(self._offers.view(name)[1]) - set(taken)
        for device in coming:
            if self._inventory.homes(device.gpu) != {name}:
                return Refusal(f"{device} is not on {name} alone")
            if device in going:
                return Refusal(f"{device} is being removed")
            made = device in entry.uuids or entry.report.makes_slices is None or self._inventory.slices_are_made(name)
            if device.slice is not None and not made:
                return Refusal(f"{device} does not exist, and {self._inventory.why_no_slices(name)}")
        return None

    # -- annotations ----------------------------------------------------------------------------------

    async def write_all(self) -> None:
        """Write the annotations that do not say yet what the ledger says: called now and then."""
        for uid in list(self.unwritten):
            if self._not_ready():
                return
            await self._write(uid)

    async def _write(self, uid: str) -> None:
        """One try. A bind that is being made writes its own; one of unknown outcome is settled first."""
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                while uid in self.unwritten and not await self._wrote(uid):
                    pass
        except NotFound as error:
            log.info("pod %s has gone: %s", uid, error)
            self.unwritten.pop(uid, None)
        except (KubeError, TimeoutError) as error:
            log.warning("cannot write the new devices of pod %s yet: %s", uid, error)

    async def _wrote(self, uid: str) -> bool:
        """Write it for the version that is known, so that no write comes after a later one; False: that was not it."""
        hold = self._ledger.get(uid)
        if hold is None or self._kube is None or hold.phase is Phase.LEAVING or not hold.devices:
            self.unwritten.pop(uid, None)
            return True
        if self._binding(uid) or hold.phase is not Phase.HELD:
            return True
        entry, pod = self._inventory.get(hold.node), self._truth.pods.get(uid)
        text = write_placement(uid, hold.node, hold.devices, entry.uuids if entry is not None else {})
        version = pod.resource_version if pod is not None else ""
        try:
            await self._kube.annotate_pod(
                hold.pod.namespace,
                hold.pod.name,
                {PLACEMENT_ANNOTATION: text},
                uid=uid,
                resource_version=version,
                timeout=WRITE_SECONDS,
            )
        except Conflict:
            now = self._truth.json_seen(await self._kube.get_pod(hold.pod.namespace, hold.pod.name))
            if now is None or now.ref.uid != uid or now.resource_version == version:
                raise  # whatever the conflict is, it is not the version
            return False
        now_held = self._ledger.get(uid)
        if now_held is None or now_held.devices == hold.devices:
            self.unwritten.pop(uid, None)
        return True

    # -- for the read side ----------------------------------------------------------------------------

    def differing(self, name: str) -> list[Handed]:
        """What containers of this node have although the kubelet counts other devices for them."""
        entry = self._inventory.get(name)
        return [each for each in entry.report.handed if _differs(each)] if entry is not None else []

    def overlaps(self, name: str) -> list[str]:
        """Devices that more than one pod of this node has, or was promised, in words."""
        entry = self._inventory.get(name)
        return list(_overlaps(entry.node, self._ledger.firmly(name))) if entry is not None else []

    def with_overlaps(self) -> list[str]:
        """The nodes where more than one pod had a device when their lists were made last."""
        return sorted(name for name, desk in self._desks.items() if desk.overlaps)

    def differences(self) -> dict[str, float]:
        """How many containers differ from what their kubelet counts, devices overlap, and annotations wait."""
        return {
            "kubelet": float(sum(desk.differing for desk in self._desks.values())),
            "overlapping": float(sum(desk.overlaps for desk in self._desks.values())),
            "unwritten": float(len(self.unwritten)),
        }


def _is_promised(hold: Hold) -> bool:
    """Whether an agent is told of it: the pod has devices, or will have once its bind is made."""
    return hold.phase in (Phase.ASSUMED, Phase.HELD)


def _differs(handed: Handed) -> bool:
    """Whether the kubelet counts other devices for the container than it has."""
    return handed.how == "overridden"


def _of(handed: Mapping[str, Devices], hold: Hold) -> Devices:
    return handed.get(hold.pod.uid) or handed.get(str(hold.pod)) or ()


def _words(devices: Iterable[Device]) -> str:
    return ", ".join(map(str, devices)) or "nothing that was known"


# -- devices, here and on the wire ----------------------------------------------------------------------------


def _profiles_of(report: NodeReport) -> dict[tuple[str, str], str]:
    """NVML's own name by GPU and name as pods ask; every GPU has an entry, with empty names."""
    return {(gpu.uuid, ""): "" for gpu in report.gpus} | {
        (gpu.uuid, profile_as_asked(profile.name)): profile.name
        for gpu in report.gpus
        if gpu.mig is not None
        for profile in gpu.mig.profiles
    }


def _devices_at(devices: Iterable[Device], profiles: Mapping[tuple[str, str], str]) -> Iterator[DeviceAt]:
    """As an agent names them; those on GPUs that are not on its node, or at no place, are nothing to it."""
    for device in devices:
        if (device.gpu, "") not in profiles or (device.slice is not None and device.slice.start > MOST_START):
            continue
        if device.slice is None:
            yield DeviceAt(gpu=device.gpu, milli=device.milli)
        else:
            asked = device.slice.profile
            profile = profiles.get((device.gpu, asked)) or re.sub(r"gb\.", "gb+", asked, count=1)
            yield DeviceAt(gpu=device.gpu, profile=profile, start=device.slice.start)


def _device(at: DeviceAt, demand: Demand | None = None, entry: Entry | None = None) -> Device:
    """As the solver names it. A share is as large as the pod's demand, however the agent has rounded its ids."""
    if at.profile:
        return Device(at.gpu, Slice(profile_as_asked(at.profile), at.start))
    if at.milli and demand is not None and demand.is_shared and entry is not None:
        memory = next((gpu.memory_mib for gpu in entry.node.gpus if gpu.uuid == at.gpu), 0)
        return Device(at.gpu, milli=demand.share_of(memory))
    return Device(at.gpu, milli=at.milli)


def _taken(asked: Exchange, hold: Hold, entry: Entry) -> list[Device]:
    return [_device(each, hold.demand, entry) for each in asked.take]


def _kind(device: Device) -> str:
    """What may be exchanged for what."""
    return device.slice.profile if device.slice is not None else "a share" if device.milli else "a whole GPU"


def _unlike(hold: Hold, give: Sequence[Device], take: Sequence[Device]) -> str:
    """Why the one cannot be had for the other, whatever is free."""
    kinds = {_kind(device) for device in (*give, *take)}
    if len(kinds) > 1:
        return f"only like for like is exchanged, not {' and '.join(sorted(kinds))}"
    if len(give) != len(take) or len(set(take)) < len(take) or len(set(give)) < len(give):
        return f"{len(set(take))} devices for {len(set(give))} are no exchange"
    missing = [device for device in give if device not in hold.devices]
    return f"{hold.pod} does not have {missing[0]}" if missing else ""


def _with(devices: Devices, *, less: Iterable[Device], more: Iterable[Device]) -> Devices:
    gone = set(less)
    return tuple(sorted([*(device for device in devices if device not in gone), *more], key=str))


def _in_return(
    owners: Mapping[Device, Hold], coming: Sequence[Device], returned: Sequence[Device]
) -> Iterator[tuple[Hold, Devices]]:
    """What those have then who were promised something that goes to another: for each of it what that one gives."""
    back = dict(zip(coming, returned, strict=True))
    for loser in {hold.pod.uid: hold for hold in owners.values()}.values():
        lost = [device for device in coming if device in owners and owners[device].pod.uid == loser.pod.uid]
        yield loser, _with(loser.devices, less=lost, more=[back[device] for device in lost])


def _wrong(seen: Node, there: tuple[Allocation, ...], moves: Sequence[tuple[Hold, Devices]]) -> Refusal | None:
    """Why these pods cannot have these devices together, beside those who are there."""
    for hold, devices in moves:
        wanted = allocation_of(hold.demand, devices)
        node = _shut_for(seen, {device.gpu for device in devices if device not in hold.devices})
        refusal = legal(node)(there, wanted)
        if refusal is not None:
            return Refusal(f"for {hold.pod}: {refusal.reason}")
        broken = on_terms(node, there, [(on_any_host(hold.demand), Placement(node.name, devices))])
        if broken:
            return Refusal(f"for {hold.pod}: {broken[0]}")
        there += (wanted,)
    return None


def _shut_for(node: Node, coming: set[str]) -> Node:
    """The node where GPUs that are kept back are so only for those who get something new on them."""
    gpus = tuple(gpu if gpu.uuid in coming or not gpu.withheld else replace(gpu, withheld="") for gpu in node.gpus)
    return replace(node, gpus=gpus)


def _either(entry: Entry) -> tuple[str, ...]:
    """GPUs whose MIG mode changes without a reset, so that it may be another when the kubelet asks."""
    return tuple(gpu.uuid for gpu in entry.report.gpus if gpu.mig is not None and gpu.mig.switches)


def _is_place(mig: Mig | None, at: DeviceAt) -> bool:
    """Whether the board can have such a slice there, or has it."""
    if mig is None:
        return False
    legal_there = any(
        profile.name == at.profile and any(place.start == at.start for place in profile.placements)
        for profile in mig.profiles
    )
    return legal_there or any((each.profile, each.start) == (at.profile, at.start) for each in mig.instances)


def _together(handed: Iterable[Handed]) -> Devices:
    """All that a pod's containers have; shares of one GPU are added up."""
    found: dict[Device, None] = {}
    shares: Counter[str] = Counter()
    for each in handed:
        for at in each.devices:
            if at.milli and not at.profile:
                shares[at.gpu] += at.milli
            else:
                found[_device(at)] = None
    return (*found, *(Device(gpu, milli=min(milli, GPU_MILLI)) for gpu, milli in shares.items()))


def _as_handed(hold: Hold, handed: Devices, entry: Entry) -> Devices:
    """The pod's devices when its containers have these: what it was promised fills up what is not handed yet.

    Empty where its devices are not known and not all have been handed: until then its node is kept back.
    """
    demand = hold.demand
    shares = [device for device in handed if device.milli]
    if len(shares) == 1:
        memory = next(gpu.memory_mib for gpu in entry.node.gpus if gpu.uuid == shares[0].gpu)
        shares = [replace(shares[0], milli=min(GPU_MILLI, demand.share_of(memory) or shares[0].milli))]
    true = [device for device in handed if not device.milli] + shares
    wanted = Counter(dict(demand.slices)) + Counter({"a whole GPU": demand.gpus, "a share": int(demand.is_shared)})
    missing = wanted - Counter(map(_kind, true))
    if missing and hold.unknown:
        return ()
    for device in hold.devices:
        if device not in true and missing[_kind(device)] > 0:
            missing[_kind(device)] -= 1
            true.append(device)
    return tuple(sorted(true, key=str))


def _overlaps(node: Node, holds: Sequence[Hold]) -> Iterator[str]:
    """What more than one pod has of a GPU, in words."""
    on: dict[str, list[tuple[Device, Hold]]] = {}
    for hold in holds:
        for device in hold.devices:
            on.setdefault(device.gpu, []).append((device, hold))
    geometries = {gpu.uuid: gpu.geometry for gpu in node.gpus}
    for gpu, there in on.items():
        if len(there) < 2:
            continue
        pods = ", ".join(dict.fromkeys(str(hold.pod) for _, hold in there))
        slices = [device.slice for device, _ in there if device.slice is not None]
        geometry = geometries.get(gpu)
        if any(device.whole for device, _ in there):
            yield f"{gpu} is one pod's whole, and others have some of it: {pods}"
        elif sum(device.milli for device, _ in there) > GPU_MILLI or (slices and len(slices) < len(there)):
            yield f"{gpu} is shared beyond what it has: {pods}"
        elif len(set(slices)) < len(slices):
            yield f"a slice of {gpu} is given twice: {pods}"
        elif geometry is not None and slices and (wrong := faults(geometry, slices)):
            yield f"{gpu}: {wrong[0]}: {pods}"
