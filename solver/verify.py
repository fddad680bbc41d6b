"""Check a plan against its problem without solving: it knows cluster, geometry and prices, and no search.

Written as the specification. It shares no code with `steps`, `rank` and `flow`: what is free is counted here
again from the nodes themselves. An empty list means that nothing is wrong.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

from solver.cluster import (
    GPU_MILLI,
    Allocation,
    Device,
    Gpu,
    Node,
    Snapshot,
    Taken,
    allocations,
    devices_of,
)
from solver.demand import Demand, Problem
from solver.geometry import Geometry, Slice, faults
from solver.goals import GOALS
from solver.plan import Placement, Plan, Status
from solver.topology import PCIE_GBS
from solver.values import DEFAULT_VALUES, Values


def verify(problem: Problem, plan: Plan, values: Values = DEFAULT_VALUES) -> list[str]:
    """What is wrong with the plan, in words; empty if it is legal and costs what it says (by these values)."""
    wrong = _outcomes(problem, plan)
    nodes = {node.name: node for node in problem.snapshot.nodes}
    demands = {ask.id: ask.demand for ask in problem.asks}
    given: dict[str, list[tuple[Demand, Placement]]] = {}
    for ask, placement in plan.placements.items():
        node = nodes.get(placement.node)
        if node is None:
            wrong.append(f"{ask}: there is no node {placement.node}")
            continue
        wrong += [f"{ask}: {words}" for words in _exactly_met(demands.get(ask, Demand()), placement)]
        given.setdefault(node.name, []).append((demands.get(ask, Demand()), placement))
    for name, placed in given.items():
        taken = allocations(problem.snapshot.taken.get(name, ()))
        devices = [device for _, placement in placed for device in placement.devices]
        wrong += [f"{name}: {words}" for words in legal_on(nodes[name], devices_of(taken), devices)]
        if not wrong:
            wrong += [f"{name}: {words}" for words in on_terms(nodes[name], taken, placed)]
    return wrong or _prices(problem, plan, values)


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
    """The devices are what was asked for, no less and no more, and in order (how large a share: `on_terms`)."""
    gpus = sum(device.whole for device in placement.devices)
    shares = sum(device.slice is None and device.milli > 0 for device in placement.devices)
    slices = Counter(device.slice.profile for device in placement.devices if device.slice is not None)
    wrong = []
    if gpus != demand.gpus or shares != demand.is_shared or slices != Counter(dict(demand.slices)):
        wrong.append(f"asked for {demand}, got {', '.join(map(str, placement.devices)) or 'nothing'}")
    if len(set(placement.devices)) == len(placement.devices) and placement.devices != tuple(sorted(placement.devices)):
        wrong.append("devices are not sorted")
    return wrong


def on_terms(node: Node, taken: Sequence[Allocation], placed: Sequence[tuple[Demand, Placement]]) -> list[str]:
    """CPU and memory suffice, every device is what its pod's terms ask for, and nobody stands where he must not."""
    wrong = []
    gpus = {gpu.uuid: gpu for gpu in node.gpus}
    position = {gpu.uuid: i for i, gpu in enumerate(node.gpus)}
    cpu = sum(each.cpu_milli for each in taken) + sum(demand.cpu_milli for demand, _ in placed)
    memory = sum(each.memory_mib for each in taken) + sum(demand.memory_mib for demand, _ in placed)
    if node.cpu_milli is not None and cpu > node.cpu_milli and any(demand.cpu_milli for demand, _ in placed):
        wrong.append(f"{cpu} milli CPU used, the node has {node.cpu_milli}")
    if node.memory_mib is not None and memory > node.memory_mib and any(demand.memory_mib for demand, _ in placed):
        wrong.append(f"{memory} MiB used, the node has {node.memory_mib}")
    for demand, placement in placed:
        terms = demand.terms
        if demand.takes_devices and terms.driver and node.driver < terms.driver:
            wrong.append(f"{demand} needs driver {terms.driver}, here is {node.driver}")
        if demand.takes_devices and terms.cuda and node.cuda[:1] < terms.cuda[:1]:
            wrong.append(f"{demand} needs CUDA {terms.cuda}, here is {node.cuda}")
        wrong += [words for device in placement.devices for words in _suits(demand, gpus[device.gpu], device)]
        whole = [position[device.gpu] for device in placement.devices if device.whole]
        pairs = [node.links[a][b] for a in whole for b in whole if a < b]
        if terms.nvlink and any(gbs <= 0 or gbs in PCIE_GBS.values() for gbs in pairs):
            wrong.append(f"{demand}: not all of its GPUs are joined by NVLink")
    holders = [(each.guest, each.devices) for each in taken if each.devices]
    newcomers = [(demand.terms.guest, placement.devices) for demand, placement in placed if placement.devices]
    for i, (guest, devices) in enumerate(newcomers):
        for other, beside in [*holders, *newcomers[:i]]:
            same_gpu = {device.gpu for device in devices} & {device.gpu for device in beside}
            wishes = {guest.isolation, other.isolation}
            if not guest.tenant == other.tenant != "" and ("node" in wishes or (same_gpu and "gpu" in wishes)):
                wrong.append(f"{guest} is beside {other}")
    return wrong


