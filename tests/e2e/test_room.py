"""Room comes back, never too early and never late: case 13 (pods that go) and case 19 (pods that wait).

Each test has nodes of its own choosing through a node selector; all share one Stack, emptied between them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from app.simulate import report_of
from solver.samples import gpu_uuid, parse_samples, sample_node
from tests.e2e.checker import Checker, is_refused, read_annotation, refusal_of
from tests.e2e.nodes import STOP_AFTER, KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, MIG, PLACEMENT, Knobs, Service, Stack
from tests.fake_nvml.describe import NodeDescription

pytestmark = pytest.mark.e2e

L4, A30, H100 = "4xl4-0", "2xa30-mig-0", "8xh100-0"
KNOBS = Knobs(lease_seconds=4.0, orphan_seconds=3.0)
SOON = 15.0
"""Seconds within which room must be used. kube-scheduler waits up to 10 s itself before it tries a pod again."""

QUICK = 3.0
"""Seconds for which nothing may happen, where something would be wrong."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    with Stack(parse_samples("4xL4:1,2xA30-mig:1,8xH100:1"), gateways=True, knobs=KNOBS) as stack:
        for name, value in (("low", 1), ("high", 1000)):
            priority = {"metadata": {"name": name}, "value": value}
            stack.cluster.request("POST", "/apis/scheduling.k8s.io/v1/priorityclasses", priority)
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Iterator[Stack]:
    """The shared Stack with no pods; at every moment of the test no device is given twice."""
    shared.empty()
    shared.wait_reported()
    with Checker(shared.cluster, map(report_of, shared.nodes)).following():
        yield shared


def pod(name: str, node: str, asks: dict[str, int], *, grace: int = 0, **more: Any) -> KubernetesObject:
    """A pod for that node only."""
    made = gpu_pod(name, asks, node_selector={"kubernetes.io/hostname": node}, **more)
    made["spec"]["terminationGracePeriodSeconds"] = grace
    return made


def all_of(node: str) -> dict[str, int]:
    """An ask that nothing else fits beside: every GPU, or a slice that fills a board (there are two boards)."""
    return {L4: {GPU: 4}, H100: {GPU: 8}, A30: {MIG + "4g.24gb": 2}}[node]


def part_of(node: str) -> dict[str, int]:
    """A small ask."""
    return {MIG + "1g.6gb": 1} if node == A30 else {GPU: 1}


def fill_and_wait(stack: Stack, node: str, **first: Any) -> None:
    """`first` has the whole node and runs, `second` was refused."""
    stack.cluster.add_pods([pod("first", node, all_of(node), **first)])
    stack.cluster.wait_phase("first", "Running")
    stack.cluster.add_pods([pod("second", node, part_of(node))])
    stack.cluster.wait_pod("second", is_refused)


