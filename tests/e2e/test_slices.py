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
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from app.simulate import report_of
from solver.samples import parse_samples
from tests.e2e.checker import MIG, Checker, Piece, is_live, is_refused, read_annotation, uuids_of
from tests.e2e.kubelets import Kubelets
from tests.e2e.nodes import FINISH_AFTER, KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, Knobs, Stack
from tests.fake_nvml.control import Control
from tests.fake_nvml.state import read_state

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
QUIET_SECONDS = 90.0
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
            stack.cluster.add_pods(mortal(rng, f"slice-{number}") for number in range(created, due))
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


def mortal(rng: random.Random, name: str) -> KubernetesObject:
    """A pod that ends by itself, or waits to be deleted."""
    (asks,) = rng.choices([dict(ask) for ask, _ in ASKS], [weight for _, weight in ASKS])
    pod = gpu_pod(name, asks)
    if rng.random() < 0.6:
        pod["metadata"].setdefault("annotations", {})[FINISH_AFTER] = f"{rng.randint(3, 30)}s"
        pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["terminationGracePeriodSeconds"] = 2
    return pod


def delete_some(stack: Stack, rng: random.Random) -> None:
    """Now and then one pod is deleted: waiting, being bound, running or finished; some by force."""
    if rng.random() > 0.15:
        return
    pods = stack.cluster.pods()
    if not pods:
        return
    try:
        stack.cluster.delete_pod(rng.choice(pods)["metadata"]["name"], grace_seconds=rng.choice([None, None, 0]))
    except Exception as gone:  # it may just have gone by itself
        if "404" not in str(gone):
            raise


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


def settle(stack: Stack, checker: Checker, sources: Sources) -> int:
    """Wait until nobody who waits has a legal step and all who are bound stay as they are; how many wait."""
    deadline = time.monotonic() + QUIET_SECONDS
    before: set[str] | None = None
    while True:
        sources.look()
        pods = [pod for pod in stack.cluster.pods() if is_live(pod)]
        waiting = [pod for pod in pods if not pod["spec"].get("nodeName")]
        now = {pod["metadata"]["uid"] for pod in pods}
        fitting = checker.pending_with_a_legal_step(pods)
        if now == before and not fitting and all(is_refused(pod) for pod in waiting):
            return len(waiting)
        assert time.monotonic() < deadline, f"{len(waiting)} wait, of whom these would fit: {fitting}"
        before = now
        time.sleep(1.0)


@dataclass
class Sources:
    """Reads the API server, the ledger and the boards, and says where they differ."""

    stack: Stack
    faults: list[str] = field(default_factory=list)
    steps: int = 0
    compared: int = 0
    seen_made: int = 0
    seen_removed: int = 0
    _boards: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def look(self) -> None:
        """One step. Only pods that were the same before and after the other two were read are compared."""
        before = self._bound()
        ledger = self._ledger()
        boards = self._read_boards()
        after = self._bound()
        self.steps += 1
        for uid, pod in before.items():
            if uid in after and read_annotation(pod) == read_annotation(after[uid]):
                self.compared += 1
                self._compare(uid, pod, after[uid], ledger, boards)

    def _compare(
        self,
        uid: str,
        before: KubernetesObject,
        after: KubernetesObject,
        ledger: dict[str, list[str]] | None,
        boards: dict[tuple[str, str, int], str],
    ) -> None:
        name, given = before["metadata"]["name"], read_annotation(before)
        if given is None:
            self._say(f"{name} is bound without a placement")
            return
        if ledger is not None and ledger.get(uid) != sorted(str(piece) for piece in given.pieces):
            self._say(f"{name}: its annotation says {[*map(str, given.pieces)]}, the ledger {ledger.get(uid)}")
        named = [uuids_of(before), uuids_of(after)]
        for piece in given.pieces:
            if piece.profile:
                found = boards.get((piece.gpu, piece.profile, piece.start))
                if found is None or all(found != uuids.get(str(piece)) for uuids in named):
                    said = named[0].get(str(piece))
                    self._say(f"{name} has {piece} as {said}; on the board there is {found}")

    def _bound(self) -> dict[str, KubernetesObject]:
        return {
            pod["metadata"]["uid"]: pod
            for pod in self.stack.cluster.pods()
            if is_live(pod) and pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]
        }

    def _ledger(self) -> dict[str, list[str]] | None:
        """Devices by pod; None while the service is down or not ready."""
        try:
            if not self.stack.service.readiness()["ready"]:
                return None
            pods = self.stack.service.get("/v1/pods")["pods"]
            if not self.stack.service.readiness()["ready"]:
                return None
        except httpx.HTTPError:
            return None
        return {each["uid"]: sorted(each["devices"]) for each in pods if each["phase"] in ("assumed", "held")}

    def _read_boards(self) -> dict[tuple[str, str, int], str]:
        """MIG UUIDs by GPU, profile and start; "" for an instance without a compute instance. Overlaps are faults."""
        found: dict[tuple[str, str, int], str] = {}
        for node in self.stack.nodes:
            state = read_state(self.stack.real_agents.fleet.description(node.name))
            for uuid, gpu in state.gpus.items():
                units: Counter[int] = Counter()
                for instance in gpu.instances:
                    units.update(range(instance.start, instance.start + instance.size))
                    found[uuid, instance.profile.replace("+", "."), instance.start] = instance.uuid or ""
                if any(count > 1 for count in units.values()):
                    self._say(f"{uuid}: instances overlap: {gpu.instances}")
        self.seen_made += len(found.keys() - self._boards.keys())
        self.seen_removed += len(self._boards.keys() - found.keys())
        self._boards = found
        return found

    def until_owned(self, seconds: float) -> int:
        """Wait until the boards have exactly the slices of bound pods; how many."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            owned = {
                (piece.gpu, piece.profile, piece.start)
                for pod in self._bound().values()
                for piece in self._pieces(pod)
                if piece.profile
            }
            if owned == set(self._boards):
                return len(owned)
            if time.monotonic() > deadline:
                without, missing = set(self._boards) - owned, owned - set(self._boards)
                raise AssertionError(f"slices without an owner: {without}; pods without their slice: {missing}")
            time.sleep(0.3)

    def _pieces(self, pod: KubernetesObject) -> tuple[Piece, ...]:
        given = read_annotation(pod)
        return given.pieces if given else ()

    def times(self) -> str:
        """How long binds waited, by the service's own histogram since its last start."""
        metric = "tangram_slices_made_seconds"
        count = self.stack.service.metric(f'{metric}_count{{outcome="made"}}')
        total = self.stack.service.metric(f'{metric}_sum{{outcome="made"}}')
        return f"{1000 * total / count:.0f} ms on average" if count else "none"

    def _say(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)
