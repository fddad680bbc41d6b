"""The fake library against NVML's header, from pynvml's side (hardware.md 1.2 and 3.2)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import GpuDescription, Instance, NodeDescription, Process, describe

HELPERS = """
import ctypes, pynvml
from ctypes import byref, c_uint
def code(call, *arguments, **named):
    try:
        call(*arguments, **named)
    except pynvml.NVMLError as error:
        return error.value
    return 0
pynvml.nvmlInit()
gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
"""


def node(kind: str = "8xH100") -> NodeDescription:
    return describe(sample_node("n1", kind))


def cut_a100() -> NodeDescription:
    """An A100-40 in MIG mode: a 3g at 4, a 1g at 0, and a GPU instance without compute."""
    instances = (
        Instance(id=2, profile="3g.20gb", start=4, uuid="MIG-aaaa", mig_index=0),
        Instance(id=9, profile="1g.5gb", start=0, uuid="MIG-bbbb", mig_index=3),
        Instance(id=11, profile="1g.5gb", start=1, uuid=None, mig_index=0),
    )
    processes = (Process(pid=100, instance=2), Process(pid=101, instance=9))
    return node("8xA100-40-mig").with_gpu(0, instances=instances, processes=processes)


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        ("nvmlPciInfo_t", 68),
        ("c_nvmlMemory_t", 24),
        ("c_nvmlMemory_v2_t", 40),
        ("c_nvmlGpuInstancePlacement_t", 8),
        ("c_nvmlGpuInstanceProfileInfo_v2_t", 152),
        ("c_nvmlGpuInstanceInfo_t", 24),
        ("c_nvmlDeviceAttributes", 40),
        ("c_nvmlFieldValue_t", 40),
        ("c_nvmlProcessInfo_v3_t", 24),
        ("c_nvmlGpuInstanceProfileInfo_t", 48),
        ("c_nvmlComputeInstanceProfileInfo_t", 36),
        ("c_nvmlComputeInstanceProfileInfo_v2_t", 136),
        ("c_nvmlComputeInstanceInfo_t", 32),
        ("c_nvmlComputeInstancePlacement_t", 8),
        ("c_nvmlEventData_t", 32),
        ("c_nvmlGpuFabricInfo_t", 28),
        ("c_nvmlGpuFabricInfo_v2_t", 36),
        ("c_nvmlGpuFabricInfo_v3_t", 40),
        ("c_nvmlTemperature_v1_t", 12),
        ("c_nvmlPlatformInfo_v1_t", 44),
        ("c_nvmlPlatformInfo_v2_t", 44),
        ("c_nvmlUtilization_t", 8),
    ],
)
def test_pynvml_and_the_header_agree_on_sizes(struct: str, size: int) -> None:
    """The C side asserts the same numbers at build time, so both sides mean the same bytes."""
    import ctypes

    import pynvml

    assert ctypes.sizeof(getattr(pynvml, struct)) == size


def test_version_words_are_checked(bench: Bench) -> None:
    """Profile info v2 and v3 have one size and two layouts: only the version word tells them apart."""
    bench.describe(node())
    result = bench.python(
        HELPERS
        + """
result = {}
for word in (0x02000028, 0x01000028, 0x02000018, 0):
    memory = pynvml.c_nvmlMemory_v2_t(version=word)
    result[hex(word)] = pynvml.nvmlLib.nvmlDeviceGetMemoryInfo_v2(gpu, byref(memory))
def profile(word):
    raw = (ctypes.c_char * 152)()
    ctypes.cast(raw, ctypes.POINTER(c_uint))[0] = word
    answer = pynvml.nvmlLib.nvmlDeviceGetGpuInstanceProfileInfoV(gpu, 0, raw)
    return answer, list(ctypes.cast(raw, ctypes.POINTER(c_uint))[0:5])
result["v2"], result["v3"], result["v1"] = profile(0x02000098), profile(0x03000098), profile(0x01000098)
"""
    )
    assert result["0x2000028"] == 0
    assert result["0x1000028"] == result["0x2000018"] == result["0x0"] == 25
    assert result["v2"] == [0, [0x02000098, 19, 0, 1, 7]]  # version, id, P2P flag, slices, instances
    assert result["v3"] == [0, [0x03000098, 19, 1, 7, 14]]  # no P2P flag: slices, instances, SMs
    assert result["v1"][0] == 25


def test_enum_on_profile_info_and_hardware_id_on_the_rest(bench: Bench) -> None:
    bench.describe(cut_a100())
    result = bench.python(
        HELPERS
        + """
