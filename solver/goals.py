"""What a step costs: one pure function of a step for each goal, in whole milli-GPU, and its plain count.

A goal is a pair: the price of one step, and the same thing counted over a finished plan from the cluster's
own links and instances, without steps. Tests hold the two equal. Nothing else in the solver knows what a goal
is about. To add one: two functions and an entry in `GOALS`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from solver.cluster import Device, Node, Snapshot
from solver.geometry import Cut, empty
from solver.plan import Placement, Plan, Status
from solver.steps import State, Step, Whole, read, slice_steps, whole_steps
from solver.topology import (
    Board,
    bandwidth,
    best_bandwidth,
    fewest_numa_nodes,
    numa_nodes,
    subsets,
    ways,
)

GPU_MILLI = 1000

NUMA_MILLI = 50
"""What one more NUMA node than needed costs each GPU of a demand: 5 % of it. Chosen by feel."""

MAKE_MILLI = 40
"""What making a slice costs where an idle one might do. Chosen by feel: below the value of one unit of a cut
GPU, so that an idle slice in a bad place does not win over a good start."""

CONVEX_SHARE = 0.3
"""How much of a cut GPU's value is convex in its free units. From 0.15 to 0.5 the results hardly differ."""

NEXT_ASKS = (2, 4, 8)
"""The sizes of later demands that a node's free GPUs are kept well connected for, besides all of them."""

NEXT_SHARE = 10
"""Such a later demand counts for one in this many. Chosen by feel."""

NEXT_SUBSETS = 100
"""Later demands are looked at while there are at most so many ways to choose them (8 GPUs: 70)."""


# --- value: what a state can still earn ---


def value(state: State) -> int:
    """What a state can still earn, in milli-GPU; only differences matter. The one place that says so."""
    return _value_of_cut(state) if isinstance(state, Cut) else _value_of_whole(state.board, state.canonical().free)


def outlook(state: State) -> Hashable:
    """What `value` looks at: states with equal outlooks have equal values, and the same steps lead them to
    states with equal outlooks again. The joint flow tells no other states apart.
    """
    if isinstance(state, Whole):
        return state.canonical()
    bare = state.without_idle()
    return state.geometry, bare.busy, bare.left, state.idle


@lru_cache(maxsize=65536)
def _value_of_cut(state: Cut) -> int:
    """`options`: the share of an empty GPU's legal starts that is still open, each weighted by its size, and
    a part that is convex in the free units.

    Counted from what is held: an idle instance can be destroyed. An already cut GPU has lost its large
    starts, so a further small slice costs less there than on an empty one. Measured on the loss system of
    benchmarks.md section 2 (slice-demand accepted at load 1.0, uniform / skew-big, seeds 7 to 11): starts
    alone 88.5 / 89.6, weighted by size 90.9 / 90.5, with the convex part 91.1 / 90.7, convex alone 87.0 / 85.2.
    """
    now, fresh = state.without_idle(), empty(state.geometry)
    if not _open_starts(fresh):
        return 0
    open_share = _open_starts(now) / _open_starts(fresh)
    free_share = (state.geometry.width - now.busy.bit_count()) / state.geometry.width
    return round(GPU_MILLI * ((1 - CONVEX_SHARE) * open_share + CONVEX_SHARE * free_share**2))


@lru_cache(maxsize=65536)
def _open_starts(state: Cut) -> int:
    """The legal starts of all profiles, each counted with the units it would take."""
    return sum(len(state.starts(profile.name)) * profile.size for profile in state.geometry.profiles)


@lru_cache(maxsize=65536)
def _value_of_whole(wiring: Board, free: tuple[int, ...]) -> int:
    """Convex in the free GPUs (best fit), less what the next demands would lose in links and NUMA."""
    count = sum(free)
    if not count:
        return 0
    size = GPU_MILLI * count * count / wiring.size
    lost = 0
    for gpus in sorted({*NEXT_ASKS, count}):
        if 1 < gpus <= count and ways(free, gpus) <= NEXT_SUBSETS:
            lost += min(_set_price(wiring, chosen) for chosen in subsets(wiring, free, gpus))
    return round(size - lost / NEXT_SHARE)


