"""Agents to play: the reports of a file, with small changes, as bytes to send. Knows nothing of locust.

A report is kept as bytes and opened only to be changed: those of 5,000 nodes as objects would be a gigabyte.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from app.errors import BadInput

MEMORY_STEP_MIB = 256  # reports round free memory to this
HOLD_SECONDS = 10.0  # how long a real agent's request for orders waits


@dataclass(slots=True)
class Agent:
    """One node's agent: what it would say. Until it has something of its own to say it is the file's agent.

    So a service that has read the same file is not told 5,000 reports at once, as after a restart.
    """

    node: str
    report: bytes
    boot: str
    version: int
    token: str = ""
    own: bool = False
    service: str = ""
    orders: int = 0
    placements: int = 0

    def beat(self) -> bytes:
        """Nothing new."""
        return orjson.dumps({"node": self.node, "boot": self.boot, "version": self.version})

    def listening(self) -> bytes:
        """Nothing new, and what are the orders? Held by the service."""
        asked = {"service": self.service, "orders": self.orders, "placements": self.placements}
        return orjson.dumps(
            {"node": self.node, "boot": self.boot, "version": self.version, **asked, "wait_seconds": HOLD_SECONDS}
        )

    def heard(self, reply: dict[str, Any]) -> None:
        """Keep the versions of the lists, so that they are not sent again; nothing is carried out."""
        for kind in ("orders", "placements"):
            if reply.get(kind) is not None:
                self.service = reply[kind]["service"]
                setattr(self, kind, reply[kind]["version"])

    def asked_again(self) -> bytes:
        """The service does not hold our version: all of it, as an agent that has just started."""
        self.boot, self.own, self.version = f"loadtest-{uuid.uuid4()}", True, 1
        return self._say(orjson.loads(self.report))

    def changed(self, rng: random.Random) -> bytes:
        """Something is new: mostly memory in use, else a GPU that falls ill or is well again."""
        said = orjson.loads(self.report)
        gpu = rng.choice(said["gpus"])
        if rng.random() < 0.5:
            _use_memory(gpu, rng)
        else:
            _fall_ill_or_recover(gpu)
        if not self.own:
            return self._said_as_new(said)
        self.version += 1
        return self._say(said)

    def _said_as_new(self, said: dict[str, Any]) -> bytes:
        self.report = orjson.dumps(said)
        return self.asked_again()

    def _say(self, said: dict[str, Any]) -> bytes:
        said["boot"], said["version"] = self.boot, self.version
        self.report = orjson.dumps(said)
        return self.report


def _use_memory(gpu: dict[str, Any], rng: random.Random) -> None:
    gpu["free_mib"] = rng.randrange(0, gpu["memory_mib"] + 1, MEMORY_STEP_MIB)


def _fall_ill_or_recover(gpu: dict[str, Any]) -> None:
    ill = gpu.get("health", "ok") == "ok"
    gpu["health"], gpu["health_reason"] = ("bad", "ill for the load test") if ill else ("ok", "")


def read_agents(path: Path, tokens: Path | None) -> list[Agent]:
    """One for each report with a GPU. Raises BadInput."""
    try:
        reports = orjson.loads(path.read_bytes())
        return [
            Agent(said["node"], orjson.dumps(said), said.get("boot", ""), said["version"], _token(tokens, said["node"]))
            for said in reports
            if said["gpus"]
        ]
    except OSError as problem:
        raise BadInput(f"cannot read {problem.filename}: {problem.strerror}") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise BadInput(f"{path} is no list of node reports, as `tangram nodes` writes it: {problem!r}") from None


def _token(tokens: Path | None, node: str) -> str:
    if tokens is None:
        return ""
    return (tokens / node if tokens.is_dir() else tokens).read_text().strip()