info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo
result = {"codes": [code(info, gpu, n) for n in range(19)], "ids": [info(gpu, n).id for n in range(5)]}
count = c_uint(0)
result["null"] = pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(gpu, 9, None, byref(count))
result["count"] = count.value
small = (pynvml.c_nvmlGpuInstancePlacement_t * 1)()
result["small"] = code(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, gpu, 9, small, byref(c_uint(1)))
result["enum as id"] = code(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, gpu, 2, None, byref(c_uint(0)))
"""
    )
    assert result["ids"] == [19, 14, 9, 5, 0]
    assert [number for number, answer in enumerate(result["codes"]) if answer == 0] == [0, 1, 2, 3, 4, 7, 9]
    assert result["codes"][5] == 3, "a profile that the product lacks"
    assert result["codes"][18] == 2, "past the last enum"
    assert (result["null"], result["count"]) == (0, 2)
    assert result["small"] == 7
    assert result["enum as id"] == 3


def test_process_lists_answer_in_two_calls(bench: Bench) -> None:
    bench.describe(node().with_gpu(0, processes=(Process(7), Process(8), Process(9, kind="g"))))
    result = bench.python(
        HELPERS
        + """
count, other = c_uint(0), pynvml.nvmlDeviceGetHandleByIndex(1)
call = pynvml.nvmlLib.nvmlDeviceGetComputeRunningProcesses_v3
result = [call(gpu, byref(count), None), count.value]
result += [call(other, byref(count), None), count.value]
result += [[p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)]]
result += [[p.pid for p in pynvml.nvmlDeviceGetGraphicsRunningProcesses(gpu)]]
result += [pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)[0].gpuInstanceId]
"""
    )
    assert result == [7, 2, 0, 0, [7, 8], [9], 0xFFFFFFFF]


def test_mig_devices_have_holes_and_processes_of_their_own(bench: Bench) -> None:
    bench.describe(cut_a100())
    result = bench.python(
        HELPERS
        + """
most = pynvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
codes = [code(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, i) for i in range(most)]
mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 3)
parent = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig)
attributes = pynvml.nvmlDeviceGetAttributes(mig)
result = {
    "most": most, "codes": codes, "uuid": pynvml.nvmlDeviceGetUUID(mig), "name": pynvml.nvmlDeviceGetName(mig),
    "gi": pynvml.nvmlDeviceGetGpuInstanceId(mig), "parent": pynvml.nvmlDeviceGetUUID(parent),
    "pids": [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(mig)],
    "slices": attributes.gpuInstanceSliceCount, "mib": attributes.memorySizeMB,
    "memory": pynvml.nvmlDeviceGetMemoryInfo(mig, version=pynvml.nvmlMemory_v2).total,
    "is mig": pynvml.nvmlDeviceIsMigDeviceHandle(mig).value,
    "by uuid": pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByUUID("MIG-bbbb")),
    "mode of a MIG device": code(pynvml.nvmlDeviceGetMigMode, mig),
}
"""
    )
    assert result["codes"] == [0, 6, 6, 0, 6, 6, 6]
    assert (result["uuid"], result["gi"], result["pids"]) == ("MIG-bbbb", 9, [101])
    assert result["name"] == "NVIDIA A100-SXM4-40GB MIG 1g.5gb"
    assert (result["slices"], result["mib"], result["memory"]) == (1, 4864, 4864 << 20)
    assert result["is mig"] == 1
    assert result["by uuid"] == "MIG-bbbb"
    assert result["mode of a MIG device"] == 2


def test_gpu_instances_are_listed_by_profile_with_their_places(bench: Bench) -> None:
    bench.describe(cut_a100())
    result = bench.python(
        HELPERS
        + """
def listed(profile):
    array, count = (pynvml.c_nvmlGpuInstance_t * 7)(), c_uint(7)
    pynvml.nvmlDeviceGetGpuInstances(gpu, profile, array, byref(count))
    infos = [pynvml.nvmlGpuInstanceGetInfo(array[i]) for i in range(count.value)]
    return [[i.id, i.profileId, i.placement.start, i.placement.size] for i in infos]
