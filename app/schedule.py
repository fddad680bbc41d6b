"""What is left of the latest joint plan: of each demand, on which nodes how many are still to come.

    plan ──adopt()──▶ left ──nodes_for()──▶ prioritize ranks those nodes first
                       ▲
                     use(): a pod was assumed there (since begin() also while the plan was made)

A plan is made on a snapshot and is old when it comes. So it only ranks: no node is refused because of it, and
what was assumed while it was in the making has used up its part already. No I/O, no clock.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from solver import Demand

NOWHERE: Mapping[str, int] = {}


class Planned(NamedTuple):
    """What a plan says of all pending pods with one demand and one priority.

    `on` is how many go to which node, `unplaced` how many nowhere, and `reason` why in words. `prices` is what
    those that are placed cost together, by goal in milli-GPU.
    """

    demand: Demand
    priority: int
    on: tuple[tuple[str, int], ...]
    unplaced: int = 0
    reason: str = ""
    prices: tuple[tuple[str, int], ...] = ()

    @property
    def placed(self) -> int:
        """How many have a place."""
        return sum(count for _, count in self.on)


@dataclass(frozen=True, slots=True)
class JointPlan:
    """A finished plan. `gap` is how far it may be from the best, None where that is not known.

    `solving_seconds` is what the solver took; `bound` and `cost` are the solver's own numbers (`solver.plan`).
    """

    status: str
    cost: int
    bound: int
    gap: float | None
    solving_seconds: float
    planned: tuple[Planned, ...] = field(repr=False)


class Schedule:
    """The latest plan, used up as pods are assumed. `followed`, `aside` and `unplanned` count what pods did."""

    def __init__(self) -> None:
        self.plan: JointPlan | None = None
        self.followed = 0
        """Pods that were assumed on a node that the plan had for their like."""
        self.aside = 0
        """Pods that were assumed elsewhere than their like were planned."""
        self.unplanned = 0
        """Pods of whose like no plan had any left."""
        self._left: dict[Demand, dict[str, int]] = {}
        self._meanwhile: list[tuple[Demand, str]] | None = None
        """What was assumed since a plan began to be made; None while none is."""

    def begin(self) -> None:
        """A plan is being made of things as they are now."""
        self._meanwhile = []

    def end(self) -> None:
        """None is being made any more, whether one was adopted or not."""
        self._meanwhile = None

    def adopt(self, plan: JointPlan) -> None:
        """It is made; what was assumed since `begin` has its part already."""
        self.plan = plan
        self._left = {}
        for planned in plan.planned:
            left = self._left.setdefault(planned.demand, {})
            for node, count in planned.on:
                left[node] = left.get(node, 0) + count
        for demand, node in self._meanwhile or ():
            self._take(demand, node)

    def clear(self) -> None:
        """Nothing is pending any more: what is left of the plan was for pods that are gone."""
        self._left = {}

    def nodes_for(self, demand: Demand) -> Mapping[str, int]:
        """The nodes that the plan still has this demand on, with how many."""
        return self._left.get(demand, NOWHERE)

    def use(self, demand: Demand, node: str) -> None:
        """A pod with this demand was assumed on the node."""
        if self._meanwhile is not None:
            self._meanwhile.append((demand, node))
        if demand not in self._left:
            self.unplanned += 1
        elif self._take(demand, node):
            self.followed += 1
        else:
            self.aside += 1

    def _take(self, demand: Demand, node: str) -> bool:
        left = self._left.get(demand, {})
        if not left.get(node):
            return False
        left[node] -= 1
        if not left[node]:
            del left[node]
        if not left:
            del self._left[demand]
        return True
