"""What each node can still give: inventory and ledger put together, kept ready in the solver's Ranking.

Work grows with changes: a node's rows are made anew when its report, its holds or its standing change, and at
no other time. Here too is what may *not* be offered although it looks free: nodes whose agent is silent, nodes
that are being checked again, and devices that could belong to a pod which nobody can place yet.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from app.inventory import Entry, Inventory
from app.ledger import Hold, Ledger
from app.translate import EVERY_PROFILE
from solver import Demand, Device, Node, Placement, Policy, Ranking, Refusal, price, quote
from solver.geometry import faults

View = tuple[Node, tuple[Device, ...]]


@dataclass(frozen=True, slots=True)
class Priced:
    """What a demand costs by node. `promised`: only devices that are softly promised to others would do."""

    free: dict[str, int]
    promised: dict[str, int]


class Offers:
    """The nodes that may be offered now, their prices, and why the others may not."""

    def __init__(self, inventory: Inventory, ledger: Ledger, *, policy: Policy) -> None:
        self._inventory = inventory
        self._ledger = ledger
        self._policy = policy
        self._ranking = Ranking(policy)
        self._barred: dict[str, str] = {}
        self._faults: dict[str, str] = {}
        self._dirty: set[str] = set()
        self.blind_until = float("-inf")
        """Until then a node whose agent does not see pods is kept back: pods that were force-deleted while
        nobody watched may still be ending there."""
        self.updated = 0
        """How many times a node's rows were made anew: work that must grow with changes only."""

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

    def keep_back_the_blind(self, *, until: float) -> None:
        """We have just begun to watch: nodes whose agents do not see pods wait for this long."""
        self.blind_until = until
        self._dirty.update(self._inventory)

    def forget(self, name: str) -> None:
        """The node is no more."""
        self._barred.pop(name, None)
        self._faults.pop(name, None)
        self._dirty.discard(name)
        self._ranking.remove(name)

    def refresh(self, *, now: float) -> None:
        """Bring the rows of changed nodes up to date."""
        self._dirty |= self._ledger.drain_changes()
        while self._dirty:
            self._update(self._dirty.pop(), now=now)

    def sweep(self, *, now: float) -> list[str]:
        """Look at every node's age; returns the nodes that are offered again after a fault."""
        back = []
        for name in self._inventory:
            fault = self._fault(name, now=now)
            if bool(fault) != bool(self._faults.get(name)):
                self._dirty.add(name)
                if not fault:
                    back.append(name)
            elif fault:
                self._faults[name] = fault
        return back

    def _update(self, name: str, *, now: float) -> None:
        self.updated += 1
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

    # -- asking ---------------------------------------------------------------------------------------

    def fault(self, name: str) -> str:
        """Why nothing of this node is offered; empty when it is."""
        if name in self._faults:
            return self._faults[name]
        return "" if self._inventory.get(name) is not None else "no agent has reported this node's GPUs"

    def fitting(self, demand: Demand, names: Iterable[str], go_on: Callable[[], bool]) -> list[str] | None:
        """The nodes among `names`, in their order, that have a legal step; None where `go_on()` ended the search.

        What was worked out until then is kept, so asking again gets further.
        """
        prices = self._ranking.prices_while(demand, go_on)
        return None if prices is None else [name for name in names if name in prices]

    def refusal(self, demand: Demand, name: str) -> Refusal:
        """Why this node does not fit."""
        fault = self.fault(name)
        if fault:
            return Refusal(fault, resolvable=False)
        return self._ranking.refusal(demand, name) or Refusal(f"fits {demand} after all; ask again")

    def priced(self, demand: Demand, names: Iterable[str], go_on: Callable[[], bool], *, uid: str) -> Priced:
        """The price of each fitting node; apart from them those that fit on softly promised devices only."""
        prices = self._ranking.prices_while(demand, go_on) or {}
        free = {name: prices[name] for name in names if name in prices}
        promised: dict[str, int] = {}
        for name in self._ledger.nodes_with_proposals():
            if name in free:
                softly = self._soft_price(demand, name, uid=uid)
                if softly is None:
                    promised[name] = free.pop(name)
                else:
                    free[name] = softly
        return Priced(free, promised)

    def best(self, demand: Demand, name: str, *, uid: str) -> Placement | Refusal:
        """Exact devices on this node: its own earlier proposal if it still stands, else the best step, softly first."""
        if self.fault(name):
            return self.refusal(demand, name)
        own = self._ledger.get(uid)
        node, taken = self.view(name)
        stands = own is not None and not own.firm and own.node == name and own.demand == demand
        if own is not None and stands and legal(node)(taken, own.devices) is None:
            return Placement(name, own.devices, own.prices)
        promised = self._unspoilt(node, taken, self._ledger.proposed(name, but=uid))
        if promised:
            softly = quote(node, (*taken, *promised), demand, self._policy)
            if softly is not None:
                return softly
        return self._ranking.best(demand, name) or self.refusal(demand, name)

    def without(self, demand: Demand, name: str, victims: Sequence[str]) -> bool:
        """Whether the demand would have a legal step here if these pods were gone."""
        if self.fault(name):
            return False
        node, taken = self.view(name, but=victims)
        return quote(node, taken, demand, self._policy) is not None

    def _soft_price(self, demand: Demand, name: str, *, uid: str) -> int | None:
        node, taken = self.view(name)
        promised = self._unspoilt(node, taken, self._ledger.proposed(name, but=uid))
        return price(node, (*taken, *promised), demand, self._policy)

    @staticmethod
    def _unspoilt(node: Node, taken: tuple[Device, ...], promised: tuple[Device, ...]) -> tuple[Device, ...]:
        """Promises that can still be kept: one that meanwhile clashes with a firm hold, or another, is none."""
        kept: list[Device] = []
        check = legal(node)
        for device in promised:
            if check((*taken, *kept), (device,)) is None:
                kept.append(device)
        return tuple(kept)

    # -- one node, as the solver may see it -----------------------------------------------------------

    def view(self, name: str, *, but: Sequence[str] = ()) -> View:
        """The node with everything kept back that could belong to somebody, and what is firmly taken.

        `but` leaves out these pods (UIDs), as if they were gone.
        """
        entry = self._inventory.get(name)
        assert entry is not None
        holds = [hold for hold in self._ledger.on(name) if hold.firm and hold.pod.uid not in but]
        taken = [device for hold in holds for device in hold.devices]
        kept_back, seen = _strangers(entry, holds, but)
        taken += seen
        for hold in holds:
            if hold.unknown:
                gpus, slices = could_be(hold, entry.node, taken)
                taken += slices
                kept_back.update(dict.fromkeys(gpus, f"may be in use by {hold.pod}, which Tangram did not place"))
        for gpu in entry.node.gpus:
            away = self._ledger.elsewhere(gpu.uuid, node=name)
            homes = self._inventory.homes(gpu.uuid)
            if away is not None and away.pod.uid not in but:
                kept_back[gpu.uuid] = f"is held by {away.pod} under the node name {away.node}"
            elif len(homes) > 1:
                kept_back[gpu.uuid] = f"is reported by more than one node: {', '.join(sorted(homes))}"
        if not kept_back:
            return entry.node, tuple(taken)
        gpus_now = tuple(replace(gpu, withheld=gpu.withheld or kept_back.get(gpu.uuid, "")) for gpu in entry.node.gpus)
        return replace(entry.node, gpus=gpus_now), tuple(taken)


