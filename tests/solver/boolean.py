"""The plain model: one Boolean for each ask and each legal set of devices. Small worlds, goals with fixed prices."""

from collections.abc import Sequence

from ortools.sat.python import cp_model

from solver.cluster import GPU_MILLI, Device, Node, Taken, allocations, devices_of
from solver.demand import Demand, Problem
from solver.flow import question_of
from solver.goals import Policy
from tests.solver import brute


def least_tiers(problem: Problem, policy: Policy) -> list[int]:
    """The least of each tier, in order: the unplaced by priority, then the policy's.

    The policy's goals must have one price for a set of devices, whoever else comes. Guests are not looked at.
    """
    asked = question_of(problem, policy)
    model = cp_model.CpModel()
    takers: list[tuple[cp_model.IntVar, Node, Demand, tuple[Device, ...]]] = []
    unplaced: list[list[tuple[cp_model.IntVar, int]]] = [[] for _ in asked.priorities]
    for ask in problem.asks:
        mine = []
        for node in problem.snapshot.nodes:
            taken = problem.snapshot.taken.get(node.name, ())
            for devices in brute.placements(node, taken, ask.demand):
                mine.append(model.new_bool_var(""))
                takers.append((mine[-1], node, ask.demand, devices))
        left = model.new_bool_var("")
        model.add_exactly_one([*mine, left])
        tier = unplaced[asked.priorities.index(ask.priority)]
        tier.append((left, asked.worths[asked.number[ask.demand]]))
    for node in problem.snapshot.nodes:
        taken = problem.snapshot.taken.get(node.name, ())
        here = [(taker, demand, devices) for taker, on, demand, devices in takers if on is node]
        _nothing_is_taken_twice(model, node, taken, here)

    prices = [
        [
            (taker, brute.total(node, problem.snapshot.taken.get(node.name, ()), demand, devices, Policy("", (tier,))))
            for taker, node, demand, devices in takers
        ]
        for tier in policy.tiers
    ]
    found = []
    for terms in (*unplaced, *prices):
        goal = cp_model.LinearExpr.weighted_sum([variable for variable, _ in terms], [weight for _, weight in terms])
        model.minimize(goal)
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        assert solver.solve(model) == cp_model.OPTIMAL
        found.append(round(solver.objective_value))
        model.add(goal <= found[-1])
    return found


def _nothing_is_taken_twice(
    model: cp_model.CpModel,
    node: Node,
    taken: Sequence[Taken],
    here: Sequence[tuple[cp_model.IntVar, Demand, tuple[Device, ...]]],
) -> None:
    there = allocations(taken)
    held = devices_of(there)
    for total, used, wanted in (
        (node.cpu_milli, sum(each.cpu_milli for each in there), [demand.cpu_milli for _, demand, _ in here]),
        (node.memory_mib, sum(each.memory_mib for each in there), [demand.memory_mib for _, demand, _ in here]),
    ):
        if total is not None:
            model.add(
                sum(amount * taker for (taker, _, _), amount in zip(here, wanted, strict=True)) <= max(0, total - used)
            )
    for gpu in node.gpus:
        uses = [(taker, device) for taker, _, devices in here for device in devices if device.gpu == gpu.uuid]
        if gpu.geometry is None:
            free = GPU_MILLI - sum(device.milli or GPU_MILLI for device in held if device.gpu == gpu.uuid)
            model.add(sum((device.milli or GPU_MILLI) * taker for taker, device in uses) <= max(0, free))
            continue
        profiles = {profile.name: profile for profile in gpu.geometry.profiles}
        for unit in range(gpu.geometry.width):
            covering = [
                taker
                for taker, device in uses
                if device.slice
                and device.slice.start <= unit < device.slice.start + profiles[device.slice.profile].size
            ]
            model.add_at_most_one(covering)
        standing = {device.slice for device in held if device.gpu == gpu.uuid and device.slice} | set(gpu.instances)
        for name, most in (("compute", gpu.geometry.compute_slices), *gpu.geometry.engines):
            use = {
                key: profile.compute_slices if name == "compute" else dict(profile.engines).get(name, 0)
                for key, profile in profiles.items()
            }
            left = most - sum(use[each.profile] for each in standing)
            new = [(taker, use[d.slice.profile]) for taker, d in uses if d.slice and d.slice not in standing]
            model.add(sum(amount * taker for taker, amount in new) <= max(0, left))
