"""What a step costs: one pure function of a step for each goal, in whole milli-GPU, and its plain count.

A goal is a pair: the price of one step, and the same thing counted over a finished plan from the cluster's
own links, instances and allocations, without steps. Tests hold the two equal. Nothing else in the solver knows
what a goal is about. To add one: two functions and an entry in `GOALS`.

Every goal is a fixed price of the set that is chosen, or the difference of a number that the states before
and after have. So what several steps cost together does not depend on their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations

from solver.cluster import GPU_MILLI, Allocation, Gpu, Node, allocations
from solver.demand import Demand, HostNeed, Problem, SliceNeed
from solver.geometry import Cut, Slice, in_the_way
from solver.guests import Guests, classes_mixed, guests_of, join, tenants_mixed
from solver.plan import Placement, Plan, Status
from solver.steps import Host, State, Step, host_steps, read, slice_steps
from solver.topology import bandwidth, best_bandwidth, fewest_places, places
from solver.values import DEFAULT_VALUES, Values, links_price, spread_price

MAKE_MILLI = 40
"""What making a slice costs where an idle one might do. Chosen by feel: below the value of one unit of a cut
GPU, so that an idle slice in a bad place does not win over a good start."""

REMOVE_MILLI = 10
"""What destroying an idle instance costs: time, and whoever could have had it as it is. So low that a GPU full of small
ones (seven of an A100) is not kept from a slice that belongs there: with MAKE_MILLI it is less than one unit."""

SHELTER_MILLI = 25
"""What a pod without GPUs costs for each GPU of the node that it goes to. From 10 to 40 it hardly matters."""

TENANTS_ON_GPU_MILLI = 100
"""One more tenant on a GPU than one. Chosen by feel, as are the next three."""

TENANTS_ON_NODE_MILLI = 20
"""One more tenant on a node than one."""

CLASSES_ON_GPU_MILLI = 100
"""Serving and training on one GPU."""

CLASSES_ON_NODE_MILLI = 50
"""Serving and training on one node."""


# --- value: what a state can still earn ---


def value_taken(step: Step, values: Values) -> int:
    """What the step takes from tomorrow."""
    return values.of(step.before) - values.of(step.after)


def value_gone(problem: Problem, plan: Plan, values: Values) -> int:
    """The value of all nodes before the plan, less that after it."""
    return sum(
        _value_of_node(node, before, values) - _value_of_node(node, (*before, *added), values)
        for node, before, added in _changed_nodes(problem, plan)
    )


def _value_of_node(node: Node, taken: Iterable[Allocation], values: Values) -> int:
    room = read(node, taken)
    return values.of(room.host) + sum(values.of(state) for _, state in room.cuts)


def _changed_nodes(problem: Problem, plan: Plan) -> Iterable[tuple[Node, list[Allocation], list[Allocation]]]:
    """Each node that the plan uses, what was on it before, and what the plan adds."""
    nodes = {node.name: node for node in problem.snapshot.nodes}
    added: dict[str, list[Allocation]] = {}
    for demand, placement in _placed(problem, plan):
        added.setdefault(placement.node, []).append(allocation_of(demand, placement))
    for name, more in added.items():
        yield nodes[name], list(allocations(problem.snapshot.taken.get(name, ()))), more


def _placed(problem: Problem, plan: Plan) -> Iterable[tuple[Demand, Placement]]:
    placements = plan.placements
    return [(ask.demand, placements[ask.id]) for ask in problem.asks if ask.id in placements]


def allocation_of(demand: Demand, placement: Placement) -> Allocation:
    """What a pod holds once it is placed."""
    return Allocation(placement.devices, demand.cpu_milli, demand.memory_mib, demand.terms.guest)


# --- links: bandwidth between the GPUs of one demand ---


def links_lost(step: Step, values: Values) -> int:
    """Bandwidth lost against the best set of that many GPUs this board could ever give.

    A job that loses a share of its bandwidth is taken to lose that share of its GPUs. Slices and shares have
    no peer-to-peer, so links never count for them.
    """
    if not isinstance(step.before, Host) or step.gpus < 2:
        return 0
    wiring = step.before.board
    return links_price(step.gpus, bandwidth(wiring, step.take), best_bandwidth(wiring, step.gpus))


def links_lost_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from each node's own link matrix, looking at every set of its whole GPUs."""
    total = 0
    for node, whole, chosen in _whole_choices(problem, plan):
        if len(chosen) < 2:
            continue
        best = max(_pair_sum(node, others) for others in combinations(whole, len(chosen)))
        total += links_price(len(chosen), _pair_sum(node, chosen), best)
    return total


