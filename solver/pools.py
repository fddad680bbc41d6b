"""Nodes whose bundles are too many to list, said in parts: courses of hosts and of cuts, and what they serve together.

    served d ═══ host courses with d in them        (demands whose host step changes nothing need none)
    slices   ═══ cut courses, slice by slice        (of what the demands served are made of)

For one node this is exact. For several in the same state it allows a demand's parts to stand on different nodes,
so it is a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from solver.columns import BITS, MASK, Catalogue, Column, Courses, Packed, counts_of, packed
from solver.geometry import Cut
from solver.program import Program
from solver.steps import Host, RoomState, Step
from solver.units import Unit


@dataclass(slots=True)
class Pool:
    """So many nodes in one state: the variables of what they serve, and of the courses that serve it, with prices."""

    unit: Unit
    serving: dict[int, int]
    hosts: Courses
    staying: frozenset[int]
    on_host: dict[Packed, int] = field(default_factory=dict)
    in_cuts: dict[tuple[Cut, Packed], int] = field(default_factory=dict)
    prices: list[tuple[int, int]] = field(default_factory=list)


class Pools:
    """Makes pools. Host courses are shared by nodes on which the same demands change nothing."""

    def __init__(self, catalogue: Catalogue, demands: Sequence[int]) -> None:
        self.catalogue = catalogue
        self.demands = demands
        self._hosts: dict[frozenset[int], Courses] = {}

    def can_make(self, state: RoomState) -> bool:
        """Whether hosts and cuts have few enough courses."""
        hosts, _ = self._hosts_of(state.host)
        return hosts.of(state.host) is not None and all(
            self.catalogue.in_cuts.of(cut) is not None for cut, _ in state.cuts
        )

    def add(self, program: Program, unit: Unit, count: int) -> Pool:
        """The variables and rows of so many nodes."""
        state, catalogue = unit.state, self.catalogue
        assert isinstance(state, RoomState)
        hosts, staying = self._hosts_of(state.host)
        offered = {profile.name for cut, _ in state.cuts for profile in cut.geometry.profiles}
        fitting = hosts.of(state.host)
        assert fitting is not None
        on_host = {d for bundle in fitting for d, _ in counts_of(bundle)} | staying
        serving = {
            d: program.variable(catalogue.caps[d])
            for d in self.demands
            if d in on_host and offered.issuperset(profile for profile, _ in catalogue.demands[d].slices)
        }
        pool = Pool(unit, serving, hosts, staying)
        self._host_rows(program, pool, fitting, count)
        self._cut_rows(program, pool, state, count)
        return pool

    def _hosts_of(self, host: Host) -> tuple[Courses, frozenset[int]]:
        catalogue = self.catalogue
        staying = frozenset(
            d for d in self.demands if catalogue.courses.stays(host, catalogue.demands[d].host_need) == 0
        )
        if staying not in self._hosts:
            self._hosts[staying] = catalogue.host_courses([d for d in self.demands if d not in staying])
        return self._hosts[staying], staying

    def _host_rows(self, program: Program, pool: Pool, fitting: Mapping[Packed, object], count: int) -> None:
        host = pool.unit.state.host  # type: ignore[union-attr]
        rows: dict[int, list[tuple[int, int]]] = {
            d: [(v, -1)] for d, v in pool.serving.items() if d not in pool.staying
        }
        row = []
        for bundle in fitting:
            demands = counts_of(bundle)
            if not bundle or any(d not in rows for d, _ in demands):
                continue
            course = pool.hosts.to(host, bundle)
            assert course is not None
            v = pool.on_host[bundle] = program.variable(count)
            pool.prices.append((v, course.price))
            row.append((v, 1))
            for d, n in demands:
                rows[d].append((v, n))
        program.at_most(row, count)
        for terms in rows.values():
            program.equal(terms, 0)

    def _cut_rows(self, program: Program, pool: Pool, state: RoomState, count: int) -> None:
        catalogue = self.catalogue
        rows: dict[int, list[tuple[int, int]]] = {}
        for d, v in pool.serving.items():
            for piece, times in counts_of(catalogue.cut_into[d]):
                rows.setdefault(piece, []).append((v, -times))
        for cut, each in sorted(state.cuts, key=lambda each: (each[0].held, each[0].idle, each[1])):
            courses = catalogue.in_cuts.of(cut)
            assert courses is not None
            row = []
            for bundle, course in courses.items():
                pieces = counts_of(bundle)
                if bundle and all(piece in rows for piece, _ in pieces):
                    v = pool.in_cuts[cut, bundle] = program.variable(count * each)
                    pool.prices.append((v, course.price))
                    row.append((v, 1))
                    for piece, times in pieces:
                        rows[piece].append((v, times))
            program.at_most(row, count * each)
        for terms in rows.values():
            program.equal(terms, 0)

    def column(self, pool: Pool, values: Sequence[int]) -> Column:
        """What one node serves in a solution, with its way: steps that change nothing, the host's, the cuts'."""
        catalogue = self.catalogue
        host = pool.unit.state.host  # type: ignore[union-attr]
        bundle = sum(values[v] * packed(d) for d, v in pool.serving.items())
        found: list[tuple[int, int, Step]] = []
        wanted: dict[int, list[tuple[int, int]]] = {}
        for d, v in pool.serving.items():
            for nth in range(values[v]):
                if d in pool.staying:
                    found.append((d, nth, catalogue.loose_way(host, d)[0][2]))
                for piece, times in counts_of(catalogue.cut_into[d]):
                    wanted.setdefault(piece, []).extend([(d, nth)] * times)
        seen: dict[int, int] = {}
        for course, v in pool.on_host.items():
            for d, step in pool.hosts.way(host, course) if values[v] else ():
                found.append((d, seen.get(d, 0), step))
                seen[d] = seen.get(d, 0) + 1
        for (cut, course), v in pool.in_cuts.items():
            for _ in range(values[v]):
                found += [(*wanted[piece].pop(), step) for piece, step in catalogue.in_cuts.way(cut, course)]
        price = sum(values[v] * price for v, price in pool.prices)
        way = tuple(found)
        assert all(bundle >> BITS * d & MASK == values[v] for d, v in pool.serving.items())
        return Column(bundle, price, lambda _: way)
