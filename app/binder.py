"""Bind: the last verb of a pod's story, the one that talks to the API server.

    assume ─▶ have its slices made ─▶ declare it in the journal ─▶ create the Binding, placement and all ─▶ confirm
       │                │                      │                             │
       │      not in time: forget      not ours: forget       4xx: read the pod; ours? confirm : forget
       └─ refused: say why                                    changed meanwhile? again
                                                              unknown: `settle` reads until the API server tells, and
                                                                       until then the devices stay taken

At most one Binding of a pod is ever under way, with the devices that the journal names: where the outcome of an
earlier one is not known the pod is *fenced* first, which is to change it, so that a Binding for the version before
conflicts. Decision 0011 says why no order of events gives a device away twice.

Bind may be called twice, in any order with the other verbs, and for pods that are never heard of again.
"""

import asyncio
import logging
import secrets
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime

from app.errors import Conflict, KubeError, NotFound, Refused
from app.handing import Handing
from app.journal import Intent, Journal
from app.kube import Kube
from app.ledger import Hold, Ledger, Phase
from app.offers import Offers, legal
from app.orders import Orders
from app.refusals import Refusals
from app.schedule import Schedule
from app.settings import Settings
from app.translate import FENCE_ANNOTATION, PLACEMENT_ANNOTATION, Malformed, Pod, PodRef, pod_of, write_placement
from app.truth import Truth
from app.wire import BindArgs
from solver import Demand, Device, Placement, Refusal

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 5.0
OUT_OF_TIME = "no time was left, or its promise had changed meanwhile"
SETTLING_AT_ONCE = 32  # after a restart there may be thousands


