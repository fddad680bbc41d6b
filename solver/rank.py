"""One pod, now: the cheapest step over all nodes, from a table kept up to date as nodes change.

    put(node, taken) ──▶ its state ──▶ its column, worked out for all known demands in one batch, when next asked
    prices(demand)   ──▶ the demand's row ──▶ name → price; cheapest(demand) ──▶ a node with the least

Work grows with changes: a put looks at one node, asking again costs nothing until then, and equal nodes share
what was worked out for one of them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from solver.batch import NONE, VALUE, Ints, Known, Pricer, Way, nobody_to_mind, ways
from solver.cluster import Device, Gpu, Node, Taken
from solver.demand import Demand, HostNeed
from solver.fits import Refusal, refusal_in
from solver.goals import DEFAULT_POLICY, WORST_MILLI, Policy, offers, prices_of
from solver.pack import cheapest_on, is_one_slice, pack
from solver.plan import Placement
from solver.prices import Prices
from solver.steps import Host, Room, RoomState, State, Step, host_steps, read

KNOWN_DEMANDS = 1024
"""Demands whose rows are kept up; the one not asked for longest goes first. At 5,000 nodes a row is 80 kB."""

NAMED_DEMANDS = 64
"""Of these the prices by name, as they are answered, are kept: 0.6 MB each at 5,000 nodes, made anew in a
millisecond. Shares in MiB alone can be a thousand different demands."""

RENEWED_STATES = 4
"""States that `settle` renews at a time after the policy's values have changed: a few milliseconds."""

NEWS = 4
"""Changes that are remembered for the prices by name, per node; whoever missed more reads the whole row."""

STEP_BY_STEP = -1
"""Instead of the place of a way: that price was found by `pack`, and so must its devices be."""

KNOWN_REFUSALS = 64
"""Refusals remembered per node until it changes: 0.2 kB each."""


def quote(node: Node, taken: Iterable[Taken], demand: Demand, policy: Policy = DEFAULT_POLICY) -> Placement | None:
    """The cheapest placement on this node, were this taken; None if the demand does not fit."""
    return _place(read(node, taken), demand, policy)


def price(node: Node, taken: Iterable[Taken], demand: Demand, policy: Policy = DEFAULT_POLICY) -> int | None:
    """The total price of that placement."""
    return cheapest_on(read(node, taken).state, demand, policy)


def _place(room: Room, demand: Demand, policy: Policy) -> Placement | None:
    """Exact devices at the lowest price; then an idle instance, the lowest start, the lowest index."""
    equal = _cheapest_on_host(room.host, demand.host_need, policy)
    if not equal:
        return None
    first = min(equal, key=lambda step: [gpu.index for gpu in gpus_of(room, step)])
    steps, devices = [first], devices_of_step(room, first)
    if demand.slices:
        cut_up = _place_slices(room, demand, policy)
        if cut_up is None:
            return None
        steps += cut_up[0]
        devices += cut_up[1]
    return Placement(room.node.name, tuple(sorted(devices)), prices_of(steps, policy.values))


@lru_cache(maxsize=16384)
def _cheapest_on_host(state: Host, need: HostNeed, policy: Policy) -> tuple[Step, ...]:
    """All steps with the lowest price."""
    priced = [(policy.total(prices_of((step,), policy.values)), step) for step in host_steps(state, need)]
    least = min((price for price, _ in priced), default=0)
    return tuple(step for price, step in priced if price == least)


def gpus_of(room: Room, step: Step) -> list[Gpu]:
    """The GPUs that a step on the host uses, by index, the shared one last: the lowest of each class."""
    chosen = [gpu for gpus, count in zip(room.idle_gpus, step.take, strict=True) for gpu in gpus[:count]]
    chosen.sort(key=lambda gpu: gpu.index)
    if step.share_milli:
        chosen.append(_shared_gpu(room, step))
    return chosen


def _shared_gpu(room: Room, step: Step) -> Gpu:
    c = step.share_class
    if step.share_on is None:
        return room.idle_gpus[c][step.take[c]]
    return next(gpu for gpu, part in room.shared_gpus[c] if part == step.share_on)