def assert_still_waiting(stack: Stack, name: str, seconds: float = QUICK) -> None:
    """For so long the pod gets neither a node nor a placement."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        seen = stack.cluster.pod(name)
        assert "nodeName" not in seen["spec"], f"{name} was bound too early"
        assert read_annotation(seen) is None, f"{name} was given devices too early"
        time.sleep(0.1)


@contextmanager
def within(seconds: float, *, not_before: float = 0.0) -> Iterator[None]:
    """The block takes at most so long, and at least as long as that."""
    started = time.monotonic()
    yield
    took = time.monotonic() - started
    assert not_before <= took <= seconds, f"took {took:.1f} s, wanted {not_before} to {seconds} s"


# ------------------------------------------------------------------------------------------------ pods that go


@pytest.mark.parametrize("node", [L4, A30])
def test_case_13_and_19_deleted_pod_makes_room_that_is_used_within_seconds(stack: Stack, node: str) -> None:
    """Whole GPUs are short in-tree, slices only for us: the first wakes by itself, the second we must wake."""
    fill_and_wait(stack, node)

    stack.cluster.delete_pod("first")

    with within(SOON):
        stack.cluster.wait_scheduled("second", timeout=SOON)


@pytest.mark.parametrize("node", [L4, A30])
def test_case_13_finished_pod_makes_room(stack: Stack, node: str) -> None:
    fill_and_wait(stack, node, finish_after="4s")

    stack.cluster.wait_phase("first", "Succeeded")

    with within(SOON):
        stack.cluster.wait_scheduled("second", timeout=SOON)


@pytest.mark.parametrize("node", [L4, A30])
def test_case_13_terminating_pod_keeps_its_devices_until_it_has_gone(stack: Stack, node: str) -> None:
    fill_and_wait(stack, node, grace=6, annotations={STOP_AFTER: "4s"})

    stack.cluster.delete_pod("first")
    assert_still_waiting(stack, "second")
    stack.cluster.wait_gone("first")

    with within(SOON):
        stack.cluster.wait_scheduled("second", timeout=SOON)


@pytest.mark.parametrize("node", [L4, A30])
def test_case_13_forced_deletion_frees_no_device_before_the_grace_time_is_over(stack: Stack, node: str) -> None:
    """The API server forgets the pod at once; its containers may still run for their grace time."""
    fill_and_wait(stack, node, grace=5, annotations={STOP_AFTER: "60s"})

    with within(5 + SOON, not_before=5.0):
        stack.cluster.delete_pod("first", grace_seconds=0)
        stack.cluster.wait_gone("first")
        stack.cluster.wait_scheduled("second", timeout=5 + SOON)


def test_case_13_forced_deletion_frees_no_device_before_a_fresh_report(stack: Stack) -> None:
    """Nobody has looked at the node since: its agent is silent (and not yet stale)."""
    fill_and_wait(stack, A30, grace=1, annotations={STOP_AFTER: "60s"})
    stack.agents.freeze(A30)

    stack.cluster.delete_pod("first", grace_seconds=0)
    assert_still_waiting(stack, "second")
    stack.agents.thaw(A30)

    stack.cluster.wait_scheduled("second", timeout=SOON)


def test_case_13_forced_deletion_frees_no_device_that_still_has_a_process_of_the_pod(stack: Stack) -> None:
    fill_and_wait(stack, L4, grace=1, annotations={STOP_AFTER: "60s"})
    uid = stack.cluster.pod("first")["metadata"]["uid"]
    with new_report(stack):
        stack.agents.use(L4, gpu_uuid(L4, 2), [uid])

    stack.cluster.delete_pod("first", grace_seconds=0)
    assert_still_waiting(stack, "second", 1 + QUICK)
    assert (stack.service.pod(uid) or {})["phase"] == "leaving"
    stack.agents.use(L4, gpu_uuid(L4, 2), [])

    stack.cluster.wait_scheduled("second", timeout=SOON)


@contextmanager
def new_report(stack: Stack) -> Iterator[None]:
    """What the block changes on a node has been reported when this returns."""
    name = 'tangram_reports_total{kind="full"}'
    before = stack.service.metric(name)
    yield
    stack.wait_for(lambda: stack.service.metric(name) > before, "a new report", 10)


def test_pod_deleted_before_it_was_bound_leaves_nothing(stack: Stack) -> None:
    stack.cluster.kill_scheduler()
    stack.cluster.add_pods([pod("first", L4, all_of(L4))])
    stack.cluster.delete_pod("first")
    stack.cluster.add_pods([pod("second", L4, all_of(L4))])
    stack.cluster.restart()

    stack.cluster.wait_scheduled("second", timeout=SOON)


# ------------------------------------------------------------------------------------------- nodes and agents


def test_node_that_has_gone_is_not_offered_and_comes_back_with_what_is_held_there(stack: Stack) -> None:
    fill_and_wait(stack, A30)
    seen = stack.cluster.get(f"/api/v1/nodes/{A30}")

    stack.cluster.request("DELETE", f"/api/v1/nodes/{A30}")
    stack.wait_for(lambda: not stack.service.node(A30)["offered"], "the node to be withdrawn", 10)
    assert "API server" in stack.service.node(A30)["reason"]
    assert (stack.service.pod(stack.cluster.pod("first")["metadata"]["uid"]) or {})["phase"] == "held"

    for field in ("resourceVersion", "uid", "creationTimestamp", "managedFields"):
        seen["metadata"].pop(field, None)
    stack.cluster.add_nodes([seen])
    stack.wait_for(lambda: stack.service.node(A30)["offered"], "the node to be offered again", 10)
    assert_still_waiting(stack, "second")

    stack.cluster.delete_pod("first")
    stack.cluster.wait_scheduled("second", timeout=SOON)


def test_case_19_silent_agent_takes_its_node_away_and_room_is_used_within_seconds_when_it_is_back(
    stack: Stack,
) -> None:
    stack.agents.freeze(L4)
    stack.wait_for(lambda: not stack.service.node(L4)["offered"], "the node to be stale", 15)
    stack.cluster.add_pods([pod("waiting", L4, {GPU: 1})])
    refused = stack.cluster.wait_pod("waiting", is_refused)
    assert "silent" in refusal_of(refused)
    assert_still_waiting(stack, "waiting")

    stack.agents.thaw(L4)

    with within(SOON):
        stack.cluster.wait_scheduled("waiting", timeout=SOON)


def test_silence_frees_nothing(stack: Stack) -> None:
    """A pod's devices stay its own while nobody reports them."""
    fill_and_wait(stack, A30)
    stack.agents.freeze(A30)
    stack.wait_for(lambda: not stack.service.node(A30)["offered"], "the node to be stale", 15)
    stack.agents.thaw(A30)
    stack.wait_for(lambda: stack.service.node(A30)["offered"], "the node to be back", 15)

    assert_still_waiting(stack, "second")


