"""What the fake library says about boards of each kind, from pynvml's side (hardware.md 1.3, 1.5, 1.6)."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from solver.products import PRODUCTS
from solver.samples import KINDS, sample_node
from solver.topology import PCIE_GBS
from tests.agent.conftest import Bench
from tests.fake_nvml.build import SOURCES
from tests.fake_nvml.describe import NVLINK_GBS_BOTH_WAYS, NodeDescription, describe

PROMISED = """
nvmlInitWithFlags nvmlShutdown nvmlErrorString nvmlSystemGetDriverVersion nvmlSystemGetNVMLVersion
nvmlSystemGetCudaDriverVersion_v2 nvmlDeviceGetCount_v2 nvmlDeviceGetHandleByIndex_v2 nvmlDeviceGetHandleByUUID
nvmlDeviceGetHandleByPciBusId_v2 nvmlDeviceGetUUID nvmlDeviceGetName nvmlDeviceGetArchitecture
nvmlDeviceGetCudaComputeCapability nvmlDeviceGetMemoryInfo nvmlDeviceGetMemoryInfo_v2 nvmlDeviceGetPciInfo_v3
nvmlDeviceGetMinorNumber nvmlDeviceGetSerial nvmlDeviceGetMemoryAffinity nvmlDeviceGetCpuAffinityWithinScope
nvmlDeviceGetNumaNodeId nvmlDeviceGetTopologyCommonAncestor nvmlDeviceGetP2PStatus nvmlDeviceGetNvLinkState
nvmlDeviceGetNvLinkVersion nvmlDeviceGetNvLinkRemotePciInfo_v2 nvmlDeviceGetNvLinkRemoteDeviceType
nvmlDeviceGetGpuFabricInfoV nvmlDeviceGetFieldValues nvmlDeviceGetTotalEccErrors nvmlDeviceGetRemappedRows
nvmlDeviceGetRetiredPages nvmlDeviceGetComputeRunningProcesses_v3 nvmlDeviceGetPowerUsage nvmlDeviceGetTemperatureV
nvmlDeviceGetTemperature nvmlDeviceGetMigMode nvmlDeviceSetMigMode nvmlDeviceGetGpuInstanceProfileInfoV
nvmlDeviceGetGpuInstanceProfileInfoByIdV nvmlDeviceGetGpuInstancePossiblePlacements_v2
nvmlDeviceGetGpuInstanceRemainingCapacity nvmlDeviceCreateGpuInstance nvmlDeviceCreateGpuInstanceWithPlacement
nvmlDeviceGetGpuInstances nvmlDeviceGetGpuInstanceById nvmlGpuInstanceGetInfo nvmlGpuInstanceDestroy
nvmlGpuInstanceGetComputeInstanceProfileInfoV nvmlGpuInstanceCreateComputeInstance
nvmlGpuInstanceCreateComputeInstanceWithPlacement nvmlGpuInstanceGetComputeInstances
nvmlGpuInstanceGetComputeInstanceById nvmlComputeInstanceGetInfo_v2 nvmlComputeInstanceDestroy
nvmlDeviceGetMaxMigDeviceCount nvmlDeviceGetMigDeviceHandleByIndex nvmlDeviceIsMigDeviceHandle
nvmlDeviceGetGpuInstanceId nvmlDeviceGetComputeInstanceId nvmlDeviceGetDeviceHandleFromMigDeviceHandle
nvmlDeviceGetAttributes_v2 nvmlEventSetCreate nvmlDeviceRegisterEvents nvmlDeviceGetSupportedEventTypes
nvmlEventSetWait_v2 nvmlEventSetFree
"""
"""The list of hardware.md 3.2."""


def node(kind: str) -> NodeDescription:
    return describe(sample_node("n1", kind))


def test_every_promised_symbol_is_there(bench: Bench) -> None:
    bench.describe(node("8xH100"))
    missing = bench.pynvml(
        f"""
