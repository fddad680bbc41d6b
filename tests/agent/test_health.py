"""What signs and XIDs mean over time, and what of it a restarted agent knows."""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.agent.agent import Agent
from app.agent.child import NoAnswer
from app.agent.health import (
    CLEAR_SECONDS,
    EVENT_SECONDS,
    LONGEST_SECONDS,
    RANK,
    RECOVER_SECONDS,
    UNTOLD_SECONDS,
    XIDS,
    XIDS_OF,
    Judge,
    Memory,
    kind_of,
)
from app.agent.memory import BOOT_ID, MemoryFile, boot_id
from app.agent.reading import GONE, Reading, Unreadable, Xid
from app.agent.versions import node_versions
from app.report import Failed, Gpu, Health, OrderList, Signal

OK = Signal(name="recovery", state="ok")
HOT = Signal(name="clocks", state="suspect", reason="too hot")
LOOK = 5.0


def gpu(*signals: Signal, uuid: str = "a", notes: str = "") -> Gpu:
    return Gpu(uuid=uuid, index=0, product="P", memory_mib=1, signals=signals, health_reason=notes)


def xid(code: int, uuid: str = "a") -> Xid:
    return Xid(gpu=uuid, code=code)


class Ward:
    """One GPU and its judge; time passes with each look."""

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge or Judge()
        self.now = 0.0

    def look(self, *signals: Signal, xids: tuple[int, ...] = (), after: float = LOOK) -> Gpu:
        self.now += after
        (judged,) = self.judge.judge((gpu(*signals),), [xid(code) for code in xids], self.now)
        return judged

    def health(self, *signals: Signal, xids: tuple[int, ...] = (), after: float = LOOK) -> Health:
        return self.look(*signals, xids=xids, after=after).health

    def until_ok(self, *signals: Signal, most: float = 1e6) -> float:
        """How long these signals must be seen until the GPU counts as well."""
        began = self.now
        while self.health(*signals) != "ok":
            assert self.now - began < most, "never"
        return self.now - began


# ---- signs ----


def test_a_sign_counts_at_once_and_ends_after_a_while() -> None:
    """Case 14: a card that was unhealthy comes back by itself."""
    ward = Ward()
    assert ward.health() == "ok"
    seen = ward.look(HOT)
    assert (seen.health, seen.health_reason, seen.signals) == ("suspect", "too hot", (HOT,))
    assert CLEAR_SECONDS <= ward.until_ok() <= CLEAR_SECONDS + LOOK
    well = ward.look()
    assert (well.health, well.health_reason, well.signals) == ("ok", "", ())


def test_a_sign_that_alternates_does_not_alternate_in_the_report() -> None:
    ward = Ward()
    seen = {ward.health(*([HOT] if look % 2 else [])) for look in range(1, 200)}
    assert seen == {"suspect"}


def test_relapses_take_longer_and_longer() -> None:
    """One that is gone just long enough each time must not flap for ever."""
    ward = Ward()
    waits = []
    for _ in range(12):
        ward.health(HOT)
        waits.append(ward.until_ok())
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(waits[:7]))
    assert max(waits) <= LONGEST_SECONDS + LOOK
    for _ in range(20):
        ward.health(after=LONGEST_SECONDS)
    ward.health(HOT)
    assert ward.until_ok() <= CLEAR_SECONDS + LOOK, "long ago is forgiven"


def test_worse_counts_at_once_and_better_in_steps() -> None:
    bad = Signal(name="nvlink", state="bad", reason="no link at all")
    some = Signal(name="nvlink", state="suspect", reason="a link is down")
    ward = Ward()
    assert ward.health(some) == "suspect"
    assert ward.health(bad) == "bad"
    assert ward.health(some) == "bad"
    assert ward.health(some, after=CLEAR_SECONDS) == "suspect"
    assert ward.look(some).health_reason == "a link is down"


def test_reasons_that_take_turns_do_not_make_reports() -> None:
    """Nor a counter in the words: it is renewed only now and then."""
    ward = Ward()
    words = [ward.look(Signal(name="ecc", state="suspect", reason=f"{n} errors")).health_reason for n in range(60)]
    changes = sum(a != b for a, b in itertools.pairwise(words))
    assert 1 <= changes <= 60 * LOOK / CLEAR_SECONDS


