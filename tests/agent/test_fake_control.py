"""What the control file does to a node: lost GPUs, XIDs, hanging and failing calls, processes, refusals."""

from __future__ import annotations

import pytest

from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.control import Control
from tests.fake_nvml.describe import NodeDescription, Process, describe

A100 = "8xA100-40-mig"


def node(kind: str = "8xH100") -> NodeDescription:
    return describe(sample_node("n1", kind))


EVENTS = """
events = nvmlEventSetCreate()
for i in range(nvmlDeviceGetCount()):
    nvmlDeviceRegisterEvents(device(i), nvmlEventTypeXidCriticalError, events)
def wait(milliseconds, events=events):
    try:
        event = nvmlEventSetWait_v2(events, milliseconds)
    except NVMLError as error:
        return error.value
    return [nvmlDeviceGetIndex(event.device), event.eventData, event.gpuInstanceId, event.computeInstanceId]
"""
NONE = 0xFFFFFFFF


def test_an_xid_is_delivered_once_to_every_set_that_registered_the_gpu(bench: Bench) -> None:
    bench.describe(node())
    with bench.session() as one, bench.session() as other:
        for session in (one, other):
            session(EVENTS)
        one("partial = nvmlEventSetCreate(); nvmlDeviceRegisterEvents(device(3), 8, partial)")
        bench.control.xid(gpu=2, code=79)
        bench.control.xid(gpu=node().gpus[3].uuid, code=31, gi=5, ci=0)
        for session in (one, other):
            assert session("result = [wait(5000), wait(5000), wait(0)]") == [[2, 79, NONE, NONE], [3, 31, 5, 0], 10]
        assert one("result = [wait(0, partial), wait(0, partial)]") == [[3, 31, 5, 0], 10]
    with bench.session() as later:
        later(EVENTS)
        assert later("result = wait(0)") == 10, "what happened before is not told again"


def test_waiting_blocks_until_something_happens(bench: Bench) -> None:
    """Returning at once would make agents spin; other calls go on meanwhile."""
    bench.describe(node())
    with bench.session() as session, bench.session() as other:
        session(EVENTS)
        took = session("begin = time.monotonic(); wait(250); result = time.monotonic() - begin")
        assert 0.24 < took < 5
        session.tell("begin = time.process_time(); found = wait(60000); result = [found, time.process_time() - begin]")
        assert other("result = code(nvmlDeviceGetName, device())") == 0
        bench.control.xid(gpu=1, code=48)
        found, spent = session.answer()
        assert found == [1, 48, NONE, NONE]
        assert spent < 0.05


def test_events_of_other_types_reach_who_registered_for_them(bench: Bench) -> None:
    """Only from registering on: what was before, on that GPU, was not waited for."""
    bench.describe(node())
    with bench.session() as session:
        session(EVENTS + "dbe = nvmlEventSetCreate()")
        bench.control.event(gpu=4, kind=2, data=1)
        session("nvmlDeviceRegisterEvents(device(4), nvmlEventTypeDoubleBitEccError, dbe)")
        assert session("result = [wait(0), wait(0, dbe)]") == [10, 10]
        bench.control.event(gpu=4, kind=2, data=7)
        assert session("result = [wait(0), wait(0, dbe)]") == [10, [4, 7, NONE, NONE]]


def test_only_supported_events_on_parents(bench: Bench) -> None:
    bench.describe(node(A100))
    result = bench.pynvml(
        """
events = nvmlEventSetCreate()
types = nvmlDeviceGetSupportedEventTypes(device())
fill(make(9, 0, 4), 3)
mig = nvmlDeviceGetMigDeviceHandleByIndex(device(), 0)
result = [types & 0x108, code(nvmlDeviceRegisterEvents, device(), types, events),
          code(nvmlDeviceRegisterEvents, device(), 0x4000, events), code(nvmlDeviceRegisterEvents, mig, 8, events),
          code(nvmlEventSetFree, events), code(nvmlEventSetFree, events), code(nvmlEventSetWait_v2, events, 0)]
"""
    )
    assert result == [0x108, 0, 3, 2, 0, 2, 2]


