"""The ground that other end-to-end tests stand on: is it a real cluster, what does kube-scheduler send?

`TANGRAM_RECORD=1` writes what was sent into tests/data/extender, for the unit tests and the demo's driver.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import Cluster, ControlPlane, ExistingCluster, open_cluster
from tests.e2e.fake_extender import Asked, FakeExtender
from tests.e2e.nodes import gpu_node, gpu_pod
from tests.e2e.toolchain import KUBERNETES_VERSION

pytestmark = pytest.mark.e2e

RECORDINGS = Path(__file__).parent.parent / "data" / "extender"
NODES = ("node-a", "node-b", "node-c")
GPU = "nvidia.com/gpu"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        cluster.add_nodes(gpu_node(name, allocatable={GPU: 8, "nvidia.com/mig-1g.10gb": 7}) for name in NODES)
        for name, value in (("low", 1), ("high", 1000)):
            priority_class = {"metadata": {"name": name}, "value": value}
            cluster.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", priority_class)
        yield cluster


@pytest.fixture
def empty(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with its three nodes, no pods and no kube-scheduler."""
    yield cluster
    for name in cluster.processes.names():
        if "scheduler" in name:
            cluster.kill_scheduler(name)
    cluster.delete_all_pods()


@pytest.fixture
def extender(empty: Cluster) -> Iterator[FakeExtender]:
    def bind(body: dict[str, Any]) -> None:
        path = f"/api/v1/namespaces/{body['PodNamespace']}/pods/{body['PodName']}/binding"
        metadata = {"name": body["PodName"], "uid": body["PodUID"]}
        target = {"apiVersion": "v1", "kind": "Node", "name": body["Node"]}
        empty.request(
            "POST",
            path,
            {"apiVersion": "v1", "kind": "Binding", "metadata": metadata, "target": target},
        )

    with FakeExtender(bind) as extender:
        yield extender
        for name in empty.processes.names():  # before its extender goes, or it would complain
            if "scheduler" in name:
                empty.kill_scheduler(name)


def test_api_server_is_the_kubernetes_release_we_say(cluster: Cluster) -> None:
    if isinstance(cluster, ControlPlane):
        assert cluster.get("/version")["gitVersion"] == KUBERNETES_VERSION
    assert "readyz check passed" in cluster.kubectl("get", "--raw", "/readyz?verbose")


def test_added_nodes_can_be_used_at_once(cluster: Cluster) -> None:
    for node in cluster.get("/api/v1/nodes")["items"]:
        assert node["spec"].get("taints", []) == []
        assert {"type": "Ready", "status": "True"}.items() <= node["status"]["conditions"][0].items()


def test_gpu_pod_is_scheduled_runs_and_finishes(empty: Cluster) -> None:
    empty.start_scheduler()
    empty.add_pods([gpu_pod("worker", {GPU: 8}, finish_after="1s")])

    assert empty.wait_scheduled("worker") in NODES
    assert empty.wait_phase("worker", "Running")["status"]["containerStatuses"][0]["ready"] is True
    assert empty.wait_phase("worker", "Succeeded")


def test_deleted_pod_goes_and_leaves_room(empty: Cluster) -> None:
    """The waiting pod fits only where the deleted one was."""
    empty.start_scheduler()
    empty.add_pods(gpu_pod(f"first-{name}", {GPU: 8}) for name in NODES)
    for name in NODES:
        empty.wait_phase(f"first-{name}", "Running")
    empty.add_pods([gpu_pod("waiting", {GPU: 8})])
    empty.wait_pod("waiting", lambda pod: "Insufficient nvidia.com/gpu" in json.dumps(pod["status"]))

    empty.delete_pod("first-node-b")

    empty.wait_gone("first-node-b")
    empty.wait_scheduled("waiting")


def test_killed_scheduler_continues_when_started_again(empty: Cluster) -> None:
    empty.start_scheduler()
    empty.add_pods([gpu_pod("before", {GPU: 1})])
    empty.wait_scheduled("before")

    empty.kill_scheduler()
    empty.add_pods([gpu_pod("meanwhile", {GPU: 1})])
    assert "nodeName" not in empty.pod("meanwhile")["spec"]
    empty.restart()

    empty.wait_scheduled("meanwhile")


