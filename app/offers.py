"""What each node can still give: inventory and ledger put together, kept ready in the solver's Ranking.

Work grows with changes: a node's rows are made anew when its report, its holds or its standing change, and at
no other time. Here too is what may *not* be offered although it looks free: nodes whose agent is silent, nodes
that are being checked again, and devices that could belong to a pod which nobody can place yet.

CPU and memory count for prices and never refuse: kube-scheduler has looked at them before it asks us, and it
knows of a pod's end before we do.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from app.hosts import Hosts
from app.inventory import PROCESS, Entry, Inventory
from app.ledger import Hold, Ledger, Legal
from app.translate import EVERY_PROFILE
from solver import Demand, Device, Gpu, Node, Placement, Policy, Ranking, Refusal, price, quote
from solver.cluster import GPU_MILLI, Allocation, Taken, allocations, devices_of
from solver.geometry import faults
from solver.guests import guests_of, may_join
from solver.prices import Prices
from solver.rank import RENEWED_STATES, Variety

View = tuple[Node, tuple[Taken, ...]]


BRIEF_DEMANDS = 32
"""Kinds of demand of which it is remembered in brief why each node does not fit: 0.4 MB each at 5,000 nodes."""

LOOK_EVERY = 32  # nodes between two looks at the clock


class Offers:
    """The nodes that may be offered now, their prices, and why the others may not."""

    def __init__(self, inventory: Inventory, ledger: Ledger, hosts: Hosts, *, policy: Policy) -> None:
        self._inventory = inventory
        self._ledger = ledger
        self._hosts = hosts
        self._policy = policy
        self._ranking = Ranking(policy)
        self._barred: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._kept_back: dict[str, dict[str, str]] = {}
        self._going: dict[str, frozenset[Device]] = {}
        self._looked_at: set[str] = set()
        self._dirty: set[str] = set()
        self.blind_until = float("-inf")
        """Until then a node whose agent does not see pods is kept back: pods that were force-deleted while
        nobody watched may still be ending there."""
        self._news: set[str] = set()
        self._old_nodes = 0
        self._briefs: OrderedDict[Demand, dict[str, Refusal]] = OrderedDict()
        self.updated = 0
        """How many times a node's rows were made anew: work that must grow with changes only."""
        self.updated_at: float | None = None

    # -- keeping up -----------------------------------------------------------------------------------

    def touch(self, name: str) -> None:
        """This node's report or standing has changed."""
        self._dirty.add(name)

    def bar(self, name: str, reason: str) -> None:
        """Do not offer this node until `unbar`, whatever its report says."""
        self._barred[name] = reason
        self._dirty.add(name)

    def unbar(self, name: str) -> None:
        """Offer the node again as its report allows."""
        if self._barred.pop(name, None) is not None:
            self._dirty.add(name)

    def keep_back(self, name: str, gpus: dict[str, str], going: frozenset[Device]) -> None:
        """Of this node do not offer these GPUs (UUID, why), nor these idle slices, which are to be removed."""
        before = self._kept_back.get(name, {}), self._going.get(name, frozenset())
        if before == (gpus, going):
            return
        self._kept_back[name], self._going[name] = gpus, going
        if not gpus and not going:
            del self._kept_back[name], self._going[name]
        self._dirty.add(name)

    def drain_looked_at(self) -> set[str]:
        """Nodes whose report, holds or standing changed since the last call, for `orders`."""
        looked_at, self._looked_at = self._looked_at, set()
        return looked_at

    def keep_back_the_blind(self, *, until: float) -> None:
        """We have just begun to watch: nodes whose agents do not see pods wait for this long."""
        self.blind_until = until
        self._dirty.update(self._inventory)

    def forget(self, name: str) -> None:
        """The node is no more."""
        self._barred.pop(name, None)
        self._faults.pop(name, None)
        self._kept_back.pop(name, None)
        self._going.pop(name, None)
        self._dirty.discard(name)
        self._ranking.remove(name)
        self._news.add(name)
        self._forget_briefs(name)

    def refresh(self, *, now: float, most: int | None = None) -> bool:
        """Bring the rows of changed nodes up to date, of so many at most; whether there are more."""
        self._dirty |= self._ledger.drain_changes()
        for gpu in self._ledger.drain_changed_gpus():
            self._dirty |= self._inventory.homes(gpu)
        self._dirty.update([name for name in self._hosts.drain_changes() if self._inventory.get(name) is not None])
        while self._dirty and most != 0:
            self._update(self._dirty.pop(), now=now)
            most = None if most is None else most - 1
        return bool(self._dirty)

    def catch_up(self, go_on: Callable[[], bool]) -> bool:
        """Bring prices up to date with the rows, which is else left to whoever asks next; False: there is more."""
        return self._ranking.catch_up(go_on)

    def sweep(self, names: Iterable[str], *, now: float) -> list[str]:
        """Look at these nodes' age; returns those that are offered again after a fault."""
        back = []
        for name in names:
            fault = self._fault(name, now=now)
            if bool(fault) != bool(self._faults.get(name)):
                self._dirty.add(name)
                if not fault:
                    back.append(name)
            elif fault and fault != self._faults[name]:
                self._faults[name] = fault
                self._forget_briefs(name)
        return back

    def _update(self, name: str, *, now: float) -> None:
        self.updated += 1
        self.updated_at = now
        self._news.add(name)
        self._looked_at.add(name)
        self._forget_briefs(name)
        fault = self._fault(name, now=now)
        if fault:
            self._faults[name] = fault
            self._ranking.remove(name)
            return
        self._faults.pop(name, None)
        node, taken = self.view(name)
        self._ranking.put(node, taken)

    def _fault(self, name: str, *, now: float) -> str:
        fault = self._barred.get(name) or self._inventory.fault(name, now=now)
        if fault or now >= self.blind_until:
            return fault
        entry = self._inventory.get(name)
        blind = entry is not None and not entry.report.sees_pods
        return "its agent does not see which pods use its GPUs, and some may still be ending" if blind else ""

    def names(self) -> list[str]:
        """Every node that has reported, offered or not."""
        return list(self._inventory)

    def drain_news(self) -> set[str]:
        """Nodes that were looked at anew since the last call, those that are gone included."""
        news, self._news = self._news, set()
        return news

    def renew(self, policy: Policy) -> None:
        """Price by this policy (of the same tiers) from now on; old prices stand until `settle` has made them anew."""
        self._policy = policy
        self._ranking.renew(policy)
        self._old_nodes = len(self._inventory)

    def settle(self) -> bool:
        """Make a few of the old prices anew; whether there may be more."""
        self._ranking.settle(RENEWED_STATES)
        self._old_nodes -= RENEWED_STATES
        return self._old_nodes > 0

    @property
    def variety(self) -> Variety:
        """How many different things the offered nodes are."""
        return self._ranking.variety

    # -- asking ---------------------------------------------------------------------------------------

    def fault(self, name: str) -> str:
        """Why nothing of this node is offered; empty when it is."""
        if name in self._faults:
            return self._faults[name]
        return "" if self._inventory.get(name) is not None else "no agent has reported this node's GPUs"

    def prices(self, demand: Demand, go_on: Callable[[], bool]) -> Prices | None:
        """What the demand costs on each node that fits; None where `go_on()` ended the search.

        What was worked out until then is kept, so asking again gets further. Where CPU and memory count for prices and
        seem not to suffice, it is the price without them.
        """
        plain, counted = on_any_host(demand), self._as_priced(demand)
        prices = self._ranking.priced_while(plain, go_on)
        if prices is None or counted == plain:
            return prices
        exact = self._ranking.prices_while(counted, go_on)
        if exact is None:
            return None
        return Prices({name: exact.get(name, milli) for name, milli in prices.by_name.items()})

    def refusal(self, demand: Demand, name: str) -> Refusal:
        """Why this node does not fit."""
        fault = self.fault(name)
        if fault:
            return Refusal(fault, resolvable=False)
        return self._ranking.refusal(on_any_host(demand), name) or Refusal(f"fits {demand} after all; ask again")

    def brief_refusal(self, demand: Demand, name: str) -> Refusal:
        """The same without details: thousands of nodes have few different ones. Remembered until the node changes."""
        return self.briefs(demand).get(name) or self._brief(demand, name)

    def learn_briefs(self, demand: Demand, names: Iterable[str], go_on: Callable[[], bool]) -> bool:
        """Work out what is to be remembered of these nodes, none of which fits; False where `go_on()` ended it.

        All that is done here is remembered: whoever begins anew after each turn gets to the end nevertheless.
        """
        briefs = self.briefs(demand)
        missing = [name for name in names if name not in briefs and self._inventory.get(name) is not None]
        for number, name in enumerate(missing):
            if number and number % LOOK_EVERY == 0 and not go_on():
                return False
            self._brief(demand, name)
        return True

    def briefs(self, demand: Demand) -> Mapping[str, Refusal]:
        """What is remembered of that."""
        plain = on_any_host(demand)
        briefs = self._briefs.setdefault(plain, {})
        self._briefs.move_to_end(plain)
        if len(self._briefs) > BRIEF_DEMANDS:
            self._briefs.popitem(last=False)
        return briefs

    def _brief(self, demand: Demand, name: str) -> Refusal:
        refusal = in_brief(self.refusal(demand, name))
        if self._inventory.get(name) is not None:
            self._briefs[on_any_host(demand)][name] = refusal
        return refusal

    def _forget_briefs(self, name: str) -> None:
        for briefs in self._briefs.values():
            briefs.pop(name, None)

    def soft_prices(
        self, demand: Demand, prices: Container[str], asked: Container[str], *, uid: str
    ) -> dict[str, int | None]:
        """What it costs beside what is softly promised to other pods, on nodes in both where something is.

        None: only what is promised would do there.
        """
        found: dict[str, int | None] = {}
        for name in self._ledger.nodes_with_proposals():
            if name in asked and name in prices and self._ledger.proposed(name, but=uid):
                found[name] = self._soft_price(demand, name, uid=uid)
        return found

    def best(self, demand: Demand, name: str, *, uid: str) -> Placement | Refusal:
        """Exact devices on this node: its own earlier proposal if it still stands, else the best step, softly first."""
        if self.fault(name):
            return self.refusal(demand, name)
        own = self._ledger.get(uid)
        node, taken = self.view(name)
        stands = own is not None and not own.firm and own.node == name and own.demand == demand
        if own is not None and stands and legal(node)(allocations(taken), own.allocation) is None:
            return Placement(name, own.devices, own.prices)
        promised = self._unspoilt(node, taken, self._ledger.proposed(name, but=uid))
        if promised:
            softly = quote(node, (*taken, *promised), on_any_host(demand), self._policy)
            if softly is not None:
                return softly
        exact = self._ranking.best(self._as_priced(demand), name)
        return exact or self._ranking.best(on_any_host(demand), name) or self.refusal(demand, name)

    def without(self, demand: Demand, name: str, victims: Sequence[str]) -> bool:
        """Whether the demand would have a legal step here if these pods were gone."""
        if self.fault(name):
            return False
        node, taken = self.view(name, but=victims)
        return quote(node, taken, on_any_host(demand), self._policy) is not None

    def _as_priced(self, demand: Demand) -> Demand:
        """What of the demand prices depend on: CPU and memory only where the policy foresees who will want them.

        Each amount of CPU is a row of its own in the ranking, 0.2 s when 5,000 nodes all differ in what they have.
        """
        return on_any_host(demand) if self._policy.values.forecast is None else demand

    def _soft_price(self, demand: Demand, name: str, *, uid: str) -> int | None:
        node, taken = self.view(name)
        promised = self._unspoilt(node, taken, self._ledger.proposed(name, but=uid))
        return price(node, (*taken, *promised), on_any_host(demand), self._policy)

    @staticmethod
    def _unspoilt(node: Node, taken: tuple[Taken, ...], promised: tuple[Allocation, ...]) -> tuple[Allocation, ...]:
        """Promises that can still be kept: one that meanwhile clashes with a firm hold, or another, is none."""
        kept: list[Allocation] = []
        firm, check = allocations(taken), legal(node)
        for each in promised:
            if check((*firm, *kept), each) is None:
                kept.append(each)
        return tuple(kept)

    # -- one node, as the solver may see it -----------------------------------------------------------

    def view(self, name: str, *, but: Sequence[str] = (), promised: bool = False) -> View:
        """The node with everything kept back that could belong to somebody, and what is firmly taken.

        `but` leaves out these pods (UIDs), as if they were gone. `promised`: as for one who has been promised devices
        there, for whom it does not matter what orders keep back from newcomers.
        """
        entry = self._inventory.get(name)
        assert entry is not None
        holds = self._ledger.firmly(name, but=but)
        kept_back, taken = self._claims(name, entry, holds, but)
        if not promised:
            kept_back = self._kept_back.get(name, {}) | kept_back
            taken += self._going.get(name, ())
        return self._as_it_is(entry.node, kept_back, [hold.pod.uid for hold in holds]), tuple(taken)

    def claims(self, name: str) -> tuple[frozenset[str], tuple[Taken, ...]]:
        """The GPUs (UUIDs) of a node on which anything could be somebody's, and what is firmly taken; whatever is on
        order there."""
        entry = self._inventory.get(name)
        assert entry is not None
        kept_back, taken = self._claims(name, entry, self._ledger.firmly(name), ())
        return frozenset(kept_back), tuple(taken)

    def _claims(
        self, name: str, entry: Entry, holds: Sequence[Hold], but: Sequence[str]
    ) -> tuple[dict[str, str], list[Taken]]:
        """GPUs (UUID, why) that could belong to somebody, and what does."""
        taken: list[Taken] = [hold.allocation for hold in holds]
        kept_back, seen = _strangers(entry, holds, but)
        taken += seen
        for hold in holds:
            if hold.unknown:
                gpus, slices = could_be(hold, entry.node, devices_of(taken))
                taken += slices
                kept_back.update(dict.fromkeys(gpus, f"may be in use by {hold.pod}, which Tangram did not place"))
        kept_back.update(self._vanished(name, entry, holds))
        for gpu in entry.node.gpus:
            away = self._ledger.elsewhere(gpu.uuid, node=name)
            homes = self._inventory.homes(gpu.uuid)
            if away is not None and away.pod.uid not in but:
                kept_back[gpu.uuid] = f"is held by {away.pod} under the node name {away.node}"
            elif len(homes) > 1:
                kept_back[gpu.uuid] = f"is reported by more than one node: {', '.join(sorted(homes))}"
        return kept_back, taken

    def _vanished(self, name: str, entry: Entry, holds: Sequence[Hold]) -> dict[str, str]:
        """GPUs (UUID, why) with held slices that are not there any more, on a node where nobody makes slices."""
        why = self._inventory.why_no_slices(name)
        return {
            device.gpu: f"{device}, which {hold.pod} holds, is not there any more, and {why}"
            for hold in (holds if why else ())
            for device in hold.devices
            if device.slice is not None and device not in entry.uuids
        }

    def _as_it_is(self, node: Node, kept_back: dict[str, str], holders: Sequence[str]) -> Node:
        """The reported node with GPUs kept back, and the CPU and memory that the holders and newcomers may use."""
        if kept_back:
            gpus = tuple(replace(gpu, withheld=gpu.withheld or kept_back.get(gpu.uuid, "")) for gpu in node.gpus)
            node = replace(node, gpus=gpus)
        given = self._hosts.given_but_for(node.name, holders)
        return node if given is None else replace(node, cpu_milli=given.cpu_milli, memory_mib=given.memory_mib)


