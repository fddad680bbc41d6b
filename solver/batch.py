"""Many demands on one state at once: the prices that `goals` gives step by step, worked out in one go.

    known demands ──Known.on(host)──▶ asks: what they want of such GPUs (demands differ mostly in CPU)
    host × ask    ──ways()─────────▶ what could be taken
    ways × CPU    ──Values.of_hosts▶ value left ──▶ the least price of each demand, and the way to it

This is the same price as `pack.cheapest_on` and never another one (tests hold the two equal). It rests on one
thing that all goals keep: only `value` looks at what is left of CPU, memory and GPUs. What the other goals say of
a way is asked once, of an example step. Demands with slices, GPUs beside a share, or a tenant to mind, and hosts
with such guests, go step by step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from solver.cluster import GPU_MILLI
from solver.demand import ANY_TERMS, Demand, HostNeed
from solver.geometry import Kind, Version
from solver.goals import GOALS, Policy, Prices
from solver.guests import NOBODY
from solver.steps import Host, Part, Step, share_on_kind, terms_allow_host, terms_allow_kind
from solver.topology import Board, Counts, joined_by_nvlink, subsets
from solver.values import Left

Ints = NDArray[np.int64]

NONE = np.iinfo(np.int64).max
"""The price where a demand does not fit."""

VALUE = "value"


class Way(NamedTuple):
    """What is taken of a host: idle GPUs by class, or a share of one GPU (`share_on` None: of an idle one)."""

    take: Counts
    share_class: int = -1
    share_milli: int = 0
    share_on: int | None = None


class Ask(NamedTuple):
    """What demands want of a host's GPUs: so many idle ones of the classes that will do, or a share of one.

    `shares` says by class how much of a GPU that would be; more than 1000 where the class will not do.
    """

    gpus: int
    nvlink: bool
    allowed: tuple[bool, ...]
    shares: tuple[int, ...]


def ways(host: Host, ask: Ask) -> list[Way]:
    """Every different way to serve the ask on this host, as `steps.host_steps` has them."""
    if ask.shares:
        return list(_ways_to_share(host, ask.shares))
    idle = host.idle
    if not all(ask.allowed):
        idle = tuple([count if fine else 0 for count, fine in zip(idle, ask.allowed, strict=True)])
    if len(idle) == 1:
        return [Way((ask.gpus,))] if ask.gpus <= idle[0] else []
    return [
        Way(take)
        for take in subsets(host.board, idle, ask.gpus)
        if not ask.nvlink or ask.gpus < 2 or joined_by_nvlink(host.board, take)
    ]


def _ways_to_share(host: Host, shares: Counts) -> Iterator[Way]:
    nothing = (0,) * len(shares)
    for c, milli in enumerate(shares):
        if milli > GPU_MILLI:
            continue
        last = -1
        for part in host.shared[c]:
            if part.milli >= milli and part.milli != last:
                last = part.milli
                yield Way(nothing, c, milli, last)
        if host.idle[c]:
            yield Way(nothing, c, milli, None)


def left_after(host: Host, left: Left, way: Way) -> Left:
    """What is left of the GPUs then."""
    idle, shared = left
    if way.share_class < 0:
        return tuple([free - taken for free, taken in zip(idle, way.take, strict=True)]), shared
    c, parts = way.share_class, list(shared[way.share_class])
    if way.share_on is None:
        idle = (*idle[:c], idle[c] - 1, *idle[c + 1 :])
        parts.append(GPU_MILLI - way.share_milli)
    else:
        parts[parts.index(way.share_on)] -= way.share_milli
    return idle, (*shared[:c], parts, *shared[c + 1 :])


def left_of(host: Host) -> Left:
    """What is left of the host's GPUs, by class: how many idle ones, and the milli of each shared one."""
    return host.idle, tuple([[part.milli for part in parts] for parts in host.shared])


def nobody_to_mind(host: Host) -> bool:
    """Whether no pod there has said who it is."""
    return not host.guests and not any(part.guests for parts in host.shared for part in parts)


def by_the_way(demand: Demand) -> bool:
    """Whether the demand can be priced here at all."""
    return not demand.slices and not (demand.gpus and demand.is_shared) and demand.terms.guest == NOBODY


@dataclass(frozen=True, slots=True, eq=False)
class Asks:
    """What the known demands want of one kind of host. Demands with one ask and one CPU are one pair."""

    asks: tuple[Ask, ...]
    ask_of: Ints  # by pair
    cpu_of: Ints  # by pair: its place in Known.cpus
    pair_of: Ints  # by demand; the number of pairs where the host will not do


class Known:
    """The demands whose prices are kept, as columns. `others` must be priced step by step."""

    def __init__(self, demands: Sequence[Demand]) -> None:
        self.demands = tuple(demands)
        self.others = [i for i, demand in enumerate(demands) if not by_the_way(demand)]
        self.memory = np.array([demand.memory_mib for demand in demands], dtype=np.int64)
        cpu = np.array([demand.cpu_milli for demand in demands], dtype=np.int64)
        self.cpus, self._cpu_of = np.unique(cpu, return_inverse=True)
        self._on: dict[tuple[tuple[Kind, ...], Version, Version], Asks] = {}

    def on(self, host: Host) -> Asks:
        """What they want of such a host."""
        key = (host.board.kinds, host.driver, host.cuda)
        found = self._on.get(key)
        if found is None:
            found = self._on[key] = self._grouped(host)
        return found

    def ask(self, number: int, host: Host) -> Ask:
        """What one of them wants of a host that will do."""
        asks = self.on(host)
        return asks.asks[int(asks.ask_of[asks.pair_of[number]])]

    def _grouped(self, host: Host) -> Asks:
        asks: dict[Ask, int] = {}
        pairs: dict[tuple[int, int], int] = {}
        pair_of = np.full(len(self.demands), -1, dtype=np.int64)
        for i, demand in enumerate(self.demands):
            ask = ask_of(demand, host) if by_the_way(demand) else None
            if ask is not None:
                pair = (asks.setdefault(ask, len(asks)), int(self._cpu_of[i]))
                pair_of[i] = pairs.setdefault(pair, len(pairs))
        pair_of[pair_of < 0] = len(pairs)
        columns = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
        return Asks(tuple(asks), columns[:, 0], columns[:, 1], pair_of)


