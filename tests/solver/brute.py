"""The same questions answered the long way: every placement tried, every price a plain count. No solver code."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations

from solver.cluster import Allocation, Device, Node, Snapshot, Taken, allocations, devices_of
from solver.demand import Ask, Demand, Problem
from solver.flow import digits, question_of
from solver.geometry import Geometry, Slice, faults
from solver.goals import DEFAULT_POLICY, MAKE_MILLI, REMOVE_MILLI, Policy, allocation_of, plain_prices
from solver.plan import Placement
from solver.verify import on_terms


def placements(node: Node, taken: Sequence[Taken], demand: Demand) -> Iterator[tuple[Device, ...]]:
    """Every legal set of devices for the demand on the node."""
    there = allocations(taken)
    held = devices_of(there)
    touched = {device.gpu for device in held}
    usable = [gpu for gpu in node.gpus if gpu.geometry is None and not gpu.withheld]
    free = [gpu.uuid for gpu in usable if gpu.uuid not in touched]
    shared = {d.gpu for d in held if d.milli} - {d.gpu for d in held if not d.milli}
    shares: list[tuple[Device, ...]] = [()]
    if demand.is_shared:
        used = {gpu: sum(d.milli for d in held if d.gpu == gpu) for gpu in shared}
        shares = [
            (Device(gpu.uuid, milli=demand.share_of(gpu.memory_mib)),)
            for gpu in usable
            if (gpu.uuid in free or gpu.uuid in shared)
            and used.get(gpu.uuid, 0) + demand.share_of(gpu.memory_mib) <= 1000
        ]
    wanted = [profile for profile, count in demand.slices for _ in range(count)]
    for gpus in combinations(free, demand.gpus):
        for share in shares:
            if share and share[0].gpu in gpus:
                continue
            for cut in set(_slices(node, frozenset(held), wanted)):
                devices = tuple(sorted([*map(Device, gpus), *share, *cut]))
                if not on_terms(node, there, [(demand, Placement(node.name, devices))]):
                    yield devices


def _slices(node: Node, taken: frozenset[Device], wanted: Sequence[str]) -> Iterator[frozenset[Device]]:
    if not wanted:
        yield frozenset()
        return
    for gpu in node.gpus:
        if gpu.geometry is None or gpu.withheld or any(d.gpu == gpu.uuid and d.slice is None for d in taken):
            continue
        held = {d.slice for d in taken if d.gpu == gpu.uuid and d.slice is not None}
        if faults(gpu.geometry, held) or faults(gpu.geometry, set(gpu.instances) - held):
            continue
        for profile in gpu.geometry.profiles:
            for start in profile.starts if profile.name == wanted[0] else ():
                device = Device(gpu.uuid, Slice(profile.name, start))
                if device not in taken and not faults(gpu.geometry, held | {Slice(profile.name, start)}):
                    for rest in _slices(node, taken | {device}, wanted[1:]):
                        yield rest | {device}


def total(node: Node, taken: Sequence[Taken], demand: Demand, devices: tuple[Device, ...], policy: Policy) -> int:
    """What these devices cost, by the plain counts."""
    return policy.total(tuple(prices(node, taken, demand, devices, policy).items()))


def prices(
    node: Node, taken: Sequence[Taken], demand: Demand, devices: tuple[Device, ...], policy: Policy
) -> dict[str, int]:
    """The plain counts of these devices by goal; of the idle instances that go, by a count of its own."""
    problem = Problem(Snapshot((node,), {node.name: tuple(taken)}), (Ask("one", demand),))
    plain = dict(plain_prices(problem, "one", Placement(node.name, devices), policy.values))
    made, removed = remade(node, taken, devices)
    return plain | {"repartition": MAKE_MILLI * made + REMOVE_MILLI * removed}


def remade(node: Node, taken: Sequence[Taken], devices: Sequence[Device]) -> tuple[int, int]:
    """How many of these slices are to be made, and how many more idle instances must go for them."""
    made = removed = 0
    for gpu in node.gpus:
        held = frozenset(d.slice for d in devices_of(allocations(taken)) if d.gpu == gpu.uuid and d.slice)
        new = frozenset(d.slice for d in devices if d.gpu == gpu.uuid and d.slice)
        if gpu.geometry is None or not new:
            continue
        idle = frozenset(gpu.instances) - held
        made += len(new - idle)
        removed += fewest_removed(gpu.geometry, held | new, idle) - fewest_removed(gpu.geometry, held, idle)
    return made, removed


@cache
def fewest_removed(geometry: Geometry, wanted: frozenset[Slice], idle: frozenset[Slice]) -> int:
    """The fewest idle instances without which all others and the wanted slices have no fault: every set is tried."""
    others = idle - wanted
    return next(
        len(others) - stay
        for stay in range(len(others), -1, -1)
        if any(not faults(geometry, wanted.union(some)) for some in combinations(sorted(others), stay))
    )


def cheapest(node: Node, taken: Sequence[Taken], demand: Demand, policy: Policy = DEFAULT_POLICY) -> int | None:
    """The least any placement of the demand on the node costs."""
    return min(
        (total(node, taken, demand, devices, policy) for devices in placements(node, taken, demand)), default=None
    )


def least_cost(problem: Problem, policy: Policy = DEFAULT_POLICY) -> int:
    """The least any plan costs: every ask on every node in every way, or unplaced. Tier by tier, in the order of
    the policy, with the digits that plans have.
    """
    asked = question_of(problem, policy)
    first = len(asked.priorities)
    asks = [(ask.demand, ask.priority) for ask in problem.asks]

    def tiers_of(node: Node, taken: Sequence[Taken], demand: Demand, devices: tuple[Device, ...]) -> tuple[int, ...]:
        costs = prices(node, taken, demand, devices, policy)
        here = (sum(weight * costs[name] for name, weight in tier) for tier in policy.tiers)
        return (0,) * first + tuple(here)

    @cache
    def on(node: Node, taken: tuple[Allocation, ...], demands: tuple[Demand, ...]) -> tuple[int, ...] | None:
        """The least that all of these demands cost on one node."""
        if not demands:
            return (0,) * (first + len(policy.tiers))
        best: tuple[int, ...] | None = None
        for devices in placements(node, taken, demands[0]):
            held = allocation_of(demands[0], Placement(node.name, devices))
            rest = on(node, tuple(sorted((*taken, held), key=repr)), demands[1:])
            if rest is not None:
                cost = _sum(rest, tiers_of(node, taken, demands[0], devices))
                best = cost if best is None else min(best, cost)
        return best

    def spread(nodes: Sequence[Node], asks: tuple[tuple[Demand, int], ...]) -> tuple[int, ...]:
        """The least cost of these asks on these nodes, the rest unplaced."""
        if not nodes:
            left = [0] * (first + len(policy.tiers))
            for demand, priority in asks:
                left[asked.priorities.index(priority)] += asked.worths[asked.number[demand]]
            return tuple(left)
        best: tuple[int, ...] | None = None
        taken = allocations(problem.snapshot.taken.get(nodes[0].name, ()))
        for count in range(len(asks) + 1):
            for here in combinations(range(len(asks)), count):
                price = on(nodes[0], taken, tuple(sorted(asks[i][0] for i in here)))
                if price is None:
                    continue
                cost = _sum(price, spread(nodes[1:], tuple(ask for i, ask in enumerate(asks) if i not in here)))
                best = cost if best is None else min(best, cost)
        assert best is not None
        return best

    least = spread(problem.snapshot.nodes, tuple(asks))
    return sum(digit * value for digit, value in zip(digits(asked), least, strict=True))


def _sum(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))
