"""The running service: every object it is made of, what it waits for, and its background tasks.

watch pods, watch nodes ─▶ truth ─▶ ledger          lease: one holder serves
chores: twice a second settle what left, look for stale nodes, settle orphans, wake refused pods
orders: what agents shall change of their MIG slices and modes; reports say what has come of it
handing: which pod gets which device, told to agents before the bind; what containers really have is the truth
planner: what is pending ─▶ a process of its own ─▶ schedule ─▶ prioritize
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from datetime import UTC, datetime

from app.binder import Binder
from app.costs import Costs
from app.errors import BadInput, KubeError
from app.events import Events
from app.extender import Extender
from app.handing import Handing
from app.hosts import Amount, Hosts
from app.inventory import Inventory, Ownership, profiles_in
from app.journal import SUFFIX, Intent, Journal, Unreadable
from app.kube import Event, Kube
from app.lease import Lease
from app.ledger import Ledger
from app.loop import LoopWatch, Turns, in_turns
from app.manifests import managed_resource_names
from app.metrics import Metrics
from app.modes import Modes
from app.offers import Offers
from app.orders import Orders
from app.planner import Planner
from app.refusals import Refusals
from app.report import NodeReport, Unchanged
from app.schedule import Schedule
from app.settings import Settings
from app.translate import (
    PLACEMENT_ANNOTATION,
    WAKE_ANNOTATION,
    Json,
    PodRef,
    Written,
    allocatable_of,
    mig_owner_of,
    resource_of_profile,
    versions_of,
    write_placement,
)
from app.truth import Truth, readable
from app.views import Views
from app.watch import Items, Watch
from solver import DEFAULT_POLICY, Device

log = logging.getLogger(__name__)

CHORES_SECONDS = 0.5
AT_ONCE = 4  # nodes whose lists are made anew when an agent reports: its own and few others; the rest is a chore
GONE_AFTER_STALE = 4.0  # times `stale_seconds`: then a node that the API server does not have is forgotten
UNKNOWN_WAITERS_SECONDS = 60.0  # after a rebuild: by then the agents have reported and the pods were looked at anew
LOOK_SECONDS = 0.05
TAKE_SECONDS = 0.3
RENAME_SECONDS = 5.0
SHOWN = 5


class Service:
    """Built once by `main.build`; `start` and `stop` are called by the app's lifespan."""

    def __init__(self, settings: Settings, *, kube: Kube | None, clock: Callable[[], float]) -> None:
        self.settings = settings
        self.clock = clock
        self.kube = kube
        self.id = secrets.token_hex(8)
        """This very process, for agents: they carry out no order of another."""
        self.ledger = Ledger()
        self.ledger.when_changed = self._soon
        self._is_soon = False
        self.inventory = Inventory(stale_seconds=settings.stale_seconds)
        self.hosts = Hosts()
        self.offers = Offers(self.inventory, self.ledger, self.hosts, policy=DEFAULT_POLICY)
        self.refusals = Refusals(self.inventory, clock=clock, seconds=settings.refused_seconds)
        self.truth = Truth(self.ledger, self.inventory, self.hosts, self.refusals, clock=clock)
        self.orders = Orders(
            self.ledger,
            self.inventory,
            self.offers,
            service=self.id,
            ready=lambda: not self.waiting_for(),
            beat=self.beat,
            placements=lambda name: self.handing.placements_of(name),
            waited=lambda made, seconds: self.metrics.slices_waited(made, seconds),
            clock=clock,
            slice_seconds=settings.slice_seconds,
            idle_seconds=settings.idle_slice_seconds,
            retry_seconds=settings.order_retry_seconds,
            stale_seconds=settings.stale_seconds,
        )
        self.handing = Handing(
            self.ledger,
            self.inventory,
            self.offers,
            self.truth,
            kube,
            service=self.id,
            can_switch=settings.mig_modes,
            not_ready=self.waiting_for,
            wake=self.orders.wake,
            order=self.orders.refresh,
            binding=lambda uid: self.binder.is_binding(uid),
            count=lambda name, label, number: self.metrics.count(name, label, number),
            term=self._current_term,
        )
        self.events = Events(instance=settings.identity)
        self.modes = Modes(self.ledger, self.inventory, self.offers, self.orders, self.truth, clock=clock)
        self.views = Views(self.ledger, self.inventory, self.offers, self.orders, self.handing, self.truth, clock=clock)
        self.loop = LoopWatch(tell_seconds=settings.tell_blocked_seconds)
        self.metrics = Metrics(self._gauges, self.loop)
        self.schedule = Schedule()
        self.planner = self._planner() if settings.planning else None
        self.costs = Costs(self.metrics, self.loop, self.ledger, self.inventory, self.offers, self.planner, clock=clock)
        self.lease: Lease | None = None
        self.journal: Journal | None = None
        self.watches: tuple[Watch, ...] = ()
        if kube is not None:
            self.lease = Lease(
                kube,
                namespace=settings.namespace,
                name=settings.lease_name,
                identity=settings.identity,
                seconds=settings.lease_seconds,
                clock=clock,
            )
            self.journal = Journal(
                kube,
                namespace=settings.namespace,
                name=settings.lease_name + SUFFIX,
                is_open=lambda uid: self.binder.is_open(uid),
                clock=clock,
            )
            self.watches = (
                self._watch(kube, "pods", self._pods_listed, self._pod_event),
                self._watch(kube, "nodes", self._nodes_listed, self._node_event),
            )
        self.extender = Extender(
            settings=settings,
            ledger=self.ledger,
            offers=self.offers,
            refusals=self.refusals,
            truth=self.truth,
            schedule=self.schedule,
            standalone=kube is None,
            waiting_for=self.waiting_for,
            clock=clock,
        )
        self.binder = Binder(
            settings=settings,
            ledger=self.ledger,
            offers=self.offers,
            orders=self.orders,
            handing=self.handing,
            refusals=self.refusals,
            truth=self.truth,
            schedule=self.schedule,
            kube=kube,
            journal=self.journal,
            waiting_for=self.waiting_for,
            term=self._stint,
            clock=clock,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self.broken = ""
        """What ended that must never end; liveness fails then, and a restart rebuilds everything."""
        self._no_journal = ""
        self._rebuilt_in_term = 0
        self._rebuilt_at = clock()
        self._changed: dict[str, None] = {}
        """Nodes whose lists are to be made anew, the latest last."""
        self._managed = frozenset(managed_resource_names())
        self._unmanaged: tuple[str, ...] = ()

    # -- keeping up -----------------------------------------------------------------------------------

    def _soon(self) -> None:
        """What has changed is worked out as soon as nothing else waits, so that no request has to. While the pods are
        still being listed nobody asks, and a node changes many times: then it is done once, at the end."""
        if self._is_soon or self.waiting_for():
            return
        try:
            asyncio.get_running_loop().call_soon(self._keep_up)
        except RuntimeError:  # nobody runs yet: whoever asks first does it
            return
        self._is_soon = True

    def _keep_up(self) -> None:
        self._is_soon = False
        turns = Turns()
        while self.offers.refresh(now=self.clock(), most=1) and turns.lasts():
            pass
        self.offers.catch_up(turns.lasts)

    # -- life -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every background task; readiness follows by itself."""
        self.loop.start()
        loops = [self._do_chores()]
        if self.kube is not None and self.lease is not None and self.journal is not None:
            loops.append(self.journal.run())
            loops += [self.lease.run(), self._rebuild(), self._wake(self.kube), self._name_slices(self.kube)]
            loops += [self._write_placements(), self._tell_refusals(self.kube)]
        if self.planner is not None:
            loops.append(self.planner.run())
        self._tasks = [asyncio.create_task(loop) for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self._ended)

    async def stop(self) -> None:
        """End binds in flight, then everything; give the Lease back."""
        await self.binder.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.loop.stop()
        if self.journal is not None:
            await self.journal.close()
        if self.lease is not None:
            await self.lease.release()
        if self.kube is not None:
            await self.kube.close()

    async def _rebuild(self) -> None:
        """Follow the API server while the Lease is ours; all is listed anew each time it becomes ours.

        While it is not, somebody else may write placements, and what we know is no longer the whole truth.
        """
        assert self.lease is not None
        assert self.journal is not None
        while True:
            while not self.lease.held():
                await asyncio.sleep(LOOK_SECONDS)
            term = self.lease.term
            self.truth.rebuilt = False
            for watch in self.watches:
                watch.lists = 0
            self._rebuilt_in_term, self._rebuilt_at = term, self.clock()
            self.offers.keep_back_the_blind(until=self.clock() + self.settings.blind_seconds)
            found = await self._take(self.journal, term)
            await self.binder.stop_settling()  # a fence from before we took the journal is none
            followers = [asyncio.create_task(watch.run()) for watch in self.watches]
            adopting = asyncio.create_task(self._adopt(self.journal, found))
            try:
                while self._leads(term) and self.journal.taken:
                    if any(each.done() for each in followers) or _has_failed(adopting):
                        break
                    await asyncio.sleep(LOOK_SECONDS)
            finally:
                for follower in (adopting, *followers):
                    follower.cancel()
                ended = await asyncio.gather(adopting, *followers, return_exceptions=True)
            for error in ended:
                if isinstance(error, Exception):
                    raise error

    async def _take(self, journal: Journal, term: int) -> tuple[Intent, ...] | Unreadable:
        """Take the journal before anything is listed: what a former holder has begun is then known, and all it may
        still begin is in vain."""
        assert self.lease is not None
        while self._leads(term):
            try:
                found = await journal.take(first=self.lease.made and term == 1)
                self._no_journal = ""
                return found
            except KubeError as error:
                log.warning("the journal of binds cannot be taken: %s", error)
                self._no_journal = f" ({error})"
            await asyncio.sleep(TAKE_SECONDS)
        return ()

    async def _adopt(self, journal: Journal, found: tuple[Intent, ...] | Unreadable) -> None:
        """When the pods have been listed: hold what may still be bound, or make sure that nothing can be."""
        pods = self.watches[0]
        while not pods.lists:
            await asyncio.sleep(LOOK_SECONDS)
        if isinstance(found, Unreadable):
            log.warning("the journal of binds: %s; every pod that waits is fenced first", found.reason)
            self.binder.fence(self.truth.unbound())
            while self.binder.unfenced:
                await asyncio.sleep(LOOK_SECONDS)
        else:
            self.binder.adopt(found)
        self.handing.look_again()
        journal.adopted()

    def _planner(self) -> Planner:
        return Planner(
            ledger=self.ledger,
            offers=self.offers,
            inventory=self.inventory,
            truth=self.truth,
            schedule=self.schedule,
            policy=DEFAULT_POLICY,
            ready=lambda: not self.waiting_for(),
            made=self.metrics.plan_made,
            clock=self.clock,
            interval_seconds=self.settings.plan_interval_seconds,
            limit_seconds=self.settings.plan_limit_seconds,
            with_tables=self.settings.value_tables,
            with_forecast=self.settings.forecast,
        )

    def _leads(self, term: int) -> bool:
        assert self.lease is not None
        return self.lease.held() and self.lease.term == term

    def _current_term(self) -> int:
        return self.lease.term if self.lease is not None else 0

    def _stint(self) -> tuple[int, int]:
        """What is promised in one is not valid in the next: the Lease or the journal has been another's between."""
        return self._current_term(), self.journal.takes if self.journal is not None else 0

    def _watch(
        self,
        kube: Kube,
        resource: str,
        listed: Callable[[Items, float], Awaitable[None]],
        event: Callable[[Event], None],
    ) -> Watch:
        resync = self.settings.resync_seconds
        return Watch(kube, resource, listed=listed, event=event, clock=self.clock, resync_seconds=resync)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            self.broken = f"a background task has ended: {task.exception()}"
            log.critical("%s", self.broken, exc_info=task.exception())

    # -- readiness ------------------------------------------------------------------------------------

    def waiting_for(self) -> list[str]:
        """What must still happen before we may decide; empty when ready."""
        waits = [self.broken] if self.broken else []
        if self.lease is not None and not self.lease.held():
            holder = f" (held by {self.lease.holder})" if self.lease.holder else ""
            waits.append(f"the Lease {self.settings.namespace}/{self.settings.lease_name}{holder}")
        elif self._current_term() != self._rebuilt_in_term:
            waits.append("the rebuild after the Lease came back")
        waits += [f"the first list of {watch.resource}" for watch in self.watches if not watch.lists]
        if self.journal is not None and not self.journal.ready:
            unfenced = self.binder.unfenced
            which = f", and {unfenced} pods to be fenced" if unfenced else self._no_journal
            waits.append(f"the journal of binds {self.settings.lease_name}{SUFFIX}{which}")
        return waits

    def warnings(self) -> list[str]:
        """What an operator should know although we serve."""
        warnings = [f"the watch of {watch.resource} is interrupted" for watch in self.watches if watch.interrupted]
        if self._unmanaged:
            warnings.append(
                "profiles reported by agents but missing from the shipped managedResources, so pods asking for them "
                f"bypass Tangram: {_some(self._unmanaged)}"
            )
        twice = [f"{name}: {words}" for name in self.handing.with_overlaps() for words in self.handing.overlaps(name)]
        if twice:
            warnings.append(f"{len(twice)} devices are had by more than one pod: {_some(twice)}")
        if self.truth.unexplained:
            pods = [
                f"{pod.ref if (pod := self.truth.pods.get(uid)) else uid}: {wrong}"
                for uid, wrong in list(self.truth.unexplained.items())[:SHOWN]
            ]
            warnings.append(f"{len(self.truth.unexplained)} pods use devices in ways we cannot explain: {_some(pods)}")
        return warnings

    # -- agents ---------------------------------------------------------------------------------------

    def report(self, report: NodeReport, *, lasting: bool = False) -> bool:
        """Take an agent's full report (or one from an inventory file); False for one that came too late."""
        concerned = self._sharing(report.node)
        if not self.inventory.accept(report, now=self.clock(), lasting=lasting):
            return False
        for node in concerned | self._sharing(report.node):
            self.offers.touch(node)
        reported = {resource_of_profile(profile) for profile in profiles_in(report)}
        self._unmanaged = tuple(sorted({*self._unmanaged, *(reported - self._managed)}))
        self.offers.touch(report.node)
        self.truth.learn(report.node)
        self.truth.settle_on(report.node)
        self.truth.made_room(report.node)
        self.orders.reported(report)
        self._order(most=AT_ONCE)
        return True

    def _order(self, *, most: int | None = None) -> bool:
        """Follow what was handed on changed nodes, and make their lists anew; what changed before we were ready is
        kept until then. Of so many nodes at most, the latest first; whether there are more."""
        if self.waiting_for():
            return False
        self.offers.refresh(now=self.clock())
        self._changed |= dict.fromkeys(self.offers.drain_looked_at())
        count = len(self._changed) if most is None else min(most, len(self._changed))
        changed = {self._changed.popitem()[0] for _ in range(count)}
        self.handing.refresh(changed)
        self.offers.refresh(now=self.clock())
        self.orders.refresh(changed | self.offers.drain_looked_at())
        return bool(self._changed)

    def _sharing(self, name: str) -> set[str]:
        """The nodes that report some GPU of this node as theirs (after a renaming, say)."""
        entry = self.inventory.get(name)
        return {home for gpu in (entry.report.gpus if entry else ()) for home in self.inventory.homes(gpu.uuid)}

    def beat(self, unchanged: Unchanged) -> bool:
        """An agent has nothing new; False asks for the full report."""
        known = self.inventory.beat(unchanged, now=self.clock())
        if known:
            self.truth.settle_on(unchanged.node)
        return known

    def release(self, uid: str) -> bool:
        """Standalone: the pod is gone."""
        if self.kube is not None:
            raise BadInput("pods are deleted on the API server, not here")
        known = self.ledger.get(uid) is not None or uid in self.truth.pods
        self.truth.dismiss(uid)
        self.ledger.release(uid)
        return known

    # -- the API server's word ------------------------------------------------------------------------

    async def _pods_listed(self, items: Items, asked_at: float) -> None:
        listed = set()
        async for item in items:
            listed.add(self.truth.pod_listed(item))
            if self.truth.rebuilt:
                self.offers.refresh(now=self.clock(), most=1)
        async for _ in in_turns(self.truth.pods_are(listed, asked_at=asked_at)):
            pass
        await self._refresh()

    async def _refresh(self) -> None:
        """Bring the rows of many changed nodes up to date."""
        turns = Turns()
        while self.offers.refresh(now=self.clock(), most=1):
            await turns.over()
        while not self.offers.catch_up(turns.lasts):
            await turns.over()

    def _pod_event(self, event: Event) -> None:
        if event.type == "DELETED":
            self.truth.pod_gone(event.object["metadata"]["uid"], readable(event.object))
        else:
            self.truth.json_seen(event.object)

    async def _nodes_listed(self, items: Items, asked_at: float) -> None:
        names = set()
        async for item in items:
            names.add(item["metadata"]["name"])
            self._node_gives(item)
        for name in names - self.truth.nodes:
            self.offers.unbar(name)
        async for name in in_turns(self.truth.nodes_listed(names)):
            self._node_left(name)
        await self._refresh()

    def _node_event(self, event: Event) -> None:
        name = event.object["metadata"]["name"]
        if event.type == "DELETED":
            self.truth.nodes.discard(name)
            self._node_left(name)
            return
        self._node_gives(event.object)
        if name not in self.truth.nodes:
            self.truth.nodes.add(name)
            self.offers.unbar(name)

    def _node_left(self, name: str) -> None:
        """Who cuts its boards goes on as long as its agent reports: only the Node object has gone, and its labels."""
        self.offers.bar(name, "the API server has no such node")
        self.hosts.node_gives(name, None)
        self.inventory.runs(name, {})
        if self.inventory.get(name) is None:
            self.inventory.owned(name, Ownership())

    def _node_gives(self, node: Json) -> None:
        name = node["metadata"]["name"]
        if self.inventory.owned(name, Ownership(*mig_owner_of(node))):
            self.offers.touch(name)
            self.truth.made_room(name)
        self.inventory.runs(name, versions_of(node))
        given = allocatable_of(node)
        self.hosts.node_gives(name, None if given is None else Amount(*given))

    # -- chores ---------------------------------------------------------------------------------------

    async def _do_chores(self) -> None:
        while True:
            now = self.clock()
            self.costs.look()
            self.ledger.expire(before=now - self.settings.proposal_seconds)
            async for _ in in_turns(self.truth.settle()):
                pass
            async for name in in_turns(list(self.inventory)):
                for back in self.offers.sweep([name], now=now):
                    self.truth.made_room(back)
                self.offers.refresh(now=now, most=1)  # else whoever asks next does all of it
            for name in self.refusals.sweep():
                self.truth.made_room(name)
            await self._refresh()
            if not self.waiting_for():
                await self._order_all()
                async for name in in_turns(self.orders.due()):
                    self.orders.refresh([name])
                if self.settings.mig_modes:
                    self.modes.sweep()
                self.binder.settle_orphans()
                if self.journal is not None:
                    self.journal.tidy()
                self._forget_gone_nodes(now)
            await asyncio.sleep(CHORES_SECONDS)

    async def _order_all(self) -> None:
        """All that have changed until now."""
        turns = Turns()
        for _ in range(len(self.inventory)):
            if not self._order(most=1):
                return
            await turns.over()

    def _forget_gone_nodes(self, now: float) -> None:
        """Nodes that the API server does not have, and whose agents have been silent for long, are no more."""
        if self.kube is None:
            return
        for name in [name for name in self.inventory if name not in self.truth.nodes]:
            if self.inventory.silent_for(name, now=now) > GONE_AFTER_STALE * self.settings.stale_seconds:
                shared = self._sharing(name)
                self.inventory.drop(name)
                self.inventory.owned(name, Ownership())
                self.offers.forget(name)
                self.orders.forget(name)
                self.handing.forget(name)
                for other in shared - {name}:
                    self.offers.touch(other)

    async def _wake(self, kube: Kube) -> None:
        """Touch one node where room was made, at most once in `wake_seconds` for the whole cluster.

        One touch makes kube-scheduler look at every pod again that an extender has refused.
        """
        while True:
            await asyncio.sleep(self.settings.wake_seconds)
            room = self.truth.chores.room
            if not room or self.waiting_for():
                continue
            nodes = sorted(room & self.truth.nodes) or sorted(self.truth.nodes)[:1]
            room.clear()
            if not nodes or not (self.truth.waiting or self._others_may_wait()):
                continue
            self.offers.refresh(now=self.clock())
            try:
                await kube.annotate_node(nodes[0], {WAKE_ANNOTATION: datetime.now(UTC).isoformat()})
                self.metrics.wakes.inc()
            except KubeError as error:
                log.warning("cannot touch node %s to wake refused pods: %s", nodes[0], error)
                room.update(nodes)

    async def _name_slices(self, kube: Kube) -> None:
        """Write the UUIDs of slices that were made again (after a reboot, say) to the pods that hold them."""
        while True:
            await asyncio.sleep(self.settings.wake_seconds)
            if self.waiting_for():
                continue
            async for of_node in in_turns(self.truth.misnamed()):
                for ref, placement in of_node:
                    await self._name_slices_of(kube, ref, placement)

    async def _name_slices_of(self, kube: Kube, ref: PodRef, placement: Written) -> None:
        """Only for the version of the pod that says so: its devices may be exchanged meanwhile."""
        pod, hold = self.truth.pods.get(ref.uid), self.ledger.get(ref.uid)
        same = hold is not None and set(hold.devices) == set(placement.devices)
        if pod is None or pod.written != placement or not same:
            return
        text = write_placement(ref.uid, placement.node, placement.devices, self._uuids_on(placement.node))
        try:
            await kube.annotate_pod(
                ref.namespace,
                ref.name,
                {PLACEMENT_ANNOTATION: text},
                uid=ref.uid,
                resource_version=pod.resource_version,
                timeout=RENAME_SECONDS,
            )
            log.info("%s has new MIG devices: %s", ref, text)
        except KubeError as error:
            log.warning("cannot write the new MIG devices of %s: %s", ref, error)

    async def _write_placements(self) -> None:
        """Write the placements of pods that were given other devices, until their annotations say so."""
        while True:
            await asyncio.sleep(self.settings.wake_seconds)
            await self.handing.write_all()

    async def _tell_refusals(self, kube: Kube) -> None:
        """Say on pods that their kubelet refused why that was, in an Event."""
        while True:
            await asyncio.sleep(self.settings.wake_seconds)
            refused = self.truth.chores.refused
            if self.waiting_for():
                continue
            while refused:
                pod, words = refused.popitem()
                self.events.tell(pod, reason="KubeletRefused", action="Admitting", words=words)
            await self.events.write(kube)

    def _uuids_on(self, name: str) -> Mapping[Device, str]:
        entry = self.inventory.get(name)
        return entry.uuids if entry is not None else {}

    def _others_may_wait(self) -> bool:
        """Whether pods may wait that were refused before our time, and that we therefore do not know."""
        return self.clock() - self._rebuilt_at < UNKNOWN_WAITERS_SECONDS

    def _gauges(self) -> Iterable[tuple[str, str, dict[str, float]]]:
        phases: dict[str, float] = dict(self.views.phases())
        yield "tangram_pods", "Pods by phase", phases
        offered = len(self.inventory) - sum(1 for name in self.inventory if self.offers.fault(name))
        nodes = {"offered": float(offered), "kept_back": float(len(self.inventory) - offered)}
        yield "tangram_nodes", "Nodes with a report", nodes
        yield (
            "tangram_unexplained_pods",
            "Pods whose devices we cannot explain",
            {"now": len(self.truth.unexplained)},
        )
        yield (
            "tangram_unmanaged_profiles",
            "Profiles missing from managedResources",
            {"now": len(self._unmanaged)},
        )
        schedule = self.schedule
        binds: dict[str, float] = {
            "followed": schedule.followed,
            "aside": schedule.aside,
            "unplanned": schedule.unplanned,
        }
        yield "tangram_planned_binds", "Pods assumed where the plan had their like, elsewhere, or without one", binds
        plan = schedule.plan
        if plan is not None:
            pods: dict[str, float] = {"planned": sum(each.placed for each in plan.planned)}
            pods["unplaced"] = sum(each.unplaced for each in plan.planned)
            yield "tangram_plan_pods", "Pods in the latest plan", pods
            if plan.gap is not None:
                yield "tangram_plan_gap", "How far the latest plan may be from the best", {"now": plan.gap}
        if self.planner is not None:
            yield "tangram_planner_starts", "Times the planning process was started", {"total": self.planner.starts}
            yield "tangram_value_tables", "Geometries with a value table", {"now": len(self.planner.tables)}
        yield "tangram_orders", "What agents are told to change and have not yet", self.orders.counts()
        yield "tangram_orders_failed", "Orders that agents could not carry out", {"total": self.orders.failed_count}
        differ = self.handing.differences()
        yield "tangram_devices_differ", "Where what containers have is not what is counted or promised", differ
        yield (
            "tangram_devices_followed",
            "Times the ledger followed what a container really had",
            {"total": float(self.handing.followed)},
        )
        refusals = {"total": float(self.refusals.count)}
        if self.journal is not None:
            written = {"declared": float(self.journal.declared), "writes": float(self.journal.writes)}
            yield "tangram_journal", "Binds declared in the journal, and the writes that this took", written
        yield "tangram_kubelet_refusals", "Pods that their kubelet refused to run", refusals
        yield "tangram_ready", "1 when ready", {"now": float(not self.waiting_for())}
        yield (
            "tangram_rows_updated",
            "Times a node's rows were made anew",
            {"total": float(self.offers.updated)},
        )


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _some(words: Iterable[str]) -> str:
    listed = list(words)
    return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
