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
from tests.fake_nvml.describe import Instance, Process, describe
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
