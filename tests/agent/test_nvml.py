"""What the agent says about described nodes: the real pynvml, the real .so, the real child process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.report import Gpu, Link, NodeReport
from solver.cluster import Node
from solver.geometry import Slice
from solver.samples import KINDS, sample_node
from solver.topology import PCIE_GBS
from tests.agent.conftest import Bench
from tests.agent.session import Session
from tests.fake_nvml.control import Control
from tests.fake_nvml.describe import Fabric, Instance, Process, describe
from tests.fake_nvml.fleet import host_proc, write_cgroup

POD_A = "11111111-2222-3333-4444-555555555555"
POD_B = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
STATIC_POD = "0123456789abcdef0123456789abcdef"


def sample(kind: str) -> Node:
    return sample_node("n1", kind)


def matrix(report: NodeReport) -> tuple[tuple[int, ...], ...]:
    """GB/s both ways between each two GPUs, in index order, as the service will see them."""
    uuids = [gpu.uuid for gpu in report.gpus]
    links = {frozenset((link.a, link.b)): link for link in report.links}

    def gbs(a: str, b: str) -> int:
        link = links.get(frozenset((a, b)), Link(a=a, b=b))
        return 0 if a == b else link.gbs if link.nvlinks else PCIE_GBS[link.pcie]

    return tuple(tuple(gbs(a, b) for b in uuids) for a in uuids)


def nvlinks(report: NodeReport) -> list[int]:
    return [link.nvlinks for link in report.links if link.nvlinks]


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_board_is_reported_as_it_is(bench: Bench, kind: str) -> None:
    """Links, NUMA nodes, memory and names come back out of NVML as they went into the description."""
    node = sample(kind)
    report = bench.report(describe(node))
    assert report.error == ""
    assert matrix(report) == node.links
    assert [(g.uuid, g.index, g.product, g.memory_mib, g.numa) for g in report.gpus] == [
        (g.uuid, g.index, g.product, g.memory_mib, g.numa) for g in node.gpus
    ]
    out_of_mesh = [g for g in report.gpus if g.nvlink is not None and g.nvlink.out_of_mesh]
    assert [g.index for g in out_of_mesh] == ([2] if kind == "8xH100-one-out" else [])
    assert {(g.health, g.health_reason) for g in report.gpus if g not in out_of_mesh} == {("ok", "")}


def test_hgx_h100_reaches_every_gpu_over_all_links(bench: Bench) -> None:
    report = bench.report(describe(sample("8xH100")))
    assert (report.driver, report.cuda, report.nvml) == ("580.95.05", "13.0", "13.580.95.05")
    assert nvlinks(report) == [18] * 28
    assert {link.gbs for link in report.links} == {900}
    assert [link.pcie for link in report.links if link.a == report.gpus[0].uuid] == ["node"] * 3 + ["system"] * 4
    first = report.gpus[0]
    assert (first.architecture, first.compute_capability, first.minor) == ("hopper", "9.0", 0)
    assert first.pci == "0000:10:00.0"
    assert first.mig is not None
    assert not first.mig.enabled
    assert len(first.mig.profiles) == 7, "what could be made is known with MIG off, too"


def test_switch_links_count_what_both_ends_have(bench: Bench) -> None:
    """A GPU with links down can use fewer with every peer; the others keep theirs."""
    described = describe(sample("8xH100"))
    links = described.gpus[3].links
    half = tuple(replace(link, active=number < 9) for number, link in enumerate(links))
    report = bench.report(described.with_gpu(3, links=half))
    assert sorted(nvlinks(report)) == [9] * 7 + [18] * 21


def test_switches_that_a_virtual_machine_hides_still_count(bench: Bench) -> None:
    described = describe(sample("8xH100"))
    for index, gpu in enumerate(described.gpus):
        described = described.with_gpu(index, links=tuple(replace(link, remote_type=255) for link in gpu.links))
    assert nvlinks(bench.report(described)) == [18] * 28


def test_dgx1v_has_its_exact_matrix(bench: Bench) -> None:
    """Eight single and eight double links, twelve pairs without (nvidia-smi topo -m of several DGX-1V)."""
    report = bench.report(describe(sample("8xV100")))
    assert sorted(nvlinks(report)) == [1] * 8 + [2] * 8
    of_first = {link.b: (link.nvlinks, link.gbs) for link in report.links if link.a == report.gpus[0].uuid}
    peers = [of_first.get(gpu.uuid, (0, 0)) for gpu in report.gpus[1:]]
    assert peers == [(1, 50), (1, 50), (2, 100), (2, 100), (0, 0), (0, 0), (0, 0)]
    assert report.gpus[0].mig is None


def test_a_direct_link_counts_only_where_both_ends_list_it(bench: Bench) -> None:
    described = describe(sample("8xV100"))
    down = (replace(described.gpus[0].links[2], active=False),)  # one of the two links to GPU 3
    links = described.gpus[0].links[:2] + down + described.gpus[0].links[3:]
    report = bench.report(described.with_gpu(0, links=links))
    pair = next(link for link in report.links if (link.a, link.b) == (report.gpus[0].uuid, report.gpus[3].uuid))
    assert (pair.nvlinks, pair.gbs) == (1, 50)


def test_l40s_has_pcie_only(bench: Bench) -> None:
    report = bench.report(describe(sample("8xL40S")))
    assert nvlinks(report) == []
    assert [link.pcie for link in report.links[:3]] == ["single", "node", "node"]
    assert {gpu.mig for gpu in report.gpus} == {None}
    assert {gpu.architecture for gpu in report.gpus} == {"ada"}


def in_mig_mode() -> Node:
    """An A100-40 node, all in MIG mode, with a 3g at 4 and two 1g on GPU 0."""
    node = sample("8xA100-40-mig")
    slices = (Slice("3g.20gb", 4), Slice("1g.5gb", 0), Slice("1g.5gb", 2))
    return replace(node, gpus=(replace(node.gpus[0], instances=slices), *node.gpus[1:]))


def test_a100_in_mig_mode_shows_geometry_and_instances(bench: Bench) -> None:
    node = in_mig_mode()
    report = bench.report(describe(node))
    mig = report.gpus[0].mig
    assert mig is not None
    assert (mig.enabled, mig.pending) == (True, True)
    geometry = node.gpus[0].geometry
    assert geometry is not None
    assert {
        p.name: (p.id, p.compute_slices, p.memory_mib, tuple(at.start for at in p.placements), p.placements[0].size)
        for p in mig.profiles
    } == {p.name: (p.id, p.compute_slices, p.memory_mib, p.starts, p.size) for p in geometry.profiles}
    assert {p.name: p.engines for p in mig.profiles} == {p.name: dict(p.engines) for p in geometry.profiles}
    assert {p.name: p.max_instances for p in mig.profiles} == {
        "1g.5gb": 7, "1g.5gb+me": 1, "1g.10gb": 4, "2g.10gb": 3, "3g.20gb": 2, "4g.20gb": 1, "7g.40gb": 1
    }  # fmt: skip
    assert sorted((i.profile, i.start, i.size) for i in mig.instances) == [
        ("1g.5gb", 0, 1),
        ("1g.5gb", 2, 1),
        ("3g.20gb", 4, 4),
    ]
    assert all(i.uuid is not None and i.uuid.startswith("MIG-") for i in mig.instances)


def test_a_gpu_instance_without_compute_instance_is_seen(bench: Bench) -> None:
    """An agent that died between the two creating calls leaves one behind: it takes room and has no UUID."""
    instances = (Instance(id=5, profile="2g.10gb", start=2, uuid=None, mig_index=0),)
    report = bench.report(describe(sample("8xA100-40-mig")).with_gpu(1, instances=instances))
    mig = report.gpus[1].mig
    assert mig is not None
    assert [(i.profile, i.gi_id, i.start, i.size, i.uuid) for i in mig.instances] == [("2g.10gb", 5, 2, 2, None)]


def test_a30_grid_is_four_wide(bench: Bench) -> None:
    report = bench.report(describe(sample("4xA30-mig")))
    mig = report.gpus[0].mig
    assert mig is not None
    assert max(at.start + at.size for profile in mig.profiles for at in profile.placements) == 4
    assert {profile.name: profile.id for profile in mig.profiles} == {
        "1g.6gb": 14, "1g.6gb+me": 21, "2g.12gb": 5, "2g.12gb+me": 6, "4g.24gb": 0
    }  # fmt: skip
    assert nvlinks(report) == [4, 4]


def test_drivers_that_list_profiles_only_in_mig_mode(bench: Bench) -> None:
    described = describe(sample("8xH100"))
    report = bench.report(described.with_gpu(0, profiles_need_mig=True))
    mig = report.gpus[0].mig
    assert mig is not None
    assert mig.profiles == ()
    assert report.gpus[0].health_reason == ""


def test_mig_mode_that_waits_for_a_reset(bench: Bench) -> None:
    mig = bench.report(describe(sample("8xA100")).with_gpu(2, mig_pending=True)).gpus[2].mig
    assert mig is not None
    assert (mig.enabled, mig.pending) == (False, True)


def test_a_lost_gpu_is_bad_and_the_others_are_read(bench: Bench) -> None:
    """Never read by this agent, it has no identity but its index; it must not vanish."""
    report = bench.report(describe(sample("8xH100")).with_gpu(5, lost=True))
    assert [gpu.health for gpu in report.gpus] == ["ok"] * 5 + ["bad"] + ["ok"] * 2
    lost = report.gpus[5]
    assert (lost.uuid, lost.index) == ("unknown-5", 5)
    assert "GPU is lost" in lost.health_reason
    assert nvlinks(report) == [18] * 21


def test_without_privileges_instances_have_no_place(bench: Bench) -> None:
    node = in_mig_mode()
    seen = bench.report(replace(describe(node), privileged=False))
    assert seen.error == ""
    mig = seen.gpus[0].mig
    assert mig is not None
    assert sorted((i.profile, i.start, i.size) for i in mig.instances) == [
        ("1g.5gb", None, None),
        ("1g.5gb", None, None),
        ("3g.20gb", None, None),
    ]
    assert all(profile.placements == () for profile in mig.profiles)
    assert seen.gpus[0].health == "ok"


def test_a_device_with_a_part_of_its_instance_is_named_by_its_profile(bench: Bench) -> None:
    """Three compute instances in one 3g: one GPU instance, known by the first device."""
    instances = (Instance(id=1, profile="3g.20gb", start=0, uuid="MIG-first", mig_index=0, parts=3),)
    described = describe(sample("8xA100-40-mig")).with_gpu(0, instances=instances)
    for privileged in (True, False):
        mig = bench.report(replace(described, privileged=privileged)).gpus[0].mig
        assert mig is not None
        assert [(i.profile, i.uuid) for i in mig.instances] == [("3g.20gb", "MIG-first")]


def test_numa_comes_from_sysfs_when_the_driver_is_old(bench: Bench) -> None:
    described = describe(sample("4xH100"))
    sysfs = bench.directory / "sys/bus/pci/devices"
    for gpu, node in zip(described.gpus, ("3", "1", "-1", None), strict=True):
        device = sysfs / gpu.bus_id[4:].lower()
        device.mkdir(parents=True)
        if node is not None:
            (device / "numa_node").write_text(node + "\n")
    old = Bench(bench.directory, without=("nvmlDeviceGetMemoryAffinity",))
    report = old.report(described)
    assert [gpu.numa for gpu in report.gpus] == [3, 1, None, None]
    assert {gpu.health_reason for gpu in report.gpus} == {""}


def test_an_old_driver_without_newer_symbols_still_reports(bench: Bench) -> None:
    missing = (
        "nvmlDeviceGetMemoryInfo_v2",
        "nvmlDeviceGetArchitecture",
        "nvmlDeviceGetNvLinkRemoteDeviceType",
        "nvmlDeviceGetFieldValues",
        "nvmlDeviceGetGpuInstanceProfileInfoV",
        "nvmlDeviceGetComputeRunningProcesses_v3",
        "nvmlSystemGetCudaDriverVersion_v2",
    )
    host_proc(bench.proc)
    report = Bench(bench.directory, without=missing).report(describe(sample("8xH100")))
    assert report.error == ""
    assert (report.cuda, report.sees_pods) == ("", False), "no list of processes is not an empty one"
    first = report.gpus[0]
    assert (first.memory_mib, first.architecture, first.health) == (81559, "unknown", "ok")
    assert nvlinks(report) == [18] * 28
    assert "MIG profiles" in first.health_reason


def test_one_failing_call_costs_one_fact_of_one_gpu(bench: Bench) -> None:
    rule = "fail nvmlDeviceGetMinorNumber 999 2"
    report = bench.report(describe(sample("8xH100")).with_rules(rule))
    assert [gpu.minor for gpu in report.gpus] == [0, 1, None, 3, 4, 5, 6, 7]
    assert report.gpus[2].health == "ok"
    assert report.gpus[2].health_reason == "minor number: Unknown Error (999)"


def test_nvml_without_a_driver_is_said_in_words(bench: Bench) -> None:
    report = bench.report(describe(sample("8xH100")).with_rules("fail nvmlInitWithFlags 9"))
    assert report.gpus == ()
    assert report.error.startswith("never read; failing since 2")
    assert "Driver Not Loaded" in report.error


def test_processes_become_pods(bench: Bench) -> None:
    """By GPU, by MIG instance; cgroupfs, systemd and static pods; what is no pod or has ended is left out."""
    node = in_mig_mode()
    described = describe(node)
    on_slice = {instance.profile: instance.id for instance in described.gpus[0].instances}
    described = described.with_gpu(
        0, processes=(Process(100, on_slice["3g.20gb"]), Process(104, on_slice["3g.20gb"], kind="g"))
    )
    described = described.with_gpu(1, mig=False, processes=(Process(101), Process(102), Process(103), Process(999)))
    described = described.with_gpu(2, mig=False, processes=(Process(105, kind="m"),))
    proc = host_proc(bench.proc)
    write_cgroup(proc, 100, POD_A)
    write_cgroup(proc, 101, POD_B, systemd=False)
    write_cgroup(proc, 102, POD_A)
    write_cgroup(proc, 105, STATIC_POD)
    for pid, text in ((103, "0::/system.slice/dcgm.service\n"), (104, "")):
        (proc / str(pid)).mkdir()
        (proc / str(pid) / "cgroup").write_text(text)
    report = bench.report(described)
    assert report.sees_pods
    mig = report.gpus[0].mig
    assert mig is not None
    assert {i.profile: i.pods for i in mig.instances if i.pods} == {"3g.20gb": (POD_A,)}
    assert [gpu.pods for gpu in report.gpus[:4]] == [(), (POD_A, POD_B), (STATIC_POD,), ()]


def test_pids_of_another_namespace_name_nobody(bench: Bench) -> None:
    """Without hostPID, a PID of NVML's would be somebody else here."""
    (bench.proc / "self/ns").mkdir(parents=True)
    (bench.proc / "self/ns/pid").symlink_to("pid:[4026532999]")
    write_cgroup(bench.proc, 100, POD_A)
    report = bench.report(describe(sample("8xH100")).with_gpu(0, processes=(Process(100),)))
    assert not report.sees_pods
    assert report.gpus[0].pods == ()


