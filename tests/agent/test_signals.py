"""Signs of health and XIDs, as one look finds them: what each means over time is tested with `health`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.agent.reading import Reading, Xid
from app.report import Gpu
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.agent.session import Session
from tests.fake_nvml.describe import ALL_WELL, Fabric, NodeDescription, describe

UNTIL_XIDS = """
def xids(count):
    found = []
    due = time.monotonic() + 20
    while len(found) < count and time.monotonic() < due:
        found += read()["xids"]
    return found
"""


def sample(kind: str, gpus: int = 8) -> NodeDescription:
    """The first GPUs of a sample node."""
    described = describe(sample_node("n1", kind))
    return replace(described, gpus=described.gpus[:gpus], ancestors={})


@pytest.fixture
def board(bench: Bench) -> Session:
    """Eight H100, healthy."""
    return Session(bench, sample("8xH100"))


@pytest.fixture
def pair(bench: Bench) -> Session:
    """Two H100, healthy."""
    return Session(bench, sample("8xH100", gpus=2))


def signs(gpu: Gpu) -> list[tuple[str, str]]:
    return [(signal.name, signal.state) for signal in gpu.signals]


WELL = [("recovery", "ok")]


def test_a_healthy_gpu_says_only_that_its_driver_asks_for_nothing(board: Session) -> None:
    """With "recovery" there, what XIDs are feared to mean can be overruled; older drivers do not have it."""
    assert [signs(gpu) for gpu in board.read().gpus] == [WELL] * 8
    old = board.description.with_gpu(0, recovery=None)
    board.bench.describe(old)
    assert signs(board.read().gpus[0]) == []


def test_each_sign_is_seen_on_its_gpu(board: Session) -> None:
    board.control.set(0, "recovery", 1)
    board.control.set(1, "recovery", 4)
    board.control.set(2, "errors", 5, 3, 9, 9)
    board.control.set(3, "rows", 0, 1, 1, 0)
    board.control.set(4, "rows", 0, 1, 1, 1)
    board.control.set(5, "clocks", 0x8 | 0x40)
    board.control.set(6, "clocks", 0x1 | 0x4 | 0x20)
    gpus = board.read().gpus
    assert [signs(gpu) for gpu in gpus] == [
        [("recovery", "bad")],
        [("recovery", "bad")],
        [*WELL, ("ecc", "suspect")],
        [*WELL, ("rows", "suspect")],
        [*WELL, ("rows", "bad")],
        [*WELL, ("clocks", "suspect")],
        WELL,
        WELL,
    ]
    assert [gpus[index].signals[-1].reason for index in (0, 1, 2, 5)] == [
        "the driver asks for a reset of this GPU",
        "the driver asks to drain this GPU and then reset it",
        "3 uncorrected ECC errors since the driver was loaded",
        "clocks are held down: too hot",
    ]


def test_pages_that_wait_to_be_retired_are_a_sign_before_ampere(bench: Bench) -> None:
    session = Session(bench, sample("8xV100"))
    session.control.set(2, "retired", 1, 1, 1)
    assert [signs(gpu) for gpu in session.read().gpus] == [[], [], [("pages", "suspect")], [], [], [], [], []]


def test_costly_signs_are_asked_once_a_minute_and_cheap_ones_always(pair: Session) -> None:
    found = pair.python("""
def names():
    return [signal["name"] for signal in read()["gpus"][0]["signals"] if signal["state"] != "ok"]
result = [names()]
asked = calls("nvmlDeviceGetTotalEccErrors")
control.set(0, "errors", 0, 2, 0, 2)
control.set(0, "clocks", 0x80)
now[0] += 30
result += [names(), calls("nvmlDeviceGetTotalEccErrors") - asked]
now[0] += 31
result += [names(), calls("nvmlDeviceGetTotalEccErrors") - asked]
""")
    assert found == [[], ["clocks"], 0, ["clocks", "ecc"], 2]


# ---- links ----


def test_a_link_that_goes_down_is_seen_at_the_next_look(board: Session) -> None:
    """Without asking again where the links lead."""
    found = board.python("""