def devices_of_step(room: Room, step: Step) -> list[Device]:
    """Real devices for a step on the host."""
    gpus = gpus_of(room, step)
    whole = gpus[:-1] if step.share_milli else gpus
    share = [Device(gpus[-1].uuid, milli=step.share_milli)] if step.share_milli else []
    return [Device(gpu.uuid) for gpu in whole] + share


def _devices(room: Room, way: Way) -> list[Device]:
    """The same for a way that the table remembers."""
    devices = [Device(gpu.uuid) for gpus, count in zip(room.idle_gpus, way.take, strict=True) for gpu in gpus[:count]]
    if way.share_milli:
        there = room.shared_gpus[way.share_class]
        if way.share_on is None:
            gpu = room.idle_gpus[way.share_class][0]
        else:
            gpu = next(gpu for gpu, part in there if part.milli == way.share_on)
        devices.append(Device(gpu.uuid, milli=way.share_milli))
    return devices


def _place_slices(room: Room, demand: Demand, policy: Policy) -> tuple[list[Step], list[Device]] | None:
    if is_one_slice(demand.slices):
        need = demand.slice_need(demand.slices[0][0])
        choices = [
            (offer.price, not offer.step.reused, offer.step.slice, gpu.index, gpu.uuid, offer.step)
            for gpu, state in room.cuts
            for offer in offers(state, need, policy)
        ]
        if not choices:
            return None
        *_, uuid, step = min(choices, key=lambda choice: choice[:4])
        return [step], [Device(uuid, step.slice)]
    found = pack([state for _, state in room.cuts], demand, policy)
    if found is None:
        return None
    steps = [step for chain in found[1] for step in chain]
    devices = [
        Device(gpu.uuid, step.slice) for (gpu, _), chain in zip(room.cuts, found[1], strict=True) for step in chain
    ]
    return steps, devices


@dataclass(slots=True)
class _Entry:
    """What the ranking knows of one node, and its column in the table."""

    room: Room
    taken: tuple[Taken, ...]
    column: int
    refusals: dict[Demand, Refusal | None] = field(default_factory=dict)
    _empty: RoomState | None = None

    def empty(self) -> RoomState:
        """Its state if nothing were held."""
        if self._empty is None:
            self._empty = read(self.room.node).state
        return self._empty


@dataclass(slots=True)
class _Row:
    """A known demand: its row in the table, the columns that have no price in it yet, and its prices by name.

    `heard` is how much of the ranking's news the prices by name have taken in; -1: they must be made anew.
    """

    number: int
    missing: set[int]
    named: Prices = field(default_factory=Prices)
    heard: int = -1


@dataclass(frozen=True, slots=True)
class Variety:
    """How many things the nodes are that differ: what a new demand costs grows with these, and not with nodes."""

    nodes: int
    states: int
    hosts: int
    """Different nodes, were it not for their GPUs in MIG mode."""
    cuts: int
    """Different GPUs in MIG mode."""
    demands: int
    """Kinds of demand that are kept up."""


def _is_small(policy: Policy) -> bool:
    """Whether the policy's totals fit into a machine word: with several tiers they may not."""
    return sum(policy.factors().values()) * WORST_MILLI < NONE // 2


