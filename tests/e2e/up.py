"""`make cluster`: Tangram on a real control plane on this machine, for kubectl by hand, until Ctrl-C.

The same Stack as the end-to-end tests': etcd, kube-apiserver, kube-controller-manager, KWOK nodes, a real agent
for each node, `tangram serve`, and kube-scheduler in both shipped forms.
"""

from __future__ import annotations

import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from solver.samples import parse_samples
from tests.e2e.processes import ProcessFailed
from tests.e2e.stack import REPOSITORY, Knobs, Stack
from tests.e2e.toolchain import BuildFailed

FLEET = "8xH100:3,8xH100-mig2:2,8xA100-mig:2,4xH100NVL:1,8xV100:1,4xL4:2,2xA30-mig:1"
PAGE_PORT = 8080
SECOND_SCHEDULER = "tangram-scheduler"
KNOBS = Knobs(agent_interval_seconds=2.0, stale_seconds=10.0, orphan_seconds=20.0, patience=0.2)


def main() -> int:
    """Bring everything up, say what there is, wait, take everything down."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _once_then_ignore(stop))
    started = time.monotonic()
    print("starting the control plane, nodes, agents, Tangram and kube-scheduler ...", flush=True)
    try:
        with Stack(parse_samples(FLEET), knobs=KNOBS, port=_free_or_any(PAGE_PORT)) as stack:
            stack.start_scheduler("second", name=SECOND_SCHEDULER)
            print(_words(stack, time.monotonic() - started), flush=True)
            _wait(stack, stop)
            print("taking everything down ...", flush=True)
    except KeyboardInterrupt:
        pass
    except (BuildFailed, ProcessFailed, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print("all gone", flush=True)
    return 0


def _once_then_ignore(stop: threading.Event) -> Callable[[int, FrameType | None], None]:
    """The first Ctrl-C ends us wherever we are; further ones must not interrupt the clean-up."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not stop.is_set():
            stop.set()
            raise KeyboardInterrupt

    return handle


def _wait(stack: Stack, stop: threading.Event) -> None:
    """Until Ctrl-C, or until something that must run has ended."""
    try:
        while not stop.wait(1.0):
            for name in stack.cluster.processes.names():
                if not stack.cluster.processes.is_running(name):
                    raise stack.cluster.processes.failed(name, "ended by itself")
    except KeyboardInterrupt:
        print(flush=True)


def _words(stack: Stack, seconds: float) -> str:
    """What runs where, and what to try."""
    kubectl = _kubectl(stack)
    samples = Path("manifests/samples") if Path.cwd() == REPOSITORY else REPOSITORY / "manifests" / "samples"
    nodes: dict[str, int] = {}
    for node in stack.nodes:
        kind = node.name.rpartition("-")[0]
        nodes[kind] = nodes.get(kind, 0) + 1
    here = " ".join(shlex.quote(part) for part in (sys.executable, "-m", "app.cli"))
    return f"""
Up after {seconds:.0f} s.

  {"API server":<16}{stack.cluster.api_url}
  {"page":<16}{stack.service.url}/
  {"extender":<16}https://127.0.0.1:{stack.service.extender_port} (client certificates in {stack.certificates})
  {"agents":<16}https://127.0.0.1:{stack.service.agent_port} (each with its own pod's token)
  {"kube-scheduler":<16}two: `default-scheduler` (the first form), and `tangram` (the second: schedulerName: tangram)
  {"nodes":<16}{", ".join(f"{count} × {kind}" for kind, count in nodes.items())}; KWOK plays their kubelets,
  {"":<16}and each has a real agent that reads a library which imitates NVML
  {"logs":<16}{stack.cluster.directory}

In another terminal:

  export KUBECONFIG={stack.cluster.kubeconfig}
  {kubectl} get nodes
  {kubectl} apply -k {samples}
  {kubectl} get pods -o wide
  {kubectl} get pod mig-half -o yaml | grep tangram.gpu/placement
  TANGRAM_URL={stack.service.url} {here} cluster

Ctrl-C takes it all down."""


def _kubectl(stack: Stack) -> Path:
    """A command of that name for this cluster's directory: the binary is kubectl and more."""
    binary, *_ = stack.cluster.kubectl_command()
    script = stack.cluster.directory / "kubectl"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(binary)} kubectl "$@"\n')
    script.chmod(0o755)
    return script


def _free_or_any(port: int) -> int:
    """That port if nobody listens on it, else 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return 0
    return port


if __name__ == "__main__":
    sys.exit(main())
