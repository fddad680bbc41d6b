"""The ground that tests of devices stand on: does controlplane/kubelet.go do what a kubelet does?

Pods are bound by the test itself, so that what is seen is the kubelet alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, ControlPlane
from tests.e2e.kubelet import ContainerEvent, Kubelet, need_mount_namespace
from tests.e2e.nodes import KubernetesObject, gpu_pod, kubelet_node
from tests.e2e.plugin import GPU, Plugin, listed

pytestmark = pytest.mark.e2e

NUMA_OF = {"gpu-0": 0, "gpu-1": 0, "gpu-2": 1, "gpu-3": 1}
NUMBERS = itertools.count(1)


class Machine:
    """A node with its kubelet and one plugin."""

    def __init__(self, cluster: Cluster, kubelet: Kubelet, plugin: Plugin) -> None:
        self.cluster = cluster
        self.kubelet = kubelet
        self.plugin = plugin

    def bind(self, *names: str, gpus: int = 1, **options: Any) -> None:
        """Create pods that are bound to the node from the start."""
        self.cluster.add_pods(self._bound(name, gpus, **options) for name in names)

    def _bound(self, name: str, gpus: int, grace_seconds: int = 5, **options: Any) -> KubernetesObject:
        pod = gpu_pod(name, {GPU: gpus}, **options)
        pod["spec"] |= {"nodeName": self.kubelet.node, "terminationGracePeriodSeconds": grace_seconds}
        return pod

    def wait_offered(self, *, capacity: int, allocatable: int) -> None:
        """Until the node's status says so."""

        def offered() -> bool:
            status = self.cluster.get(f"/api/v1/nodes/{self.kubelet.node}")["status"]
            return (status["capacity"].get(GPU), status["allocatable"].get(GPU)) == (str(capacity), str(allocatable))

        self.cluster.wait_for(offered, f"{capacity} GPUs, {allocatable} of them well")

    def container_of(self, name: str) -> ContainerEvent:
        """How the pod's one container was started."""
        (found,) = [each for each in self.kubelet.containers().values() if each.pod == name]
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    need_mount_namespace()
    with ControlPlane() as cluster:
        yield cluster


