"""`make loadtest`: a standalone service and an echo on loopback, driven for a bounded time; tables, files, exit status.

    alone      KubeScheduler and Echo in turns, nothing else: what a call costs
    agents     the same while agents report at full rate, from a process of their own: what their reports cost it
    arrivals   KubeScheduler and Tenants (with --arrivals): what a pod waits

Every part is a locust of its own, so that one part's users do not hold up another's clock.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from loadtests.summary import console, table_of

Json = dict[str, Any]

READY_SECONDS = 120.0
STOP_SECONDS = 30.0
SPARE_SECONDS = 60.0  # for locust to start, to learn the nodes and to write its report
AGENTS_PER_USER = 100
AT_REST = 0.1  # seconds of CPU in a second
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the test: its name, how much of the time it takes, and its locusts by name: users and options."""

    name: str
    share: float
    locusts: dict[str, list[str]]


def main(words: Sequence[str] | None = None) -> int:
    """Start, drive, stop, tell."""
    options = _options(words)
    paper = console()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        nodes = Path(folder) / "nodes.json"
        _tangram("nodes", "--sample", options.nodes, "--out", str(nodes))
        count = len(orjson.loads(nodes.read_bytes()))
        port, echo_port = _free_ports(2)
        serve = [sys.executable, "-m", "app.cli", "serve", "--nodes", str(nodes), "--port", str(port)]
        service = stack.enter_context(_running(serve, options.out / "service.log"))
        echo = [sys.executable, "-m", "loadtests.echo", "--port", str(echo_port)]
        stack.enter_context(_running(echo, options.out / "echo.log"))
        url, echo_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{echo_port}"
        for each in (url, echo_url):
            _wait_until_ready(each, service)
        _wait_until_at_rest(service.pid)
        paper.print(f"{count} nodes ({options.nodes}), {options.seconds} s against {url}", markup=False)
        parts = _parts(options, url=url, echo=echo_url, nodes=nodes, count=count)
        told = [summary for part in parts for summary in _play(part, options, service, paper)]
    return _tell(told, options, paper)


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--nodes", default="8xH100:4000,8xA100-mig:1000", help="the fleet, as in `tangram nodes`")
    parser.add_argument("--seconds", type=int, default=40, help="all parts together")
    parser.add_argument("--mix", default="mixed", help="whole, mig, shares, mixed, or RESOURCE=COUNT:WEIGHT,...")
    parser.add_argument("--trace", default="", help="pods of this openb CSV file instead")
    parser.add_argument("--sizes", default="100,500,all", help="names in a request, in turns")
    parser.add_argument("--think", default="0.01", help="mean pause of the kube-scheduler between two pods, seconds")
    parser.add_argument("--every", default="10", help="each agent says something once in so many seconds")
    parser.add_argument("--arrivals", default="0", help="pods a second in a third part, an open loop (0: none)")
    parser.add_argument("--holding", default="20", help="how long such a pod stays, on average, seconds")
    parser.add_argument("--out", type=Path, default=Path("out/loadtest"), help="folder of everything that is written")
    return parser.parse_args(words)


