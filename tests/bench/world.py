"""The fleet that the service is measured on, and the processes that are measured.

Nodes of eight GPUs: half of them with whole GPUs, three in ten all in MIG mode (two geometries), two in ten half and
half. They are half full by pods of all kinds, so that states vary. All of it comes from a seed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from app.driver import PodSpec, args_body, binding_body, pod_object
from app.report import NodeReport
from app.settings import Settings
from app.simulate import report_of
from solver.samples import sample_node

KINDS = ("8xH100",) * 5 + ("8xA100-mig",) * 2 + ("8xH100-mig",) + ("8xH100-mig4",) * 2
"""Of ten nodes."""

GEOMETRIES = 2
"""Different boards in MIG mode among them, each with a value table."""

SETTLE_SECONDS = 3.0
"""After the last value table, for the prices of all nodes to be made anew."""

GPU, SHARE = "nvidia.com/gpu", "tangram.gpu/share"

ASKS: dict[str, tuple[str, int]] = {
    "1 GPU": (GPU, 1),
    "2 GPUs": (GPU, 2),
    "4 GPUs": (GPU, 4),
    "8 GPUs": (GPU, 8),
    "1g.10gb": ("nvidia.com/mig-1g.10gb", 1),
    "2g.20gb": ("nvidia.com/mig-2g.20gb", 1),
    "3g.40gb": ("nvidia.com/mig-3g.40gb", 1),
    "20 GiB share": (SHARE, 20),
}
"""The kinds of demand that are measured."""

HELD = ("1 GPU", "1 GPU", "2 GPUs", "4 GPUs", "1g.10gb", "1g.10gb", "2g.20gb", "3g.40gb", "20 GiB share")
"""What the pods ask for that are there already, each entry equally often."""

MOST_HELD = 6
"""Tries of pods to put on a node: from none to so many, about half of which fit."""

START_SECONDS = 300.0
PR_SET_PDEATHSIG = 1


def reports_of(nodes: int, *, seed: int = 1) -> list[NodeReport]:
    """What the agents of the fleet say."""
    kinds = [KINDS[i % len(KINDS)] for i in range(nodes)]
    random.Random(seed).shuffle(kinds)
    return [report_of(sample_node(f"node-{i:05d}", kind)) for i, kind in enumerate(kinds)]


def write_inventory(reports: Sequence[NodeReport], path: Path) -> None:
    """The file that `tangram serve --nodes` reads."""
    path.write_text("[" + ",\n".join(report.model_dump_json(by_alias=True) for report in reports) + "]\n")


def new_pod(rng: random.Random, ask: str) -> PodSpec:
    """A pod that asks for one of ASKS."""
    uid = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return PodSpec(name=f"pod-{uid[:8]}", uid=uid, resources=(ASKS[ask],), token=uid[:5])


class Asker(Protocol):
    """The service, however it is reached; `nanoseconds` is what the last request took."""

    nanoseconds: int

    def post(self, path: str, body: bytes) -> bytes:
        """The reply to a verb."""

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body of anything else."""


def fill(client: Asker, names: Iterable[str], *, seed: int = 1, most: int = MOST_HELD) -> int:
    """Pods on every node, as kube-scheduler binds them where one node is left; how many there are then."""
    rng = random.Random(seed)
    bound = 0
    for name in names:
        for _ in range(rng.randint(0, most)):
            pod = new_pod(rng, rng.choice(HELD))
            fits = f'"NodeNames":["{name}"]'.encode() in client.post("/filter", args_body(pod_object(pod), [name]))
            if fits and client.post("/bind", binding_body(pod, name)) == b'{"Error":""}':
                bound += 1
            else:
                client.ask("DELETE", f"/v1/pods/{pod.uid}")
    return bound


# --- processes ---


@dataclass(frozen=True, slots=True)
class Server:
    """A process of ours that listens on loopback."""

    pid: int
    port: int


@contextlib.contextmanager
def service(inventory: Path, *, log: Path, most_nodes: int | None = None, planning: bool = True) -> Iterator[Server]:
    """`tangram serve` on this inventory, ready; standalone. `most_nodes` None: as shipped."""
    port = free_port()
    command = [sys.executable, "-m", "app.cli", "serve", "--nodes", str(inventory), "--port", str(port)]
    if most_nodes is not None and knows_most_nodes():
        command += ["--most-nodes", str(most_nodes)]
    if not planning:
        command += ["--no-planning"]
    with process(command, log=log) as started:
        _wait_until_settled(GEOMETRIES if planning else 0, f"http://127.0.0.1:{port}/metrics", started, log)
        yield Server(started.pid, port)


@contextlib.contextmanager
def echo(*, log: Path) -> Iterator[Server]:
    """`tests.bench.echo`, listening."""
    port = free_port()
    with process([sys.executable, "-m", "tests.bench.echo", "--port", str(port)], log=log) as started:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), contextlib.closing(socket.create_connection(("127.0.0.1", port), 1)):
                break
            time.sleep(0.05)
        yield Server(started.pid, port)


@contextlib.contextmanager
def process(command: Sequence[str], *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of ours, ended with the block."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TANGRAM_")}
    with (
        log.open("ab") as sink,
        subprocess.Popen(command, stdout=sink, stderr=sink, env=clean, preexec_fn=end_with_parent) as started,
    ):
        try:
            yield started
        finally:
            started.terminate()
            try:
                started.wait(30)
            except subprocess.TimeoutExpired:
                started.kill()


def end_with_parent() -> None:
    """In a child: have the kernel end it should its parent be killed without a last word (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def knows_most_nodes() -> bool:
    """Whether this Tangram can return only the best nodes from filter."""
    return "most_nodes" in Settings.model_fields


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_settled(tables: int, url: str, started: subprocess.Popen[bytes], log: Path) -> None:
    """Until it is ready and the planner has solved so many value tables, which takes it a core for seconds."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and started.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2) as answer:
            said = answer.read().decode()
            if _metric(said, "tangram_ready") and _metric(said, "tangram_value_tables") >= tables:
                time.sleep(SETTLE_SECONDS if tables else 0)
                return
        time.sleep(0.2)
    raise SystemExit(f"not ready: {url}; its last words:\n{log.read_text(errors='replace')[-2000:]}")


def _metric(exposition: str, name: str) -> float:
    """A gauge with one value; 0 where there is none."""
    lines = (line for line in exposition.splitlines() if line.startswith(f"{name}{{"))
    return float(next(lines, "0").rpartition(" ")[2])
