"""What each node's agent shall change: MIG slices to make and to remove, MIG modes to switch. Decision 0007.

An agent's held request is answered here for both of its lists: this one, and `handing`'s placements.

    ledger + report ──refresh()──▶ OrderList (its version grows when it changes)
                                     │  listen(): the agent's held request
                                     ▼
    bind ── made() waits ◀── report with OrdersDone ◀── agent carries the list out

A list is what is to be different now, computed by comparing; nothing here must survive a restart. While it is not
certain that an agent will no longer act on an older list, the GPUs concerned are kept back (`Offers.keep_back`).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from app.inventory import Entry, Inventory
from app.ledger import Ledger, Phase
from app.offers import Offers
from app.report import (
    Failed,
    Gpu,
    Listening,
    Make,
    NodeReport,
    OrderList,
    OrdersReply,
    Placements,
    SliceAt,
    Switch,
    Unchanged,
)
from app.translate import profile_as_asked
from solver import Device, Geometry, Placement, Refusal, Slice
from solver.cluster import devices_of
from solver.geometry import faults, in_the_way

log = logging.getLogger(__name__)

HELD_PART = 3  # a request is held for this part of `stale_seconds` at most: it is also the agent's sign of life

NEVER = float("inf")

Facts = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Trouble:
    """An order for a GPU failed: in whose words, what the GPU was like then, and when to try again all the same."""

    reason: str
    facts: Facts
    until: float


@dataclass(slots=True)
class Desk:
    """One node's list, and what is not certain about it.

    `doubts`: GPUs with withdrawn orders, `going`: idle slices that are to be removed, `giving_way`: others that an
    order for a slice removes; all until a list of at least that version is acknowledged, the last that has them.
    `idle_since`: when each slice was first seen idle.
    """

    orders: OrderList
    news: asyncio.Event = field(default_factory=asyncio.Event)
    doubts: dict[str, int] = field(default_factory=dict)
    going: dict[Device, int] = field(default_factory=dict)
    giving_way: dict[Device, int] = field(default_factory=dict)
    idle_since: dict[Device, float] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    failures: dict[Device, tuple[int, str]] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)
    sent_at: float = 0.0
    due: float = NEVER
    """When time alone changes something: a slice has been idle for too long, a failure is to be tried again."""

    @property
    def is_clear(self) -> bool:
        """Whether nothing is wanted and nothing uncertain."""
        orders = self.orders
        wanted = orders.make or orders.remove or orders.switch or self.switches
        uncertain = self.doubts or self.going or self.giving_way
        return not (wanted or uncertain or self.troubles or self.idle_since)


class Orders:
    """The lists of all nodes. `ready` says whether the ledger is the whole truth: before, nothing is ordered."""

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        offers: Offers,
        *,
        service: str,
        ready: Callable[[], bool],
        beat: Callable[[Unchanged], bool],
        placements: Callable[[str], Placements | None],
        waited: Callable[[bool, float], None],
        clock: Callable[[], float],
        slice_seconds: float,
        idle_seconds: float,
        retry_seconds: float,
        stale_seconds: float,
    ) -> None:
        self._ledger = ledger
        self._inventory = inventory
        self._offers = offers
        self._service = service
        self._ready = ready
        self._beat = beat
        self._placements = placements
        self._waited = waited
        self._clock = clock
        self._slice_seconds = slice_seconds
        self._idle_seconds = idle_seconds
        self._retry_seconds = retry_seconds
        self._longest_hold = stale_seconds / HELD_PART
        self._desks: dict[str, Desk] = {}
        self._last_version = 0
        """Of all nodes: one that is forgotten and comes back must not take old acknowledgements for new ones."""
        self.failed_count = 0

    # -- agents ---------------------------------------------------------------------------------------

    async def listen(self, said: Listening) -> OrdersReply:
        """Answer as soon as there is a list that the agent does not have, or a report to ask for; else at the end."""
        latest = self._clock() + min(said.wait_seconds, self._longest_hold)
        about = Unchanged(node=said.node, boot=said.boot, version=said.version)
        if not self._beat(about):
            return OrdersReply(resend=True, service=self._service)
        while True:
            desk = self._desks.get(said.node)
            reply = self._news(desk, said) if self._ready() else None
            if reply is not None:
                return reply
            left = latest - self._clock()
            if left <= 0:
                return OrdersReply(service=self._service)
            desk = desk or self._desk(said.node)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(desk.news.wait(), left)

    def _news(self, desk: Desk | None, said: Listening) -> OrdersReply | None:
        """The lists that the agent does not have; None where there is none."""
        orders = desk.orders if desk is not None and self._is_news(desk.orders, said, said.orders) else None
        placements = self._placements(said.node)
        if placements is not None and not self._is_news(placements, said, said.placements):
            placements = None
        if orders is not None and desk is not None:
            desk.sent_at = self._clock()
            desk.due = self._next_due(desk)
        if orders is None and placements is None:
            return None
        return OrdersReply(service=self._service, orders=orders, placements=placements)

    def _is_news(self, listed: OrderList | Placements, said: Listening, has: int) -> bool:
        return listed.version > 0 and (said.service, has) != (self._service, listed.version)

    def wake(self, name: str) -> None:
        """There is other news for this node's agent."""
        desk = self._desks.get(name)
        if desk is not None:
            self._wake(desk)

    def reported(self, report: NodeReport) -> None:
        """A full report has been taken: what it acknowledges is certain, what failed in it is kept back."""
        desk = self._desks.get(report.node)
        if desk is None:
            return
        done = report.orders
        if done is not None and done.service == self._service:
            desk.doubts = _newer(desk.doubts, done.version)
            desk.going = _newer(desk.going, done.version)
            desk.giving_way = _newer(desk.giving_way, done.version)
            if done.version == desk.orders.version:
                self._note_failures(desk, report, done.failed)
        self._wake(desk)

    def _note_failures(self, desk: Desk, report: NodeReport, failed: Iterable[Failed]) -> None:
        gpus = {gpu.uuid: gpu for gpu in report.gpus}
        version = desk.orders.version
        for each in failed:
            gpu = gpus.get(each.gpu)
            if gpu is None:
                continue
            if each.profile:
                device = Device(each.gpu, Slice(profile_as_asked(each.profile), each.start))
                desk.failures[device] = version, each.reason
                desk.idle_since.pop(device, None)
                what = f"{each.profile} at {each.start} could not be made or removed"
            else:
                desk.switches.pop(each.gpu, None)
                what = "its MIG mode could not be switched"
            self.failed_count += 1
            reason = f"{what}: {each.reason}"
            desk.troubles[each.gpu] = Trouble(reason, _facts(gpu), self._clock() + self._retry_seconds)
            log.warning("node %s, GPU %s: %s", report.node, each.gpu, reason)

    def forget(self, name: str) -> None:
        """The node is no more."""
        desk = self._desks.pop(name, None)
        if desk is not None:
            self._wake(desk)

    # -- binds ----------------------------------------------------------------------------------------

    async def made(self, uid: str, placement: Placement) -> Mapping[Device, str] | Refusal:
        """Wait until the node's report shows the slices promised to this pod; their UUIDs, or why there are none.

        Nothing is waited for where slices are on paper only (nobody says who makes them).
        """
        if all(device.slice is None for device in placement.devices):
            return {}
        began = self._clock()
        result = await self._made(uid, placement, began)
        if self._inventory.slices_are_made(placement.node):
            self._waited(not isinstance(result, Refusal), self._clock() - began)
        return result

    async def _made(self, uid: str, placement: Placement, began: float) -> Mapping[Device, str] | Refusal:
        name = placement.node
        self.refresh([name])
        first_version = self._desks[name].orders.version if name in self._desks else 0
        while True:
            entry = self._inventory.get(name)
            if entry is None:
                return Refusal(f"{name} is not in the inventory any more")
            missing = [device for device in placement.devices if device.slice and device not in entry.uuids]
            if not missing or entry.report.makes_slices is None:
                return {device: entry.uuids[device] for device in placement.devices if device in entry.uuids}
            if not self._inventory.slices_are_made(name):
                return Refusal(f"{missing[0]} does not exist, and {self._inventory.why_no_slices(name)}")
            hold = self._ledger.get(uid)
            if hold is None or not hold.firm or hold.devices != placement.devices:
                return Refusal("the pod has gone, or its promise has ended, while its slices were being made")
            desk = self._desk(name)
            for device in missing:
                version, reason = desk.failures.get(device, (-1, ""))
                if version >= first_version:
                    return Refusal(f"{device} could not be made: {reason}")
            left = began + self._slice_seconds - self._clock()
            if left <= 0:
                return Refusal(f"{missing[0]} was not made within {self._slice_seconds:g} s by the agent of {name}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(desk.news.wait(), left)

    # -- lists ----------------------------------------------------------------------------------------

    def refresh(self, names: Iterable[str]) -> None:
        """Make the lists of these nodes anew."""
        if not self._ready():
            return
        for name in names:
            entry = self._inventory.get(name)
            if entry is not None and (name in self._desks or self._inventory.slices_are_made(name)):
                desk = self._desk(name)
                if desk.is_clear and all(gpu.geometry is None for gpu in entry.node.gpus):
                    continue  # nothing of MIG is there: most nodes
                self._refresh(name, entry, desk)

    def sweep(self) -> None:
        """Look again where time has brought something."""
        self.refresh(self.due())

    def due(self) -> list[str]:
        """The nodes where it has: slices have been idle for too long, what has failed is to be tried again."""
        now = self._clock()
        return [name for name, desk in self._desks.items() if desk.due <= now]

    def switch(self, name: str, gpu: str, *, enabled: bool) -> None:
        """Have the MIG mode of this GPU switched; it is kept back until its report shows it."""
        self._desk(name).switches[gpu] = enabled
        self.refresh([name])

    def clear(self, name: str, gpu: str) -> None:
        """Have the idle slices of this GPU removed now."""
        desk = self._desk(name)
        for device in [each for each in desk.idle_since if each.gpu == gpu]:
            desk.idle_since[device] = float("-inf")
        self.refresh([name])

    def is_switching(self, name: str) -> bool:
        """Whether the MIG mode of some GPU of the node is being switched."""
        desk = self._desks.get(name)
        return desk is not None and bool(desk.switches)

    def troubled(self, name: str, gpu: str) -> bool:
        """Whether an order for this GPU has failed lately."""
        desk = self._desks.get(name)
        return desk is not None and gpu in desk.troubles

    def _refresh(self, name: str, entry: Entry, desk: Desk) -> None:
        now = self._clock()
        self._mend(entry, desk, now)
        makes: list[Make] = []
        removes: list[Device] = []
        giving_way: list[Device] = []
        if self._inventory.slices_are_made(name) and not entry.report.error:
            claimed, taken = self._offers.claims(name)
            wanted, owners = _by_gpu(devices_of(taken)), self._owners(name)
            idle = _idle(entry, wanted, claimed)
            for gpu in entry.report.gpus:
                if gpu.uuid in owners:
                    makes += self._makes(entry, gpu, wanted[gpu.uuid], owners[gpu.uuid], idle.get(gpu.uuid, []))
            giving_way += _able_to_stay(entry, makes, wanted)
            self._note_withdrawn(entry, desk, makes)
            since = desk.idle_since
            there = [Device(gpu, each) for gpu, slices in idle.items() for each in slices]
            desk.idle_since = {device: since.get(device, now) for device in there}
            removes += self._removes(desk, now)
            removes += [each for each in desk.going if each.gpu in idle and each.slice not in wanted.get(each.gpu, ())]
        else:
            self._note_withdrawn(entry, desk, makes)
        self._put(entry, desk, makes, removes, now)
        desk.giving_way |= dict.fromkeys(giving_way, desk.orders.version)
        desk.due = self._next_due(desk)
        self._offers.keep_back(name, self._kept_back(desk), frozenset({*desk.going, *desk.giving_way}))

    def _next_due(self, desk: Desk) -> float:
        times = [trouble.until for trouble in desk.troubles.values()]
        if desk.idle_since and self._idle_seconds:
            fresh = [since for device, since in desk.idle_since.items() if device not in desk.going]
            times += [min(fresh) + self._idle_seconds] if fresh else []
        if desk.sent_at and (desk.orders.make or desk.orders.remove or desk.orders.switch):
            times.append(desk.sent_at + self._retry_seconds)
        return min(times, default=NEVER)

    def _mend(self, entry: Entry, desk: Desk, now: float) -> None:
        """Forget troubles that are over, modes that are as wanted, and all plans where others cut the boards now."""
        if not self._inventory.slices_are_made(entry.report.node):
            desk.switches.clear()
            desk.idle_since.clear()
        gpus = {gpu.uuid: gpu for gpu in entry.report.gpus}
        for uuid, trouble in list(desk.troubles.items()):
            gpu = gpus.get(uuid)
            if gpu is None or _facts(gpu) != trouble.facts or now >= trouble.until:
                del desk.troubles[uuid]
        for uuid, enabled in list(desk.switches.items()):
            gpu = gpus.get(uuid)
            if (
                gpu is None
                or gpu.mig is None
                or (gpu.mig.enabled, gpu.mig.pending) in ((enabled, enabled), (enabled, None))
            ):
                del desk.switches[uuid]

    def _owners(self, name: str) -> dict[str, dict[Slice, str]]:
        """By GPU: the slices of pods that shall have them, with the pods' UIDs."""
        owners: dict[str, dict[Slice, str]] = {}
        for hold in self._ledger.firmly(name):
            for device in hold.devices if hold.phase in (Phase.ASSUMED, Phase.HELD) else ():
                if device.slice is not None:
                    owners.setdefault(device.gpu, {})[device.slice] = hold.pod.uid
        return owners

    def _makes(
        self, entry: Entry, gpu: Gpu, wanted: set[Slice], owners: Mapping[Slice, str], idle: Iterable[Slice]
    ) -> Iterator[Make]:
        """The held slices of this GPU that do not exist, and what is in their way."""
        missing = [each for each in sorted(owners) if Device(gpu.uuid, each) not in entry.uuids]
        geometry = _geometry(entry, gpu) if missing else None
        if geometry is None or gpu.mig is None or gpu.health == "bad" or faults(geometry, wanted):
            return
        names = {profile_as_asked(profile.name): profile.name for profile in gpu.mig.profiles}
        way = in_the_way(geometry, wanted, idle)
        for number, each in enumerate(missing):
            yield Make(
                gpu=gpu.uuid,
                profile=names[each.profile],
                start=each.start,
                group=owners[each],
                remove=tuple(_at(gpu, names, piece) for piece in way) if number == 0 else (),
            )

    def _removes(self, desk: Desk, now: float) -> Iterator[Device]:
        """The slices that have been idle for too long."""
        for device, since in desk.idle_since.items():
            too_long = now >= since + self._idle_seconds if self._idle_seconds else since == float("-inf")
            if too_long and device.gpu not in desk.troubles:
                yield device

    def _note_withdrawn(self, entry: Entry, desk: Desk, makes: Iterable[Make]) -> None:
        """What is no longer to be made, and is not there, may be made all the same until the agent has a newer list."""
        still = {_device(make) for make in makes}
        for make in desk.orders.make:
            device = _device(make)
            if device not in still and device not in entry.uuids:
                desk.doubts[make.gpu] = self._last_version + 1
                desk.going[device] = self._last_version + 1
                desk.failures.pop(device, None)
        as_wanted = {gpu.uuid: gpu.mig.enabled for gpu in entry.report.gpus if gpu.mig is not None}
        for switch in desk.orders.switch:
            if switch.gpu not in desk.switches and as_wanted.get(switch.gpu) != switch.enabled:
                desk.doubts[switch.gpu] = self._last_version + 1

    def _put(self, entry: Entry, desk: Desk, makes: list[Make], removes: list[Device], now: float) -> None:
        """Replace the list where it is another, or where what is wanted for long has not come."""
        before = desk.orders
        remove = tuple(_places(entry, sorted(set(removes)))) if removes else ()
        switch = tuple(Switch(gpu=gpu, enabled=enabled) for gpu, enabled in sorted(desk.switches.items()))
        make = tuple(makes)
        wanted = bool(make or remove or switch)
        again = wanted and desk.sent_at and now >= desk.sent_at + self._retry_seconds
        if (make, remove, switch) != (before.make, before.remove, before.switch) or again:
            self._last_version += 1
            desk.orders = OrderList(
                service=self._service, version=self._last_version, make=make, remove=remove, switch=switch
            )
            desk.sent_at = 0.0
            wanted_still = {_device(each) for each in make}
            desk.failures = {device: failure for device, failure in desk.failures.items() if device in wanted_still}
            self._wake(desk)
        version = desk.orders.version
        desk.going |= dict.fromkeys(removes, version)

    @staticmethod
    def _kept_back(desk: Desk) -> dict[str, str]:
        kept = dict.fromkeys(desk.doubts, "its agent has not yet confirmed that an order for a MIG slice was withdrawn")
        kept |= {gpu: trouble.reason for gpu, trouble in desk.troubles.items()}
        return kept | dict.fromkeys(desk.switches, "its MIG mode is being switched")

    def _desk(self, name: str) -> Desk:
        if name not in self._desks:
            self._desks[name] = Desk(OrderList(service=self._service, version=0))
        return self._desks[name]

    @staticmethod
    def _wake(desk: Desk) -> None:
        """Everybody who waits for news of this node looks again."""
        desk.news.set()
        desk.news = asyncio.Event()

    # -- for the read side ----------------------------------------------------------------------------

    def list_of(self, name: str) -> OrderList | None:
        """What this node's agent is told now; None where it has never been told anything."""
        desk = self._desks.get(name)
        return desk.orders if desk is not None and desk.orders.version else None

    def counts(self) -> dict[str, float]:
        """How many slices are to be made and removed, and how many GPUs switched, on all nodes."""
        lists = [desk.orders for desk in self._desks.values()]
        return {
            "make": float(sum(len(each.make) for each in lists)),
            "remove": float(sum(len(each.remove) for each in lists)),
            "switch": float(sum(len(each.switch) for each in lists)),
        }


def _places(entry: Entry, devices: Iterable[Device]) -> Iterator[SliceAt]:
    """Devices as an agent names them: by NVML's own profile names."""
    names = {
        (gpu.uuid, profile_as_asked(profile.name)): profile.name
        for gpu in entry.report.gpus
        if gpu.mig is not None
        for profile in gpu.mig.profiles
    }
    for device in devices:
        if device.slice is not None and (device.gpu, device.slice.profile) in names:
            profile = names[device.gpu, device.slice.profile]
            yield SliceAt(gpu=device.gpu, profile=profile, start=device.slice.start)


def _by_gpu(devices: Iterable[Device]) -> dict[str, set[Slice]]:
    found: dict[str, set[Slice]] = {}
    for device in devices:
        if device.slice is not None:
            found.setdefault(device.gpu, set()).add(device.slice)
    return found


def _geometry(entry: Entry, gpu: Gpu) -> Geometry | None:
    return next((each.geometry for each in entry.node.gpus if each.uuid == gpu.uuid), None)


def _idle(entry: Entry, wanted: Mapping[str, set[Slice]], claimed: frozenset[str]) -> dict[str, list[Slice]]:
    """By GPU in MIG mode: the instances, with a MIG device or without, that nobody holds. Not where any could be
    somebody's: a pod that we did not place, or one that was placed here under another node's name."""
    enabled = {gpu.uuid for gpu in entry.report.gpus if gpu.mig is not None and gpu.mig.enabled}
    return {
        gpu.uuid: [each for each in gpu.instances if each not in wanted.get(gpu.uuid, ())]
        for gpu in entry.node.gpus
        if gpu.uuid in enabled - claimed
    }


def _able_to_stay(entry: Entry, makes: Iterable[Make], wanted: Mapping[str, set[Slice]]) -> Iterator[Device]:
    """The idle slices that are removed for others although each could still be handed out: what runs out is no place
    but an engine, say."""
    geometries = {gpu.uuid: gpu.geometry for gpu in entry.node.gpus}
    for device in [_device(piece) for make in makes for piece in make.remove]:
        geometry = geometries.get(device.gpu)
        if geometry and device.slice and not faults(geometry, {*wanted[device.gpu], device.slice}):
            yield device


Named = TypeVar("Named")


def _newer(marks: Mapping[Named, int], version: int) -> dict[Named, int]:
    """What a list of this version, acknowledged, leaves uncertain."""
    return {each: needed for each, needed in marks.items() if needed > version}


def _at(gpu: Gpu, names: Mapping[str, str], piece: Slice) -> SliceAt:
    return SliceAt(gpu=gpu.uuid, profile=names[piece.profile], start=piece.start)


def _device(at: SliceAt) -> Device:
    return Device(at.gpu, Slice(profile_as_asked(at.profile), at.start))


def _facts(gpu: Gpu) -> Facts:
    """What must have changed before a GPU whose order failed is offered again."""
    if gpu.mig is None:
        return (gpu.health,)
    instances = tuple(
        (each.profile, each.start, each.uuid, each.pods, *(process.pid for process in each.processes))
        for each in gpu.mig.instances
    )
    return gpu.health, gpu.mig.enabled, gpu.mig.pending, instances