def test_case_19_lost_gpu_is_not_offered_and_is_used_within_seconds_when_it_is_back(stack: Stack) -> None:
    agents = stack.real_agents
    agents.change(L4, _lost(1, True))
    stack.wait_for(lambda: stack.service.node(L4)["gpus"][1]["phase"] == "withheld", "the lost GPU to be withheld", 10)
    stack.cluster.add_pods([pod("waiting", L4, {GPU: 4})])
    assert "unhealthy" in refusal_of(stack.cluster.wait_pod("waiting", is_refused))

    agents.change(L4, _lost(1, False))

    with within(SOON):
        stack.cluster.wait_scheduled("waiting", timeout=SOON)


def _lost(index: int, lost: bool) -> Any:
    def change(description: NodeDescription) -> NodeDescription:
        return description.with_gpu(index, lost=lost)

    return change


# --------------------------------------------------------------------------------------------- the API server


def test_case_13_deletion_in_a_watch_gap_is_seen(stack: Stack) -> None:
    """The connection to the API server is cut, the pod goes meanwhile, and the event is never sent again."""
    fill_and_wait(stack, A30)

    stack.api_gateway.cut()
    stack.cluster.delete_pod("first")
    stack.cluster.wait_gone("first")
    stack.cluster.add_pods([pod("third", L4, {GPU: 1})])
    stack.api_gateway.mend()

    with within(2 * SOON):
        stack.cluster.wait_scheduled("second", timeout=SOON)
        stack.cluster.wait_scheduled("third", timeout=SOON)


def test_restarted_api_server_changes_nothing(stack: Stack) -> None:
    fill_and_wait(stack, A30)

    stack.cluster.restart("kube-apiserver")
    stack.wait_for(lambda: stack.service.readiness()["ready"], "the service to be ready again", 30)
    assert_still_waiting(stack, "second")
    stack.cluster.delete_pod("first")

    stack.cluster.wait_scheduled("second", timeout=2 * SOON)


# -------------------------------------------------------------------------------------- placements half made