@lru_cache(maxsize=65536)
def _set_price(wiring: Board, chosen: tuple[int, ...]) -> int:
    return _links_price(sum(chosen), bandwidth(wiring, chosen), best_bandwidth(wiring, sum(chosen))) + _numa_price(
        sum(chosen), numa_nodes(wiring, chosen), fewest_numa_nodes(wiring, sum(chosen))
    )


def value_taken(step: Step) -> int:
    """What the step takes from tomorrow."""
    return value(step.before) - value(step.after)


def value_gone(snapshot: Snapshot, plan: Plan) -> int:
    """The value of all nodes before the plan, less that after it."""
    after = {name: list(devices) for name, devices in snapshot.taken.items()}
    for placement in plan.placements.values():
        after.setdefault(placement.node, []).extend(placement.devices)
    return sum(
        _value_of_node(node, snapshot.taken.get(node.name, ())) - _value_of_node(node, after.get(node.name, ()))
        for node in snapshot.nodes
    )


def _value_of_node(node: Node, taken: Iterable[Device]) -> int:
    room = read(node, taken)
    return value(room.whole) + sum(value(state) for _, state in room.cuts)


# --- links: bandwidth between the GPUs of one demand ---


def links_lost(step: Step) -> int:
    """Bandwidth lost against the best set of that many GPUs this board could ever give.

    A job that loses a share of its bandwidth is taken to lose that share of its GPUs. Slices have no
    peer-to-peer, so links never count for them.
    """
    if not isinstance(step.before, Whole) or step.gpus < 2:
        return 0
    wiring = step.before.board
    return _links_price(step.gpus, bandwidth(wiring, step.take), best_bandwidth(wiring, step.gpus))


def _links_price(gpus: int, got: int, best: int) -> int:
    return round(GPU_MILLI * gpus * max(0, best - got) / best) if best > 0 else 0


def links_lost_in(snapshot: Snapshot, plan: Plan) -> int:
    """The same from each node's own link matrix, looking at every set of its whole GPUs."""
    total = 0
    for node, whole, chosen in _whole_choices(snapshot, plan):
        if len(chosen) < 2:
            continue
        best = max(_pair_sum(node, others) for others in combinations(whole, len(chosen)))
        total += _links_price(len(chosen), _pair_sum(node, chosen), best)
    return total


def _pair_sum(node: Node, positions: Iterable[int]) -> int:
    return sum(node.links[a][b] for a, b in combinations(positions, 2))


def _whole_choices(snapshot: Snapshot, plan: Plan) -> Iterable[tuple[Node, list[int], list[int]]]:
    """For each placement: its node, the positions of the node's whole GPUs, and of those it takes."""
    nodes = {node.name: node for node in snapshot.nodes}
    for placement in plan.placements.values():
        node = nodes[placement.node]
        taken = {device.gpu for device in placement.devices if device.slice is None}
        whole = [i for i, gpu in enumerate(node.gpus) if gpu.geometry is None]
        yield node, whole, [i for i in whole if node.gpus[i].uuid in taken]


# --- numa: demands spread over more NUMA nodes than needed ---


def numa_split(step: Step) -> int:
    """NUMA nodes touched beyond the fewest that this board needs for so many GPUs."""
    if not isinstance(step.before, Whole) or step.gpus < 2:
        return 0
    wiring = step.before.board
    return _numa_price(step.gpus, numa_nodes(wiring, step.take), fewest_numa_nodes(wiring, step.gpus))


def _numa_price(gpus: int, touched: int, fewest: int) -> int:
    return NUMA_MILLI * gpus * max(0, touched - fewest)


def numa_split_in(snapshot: Snapshot, plan: Plan) -> int:
    """The same from each GPU's NUMA node, looking at every set of NUMA nodes."""
    total = 0
    for node, whole, chosen in _whole_choices(snapshot, plan):
        if len(chosen) < 2:
            continue
        places = sorted({node.gpus[i].numa for i in whole}, key=str)
        fewest = next(
            count
            for count in range(1, len(places) + 1)
            if any(sum(node.gpus[i].numa in some for i in whole) >= len(chosen) for some in combinations(places, count))
        )
        total += _numa_price(len(chosen), len({node.gpus[i].numa for i in chosen}), fewest)
    return total


# --- repartition: slices that have to be made ---


