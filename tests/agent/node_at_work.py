"""A node on which pods come and go, small and in one process: a kubelet's device manager, a service with a ledger, and
the agent's `Handing` between them. The real ones are in tests/e2e.

    world = World(report)
    pod = world.place("p", main=["GPU-0"])      the service has placed it, the agent knows
    world.admit(pod)                            the kubelet asks, as it does; what the containers got

The kubelet's freedom is `choose`: which of the available ids it takes, whatever is preferred.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

from app.agent.gift import CannotHand, Gift
from app.agent.handing import Handing, Waits
from app.agent.kubelet.ids import offered, resource_of
from app.agent.kubelet.pod_resources import ContainerHas, KubeletSilent, PodHas
from app.agent.record import RecordFile
from app.agent.service import ReportError
from app.report import (
    ContainerAsk,
    DeviceAt,
    Exchange,
    ExchangeReply,
    Gpu,
    Instance,
    NodeReport,
    Placements,
    PodAt,
    Process,
)
from app.simulate import report_of
from tests.builders import mig_node, node

AT_ONCE = Waits(name=0, room=0, ready=0, answer=0, reach=0, again=0, look=0)

T = TypeVar("T")
Choose = Callable[[Sequence[str], Sequence[str], int], Sequence[str]]
Cells = frozenset[tuple[str, int]]


def mixed_report(wholes: int = 2, cut: int = 2) -> NodeReport:
    """A node with whole GPUs w-0, w-1, … and GPUs in MIG mode m-0, m-1, …; odd ones are on NUMA node 1."""
    gpus = (*report_of(node("w", wholes)).gpus, *report_of(mig_node("m", cut)).gpus)
    numbered = (gpu.model_copy(update={"index": at, "numa": at % 2}) for at, gpu in enumerate(gpus))
    return NodeReport(node="n1", version=1, gpus=tuple(numbered))


def whole(gpu: str) -> DeviceAt:
    return DeviceAt(gpu=gpu)


def part(gpu: str, profile: str, start: int) -> DeviceAt:
    return DeviceAt(gpu=gpu, profile=profile, start=start)


def cells(device: DeviceAt, report: NodeReport) -> Cells:
    """The memory slices of a device: two devices overlap where they share one."""
    if not device.profile:
        return frozenset((device.gpu, at) for at in range(8))
    gpu = next(gpu for gpu in report.gpus if gpu.uuid == device.gpu)
    assert gpu.mig is not None
    sizes = {(profile.name, at.start): at.size for profile in gpu.mig.profiles for at in profile.placements}
    size = sizes[device.profile, device.start]
    return frozenset((device.gpu, at) for at in range(device.start, device.start + size))


@dataclass(frozen=True)
class Container:
    """What a container asks for. `kind`: "init", "sidecar" (an init container that stays) or "main"."""

    name: str
    asks: dict[str, int]
    kind: str = "main"


@dataclass(frozen=True)
class Pod:
    """A pod as the API server has it."""

    uid: str
    name: str
    containers: tuple[Container, ...]
    namespace: str = "default"

    def at(self, devices: Iterable[DeviceAt]) -> PodAt:
        """As the service tells of it."""
        asks = tuple(ContainerAsk(name=one.name, resources=one.asks) for one in self.containers)
        return PodAt(uid=self.uid, namespace=self.namespace, name=self.name, devices=tuple(devices), containers=asks)


def obedient(available: Sequence[str], preferred: Sequence[str], size: int) -> Sequence[str]:
    """Takes what is preferred, and then whatever comes."""
    wanted = [id_ for id_ in preferred if id_ in available]
    return [*wanted, *(id_ for id_ in available if id_ not in wanted)][:size]


def taking(*ids: str) -> Choose:
    """A NUMA hint that leaves only these."""
    return lambda available, preferred, size: [id_ for id_ in ids if id_ in available][:size]


Resources = Mapping[str, Sequence[str]]
Ids = list[str]


class Kubelet:
    """The device manager's rules: who asks in which order, what is counted for whom, what is listed."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.counted: dict[tuple[str, str, str], tuple[str, ...]] = {}
        self.silent = False

    async def list(self) -> tuple[PodHas, ...]:
        """PodResources."""
        if self.silent:
            raise KubeletSilent("nobody listens")
        return tuple(
            PodHas(
                pod.namespace,
                pod.name,
                tuple(
                    ContainerHas(
                        one.name,
                        {
                            resource: ids
                            for (uid, name, resource), ids in self.counted.items()
                            if (uid, name) == (pod.uid, one.name)
                        },
                    )
                    for one in pod.containers
                    if one.kind != "init"
                ),
            )
            for pod in self.pods.values()
        )

    def forget(self, uid: str) -> None:
        """The pod is over."""
        self.pods.pop(uid, None)
        self.counted = {key: ids for key, ids in self.counted.items() if key[0] != uid}

    async def admit(self, pod: Pod, handing: Handing, healthy: Resources, choose: Choose) -> dict[str, Gift]:
        """Container by container; what each got. Raises `CannotHand` and forgets what it counted."""
        self.pods[pod.uid] = pod
        reusable: dict[str, list[str]] = {}
        gifts: dict[str, Gift] = {}
        for container in pod.containers:
            for resource, size in container.asks.items():
                key = pod.uid, container.name, resource
                if key in self.counted:
                    continue
                again = reusable.get(resource, [])[:size]
                ids = again + await self._take(resource, size, again, handing, healthy[resource], choose)
                try:
                    gifts[f"{container.name} {resource}"] = await handing.allocate(resource, ids)
                except CannotHand:
                    self.counted = {key: ids for key, ids in self.counted.items() if key[0] != pod.uid}
                    raise
                self.counted[key] = tuple(ids)
                left = [id_ for id_ in reusable.get(resource, []) if id_ not in ids]
                reusable[resource] = left + (ids if container.kind == "init" else [])
        return gifts

    async def _take(
        self, resource: str, size: int, again: Ids, handing: Handing, healthy: Sequence[str], choose: Choose
    ) -> Ids:
        used = set(chain.from_iterable(ids for key, ids in self.counted.items() if key[2] == resource))
        available = [id_ for id_ in healthy if id_ not in used]
        needed = size - len(again)
        if len(available) < needed:
            raise CannotHand(f"{needed} of {resource} are wanted, {len(available)} are available")
        if not needed:
            return []
        preferred: Sequence[str] = ()
        if len(available) > needed:
            preferred = await handing.prefer(resource, available + again, again, size)
            assert len(preferred) <= size
            assert set(again) <= set(preferred) <= {*available, *again}
        ids = list(choose(available, preferred, needed))
        assert len(ids) == needed
        assert set(ids) <= set(available)
        return ids