def test_the_worst_sign_is_the_health() -> None:
    rows = Signal(name="rows", state="bad", reason="replace it")
    judged = Ward().look(HOT, rows, OK)
    assert (judged.health, judged.health_reason) == ("bad", "replace it; too hot")
    assert judged.signals == (rows, HOT), "what is ok is no sign of ill health"


def test_a_gpu_that_has_got_its_name_leaves_nothing_behind() -> None:
    """Unreadable since the agent started it had only its index. Else no look at this node would ever be a quiet one."""
    judge = Judge()
    lost = Signal(name="unreadable", state="bad", reason="lost")
    judge.judge([gpu(lost, uuid="unknown-0").model_copy(update={"product": "unknown"})], [], 0.0)
    assert judge.moving
    judge.judge([gpu()], [], 5.0)
    assert [each.uuid for each in judge.known] == ["a"]
    assert not judge.moving


def test_each_gpu_by_itself() -> None:
    judge = Judge()
    well, hot = judge.judge((gpu(), gpu(HOT, uuid="b")), [xid(13, "b"), xid(79, "elsewhere")], 0)
    assert (well.health, hot.health) == ("ok", "suspect")


def test_what_could_not_be_read_stays_said() -> None:
    (judged,) = Judge().judge((gpu(notes="minor number: unknown"),), (), 0)
    assert (judged.health, judged.health_reason) == ("ok", "minor number: unknown")


# ---- XIDs ----


@pytest.mark.parametrize(
    ("code", "health"),
    [
        *[(code, "ok") for code in (13, 31, 43, 45, 63, 92, 94, 137, 154)],
        *[(code, "suspect") for code in (54, 74, 78, 144, 150, 999)],
        *[(code, "bad") for code in (46, 48, 62, 64, 79, 95, 109, 119, 120, 140, 142, 143, 151, 158)],
    ],
)
def test_what_an_xid_means(code: int, health: Health) -> None:
    judged = Ward().look(xids=(code,))
    assert judged.health == health
    assert f"XID {code}" in judged.health_reason


def test_the_table_has_each_code_of_the_catalogue_once() -> None:
    listed = [codes if isinstance(codes, tuple) else (codes, codes) for kind in XIDS_OF.values() for codes in kind]
    assert sum(last - first + 1 for first, last in listed) == len(XIDS)
    assert {kind_of(code) for code in (79, 45, 154)} == {"reboot", "follows", "recovery"}


def test_faults_of_programs_are_mentioned_for_an_hour_and_make_no_stream_of_reports() -> None:
    ward = Ward()
    first = ward.look(xids=(31,))
    assert first == ward.look(xids=(31, 31))
    assert "XID 13, 31" in ward.look(xids=(13,)).health_reason
    assert ward.look(after=EVENT_SECONDS).health_reason == ""


def test_an_xid_is_over_when_the_driver_has_said_so_for_a_while() -> None:
    ward = Ward()
    reset = Signal(name="recovery", state="bad", reason="a reset is wanted")
    assert ward.health(OK, xids=(95,)) == "bad"
    assert ward.health(reset, after=10 * UNTOLD_SECONDS) == "bad"
    ward.look(OK, xids=(31,))
    assert ward.until_ok(OK, most=UNTOLD_SECONDS) + LOOK >= RECOVER_SECONDS
    ward.look(OK, xids=(95,))
    ward.look(OK, after=RECOVER_SECONDS - LOOK)
    assert ward.health(OK, xids=(95,)) == "bad"
    assert ward.health(OK, after=RECOVER_SECONDS - LOOK) == "bad", "a new one begins it anew"


def test_a_program_in_a_loop_of_faults_does_not_keep_a_gpu_bad() -> None:
    ward = Ward()
    ward.look(OK, xids=(95,))
    looks = [ward.health(OK, xids=(31,)) for _ in range(20)]
    assert looks[-1] == "ok"


