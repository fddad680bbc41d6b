"""The state that all processes of a node share: seen by each, whole after any death, gone where a reboot takes it."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from solver.geometry import Slice
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.build import build_probe
from tests.fake_nvml.describe import Instance, NodeDescription, describe
from tests.fake_nvml.state import FakeNode, read_state

A100, H100 = "8xA100-40-mig", "8xH100-mig"


def node(kind: str) -> NodeDescription:
    return describe(sample_node("n1", kind))


def places(state: FakeNode, index: int = 0) -> list[tuple[str, int, int, bool]]:
    gpu = next(gpu for gpu in state.gpus.values() if gpu.index == index)
    return [(i.profile, i.start, i.size, i.uuid is not None) for i in gpu.instances]


def test_two_processes_see_one_board(bench: Bench) -> None:
    bench.describe(node(A100))
    with bench.session() as one, bench.session() as other:
        uuid = one("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); result = uuid")
        assert other("result = [listed(), migs()]") == [[[9, 4, 4]], {"0": uuid}]
        assert other("result = code(make, 9, 4, 4)") == 23
        assert other(f"mig = nvmlDeviceGetHandleByUUID({uuid!r}); result = code(nvmlDeviceGetName, mig)") == 0
        one("nvmlComputeInstanceDestroy(ci); nvmlGpuInstanceDestroy(gi)")
        assert other("result = [listed(), migs(), code(nvmlDeviceGetName, mig)]") == [[], {}, 2]


def test_python_reads_the_state_without_the_library(bench: Bench) -> None:
    bench.describe(node(A100))
    with pytest.raises(FileNotFoundError):
        read_state(bench.file)
    with bench.session() as session:
        session("result = None")
        before = read_state(bench.file)
        uuid = session("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); make(20, 0, 1); result = uuid")
        after = read_state(bench.file)
    assert places(before) == []
    assert places(after) == [("1g.5gb+me", 0, 1, False), ("3g.20gb", 4, 4, True)]
    assert after.turn > before.turn
    gpu = after.gpus[node(A100).gpus[0].uuid]
    assert (gpu.mig, gpu.mig_pending, len(after.gpus)) == (True, True, 8)
    whole = gpu.instances[1]
    assert (whole.uuid, whole.profile_id, whole.compute[0].mig_index, whole.compute[0].slices) == (uuid, 9, 0, 3)


def test_described_instances_are_there_from_the_start(bench: Bench) -> None:
    instances = (Instance(id=1, profile="3g.20gb", start=0, uuid="MIG-first", mig_index=2, parts=3),)
    bench.describe(node(A100).with_gpu(0, instances=instances))
    bench.pynvml("result = None")
    instance = read_state(bench.file).gpus[node(A100).gpus[0].uuid].instances[0]
    assert [(part.id, part.mig_index, part.start, part.slices) for part in instance.compute] == [
        (0, 2, 0, 1),
        (1, 3, 1, 1),
        (2, 4, 2, 1),
    ]


def test_what_was_made_stays_until_an_operator_describes_other_instances(bench: Bench) -> None:
    """Facts, faults and processes may change in the description; only its lines about MIG are a new beginning."""
    described = node(A100)
    bench.describe(described)
    with bench.session() as session:
        session("gi = make(9, 4, 4)")
        bench.describe(described.with_gpu(0, lost=True).with_rules("fail nvmlDeviceGetName 999"))
        assert session("result = code(nvmlGpuInstanceGetInfo, gi)") == 15
        bench.describe(described)
        assert session("result = [listed(), code(nvmlGpuInstanceGetInfo, gi)]") == [[[9, 4, 4]], 0]
        session("make(14, 0, 2, 1)")
        instances = (Instance(id=7, profile="1g.5gb", start=6, uuid="MIG-x", mig_index=0),)
        bench.describe(described.with_gpu(0, instances=instances))
        assert session("result = [listed(0), listed(1), code(nvmlGpuInstanceGetInfo, gi)]") == [
            [[19, 6, 1]],
            [[14, 0, 2]],
            2,
        ]


def test_a_kill_at_any_moment_leaves_the_state_whole(bench: Bench) -> None:
    """The lock goes with its owner, and what was half changed has not changed."""
    bench.describe(node(A100))
    seen = set()
    for attempt in range(12):
        churn = subprocess.Popen(
            [str(build_probe()), "churn"], env=bench.environment, stdout=subprocess.PIPE, text=True
        )
        assert churn.stdout is not None
        assert churn.stdout.readline() == "churning\n"
        end = time.monotonic() + 0.004 * attempt
        while time.monotonic() < end:
            state = read_state(bench.file)
            seen.add(tuple(places(state)))
        churn.kill()
        churn.communicate()
        state = read_state(bench.file)
        assert places(state) in ([], [("3g.20gb", 4, 4, False)], [("3g.20gb", 4, 4, True)])
        bench.control.reset(0)  # takes what the dead one has left
    assert seen <= {(), (("3g.20gb", 4, 4, False),), (("3g.20gb", 4, 4, True),)}
    assert len(seen) == 3, "the reader has seen every state, and no other"
    bench.describe(node(A100).with_gpu(1, instances=(Instance(3, "1g.5gb", 0, None, 0),)))
    assert bench.pynvml("result = [code(make, 9, 4, 4), listed(1)]") == [0, [[19, 0, 1]]]


def test_two_processes_never_overlap_on_a_board(bench: Bench) -> None:
    """Both try every place; together they fill the board, no unit twice, no UUID twice."""
    bench.describe(node(A100))
    code = """
