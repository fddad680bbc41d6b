"""One pod, now: the cheapest step over all nodes, from tables kept up to date as nodes change.

    put(node, taken) ──▶ its state ──▶ one row of prices per state, shared by all nodes in it
                            └──▶ for each known demand: name → price      (this node's entries only)

Work grows with changes: a put looks at one node, a known demand costs nothing until then, and equal nodes
share what was worked out for one of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from solver.cluster import Device, Gpu, Node
from solver.demand import Demand
from solver.fits import Refusal, refusal
from solver.goals import DEFAULT_POLICY, Policy, cheapest, offers, prices_of
from solver.pack import cheapest_on, is_one_slice, pack
from solver.plan import Placement
from solver.steps import Room, RoomState, Step, read, whole_steps

KNOWN_DEMANDS = 256
"""Demands whose tables are kept up; the one not asked for longest goes first."""

KNOWN_STATES = 50_000
"""States whose rows are kept; the one not met for longest goes first. A row is a few hundred bytes."""

KNOWN_REFUSALS = 256
"""Refusals remembered per node until it changes."""


def quote(node: Node, taken: Iterable[Device], demand: Demand, policy: Policy = DEFAULT_POLICY) -> Placement | None:
    """The cheapest placement on this node, were these devices taken; None if the demand does not fit."""
    return _place(read(node, taken), demand, policy)


def price(node: Node, taken: Iterable[Device], demand: Demand, policy: Policy = DEFAULT_POLICY) -> int | None:
    """The total price of that placement."""
    return cheapest_on(read(node, taken).state, demand, policy)


def _place(room: Room, demand: Demand, policy: Policy) -> Placement | None:
    """Exact devices at the lowest price; then an idle instance, the lowest start, the lowest index."""
    steps: list[Step] = []
    devices: list[Device] = []
    if demand.gpus:
        whole = _place_whole(room, demand.gpus, policy)
        if whole is None:
            return None
        steps.append(whole[0])
        devices += whole[1]
    if demand.slices:
        cut_up = _place_slices(room, demand.slices, policy)
        if cut_up is None:
            return None
        steps += cut_up[0]
        devices += cut_up[1]
    return Placement(room.node.name, tuple(sorted(devices)), prices_of(steps))


def _place_whole(room: Room, gpus: int, policy: Policy) -> tuple[Step, list[Device]] | None:
    least = cheapest(room.whole, gpus, policy)
    if least is None:
        return None
    equal = [step for step in whole_steps(room.whole, gpus) if policy.total(prices_of((step,))) == least]
    step = min(equal, key=lambda step: [gpu.index for gpu in gpus_of(room, step)])
    return step, [Device(gpu.uuid) for gpu in gpus_of(room, step)]


def gpus_of(room: Room, step: Step) -> list[Gpu]:
    """The GPUs that a step takes on this node, by index: the lowest free ones of each class."""
    chosen = [gpu for gpus, count in zip(room.free_gpus, step.take, strict=True) for gpu in gpus[:count]]
    return sorted(chosen, key=lambda gpu: gpu.index)


def _place_slices(
    room: Room, wanted: tuple[tuple[str, int], ...], policy: Policy
) -> tuple[list[Step], list[Device]] | None:
    if is_one_slice(wanted):
        choices = [
            (offer.price, not offer.step.reused, offer.step.slice, gpu.index, gpu.uuid, offer.step)
            for gpu, state in room.cuts
            for offer in offers(state, wanted[0][0], policy)
        ]
        if not choices:
            return None
        *_, uuid, step = min(choices, key=lambda choice: choice[:4])
        return [step], [Device(uuid, step.slice)]
    found = pack([state for _, state in room.cuts], wanted, policy)
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

    node: Node
    taken: tuple[Device, ...]
    state: RoomState
    refusals: dict[Demand, Refusal | None] = field(default_factory=dict)


class Ranking:
    """Every node's price for every known demand. Changed only by `put` and `remove`; never blocks.

    `quoted` counts the entries (node × demand) that were worked out or looked up again, for tests and
    metrics: it grows with changes, never with nodes × pods.
    """

    def __init__(self, policy: Policy = DEFAULT_POLICY) -> None:
        self.policy = policy
        self.quoted = 0
        self._nodes: dict[str, _Entry] = {}
        self._tables: OrderedDict[Demand, dict[str, int]] = OrderedDict()
        self._rows: OrderedDict[RoomState, dict[Demand, int | None]] = OrderedDict()

    def put(self, node: Node, taken: Iterable[Device] = ()) -> None:
        """The node is now like this. Only its entries change, none if it can do what it could before."""
        taken = tuple(taken)
        state = read(node, taken).state
        before = self._nodes.get(node.name)
        self._nodes[node.name] = _Entry(node, taken, state)
        if before is not None and before.state == state:
            return
        row = self._row(state)
        for demand, table in self._tables.items():
            self._enter(table, node.name, state, row, demand)

    def remove(self, name: str) -> None:
        """The node is gone, or not to be offered."""
        if self._nodes.pop(name, None) is not None:
            for table in self._tables.values():
                table.pop(name, None)

    def prices(self, demand: Demand) -> Mapping[str, int]:
        """The nodes that can take the demand now, by name, each with its total price. Do not change it."""
        table = self._tables.get(demand)
        if table is None:
            table = self._tables[demand] = {}
            for name, entry in self._nodes.items():
                self._enter(table, name, entry.state, self._row(entry.state), demand)
            if len(self._tables) > KNOWN_DEMANDS:
                self._tables.popitem(last=False)
        else:
            self._tables.move_to_end(demand)
        return table

    def best(self, demand: Demand, name: str) -> Placement | None:
        """The exact devices for the demand on this node; None if it does not fit or there is no such node."""
        entry = self._nodes.get(name)
        return None if entry is None else quote(entry.node, entry.taken, demand, self.policy)

    def refusal(self, demand: Demand, name: str) -> Refusal | None:
        """Why the node cannot take the demand; None if it can. Remembered until the node changes."""
        entry = self._nodes.get(name)
        if entry is None:
            return Refusal("is not known to have GPUs")
        if demand not in entry.refusals:
            if len(entry.refusals) >= KNOWN_REFUSALS:
                entry.refusals.clear()
            entry.refusals[demand] = refusal(entry.node, entry.taken, demand)
        return entry.refusals[demand]

    def _row(self, state: RoomState) -> dict[Demand, int | None]:
        row = self._rows.get(state)
        if row is None:
            row = self._rows[state] = {}
            if len(self._rows) > KNOWN_STATES:
                self._rows.popitem(last=False)
        else:
            self._rows.move_to_end(state)
        return row

    def _enter(
        self,
        table: dict[str, int],
        name: str,
        state: RoomState,
        row: dict[Demand, int | None],
        demand: Demand,
    ) -> None:
        self.quoted += 1
        if demand in row:
            least = row[demand]
        else:
            if len(row) >= 2 * KNOWN_DEMANDS:
                row.clear()
            least = row[demand] = cheapest_on(state, demand, self.policy)
        if least is None:
            table.pop(name, None)
        else:
            table[name] = least
