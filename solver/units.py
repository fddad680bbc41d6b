"""What a joint plan counts: units in equal states. Which parts of a node are a unit, and what of a state matters.

    Room ──Lens──▶ a Cut for each GPU in MIG mode, and a Host        where no demand at hand ties them together
              └──▶ a RoomState                                       where one does

A demand takes one step on its node's host and one for each slice. Small units make a small program, so a node
is taken apart wherever the host's step of every slice demand costs nothing and changes nothing.

States are told apart only by what the demands at hand and the policy can see: names of products where terms ask
for them, guests where somebody minds, CPU where it could run out.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import NamedTuple

from solver.cluster import GPU_MILLI
from solver.demand import Demand
from solver.geometry import NO_KIND, Cut, Kind
from solver.goals import GOALS, WORST_MILLI, Offer, Policy, prices_of, steps_of
from solver.guests import NOBODY, Guests
from solver.steps import Host, Part, RoomState, State, Step

UnitState = Host | Cut | RoomState


class Unit(NamedTuple):
    """A state that units can be in. `barred`: the demands (by number) that their node does not admit."""

    state: UnitState
    barred: frozenset[int] = frozenset()


class Scale:
    """The policy's tiers in one number, for so many demands: a better tier beats whatever those after it add up to.

    `Policy.total` does the same for one demand; sums of many need more room between the digits.
    """

    def __init__(self, policy: Policy, demands: int) -> None:
        self.policy = policy
        self.digits: list[int] = []
        digit = 1
        for tier in reversed(policy.tiers):
            self.digits.insert(0, digit)
            digit *= 2 * WORST_MILLI * max(1, demands) * max(1, sum(weight for _, weight in tier)) + 1
        self.reach = digit
        weights: dict[str, int] = {}
        for tier, each in zip(policy.tiers, self.digits, strict=True):
            weights.update({name: each * weight for name, weight in tier})
        self._weighted = [(goal, weights.get(goal.name, 0)) for goal in GOALS]
        self._of_step: dict[Step, int] = {}

    def of(self, offer: Offer) -> int:
        """What a step costs."""
        return offer.price if len(self.digits) < 2 else self.of_step(offer.step)

    def of_step(self, step: Step) -> int:
        """The same where its total under the policy is not known."""
        if step not in self._of_step:
            self._of_step[step] = sum(
                weight * goal.of_step(step, self.policy.values) for goal, weight in self._weighted if weight
            )
        return self._of_step[step]

    def tiers(self, total: int) -> list[int]:
        """The tiers of a number, each negative or not."""
        found = []
        for digit in self.digits[:-1]:
            here = (total + digit // 2) // digit
            found.append(here)
            total -= here * digit
        return [*found, total] if self.digits else []


class Worth:
    """What placing a demand counts, in milli-GPU: 1000 a GPU, and of a slice or share its part of the GPU's memory.

    Of several boards it is the smallest part that counts; what fits nowhere counts 1. A pod that asks for no
    device counts 1 a core. The policy's `worths` multiply by class of work.
    """

    def __init__(self, policy: Policy, units: Mapping[str, int], memory_mib: int) -> None:
        self._factors = dict(policy.worths)
        self._units = units
        self._memory_mib = memory_mib

    @classmethod
    def among(cls, policy: Policy, gpus: Iterable[tuple[Kind, object]]) -> Worth:
        """On GPUs of these kinds and geometries (None: not in MIG mode)."""
        units: dict[str, int] = {}
        memory = 0
        for kind, geometry in set(gpus):
            if geometry is None:
                memory = max(memory, kind.memory_mib)
                continue
            for profile in geometry.profiles:  # type: ignore[attr-defined]
                share = round(GPU_MILLI * profile.size / geometry.width)  # type: ignore[attr-defined]
                units[profile.name] = min(units.get(profile.name, share), share)
        return cls(policy, units, memory)

    def of(self, demand: Demand) -> int:
        """What placing it counts; at least 1."""
        milli = GPU_MILLI * demand.gpus + demand.share_milli
        milli += sum(count * self._units.get(profile, 0) for profile, count in demand.slices)
        if demand.share_mib and self._memory_mib:
            milli += min(GPU_MILLI, demand.share_of(self._memory_mib))
        if not demand.takes_devices:
            milli = demand.cpu_milli // 1000
        return max(1, milli) * self._factors.get(demand.terms.guest.workload, 1)


class Lens:
    """What these demands and this policy can tell apart."""

    def __init__(self, demands: Sequence[Demand], counts: Sequence[int], policy: Policy) -> None:
        self.demands = demands
        self.policy = policy
        terms = [demand.terms for demand in demands]
        self._kinds = policy.weighs("power") or any(
            each.products or each.architectures or each.compute_capability or each.gpu_memory_mib for each in terms
        )
        self._versions = any(each.driver or each.cuda for each in terms)
        beside = policy.weighs("tenants", "classes")
        self._guests = any(each.guest.isolation or (beside and each.guest != NOBODY) for each in terms)
        self._beside = beside
        self._fresh = policy.weighs("fresh_node")
        self._seen = policy.values.forecast is not None
        self._cpu = _Supply([demand.cpu_milli for demand in demands], demands, counts)
        self._memory = _Supply([demand.memory_mib for demand in demands], demands, counts)
        self._coupled = [demand for demand in demands if is_coupled(demand)]
        self._sliced = [(d, demand) for d, demand in enumerate(demands) if demand.slices]
        self._hosted = any(not demand.slices for demand in demands)
        self._first: dict[Hashable, Cut] = {}
        self._hosts: dict[Host, Host] = {}
        self._cuts: dict[Cut, Cut] = {}
        self._apart: dict[tuple[Host, frozenset[object]], frozenset[int] | None] = {}

    def host(self, state: Host) -> Host:
        """The same state without what cannot be seen."""
        found = self._hosts.get(state)
        if found is None:
            found = self._hosts[state] = self._bare_host(state).canonical()
        return found

    def cut(self, state: Cut) -> Cut:
        """The first of the states that look the same."""
        found = self._cuts.get(state)
        if found is None:
            bare = state if self._kinds else replace(state, kind=NO_KIND)
            if bare.guests and not self._minds(bare.guests):
                bare = replace(bare, guests=())
            found = self._cuts[state] = self._first.setdefault(self.policy.values.essence(bare), bare)
        return found

    def state(self, state: State) -> State:
        """Either of the two."""
        return self.host(state) if isinstance(state, Host) else self.cut(state)

    def units(self, host: Host, cuts: Sequence[Cut]) -> tuple[Unit, list[Unit]]:
        """The node's host, or all of the node; and its GPUs in MIG mode, if they are units of their own."""
        bare = self.host(host)
        if not cuts or not self._sliced:
            return Unit(bare), []
        barred = self.barred(bare, frozenset(cut.geometry for cut in cuts))
        if barred is None:
            counted: dict[Cut, int] = {}
            for cut in cuts:
                each = self.cut(cut)
                counted[each] = counted.get(each, 0) + 1
            return Unit(RoomState(bare, frozenset(counted.items()))), []
        return Unit(bare), [Unit(self.cut(cut), barred) for cut in cuts]

    def barred(self, host: Host, geometries: frozenset[object]) -> frozenset[int] | None:
        """The slice demands that such a node does not admit; None where the node cannot be taken apart."""
        key = (host, geometries)
        if key not in self._apart:
            self._apart[key] = self._find_barred(host, geometries)
        return self._apart[key]

    def _find_barred(self, host: Host, geometries: frozenset[object]) -> frozenset[int] | None:
        offered = {profile.name for each in geometries for profile in each.profiles}  # type: ignore[attr-defined]
        barred = set()
        for d, demand in self._sliced:
            if not offered.issuperset(profile for profile, _ in demand.slices):
                continue
            steps = steps_of(host, demand.host_need)
            if not steps:
                barred.add(d)
            elif is_coupled(demand) or not self._is_neutral(host, steps[0]):
                return None
        return frozenset(barred)

    def _is_neutral(self, host: Host, step: Step) -> bool:
        after = step.after
        assert isinstance(after, Host)
        return self.host(after) == host and not self.policy.total(prices_of((step,), self.policy.values))

    def _bare_host(self, state: Host) -> Host:
        minds = self._minds(state.guests) or any(self._minds(part.guests) for parts in state.shared for part in parts)
        bare = state
        if not self._versions:
            bare = replace(bare, driver=(), cuda=())
        if not minds:
            shared = tuple(tuple(Part(part.milli) for part in parts) for parts in state.shared)
            bare = replace(bare, guests=(), shared=shared)
            if not self._fresh:
                bare = replace(bare, busy=True)
        if not self._seen:
            cpu = self._cpu.useful(state.cpu_milli, state.free_milli)
            memory = self._memory.useful(state.memory_mib, state.free_milli)
            bare = replace(bare, cpu_milli=cpu, memory_mib=memory)
        return bare

    def _minds(self, guests: Guests) -> bool:
        """Whether it matters that these are there."""
        return self._guests or any(guest.isolation or (self._beside and guest != NOBODY) for guest in guests)


