"""The deadline around NVML, with real child processes and a library that hangs or dies when told to."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.agent.agent import Agent
from app.agent.child import Child, NoAnswer
from app.agent.reading import GONE, Reading, Unreadable, remember
from app.report import Gpu
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import describe

HANG = "hang nvmlDeviceGetMemoryInfo_v2"


@pytest.fixture
def child(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Child]]:
    """Builds children that find the fake library; ends them afterwards."""
    for name in ("LD_LIBRARY_PATH", "TANGRAM_FAKE_NVML"):
        monkeypatch.setenv(name, bench.environment[name])
    made: list[Child] = []

    def build(**options: object) -> Child:
        settings = {"deadline_seconds": 0.5, "start_deadline_seconds": 20.0, "backoff_seconds": (0.05, 0.2)}
        made.append(Child(proc=bench.proc, **{**settings, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield build
    for one in made:
        one.close()


def until_read(child: Child, seconds: float = 15.0) -> Reading:
    """Look until there is a reading."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        answer = child.look(1.0)
        if isinstance(answer, Reading):
            return answer
        time.sleep(0.02)
    raise AssertionError(f"no reading: {answer}")


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_one_child_reads_again_and_again(bench: Bench, child: Callable[..., Child]) -> None:
    bench.describe(describe(sample_node("n1", "8xH100")))
    nvml = child()
    first = until_read(nvml)
    pid = nvml.pid
    assert until_read(nvml) == first
    assert nvml.pid == pid
    assert len(first.gpus) == 8


def test_a_hang_becomes_stale_and_recovers(bench: Bench, child: Callable[..., Child]) -> None:
    """The agent goes on with what it knew, says since when, and the time of the first failure stays."""
    described = describe(sample_node("n1", "8xH100"))
    bench.describe(described)
    nvml = child()
    agent = Agent(node="n1", reader=nvml)
    while not agent.report.gpus:
        agent.look(1.0)
    good = agent.report
    hung = nvml.pid
    assert hung is not None

    bench.describe(described.with_rules(HANG))
    started = time.monotonic()
    while not agent.report.error:
        agent.look(0.1)
        assert time.monotonic() - started < 10
    assert agent.report.gpus == good.gpus
    assert agent.report.version == good.version + 1
    since = agent.report.error.partition(": ")[0]
    assert since.startswith("stale since 20")
    assert "not answered for" in agent.report.error
    assert not exists(hung)

    bench.describe(described)
    while agent.report.error:
        agent.look(1.0)
        assert not agent.report.error or agent.report.error.startswith(since)
    assert agent.report.gpus == good.gpus
    assert nvml.pid != hung


def test_a_look_takes_no_longer_than_it_may(bench: Bench, child: Callable[..., Child]) -> None:
    """A reading that is merely slow is picked up by a later look, so that heartbeats go on meanwhile."""
    bench.describe(describe(sample_node("n1", "8xH100")).with_rules("delay nvmlSystemGetNVMLVersion 700"))
    nvml = child(deadline_seconds=20.0)
    started = time.monotonic()
    answer = nvml.look(0.1)
    assert isinstance(answer, NoAnswer)
    assert not answer.failed
    assert time.monotonic() - started < 0.6
    assert until_read(nvml).gpus


def test_a_crash_is_said_and_tried_again(bench: Bench, child: Callable[..., Child]) -> None:
    bench.describe(describe(sample_node("n1", "8xH100")))
    nvml = child()
    until_read(nvml)
    assert nvml.pid is not None
    os.kill(nvml.pid, 11)
    answer = nvml.look(5.0)
    assert isinstance(answer, NoAnswer)
    assert answer.failed
    assert "ended" in answer.reason
    assert len(until_read(nvml).gpus) == 8