def test_a_lost_gpu_fails_alone_and_can_come_back(bench: Bench) -> None:
    """Every call on it is 15, also on its instances; the count stays; the others answer."""
    bench.describe(node(A100))
    with bench.session() as session:
        session("gpu = device(); gi = make(9, 4, 4); ci, uuid = fill(gi, 3); mig = nvmlDeviceGetHandleByUUID(uuid)")
        bench.control.lose(0)
        result = session(
            """
calls = [(nvmlDeviceGetUUID, gpu), (nvmlDeviceGetName, mig), (nvmlGpuInstanceGetInfo, gi), (nvmlDeviceGetMigMode, gpu),
         (nvmlComputeInstanceGetInfo, ci), (nvmlComputeInstanceDestroy, ci), (nvmlDeviceGetHandleByUUID, uuid),
         (nvmlDeviceGetFieldValues, gpu, [230]), (nvmlDeviceGetPowerUsage, gpu), (nvmlDeviceGetNvLinkState, gpu, 0)]
result = [nvmlDeviceGetCount(), {code(*call) for call in calls} == {15}, code(nvmlDeviceGetHandleByIndex, 0)]
result += [code(nvmlDeviceGetUUID, device(1)), code(make, 9, 0, 4, 1)]
"""
        )
        assert result == [8, True, 0, 0, 0]
        bench.control.lose(0, handle=False)
        assert session("result = code(nvmlDeviceGetHandleByIndex, 0)") == 15
        bench.control.find(0)
        assert session("result = [code(nvmlDeviceGetUUID, gpu), code(nvmlGpuInstanceGetInfo, gi)]") == [0, 0]


def test_calls_fail_so_often_in_all_processes_together(bench: Bench) -> None:
    bench.describe(node())
    bench.control.fail("nvmlDeviceGetName", 999, gpu=2, times=3)
    code = "result = [code(nvmlDeviceGetName, device(2)), code(nvmlDeviceGetName, device(3))]"
    with bench.session() as one, bench.session() as other:
        assert [one(code), other(code), one(code), other(code)] == [[999, 0], [999, 0], [999, 0], [0, 0]]
        bench.control.fail("nvmlDeviceGetName", 17)
        assert other(code) == [17, 17]
        bench.control.clear("fail")
        assert one(code) == [0, 0]


def test_slow_and_hanging_calls_hold_up_nobody_else(bench: Bench) -> None:
    bench.describe(node())
    bench.control.delay("nvmlDeviceGetSerial", 120, gpu=1)
    bench.control.hang("nvmlDeviceGetBrand")
    with bench.session() as stuck, bench.session() as other:
        stuck.tell("result = nvmlDeviceGetBrand(device())")
        took = other("begin = time.monotonic(); nvmlDeviceGetSerial(device(1)); result = time.monotonic() - begin")
        assert 0.12 <= took < 5
        took = other("begin = time.monotonic(); nvmlDeviceGetSerial(device(0)); result = time.monotonic() - begin")
        assert took < 0.12
        assert stuck.process.poll() is None


def test_a_place_can_refuse(bench: Bench) -> None:
    """As a driver does that knows something we do not; only there, only so often."""
    bench.describe(node(A100))
    bench.control.refuse_make(0, "3g.20gb", 4, times=1)
    bench.control.refuse_remove(0, 19, 0)
    result = bench.pynvml(
        """
result = [code(make, 9, 4, 4), code(make, 9, 4, 4), code(make, 9, 4, 4, 1)]
gi = make(19, 0, 1); ci, uuid = fill(gi, 1)
result += [code(nvmlComputeInstanceDestroy, ci)]
"""
    )
    assert result == [23, 0, 0, 19]