@dataclass
class ServiceLike:
    """A ledger of one node, and its answers. `says`: how an exchange goes; "lost" is granted and never answered."""

    report: NodeReport
    pods: dict[str, PodAt] = field(default_factory=dict)
    handed: set[str] = field(default_factory=set)
    says: str = "grant"
    version: int = 0
    asked: list[Exchange] = field(default_factory=list)

    def placements(self) -> Placements:
        """The list as it is now."""
        self.version += 1
        return Placements(service="s", version=self.version, pods=tuple(self.pods.values()))

    def taken(self, *, but: str = "") -> set[tuple[str, int]]:
        """The memory slices that pods hold."""
        return set(self.cells(device for pod in self.pods.values() if pod.uid != but for device in pod.devices))

    def cells(self, devices: Iterable[DeviceAt]) -> Iterator[tuple[str, int]]:
        for device in devices:
            yield from cells(device, self.report)

    def exchange(self, asked: Exchange) -> ExchangeReply:
        """As the service does: free ones, or those of pods that were not handed theirs, one for one."""
        self.asked.append(asked)
        if self.says == "down":
            raise ReportError("cannot reach it: connection refused", arrived=False)
        reply = self._decide(asked)
        if self.says == "lost":
            raise ReportError("the connection was reset")
        return reply

    def _decide(self, asked: Exchange) -> ExchangeReply:
        pod = self.pods.get(asked.uid)
        if pod is not None and set(asked.take) <= set(pod.devices):
            return ExchangeReply(granted=True)
        if pod is None or self.says == "refuse" or not set(asked.give) <= set(pod.devices):
            return ExchangeReply(granted=False, reason="no")
        moved = {asked.uid: [*(one for one in pod.devices if one not in asked.give), *asked.take]}
        for give, take in zip(asked.give, asked.take, strict=True):
            owner = next((one for one in self.pods.values() if take in one.devices), None)
            if owner is not None and owner.uid not in self.handed:
                devices = moved.get(owner.uid, list(owner.devices))
                moved[owner.uid] = [give if one == take else one for one in devices]
        after = {uid: moved.get(uid, list(one.devices)) for uid, one in self.pods.items()}
        everything = list(self.cells(chain.from_iterable(after.values())))
        if len(everything) != len(set(everything)):
            return ExchangeReply(granted=False, reason="somebody has it")
        for uid, devices in moved.items():
            self.pods[uid] = self.pods[uid].model_copy(update={"devices": tuple(devices)})
        return ExchangeReply(granted=True, swapped=tuple(uid for uid in moved if uid != asked.uid))