first = read()
asked = calls("nvmlDeviceGetNvLinkRemotePciInfo_v2")
control.set(3, "link", 0, 0, 2, "00000000:F0:00.0")
second = read()
control.clear()
result = [first, second, read(), calls("nvmlDeviceGetNvLinkRemotePciInfo_v2") - asked]
""")
    first, second, third = (Reading.model_validate(one) for one in found[:3])
    assert signs(second.gpus[3]) == [*WELL, ("nvlink", "suspect")]
    assert second.gpus[3].nvlink is not None
    assert (second.gpus[3].nvlink.active, second.gpus[3].nvlink.total) == (17, 18)
    assert sorted(link.nvlinks for link in second.links) == [17] * 7 + [18] * 21
    assert third == first
    assert found[3] == 0


def test_a_gpu_with_all_links_down_is_out_of_the_mesh_and_its_peers_are_not(bench: Bench) -> None:
    gpus = Session(bench, sample("8xH100-one-out")).read().gpus
    out = [gpu.nvlink is not None and gpu.nvlink.out_of_mesh for gpu in gpus]
    assert out == [False, False, True, False, False, False, False, False]
    assert [signal.reason for signal in gpus[2].signals if signal.name == "nvlink"] == ["18 of 18 NVLinks are down"]


def test_cards_without_a_bridge_have_nothing_wrong_with_them(bench: Bench) -> None:
    """Half of this board's cards are bridged in pairs; the links of a slot that has no bridge are down for good."""
    described = sample("8xA100PCIe")
    unbridged = tuple(replace(link, active=False) for link in described.gpus[0].links)
    session = Session(bench, described.with_gpu(0, links=unbridged).with_gpu(1, links=unbridged))
    assert [signs(gpu) for gpu in session.read().gpus] == [[]] * 8


# ---- the fabric ----


def test_an_unhealthy_fabric_is_a_sign_in_words(bench: Bench) -> None:
    cluster = "11111111-2222-3333-4444-555555555555"
    degraded = ALL_WELL ^ 0b11  # bits 0-1: degraded bandwidth, from false (2) to true (1)
    manager_gone = ALL_WELL ^ 0b11 << 14
    described = sample("4xGB200", gpus=4)
    described = described.with_gpu(1, fabric=Fabric(cluster, 7, mask=degraded, summary=2))
    described = described.with_gpu(2, fabric=Fabric(cluster, 7, mask=manager_gone, summary=0))
    described = described.with_gpu(3, fabric=Fabric(cluster, 7, state=3, status=999))
    gpus = Session(bench, described).read().gpus
    assert [signs(gpu) for gpu in gpus] == [WELL, *[[("fabric", "suspect"), *WELL]] * 3]
    assert [gpu.fabric.health if gpu.fabric else "" for gpu in gpus] == [
        "healthy",
        "unhealthy: degraded bandwidth",
        "fabric manager not connected",
        "joining it failed: Unknown Error (999)",
    ]


# ---- XIDs ----


def test_an_xid_is_told_once_with_its_gpu_and_instance(pair: Session) -> None:
    found = pair.python(f"""{UNTIL_XIDS}
read()
control.xid(1, 79)
control.xid(0, 94, gi=2, ci=0)
result = [xids(2), read()["xids"]]
""")
    assert {Xid.model_validate(one) for one in found[0]} == {
        Xid(gpu=pair.gpu(1), code=79),
        Xid(gpu=pair.gpu(0), code=94, gi_id=2, ci_id=0),
    }
    assert found[1] == []