library = ctypes.CDLL("libnvidia-ml.so.1")
result = [symbol for symbol in {PROMISED.split()!r} if not hasattr(library, symbol)]
"""
    )
    assert missing == []


def test_pynvml_knows_every_symbol_that_is_there() -> None:
    """A slip in a name would otherwise be a call that nobody can make."""
    import pynvml

    text = "".join(source.read_text() for source in SOURCES if source.suffix == ".c")
    exported = set(re.findall(r"^(?:API |NUMBER\(|.* \*)(nvml\w+)", text, re.MULTILINE))
    assert len(exported) > len(PROMISED.split())
    known = set(re.findall(r'"(nvml\w+)"', Path(pynvml.__file__).read_text()))
    assert exported - known == {"nvmlInit_v2"}


def test_every_sample_is_wired_as_its_matrix(bench: Bench) -> None:
    """Names, memory, NUMA nodes and the bandwidth of each pair, out of NVML as they went in."""
    bench.describe(node(KINDS[0]))
    with bench.session() as session:
        session(
            """
def look():
    gpus = [device(i) for i in range(nvmlDeviceGetCount())]
    buses = [nvmlDeviceGetPciInfo(gpu).busId for gpu in gpus]
    def links(gpu):
        ends = []
        for link in range(NVML_NVLINK_MAX_LINKS):
            try:
                if nvmlDeviceGetNvLinkState(gpu, link):
                    ends.append([nvmlDeviceGetNvLinkRemoteDeviceType(gpu, link),
                                 nvmlDeviceGetNvLinkRemotePciInfo(gpu, link).busId])
            except NVMLError:
                break
        return ends
    return {"gpus": [[nvmlDeviceGetUUID(gpu), nvmlDeviceGetName(gpu), nvmlDeviceGetMemoryInfo(gpu).total >> 20,
                      nvmlDeviceGetMemoryAffinity(gpu, 1, 0)[0]] for gpu in gpus],
            "links": [links(gpu) for gpu in gpus], "buses": buses,
            "common": [[nvmlDeviceGetTopologyCommonAncestor(a, b) for b in gpus] for a in gpus]}
"""
        )
        for kind in KINDS:
            sample = sample_node("n1", kind)
            bench.describe(describe(sample))
            seen = session("result = look()")
            assert seen["gpus"] == [[g.uuid, g.product, g.memory_mib, 1 << (g.numa or 0)] for g in sample.gpus], kind
            assert _matrix(seen, kind) == [list(row) for row in sample.links], kind


def _matrix(seen: dict[str, list[list[list[object]]]], kind: str) -> list[list[int]]:
    """GB/s both ways: links that end at the peer, or through switches the smaller of both ends; else PCIe's class."""
    names = {0: "internal", 10: "single", 20: "multiple", 30: "hostbridge", 40: "node", 50: "system"}
    product = next(product for product in PRODUCTS if product.name == sample_node("n1", kind).gpus[0].product)
    rows = []
    for a, ends in enumerate(seen["links"]):
        row: list[int] = []
        for b, others in enumerate(seen["links"]):
            direct = sum(end == [0, seen["buses"][b]] for end in ends)
            switched = min(sum(end[0] == 2 for end in ends), sum(end[0] == 2 for end in others))
            level = seen["common"][a][b]
            assert isinstance(level, int)
            nvlink = (direct or switched) * NVLINK_GBS_BOTH_WAYS.get(product.architecture, 0)
            row.append(0 if a == b else nvlink or PCIE_GBS[names[level]])
        rows.append(row)
    return rows