def _pair_sum(node: Node, positions: Iterable[int]) -> int:
    return sum(node.links[a][b] for a, b in combinations(positions, 2))


def _whole_choices(problem: Problem, plan: Plan) -> Iterable[tuple[Node, list[int], list[int]]]:
    """For each placement: its node, the positions of the node's whole GPUs, and of those it takes."""
    nodes = {node.name: node for node in problem.snapshot.nodes}
    for placement in plan.placements.values():
        node = nodes[placement.node]
        taken = {device.gpu for device in placement.devices if device.whole}
        whole = [i for i, gpu in enumerate(node.gpus) if gpu.geometry is None]
        yield node, whole, [i for i in whole if node.gpus[i].uuid in taken]


# --- numa, nics: demands spread over more NUMA nodes or network cards than needed ---


def numa_split(step: Step, values: Values) -> int:
    """NUMA nodes touched beyond the fewest that this board needs for so many GPUs."""
    return _split(step, step.before.board.numa) if isinstance(step.before, Host) else 0


def nics_split(step: Step, values: Values) -> int:
    """Nearest network cards beyond the fewest that this board needs for so many GPUs."""
    return _split(step, step.before.board.nics) if isinstance(step.before, Host) else 0


def _split(step: Step, labels: tuple[int, ...]) -> int:
    assert isinstance(step.before, Host)
    if step.gpus < 2:
        return 0
    fewest = fewest_places(step.before.board, labels, step.gpus)
    return spread_price(step.gpus, places(labels, step.take), fewest)


def numa_split_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from each GPU's NUMA node, looking at every set of NUMA nodes."""
    return _split_in(problem, plan, lambda gpu: gpu.numa)


def nics_split_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from each GPU's nearest card."""
    return _split_in(problem, plan, lambda gpu: gpu.nic)


def _split_in(problem: Problem, plan: Plan, label: Callable[[Gpu], int | None]) -> int:
    total = 0
    for node, whole, chosen in _whole_choices(problem, plan):
        if len(chosen) < 2:
            continue
        labels = [label(node.gpus[i]) for i in whole]
        there = sorted(set(labels), key=str)
        fewest = next(
            count
            for count in range(1, len(there) + 1)
            if any(sum(each in some for each in labels) >= len(chosen) for some in combinations(there, count))
        )
        total += spread_price(len(chosen), len({label(node.gpus[i]) for i in chosen}), fewest)
    return total


# --- repartition: slices that have to be made, idle ones that have to go ---


def slice_made(step: Step, values: Values) -> int:
    """A slice made new, and the idle instances that go for it. An idle one of the profile is cheaper anywhere."""
    if step.slice is None:
        return 0
    return MAKE_MILLI * (not step.reused) + REMOVE_MILLI * step.removed


