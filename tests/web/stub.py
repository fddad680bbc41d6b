"""A service that only looks like one: canned docs/api.md answers, for the states of the page that are hard to reach.

Nothing is decided here. Tests of real behaviour use the real service.
"""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

Json = dict[str, Any]
WEB = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
SIZES = {"1g.10gb": 1, "2g.20gb": 2, "3g.40gb": 4, "4g.40gb": 4, "7g.80gb": 8}


@dataclass
class Canned:
    """What the stub answers; tests change it while it runs."""

    nodes: list[Json] = field(default_factory=list)
    pods: list[Json] = field(default_factory=list)
    ready: bool = True
    warnings: list[str] = field(default_factory=list)
    status: int = 200
    _totals: Json = field(default_factory=dict)
    _asked: int = 0

    def cluster(self, limit: int, after: str) -> Json:
        """`GET /v1/cluster`."""
        ordered = sorted(self.nodes, key=lambda n: str(n["name"]))
        rest = [n for n in ordered if n["name"] > after]
        page = rest[:limit]
        return {
            "ready": self.ready,
            "mode": "standalone",
            "waiting_for": [] if self.ready else ["the pods of the API server"],
            "warnings": self.warnings,
            "totals": self.totals(),
            "next": page[-1]["name"] if len(rest) > limit else None,
            "nodes": page,
        }

    def totals(self) -> Json:
        """Counted once where counting takes long."""
        if len(self.nodes) > 1000 and self._totals:
            return self._totals
        gpus = [g for n in self.nodes for g in n["gpus"]]
        slices = [s for g in gpus for s in g["slices"]]
        totals = {
            "nodes": len(self.nodes),
            "nodes_offered": sum(n["offered"] for n in self.nodes),
            "gpus": len(gpus),
            "gpus_held": sum(g["phase"] == "held" for g in gpus),
            "gpus_shared": sum(bool(g["shares"]) for g in gpus),
            "shares_held": sum(len(g["shares"]) for g in gpus),
            "milli_held": sum(s["milli"] for g in gpus for s in g["shares"]),
            "mig_gpus": sum(g["mig"] for g in gpus),
            "mig_units": sum(g["width"] for g in gpus),
            "mig_units_held": sum(s["size"] for s in slices),
            "slices_held": len(slices),
        }
        for phase in ("waiting", "proposed", "assumed", "held", "leaving"):
            totals[f"pods_{phase}"] = sum(p["phase"] == phase for p in self.pods)
        self._totals = totals
        return totals

    def costs(self) -> Json:
        """`GET /v1/costs`: filter is asked a thousand times between two looks, and nobody binds."""
        self._asked += 1
        none = {"p50_seconds": None, "p99_seconds": None}
        times = {"p50_seconds": 0.00142, "p99_seconds": 0.0123}
        lately = {"p50_seconds": 0.001 * (1 + self._asked % 2), "p99_seconds": 0.0087}
        busy = {"answers": 1000 * self._asked, **times, "lately": {"per_second": 1000.0, **lately}}
        blocked = {"longest_seconds": 0.0312, "longest_lately_seconds": 0.0041, "over_20_ms": 3}
        return {
            "up_seconds": 7300.0,
            "lately_seconds": 14.0,
            "verbs": {
                "filter": busy,
                "prioritize": busy,
                "bind": {"answers": 0, **none, "lately": {"per_second": 0.0, **none}},
            },
            "memory_mib": {"service": 312.4, "planning": None},
            "loop": {"looks": 720_000, "wall": blocked, "own": {**blocked, "over_20_ms": 1}},
            "sizes": {
                "nodes": len(self.nodes),
                "nodes_offered": len(self.nodes) - 1,
                "pods_held": 12_345,
                "demands": 17,
                "states": 298,
                "hosts": 31,
                "mig_gpus": 96,
            },
            "rows": {"updated": 4321, "per_second": 12.5, "last_seconds_ago": 0.3},
        }

    def answer(self, path: str) -> tuple[int, Json]:
        """Route one GET under /v1/."""
        url = urlparse(path)
        query = parse_qs(url.query)
        if url.path == "/v1/cluster":
            return 200, self.cluster(int(query.get("limit", ["5000"])[0]), query.get("after", [""])[0])
        if url.path == "/v1/pods":
            phase = query.get("phase", [""])[0]
            return 200, {"pods": [p for p in self.pods if phase in ("", p["phase"])]}
        if url.path == "/v1/costs":
            return 200, self.costs()
        kind, _, name = unquote(url.path).removeprefix("/v1/").partition("/")
        for item in self.nodes if kind == "nodes" else self.pods:
            if name == item["name" if kind == "nodes" else "uid"]:
                return 200, item
        return 404, {"detail": f"no {kind[:-1]} {name}"}


