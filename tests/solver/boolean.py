"""The plain model: one Boolean for each ask and each legal set of devices. Small worlds, goals with fixed prices."""

from collections.abc import Sequence

from ortools.sat.python import cp_model

from solver.cluster import GPU_MILLI, Device, Gpu, Node, Taken, allocations, devices_of
from solver.demand import Demand, Problem
from solver.flow import question_of
from solver.geometry import Profile, Slice
from solver.goals import MAKE_MILLI, REMOVE_MILLI, Policy
from tests.solver import brute


def least_tiers(problem: Problem, policy: Policy) -> list[int]:
    """The least of each tier, in order: the unplaced by priority, then the policy's.

    The policy's goals must have one price for a set of devices, whoever else comes; but for `repartition`, where one
    Boolean for each idle instance says that it goes. Guests are not looked at.
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
    remade: list[tuple[cp_model.IntVar, int]] = []
    for node in problem.snapshot.nodes:
        taken = problem.snapshot.taken.get(node.name, ())
        here = [(taker, demand, devices) for taker, on, demand, devices in takers if on is node]
        _nothing_is_taken_twice(model, node, taken, here)
        remade += _what_is_made_and_removed(model, node, taken, here)

    prices = []
    for weights in policy.tiers:
        fixed = Policy("", (tuple((name, weight) for name, weight in weights if name != "repartition"),))
        terms = [
            (taker, brute.total(node, problem.snapshot.taken.get(node.name, ()), demand, devices, fixed))
            for taker, node, demand, devices in takers
        ]
        prices.append([*terms, *((v, milli * dict(weights).get("repartition", 0)) for v, milli in remade)])
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
        for unit in range(gpu.geometry.width):
            covering = [taker for taker, device in uses if device.slice and unit in _units(gpu, device.slice)]
            model.add_at_most_one(covering)
        standing = {device.slice for device in held if device.gpu == gpu.uuid and device.slice}
        for name in _capacities(gpu):
            new = [(taker, _use(gpu, d.slice, name)) for taker, d in uses if d.slice]
            left = _total(gpu, name) - sum(_use(gpu, each, name) for each in standing)
            model.add(sum(amount * taker for taker, amount in new) <= max(0, left))


def _what_is_made_and_removed(
    model: cp_model.CpModel,
    node: Node,
    taken: Sequence[Taken],
    here: Sequence[tuple[cp_model.IntVar, Demand, tuple[Device, ...]]],
) -> list[tuple[cp_model.IntVar, int]]:
    """The prices of slices made new, and of idle instances that go: one goes where a taker overlaps it, and where
    otherwise a capacity is exceeded. Those that have gone already for what is held are free.
    """
    prices: list[tuple[cp_model.IntVar, int]] = []
    for gpu in node.gpus:
        if gpu.geometry is None:
            continue
        held = {device.slice for device in devices_of(allocations(taken)) if device.gpu == gpu.uuid and device.slice}
        idle = sorted(set(gpu.instances) - held)
        uses = [(taker, d.slice) for taker, _, devices in here for d in devices if d.gpu == gpu.uuid and d.slice]
        prices += [(taker, MAKE_MILLI) for taker, slice_ in uses if slice_ not in idle]
        gone = {each: model.new_bool_var("") for each in idle}
        prices += [(v, REMOVE_MILLI) for v in gone.values()]
        before = brute.fewest_removed(gpu.geometry, frozenset(held), frozenset(idle))
        prices.append((model.new_constant(1), -REMOVE_MILLI * before))
        for each, v in gone.items():
            overlapping = [taker for taker, other in uses if other != each and _units(gpu, each) & _units(gpu, other)]
            if any(_units(gpu, each) & _units(gpu, other) for other in held):
                model.add(v == 1)
            for taker in overlapping:
                model.add_implication(taker, v)
        for name in _capacities(gpu):
            new = [(taker, _use(gpu, other, name)) for taker, other in uses if other not in idle]
            left = _total(gpu, name) - sum(_use(gpu, each, name) for each in held)
            stay = sum(_use(gpu, each, name) * (1 - v) for each, v in gone.items())
            model.add(stay + sum(amount * taker for taker, amount in new) <= max(0, left))
        for taker, other in uses:
            if other in gone:
                model.add_implication(taker, gone[other].negated())
    return prices


def _units(gpu: Gpu, slice_: Slice) -> set[int]:
    return set(range(slice_.start, slice_.start + _profile(gpu, slice_).size))


def _capacities(gpu: Gpu) -> list[str]:
    assert gpu.geometry is not None
    return ["compute", *dict(gpu.geometry.engines)]


def _total(gpu: Gpu, capacity: str) -> int:
    assert gpu.geometry is not None
    return gpu.geometry.compute_slices if capacity == "compute" else dict(gpu.geometry.engines)[capacity]


def _use(gpu: Gpu, slice_: Slice, capacity: str) -> int:
    profile = _profile(gpu, slice_)
    return profile.compute_slices if capacity == "compute" else dict(profile.engines).get(capacity, 0)


def _profile(gpu: Gpu, slice_: Slice) -> Profile:
    assert gpu.geometry is not None
    return next(each for each in gpu.geometry.profiles if each.name == slice_.profile)