def slices_made_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same: slices handed out that are not on the board yet, and instances that are in the way of all that is held
    after the plan, less those that were before.
    """
    made = removed = 0
    for node, before, added in _changed_nodes(problem, plan):
        for gpu in node.gpus:
            held, new = _slices_on(gpu, before), _slices_on(gpu, added)
            if new and gpu.geometry is not None:
                idle = set(gpu.instances) - held
                made += len(new - idle)
                removed += len(in_the_way(gpu.geometry, held | new, idle)) - len(in_the_way(gpu.geometry, held, idle))
    return MAKE_MILLI * made + REMOVE_MILLI * removed


def _slices_on(gpu: Gpu, there: Iterable[Allocation]) -> set[Slice]:
    return {device.slice for each in there for device in each.devices if device.gpu == gpu.uuid and device.slice}


# --- tenants, classes: who stands beside whom ---


def tenants_beside(step: Step, values: Values) -> int:
    """Tenants on one GPU, and on one node, beyond the first."""
    return _more_mixed(step, tenants_mixed, TENANTS_ON_GPU_MILLI, TENANTS_ON_NODE_MILLI)


def classes_beside(step: Step, values: Values) -> int:
    """GPUs, and nodes, that have serving beside training."""
    return _more_mixed(step, classes_mixed, CLASSES_ON_GPU_MILLI, CLASSES_ON_NODE_MILLI)


def _more_mixed(step: Step, mixed: Callable[[Guests], int], on_gpu: int, on_node: int) -> int:
    if isinstance(step.before, Cut):
        return on_gpu * (mixed(step.after.guests) - mixed(step.before.guests))
    assert isinstance(step.after, Host)
    price = on_node * (mixed(step.after.guests) - mixed(step.before.guests))
    if step.share_on is not None:
        joined = join(step.share_on.guests, step.guest, occupied=True)
        price += on_gpu * (mixed(joined) - mixed(step.share_on.guests))
    return price


def tenants_beside_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from who holds what before and after."""
    return _mixed_in(problem, plan, tenants_mixed, TENANTS_ON_GPU_MILLI, TENANTS_ON_NODE_MILLI)


def classes_beside_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from who holds what before and after."""
    return _mixed_in(problem, plan, classes_mixed, CLASSES_ON_GPU_MILLI, CLASSES_ON_NODE_MILLI)


def _mixed_in(problem: Problem, plan: Plan, mixed: Callable[[Guests], int], on_gpu: int, on_node: int) -> int:
    def count(there: list[Allocation]) -> int:
        gpus = {device.gpu for each in there for device in each.devices if not device.whole}
        on = [guests_of([a.guest for a in there if any(d.gpu == gpu for d in a.devices)]) for gpu in gpus]
        holders = [a.guest for a in there if a.devices]
        return on_node * mixed(guests_of(holders)) + on_gpu * sum(mixed(guests) for guests in on)

    return sum(count(before + added) - count(before) for _, before, added in _changed_nodes(problem, plan))


# --- fresh_gpu, fresh_node: MIG kept on GPUs that are cut already, pods on nodes that are open ---


def gpu_opened(step: Step, values: Values) -> int:
    """A GPU in MIG mode that had nothing on it gets its first slice."""
    return GPU_MILLI if isinstance(step.before, Cut) and not step.before.held else 0


def gpus_opened_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same: GPUs with held slices after the plan that had none before."""

    def cut_up(there: list[Allocation]) -> int:
        return len({device.gpu for each in there for device in each.devices if device.slice is not None})

    changed = _changed_nodes(problem, plan)
    return GPU_MILLI * sum(cut_up(before + added) - cut_up(before) for _, before, added in changed)


def node_opened(step: Step, values: Values) -> int:
    """A node whose devices nobody held gets its first pod with devices."""
    if not isinstance(step.before, Host) or not isinstance(step.after, Host):
        return 0
    return GPU_MILLI * (step.after.busy - step.before.busy)