def test_attempts_become_rarer(bench: Bench, child: Callable[..., Child]) -> None:
    """Starting processes on a driver in trouble, one after the other, is no help."""
    bench.describe(describe(sample_node("n1", "8xH100")).with_rules("fail nvmlInitWithFlags 9"))
    now = [0.0]
    nvml = child(clock=lambda: now[0], backoff_seconds=(1.0, 4.0), start_deadline_seconds=1e9)
    starts = []
    before = None
    for _ in range(1500):
        now[0] += 0.01
        answer = nvml.look(20.0)
        assert isinstance(answer, NoAnswer)
        assert "Driver Not Loaded" in answer.reason
        if nvml._not_before != before:
            before = nvml._not_before
            starts.append(now[0])
    waits = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert len(waits) >= 3
    assert 0.7 < waits[0] < 1.4 < waits[1] < 2.6 < waits[2] < 5.0


def test_never_a_second_child_beside_one_that_cannot_be_killed(bench: Bench, child: Callable[..., Child]) -> None:
    """Uninterruptible sleep in the driver: a second one would only get stuck, too."""
    bench.describe(describe(sample_node("n1", "8xH100")).with_rules(HANG))
    stuck: list[subprocess.Popen[bytes]] = []
    nvml = child(start_deadline_seconds=2.0, kill=stuck.append)
    deadline = time.monotonic() + 20
    while not stuck:
        nvml.look(0.5)
        assert time.monotonic() < deadline
    pid = nvml.pid
    for _ in range(20):
        answer = nvml.look(0.1)
        assert isinstance(answer, NoAnswer)
        assert "stuck in the driver" in answer.reason
        assert nvml.pid == pid
        time.sleep(0.02)
    bench.describe(describe(sample_node("n1", "8xH100")))
    nvml._kill = subprocess.Popen.kill
    stuck[0].kill()  # the driver let go of it
    assert len(until_read(nvml).gpus) == 8
    assert nvml.pid != pid


def test_the_child_ends_with_its_agent(bench: Bench) -> None:
    """Also in the middle of a call that never returns: SIGKILL of the agent takes the hung child along."""
    bench.describe(describe(sample_node("n1", "8xH100")).with_rules(HANG))
    program = (
        "from app.agent.child import Child; import sys; c = Child(); c.look(3.0); print(c.pid, flush=True); "
        "sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", program],
        env=bench.environment,
        stdin=pipe,
        stdout=pipe,
    ) as agent:
        assert agent.stdout is not None
        pid = int(agent.stdout.readline())
        assert exists(pid)
        agent.kill()
        agent.wait()
    deadline = time.monotonic() + 5
    while exists(pid) and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gpu(index: int, uuid: str) -> Gpu:
    return Gpu(uuid=uuid, index=index, product="P", memory_mib=1, pods=(f"pod-of-{uuid}",))


def test_a_lost_gpu_keeps_its_identity() -> None:
    known = (gpu(0, "a"), gpu(1, "b"))
    reading = Reading(gpus=(gpu(0, "a"),), unreadable=(Unreadable(index=1, reason="NVML: GPU is lost (15)"),))
    lost = remember(known, reading)[1]
    assert (lost.uuid, lost.health, lost.health_reason) == ("b", "bad", "NVML: GPU is lost (15)")
    assert lost.pods == ("pod-of-b",), "nothing must be thought free"
    assert remember(remember(known, reading), Reading(gpus=known)) == known, "back again"


def test_a_gpu_that_the_driver_no_longer_lists_stays() -> None:
    """The driver closes the gap, so indices shift; the one that is gone moves to the end."""
    known = (gpu(0, "a"), gpu(1, "b"), gpu(2, "c"))
    seen = remember(known, Reading(gpus=(gpu(0, "a"), gpu(1, "c"))))
    assert [(g.index, g.uuid, g.health) for g in seen] == [(0, "a", "ok"), (1, "c", "ok"), (2, "b", "bad")]
    assert seen[2].health_reason == GONE


def test_an_unknown_gpu_gets_its_name_when_it_comes_back() -> None:
    first = remember((), Reading(unreadable=(Unreadable(index=0, reason="x"),)))
    assert [g.uuid for g in first] == ["unknown-0"]
    assert remember(first, Reading(gpus=(gpu(0, "a"),))) == (gpu(0, "a"),)
