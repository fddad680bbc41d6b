"""Worlds for the agent's tests: a description file, the real pynvml and the real .so in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.report import NodeReport
from tests.fake_nvml.build import build
from tests.fake_nvml.control import Control
from tests.fake_nvml.describe import NodeDescription

ROOT = Path(__file__).resolve().parents[2]

PYNVML = """
import ctypes, json, os, sys, time
import pynvml
from ctypes import byref, c_uint
from pynvml import *

def code(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except pynvml.NVMLError as error:
        return error.value
    return 0

def device(index=0):
    return nvmlDeviceGetHandleByIndex(index)

def make(profile, start, size, index=0):
    place = c_nvmlGpuInstancePlacement_t(start, size)
    return nvmlDeviceCreateGpuInstanceWithPlacement(device(index), profile, byref(place))

def fill(gi, slices):
    ci = nvmlGpuInstanceCreateComputeInstance(gi, {1: 0, 2: 1, 3: 2, 4: 3, 7: 4}[slices])
    return ci, nvmlDeviceGetUUID(nvmlComputeInstanceGetInfo(ci).device)

def listed(index=0):
    found = []
    for number in range(18):
        try:
            profile = nvmlDeviceGetGpuInstanceProfileInfo(device(index), number)
        except pynvml.NVMLError:
            continue
        array, count = (c_nvmlGpuInstance_t * 32)(), c_uint(32)
        nvmlDeviceGetGpuInstances(device(index), profile.id, array, byref(count))
        for i in range(count.value):
            info = nvmlGpuInstanceGetInfo(array[i])
            found.append([info.profileId, info.placement.start, info.placement.size])
    return sorted(found)

def migs(index=0):
    found = {}
    for i in range(nvmlDeviceGetMaxMigDeviceCount(device(index))):
        try:
            found[i] = nvmlDeviceGetUUID(nvmlDeviceGetMigDeviceHandleByIndex(device(index), i))
        except pynvml.NVMLError:
            pass
    return found

nvmlInit()
"""
"""What tests run in processes of their own begin with: short words for pynvml's long ones."""


SESSION = """
print("null", flush=True)
for line in sys.stdin:
    result = None
    exec(json.loads(line))
    print(json.dumps(result), flush=True)
"""


@dataclass
class Session:
    """A Python process with NVML open."""

    process: subprocess.Popen[str]

    def __call__(self, code: str) -> Any:
        """Run this code there; what it assigns to `result` comes back. Names stay from call to call."""
        self.tell(code)
        return self.answer()

    def tell(self, code: str) -> None:
        """Send code without waiting for its end."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The result of what was told; None where the process has ended instead."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


@dataclass
class Bench:
    """A described node and ways to run programs on it. The library is found by the loader, as on a GPU node."""

    directory: Path
    without: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return self.directory / "node.nvml"

    @property
    def proc(self) -> Path:
        return self.directory / "proc"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "LD_LIBRARY_PATH": str(build(self.without)), "TANGRAM_FAKE_NVML": str(self.file)}

    @property
    def control(self) -> Control:
        return Control(self.file)

    def describe(self, description: NodeDescription) -> None:
        description.write(self.file)

    def pynvml(self, code: str) -> Any:
        """As `python`, with NVML open and short words for it."""
        return self.python(PYNVML + code)

    def python(self, code: str, *, check: bool = True) -> Any:
        """Run code in a fresh Python; what it assigns to `result` comes back through JSON."""
        program = f"import json, pynvml\n{code}\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-c", program], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        if check:
            assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A process that stays and does what it is told, among others that do the same."""
        process = subprocess.Popen(
            [sys.executable, "-c", PYNVML + SESSION],
            env=self.environment,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            session = Session(process)
            session.answer()  # NVML is open
            yield session
        finally:
            process.kill()
            process.communicate()

    def report(self, description: NodeDescription | None = None) -> NodeReport:
        """What `--once` prints (through the real child process)."""
        if description is not None:
            self.describe(description)
        roots = ["--proc", str(self.proc), "--sys", str(self.directory / "sys")]
        done = subprocess.run(
            [sys.executable, "-m", "app.agent", "--once", "--node", "n1", *roots],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return NodeReport.model_validate_json(done.stdout)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@dataclass
class Received:
    """One request that came in."""

    body: dict[str, Any]
    size: int
    authorization: str | None


@dataclass
class Post:
    """A tiny real HTTP server in the service's place. `answers` are given first, each once; then "thank you"."""

    url: str = ""
    received: list[Received] = field(default_factory=list)
    answers: list[tuple[int, Any]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, count: int, *, timeout: float = 20.0) -> list[Received]:
        """The first `count` requests, waiting for them."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.received) >= count, timeout), f"only {self.received}"
            return list(self.received)

    def wait(self, condition: Any, *, timeout: float = 20.0) -> Received:
        """The first request that fulfils the condition, waiting for it."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: any(map(condition, self.received)), timeout), "never came"
            return next(request for request in self.received if condition(request))

    def forget(self) -> None:
        with self.arrived:
            self.received.clear()


@pytest.fixture
def post() -> Iterator[Post]:
    post = Post()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/reports"
            with post.arrived:
                post.received.append(Received(json.loads(raw), len(raw), self.headers.get("Authorization")))
                status, answer = post.answers.pop(0) if post.answers else (200, {"resend": False})
                post.arrived.notify_all()
            body = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """An agent that a test killed resets its connection."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    post.url = f"http://127.0.0.1:{server.server_port}"
    yield post
    server.shutdown()
    server.server_close()
    thread.join()