def _strangers(entry: Entry, holds: Sequence[Hold], but: Sequence[str]) -> tuple[dict[str, str], list[Device]]:
    """GPUs to keep back and slices to count as taken, because a pod that does not hold them was seen on them."""
    kept_back: dict[str, str] = {}
    seen: list[Device] = []
    for device, uids in entry.users.items():
        holders = {hold.pod.uid for hold in holds if _is_on(hold, device)}
        strangers = uids - holders - set(but)
        if not strangers:
            continue
        if device.slice is None:
            kept_back[device.gpu] = _words_on(min(strangers))
        elif not holders:
            seen.append(device)
    return kept_back, seen


def _words_on(user: str) -> str:
    if user.startswith(PROCESS):
        return f"has a process of no pod ({user})"
    return f"has processes of pod {user}, which was not placed there"


def _is_on(hold: Hold, device: Device) -> bool:
    """Whether the pod holds the slice; of a GPU outside MIG mode, all or a share of it."""
    if device.slice is not None:
        return device in hold.devices
    return any(each.gpu == device.gpu and each.slice is None for each in hold.devices)


def could_be(hold: Hold, node: Node, taken: Sequence[Device]) -> tuple[list[str], list[Device]]:
    """What a pod of unknown devices might be using: GPUs (UUIDs), and existing slices of its profiles.

    A GPU that others share is kept back too: nothing tells that the pod is not on it. Where a node does not show
    enough instances of an asked profile, every GPU that could be cut into it is kept back.
    """
    held = set(taken)
    gpus: list[str] = []
    slices: list[Device] = []
    if hold.demand.gpus or hold.demand.is_shared:
        gpus += [gpu.uuid for gpu in node.gpus if gpu.geometry is None and Device(gpu.uuid) not in held]
    for profile, count in hold.demand.slices:
        if profile == EVERY_PROFILE:
            gpus += [gpu.uuid for gpu in node.gpus if gpu.geometry is not None]
            continue
        there = [
            device
            for gpu in node.gpus
            for instance in gpu.instances
            if instance.profile == profile and (device := Device(gpu.uuid, instance)) not in held
        ]
        slices += there
        if len(there) < count:
            gpus += [
                gpu.uuid
                for gpu in node.gpus
                if gpu.geometry is not None and any(each.name == profile for each in gpu.geometry.profiles)
            ]
    return gpus, slices


