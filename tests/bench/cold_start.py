"""Cold start: how long until a service is ready in a cluster that is full already, and until it knows every node.

    python -m tests.bench.cold_start [--nodes 5000] [--pods 40000] [--mix whole] [--json out/bench/cold_start.json]

Nodes and pods with placements are on a real API server before `tangram serve` is started; simulated agents knock all
the while, as they would after the service's node has failed. The clock starts with the process:

    ready      /readyz is 200: the Lease is ours, and all pods and nodes were listed
    reported   every node has reported and is offered
    answered   a filter with all names has been answered, and none is refused for want of a report
"""

from __future__ import annotations

import argparse
import ssl
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import orjson
from rich.console import Console

from app.driver import PodSpec, args_body, pod_object
from tests.bench.agents import MIXES
from tests.bench.figures import Target, show_targets, write
from tests.bench.fleet import (
    Memory,
    blocked,
    control_plane,
    held_pods,
    pid_of,
    samples,
    show_blocked,
    write_to_etcd,
)
from tests.bench.machine import cpu_seconds, machine
from tests.e2e.cluster import ControlPlane
from tests.e2e.stack import GPU, MIG, Service, Stack

OUT = Path("out") / "bench" / "cold_start.json"
LONGEST_SECONDS = 120.0
POLL_SECONDS = 0.05
READY_TARGET_SECONDS = 15.0
MEMORY_TARGET_MIB = 800.0
BLOCKED_TARGET_MS = 20.0
CALM_SECONDS = 12.0  # then every agent has said "nothing new" once, and the chores have come round
FILTERS = 50
QUICK_NODES, QUICK_PODS = 500, 4000

Json = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Cold start in a full cluster.")
    parser.add_argument("--nodes", type=int, default=5000, help="nodes of 8 GPUs")
    parser.add_argument("--pods", type=int, default=40_000, help="pods that hold devices")
    parser.add_argument("--mix", choices=MIXES, default="whole", help="kinds of nodes")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_NODES} nodes and {QUICK_PODS} pods")
    parser.add_argument("--json", type=Path, default=OUT, help="where the figures go")
    parser.add_argument("--tell-blocked", type=float, default=0.0, metavar="SECONDS", help="log what blocks the loop")
    options = parser.parse_args(argv)
    if options.quick:
        options.nodes, options.pods = QUICK_NODES, QUICK_PODS
    console = Console()
    found = measure(options.mix, options.nodes, options.pods, console, tell_blocked_seconds=options.tell_blocked)
    show_targets(targets(found), console)
    write(options.json, found, targets(found))
    return 0


def measure(mix: str, nodes: int, pods: int, console: Console, *, tell_blocked_seconds: float = 0.0) -> Json:
    """One cold start."""
    about = machine()
    with control_plane(mix, nodes, tell_blocked_seconds=tell_blocked_seconds) as stack:
        assert isinstance(stack.cluster, ControlPlane)
        held = held_pods(stack.cluster, stack.nodes, pods)
        write_to_etcd(stack.cluster, held)
        console.print(
            f"{nodes} nodes, {len(held)} held pods of {len(orjson.dumps(held[-1]))} bytes are on the API server"
        )
        began = time.monotonic()
        stack.service.start()
        with Memory(pid_of(stack)) as memory:
            ready = _until(stack, lambda service: service.readiness()["ready"]) - began
            cpu = cpu_seconds(pid_of(stack))
            console.print(f"ready after {ready:.1f} s, with {memory.now()['service']:.0f} MiB")
            first = stack.service.metric('tangram_nodes{state="offered"}')
            reported = _until(stack, lambda service: service.metric('tangram_nodes{state="offered"}') >= nodes) - began
            answered, milliseconds = _first_filters(stack, mix)
            console.print(f"all nodes offered after {reported:.1f} s, filter answered {answered - began:.1f} s")
            time.sleep(CALM_SECONDS)
            at_rest = memory.now()
        since_start = blocked_since_start(stack.service)
        totals = stack.service.totals()
        if tell_blocked_seconds:
            show_blocked(stack, console)
    return {
        "what": "cold start in a full cluster",
        "machine": about,
        "mix": mix,
        "nodes": nodes,
        "held_pods": len(held),
        "pod_bytes": len(orjson.dumps(held[-1])),
        "ready_seconds": round(ready, 2),
        "cpu_seconds_when_ready": round(cpu, 2),
        "offered_when_ready": first,
        "reported_seconds": round(reported, 2),
        "answered_seconds": round(answered - began, 2),
        "filter_ms": milliseconds,
        "memory_mib": {"at_rest": {name: round(mib) for name, mib in at_rest.items()}, "peak": memory.peak},
        "memory_course": memory.thinned(),
        "blocked": since_start,
        "pods_held_in_the_ledger": totals["pods_held"],
    }


def _until(stack: Stack, look: Any) -> float:
    """When it was true first."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not look(stack.service):
        if time.monotonic() > deadline or not stack.cluster.processes.is_running(stack.service.name):
            raise stack.cluster.processes.failed(stack.service.name, "did not get so far")
        time.sleep(POLL_SECONDS)
    return time.monotonic()


def _first_filters(stack: Stack, mix: str) -> tuple[float, list[float]]:
    """When the first filter for all names was answered well, and how long it and the next ones took."""
    ask = ((GPU, 1),) if mix == "whole" else ((f"{MIG}1g.10gb", 1),)
    names = [node.name for node in stack.nodes]
    files = stack.certificates
    context = ssl.create_default_context(cafile=str(files / "ca.crt"))
    context.load_cert_chain(files / "client.crt", files / "client.key")
    took: list[float] = []
    answered = 0.0
    with httpx.Client(verify=context, timeout=20, trust_env=False) as client:
        for number in range(FILTERS):
            pod = pod_object(PodSpec(f"asks-{number}", f"asks-{number}", ask))
            began = time.monotonic()
            body = args_body(pod, names)
            reply = client.post(f"https://127.0.0.1:{stack.service.extender_port}/filter", content=body)
            took.append(round(1000 * (time.monotonic() - began), 2))
            said = reply.raise_for_status().json()
            unknown = [why for why in (said.get("FailedNodes") or {}).values() if "no agent" in why]
            assert not said.get("Error"), said["Error"]
            assert not unknown, unknown[0]
            answered = answered or time.monotonic()
    return answered, took


def blocked_since_start(service: Service) -> Json:
    """How long the loop was blocked, from its start."""
    found = samples(service)
    now = blocked(found)
    nothing = type(now)({clock: dict.fromkeys(counts, 0.0) for clock, counts in now.counts.items()}, now.longest_ms)
    longest = {
        sample.labels["clock"]: 1000 * sample.value
        for sample in found
        if sample.name == "tangram_loop_blocked_longest_seconds" and sample.labels["since"] == "start"
    }
    return type(now)(now.counts, longest).since(nothing)


def targets(found: Json) -> list[Target]:
    """What was promised."""
    longest = found["blocked"]["own"]["longest_ms"]
    return [
        Target("cold_start_ready", "cold start: ready", READY_TARGET_SECONDS, found["ready_seconds"], "s"),
        Target("cold_start_memory", "peak memory", MEMORY_TARGET_MIB, found["memory_mib"]["peak"]["service"], "MiB"),
        Target("cold_start_blocked", "event loop blocked by its own work", BLOCKED_TARGET_MS, longest, "ms"),
    ]


if __name__ == "__main__":
    sys.exit(main())