class Stub:
    """The canned service on a free port of loopback, as a context manager."""

    def __init__(self, canned: Canned) -> None:
        self.canned = canned
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(canned))
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def __enter__(self) -> Stub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(canned: Canned) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in WEB:
                name, kind = WEB[self.path]
                self._send(200, kind, (files("app.web") / name).read_bytes())
                return
            status, body = canned.answer(self.path)
            self._send(canned.status if canned.status != 200 else status, "application/json", json.dumps(body).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Handler


def gpu(index: int, *, phase: str = "free", pod: Json | None = None, reason: str = "", mig: bool = False) -> Json:
    """One GPU as /v1/cluster says it."""
    return {
        "uuid": f"GPU-{index:08x}",
        "index": index,
        "product": "NVIDIA A100-SXM4-80GB" if mig else "NVIDIA H100 80GB HBM3",
        "memory_mib": 81559,
        "numa": index // 4,
        "phase": phase,
        "pod": pod,
        "reason": reason,
        "mig": mig,
        "width": 8 if mig else 0,
        "slices": [],
        "shares": [],
    }


def node(name: str, gpus: list[Json], *, offered: bool = True, reason: str = "") -> Json:
    """One node as /v1/cluster says it."""
    return {
        "name": name,
        "offered": offered,
        "reason": reason,
        "reported_seconds_ago": 1.2,
        "product": gpus[0]["product"],
        "driver": "570.124.06",
        "cuda": "12.8",
        "gpus": gpus,
    }


def pod(uid: str, name: str, phase: str, demand: str, node: str | None, devices: list[str], reason: str = "") -> Json:
    """One pod as /v1/pods says it."""
    return {
        "uid": uid,
        "namespace": "default",
        "name": name,
        "phase": phase,
        "demand": demand,
        "node": node,
        "devices": devices,
        "since_seconds": 12.5,
        "reason": reason,
        "prices": {"fragmentation": 125, "links": 0},
    }


def lively(count: int = 40, seed: int = 7) -> Canned:
    """A cluster with a bit of everything."""
    rng = random.Random(seed)
    canned = Canned(warnings=["profile 1g.12gb is reported by node a100-03 but missing from managedResources"])
    phases = ["held"] * 12 + ["assumed", "proposed", "leaving"]
    for i in range(count):
        mig = i % 2 == 0
        name = f"{'a100' if mig else 'h100'}-{i:02d}"
        gpus = [gpu(j, mig=mig) for j in range(8)]
        for board in gpus:
            _fill(board, canned, name, rng, phases)
        off = i == 5
        canned.nodes.append(node(name, gpus, offered=not off, reason="no report for 41 s" if off else ""))
    canned.nodes[1]["gpus"][3].update(phase="withheld", pod=None, reason="XID 79: the GPU has fallen off the bus")
    shared = next(g for g in canned.nodes[3]["gpus"] if g["phase"] == "free")
    for milli, phase in ((250, "held"), (500, "assumed")):
        who = _new_pod(canned, phase, f"{milli} milli of a GPU", canned.nodes[3]["name"], f"{shared['uuid']}:{milli}m")
        shared["shares"].append({"milli": milli, "phase": phase, "pod": who})
    shared["phase"] = "shared"
    for i in range(5):
        canned.pods.append(
            pod(f"w{i}", f"train-xl-{i}", "waiting", "8 GPUs", None, [],
                "12 nodes: needs 8 free GPUs, has 3 or fewer; 20 nodes: no GPUs outside MIG mode")
        )  # fmt: skip
    return canned


def _fill(board: Json, canned: Canned, node_name: str, rng: random.Random, phases: list[str]) -> None:
    if not board["mig"]:
        if rng.random() < 0.7:
            phase = rng.choice(phases)
            who = _new_pod(canned, phase, "1 GPU", node_name, board["uuid"])
            board.update(phase=phase, pod=who)
        return
    start = 0
    while start < 7:
        profile = rng.choice(list(SIZES))
        size = SIZES[profile]
        start += -start % size
        if start + size > 8:
            break
        if rng.random() < 0.75:
            phase = rng.choice(phases)
            who = _new_pod(canned, phase, f"1 × {profile}", node_name, f"{board['uuid']}/{profile}@{start}")
            board["slices"].append(
                {
                    "profile": profile,
                    "start": start,
                    "size": size,
                    "phase": phase,
                    "pod": who,
                    "exists": phase == "held",
                }
            )
        start += size
    board["phase"] = "shared" if board["slices"] else "free"


def _new_pod(canned: Canned, phase: str, demand: str, node_name: str, device: str) -> Json:
    uid = f"uid-{len(canned.pods):05d}"
    made = pod(uid, f"infer-{len(canned.pods)}", phase, demand, node_name, [device], "the cheapest of 20 nodes")
    canned.pods.append(made)
    return {"uid": uid, "namespace": "default", "name": made["name"]}