def test_case_05_half_made_bind_is_finished_after_a_restart_with_the_same_devices(stack: Stack) -> None:
    """The service died between the two calls of a bind; kube-scheduler asks again."""
    stack.cluster.kill_scheduler()
    stack.service.kill()
    stack.cluster.add_pods([pod("half", H100, {GPU: 2}), pod("second", H100, {GPU: 6})])
    half = stack.cluster.pod("half")
    chosen = [gpu_uuid(H100, index) for index in (3, 6)]  # not what anybody would choose
    write_placement(stack, half, H100, chosen)

    stack.service.restart()
    assert (stack.service.pod(half["metadata"]["uid"]) or {})["phase"] == "assumed"
    stack.cluster.restart()

    stack.cluster.wait_scheduled("half", timeout=SOON)
    stack.cluster.wait_scheduled("second", timeout=SOON)
    assert len((stack.placement("half") or {})["devices"]) == 2
    assert len((stack.placement("second") or {})["devices"]) == 6


def test_case_05_orphaned_placement_is_removed_and_a_late_binding_then_fails(stack: Stack) -> None:
    """Nobody asks for that pod again (no kube-scheduler has it), so time ends it; but not time alone."""
    stack.service.kill()
    stack.cluster.add_pods([pod("half", L4, all_of(L4), scheduler_name="nobody")])
    half = stack.cluster.pod("half")
    annotated = write_placement(stack, half, L4, [gpu_uuid(L4, index) for index in range(4)])
    stack.service.restart()
    assert (stack.service.pod(half["metadata"]["uid"]) or {})["phase"] == "assumed"
    stack.cluster.add_pods([pod("second", L4, part_of(L4))])
    stack.cluster.wait_pod("second", is_refused)

    stack.cluster.wait_scheduled("second", timeout=SOON)

    assert read_annotation(stack.cluster.pod("half")) is None
    preconditions = {"uid": half["metadata"]["uid"], "resourceVersion": annotated["metadata"]["resourceVersion"]}
    binding = {"metadata": {"name": "half", **preconditions}, "target": {"kind": "Node", "name": L4}}
    late = as_service(stack, "POST", "/api/v1/namespaces/default/pods/half/binding", binding)
    assert late.status_code == httpx.codes.CONFLICT, late.text


def write_placement(stack: Stack, made: KubernetesObject, node: str, gpus: list[str]) -> KubernetesObject:
    """Do the first half of a bind, as the service does it; the pod afterwards."""
    meta = made["metadata"]
    text = json.dumps({"v": 1, "uid": meta["uid"], "node": node, "devices": sorted(gpus)})
    path = f"/api/v1/namespaces/default/pods/{meta['name']}"
    reply = as_service(stack, "PATCH", path, {"metadata": {"annotations": {PLACEMENT: text}}})
    reply.raise_for_status()
    found: KubernetesObject = reply.json()
    return found


def as_service(stack: Stack, method: str, path: str, body: Any) -> httpx.Response:
    """One call to the API server with the service's own token, as a process of it would make it."""
    token = stack.cluster.service_account_token(stack.account, namespace=stack.namespace)
    headers = {"Authorization": f"Bearer {token}"}
    if method == "PATCH":
        headers["Content-Type"] = "application/merge-patch+json"
    with httpx.Client(verify=False, headers=headers, trust_env=False) as client:
        return client.request(method, stack.cluster.api_url + path, json=body)


# ------------------------------------------------------------------------------------------------- one at a time


