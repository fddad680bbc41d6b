"""Columns of a joint plan: what one unit can serve, each bundle of demands at its least price.

    Host, Cut:  states ──offers──▶ arcs; from the last states back, the cheapest course to every bundle
    RoomState:  a course of its host and one of each cut that serve the same demands
    too many:   a few bundles that a greedy walk finds worthwhile (`grow`); the unit is then not complete

What several steps cost together does not depend on their order, so a bundle has one least price. Bundles are
kept in one number, 16 bits for each demand: adding a demand is adding a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from solver.demand import Demand, HostNeed, SliceNeed
from solver.geometry import Cut
from solver.goals import offers
from solver.steps import Host, RoomState, State, Step
from solver.units import Lens, Scale, Unit, is_coupled

REACHED = 600
"""States that one host's courses may lead through. Eight GPUs in two NUMA nodes have 45; eight GPUs with shares on
them have millions, and are not complete. A state takes up to a millisecond."""

CUT_STATES = 2_000
"""The same for a cut. An A100 has 1,500 with all its profiles, a few hundred with those that are mostly asked for;
they are the same in every plan, so their prices are known from the second on."""

STATES = 5_000
"""The same for all hosts of a plan together."""

FEW = 5
"""Asks in all up to which every bundle is looked at by itself: shares on rich hosts, and boards with many states."""

BUNDLES = 3_000
"""Bundles that one unit may have and be complete. Boards of 8 with demands of 1, 2, 4 and 8 GPUs have 35, an A100
with all its profiles 127."""

COMBINED = 300_000
"""Pairs of bundles (of one cut, and of all cuts before it) that are tried at once for a whole node."""

BITS = 16
MASK = (1 << BITS) - 1

Packed = int
"""How many of each demand, in one number."""

Part = tuple[int, HostNeed | SliceNeed]
"""A demand by number, and what one unit must serve of it."""

Way = tuple[tuple[int, int, Step], ...]
"""Steps in an order in which they can be taken, each with the demand that it serves and, where several of that
demand are served, which of them."""


def packed(demand: int) -> Packed:
    """One of this demand."""
    return 1 << BITS * demand


def counts_of(bundle: Packed) -> list[tuple[int, int]]:
    """The demands of a bundle, with their counts."""
    found, demand = [], 0
    while bundle:
        if bundle & MASK:
            found.append((demand, bundle & MASK))
        bundle >>= BITS
        demand += 1
    return found


class Course(NamedTuple):
    """The cheapest way to a bundle: its price, its first step (for which demand), and the rest from there."""

    price: int
    demand: int = -1
    step: Step | None = None
    target: int = -1
    rest: Packed = 0


class Courses:
    """The courses of hosts and cuts from every state that was asked about, at the least price.

    Any bundle that fits can be served in the order of its demands, so only such courses are looked at.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        caps: Sequence[int],
        lens: Lens,
        scale: Scale,
        go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._go_on = go_on
        self._hosted = [(d, need) for d, need in parts if isinstance(need, HostNeed)]
        self._sliced = [(d, need) for d, need in parts if isinstance(need, SliceNeed)]
        self._caps = [min(MASK, cap) for cap in caps]
        self._lens = lens
        self._scale = scale
        self._numbers: dict[State, int] = {}
        self._states: list[State] = []
        self._arcs: list[list[_Arc] | None] = []
        self._courses: list[dict[Packed, Course] | None] = []
        self._asked: dict[tuple[int, Packed], Course | None] = {}
        self._looked_at = 0
        self._hopeless: dict[object, int] = {}
        self._few_on_host = self._bundles([d for d, _ in self._hosted])
        self._few_on_cut = self._bundles([d for d, _ in self._sliced])

    def _bundles(self, demands: Sequence[int]) -> list[Packed] | None:
        """Every bundle of these demands, if they are few."""
        if sum(self._caps[d] for d in demands) > FEW:
            return None
        bundles = [0]
        for d in demands:
            bundles = [bundle + packed(d) * n for bundle in bundles for n in range(self._caps[d] + 1)]
        return bundles

    def of(self, state: State) -> dict[Packed, Course] | None:
        """The cheapest course to every bundle; None where there are too many."""
        few = self._few_on_host if isinstance(state, Host) else self._few_on_cut
        if few is not None and self._looked_at <= STATES:
            return {bundle: course for bundle in few if (course := self.to(state, bundle)) is not None}
        if isinstance(state, Host) and state.free_milli >= self._hopeless.get(state.board, 1 << 60):
            return None
        root = self._number(state)
        reached = self._reach(root)
        if reached is None or not all(self._complete(number) for number in reached):
            if isinstance(state, Host):
                self._hopeless[state.board] = min(state.free_milli, self._hopeless.get(state.board, 1 << 60))
            return None
        return self._courses[root]

    def to(self, state: State, bundle: Packed) -> Course | None:
        """The cheapest course to this one bundle; None where it does not fit."""
        return self._to(self._number(state), bundle)

    def way(self, state: State, bundle: Packed) -> list[tuple[int, Step]]:
        """The steps of a course, each with its demand."""
        found: list[tuple[int, Step]] = []
        number = self._number(state)
        while bundle:
            courses = self._courses[number]
            course = courses[bundle] if courses is not None else self._to(number, bundle)
            assert course is not None
            assert course.step is not None
            found.append((course.demand, course.step))
            number, bundle = course.target, course.rest
        return found

    def stays(self, state: State, need: HostNeed | SliceNeed) -> int | None:
        """What serving this costs where it changes nothing; None where it changes something, or is not served."""
        for offer in offers(state, need, self._lens.policy):
            if self._lens.state(offer.step.after) == state:
                return self._scale.of(offer)
        return None

    def _to(self, number: int, bundle: Packed) -> Course | None:
        if not bundle:
            return Course(0)
        key = (number, bundle)
        if key not in self._asked:
            first = (bundle & -bundle).bit_length() // BITS
            best: Course | None = None
            for arc in self._arcs_from(number):
                if arc.demand == first:
                    rest = self._to(arc.target, bundle - packed(first))
                    if rest is not None and (best is None or arc.price + rest.price < best.price):
                        best = Course(arc.price + rest.price, first, arc.step, arc.target, bundle - packed(first))
            self._asked[key] = best
        return self._asked[key]

    def _number(self, state: State) -> int:
        number = self._numbers.get(state)
        if number is None:
            number = self._numbers[state] = len(self._states)
            self._states.append(state)
            self._arcs.append(None)
            self._courses.append(None)
        return number

    def _reach(self, root: int) -> list[int] | None:
        """The states from here that have no courses yet, each after all that it leads to; None: too many."""
        order: list[int] = []
        seen = {root}
        hosts = isinstance(self._states[root], Host)
        stack: list[tuple[int, int]] = [(root, 0)] if self._courses[root] is None else []
        while stack:
            if not self._go_on():
                return None
            number, i = stack.pop()
            arcs = self._arcs_from(number)
            while i < len(arcs) and (arcs[i].target in seen or self._courses[arcs[i].target] is not None):
                i += 1
            if i == len(arcs):
                order.append(number)
                continue
            target = arcs[i].target
            seen.add(target)
            if len(seen) > (REACHED if hosts else CUT_STATES) or (hosts and self._looked_at > STATES):
                return None
            stack += [(number, i + 1), (target, 0)]
        return order

    def _arcs_from(self, number: int) -> list[_Arc]:
        arcs = self._arcs[number]
        if arcs is None:
            state = self._states[number]
            self._looked_at += isinstance(state, Host)
            parts: Iterable[Part] = self._hosted if isinstance(state, Host) else self._sliced
            look, price = self._lens.state, self._scale.of
            arcs = self._arcs[number] = [
                _Arc(d, self._number(look(offer.step.after)), price(offer), offer.step)
                for d, need in parts
                for offer in offers(state, need, self._lens.policy)
                if look(offer.step.after) != state or not is_loose(need)
            ]
        return arcs

    def _complete(self, number: int) -> bool:
        here: dict[Packed, Course] = {0: Course(0)}
        for d, target, price, step in reversed(self._arcs[number] or ()):
            shift, cap = BITS * d, self._caps[d]
            one = 1 << shift
            before = one - 1  # the bits of the demands that come first
            rests = self._courses[target] if target != number else here
            assert rests is not None
            waiting = list(rests.items())
            for rest, course in waiting:
                if rest & before or (rest >> shift) & MASK >= cap:
                    continue
                bundle, total = rest + one, price + course.price
                known = here.get(bundle)
                if known is None or total < known.price:
                    here[bundle] = made = Course(total, d, step, target, rest)
                    if target == number:
                        waiting.append((bundle, made))
            if len(here) > BUNDLES:
                return False
        self._courses[number] = here
        return True


