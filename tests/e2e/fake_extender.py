"""A scheduler extender that agrees with everything and keeps what it was asked, byte for byte.

It has no opinion on placement: it is there to see what kube-scheduler really sends, and to be a baseline.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

VERBS = ("filter", "prioritize", "bind", "preempt")

Bind = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as it came in."""

    verb: str
    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """The decoded body."""
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded

    @property
    def about(self) -> str:
        """The name of the pod that this is about."""
        body = self.json
        return str(body["PodName"] if self.verb == "bind" else body["Pod"]["metadata"]["name"])

    @property
    def node_names(self) -> list[str]:
        """The nodes offered to filter or prioritize, in either form."""
        body = self.json
        if body["NodeNames"] is not None:
            return list(body["NodeNames"])
        return [node["metadata"]["name"] for node in body["Nodes"]["items"]]


class FakeExtender:
    """Listens on loopback while it is used in a `with`; `bind` is called with each bind request's body."""

    def __init__(self, bind: Bind) -> None:
        self.asked: list[Asked] = []
        self.bind = bind
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """The `urlPrefix` to give to kube-scheduler."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def config(self, *, node_cache_capable: bool = True) -> dict[str, Any]:
        """An entry of `extenders:` with all four verbs."""
        return {
            "urlPrefix": self.url,
            "filterVerb": "filter",
            "prioritizeVerb": "prioritize",
            "bindVerb": "bind",
            "preemptVerb": "preempt",
            "weight": 1,
            "nodeCacheCapable": node_cache_capable,
            "httpTimeout": "15s",
        }

    def verbs_asked_about(self, pod: str) -> list[str]:
        """The verbs that came for a pod, in order."""
        return [asked.verb for asked in list(self.asked) if asked.about == pod]

    def first(self, verb: str, pod: str) -> Asked:
        """The first request of that verb for that pod."""
        return next(asked for asked in list(self.asked) if asked.verb == verb and asked.about == pod)

    def last(self, verb: str, pod: str) -> Asked:
        """The latest request of that verb for that pod."""
        return next(asked for asked in reversed(list(self.asked)) if asked.verb == verb and asked.about == pod)

    def _answer(self, asked: Asked) -> object:
        body = asked.json
        match asked.verb:
            case "filter":
                return {
                    "NodeNames": body["NodeNames"],
                    "Nodes": body["Nodes"],
                    "FailedNodes": {},
                    "Error": "",
                }
            case "prioritize":
                return [{"Host": name, "Score": 0} for name in asked.node_names]
            case "bind":
                return self._bound(body)
            case "preempt":
                return {"NodeNameToMetaVictims": _meta_victims(body)}
        raise ValueError(f"unknown verb {asked.verb}")

    def _bound(self, body: dict[str, Any]) -> dict[str, str]:
        try:
            self.bind(body)
        except Exception as error:  # kube-scheduler must read why, whatever it is
            return {"Error": str(error)}
        return {"Error": ""}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        extender = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # keep the connection, as a real extender would
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = tuple(self.headers.items())
                asked = Asked(self.path.rsplit("/", 1)[-1], self.path, headers, body)
                extender.asked.append(asked)
                reply = json.dumps(extender._answer(asked)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing; the tests look at `asked`."""

        return Handler


def _meta_victims(body: dict[str, Any]) -> dict[str, Any]:
    """The candidates as they came, in the only form that an extender may answer with."""
    if body["NodeNameToMetaVictims"] is not None:
        meta: dict[str, Any] = body["NodeNameToMetaVictims"]
        return meta
    return {
        node: {
            "Pods": [{"UID": pod["metadata"]["uid"]} for pod in victims["Pods"]],
            "NumPDBViolations": victims["NumPDBViolations"],
        }
        for node, victims in body["NodeNameToVictims"].items()
    }