def slice_made(step: Step) -> int:
    """A slice made new. An idle one of the profile, wherever it stands, is cheaper by this much."""
    return MAKE_MILLI if step.slice is not None and not step.reused else 0


def slices_made_in(snapshot: Snapshot, plan: Plan) -> int:
    """The same: slices handed out that are not on the board yet."""
    there = {Device(gpu.uuid, instance) for node in snapshot.nodes for gpu in node.gpus for instance in gpu.instances}
    return MAKE_MILLI * sum(
        device.slice is not None and device not in there
        for placement in plan.placements.values()
        for device in placement.devices
    )


# --- the tuple, and the policy that weighs it ---


@dataclass(frozen=True, slots=True)
class Goal:
    """A price by name: of one step, and counted over a plan, both in milli-GPU."""

    name: str
    of_step: Callable[[Step], int]
    of_plan: Callable[[Snapshot, Plan], int]


GOALS = (
    Goal("value", value_taken, value_gone),
    Goal("links", links_lost, links_lost_in),
    Goal("numa", numa_split, numa_split_in),
    Goal("repartition", slice_made, slices_made_in),
)

WORST_MILLI = 1_000_000
"""No goal prices one pod beyond this (a thousand GPUs), so that a better tier beats all tiers after it."""

Tier = tuple[tuple[str, int], ...]
"""Goals by name, with their weights; within a tier they are added up."""

Prices = tuple[tuple[str, int], ...]
"""What something costs by goal, unweighted, in the order of `GOALS`."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How goals are weighed: tiers in order (a better tier beats everything after it), weights inside them.

    The default has one tier and no weights: all goals speak milli-GPU, so they can be added. Links cost the
    share of the job's GPUs that it could as well not have, which beats breaking into a half-used node but
    not opening an empty one; a NUMA split decides between otherwise equal places; making a slice loses to an
    idle one unless that stands in a worse place.
    """

    name: str = "potential"
    tiers: tuple[Tier, ...] = ((("value", 1), ("links", 1), ("numa", 1), ("repartition", 1)),)

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

    def total(self, prices: Prices) -> int:
        """One number: the tiers as digits, so that the lower number is the better one in the tiers' order."""
        return sum(self.factors()[name] * milli for name, milli in prices if milli)

    def factors(self) -> dict[str, int]:
        """What each goal's milli-GPU counts in the total; 0 where the policy does not name it."""
        return _factors(self)


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


def prices_of(steps: Iterable[Step]) -> Prices:
    """What these steps cost together, by goal."""
    steps = tuple(steps)
    return tuple((goal.name, sum(goal.of_step(step) for step in steps)) for goal in GOALS)


@dataclass(frozen=True, slots=True)
class Offer:
    """A step with its total price under a policy."""

    price: int
    step: Step


@lru_cache(maxsize=16384)
def offers(state: State, part: int | str, policy: Policy) -> tuple[Offer, ...]:
    """Every useful way to serve so many whole GPUs, or one slice of a profile: cheapest first.

    Of the steps to equal states only the cheapest is kept, and of equally cheap ones the first (idle
    instances before new ones, the lowest start, the lowest GPUs).
    """
    steps: tuple[Step, ...] = ()
    if isinstance(state, Whole) and isinstance(part, int):
        steps = whole_steps(state, part)
    elif isinstance(state, Cut) and isinstance(part, str):
        steps = slice_steps(state, part)
    best: dict[State, Offer] = {}
    for step in steps:
        after = step.after.canonical() if isinstance(step.after, Whole) else step.after
        price = policy.total(prices_of((step,)))
        if after not in best or price < best[after].price:
            best[after] = Offer(price, step)
    return tuple(sorted(best.values(), key=lambda offer: offer.price))


def cheapest(state: State, part: int | str, policy: Policy) -> int | None:
    """The least that serving this part costs on the state; None where it cannot be served."""
    found = offers(state, part, policy)
    return found[0].price if found else None


def plain_prices(snapshot: Snapshot, placement: Placement) -> Prices:
    """What one placement costs by goal on this snapshot, by the plain counts alone."""
    alone = Plan(Status.FEASIBLE, (("", placement),), 0, 0)
    return tuple((goal.name, goal.of_plan(snapshot, alone)) for goal in GOALS)