def nodes_opened_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same: nodes that had nobody before the plan and have somebody after it."""

    def open_to(there: list[Allocation]) -> bool:
        return any(each.devices for each in there)

    changed = _changed_nodes(problem, plan)
    return GPU_MILLI * sum(open_to(added) and not open_to(before) for _, before, added in changed)


# --- power: what the GPUs may draw ---


def power_added(step: Step, values: Values) -> int:
    """Watts that the devices may draw: the GPU's limit, by the part of it that is taken."""
    if isinstance(step.before, Cut):
        assert step.slice is not None
        return _slice_watts(step.before.kind.watts, _size(step.before, step.slice.profile), step.before.geometry.width)
    kinds = step.before.board.kinds
    watts = sum(count * kinds[c].watts for c, count in enumerate(step.take))
    return watts + (kinds[step.share_class].watts * step.share_milli // GPU_MILLI if step.share_milli else 0)


def _size(state: Cut, profile: str) -> int:
    return next(each.size for each in state.geometry.profiles if each.name == profile)


def _slice_watts(watts: int, size: int, width: int) -> int:
    return watts * size // width


def power_added_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from the plan's devices."""
    gpus = {gpu.uuid: gpu for node in problem.snapshot.nodes for gpu in node.gpus}
    total = 0
    for placement in plan.placements.values():
        for device in placement.devices:
            gpu = gpus[device.gpu]
            if device.slice is not None:
                assert gpu.geometry is not None
                size = next(each.size for each in gpu.geometry.profiles if each.name == device.slice.profile)
                total += _slice_watts(gpu.watts, size, gpu.geometry.width)
            else:
                total += gpu.watts * (device.milli or GPU_MILLI) // GPU_MILLI
    return total


# --- cpu_only: pods without GPUs kept away from nodes with them ---


def gpus_beside(step: Step, values: Values) -> int:
    """A pod that asks for no GPU, on a node that has some."""
    if not isinstance(step.before, Host) or not isinstance(step.need, HostNeed):
        return 0
    return 0 if step.need.takes_devices else SHELTER_MILLI * step.before.board.size


def gpus_beside_in(problem: Problem, plan: Plan, values: Values) -> int:
    """The same from the nodes' GPUs."""
    nodes = {node.name: node for node in problem.snapshot.nodes}
    return SHELTER_MILLI * sum(
        sum(gpu.geometry is None for gpu in nodes[placement.node].gpus)
        for demand, placement in _placed(problem, plan)
        if not demand.takes_devices
    )


# --- the tuple, and the policy that weighs it ---


@dataclass(frozen=True, slots=True)
class Goal:
    """A price by name: of one step, and counted over a plan, both in milli-GPU (power: in watts)."""

    name: str
    of_step: Callable[[Step, Values], int]
    of_plan: Callable[[Problem, Plan, Values], int]


GOALS = (
    Goal("value", value_taken, value_gone),
    Goal("links", links_lost, links_lost_in),
    Goal("numa", numa_split, numa_split_in),
    Goal("nics", nics_split, nics_split_in),
    Goal("repartition", slice_made, slices_made_in),
    Goal("tenants", tenants_beside, tenants_beside_in),
    Goal("classes", classes_beside, classes_beside_in),
    Goal("fresh_gpu", gpu_opened, gpus_opened_in),
    Goal("fresh_node", node_opened, nodes_opened_in),
    Goal("power", power_added, power_added_in),
    Goal("cpu_only", gpus_beside, gpus_beside_in),
)

WORST_MILLI = 1_000_000
"""No goal prices one pod beyond this (a thousand GPUs), so that a better tier beats all tiers after it."""

Tier = tuple[tuple[str, int], ...]
"""Goals by name, with their weights; within a tier they are added up."""

Prices = tuple[tuple[str, int], ...]
"""What something costs by goal, unweighted, in the order of `GOALS`."""

DEFAULT_TIER: Tier = tuple((name, 1) for name in (
    "value", "links", "numa", "nics", "repartition", "tenants", "classes", "cpu_only"
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """How goals are weighed: tiers in order (a better tier beats everything after it), weights inside them.

    The default has one tier and no weights: all its goals speak milli-GPU, so they can be added. Links cost the
    share of the job's GPUs that it could as well not have, which beats breaking into a half-used node but
    not opening an empty one; a NUMA split decides between otherwise equal places; making a slice loses to an
    idle one unless that stands in a worse place, and one made over idle ones to one made beside them. `worths`
    weigh what is placed by its class of work, where not everything can be: (("serving", 2),) counts a serving pod
    twice. `values` say what states are worth.
    """

    name: str = "potential"
    tiers: tuple[Tier, ...] = (DEFAULT_TIER,)
    worths: tuple[tuple[str, int], ...] = ()
    values: Values = DEFAULT_VALUES
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        names = [name for tier in self.tiers for name, _ in tier]
        unknown = sorted(set(names) - {goal.name for goal in GOALS})
        if unknown:
            known = ", ".join(goal.name for goal in GOALS)
            raise ValueError(f"policy {self.name}: no goal is called {', '.join(unknown)}; there are {known}")
        if len(set(names)) != len(names):
            raise ValueError(f"policy {self.name}: a goal is named twice")
        if any(weight < 0 for tier in self.tiers for _, weight in tier):
            raise ValueError(f"policy {self.name}: a weight is negative")
        if any(weight < 1 for _, weight in self.worths):
            raise ValueError(f"policy {self.name}: a class of work must be worth 1 or more")
        object.__setattr__(self, "_hash", hash((self.name, self.tiers, self.worths, self.values)))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Policy], tuple[object, ...]]:
        """Pickle by value: hashes differ between processes."""
        return Policy, (self.name, self.tiers, self.worths, self.values)

    def total(self, prices: Prices) -> int:
        """One number: the tiers as digits, so that the lower number is the better one in the tiers' order."""
        return sum(self.factors()[name] * milli for name, milli in prices if milli)

    def factors(self) -> dict[str, int]:
        """What each goal's milli-GPU counts in the total; 0 where the policy does not name it."""
        return _factors(self)

    def weighs(self, *goals: str) -> bool:
        """Whether any of these goals counts."""
        return any(self.factors()[name] for name in goals)


@lru_cache(maxsize=256)
def _factors(policy: Policy) -> dict[str, int]:
    factors = {goal.name: 0 for goal in GOALS}
    digit = 1
    for tier in reversed(policy.tiers):
        for name, weight in tier:
            factors[name] = digit * weight
        digit *= 2 * WORST_MILLI * sum(weight for _, weight in tier) + 1
    return factors


DEFAULT_POLICY = Policy()


def prices_of(steps: Iterable[Step], values: Values) -> Prices:
    """What these steps cost together, by goal."""
    steps = tuple(steps)
    return tuple((goal.name, sum(goal.of_step(step, values) for step in steps)) for goal in GOALS)


@dataclass(frozen=True, slots=True)
class Offer:
    """A step with its total price under a policy."""

    price: int
    step: Step


@lru_cache(maxsize=16384)
def offers(state: State, need: HostNeed | SliceNeed, policy: Policy) -> tuple[Offer, ...]:
    """Every useful way to serve this on one unit: cheapest first.

    Of the steps to equal states only the cheapest is kept, and of equally cheap ones the first (idle
    instances before new ones, the lowest start, the lowest GPUs).
    """
    best: dict[State, Offer] = {}
    for step in steps_of(state, need):
        after = step.after.canonical() if isinstance(step.after, Host) else step.after
        price = policy.total(prices_of((step,), policy.values))
        if after not in best or price < best[after].price:
            best[after] = Offer(price, step)
    return tuple(sorted(best.values(), key=lambda offer: offer.price))


def steps_of(state: State, need: HostNeed | SliceNeed) -> tuple[Step, ...]:
    """Every step on this unit; none where it serves nothing of the kind."""
    if isinstance(state, Host):
        return host_steps(state, need) if isinstance(need, HostNeed) else ()
    return slice_steps(state, need) if isinstance(need, SliceNeed) else ()


def cheapest(state: State, need: HostNeed | SliceNeed, policy: Policy) -> int | None:
    """The least that serving this costs on the state; None where it cannot be served."""
    found = offers(state, need, policy)
    return found[0].price if found else None


def plain_prices(problem: Problem, ask: str, placement: Placement, values: Values) -> Prices:
    """What one placement costs by goal on this problem's snapshot, by the plain counts alone."""
    alone = Plan(Status.FEASIBLE, ((ask, placement),), 0, 0)
    return tuple((goal.name, goal.of_plan(problem, alone, values)) for goal in GOALS)