def is_coupled(demand: Demand) -> bool:
    """Whether it ties several slices, or slices and whole GPUs or a share, to one node."""
    several = sum(count for _, count in demand.slices) > 1
    return bool(demand.slices) and (several or demand.gpus > 0 or demand.is_shared)


class _Supply:
    """CPU or memory of nodes, as far as it can decide anything."""

    def __init__(self, amounts: Sequence[int], demands: Sequence[Demand], counts: Sequence[int]) -> None:
        self._grain = gcd(*amounts)
        self._total = sum(amount * count for amount, count in zip(amounts, counts, strict=True))
        self._by_size = []  # per milli-GPU of the host, as a fraction (amount, milli)
        for amount, demand in zip(amounts, demands, strict=True):
            milli = GPU_MILLI * demand.gpus + demand.share_milli
            if amount and not milli:
                self._by_size = [(self._total, 0)]
                break
            if amount:
                self._by_size.append((amount, milli))

    def useful(self, free: int | None, free_milli: int) -> int | None:
        """The same amount as far as the demands can use it: None where it cannot run out."""
        if free is None or not self._grain:
            return None
        most = self._total
        if all(milli for _, milli in self._by_size):
            most = min(most, max(amount * free_milli // milli for amount, milli in self._by_size))
        return None if free >= most else free // self._grain * self._grain