class Giver:
    """Gives what the report has: a slice needs a UUID. `whole` as by environment, not by CDI."""

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole

    def gift(self, devices: Sequence[DeviceAt], report: NodeReport, *, memory_mib: int | None = None) -> Gift:
        there = {device for gpu in report.gpus for device in _there(gpu)}
        for device in devices:
            if not device.milli and device not in there:
                raise CannotHand(f"{device} is not there")
        return Gift(envs={"GOT": ",".join(one.model_dump_json() for one in devices)})


def _there(gpu: Gpu) -> Iterator[DeviceAt]:
    if gpu.mig is None or not gpu.mig.enabled:
        yield DeviceAt(gpu=gpu.uuid)
    for one in gpu.mig.instances if gpu.mig is not None else ():
        if one.uuid and one.start is not None:
            yield DeviceAt(gpu=gpu.uuid, profile=one.profile, start=one.start)


def devices_in(gift: Gift) -> tuple[DeviceAt, ...]:
    """What a container was given."""
    found = gift.envs["GOT"].replace("},{", "}\n{").split("\n")
    return tuple(DeviceAt.model_validate_json(one) for one in found)


class World:
    """Everything together, with time standing still. `told`: whether the agent hears at once what the service does."""

    by_environment = False

    def __init__(self, report: NodeReport | None = None, *, waits: Waits = AT_ONCE, told: bool = True) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = Path(tempfile.mkdtemp(prefix="handing-"))
        self.waits = waits
        self.told = told
        self.report = report or mixed_report()
        self.kubelet = Kubelet()
        self.service = ServiceLike(self.report)
        self.running: dict[str, dict[str, tuple[DeviceAt, ...]]] = {}
        self.now = 1000.0
        self.numbers = count(1)
        self.counted: Counter[str] = Counter()
        self.handing = self._agent()

    def restart(self) -> None:
        """Another agent on the same node, with what the last one has kept."""
        self.counted.update(self.handing.said().counts)
        self.handing = self._agent()

    def _agent(self) -> Handing:
        return Handing(
            report=self.report,
            kubelet=self.kubelet,
            giver=Giver(whole=self.by_environment),
            exchange=self.service.exchange,
            record=RecordFile(self.directory, node="n1"),
            waits=self.waits,
            clock=self._clock,
        )

    def _clock(self) -> float:
        self.now += 0.001
        return self.now

    def close(self) -> None:
        shutil.rmtree(self.directory)
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    # ---- what happens ----

    def pod(self, name: str, *containers: Container) -> Pod:
        return Pod(f"uid-{name}-{next(self.numbers)}", name, containers)

    def place(self, name: str, *devices: DeviceAt, containers: Sequence[Container] = ()) -> Pod:
        """The service places a pod on these; without containers, one has all of them."""
        asks: dict[str, int] = {}
        for device in devices:
            asks[resource_of(device)] = asks.get(resource_of(device), 0) + 1
        pod = self.pod(name, *(containers or [Container("main", asks)]))
        self.service.pods[pod.uid] = pod.at(devices)
        self.tell()
        return pod

    def tell(self, *, always: bool = False) -> None:
        """The agent makes the slices that are wanted and reports; it hears who is promised what."""
        self.look()
        if self.told or always:
            self.handing.placements(self.service.placements())

    def look(self) -> None:
        """The next report: every slice that is promised or in use is there, with the processes in it."""
        used = {device: uid for uid, got in self.running.items() for devices in got.values() for device in devices}
        wanted = {device for pod in self.service.pods.values() for device in pod.devices} | set(used)
        gpus = tuple(_as_used(gpu, wanted, used) for gpu in self.report.gpus)
        self.report = self.report.model_copy(update={"gpus": gpus, "version": self.report.version + 1})
        self.handing.reported(self.report)

    def admit(self, pod: Pod, choose: Choose = obedient) -> dict[str, tuple[DeviceAt, ...]]:
        """The kubelet admits it; what each container got. Raises `CannotHand`."""
        healthy = {resource: [one.id for one in ids] for resource, ids in offered(self.report, ()).items()}
        self.kubelet.pods[pod.uid] = pod
        try:
            gifts = self.run(self.kubelet.admit(pod, self.handing, healthy, choose))
        finally:
            self.tell()
        got = {name: devices_in(gift) for name, gift in gifts.items()}
        self.running.setdefault(pod.uid, {}).update(got)
        self.service.handed.add(pod.uid)
        self.look()
        return got

    def run(self, awaitable: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(awaitable)

    def end(self, pod: Pod) -> None:
        """It is over, and everybody knows."""
        self.running.pop(pod.uid, None)
        self.kubelet.forget(pod.uid)
        self.service.pods.pop(pod.uid, None)
        self.tell()

    def agree(self) -> None:
        """The agent looks at the kubelet's list."""
        self.run(self.handing._look())

    # ---- what is the case ----

    def counts(self) -> dict[str, int]:
        """Of all agents that there have been."""
        return dict(self.counted + Counter(self.handing.said().counts))

    def hows(self) -> dict[str, str]:
        return {one.name: one.how for one in self.handing.said().handed}

    def shared(self) -> list[str]:
        """Pods that run on the same memory slices."""
        owners: dict[tuple[str, int], str] = {}
        found = []
        for uid, got in self.running.items():
            for cell in set(self.service.cells(chain.from_iterable(got.values()))):
                if cell in owners:
                    found.append(f"{cell} is {owners[cell]}'s and {uid}'s")
                owners[cell] = uid
        return found


def _as_used(gpu: Gpu, wanted: set[DeviceAt], used: dict[DeviceAt, str]) -> Gpu:
    def processes(device: DeviceAt) -> tuple[Process, ...]:
        return (Process(pid=1, pod=used[device]),) if device in used else ()

    if gpu.mig is None:
        return gpu.model_copy(update={"processes": processes(DeviceAt(gpu=gpu.uuid))})
    places = sorted((one for one in wanted if one.gpu == gpu.uuid and one.profile), key=lambda one: one.start)
    instances = tuple(
        Instance(
            profile=one.profile,
            gi_id=number,
            start=one.start,
            uuid=f"MIG-{one.gpu}-{one.profile}-{one.start}",
            processes=processes(one),
        )
        for number, one in enumerate(places)
    )
    return gpu.model_copy(update={"mig": gpu.mig.model_copy(update={"instances": instances})})
