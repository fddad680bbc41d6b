"""The answer: where each ask goes and what it costs, or why it goes nowhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from solver.cluster import Device


class Status(Enum):
    """How a joint solve ended. OPTIMAL and INFEASIBLE are proofs; FEASIBLE is the best found so far."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Placement:
    """Exact devices on a node (sorted), with the price of the step by goal, in milli-GPU."""

    node: str
    devices: tuple[Device, ...]
    prices: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Unplaced:
    """Why an ask has no place in a plan."""

    reason: str


@dataclass(frozen=True, slots=True)
class Tier:
    """One tier of what was minimised: its value in the plan, and the least it could be with all tiers before it as
    they are proven. OPTIMAL: the two are equal; FEASIBLE: it could be better, down to `bound`; UNKNOWN: a tier
    before it was not proven, so that nothing was proven of this one.
    """

    name: str
    value: int
    bound: int
    status: Status


@dataclass(frozen=True, slots=True)
class Plan:
    """A joint plan. `cost` is its objective in one number, `bound` the best that is still possible.

    The tiers are the digits of `cost`, the first the most significant: what stays unplaced by priority (in
    milli-GPU of worth), then the policy's tiers. Costs compare between plans of one problem under one policy.
    `seconds` is the time that was spent in solvers; what a plan holds besides it depends on the problem alone.
    `outcomes` has one entry per ask of the problem, by ask id, in the problem's order.
    """

    status: Status
    outcomes: tuple[tuple[str, Placement | Unplaced], ...]
    cost: int
    bound: int
    tiers: tuple[Tier, ...] = ()
    seconds: float = field(default=0.0, compare=False)

    @property
    def gap(self) -> float:
        """How far the first tier that is not proven may be from its best, as a part of its value; 0.0: proven."""
        for tier in self.tiers:
            if tier.value > tier.bound:
                return (tier.value - tier.bound) / max(abs(tier.value), abs(tier.bound))
        return 0.0

    @property
    def placements(self) -> dict[str, Placement]:
        """The asks that were placed."""
        return {ask: outcome for ask, outcome in self.outcomes if isinstance(outcome, Placement)}

    @property
    def unplaced(self) -> dict[str, Unplaced]:
        """The asks that were not."""
        return {ask: outcome for ask, outcome in self.outcomes if isinstance(outcome, Unplaced)}
