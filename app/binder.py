"""Bind: the last verb of a pod's story, the one that talks to the API server.

    assume ─▶ have its slices made ─▶ write the placement on the pod ─▶ create the Binding ─▶ confirm
       │                │                      │                             │
       │      not in time: forget        4xx: forget      4xx: read the pod; ours? confirm : remove annotation, forget
       └─ refused: say why               unknown: `settle` reads until the API server tells, and until then the
                                                  devices stay taken

It may be called twice, in any order with the other verbs, and for pods that are never heard of again.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping

from app.errors import Conflict, KubeError, NotFound, Refused
from app.handing import Handing
from app.kube import Kube
from app.ledger import Hold, Ledger, Phase
from app.offers import Offers, legal
from app.orders import Orders
from app.refusals import Refusals
from app.schedule import Schedule
from app.settings import Settings
from app.translate import PLACEMENT_ANNOTATION, Malformed, Pod, PodRef, pod_of, write_placement
from app.truth import Truth
from app.wire import BindArgs
from solver import Demand, Device, Placement, Refusal

log = logging.getLogger(__name__)

FIRST_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 5.0


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
        waiting_for: Callable[[], list[str]],
        term: Callable[[], int],
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
        self._waiting_for = waiting_for
        self._term = term
        self._clock = clock
        self._binds: dict[str, tuple[str, asyncio.Task[str]]] = {}
        self._settling: dict[str, asyncio.Task[None]] = {}
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
        await self._stop_settling(args.pod.uid)
        try:
            pod = await self._find(args.pod)
        except KubeError as error:
            return f"cannot read {args.pod}: {error}"
        refusal = _unbindable(pod, args)
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
        term = self._term()
        devices = self._assume(pod, pod.ask, args.node)
        if isinstance(devices, Refusal):
            reason = f"{args.node}: {devices.reason}"
            self._truth.refused(pod, reason)
            return reason
        self._truth.fits(pod.ref.uid)
        if self._kube is None:
            self._ledger.confirm(pod.ref.uid, now=self._clock())
            return ""
        try:
            async with asyncio.timeout(self._left(latest)):
                return await self._bind_to(self._kube, pod, devices, term, latest, promised_before=promised_before)
        except (KubeError, TimeoutError) as error:
            return f"it is not known whether {pod.ref} was bound: {error}"

    async def _bind_to(
        self, kube: Kube, pod: Pod, placement: Placement, term: int, latest: float, *, promised_before: bool
    ) -> str:
        """Its slices, its annotation, its Binding; begun anew where its devices are exchanged for others meanwhile."""
        while True:
            uuids = await self._orders.made(pod.ref.uid, placement)
            exchanged = self._exchanged(pod.ref, placement)
            if exchanged is None and isinstance(uuids, Refusal):
                return self._not_made(pod, placement, uuids, promised_before=promised_before)
            if exchanged is None and not isinstance(uuids, Refusal):
                try:
                    version = await self._write(kube, pod.ref, placement, uuids, latest)
                except Refused as error:
                    # Nothing was written by this call. An earlier one may have a Binding under way, and is settled.
                    if not promised_before:
                        self._ledger.forget(pod.ref.uid)
                    return f"the placement could not be written to {pod.ref}: {error}"
                exchanged = self._exchanged(pod.ref, placement)
            if exchanged is not None:
                placement = exchanged
                continue
            if self._clock() >= latest or self._term() != term or not self._still_ours(pod.ref, placement):
                return f"no time was left to bind {pod.ref} after its placement had been written, or it had changed"
            return await self._create_binding(kube, pod.ref, placement.node, version, latest)

    def _exchanged(self, pod: PodRef, placement: Placement) -> Placement | None:
        """What the pod is promised now, if that is other devices of the same node."""
        hold = self._ledger.get(pod.uid)
        if hold is None or hold.phase is not Phase.ASSUMED or hold.node != placement.node:
            return None
        return Placement(hold.node, hold.devices, hold.prices) if hold.devices != placement.devices else None

    def _not_made(self, pod: Pod, placement: Placement, why: Refusal, *, promised_before: bool) -> str:
        """Its slices were not made: nothing was written by this call, so the devices are free again.

        An earlier call may have written it; then it is settled.
        """
        if not promised_before:
            self._ledger.forget(pod.ref.uid)
        self._offers.refresh(now=self._clock())
        self._orders.refresh([placement.node])
        self._handing.refresh([placement.node])
        self._truth.made_room(placement.node)
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
            return self._again(hold)
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
            self.settle(hold.pod)
            return refusal
        return Placement(hold.node, hold.devices, hold.prices)

    async def _write(
        self, kube: Kube, pod: PodRef, placement: Placement, uuids: Mapping[Device, str], latest: float
    ) -> str:
        """The placement onto the pod; the pod's new version. Raises KubeError."""
        text = write_placement(pod.uid, placement.node, placement.devices, uuids)
        return await kube.annotate_pod(
            pod.namespace, pod.name, {PLACEMENT_ANNOTATION: text}, uid=pod.uid, timeout=self._left(latest)
        )

    def _still_ours(self, pod: PodRef, placement: Placement) -> bool:
        """Whether the promise still stands after waiting for the API server: much may have happened."""
        hold = self._ledger.get(pod.uid)
        ready = not self._waiting_for() and hold is not None and hold.phase is Phase.ASSUMED
        if hold is None or not ready or hold.devices != placement.devices:
            return False
        return not isinstance(self._again(hold), Refusal)

    async def _create_binding(self, kube: Kube, pod: PodRef, node: str, version: str, latest: float) -> str:
        """Bind; a definite refusal is undone. Raises Unknown and TimeoutError: the caller's hold is then settled."""
        try:
            await kube.bind(
                pod.namespace, pod.name, node, uid=pod.uid, resource_version=version, timeout=self._left(latest)
            )
        except Refused as error:
            refused = f"{pod} could not be bound: {error}"
            if isinstance(error, Conflict) and await self._is_bound(kube, pod, node):
                return ""
            self.check(node, f"its last bind was refused: {error}")
            await self._undo(kube, pod, version, latest)
            return refused
        self._ledger.confirm(pod.uid, now=self._clock())
        return ""

    async def _is_bound(self, kube: Kube, pod: PodRef, node: str) -> bool:
        """Whether the conflict is that an earlier Binding of ours had been made after all."""
        try:
            now = pod_of(await kube.get_pod(pod.namespace, pod.name))
        except NotFound:
            return False
        if now.ref.uid != pod.uid or now.node != node:
            return False
        self._truth.pod_seen(now)
        return True

    async def _undo(self, kube: Kube, pod: PodRef, version: str, latest: float) -> None:
        """Remove the annotation of the very version that we wrote, then forget; anything else is left to `settle`."""
        try:
            await kube.annotate_pod(
                pod.namespace,
                pod.name,
                {PLACEMENT_ANNOTATION: None},
                uid=pod.uid,
                resource_version=version,
                timeout=self._left(latest),
            )
        except KubeError as error:
            log.info("undoing the bind of %s: %s", pod, error)
            return
        self._ledger.forget(pod.uid)

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

    async def _settled(self, kube: Kube, ref: PodRef) -> bool:
        """One try. The removal carries the version that was read, so that a Binding still under way conflicts."""
        try:
            pod = pod_of(await kube.get_pod(ref.namespace, ref.name))
            if pod.ref.uid != ref.uid:
                raise NotFound(f"{ref} is another pod now")
            if pod.node or pod.finished:
                self._truth.pod_seen(pod)
                return True
            await kube.annotate_pod(
                ref.namespace,
                ref.name,
                {PLACEMENT_ANNOTATION: None},
                uid=ref.uid,
                resource_version=pod.resource_version,
                timeout=LONGEST_RETRY_SECONDS,
            )
        except NotFound:
            self._truth.pod_gone(ref.uid)
            return True
        except KubeError as error:
            log.info("settling %s: %s", ref, error)
            return False
        hold = self._ledger.get(ref.uid)
        self._ledger.forget(ref.uid)
        if hold is not None:
            self._truth.made_room(hold.node)
        return True

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
