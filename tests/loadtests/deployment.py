"""A deployment to drive: answers as Tangram does, decides nothing, remembers every call. And locust, run against it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

ROOT = Path(__file__).parents[2]
NAMES = [f"n{number:02d}" for number in range(12)]


@dataclass(frozen=True)
class Call:
    method: str
    path: str
    headers: dict[str, str]
    query: dict[str, str]
    body: Any


@dataclass
class Deployment:
    """`mode` is what it says of itself, `error` what filter says, `knows` whether every pod is known to it."""

    mode: str = "standalone"
    error: str = ""
    knows: bool = False
    names: Sequence[str] = tuple(NAMES)
    calls: list[Call] = field(default_factory=list)

    def to(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"])
        async def take(path: str, request: Request) -> Response:
            body = await request.body()
            value = json.loads(body) if body else None
            call = Call(request.method, f"/{path}", dict(request.headers), dict(request.query_params), value)
            self.calls.append(call)
            status, reply = self.answer(call)
            return JSONResponse(reply, status)

        return app

    def answer(self, call: Call) -> tuple[int, Any]:
        if call.path == "/v1/cluster":
            return 200, {"mode": self.mode, "next": None, "nodes": [{"name": name} for name in self.names]}
        if call.path == "/filter":
            return 200, {"NodeNames": call.body["NodeNames"][:3], "Error": self.error}
        if call.path == "/prioritize":
            return 200, [{"Host": name, "Score": score} for score, name in enumerate(call.body["NodeNames"])]
        if call.path == "/bind":
            return 200, {"Error": ""}
        if call.path == "/v1/reports":
            first = sum(each.body["node"] == call.body["node"] for each in self.to("/v1/reports")) == 1
            return 200, {"resend": first, "service": "fake"}
        return (200, {}) if self.knows or call.method == "DELETE" else (404, {"detail": "no such pod"})


@contextmanager
def serving(app: FastAPI, **tls: Any) -> Iterator[int]:
    """On a port of its own, from a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, **tls))
    thread = threading.Thread(target=server.run, daemon=True)
    up = threading.Event()
    start = server.startup

    async def startup(*given: Any, **named: Any) -> None:
        await start(*given, **named)
        up.set()

    server.startup = startup  # type: ignore[method-assign]
    thread.start()
    assert up.wait(20), "the server does not start"
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join(20)


def locust(*words: str, out: Path, seconds: int = 2) -> tuple[int, dict[str, Any], str]:
    """Exit status, summary and what was printed."""
    summary = out / "summary.json"
    drive = ["--headless", "--only-summary", "-t", f"{seconds}s", "--summary", str(summary)]
    done = subprocess.run(
        [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", *words, *drive],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    told = json.loads(summary.read_text()) if summary.exists() else {}
    return done.returncode, told, done.stdout + done.stderr


def row(summary: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in summary["rows"] if each["name"] == name)
    return found