def is_loose(need: HostNeed | SliceNeed) -> bool:
    """Whether it takes nothing but CPU and memory. Where these cannot run out it is no part of any column."""
    return isinstance(need, HostNeed) and not need.takes_devices


class _Arc(NamedTuple):
    """A demand served on a state (which leads to another, by number), at this price."""

    demand: int
    target: int
    price: int
    step: Step


# --- units with their columns ---


class Column(NamedTuple):
    """A bundle that a unit can serve, its price on the scale, and what tells how to serve bundles.

    There are a hundred thousand of them, and ways are asked of few.
    """

    bundle: Packed
    price: int
    ways: Callable[[Packed], Way]

    def way(self) -> Way:
        """How to serve it."""
        return self.ways(self.bundle)


@dataclass(slots=True)
class Columns:
    """The columns of the units in one state. `complete`: there are no others."""

    unit: Unit
    count: int
    complete: bool
    found: dict[Packed, Column] = field(default_factory=dict)

    def add(self, column: Column) -> bool:
        """Keep the column, if it is new or cheaper than the one for the same bundle."""
        known = self.found.get(column.bundle)
        if known is not None and known.price <= column.price:
            return False
        self.found[column.bundle] = column
        return True


class Catalogue:
    """The columns of every unit, for these demands and so many of each (`caps`).

    Once `go_on()` says no, what is not known by then counts as too much.
    """

    def __init__(
        self,
        demands: Sequence[Demand],
        caps: Sequence[int],
        lens: Lens,
        scale: Scale,
        go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self._go_on = go_on
        self.demands = demands
        self.scale = scale
        self.caps = caps
        self._lens = lens
        small: list[Part] = [(d, demand.host_need) for d, demand in enumerate(demands) if not demand.slices]
        for d, demand in enumerate(demands):
            if demand.slices and not is_coupled(demand):
                small.append((d, demand.slice_need(demand.slices[0][0])))
        self.courses = Courses(small, caps, lens, scale, go_on)
        self._on_host = Courses([(d, demand.host_need) for d, demand in enumerate(demands)], caps, lens, scale)
        self._needs: list[list[tuple[SliceNeed, int]]] = [
            [(demand.slice_need(profile), count) for profile, count in demand.slices] for demand in demands
        ]
        self.pieces = list(dict.fromkeys(need for needs in self._needs for need, _ in needs))
        number = {need: i for i, need in enumerate(self.pieces)}
        self.cut_into = [sum(packed(number[need]) * count for need, count in needs) for needs in self._needs]
        most = [0] * len(self.pieces)
        for needs, cap in zip(self._needs, caps, strict=True):
            for need, count in needs:
                most[number[need]] += cap * count
        self.most_pieces = most
        self.in_cuts = Courses(list(enumerate(self.pieces)), most, lens, scale, go_on)

    def of(self, unit: Unit, count: int) -> Columns:
        """All that the unit can serve; not complete where that is too much."""
        if not self._go_on():
            return Columns(unit, count, False)
        if isinstance(unit.state, RoomState):
            return self._of_room(unit, unit.state, count)
        found = self.courses.of(unit.state)
        if found is None:
            return Columns(unit, count, False)
        shut = sum(MASK << BITS * d for d in unit.barred)
        ways = partial(self._small_way, unit.state)
        columns = {
            bundle: Column(bundle, course.price, ways)
            for bundle, course in found.items()
            if bundle and not bundle & shut
        }
        return Columns(unit, count, True, columns)

    def _small_way(self, state: State, bundle: Packed) -> Way:
        return numbered(self.courses.way(state, bundle))

    def host_courses(self, demands: Sequence[int]) -> Courses:
        """Courses of hosts for the host's part of these demands only."""
        parts = [(d, self.demands[d].host_need) for d in demands]
        return Courses(parts, self.caps, self._lens, self.scale, self._go_on)

    def loose_way(self, state: Host, d: int) -> Way:
        """The step of a demand that changes nothing."""
        found = offers(state, self.demands[d].host_need, self.scale.policy)
        return ((d, 0, found[0].step),)

    def loose_ways(self, state: Host, d: int) -> Callable[[Packed], Way]:
        """The same for a column."""
        return lambda _: self.loose_way(state, d)

    def _of_room(self, unit: Unit, state: RoomState, count: int) -> Columns:
        """Every bundle that the host and the cuts can serve together."""
        stages = self._stages(state)
        if stages is None:
            return Columns(unit, count, False)
        in_cuts = stages[-1][1]
        found: dict[Packed, Column] = {}
        stack: list[tuple[int, Packed, Packed]] = [(0, 0, 0)]
        while stack:
            first, bundle, pieces = stack.pop()
            for d in range(first, len(self.demands)):
                if bundle >> BITS * d & MASK >= self.caps[d]:
                    continue
                more, cut_up = bundle + packed(d), pieces + self.cut_into[d]
                slices = in_cuts.get(cut_up)
                hosted = self._on_host.to(state.host, more) if slices is not None else None
                if slices is None or hosted is None:
                    continue
                ways = partial(self._room_way, state, stages, cut_up)
                found[more] = Column(more, slices + hosted.price, ways)
                if len(found) > BUNDLES:
                    return Columns(unit, count, False)
                stack.append((d, more, cut_up))
        return Columns(unit, count, True, found)

    def _stages(self, state: RoomState) -> list[tuple[Cut | None, dict[Packed, int]]] | None:
        """The least price of every bundle of slices on the first cut, the first two, …; None: too many."""
        stages: list[tuple[Cut | None, dict[Packed, int]]] = [(None, {0: 0})]
        for cut in in_order(state):
            courses = self.in_cuts.of(cut)
            if courses is None or len(courses) * len(stages[-1][1]) > COMBINED:
                return None
            after: dict[Packed, int] = {}
            for bundle, course in courses.items():
                for rest, so_far in stages[-1][1].items():
                    price = so_far + course.price
                    if price < after.get(bundle + rest, price + 1):
                        after[bundle + rest] = price
            stages.append((cut, after))
        return stages

    def _room_way(
        self,
        state: RoomState,
        stages: Sequence[tuple[Cut | None, dict[Packed, int]]],
        pieces: Packed,
        bundle: Packed,
    ) -> Way:
        """The host's steps, then those of each cut, given to the demands that want such slices."""
        found = list(numbered(self._on_host.way(state.host, bundle)))
        wanted: dict[int, list[tuple[int, int]]] = {}
        for d, count in counts_of(bundle):
            for nth in range(count):
                for piece, times in counts_of(self.cut_into[d]):
                    wanted.setdefault(piece, []).extend([(d, nth)] * times)
        for (cut, after), (_, before) in zip(reversed(stages[1:]), reversed(stages[:-1]), strict=True):
            assert cut is not None
            courses = self.in_cuts.of(cut)
            assert courses is not None
            here = next(
                each
                for each, course in courses.items()
                if pieces >= each and before.get(pieces - each, 1 << 200) + course.price == after[pieces]
            )
            found += [(*wanted[piece].pop(), step) for piece, step in self.in_cuts.way(cut, here)]
            pieces -= here
        return tuple(found)


def in_order(state: RoomState) -> list[Cut]:
    """The node's GPUs in MIG mode, always in the same order (sets of equal content may differ in theirs)."""
    counted = sorted(state.cuts, key=lambda each: (each[0].held, each[0].idle, each[0].guests, each[1]))
    return [cut for cut, count in counted for _ in range(count)]


def numbered(steps: Iterable[tuple[int, Step]]) -> Way:
    """Steps that each serve a demand alone."""
    seen: dict[int, int] = {}
    found = []
    for d, step in steps:
        seen[d] = seen.get(d, -1) + 1
        found.append((d, seen[d], step))
    return tuple(found)
