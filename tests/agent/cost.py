"""What an agent costs at rest: `python -m tests.agent.cost`, or `make bench-agent`. A measurement, not a test.

A real agent with its child as in the DaemonSet (TLS, a token, a state folder, the default interval) on the fake
library, towards a server that holds requests for orders as the service does, without and with handing devices over
(the kubelet's side is played by this process). It rests; then a few orders come.

    CPU         user and system time of both processes, from the scheduler's own counts, over the time of rest
    memory      at the end of the rest: what both have for themselves, and once what the one that shares more shares
                (the two share the interpreter and its libraries; PSS would be less wherever other Pythons run)
    on the wire bytes of request bodies; requests per minute of rest
    NVML calls  of one quiet look, by the fake's own count
    an order    from the list being there until the report that acknowledges it (slice made, read again) has come

The fake answers in microseconds; a real driver takes longer for some calls, most of which is waiting, not CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.agent.hands import CHECKPOINT
from app.report import Make, OrderList, SliceAt
from solver.samples import sample_node
from tests.agent.conftest import ROOT, Bench
from tests.agent.kubelet.fake import Kubelet, Pods
from tests.fake_nvml.describe import describe
from tests.fake_nvml.fleet import host_proc

SAMPLES = ("8xH100", "8xA100-mig")
HANDS = ("no", "plugin", "observe")
SETTLE_SECONDS = 12.0
"""Before measuring: start, first looks, and one held request."""

TARGET_CPU_PERCENT = 0.5
TARGET_MIB = 80.0
OUT = ROOT / "out/bench/agent.json"

COUNT_CALLS = """
import ctypes, json, pathlib, sys, pynvml
from app.agent.nvml import Nvml
nvml = Nvml(proc=pathlib.Path(sys.argv[1]))
count = lambda: sum(
    ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_calls(name.encode()) for name in pynvml._nvmlGetFunctionPointer_cache
)
counts = [(nvml.read(), count())[1] for _ in range(5)]
print(json.dumps([later - earlier for earlier, later in zip([0] + counts, counts)]))
"""


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in MiB."""

    pss: float
    private: float
    rss: float


@dataclass(frozen=True, slots=True)
class Cost:
    """One sample's line of the table."""

    sample: str
    hand: str
    seconds: float
    cpu_percent: float
    cpu_percent_agent: float
    cpu_percent_child: float
    agent: Memory
    child: Memory
    together_mib: float
    report_bytes_full: int
    report_bytes_changed: int
    beat_bytes: int
    requests_per_minute: float
    reports_at_rest: int
    nvml_calls_first: int
    nvml_calls_quiet: int
    order_seconds: tuple[float, ...]


