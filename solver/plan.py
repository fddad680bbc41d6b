"""The answer: where each ask goes and what it costs, or why it goes nowhere."""

from __future__ import annotations

from dataclasses import dataclass
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
class Plan:
    """A joint plan. `cost` is its objective as the model counts it, `bound` the best that is still possible.

    `outcomes` has one entry per ask of the problem, by ask id, in the problem's order.
    """

    status: Status
    outcomes: tuple[tuple[str, Placement | Unplaced], ...]
    cost: int
    bound: int

    @property
    def placements(self) -> dict[str, Placement]:
        """The asks that were placed."""
        return {ask: outcome for ask, outcome in self.outcomes if isinstance(outcome, Placement)}

    @property
    def unplaced(self) -> dict[str, Unplaced]:
        """The asks that were not."""
        return {ask: outcome for ask, outcome in self.outcomes if isinstance(outcome, Unplaced)}
