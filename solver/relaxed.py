"""What no plan can beat, where the columns of some units are too many to list: a linear program that allows more.

    complete units           their own columns
    the others, by state     host: whatever fits into the GPUs, CPU and memory of all of them together
                             cuts: their own columns for slices; a demand takes its slices from any of them

Of what hosts cost it counts only what best fit must take of a node's value for each milli-GPU. All numbers are
whole, and every simplification allows more or charges less, so its bounds are true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from solver.cluster import GPU_MILLI
from solver.columns import Catalogue, Columns, counts_of
from solver.demand import Demand
from solver.geometry import Cut
from solver.goals import SHELTER_MILLI
from solver.pools import Pools
from solver.program import Program
from solver.steps import Host, RoomState, share_on_kind, terms_allow_host, terms_allow_kind
from solver.units import is_coupled
from solver.values import Values


class Price(NamedTuple):
    """What a variable costs at least: by tier, as the policy weighs it."""

    variable: int
    tiers: list[int]


class Relaxation:
    """Rows and variables for units that are not complete, in a program that has those of the complete ones.

    `serving[d]` are the variables that serve demand d here, `prices` what they cost at least, and `constant` is
    added to each tier.
    """

    def __init__(self, program: Program, catalogue: Catalogue, caps: Sequence[int], demands: Sequence[int]) -> None:
        self.program = program
        self.catalogue = catalogue
        self.caps = caps
        self.demands = demands
        self.pools = Pools(catalogue, demands)
        self.scale = catalogue.scale
        policy = self.scale.policy
        self._value_weights = [dict(tier).get("value", 0) for tier in policy.tiers]
        self._values: Values = policy.values
        self.serving: dict[int, list[int]] = {}
        self.prices: list[Price] = []
        self.constant = [0] * len(policy.tiers)

    def add(self, columns: Columns) -> None:
        """So many units in this state."""
        state = columns.unit.state
        if isinstance(state, Cut):
            self._share_a_cut(state, columns)
            return
        if isinstance(state, RoomState) and self.pools.can_make(state):
            pool = self.pools.add(self.program, columns.unit, columns.count)
            for d, v in pool.serving.items():
                self.serving.setdefault(d, []).append(v)
            self.prices += [Price(v, self.scale.tiers(price)) for v, price in pool.prices]
            return
        room = state if isinstance(state, RoomState) else None
        host = room.host if room is not None else state
        assert isinstance(host, Host)
        on_host = {d: most for d in self.demands if (most := self._fit(host, d)) and (room or not self._sliced(d))}
        if room is not None:
            offered = {profile.name for cut, _ in room.cuts for profile in cut.geometry.profiles}
            on_host = {
                d: most
                for d, most in on_host.items()
                if offered.issuperset(profile for profile, _ in self.catalogue.demands[d].slices)
            }
        variables = {d: self.program.variable(min(self.caps[d], columns.count * most)) for d, most in on_host.items()}
        for d, variable in variables.items():
            self.serving.setdefault(d, []).append(variable)
        self._share_the_host(host, columns.count, variables)
        if room is not None:
            self._share_the_cuts(room, columns.count, variables)

    def _sliced(self, d: int) -> bool:
        return bool(self.catalogue.demands[d].slices)

    def _fit(self, host: Host, d: int) -> int:
        """How many of the demand one such host may hold at most."""
        demand = self.catalogue.demands[d]
        if demand.takes_devices and not terms_allow_host(demand.terms, host):
            return 0
        most = self.caps[d]
        open_to = [c for c, kind in enumerate(host.board.kinds) if terms_allow_kind(demand.terms, kind)]
        if demand.gpus:
            most = min(most, sum(host.idle[c] for c in open_to) // demand.gpus)
        if demand.is_shared:
            share = _least_share(host, demand, open_to)
            parts = [part.milli for c in open_to for part in host.shared[c]]
            room = sum(host.idle[c] for c in open_to) * (GPU_MILLI // share) + sum(p // share for p in parts)
            most = min(most, room)
        for free, each in ((host.cpu_milli, demand.cpu_milli), (host.memory_mib, demand.memory_mib)):
            if free is not None and each:
                most = min(most, free // each)
        return most

    def _share_the_host(self, host: Host, count: int, variables: dict[int, int]) -> None:
        demands, program = self.catalogue.demands, self.program
        self._row([(v, demands[d].gpus) for d, v in variables.items()], count * sum(host.idle))
        if host.cpu_milli is not None:
            self._row([(v, demands[d].cpu_milli) for d, v in variables.items()], count * host.cpu_milli)
        if host.memory_mib is not None:
            self._row([(v, demands[d].memory_mib) for d, v in variables.items()], count * host.memory_mib)

        idle = GPU_MILLI * sum(host.idle)
        parts = [part.milli for shared in host.shared for part in shared]
        on_idle: list[tuple[int, int]] = []
        on_parts: list[tuple[int, int]] = []
        for d, v in variables.items():
            share = _least_share(host, demands[d], range(len(host.board.kinds))) if demands[d].is_shared else 0
            whole = GPU_MILLI * demands[d].gpus
            if whole or not share:
                on_idle.append((v, whole))
                self._price(host, v, whole, idle, demands[d])
                continue
            opening, joining = program.variable(program.most[v]), program.variable(program.most[v] if parts else 0)
            program.equal([(v, 1), (opening, -1), (joining, -1)], 0)
            on_idle.append((opening, share))
            on_parts.append((joining, share))
            self._price(host, opening, share, idle, demands[d])
            self._price(host, joining, share, min(parts, default=0), demands[d])
        self._row(on_idle, count * idle)
        self._row(on_parts, count * sum(parts))
        for t, weight in enumerate(self._value_weights):
            self.constant[t] -= weight * count * self._given_back(host)

    def _price(self, host: Host, variable: int, milli: int, left: int, demand: Demand) -> None:
        """What so much of a node's idle GPUs, or of a shared one, takes of its value at least; `left` is all of it.

        Best fit is convex: with F idle of K in all, taking m leaves (F - m)²/K or less, opened GPUs with what is
        left of them included, so that m·F/K or more is taken; and so on a shared one. A pod without devices has
        its own price.
        """
        size = host.board.size
        best_fit = self._values.forecast is None and size
        value = milli * left // (GPU_MILLI * size) if best_fit else 0
        shelter = 0 if demand.takes_devices else SHELTER_MILLI * size
        tiers = [dict(tier) for tier in self.scale.policy.tiers]
        prices = [tier.get("value", 0) * value + tier.get("cpu_only", 0) * shelter for tier in tiers]
        self.prices.append(Price(variable, prices))

    def _given_back(self, host: Host) -> int:
        """Links that later demands lose count for the node's state now; they may all be won back. And rounding."""
        if not host.board.size:
            return 0
        if self._values.forecast is not None:
            without = self._values.forecast.of(host)
        else:
            idle = GPU_MILLI * sum(host.idle)
            parts = [part.milli for shared in host.shared for part in shared]
            without = (idle**2 + sum(milli**2 for milli in parts)) // (GPU_MILLI * host.board.size)
        return max(0, without - self._values.of(host)) + 1

    def _share_a_cut(self, cut: Cut, columns: Columns) -> None:
        """A GPU with too many bundles of its own: its slices by size only, at no price."""
        sizes = {profile.name: profile.size for profile in cut.geometry.profiles}
        free = cut.geometry.width - cut.without_idle().busy.bit_count()
        row = []
        for d in self.demands:
            demand = self.catalogue.demands[d]
            size = sizes.get(demand.slices[0][0], 0) if demand.slices else 0
            if size and not is_coupled(demand):
                v = self.program.variable(min(self.caps[d], columns.count * (free // size)))
                self.serving.setdefault(d, []).append(v)
                row.append((v, size))
        self._row(row, columns.count * free)

    def _share_the_cuts(self, room: RoomState, count: int, variables: dict[int, int]) -> None:
        catalogue, program = self.catalogue, self.program
        made: dict[int, list[tuple[int, int]]] = {piece: [] for piece in range(len(catalogue.pieces))}
        for d, v in variables.items():
            for piece, times in counts_of(catalogue.cut_into[d]):
                made[piece].append((v, -times))
        for cut, each in room.cuts:
            courses = catalogue.in_cuts.of(cut)
            if courses is None:
                return  # then any slices: the demands are not tied to them at all
            here = []
            for bundle, course in courses.items():
                if not bundle:
                    continue
                pieces = counts_of(bundle)
                most = min([count * each, *[self._most_of(piece) // times for piece, times in pieces]])
                variable = program.variable(most)
                here.append((variable, 1))
                self.prices.append(Price(variable, self.scale.tiers(course.price)))
                for piece, times in pieces:
                    made[piece].append((variable, times))
            program.at_most(here, count * each)
        for terms in made.values():
            if terms:
                program.equal(terms, 0)

    def _most_of(self, piece: int) -> int:
        return self.catalogue.most_pieces[piece]

    def _row(self, terms: list[tuple[int, int]], total: int) -> None:
        terms = [(variable, amount) for variable, amount in terms if amount]
        if terms:
            self.program.at_most(terms, total)


def _least_share(host: Host, demand: Demand, classes: Sequence[int]) -> int:
    """The smallest share in thousandths that the demand is on any of these GPUs."""
    shares = [share_on_kind(demand.host_need, host.board.kinds[c]) for c in classes]
    return max(1, min(shares, default=GPU_MILLI + 1))
