"""A real `tangram serve` on an inventory file, as a process of its own, for tests that speak HTTP to it."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

START_SECONDS = 60.0


@contextmanager
def serving(folder: Path, samples: str) -> Iterator[str]:
    """The URL of a standalone service that knows these sample nodes."""
    inventory, log = folder / "nodes.json", folder / "serve.log"
    command = [sys.executable, "-m", "app.cli"]
    subprocess.run([*command, "nodes", "--sample", samples, "--out", str(inventory)], check=True, capture_output=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*command, "serve", "--nodes", str(inventory), "--port", str(port)], stdout=sink, stderr=sink
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(15)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/readyz", timeout=1, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"the service was not ready within {START_SECONDS:.0f} s:\n{log.read_text()}")
