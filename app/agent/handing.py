"""Hands devices to containers when the kubelet asks: waits for what must be known first, and remembers what was handed.

    kubelet ── prefer, allocate ──▶ Handing ── who? what? ──▶ matching (decides; no I/O)
                                       ├── list() ──────────▶ the kubelet's PodResources
                                       ├── exchange ────────▶ the service, where the kubelet has taken others
                                       ├── gift() ──────────▶ what the container is given
                                       └── keep() ──────────▶ the file, before the answer
    feed ── placements() ──▶         agent's loop ── reported() ──▶         ── said() ──▶ report

The plugins' event loop calls `prefer` and `allocate`, one after the other; other threads everything else. What is known
is behind one lock, never held while something is waited for.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from app.agent.gift import CannotHand, Gift
from app.agent.kubelet.ids import MIB_PER_GIB, SHARE_RESOURCE, id_of
from app.agent.matching import (
    Ask,
    Devices,
    Give,
    Held,
    Listed,
    Match,
    Not,
    Scene,
    asks_beside,
    beside,
    blocked,
    by_name,
    counted_wrongly,
    decide,
    decide_whole,
    exchanged,
    in_first_seen_order,
    preferred,
    settle,
    who,
    with_uids,
)
from app.agent.record import RecordFile
from app.agent.service import ReportError
from app.report import DeviceAt, Exchange, ExchangeReply, Handed, NodeReport, Placements, PodAt

if TYPE_CHECKING:
    from app.agent.kubelet.pod_resources import PodHas  # which loads gRPC

log = logging.getLogger(__name__)

MOST_HANDED = 4096
"""As many as a report may name."""

ON_ITS_WAY_SECONDS = 10.0
"""How long a list that was made before an exchange may still arrive after it."""

SAME_CALL_SECONDS = 1.0
"""The kubelet asks for a preference and then allocates, at once."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long each thing may take, in seconds. The node's whole admission waits meanwhile."""

    name: float = 3.0
    """For the service to name a pod that the kubelet asks for, and for an unplaced pod's ids to become free."""
    room: float = 8.0
    """For placed devices that another pod still has: kubelet and service let go of a pod at different moments."""
    ready: float = 8.0
    """For a slice to be made and reported."""
    answer: float = 10.0
    """For an answer about an exchange that may have arrived."""
    reach: float = 2.0
    """For a service that cannot be reached at all, as while it is replaced; then the placement wins."""
    again: float = 0.5
    """Between attempts to ask for an exchange."""
    look: float = 0.2
    """Between looks at the kubelet's list."""


class Lists(Protocol):
    """The kubelet's PodResources."""

    async def list(self) -> Sequence[PodHas]:
        """Its pods and what their containers have. Raises where it is silent."""
        ...


class Gives(Protocol):
    """Turns devices into what the container is given (`gift.Giver`)."""

    @property
    def whole(self) -> bool:
        """Whether each answer must carry all devices of its container."""
        ...

    def gift(self, devices: Sequence[DeviceAt], report: NodeReport, *, memory_mib: int | None = None) -> Gift:
        """Raises `CannotHand` where a device is not there yet."""
        ...


@dataclass(frozen=True, slots=True)
class Said:
    """What the report says about handing; the very same object while nothing has changed."""

    hands: Literal["plugin", "observe"]
    none: str
    handed: tuple[Handed, ...]
    counts: Mapping[str, int]


def listed(pods: Iterable[PodHas]) -> Listed:
    """The kubelet's list, for looking things up."""
    return Listed(
        {(pod.namespace, pod.name): {container.name: container.devices for container in pod.containers} for pod in pods}
    )


