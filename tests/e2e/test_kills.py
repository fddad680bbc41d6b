"""The service and kube-scheduler are killed at random moments, and everything that can come and go does.

Case 5 of what went wrong for others: the same GPU handed out after a restart.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.simulate import report_of
from solver.samples import parse_samples
from tests.e2e.checker import Checker, Follower, is_live
from tests.e2e.nodes import STOP_AFTER, KubernetesObject
from tests.e2e.stack import Stack, burst
from tests.e2e.test_burst import FLEET, settle, summary

pytestmark = [pytest.mark.e2e]

PODS_A_KILL = 170  # three kills make the burst of 500
MOMENTS = (1, 500)  # a kill comes after so many events of its burst: four for a pod that is placed, two for others
BURST_SECONDS = 15.0
TURNS = ("service", "scheduler", "both")
ROOM_SHARE = 0.5  # of the bound pods leave before each further burst, or there would be nothing to place


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with Stack(parse_samples(FLEET), gateways=True) as stack:
        yield stack


@pytest.mark.timeout(600)
def test_case_05_no_device_is_given_twice_when_service_and_scheduler_are_killed(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in the middle of binds; rebuilt from the API server before it decides again."""
    words = kill_in_bursts(stack, kills=3, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_case_05_twenty_kills(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The full count."""
    words = kill_in_bursts(stack, kills=20, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.timeout(600)
def test_a_minute_of_churn_with_silent_agents_and_cut_connections(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pods come, finish, are deleted and force-deleted; agents fall silent; the API server is cut off."""
    words = churn(stack, seconds=60, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_minutes_of_churn_with_kills(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The same for longer, and the service is killed as well."""
    words = churn(stack, seconds=600, seed=random.randrange(1 << 30), kill_every_seconds=30)
    with capsys.disabled():
        print(f"\n{words}")


def kill_in_bursts(stack: Stack, *, kills: int, seed: int) -> str:
    """Kill at random moments of bursts, start again, and see that all promises are kept; what happened, in words."""
    rng = random.Random(seed)
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    started = time.monotonic()
    moments = []
    with checker.following() as follower:
        for number in range(kills):
            if number:
                make_room(stack, rng)
            at_event = rng.randint(*MOMENTS)
            before = follower.events
            pods = burst(PODS_A_KILL, seed=rng.randrange(1 << 30), prefix=f"kill-{number}")
            with ThreadPoolExecutor(1) as creator:  # the kill may come while they are still being created
                created = creator.submit(stack.cluster.add_pods, pods)
                seen = events_since(follower, before, at_event)
                kill_and_start_again(stack, TURNS[number % len(TURNS)], rng)
                created.result()
            moments.append(f"{TURNS[number % len(TURNS)]} after {seen} events")
        settle(stack, checker, since=started)
    agree(stack)
    pods = checker.check()
    words = summary(stack, pods, time.monotonic() - started)
    stack.empty()
    return f"seed {seed}, {kills} kills ({', '.join(moments)}): {words}; {follower.events} events checked"


def events_since(follower: Follower, before: int, wanted: int) -> int:
    """Wait for so many events after `before`, or until the burst must be over; how many came."""
    deadline = time.monotonic() + BURST_SECONDS
    while follower.events - before < wanted and time.monotonic() < deadline:
        time.sleep(0.002)
    return follower.events - before


def kill_and_start_again(stack: Stack, what: str, rng: random.Random) -> None:
    """SIGKILL; down for a random time; up again."""
    if what in ("service", "both"):
        stack.service.kill()
    if what in ("scheduler", "both"):
        stack.cluster.kill_scheduler()
    time.sleep(rng.random())  # the time for which it is down is part of what is tried
    if what in ("service", "both"):
        stack.service.start()
    if what in ("scheduler", "both"):
        stack.cluster.restart()
    stack.service.wait_ready()


def make_room(stack: Stack, rng: random.Random) -> None:
    """Delete a random part of the bound pods, some of them by force."""
    bound = [pod for pod in stack.cluster.pods() if pod["spec"].get("nodeName") and is_live(pod)]
    for pod in rng.sample(bound, int(ROOM_SHARE * len(bound))):
        stack.cluster.delete_pod(pod["metadata"]["name"], grace_seconds=rng.choice([None, 0]))


def agree(stack: Stack) -> None:
    """What the service holds is what the API server says, no more and no less."""

    def same() -> bool:
        held = {each["uid"]: each["node"] for each in stack.service.get("/v1/pods")["pods"] if each["phase"] == "held"}
        pods = stack.cluster.pods()
        return held == {
            pod["metadata"]["uid"]: pod["spec"]["nodeName"]
            for pod in pods
            if pod["spec"].get("nodeName") and is_live(pod)
        }

    stack.wait_for(same, "the service to hold exactly what is bound", 20)


def churn(stack: Stack, *, seconds: float, seed: int, kill_every_seconds: float | None = None) -> str:
    """Pods come and go for so long; at the end everything that fits is placed, and nothing is left behind."""
    rng = random.Random(seed)
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    started = time.monotonic()
    next_kill = started + (kill_every_seconds or float("inf"))
    created = rounds = kills = 0
    frozen: str | None = None
    with checker.following() as follower:
        while time.monotonic() < started + seconds:
            rounds += 1
            stack.cluster.add_pods(mortal(rng, f"churn-{rounds}", 16))
            created += 16
            delete_some(stack, rng)
            if rounds % 6 == 0:
                if frozen is not None:
                    stack.agents.thaw(frozen)
                frozen = rng.choice(stack.nodes).name
                stack.agents.freeze(frozen)
            if rounds % 15 == 0:
                stack.api_gateway.cut()
                delete_some(stack, rng)
                time.sleep(2 * rng.random())
                stack.api_gateway.mend()
            if time.monotonic() > next_kill:
                kill_and_start_again(stack, rng.choice(TURNS), rng)
                next_kill += kill_every_seconds or 0.0
                kills += 1
            time.sleep(max(0.0, started + rounds - time.monotonic()))  # one round a second
        if frozen is not None:
            stack.agents.thaw(frozen)
        stack.wait_reported()
        settle(stack, checker, since=started)
    checker.check()
    agree(stack)
    stack.empty()
    totals = stack.service.totals()
    assert (totals["gpus_held"], totals["slices_held"]) == (0, 0)
    return (
        f"seed {seed}: {created} pods in {seconds:.0f} s, {kills} kills, {follower.events} events checked, "
        f"{follower.lists} lists"
    )


def mortal(rng: random.Random, prefix: str, count: int) -> list[KubernetesObject]:
    """Pods of which a half finishes by itself and the rest waits to be deleted."""
    pods = []
    for pod in burst(count, seed=rng.randrange(1 << 30), prefix=prefix):
        notes = pod["metadata"]["annotations"]
        if rng.random() < 0.5:
            notes["tangram.test/finish-after"] = f"{rng.randint(1, 20)}s"
            pod["spec"]["restartPolicy"] = "Never"
        if rng.random() < 0.3:
            notes[STOP_AFTER] = f"{rng.randint(1, 2)}s"
            pod["spec"]["terminationGracePeriodSeconds"] = 3
        pods.append(pod)
    return pods


def delete_some(stack: Stack, rng: random.Random) -> None:
    """A few pods are deleted: waiting, running and finished ones, some by force."""
    pods = stack.cluster.pods()
    for pod in rng.sample(pods, min(len(pods), 10)):
        try:
            stack.cluster.delete_pod(pod["metadata"]["name"], grace_seconds=rng.choice([None, None, 0]))
        except Exception as gone:  # it may just have gone by itself
            if "404" not in str(gone):
                raise
