"""What happens to boards, end to end: reboots, refusals, agents that hang or may not change anything, MIG modes.

Real kube-scheduler and API server, real agents on the fake NVML; each test has a node of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from solver.samples import parse_samples
from tests.e2e.checker import is_refused, refusal_of, uuids_of
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import MIG, Knobs, Stack
from tests.fake_nvml.control import Control
from tests.fake_nvml.state import read_state

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

A30, A100, H100 = "2xa30-mig-0", "4xa100pcie-mig1-0", "4xh100-0"
HALF, WHOLE = MIG + "3g.40gb", MIG + "7g.80gb"
SOON = 30.0
"""Seconds within which room must be used; kube-scheduler waits up to 10 s itself before it tries a pod again."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Stack]:
    knobs = Knobs(flags=("--mig-modes",), options={"slice-seconds": "3", "order-retry-seconds": "8"})
    with Stack(parse_samples("2xA30-mig:1,4xA100PCIe-mig1:1,4xH100:1"), knobs=knobs) as stack:
        stack.cluster.request(
            "PATCH",
            f"/api/v1/nodes/{H100}/status",
            {"status": {"allocatable": {HALF: "8"}, "capacity": {HALF: "8"}}},
            headers={"Content-Type": "application/merge-patch+json"},
        )
        yield stack


@pytest.fixture
def stack(shared: Stack) -> Iterator[Stack]:
    yield shared
    for node in shared.nodes:
        control_of(shared, node.name).clear()
    shared.empty()
    shared.wait_reported()


def control_of(stack: Stack, node: str) -> Control:
    return Control(stack.real_agents.fleet.description(node))


def run(stack: Stack, name: str, node: str, asks: dict[str, int]) -> None:
    pod = gpu_pod(name, asks, node_selector={"kubernetes.io/hostname": node})
    pod["spec"]["terminationGracePeriodSeconds"] = 0
    stack.cluster.add_pods([pod])


def bound(stack: Stack, name: str, seconds: float = SOON) -> KubernetesObject:
    """The pod once it is bound."""

    def look() -> KubernetesObject | None:
        pod = stack.cluster.pod(name)
        return pod if pod["spec"].get("nodeName") else None

    return stack.wait_for(look, f"{name} to be bound", seconds)


def refused(stack: Stack, name: str) -> str:
    """kube-scheduler's words for a pod that it cannot place."""

    def look() -> str | None:
        pod = stack.cluster.pod(name)
        return refusal_of(pod) if is_refused(pod) and refusal_of(pod) else None

    return stack.wait_for(look, f"{name} to be refused", SOON)


def on_board(stack: Stack, node: str) -> dict[str, str]:
    """MIG UUIDs on the node by device, as placements write it."""
    state = read_state(stack.real_agents.fleet.description(node))
    return {
        f"{uuid}/{instance.profile}@{instance.start}": instance.uuid or ""
        for uuid, gpu in state.gpus.items()
        for instance in gpu.instances
    }


def test_after_a_reboot_slices_are_made_again_and_pods_carry_their_new_uuids(stack: Stack) -> None:
    """Instances never survive a reboot; the place is what the pod was given, the UUID only a name of it."""
    for number in range(2):
        run(stack, f"p{number}", A100, {HALF: 1})
    before = {f"p{number}": uuids_of(bound(stack, f"p{number}")) for number in range(2)}

    stack.real_agents.fleet.stop(A100)
    control_of(stack, A100).reboot()
    stack.real_agents.fleet.start(A100)

    def named_anew() -> bool:
        now = {name: uuids_of(stack.cluster.pod(name)) for name in before}
        there = on_board(stack, A100)
        return all(
            now[name].keys() == uuids.keys()
            and all(there.get(device) == now[name][device] != uuids[device] for device in uuids)
            for name, uuids in before.items()
        )

    stack.wait_for(named_anew, "the slices to be there again, and named on the pods", SOON)