@dataclass
class Desk:
    """The service's place: takes reports, holds requests for orders, notes sizes and times."""

    url: str = ""
    orders: OrderList | None = None
    came: list[tuple[float, str, int, dict[str, Any]]] = field(default_factory=list)
    moved: threading.Condition = field(default_factory=threading.Condition)

    def take(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "/v1/reports":
            return {"resend": False, "service": "bench"}
        until = time.monotonic() + body["wait_seconds"]
        while self.orders is None or self.orders.version == body["orders"]:
            if not self.moved.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                return {"service": "bench"}
        return {"service": "bench", "orders": self.orders.model_dump()}

    def order(self, orders: OrderList) -> tuple[float, int, dict[str, Any]]:
        """Give a list; how long it took until it was acknowledged, and that report (its size, itself)."""
        with self.moved:
            began = time.monotonic()
            self.orders = orders
            self.moved.notify_all()
            assert self.moved.wait_for(lambda: self._done(orders.version) is not None, 30), "never acknowledged"
            at, _, size, body = self._done(orders.version) or self.came[-1]
        return at - began, size, body

    def _done(self, version: int) -> tuple[float, str, int, dict[str, Any]] | None:
        for one in self.came:
            done = one[3].get("orders")
            if one[1] == "/v1/reports" and done and done["version"] == version:
                return one
        return None


@contextmanager
def service(directory: Path) -> Iterator[Desk]:
    desk = Desk()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two packets: the second would wait 40 ms

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            body = json.loads(raw)
            with desk.moved:
                desk.came.append((time.monotonic(), self.path, len(raw), body))
                desk.moved.notify_all()
                answer = json.dumps(desk.take(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """The agent is ended while it waits."""

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate(directory))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    desk.url = f"https://127.0.0.1:{server.server_port}"
    yield desk
    server.shutdown()
    server.server_close()


def certificate(directory: Path) -> Path:
    """A certificate of the server's own; the agent trusts it as its CA (`ca.pem`)."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tangram")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "server.pem").write_bytes(private + pem)
    (directory / "ca.pem").write_bytes(pem)
    return directory / "server.pem"


def cpu_seconds(pid: int) -> float:
    """Time on a CPU of all threads, as the scheduler counts it (nanoseconds; /proc/<pid>/stat counts in 10 ms)."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    try:
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> Memory:
    kib = {"Pss": 0, "Private_Clean": 0, "Private_Dirty": 0, "Rss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        if name in kib:
            kib[name] = int(value.split()[0])
    return Memory(kib["Pss"] / 1024, (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024, kib["Rss"] / 1024)


@contextmanager
def kubelet(directory: Path) -> Iterator[Path]:
    """The kubelet's two sockets, with an answer at each: forty pods that have nothing of ours."""
    plugins, resources = directory / "device-plugins", directory / "pod-resources"
    plugins.mkdir(parents=True)
    resources.mkdir()
    registry, pods = Kubelet(plugins), Pods(resources / "kubelet.sock")
    (plugins / CHECKPOINT).write_text("{}")
    pods.pods = [("default", f"pod-{number}", {"main": []}) for number in range(40)]
    yield directory
    pods.close()
    registry.close()


def measure(sample: str, seconds: float, hand: str = "no") -> Cost:
    """Start, settle, rest, give orders, end."""
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder)) as desk,
        kubelet(Path(folder) / "kubelet") as kubelet_dir,
    ):
        bench = Bench(Path(folder))
        bench.describe(describe(sample_node("n1", sample)))
        host_proc(bench.proc)
        (bench.directory / "token").write_text("x" * 900)
        files = {
            "--token-file": "token",
            "--ca-file": "ca.pem",
            "--state-dir": "state",
            "--proc": "proc",
            "--sys": "sys",
        }
        options = [word for name, file in files.items() for word in (name, str(bench.directory / file))]
        options += ["--hand", hand, "--kubelet-dir", str(kubelet_dir)]
        agent = subprocess.Popen(
            [sys.executable, "-m", "app.agent", "--node", "n1", "--service", desk.url, *options],
            env=bench.environment,
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        try:
            time.sleep(SETTLE_SECONDS)
            child = int(Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text())
            seen, began = len(desk.came), time.monotonic()
            before = cpu_seconds(agent.pid), cpu_seconds(child)
            time.sleep(seconds)
            rested = time.monotonic() - began
            used = cpu_seconds(agent.pid) - before[0], cpu_seconds(child) - before[1]
            memories = memory(agent.pid), memory(child)
            quiet = desk.came[seen:]
            report = next(one for one in reversed(desk.came) if one[1] == "/v1/reports")
            orders, changed = _orders(desk, report[3])
        finally:
            agent.terminate()
            agent.wait(20)
        calls = _nvml_calls(bench)
    return Cost(
        sample=sample,
        hand=hand,
        seconds=rested,
        cpu_percent=100 * sum(used) / rested,
        cpu_percent_agent=100 * used[0] / rested,
        cpu_percent_child=100 * used[1] / rested,
        agent=memories[0],
        child=memories[1],
        together_mib=sum(one.private for one in memories) + max(one.rss - one.private for one in memories),
        report_bytes_full=report[2],
        report_bytes_changed=changed,
        beat_bytes=max((size for _, path, size, _ in quiet if path == "/v1/orders"), default=0),
        requests_per_minute=60 * len(quiet) / rested,
        reports_at_rest=sum(path == "/v1/reports" for _, path, _, _ in quiet),
        nvml_calls_first=calls[0],
        nvml_calls_quiet=calls[-1],
        order_seconds=orders,
    )


def _orders(desk: Desk, report: dict[str, Any]) -> tuple[tuple[float, ...], int]:
    """Ten lists one after the other, a slice made and removed in turn where there is room for one; else they fail."""
    place = _room(report)
    times, size = [], 0
    for version in range(1, 11):
        make = (Make(gpu=place.gpu, profile=place.profile, start=place.start),) if version % 2 else ()
        remove = () if version % 2 else (place,)
        took, size, _ = desk.order(OrderList(service="bench", version=version, make=make, remove=remove))
        times.append(took)
        time.sleep(0.2)
    return tuple(times), size


def _room(report: dict[str, Any]) -> SliceAt:
    """A free place for a slice of one unit of compute; where no GPU is in MIG mode, one that cannot be made."""
    for gpu in report["gpus"]:
        if gpu["mig"] and gpu["mig"]["enabled"]:
            taken = {unit for i in gpu["mig"]["instances"] for unit in range(i["start"], i["start"] + i["size"])}
            for profile in gpu["mig"]["profiles"]:
                for at in profile["placements"]:
                    units = set(range(at["start"], at["start"] + at["size"]))
                    if profile["compute_slices"] == 1 and not taken & units:
                        return SliceAt(gpu=gpu["uuid"], profile=profile["name"], start=at["start"])
    return SliceAt(gpu=report["gpus"][0]["uuid"], profile="1g", start=0)


def _nvml_calls(bench: Bench) -> list[int]:
    """Of five looks in one process, each look's."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT_CALLS, str(bench.proc)],
        env=bench.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    counts: list[int] = json.loads(done.stdout)
    return counts


def table(costs: list[Cost]) -> str:
    """As Markdown."""
    lines = [
        "| node | CPU, % of a core (agent + child) | memory together, MiB | private (agent + child) | PSS | RSS | "
        "report bytes full, changed | beat bytes | requests/min | NVML calls first, quiet | order to report, ms |",
        "|" + "---|" * 11,
    ]
    for cost in costs:
        times = sorted(1000 * seconds for seconds in cost.order_seconds)
        lines.append(
            f"| {cost.sample}, --hand={cost.hand} "
            f"| {cost.cpu_percent:.2f} ({cost.cpu_percent_agent:.2f} + {cost.cpu_percent_child:.2f}) "
            f"| {cost.together_mib:.1f} "
            f"| {cost.agent.private:.1f} + {cost.child.private:.1f} "
            f"| {cost.agent.pss:.1f} + {cost.child.pss:.1f} "
            f"| {cost.agent.rss:.1f} + {cost.child.rss:.1f} "
            f"| {cost.report_bytes_full:,}, {cost.report_bytes_changed:,} "
            f"| {cost.beat_bytes} "
            f"| {cost.requests_per_minute:.1f} "
            f"| {cost.nvml_calls_first:,}, {cost.nvml_calls_quiet:,} "
            f"| {times[len(times) // 2]:.0f} (at most {times[-1]:.0f}) |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure, print, write; the exit status says whether the targets are held."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rest for each sample")
    parser.add_argument("--sample", action="append", choices=SAMPLES, help="only this one (default: all)")
    parser.add_argument("--hand", action="append", choices=HANDS, help="only so (default: all ways)")
    options = parser.parse_args()
    ways = [(sample, hand) for hand in options.hand or HANDS for sample in options.sample or SAMPLES]
    costs = [measure(sample, options.seconds, hand) for sample, hand in ways]
    print(table(costs))
    held = all(cost.cpu_percent < TARGET_CPU_PERCENT and cost.together_mib < TARGET_MIB for cost in costs)
    print(f"target: under {TARGET_CPU_PERCENT} % of a core and {TARGET_MIB:.0f} MiB: {'held' if held else 'NOT held'}")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    OUT.write_text(json.dumps({"machine": machine, "costs": [asdict(cost) for cost in costs]}, indent=2) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
