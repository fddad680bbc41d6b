"""Pods per second through a real kube-scheduler: with Tangram, without any extender, and with one that does nothing.

    python -m tests.bench.throughput [--json FILE] [--quick] [--nodes 500,5000] [--mixes whole,mig] [--rounds 3]
                                     [--configurations none,tangram-100 | all] [--ways waiting,arriving] [--minutes 20]

Configurations take turns within one run on one control plane, in another order each round, since figures of one machine
differ more between runs than between them. Whoever has no turn is frozen or not running. Tangram's are compared with
the same kube-scheduler without an extender, and with the stock one, which looks at a sample of a large cluster only.

    waiting    kube-scheduler is frozen, all pods are created, then it goes on and the clock starts
    arriving   the clock starts with the first pod's creation, by 16 connections, while kube-scheduler is at work; on
               few cores the creating is what takes the time, and configurations look more alike than they are

    whole      nodes of eight H100; pods ask for one, two or four of them
    mig        nodes of eight H100 or A100 in MIG mode; pods ask for one slice of six profiles. Every node says it has
               as many of each profile as fit if there is nothing else, so kube-scheduler alone places more than
               boards can hold: it shows the speed of counting. Tangram finds a legal place on a board for each; slices
               are made on paper, since what makes them is the agent's work on its own machine

The API server, etcd, kube-scheduler and KWOK (pods become Running) are real; controllers do not run and nodes' leases
are not renewed, which at 5,000 nodes would be all that two cores can do. Agents are simulated over plain HTTP
(`agents`), every node reporting each 10 s. Everything shares the cores, so processor time is shown by process.
"""

from __future__ import annotations

import argparse
import random
import socket
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.simulate import report_of
from tests.bench.agents import MIXES, fleet
from tests.bench.figures import Target, show_targets, write
from tests.bench.machine import machine, words
from tests.bench.meter import THIS, Bound, read
from tests.e2e.checker import Checker
from tests.e2e.cluster import free_port
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, MIG, REPOSITORY, SLICE_ASKS, Knobs, Service, Stack, kubernetes_node

OUT = Path("out") / "bench" / "throughput.json"

INTERVAL_SECONDS = 10.0
FOR_EVER = 3600.0  # a service is frozen while others have their turns: it must not think agents or its Lease lost
KNOBS = Knobs(stale_seconds=FOR_EVER, lease_seconds=FOR_EVER, unauthenticated_agents=True)

ROUND_SECONDS = 90.0  # a turn that takes longer ends there; its rate is of the pods that have a node by then
CALM_SECONDS = 1.5  # for things to calm down before the clock starts
IDLE_SECONDS = 5.0
START_SECONDS = 300.0  # 5,000 nodes and the value tables of their boards, on a busy machine, too

WHOLE_ASKS = ((1, 6), (2, 3), (4, 1))
"""GPUs of a pod, and how often: few and small enough that kube-scheduler alone, which spreads, places all of them."""

PODS = {500: 800, 5000: 300}
"""In a round, by the size of the cluster: some seconds' worth."""

TARGET = 0.8
LOG_COLUMNS = 150


@dataclass(frozen=True, slots=True)
class Configuration:
    """How kube-scheduler is set up. `most_nodes`: what the extender's filter returns at most; 0: all that fit.

    `adaptive`: kube-scheduler looks at a part of a large cluster, as it does by default; else at all nodes.
    """

    name: str
    extender: str = ""
    adaptive: bool = False
    most_nodes: int = 0

    @property
    def base(self) -> str:
        """The same without an extender."""
        return STOCK if self.adaptive else NONE

    @property
    def server(self) -> str:
        """The name of the process that answers; two configurations may share it."""
        return f"{self.extender}-{self.most_nodes or 'all'}" if self.extender else ""


TANGRAM, NOTHING = "tangram", "nothing"
STOCK, NONE = "stock", "none"
SHIPPED = "tangram-100"