def head(reason: str) -> str:
    """A reason without its details, which come after a colon or a semicolon."""
    return re.split("[:;] ", reason, maxsplit=1)[0]


def in_brief(refusal: Refusal) -> Refusal:
    """A refusal without its details: one object for all that are equal."""
    return _one_of(head(refusal.reason), refusal.resolvable)


@lru_cache(maxsize=4096)
def _one_of(reason: str, resolvable: bool) -> Refusal:
    return Refusal(reason, resolvable)


@lru_cache(maxsize=4096)
def on_any_host(demand: Demand) -> Demand:
    """The demand without CPU and memory, which kube-scheduler has looked at."""
    return replace(demand, cpu_milli=0, memory_mib=0) if demand.cpu_milli or demand.memory_mib else demand


def legal(node: Node) -> Legal:
    """The check that the ledger makes before it assumes: plain arithmetic on the node, no steps and no prices."""

    def check(taken: tuple[Allocation, ...], wanted: Allocation) -> Refusal | None:
        gpus = {gpu.uuid: gpu for gpu in node.gpus}
        guest = wanted.guest
        for device in wanted.devices:
            gpu = gpus.get(device.gpu)
            if gpu is None:
                return Refusal(f"{device.gpu} is not on {node.name}", resolvable=False)
            if gpu.withheld:
                return Refusal(f"{device.gpu}: {gpu.withheld}", resolvable=False)
            if (device.slice is None) != (gpu.geometry is None):
                return Refusal(f"{device} does not agree with the GPU's MIG mode", resolvable=False)
            beside = [each for each in taken if any(other.gpu == gpu.uuid for other in each.devices)]
            together = [other for each in (*beside, wanted) for other in each.devices if other.gpu == gpu.uuid]
            refusal = _together_on(gpu, device, together)
            if refusal is not None:
                return refusal
            if not may_join(guests_of([each.guest for each in beside]), guest, "gpu", occupied=bool(beside)):
                return Refusal(f"{device}: the pods there and this one are not to share a GPU")
        there = [each.guest for each in taken if each.devices]
        if wanted.devices and not may_join(guests_of(there), guest, "node", occupied=bool(there)):
            return Refusal(f"the pods on {node.name} and this one are not to share a node")
        return None

    return check


def _together_on(gpu: Gpu, device: Device, together: Sequence[Device]) -> Refusal | None:
    """Why these devices cannot all be on this GPU; `device` is the one that comes, and among them."""
    if gpu.geometry is not None:
        slices = [each.slice for each in together]
        if any(each is None for each in slices) or len(set(slices)) < len(slices):
            return Refusal(f"{device} is taken")
        wrong = faults(gpu.geometry, [each for each in slices if each is not None])
        return Refusal(f"{device}: {wrong[0]}") if wrong else None
    if len(together) == 1:
        return None
    if not all(each.milli for each in together):
        return Refusal(f"{device} is taken")
    left = GPU_MILLI - sum(each.milli for each in together) + device.milli
    return Refusal(f"{device}: {max(0, left)} milli are left") if device.milli > left else None