def test_second_scheduler_takes_only_pods_that_name_it(empty: Cluster) -> None:
    profile = {"profiles": [{"schedulerName": "second"}]}
    empty.start_scheduler(profile, name="second-scheduler")
    empty.add_pods([gpu_pod("ours", {GPU: 1}, scheduler_name="second"), gpu_pod("other", {GPU: 1})])

    empty.wait_scheduled("ours")
    assert "nodeName" not in empty.pod("other")["spec"]


def test_deployments_and_jobs_work(empty: Cluster) -> None:
    empty.start_scheduler()
    empty.kubectl("create", "deployment", "web", "--image=registry.test/web:1", "--replicas=2")
    empty.kubectl("create", "job", "once", "--image=registry.test/once:1")

    empty.kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    empty.kubectl("wait", "--for=condition=complete", "job/once", "--timeout=30s")
    empty.kubectl("delete", "deployment/web", "job/once", "--wait=false")
    empty.wait_for(lambda: not empty.pods(), "the garbage collector to remove the pods", 30)


def test_service_account_may_do_only_what_it_was_given(cluster: Cluster) -> None:
    """RBAC is real here, so that the manifests' least rights can be tested."""
    kubeconfig = cluster.kubeconfig_for_service_account("default")

    whoami = cluster.kubectl(f"--kubeconfig={kubeconfig}", "auth", "whoami")
    with pytest.raises(RuntimeError, match="forbidden"):
        cluster.kubectl(f"--kubeconfig={kubeconfig}", "get", "pods")

    assert "system:serviceaccount:default:default" in whoami


def test_five_hundred_nodes_are_there_in_seconds(cluster: Cluster) -> None:
    names = [f"extra-{number}" for number in range(500)]
    started = time.monotonic()
    cluster.add_nodes(gpu_node(name, allocatable={GPU: 8}) for name in names)
    seconds = time.monotonic() - started
    others = f"kubernetes.io/hostname notin ({','.join(NODES)})"
    cluster.request("DELETE", "/api/v1/nodes", params={"labelSelector": others})

    print(f"500 nodes in {seconds:.1f} s")
    assert seconds < 20


def test_extender_is_asked_to_filter_then_prioritize_then_bind(empty: Cluster, extender: FakeExtender) -> None:
    empty.start_scheduler({"extenders": [extender.config()]})
    empty.add_pods([gpu_pod("worker", {GPU: 2})])
    node = empty.wait_scheduled("worker")

    assert extender.verbs_asked_about("worker") == ["filter", "prioritize", "bind"]
    assert sorted(extender.first("filter", "worker").node_names) == list(NODES)
    bind = extender.first("bind", "worker")
    assert (bind.json["Node"], bind.json["PodUID"]) == (node, empty.pod("worker")["metadata"]["uid"])
    for verb in ("filter", "prioritize", "bind"):
        compare_with_recording(verb, extender.first(verb, "worker"))


def test_extender_sees_mig_slices_asked_for(empty: Cluster, extender: FakeExtender) -> None:
    empty.start_scheduler({"extenders": [extender.config()]})
    empty.add_pods([gpu_pod("slices", {"nvidia.com/mig-1g.10gb": 2})])
    empty.wait_scheduled("slices")

    compare_with_recording("filter-mig", extender.first("filter", "slices"))


def test_extender_without_cache_gets_whole_nodes(empty: Cluster, extender: FakeExtender) -> None:
    empty.start_scheduler({"extenders": [extender.config(node_cache_capable=False)]})
    empty.add_pods([gpu_pod("worker", {GPU: 2})])
    empty.wait_scheduled("worker")

    asked = extender.first("filter", "worker")
    assert asked.json["NodeNames"] is None
    assert asked.json["Nodes"]["items"][0]["status"]["allocatable"][GPU] == "8"
    compare_with_recording("filter-nodes", asked)
    compare_with_recording("prioritize-nodes", extender.first("prioritize", "worker"))


