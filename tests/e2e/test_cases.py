"""What went wrong for users of comparable systems, played on a real kube-scheduler.

The other cases: 1 in test_burst, 5 in test_kills and test_room, 13 and 19 in test_room, 16 in test_admission.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.certs import create_certificates
from app.simulate import report_of
from solver.samples import gpu_uuid, parse_samples
from tests.e2e.checker import Checker, is_refused, read_annotation, refusal_of
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, MIG, Stack
from tests.fake_nvml.describe import NodeDescription

pytestmark = pytest.mark.e2e

L4, OTHER_L4, SLICED = "4xl4-0", "4xl4-1", "8xa100-mig-0"
SOON = 20.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    with Stack(parse_samples("4xL4:2,8xA100-mig:1,8xH100:5"), gateways=True) as stack:
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Iterator[Stack]:
    """The shared Stack with no pods; at every moment of the test no device is given twice."""
    shared.empty()
    shared.wait_reported()
    with Checker(shared.cluster, map(report_of, shared.nodes)).following():
        yield shared


def on(node: str) -> dict[str, str]:
    """A node selector."""
    return {"kubernetes.io/hostname": node}


def test_case_02_devices_of_init_containers_count(stack: Stack) -> None:
    """Two in an init container and one afterwards are two; a sidecar's stay beside the others'."""
    pods = [gpu_pod("init", {GPU: 1}, node_selector=on(L4)), gpu_pod("sidecar", {GPU: 1}, node_selector=on(L4))]
    for pod, (count, policy) in zip(pods, ((2, None), (1, "Always")), strict=True):
        limits = {GPU: str(count)}
        first: KubernetesObject = {"name": "first", "image": "registry.test/first:1", "resources": {"limits": limits}}
        if policy:
            first["restartPolicy"] = policy
        pod["spec"]["initContainers"] = [first]
    stack.cluster.add_pods(pods)

    for pod in pods:
        stack.cluster.wait_scheduled(pod["metadata"]["name"])
        assert len((stack.placement(pod["metadata"]["name"]) or {})["devices"]) == 2


def test_case_03_device_that_left_the_inventory_stays_held_and_the_node_offers_less(stack: Stack) -> None:
    agents = stack.real_agents
    stack.cluster.add_pods([gpu_pod("first", {GPU: 2}, node_selector=on(L4))])
    stack.cluster.wait_scheduled("first")
    mine = (stack.placement("first") or {})["devices"]
    index = next(index for index in range(4) if gpu_uuid(L4, index) == mine[0])
    whole: list[NodeDescription] = []

    def without(description: NodeDescription) -> NodeDescription:
        whole.append(description)
        return replace(description, gpus=(*description.gpus[:index], *description.gpus[index + 1 :]))

    agents.change(L4, without)
    agents.restart(L4)  # a new agent has never seen that GPU
    try:
        stack.wait_for(lambda: len(stack.service.node(L4)["gpus"]) == 3, "the GPU to be missing", 10)
        uid = stack.cluster.pod("first")["metadata"]["uid"]
        assert (stack.service.pod(uid) or {})["devices"] == mine
        assert mine[0] in str(stack.service.node(L4)["not_in_inventory"])
        stack.cluster.add_pods([gpu_pod("second", {GPU: 2}, node_selector=on(L4))])
        stack.cluster.wait_scheduled("second", timeout=SOON)
        stack.cluster.delete_pod("second")
        stack.cluster.add_pods([gpu_pod("third", {GPU: 1}, node_selector=on(L4))])
        stack.cluster.wait_scheduled("third", timeout=SOON)
        assert not set((stack.placement("third") or {})["devices"]) & set(mine)
    finally:
        agents.change(L4, lambda _: whole[0])
        agents.restart(L4)
    stack.wait_for(lambda: len(stack.service.node(L4)["gpus"]) == 4, "the GPU to be back", 10)
    assert (stack.service.pod(uid) or {})["devices"] == mine


def test_case_04_node_that_refused_a_bind_is_read_again_and_nothing_is_lost(stack: Stack) -> None:
    """A policy of somebody else forbids bindings to that node; the API server says so with a 4xx."""
    group = "/apis/admissionregistration.k8s.io/v1"
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods/binding"]}
    policy = {
        "metadata": {"name": "closed"},
        "spec": {
            "matchConstraints": {"resourceRules": [rule]},
            "validations": [{"expression": f"object.target.name != '{L4}'", "message": "closed for today"}],
        },
    }
    spec = {"policyName": "closed", "validationActions": ["Deny"]}
    stack.cluster.request("POST", f"{group}/validatingadmissionpolicies", policy)
    binding = {"metadata": {"name": "closed"}, "spec": spec}
    stack.cluster.request("POST", f"{group}/validatingadmissionpolicybindings", binding)
    try:
        stack.cluster.add_pods([gpu_pod("probe", scheduler_name="nobody")])
        stack.wait_for(lambda: _is_closed(stack), "the policy to be in force", 30)
        before = stack.service.metric('tangram_answers_total{kind="refused",verb="bind"}')
        stack.cluster.add_pods([gpu_pod("unlucky", {GPU: 4}, node_selector=on(L4))])
        said = stack.cluster.wait_pod("unlucky", lambda pod: "closed for today" in refusal_of(pod), timeout=SOON)

        assert stack.service.metric('tangram_answers_total{kind="refused",verb="bind"}') > before
        stack.wait_for(lambda: read_annotation(stack.cluster.pod("unlucky")) is None, "the undoing", SOON)
        stack.wait_for(lambda: stack.service.node(L4)["offered"], "the node to be read again and offered", SOON)
        assert "nodeName" not in said["spec"]
    finally:
        stack.cluster.request("DELETE", f"{group}/validatingadmissionpolicybindings/closed")
        stack.cluster.request("DELETE", f"{group}/validatingadmissionpolicies/closed")

    stack.cluster.wait_scheduled("unlucky", timeout=2 * SOON)


def _is_closed(stack: Stack) -> bool:
    target = {"kind": "Node", "name": L4}
    body = {"metadata": {"name": "probe"}, "target": target}
    try:
        stack.cluster.request("POST", "/api/v1/namespaces/default/pods/probe/binding?dryRun=All", body)
    except httpx.HTTPStatusError as refused:
        return "closed for today" in str(refused)
    return False


def test_case_06_many_pods_of_one_node_are_bound_at_the_same_time(stack: Stack) -> None:
    """No lock on a node: with an API server that takes 0.4 s for each call, one by one would take 22 s."""
    pods = [gpu_pod(f"slice-{number}", {MIG + "1g.10gb": 1}, node_selector=on(SLICED)) for number in range(28)]
    stack.api_gateway.delay_seconds = 0.4
    try:
        started = time.monotonic()
        stack.cluster.add_pods(pods)
        for pod in pods:
            stack.cluster.wait_scheduled(pod["metadata"]["name"])
        assert time.monotonic() - started < 10
    finally:
        stack.api_gateway.delay_seconds = 0.0


def test_case_09_names_only_are_asked_for_and_whole_nodes_are_understood(stack: Stack) -> None:
    configuration = stack.scheduler_configuration("first")
    assert configuration["extenders"][0]["nodeCacheCapable"] is True
    stack.cluster.kill_scheduler()
    configuration["extenders"][0]["nodeCacheCapable"] = False
    configuration["profiles"] = [{"schedulerName": "whole-nodes"}]
    stack.cluster.start_scheduler(configuration, name="whole-nodes-scheduler")
    try:
        asks: tuple[dict[str, int], ...] = ({GPU: 8}, {MIG + "3g.40gb": 1}, {GPU: 1}, {GPU: 8}, {GPU: 16})
        pods = [gpu_pod(f"whole-{i}", ask, scheduler_name="whole-nodes") for i, ask in enumerate(asks)]
        stack.cluster.add_pods(pods)

        for pod in pods[:-1]:
            stack.cluster.wait_scheduled(pod["metadata"]["name"])
        stack.cluster.wait_pod("whole-4", is_refused)
    finally:
        stack.cluster.kill_scheduler("whole-nodes-scheduler")
        stack.cluster.restart()


def test_case_10_work_grows_with_changes_not_with_nodes_and_pods(stack: Stack) -> None:
    """Rebuilding every node at each call would be 8 nodes × 2 verbs × 30 pods."""
    name = 'tangram_rows_updated{state="total"}'
    before = stack.service.metric(name)
    pods = [gpu_pod(f"small-{number}", {GPU: 1}) for number in range(30)]
    stack.cluster.add_pods(pods)
    for pod in pods:
        stack.cluster.wait_scheduled(pod["metadata"]["name"])

    updated = stack.service.metric(name) - before

    assert 30 <= updated <= 4 * 30


def test_case_15_only_kube_scheduler_may_call_bind_and_only_for_a_pod_that_exists(stack: Stack, tmp_path: Path) -> None:
    service = stack.service
    stack.cluster.add_pods([gpu_pod("held", {GPU: 4}, node_selector=on(L4))])
    stack.cluster.add_pods([gpu_pod("wanted", {GPU: 1}, scheduler_name="nobody")])
    stack.cluster.wait_scheduled("held")
    held, wanted = stack.cluster.pod("held"), stack.cluster.pod("wanted")
    bind = {
        "PodName": "wanted",
        "PodNamespace": "default",
        "PodUID": wanted["metadata"]["uid"],
        "Node": OTHER_L4,
    }

    for verb in ("filter", "prioritize", "bind", "preempt"):
        with pytest.raises(httpx.TransportError):
            service.verb(verb, bind, certificate=False)
        assert httpx.post(f"{service.url}/{verb}", json=bind, trust_env=False).status_code in (404, 405)
    create_certificates(tmp_path / "strangers", ips=("127.0.0.1",))
    with pytest.raises(httpx.TransportError):
        service.verb("bind", bind, certificate=(tmp_path / "strangers/client.crt", tmp_path / "strangers/client.key"))
    deleted = httpx.delete(f"{service.url}/v1/pods/{held['metadata']['uid']}", trust_env=False)
    assert deleted.status_code in (404, 405)

    assert service.verb("bind", {**bind, "PodUID": "no-such-uid"})["Error"]
    assert service.verb("bind", {**bind, "PodName": "nobody"})["Error"]
    assert service.verb("bind", {**bind, "PodUID": held["metadata"]["uid"]})["Error"]
    assert service.verb("bind", {**bind, "Node": L4})["Error"], "what others hold is not given away"
    assert "nodeName" not in stack.cluster.pod("wanted")["spec"]
    assert (service.pod(held["metadata"]["uid"]) or {})["phase"] == "held"

    assert service.verb("bind", bind)["Error"] == ""
    assert stack.cluster.wait_scheduled("wanted") == OTHER_L4


@pytest.mark.parametrize("wanted", [L4, OTHER_L4])
def test_case_17_preference_of_the_pod_decides_among_equally_good_nodes(stack: Stack, wanted: str) -> None:
    """All that fit are returned, so kube-scheduler's own scores still count."""
    made: dict[str, Any] = gpu_pod("choosy", {GPU: 1})
    made["spec"]["affinity"] = {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [
                {
                    "weight": 1,
                    "preference": {
                        "matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [wanted]}]
                    },
                }
            ]
        }
    }
    names = [L4, OTHER_L4]
    asked = {"Pod": {**made, "metadata": {**made["metadata"], "uid": "asked"}}, "Nodes": None, "NodeNames": names}
    assert stack.service.verb("filter", asked)["NodeNames"] == names
    stack.cluster.add_pods([made])

    assert stack.cluster.wait_scheduled("choosy") == wanted
