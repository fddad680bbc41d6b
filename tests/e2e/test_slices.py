"""MIG slices on the fly, end to end: real kube-scheduler, real agents on the fake NVML, three sources that must agree.

Pods of mixed profiles and whole GPUs come and go at random; slices are made before each bind and removed when idle or
in the way. At every step an independent checker compares the pods' annotations (API server), the service's ledger, and
the boards themselves (the fake NVML's state file, read without the library):

* a pod that is bound has every one of its slices on the board, with the UUID that its annotation names;
* the ledger holds for it exactly these devices;
* no two slices of a board overlap, and none is under two pods.

After quiet no slice is without an owner. Cases 7 and 8 of what went wrong for others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from app.simulate import report_of
from solver.samples import parse_samples
from tests.e2e.checker import MIG, Checker
from tests.e2e.churn import QUIET_SECONDS, delete_some, mortal, settle
from tests.e2e.kubelets import Kubelets
from tests.e2e.sources import Sources
from tests.e2e.stack import GPU, Knobs, Stack
from tests.fake_nvml.control import Control

pytestmark = [pytest.mark.e2e]

FLEET = "8xA100-mig4:1,4xH100-mig3:1,2xA30-mig:1,4xH100:1"
"""Small, so that room is short, pods wait, and idle slices are in the way."""
ASKS = (
    ({MIG + "1g.10gb": 1}, 9),
    ({MIG + "1g.20gb": 1}, 3),
    ({MIG + "2g.20gb": 1}, 6),
    ({MIG + "3g.40gb": 1}, 5),
    ({MIG + "4g.40gb": 1}, 2),
    ({MIG + "7g.80gb": 1}, 2),
    ({MIG + "1g.10gb": 2}, 2),
    ({MIG + "3g.40gb": 1, MIG + "1g.10gb": 1}, 1),
    ({MIG + "1g.6gb": 1}, 2),
    ({MIG + "2g.12gb": 1}, 1),
    ({GPU: 1}, 5),
    ({GPU: 2}, 2),
    ({GPU: 4}, 1),
)
"""What pods ask for, and how often."""

SLOW = (
    "nvmlDeviceCreateGpuInstanceWithPlacement",
    "nvmlGpuInstanceCreateComputeInstance",
    "nvmlComputeInstanceDestroy",
    "nvmlGpuInstanceDestroy",
)
SLOW_MS = 150
"""How long making and removing takes while things are killed, so that they are killed in the middle of it."""

IDLE_SECONDS = 4.0
STEP_SECONDS = 0.1


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    knobs = Knobs(agent_interval_seconds=1.0, options={"idle-slice-seconds": str(IDLE_SECONDS)})
    with Stack(parse_samples(FLEET), knobs=knobs) as stack:
        yield stack


@pytest.mark.timeout(600)
def test_slices_are_made_and_removed_and_three_sources_agree_at_every_step(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    words = churn(stack, pods=150, seconds=60, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.timeout(600)
def test_three_sources_agree_though_agents_and_service_are_killed(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    words = churn(stack, pods=100, seconds=45, kills=3, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_three_hundred_pods_for_minutes(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The full count."""
    words = churn(stack, pods=300, seconds=240, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_three_hundred_pods_and_twenty_kills_each(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """Agents and service, each killed at 20 random moments."""
    words = churn(stack, pods=300, seconds=300, kills=20, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


def churn(stack: Stack, *, pods: int, seconds: float, seed: int, kills: int = 0) -> str:
    """Pods come and go for so long while agents and service are killed so often; what happened, in words."""
    rng = random.Random(seed)
    fleet = stack.real_agents.fleet
    controls = {node.name: Control(fleet.description(node.name)) for node in stack.nodes}
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    sources = Sources(stack)
    arrivals = sorted(rng.random() * seconds for _ in range(pods))
    moments = sorted((rng.random() * seconds, what) for what in ("agent", "service") for _ in range(kills))
    started = time.monotonic()
    before = stack.service.metric('tangram_slices_made_seconds_count{outcome="made"}')
    created = 0
    for control in controls.values():
        for symbol in SLOW if kills else ():
            control.delay(symbol, SLOW_MS)
    with Kubelets(stack.cluster, fleet, controls, seed=seed), checker.following() as follower:
        while (elapsed := time.monotonic() - started) < seconds:
            due = sum(arrival <= elapsed for arrival in arrivals)
            stack.cluster.add_pods(mortal(rng, f"slice-{number}", ASKS) for number in range(created, due))
            created = due
            delete_some(stack, rng)
            if moments and moments[0][0] <= elapsed:
                kill(stack, moments.pop(0)[1], rng)
            sources.look()
            time.sleep(STEP_SECONDS)
        for control in controls.values():
            control.clear("delay")
        stack.service.wait_ready()
        waiting = settle(stack, checker, sources)
        owned = sources.until_owned(QUIET_SECONDS)
        stack.empty()
        sources.until_owned(QUIET_SECONDS)
    assert sources.faults == []
    counted = stack.service.metric('tangram_slices_made_seconds_count{outcome="made"}')
    made = f"{counted:.0f} since the last kill" if kills else f"{counted - before:.0f}"
    times = sources.times()
    return (
        f"seed {seed}: {created} pods in {seconds:.0f} s, {kills} kills each of agents and service, "
        f"{sources.steps} steps compared ({sources.compared} bound pods in all), {follower.events} events checked; "
        f"{sources.seen_made} slices seen made, {sources.seen_removed} seen removed; {made} binds waited for slices "
        f"({times}); {owned} slices owned and {waiting} pods waiting when quiet"
    )


def kill(stack: Stack, what: str, rng: random.Random) -> None:
    """SIGKILL, down for a random time, up again."""
    if what == "service":
        stack.service.kill()
        time.sleep(rng.random())
        stack.service.start()
        return
    fleet = stack.real_agents.fleet
    name = rng.choice(stack.nodes).name
    fleet.stop(name)
    time.sleep(rng.random())
    fleet.start(name)