def test_the_report_survives_the_wire(bench: Bench) -> None:
    report = bench.report(describe(in_mig_mode()))
    assert NodeReport.model_validate_json(report.model_dump_json(by_alias=True)) == report
    assert isinstance(report.gpus[0], Gpu)


def test_far_ends_of_links_are_asked_for_once(bench: Bench) -> None:
    """Each costs 33 ms on real boards; a GPU whose MIG mode changes is asked again."""
    bench.describe(describe(sample("8xH100")))
    changed = bench.directory / "changed.nvml"
    describe(sample("8xH100")).with_gpu(0, mig=True).write(changed)
    result = bench.python(
        f"""
import ctypes, os
from app.agent.nvml import Nvml
nvml = Nvml()
readings = [nvml.read() for _ in range(3)]
calls = ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_calls
result = [readings[0] == readings[1] == readings[2], calls(b"nvmlDeviceGetNvLinkRemotePciInfo_v2")]
os.replace({str(changed)!r}, os.environ["TANGRAM_FAKE_NVML"])
nvml.read()
result += [calls(b"nvmlDeviceGetNvLinkRemotePciInfo_v2"), calls(b"nvmlDeviceGetTopologyCommonAncestor")]
"""
    )
    assert result == [True, 8 * 18, 9 * 18, 28]


