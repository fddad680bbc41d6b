"""The deadline around NVML, with real child processes and a library that hangs or dies when told to.

What a list of orders does to the instances is `test_change`'s; here it is that the agent never waits for ever.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.agent.agent import Agent
from app.agent.child import Child, NoAnswer
from app.agent.reading import GONE, Reading, Unreadable, remember
from app.report import Failed, Gpu, Make, OrderList
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.control import Control
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


def test_a_child_that_cannot_be_killed_gets_no_orders(bench: Bench, child: Callable[..., Child]) -> None:
    """It might carry them out hours later; and nobody waits for it."""
    bench.describe(describe(sample_node("n1", "8xA100-40-mig")))
    stuck: list[subprocess.Popen[bytes]] = []
    nvml = child(deadline_seconds=20.0, kill=stuck.append)
    reading = until_read(nvml)
    Control(bench.file).delay(CREATE, 2000)
    assert isinstance(nvml.change(a_slice(reading), 0.3), NoAnswer)
    started = time.monotonic()
    answer = nvml.change(a_slice(reading, start=3), 10.0)
    assert isinstance(answer, NoAnswer)
    assert "stuck in the driver" in answer.reason
    assert time.monotonic() - started < 1
    assert len(stuck) == 1
    stuck[0].kill()


def test_a_child_that_dies_again_and_again_is_started_ever_later(bench: Bench, child: Callable[..., Child]) -> None:
    """Also where each one answers once before it dies: a node that is there and stale by turns is no use."""
    bench.describe(describe(sample_node("n1", "8xH100")))
    now = [0.0]
    nvml = child(clock=lambda: now[0], backoff_seconds=(1.0, 60.0), start_deadline_seconds=1e9, deadline_seconds=1e9)
    waits = []
    for _ in range(4):
        now[0] = nvml._not_before
        assert isinstance(nvml.look(20.0), Reading)
        assert nvml.pid is not None
        os.kill(nvml.pid, signal.SIGKILL)
        assert isinstance(nvml.look(20.0), NoAnswer)
        waits.append(nvml._not_before - now[0])
    assert waits[0] < 1.3 < waits[1] < 2.6 < waits[2] < 5.2 < waits[3]

    now[0] = nvml._not_before
    nvml.look(20.0)
    now[0] += 61.0
    nvml.look(20.0)
    assert nvml.pid is not None
    os.kill(nvml.pid, signal.SIGKILL)
    assert isinstance(nvml.look(20.0), NoAnswer)
    assert nvml._not_before - now[0] < 1.3, "this one was well for a minute"


def test_a_process_that_cannot_be_started_is_said_and_tried_again(
    bench: Bench, child: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node may be out of process numbers or memory; the agent goes on."""
    bench.describe(describe(sample_node("n1", "8xH100")))
    nvml = child()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", "/nowhere/python")
        answer = nvml.look(1.0)
        assert isinstance(answer, NoAnswer)
        assert answer.failed
        assert "cannot be started" in answer.reason
    assert len(until_read(nvml).gpus) == 8


def test_a_signal_without_a_name_is_said_by_its_number(bench: Bench, child: Callable[..., Child]) -> None:
    bench.describe(describe(sample_node("n1", "8xH100")))
    nvml = child(deadline_seconds=20.0)
    until_read(nvml)
    assert nvml.pid is not None
    os.kill(nvml.pid, 40)
    answer = nvml.look(5.0)
    assert isinstance(answer, NoAnswer)
    assert "was ended by signal 40" in answer.reason


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


# ---- orders ----

CREATE = "nvmlDeviceCreateGpuInstanceWithPlacement"


def made(reading: Reading) -> list[tuple[str, int | None, bool]]:
    """What is on the first GPU: profile, place, whether it has a UUID."""
    mig = reading.gpus[0].mig
    assert mig is not None
    return [(i.profile, i.start, i.uuid is not None) for i in mig.instances]


@pytest.fixture
def sliced(bench: Bench) -> Control:
    """GPUs in MIG mode with nothing on them."""
    bench.describe(describe(sample_node("n1", "8xA100-40-mig")))
    return Control(bench.file)


def a_slice(reading: Reading, start: int = 0) -> OrderList:
    return OrderList(service="s", version=1, make=(Make(gpu=reading.gpus[0].uuid, profile="1g.5gb", start=start),))


