"""What the fake library promises, asked of a real GPU: `pytest -m gpu` where there is a driver, else skipped in words.

Reads only, unless TANGRAM_GPU_WRITE=1: then slices are made and removed on an idle GPU that is in MIG mode already;
modes are never switched here. TANGRAM_RECORD=1 keeps the report under `recorded/`.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pynvml
import pytest

from app.agent.nvml import Nvml
from app.agent.reading import Reading
from app.report import Gpu, Make, Mig, NodeReport, OrderList

pytestmark = pytest.mark.gpu

RECORDED = Path(__file__).parent / "recorded"
UUID = re.compile(r"^GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
BUS_ID = re.compile(r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.0$")


def no_gpu() -> str:
    """Why these tests have nothing to ask; empty where they have."""
    try:
        ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "no NVIDIA driver here: libnvidia-ml.so.1 cannot be loaded"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"NVML does not begin: {error}"
    try:
        return "" if pynvml.nvmlDeviceGetCount() else "the driver has no GPU"
    finally:
        pynvml.nvmlShutdown()


@pytest.fixture(scope="module")
def nvml() -> Iterator[Nvml]:
    reason = no_gpu()
    if reason:
        pytest.skip(reason)
    session = Nvml()
    yield session
    session.close()


@pytest.fixture(scope="module")
def reading(nvml: Nvml) -> Reading:
    return nvml.read()


def capable(reading: Reading) -> list[tuple[Gpu, Mig]]:
    return [(gpu, gpu.mig) for gpu in reading.gpus if gpu.mig is not None]


def test_everything_is_read_and_nothing_fails(reading: Reading, capsys: pytest.CaptureFixture[str]) -> None:
    report = NodeReport(node="recorded", version=1, **_shared(reading))
    text = report.model_dump_json(by_alias=True, indent=2, exclude_defaults=True)
    with capsys.disabled():
        print(f"\n{text}\nmakes slices: {reading.makes_slices} {reading.makes_none}")
    if os.environ.get("TANGRAM_RECORD") == "1":
        _record(reading, text)
    assert reading.error == ""
    assert reading.unreadable == ()
    assert {gpu.health_reason for gpu in reading.gpus} == {""}
    assert all((reading.driver, reading.nvml, reading.cuda))


def test_each_gpu_is_who_it_says(reading: Reading) -> None:
    for gpu in reading.gpus:
        assert UUID.match(gpu.uuid)
        assert BUS_ID.match(gpu.pci)
        assert gpu.product
        assert gpu.architecture != "unknown"
        assert gpu.compute_capability
        assert gpu.memory_mib > 0
        assert gpu.free_mib is not None
        assert gpu.free_mib <= gpu.memory_mib
        assert gpu.free_mib % 256 == 0
        assert gpu.watts > 0


def test_profiles_have_legal_places_on_a_grid(reading: Reading) -> None:
    """Privileged; some drivers list them only while MIG is on."""
    boards = [mig for _, mig in capable(reading) if mig.profiles and reading.makes_slices]
    if not boards:
        pytest.skip("no GPU here shows MIG profiles to this user")
    for mig in boards:
        for profile in mig.profiles:
            assert profile.placements, profile.name
            assert profile.compute_slices > 0
            assert not profile.name.startswith("MIG")
        assert len({profile.id for profile in mig.profiles}) == len(mig.profiles), "ids, not enums"


def test_instances_are_where_their_profiles_may_be(reading: Reading) -> None:
    instances = [(mig, one) for _, mig in capable(reading) for one in mig.instances if one.start is not None]
    if not instances:
        pytest.skip("no MIG instance is seen here")
    for mig, one in instances:
        (profile,) = [profile for profile in mig.profiles if profile.name == one.profile]
        assert (one.start, one.size) in {(place.start, place.size) for place in profile.placements}


def test_links_join_gpus_of_this_node(reading: Reading) -> None:
    if len(reading.gpus) < 2:
        pytest.skip("one GPU has no links")
    uuids = {gpu.uuid for gpu in reading.gpus}
    for link in reading.links:
        assert {link.a, link.b} <= uuids
        assert bool(link.nvlinks) == bool(link.gbs)


def test_a_quiet_look_is_quick_and_says_the_same(nvml: Nvml, reading: Reading) -> None:
    """Memory and processes may move on a machine that is in use; who and where the GPUs are may not."""
    started = datetime.now(UTC)
    again = nvml.read()
    seconds = (datetime.now(UTC) - started).total_seconds()
    print(f"a quiet look took {1000 * seconds:.1f} ms on {len(again.gpus)} GPUs")
    assert [(gpu.uuid, gpu.pci, gpu.numa, gpu.nic) for gpu in again.gpus] == [
        (gpu.uuid, gpu.pci, gpu.numa, gpu.nic) for gpu in reading.gpus
    ]
    assert seconds < 1


@pytest.mark.skipif(os.environ.get("TANGRAM_GPU_WRITE") != "1", reason="changes the GPU: only with TANGRAM_GPU_WRITE=1")
def test_a_slice_is_made_where_it_was_ordered_and_removed_again(nvml: Nvml) -> None:
    empty = [(gpu, mig) for gpu, mig in capable(nvml.read()) if mig.enabled and not mig.instances]
    if not empty:
        pytest.skip("no GPU here is in MIG mode and empty")
    gpu, mig = empty[0]
    for profile in mig.profiles:
        last = profile.placements[-1]
        order = Make(gpu=gpu.uuid, profile=profile.name, start=last.start)
        if nvml.change(OrderList(service="test", version=1, make=(order,))):
            continue  # more than this board has now (+gfx, say); that a failure leaves nothing is looked at below
        (made,) = _mig(nvml.read(), gpu.uuid).instances
        assert (made.profile, made.start, made.size) == (profile.name, last.start, last.size)
        assert made.uuid is not None
        assert nvml.change(OrderList(service="test", version=2, remove=(order,))) == ()
    assert _mig(nvml.read(), gpu.uuid).instances == ()


def _mig(reading: Reading, uuid: str) -> Mig:
    return next(mig for gpu, mig in capable(reading) if gpu.uuid == uuid)


def _shared(reading: Reading) -> dict[str, object]:
    return {name: getattr(reading, name) for name in Reading.model_fields if name in NodeReport.model_fields}


def _record(reading: Reading, text: str) -> None:
    """Without serial numbers: they are nobody's business."""
    report = json.loads(text)
    for gpu in report["gpus"]:
        gpu.pop("serial", None)
    product = re.sub(r"[^A-Za-z0-9]+", "-", reading.gpus[0].product)
    path = RECORDED / f"{datetime.now(UTC):%Y-%m-%d}-{product}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"kept as {path.name}")