# ---- the inventory ----


def test_a_gpu_says_who_it_is_and_how_it_is_set(bench: Bench) -> None:
    described = describe(sample("8xH100")).with_gpu(1, ecc=True, ecc_pending=False, compute_mode=3, serial="1650123")
    first, second = bench.report(described).gpus[:2]
    assert (first.brand, first.watts, first.ecc, first.ecc_pending) == ("NVIDIA", 700, True, True)
    assert (first.compute_mode, second.compute_mode) == ("default", "exclusive-process")
    assert (second.serial, second.ecc, second.ecc_pending) == ("1650123", True, False)
    assert first.reserved_mib == 512
    assert first.free_mib is not None
    assert first.free_mib % 256 == 0
    assert first.memory_mib - 512 - 256 < first.free_mib <= first.memory_mib - 512


def test_what_a_board_does_not_have_is_absent(bench: Bench) -> None:
    described = describe(sample("4xT4")).with_gpu(0, ecc=None, serial="", watts=0)
    first = bench.report(described).gpus[0]
    assert (first.ecc, first.ecc_pending, first.serial, first.watts) == (None, None, "", 0)
    assert (first.nvlink, first.fabric, first.mig) == (None, None, None)
    assert first.health_reason == ""


def test_processes_have_their_memory_in_steps(bench: Bench) -> None:
    """Rounded up, so that a report does not change with every allocation; kinds as NVML lists them."""
    bench.describe(describe(sample("8xH100")))
    control = Control(bench.file)
    control.process(10, gpu=0, used_mib=257)
    control.process(11, gpu=0, used_mib=256, kind="m")
    control.process(12, gpu=0, used_mib=1, kind="g")
    report = bench.report()
    assert [(one.pid, one.kind, one.used_mib, one.pod) for one in report.gpus[0].processes] == [
        (10, "compute", 512, ""),
        (11, "mps", 256, ""),
        (12, "graphics", 256, ""),
    ]