def test_a_change_shows_in_the_next_reading(sliced: Control, child: Callable[..., Child]) -> None:
    nvml = child(deadline_seconds=20.0)
    before = until_read(nvml)
    assert nvml.change(a_slice(before)) == ()
    assert made(until_read(nvml)) == [("1g.5gb", 0, True)]
    failed = nvml.change(a_slice(before, start=3).model_copy(update={"make": (Make(gpu="?", profile="x", start=1),)}))
    assert isinstance(failed, tuple)
    assert [(each.gpu, each.profile, each.start) for each in failed] == [("?", "x", 1)]


def test_what_has_not_changed_is_not_read_again_by_the_agent(sliced: Control, child: Callable[..., Child]) -> None:
    """The child says so in one byte, and it is the same object."""
    nvml = child(deadline_seconds=20.0)
    first = until_read(nvml)
    assert until_read(nvml) is first
    nvml.change(a_slice(first))
    second = until_read(nvml)
    assert second is not first
    assert until_read(nvml) is second


def test_a_change_that_hangs_is_ended(sliced: Control, child: Callable[..., Child]) -> None:
    """The agent's next child tells what there is."""
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    hung = nvml.pid
    assert hung is not None
    sliced.hang(CREATE)
    started = time.monotonic()
    answer = nvml.change(a_slice(reading), 0.5)
    assert isinstance(answer, NoAnswer)
    assert answer.failed
    assert "not carried out" in answer.reason
    assert time.monotonic() - started < 3
    assert not exists(hung)
    sliced.clear("hang")
    assert made(until_read(nvml)) == []
    assert nvml.change(a_slice(reading)) == ()


def test_a_child_that_dies_half_way_is_said_and_the_list_can_be_finished(
    sliced: Control, child: Callable[..., Child]
) -> None:
    """Between making the GPU instance and its compute instance: the first is there, has no UUID, and is completed."""
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    sliced.die(CREATE)
    answer = nvml.change(a_slice(reading))
    assert isinstance(answer, NoAnswer)
    assert answer.failed
    assert "ended with status 137" in answer.reason
    assert made(until_read(nvml)) == [("1g.5gb", 0, False)]
    assert nvml.change(a_slice(reading)) == ()
    assert made(until_read(nvml)) == [("1g.5gb", 0, True)]


def test_a_child_that_has_died_before_it_was_asked(sliced: Control, child: Callable[..., Child]) -> None:
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    assert nvml.pid is not None
    os.kill(nvml.pid, signal.SIGKILL)
    answer = nvml.change(a_slice(reading))
    assert isinstance(answer, NoAnswer)
    assert "SIGKILL" in answer.reason


def test_a_change_waits_for_the_reading_under_way(sliced: Control, child: Callable[..., Child]) -> None:
    """The child does one thing at a time; the reading that came meanwhile is not lost."""
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    sliced.delay("nvmlDeviceGetCount_v2", 400, times=1)
    assert isinstance(nvml.look(0.05), NoAnswer)
    assert nvml.change(a_slice(reading)) == ()
    assert made(until_read(nvml)) == [("1g.5gb", 0, True)]


def test_a_reading_that_takes_too_long_leaves_everything_as_it_is(sliced: Control, child: Callable[..., Child]) -> None:
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    pid = nvml.pid
    sliced.delay("nvmlDeviceGetCount_v2", 1000, times=1)
    nvml.look(0.05)
    answer = nvml.change(a_slice(reading), 0.1)
    assert isinstance(answer, NoAnswer)
    assert not answer.failed
    assert made(until_read(nvml)) == []
    assert nvml.pid == pid


def test_a_list_longer_than_a_pipe_holds(sliced: Control, child: Callable[..., Child]) -> None:
    nvml = child(deadline_seconds=20.0)
    reading = until_read(nvml)
    gpu = "no such GPU" + "x" * 80
    many = OrderList(service="s", version=1, make=tuple(Make(gpu=gpu, profile="1g.5gb", start=0) for _ in range(1024)))
    failed = nvml.change(many)
    assert isinstance(failed, tuple)
    assert len(failed) == 1024
    assert isinstance(failed[0], Failed)
    assert until_read(nvml) == reading


def test_a_stopped_child_does_not_stop_the_agent(sliced: Control, child: Callable[..., Child]) -> None:
    """It empties its pipe no more, so a long list would wait for ever."""
    nvml = child(deadline_seconds=20.0)
    until_read(nvml)
    assert nvml.pid is not None
    os.kill(nvml.pid, signal.SIGSTOP)
    many = OrderList(
        service="s", version=1, make=tuple(Make(gpu="x" * 90, profile="1g.5gb", start=0) for _ in range(1024))
    )
    answer = nvml.change(many, 0.5)
    assert isinstance(answer, NoAnswer)
    assert answer.failed
    assert until_read(nvml).gpus


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
