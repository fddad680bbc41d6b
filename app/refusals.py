"""Pods that a kubelet refused to run: where the like is not offered again for a while, and why. No I/O.

A refused pod is Failed for good, and the one that its controller makes instead would be refused again on the same node,
as long as kubelet and ledger do not agree there. So the node waits, for asks of the same kinds and counts, until its
agent has reported again and some time has passed; longer each time, until one is accepted.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from app.inventory import Inventory
from solver import Demand
from solver.demand import ANY_TERMS

LONGEST_SECONDS = 600.0
FORGOTTEN_SECONDS = 3600.0  # after this without another refusal the next one is a first one
MOST_KEPT = 10_000  # asks and nodes; then the oldest are forgotten
MOST_WORDS = 300  # of what a kubelet says: kube-scheduler puts the reasons of many nodes into one condition

EMPTY: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Refused:
    """The last time at which a kubelet refused such a pod: in whose words, when, and how long it is waited now."""

    words: str
    at: float
    seconds: float
    over: bool = False


class Refusals:
    """By kind of ask: the nodes that are not offered for it now."""

    def __init__(self, inventory: Inventory, *, clock: Callable[[], float], seconds: float) -> None:
        self._inventory = inventory
        self._clock = clock
        self._seconds = seconds
        self._by_ask: dict[Demand, dict[str, Refused]] = {}
        self.count = 0

    def refused(self, demand: Demand, node: str, words: str) -> None:
        """The kubelet of this node refused a pod that asks for this.

        Several that were under way together are one reason to wait, not several.
        """
        self.count += 1
        of_ask = self._by_ask.setdefault(_kinds_and_counts(demand), {})
        before = of_ask.pop(node, None)
        seconds = self._seconds
        if before is not None:
            seconds = min(LONGEST_SECONDS, 2 * before.seconds) if before.over else before.seconds
        of_ask[node] = Refused(words[:MOST_WORDS], self._clock(), seconds)
        self._forget_oldest()

    def accepted(self, demand: Demand, node: str) -> None:
        """The kubelet of this node has taken such a pod."""
        ask = _kinds_and_counts(demand)
        of_ask = self._by_ask.get(ask)
        if of_ask is not None and of_ask.pop(node, None) is not None and not of_ask:
            del self._by_ask[ask]

    def on(self, demand: Demand) -> Mapping[str, str]:
        """The nodes that are not offered for this ask now, each with the reason."""
        of_ask = self._by_ask.get(_kinds_and_counts(demand)) if self._by_ask else None
        if not of_ask:
            return EMPTY
        return {node: _why(refused) for node, refused in of_ask.items() if not self._is_over(node, refused)}

    def sweep(self) -> list[str]:
        """The nodes that are offered again for something since the last call."""
        now = self._clock()
        back = []
        for ask, node, refused in list(self._all()):
            if now >= refused.at + FORGOTTEN_SECONDS or self._inventory.get(node) is None:
                self.accepted(ask, node)
            elif not refused.over and self._is_over(node, refused):
                self._by_ask[ask][node] = replace(refused, over=True)
                back.append(node)
        return back

    def _is_over(self, node: str, refused: Refused) -> bool:
        entry = self._inventory.get(node)
        heard_since = entry is not None and (entry.lasting or entry.heard > refused.at)
        return refused.over or (heard_since and self._clock() >= refused.at + refused.seconds)

    def _all(self) -> Iterator[tuple[Demand, str, Refused]]:
        for ask, of_ask in self._by_ask.items():
            for node, refused in of_ask.items():
                yield ask, node, refused

    def _forget_oldest(self) -> None:
        while sum(map(len, self._by_ask.values())) > MOST_KEPT:
            ask, node, _ = min(self._all(), key=lambda each: each[2].at)
            self.accepted(ask, node)


def _why(refused: Refused) -> str:
    return (
        f"its kubelet has refused a pod with this ask: {refused.words}; offered for it again when its agent has "
        f"reported and {refused.seconds:g} s have passed"
    )


def _kinds_and_counts(demand: Demand) -> Demand:
    """What makes two asks alike to a kubelet: what its device plugins count."""
    return replace(demand, cpu_milli=0, memory_mib=0, terms=ANY_TERMS)
