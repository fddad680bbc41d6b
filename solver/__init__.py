"""Where GPU and MIG demands go: a pure library, exact and checked.

    Node + taken ──read──▶ Room ──▶ states (Whole, Cut) ──steps──▶ Step ──GOALS, Policy──▶ price
                                                                            │  (one definition of good)
          one pod, now:          Ranking.put / prices / best / refusal ◀────┤
          all that is pending:   solve(Problem) ──▶ Plan ◀──────────────────┘
          afterwards:            verify(Problem, Plan) ──▶ what is wrong with it (nothing)

Standard library, numpy and OR-Tools only. No I/O, no clock, no Kubernetes. All prices are whole milli-GPU.
`solve` is in `solver.flow`, which loads OR-Tools; it is not imported here, so that a process that only ranks
does not pay for it.
"""

from solver.cluster import Device, Gpu, Node, Snapshot
from solver.demand import Ask, Demand, Problem
from solver.fits import CHECKS, Refusal
from solver.geometry import Geometry, Profile, Slice
from solver.goals import DEFAULT_POLICY, GOALS, Policy
from solver.plan import Placement, Plan, Status, Unplaced
from solver.products import PRODUCTS
from solver.rank import Ranking, price, quote
from solver.samples import parse_samples, sample_node
from solver.verify import legal_step_exists, verify

__all__ = [
    "CHECKS",
    "DEFAULT_POLICY",
    "GOALS",
    "PRODUCTS",
    "Ask",
    "Demand",
    "Device",
    "Geometry",
    "Gpu",
    "Node",
    "Placement",
    "Plan",
    "Policy",
    "Problem",
    "Profile",
    "Ranking",
    "Refusal",
    "Slice",
    "Snapshot",
    "Status",
    "Unplaced",
    "legal_step_exists",
    "parse_samples",
    "price",
    "quote",
    "sample_node",
    "verify",
]
