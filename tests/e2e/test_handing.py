"""The chosen device reaches the container, end to end: real kube-scheduler, real device managers, real agents.

Each node has the kubelet's own device manager and topology manager, each with another topology policy, and its agent is
the device plugin. Pods come and go; four sources are compared at every step: the pods' annotations (API server), the
ledger, the boards (the fake NVML's state file) and what containers were given by the device manager:

* containers that run see exactly their pod's placement, each as many devices as it asks for;
* no device is in two running containers;
* the slice under a running container is on the board, with the UUID that the container was given.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest

from app.simulate import report_of
from solver.samples import parse_samples
from tests.e2e.checker import MIG, Checker, Piece, asks_of, is_live, read_annotation
from tests.e2e.churn import QUIET_SECONDS, delete_some, settle
from tests.e2e.containers import Containers, Running, pieces_on, running_on
from tests.e2e.kubelet import Policy
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.sources import Sources
from tests.e2e.stack import GPU, Knobs, Stack

pytestmark = [pytest.mark.e2e]

FLEET = "8xA100-mig4:2,8xH100-mig4:1,8xH100:1"
POLICIES: tuple[Policy, ...] = ("none", "best-effort", "restricted", "single-numa-node")
ASKS = (
    ({MIG + "1g.10gb": 1}, 9),
    ({MIG + "1g.20gb": 1}, 3),
    ({MIG + "2g.20gb": 1}, 6),
    ({MIG + "3g.40gb": 1}, 5),
    ({MIG + "7g.80gb": 1}, 2),
    ({MIG + "1g.10gb": 2}, 3),
    ({MIG + "3g.40gb": 1, MIG + "1g.10gb": 1}, 1),
    ({GPU: 1}, 8),
    ({GPU: 2}, 4),
    ({GPU: 4}, 1),
)
ENDS_AFTER = "tangram.test/seconds"  # see controlplane/kubelet_life.go
STEP_SECONDS = 0.2
IDLE_SECONDS = 4.0
REFUSED_SECONDS = 2.0


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    knobs = Knobs(
        agent_interval_seconds=1.0,
        options={"idle-slice-seconds": str(IDLE_SECONDS), "refused-seconds": str(REFUSED_SECONDS)},
    )
    with Stack(parse_samples(FLEET), knobs=knobs, kubelets=POLICIES) as stack:
        yield stack


@pytest.mark.timeout(600)
def test_every_container_has_its_placement_and_four_sources_agree(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    words = churn(stack, pods=100, seconds=60, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.timeout(600)
def test_four_sources_agree_though_agent_service_and_device_manager_are_killed(
    stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    words = churn(stack, pods=80, seconds=60, kills=3, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_three_hundred_pods_through_the_device_managers(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """The full count."""
    words = churn(stack, pods=300, seconds=240, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_three_hundred_pods_and_twenty_kills_of_each(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    """Agents, service and device managers, each killed at 20 random moments."""
    words = churn(stack, pods=300, seconds=300, kills=20, seed=random.randrange(1 << 30))
    with capsys.disabled():
        print(f"\n{words}")


def churn(stack: Stack, *, pods: int, seconds: float, seed: int, kills: int = 0) -> str:
    """Pods come and go for so long while everything is killed so often; what happened, in words and a table."""
    rng = random.Random(seed)
    checker = Checker(stack.cluster, map(report_of, stack.nodes))
    sources = FourSources(Sources(stack, before_bind=False), stack)
    arrivals = sorted(rng.random() * seconds for _ in range(pods))
    moments = sorted((rng.random() * seconds, what) for what in ("agent", "service", "kubelet") for _ in range(kills))
    counted = Counts(stack)
    started = time.monotonic()
    created = 0
    with Containers(stack.kubelets, stack.real_agents.fleet):
        while (elapsed := time.monotonic() - started) < seconds:
            due = sum(arrival <= elapsed for arrival in arrivals)
            stack.cluster.add_pods(mortal(rng, f"hand-{number}") for number in range(created, due))
            created = due
            delete_some(stack, rng)
            if moments and moments[0][0] <= elapsed:
                kill(stack, moments.pop(0)[1], rng)
            sources.look()
            counted.look()
            time.sleep(STEP_SECONDS)
        stack.service.wait_ready()
        waiting = settle(stack, checker, sources.three)
        sources.look()
        refused = refusals(stack)
        owned = sources.three.until_owned(QUIET_SECONDS)
        counted.look()
        stack.empty()
        sources.three.until_owned(QUIET_SECONDS)
    assert sources.faults == []
    assert sources.three.faults == []
    assert sources.seen > 0
    return (
        f"seed {seed}: {created} pods in {seconds:.0f} s, {kills} kills each of agents, service and device managers, "
        f"{sources.steps} steps compared ({sources.compared} running containers in all, {sources.seen} different); "
        f"the kubelets refused {refused or 'none'}; {owned} slices owned and {waiting} pods waiting when quiet\n"
        f"{counted}"
    )


def mortal(rng: random.Random, name: str) -> KubernetesObject:
    """A pod that ends by itself or waits to be deleted; some with two containers, some with an init container."""
    (chosen,) = rng.choices([dict(ask) for ask, _ in ASKS], [weight for _, weight in ASKS])
    pod = gpu_pod(name, chosen)
    (main,) = pod["spec"]["containers"]
    ((resource, count), *more) = chosen.items()
    form = rng.random()
    if form < 0.15 and count == 2 and not more:
        halves = {"requests": {resource: "1"}, "limits": {resource: "1"}}
        pod["spec"]["containers"] = [{**main, "name": each, "resources": halves} for each in ("left", "right")]
    elif form < 0.25:
        one = {"requests": {resource: "1"}, "limits": {resource: "1"}}
        pod["spec"]["initContainers"] = [{**main, "name": "prepare", "resources": one}]
    if rng.random() < 0.6:
        pod["metadata"].setdefault("annotations", {})[ENDS_AFTER] = str(rng.randint(3, 30))
        pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["terminationGracePeriodSeconds"] = 2
    return pod


def kill(stack: Stack, what: str, rng: random.Random) -> None:
    """SIGKILL, down for a random time, up again."""
    name = rng.choice(stack.nodes).name
    if what == "service":
        stack.service.kill()
        time.sleep(rng.random())
        stack.service.start()
    elif what == "kubelet":
        stack.kubelets[name].kill()
        time.sleep(rng.random())
        stack.kubelets[name].restart()
    else:
        fleet = stack.real_agents.fleet
        fleet.stop(name)
        time.sleep(rng.random())
        fleet.start(name)


def refusals(stack: Stack) -> str:
    """The pods that kubelets have refused, counted by reason."""
    reasons = Counter(
        event.reason for kubelet in stack.kubelets.values() for event in kubelet.events() if event.event == "refused"
    )
    return ", ".join(f"{count} with {reason}" for reason, count in sorted(reasons.items()))


@dataclass
class FourSources:
    """The device managers beside the other three sources."""

    three: Sources
    stack: Stack
    faults: list[str] = field(default_factory=list)
    steps: int = 0
    compared: int = 0
    _seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def seen(self) -> int:
        """How many containers were compared at least once."""
        return len(self._seen)

    def look(self) -> None:
        """One step. What changed while it was read is left to the next."""
        self.three.look()
        self.steps += 1
        before = self._pods()
        runs = {name: running_on(name, kubelet) for name, kubelet in self.stack.kubelets.items()}
        pieces = {name: pieces_on(self.stack.real_agents.fleet, name) for name in runs}
        still = {name: running_on(name, kubelet) for name, kubelet in self.stack.kubelets.items()}
        after = self._pods()
        for name in runs:
            steady = [each for key, each in runs[name].items() if key in still[name]]
            self._no_device_is_in_two(steady, pieces[name])
            for uid in {each.uid for each in steady}:
                if uid in before and uid in after and read_annotation(before[uid]) == read_annotation(after[uid]):
                    self._compare(before[uid], [each for each in steady if each.uid == uid], pieces[name])

    def _no_device_is_in_two(self, running: list[Running], pieces: dict[str, Piece]) -> None:
        owners: dict[Piece, Running] = {}
        for container in running:
            for uuid in container.visible:
                piece = pieces.get(uuid)
                if piece is None:
                    self._say(f"{container.pod}/{container.container} sees {uuid}, which is not on its node's boards")
                elif owners.setdefault(piece, container).uid != container.uid:
                    self._say(f"{piece} is in {owners[piece].pod} and in {container.pod}")

    def _compare(self, pod: KubernetesObject, running: list[Running], pieces: dict[str, Piece]) -> None:
        given = read_annotation(pod)
        if given is None:
            self._say(f"{pod['metadata']['name']} runs without a placement")
            return
        wanted = {each["name"] for each in pod["spec"]["containers"] if _asks(each)}
        main = [each for each in running if each.container in wanted]
        if {each.container for each in main} != wanted:
            return  # its containers are starting or ending
        self.compared += len(main)
        self._seen |= {(each.uid, each.container) for each in main}
        sees = [pieces[uuid] for each in running for uuid in each.visible if uuid in pieces]
        if set(sees) - set(given.pieces):
            self._say(f"{pod['metadata']['name']} sees {[*map(str, sees)]}, placed are {[*map(str, given.pieces)]}")
        for container in pod["spec"]["containers"]:
            sees_here = [each.visible for each in main if each.container == container["name"]]
            if sees_here and len(sees_here[0]) != sum(_asks(container).values()):
                self._say(f"{pod['metadata']['name']}/{container['name']} sees {sees_here}, asks {_asks(container)}")
        seen_by_main = [uuid for each in main for uuid in each.visible]
        if len(set(seen_by_main)) < len(seen_by_main):
            self._say(f"{pod['metadata']['name']}: two of its containers see the same device: {seen_by_main}")

    def _pods(self) -> dict[str, KubernetesObject]:
        return {pod["metadata"]["uid"]: pod for pod in self.stack.cluster.pods() if is_live(pod)}

    def _say(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def _asks(container: KubernetesObject) -> dict[str, int]:
    return asks_of({"spec": {"containers": [container]}})


class Counts:
    """How pods were found and how containers came by their devices, added up over restarts of agents."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._last = {node.name: self._read(node.name) for node in stack.nodes}
        self._sum: Counter[str] = Counter()

    def look(self) -> None:
        """Read what each node's agent has counted since its start."""
        for name, before in self._last.items():
            now = self._read(name)
            if now:  # an agent that has just started has counted nothing
                began_anew = any(now[what] < count for what, count in before.items())
                self._sum += now if began_anew else now - before
                self._last[name] = now

    def _read(self, name: str) -> Counter[str]:
        with contextlib.suppress(httpx.HTTPError):  # the service is down
            return Counter(self._stack.service.node(name)["handing"]["counts"])
        return Counter()

    def __str__(self) -> str:
        return "\n".join(f"  {what:28} {count:5}" for what, count in sorted(self._sum.items()))
