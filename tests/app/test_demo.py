"""`tangram demo` as people run it: a process, a page, a table, a file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

COMMAND = [sys.executable, "-m", "app.cli", "demo", "--sample", "8xH100:2,8xA100-mig:2,4xA30-mig:1"]
ENVIRONMENT = {
    **os.environ,
    "COLUMNS": "120",
    "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
}


def test_once_ends_by_itself_and_writes_what_came_of_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [*COMMAND, "--once", "--seconds", "3", "--pods", "60"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Checked apart from the solver" in done.stdout
    said = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert said["wrong"] == []
    assert said["tangram"]["arrived"] == said["first_fit"]["arrived"] == 60
    assert said["tangram"]["placed"] + said["tangram"]["pending"] == 60
    assert set(said["latency_milliseconds"]) == {"filter", "prioritize", "bind"}
    assert sum(each["pods"] for each in said["pending"]) == said["tangram"]["pending"]


def test_stays_with_its_page_until_interrupted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        demo = subprocess.Popen(
            [*COMMAND, "--seconds", "2", "--pods", "300"], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log
        )
        try:
            url = _url(demo, tmp_path / "log", "Pods keep coming and going")
            assert "<title>Tangram</title>" in httpx.get(url, trust_env=False).text
            demo.send_signal(signal.SIGINT)
            assert demo.wait(20) == 0
        finally:
            demo.kill()
            demo.wait()

    assert "Traceback" not in (tmp_path / "log").read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, timeout=2, trust_env=False)


def test_the_service_ends_even_when_the_demo_is_killed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as log:
        demo = subprocess.Popen([*COMMAND, "--seconds", "60"], cwd=tmp_path, env=ENVIRONMENT, stdout=log, stderr=log)
        url = _url(demo, tmp_path / "log", "The page")
        demo.kill()
        demo.wait()

    for _ in range(100):
        try:
            httpx.get(url, timeout=2, trust_env=False)
        except httpx.HTTPError:
            return
        time.sleep(0.1)
    raise AssertionError("the service is still there")


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    """Else it would drive whatever answers there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = subprocess.run(
            [*COMMAND, "--once", "--port", port], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
        )

    assert done.returncode == 1
    assert f"The demo failed: port {port} of 127.0.0.1 is not to be had" in done.stdout


def _url(demo: subprocess.Popen[bytes], log: Path, words: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = log.read_text()
        assert demo.poll() is None, text
        found = re.search(rf"{words}: (http://\S+)", text)
        if found:
            return found[1]
        time.sleep(0.1)
    raise AssertionError(log.read_text())
