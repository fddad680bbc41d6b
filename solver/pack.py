"""Several parts for one pod on one node: its step on the host, and slices of several kinds, together.

A node's host (whole GPUs, shares, CPU, memory) and its slices never compete for a GPU (a GPU in MIG mode
serves slices only), so the cheapest step on the host and the cheapest slices make the cheapest placement. For
the slices a walk along the node's GPUs keeps, for each remainder still to be served, the cheapest way there:

    remainder after GPU i  ×  every bundle that GPU i+1 can hold  ──▶  remainder after GPU i+1

Exact as long as no more than BEAM remainders are in play (five 1g and five 3g make 36). The bound keeps a pod
that asks for dozens of slices of five kinds from holding up everybody: a node then costs tenths of a second.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from solver.demand import Demand, SliceNeed, Terms
from solver.geometry import Cut
from solver.goals import Policy, cheapest, offers
from solver.steps import RoomState, Step

BEAM = 256
"""Remainders kept after each GPU. Beyond it those with the least left to serve are kept, so that a pod with
many slices of many kinds may in rare cases be refused, or placed not quite at the lowest price; never
illegally."""

Bundle = tuple[int, ...]
"""How many slices of each wanted profile."""

Wanted = tuple[tuple[str, int], ...]


def cheapest_on(state: RoomState, demand: Demand, policy: Policy) -> int | None:
    """The least that the demand costs on a node in this state; None where it does not fit."""
    total = cheapest(state.host, demand.host_need, policy)
    if total is None or not demand.slices:
        return total
    slices = _cheapest_slices(state, demand, policy)
    return None if slices is None else total + slices


def _cheapest_slices(state: RoomState, demand: Demand, policy: Policy) -> int | None:
    if is_one_slice(demand.slices):
        need = demand.slice_need(demand.slices[0][0])
        prices = [cheapest(cut, need, policy) for cut, _ in state.cuts]
        return min((price for price in prices if price is not None), default=None)
    found = pack([cut for cut, count in state.cuts for _ in range(count)], demand, policy)
    return None if found is None else found[0]


def is_one_slice(wanted: Wanted) -> bool:
    """Whether a single step on a single GPU serves these slices."""
    return len(wanted) == 1 and wanted[0][1] == 1


def pack(cuts: Sequence[Cut], demand: Demand, policy: Policy) -> tuple[int, tuple[tuple[Step, ...], ...]] | None:
    """The cheapest way to serve the demand's slices on these GPUs: its price, and each GPU's steps in order."""
    wanted, terms = demand.slices, demand.terms
    reached: dict[Bundle, tuple[int, _Way | None]] = {tuple(count for _, count in wanted): (0, None)}
    for i, cut in enumerate(cuts):
        after = dict(reached)
        for bundle, price, steps in _bundles(cut, wanted, terms, policy):
            for rest, (so_far, way) in reached.items():
                left = tuple([need - got for need, got in zip(rest, bundle, strict=True)])
                if min(left) < 0:
                    continue
                known = after.get(left)
                if known is None or so_far + price < known[0]:
                    after[left] = (so_far + price, _Way(i, steps, way))
        if len(after) > BEAM:
            kept = sorted(after.items(), key=lambda item: (sum(item[0]), item[1][0]))[:BEAM]
            after = dict(kept)
        reached = after
    found = reached.get((0,) * len(wanted))
    if found is None:
        return None
    price, way = found
    steps_on: list[tuple[Step, ...]] = [()] * len(cuts)
    while way is not None:
        steps_on[way.gpu] = way.steps
        way = way.before
    return price, tuple(steps_on)


class _Way(NamedTuple):
    """How a remainder was reached: the steps on the last GPU that serves any, and the way before."""

    gpu: int
    steps: tuple[Step, ...]
    before: _Way | None


@lru_cache(maxsize=16384)
def _bundles(
    cut: Cut, wanted: Wanted, terms: Terms, policy: Policy
) -> tuple[tuple[Bundle, int, tuple[Step, ...]], ...]:
    """Every non-empty part of the wanted slices that this GPU can hold, with its cheapest steps."""
    profiles = tuple(profile for profile, _ in wanted)

    def grow(bundle: Bundle, first: int) -> Iterator[tuple[Bundle, int, tuple[Step, ...]]]:
        for i in range(first, len(wanted)):
            if bundle[i] == wanted[i][1]:
                continue
            larger = (*bundle[:i], bundle[i] + 1, *bundle[i + 1 :])
            served = _serve(cut, profiles, larger, terms, policy)
            if served is not None:
                yield larger, served[0], served[1]
                yield from grow(larger, i)

    return tuple(grow((0,) * len(wanted), 0))


@lru_cache(maxsize=65536)
def _serve(
    cut: Cut, profiles: tuple[str, ...], bundle: Bundle, terms: Terms, policy: Policy
) -> tuple[int, tuple[Step, ...]] | None:
    """The cheapest steps that put the whole bundle on this GPU. Every set can be made in profile order."""
    i = next((i for i, count in enumerate(bundle) if count), None)
    if i is None:
        return 0, ()
    rest = (*bundle[:i], bundle[i] - 1, *bundle[i + 1 :])
    best: tuple[int, tuple[Step, ...]] | None = None
    for offer in offers(cut, SliceNeed(profiles[i], terms), policy):
        assert isinstance(offer.step.after, Cut)
        served = _serve(offer.step.after, profiles, rest, terms, policy)
        if served is not None and (best is None or offer.price + served[0] < best[0]):
            best = (offer.price + served[0], (offer.step, *served[1]))
    return best