def test_in_mig_mode_processes_are_their_instances_own(bench: Bench) -> None:
    bench.describe(describe(in_mig_mode()))
    Control(bench.file).process(10, gpu=0, profile="3g.20gb", start=4)
    write_cgroup(host_proc(bench.proc), 10, POD_A)
    gpu = bench.report().gpus[0]
    assert gpu.mig is not None
    assert (gpu.processes, gpu.pods) == ((), ())
    used = [one for one in gpu.mig.instances if one.processes]
    assert [(one.profile, one.pods, one.processes[0].pod) for one in used] == [("3g.20gb", (POD_A,), POD_A)]


def test_compute_instances_are_listed_with_their_places(bench: Bench) -> None:
    cut = (Instance(id=1, profile="3g.20gb", start=4, uuid="MIG-first", mig_index=0, parts=3),)
    mig = bench.report(describe(sample("8xA100-40-mig")).with_gpu(0, instances=cut)).gpus[0].mig
    assert mig is not None
    assert [(one.id, one.slices, one.start) for one in mig.instances[0].compute] == [(0, 1, 0), (1, 1, 1), (2, 1, 2)]
    assert len({one.uuid for one in mig.instances[0].compute}) == 3


def test_an_operator_is_told_what_a_mode_waits_for(bench: Bench) -> None:
    gpus = bench.report(describe(sample("8xA100")).with_gpu(2, mig_pending=True)).gpus
    off, waiting = gpus[0].mig, gpus[2].mig
    assert off is not None
    assert waiting is not None
    assert "nvidia-smi -i 0000:10:00.0 -mig 1" in off.note
    assert waiting.note.startswith("MIG goes on when this GPU is reset: drain the node")
    assert "nvidia-smi --gpu-reset -i 0000:20:00.0" in waiting.note
    assert not off.switches