def test_a_storm_of_xids_hides_none(pair: Session) -> None:
    """A program in a loop of faults after the GPU has fallen off the bus, all between two looks."""
    found = pair.python(f"""{UNTIL_XIDS}
from types import SimpleNamespace
from app.agent.nvml.events import XID, NO_INSTANCE
read()
control.xid(0, 79)
first = xids(1)
def told(code):
    event = SimpleNamespace(eventType=XID, eventData=code, gpuInstanceId=NO_INSTANCE, computeInstanceId=NO_INSTANCE)
    nvml._events._put(event, "GPU-a")
told(79)
for _ in range(5000):
    told(13)
result = [one["code"] for one in read()["xids"]]
""")
    assert found == [79, 13]


def test_a_wait_that_fails_is_begun_anew(pair: Session) -> None:
    found = pair.python(f"""{UNTIL_XIDS}
control.fail("nvmlEventSetWait_v2", 999, times=1)
read()
due = time.monotonic() + 20
while calls("nvmlEventSetCreate") < 2 and time.monotonic() < due:
    read()
control.xid(0, 48)
result = xids(1)
""")
    assert [one["code"] for one in found] == [48]


def test_a_wait_that_never_returns_is_said(pair: Session) -> None:
    """Silence would look like health."""
    pair.control.hang("nvmlEventSetWait_v2")
    found = pair.python("""
import app.agent.nvml.events as events
events.HUNG_SECONDS = 0.2
def said():
    return [gpu["health_reason"] for gpu in read()["gpus"]]
result = [said()]
due = time.monotonic() + 20
while said() == ["", ""] and time.monotonic() < due:
    pass
result += [said()]
""")
    assert found == [["", ""], ["events: NVML's wait for them does not return"] * 2]


def test_one_gpu_whose_events_cannot_be_had_does_not_silence_the_others(pair: Session) -> None:
    pair.control.fail("nvmlDeviceRegisterEvents", 999, gpu=0)
    found = pair.python(f"""{UNTIL_XIDS}
first = read()
control.xid(1, 63)
result = [[gpu["health_reason"] for gpu in first["gpus"]], xids(1)]
""")
    assert found[0] == ["events: Unknown Error (999)", ""]
    assert [(one["gpu"], one["code"]) for one in found[1]] == [(pair.gpu(1), 63)]


def test_a_lost_gpu_does_not_silence_the_others(pair: Session) -> None:
    found = pair.python(f"""{UNTIL_XIDS}
read()
control.xid(0, 79)
control.lose(0)
first = xids(1)
control.xid(1, 13)
result = [first, xids(1)]
""")
    assert [[(one["gpu"], one["code"]) for one in of_time] for of_time in found] == [
        [(pair.gpu(0), 79)],
        [(pair.gpu(1), 13)],
    ]


def test_a_driver_without_events_is_read_all_the_same(bench: Bench) -> None:
    session = Session(Bench(bench.directory, without=("nvmlEventSetCreate",)), sample("8xH100", gpus=2))
    reading = session.read()
    assert (reading.error, reading.xids) == ("", ())
    assert {gpu.health_reason for gpu in reading.gpus} == {""}


def test_closing_a_session_ends_its_thread_and_the_next_begins_another(pair: Session) -> None:
    found = pair.python(f"""{UNTIL_XIDS}
import threading
def waiting():
    return sum(thread.name == "nvml-events" for thread in threading.enumerate())
read()
result = [waiting()]
nvml.close()
result += [waiting()]
read()
control.xid(0, 31)
result += [waiting(), len(xids(1))]
""")
    assert found == [1, 0, 1, 1]


def test_an_xid_before_nvml_failed_is_told_when_it_answers_again(pair: Session) -> None:
    """The driver may go down with what the XID was about; the reason must not go with it."""
    found = pair.python(f"""{UNTIL_XIDS}
read()
control.xid(0, 119)
due = time.monotonic() + 20
while not nvml._events._xids and time.monotonic() < due:
    time.sleep(0.01)
control.fail("nvmlDeviceGetCount_v2", 999, times=1)
failed = read()
result = [failed["error"], failed["xids"], xids(1)]
""")
    assert found[:2] == ["NVML: Unknown Error (999)", []]
    assert [one["code"] for one in found[2]] == [119]