def _suits(demand: Demand, gpu: Gpu, device: Device) -> list[str]:
    terms, memory = demand.terms, gpu.memory_mib
    wrong = []
    if device.slice is not None and gpu.geometry is not None:
        memory = next(each.memory_mib for each in gpu.geometry.profiles if each.name == device.slice.profile)
    if terms.products and not any(_has_words(gpu.product, asked) for asked in terms.products):
        wrong.append(f"{device} is a {gpu.product}, asked for {terms.products}")
    if terms.architectures and gpu.architecture.lower() not in [each.lower() for each in terms.architectures]:
        wrong.append(f"{device} is {gpu.architecture}, asked for {terms.architectures}")
    if gpu.compute_capability < terms.compute_capability or memory < terms.gpu_memory_mib:
        wrong.append(f"{device} has {gpu.compute_capability} and {memory} MiB, too little for {terms}")
    if device.milli:
        asked = demand.share_milli or -(-demand.share_mib * GPU_MILLI // max(1, gpu.memory_mib))
        if device.milli != asked:
            wrong.append(f"{device}: asked for {demand}, which is {asked} milli of it")
    return wrong


def _has_words(product: str, asked: str) -> bool:
    return set(re.findall(r"[^\W_]+", asked.casefold())) <= set(re.findall(r"[^\W_]+", product.casefold()))


def legal_on(node: Node, taken: Iterable[Device], given: list[Device]) -> list[str]:
    """The devices exist, are free, may be used, are given once, and can stand on their boards together."""
    given_once = [device for device in given if not device.milli]
    wrong = [f"{device} given {count} times" for device, count in Counter(given_once).items() if count > 1]
    gpus = {gpu.uuid: gpu for gpu in node.gpus}
    taken = tuple(taken)
    there = set(taken)
    touched = {device.gpu for device in taken}
    shared = {device.gpu for device in given if device.milli}
    unshared = {device.gpu for device in (*taken, *given_once) if not device.milli}
    for device in given:
        gpu = gpus.get(device.gpu)
        if gpu is None:
            wrong.append(f"there is no GPU {device.gpu}")
        elif gpu.withheld:
            wrong.append(f"{device} is withheld: {gpu.withheld}")
        elif Device(device.gpu) in there or (device in there and not device.milli):
            wrong.append(f"{device} is taken")
        elif device.slice is None and gpu.geometry is not None:
            wrong.append(f"{device} is cut and cannot be given whole or shared")
        elif device.whole and (device.gpu in touched or device.gpu in shared):
            wrong.append(f"{device} is partly taken and cannot be given whole")
        elif device.milli and device.gpu in unshared:
            wrong.append(f"{device}: the GPU is not for sharing now")
        elif device.slice is not None and gpu.geometry is None:
            wrong.append(f"{device}: the GPU is not in MIG mode")
    for uuid in sorted(shared):
        milli = sum(device.milli for device in (*taken, *given) if device.gpu == uuid)
        if milli > GPU_MILLI:
            wrong.append(f"{milli} milli of {uuid} are promised")
    for uuid in sorted({device.gpu for device in given if device.slice is not None} & set(gpus)):
        gpu = gpus[uuid]
        if gpu.geometry is not None:
            held = _held_on(gpu, taken)
            wrong += [f"{uuid}: {words}" for words in faults(gpu.geometry, held | _held_on(gpu, given))]
            wrong += [f"{uuid}: {words}" for words in faults(gpu.geometry, set(gpu.instances) - held)]
    return wrong


def _held_on(gpu: Gpu, taken: Iterable[Device]) -> set[Slice]:
    """The slices of a board that are held or promised. Other instances are no obstacle, they can be destroyed."""
    return {device.slice for device in taken if device.gpu == gpu.uuid and device.slice is not None}


def _prices(problem: Problem, plan: Plan, values: Values) -> list[str]:
    """The placements' prices by goal add up to what the plain counts say."""
    wrong = []
    for goal in GOALS:
        claimed = sum(dict(placement.prices).get(goal.name, 0) for placement in plan.placements.values())
        counted = goal.of_plan(problem, plan, values)
        if claimed != counted:
            wrong.append(f"{goal.name}: placements claim {claimed}, the plan costs {counted}")
    if plan.bound > plan.cost:
        wrong.append(f"bound {plan.bound} above cost {plan.cost}")
    if plan.status is Status.OPTIMAL and plan.bound != plan.cost:
        wrong.append(f"called optimal with cost {plan.cost} and bound {plan.bound}")
    return wrong


def nodes_with_a_legal_step(snapshot: Snapshot, demand: Demand) -> list[str]:
    """The nodes that could take the demand now, by brute force. Small demands only: it tries every set of devices."""
    return [node.name for node in snapshot.nodes if _could_take(node, snapshot.taken.get(node.name, ()), demand)]


def legal_step_exists(snapshot: Snapshot, demand: Demand) -> bool:
    """Whether any node could take the demand now."""
    return any(_could_take(node, snapshot.taken.get(node.name, ()), demand) for node in snapshot.nodes)


def _could_take(node: Node, taken: Iterable[Taken], demand: Demand) -> bool:
    there = allocations(taken)
    if _plain(demand) and not any(each.guest.isolation for each in there):
        return _could_take_plain(node, set(devices_of(there)), demand)
    return any(
        not legal_on(node, devices_of(there), list(chosen))
        and not on_terms(node, there, [(demand, Placement(node.name, tuple(sorted(chosen))))])
        for chosen in _choices(node, demand)
    )


def _plain(demand: Demand) -> bool:
    """Whether it asks for GPUs and slices only, on no terms."""
    return replace(demand, gpus=0, slices=()) == Demand()


def _choices(node: Node, demand: Demand) -> Iterator[tuple[Device, ...]]:
    """Every set of devices on the node that counts as many as the demand, legal or not."""
    shares = [()] if not demand.is_shared else [
        (Device(gpu.uuid, milli=demand.share_of(gpu.memory_mib)),) for gpu in node.gpus
    ]  # fmt: skip
    wanted = [profile for profile, count in demand.slices for _ in range(count)]
    cuts = [
        [
            Device(gpu.uuid, Slice(profile, start))
            for gpu in node.gpus
            if gpu.geometry
            for each in gpu.geometry.profiles
            if each.name == profile
            for start in each.starts
        ]
        for profile in wanted
    ]
    for gpus in combinations(node.gpus, demand.gpus):
        for share in shares:
            for slices in product(*cuts):
                yield (*[Device(gpu.uuid) for gpu in gpus], *share, *slices)


def _could_take_plain(node: Node, taken: set[Device], demand: Demand) -> bool:
    touched = {device.gpu for device in taken}
    usable = [gpu for gpu in node.gpus if not gpu.withheld]
    if sum(gpu.geometry is None and gpu.uuid not in touched for gpu in usable) < demand.gpus:
        return False
    wanted = [profile for profile, count in demand.slices for _ in range(count)]
    boards = []
    for gpu in usable:
        if gpu.geometry is not None and not any(d.slice is None for d in taken if d.gpu == gpu.uuid):
            held = frozenset(_held_on(gpu, taken))
            if not faults(gpu.geometry, held) and not faults(gpu.geometry, set(gpu.instances) - held):
                boards.append((gpu.geometry, held))
    return _can_place(tuple(boards), wanted, set())


def _can_place(boards: tuple[tuple[Geometry, frozenset[Slice]], ...], wanted: list[str], tried: set[object]) -> bool:
    """Whether these slices fit on these boards (geometry, held slices), tried one by one."""
    if not wanted:
        return True
    key = (len(wanted), frozenset(Counter(boards).items()))
    if key in tried:
        return False
    tried.add(key)
    profile, rest = wanted[0], wanted[1:]
    for i, (geometry, held) in enumerate(boards):
        starts = [start for known in geometry.profiles if known.name == profile for start in known.starts]
        for slice_ in [Slice(profile, start) for start in starts]:
            if slice_ in held or faults(geometry, held | {slice_}):
                continue
            if _can_place((*boards[:i], (geometry, held | {slice_}), *boards[i + 1 :]), rest, tried):
                return True
    return False
