"""One pod, now: the cheapest step over all nodes, from tables kept up to date as nodes change.

    put(node, taken) ──▶ its state ──▶ marked as changed in the table of each known demand
    prices(demand)   ──▶ the nodes changed since last time, each from its state's row ──▶ name → price

Work grows with changes: a put looks at one node, asking again costs nothing until then, and equal nodes share
what was worked out for one of them (a row of prices for each state).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from solver.cluster import Device, Gpu, Node, Taken
from solver.demand import Demand, HostNeed
from solver.fits import Refusal, refusal_in
from solver.goals import DEFAULT_POLICY, Policy, offers, prices_of
from solver.pack import cheapest_on, is_one_slice, pack
from solver.plan import Placement
from solver.steps import Host, Room, RoomState, Step, host_steps, read

KNOWN_DEMANDS = 256
"""Demands whose tables are kept up; the one not asked for longest goes first."""

KNOWN_STATES = 50_000
"""States whose rows are kept; the one not met for longest goes first. A row is a few hundred bytes."""

KNOWN_REFUSALS = 256
"""Refusals remembered per node until it changes."""


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
    """What the ranking knows of one node."""

    room: Room
    taken: tuple[Taken, ...]
    refusals: dict[Demand, Refusal | None] = field(default_factory=dict)


@dataclass(slots=True)
class _Table:
    """The prices of one demand by node, and the nodes that have changed since they were last asked for."""

    prices: dict[str, int] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


class Ranking:
    """Every node's price for every known demand. Changed by `put` and `remove` only; never blocks.

    `quoted` counts the entries (node × demand) that were worked out or looked up again, for tests and
    metrics: it grows with changes, never with nodes × pods.
    """

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self.policy = policy
        self.quoted = 0
        self._nodes: dict[str, _Entry] = {}
        self._tables: OrderedDict[Demand, _Table] = OrderedDict()
        self._rows: OrderedDict[RoomState, dict[Demand, int | None]] = OrderedDict()

    def put(self, node: Node, taken: Iterable[Taken] = ()) -> None:
        """The node is now like this. Only its own entries change, and none if it can do what it could before.

        They are marked here and brought up to date when their demand is next asked for.
        """
        taken = tuple(taken)
        room = read(node, taken)
        before = self._nodes.get(node.name)
        self._nodes[node.name] = _Entry(room, taken)
        if before is None or before.room.state != room.state:
            for table in self._tables.values():
                table.changed.add(node.name)

    def remove(self, name: str) -> None:
        """The node is gone, or not to be offered."""
        if self._nodes.pop(name, None) is not None:
            for table in self._tables.values():
                table.prices.pop(name, None)
                table.changed.discard(name)

    def prices(self, demand: Demand) -> Mapping[str, int]:
        """The nodes that can take the demand now, by name, each with its total price. Do not change it."""
        prices = self.prices_while(demand, lambda: True)
        assert prices is not None
        return prices

    def prices_while(self, demand: Demand, go_on: Callable[[], bool]) -> Mapping[str, int] | None:
        """The same, given up (None) as soon as `go_on()` says no; what was worked out is kept for the next call."""
        table = self._tables.get(demand)
        if table is None:
            table = self._tables[demand] = _Table(changed=set(self._nodes))
            if len(self._tables) > KNOWN_DEMANDS:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(demand)
        while table.changed:
            if not go_on():
                return None
            name = table.changed.pop()
            least = self._quote(self._nodes[name].room.state, demand)
            if least is None:
                table.prices.pop(name, None)
            else:
                table.prices[name] = least
        return table.prices

    def best(self, demand: Demand, name: str) -> Placement | None:
        """The exact devices for the demand on this node; None if it does not fit or there is no such node."""
        entry = self._nodes.get(name)
        return None if entry is None else _place(entry.room, demand, self.policy)

    def refusal(self, demand: Demand, name: str) -> Refusal | None:
        """Why the node cannot take the demand; None if it can. Remembered until the node changes."""
        entry = self._nodes.get(name)
        if entry is None:
            return Refusal("is not known to have GPUs")
        if demand not in entry.refusals:
            if len(entry.refusals) >= KNOWN_REFUSALS:
                entry.refusals.clear()
            entry.refusals[demand] = refusal_in(entry.room, entry.taken, demand)
        return entry.refusals[demand]

    def _quote(self, state: RoomState, demand: Demand) -> int | None:
        """The least price on a node in this state, from its row."""
        self.quoted += 1
        row = self._rows.get(state)
        if row is None:
            row = self._rows[state] = {}
            if len(self._rows) > KNOWN_STATES:
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(state)
        if demand not in row:
            if len(row) >= 2 * KNOWN_DEMANDS:
                row.clear()
            row[demand] = cheapest_on(state, demand, self.policy)
        return row[demand]