class Handing:
    """Knows who was promised and handed what, and answers the kubelet (`kubelet.plugin.Hands`)."""

    def __init__(
        self,
        *,
        report: NodeReport,
        kubelet: Lists,
        giver: Gives,
        exchange: Callable[[Exchange], ExchangeReply],
        record: RecordFile,
        waits: Waits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kubelet = kubelet
        self._giver = giver
        self._exchange = exchange
        self._record = record
        self._changed: Callable[[], None] = lambda: None
        self._waits = waits or Waits()
        self._clock = clock
        self._lock = threading.Lock()
        self._news = _News()
        self._one_at_a_time = asyncio.Lock()
        recalled = record.recall()
        self._report = report
        self._placements = recalled.placements
        self._pods: tuple[PodAt, ...] = recalled.placements.pods if recalled.placements is not None else ()
        self._held = recalled.held
        self._granted: list[_Granted] = []
        self._refused = frozenset(recalled.refused)
        self._counts: Counter[str] = Counter()
        self._silent = ""
        self._preferred = _Preferred()
        self._promised: dict[tuple[str, str, str], Devices] = {}
        """What containers were told of resources that the kubelet has yet to ask for: by pod, container, resource."""
        self._unsaved = ""
        self._said: Said | None = None

    # ---- from other threads ----

    def call_when_changed(self, changed: Callable[[], None]) -> None:
        """It is called, from any thread, when the report has something new to say."""
        self._changed = changed

    def placements(self, placements: Placements) -> None:
        """The service's list, instead of the last one."""
        with self._lock:
            pods = in_first_seen_order(placements.pods, self._pods)
            self._granted = [one for one in self._granted if one.is_news_to(pods, self._clock())]
            for one in self._granted:
                pods = exchanged(pods, one.uid, one.give, one.take)
            self._pods = pods
            self._placements = placements
            held = with_uids(self._held, pods)
            named = held != self._held
            if named:
                self._held, self._said = held, None
            self._refused &= {pod.uid for pod in pods}
            self._save()
        self._news.ring()
        if named:
            self._changed()

    @property
    def either(self) -> tuple[str, ...]:
        """GPUs that are to be offered in both forms."""
        placements = self._placements
        return placements.either if placements is not None else ()

    def reported(self, report: NodeReport) -> None:
        """What the agent has just read of its node."""
        if report is not self._report:
            self._report = report
            self._news.ring()

    def agree(self, kubelet: Listed | None, asked_at: float, silent: str = "") -> Scene:
        """Take note of what the kubelet lists (asked for at that time of the clock), and what is known then."""
        with self._lock:
            scene = Scene(self._report, self._pods, self._held, kubelet, self._refused)
            held = settle(scene, asked_at, self._clock()) if self._report.gpus else self._held
            fresh = held != self._held
            if fresh:
                self._count_moves(held)
                self._held = held
                self._save()
            fresh |= silent != self._silent
            self._silent = silent
            if fresh:
                self._said = None
        if fresh:
            self._changed()
        return replace(scene, held=held)

    def said(self) -> Said:
        """For the report: in a fixed order, so that nothing new is nothing new."""
        with self._lock:
            if self._said is None:
                handed = tuple(one.said() for one in self._held if one.name)[:MOST_HANDED]
                self._said = Said("plugin", self._silent, handed, dict(sorted(self._counts.items())))
            return self._said

    # ---- the kubelet asks ----

    async def prefer(
        self, resource: str, available: Sequence[str], must_include: Sequence[str], size: int
    ) -> Sequence[str]:
        """The ids that it should take: those of the placement."""
        async with self._one_at_a_time:
            scene, match, waited = await self._find(resource, size, ())
            self._preferred = _Preferred(resource, size, self._clock(), match is None, waited)
            promised = self._promised_to(match, resource)
            if promised is not None:
                return [id_ for id_ in map(id_of, promised) if id_ in available]
            return preferred(scene, match, resource, frozenset(available), must_include, size)

    async def allocate(self, resource: str, ids: Sequence[str]) -> Gift:
        """Hand out what is the container's, and remember it before the kubelet has the answer. Raises `CannotHand`."""
        async with self._one_at_a_time:
            _, match, waited = await self._find(resource, len(ids), ids)
            self._preferred = _Preferred()
            try:
                give = await self._choose(match, resource, ids)
                others = await self._beside(match, resource)
                gift = await self._gift(give, others.values(), resource, len(ids))
                self._hand(give, match, resource, ids, "waited" if waited and _is_new(match) else _rule(match))
            except CannotHand as error:
                self._refuse(match, resource, ids, str(error))
                raise
            self._promise(match, resource, others)
            return gift

    async def _beside(self, match: Match | None, resource: str) -> dict[str, Devices]:
        """What else must be in the answer, by resource. Raises `CannotHand` where too little was placed for it."""
        if match is None or not self._giver.whole or not asks_beside(match, resource):
            return {}
        others = beside(await self._look(), match, resource)
        for other, devices in others.items():
            others[other] = self._promised_to(match, other) or devices
            if not others[other]:
                raise CannotHand(f"{_pod_words(match)} asks for {other} too, and none is left that was placed for it")
        return others

    def _promised_to(self, match: Match | None, resource: str) -> Devices | None:
        return self._promised.get((match.pod.uid, match.container, resource)) if match is not None else None

    def _promise(self, match: Match | None, resource: str, others: Mapping[str, Devices]) -> None:
        if match is not None:
            self._promised.pop((match.pod.uid, match.container, resource), None)
            for other, devices in others.items():
                self._promised[match.pod.uid, match.container, other] = devices
            known = {pod.uid for pod in self._pods}
            self._promised = {key: devices for key, devices in self._promised.items() if key[0] in known}

    async def _find(self, resource: str, size: int, ids: Sequence[str]) -> tuple[Scene, Match | None, bool]:
        """Whose call it is, whether that had to be waited for. None: nobody's whom the service has named in time."""
        before = self._preferred
        same = (before.resource, before.size) == (resource, size) and self._clock() - before.at < SAME_CALL_SECONDS
        until = self._clock() + (0.0 if same and before.nobody else self._waits.name)
        waited = same and before.waited
        while True:
            seen = self._news.count
            scene = await self._look()
            late = self._clock() >= until
            match = who(scene, resource, size, ids, late=late)
            if match is not None or late:
                return scene, match, waited
            waited = True
            await self._news.wait(seen, min(self._waits.look, until - self._clock()))

    async def _look(self) -> Scene:
        asked_at = self._clock()
        try:
            pods = await self._kubelet.list()
        except Exception as error:  # KubeletSilent; whatever else, the kubelet is waiting
            return self.agree(None, asked_at, str(error)[:500] or type(error).__name__)
        return self.agree(listed(pods), asked_at)

    # ---- what is it to have? ----

    async def _choose(self, match: Match | None, resource: str, ids: Sequence[str]) -> Give:
        """Decide, and again when something has changed, until the devices can be had or the time is over."""
        placed = match is not None and bool(match.pod.devices)
        until = self._clock() + (self._waits.room if placed else self._waits.name)
        answers: dict[Ask, ExchangeReply | None] = {}
        by_exchange: Give | None = None
        while True:
            seen = self._news.count
            scene = await self._look()
            match = _as_known_now(match, scene)
            if self._giver.whole:
                choice = decide_whole(scene, match, resource, ids, self._promised_to(match, resource))
            else:
                choice = decide(scene, match, resource, ids)
            if isinstance(choice, Ask) and match is not None:
                if choice not in answers:
                    lost = counted_wrongly(scene, match, choice.take)
                    answers[choice] = None if lost else await self._ask(match, choice)
                reply = answers[choice]
                if reply is not None and reply.granted:
                    choice = by_exchange = choice.granted(swapped=bool(reply.swapped))
                else:
                    choice = choice.refused()
            if isinstance(choice, Give):
                if by_exchange is not None and set(choice.devices) == set(by_exchange.devices):
                    choice = by_exchange
                why = blocked(scene, match, choice.devices, ids, placed=placed)
                if not why:
                    return choice
            else:
                assert isinstance(choice, Not)
                why = choice.why
            if self._clock() >= until:
                raise CannotHand(why)
            await self._news.wait(seen, min(self._waits.look, until - self._clock()))

    async def _ask(self, match: Match, ask: Ask) -> ExchangeReply | None:
        """The service's answer; None where it was certainly not asked. Raises `CannotHand` where nobody knows."""
        asked = Exchange(node=self._report.node, uid=match.pod.uid, give=ask.give, take=ask.take)
        started, perhaps = self._clock(), False
        while True:
            try:
                reply = await asyncio.to_thread(self._exchange, asked)
            except ReportError as error:
                perhaps = perhaps or error.arrived
                waited = self._clock() - started
                if not perhaps and waited >= self._waits.reach:
                    log.warning("no exchange for %s/%s: %s", match.pod.namespace, match.pod.name, error)
                    return None
                if waited >= self._waits.answer:
                    raise CannotHand(f"whether it may have what the kubelet counts is not known: {error}") from error
            else:
                if reply.granted:
                    self._note(_Granted(match.pod.uid, ask.give, ask.take, self._clock()), reply)
                else:
                    log.info("no exchange for %s/%s: %s", match.pod.namespace, match.pod.name, reply.reason)
                return reply
            await asyncio.sleep(self._waits.again)

    def _note(self, granted: _Granted, reply: ExchangeReply) -> None:
        """The lists that come next may still be of before the exchange. Who got which of several is left to them."""
        with self._lock:
            moves = [granted]
            if len(reply.swapped) == 1:
                moves.append(replace(granted, uid=reply.swapped[0], give=granted.take, take=granted.give))
            for one in moves:
                self._pods = exchanged(self._pods, one.uid, one.give, one.take)
            self._granted += moves

    async def _gift(self, give: Give, others: Iterable[Devices], resource: str, size: int) -> Gift:
        """What the container is given, once all of it is there. What nobody has ordered is not waited for."""
        devices = give.devices
        for more in others:
            devices = tuple(sorted((*devices, *more), key=id_of))  # the same in each answer
        until = self._clock() + (self._waits.ready if give.how != "unplaced" else 0.0)
        memory_mib = size * MIB_PER_GIB if resource == SHARE_RESOURCE else None
        while True:
            seen = self._news.count
            try:
                return self._giver.gift(devices, self._report, memory_mib=memory_mib)
            except CannotHand:
                if self._clock() >= until:
                    raise
            await self._news.wait(seen, min(self._waits.look, until - self._clock()))

    def _hand(self, give: Give, match: Match | None, resource: str, ids: Sequence[str], rule: str) -> None:
        """Remember it, on the disk too. Raises `CannotHand` where that fails, or somebody was found to have it."""
        pod = match.pod if match is not None else None
        held = Held(
            uid=pod.uid if pod is not None else "",
            namespace=pod.namespace if pod is not None else "",
            name=pod.name if pod is not None else "",
            container=match.container if match is not None else "",
            resource=resource,
            devices=give.devices,
            ids=tuple(ids),
            how=give.how,
            again=match is not None and match.again is not None,
            since=self._clock(),
        )
        with self._lock:
            scene = Scene(self._report, self._pods, self._held)
            why = blocked(scene, match, give.devices, ids, placed=pod is not None and bool(pod.devices))
            if why:
                raise CannotHand(why)
            others = (one for one in self._held if not _is_followed_by(one, held))
            after = tuple(sorted((*others, held), key=by_name))
            try:
                self._record.keep(after, self._kept_placements(), self._refused - {held.uid})
            except OSError as error:
                raise CannotHand(f"what is handed out cannot be remembered: {error}") from error
            self._held = after
            self._refused -= {held.uid}
            self._counts[give.how] += 1
            self._counts[rule] += 1
            self._said = None
        log.info("%s: %s of %s, %s (%s)", _pod_words(match), _words(give.devices), resource, give.how, rule)
        self._changed()

    def _refuse(self, match: Match | None, resource: str, ids: Sequence[str], why: str) -> None:
        log.warning("%s: nothing of %s for %s: %s", _pod_words(match), resource, ", ".join(ids[:4]), why)
        with self._lock:
            self._counts["refused"] += 1
            if match is not None:
                self._refused |= {match.pod.uid}
                self._save()
            self._said = None
        self._changed()

    # ---- remembering (the lock is held) ----

    def _kept_placements(self) -> Placements | None:
        """The list as it is since the exchanges that it does not show."""
        return self._placements.model_copy(update={"pods": self._pods}) if self._placements is not None else None

    def _save(self) -> None:
        """For what is not handed out by it: a disk that is full is said once, and the agent goes on."""
        try:
            self._record.keep(self._held, self._kept_placements(), self._refused)
        except OSError as error:
            if str(error) != self._unsaved:
                log.warning("what is promised and handed out is not kept: %s", error)
            self._unsaved = str(error)
        else:
            self._unsaved = ""

    def _count_moves(self, held: tuple[Held, ...]) -> None:
        before: dict[tuple[str, tuple[str, ...]], list[Held]] = {}
        for one in self._held:  # of an init container and the one that follows it the ids may be the same
            before.setdefault((one.resource, one.ids), []).append(one)
        for one in held:
            known = before.get((one.resource, one.ids), [])
            if not known:
                log.info("%s/%s has %s by the kubelet's word", one.namespace, one.name, _words(one.devices))
                self._counts["observed"] += 1
            elif all(was.name and was.place != one.place for was in known):
                log.warning("%s is %s/%s's, not %s's", _words(one.devices), one.namespace, one.name, known[0].name)
                self._counts["moved"] += 1


@dataclass(frozen=True, slots=True)
class _Granted:
    """An exchange that the service has granted."""

    uid: str
    give: Devices
    take: Devices
    at: float

    def is_news_to(self, pods: Iterable[PodAt], now: float) -> bool:
        """Whether a list is of before it: it does not show it, and could have been on its way."""
        unseen = any(pod.uid == self.uid and not set(self.take) <= set(pod.devices) for pod in pods)
        return unseen and now - self.at < ON_ITS_WAY_SECONDS


@dataclass(frozen=True, slots=True)
class _Preferred:
    """The last preference that was asked for, when, and whether somebody was found and had to be waited for.

    The kubelet allocates right after it; what was waited for then need not be waited for again.
    """

    resource: str = ""
    size: int = 0
    at: float = 0.0
    nobody: bool = False
    waited: bool = False


class _News:
    """Wakes what waits in an event loop when another thread has something new."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self.count = 0

    def ring(self) -> None:
        """There is something new."""
        with self._lock:
            self.count += 1
            waiting, self._waiting = self._waiting, []
        for loop, event in waiting:
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    async def wait(self, seen: int, seconds: float) -> None:
        """Until there is something newer than was `seen`, or the time is over."""
        event = asyncio.Event()
        with self._lock:
            if self.count != seen:
                return
            self._waiting.append((asyncio.get_running_loop(), event))
        try:
            await asyncio.wait_for(event.wait(), max(0.0, seconds))
        except TimeoutError:
            with self._lock:
                self._waiting = [one for one in self._waiting if one[1] is not event]


def _as_known_now(match: Match | None, scene: Scene) -> Match | None:
    """A newer list may place the pod elsewhere."""
    for pod in scene.pods if match is not None else ():
        if match is not None and pod.uid == match.pod.uid:
            return replace(match, pod=pod)
    return match


def _is_followed_by(before: Held, now: Held) -> bool:
    """Whether a record is replaced by this one: of the same container, or (nobody's) of ids that are used again."""
    if now.name:
        return (before.uid, before.container, before.resource) == (now.uid, now.container, now.resource)
    return not before.name and before.resource == now.resource and not set(before.ids).isdisjoint(now.ids)


def _is_new(match: Match | None) -> bool:
    return match is not None and match.again is None


def _rule(match: Match | None) -> str:
    return match.rule if match is not None else "nobody"


def _pod_words(match: Match | None) -> str:
    return f"{match.pod.namespace}/{match.pod.name} ({match.container})" if match is not None else "a pod unknown here"


def _words(devices: Devices) -> str:
    return ", ".join(
        f"{one.gpu}:{one.milli}m" if one.milli else f"{one.gpu}/{one.profile}@{one.start}" if one.profile else one.gpu
        for one in devices
    )