result = {str(profile): listed(profile) for profile in (9, 19, 14)}
"""
    )
    assert result == {"9": [[2, 9, 4, 4]], "19": [[9, 19, 0, 1], [11, 19, 1, 1]], "14": []}


def test_an_ordinary_user_sees_mig_devices_but_not_where_they_sit(bench: Bench) -> None:
    bench.describe(replace(cut_a100(), privileged=False))
    result = bench.python(
        HELPERS
        + """
array, count = (pynvml.c_nvmlGpuInstance_t * 7)(), c_uint(7)
result = {
    "placements": code(pynvml.nvmlDeviceGetGpuInstancePossiblePlacements, gpu, 9, None, byref(count)),
    "instances": code(pynvml.nvmlDeviceGetGpuInstances, gpu, 9, array, byref(count)),
    "by id": code(pynvml.nvmlDeviceGetGpuInstanceById, gpu, 2),
    "processes of all": code(pynvml.nvmlDeviceGetComputeRunningProcesses_v3, gpu),
    "profiles": code(pynvml.nvmlDeviceGetGpuInstanceProfileInfo, gpu, 2),
    "device": code(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, gpu, 0),
}
"""
    )
    assert result == {
        "placements": 4,
        "instances": 4,
        "by id": 4,
        "processes of all": 4,
        "profiles": 0,
        "device": 0,
    }


def test_handles_end_with_what_they_stand_for(bench: Bench) -> None:
    """A handle of a destroyed instance, of another session, or made up, is an invalid argument and never a crash."""
    bench.describe(cut_a100())
    without = cut_a100()
    moved = (replace(without.gpus[0].instances[0], start=0, uuid="MIG-cccc"),)
    changed = bench.directory / "changed.nvml"
    without.with_gpu(0, instances=moved, processes=()).write(changed)
    result = bench.python(
        HELPERS
        + f"""
import os
mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, 0)
instance = pynvml.nvmlDeviceGetGpuInstanceById(gpu, 2)
before = [code(pynvml.nvmlDeviceGetUUID, mig), code(pynvml.nvmlGpuInstanceGetInfo, instance)]
os.replace({str(changed)!r}, os.environ["TANGRAM_FAKE_NVML"])
gone = [code(pynvml.nvmlDeviceGetUUID, mig), code(pynvml.nvmlGpuInstanceGetInfo, instance)]
same = code(pynvml.nvmlDeviceGetUUID, gpu)
kinds = [code(pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetGpuInstanceById(gpu, 2)),
         code(pynvml.nvmlGpuInstanceGetInfo, gpu), code(pynvml.nvmlDeviceGetUUID, None),
         code(pynvml.nvmlDeviceGetUUID, ctypes.c_void_p(0xDEADBEEF))]
pynvml.nvmlShutdown()
closed = code(pynvml.nvmlDeviceGetUUID, gpu)
pynvml.nvmlInit()
another_session = code(pynvml.nvmlDeviceGetUUID, gpu)
result = [before, gone, same, kinds, closed, another_session]
"""
    )
    assert result == [[0, 0], [2, 2], 0, [2, 2, 2, 2], 1, 2]


def test_sessions_are_counted(bench: Bench) -> None:
    bench.describe(node())
    result = bench.python(
        HELPERS
        + """
pynvml.nvmlInit()
pynvml.nvmlShutdown()
result = [code(pynvml.nvmlDeviceGetCount)]
pynvml.nvmlShutdown()
result += [code(pynvml.nvmlDeviceGetCount), code(pynvml.nvmlShutdown)]
"""
    )
    assert result == [0, 1, 1]


@pytest.mark.parametrize("lost", [True, "index"])
def test_a_lost_gpu_fails_alone(bench: Bench, lost: bool | str) -> None:
    bench.describe(node().with_gpu(0, lost=lost))
    result = bench.python(
        HELPERS.replace("gpu = pynvml.nvmlDeviceGetHandleByIndex(0)", "")
        + """
