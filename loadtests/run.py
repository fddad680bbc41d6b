"""`make load`: a standalone service on sample nodes, and locust against it for a bounded time, on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

NODES = os.environ.get("LOAD_NODES", "8xH100:400,8xA100-mig:100")
SECONDS = os.environ.get("LOAD_SECONDS", "30")
USERS = os.environ.get("LOAD_USERS", "1")
TANGRAM = [sys.executable, "-m", "app.cli"]


def main() -> int:
    """Start, wait until ready, drive, stop; locust's exit status."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        nodes = Path(folder) / "nodes.json"
        subprocess.run([*TANGRAM, "nodes", "--sample", NODES, "--out", str(nodes)], check=True)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        service = subprocess.Popen([*TANGRAM, "serve", "--nodes", str(nodes), "--port", str(port)])
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(service, url)
            print(f"{NODES}, {USERS} user(s), {SECONDS} s against {url}", flush=True)
            drive = ["--headless", "-u", USERS, "-r", USERS, "-t", f"{SECONDS}s", "--only-summary", "--host", url]
            return subprocess.run([sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", *drive]).returncode
        finally:
            service.terminate()
            service.wait(timeout=30)


def _wait_until_ready(service: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise SystemExit("the service did not start")
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit("the service did not become ready within a minute")


if __name__ == "__main__":
    sys.exit(main())