CONFIGURATIONS = {
    each.name: each
    for each in (
        Configuration(STOCK, adaptive=True),
        Configuration(NONE),
        Configuration("nothing", NOTHING),
        Configuration("nothing-100", NOTHING, most_nodes=100),
        Configuration("nothing-adaptive", NOTHING, adaptive=True),
        Configuration("tangram-1", TANGRAM, most_nodes=1),
        Configuration(SHIPPED, TANGRAM, most_nodes=100),
        Configuration("tangram-all", TANGRAM),
        Configuration("tangram-1-adaptive", TANGRAM, adaptive=True, most_nodes=1),
        Configuration("tangram-100-adaptive", TANGRAM, adaptive=True, most_nodes=100),
        Configuration("tangram-all-adaptive", TANGRAM, adaptive=True),
    )
}

DEFAULTS = {
    "whole": (STOCK, NONE, "nothing", "tangram-1", SHIPPED, "tangram-100-adaptive"),
    "mig": (STOCK, NONE, SHIPPED),
}
"""What is measured unless told otherwise: an extender that does nothing does not know what pods ask for."""

QUICK = (STOCK, NONE, SHIPPED)


@dataclass(frozen=True, slots=True)
class Turn:
    """One configuration's pods of one round."""

    configuration: str
    way: str
    round: int
    pods: int
    bound: int
    seconds: float
    half_seconds: float
    cpu_ms_per_pod: dict[str, float]
    requests_per_pod: dict[str, float]

    @property
    def rate(self) -> float:
        """Pods per second."""
        return self.bound / self.seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured on one fleet."""

    nodes: int
    mix: str
    pods: int
    rounds: int
    ways: tuple[str, ...]
    configurations: tuple[Configuration, ...]


@dataclass(slots=True)
class Found:
    """What was measured on one fleet."""

    plan: Plan
    turns: list[Turn] = field(default_factory=list)
    idle_cpu_ms_per_second: dict[str, float] = field(default_factory=dict)
    reporting_cpu_ms_per_second: dict[str, float] = field(default_factory=dict)
    set_up_seconds: float = 0.0

    def rates(self, configuration: str, way: str) -> list[float]:
        """Pods per second of each round."""
        return [turn.rate for turn in self.turns if (turn.configuration, turn.way) == (configuration, way)]

    def ratio(self, configuration: str, to: str, way: str) -> float:
        """Of the medians; 0 where one of them was not measured."""
        ours, theirs = self.rates(configuration, way), self.rates(to, way)
        return statistics.median(ours) / statistics.median(theirs) if ours and theirs else 0.0

    def ratios(self, configuration: str, to: str, way: str) -> list[float]:
        """Round by round."""
        pairs = zip(self.rates(configuration, way), self.rates(to, way), strict=False)
        return [ours / theirs for ours, theirs in pairs]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _options(argv)
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    about = machine()
    latest = time.monotonic() + 60 * options.minutes
    found = []
    for plan in _plans(options):
        if time.monotonic() < latest:
            found.append(measure(plan, console, latest))
            show(found[-1], console)
    targets = [target for each in found for target in targets_of(each)]
    show_targets(targets, console)
    console.print(words(about))
    write(options.json, {"what": __doc__.splitlines()[0], "machine": about, "fleets": list(map(_json, found))}, targets)
    console.print(f"written to {options.json}")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pods per second through a real kube-scheduler.")
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--quick", action="store_true", help="about three minutes: one round of what matters most")
    parser.add_argument("--nodes", default="500,5000", help="sizes of the cluster, eight GPUs a node")
    parser.add_argument("--mixes", default="whole,mig", help="what pods ask for: whole, mig")
    parser.add_argument("--ways", default="waiting", help="how pods come: waiting, arriving")
    parser.add_argument("--configurations", default="", help=f"all, or some of {', '.join(CONFIGURATIONS)}")
    parser.add_argument("--pods", type=int, default=0, help="pods in a round (0: some seconds' worth)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    parser.add_argument("--minutes", type=float, default=25.0, help="no turn is begun later than this")
    return parser.parse_args(argv)


def _plans(options: argparse.Namespace) -> list[Plan]:
    plans = []
    for size in map(int, options.nodes.split(",")):
        for mix in options.mixes.split(","):
            if options.quick and mix == "mig" and size > min(PODS):
                continue
            names = tuple(CONFIGURATIONS) if options.configurations == "all" else options.configurations.split(",")
            if not options.configurations:
                names = QUICK if options.quick else DEFAULTS[mix]
            wanted = [CONFIGURATIONS[name] for name in names]
            wanted += [CONFIGURATIONS[base] for base in (NONE, STOCK)]  # nothing says anything without them
            plans.append(
                Plan(
                    nodes=size,
                    mix=mix,
                    pods=options.pods or PODS.get(size, 300),
                    rounds=1 if options.quick else options.rounds,
                    ways=tuple(options.ways.split(",")),
                    configurations=tuple(dict.fromkeys(wanted)),
                )
            )
    return plans


def measure(plan: Plan, console: Console, latest: float) -> Found:
    """Every turn on one fleet, on a control plane of its own; no turn is begun after `latest`."""
    found = Found(plan)
    began = time.monotonic()
    with Stack((), knobs=KNOBS, service=False, form=None) as stack:
        bench = Bench(stack, plan)
        found.set_up_seconds = round(time.monotonic() - began, 1)
        console.print(f"{plan.nodes} nodes, {plan.mix}: set up in {found.set_up_seconds:.0f} s")
        found.idle_cpu_ms_per_second = bench.idle()
        found.reporting_cpu_ms_per_second = bench.reporting()
        bench.turn(CONFIGURATIONS[NONE], plan.ways[0], plan.rounds)  # the first one finds everything cold
        for way in plan.ways:
            for number in range(plan.rounds):
                for configuration in _rotated(plan.configurations, number):
                    if time.monotonic() > latest:
                        console.print("no time is left for more")
                        return found
                    turn = bench.turn(configuration, way, number)
                    found.turns.append(turn)
                    where = f"{plan.nodes} nodes, {plan.mix}, {way}, round {number + 1}"
                    late = "" if turn.bound == turn.pods else f" (only {turn.bound} of {turn.pods} pods)"
                    console.print(f"{where}, {configuration.name}: {turn.rate:.0f} pods/s{late}")
    return found


def _rotated(configurations: Sequence[Configuration], number: int) -> list[Configuration]:
    """Another first one each round, and every other round backwards, so that neighbours change."""
    shift = number % len(configurations)
    order = [*configurations[shift:], *configurations[:shift]]
    return order[:1] + order[:0:-1] if number % 2 else order


class Bench:
    """A control plane with a fleet, and the extenders that take turns on it."""

    def __init__(self, stack: Stack, plan: Plan) -> None:
        self._stack = stack
        self._cluster = stack.cluster
        self._plan = plan
        self._nodes = fleet(plan.mix, plan.nodes)
        self._cluster.be_still()
        self._allow_names()
        self._cluster.add_nodes(self._kubernetes_nodes())
        self._checker = Checker(self._cluster, map(report_of, self._nodes))
        self._ports: dict[str, int] = {}
        self._services: dict[str, Service] = {}
        for each in plan.configurations:
            if each.server and each.server not in {*self._ports, *self._services}:
                self._start(each)

    def turn(self, configuration: Configuration, way: str, number: int) -> Turn:
        """The cluster is empty before and afterwards."""
        pods = PODS_OF[self._plan.mix](self._plan.pods, seed=number)
        self._thaw(configuration)
        scheduler = f"{configuration.name}-scheduler"
        self._cluster.start_scheduler(self._scheduler_configuration(configuration), name=scheduler, verbosity=0)
        try:
            turn = self._timed(configuration, scheduler, pods, way, number)
            if configuration.extender == TANGRAM:
                self._checker.check()
        finally:
            self._cluster.kill_scheduler(scheduler)
        self._empty(configuration)
        self._freeze(configuration)
        return turn

    def _timed(
        self, configuration: Configuration, scheduler: str, pods: Sequence[KubernetesObject], way: str, number: int
    ) -> Turn:
        processes = self._cluster.processes
        with Bound(self._cluster) as bound:
            if way == "waiting":
                processes.pause(scheduler)
                self._cluster.add_pods(pods)
            time.sleep(CALM_SECONDS)
            before = read(self._cluster)
            started = time.monotonic()
            if way == "waiting":
                processes.resume(scheduler)
            else:
                self._cluster.add_pods(pods)
            times = bound.wait(len(pods), ROUND_SECONDS)
            after = read(self._cluster)
        if not times:
            raise TimeoutError(
                f"no pod has a node after {ROUND_SECONDS:.0f} s: {self._cluster.logs(scheduler)[-2000:]}"
            )
        late = len(times) < len(pods)
        cpu = after.cpu_ms_since(before, per=len(times))
        return Turn(
            configuration=configuration.name,
            way=way,
            round=number,
            pods=len(pods),
            bound=len(times),
            seconds=round(ROUND_SECONDS if late else times[-1] - started, 3),
            half_seconds=round(times[len(times) // 2] - started, 3),
            cpu_ms_per_pod={"kube-scheduler" if name == scheduler else name: ms for name, ms in cpu.items()},
            requests_per_pod=after.requests_since(before, per=len(times)),
        )

    def idle(self) -> dict[str, float]:
        """What each process uses of the processors by itself, in milliseconds a second."""
        before = read(self._cluster)
        time.sleep(IDLE_SECONDS)
        return read(self._cluster).cpu_ms_since(before, per=IDLE_SECONDS)

    def reporting(self) -> dict[str, float]:
        """The same while a service takes its agents' reports, at their full rate, and does nothing else."""
        ours = next((each for each in self._plan.configurations if each.extender == TANGRAM), None)
        if ours is None:
            return {}
        self._thaw(ours)
        time.sleep(CALM_SECONDS)
        used = self.idle()
        self._freeze(ours)
        return used

    # -- extenders ------------------------------------------------------------------------------------

    def _start(self, configuration: Configuration) -> None:
        """The process that answers, frozen as soon as it knows the fleet."""
        if configuration.extender == NOTHING:
            self._start_nothing(configuration)
        else:
            self._start_tangram(configuration)
        self._freeze(configuration)

    def _start_tangram(self, configuration: Configuration) -> None:
        name = configuration.server
        options = {"most-nodes": str(configuration.most_nodes), "lease-name": name, "blind-seconds": "0"}
        service = self._stack.add_service(name, options=options)
        self._services[name] = service
        plan = self._plan
        words = ["--mix", plan.mix, "--nodes", str(plan.nodes), "--interval", str(INTERVAL_SECONDS)]
        self._run(_agents_of(name), "agents", ["--port", str(service.port_for_agents), *words])
        service.wait_ready(START_SECONDS)
        tables = len(MIXES[plan.mix]) if plan.mix == "mig" else 0

        def settled() -> bool:
            known = service.totals()["nodes_offered"] == plan.nodes
            return known and service.metric('tangram_value_tables{state="now"}') >= tables

        self._stack.wait_for(settled, f"{name} to know {plan.nodes} nodes", START_SECONDS)

    def _start_nothing(self, configuration: Configuration) -> None:
        name = configuration.server
        port = self._ports[name] = free_port()
        files = self._stack.certificates
        words = [f"--cert={files / 'server.crt'}", f"--key={files / 'server.key'}", f"--client-ca={files / 'ca.crt'}"]
        self._run(name, "nothing", [f"--port={port}", f"--most-nodes={configuration.most_nodes}", *words])
        self._stack.wait_for(lambda: _listens(port), f"{name} to listen", START_SECONDS)

    def _run(self, name: str, module: str, words: Sequence[str]) -> None:
        argv = [sys.executable, "-m", f"tests.bench.{module}", *words]
        self._cluster.processes.start(name, argv, environment={"PYTHONPATH": str(REPOSITORY)})

    def _processes_of(self, configuration: Configuration) -> list[str]:
        name = configuration.server
        return [name, _agents_of(name)] if configuration.extender == TANGRAM else [name] if name else []

    def _thaw(self, configuration: Configuration) -> None:
        for name in self._processes_of(configuration):
            self._cluster.processes.resume(name)
        if configuration.extender == TANGRAM:
            self._services[configuration.server].wait_ready()
            self._wait_for_nothing_held(configuration)

    def _freeze(self, configuration: Configuration) -> None:
        for name in self._processes_of(configuration):
            self._cluster.processes.pause(name)

    def _empty(self, configuration: Configuration) -> None:
        self._cluster.delete_all_pods()
        if configuration.extender == TANGRAM:
            self._wait_for_nothing_held(configuration)

    def _wait_for_nothing_held(self, configuration: Configuration) -> None:
        """A service that was frozen has to hear first what was done by others meanwhile."""
        service = self._services[configuration.server]
        what = f"{service.name} to hold nothing"
        self._stack.wait_for(lambda: not service.get("/v1/pods")["pods"], what, ROUND_SECONDS)

    def _scheduler_configuration(self, configuration: Configuration) -> dict[str, Any]:
        """The shipped one; in another sample, without its extender, or with one that does nothing."""
        whole = self._stack.scheduler_configuration("first", self._services.get(configuration.server))
        if configuration.adaptive:
            del whole["percentageOfNodesToScore"]
        if not configuration.extender:
            del whole["extenders"]
        elif configuration.extender == NOTHING:
            (extender,) = whole["extenders"]
            del extender["bindVerb"], extender["preemptVerb"]
            extender["urlPrefix"] = f"https://127.0.0.1:{self._ports[configuration.server]}"
        return whole

    # -- the cluster ----------------------------------------------------------------------------------

    def _kubernetes_nodes(self) -> list[KubernetesObject]:
        """The fleet as kubelets would register it; those of one kind are alike but for their names."""
        kinds = [kubernetes_node(node) for node in self._nodes[: len(MIXES[self._plan.mix])]]
        return [_named(kind, node.name) for node, kind in zip(self._nodes, cycle(kinds), strict=False)]

    def _allow_names(self) -> None:
        """Each service has a Lease and a journal of its own, where the shipped role allows but one name of each."""
        group, namespace = "rbac.authorization.k8s.io", self._stack.namespace
        path = f"/apis/{group}/v1/namespaces/{namespace}"
        verbs = ["get", "create", "update", "patch", "delete"]
        rules = [
            {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": verbs},
            {"apiGroups": [""], "resources": ["configmaps"], "verbs": verbs},
        ]
        subject = {"kind": "ServiceAccount", "name": self._stack.account, "namespace": namespace}
        role = {"apiGroup": group, "kind": "Role", "name": "bench"}
        self._cluster.request("POST", f"{path}/roles", {"metadata": {"name": "bench"}, "rules": rules})
        binding = {"metadata": {"name": "bench"}, "roleRef": role, "subjects": [subject]}
        self._cluster.request("POST", f"{path}/rolebindings", binding)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _agents_of(server: str) -> str:
    return f"{server}'s agents"


def _named(node: KubernetesObject, name: str) -> KubernetesObject:
    labels = {**node["metadata"]["labels"], "kubernetes.io/hostname": name}
    return {**node, "metadata": {**node["metadata"], "name": name, "labels": labels}}


def whole_pods(count: int, *, seed: int) -> list[KubernetesObject]:
    """Pods for whole GPUs in random order, the same for each configuration."""
    rng = random.Random(seed)
    sizes = rng.choices([ask for ask, _ in WHOLE_ASKS], [weight for _, weight in WHOLE_ASKS], k=count)
    return [gpu_pod(f"pod-{seed}-{number:05d}", {GPU: gpus}) for number, gpus in enumerate(sizes)]


def mig_pods(count: int, *, seed: int) -> list[KubernetesObject]:
    """Pods for one slice each, in random order, the same for each configuration."""
    rng = random.Random(seed)
    profiles = rng.choices([ask for ask, _ in SLICE_ASKS], [weight for _, weight in SLICE_ASKS], k=count)
    return [gpu_pod(f"pod-{seed}-{number:05d}", {MIG + profile: 1}) for number, profile in enumerate(profiles)]


PODS_OF = {"whole": whole_pods, "mig": mig_pods}


# ----------------------------------------------------------------------------------------------------- figures


def targets_of(found: Found) -> list[Target]:
    """The shipped configuration against the same without us, beside what it is against the stock one."""
    plan = found.plan
    targets = []
    for way in plan.ways:
        if not found.rates(SHIPPED, way):
            continue
        spread = found.ratios(SHIPPED, NONE, way)
        rounds = f"rounds {min(spread):.2f} to {max(spread):.2f}; " if len(spread) > 1 else ""
        targets.append(
            Target(
                key=f"throughput {plan.nodes} {plan.mix} {way}",
                what=f"pods/s through kube-scheduler ÷ without us, {plan.nodes:,} nodes, {plan.mix}, {way}",
                target=TARGET,
                measured=round(found.ratio(SHIPPED, NONE, way), 3),
                note=f"{rounds}{found.ratio(SHIPPED, STOCK, way):.2f}× the stock one, which samples nodes",
                unit="×",
                at_least=True,
                ratio=True,
            )
        )
    return targets


def show(found: Found, console: Console) -> None:
    """A row for each configuration, then where processor time went."""
    plan = found.plan
    for way in plan.ways:
        title = f"pods/s, {plan.nodes:,} nodes × 8 GPUs, {plan.mix}, {plan.pods} pods a round, {way}"
        table = Table(title=title, title_justify="left")
        for head in ("configuration", "rounds", "median", "÷ same without (rounds)", "÷ stock", "CPU ms a pod"):
            table.add_column(head, justify="left" if head == "configuration" else "right")
        for each in plan.configurations:
            rates = found.rates(each.name, way)
            if rates:
                table.add_row(*_row(found, each, way, rates))
        console.print(table)
    for name, used in (("nothing", found.idle_cpu_ms_per_second), ("reports", found.reporting_cpu_ms_per_second)):
        console.print(f"CPU ms a second with {name}: {_parts(used)}")
    for way in plan.ways:
        for each in plan.configurations:
            console.print(f"CPU ms a pod, {way}, {each.name}: {_parts(_cpu(found, each.name, way))}")


def _row(found: Found, configuration: Configuration, way: str, rates: Sequence[float]) -> list[str]:
    name = configuration.name
    each_ratio = found.ratios(name, configuration.base, way)
    spread = f" ({min(each_ratio):.2f} to {max(each_ratio):.2f})" if len(each_ratio) > 1 else ""
    return [
        name,
        " ".join(f"{rate:.0f}" for rate in rates),
        f"{statistics.median(rates):.0f}",
        f"{found.ratio(name, configuration.base, way):.2f}{spread}",
        f"{found.ratio(name, STOCK, way):.2f}",
        f"{sum(_cpu(found, name, way).values()):.1f}",
    ]


def _cpu(found: Found, configuration: str, way: str) -> dict[str, float]:
    """Milliseconds a pod by process: medians over the rounds, the highest first."""
    turns = [turn for turn in found.turns if (turn.configuration, turn.way) == (configuration, way)]
    names = {name for turn in turns for name in turn.cpu_ms_per_pod}
    used = {name: statistics.median(turn.cpu_ms_per_pod.get(name, 0.0) for turn in turns) for name in names}
    return dict(sorted(used.items(), key=lambda each: -each[1]))


def _parts(used: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {ms:.1f}" for name, ms in used.items() if name != THIS or ms >= 0.1)


def _json(found: Found) -> dict[str, Any]:
    """Every turn, and what the table says of them."""
    plan = found.plan
    summary = [
        {
            "configuration": each.name,
            "way": way,
            "pods_per_second": [round(rate, 2) for rate in found.rates(each.name, way)],
            "median": round(statistics.median(found.rates(each.name, way)), 2),
            "ratio_to_same_without": round(found.ratio(each.name, each.base, way), 3),
            "ratio_to_stock": round(found.ratio(each.name, STOCK, way), 3),
            "cpu_ms_per_pod": _cpu(found, each.name, way),
        }
        for way in plan.ways
        for each in plan.configurations
        if found.rates(each.name, way)
    ]
    return {
        **asdict(plan),
        "set_up_seconds": found.set_up_seconds,
        "idle_cpu_ms_per_second": found.idle_cpu_ms_per_second,
        "reporting_cpu_ms_per_second": found.reporting_cpu_ms_per_second,
        "report_interval_seconds": INTERVAL_SECONDS,
        "summary": summary,
        "turns": [asdict(turn) for turn in found.turns],
    }


if __name__ == "__main__":
    sys.exit(main())
