"""CPU and memory of nodes: what they give to pods, and what pods that are bound there request.

kube-scheduler decides about CPU and memory; that they are known here makes prices and plans right. Fed by
`truth` with every pod that is seen, also those that ask for no GPU, and by the service with every node: a few
dictionary operations for each event. `drain_changes` names the nodes where something changed.
"""

from collections.abc import Container, Iterable, Iterator
from typing import NamedTuple


class Amount(NamedTuple):
    """CPU in thousandths, memory in MiB."""

    cpu_milli: int = 0
    memory_mib: int = 0

    def plus(self, other: "Amount") -> "Amount":
        """Both together."""
        return Amount(self.cpu_milli + other.cpu_milli, self.memory_mib + other.memory_mib)

    def minus(self, other: "Amount") -> "Amount":
        """What is left, never below nothing."""
        return Amount(max(0, self.cpu_milli - other.cpu_milli), max(0, self.memory_mib - other.memory_mib))


NONE = Amount()


class Hosts:
    """What every node gives, and what is requested on it, by pod."""

    def __init__(self) -> None:
        self._given: dict[str, Amount] = {}
        self._requested: dict[str, Amount] = {}
        self._pods: dict[str, tuple[str, Amount]] = {}
        self._changed: set[str] = set()

    def node_gives(self, node: str, amount: Amount | None) -> None:
        """A Node's allocatable; None where it has none or is gone."""
        if self._given.get(node) == amount:
            return
        if amount is None:
            del self._given[node]
        else:
            self._given[node] = amount
        self._changed.add(node)

    def pod_requests(self, uid: str, node: str, amount: Amount) -> None:
        """A pod is bound to this node (empty: to none, or it has ended) and requests so much."""
        before = self._pods.get(uid)
        now = (node, amount) if node and amount != NONE else None
        if before == now:
            return
        if before is not None:
            self._requested[before[0]] = self._requested[before[0]].minus(before[1])
            self._changed.add(before[0])
            del self._pods[uid]
        if now is not None:
            self._requested[node] = self._requested.get(node, NONE).plus(amount)
            self._changed.add(node)
            self._pods[uid] = now

    def pods_are(self, uids: Container[str]) -> Iterator[None]:
        """A list of all pods has come: no other pod requests anything. Step by step, to be done in turns."""
        for uid in list(self._pods):
            if uid not in uids:
                self.pod_requests(uid, "", NONE)
            yield

    def given_but_for(self, node: str, uids: Iterable[str]) -> Amount | None:
        """What the node gives, less what all pods but these request there; None where that is not known.

        `uids` are pods whose requests are counted elsewhere, in their holds.
        """
        given = self._given.get(node)
        if given is None:
            return None
        others = self._requested.get(node, NONE)
        for uid in uids:
            there, amount = self._pods.get(uid, ("", NONE))
            if there == node:
                others = others.minus(amount)
        return given.minus(others)

    def drain_changes(self) -> set[str]:
        """Nodes where something changed since the last call."""
        changed, self._changed = self._changed, set()
        return changed