def test_whether_slices_can_be_made_is_said_with_a_reason(bench: Bench) -> None:
    described = describe(sample("8xA100-40-mig"))
    assert Session(bench, described).read().makes_slices
    unprivileged = Session(bench, replace(described, privileged=False)).read()
    assert not unprivileged.makes_slices
    assert unprivileged.makes_none.startswith("it can see and cannot change")


# ---- links ----


def test_nvlinks_of_a_gpu_together(bench: Bench) -> None:
    """What they lead to, by board: switches, modules of one board, bridges between cards."""
    found = {}
    for kind in ("8xH100", "8xV100", "4xA100PCIe", "8xL40S"):
        nvlink = bench.report(describe(sample(kind))).gpus[0].nvlink
        found[kind] = nvlink and (nvlink.kind, nvlink.active, nvlink.total, nvlink.gbs_each_way, nvlink.version)
    assert found == {
        "8xH100": ("switch", 18, 18, 25.0, 6),
        "8xV100": ("direct", 6, 6, 25.0, 2),
        "4xA100PCIe": ("bridge", 12, 12, 25.0, 5),
        "8xL40S": None,
    }


def test_mig_takes_a_gpu_out_of_the_mesh(bench: Bench) -> None:
    """It ends peer-to-peer on that GPU, over NVLink and PCIe."""
    report = bench.report(describe(sample("8xH100")).with_gpu(0, mig=True))
    assert [gpu.nvlink is not None and gpu.nvlink.out_of_mesh for gpu in report.gpus] == [True] + [False] * 7
    first = report.gpus[0].uuid
    assert {link.p2p for link in report.links if first in (link.a, link.b)} == {False}
    assert {link.p2p for link in report.links if first not in (link.a, link.b)} == {True}
    assert all(signal.name != "nvlink" for gpu in report.gpus for signal in gpu.signals)


