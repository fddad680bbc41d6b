"""Many real agents in one small machine, for the end-to-end tests: cheap, and each of them to be steered."""

from __future__ import annotations

import time
from pathlib import Path

from solver.samples import sample_node
from tests.agent.conftest import Post, Received
from tests.fake_nvml.describe import Process, describe
from tests.fake_nvml.fleet import Fleet

POD = "11111111-2222-3333-4444-555555555555"


def full_of(name: str) -> object:
    return lambda request: request.body["node"] == name and "gpus" in request.body and not request.body["error"]


def test_each_agent_is_itself_and_can_be_steered(tmp_path: Path, post: Post) -> None:
    kinds = {"a": "8xH100", "b": "8xA100-40-mig", "c": "8xV100"}
    with Fleet(tmp_path / "fleet", service=post.url, interval_seconds=0.1) as fleet:
        for name, kind in kinds.items():
            fleet.start(sample_node(name, kind))
        for name, kind in kinds.items():
            body = post.wait(full_of(name)).body
            assert [gpu["uuid"] for gpu in body["gpus"]] == [gpu.uuid for gpu in sample_node(name, kind).gpus]
            assert body["sees_pods"]

        fleet.silence("a")
        time.sleep(0.3)
        post.forget()
        time.sleep(0.5)
        assert {request.body["node"] for request in post.received} == {"b", "c"}
        fleet.resume("a")
        post.wait(lambda request: request.body["node"] == "a")

        post.forget()
        fleet.add_process("c", 4711, POD)
        described = describe(sample_node("c", "8xV100")).with_gpu(2, processes=(Process(4711),))
        fleet.describe("c", described.with_gpu(5, lost=True))
        changed = post.wait(full_of("c")).body
        assert changed["gpus"][2]["pods"] == [POD]
        assert changed["gpus"][5]["health"] == "bad"

        fleet.stop("b")
        time.sleep(0.3)
        post.forget()
        time.sleep(0.4)
        assert "b" not in {request.body["node"] for request in post.received}
        fleet.start("b")
        post.wait(full_of("b"))


def test_forty_agents_are_cheap(tmp_path: Path, post: Post) -> None:
    """Under 25 MiB each for itself, and all have reported within seconds."""
    names = [f"n{number}" for number in range(40)]

    def reported(received: list[Received]) -> set[str]:
        return {request.body["node"] for request in received if request.body.get("gpus")}

    with Fleet(tmp_path / "fleet", service=post.url, interval_seconds=1.0) as fleet:
        for name in names:
            fleet.start(sample_node(name, "8xA100-40-mig"))
        with post.arrived:
            assert post.arrived.wait_for(lambda: reported(post.received) == set(names), timeout=60)
        heaviest = max(fleet.memory_kib(name) for name in names)
        print(f"heaviest agent: {heaviest / 1024:.1f} MiB private")
        assert heaviest < 25 * 1024
        pids = [fleet.pid(name) for name in names]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/smaps").exists() and _alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "agents outlive their fleet"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