result = []
for start in range(7):
    try:
        gi = make(19, start, 1)
    except NVMLError:
        continue
    result.append([start, fill(gi, 1)[1]])
"""
    with bench.session() as one, bench.session() as other:
        one.tell(code)
        other.tell(code)
        made = one.answer() + other.answer()
    assert sorted(start for start, _ in made) == list(range(7))
    state = read_state(bench.file)
    assert [start for _, start, _, _ in places(state)] == list(range(7))
    uuids = {uuid for _, uuid in made}
    assert len(uuids) == 7
    assert {i.uuid for gpu in state.gpus.values() for i in gpu.instances} == uuids


def test_dying_between_the_two_creating_calls(bench: Bench) -> None:
    """A GPU instance without compute: no device shows it, only the privileged listing (hardware.md 1.4)."""
    bench.describe(node(A100))
    bench.control.die("nvmlDeviceCreateGpuInstanceWithPlacement")
    with bench.session() as session:
        assert session("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); result = uuid") is None
        assert session.process.wait(timeout=10) == 137
    with bench.session() as session:
        assert session("result = [migs(), listed()]") == [{}, [[9, 4, 4]]]
        assert session("result = code(make, 9, 0, 4)") == 0, "it died once"
    assert places(read_state(bench.file)) == [("3g.20gb", 0, 4, False), ("3g.20gb", 4, 4, False)]


@pytest.mark.parametrize(("kind", "after"), [(A100, True), (H100, False)])
def test_a_reboot_takes_instances_and_ampere_keeps_its_mode(bench: Bench, kind: str, after: bool) -> None:
    bench.describe(node(kind))
    with bench.session() as session:
        session("gpu = device(); gi = make(9, 4, 4); fill(gi, 3)")
        bench.control.reboot()
        assert session("result = [code(nvmlDeviceGetUUID, gpu), code(nvmlGpuInstanceGetInfo, gi)]") == [2, 2]
        assert session("result = nvmlDeviceGetMigMode(device())") == [int(after), int(after)]
        assert session("result = migs()") == {}
        boots = read_state(bench.file).boots
    assert bench.pynvml("result = nvmlDeviceGetMaxMigDeviceCount(device())") == (7 if after else 0)
    assert read_state(bench.file).boots == boots == 1, "it happens once"


def test_a_pending_mode_is_taken_at_a_reboot_by_ampere_only(bench: Bench) -> None:
    for kind, expected in (("8xA100", [1, 1]), ("8xH100", [0, 0])):
        described = node(kind).with_gpu(0, mig_pending=True)
        bench.describe(replace(described, gpus=described.gpus[:1]))
        bench.control.reboot()
        assert bench.pynvml("result = nvmlDeviceGetMigMode(device())") == expected


def test_reading_the_state_is_cheap(bench: Bench) -> None:
    """A checker reads it many times a second, on many nodes."""
    slices = tuple(Slice("1g.5gb", start) for start in range(7))
    sample = sample_node("n1", A100)
    full = replace(sample, gpus=tuple(replace(gpu, instances=slices) for gpu in sample.gpus))
    bench.describe(describe(full))
    bench.pynvml("result = None")
    begin = time.process_time()
    for _ in range(50):
        assert sum(len(gpu.instances) for gpu in read_state(bench.file).gpus.values()) == 56
    took = (time.process_time() - begin) / 50
    print(f"{took * 1e6:.0f} µs for eight full GPUs")
    assert took < 0.005


def test_a_directory_that_cannot_be_written_is_no_obstacle(bench: Bench, tmp_path: Path) -> None:
    """Then the process has a state of its own."""
    bench.describe(node(A100))
    bench.file.with_name(bench.file.name + ".state").mkdir()
    assert bench.pynvml("gi = make(9, 4, 4); result = listed()") == [[9, 4, 4]]
    assert bench.pynvml("result = listed()") == []