def test_identity_power_and_modes(bench: Bench) -> None:
    bench.describe(node("8xA100").with_gpu(1, ecc=None).with_gpu(2, ecc=False, ecc_pending=True, compute_mode=3))
    result = bench.pynvml(
        """
gpu = device()
serials = {nvmlDeviceGetSerial(device(i)) for i in range(8)}
result = {
    "serials": len(serials), "brand": nvmlDeviceGetBrand(gpu), "part": nvmlDeviceGetBoardPartNumber(gpu)[:4],
    "power": [ask(gpu) for ask in (nvmlDeviceGetEnforcedPowerLimit, nvmlDeviceGetPowerManagementLimit,
                                   nvmlDeviceGetPowerUsage)],
    "heat": [nvmlDeviceGetTemperature(gpu, 0), nvmlDeviceGetTemperatureV(gpu, 0)],
    "ecc": [nvmlDeviceGetEccMode(gpu), code(nvmlDeviceGetEccMode, device(1)), nvmlDeviceGetEccMode(device(2))],
    "errors": [code(nvmlDeviceGetTotalEccErrors, device(i), 1, 0) for i in range(3)],
    "modes": [nvmlDeviceGetComputeMode(gpu), nvmlDeviceGetComputeMode(device(2)), nvmlDeviceGetPersistenceMode(gpu)],
    "clocks": [nvmlDeviceGetCurrentClocksEventReasons(gpu), nvmlDeviceGetCurrentClocksThrottleReasons(gpu)],
    "numa": code(nvmlDeviceGetNumaNodeId, gpu),
    "tray": code(nvmlDeviceGetPlatformInfo, gpu, byref(c_nvmlPlatformInfo_v2_t())),
    "cpus": [sum(bin(w).count("1") for w in nvmlDeviceGetCpuAffinityWithinScope(gpu, 2, scope)) for scope in (0, 1)],
    "version": [nvmlDeviceGetNvLinkVersion(gpu, 0), nvmlDeviceGetFieldValues(gpu, [(166, 0)])[0].value.uiVal],
}
"""
    )
    assert result == {
        "serials": 8,
        "brand": 14,
        "part": "900-",
        "power": [400_000, 400_000, 40_000],
        "heat": [40, 40],
        "ecc": [[1, 1], 3, [0, 1]],
        "errors": [0, 3, 3],
        "modes": [0, 3, 1],
        "clocks": [1, 1],
        "numa": 3,
        "tray": 3,
        "cpus": [16, 64],
        "version": [5, 5],
    }


def test_remapped_rows_and_retired_pages_by_generation(bench: Bench) -> None:
    """Pages are retired before Ampere, rows remapped from then on, and not to be asked for while instances exist."""
    bench.describe(node("8xV100").with_gpu(0, facts=("retired 2 1 1",)))
    result = bench.pynvml(
        """
gpu = device()
count = c_uint(0)
library = ctypes.CDLL("libnvidia-ml.so.1")
null = library.nvmlDeviceGetRetiredPages(gpu, 0, byref(count), None)
result = [null, count.value, len(nvmlDeviceGetRetiredPages(gpu, 0)), len(nvmlDeviceGetRetiredPages(gpu, 1)),
          nvmlDeviceGetRetiredPagesPendingStatus(gpu), len(nvmlDeviceGetRetiredPages(device(1), 0)),
          code(nvmlDeviceGetRemappedRows, gpu), nvmlDeviceGetFieldValues(gpu, [142])[0].nvmlReturn]
"""
    )
    assert result == [0, 2, 2, 1, 1, 0, 3, 3]
    bench.describe(node("8xA100-40-mig"))
    result = bench.pynvml(
        """
gpu = device()
rows = lambda: [code(nvmlDeviceGetRemappedRows, gpu), nvmlDeviceGetFieldValues(gpu, [145])[0].nvmlReturn]
result = [rows()]
gi = make(19, 0, 1)
result += [rows(), code(nvmlDeviceGetRetiredPages, gpu, 0)]
nvmlGpuInstanceDestroy(gi)
result += [rows()]
"""
    )
    assert result == [[0, 0], [3, 3], 3, [0, 0]]


