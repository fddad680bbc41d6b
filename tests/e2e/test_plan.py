"""The joint plan in front of a real kube-scheduler: it steers, and it refuses nobody.

Two nodes of eight GPUs, and pods for 4, 3, 5 and 4 of them. One by one, each to the node that it fills best, they end
with 4 + 3 on one node and 5 on the other, and the last has no place. Planned together all four have one.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.simulate import report_of
from solver.samples import parse_samples
from tests.e2e.checker import Checker
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, Knobs, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SIZES = (4, 3, 5, 4)


@pytest.fixture
def stack() -> Iterator[Stack]:
    """No kube-scheduler yet: the plan is there before the first pod is looked at."""
    options = {"plan-interval-seconds": "0.1"}
    with Stack(parse_samples("8xH100:2"), form=None, knobs=Knobs(options=options)) as stack:
        yield stack


def pods() -> list[KubernetesObject]:
    return [gpu_pod(f"p{number}-{size}", {GPU: size}) for number, size in enumerate(SIZES)]


def test_a_burst_follows_its_plan_and_all_have_a_place_that_one_by_one_would_not(stack: Stack) -> None:
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    with checker.following():
        stack.cluster.add_pods(pods())
        plan = stack.wait_for(lambda: _plan_of(stack, len(SIZES)), "a plan for every pod", 60)
        assert (plan["status"], plan["planned"], plan["unplaced"]) == ("optimal", 4, 0)
        assert plan["gap"] == 0
        stack.start_scheduler("first")
        stack.wait_for(lambda: _bound(stack) == len(SIZES), "every pod to be bound", 60)
    on = Counter[str]()
    for pod in checker.check():
        on[pod["spec"]["nodeName"]] += int(pod["spec"]["containers"][0]["resources"]["limits"][GPU])
    assert sorted(on.values()) == [8, 8]
    assert stack.service.get("/v1/plan")["binds"]["aside"] == 0


def test_without_its_planning_process_pods_are_placed_as_ever_and_it_comes_back(stack: Stack) -> None:
    (child,) = _planning_processes(stack)
    os.kill(child, signal.SIGKILL)
    stack.cluster.add_pods(pods())
    stack.start_scheduler("first")
    stack.wait_for(lambda: _bound(stack) >= len(SIZES) - 1, "pods to be bound", 60)
    stack.wait_for(lambda: stack.service.get("/v1/plan")["process"] == "running", "the planning process", 60)
    assert _planning_processes(stack) != [child]
    assert stack.service.get("/readyz")["ready"]


def _plan_of(stack: Stack, count: int) -> KubernetesObject | None:
    plan = stack.service.get("/v1/plan")
    return plan if plan["status"] and plan["pods"] == count else None


def _bound(stack: Stack) -> int:
    return sum(bool(pod["spec"].get("nodeName")) for pod in stack.cluster.pods())


def _planning_processes(stack: Stack) -> list[int]:
    """The planning processes of this stack's services: their parents name its kubeconfig."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"app.plan_process" not in (folder / "cmdline").read_bytes():
                continue
            parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[1]
            if str(stack.kubeconfig).encode() in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
