"""Everything that is pending, together: nodes are read and counted, decided in numbers, and given real devices.

    rooms ──lens──▶ units in equal states ──▶ decide ──▶ so many units of that state serve this, in this way
          ──▶ each unit walks its way on the node as it is, and each step takes real devices

The plan says "so many of this bundle on units in that state"; which of equal pods goes first does not matter, so
the caller's order decides. Prices are those of the very steps on the very nodes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from solver.cluster import GPU_MILLI, Device, Gpu
from solver.decide import LATE_SECONDS, Question, Take, Wish, decide_units, in_status
from solver.demand import Ask, Demand, HostNeed, Problem
from solver.fits import refusal
from solver.geometry import Cut
from solver.goals import DEFAULT_POLICY, Policy, Prices, allocation_of, offers, prices_of, steps_of
from solver.guests import join
from solver.plan import Placement, Plan, Status, Tier, Unplaced
from solver.program import Limits
from solver.rank import Ranking
from solver.steps import Host, Part, Room, Step, read
from solver.units import Unit, Worth

ONE_BY_ONE = 2_000
"""Asks up to which a plan that is not proven is held against the one-pod path, ask by ask (a millisecond each).
Beyond, the counted one (`greedy`) must do."""

UNPLACED = 10**12
"""What a milli-GPU that is not placed counts in a plan's cost at least, next to 1 for a milli-GPU of price. With
very many asks or several tiers it is a larger power of ten (`digits`)."""


LOOKED_AT, TOLD = 64, 3
"""Nodes that are asked why they could not take a demand that stays unplaced, and reasons that are told."""


def solve(
    problem: Problem,
    policy: Policy = DEFAULT_POLICY,
    *,
    seed: int = 0,
    workers: int = 1,
    time_limit_seconds: float | None = None,
    deterministic_limit: float | None = None,
    clock: Callable[[], float] | None = None,
) -> Plan:
    """Place all asks of the problem together: the more urgent first, as much of their worth as can be, then at the
    least price.

    OPTIMAL is a proof for all of it, in that order. With a limit (seconds in solvers, by `clock` if there is one, or
    CP-SAT's deterministic time for each solve) the plan may be FEASIBLE: while there is time nothing that fits is left
    out, and placing one by one is never better, but it could be better down to `bound`.
    """
    question = question_of(problem, policy)
    walk = Walk(problem, question)
    limits = Limits(seed, workers, time_limit_seconds, deterministic_limit, clock).started()
    late = limits.longer(LATE_SECONDS)
    decision = decide_units(walk.counted(), question, limits)
    for take in decision.takes:
        walk.send(take)
    placed, tiers = walk.placed, decision.tiers
    if decision.status is not Status.OPTIMAL and len(problem.asks) <= ONE_BY_ONE:
        other = _one_by_one(problem, policy, late)
        if other is not None:
            placed, tiers = _no_worse_than(other, placed, tiers, problem, question)
    unit = dict(zip(question.tier_names(), digits(question), strict=True))
    cost = sum(unit[tier.name] * tier.value for tier in tiers)
    bound = sum(unit[tier.name] * tier.bound for tier in tiers)
    status = Status.OPTIMAL if cost == bound else Status.FEASIBLE
    return Plan(status, _outcomes(problem, placed), cost, bound, tiers, decision.seconds)


def _one_by_one(problem: Problem, policy: Policy, limits: Limits) -> dict[str, Placement] | None:
    """The one-pod path for each ask in its turn: the urgent first, then in the order of the problem. None where that
    takes too long.
    """
    nodes = {node.name: node for node in problem.snapshot.nodes}
    order = {name: i for i, name in enumerate(nodes)}
    taken = {name: list(problem.snapshot.taken.get(name, ())) for name in nodes}
    ranking = Ranking(policy)
    for name, node in nodes.items():
        ranking.put(node, taken[name])
    placed = {}
    for ask in sorted(problem.asks, key=lambda ask: -ask.priority):
        prices = ranking.prices_while(ask.demand, lambda: not limits.none_left(0.0))
        if prices is None:
            return None
        if prices:
            name = min(prices, key=lambda name: (prices[name], order[name]))
            placement = ranking.best(ask.demand, name)
            assert placement is not None
            placed[ask.id] = placement
            taken[name].append(allocation_of(ask.demand, placement))
            ranking.put(nodes[name], taken[name])
    return placed


def _no_worse_than(
    other: dict[str, Placement],
    placed: dict[str, Placement],
    tiers: tuple[Tier, ...],
    problem: Problem,
    question: Question,
) -> tuple[dict[str, Placement], tuple[Tier, ...]]:
    """The better of the two plans, with the same bounds."""
    values = [0] * len(tiers)
    for ask in problem.asks:
        if ask.id in other:
            for t, tier in enumerate(question.policy.tiers, start=len(question.priorities)):
                prices = dict(other[ask.id].prices)
                values[t] += sum(weight * prices[name] for name, weight in tier)
        else:
            values[question.priorities.index(ask.priority)] += question.worths[question.number[ask.demand]]
    if values >= [tier.value for tier in tiers]:
        return placed, tiers
    return other, in_status(tiers, values)


def question_of(problem: Problem, policy: Policy) -> Question:
    """What a problem asks, counted."""
    gpus = {(gpu.kind, gpu.geometry) for node in problem.snapshot.nodes for gpu in node.gpus}
    pending = Counter(Wish(ask.demand, ask.priority) for ask in problem.asks)
    return Question(pending, policy, Worth.among(policy, gpus))


def digits(question: Question) -> list[int]:
    """What one of each tier counts in a plan's cost: more than all tiers after it can add up to.

    The policy's tiers are as they are (the last counts 1); a milli-GPU unplaced is a power of ten, at least
    `UNPLACED`, and so is one of each higher priority.
    """
    found = list(question.scale.digits)
    digit = _power_of_ten(max(UNPLACED, question.scale.reach))
    for priority in reversed(question.priorities):
        found.insert(0, digit)
        asked = [(wish, count) for wish, count in question.pending.items() if wish.priority == priority]
        most = sum(question.worths[question.number[wish.demand]] * count for wish, count in asked)
        digit *= _power_of_ten(most + 1)
    return found


def _power_of_ten(number: int) -> int:
    """The smallest that is no less."""
    return int(10 ** len(str(number - 1))) if number > 1 else 1


def _outcomes(problem: Problem, placed: Mapping[str, Placement]) -> tuple[tuple[str, Placement | Unplaced], ...]:
    reasons: dict[Demand, Unplaced] = {}
    found: list[tuple[str, Placement | Unplaced]] = []
    for ask in problem.asks:
        placement = placed.get(ask.id)
        if placement is None and ask.demand not in reasons:
            reasons[ask.demand] = _why_unplaced(problem, ask.demand)
        found.append((ask.id, placement or reasons[ask.demand]))
    return tuple(found)


def _why_unplaced(problem: Problem, demand: Demand) -> Unplaced:
    """What was in the way before the plan on nodes all over the cluster, or else that others won the room."""
    nodes = problem.snapshot.nodes
    looked_at = nodes[:: max(1, -(-len(nodes) // LOOKED_AT))]
    reasons: Counter[str] = Counter()
    for node in looked_at:
        refused = refusal(node, problem.snapshot.taken.get(node.name, ()), demand)
        if refused is None:
            return Unplaced(f"no node has room for {demand} in this plan: others took what there was, or time ran out")
        reasons[refused.reason] += 1
    if not reasons:
        return Unplaced("there are no nodes")
    if len(reasons) == len(looked_at) == 1:
        return Unplaced(f"{looked_at[0].name}: {next(iter(reasons))}")
    told = [f"{count} node{'s' if count != 1 else ''}: {reason}" for reason, count in reasons.most_common(TOLD)]
    more = f"; {len(reasons) - TOLD} more reasons" if len(reasons) > TOLD else ""
    return Unplaced("; ".join(told) + more)


# --- units walk on real nodes ---


@dataclass(slots=True)
class _Standing:
    """One node while the plan is walked: what is free of it, with names, in the board's own order of classes."""

    room: Room
    host: Host
    idle: list[list[Gpu]]
    shared: list[list[tuple[Gpu, Part]]]
    cuts: list[Cut]

    @classmethod
    def of(cls, room: Room) -> _Standing:
        """The node as it was read."""
        idle, shared = [list(gpus) for gpus in room.idle_gpus], [list(parts) for parts in room.shared_gpus]
        return cls(room, room.host, idle, shared, [cut for _, cut in room.cuts])

    def take(self, step: Step) -> list[Device]:
        """Real devices for a step on the host, which is then taken."""
        devices = []
        for free, count in zip(self.idle, step.take, strict=True):
            devices += [Device(gpu.uuid) for gpu in free[:count]]
            del free[:count]
        if step.share_milli:
            devices.append(self._share(step))
        assert isinstance(step.after, Host)
        self.host = step.after
        return devices

    def _share(self, step: Step) -> Device:
        parts = self.shared[step.share_class]
        if step.share_on is None:
            gpu, before = self.idle[step.share_class].pop(0), Part(GPU_MILLI)
        else:
            at = next(i for i, (_, part) in enumerate(parts) if part == step.share_on)
            gpu, before = parts.pop(at)
        guests = join(before.guests, step.guest, occupied=step.share_on is not None)
        left = Part(before.milli - step.share_milli, guests)
        if left.milli:
            parts.append((gpu, left))
        return Device(gpu.uuid, milli=step.share_milli)

    def cut_up(self, i: int, step: Step) -> tuple[Device, Step]:
        """The slice of a step on the node's i-th GPU in MIG mode, and the step as it really is there."""
        before, at = self.cuts[i], step.slice
        assert at is not None
        self.cuts[i] = before.add(at, step.guest)
        real = Step(before, self.cuts[i], step.need, slice=at, reused=at in before.idle)
        return Device(self.room.cuts[i][0].uuid, at), real


class Walk:
    """Real devices for the units of a plan."""

    def __init__(self, problem: Problem, question: Question) -> None:
        self.placed: dict[str, Placement] = {}
        self._question = question
        self._lens = question.lens
        asks = sorted(problem.asks, key=lambda ask: -ask.priority)
        self._waiting: list[deque[Ask]] = [deque() for _ in question.demands]
        for ask in asks:
            self._waiting[question.number[ask.demand]].append(ask)
        self._rooms: list[_Standing] = []
        self._units: dict[Unit, deque[tuple[int, int]]] = {}
        taken = problem.snapshot.taken
        for node in problem.snapshot.nodes:
            self._add(read(node, taken.get(node.name, ())))
        self._first = {unit: places[0] for unit, places in self._units.items()}
        self._steps: dict[tuple[Host, HostNeed, Host], Step] = {}
        self._prices: dict[tuple[Step, ...], Prices] = {}

    def _add(self, room: Room) -> None:
        number = len(self._rooms)
        self._rooms.append(_Standing.of(room))
        whole, cuts = self._lens.units(room.host, [cut for _, cut in room.cuts])
        self._units.setdefault(whole, deque()).append((number, -1))
        for i, unit in enumerate(cuts):
            self._units.setdefault(unit, deque()).append((number, i))

    def counted(self) -> dict[Unit, int]:
        """How many units there are in each state."""
        return {unit: len(places) for unit, places in self._units.items()}

    def send(self, take: Take) -> None:
        """So many units go this way."""
        places = self._units[take.unit]
        for _ in range(take.times):
            number, i = self._first[take.unit] if take.loose else places.popleft()
            standing = self._rooms[number]
            served: dict[tuple[int, int], tuple[list[Device], list[Step]]] = {}
            for d, nth, step in take.way:
                devices, steps = served.setdefault((d, nth), ([], []))
                if isinstance(step.need, HostNeed):
                    steps.append(self._on_host(standing, step))
                    devices += standing.take(steps[-1])
                    continue
                if i >= 0:  # a GPU that is a unit of its own: the node's host takes its step along
                    steps.append(steps_of(standing.host, self._question.demands[d].host_need)[0])
                    standing.take(steps[-1])
                device, real = standing.cut_up(i if i >= 0 else self._like(standing, step), step)
                devices.append(device)
                steps.append(real)
            for (d, _), (devices, steps) in served.items():
                ask = self._waiting[d].popleft()
                name = standing.room.node.name
                self.placed[ask.id] = Placement(name, tuple(sorted(devices)), self._prices_of(tuple(steps)))

    def _on_host(self, standing: _Standing, step: Step) -> Step:
        """The step from the node's very state that leaves the GPUs free that this one does."""
        assert isinstance(step.need, HostNeed)
        assert isinstance(step.after, Host)
        look = self._lens.host
        wanted = look(step.after)
        key = (standing.host, step.need, wanted)
        if key not in self._steps:
            for offer in offers(standing.host, step.need, self._question.policy):
                assert isinstance(offer.step.after, Host)
                after = look(offer.step.after)
                if (after.idle, after.shared) == (wanted.idle, wanted.shared):
                    self._steps[key] = offer.step
                    break
        return self._steps[key]

    def _like(self, standing: _Standing, step: Step) -> int:
        """A GPU of the node that is in the state before the step."""
        look = self._lens.cut
        assert isinstance(step.before, Cut)
        before = look(step.before)
        return next(i for i, cut in enumerate(standing.cuts) if look(cut) == before)

    def _prices_of(self, steps: tuple[Step, ...]) -> Prices:
        if steps not in self._prices:
            self._prices[steps] = prices_of(steps, self._question.policy.values)
        return self._prices[steps]