@pytest.fixture
def machine(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine with four GPUs on two NUMA nodes; its parameter is more for the kubelet."""
    node = f"node-{next(NUMBERS)}"
    cluster.add_nodes([kubelet_node(node)])
    options: dict[str, Any] = getattr(request, "param", {})
    with Kubelet(cluster.processes, node, cluster.kubeconfig, **options) as kubelet:
        plugin = Plugin(kubelet, NUMA_OF)
        plugin.register()
        machine = Machine(cluster, kubelet, plugin)
        machine.wait_offered(capacity=4, allocatable=4)
        yield machine
        plugin.close()
        cluster.delete_all_pods()


def test_ill_device_lowers_what_the_node_offers(machine: Machine) -> None:
    machine.plugin.fall_ill("gpu-1")
    machine.wait_offered(capacity=4, allocatable=3)


def test_pod_gets_the_ids_that_the_plugin_prefers(machine: Machine) -> None:
    machine.plugin.prefers = ["gpu-3"]
    machine.bind("wants-one")
    machine.cluster.wait_phase("wants-one", "Running")

    given = machine.container_of("wants-one")
    assert given.devices == {GPU: ("gpu-3",)}
    assert given.envs == {"NVIDIA_VISIBLE_DEVICES": "gpu-3"}
    assert given.annotations == {"tangram.gpu/given": "gpu-3"}
    assert given.cdi_devices == ("nvidia.com/gpu=gpu-3",)
    assert given.device_nodes == ("/dev/null",)
    assert listed(machine.kubelet) == {"wants-one": {"gpu-3"}}


@pytest.mark.parametrize("machine", [{"policy": "single-numa-node"}], indirect=True)
def test_pod_that_cannot_be_aligned_is_failed(machine: Machine) -> None:
    machine.bind("wants-three", gpus=3)
    refused = machine.cluster.wait_phase("wants-three", "Failed")
    assert refused["status"]["reason"] == "TopologyAffinityError"
    assert refused["status"]["message"].startswith("Pod was rejected: ")
    assert not machine.plugin.allocated
    assert [event.event for event in machine.kubelet.events()] == ["refused"]
    assert listed(machine.kubelet) == {}

    machine.plugin.prefers = ["gpu-2", "gpu-3"]
    machine.bind("wants-two", gpus=2)
    machine.cluster.wait_phase("wants-two", "Running")
    (ids,) = machine.container_of("wants-two").devices.values()
    assert len({NUMA_OF[device] for device in ids}) == 1


@pytest.mark.parametrize("machine", [{"policy": "best-effort"}], indirect=True)
def test_plugin_is_not_asked_when_a_numa_node_has_just_enough(machine: Machine) -> None:
    """The topology manager chooses the NUMA node; the plugin chooses among its devices, if there is a choice."""
    machine.plugin.prefers = ["gpu-2", "gpu-3"]
    machine.bind("wants-two", gpus=2)
    machine.cluster.wait_phase("wants-two", "Running")
    assert machine.container_of("wants-two").devices == {GPU: ("gpu-0", "gpu-1")}
    assert machine.plugin.preferences_asked == 0

    machine.plugin.prefers = ["gpu-3"]
    machine.bind("wants-one")
    machine.cluster.wait_phase("wants-one", "Running")
    assert machine.container_of("wants-one").devices == {GPU: ("gpu-3",)}
    assert machine.plugin.preferences_asked == 1


def test_pod_that_waits_for_a_kubelet_is_refused_when_plugins_come_later(machine: Machine) -> None:
    """A new kubelet admits what was bound meanwhile at once, and knows from its checkpoint whose the resource is."""
    machine.kubelet.kill()
    machine.bind("too-early")
    machine.kubelet.restart()
    refused = machine.cluster.wait_phase("too-early", "Failed")
    assert refused["status"]["reason"] == "UnexpectedAdmissionError"
    assert "no healthy devices present" in refused["status"]["message"]


def test_killed_kubelet_keeps_what_it_gave(machine: Machine) -> None:
    machine.plugin.prefers = ["gpu-2"]
    machine.bind("before")
    machine.cluster.wait_phase("before", "Running")
    before = machine.kubelet.containers()

    machine.kubelet.restart()

    machine.cluster.wait_for(lambda: listed(machine.kubelet) == {"before": {"gpu-2"}}, "PodResources to know the pod")
    machine.wait_offered(capacity=0, allocatable=0)  # plugins have to register again
    machine.plugin.register()
    machine.wait_offered(capacity=4, allocatable=4)
    machine.plugin.prefers = ["gpu-2", "gpu-0"]
    machine.bind("after", gpus=2)
    machine.cluster.wait_phase("after", "Running")
    (ids,) = machine.container_of("after").devices.values()
    assert "gpu-2" not in ids
    assert machine.kubelet.containers().items() >= before.items()
    assert len(machine.plugin.allocated) == 2


def test_plugin_that_refuses_fails_the_pod(machine: Machine) -> None:
    machine.plugin.refuses = "no such slice"
    machine.bind("refused")
    refused = machine.cluster.wait_phase("refused", "Failed")
    assert refused["status"]["reason"] == "UnexpectedAdmissionError"
    assert "no such slice" in refused["status"]["message"]

    machine.plugin.refuses = ""
    machine.bind("all", gpus=4)
    machine.cluster.wait_phase("all", "Running")


@pytest.mark.parametrize("machine", [{"longest_delay_seconds": 1.0}], indirect=True)
def test_pods_are_admitted_one_by_one(machine: Machine) -> None:
    """Whoever is being given devices is the only listed pod that has none."""
    names = [f"pod-{index}" for index in range(4)]
    machine.bind(*names)
    for name in names:
        machine.cluster.wait_phase(name, "Running")
    empty = [[name for name, ids in seen.items() if not ids] for seen in machine.plugin.listed_meanwhile]
    assert all(len(lacking) == 1 for lacking in empty)
    assert {lacking[0] for lacking in empty} == set(names)
    assert [len(seen) for seen in machine.plugin.listed_meanwhile] == [1, 2, 3, 4]


def test_node_without_enough_refuses_by_name(machine: Machine) -> None:
    machine.plugin.fall_ill("gpu-0")
    machine.wait_offered(capacity=4, allocatable=3)
    machine.bind("wants-four", gpus=4)
    refused = machine.cluster.wait_phase("wants-four", "Failed")
    assert refused["status"]["reason"] == "UnexpectedAdmissionError"  # the device manager is asked before predicates


def test_pod_ends_by_itself_and_frees_its_devices(machine: Machine) -> None:
    machine.bind("short", gpus=4, annotations={"tangram.test/seconds": "0.2"}, finish_after="1h")
    machine.cluster.wait_phase("short", "Succeeded")
    assert not machine.kubelet.containers()
    assert listed(machine.kubelet) == {}
    machine.bind("next", gpus=4)
    machine.cluster.wait_phase("next", "Running")


def test_deleted_pod_leaves_the_api_after_its_containers(machine: Machine) -> None:
    machine.bind("deleted")
    machine.cluster.wait_phase("deleted", "Running")
    machine.cluster.delete_pod("deleted")
    machine.cluster.wait_gone("deleted")
    assert not machine.kubelet.containers()
    assert kinds(machine.kubelet.events()) == ["started", "ended"]


@pytest.mark.parametrize("machine", [{"end_within_seconds": 5.0}], indirect=True)
def test_pod_deleted_by_force_is_forgotten_before_its_containers_end(machine: Machine) -> None:
    """Upstream's kubelet gives the devices of such a pod away at once (kubernetes issue 104824)."""
    machine.bind("forced")
    machine.cluster.wait_phase("forced", "Running")
    machine.cluster.delete_pod("forced", grace_seconds=0)
    machine.cluster.wait_for(lambda: not listed(machine.kubelet), "PodResources to forget the pod")
    machine.cluster.wait_for(lambda: not machine.kubelet.containers(), "its container to end")


def test_container_of_a_pod_that_went_while_the_kubelet_was_down_ends(machine: Machine) -> None:
    machine.bind("orphan")
    machine.cluster.wait_phase("orphan", "Running")
    machine.kubelet.kill()
    machine.cluster.delete_pod("orphan", grace_seconds=0)
    machine.cluster.wait_gone("orphan")
    assert len(machine.kubelet.containers()) == 1
    machine.kubelet.restart()
    machine.cluster.wait_for(lambda: not machine.kubelet.containers(), "the orphan to end")


def kinds(events: Iterable[ContainerEvent]) -> list[str]:
    """What happened, in order."""
    return [event.event for event in events]
