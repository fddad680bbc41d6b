"""The law of handing out, under everything that a kubelet, a service and an agent may do to one another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.agent.gift import CannotHand
from app.agent.kubelet.ids import GPU_RESOURCE, offered
from app.report import DeviceAt
from tests.agent.node_at_work import Choose, Container, Pod, World, cells, mixed_report, obedient, part, whole

PLACES = [
    *(whole(f"w-{at}") for at in range(3)),
    *(part(f"m-{at}", "1g.10gb", start) for at in range(2) for start in range(4)),
    *(part(f"m-{at}", "2g.20gb", start) for at in range(2) for start in (0, 2, 4)),
    *(part(f"m-{at}", "3g.40gb", start) for at in range(2) for start in (0, 4)),
]
RESOURCES = (GPU_RESOURCE, "nvidia.com/mig-1g.10gb", "nvidia.com/mig-2g.20gb", "nvidia.com/mig-3g.40gb")


def capricious(numbers: Sequence[int]) -> Choose:
    """Takes ids without regard to what is preferred."""

    def choose(available: Sequence[str], preferred: Sequence[str], size: int) -> Sequence[str]:
        left, taken = sorted(available), []
        for number in [*numbers, *range(size)][:size]:
            taken.append(left.pop(number % len(left)))
        return taken

    return choose


choices = st.one_of(st.just(obedient), st.lists(st.integers(0, 30), max_size=3).map(capricious))


class Node(RuleBasedStateMachine):
    """Pods come and go; the kubelet takes what it likes; whoever can be restarted or silent is."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World(mixed_report(3, 2))
        self.pending: list[Pod] = []
        self.placed: dict[str, Pod] = {}
        self.unplaced: dict[str, Pod] = {}
        self.half_gone: list[tuple[Pod, str]] = []

    def teardown(self) -> None:
        self.world.close()

    # ---- pods ----

    @rule(
        start=st.integers(0, 30),
        size=st.integers(1, 3),
        first=st.sampled_from(["none", "init", "sidecar"]),
        split=st.booleans(),
        now=st.one_of(st.none(), choices),
    )
    def place(self, start: int, size: int, first: str, split: bool, now: Choose | None) -> None:
        """The service finds room and takes it: of one kind, as much as there is."""
        taken = self.world.service.taken()
        kind = PLACES[start % len(PLACES)].profile
        devices: list[DeviceAt] = []
        for device in PLACES[start % len(PLACES) :]:
            its = cells(device, self.world.report)
            if device.profile == kind and len(devices) < size and not its & taken:
                devices.append(device)
                taken |= its
        if devices:
            self._place(devices, first, split)
        if devices and now is not None:
            self.admit_one(len(self.pending) - 1, now)

    def _place(self, devices: list[DeviceAt], first: str, split: bool) -> None:
        resource = self._resource(devices[0])
        rest, containers = len(devices), []
        if first == "init":
            containers.append(Container("first", {resource: len(devices)}, "init"))
        if first == "sidecar" and rest > 1:
            containers.append(Container("first", {resource: 1}, "sidecar"))
            rest -= 1
        if split and rest > 1:
            containers.append(Container("one", {resource: 1}))
            rest -= 1
        containers.append(Container("main", {resource: rest}))
        pod = self.world.place(self._name(), *devices, containers=containers)
        self.placed[pod.uid] = pod
        self.pending.append(pod)

    def _name(self) -> str:
        """Names are used again when a pod has gone: there are but few."""
        pods = [*self.placed.values(), *self.unplaced.values(), *self.world.kubelet.pods.values()]
        names = {one.name for one in pods} | {one.name for one, _ in self.half_gone}
        return next(name for name in map(str, range(100)) if name not in names)

    @staticmethod
    def _resource(device: DeviceAt) -> str:
        return f"nvidia.com/mig-{device.profile}" if device.profile else GPU_RESOURCE

    @rule(resource=st.sampled_from(RESOURCES), size=st.integers(1, 2), named=st.booleans(), choose=choices)
    def come_by_itself(self, resource: str, size: int, named: bool, choose: Choose) -> None:
        """Past Tangram; whether its service has seen it or not."""
        pod = self.world.pod(self._name(), Container("main", {resource: size}))
        if named:
            self.world.service.pods[pod.uid] = pod.at(())
            self.world.tell()
        self.unplaced[pod.uid] = pod
        self.pending.append(pod)
        self.admit_one(len(self.pending) - 1, choose)

    @precondition(lambda self: self.pending)
    @rule(which=st.integers(0, 30), choose=choices)
    def admit(self, which: int, choose: Choose) -> None:
        self.admit_one(which, choose)

    def admit_one(self, which: int, choose: Choose) -> None:
        """Which kubelets do in any order."""
        pod = self.pending.pop(which % len(self.pending))
        if pod.uid in self.placed and pod.uid not in self.world.service.pods:
            return
        if any(
            size > len(offered(self.world.report, ())[key]) for one in pod.containers for key, size in one.asks.items()
        ):
            return
        try:
            got = self.world.admit(pod, choose)
        except CannotHand:
            self.half_gone.append((pod, "kubelet"))  # it has failed, and is listed until somebody tidies up
            self.world.running.pop(pod.uid, None)
            return
        given = set(chain.from_iterable(got.values()))
        sure = self.world.told and not self.world.kubelet.silent and not self.half_gone  # nobody else can seem to ask
        if pod.uid in self.placed and sure:
            assert given == set(self.world.service.pods[pod.uid].devices), "each placed pod gets its ledger's devices"
        self._agree(pod, given)

    def _agree(self, pod: Pod, given: set[DeviceAt]) -> None:
        """The agent sees the list; the ledger follows what was handed, and what that displaces is placed no more."""
        if self.world.kubelet.silent or not self.world.told:
            return  # a name that is used again is then not known to be another pod's
        self.world.agree()
        said = [one for one in self.world.handing.said().handed if one.name == pod.name]
        assert given == {device for one in said for device in one.devices}, "the report says what containers have"
        pods, by_name = self.world.service.pods, {one.name: one for one in self.world.kubelet.pods.values()}
        handed: dict[str, set[DeviceAt]] = {}
        for each in self.world.handing.said().handed:
            uid = each.uid or by_name[each.name].uid
            handed[uid] = handed.get(uid, set()) | set(each.devices)
        for uid, devices in handed.items():
            if uid in self.world.running:
                pods[uid] = (self.placed.get(uid) or self.unplaced[uid]).at(devices)
        its = set(self.world.service.cells(chain.from_iterable(handed.values())))
        for other in list(pods.values()):
            if other.uid not in handed and its & set(self.world.service.cells(other.devices)):
                assert other.uid not in self.world.running
                del pods[other.uid]
        self.world.tell()

    @precondition(lambda self: self.world.running)
    @rule(which=st.integers(0, 30), first=st.sampled_from(["both", "kubelet", "service"]))
    def end(self, which: int, first: str) -> None:
        """Its containers have ended; kubelet and service notice one after the other."""
        uid = sorted(self.world.running)[which % len(self.world.running)]
        pod = self.placed.get(uid) or self.unplaced[uid]
        self.world.running.pop(uid)
        self.half_gone.append((pod, "both"))
        if first == "both":
            self._let_go()
        elif first == "kubelet":
            self.world.kubelet.forget(uid)
        else:
            self.world.service.pods.pop(uid, None)
        self.world.tell()

    @rule()
    def everybody_has_noticed(self) -> None:
        self._let_go()
        self.world.tell()

    def _let_go(self) -> None:
        for pod, _ in self.half_gone:
            self.world.kubelet.forget(pod.uid)
            self.world.service.pods.pop(pod.uid, None)
            self.placed.pop(pod.uid, None)
            self.unplaced.pop(pod.uid, None)
        self.half_gone.clear()

    # ---- what goes wrong ----

    @rule(says=st.sampled_from(["grant", "grant", "refuse", "down", "lost"]))
    def the_service_answers(self, says: str) -> None:
        self.world.service.says = says

    @rule(told=st.booleans())
    def the_feed_is_cut(self, told: bool) -> None:
        self.world.told = told
        self.world.tell()

    @rule()
    def the_agent_is_killed(self) -> None:
        self.world.restart()

    @rule(silent=st.booleans())
    def the_kubelet_says_nothing(self, silent: bool) -> None:
        self.world.kubelet.silent = silent

    @rule()
    def the_agent_looks_at_the_list(self) -> None:
        self.world.agree()

    @precondition(lambda self: self.world.told and not self.world.kubelet.silent)
    @precondition(lambda self: all(uid in self.world.service.pods for uid in self.world.running))
    @rule()
    def the_kubelet_loses_its_checkpoint(self) -> None:
        """Not in the same moment in which it admits: the agent looks at its list every few seconds."""
        self.world.agree()
        self.world.kubelet.counted.clear()

    # ---- the law ----

    @invariant()
    def no_device_is_in_two_running_pods(self) -> None:
        assert not self.world.shared()


TestNode = Node.TestCase
TestNode.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