def test_a_tray_says_which_fabric_it_belongs_to(bench: Bench) -> None:
    cluster = "11111111-2222-3333-4444-555555555555"
    described = describe(sample("4xGB200")).with_gpu(0, fabric=Fabric(cluster, clique=7))
    described = described.with_gpu(1, fabric=Fabric(cluster, clique=7, state=2))
    gpus = bench.report(described).gpus
    assert gpus[0].fabric is not None
    assert gpus[1].fabric is not None
    assert (gpus[0].fabric.cluster, gpus[0].fabric.clique, gpus[0].fabric.state) == (cluster, 7, "completed")
    assert (gpus[1].fabric.cluster, gpus[1].fabric.clique, gpus[1].fabric.state) == ("", None, "in-progress")
    alone = bench.report(describe(sample("8xH100"))).gpus[0].fabric
    assert alone is not None
    assert (alone.state, alone.cluster, alone.clique) == ("completed", "", None), "a fabric that ends in the node"


# ---- what a look costs ----

COUNTED = """
import collections
import pynvml
look_up, count = pynvml._nvmlGetFunctionPointer, collections.Counter()
def counted(name):
    count[name] += 1
    return look_up(name)
read()
pynvml._nvmlGetFunctionPointer = counted
started = time.process_time()
for _ in range(10):
    read()
result = [{name: calls / 10 for name, calls in count.items()}, (time.process_time() - started) * 100]
"""


@pytest.mark.parametrize(("kind", "most"), [("8xH100", 8 * 30), ("8xA100-40-mig", 8 * 90), ("8xL40S", 8 * 12)])
def test_a_quiet_look_asks_only_for_what_may_change(bench: Bench, kind: str, most: int) -> None:
    """By call, of an 8-GPU board, in MIG mode with six slices on each GPU. Most are the states of NVLinks."""
    node = sample(kind)
    if node.gpus[0].geometry is not None:
        slices = tuple(Slice("1g.5gb", start) for start in range(6))
        node = replace(node, gpus=tuple(replace(gpu, instances=slices) for gpu in node.gpus))
    calls, milliseconds = Session(bench, describe(node)).python(COUNTED)
    total = sum(count for name, count in calls.items() if name != "nvmlEventSetWait_v2")
    print(f"{kind}: {total:.0f} calls a quiet look, {milliseconds:.1f} ms of CPU; {calls}")
    assert total <= most
    assert not {name for name in calls if "RemotePciInfo" in name or "Serial" in name or "TotalEcc" in name}


def test_a_text_that_is_no_text_costs_that_text_only(bench: Bench) -> None:
    session = Session(bench, replace(describe(sample_node("n1", "8xH100")), ancestors={}))
    described = bench.file.read_bytes()
    serial = session.description.gpus[1].serial.encode()
    bench.file.write_bytes(described.replace(b"serial " + serial, b"serial \xff\xfe" + serial))
    reading = session.read()
    assert reading.error == ""
    assert len(reading.gpus) == 8
    assert reading.gpus[1].serial == ""
    assert "serial number" in reading.gpus[1].health_reason
    assert reading.gpus[0].serial


def test_a_gpu_whose_facts_make_no_sense_is_unreadable_and_the_others_are_read(bench: Bench) -> None:
    session = Session(bench, describe(sample_node("n1", "8xH100")))
    session.control.set(2, "power", 4_000_000_000, 0)
    reading = session.read()
    assert [gpu.index for gpu in reading.gpus] == [0, 1, 3, 4, 5, 6, 7]
    assert [one.index for one in reading.unreadable] == [2]
    assert "watts" in reading.unreadable[0].reason


def test_when_no_gpu_answers_the_session_is_begun_anew(bench: Bench) -> None:
    """A driver that was reloaded under us lists the GPUs of before, and answers nothing until NVML is opened again."""
    session = Session(bench, describe(sample_node("n1", "8xH100")))
    found = session.python(
        """
read()
before = calls("nvmlInitWithFlags")
control.fail("nvmlDeviceGetUUID", 999)
now[0] += 100
one = read()
control.clear("fail")
two = read()
result = [len(one["unreadable"]), len(two["gpus"]), calls("nvmlInitWithFlags") - before]
"""
    )
    assert found == [8, 8, 1]
