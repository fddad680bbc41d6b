"""Pods per second through a real kube-scheduler: with Tangram, without any extender, and with one that does nothing.

    python -m tests.e2e.throughput [--nodes 500] [--pods 1000] [--rounds 3]

The three take turns in one run on one control plane, in another order each round, since figures of one machine
differ more between runs than between these three. The clock runs until the last pod has a node, in two ways:

    arriving   from the first pod's creation, by 16 connections, while kube-scheduler is at work
    waiting    kube-scheduler is frozen, all pods are created, then it goes on and the clock starts

Whoever has no turn is frozen or not running. Agents are simulated over HTTP (500 real ones would take the machine
from kube-scheduler) and report every 10 s. On few cores everything shares them, so processor time is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response
from rich.console import Console
from rich.table import Table

from app.simulate import report_of
from solver.samples import sample_node
from tests.e2e.checker import Checker
from tests.e2e.cluster import free_port
from tests.e2e.nodes import KubernetesObject, gpu_pod
from tests.e2e.stack import GPU, REPOSITORY, Knobs, Stack, posted_reports

OUT = Path("out") / "bench" / "throughput.json"
ROUND_SECONDS = 300.0
POLL_SECONDS = 0.1
CALM_SECONDS = 2.0  # for things to calm down before the clock starts

KNOBS = Knobs(agent_interval_seconds=10.0, stale_seconds=60.0, unauthenticated_agents=True)

ASKS = ((1, 6), (2, 3), (4, 1))
"""GPUs of a pod, and how often: few and small enough that kube-scheduler alone, which spreads, places all of them."""

WAYS = ("arriving", "waiting")

TANGRAM, NONE, NOTHING = "tangram", "no extender", "do-nothing extender"
ORDERS = ((TANGRAM, NONE, NOTHING), (NOTHING, NONE, TANGRAM), (NONE, TANGRAM, NOTHING))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Pods per second through a real kube-scheduler.")
    parser.add_argument("--nodes", type=int, default=500, help="nodes of 8 GPUs")
    parser.add_argument("--pods", type=int, default=1000, help="pods in a round")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go, as JSON")
    parser.add_argument("--serve-nothing", type=int, default=0, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve_nothing:
        serve_nothing(options.serve_nothing)
        return 0
    console = Console()
    figures = measure(options.nodes, options.pods, options.rounds, console)
    show(figures, console)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(f"written to {options.out}")
    return 0


def measure(nodes: int, pods: int, rounds: int, console: Console) -> dict[str, Any]:
    """Pods per second of every round, in both ways."""
    fleet = [sample_node(f"node-{number:04d}", "8xH100") for number in range(nodes)]
    found: dict[str, Any] = {}
    with Stack(fleet, knobs=KNOBS, agents=posted_reports, form=None) as stack:
        bench = Bench(stack)
        for way in WAYS:
            rates: dict[str, list[float]] = {TANGRAM: [], NONE: [], NOTHING: []}
            cpu: dict[str, dict[str, float]] = {}
            for number in range(rounds):
                for which in ORDERS[number % len(ORDERS)]:
                    rate = bench.round(which, whole_gpu_pods(pods, seed=number), waiting=way == "waiting")
                    rates[which].append(round(rate, 1))
                    cpu[which] = {name: round(ms, 2) for name, ms in bench.cpu_ms.items()}
                    console.print(f"{way}, round {number + 1}, {which}: {rate:.0f} pods/s")
            medians = {which: statistics.median(each) for which, each in rates.items()}
            found[way] = {
                "rounds": rates,
                "median": medians,
                "ratio_to_no_extender": {which: round(medians[which] / medians[NONE], 3) for which in medians},
                "cpu_ms_per_pod_in_the_last_round": cpu,
            }
    return {
        "what": "pods per second through a real kube-scheduler",
        "machine": machine(),
        "nodes": nodes,
        "gpus_per_node": 8,
        "pods_per_round": pods,
        **found,
    }


class Bench:
    """Takes one turn after the other on one Stack."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._nothing_port = free_port()
        self.cpu_ms: dict[str, float] = {}
        """Milliseconds of processor time for each pod, by process, in the last round."""
        stack.service.freeze()
        argv = [sys.executable, "-m", "tests.e2e.throughput", f"--serve-nothing={self._nothing_port}"]
        stack.cluster.processes.start("do-nothing", argv, environment={"PYTHONPATH": str(REPOSITORY)})
        stack.cluster.processes.pause("do-nothing")

    def round(self, which: str, pods: Sequence[KubernetesObject], *, waiting: bool) -> float:
        """Pods per second of one turn; the cluster is empty before and afterwards."""
        processes = self._stack.cluster.processes
        if which == TANGRAM:
            self._stack.service.thaw()
            self._stack.service.wait_ready()
            self._stack.wait_reported()
        elif which == NOTHING:
            processes.resume("do-nothing")
        scheduler = f"{which.replace(' ', '-')}-scheduler"
        self._stack.cluster.start_scheduler(self._configuration(which), name=scheduler, verbosity=0)
        try:
            seconds = self._run(scheduler, pods, waiting=waiting)
            if which == TANGRAM:
                Checker(self._stack.cluster, map(report_of, self._stack.nodes)).check()
        finally:
            self._stack.cluster.kill_scheduler(scheduler)
        if which == TANGRAM:
            self._stack.empty()
            self._stack.service.freeze()
        else:
            self._stack.cluster.delete_all_pods()
            if which == NOTHING:
                processes.pause("do-nothing")
        return len(pods) / seconds

    def _run(self, scheduler: str, pods: Sequence[KubernetesObject], *, waiting: bool) -> float:
        cluster = self._stack.cluster
        if waiting:
            cluster.processes.pause(scheduler)
            cluster.add_pods(pods)
        time.sleep(CALM_SECONDS)
        before = self._cpu_seconds()
        started = time.monotonic()
        if waiting:
            cluster.processes.resume(scheduler)
        else:
            cluster.add_pods(pods)
        query = {"fieldSelector": "spec.nodeName=", "limit": "1"}
        headers = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}  # a look costs little
        while cluster.request("GET", "/api/v1/namespaces/default/pods", params=query, headers=headers)["items"]:
            if time.monotonic() - started > ROUND_SECONDS:
                raise TimeoutError(f"not all pods have a node after {ROUND_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - started
        used = {name: after - before.get(name, 0.0) for name, after in self._cpu_seconds().items()}
        self.cpu_ms = {name: 1000 * cpu / len(pods) for name, cpu in used.items() if cpu > 0.02}
        return seconds

    def _cpu_seconds(self) -> dict[str, float]:
        """What each process has used of the processors so far; this one last, for the agents and the looking."""
        processes = self._stack.cluster.processes
        pids = {name: processes.pid(name) for name in processes.names() if processes.is_running(name)}
        return {name: _cpu_seconds(pid) for name, pid in {**pids, "this bench": os.getpid()}.items()}

    def _configuration(self, which: str) -> dict[str, Any]:
        """The shipped configuration; without its extender; or with one that does nothing."""
        configuration = self._stack.scheduler_configuration("first")
        if which == NONE:
            del configuration["extenders"]
        elif which == NOTHING:
            configuration["extenders"] = [
                {
                    "urlPrefix": f"http://127.0.0.1:{self._nothing_port}",
                    "filterVerb": "filter",
                    "prioritizeVerb": "prioritize",
                    "weight": 1,
                    "nodeCacheCapable": True,
                    "managedResources": configuration["extenders"][0]["managedResources"],
                }
            ]
        return configuration


def whole_gpu_pods(count: int, *, seed: int) -> list[KubernetesObject]:
    """Pods in random order, the same for each of the three."""
    rng = random.Random(seed)
    sizes = rng.choices([ask for ask, _ in ASKS], [weight for _, weight in ASKS], k=count)
    return [gpu_pod(f"pod-{seed}-{number:05d}", {GPU: gpus}) for number, gpus in enumerate(sizes)]


def serve_nothing(port: int) -> None:
    """An extender in FastAPI that lets all nodes pass, with equal scores; kube-scheduler binds by itself."""
    app = FastAPI()

    @app.post("/filter")
    async def filter_nodes(request: Request) -> Response:
        names = orjson.loads(await request.body())["NodeNames"]
        reply = {"NodeNames": names, "FailedNodes": {}, "FailedAndUnresolvableNodes": {}, "Error": ""}
        return Response(orjson.dumps(reply), media_type="application/json")

    @app.post("/prioritize")
    async def prioritize_nodes(request: Request) -> Response:
        names = orjson.loads(await request.body())["NodeNames"]
        return Response(orjson.dumps([{"Host": name, "Score": 0} for name in names]), media_type="application/json")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", loop="uvloop", timeout_keep_alive=120)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine() -> str:
    """Cores and processor, as far as the machine says."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{os.cpu_count()} × {model}, Python {platform.python_version()}"


def show(figures: dict[str, Any], console: Console) -> None:
    """A row for each of the three, in both ways."""
    table = Table(title=f"pods/s, {figures['nodes']} nodes × 8 GPUs, {figures['pods_per_round']} pods a round")
    for title in ("pods are", "kube-scheduler with", "rounds", "median", "ratio", "CPU ms a pod"):
        table.add_column(title)
    for way in WAYS:
        of_way = figures[way]
        for which, rates in of_way["rounds"].items():
            cpu = of_way["cpu_ms_per_pod_in_the_last_round"][which]
            all_rates = " ".join(f"{rate:.0f}" for rate in rates)
            ratio = f"{of_way['ratio_to_no_extender'][which]:.2f}"
            table.add_row(way, which, all_rates, f"{of_way['median'][which]:.0f}", ratio, f"{sum(cpu.values()):.1f}")
    console.print(table)
    for way in WAYS:
        for which, used in figures[way]["cpu_ms_per_pod_in_the_last_round"].items():
            parts = ", ".join(f"{name} {ms:.1f}" for name, ms in sorted(used.items(), key=lambda each: -each[1]))
            console.print(f"CPU ms a pod, {way}, {which}: {parts}")
    console.print(figures["machine"])


if __name__ == "__main__":
    sys.exit(main())