def test_without_a_recovery_field_an_xid_lasts_longer() -> None:
    ward = Ward()
    ward.look(xids=(95,))
    assert UNTOLD_SECONDS <= ward.until_ok() <= UNTOLD_SECONDS + LOOK


def test_what_wants_a_reboot_lasts_until_it() -> None:
    ward = Ward()
    ward.look(xids=(79,))
    assert ward.health(after=100 * UNTOLD_SECONDS) == "bad"
    after_reboot = Ward(Judge(None))
    assert after_reboot.health() == "ok"


def test_where_one_gpu_wants_a_reboot_nothing_new_comes_to_its_node() -> None:
    """Whatever is placed beside it is in the way of the reboot."""
    judge = Judge()
    node = (gpu(uuid="a"), gpu(uuid="b").model_copy(update={"index": 1}))
    lost, beside = judge.judge(node, [xid(79)], 5.0)

    assert [signal.name for signal in lost.signals] == ["xid"]
    assert [(signal.name, signal.state) for signal in beside.signals] == [("node", "bad")]
    assert "GPU 0 of this node" in beside.health_reason
    assert [each.health for each in judge.judge(node, [], 10.0)] == ["bad", "bad"]
    assert [each.health for each in Judge().judge(node, [], 15.0)] == ["ok", "ok"], "after the reboot"


def test_the_driver_overrules_what_wants_a_reboot() -> None:
    ward = Ward()
    ward.look(OK, xids=(79,))
    assert ward.until_ok(OK) <= RECOVER_SECONDS + LOOK


@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from([HOT, OK, Signal(name="ecc", state="bad", reason="x")]), unique=True),
            st.lists(st.sampled_from([13, 74, 79, 95, 999]), max_size=2),
            st.floats(min_value=0.1, max_value=7200),
        ),
        max_size=20,
    )
)
def test_never_better_than_what_is_seen_and_always_well_in_the_end(
    story: list[tuple[list[Signal], list[int], float]],
) -> None:
    ward = Ward()
    for signals, xids, after in story:
        judged = ward.look(*signals, xids=tuple(xids), after=after)
        assert RANK[judged.health] >= max((RANK[signal.state] for signal in signals), default=0)
        assert RANK[judged.health] == max((RANK[signal.state] for signal in judged.signals), default=0)
    ward.until_ok(OK, most=2 * LONGEST_SECONDS)


# ---- memory ----


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., MemoryFile]:
    def build(node: str = "n1", boot: str = "boot-1") -> MemoryFile:
        return MemoryFile(tmp_path / "state", node=node, boot=boot)

    return build


class Told:
    """A reader that says what it is told to."""

    def __init__(self, *answers: Reading) -> None:
        self.answers = list(answers)

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def change(self, orders: OrderList, seconds: float) -> tuple[Failed, ...] | NoAnswer:
        return ()

    def close(self) -> None:
        pass


def agent(
    memory: MemoryFile, *answers: Reading, boot: str = "boot-1", clock: Callable[[], float] = lambda: 0.0
) -> Agent:
    return Agent(node="n1", reader=Told(*answers), memory=memory, boot_id=boot, clock=clock)


def seen(agent: Agent) -> Gpu:
    """What it reports of its first GPU after another look."""
    agent.look(0)
    return agent.report.gpus[0]


def test_a_restarted_agent_knows_what_its_gpus_had(file: Callable[..., MemoryFile]) -> None:
    agent(file(), Reading(gpus=(gpu(),), xids=(xid(95),))).look(0)
    now = [0.0]
    second = agent(file(), Reading(gpus=(gpu(),)), clock=lambda: now[0])
    second = agent(file(), Reading(gpus=(gpu(),)), clock=lambda: now[0])
    assert seen(second).health == "bad"
    assert "XID 95" in seen(second).health_reason
    now[0] = UNTOLD_SECONDS
    assert seen(second).health == "ok"
    assert seen(agent(file(), Reading(gpus=(gpu(),)))).health == "ok"


def test_a_reboot_forgets(file: Callable[..., MemoryFile]) -> None:
    agent(file(), Reading(gpus=(gpu(),), xids=(xid(79),))).look(0)
    second = agent(file(boot="boot-2"), Reading(gpus=(gpu(),)), boot="boot-2")
    second.look(0)
    assert second.report.gpus[0].health == "ok"