def test_processes_are_where_they_were_put_while_there_is_a_place(bench: Bench) -> None:
    bench.describe(node(A100).with_gpu(1, mig=False))
    bench.control.process(100, gpu=0, profile="3g.20gb", start=4, used_mib=700)
    bench.control.process(101, gpu=1, kind="g", used_mib=300)
    with bench.session() as session:
        session("pids = lambda h: [[p.pid, p.usedGpuMemory >> 20, p.gpuInstanceId] for p in h]")
        assert session("result = pids(nvmlDeviceGetComputeRunningProcesses(device(0)))") == []
        session("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); mig = nvmlDeviceGetHandleByUUID(uuid)")
        assert session("result = pids(nvmlDeviceGetComputeRunningProcesses(mig))") == [[100, 700, 1]]
        assert session("result = pids(nvmlDeviceGetGraphicsRunningProcesses(device(1)))") == [[101, 300, NONE]]
        free = "m = nvmlDeviceGetMemoryInfo({}, version=nvmlMemory_v2); result = [x >> 20 for x in (m.total, m.free)]"
        assert session(free.format("mig")) == [19968, 19268]
        assert session(free.format("device(1)")) == [40960, 40960 - 512 - 300]
        bench.control.clear_process(100)
        assert session("result = pids(nvmlDeviceGetComputeRunningProcesses(mig))") == []


def test_facts_can_be_set_and_unset(bench: Bench) -> None:
    bench.describe(node("8xA100"))
    control = bench.control
    control.set(0, "rows", 1, 2, 1, 0)
    control.set(0, "errors", 5, 1, 50, 10)
    control.set(1, "recovery", 1)
    control.set(1, "clocks", 0x48)
    control.set(2, "temperature", 91)
    control.set(2, "link", 3, 0, 2, "00000000:F3:00.0")
    control.set(2, "link_errors", 4, 7, 6, 5, 4, 3)
    result = bench.pynvml(
        """
zero, one, two = device(0), device(1), device(2)
fields = lambda gpu: [[v.nvmlReturn, v.value.uiVal] for v in nvmlDeviceGetFieldValues(gpu, [142, 143, 144, 145, 230])]
result = [nvmlDeviceGetRemappedRows(zero), [nvmlDeviceGetTotalEccErrors(zero, t, c) for c in (0, 1) for t in (0, 1)],
          fields(zero), fields(one)[4], nvmlDeviceGetCurrentClocksEventReasons(one),
          nvmlDeviceGetTemperatureV(two, 0), nvmlDeviceGetNvLinkState(two, 3), nvmlDeviceGetNvLinkState(two, 4),
          [nvmlDeviceGetNvLinkErrorCounter(two, 4, c) for c in range(5)]]
"""
    )
    assert result == [
        [1, 2, 1, 0],
        [5, 1, 50, 10],
        [[0, 1], [0, 2], [0, 1], [0, 0], [3, 0]],
        [0, 1],
        0x48,
        91,
        0,
        1,
        [7, 6, 5, 4, 3],
    ]
    control.set(0, "rows", 9, 9, 9, 9)
    control.unset(0, "rows")
    assert bench.pynvml("result = nvmlDeviceGetRemappedRows(device())") == [0, 0, 0, 0]


def test_a_broken_control_file_changes_nothing(bench: Bench) -> None:
    bench.describe(node())
    with bench.session() as session:
        bench.control.path.write_text("make coffee\n")
        assert session("result = code(nvmlDeviceGetName, device())") == 0


def test_numbers_are_never_given_again(bench: Bench) -> None:
    """Else a second "once" would be taken for the first, and not happen."""
    control = bench.control
    control.fail("nvmlDeviceGetName", 1, times=1)
    control.xid(0, 79)
    control.clear("fail")
    Control(bench.file).die("nvmlDeviceGetName")
    control.clear()
    for _ in range(300):
        control.xid(0, 31)
    lines = control.path.read_text().splitlines()
    assert lines[-1] == "event 303 0 8 31 - -"
    assert len(lines) == 201


@pytest.mark.parametrize("times", [1, 2])
def test_a_process_dies_so_often(bench: Bench, times: int) -> None:
    bench.describe(node())
    bench.control.die("nvmlDeviceGetName", times=times)
    for _ in range(times):
        with bench.session() as session:
            assert session("result = code(nvmlDeviceGetName, device())") is None
    assert bench.pynvml("result = code(nvmlDeviceGetName, device())") == 0


def test_processes_of_the_description_hold_instances_too(bench: Bench) -> None:
    described = node(A100).with_gpu(0, processes=(Process(pid=5, instance=1),))
    bench.describe(described)
    result = bench.pynvml("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); result = code(nvmlComputeInstanceDestroy, ci)")
    assert result == 19
