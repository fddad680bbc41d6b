"""One by one, counted: the one-pod path for many equal pods on many equal units. A joint plan's hint and fallback.

Demand after demand in the order given; each goes where it is cheapest now, of equals to the unit that came first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count as numbers
from typing import NamedTuple

from solver.columns import BITS, MASK, Column, Packed, Way, in_order, packed
from solver.demand import Demand
from solver.geometry import Cut
from solver.goals import offers
from solver.pack import is_one_slice, pack
from solver.steps import Host, RoomState, Step
from solver.units import Lens, Scale, Unit, UnitState


class Move(NamedTuple):
    """A demand served on a unit: its price, the state after it, and the steps."""

    price: int
    after: UnitState
    steps: tuple[Step, ...]


@dataclass(slots=True, eq=False)
class Position:
    """So many units that started in one state and have served the same in the same way."""

    unit: Unit
    state: UnitState
    bundle: Packed
    price: int
    count: int
    before: Position | None = None
    last: tuple[int, tuple[Step, ...]] = (-1, ())
    prefix: Way = ()

    def column(self) -> Column:
        """What these units serve."""
        return Column(self.bundle, self.price, lambda _: self.way())

    def way(self) -> Way:
        """How they serve it."""
        chain: list[tuple[int, tuple[Step, ...]]] = []
        here: Position | None = self
        while here is not None and here.before is not None:
            chain.append(here.last)
            here = here.before
        found = list(here.prefix) if here is not None else []
        seen: dict[int, int] = {}
        for d, nth, _ in found:
            seen[d] = max(nth, seen.get(d, 0))
        for d, steps in reversed(chain):
            seen[d] = seen.get(d, -1) + 1
            found += [(d, seen[d], step) for step in steps]
        return tuple(found)


class Mover:
    """The cheapest move of each demand on each state, worked out once."""

    def __init__(self, demands: Sequence[Demand], lens: Lens, scale: Scale) -> None:
        self.demands = demands
        self._lens = lens
        self._scale = scale
        self.looked_at = 0
        self._known: dict[tuple[UnitState, int], Move | None] = {}

    def move(self, unit: Unit, state: UnitState, d: int) -> Move | None:
        """None where the demand cannot be served."""
        if d in unit.barred:
            return None
        key = (state, d)
        if key not in self._known:
            self.looked_at += 1
            self._known[key] = self._find(state, self.demands[d])
        return self._known[key]

    def _find(self, state: UnitState, demand: Demand) -> Move | None:
        if isinstance(state, RoomState):
            return self._in_room(state, demand)
        policy = self._lens.policy
        if isinstance(state, Cut):
            found = offers(state, demand.slice_need(demand.slices[0][0]), policy) if is_one_slice(demand.slices) else ()
            found = () if demand.gpus or demand.is_shared else found
        else:
            found = () if demand.slices else offers(state, demand.host_need, policy)
        if not found:
            return None
        step = found[0].step
        return Move(self._scale.of(found[0]), self._lens.state(step.after), (step,))

    def _in_room(self, state: RoomState, demand: Demand) -> Move | None:
        policy = self._lens.policy
        hosted = offers(state.host, demand.host_need, policy)
        if not hosted:
            return None
        steps: list[Step] = [hosted[0].step]
        cuts = in_order(state)
        if demand.slices:
            packed_up = pack(cuts, demand, policy)
            if packed_up is None:
                return None
            for i, chain in enumerate(packed_up[1]):
                for step in chain:
                    assert isinstance(step.after, Cut)
                    cuts[i] = self._lens.cut(step.after)
                    steps.append(step)
        after = steps[0].after
        assert isinstance(after, Host)
        counted: dict[Cut, int] = {}
        for cut in cuts:
            counted[cut] = counted.get(cut, 0) + 1
        price = sum(self._scale.of_step(step) for step in steps)
        return Move(price, RoomState(self._lens.host(after), frozenset(counted.items())), tuple(steps))


def place_all(
    positions: Iterable[Position],
    waiting: Iterable[tuple[int, int]],
    mover: Mover,
    go_on: Callable[[], bool] = lambda: True,
) -> list[Position]:
    """Place demands (by number, so many of each) in this order; answers all positions with their counts.

    Given up as soon as `go_on()` says no.
    """
    known = {(each.unit, each.state, each.bundle): each for each in positions}
    for d, wanted in waiting:
        ticket = numbers()
        heap = []
        for position in known.values():
            if not go_on():
                return list(known.values())
            move = mover.move(position.unit, position.state, d) if position.count else None
            if move is not None:
                heap.append((move.price, next(ticket), position, move))
        heapify(heap)
        while wanted and heap:
            if not go_on():
                return list(known.values())
            _, _, position, move = heap[0]
            if not position.count or position.bundle >> BITS * d & MASK == MASK:
                heappop(heap)
                continue
            key = (position.unit, move.after, position.bundle + packed(d))
            target = known.get(key)
            if target is None:
                price = position.price + move.price
                target = Position(position.unit, move.after, key[2], price, 0, position, (d, move.steps))
                known[key] = target
            again = mover.move(target.unit, target.state, d)
            # as long as the next one is no cheaper on the unit just used, all of the position can go at once
            times = 1 if again is not None and again.price < move.price else min(wanted, position.count)
            position.count -= times
            wanted -= times
            was_empty = not target.count
            target.count += times
            if again is not None and was_empty:
                heappush(heap, (again.price, next(ticket), target, again))
    return list(known.values())