def test_a_slice_that_nvml_refuses_is_said_in_words_and_tried_again_after_a_while(stack: Stack) -> None:
    """Case 8: nos #21, #25."""
    gpus = [gpu.uuid for node in stack.nodes if node.name == A30 for gpu in node.gpus]
    control = control_of(stack, A30)
    for gpu in gpus:
        control.refuse_make(gpu, "4g.24gb", 0)
    run(stack, "p", A30, {MIG + "4g.24gb": 1})
    assert "could not be made" in refused(stack, "p")
    assert on_board(stack, A30) == {}, "nothing is left half made"

    control.clear("refuse")
    bound(stack, "p")


def test_an_agent_that_hangs_while_it_makes_a_slice_costs_one_bind_and_no_promise(stack: Stack) -> None:
    """Withdrawn after `slice_seconds`; the board is kept back until a living agent has confirmed it."""
    control = control_of(stack, A100)
    control.hang("nvmlDeviceCreateGpuInstanceWithPlacement", times=1)
    run(stack, "p", A100, {WHOLE: 1})
    stack.wait_for(
        lambda: "confirmed" in str(stack.service.node(A100)["gpus"]) or not stack.service.node(A100)["offered"],
        "the board to be kept back",
        SOON,
    )
    assert not stack.cluster.pod("p")["spec"].get("nodeName")
    stack.real_agents.fleet.stop(A100)
    control.clear("hang")
    stack.real_agents.fleet.start(A100)

    device, uuid = next(iter(uuids_of(bound(stack, "p")).items()))
    assert on_board(stack, A100)[device] == uuid


def test_an_agent_killed_between_the_two_calls_leaves_nothing_that_stays(stack: Stack) -> None:
    """A GPU instance without compute instance shows in no list of MIG devices; it is completed or removed."""
    control = control_of(stack, A100)
    control.die("nvmlDeviceCreateGpuInstanceWithPlacement", times=1)
    run(stack, "p", A100, {HALF: 1})
    stack.wait_for(lambda: "" in on_board(stack, A100).values(), "an instance without a device", SOON)
    stack.real_agents.fleet.start(A100)

    device, uuid = next(iter(uuids_of(bound(stack, "p")).items()))
    assert on_board(stack, A100) == {device: uuid}


def test_an_agent_that_may_not_change_boards_offers_what_is_there(stack: Stack) -> None:
    run(stack, "first", A100, {HALF: 1})
    bound(stack, "first")
    stack.cluster.delete_pod("first", grace_seconds=0)
    stack.wait_for(lambda: not stack.service.get("/v1/pods")["pods"], "the slice to be idle", SOON)
    there = on_board(stack, A100)
    control_of(stack, A100).privileged(False)
    run(stack, "second", A100, {WHOLE: 1})

    assert refused(stack, "second")
    assert on_board(stack, A100) == there
    assert "cannot change" in stack.service.node(A100)["slices"]

    stack.real_agents.fleet.stop(A100)
    control_of(stack, A100).clear("privileged")
    stack.real_agents.fleet.start(A100)
    bound(stack, "second")


def test_nodes_of_the_mig_manager_are_left_alone(stack: Stack) -> None:
    labels = ("nvidia.com/mig.config=all-1g.6gb", "nvidia.com/mig.config.state=success")
    stack.cluster.kubectl("label", "node", A30, *labels)
    before = on_board(stack, A30)
    run(stack, "p", A30, {MIG + "1g.6gb": 1})

    assert refused(stack, "p")
    assert "MIG manager" in stack.service.node(A30)["slices"]
    assert on_board(stack, A30) == before

    stack.cluster.kubectl("label", "node", A30, "nvidia.com/mig.config-", "nvidia.com/mig.config.state-")
    bound(stack, "p")


def test_an_idle_gpu_is_put_into_mig_mode_for_a_pod_that_waits_and_again_after_a_reboot(stack: Stack) -> None:
    """Hopper switches without a reset, and forgets the mode with a reboot."""
    run(stack, "p", H100, {HALF: 1})
    before = uuids_of(bound(stack, "p"))
    assert [gpu["mig"] for gpu in stack.service.node(H100)["gpus"]].count(True) == 1

    stack.real_agents.fleet.stop(H100)
    control_of(stack, H100).reboot()
    stack.real_agents.fleet.start(H100)

    stack.wait_for(
        lambda: (now := uuids_of(stack.cluster.pod("p"))) != before and now == on_board(stack, H100),
        "the mode and the slice to be there again",
        90.0,
    )