class Binder:
    """Binds pods, finds out what became of unknown outcomes, and reads nodes again that are in doubt."""

    def __init__(
        self,
        *,
        settings: Settings,
        ledger: Ledger,
        offers: Offers,
        orders: Orders,
        handing: Handing,
        refusals: Refusals,
        truth: Truth,
        schedule: Schedule,
        kube: Kube | None,
        journal: Journal | None,
        waiting_for: Callable[[], list[str]],
        term: Callable[[], Hashable],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._offers = offers
        self._orders = orders
        self._handing = handing
        self._refusals = refusals
        self._truth = truth
        self._schedule = schedule
        self._kube = kube
        self._journal = journal
        self._waiting_for = waiting_for
        self._term = term
        self._clock = clock
        self._binds: dict[str, tuple[str, asyncio.Task[str]]] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
        self._settlers = asyncio.Semaphore(SETTLING_AT_ONCE)
        self._unfenced: set[str] = set()
        self._checking: dict[str, asyncio.Task[None]] = {}

    async def bind(self, args: BindArgs) -> str:
        """Bind, or say in words why not. A repeated bind of the same pod joins the one in flight."""
        flying = self._binds.get(args.pod.uid)
        if flying is not None:
            node, task = flying
            if node != args.node:
                return f"{args.pod} is being bound to {node} right now"
            return await asyncio.shield(task)
        task = asyncio.create_task(self._bind_and_settle(args), name=f"bind {args.pod}")
        self._binds[args.pod.uid] = (args.node, task)
        task.add_done_callback(lambda _: self._binds.pop(args.pod.uid, None))
        return await asyncio.shield(task)

    def is_binding(self, uid: str) -> bool:
        """Whether a bind of this pod is being made now."""
        return uid in self._binds

    def is_open(self, uid: str) -> bool:
        """Whether a Binding of this pod may still arrive: the journal must go on naming it."""
        hold = self._ledger.get(uid)
        return uid in self._binds or (hold is not None and hold.phase is Phase.ASSUMED)

    async def _bind_and_settle(self, args: BindArgs) -> str:
        """Whatever is left assumed by a bind that was not made must be settled."""
        error = "a fault inside Tangram"
        try:
            error = await self._bind(args)
        finally:
            hold = self._ledger.get(args.pod.uid)
            if error and hold is not None and hold.phase is Phase.ASSUMED:
                self.settle(hold.pod)
        return error

    async def _bind(self, args: BindArgs) -> str:
        latest = self._clock() + self._settings.bind_deadline_seconds
        waiting_for = self._waiting_for()
        if waiting_for:
            return f"Tangram is not ready: waiting for {', '.join(waiting_for)}"
        term = self._term()
        await self._stop_settling(args.pod.uid)
        try:
            pod = await self._find(args.pod)
        except KubeError as error:
            return f"cannot read {args.pod}: {error}"
        refusal = _unbindable(pod, args) or (OUT_OF_TIME if self._is_over(term, latest) else "")
        if refusal:
            return refusal
        assert isinstance(pod.ask, Demand)
        if pod.node == args.node:
            return ""
        if not pod.ask.takes_devices:
            return await self._bind_without_devices(args, latest)
        hold = self._ledger.get(pod.ref.uid)
        if hold is not None and hold.phase is Phase.HELD and hold.node == args.node:
            return ""
        promised_before = hold is not None and hold.firm
        devices = self._assume(pod, pod.ask, args.node)
        if isinstance(devices, Refusal):
            reason = f"{args.node}: {devices.reason}"
            self._truth.refused(pod, reason)
            return reason
        self._truth.fits(pod.ref.uid)
        if self._kube is None:
            self._ledger.confirm(pod.ref.uid, now=self._clock())
            return ""
        assert self._journal is not None
        try:
            async with asyncio.timeout(self._left(latest)):
                if promised_before:
                    pod = pod_of(await self._kube.get_pod(pod.ref.namespace, pod.ref.name))
                    self._truth.pod_seen(pod)
                    refusal = _unbindable(pod, args)
                    if refusal or pod.node:
                        return refusal
                    pod = await self._fence(self._kube, pod)
                return await self._bind_to(self._kube, self._journal, pod, devices, term, latest)
        except (KubeError, TimeoutError) as error:
            return f"it is not known whether {pod.ref} was bound: {error}"

    async def _bind_to(
        self, kube: Kube, journal: Journal, pod: Pod, placement: Placement, term: Hashable, latest: float
    ) -> str:
        """Its slices, its entry in the journal, its Binding; begun anew where its devices are exchanged meanwhile.

        No other Binding of the pod is under way when this begins, so until ours is sent all can be taken back.
        """
        while True:
            uuids = await self._orders.made(pod.ref.uid, placement)
            placement, before = self._exchanged(pod.ref, placement), placement
            if placement is not before:
                continue
            if isinstance(uuids, Refusal):
                return self._not_made(pod, placement, uuids, term)
            if self._is_over(term, latest):
                return self._taken_back(pod.ref, OUT_OF_TIME, term)
            try:
                await journal.declare(Intent(pod.ref, placement.node, placement.devices))
            except Refused as error:
                return self._taken_back(pod.ref, f"its bind could not be declared: {error}", term)
            placement, before = self._exchanged(pod.ref, placement), placement
            if placement is not before:
                continue
            if self._is_over(term, latest) or not self._still_ours(pod.ref, placement):
                return self._taken_back(pod.ref, OUT_OF_TIME, term)
            why_not = await self._create_binding(kube, pod, placement, uuids, term, latest)
            if not why_not:
                return ""
            self.check(placement.node, f"its last bind was refused: {why_not}")
            return self._taken_back(pod.ref, why_not, term)

    def _is_over(self, term: Hashable, latest: float) -> bool:
        """Whether nothing may be sent any more for a bind that began in that term."""
        return self._clock() >= latest or self._term() != term or bool(self._waiting_for())

    def _taken_back(self, pod: PodRef, why: str, term: Hashable) -> str:
        """Nothing was sent, or it was refused: the devices are free again.

        In another term what the pod holds may be what somebody else has declared for it; that is settled.
        """
        hold = self._ledger.get(pod.uid)
        if hold is not None and self._term() == term:
            self._ledger.forget(pod.uid)
            self._truth.made_room(hold.node)
        return f"{pod} was not bound: {why}"

    def _exchanged(self, pod: PodRef, placement: Placement) -> Placement:
        """The placement; where the pod is promised other devices of the same node by now, one with those."""
        hold = self._ledger.get(pod.uid)
        if hold is None or hold.phase is not Phase.ASSUMED or hold.node != placement.node:
            return placement
        same = hold.devices == placement.devices
        return placement if same else Placement(hold.node, hold.devices, hold.prices)

    def _not_made(self, pod: Pod, placement: Placement, why: Refusal, term: Hashable) -> str:
        """Its slices were not made: the devices are free again."""
        self._taken_back(pod.ref, why.reason, term)
        self._offers.refresh(now=self._clock())
        self._orders.refresh([placement.node])
        self._handing.refresh([placement.node])
        self._truth.refused(pod, why.reason)
        return why.reason

    async def _find(self, ref: PodRef) -> Pod:
        """The pod of that UID, from the watch or else from the API server. Raises KubeError."""
        known = self._truth.pods.get(ref.uid)
        if known is not None and known.ref == ref:
            return known
        if self._kube is None:
            raise NotFound(f"no pod {ref} with UID {ref.uid} has been through filter")
        pod = pod_of(await self._kube.get_pod(ref.namespace, ref.name))
        self._truth.pod_seen(pod)
        return pod

    def _assume(self, pod: Pod, demand: Demand, node: str) -> Placement | Refusal:
        """Decide again on the node that we were given, and take the devices."""
        now = self._clock()
        self._offers.refresh(now=now)
        hold = self._ledger.get(pod.ref.uid)
        if hold is not None and hold.phase is Phase.ASSUMED and hold.node == node:
            again = self._again(hold)
            if isinstance(again, Refusal):
                self.settle(hold.pod)
            return again
        refused = self._refusals.on(demand)
        if node in refused:
            return Refusal(refused[node])
        best = self._offers.best(demand, node, uid=pod.ref.uid)
        if isinstance(best, Refusal):
            return best
        seen, _ = self._offers.view(node)
        refusal = self._ledger.assume(pod.ref, demand, best, now=now, legal=legal(seen))
        if refusal is not None:
            return refusal
        self._schedule.use(demand, node)
        self._handing.refresh([node])  # on its way to the agent before the kubelet can hear of the pod
        return best

    def _again(self, hold: Hold) -> Placement | Refusal:
        """What a pod was promised before (by us, or by us before a restart) if it is still in order."""
        fault = self._offers.fault(hold.node)
        if fault:
            return Refusal(fault, resolvable=False)
        seen, _ = self._offers.view(hold.node, promised=True)
        others = self._ledger.taken(hold.node, but=[hold.pod.uid])
        refusal = legal(seen)(others, hold.allocation)
        if refusal is not None:
            return refusal
        return Placement(hold.node, hold.devices, hold.prices)

    def _still_ours(self, pod: PodRef, placement: Placement) -> bool:
        """Whether the promise still stands after waiting for the API server: much may have happened."""
        hold = self._ledger.get(pod.uid)
        if hold is None or hold.phase is not Phase.ASSUMED or hold.devices != placement.devices:
            return False
        return not isinstance(self._again(hold), Refusal)

    async def _create_binding(
        self, kube: Kube, pod: Pod, placement: Placement, uuids: Mapping[Device, str], term: Hashable, latest: float
    ) -> str:
        """Bind, for the version that is known; again where the pod had changed. Why not, if it definitely was not.

        A version counts only if the pod has not been fenced since the bind was declared: else somebody has given
        the devices up on our behalf. Raises Unknown and TimeoutError: the caller's hold is then settled.
        """
        text = write_placement(pod.ref.uid, placement.node, placement.devices, uuids)
        now = self._truth.pods.get(pod.ref.uid) or pod
        while True:
            why_not = _changed(now, pod)
            if why_not:
                return why_not
            try:
                await kube.bind(
                    pod.ref.namespace,
                    pod.ref.name,
                    placement.node,
                    uid=pod.ref.uid,
                    resource_version=now.resource_version,
                    annotations={PLACEMENT_ANNOTATION: text},
                    timeout=self._left(latest),
                )
                self._ledger.confirm(pod.ref.uid, now=self._clock())
                return ""
            except Conflict as error:
                refused, sent = str(error), now.resource_version
            except Refused as error:
                return str(error)
            try:
                now = pod_of(await kube.get_pod(pod.ref.namespace, pod.ref.name))
            except NotFound:
                return refused
            self._truth.pod_seen(now)
            if now.ref.uid == pod.ref.uid and now.node == placement.node:
                return ""  # an earlier Binding of ours had been made after all
            if now.resource_version == sent:
                return refused  # whatever the conflict is, it is not the version
            if self._is_over(term, latest) or not self._still_ours(pod.ref, placement):
                return OUT_OF_TIME

    async def _bind_without_devices(self, args: BindArgs, latest: float) -> str:
        """A pod that asks for nothing of ours, sent to us all the same (managedResources is empty)."""
        if self._kube is None:
            return ""
        pod = args.pod
        try:
            await self._kube.bind(
                pod.namespace,
                pod.name,
                args.node,
                uid=pod.uid,
                resource_version="",
                timeout=self._left(latest),
            )
        except KubeError as error:
            return f"{pod} could not be bound: {error}"
        return ""

    def _left(self, latest: float) -> float:
        return max(0.05, latest - self._clock())

    # -- settling what is not known -------------------------------------------------------------------

    def adopt(self, intents: Iterable[Intent]) -> None:
        """Nobody knows what became of these binds: where the pod is not bound its devices stay taken until that is
        settled. Called at a new term when the pods have been listed; what was being settled before begins anew."""
        for intent in intents:
            self._truth.was_declared(intent.pod.uid, intent.node, intent.devices)
        for hold in self._ledger.assumed():
            pod = self._truth.pods.get(hold.pod.uid)
            if hold.pod.uid not in self._binds and (pod is None or pod.written is None):
                self.settle(hold.pod)

    def fence(self, pods: Iterable[PodRef]) -> None:
        """Make sure that no Binding of these pods can still arrive; until then `unfenced` counts them."""
        for pod in pods:
            self._unfenced.add(pod.uid)
            self.settle(pod)

    @property
    def unfenced(self) -> int:
        """Pods of which a Binding may arrive, with devices that nobody knows."""
        return len(self._unfenced)

    def settle(self, pod: PodRef) -> None:
        """Find out from the API server what became of a bind, and free the devices if it was not made."""
        if self._kube is not None and pod.uid not in self._settling:
            task = asyncio.create_task(self._settle(self._kube, pod), name=f"settle {pod}")
            self._settling[pod.uid] = task
            task.add_done_callback(lambda _: self._settling.pop(pod.uid, None))

    def settle_orphans(self) -> None:
        """Settle what was assumed long ago and is being bound by nobody, and placements that we did not write."""
        for uid, pod in list(self._truth.chores.settle.items()):
            del self._truth.chores.settle[uid]
            if uid not in self._binds:
                self.settle(pod)
        before = self._clock() - self._settings.orphan_seconds
        for hold in self._ledger.assumed():
            if hold.since < before and hold.pod.uid not in self._binds:
                self.settle(hold.pod)

    async def _settle(self, kube: Kube, ref: PodRef) -> None:
        pause = FIRST_RETRY_SECONDS
        while not await self._settled(kube, ref):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
        self._unfenced.discard(ref.uid)

    async def _settled(self, kube: Kube, ref: PodRef) -> bool:
        """One try: a pod that is not bound is fenced, and its devices are free."""
        try:
            async with self._settlers:
                pod = pod_of(await kube.get_pod(ref.namespace, ref.name))
                if pod.ref.uid != ref.uid:
                    raise NotFound(f"{ref} is another pod now")
                if pod.node or pod.finished:
                    self._truth.pod_seen(pod)
                    return True
                await self._fence(kube, pod)
        except NotFound:
            self._truth.pod_gone(ref.uid)
            return True
        except KubeError as error:
            level = logging.WARNING if ref.uid in self._unfenced else logging.INFO  # nothing is decided until it is
            log.log(level, "settling %s: %s", ref, error)
            return False
        hold = self._ledger.get(ref.uid)
        self._ledger.forget(ref.uid)
        if hold is not None:
            self._truth.made_room(hold.node)
        return True

    async def _fence(self, kube: Kube, pod: Pod) -> Pod:
        """Change that very version of the pod, so that a Binding still under way conflicts; the pod afterwards.

        The mark is a new one each time: kube-apiserver makes nothing of a patch that changes nothing.
        """
        mark = f"{datetime.now(UTC).isoformat()} {secrets.token_hex(4)}"
        version = await kube.annotate_pod(
            pod.ref.namespace,
            pod.ref.name,
            {FENCE_ANNOTATION: mark, PLACEMENT_ANNOTATION: None},
            uid=pod.ref.uid,
            resource_version=pod.resource_version,
            timeout=LONGEST_RETRY_SECONDS,
        )
        fenced = replace(pod, resource_version=version, fence=mark, written=None)
        self._truth.pod_seen(fenced)
        return fenced

    async def stop_settling(self) -> None:
        """At a new term: what was found out before it is not enough any more, and who was to be fenced may be gone."""
        self._unfenced.clear()
        settling = list(self._settling.values())
        for task in settling:
            task.cancel()
        await asyncio.gather(*settling, return_exceptions=True)

    async def _stop_settling(self, uid: str) -> None:
        task = self._settling.get(uid)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- nodes in doubt -------------------------------------------------------------------------------

    def check(self, node: str, reason: str) -> None:
        """Keep a node back until what is on it has been read again from the API server."""
        if self._kube is None or node in self._checking:
            return
        self._offers.bar(node, reason)
        task = asyncio.create_task(self._check(self._kube, node), name=f"check {node}")
        self._checking[node] = task
        task.add_done_callback(lambda _: self._checking.pop(node, None))

    async def _check(self, kube: Kube, node: str) -> None:
        pause = FIRST_RETRY_SECONDS
        while True:
            try:
                await kube.get_node(node)
                pods = await kube.list("pods", fields=f"spec.nodeName={node}")
                for pod in pods.items:
                    self._truth.json_seen(pod)
                self._offers.unbar(node)
                self._truth.made_room(node)
                return
            except NotFound:
                if node not in self._truth.nodes:
                    self._offers.bar(node, "the API server has no such node")
                    return  # the node's coming back ends it
            except KubeError as error:
                log.info("checking node %s: %s", node, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)

    async def close(self) -> None:
        """Let binds in flight end, then stop everything else."""
        binds = [task for _, task in self._binds.values()]
        if binds:
            await asyncio.wait(binds, timeout=self._settings.bind_deadline_seconds)
        rest = [*self._settling.values(), *self._checking.values()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


def _unbindable(pod: Pod, args: BindArgs) -> str:
    """Why this pod cannot be bound there, whatever is free; empty if it can."""
    if pod.ref.uid != args.pod.uid:
        return f"{args.pod} has UID {pod.ref.uid} now, the bind is for {args.pod.uid}"
    if pod.node and pod.node != args.node:
        return f"{args.pod} is already bound to {pod.node}"
    if pod.finished or (pod.terminating and not pod.node):
        return f"{args.pod} is being deleted or has finished"
    if isinstance(pod.ask, Malformed):
        return pod.ask.reason
    return ""


def _changed(now: Pod, declared: Pod) -> str:
    """Why a pod that was declared cannot be bound as it is now; empty if it can."""
    if now.ref.uid != declared.ref.uid:
        return f"it has UID {now.ref.uid} now"
    if now.node:
        return f"it is bound to {now.node} already"
    if now.finished or now.terminating:
        return "it is being deleted or has finished"
    if now.gated:
        return "somebody holds it back from being scheduled"
    if now.fence != declared.fence:
        return "somebody has fenced it: its bind was given up"
    return ""
