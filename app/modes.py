"""Which GPUs shall change their MIG mode. Only where the policy allows it (`mig_modes`), the GPU is idle, and the
architecture does it without a reset; what an operator must do elsewhere is in the report (`Mig.note`).

Pods that wait for slices make an idle GPU a MIG GPU, pods that wait for whole GPUs the other way round, and a GPU
that came back from a reboot without MIG although pods hold slices of it is switched on again. One GPU of a node at a
time, and none within `REST_SECONDS` of its last change: what is switched back and forth serves nobody.
"""

from collections.abc import Callable, Iterator

from app.inventory import Inventory
from app.ledger import Ledger
from app.offers import Offers
from app.orders import Orders
from app.report import Gpu
from app.translate import profile_as_asked
from app.truth import Truth, Waiting
from solver import Demand
from solver.cluster import devices_of

REST_SECONDS = 60.0
"""Chosen by feel: longer than a pod needs to be scheduled on the GPU that was switched for it."""

PATIENCE_SECONDS = 15.0
"""After a GPU was switched for a kind of demand: kube-scheduler may wait 10 s before it tries a refused pod again."""

WAIT_SECONDS = 2.0
"""A pod must have waited so long before a GPU changes for it: room that is just being made comes first."""


class Modes:
    """Decides about modes; `orders` has them switched."""

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        offers: Offers,
        orders: Orders,
        truth: Truth,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._inventory = inventory
        self._offers = offers
        self._orders = orders
        self._truth = truth
        self._clock = clock
        self._switched_at: dict[str, float] = {}
        self._switched_for: dict[Demand, float] = {}

    def sweep(self) -> None:
        """Switch what is to be switched now: what pods hold already, then one GPU for the pods that wait."""
        for name in self._inventory:
            self._bring_back(name)
        asked = [each.pod.ask for each in self._waiting()]
        demands = list(dict.fromkeys(ask for ask in asked if isinstance(ask, Demand)))
        self._switched_for = {
            demand: at for demand, at in self._switched_for.items() if self._clock() - at < PATIENCE_SECONDS
        }
        for demand in demands:
            if demand in self._switched_for:
                continue
            if demand.slices and self._switch_one(demand, enabled=True):
                return
            if demand.gpus and not demand.slices and self._switch_one(demand, enabled=False):
                return

    def _waiting(self) -> list[Waiting]:
        before = self._clock() - WAIT_SECONDS
        return [each for each in self._truth.waiting.values() if each.since <= before]

    def _bring_back(self, name: str) -> None:
        """Slices are held on a GPU that is not in MIG mode: it lost the mode with a reboot."""
        held = {device.gpu for hold in self._ledger.firmly(name) for device in hold.devices if device.slice}
        for gpu in self._can_switch(name, enabled=True) if held else ():
            if gpu.uuid in held:
                self._switch(name, gpu, enabled=True)
                return

    def _switch_one(self, demand: Demand, *, enabled: bool) -> bool:
        """Switch one idle GPU that would serve the demand; of several, one beside most GPUs of that mode."""
        found = []
        for name in self._truth.refused_on.get(demand, ()):
            entry = self._inventory.get(name)
            if entry is None or self._offers.fault(name) or self._orders.is_switching(name):
                continue
            taken = {device.gpu for device in devices_of(self._offers.view(name)[1])}
            alike = sum(gpu.mig is not None and gpu.mig.enabled == enabled for gpu in entry.report.gpus)
            for gpu in self._can_switch(name, enabled=enabled):
                if gpu.uuid not in taken and not gpu.pods and not gpu.processes and _serves(gpu, demand):
                    instances = len(gpu.mig.instances) if gpu.mig else 0
                    found.append((instances, -alike, name, gpu.index, gpu))
        if not found:
            return False
        instances, _, name, _, gpu = min(found, key=lambda each: each[:4])
        if instances:
            self._orders.clear(name, gpu.uuid)  # all idle, since nothing of the GPU is taken; the mode comes next
        else:
            self._switched_for[demand] = self._clock()
            self._switch(name, gpu, enabled=enabled)
        return True

    def _can_switch(self, name: str, *, enabled: bool) -> Iterator[Gpu]:
        entry = self._inventory.get(name)
        if entry is None or not self._inventory.slices_are_made(name) or entry.report.error:
            return
        now = self._clock()
        for gpu in entry.report.gpus:
            mig = gpu.mig
            if mig is None or not mig.switches or mig.enabled == enabled or mig.pending not in (None, mig.enabled):
                continue
            rested = now - self._switched_at.get(gpu.uuid, float("-inf")) >= REST_SECONDS
            if gpu.health == "ok" and rested and not self._orders.troubled(name, gpu.uuid):
                yield gpu

    def _switch(self, name: str, gpu: Gpu, *, enabled: bool) -> None:
        self._switched_at[gpu.uuid] = self._clock()
        self._orders.switch(name, gpu.uuid, enabled=enabled)


def _serves(gpu: Gpu, demand: Demand) -> bool:
    """Whether the GPU would be of use after switching: it can be cut into one of the profiles, or is not a slice's."""
    profiles = {profile_as_asked(profile.name) for profile in gpu.mig.profiles} if gpu.mig else set()
    return not demand.slices or any(profile in profiles for profile, _ in demand.slices)