result = [pynvml.nvmlDeviceGetCount(), code(pynvml.nvmlDeviceGetHandleByIndex, 0)]
if result[1] == 0:
    gpu = pynvml.nvmlDeviceGetHandleByIndex(0)
    result += [code(pynvml.nvmlDeviceGetUUID, gpu), code(pynvml.nvmlDeviceGetMemoryInfo, gpu)]
result += [code(pynvml.nvmlDeviceGetUUID, pynvml.nvmlDeviceGetHandleByIndex(1))]
"""
    )
    assert result == ([8, 0, 15, 15, 0] if lost is True else [8, 15, 0])


def test_links_end_where_the_board_ends(bench: Bench) -> None:
    bench.describe(node("8xV100"))
    result = bench.python(
        HELPERS
        + """
codes = [code(pynvml.nvmlDeviceGetNvLinkState, gpu, i) for i in (0, 5, 6, 35)]
far = [pynvml.nvmlDeviceGetNvLinkRemotePciInfo(gpu, i).busId for i in range(6)]
values = pynvml.nvmlDeviceGetFieldValues(gpu, [(164, 0), (90, 0), (170, 0)])
result = [codes, far, [[v.nvmlReturn, v.value.uiVal] for v in values]]
"""
    )
    buses = [f"00000000:{bus}:00.0" for bus in ("18", "20", "28", "28", "30", "30")]
    assert result == [[0, 0, 2, 2], buses, [[0, 25781], [0, 25781], [3, 0]]]


def test_boards_without_links_or_mig_say_so(bench: Bench) -> None:
    bench.describe(node("8xL40S"))
    result = bench.python(
        HELPERS
        + """
result = [code(pynvml.nvmlDeviceGetNvLinkState, gpu, 0), code(pynvml.nvmlDeviceGetMigMode, gpu),
          code(pynvml.nvmlDeviceGetMaxMigDeviceCount, gpu)]
"""
    )
    assert result == [3, 3, 3]


def test_a_symbol_that_is_left_out_is_absent(bench: Bench) -> None:
    bench.describe(node())
    old = Bench(bench.directory, without=("nvmlDeviceGetMemoryAffinity",))
    code = HELPERS + "result = [code(pynvml.nvmlDeviceGetMemoryAffinity, gpu, 1, 0)]"
    assert bench.python(code) == [0]
    assert old.python(code) == [13]


def test_delays_counts_and_failures_by_call(bench: Bench) -> None:
    rules = ("delay nvmlDeviceGetName 60", "fail nvmlDeviceGetUUID 999 0", "fail nvmlDeviceGetPciInfo_v3 15")
    bench.describe(node().with_rules(*rules))
    result = bench.python(
        HELPERS
        + """
import time
start = time.monotonic()
pynvml.nvmlDeviceGetName(gpu); pynvml.nvmlDeviceGetName(gpu)
took = time.monotonic() - start
other = pynvml.nvmlDeviceGetHandleByIndex(1)
fake = ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_calls
result = [took >= 0.12, code(pynvml.nvmlDeviceGetUUID, gpu), code(pynvml.nvmlDeviceGetUUID, other),
          code(pynvml.nvmlDeviceGetPciInfo, other), fake(b"nvmlDeviceGetName"), fake(b"nvmlNever")]
"""
    )
    assert result == [True, 999, 0, 15, 2, 0]


def test_no_description_is_no_driver(bench: Bench) -> None:
    result = bench.python(HELPERS.split("pynvml.nvmlInit()")[0] + "result = [code(pynvml.nvmlInit)]")
    assert result == [9]


def test_a_broken_description_is_refused_and_a_broken_change_ignored(bench: Bench) -> None:
    bench.describe(node())
    result = bench.python(
        HELPERS
        + """
import os
open(os.environ["TANGRAM_FAKE_NVML"], "w").write("gpu GPU-1\\ncolour blue\\n")
result = [code(pynvml.nvmlDeviceGetUUID, gpu), pynvml.nvmlDeviceGetCount()]
pynvml.nvmlShutdown()
result += [code(pynvml.nvmlInit)]
"""
    )
    assert result == [0, 8, 999]


def test_descriptions_are_plain_values() -> None:
    described = node("8xA100-mig")
    assert isinstance(described.gpus[0], GpuDescription)
    assert described.with_gpu(1, lost=True).gpus[1].lost is True
    assert described.gpus[1].lost is False
