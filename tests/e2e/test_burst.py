"""Five hundred pods at once, through a real kube-scheduler, on forty nodes of many kinds.

Case 1 of what went wrong for others: the same card given to two pods under a burst.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from app.simulate import report_of
from solver import DEFAULT_POLICY, Ask, Demand, Problem, Snapshot
from solver.flow import solve
from solver.samples import parse_samples
from solver.units import Worth
from tests.e2e.checker import MIG, Checker, asks_of, is_live, is_refused, refusal_of
from tests.e2e.nodes import KubernetesObject
from tests.e2e.stack import GPU, Stack, burst

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FLEET = "8xH100:9,8xA100-mig:5,8xH100-mig2:6,4xH100NVL:6,8xV100:3,4xA100PCIe:5,4xL4:4,2xA30:2"
PODS = 500
SETTLE_SECONDS = 120.0


@pytest.fixture(scope="module", params=["first", "second"])
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    with Stack(parse_samples(FLEET), form=request.param) as stack:
        yield stack


def test_case_01_no_device_is_given_twice_in_a_burst_and_nobody_who_fits_is_left_out(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """500 pods at once: at no moment is a device or slice given twice; at the end nobody who waits has a legal step."""
    assert len(stack.nodes) == 40
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    pods = burst(PODS, seed=1, scheduler_name=stack.scheduler_name())

    started = time.monotonic()
    with checker.following() as follower:
        stack.cluster.add_pods(pods)
        seconds = settle(stack, checker, since=started)
    final = checker.check()

    with capsys.disabled():
        print(f"\nthe {stack.form} scheduler: {summary(stack, final, seconds)}; {follower.events} events checked")
    waiting = [pod for pod in final if not pod["spec"].get("nodeName")]
    assert waiting, "the burst must be larger than the cluster, or the promise to those who wait is not tested"
    assert all(refusal_of(pod) for pod in waiting), "whoever waits is told why"
    stack.empty()


def settle(stack: Stack, checker: Checker, *, since: float, timeout: float = SETTLE_SECONDS) -> float:
    """Wait until every pod is bound or refused and nobody who waits has a legal step; the seconds it took."""
    deadline = time.monotonic() + timeout
    while True:
        pods = checker.pods()
        undecided = [pod for pod in pods if is_live(pod) and not pod["spec"].get("nodeName") and not is_refused(pod)]
        fitting: dict[str, str] = {}
        if not undecided:
            fitting = checker.pending_with_a_legal_step(pods)
            if not fitting:
                return time.monotonic() - since
        if time.monotonic() > deadline:
            words = f"after {timeout:.0f} s {len(undecided)} pods are undecided"
            raise AssertionError(f"{words}, and these wait although they fit: {fitting}")
        time.sleep(0.3)


def summary(stack: Stack, pods: Sequence[KubernetesObject], seconds: float) -> str:
    """Placed beside the joint optimum of the same asks on the same, empty cluster; how many pods followed a plan."""
    asks = tuple(Ask(pod["metadata"]["uid"], _demand(pod)) for pod in pods)
    plan = solve(Problem(Snapshot(stack.nodes), asks), DEFAULT_POLICY, time_limit_seconds=60)
    placed = {pod["metadata"]["uid"] for pod in pods if pod["spec"].get("nodeName")}
    worth = Worth.among(DEFAULT_POLICY, {(gpu.kind, gpu.geometry) for node in stack.nodes for gpu in node.gpus})
    demands = {ask.id: ask.demand for ask in asks}
    ours = sum(worth.of(demands[uid]) for uid in placed) / 1000
    theirs = sum(worth.of(demands[uid]) for uid in plan.placements) / 1000
    kinds = Counter(str(demands[uid]) for uid in placed)
    best = Counter(str(demands[uid]) for uid in plan.placements)
    table = ", ".join(f"{kind} {kinds[kind]}:{best[kind]}" for kind in sorted(best | kinds))
    return (
        f"{len(placed)} of {len(pods)} pods placed in {seconds:.1f} s, worth {ours:.1f} GPUs; joint optimum "
        f"({plan.status.value}) {len(plan.placements)} pods, worth {theirs:.1f} GPUs; ours:optimum by kind: {table}; "
        f"{stack.service.get('/v1/plan')['binds']}"
    )


def _demand(pod: KubernetesObject) -> Demand:
    asked = asks_of(pod)
    return Demand.of(
        asked.get(GPU, 0), **{name.removeprefix(MIG): count for name, count in asked.items() if name != GPU}
    )
