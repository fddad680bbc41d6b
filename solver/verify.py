"""Check a plan against its problem without solving: it knows cluster, geometry and prices, and no search.

Written as the specification. It shares no code with `steps`, `rank` and `flow`: what is free is counted here
again from the nodes themselves. An empty list means that nothing is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from solver.cluster import Device, Gpu, Node, Snapshot
from solver.demand import Demand, Problem
from solver.geometry import Geometry, Slice, faults
from solver.goals import GOALS
from solver.plan import Placement, Plan, Status


def verify(problem: Problem, plan: Plan) -> list[str]:
    """What is wrong with the plan, in words; empty if it is legal and costs what it says."""
    wrong = _outcomes(problem, plan)
    nodes = {node.name: node for node in problem.snapshot.nodes}
    demands = {ask.id: ask.demand for ask in problem.asks}
    given: dict[str, list[Device]] = {}
    for ask, placement in plan.placements.items():
        node = nodes.get(placement.node)
        if node is None:
            wrong.append(f"{ask}: there is no node {placement.node}")
            continue
        wrong += [f"{ask}: {words}" for words in _exactly_met(demands.get(ask, Demand()), placement)]
        given.setdefault(node.name, []).extend(placement.devices)
    for name, devices in given.items():
        taken = problem.snapshot.taken.get(name, ())
        wrong += [f"{name}: {words}" for words in _legal_on(nodes[name], taken, devices)]
    return wrong or _prices(problem, plan)


def _outcomes(problem: Problem, plan: Plan) -> list[str]:
    """Every ask has exactly one outcome, and nobody else has one."""
    asked = [ask.id for ask in problem.asks]
    answered = [ask for ask, _ in plan.outcomes]
    known, seen = set(asked), set(answered)
    if len(known) != len(asked):
        return ["two asks have the same id"]
    wrong = [f"{ask} has {count} outcomes" for ask, count in Counter(answered).items() if count > 1]
    wrong += [f"{ask} has no outcome" for ask in asked if ask not in seen]
    wrong += [f"{ask} was not asked" for ask in answered if ask not in known]
    return wrong if wrong or asked == answered else ["outcomes are not in the order of the problem"]


def _exactly_met(demand: Demand, placement: Placement) -> list[str]:
    """The devices are what was asked for, no less and no more, and in order."""
    gpus = sum(device.slice is None for device in placement.devices)
    slices = Counter(device.slice.profile for device in placement.devices if device.slice is not None)
    wrong = []
    if gpus != demand.gpus or slices != Counter(dict(demand.slices)):
        wrong.append(f"asked for {demand}, got {', '.join(map(str, placement.devices)) or 'nothing'}")
    if len(set(placement.devices)) == len(placement.devices) and placement.devices != tuple(sorted(placement.devices)):
        wrong.append("devices are not sorted")
    return wrong


def _legal_on(node: Node, taken: Iterable[Device], given: list[Device]) -> list[str]:
    """The devices exist, are free, may be used, are given once, and can stand on their boards together."""
    wrong = [f"{device} given {count} times" for device, count in Counter(given).items() if count > 1]
    gpus = {gpu.uuid: gpu for gpu in node.gpus}
    taken = set(taken)
    touched = {device.gpu for device in taken}
    for device in given:
        gpu = gpus.get(device.gpu)
        if gpu is None:
            wrong.append(f"there is no GPU {device.gpu}")
        elif gpu.withheld:
            wrong.append(f"{device} is withheld: {gpu.withheld}")
        elif device in taken or Device(device.gpu) in taken:
            wrong.append(f"{device} is taken")
        elif device.slice is None and (gpu.geometry is not None or device.gpu in touched):
            wrong.append(f"{device} is cut or partly taken and cannot be given whole")
        elif device.slice is not None and gpu.geometry is None:
            wrong.append(f"{device}: the GPU is not in MIG mode")
    for uuid in sorted({device.gpu for device in given if device.slice is not None} & set(gpus)):
        gpu = gpus[uuid]
        if gpu.geometry is not None:
            slices = _standing(gpu, taken) | {d.slice for d in given if d.gpu == uuid and d.slice is not None}
            wrong += [f"{uuid}: {words}" for words in faults(gpu.geometry, slices)]
    return wrong


def _standing(gpu: Gpu, taken: Iterable[Device]) -> set[Slice]:
    """The instances on a board: those that exist, and those that are held or promised."""
    held = {device.slice for device in taken if device.gpu == gpu.uuid and device.slice is not None}
    return held | set(gpu.instances)


def _prices(problem: Problem, plan: Plan) -> list[str]:
    """The placements' prices by goal add up to what the plain counts say."""
    wrong = []
    for goal in GOALS:
        claimed = sum(dict(placement.prices).get(goal.name, 0) for placement in plan.placements.values())
        counted = goal.of_plan(problem.snapshot, plan)
        if claimed != counted:
            wrong.append(f"{goal.name}: placements claim {claimed}, the plan costs {counted}")
    if plan.bound > plan.cost:
        wrong.append(f"bound {plan.bound} above cost {plan.cost}")
    if plan.status is Status.OPTIMAL and plan.bound != plan.cost:
        wrong.append(f"called optimal with cost {plan.cost} and bound {plan.bound}")
    return wrong


def nodes_with_a_legal_step(snapshot: Snapshot, demand: Demand) -> list[str]:
    """The nodes that could take the demand now, by brute force. Small demands only: it tries every set of slices."""
    return [node.name for node in snapshot.nodes if _could_take(node, set(snapshot.taken.get(node.name, ())), demand)]


def legal_step_exists(snapshot: Snapshot, demand: Demand) -> bool:
    """Whether any node could take the demand now."""
    return any(_could_take(node, set(snapshot.taken.get(node.name, ())), demand) for node in snapshot.nodes)


def _could_take(node: Node, taken: set[Device], demand: Demand) -> bool:
    touched = {device.gpu for device in taken}
    usable = [gpu for gpu in node.gpus if not gpu.withheld]
    if sum(gpu.geometry is None and gpu.uuid not in touched for gpu in usable) < demand.gpus:
        return False
    wanted = [profile for profile, count in demand.slices for _ in range(count)]
    boards = []
    for gpu in usable:
        if gpu.geometry is not None and Device(gpu.uuid) not in taken:
            standing = frozenset(_standing(gpu, taken))
            held = {device.slice for device in taken if device.gpu == gpu.uuid}
            if not faults(gpu.geometry, standing):
                boards.append((gpu.geometry, standing, frozenset(gpu.instances) - held))
    return _can_place(tuple(boards), wanted, set())


_Board = tuple[Geometry, frozenset[Slice], frozenset[Slice | None]]


def _can_place(boards: tuple[_Board, ...], wanted: list[str], tried: set[object]) -> bool:
    """Whether these slices fit on these boards (geometry, standing instances, idle ones), tried one by one."""
    if not wanted:
        return True
    key = (len(wanted), frozenset(Counter(boards).items()))
    if key in tried:
        return False
    tried.add(key)
    profile, rest = wanted[0], wanted[1:]
    for i, (geometry, standing, idle) in enumerate(boards):
        starts = [start for known in geometry.profiles if known.name == profile for start in known.starts]
        for slice_ in [Slice(profile, start) for start in starts]:
            if slice_ in idle:
                after = (geometry, standing, idle - {slice_})
            elif slice_ not in standing and not faults(geometry, standing | {slice_}):
                after = (geometry, standing | {slice_}, idle)
            else:
                continue
            if _can_place((*boards[:i], after, *boards[i + 1 :]), rest, tried):
                return True
    return False