def test_case_05_second_service_refuses_until_the_first_is_dead_and_its_lease_is_over(stack: Stack) -> None:
    """And the first, when it comes back from the dead, refuses in its turn."""
    first = stack.service
    standby = stack.add_service("standby")
    try:
        stack.wait_for(lambda: "Lease" in " ".join(standby.readiness()["waiting_for"]), "the standby to wait", 30)
        stack.cluster.add_pods([pod("held", L4, all_of(L4))])
        stack.cluster.wait_scheduled("held")
        assert_refuses(stack, standby)

        first.freeze()
        with within(30, not_before=0.8 * KNOBS.lease_seconds - 0.8):  # it was renewed up to a fifth of it before
            standby.wait_ready()
        first.thaw()
        assert_refuses(stack, first)
        stack.turn_to(standby)
        stack.wait_for(lambda: standby.node(L4)["offered"], "the standby to have heard of the node", 15)
        assert (standby.pod(stack.cluster.pod("held")["metadata"]["uid"]) or {})["phase"] == "held"
        stack.cluster.add_pods([pod("after", L4, {GPU: 1}), pod("other", H100, {GPU: 1})])
        stack.cluster.wait_scheduled("other", timeout=SOON)
        assert "nodeName" not in stack.cluster.pod("after")["spec"]
    finally:
        standby.kill()
        stack.services.pop("standby")
        stack.turn_to(first)
        first.wait_ready()


def assert_refuses(stack: Stack, service: Service) -> None:
    """It binds nothing and offers nothing, and says why."""
    stack.cluster.add_pods([pod("tried", H100, {GPU: 1}, scheduler_name="nobody")])
    tried = stack.cluster.pod("tried")
    uid = tried["metadata"]["uid"]
    bind = {"PodName": "tried", "PodNamespace": "default", "PodUID": uid, "Node": H100}
    assert "Lease" in service.verb("bind", bind)["Error"]
    assert "Lease" in service.verb("filter", {"Pod": tried, "Nodes": None, "NodeNames": [H100]})["Error"]
    assert "nodeName" not in stack.cluster.pod("tried")["spec"]
    stack.cluster.delete_pod("tried")


# -------------------------------------------------------------------------------------------------- preemption


def test_eviction_makes_room_for_the_pod_that_caused_it(stack: Stack) -> None:
    stack.cluster.add_pods(pod(f"low-{number}", L4, {GPU: 1}, priority_class="low") for number in range(4))
    for number in range(4):
        stack.cluster.wait_phase(f"low-{number}", "Running")

    stack.cluster.add_pods([pod("urgent", L4, {GPU: 2}, priority_class="high")])

    with within(2 * SOON):
        stack.cluster.wait_scheduled("urgent", timeout=2 * SOON)
    assert sum(each["metadata"]["name"].startswith("low") for each in stack.cluster.pods()) == 2


def test_nobody_is_evicted_where_that_would_not_make_room(stack: Stack) -> None:
    """In-tree three evictions would make four GPUs free; we know that the fourth is lost."""
    agents = stack.real_agents
    agents.change(L4, _lost(3, True))
    try:
        stack.wait_for(
            lambda: stack.service.node(L4)["gpus"][3]["phase"] == "withheld", "the lost GPU to be withheld", 10
        )
        stack.cluster.add_pods(pod(f"low-{number}", L4, {GPU: 1}, priority_class="low") for number in range(3))
        for number in range(3):
            stack.cluster.wait_phase(f"low-{number}", "Running")
        before = stack.service.metric('tangram_answers_total{kind="none",verb="preempt"}')

        stack.cluster.add_pods([pod("urgent", L4, {GPU: 4}, priority_class="high")])
        stack.cluster.wait_pod("urgent", is_refused)

        stack.wait_for(
            lambda: stack.service.metric('tangram_answers_total{kind="none",verb="preempt"}') > before,
            "kube-scheduler to ask about victims",
            SOON,
        )
        assert_still_waiting(stack, "urgent")
        lows = [each for each in stack.cluster.pods() if each["metadata"]["name"].startswith("low")]
        assert len(lows) == 3
        assert not any("deletionTimestamp" in each["metadata"] for each in lows)
    finally:
        agents.change(L4, _lost(3, False))


# ------------------------------------------------------------------------------------- those who were there before

STRANGERS = 50
STRANGE_NODES = 10


