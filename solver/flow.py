"""Everything that is pending, together: an exact flow of units through states, solved by CP-SAT.

    rooms ──▶ units (a GPU in MIG mode; a node's whole GPUs), counted by state
    states ──offers──▶ arcs: state ──demand──▶ next state, with a price
    arcs ──▶ courses: from a state, the cheapest way to serve this bundle of demands
    choices: how many units of a state take each course; how many of each demand stay unplaced
    rules:   a demand is served or unplaced; a unit takes one course
    goals:   worth of the unplaced first, then the policy's tiers, each proven before it is fixed
    program: bounded by its linear program, decided by CP-SAT
    plan:    units walk the courses that were chosen, and each step takes real devices

The size is that of the different states and demands, not of nodes or pods. The plan says "so many of this
bundle on units in that state"; which of equal pods goes first does not matter.

A course is a path of the flow, and what a path costs is the sum of its steps, so one variable for each bundle
says all that a variable for each arc could. Measured (500 empty nodes, 1,000 asks, nine kinds, one core): arcs
12 s (986 variables), courses 13 ms (72 variables), the same optimum.

Asks that couple several slices on one node (or slices and whole GPUs) are no single step. They are placed
before the flow, one by one, the worthiest first and equals in the order of the problem; the plan is then
FEASIBLE at most. (They will join the flow as courses of whole nodes.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from solver.cluster import GPU_MILLI, Allocation, Device, Gpu, Taken
from solver.demand import Ask, Demand, HostNeed, Problem, SliceNeed
from solver.fits import refusal
from solver.geometry import Cut
from solver.goals import DEFAULT_POLICY, Offer, Policy, Prices, allocation_of, offers, prices_of, steps_of
from solver.pack import is_one_slice
from solver.plan import Placement, Plan, Status, Unplaced
from solver.program import Limits, Program, Terms
from solver.rank import Ranking
from solver.steps import Host, Room, State, Step, read
from solver.topology import Counts
from solver.values import Values

STATES = 20_000
"""States that are looked at. Ordinary boards have tens to hundreds; sixteen GPUs that are all wired
differently have 65,536. Beyond, later states take no steps in the flow, and the plan is FEASIBLE."""

BUNDLES = 3_000
"""Courses kept for one state, the smallest bundles first. Boards of 8 with demands of 1, 2, 4 and 8 GPUs have
35, an A100 with all its profiles 127. Beyond, the plan is FEASIBLE."""

UNPLACED = 10**12
"""What a milli-GPU that is not placed counts in a plan's cost, next to 1 for a milli-GPU of price: so much
that placing more always comes first."""


def solve(
    problem: Problem,
    policy: Policy = DEFAULT_POLICY,
    *,
    seed: int = 0,
    workers: int = 1,
    time_limit_seconds: float | None = None,
    deterministic_limit: float | None = None,
) -> Plan:
    """Place all asks of the problem together: as much of their worth as can be, then at the least price.

    An ask is worth its milli-GPU (`worth`). OPTIMAL is a proof for both, in that order. With a limit (seconds
    of wall clock, or CP-SAT's deterministic time) the plan may be FEASIBLE: nothing that fits is left out,
    but it could be better, at most down to `bound`. `bound` is 0 where it is not known.
    """
    books = _Books(problem, policy)
    alone = [ask for ask in problem.asks if not _is_one_step(ask.demand)]
    for ask in sorted(alone, key=lambda ask: -books.worth(ask.demand)):
        books.place_alone(ask)

    limits = Limits(seed, workers, time_limit_seconds, deterministic_limit)
    rooms = books.rooms()
    proven, known, bound = not alone, not alone, 0
    for asks in _separate([ask for ask in problem.asks if _is_one_step(ask.demand)], rooms):
        network = _network(books, rooms, asks)
        answer = _minimise(network, policy, limits)
        _walk(network, answer.taken, books)
        proven = proven and answer.status is Status.OPTIMAL
        known = known and not network.cut_short
        bound += answer.bound

    if not (proven and known):
        for ask in problem.asks:
            if ask.id not in books.placed:
                books.place_alone(ask)
    cost = books.cost()
    bound = min(bound if known else 0, cost)
    status = Status.OPTIMAL if proven and bound == cost else Status.FEASIBLE
    return Plan(status, books.outcomes(), cost, bound)


def worth(demand: Demand, units: dict[str, int]) -> int:
    """What placing a demand counts, in milli-GPU: 1000 a GPU, and of a slice its share of the GPU's memory.

    `units` gives the milli-GPU of a slice by profile: the smallest share that any GPU of the cluster makes
    of it. A profile that is nowhere counts nothing, since it can be placed nowhere.
    """
    return (
        GPU_MILLI * demand.gpus
        + demand.share_milli
        + sum(count * units.get(profile, 0) for profile, count in demand.slices)
    )


def _is_one_step(demand: Demand) -> bool:
    plain = Demand(demand.gpus, demand.slices)
    if demand != plain:
        return False
    if demand.slices:
        return demand.gpus == 0 and is_one_slice(demand.slices)
    return demand.gpus > 0


# --- the books: who has what while a plan is made ---


class _Books:
    """Rooms and outcomes while a plan is made. Rooms are read again only where something was placed."""

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self.problem = problem
        self.policy = policy
        self.placed: dict[str, Placement] = {}
        self.added: dict[str, list[Allocation]] = {}
        self.hosts: dict[str, Host] = {}
        self._nodes = {node.name: node for node in problem.snapshot.nodes}
        self._order = {node.name: i for i, node in enumerate(problem.snapshot.nodes)}
        self._ranking: Ranking | None = None
        self._changed: set[str] = set()
        self._units = _slice_worth(problem)

    def worth(self, demand: Demand) -> int:
        return worth(demand, self._units)

    def rooms(self) -> list[Room]:
        """Every node as it is now."""
        return [read(node, self.taken(node.name)) for node in self.problem.snapshot.nodes]

    def taken(self, name: str) -> tuple[Taken, ...]:
        before = self.problem.snapshot.taken.get(name, ())
        added = self.added.get(name)
        return (*before, *added) if added else tuple(before)

    def place(self, ask: Ask, placement: Placement) -> None:
        self.placed[ask.id] = placement
        self.added.setdefault(placement.node, []).append(allocation_of(ask.demand, placement))
        self._changed.add(placement.node)

    def place_alone(self, ask: Ask) -> None:
        """The one-pod path: the cheapest node now, if any; of equals the first."""
        if self._ranking is None:
            self._ranking = Ranking(self.policy)
            self._changed = set(self._nodes)
        for name in sorted(self._changed):
            self._ranking.put(self._nodes[name], self.taken(name))
        self._changed.clear()
        prices = self._ranking.prices(ask.demand)
        if not prices:
            return
        name = min(prices, key=lambda name: (prices[name], self._order[name]))
        placement = self._ranking.best(ask.demand, name)
        assert placement is not None
        self.place(ask, placement)

    def cost(self) -> int:
        """What the plan costs: the unplaced, then the prices."""
        left = sum(self.worth(ask.demand) for ask in self.problem.asks if ask.id not in self.placed)
        return UNPLACED * left + sum(self.policy.total(placement.prices) for placement in self.placed.values())

    def outcomes(self) -> tuple[tuple[str, Placement | Unplaced], ...]:
        reasons: dict[Demand, Unplaced] = {}
        found: list[tuple[str, Placement | Unplaced]] = []
        for ask in self.problem.asks:
            placement = self.placed.get(ask.id)
            if placement is None and ask.demand not in reasons:
                reasons[ask.demand] = self._why_unplaced(ask.demand)
            found.append((ask.id, placement or reasons[ask.demand]))
        return tuple(found)

    def _why_unplaced(self, demand: Demand) -> Unplaced:
        """One node's refusal before the plan if there is one for each, else that the rest won the room."""
        nodes = self.problem.snapshot.nodes
        for node in nodes[:1]:
            refused = refusal(node, self.problem.snapshot.taken.get(node.name, ()), demand)
            if refused is not None and len(nodes) == 1:
                return Unplaced(f"{node.name}: {refused}")
        return Unplaced(f"no node has room for {demand} in this plan")


def _slice_worth(problem: Problem) -> dict[str, int]:
    """Milli-GPU of a slice by profile: the smallest share of a GPU's memory units that the cluster offers."""
    units: dict[str, int] = {}
    geometries = {gpu.geometry for node in problem.snapshot.nodes for gpu in node.gpus if gpu.geometry}
    for geometry in geometries:
        for profile in geometry.profiles:
            share = round(GPU_MILLI * profile.size / geometry.width)
            units[profile.name] = min(units.get(profile.name, share), share)
    return units


# --- the network: states, arcs, units ---


@dataclass(frozen=True, slots=True)
class _Arc:
    """A demand served on a unit in one state, which leads to another; states and demands by number."""

    demand: int
    target: int
    offer: Offer


Bundle = tuple[int, ...]
"""How many of each demand of one kind (of whole GPUs, or of slices)."""


@dataclass(frozen=True, slots=True)
class _Course:
    """The cheapest way to serve a bundle from a state: the first arc, then the rest of the bundle from there."""

    price: int
    first: _Arc | None = None


@dataclass(slots=True)
class _Unit:
    """What takes a course: one GPU in MIG mode (`gpu`), or a node's whole GPUs as they are free now."""

    room: Room
    gpu: Gpu | None = None
    free: list[list[Gpu]] = field(default_factory=list)


@dataclass(slots=True)
class _Network:
    """The problem in numbers: `units[s]` start in state s, `courses[s]` are open to them."""

    states: list[State]
    units: list[list[_Unit]]
    demands: list[Demand]
    asks: list[list[Ask]]
    worths: list[int]
    courses: list[dict[Bundle, _Course]]
    cut_short: bool


def _separate(asks: Iterable[Ask], rooms: Sequence[Room]) -> list[list[Ask]]:
    """Asks that can never compete for a unit, apart: whole GPUs, and slices of boards with no profile in common.

    Each part is solved by itself, which is exact, and much easier to prove than all of them in one program.
    """
    whole = ""
    family: dict[str, str] = {whole: whole}

    def root(name: str) -> str:
        while family.setdefault(name, name) != name:
            name = family[name]
        return name

    for geometry in {cut.geometry for room in rooms for _, cut in room.cuts}:
        for profile in geometry.profiles:
            family[root(profile.name)] = root(geometry.profiles[0].name)
    parts: dict[str, list[Ask]] = {}
    for ask in asks:
        parts.setdefault(root(ask.demand.slices[0][0] if ask.demand.slices else whole), []).append(ask)
    return list(parts.values())


def _network(books: _Books, rooms: Sequence[Room], asks: Sequence[Ask]) -> _Network:
    """Units by state, every state that the demands can lead to, and the courses from there."""
    pending: dict[Demand, list[Ask]] = {}
    for ask in asks:
        pending.setdefault(ask.demand, []).append(ask)
    demands = sorted(pending)
    counts = [len(pending[demand]) for demand in demands]
    sizes = [(d, demand.host_need) for d, demand in enumerate(demands) if demand.gpus]
    profiles = [
        (d, demand.slice_need(demand.slices[0][0]), demand.host_need)
        for d, demand in enumerate(demands)
        if demand.slices
    ]

    numbers: dict[Hashable, int] = {}
    states: list[State] = []
    units: list[list[_Unit]] = []

    def number(state: State) -> int:
        seen = books.policy.values.essence(state)
        if seen not in numbers:
            numbers[seen] = len(states)
            states.append(state)
            units.append([])
        return numbers[seen]

    for room in rooms:
        if sizes and any(room.host.idle):
            free = [list(gpus) for gpus in room.idle_gpus]
            units[number(room.state.host)].append(_Unit(room, free=free))
        if profiles and steps_of(room.host, profiles[0][2]):
            for gpu, cut in room.cuts:
                units[number(cut)].append(_Unit(room, gpu=gpu))

    arcs: list[list[_Arc]] = []
    while len(arcs) < len(states) <= STATES:
        state = states[len(arcs)]
        parts: Iterable[tuple[int, HostNeed | SliceNeed]] = (
            [(d, need) for d, need, _ in profiles] if isinstance(state, Cut) else sizes
        )
        arcs.append(
            [
                _Arc(d, number(offer.step.after), offer)
                for d, part in parts
                for offer in offers(state, part, books.policy)
            ]
        )
    cut_short = len(arcs) < len(states)
    arcs += [[] for _ in range(len(states) - len(arcs))]
    courses, dropped = _courses(states, arcs, counts)
    return _Network(
        states=states,
        units=units,
        demands=demands,
        asks=[pending[demand] for demand in demands],
        worths=[books.worth(demand) for demand in demands],
        courses=courses,
        cut_short=cut_short or dropped,
    )


def _courses(
    states: Sequence[State], arcs: Sequence[Sequence[_Arc]], counts: Sequence[int]
) -> tuple[list[dict[Bundle, _Course]], bool]:
    """For each state the cheapest course to every bundle that fits, later states first; and if any were dropped."""
    nothing = (0,) * len(counts)
    courses: list[dict[Bundle, _Course]] = [{} for _ in states]
    dropped = False
    for s in sorted(range(len(states)), key=lambda s: _room_left(states[s])):
        here = courses[s]
        here[nothing] = _Course(0)
        for arc in arcs[s]:
            d, price = arc.demand, arc.offer.price
            for rest, course in courses[arc.target].items():
                if rest[d] == counts[d]:
                    continue
                bundle = (*rest[:d], rest[d] + 1, *rest[d + 1 :])
                known = here.get(bundle)
                if known is None or price + course.price < known.price:
                    here[bundle] = _Course(price + course.price, arc)
        if len(here) > BUNDLES:
            dropped = True
            kept = sorted(here, key=lambda bundle: (sum(bundle), bundle))[:BUNDLES]
            courses[s] = {bundle: here[bundle] for bundle in kept}
    return courses, dropped


def _room_left(state: State) -> int:
    """Falls with every step: what nobody holds, in units or GPUs."""
    if isinstance(state, Cut):
        return state.geometry.width - state.without_idle().busy.bit_count()
    return sum(state.idle)


def _arcs_of(network: _Network, start: int, bundle: Bundle) -> Iterator[_Arc]:
    """The course's arcs, one after the other."""
    arc = network.courses[start][bundle].first
    while arc is not None:
        yield arc
        bundle = (*bundle[: arc.demand], bundle[arc.demand] - 1, *bundle[arc.demand + 1 :])
        arc = network.courses[arc.target][bundle].first


# --- the model: choices, rules, goals ---


class _Choices:
    """The variables, and the questions rules and goals ask about them."""

    def __init__(self, program: Program, network: _Network) -> None:
        self.network = network
        self._unplaced = [
            program.variable(len(asks), f"unplaced[{demand}]")
            for demand, asks in zip(network.demands, network.asks, strict=True)
        ]
        self._taking: dict[int, dict[Bundle, int]] = {}
        counts = [len(asks) for asks in network.asks]
        for start, units in enumerate(network.units):
            if units:
                self._taking[start] = {
                    bundle: program.variable(
                        min(len(units), *(have // n for n, have in zip(bundle, counts, strict=True) if n)),
                        f"units[{start},{bundle}]",
                    )
                    for bundle in network.courses[start]
                    if any(bundle)
                }

    def unplaced(self, demand: int) -> int:
        """How many of the demand stay unplaced."""
        return self._unplaced[demand]

    def starts(self) -> list[int]:
        """The states in which units start."""
        return list(self._taking)

    def taking_a_course_from(self, start: int) -> list[int]:
        """How many units that start in this state take each of its courses."""
        return list(self._taking[start].values())

    def courses(self) -> Iterator[tuple[int, Bundle, int]]:
        """Each course: its state, its bundle, and how many units take it."""
        for start, courses in self._taking.items():
            for bundle, units in courses.items():
                yield start, bundle, units


def every_demand_is_served_or_unplaced(program: Program, choices: _Choices) -> None:
    """Each ask is served by a unit on its course, or counts as unplaced."""
    serving = [[(choices.unplaced(d), 1)] for d in range(len(choices.network.demands))]
    for _, bundle, units in choices.courses():
        for d, count in enumerate(bundle):
            if count:
                serving[d].append((units, count))
    for terms, asks in zip(serving, choices.network.asks, strict=True):
        program.equal(terms, len(asks))


def a_unit_takes_one_course(program: Program, choices: _Choices) -> None:
    """No more units set out from a state than start in it."""
    for start in choices.starts():
        terms = [(units, 1) for units in choices.taking_a_course_from(start)]
        program.at_most(terms, len(choices.network.units[start]))


RULES = (every_demand_is_served_or_unplaced, a_unit_takes_one_course)


def worth_unplaced(choices: _Choices) -> Terms:
    """What stays unplaced, in milli-GPU."""
    return [(choices.unplaced(d), milli) for d, milli in enumerate(choices.network.worths)]


def tier_price(choices: _Choices, policy: Policy, tier: int) -> Terms:
    """What the chosen courses cost in one tier of the policy."""
    weights = dict(policy.tiers[tier])
    of_offer: dict[Offer, int] = {}

    def price(offer: Offer) -> int:
        if offer not in of_offer:
            prices = prices_of((offer.step,), policy.values)
            of_offer[offer] = sum(weights.get(name, 0) * milli for name, milli in prices)
        return of_offer[offer]

    return [
        (units, sum(price(arc.offer) for arc in _arcs_of(choices.network, start, bundle)))
        for start, bundle, units in choices.courses()
    ]


@dataclass(frozen=True, slots=True)
class _Answer:
    """How many units take each course (state, bundle, units), and the least that a plan's cost could be."""

    status: Status
    taken: list[tuple[int, Bundle, int]]
    bound: int


def _minimise(network: _Network, policy: Policy, limits: Limits) -> _Answer:
    """Goal by goal: what is proven of one is fixed for the next; the first that is not proven is the last.

    The unplaced come first. Mostly their linear bound can be reached, and trying the first tier with that
    much left unplaced is a proof of both; only where it fails are the unplaced minimised by themselves.
    """
    program = Program()
    choices = _Choices(program, network)
    for rule in RULES:
        rule(program, choices)
    worth = worth_unplaced(choices)
    goals = [(digit, tier_price(choices, policy, tier)) for tier, digit in enumerate(_digits(policy))]

    def answer(status: Status, values: Sequence[int] | None, bound: int) -> _Answer:
        if values is None:
            return _Answer(Status.UNKNOWN, [], bound)
        taken = [(start, bundle, values[units]) for start, bundle, units in choices.courses()]
        return _Answer(status, taken, bound)

    if not program.can_hold(worth):
        return answer(Status.UNKNOWN, None, _least(goals, program))
    left = program.floor(worth)
    found = program.with_at_most(worth, left).minimise(goals[0][1], limits, one_try=True) if goals else None
    if found is None or found.values is None:
        fewest = program.minimise(worth, limits)
        if fewest.status is not Status.OPTIMAL:
            return answer(fewest.status, fewest.values, UNPLACED * fewest.bound + _least(goals, program))
        left, found = fewest.cost, None
    program.at_most(worth, left)
    bound = UNPLACED * left
    values = found.values if found is not None else fewest.values
    for tier, (digit, goal) in enumerate(goals):
        found = program.minimise(goal, limits) if found is None else found
        values = values if found.values is None else found.values
        bound += digit * found.bound
        later = goals[tier + 1 :]
        if found.status is not Status.OPTIMAL or (later and not program.can_hold(goal)):
            return answer(Status.FEASIBLE, values, bound + _least(later, program))
        if later:
            program.at_most(goal, found.cost)
        found = None
    return answer(Status.OPTIMAL, values, bound)


def _least(goals: Sequence[tuple[int, Terms]], program: Program) -> int:
    """No prices of these goals add up to less: every course with a negative price taken as often as can be."""
    return sum(digit * sum(min(0, price) * program.most[units] for units, price in goal) for digit, goal in goals)


def _digits(policy: Policy) -> list[int]:
    """What one unit of each tier counts in the policy's total."""
    factors = policy.factors()
    return [next((factors[name] // weight for name, weight in tier if weight), 0) for tier in policy.tiers]


# --- the plan: units walk the chosen arcs ---


def _walk(network: _Network, taken: Sequence[tuple[int, Bundle, int]], books: _Books) -> None:
    """Send units on the courses chosen; each step gives the next ask of its demand real devices.

    Prices are those of the very states: the units of one node share its host, and who comes first opens it.
    """
    waiting = [deque(asks) for asks in network.asks]
    resting = [deque(units) for units in network.units]
    for start, bundle, times in taken:
        arcs = list(_arcs_of(network, start, bundle)) if times else []
        for _ in range(times):
            unit = resting[start].popleft()
            name = unit.room.node.name
            for arc in arcs:
                ask = waiting[arc.demand].popleft()
                before = books.hosts.get(name, unit.room.host)
                if unit.gpu is not None:
                    on_host = _first_step(before, ask.demand.host_need)
                    steps: tuple[Step, ...] = (on_host, arc.offer.step)
                    devices: tuple[Device, ...] = (Device(unit.gpu.uuid, arc.offer.step.slice),)
                else:
                    after = arc.offer.step.after
                    assert isinstance(after, Host)
                    on_host = _step_to(before, ask.demand.host_need, after.canonical(), books.policy)
                    steps, devices = (on_host,), _take(unit, on_host)
                assert isinstance(on_host.after, Host)
                books.hosts[name] = on_host.after
                books.place(ask, Placement(name, devices, _prices_of(steps, books.policy.values)))


def _take(unit: _Unit, step: Step) -> tuple[Device, ...]:
    """Real devices for a step on a node's whole GPUs."""
    devices = []
    for free, count in zip(unit.free, step.take, strict=True):
        devices += [Device(gpu.uuid) for gpu in free[:count]]
        del free[:count]
    return tuple(sorted(devices))


@lru_cache(maxsize=65536)
def _prices_of(steps: tuple[Step, ...], values: Values) -> Prices:
    return prices_of(steps, values)


@lru_cache(maxsize=65536)
def _first_step(state: Host, need: HostNeed) -> Step:
    found = steps_of(state, need)[0]
    assert isinstance(found, Step)
    return found


@lru_cache(maxsize=65536)
def _step_to(state: Host, need: HostNeed, after: Host, policy: Policy) -> Step:
    """The cheapest step from this very state to one with the GPUs free that `after` has."""
    steps = [offer.step for offer in offers(state, need, policy)]
    wanted = (after.idle, after.shared)
    return next(step for step in steps if isinstance(step.after, Host) and _free_of(step.after) == wanted)


def _free_of(state: Host) -> tuple[Counts, object]:
    found = state.canonical()
    return found.idle, found.shared
