"""The story of one pod up to its bind: filter, prioritize, preempt. Bind is in `binder`.

All of it is dictionary work on the event loop. Every verb may be called twice, in any order, and for pods that
are never heard of again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from heapq import merge
from itertools import chain, groupby, islice
from operator import itemgetter

from app.ledger import Hold, Ledger
from app.loop import Turns
from app.offers import Offers, head, in_brief
from app.refusals import Refusals
from app.schedule import Schedule
from app.settings import Settings
from app.translate import Json, Malformed, Pod, has_preferences, pod_of
from app.truth import Truth
from app.wire import Args, Filtered, Left, PreemptArgs, Scored, Victims
from solver import Demand, Placement, Refusal
from solver.prices import Prices

RANK_STEP = 1000  # ×10 by kube-scheduler: one rank outweighs all in-tree scores together (about 1,400)
FEW = 4  # asked about fewer than this part of the nodes that fit, those are sorted anew
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

    async def filter_in_turns(self, args: Args, *, trial: bool = False) -> Filtered:
        """The same as `filter`: what was never worked out before is, with turns for others in between."""
        go_on = self._until_deadline()
        while (result := self._filter(args, go_on=Turns().lasts, trial=trial)) is None:
            if not go_on():
                return self._too_late()
            await asyncio.sleep(0)
        return result

    def filter(self, args: Args, *, trial: bool = False) -> Filtered:
        """The nodes that fit, and why each of the others does not. A `trial` leaves no trace.

        Where more fit than the settings want in an answer it is the best of them, and nobody is told of the others:
        kube-scheduler reads reasons only where nothing fits.
        """
        return self._filter(args, go_on=self._until_deadline(), trial=trial) or self._too_late()

    def _too_late(self) -> Filtered:
        return Filtered(error=f"filter took longer than {self._settings.cycle_deadline_seconds} s; ask again")

    def _filter(self, args: Args, *, go_on: Callable[[], bool], trial: bool) -> Filtered | None:
        """None where `go_on()` ended it; asked again it gets further."""
        pod = self._pod(args.pod, trial=trial)
        if isinstance(pod, NotNow):
            return Filtered(error=pod.reason)
        if isinstance(pod.ask, Malformed):
            if not trial:
                self._truth.refused(pod, pod.ask.reason)
            return Filtered(left={Refusal(pod.ask.reason): args.names})
        if not pod.ask.takes_devices:
            return Filtered(args.names)
        hold = self._ledger.get(pod.ref.uid)
        if hold is not None and hold.firm:
            return _only(hold, args.names)
        prices = self._offers.prices(pod.ask, go_on)
        if prices is None:
            return None
        refused = self._refusals.on(pod.ask)
        most = self._settings.most_nodes
        if most and len(args.names) > most and not has_preferences(args.pod):
            asked = set(args.names)
            asked.difference_update(refused)
            fitting = self._best(pod, pod.ask, prices, asked, most)
            left: Left | None = {}
        else:
            fitting = [name for name in args.names if name in prices.by_name and name not in refused]
            left = None
        if not fitting or left is None:
            left = self._left_out(pod.ask, args.names, set(fitting), refused, go_on)
            if left is None:
                return None
        if not trial:
            self._note(pod, pod.ask, args.names, fitting, left)
        return Filtered(fitting, left)

    def _note(self, pod: Pod, demand: Demand, names: Sequence[str], fitting: Sequence[str], left: Left) -> None:
        """What follows from an answer: a promise where it leaves no choice, or a pod that waits."""
        if len(fitting) == 1:
            self._propose(pod, demand, fitting[0])
        if fitting:
            self._truth.fits(pod.ref.uid)
        else:
            self._truth.refused(pod, self._summary(demand, left))
            self._truth.refused_on_all(demand, names)

    def _summary(self, demand: Demand, left: Left) -> str:
        """Why no node fits, in one line: first the reasons that room would mend, then the frequent ones."""
        if not left:
            return "kube-scheduler offered no node"
        counted: Counter[Refusal] = Counter()
        for why, names in left.items():
            counted[in_brief(why)] += len(names)
        order = sorted(counted.items(), key=lambda each: (not each[0].resolvable, -each[1]))
        parts = [f"{count} node{'s' if count != 1 else ''}: {why.reason}" for why, count in order[:REASONS_KEPT]]
        more = len(order) - REASONS_KEPT
        nearest = next(names[0] for why, names in left.items() if why.resolvable == order[0][0].resolvable)
        detail = self._why_not(demand, nearest, self._refusals.on(demand)).reason
        example = f" (on {nearest}: {detail})" if detail != head(detail) else ""
        return "; ".join(parts) + (f"; and {more} other reasons" if more > 0 else "") + example

    def _left_out(
        self,
        demand: Demand,
        names: Sequence[str],
        fits: set[str],
        refused: Mapping[str, str],
        go_on: Callable[[], bool],
    ) -> Left | None:
        """Why each of the others does not fit; None where that would take too long."""
        others = [name for name in names if name not in fits] if fits else names
        left: dict[Refusal, list[str]] = {}
        if len(others) <= DETAILED_NODES:
            for name in others:
                left.setdefault(self._why_not(demand, name, refused), []).append(name)
            return left
        shut_out = [name for name in others if name not in refused] if refused else others
        if not self._offers.learn_briefs(demand, shut_out, go_on):
            return None
        briefs = self._offers.briefs(demand)
        for name in others:
            why = in_brief(self._why_not(demand, name, refused)) if name in refused else briefs.get(name)
            why = why or self._offers.brief_refusal(demand, name)
            if why in left:
                left[why].append(name)
            else:
                left[why] = [name]
        return left

    def _why_not(self, demand: Demand, name: str, refused: Mapping[str, str]) -> Refusal:
        """Why this node does not fit. Where its kubelet has refused the like, room that is made may mend it."""
        if name in refused and not self._offers.fault(name):
            return Refusal(refused[name], resolvable=True)
        return self._offers.refusal(demand, name)

    # -- the order of nodes ---------------------------------------------------------------------------

    def _best(self, pod: Pod, demand: Demand, prices: Prices, asked: set[str], most: int) -> list[str]:
        """The best of the nodes: what others have been promised only where there is too little else."""
        best: list[str] = []
        for _, names in self._ranked(pod, demand, prices, asked, to_the_end=False):
            if most == 1:
                return [min(names)]  # what prioritize, which is not asked then, would choose
            best.extend(islice(names, most - len(best)))
            if len(best) >= most:
                break
        return best

    def _ranked(
        self, pod: Pod, demand: Demand, prices: Prices, asked: set[str], *, to_the_end: bool
    ) -> Iterator[tuple[int, Collection[str]]]:
        """The nodes that fit, the best first and equal ones together, each lot with its price.

        `to_the_end`: whether all lots will be wanted; the first few are had without a look at every node.

        Nodes on which the joint plan has a pod like this come first, those where it would need what is softly
        promised to others last; each in the order of their prices.
        """
        by_name = prices.by_name
        soft = self._offers.soft_prices(demand, by_name, asked, uid=pod.ref.uid)
        planned = {name for name in self._schedule.nodes_for(demand) if name in asked and name in by_name}
        promised = {name: by_name[name] for name, price in soft.items() if price is None}
        softly = {name: price for name, price in soft.items() if price is not None}
        special = planned | soft.keys()
        yield from _by_price({name: softly.get(name, by_name[name]) for name in planned if name not in promised})
        others = _by_price({name: price for name, price in softly.items() if name not in planned})
        if to_the_end and FEW * len(asked) < len(by_name):
            prices = Prices({name: by_name[name] for name in sorted(asked & by_name.keys())})
        all_asked = to_the_end and len(asked) >= len(prices.by_name) and prices.by_name.keys() <= asked
        yield from _merged(_among(prices, None if all_asked else asked, special), others)
        yield from _by_price(promised)

    # -- prioritize -----------------------------------------------------------------------------------

    def prioritize(self, args: Args, *, trial: bool = False) -> Scored:
        """Scores: 1000 × the rank of a node (the best highest), plus 1 for our first choice among the best."""
        pod = self._pod(args.pod, trial=trial)
        if isinstance(pod, NotNow) or isinstance(pod.ask, Malformed) or not pod.ask.takes_devices:
            return Scored()
        prices = self._offers.prices(pod.ask, self._until_deadline())
        if prices is None:
            return Scored()
        ranked = list(self._ranked(pod, pod.ask, prices, set(args.names), to_the_end=True))
        if not ranked:
            return Scored()
        choice = min(ranked[0][1])
        if not trial:
            self._propose(pod, pod.ask, choice)
        return Scored([(RANK_STEP * (len(ranked) - rank), lot) for rank, (_, lot) in enumerate(ranked)], choice)

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

    def _pod(self, json: Json, *, trial: bool = False) -> Pod | NotNow:
        """The pod of a request, with everything brought up to date for it."""
        waiting_for = self._waiting_for()
        if waiting_for:
            return NotNow(f"Tangram is not ready: waiting for {', '.join(waiting_for)}")
        try:
            pod = (None if self._standalone else self._truth.known(json)) or pod_of(json)
        except (ValueError, TypeError, AttributeError) as error:
            return NotNow(f"the pod cannot be read: {error}")
        now = self._clock()
        self._ledger.expire(before=now - self._settings.proposal_seconds)
        self._offers.refresh(now=now)
        if trial:
            return pod
        self._truth.asked_about(pod)
        if self._standalone:
            self._truth.remember(pod)
        return pod


def _by_price(prices: Mapping[str, int]) -> Iterator[tuple[int, Collection[str]]]:
    """These nodes, the cheapest first and equal ones together."""
    return Prices(prices).cheapest_first()


def _among(prices: Prices, asked: set[str] | None, but: Set[str]) -> Iterator[tuple[int, Collection[str]]]:
    """The same of all prices, for the nodes that are asked about (None: all) but for some."""
    for price, names in prices.cheapest_first():
        lot: Collection[str] = names if asked is None else list(filter(asked.__contains__, names))
        if but and not but.isdisjoint(lot):
            lot = [name for name in lot if name not in but]
        if lot:
            yield price, lot


def _merged(
    one: Iterable[tuple[int, Collection[str]]], other: Iterable[tuple[int, Collection[str]]]
) -> Iterator[tuple[int, Collection[str]]]:
    """Both in the order of price; what costs the same stands together."""
    for price, lots in groupby(merge(one, other, key=itemgetter(0)), key=itemgetter(0)):
        together = [lot for _, lot in lots]
        yield price, together[0] if len(together) == 1 else [*chain.from_iterable(together)]


def _only(hold: Hold, names: Sequence[str]) -> Filtered:
    """The answer for a pod whose devices are already taken: that node, and no other."""
    where = f"{hold.pod} already has devices on {hold.node} ({hold.phase.value})"
    others = [name for name in names if name != hold.node]
    return Filtered([hold.node] if hold.node in names else [], {Refusal(where): others} if others else {})
