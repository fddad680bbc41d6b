"""An agent's side of orders without NVML: it fetches a node's list, carries it out on a report, and reports."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field

from app.handing import Unanswered
from app.report import (
    DeviceAt,
    Exchange,
    ExchangeReply,
    Failed,
    Gpu,
    Handed,
    Instance,
    Listening,
    Make,
    NodeReport,
    OrderList,
    OrdersDone,
    OrdersReply,
    Placements,
    PodAt,
    SliceAt,
)
from app.service import Service

_numbers = itertools.count(1)


@dataclass
class Hands:
    """One node. `fail` has words for slices (profile, start) that cannot be made or removed."""

    service: Service
    report: NodeReport
    fail: dict[tuple[str, int], str] = field(default_factory=dict)
    got: OrderList | None = None
    placed: Placements | None = None
    removed: list[tuple[str, str, int]] = field(default_factory=list)

    def tell(self, **changes: object) -> None:
        """Report, with these fields changed."""
        self.report = self.report.model_copy(update={**changes, "version": self.report.version + 1})
        assert self.service.report(self.report)

    async def listen(self, *, seconds: float = 0.0) -> OrdersReply:
        """Ask for orders, as one who has the list that came last."""
        said = Listening(
            node=self.report.node,
            boot=self.report.boot,
            version=self.report.version,
            service=next((each.service for each in (self.got, self.placed) if each), ""),
            orders=self.got.version if self.got else 0,
            placements=self.placed.version if self.placed else 0,
            wait_seconds=seconds,
        )
        reply = await self.service.orders.listen(said)
        self.got = reply.orders or self.got
        self.placed = reply.placements or self.placed
        return reply

    async def placements(self) -> dict[str, PodAt]:
        """What the node's agent knows now, by the pods' names."""
        await self.listen()
        return {pod.name: pod for pod in (self.placed.pods if self.placed else ())}

    async def exchange(self, pod: str, give: DeviceAt, take: DeviceAt) -> ExchangeReply | Unanswered:
        """Ask to have one device instead of another."""
        asked = Exchange(node=self.report.node, uid=f"uid-{pod}", give=(give,), take=(take,))
        return await self.service.handing.exchange(asked)

    def hand(self, *handed: Handed, **changes: object) -> None:
        """Report that this is what containers have."""
        self.tell(handed=handed, **changes)

    async def hear(self, *, seconds: float = 0.0) -> OrderList:
        """The new list that must come."""
        orders = (await self.listen(seconds=seconds)).orders
        assert orders is not None
        return orders

    async def obey(self) -> OrderList | None:
        """Fetch the list if there is a new one, carry it out, report; the list."""
        reply = await self.listen()
        if reply.orders is not None:
            self.carry_out(reply.orders)
        return reply.orders

    async def keep_obeying(self) -> None:
        """For ever."""
        while True:
            await self.obey()
            await asyncio.sleep(0.002)

    def carry_out(self, orders: OrderList) -> None:
        """Remove, make, and say what failed."""
        failed = []
        for switch in orders.switch:
            self.change(switch.gpu, mig_enabled=switch.enabled)
        for each in orders.remove:
            failed += self._remove(each)
        for make in orders.make:
            failed += self._make(make)
        self.tell(orders=OrdersDone(service=orders.service, version=orders.version, failed=tuple(failed)))

    def instances(self, gpu: str) -> dict[tuple[str, int], Instance]:
        """What is on the board, by profile and start."""
        mig = next(each.mig for each in self.report.gpus if each.uuid == gpu)
        return {(each.profile, each.start or 0): each for each in (mig.instances if mig else ())}

    def put(self, gpu: str, profile: str, start: int, *, uuid: str | None = "") -> None:
        """An instance is there; with `uuid` None it has no compute instance."""
        board = next(each for each in self.report.gpus if each.uuid == gpu)
        assert board.mig is not None
        size = next(each.placements[0].size for each in board.mig.profiles if each.name == profile)
        number = next(_numbers)
        named = f"MIG-{number}" if uuid == "" else uuid
        made = Instance(profile=profile, gi_id=number, start=start, size=size, uuid=named)
        there = {**self.instances(gpu), (profile, start): made}
        self.change(gpu, instances=tuple(there.values()))

    def take_away(self, gpu: str, profile: str, start: int) -> None:
        """It is there no longer."""
        there = self.instances(gpu)
        del there[profile, start]
        self.change(gpu, instances=tuple(there.values()))

    def reboot(self) -> None:
        """Instances do not survive it."""
        for gpu in self.report.gpus:
            if gpu.mig is not None:
                self.change(gpu.uuid, instances=())

    def _make(self, make: Make) -> list[Failed]:
        if (make.profile, make.start) in self.fail:
            return [self._failed(make)]
        for each in make.remove:
            self._remove(each)
        there = self.instances(make.gpu).get((make.profile, make.start))
        if there is not None and there.uuid is not None:
            return []
        if there is None and self._overlaps(make):
            return [
                Failed(**make.model_dump(include={"gpu", "profile", "start"}), reason="Insufficient Resources (23)")
            ]
        self.put(make.gpu, make.profile, make.start)
        return []

    def _overlaps(self, make: Make) -> bool:
        board = next(each for each in self.report.gpus if each.uuid == make.gpu)
        assert board.mig is not None
        size = next(each.placements[0].size for each in board.mig.profiles if each.name == make.profile)
        return any(
            (each.start or 0) < make.start + size and make.start < (each.start or 0) + (each.size or 0)
            for each in self.instances(make.gpu).values()
        )

    def _remove(self, at: SliceAt) -> list[Failed]:
        if (at.profile, at.start) not in self.instances(at.gpu):
            return []
        if (at.profile, at.start) in self.fail:
            return [self._failed(at)]
        self.removed.append((at.gpu, at.profile, at.start))
        self.take_away(at.gpu, at.profile, at.start)
        return []

    def _failed(self, at: SliceAt) -> Failed:
        reason = self.fail[at.profile, at.start]
        return Failed(gpu=at.gpu, profile=at.profile, start=at.start, reason=reason)

    def change(self, gpu: str, *, mig_enabled: bool | None = None, **changes: object) -> None:
        """These fields of a GPU's MIG are now so."""
        if mig_enabled is not None:
            changes |= {"enabled": mig_enabled, "pending": mig_enabled}
        self.report = self.report.model_copy(
            update={"gpus": tuple(_changed(each, changes) if each.uuid == gpu else each for each in self.report.gpus)}
        )


def _changed(gpu: Gpu, changes: dict[str, object]) -> Gpu:
    assert gpu.mig is not None
    return gpu.model_copy(update={"mig": gpu.mig.model_copy(update=changes)})
