"""What the API server last said about pods and nodes, and what follows from it for the ledger.

Fed by `watch` (events and lists) and by `bind` (single reads). No I/O here; what must be *done* because of it
(remove an annotation, touch a node) is left in `Chores` for whoever may do I/O.
"""

import logging
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from app.hosts import NONE, Amount, Hosts
from app.inventory import Entry, Inventory
from app.ledger import Hold, Ledger, Phase
from app.refusals import Refusals
from app.translate import DEFAULT_GRACE_SECONDS, Json, Malformed, Pod, PodRef, Written, pod_of
from solver import Demand, Device
from solver.cluster import GPU_MILLI

RECENTLY_GONE = 10_000  # UIDs; kube-scheduler may ask for a pod until its own watch has seen the deletion
KINDS_KEPT = 100  # kinds of refused demands; each has a list of the nodes it was refused on
ARRIVALS_KEPT = 4096  # then each count is halved: the mix of pods is that of the last thousands
log = logging.getLogger(__name__)

FRESH_REFUSAL_SECONDS = 3.0  # a refusal this recent may have raced with the event that made room


Kind = tuple[Demand | Malformed, int, str]
"""What pods ask for, their priority, and their scheduler's name."""


@dataclass(slots=True)
class Waiting:
    """A pod that was refused everywhere we were asked, with the last reason."""

    pod: Pod
    reason: str
    since: float
    refused: float


@dataclass(slots=True)
class Chores:
    """Work for somebody who may do I/O.

    `room`: nodes where room was made that no pod-delete event announces. `settle`: unbound pods that carry a
    placement which we did not write. `refused`: pods that their kubelet refused, with its words.
    """

    room: set[str] = field(default_factory=set)
    settle: dict[str, PodRef] = field(default_factory=dict)
    refused: dict[PodRef, str] = field(default_factory=dict)