def test_only_feasible_node_is_never_prioritized(empty: Cluster, extender: FakeExtender) -> None:
    """So filter has to propose when one node is left."""
    empty.start_scheduler({"extenders": [extender.config()]})
    empty.add_pods([gpu_pod("worker", {GPU: 2}, node_selector={"kubernetes.io/hostname": "node-b"})])

    assert empty.wait_scheduled("worker") == "node-b"
    assert extender.verbs_asked_about("worker") == ["filter", "bind"]
    compare_with_recording("filter-one-node", extender.first("filter", "worker"))


@pytest.mark.parametrize(("capable", "suffix"), [(True, ""), (False, "-nodes")], ids=["names", "nodes"])
def test_extender_is_asked_before_preemption(
    empty: Cluster, extender: FakeExtender, capable: bool, suffix: str
) -> None:
    """GPUs counted in-tree are short, so kube-scheduler finds victims and asks the extender about them.

    Afterwards the pod has a nominated node, and filter is asked about that node alone.
    """
    empty.start_scheduler({"extenders": [extender.config(node_cache_capable=capable)]})
    low = [gpu_pod(f"low-{name}", {GPU: 8}, priority_class="low") for name in NODES]
    empty.add_pods(low)
    for name in NODES:
        empty.wait_phase(f"low-{name}", "Running")

    empty.add_pods([gpu_pod("urgent", {GPU: 8}, priority_class="high")])
    node = empty.wait_scheduled("urgent")

    verbs = extender.verbs_asked_about("urgent")
    assert verbs[0] == "preempt"
    assert verbs[-1] == "bind"
    assert len(empty.pods()) == 3
    nominated = extender.last("filter", "urgent")
    assert nominated.json["Pod"]["status"]["nominatedNodeName"] == node
    assert nominated.node_names == [node]
    compare_with_recording(f"preempt{suffix}", extender.first("preempt", "urgent"))
    compare_with_recording(f"filter-nominated{suffix}", nominated)


def test_nominated_node_is_asked_alone_although_others_fit(empty: Cluster, extender: FakeExtender) -> None:
    """Somebody else may nominate (we do, to preempt devices); the other nodes are then not offered."""
    empty.add_pods([gpu_pod("worker", {GPU: 2})])
    status = {"status": {"nominatedNodeName": "node-c"}}
    empty.request(
        "PATCH",
        "/api/v1/namespaces/default/pods/worker/status",
        status,
        headers={"Content-Type": "application/merge-patch+json"},
    )
    empty.start_scheduler({"extenders": [extender.config()]})

    assert empty.wait_scheduled("worker") == "node-c"
    assert extender.first("filter", "worker").node_names == ["node-c"]
    assert extender.verbs_asked_about("worker") == ["filter", "bind"]


def test_failed_bind_is_tried_again(empty: Cluster, extender: FakeExtender) -> None:
    do_bind = extender.bind
    refused: list[dict[str, Any]] = []

    def refuse_once(body: dict[str, Any]) -> None:
        if not refused:
            refused.append(body)
            raise RuntimeError("not this time")
        do_bind(body)

    extender.bind = refuse_once
    empty.start_scheduler({"extenders": [extender.config()]})
    empty.add_pods([gpu_pod("worker", {GPU: 2})])
    empty.wait_scheduled("worker")

    assert extender.verbs_asked_about("worker") == ["filter", "prioritize", "bind"] * 2


def test_cluster_that_is_there_can_be_used_through_its_kubeconfig(empty: Cluster) -> None:
    """What TANGRAM_CLUSTER=kubeconfig does, here on our own control plane as if it were somebody's."""
    with ExistingCluster(empty.kubeconfig) as there:
        there.start_scheduler()
        there.add_nodes([gpu_node("node-d", allocatable={GPU: 8})])
        there.add_pods([gpu_pod("worker", {GPU: 1}, node_selector={"kubernetes.io/hostname": "node-d"})])

        there.wait_scheduled("worker")
        kubeconfig = there.kubeconfig_for_service_account("default")
        assert "default:default" in there.kubectl(f"--kubeconfig={kubeconfig}", "auth", "whoami")
        there.request("DELETE", "/api/v1/nodes/node-d")