def test_fields_have_results_of_their_own(bench: Bench) -> None:
    bench.describe(node("8xH100").with_gpu(0, facts=("recovery 2", "replays 9")))
    result = bench.pynvml(
        """
asked = [230, 184, 94, 90, (164, 0), (165, 17), (166, 0), (164, 18), 91, 170, 9999]
answers = nvmlDeviceGetFieldValues(device(), asked)
result = [[v.nvmlReturn, v.value.uiVal if v.nvmlReturn == 0 else None] for v in answers]
"""
    )
    assert result == [
        [0, 2], [0, 1], [0, 9], [0, 26562], [0, 26562], [0, 1], [0, 6], [2, None], [0, 18], [3, None], [3, None]
    ]  # fmt: skip


FABRIC = """
def fabric(gpu, struct=c_nvmlGpuFabricInfo_v3_t):
    info = struct()
    nvmlDeviceGetGpuFabricInfoV(gpu, byref(info))
    return [info.state, info.status, bytes(info.clusterUuid).hex(), info.cliqueId, info.healthMask]
"""


def test_an_nvl72_tray_says_what_it_is_part_of(bench: Bench) -> None:
    """GPU memory as NUMA nodes 2, 10, 18, 26; one board serial for two GPUs; one cluster for the rack."""
    bench.describe(node("4xGB200"))
    result = bench.pynvml(
        FABRIC
        + """
gpus = [device(i) for i in range(4)]
info = c_nvmlPlatformInfo_v2_t()
nvmlDeviceGetPlatformInfo(gpus[0], byref(info))
result = {
    "numa": [nvmlDeviceGetNumaNodeId(gpu) for gpu in gpus], "modules": [nvmlDeviceGetModuleId(gpu) for gpu in gpus],
    "serials": [nvmlDeviceGetSerial(gpu) for gpu in gpus], "fabric": [fabric(gpu) for gpu in gpus],
    "v2": fabric(gpus[0], c_nvmlGpuFabricInfo_v2_t), "module": ord(info.moduleId),
    "cpus": [sum(bin(w).count("1") for w in nvmlDeviceGetCpuAffinityWithinScope(gpu, 3, 0)) for gpu in gpus],
}
"""
    )
    assert result["numa"] == [2, 10, 18, 26]
    assert result["modules"] == [2, 1, 4, 3]
    assert result["module"] == 2
    assert len(set(result["serials"])) == 2
    assert result["serials"][0] == result["serials"][1]
    assert result["cpus"] == [72] * 4
    state, status, cluster, clique, mask = result["fabric"][0]
    assert (state, status, clique, mask & 3) == (3, 0, 0, 2)
    assert result["fabric"] == [result["fabric"][0]] * 4
    assert result["v2"] == result["fabric"][0]
    assert cluster != "00" * 16
    bench.describe(describe(sample_node("another tray", "4xGB200")))
    assert bench.pynvml(FABRIC + "result = fabric(device())")[2] == cluster


def test_boards_without_a_fabric_say_so(bench: Bench) -> None:
    """HGX: completed, with no cluster. Hopper on PCIe: state 0. Before Hopper: not supported."""
    bench.describe(node("8xH100"))
    assert bench.pynvml(FABRIC + "result = fabric(device())")[:3] == [3, 0, "00" * 16]
    bench.describe(node("4xH100NVL"))
    assert bench.pynvml(FABRIC + "result = fabric(device())")[0] == 0
    bench.describe(node("8xA100"))
    assert bench.pynvml(FABRIC + "result = code(fabric, device())") == 3


def test_peer_to_peer_ends_with_mig_and_with_links(bench: Bench) -> None:
    described = node("8xH100-one-out").with_gpu(7, mig=True)
    bench.describe(replace(described, ancestors={}))
    result = bench.pynvml(
        """
status = lambda a, b: [nvmlDeviceGetP2PStatus(device(a), device(b), kind) for kind in (0, 2)]
result = [status(0, 1), status(0, 2), status(0, 7), status(7, 0), code(nvmlDeviceGetP2PStatus, device(0), device(0), 0)]
"""
    )
    assert result == [[0, 0], [0, 5], [5, 5], [5, 5], 2]