class Truth:
    """The pods that concern us, the nodes that exist, and the pods that wait."""

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        hosts: Hosts,
        refusals: Refusals,
        *,
        clock: Callable[[], float],
        most_waiting: int = 20_000,
    ) -> None:
        self._ledger = ledger
        self._inventory = inventory
        self._hosts = hosts
        self._refusals = refusals
        self._clock = clock
        self._most_waiting = most_waiting
        self.pods: dict[str, Pod] = {}
        self.nodes: set[str] = set()
        self.waiting: dict[str, Waiting] = {}
        self.pending: dict[str, Pod] = {}
        """Pods that wait for devices, whether we were asked about them or not; a bind may be under way."""
        self.kinds: Counter[Kind] = Counter()
        """How many of them there are of each kind."""
        self.pending_changes = 0
        """How often `pending` has changed."""
        self.arrivals: Counter[Demand] = Counter()
        """What pods have asked for lately."""
        self.refused_on: dict[Demand, Sequence[str]] = {}
        """The nodes that were last asked about for a kind of demand that none of them could serve, latest last."""
        self.askers: set[str] = set()
        """Names of the schedulers that have asked us about pods."""
        self.unexplained: dict[str, str] = {}
        """UIDs of pods whose placement annotation we cannot explain, with what is wrong with it."""
        self._told: set[str] = set()
        """UIDs of pods whose devices are known better than from their annotation: it is old, or they have none."""
        self._reported: set[str] = set()
        self._ending: dict[str, float] = {}
        """When pods that are being deleted were first seen so: the kubelet ends them a grace time later at most."""
        self._gone: dict[str, None] = {}
        """The latest pods that are gone, oldest first: one that is refused once more does not wait."""
        self.rebuilt = False
        """Whether one list of all pods has been applied: from then on we know every placement that we wrote."""
        self.chores = Chores()

    # -- pods -----------------------------------------------------------------------------------------

    def pod_seen(self, pod: Pod) -> None:
        """A pod was listed, added, changed or read. What is older than what we know, or gone, is passed over."""
        uid = pod.ref.uid
        known = self.pods.get(uid)
        if uid in self._gone or (known is not None and _is_older(pod, known)):
            return
        node = "" if pod.finished else pod.node
        self._hosts.pod_requests(uid, node, Amount(pod.need.cpu_milli, pod.need.memory_mib))
        if not pod.concerns_us and known is None:
            return
        self.pods[uid] = pod
        self._note_pending(uid, pod)
        if pod.terminating:
            self._ending.setdefault(uid, self._clock())
        if pod.node:
            self.waiting.pop(uid, None)
        self._note_kubelet(pod, known)
        if pod.finished:
            self._release(uid)
        elif pod.node:
            self._bound(pod)
        else:
            self._unbound(pod)

    def _note_kubelet(self, pod: Pod, known: Pod | None) -> None:
        """What its kubelet has just decided about it. Of what it decided before our time nothing follows, and of a
        refusal only where we have placed the pod: others put pods where there is no room for them, again and again."""
        hold = self._ledger.get(pod.ref.uid)
        if hold is None or not hold.firm or hold.node != pod.node:
            return
        if pod.refused and isinstance(pod.written, Written):
            log.warning("the kubelet of %s refused %s: %s", pod.node, pod.ref, pod.refused)
            self._refusals.refused(hold.demand, pod.node, pod.refused)
            self.chores.refused[pod.ref] = pod.refused
        elif pod.admitted and known is not None and not known.admitted:
            self._refusals.accepted(hold.demand, pod.node)

    def devices_told(self, uid: str) -> None:
        """Which devices this pod has is known from its node, or was changed just now: its annotation says no better."""
        self._told.add(uid)
        self.unexplained.pop(uid, None)

    def known(self, item: Json) -> Pod | None:
        """The pod as the watch has read it, where that was this very version of it."""
        meta = item.get("metadata")
        if not isinstance(meta, dict):
            return None
        pod = self.pods.get(str(meta.get("uid")))
        if pod is None or not pod.resource_version or pod.resource_version != meta.get("resourceVersion"):
            return None
        return pod if (pod.ref.namespace, pod.ref.name) == (meta.get("namespace"), meta.get("name")) else None

    def asked_about(self, pod: Pod) -> None:
        """A kube-scheduler has asked us about this pod, so it asks us about all that chose it."""
        if pod.scheduler not in self.askers:
            self.askers.add(pod.scheduler)
            self.pending_changes += 1

    def is_asked_about(self, pod: Pod) -> bool:
        """Whether the pod is one that we are asked about; until anybody has asked, all are."""
        return self.asks_us(pod.scheduler)

    def asks_us(self, scheduler: str) -> bool:
        """Whether this scheduler asks us about its pods; until anybody has asked, all are taken to do so."""
        return not self.askers or scheduler in self.askers

    def json_seen(self, item: Json) -> Pod | None:
        """The same for a pod as JSON; one that cannot be read changes nothing, and is logged."""
        pod = readable(item)
        if pod is not None:
            self.pod_seen(pod)
        return pod

    def pod_gone(self, uid: str, last: Pod | None = None, *, announced: bool = True) -> None:
        """A pod is no longer on the API server. `last` is its final state, where the event carries it.

        An announced deletion is final: what is read of the pod afterwards is old. A pod that is merely missing
        from a list may be younger than the list.
        """
        known = self.pods.pop(uid, None)
        self._note_pending(uid, None)
        self._hosts.pod_requests(uid, "", NONE)
        self.waiting.pop(uid, None)
        self.unexplained.pop(uid, None)
        self._told.discard(uid)
        ending = self._ending.pop(uid, None)
        if announced:
            self._gone[uid] = None
        if len(self._gone) > RECENTLY_GONE:
            del self._gone[next(iter(self._gone))]
        hold = self._ledger.get(uid)
        if hold is None:
            return
        never_bound = last is not None and not last.node
        if hold.phase is Phase.PROPOSED or (hold.phase is Phase.ASSUMED and never_bound):
            self._ledger.forget(uid)  # no container has ever seen the devices
            self.made_room(hold.node)
        elif last is not None and last.finished:
            self._release(uid)
        else:
            self._leave(hold, last or known, ending=ending)

    def pods_listed(self, items: Iterable[Json], *, asked_at: float) -> None:
        """A consistent list of all pods, requested at `asked_at`: who is missing from it is gone.

        Pods that came into the ledger after the list was asked for are left to the events that follow it.
        """
        listed = {self.pod_listed(item) for item in items}
        for _ in self.pods_are(listed, asked_at=asked_at):
            pass

    def pod_listed(self, item: Json) -> str:
        """One pod of such a list; its UID."""
        self.json_seen(item)
        return str((item.get("metadata") or {}).get("uid"))

    def pods_are(self, listed: Container[str], *, asked_at: float) -> Iterator[None]:
        """The list is complete with these UIDs: step by step, so that it can be done in turns."""
        yield from self._hosts.pods_are(listed)
        for uid in list(self.pods):
            hold = self._ledger.get(uid)
            if uid not in listed and (hold is None or hold.since < asked_at):
                self.pod_gone(uid, announced=False)
            yield
        for hold in self._ledger:
            now = self._ledger.get(hold.pod.uid)
            missing = hold.pod.uid not in listed and now is not None and now.since < asked_at
            if missing and hold.phase is not Phase.LEAVING:
                self.pod_gone(hold.pod.uid, announced=False)
            yield
        for uid, waiting in list(self.waiting.items()):
            if uid not in listed and waiting.refused < asked_at:
                self.waiting.pop(uid, None)
            yield
        self.rebuilt = True

    def _bound(self, pod: Pod) -> None:
        hold = self._ledger.get(pod.ref.uid)
        written = pod.written if isinstance(pod.written, Written) else None
        same = hold is not None and written is not None and set(written.devices) == set(hold.devices)
        ours = self.rebuilt or written is None or same
        if hold is not None and hold.firm and hold.node == pod.node and ours:
            if hold.phase is Phase.ASSUMED:
                self._ledger.confirm(pod.ref.uid, now=self._clock())
                self._ledger.seen_bound(pod.ref.uid)
            elif hold.phase is Phase.LEAVING:
                self._ledger.restore(replace(hold, phase=Phase.HELD, since=self._clock()))
            if same:
                self.unexplained.pop(pod.ref.uid, None)
                self._told.discard(pod.ref.uid)
            elif pod.ref.uid not in self.unexplained and pod.ref.uid not in self._told:
                self._doubt(pod, "its placement annotation is not what Tangram wrote")
            return
        explained = self._explained(pod)
        if not pod.need.takes_devices:
            return
        self._ledger.restore(Hold(pod.ref, pod.node, pod.need, explained or (), Phase.HELD, self._clock()))
        if not explained:
            self.learn(pod.node)

    def _unbound(self, pod: Pod) -> None:
        """An unbound pod with our annotation: a bind was begun. Its devices stay taken until that is settled.

        Once we are rebuilt, every annotation of ours has a hold: one without was written by somebody else, or
        by a former holder of the Lease. It is removed, which also makes a late Binding of theirs fail.
        """
        hold = self._ledger.get(pod.ref.uid)
        written = pod.written if isinstance(pod.written, Written) else None
        known = hold is not None and hold.firm
        if pod.written is None:
            self.unexplained.pop(pod.ref.uid, None)
            return
        if known and self.rebuilt:
            return
        if known and hold is not None and written is not None and set(written.devices) == set(hold.devices):
            return
        devices = self._explained(pod)
        if devices and written is not None:
            self._ledger.restore(Hold(pod.ref, written.node, pod.need, devices, Phase.ASSUMED, self._clock()))
        if self.rebuilt or not devices:
            self.chores.settle[pod.ref.uid] = pod.ref

    def was_declared(self, uid: str, node: str, devices: tuple[Device, ...]) -> None:
        """A Binding of this pod may still arrive. Where the pod is not bound its devices are taken, whatever else was
        thought of it."""
        pod, hold = self.pods.get(uid), self._ledger.get(uid)
        bound = pod is None or pod.node or pod.finished or (hold is not None and hold.phase is Phase.HELD)
        same = hold is not None and hold.firm and (hold.node, set(hold.devices)) == (node, set(devices))
        if pod is not None and not bound and not same:
            self._ledger.restore(Hold(pod.ref, node, pod.need, devices, Phase.ASSUMED, self._clock()))

    def unbound(self) -> list[PodRef]:
        """Every pod that wants devices and is bound nowhere yet."""
        waiting = [pod for pod in self.pods.values() if not pod.node and not pod.finished]
        return [pod.ref for pod in waiting if pod.need.takes_devices]

    def _explained(self, pod: Pod) -> tuple[Device, ...] | None:
        """The devices of the pod's annotation if it is one that we could have written for this very pod."""
        wrong = ""
        if pod.written is None:
            if pod.node and pod.need.takes_devices:
                wrong = "it was not placed by Tangram"
        elif isinstance(pod.written, Malformed):
            wrong = pod.written.reason
        elif pod.written.uid != pod.ref.uid:
            wrong = "its placement annotation was written for another pod"
        elif pod.node and pod.written.node != pod.node:
            wrong = f"its placement annotation names node {pod.written.node}"
        elif not _meets(pod.written.devices, pod.need):
            wrong = "its placement annotation does not give what the pod asks for"
        elif self.rebuilt:
            wrong = "its placement annotation was not written by this Tangram"
        if wrong:
            self._doubt(pod, wrong)
            return None
        self.unexplained.pop(pod.ref.uid, None)
        return pod.written.devices if isinstance(pod.written, Written) else None

    def _doubt(self, pod: Pod, wrong: str) -> None:
        self.unexplained[pod.ref.uid] = wrong

    def remember(self, pod: Pod) -> None:
        """Without Kubernetes: a pod that came by in a request is all that we know of it."""
        if pod.ref.uid not in self.pods and len(self.pods) >= self._most_waiting:
            free = next((uid for uid in self.pods if self._ledger.get(uid) is None), None)
            self.pods.pop(free or "", None)
            self._note_pending(free or "", None)
        self.pods[pod.ref.uid] = pod
        self._note_pending(pod.ref.uid, pod)

    def dismiss(self, uid: str) -> None:
        """Without Kubernetes: the pod is gone."""
        self.pods.pop(uid, None)
        self.waiting.pop(uid, None)
        self._note_pending(uid, None)

    def _note_pending(self, uid: str, pod: Pod | None) -> None:
        before = self.pending.get(uid)
        now = pod if pod is not None and pod.is_pending else None
        if now is None and before is None:
            return
        if before is not None:
            self._count(before, -1)
        if now is None:
            del self.pending[uid]
            self._ledger.seen_bound(uid)
        else:
            self._count(now, 1)
            self.pending[uid] = now
            if before is None and isinstance(now.ask, Demand):
                self._note_arrival(now.ask)
        if before is None or now is None or (before.ask, before.priority) != (now.ask, now.priority):
            self.pending_changes += 1

    def _count(self, pod: Pod, number: int) -> None:
        kind = pod.ask, pod.priority, pod.scheduler
        self.kinds[kind] += number
        if not self.kinds[kind]:
            del self.kinds[kind]

    def _note_arrival(self, demand: Demand) -> None:
        """Count what comes; what came long ago counts less and less."""
        self.arrivals[demand] += 1
        if self.arrivals.total() > ARRIVALS_KEPT:
            self.arrivals = Counter({each: count // 2 for each, count in self.arrivals.items() if count > 1})

    # -- room -----------------------------------------------------------------------------------------

    def _release(self, uid: str) -> None:
        hold = self._ledger.get(uid)
        self.unexplained.pop(uid, None)
        self._told.discard(uid)
        if hold is not None:
            self._ledger.release(uid)
            if hold.firm and self._just_refused():
                self.made_room(hold.node)

    def _leave(self, hold: Hold, last: Pod | None, *, ending: float | None) -> None:
        """Not finished when it was last seen, so its containers may still run: for its grace time at most.

        The kubelet gives a pod its final phase before it removes it. A forced deletion waits for nobody, and the
        API server announces it like any other (MODIFIED with a deletionTimestamp, then DELETED), so having been
        seen terminating proves nothing; only the time since then counts. After it the agent is asked.
        """
        now = self._clock()
        grace = DEFAULT_GRACE_SECONDS if last is None else last.grace_seconds
        self._ledger.leave(hold.pod.uid, now=now, not_before=(now if ending is None else ending) + grace)

    def settle(self) -> Iterator[None]:
        """Release what has left and been seen idle since: now and then, step by step, to be done in turns."""
        for hold in self._ledger.leaving():
            if self._ledger.get(hold.pod.uid) is hold:
                self._settle(hold)
            yield

    def settle_on(self, node: str) -> None:
        """The same for one node, whose agent has just been heard."""
        if self._ledger.has_leaving:
            for hold in self._ledger.on(node):
                if hold.phase is Phase.LEAVING:
                    self._settle(hold)

    def _settle(self, hold: Hold) -> None:
        """A node that neither the API server nor an agent knows any more has nothing left to wait for."""
        now = self._clock()
        if now < hold.not_before:
            return
        entry = self._inventory.get(hold.node)
        if entry is None:
            gone = hold.node not in self.nodes
        else:
            heard_since = entry.lasting or entry.heard > max(hold.since, hold.not_before)
            gone = heard_since and _seen_idle(entry, hold)
        if gone:
            self._told.discard(hold.pod.uid)
            self._ledger.release(hold.pod.uid)
            self.made_room(hold.node)

    def learn(self, name: str) -> None:
        """Look in the node's report for the devices of pods that we did not place."""
        self._reported.add(name)
        entry = self._inventory.get(name)
        if entry is None:
            return
        for hold in self._ledger.on(name):
            if not hold.unknown:
                continue
            seen = [device for device, uids in entry.users.items() if hold.pod.uid in uids]
            devices = _as_share(seen, hold.demand, entry) or tuple(seen)
            if devices and _meets(devices, hold.demand):
                self._ledger.explain(hold.pod.uid, devices)
                self.made_room(name)

    def misnamed(self) -> Iterator[list[tuple[PodRef, Written]]]:
        """Held pods whose annotation has other UUIDs for their slices than the node's report now shows, node by node.

        Their nodes are looked at again until they have the right ones; so are those on which a bind is under way.
        """
        nodes, self._reported = self._reported, {hold.node for hold in self._ledger.assumed()} & self._reported
        for name in nodes:
            entry = self._inventory.get(name)
            yield self._misnamed_on(name, entry) if entry is not None else []

    def _misnamed_on(self, name: str, entry: Entry) -> list[tuple[PodRef, Written]]:
        if not entry.uuids:
            return []
        found = []
        for hold in self._ledger.on(name):
            pod = self.pods.get(hold.pod.uid)
            if pod is None or hold.phase is not Phase.HELD:
                continue
            now = {str(device): entry.uuids[device] for device in hold.devices if device in entry.uuids}
            told = hold.pod.uid in self._told
            if now and (told if pod.written is not None else not told):
                self._reported.add(name)  # bound or exchanged just now: its placement is still to be seen
            if not isinstance(pod.written, Written) or not now or now == dict(pod.written.uuids):
                continue
            if set(pod.written.devices) == set(hold.devices):
                found.append((hold.pod, pod.written))
                self._reported.add(name)
        return found

    def made_room(self, node: str) -> None:
        """Something became free on this node that no pod-delete event announces."""
        self.chores.room.add(node)

    def _just_refused(self) -> bool:
        """Whether a pod was refused so recently that it may not have seen the room that is made now."""
        latest = next(reversed(self.waiting.values()), None)
        return latest is not None and latest.refused >= self._clock() - FRESH_REFUSAL_SECONDS

    # -- those who wait -------------------------------------------------------------------------------

    def refused(self, pod: Pod, reason: str) -> None:
        """No node that we were asked about fits this pod; an earlier proposal of its own stands in nobody's way now."""
        hold = self._ledger.get(pod.ref.uid)
        if hold is not None and not hold.firm:
            self._ledger.forget(pod.ref.uid)
        if pod.ref.uid in self._gone:
            return
        now = self._clock()
        before = self.waiting.pop(pod.ref.uid, None)
        while len(self.waiting) >= self._most_waiting:
            self.waiting.pop(next(iter(self.waiting)))
        self.waiting[pod.ref.uid] = Waiting(pod, reason, before.since if before else now, now)

    def refused_on_all(self, demand: Demand, names: Sequence[str]) -> None:
        """None of these nodes, all that kube-scheduler would take, has room for the demand."""
        self.refused_on.pop(demand, None)
        self.refused_on[demand] = names
        if len(self.refused_on) > KINDS_KEPT:
            del self.refused_on[next(iter(self.refused_on))]

    def fits(self, uid: str) -> None:
        """A node was found for this pod."""
        self.waiting.pop(uid, None)

    # -- nodes ----------------------------------------------------------------------------------------

    def nodes_listed(self, names: Iterable[str]) -> set[str]:
        """The nodes that exist; returns those that are gone since."""
        now_there = set(names)
        gone = self.nodes - now_there
        self.nodes = now_there
        return gone


def readable(item: Json) -> Pod | None:
    """A pod from the API server; None, and a line in the log, for one that even we cannot read."""
    try:
        return pod_of(item)
    except (ValueError, TypeError, AttributeError) as error:
        log.error("a pod from the API server cannot be read: %s", error)
        return None


def _is_older(pod: Pod, known: Pod) -> bool:
    """Whether a pod was read before what we know of it (resourceVersions are whole numbers that grow)."""
    new, old = pod.resource_version, known.resource_version
    return new.isdigit() and old.isdigit() and int(new) < int(old)


def _seen_idle(entry: Entry, hold: Hold) -> bool:
    """Whether the node's agent sees the devices of a pod that is gone, and the pod on none of them."""
    if entry.report.error or any(hold.pod.uid in uids for uids in entry.users.values()):
        return False
    seen = {gpu.uuid for gpu in entry.report.gpus if gpu.health != "bad"}
    return all(device.gpu in seen for device in hold.devices)


def _as_share(seen: Sequence[Device], demand: Demand, entry: Entry) -> tuple[Device, ...]:
    """Where the pod has a share and nothing else: the share of the one GPU on which it was seen."""
    if not demand.is_shared or len(seen) != 1 or not seen[0].whole:
        return ()
    memory = next(gpu.memory_mib for gpu in entry.node.gpus if gpu.uuid == seen[0].gpu)
    milli = demand.share_of(memory)
    return (replace(seen[0], milli=milli),) if milli <= GPU_MILLI else ()


def _meets(devices: Iterable[Device], demand: Demand) -> bool:
    """Whether the devices are exactly as many of each kind as the demand. A share asked for in GiB may be any."""
    gpus = 0
    shares: list[int] = []
    slices: dict[str, int] = {}
    for device in devices:
        if device.slice is not None:
            slices[device.slice.profile] = slices.get(device.slice.profile, 0) + 1
        elif device.milli:
            shares.append(device.milli)
        else:
            gpus += 1
    asked_share = len(shares) == demand.is_shared and (not demand.share_milli or shares == [demand.share_milli])
    return gpus == demand.gpus and asked_share and tuple(sorted(slices.items())) == demand.slices