def test_policy_on_an_annotation_is_enforced(empty: Cluster) -> None:
    """ValidatingAdmissionPolicy needs no switch in this release."""
    group = "/apis/admissionregistration.k8s.io/v1"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    policy = {
        "metadata": {"name": "no-forbidden"},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": "!('forbidden' in object.metadata.?annotations.orValue({}))"}],
        },
    }
    binding = {
        "metadata": {"name": "no-forbidden"},
        "spec": {"policyName": "no-forbidden", "validationActions": ["Deny"]},
    }
    empty.request("POST", f"{group}/validatingadmissionpolicies", policy)
    empty.request("POST", f"{group}/validatingadmissionpolicybindings", binding)
    pod = gpu_pod("refused", annotations={"forbidden": "yes"})

    def is_refused() -> bool:
        try:
            empty.request("POST", "/api/v1/namespaces/default/pods", pod, params={"dryRun": "All"})
        except httpx.HTTPStatusError as error:
            return "no-forbidden" in str(error)
        return False

    empty.wait_for(is_refused, "the policy to take effect", 30)
    empty.add_pods([gpu_pod("allowed")])


def test_restarted_api_server_keeps_what_it_had(empty: Cluster) -> None:
    """Killing it drops every watch: the way to test that ours are healed."""
    if not isinstance(empty, ControlPlane):
        pytest.skip("somebody else's API server is not killed")
    empty.add_pods([gpu_pod("worker", {GPU: 1})])
    uid = empty.pod("worker")["metadata"]["uid"]

    empty.restart("kube-apiserver")

    assert empty.pod("worker")["metadata"]["uid"] == uid
    empty.start_scheduler()
    empty.wait_scheduled("worker")


def test_everything_ends_when_its_starter_is_killed() -> None:
    """A SIGKILLed pytest runs no clean-up, and must leave no etcd behind."""
    script = (
        "import time\n"
        "from tests.e2e.cluster import ControlPlane\n"
        "with ControlPlane() as cluster:\n"
        "    cluster.start_scheduler()\n"
        "    cluster.processes.start('sleeper', ['sleep', '1000'])\n"
        "    print(cluster.directory, *map(cluster.processes.pid, cluster.processes.names()), flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        directory, *pids = starter.stdout.readline().split()
        starter.send_signal(signal.SIGKILL)
    assert len(pids) == 6

    deadline = time.monotonic() + 10
    while alive := [pid for pid in pids if is_alive(int(pid))]:
        assert time.monotonic() < deadline, f"still alive: {alive}"
        time.sleep(0.05)
    shutil.rmtree(directory)  # a killed process cannot


def test_stopping_leaves_nothing() -> None:
    with ControlPlane() as cluster:
        pids = [cluster.processes.pid(name) for name in cluster.processes.names()]
        directory = cluster.directory
    assert not directory.exists()
    assert not [pid for pid in pids if is_alive(pid)]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits for its parent to take note does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def compare_with_recording(name: str, asked: Asked) -> None:
    """The request has the shape of the recorded one, so that stays true; or becomes the recording."""
    body_file, headers_file = RECORDINGS / f"{name}.json", RECORDINGS / f"{name}.headers.json"
    if os.environ.get("TANGRAM_RECORD"):
        RECORDINGS.mkdir(parents=True, exist_ok=True)
        body_file.write_bytes(asked.body)
        head = {"method": "POST", "path": asked.path, "headers": asked.headers}
        headers_file.write_text(json.dumps(head, indent=1) + "\n")
    recorded_names = [key for key, _ in json.loads(headers_file.read_text())["headers"]]

    assert shape(asked.json) == shape(json.loads(body_file.read_bytes()))
    assert [key for key, _ in asked.headers] == recorded_names


def shape(body: dict[str, Any]) -> dict[str, Any]:
    """The members of a request, and those of its pod: what a parser depends on."""
    members: dict[str, Any] = {key: type(value).__name__ for key, value in body.items()}
    if "Pod" in body:
        members["Pod"] = {part: sorted(body["Pod"][part]) for part in ("metadata", "spec", "status")}
    return members