def _parts(options: argparse.Namespace, *, url: str, echo: str, nodes: Path, count: int) -> list[Part]:
    pods = ["--host", url, "--mix", options.mix, "--trace", options.trace, "--sizes", options.sizes]
    kube_scheduler = ["KubeScheduler", "Echo", *pods, "--echo", echo, "--think", options.think, "-u", "2", "-r", "2"]
    users = str(-(-count // AGENTS_PER_USER))
    reports = ["--host", url, "--agents-file", str(nodes), "--agents-per-user", str(AGENTS_PER_USER)]
    agents = ["Agents", *reports, "--agents-every", options.every, "-u", users, "-r", users]
    rate = ["--arrivals-per-second", options.arrivals, "--holding", options.holding, "--think", "0"]
    parts = [
        Part("alone", 0.3, {"alone": kube_scheduler}),
        Part("agents", 0.7, {"beside agents": kube_scheduler, "agents": agents}),
    ]
    if float(options.arrivals):
        arrivals = ["KubeScheduler", "Tenant", *pods, *rate, "-u", "2", "-r", "2"]
        parts.append(Part("arrivals", 0.5, {"arrivals": arrivals}))
    whole = sum(part.share for part in parts)
    return [Part(part.name, part.share / whole, part.locusts) for part in parts]


def _play(part: Part, options: argparse.Namespace, service: subprocess.Popen[bytes], paper: Console) -> Iterator[Json]:
    """Its locusts side by side; what each has summed up."""
    seconds = max(2, round(options.seconds * part.share))
    before = _cpu_seconds(service.pid)
    with ExitStack() as stack:
        drivers = {
            name: stack.enter_context(
                _running(_locust(name, words, seconds, options.out), _file(options.out, name, "log"))
            )
            for name, words in part.locusts.items()
        }
        for driver in drivers.values():
            driver.wait(timeout=seconds + SPARE_SECONDS)
    used = _cpu_seconds(service.pid) - before
    for name, driver in drivers.items():
        summary = _summary_of(name, driver.returncode, options.out)
        summary["service_cpu_share"] = round(used / seconds, 3)
        summary["service_mib"] = _peak_mib(service.pid)
        late = summary.get("driver_late", {}).get("p90_ms", 0.0)
        title = f"{name}, {seconds} s, milliseconds; locust itself was late by {late:.1f} (p90)"
        paper.print(table_of(title, summary["rows"]))
        yield summary


def _locust(name: str, words: Sequence[str], seconds: int, out: Path) -> list[str]:
    summary = _file(out, name, "json")
    summary.unlink(missing_ok=True)
    html, csv = str(_file(out, name, "html")), str(_file(out, name, "csv").with_suffix(""))
    drive = ["--headless", "--only-summary", "-t", f"{seconds}s", "--html", html, "--csv", csv]
    return [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", *words, *drive, "--summary", str(summary)]


def _summary_of(name: str, status: int, out: Path) -> Json:
    file = _file(out, name, "json")
    if not file.exists():
        log = _file(out, name, "log")
        words = log.read_text(errors="replace").splitlines()[-3:]
        return {"name": name, "rows": [], "failures": [f"no summary, exit status {status}, see {log}: {words}"]}
    summary: Json = json.loads(file.read_text())
    if status and not summary["failures"]:
        summary["failures"] = [f"exit status {status}"]
    return {"name": name, **summary}


def _tell(told: Sequence[Json], options: argparse.Namespace, paper: Console) -> int:
    failures = [f"{part['name']}: {words}" for part in told for words in part["failures"]]
    given = {name: str(value) for name, value in vars(options).items()}
    whole = {"schema": 1, "options": given, "cores": os.cpu_count(), "parts": told, "failures": failures}
    (options.out / "summary.json").write_text(json.dumps(whole, indent=1) + "\n")
    for words in failures:
        paper.print(f"FAILED: {words}", markup=False)
    if told and "service_mib" in told[-1]:
        paper.print(f"the service had at most {told[-1]['service_mib']} MiB; every part's files are in {options.out}")
    return 1 if failures else 0


def _file(out: Path, name: str, kind: str) -> Path:
    return out / f"{name.replace(' ', '-')}.{kind}"


def _tangram(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "app.cli", *words], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def _running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process for as long as it is needed."""
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _wait_until_ready(url: str, service: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise SystemExit("the service did not start: see service.log")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"{url} was not ready within {READY_SECONDS:.0f} s")


def _wait_until_at_rest(pid: int) -> None:
    """After its start the planning process works out value tables, on a core that would be missing in the figures."""
    deadline = time.monotonic() + READY_SECONDS
    before = float("-inf")
    while (used := sum(map(_cpu_seconds, [pid, *_children(pid)]))) - before > AT_REST and time.monotonic() < deadline:
        before = used
        time.sleep(1)


def _cpu_seconds(pid: int) -> float:
    """What the process has used so far, all threads, its children left out."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def _children(pid: int) -> list[int]:
    """Of all its threads; some may have begun a moment ago, so there is nothing to rely on."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def _peak_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended, too
    sys.exit(main())