def _strangers(entry: Entry, holds: Sequence[Hold], but: Sequence[str]) -> tuple[dict[str, str], list[Device]]:
    """GPUs to keep back and slices to count as taken, because a pod that does not hold them was seen on them."""
    kept_back: dict[str, str] = {}
    seen: list[Device] = []
    for device, uids in entry.users.items():
        holders = {hold.pod.uid for hold in holds if device in hold.devices}
        strangers = uids - holders - set(but)
        if not strangers:
            continue
        if device.slice is None:
            kept_back[device.gpu] = f"has processes of pod {min(strangers)}, which was not placed there"
        elif not holders:
            seen.append(device)
    return kept_back, seen


def could_be(hold: Hold, node: Node, taken: Sequence[Device]) -> tuple[list[str], list[Device]]:
    """What a pod of unknown devices might be using: whole GPUs (UUIDs), and existing slices of its profiles.

    Where a node does not show enough instances of an asked profile, every GPU that could be cut into it is
    kept back.
    """
    held = set(taken)
    gpus: list[str] = []
    slices: list[Device] = []
    if hold.demand.gpus:
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


def legal(node: Node) -> Callable[[tuple[Device, ...], tuple[Device, ...]], Refusal | None]:
    """The check that the ledger makes before it assumes: plain arithmetic on the node, no steps and no prices."""

    def check(taken: tuple[Device, ...], devices: tuple[Device, ...]) -> Refusal | None:
        gpus = {gpu.uuid: gpu for gpu in node.gpus}
        for device in devices:
            gpu = gpus.get(device.gpu)
            if gpu is None:
                return Refusal(f"{device.gpu} is not on {node.name}", resolvable=False)
            if gpu.withheld:
                return Refusal(f"{device.gpu}: {gpu.withheld}", resolvable=False)
            others = [other for other in taken if other.gpu == device.gpu]
            mine = [other for other in devices if other.gpu == device.gpu]
            if device.slice is None or gpu.geometry is None:
                if gpu.geometry is not None or device.slice is not None:
                    return Refusal(f"{device} does not agree with the GPU's MIG mode", resolvable=False)
                if others or len(mine) > 1:
                    return Refusal(f"{device} is taken")
                continue
            slices = [other.slice for other in (*others, *mine)]
            if any(each is None for each in slices) or len(set(slices)) < len(slices):
                return Refusal(f"{device} is taken")
            idle = [each for each in gpu.instances if each not in slices]
            wrong = faults(gpu.geometry, [each for each in (*slices, *idle) if each is not None])
            if wrong:
                return Refusal(f"{device}: {wrong[0]}")
        return None

    return check
