"""Worlds for the agent's tests: a description file, the real pynvml and the real .so in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.report import NodeReport
from tests.fake_nvml.build import build
from tests.fake_nvml.describe import NodeDescription

ROOT = Path(__file__).resolve().parents[2]


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

    def describe(self, description: NodeDescription) -> None:
        description.write(self.file)

    def python(self, code: str, *, check: bool = True) -> Any:
        """Run code in a fresh Python; what it assigns to `result` comes back through JSON."""
        program = f"import json, pynvml\n{code}\nprint(json.dumps(result))"
        done = subprocess.run(
            [sys.executable, "-c", program], env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        if check:
            assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

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