@pytest.fixture(scope="module")
def strange() -> Iterator[Stack]:
    """Fifty GPU pods bound by a plain kube-scheduler before Tangram was ever started."""
    nodes = [sample_node(f"strange-{number}", "8xH100") for number in range(STRANGE_NODES)]
    with Stack([*nodes, sample_node("clean", "8xH100")], form=None, service=False) as stack:
        cordon(stack, "clean", True)
        stack.cluster.start_scheduler(name="plain-scheduler")
        stack.cluster.add_pods(
            pod(f"strange-{number}", f"strange-{number % STRANGE_NODES}", {GPU: 1}) for number in range(STRANGERS)
        )
        for number in range(STRANGERS):
            stack.cluster.wait_phase(f"strange-{number}", "Running", timeout=60)
        stack.cluster.kill_scheduler("plain-scheduler")
        cordon(stack, "clean", False)
        stack.service.start()
        stack.service.wait_ready()
        stack.wait_reported()
        stack.start_scheduler("first")
        yield stack


def cordon(stack: Stack, node: str, closed: bool) -> None:
    """Close a node for new pods, or open it."""
    stack.cluster.request(
        "PATCH",
        f"/api/v1/nodes/{node}",
        {"spec": {"unschedulable": closed}},
        headers={"Content-Type": "application/merge-patch+json"},
    )


@pytest.mark.timeout(400)
def test_nothing_is_offered_that_pods_from_before_us_may_be_using_until_their_devices_are_seen(strange: Stack) -> None:
    """Fifty of them. Then NVML shows their processes on one node, then they go."""
    stack = strange
    node = "strange-0"
    there = {each["metadata"]["name"]: each for each in stack.cluster.pods()}
    guests = [each for each in there.values() if each["spec"]["nodeName"] == node]
    assert stack.service.totals()["pods_held"] == STRANGERS

    stack.cluster.add_pods([pod("new", node, {GPU: 1}), pod("elsewhere", "clean", {GPU: 8})])
    stack.cluster.wait_scheduled("elsewhere")
    refused = stack.cluster.wait_pod("new", is_refused)
    assert "did not place" in refusal_of(refused)
    assert_still_waiting(stack, "new")

    really = [gpu_uuid(node, 7 - position) for position in range(len(guests))]  # not the first ones: nobody promised
    for guest, gpu in zip(guests, really, strict=True):
        stack.agents.use(node, gpu, [guest["metadata"]["uid"]])
    with within(SOON):  # case 19: a device was explained, so the others are free
        stack.cluster.wait_scheduled("new", timeout=SOON)
    given = stack.placement("new")
    assert given is not None
    assert not set(given["devices"]) & set(really)
    Checker(stack.cluster, map(report_of, stack.nodes), strangers=there).check()

    rest = 8 - len(guests) - 1
    stack.cluster.add_pods([pod("more", node, {GPU: rest})])
    stack.cluster.wait_scheduled("more", timeout=SOON)
    stack.cluster.add_pods([pod("too-many", node, {GPU: 1})])
    assert not set((stack.placement("more") or {})["devices"]) & set(really)
    stack.cluster.wait_pod("too-many", is_refused)
    stack.cluster.delete_pod(guests[0]["metadata"]["name"])
    assert_still_waiting(stack, "too-many")  # its process is still there
    stack.agents.use(node, really[0], [])
    with within(SOON):
        stack.cluster.wait_scheduled("too-many", timeout=SOON)
    assert (stack.placement("too-many") or {})["devices"] == [really[0]]


def test_pods_from_before_us_make_room_when_they_are_deleted(strange: Stack) -> None:
    """Never explained: when the last of a node has gone, the whole node is offered."""
    stack = strange
    node = "strange-1"
    guests = [each["metadata"]["name"] for each in stack.cluster.pods() if each["spec"].get("nodeName") == node]
    stack.cluster.add_pods([pod("whole", node, {GPU: 8})])
    stack.cluster.wait_pod("whole", is_refused)

    for guest in guests:
        assert "nodeName" not in stack.cluster.pod("whole")["spec"]
        stack.cluster.delete_pod(guest)

    with within(SOON):
        stack.cluster.wait_scheduled("whole", timeout=SOON)