class Ranking:
    """Every node's price for every known demand. Changed by `put`, `remove` and `renew`; never blocks for long.

    A table with a row for each known demand and a column for each node. A changed node's column is worked out
    in one batch (`solver.batch`) when anything is next asked, or before that by `settle`. After `renew` the
    columns stand for a while as they are, and `settle` renews a few at a time.

    `quoted` counts the entries (node × demand) that were worked out or looked up again, for tests and
    metrics: it grows with changes, never with nodes × pods.
    """

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self.quoted = 0
        self._pricer = Pricer(policy)
        self._nodes: dict[str, _Entry] = {}
        self._names: list[str] = []  # by column; empty: the column is free
        self._free: list[int] = []
        self._alike: dict[RoomState, set[int]] = {}  # columns that are up to date, by the state they stand for
        self._hosts: Counter[State] = Counter()  # in how many of these states
        self._cuts: Counter[State] = Counter()
        self._changed: dict[int, None] = {}
        self._old: dict[int, None] = {}  # columns with prices of the policy before
        self._rows: OrderedDict[Demand, _Row] = OrderedDict()
        self._unfinished: dict[Demand, _Row] = {}  # rows where something is missing
        self._named: OrderedDict[Demand, _Row] = OrderedDict()  # rows with prices by name
        self._known: Known | None = None
        self._none = NONE if _is_small(policy) else NONE**8
        self._prices = self._table(4, 16)
        self._ways: Ints = np.full((4, 16), STEP_BY_STEP, dtype=np.int64)
        self._news: list[str] = []

    @property
    def policy(self) -> Policy:
        """What prices are made by."""
        return self._pricer.policy

    @property
    def variety(self) -> Variety:
        """How many are different, but for nodes that have changed since prices were last worked out. Costs nothing."""
        return Variety(len(self._nodes), len(self._alike), len(self._hosts), len(self._cuts), len(self._rows))

    # -- what changes --

    def put(self, node: Node, taken: Iterable[Taken] = ()) -> None:
        """The node is now like this. Only its own entries change, and none if it can do what it could before."""
        taken = tuple(taken)
        room = read(node, taken)
        before = self._nodes.get(node.name)
        column = self._column_for(node.name) if before is None else before.column
        self._nodes[node.name] = _Entry(room, taken, column)
        if before is None or before.room.state != room.state:
            if before is not None:
                self._unlike(before)
            self._changed[column] = None

    def remove(self, name: str) -> None:
        """The node is gone, or not to be offered."""
        gone = self._nodes.pop(name, None)
        if gone is None:
            return
        self._unlike(gone)
        self._changed.pop(gone.column, None)
        self._prices[:, gone.column] = self._none
        for row in self._unfinished.values():
            row.missing.discard(gone.column)
        self._names[gone.column] = ""
        self._free.append(gone.column)
        self._tell(name)

    def renew(self, policy: Policy) -> None:
        """Nodes that change from now on are priced by this policy, and all others one after another by `settle`."""
        if _is_small(policy) != _is_small(self.policy):
            raise ValueError(f"policy {policy.name} has other tiers than {self.policy.name}: make a new ranking")
        self._pricer.renew(policy)
        for columns in self._alike.values():
            self._old.update(dict.fromkeys(columns))

    def settle(self, states: int = RENEWED_STATES) -> None:
        """Do now what would else be done when prices are next asked for, and renew so many states."""
        while self._changed:
            self._catch_up(next(iter(self._changed)))
        for _ in range(states):
            if self._old:
                self._write(self._state_of(next(iter(self._old))))

    # -- what is asked --

    def prices(self, demand: Demand) -> Mapping[str, int]:
        """The nodes that can take the demand now, by name, each with its total price. Do not change it."""
        prices = self.prices_while(demand, lambda: True)
        assert prices is not None
        return prices

    def prices_while(self, demand: Demand, go_on: Callable[[], bool]) -> Mapping[str, int] | None:
        """The same, given up (None) as soon as `go_on()` says no; what was worked out is kept for the next call."""
        found = self.priced_while(demand, go_on)
        return None if found is None else found.by_name

    def priced_while(self, demand: Demand, go_on: Callable[[], bool]) -> Prices | None:
        """The same, by name and by price. Good until the ranking is next changed or asked."""
        row = self._ready(demand, go_on)
        if row is None:
            return None
        prices = self._prices[row.number]
        if row.heard < 0:
            fits = np.flatnonzero(prices[: len(self._names)] != self._none)
            row.named.fill(zip([self._names[column] for column in fits.tolist()], prices[fits].tolist(), strict=True))
        elif row.heard < len(self._news):
            for name in dict.fromkeys(self._news[row.heard :]):
                entry = self._nodes.get(name)
                price = self._none if entry is None else int(prices[entry.column])
                row.named.put(name, None if price == self._none else price)
        row.heard = len(self._news)
        self._named[demand] = row
        self._named.move_to_end(demand)
        if len(self._named) > NAMED_DEMANDS:
            _, oldest = self._named.popitem(last=False)
            oldest.named.clear()
            oldest.heard = -1
        return row.named

    def cheapest(self, demand: Demand, chance: Random | None = None) -> str | None:
        """A node with the lowest price: any of them by chance, or the first; None where the demand fits nowhere."""
        row = self._ready(demand, lambda: True)
        assert row is not None
        prices = self._prices[row.number, : len(self._names)]
        column = int(prices.argmin()) if len(prices) else 0
        if not len(prices) or prices[column] == self._none:
            return None
        if chance is not None:
            equal = np.flatnonzero(prices == prices[column])
            column = int(equal[int(chance.random() * len(equal))])
        return self._names[column]

    def best(self, demand: Demand, name: str) -> Placement | None:
        """The exact devices for the demand on this node; None if it does not fit or there is no such node."""
        entry = self._nodes.get(name)
        if entry is None:
            return None
        return self._remembered(demand, entry) or _place(entry.room, demand, self.policy)

    def refusal(self, demand: Demand, name: str) -> Refusal | None:
        """Why the node cannot take the demand; None if it can. Remembered until the node changes."""
        entry = self._nodes.get(name)
        if entry is None:
            return Refusal("is not known to have GPUs")
        if demand not in entry.refusals:
            if len(entry.refusals) >= KNOWN_REFUSALS:
                entry.refusals.clear()
            entry.refusals[demand] = refusal_in(entry.room, entry.taken, demand, empty=entry.empty)
        return entry.refusals[demand]

    # -- the table --

    def _table(self, rows: int, columns: int) -> NDArray[Any]:
        """Prices, with nothing that fits. Those of policies with several tiers may be too long for a machine word."""
        return np.full((rows, columns), self._none, dtype=np.int64 if self._none == NONE else object)

    def _column_for(self, name: str) -> int:
        if self._free:
            column = self._free.pop()
            self._names[column] = name
            return column
        self._names.append(name)
        self._grow(len(self._rows), len(self._names))
        return len(self._names) - 1

    def _grow(self, rows: int, columns: int) -> None:
        """Make room for so many, doubling."""
        have_rows, have_columns = self._prices.shape
        if rows <= have_rows and columns <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        columns = have_columns if columns <= have_columns else max(columns, 2 * have_columns)
        prices, ways = self._prices, self._ways
        self._prices = self._table(rows, columns)
        self._ways = np.full((rows, columns), STEP_BY_STEP, dtype=np.int64)
        self._prices[:have_rows, :have_columns], self._ways[:have_rows, :have_columns] = prices, ways

    def _unlike(self, entry: _Entry) -> None:
        """The column no longer stands for its state."""
        state = entry.room.state
        together = self._alike.get(state, set())
        together.discard(entry.column)
        if not together and self._alike.pop(state, None) is not None:
            self._count(state, -1)
        self._old.pop(entry.column, None)

    def _count(self, state: RoomState, by: int) -> None:
        """A state has come (1) or gone (-1), and its parts with it."""
        self._hosts[state.host] += by
        if not self._hosts[state.host]:
            del self._hosts[state.host]
        for each, _ in state.cuts:
            self._cuts[each] += by
            if not self._cuts[each]:
                del self._cuts[each]

    def _tell(self, name: str) -> None:
        """Every row's prices by name must look at this node again."""
        self._news.append(name)
        if len(self._news) > NEWS * len(self._names) + NEWS:
            self._news.clear()
            for row in self._rows.values():
                row.heard = -1

    def _ready(self, demand: Demand, go_on: Callable[[], bool]) -> _Row | None:
        """The demand's row with everything in it; None if that would have taken too long."""
        row = self._rows.get(demand)
        if row is None:
            row = self._add(demand)
        else:
            self._rows.move_to_end(demand)
        if not self.catch_up(go_on):
            return None
        if row.missing:
            alone = Known((demand,))
            while row.missing:
                if not go_on():
                    return None
                state = self._state_of(next(iter(row.missing)))
                together = sorted(self._alike[state])
                prices, ways = self._work_out(alone, state)
                self._prices[row.number, together], self._ways[row.number, together] = prices[0], ways[0]
                row.missing.difference_update(together)
                self.quoted += len(together)
            row.heard = -1
        if self._unfinished.pop(demand, None) is not None:
            row.missing.clear()  # gives back what a set of all columns took: 0.5 MB at 5,000 nodes
        return row

    def catch_up(self, go_on: Callable[[], bool]) -> bool:
        """Bring every row up to date with the nodes that have changed, which is else left to the next question.

        False where `go_on()` ended it: there is more.
        """
        while self._changed:
            if not go_on():
                return False
            self._catch_up(next(iter(self._changed)))
        return True

    def _add(self, demand: Demand) -> _Row:
        number = len(self._rows)
        if number >= KNOWN_DEMANDS:
            forgotten, oldest = self._rows.popitem(last=False)
            self._unfinished.pop(forgotten, None)
            self._named.pop(forgotten, None)
            number = oldest.number
        self._grow(number + 1, len(self._names))
        self._known = None
        self._prices[number] = self._none
        row = self._rows[demand] = _Row(number, {column for together in self._alike.values() for column in together})
        if row.missing:
            self._unfinished[demand] = row
        return row

    def _state_of(self, column: int) -> RoomState:
        return self._nodes[self._names[column]].room.state

    def _catch_up(self, column: int) -> None:
        """Bring the column of a changed node up to date: as another in its state, or worked out for all of them."""
        state = self._state_of(column)
        if state not in self._alike:
            self._alike[state] = set()
            self._count(state, 1)
        together = self._alike[state]
        twin = next((each for each in together if each not in self._old), None)
        together.add(column)
        del self._changed[column]
        if twin is None or self._unfinished:
            self._write(state)
            return
        self._prices[:, column], self._ways[:, column] = self._prices[:, twin], self._ways[:, twin]
        self.quoted += len(self._rows)
        self._tell(self._names[column])

    def _write(self, state: RoomState) -> None:
        """Work out the prices of a state for every known demand, and write them into all columns in it."""
        together = sorted(self._alike[state])
        known = self._all_known()
        if known.demands:
            prices, ways = self._work_out(known, state)
            self._prices[: len(prices), together] = prices[:, None]
            self._ways[: len(ways), together] = ways[:, None]
        self.quoted += len(known.demands) * len(together)
        for column in together:
            self._old.pop(column, None)
            self._tell(self._names[column])
        for row in self._unfinished.values():
            row.missing.difference_update(together)

    def _all_known(self) -> Known:
        if self._known is None:
            by_number = {row.number: demand for demand, row in self._rows.items()}
            self._known = Known([by_number[number] for number in range(len(by_number))])
        return self._known

    def _work_out(self, known: Known, state: RoomState) -> tuple[NDArray[Any], Ints]:
        """By demand: the least price on a node in this state, and the place of its way among all."""
        if self._none == NONE and nobody_to_mind(state.host):
            prices, ways = self._pricer.prices(known, state.host)
            ways[known.others] = STEP_BY_STEP
            by_step = known.others
        else:
            prices = self._table(1, len(known.demands))[0]
            ways = np.full(len(known.demands), STEP_BY_STEP, dtype=np.int64)
            by_step = list(range(len(known.demands)))
        for i in by_step:
            least = cheapest_on(state, known.demands[i], self.policy)
            prices[i] = self._none if least is None else least
        return prices, ways

    def _remembered(self, demand: Demand, entry: _Entry) -> Placement | None:
        """The placement that the table's price is for; None if that must be asked step by step."""
        row = self._rows.get(demand)
        host, weight = entry.room.host, self.policy.factors()[VALUE]
        if row is None or not weight or entry.column in self._changed or entry.column in row.missing:
            return None
        place, price = int(self._ways[row.number, entry.column]), self._prices[row.number, entry.column]
        if place == STEP_BY_STEP or price == self._none or host is not entry.room.state.host:
            return None
        ask = self._all_known().ask(row.number, host)
        way = ways(host, ask)[place]
        fixed = self._pricer.fixed(host, ask, way)
        value = (int(price) - fixed.total) // weight
        prices = tuple([(name, value if name == VALUE else milli) for name, milli in fixed.prices])
        return Placement(entry.room.node.name, tuple(sorted(_devices(entry.room, way))), prices)
