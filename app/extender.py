"""The story of one pod up to its bind: filter, prioritize, preempt. Bind is in `binder`.

All of it is dictionary work on the event loop. Every verb may be called twice, in any order, and for pods that
are never heard of again.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from app.ledger import Hold, Ledger
from app.offers import Offers
from app.refusals import Refusals
from app.schedule import Schedule
from app.settings import Settings
from app.translate import Json, Malformed, Pod, pod_of
from app.truth import Truth
from app.wire import Args, Filtered, PreemptArgs, Victims
from solver import Demand, Placement, Refusal

RANK_STEP = 1000  # ×10 by kube-scheduler: one rank outweighs all in-tree scores together (about 1,400)
LOOK_EVERY = 512  # nodes between two looks at the clock
REASONS_KEPT = 3
DETAILED_NODES = 8  # with more nodes than this left out, kube-scheduler gets reasons without their details:
# it joins all that differ into the pod's condition, which at 5,000 nodes would be a megabyte


@dataclass(frozen=True, slots=True)
class NotNow:
    """We could not answer; kube-scheduler will ask again."""

    reason: str


class Extender:
    """kube-scheduler's verbs that look for a node."""

    def __init__(
        self,
        *,
        settings: Settings,
        ledger: Ledger,
        offers: Offers,
        refusals: Refusals,
        truth: Truth,
        schedule: Schedule,
        standalone: bool,
        waiting_for: Callable[[], list[str]],
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._offers = offers
        self._refusals = refusals
        self._truth = truth
        self._schedule = schedule
        self._standalone = standalone
        self._waiting_for = waiting_for
        self._clock = clock

    # -- filter ---------------------------------------------------------------------------------------

    def filter(self, args: Args) -> Filtered:
        """The nodes that fit, and why each of the others does not."""
        pod = self._pod(args.pod)
        if isinstance(pod, NotNow):
            return Filtered(error=pod.reason)
        if isinstance(pod.ask, Malformed):
            self._truth.refused(pod, pod.ask.reason)
            return Filtered(unresolvable=dict.fromkeys(args.names, pod.ask.reason))
        if not pod.ask.takes_devices:
            return Filtered(fitting=args.names)
        hold = self._ledger.get(pod.ref.uid)
        if hold is not None and hold.firm:
            return _only(hold, args.names)
        fitting = self._offers.fitting(pod.ask, args.names, self._until_deadline())
        if fitting is None:
            return Filtered(error=f"filter took longer than {self._settings.cycle_deadline_seconds} s; ask again")
        refused = self._refusals.on(pod.ask)
        if refused:
            fitting = [name for name in fitting if name not in refused]
        result = self._explained(pod.ask, args.names, fitting)
        if result.error:
            return result
        if len(fitting) == 1:
            self._propose(pod, pod.ask, fitting[0])
        if fitting:
            self._truth.fits(pod.ref.uid)
        else:
            self._truth.refused(pod, self._summary(pod.ask, result))
            self._truth.refused_on_all(pod.ask, args.names)
        return result

    def _summary(self, demand: Demand, result: Filtered) -> str:
        """Why no node fits, in one line: first the reasons that room would mend, then the frequent ones."""
        nearest = next(iter(result.failed), None) or next(iter(result.unresolvable), None)
        if nearest is None:
            return "kube-scheduler offered no node"
        counted: list[tuple[str, int]] = []
        for reasons in (result.failed, result.unresolvable):
            counted += Counter(head(reason) for reason in reasons.values()).most_common()
        parts = [f"{count} node{'s' if count != 1 else ''}: {reason}" for reason, count in counted[:REASONS_KEPT]]
        more = len(counted) - REASONS_KEPT
        detail = self._why_not(demand, nearest, self._refusals.on(demand)).reason
        example = f" (on {nearest}: {detail})" if detail != head(detail) else ""
        return "; ".join(parts) + (f"; and {more} other reasons" if more > 0 else "") + example

    def _explained(self, demand: Demand, names: Sequence[str], fitting: list[str]) -> Filtered:
        """A reason for every node that is left out, in the map that tells whether eviction could help."""
        fits = set(fitting)
        failed: dict[str, str] = {}
        unresolvable: dict[str, str] = {}
        go_on = self._until_deadline()
        brief = len(names) - len(fits) > DETAILED_NODES
        refused = self._refusals.on(demand)
        for position, name in enumerate(names):
            if name in fits:
                continue
            if position % LOOK_EVERY == 0 and not go_on():
                return Filtered(error=f"filter took longer than {self._settings.cycle_deadline_seconds} s")
            refusal = self._why_not(demand, name, refused)
            (failed if refusal.resolvable else unresolvable)[name] = head(refusal.reason) if brief else refusal.reason
        return Filtered(fitting, failed, unresolvable)

    def _why_not(self, demand: Demand, name: str, refused: Mapping[str, str]) -> Refusal:
        """Why this node does not fit. Where its kubelet has refused the like, room that is made may mend it."""
        if name in refused and not self._offers.fault(name):
            return Refusal(refused[name], resolvable=True)
        return self._offers.refusal(demand, name)

    # -- prioritize -----------------------------------------------------------------------------------

    def prioritize(self, args: Args) -> list[tuple[str, int]]:
        """Scores: 1000 × the rank of the price (the cheapest highest), plus 1 for our first choice.

        Nodes on which the joint plan has a pod like this come first, those where it would need what is softly
        promised to others last; each in the order of their prices.
        """
        pod = self._pod(args.pod)
        if isinstance(pod, NotNow) or isinstance(pod.ask, Malformed) or not pod.ask.takes_devices:
            return []
        priced = self._offers.priced(pod.ask, args.names, self._until_deadline(), uid=pod.ref.uid)
        planned = self._schedule.nodes_for(pod.ask)
        rest = {name: price for name, price in priced.free.items() if name not in planned}
        first = {name: priced.free[name] for name in planned if name in priced.free}
        scores: dict[str, int] = {}
        ranks = 0
        for prices in (priced.promised, rest, first):
            scores |= _scores(prices, first_rank=1 + ranks)
            ranks += len(set(prices.values()))
        if not scores:
            return []
        highest = max(scores.values())
        choice = min(name for name, score in scores.items() if score == highest)
        self._propose(pod, pod.ask, choice)
        scores[choice] += 1
        return list(scores.items())

    def _until_deadline(self) -> Callable[[], bool]:
        """Whether there is time left in this request: asked between two nodes."""
        latest = self._clock() + self._settings.cycle_deadline_seconds
        return lambda: self._clock() <= latest

    def _propose(self, pod: Pod, demand: Demand, node: str) -> None:
        best = self._offers.best(demand, node, uid=pod.ref.uid)
        if isinstance(best, Placement):
            self._ledger.propose(pod.ref, demand, best, now=self._clock())

    # -- preempt --------------------------------------------------------------------------------------

    def preempt(self, args: PreemptArgs) -> dict[str, Victims]:
        """The nodes where evicting those victims leads to a legal step; victims are never added."""
        pod = self._pod(args.pod)
        if isinstance(pod, NotNow) or isinstance(pod.ask, Malformed):
            return {}
        if not pod.ask.takes_devices:
            return dict(args.victims)
        demand = pod.ask
        refused = self._refusals.on(demand)
        return {
            node: victims
            for node, victims in args.victims.items()
            if node not in refused and self._offers.without(demand, node, victims.uids)
        }

    def _pod(self, json: Json) -> Pod | NotNow:
        """The pod of a request, with everything brought up to date for it."""
        waiting_for = self._waiting_for()
        if waiting_for:
            return NotNow(f"Tangram is not ready: waiting for {', '.join(waiting_for)}")
        try:
            pod = pod_of(json)
        except (ValueError, TypeError, AttributeError) as error:
            return NotNow(f"the pod cannot be read: {error}")
        now = self._clock()
        self._ledger.expire(before=now - self._settings.proposal_seconds)
        self._offers.refresh(now=now)
        self._truth.asked_about(pod)
        if self._standalone:
            self._truth.remember(pod)
        return pod


def head(reason: str) -> str:
    """A reason without its details, which come after a colon or a semicolon."""
    return re.split("[:;] ", reason, maxsplit=1)[0]


def _scores(prices: Mapping[str, int], *, first_rank: int) -> dict[str, int]:
    """1000 × the rank of each price, the highest price at `first_rank`; equal prices have one rank."""
    dearest_first = sorted(set(prices.values()), reverse=True)
    score = {price: RANK_STEP * rank for rank, price in enumerate(dearest_first, start=first_rank)}
    return {name: score[price] for name, price in prices.items()}


def _only(hold: Hold, names: Sequence[str]) -> Filtered:
    """The answer for a pod whose devices are already taken: that node, and no other."""
    where = f"{hold.pod} already has devices on {hold.node} ({hold.phase.value})"
    others = {name: where for name in names if name != hold.node}
    return Filtered([hold.node] if hold.node in names else [], {}, others)