def ask_of(demand: Demand, host: Host) -> Ask | None:
    """What it wants of a host of this kind, whatever is left there; None where its terms are not met."""
    need = demand.host_need
    kinds = host.board.kinds
    if not need.takes_devices:
        return Ask(0, False, (True,) * len(kinds), ())
    if not terms_allow_host(need.terms, replace(host, busy=False)):
        return None
    allowed = tuple([terms_allow_kind(need.terms, kind) for kind in kinds])
    if not any(allowed):
        return None
    if not demand.is_shared:
        return Ask(need.gpus, need.terms.nvlink, allowed, ())
    shares = tuple(
        [share_on_kind(need, kind) if fine else GPU_MILLI + 1 for kind, fine in zip(kinds, allowed, strict=True)]
    )
    return Ask(0, False, allowed, shares)


class Fixed(NamedTuple):
    """What the goals but `value` say of a way: their prices, and what these count in the policy's total."""

    total: int
    prices: Prices


class Pricer:
    """Prices under one policy; `renew` changes its values only."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._fixed: dict[tuple[Board, bool, bool, Way], Fixed] = {}

    def renew(self, policy: Policy) -> None:
        """The same goals with other values."""
        if policy.tiers != self.policy.tiers:
            self._fixed.clear()
        self.policy = policy

    def fixed(self, host: Host, ask: Ask, way: Way) -> Fixed:
        """What does not depend on what is left."""
        takes = bool(ask.gpus or ask.shares)
        key = (host.board, host.busy, takes, way if way.share_on is None else way._replace(share_on=0))
        found = self._fixed.get(key)
        if found is None:
            found = self._fixed[key] = self._asked(host, ask, way)
        return found

    def _asked(self, host: Host, ask: Ask, way: Way) -> Fixed:
        takes = bool(ask.gpus or ask.shares)
        on = None if way.share_on is None else Part(way.share_on)
        need = HostNeed(ask.gpus, way.share_milli, 0, 0, 0, False, ANY_TERMS)
        step = Step(host, replace(host, busy=host.busy or takes), need, way.take, way.share_class, way.share_milli, on)
        prices = tuple(
            (goal.name, goal.of_step(step, self.policy.values) if goal.name != VALUE else 0) for goal in GOALS
        )
        return Fixed(self.policy.total(prices), prices)

    def prices(self, known: Known, host: Host) -> tuple[Ints, Ints]:
        """By demand: the least price on the host (NONE: it does not fit, or must be asked step by step), and the
        place among its `ways` of the one that costs no more.
        """
        grouped = known.on(host)
        before = left_of(host)
        rooms, fixed, first, number = [before], [0], [], []
        for ask in grouped.asks:
            found = ways(host, ask)
            first.append(len(rooms))
            number.append(len(found))
            for way in found:
                rooms.append(left_after(host, before, way))
                fixed.append(self.fixed(host, ask, way).total)
        pairs = len(grouped.ask_of)
        least, chosen = np.full(pairs + 1, NONE, dtype=np.int64), np.zeros(pairs + 1, dtype=np.int64)

        number_of = np.array(number, dtype=np.int64)[grouped.ask_of] if pairs else np.zeros(0, dtype=np.int64)
        if host.cpu_milli is not None:
            number_of[known.cpus[grouped.cpu_of] > host.cpu_milli] = 0
        open_to = np.flatnonzero(number_of)
        if len(open_to):
            counts = number_of[open_to]
            ends = np.cumsum(counts)
            begins = ends - counts
            place = np.arange(ends[-1]) - np.repeat(begins, counts)
            room_of = np.concatenate(([0], place + np.repeat(np.array(first)[grouped.ask_of[open_to]], counts)))
            cpu_of = np.concatenate(([len(known.cpus)], np.repeat(grouped.cpu_of[open_to], counts)))
            cpu = np.full(len(known.cpus) + 1, np.inf)
            if host.cpu_milli is not None:
                cpu[:-1], cpu[-1] = np.maximum(host.cpu_milli - known.cpus, 0), host.cpu_milli
            values = self.policy.values.of_hosts(host.board, rooms, cpu, room_of, cpu_of)
            costs = (values[0] - values[1:]) * self.policy.factors()[VALUE]
            costs += np.array(fixed, dtype=np.int64)[room_of[1:]]
            best = np.minimum.reduceat(costs, begins)
            ties = np.where(costs == np.repeat(best, counts), place, len(costs))
            least[open_to], chosen[open_to] = best, np.minimum.reduceat(ties, begins)

        prices = least[grouped.pair_of]
        if host.memory_mib is not None:
            prices[known.memory > host.memory_mib] = NONE
        return prices, chosen[grouped.pair_of]
