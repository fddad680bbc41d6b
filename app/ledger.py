"""Who holds what.

            propose            assume              confirm             leave
   (free) ──────────▶ PROPOSED ───────▶ ASSUMED ──────────▶ HELD ──────────▶ LEAVING
      ▲                  │ expire/         │ forget           │ release          │ release
      └──────────────────┴─────────────────┴──────────────────┴──────────────────┘

What stands behind it:

* A proposal is soft: it never refuses anybody, it only makes others look elsewhere first.
* ASSUMED: a bind is being made, or was made with an unknown outcome. Nothing but a definite answer ends it.
* ASSUMED and HELD may get other devices (`move`): a kubelet chooses in the end, and what containers have is the truth.
* HELD: seen bound on the API server (or bound by us). Its devices may be unknown (a pod that was there before
  us): then `devices` is empty and whoever offers that node must keep back whatever could be its device.
* LEAVING: the pod is gone from the API server, but its devices have not been seen idle yet.

No method awaits and none reads a clock, so each is atomic and every order of events can be played in a test.
**The law**: ASSUMED, HELD and LEAVING never overlap on a device, unless the API server itself says so: shares of
a GPU never add up to more than all of it, and no share stands beside a slice or a whole GPU.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

from app.translate import PodRef
from solver import Demand, Device, Placement, Refusal
from solver.cluster import Allocation

Legal = Callable[[tuple[Allocation, ...], Allocation], Refusal | None]


class Phase(Enum):
    """Where a hold stands. All but PROPOSED refuse others."""

    PROPOSED = "proposed"
    ASSUMED = "assumed"
    HELD = "held"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Hold:
    """One pod's promise. `since` is when it came into this phase, in seconds of the caller's clock.

    `devices` is empty only for a HELD pod that Tangram did not place, until somebody tells which they are.
    `not_before`, for LEAVING: the earliest moment at which an idle device may be believed to be free.
    """

    pod: PodRef
    node: str
    demand: Demand
    devices: tuple[Device, ...]
    phase: Phase
    since: float
    prices: tuple[tuple[str, int], ...] = ()
    not_before: float = 0.0

    @property
    def firm(self) -> bool:
        """Whether it refuses others."""
        return self.phase is not Phase.PROPOSED

    @property
    def allocation(self) -> Allocation:
        """What it takes from its node: of a pod that is gone only the devices are still taken."""
        if self.phase is Phase.LEAVING:
            return Allocation(self.devices, guest=self.demand.terms.guest)
        return allocation_of(self.demand, self.devices)

    @property
    def unknown(self) -> bool:
        """Whether it holds devices that nobody can name yet."""
        return self.firm and not self.devices and self.demand.takes_devices


def _nobody() -> None:
    """Who is told of changes until somebody wants to be."""


class Ledger:
    """Every hold, by pod UID and by node. `drain_changes` names the nodes whose holds changed since last asked."""

    def __init__(self) -> None:
        self._holds: dict[str, Hold] = {}
        self._by_node: dict[str, dict[str, Hold]] = {}
        self._soft: dict[str, set[str]] = {}
        self._leaving: set[str] = set()
        self._assumed: set[str] = set()
        self._confirmed: set[str] = set()
        self._by_gpu: dict[str, set[str]] = {}
        self.when_changed: Callable[[], None] = _nobody
        """Called after each change of firm holds, by whoever makes it: only to note that there was one."""
        self._changed: set[str] = set()
        self._changed_gpus: set[str] = set()

    def __len__(self) -> int:
        return len(self._holds)

    def __iter__(self) -> Iterator[Hold]:
        return iter(list(self._holds.values()))

    def get(self, uid: str) -> Hold | None:
        """What this pod holds, if anything."""
        return self._holds.get(uid)

    def nodes(self) -> Iterable[str]:
        """Where anything is held or promised."""
        return self._by_node.keys()

    def on(self, node: str) -> tuple[Hold, ...]:
        """Every hold on a node, oldest first."""
        return tuple(self._by_node.get(node, {}).values())

    def firmly(self, node: str, *, but: Iterable[str] = ()) -> tuple[Hold, ...]:
        """The holds on a node that refuse others, leaving out the pods in `but`."""
        without = set(but)
        return tuple([hold for uid, hold in self._by_node.get(node, {}).items() if hold.firm and uid not in without])

    def taken(self, node: str, *, but: Iterable[str] = ()) -> tuple[Allocation, ...]:
        """What on a node refuses others, leaving out the pods in `but`."""
        return tuple([hold.allocation for hold in self.firmly(node, but=but)])

    def proposed(self, node: str, *, but: str = "") -> tuple[Allocation, ...]:
        """What on a node is softly promised to pods other than `but`."""
        holds = self._by_node.get(node, {})
        return tuple([hold.allocation for uid, hold in holds.items() if not hold.firm and uid != but])

    def nodes_with_proposals(self) -> frozenset[str]:
        """Where something is softly promised."""
        return frozenset(self._soft)

    def elsewhere(self, gpu: str, *, node: str) -> Hold | None:
        """A firm hold on this GPU (UUID) under another node's name: nodes are renamed, boards are moved."""
        for uid in self._by_gpu.get(gpu, ()):
            if self._holds[uid].node != node:
                return self._holds[uid]
        return None

    def counts(self) -> dict[Phase, int]:
        """How many pods stand in which phase."""
        proposed = sum(map(len, self._soft.values()))
        assumed, leaving = len(self._assumed), len(self._leaving)
        held = len(self._holds) - proposed - assumed - leaving
        return {Phase.PROPOSED: proposed, Phase.ASSUMED: assumed, Phase.HELD: held, Phase.LEAVING: leaving}

    def leaving(self) -> tuple[Hold, ...]:
        """Pods that are gone, with devices that have not been seen idle."""
        return tuple(self._holds[uid] for uid in self._leaving)

    @property
    def has_leaving(self) -> bool:
        """Whether there are any."""
        return bool(self._leaving)

    def assumed(self) -> tuple[Hold, ...]:
        """Pods with a bind under way or of unknown outcome."""
        return tuple(self._holds[uid] for uid in self._assumed)

    def under_way(self) -> tuple[str, ...]:
        """UIDs of pods that are being bound, or have been without having been seen so on the API server."""
        return (*self._assumed, *self._confirmed)

    def seen_bound(self, uid: str) -> None:
        """The API server says so."""
        self._confirmed.discard(uid)

    def drain_changes(self) -> set[str]:
        """Nodes whose firm holds changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed

    def drain_changed_gpus(self) -> set[str]:
        """The GPUs (UUIDs) of those holds: some other node may report them."""
        changed, self._changed_gpus = self._changed_gpus, set()
        return changed

    # -- the transitions ------------------------------------------------------------------------------

    def propose(self, pod: PodRef, demand: Demand, placement: Placement, *, now: float) -> None:
        """Promise softly; replaces this pod's earlier proposal, never an assumed or held placement."""
        current = self._holds.get(pod.uid)
        if current is not None and current.firm:
            return
        self._put(Hold(pod, placement.node, demand, placement.devices, Phase.PROPOSED, now, placement.prices))

    def assume(self, pod: PodRef, demand: Demand, placement: Placement, *, now: float, legal: Legal) -> Refusal | None:
        """Take the devices for a bind, or say why not.

        `legal(taken, wanted)` checks it against what others firmly hold on that node: the same check that
        `verify` makes, independent of how the placement was found.
        """
        current = self._holds.get(pod.uid)
        if current is not None and current.firm:
            return Refusal(f"{pod} already has {_names(current)} on {current.node}", resolvable=False)
        refusal = legal(self.taken(placement.node), allocation_of(demand, placement.devices))
        if refusal is None:
            self._put(Hold(pod, placement.node, demand, placement.devices, Phase.ASSUMED, now, placement.prices))
        return refusal

    def restore(self, hold: Hold) -> None:
        """Enter what the API server says (after a restart, or a pod that others have bound), conflicts and all.

        The API server is the truth: if it gives one device to two pods, both are entered, and the device is
        free only when both are gone.
        """
        self._put(hold)

    def confirm(self, uid: str, *, now: float) -> None:
        """The Binding is known to have been made."""
        hold = self._holds.get(uid)
        if hold is not None and hold.phase is Phase.ASSUMED:
            self._put(replace(hold, phase=Phase.HELD, since=now))
            self._confirmed.add(uid)

    def explain(self, uid: str, devices: tuple[Device, ...]) -> None:
        """Somebody saw which devices a pod of unknown devices uses."""
        hold = self._holds.get(uid)
        if hold is not None and hold.unknown:
            self._put(replace(hold, devices=tuple(sorted(devices, key=str))))

    def move(self, uid: str, devices: tuple[Device, ...]) -> None:
        """A pod has these devices instead: its containers do, or an exchange was checked for all who take part."""
        hold = self._holds.get(uid)
        if hold is not None and hold.firm:
            self._put(replace(hold, devices=devices))

    def forget(self, uid: str) -> None:
        """The bind was definitely not made: the devices are free again."""
        hold = self._holds.get(uid)
        if hold is not None and hold.phase in (Phase.PROPOSED, Phase.ASSUMED):
            self._drop(hold)

    def leave(self, uid: str, *, now: float, not_before: float) -> None:
        """The pod is gone from the API server; its devices stay taken until they have been seen idle."""
        hold = self._holds.get(uid)
        if hold is not None and hold.firm and hold.phase is not Phase.LEAVING:
            self._put(replace(hold, phase=Phase.LEAVING, since=now, not_before=not_before))

    def release(self, uid: str) -> None:
        """The pod has finished, or its devices were seen idle after it had gone."""
        hold = self._holds.get(uid)
        if hold is not None:
            self._drop(hold)

    def expire(self, *, before: float) -> list[Hold]:
        """End the proposals made before that time."""
        proposals = [self._holds[uid] for uids in self._soft.values() for uid in uids]
        lapsed = [hold for hold in proposals if hold.since < before]
        for hold in lapsed:
            self._drop(hold)
        return lapsed

    # -- bookkeeping ----------------------------------------------------------------------------------

    def _put(self, hold: Hold) -> None:
        before = self._holds.get(hold.pod.uid)
        if before is not None and before.node != hold.node:
            self._drop(before)
            before = None
        self._holds[hold.pod.uid] = hold
        self._by_node.setdefault(hold.node, {})[hold.pod.uid] = hold
        self._unindex(before or hold)
        if hold.firm:
            for device in hold.devices:
                self._by_gpu.setdefault(device.gpu, set()).add(hold.pod.uid)
        if hold.phase is Phase.LEAVING:
            self._leaving.add(hold.pod.uid)
        elif hold.phase is Phase.ASSUMED:
            self._assumed.add(hold.pod.uid)
        elif hold.phase is Phase.PROPOSED:
            self._soft.setdefault(hold.node, set()).add(hold.pod.uid)
        for each in (hold, before):
            if each is not None and each.firm:
                self._note_change(each)

    def _drop(self, hold: Hold) -> None:
        del self._holds[hold.pod.uid]
        self._confirmed.discard(hold.pod.uid)
        self._unindex(hold)
        of_node = self._by_node[hold.node]
        del of_node[hold.pod.uid]
        if not of_node:
            del self._by_node[hold.node]
        if hold.firm:
            self._note_change(hold)

    def _note_change(self, hold: Hold) -> None:
        self._changed.add(hold.node)
        self._changed_gpus.update([device.gpu for device in hold.devices])
        self.when_changed()

    def _unindex(self, hold: Hold) -> None:
        self._leaving.discard(hold.pod.uid)
        self._assumed.discard(hold.pod.uid)
        for device in hold.devices:
            users = self._by_gpu.get(device.gpu, set())
            users.discard(hold.pod.uid)
            if not users:
                self._by_gpu.pop(device.gpu, None)
        soft = self._soft.get(hold.node, set())
        soft.discard(hold.pod.uid)
        if not soft:
            self._soft.pop(hold.node, None)


def allocation_of(demand: Demand, devices: tuple[Device, ...]) -> Allocation:
    """What a pod with this demand takes from its node with these devices."""
    return Allocation(devices, demand.cpu_milli, demand.memory_mib, demand.terms.guest)


def _names(hold: Hold) -> str:
    return ", ".join(str(device) for device in hold.devices) or "devices that are not known yet"