def test_a_gpu_that_was_lost_before_the_agent_started_keeps_its_name(file: Callable[..., MemoryFile]) -> None:
    agent(file(), Reading(gpus=(gpu(),))).look(0)
    unread = agent(file(), Reading(unreadable=(Unreadable(index=0, reason="GPU is lost"),)))
    unread.look(0)
    assert [(g.uuid, g.health, g.health_reason) for g in unread.report.gpus] == [("a", "bad", "GPU is lost")]
    unlisted = agent(file(), Reading())
    unlisted.look(0)
    assert [g.uuid for g in unlisted.report.gpus] == ["a"]
    assert GONE in unlisted.report.gpus[0].health_reason


def test_nothing_is_written_while_nothing_happens(tmp_path: Path, file: Callable[..., MemoryFile]) -> None:
    now = [0.0]
    quiet = Reading(gpus=(gpu(HOT),))
    one = agent(file(), quiet, clock=lambda: now[0])
    one.look(0)
    kept = tmp_path / "state/agent.json"
    before = kept.stat().st_ino
    for _ in range(20):
        now[0] += LOOK
        one.look(0)
    assert kept.stat().st_ino == before
    assert [entry.name for entry in kept.parent.iterdir()] == ["agent.json"], "no half-written file is left"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not understood"),
        (b'{"schema_version": 1, "node', "not understood"),
        (b"\xff\xfe\x00", "not understood"),
        (b'{"schema_version": 9, "node": "n1", "boot": "boot-1"}', "not understood"),
        (b'{"schema_version": 1, "node": "n2", "boot": "boot-1"}', "of node 'n2'"),
        (b'{"schema_version": 1, "node": "n1", "boot": "of old"}', "before the node was booted"),
    ],
)
def test_a_file_that_does_not_hold_is_said_and_replaced(
    tmp_path: Path, file: Callable[..., MemoryFile], caplog: pytest.LogCaptureFixture, content: bytes, words: str
) -> None:
    caplog.set_level(logging.INFO)
    kept = tmp_path / "state/agent.json"
    kept.parent.mkdir()
    kept.write_bytes(content)
    one = agent(file(), Reading(gpus=(gpu(),)))
    assert words in caplog.text
    one.look(0)
    assert Memory.model_validate_json(kept.read_bytes()).boot == "boot-1"


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, file: Callable[..., MemoryFile], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("a file is in the way")
    one = agent(file(), Reading(gpus=(gpu(),)), Reading(gpus=(gpu(HOT),)))
    one.look(0)
    one.look(0)
    assert one.report.gpus[0].health == "suspect"
    assert caplog.text.count("is not kept") == 1


def test_without_a_boot_id_nothing_is_kept(tmp_path: Path) -> None:
    """Nobody could tell whether the node was booted since."""
    assert boot_id(tmp_path) == ""
    agent(MemoryFile(tmp_path / "state", node="n1", boot=""), Reading(gpus=(gpu(),))).look(0)
    assert not (tmp_path / "state").exists()
    (tmp_path / BOOT_ID).parent.mkdir(parents=True)
    (tmp_path / BOOT_ID).write_text("1234\n")
    assert boot_id(tmp_path) == "1234"


# ---- versions ----


def tool(directory: Path, name: str, script: str) -> None:
    file = directory / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_versions_of_what_is_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert node_versions() == {"kernel": os.uname().release}
    tool(tmp_path, "nvidia-ctk", "exit 1")
    tool(tmp_path, "nvidia-container-cli", "echo cli-version: 1.17.4; echo lib-version: 1.17.4")
    tool(tmp_path, "nvidia-container-runtime", "echo NVIDIA Container Runtime version 1.18.0-rc.1; echo spec: 1.2")
    assert node_versions() == {"kernel": os.uname().release, "toolkit": "1.17.4", "runtime": "1.18.0-rc.1"}
    tool(tmp_path, "nvidia-ctk", "echo NVIDIA Container Toolkit CLI version 1.18.1; echo commit: abc")
    assert node_versions()["toolkit"] == "1.18.1"
