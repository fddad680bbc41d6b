"""MIG in the fake library, from pynvml's side: making and removing instances, mode, privileges (hardware.md 1.4)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solver.geometry import Geometry
from solver.products import PRODUCTS
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import Instance, NodeDescription, Process, describe

A100, H100 = "8xA100-40-mig", "8xH100-mig"


def node(kind: str) -> NodeDescription:
    return describe(sample_node("n1", kind))


def test_an_instance_is_made_where_it_is_wanted_and_becomes_a_device(bench: Bench) -> None:
    """Only with a compute instance is there a MIG device, and a UUID."""
    bench.describe(node(A100))
    result = bench.pynvml(
        """
gi = make(9, 4, 4)
before = [listed(), migs()]
ci, uuid = fill(gi, 3)
info, whole = nvmlComputeInstanceGetInfo(ci), nvmlGpuInstanceGetInfo(gi)
mig = nvmlDeviceGetHandleByUUID(uuid)
result = {
    "before": before, "migs": list(migs().values()) == [uuid], "name": nvmlDeviceGetName(mig),
    "ids": [info.id, info.profileId, info.placement.start, info.placement.size],
    "same gi": nvmlGpuInstanceGetInfo(info.gpuInstance).id == whole.id == nvmlDeviceGetGpuInstanceId(mig),
    "parent": nvmlDeviceGetUUID(whole.device) == nvmlDeviceGetUUID(device()),
}
array, count = (c_nvmlComputeInstance_t * 7)(), c_uint(7)
nvmlGpuInstanceGetComputeInstances(gi, 2, array, byref(count))
result["listed"] = [count.value, nvmlComputeInstanceGetInfo(array[0]).id]
result["by id"] = nvmlComputeInstanceGetInfo(nvmlGpuInstanceGetComputeInstanceById(gi, 0)).id
result["none by id"] = code(nvmlGpuInstanceGetComputeInstanceById, gi, 1)
"""
    )
    assert result == {
        "before": [[[9, 4, 4]], {}],
        "migs": True,
        "name": "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "ids": [0, 2, 0, 3],
        "same gi": True,
        "parent": True,
        "listed": [1, 0],
        "by id": 0,
        "none by id": 6,
    }


def test_what_does_not_fit_and_what_is_no_place(bench: Bench) -> None:
    """Taken: INSUFFICIENT_RESOURCES. A place the profile does not list: INVALID_ARGUMENT, as is an unknown profile."""
    bench.describe(node(A100))
    result = bench.pynvml(
        """
make(9, 4, 4)
result = {
    "overlap": [code(make, 19, 4, 1), code(make, 0, 0, 8), code(make, 14, 4, 2)],
    "no place": [code(make, 9, 2, 4), code(make, 9, 0, 3), code(make, 19, 7, 1), code(make, 14, 1, 2)],
    "profile": [code(make, 77, 0, 1), code(nvmlDeviceGetGpuInstanceRemainingCapacity, device(), 77)],
    "one +me a board": [code(make, 20, 0, 1), code(make, 20, 1, 1), code(make, 19, 1, 1)],
}
"""
    )
    assert result == {
        "overlap": [23, 23, 23],
        "no place": [2, 2, 2, 2],
        "profile": [2, 2],
        "one +me a board": [0, 23, 0],
    }


def test_the_same_instances_leave_different_room(bench: Bench) -> None:
    """{3g,1g,1g,1g} is full with 3g at 0 and takes another 1g with 3g at 4 (hardware.md 0.3)."""
    bench.describe(node(A100))
    result = bench.pynvml(
        """
room = lambda index: nvmlDeviceGetGpuInstanceRemainingCapacity(device(index), 19)
make(9, 0, 4, 0)
make(9, 4, 4, 1)
result = [room(0), room(1)]
for start in (4, 5, 6): make(19, start, 1, 0)
for start in (0, 1, 2): make(19, start, 1, 1)
result += [room(0), room(1), code(make, 19, 3, 1, 1)]
result += [code(nvmlDeviceCreateGpuInstance, device(0), 19)]
"""
    )
    assert result == [3, 4, 0, 1, 0, 23]


def test_without_a_place_the_order_decides(bench: Bench) -> None:
    """19,19,14,9 fails on an empty A100 although the set is feasible; 9 first works (hardware.md 1.4)."""
    bench.describe(node(A100))
    result = bench.pynvml(
        """
result = [[code(nvmlDeviceCreateGpuInstance, device(index), profile) for profile in order]
          for index, order in enumerate(((19, 19, 14, 9), (9, 19, 19, 14)))]
"""
    )
    assert result == [[0, 0, 0, 23], [0, 0, 0, 0]]


def test_removing_goes_from_the_inside_out(bench: Bench) -> None:
    """A GPU instance with a compute instance, and a compute instance with a process, are in use."""
    bench.describe(node(A100))
    bench.control.process(4711, gpu=0, profile="3g.20gb", start=4)
    result = bench.pynvml(
        """
gi = make(9, 4, 4)
ci, uuid = fill(gi, 3)
result = [code(nvmlGpuInstanceDestroy, gi), code(nvmlComputeInstanceDestroy, ci)]
result += [[p.pid for p in nvmlDeviceGetComputeRunningProcesses(nvmlDeviceGetHandleByUUID(uuid))]]
"""
    )
    assert result == [19, 19, [4711]]
    bench.control.clear_process(4711)
    result = bench.pynvml(
        """
gi = nvmlDeviceGetGpuInstanceById(device(), 1)
ci = nvmlGpuInstanceGetComputeInstanceById(gi, 0)
result = [code(nvmlComputeInstanceDestroy, ci), migs(), listed(), code(nvmlGpuInstanceDestroy, gi), listed()]
"""
    )
    assert result == [0, {}, [[9, 4, 4]], 0, []]


def test_an_instance_made_anew_is_another_device_and_indices_have_holes(bench: Bench) -> None:
    bench.describe(node(A100))
    result = bench.pynvml(
        """
made = [(make(19, start, 1), start) for start in range(3)]
parts = [fill(gi, 1) for gi, _ in made]
first = migs()
nvmlComputeInstanceDestroy(parts[1][0])
hole = migs()
again, uuid = fill(made[1][0], 1)
then = migs()
result = [sorted(first), sorted(hole), sorted(then), then[1] == first[1], then[2] == first[2],
          code(nvmlDeviceGetHandleByUUID, first[1])]
"""
    )
    assert result == [[0, 1, 2], [0, 2], [0, 1, 2], False, True, 6]


def test_a_gpu_instance_can_be_cut_into_compute_instances(bench: Bench) -> None:
    """What is offered inside a GPU instance follows its slices (mig-profiles.json)."""
    bench.describe(node(A100))
    result = bench.pynvml(
        """
gi = make(9, 0, 4)
profiles = {}
for number in range(10):
    try:
        info = nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, number, 0)
        profiles[number] = [info.id, info.sliceCount, info.instanceCount, info.name]
    except NVMLError as error:
        profiles[number] = error.value
result = {"profiles": profiles}
two = nvmlGpuInstanceCreateComputeInstance(gi, 1)
place = c_nvmlComputeInstancePlacement_t(2, 1)
result["taken"] = code(nvmlGpuInstanceCreateComputeInstance, gi, 1)
result["room"] = nvmlGpuInstanceGetComputeInstanceRemainingCapacity(gi, 0)
one = nvmlGpuInstanceCreateComputeInstanceWithPlacement(gi, 0, byref(place))
result["there"] = [nvmlComputeInstanceGetInfo(ci).placement.start for ci in (two, one)]
result["names"] = sorted(nvmlDeviceGetName(nvmlComputeInstanceGetInfo(ci).device)[-11:] for ci in (two, one))
result["full"] = code(nvmlGpuInstanceCreateComputeInstanceWithPlacement, gi, 0, byref(place))
place = c_nvmlComputeInstancePlacement_t(5, 1)
result["no place"] = code(nvmlGpuInstanceCreateComputeInstanceWithPlacement, gi, 0, byref(place))
result["too large"] = code(nvmlGpuInstanceCreateComputeInstance, gi, 4)
result["v1"] = nvmlGpuInstanceGetComputeInstanceProfileInfo(gi, 2, 0, version=1).sliceCount
"""
    )
    assert result.pop("profiles") == {
        "0": [0, 1, 3, "MIG 1c.3g.20gb"],
        "1": [1, 2, 1, "MIG 2c.3g.20gb"],
        "2": [2, 3, 1, "MIG 3g.20gb"],
        **{str(number): 3 for number in range(3, 9)},
        "9": 2,
    }
    assert result == {
        "taken": 23,
        "room": 1,
        "there": [0, 2],
        "names": [" 1c.3g.20gb", " 2c.3g.20gb"],
        "full": 23,
        "no place": 2,
        "too large": 3,
        "v1": 3,
    }


def test_hopper_changes_its_mode_at_once_and_handles_end(bench: Bench) -> None:
    bench.describe(node("8xH100"))
    result = bench.pynvml(
        """
gpu, other = device(), device(1)
events = nvmlEventSetCreate()
nvmlDeviceRegisterEvents(other, nvmlEventMigConfigChange, events)
nvmlDeviceRegisterEvents(gpu, nvmlEventMigConfigChange, events)
result = [nvmlDeviceGetFieldValues(gpu, [184])[0].value.uiVal, nvmlDeviceGetMigMode(gpu), code(make, 9, 0, 4)]
result += [nvmlDeviceSetMigMode(gpu, 1), code(nvmlDeviceGetUUID, gpu), code(nvmlDeviceGetUUID, other)]
result += [nvmlDeviceGetMigMode(device()), nvmlEventSetWait_v2(events, 1000).eventType]
gi = make(9, 0, 4)
result += [code(nvmlDeviceSetMigMode, device(), 0)]
nvmlGpuInstanceDestroy(gi)
result += [nvmlDeviceSetMigMode(device(), 0), nvmlDeviceGetMigMode(device()), nvmlDeviceSetMigMode(device(), 0)]
"""
    )
    assert result == [1, [0, 0], 3, 0, 2, 0, [1, 1], 0x100, 19, 0, [0, 0], 0]


def test_a_used_gpu_keeps_its_mode_pending(bench: Bench) -> None:
    bench.describe(node("8xH100").with_gpu(0, processes=(Process(7),)))
    result = bench.pynvml(
        "result = [nvmlDeviceSetMigMode(device(), 1), nvmlDeviceGetMigMode(device()), code(make, 9, 0, 4)]"
    )
    assert result == [19, [0, 1], 3]


def test_ampere_changes_its_mode_at_a_reset(bench: Bench) -> None:
    bench.describe(node("8xA100"))
    result = bench.pynvml(
        """
result = [nvmlDeviceGetFieldValues(device(), [184])[0].value.uiVal, nvmlDeviceSetMigMode(device(), 1)]
result += [nvmlDeviceGetMigMode(device())]
"""
    )
    assert result == [0, 16, [0, 1]]
    bench.control.reset(0)
    assert bench.pynvml("result = [nvmlDeviceGetMigMode(device(i)) for i in (0, 1)]") == [[1, 1], [0, 0]]


def test_boards_without_mig_have_none_of_it(bench: Bench) -> None:
    bench.describe(node("8xL40S"))
    result = bench.pynvml(
        """
result = [code(nvmlDeviceSetMigMode, device(), 1), code(make, 9, 0, 4), code(nvmlDeviceCreateGpuInstance, device(), 9),
          code(nvmlDeviceGetGpuInstanceRemainingCapacity, device(), 9),
          nvmlDeviceGetFieldValues(device(), [184])[0].nvmlReturn]
"""
    )
    assert result == [3, 3, 3, 3, 3]


@pytest.mark.parametrize(("privileged", "configures"), [(False, True), (True, False)])
def test_who_may_list_and_who_may_change(bench: Bench, privileged: bool, configures: bool) -> None:
    """A container with mig/monitor and without mig/config sees every place and can change none."""
    instances = (Instance(id=2, profile="3g.40gb", start=4, uuid="MIG-a", mig_index=0),)
    described = node(H100).with_gpu(0, instances=instances)
    bench.describe(replace(described, privileged=privileged, configures=configures))
    result = bench.pynvml(
        """
array, count = (c_nvmlGpuInstance_t * 7)(), c_uint(7)
listing = [code(nvmlDeviceGetGpuInstances, device(), 9, array, byref(count)),
           code(nvmlDeviceGetGpuInstanceById, device(), 2),
           code(nvmlDeviceGetGpuInstancePossiblePlacements, device(), 9, None, byref(count)),
           code(nvmlDeviceGetGpuInstanceRemainingCapacity, device(), 9)]
changing = [code(make, 9, 0, 4), code(nvmlDeviceCreateGpuInstance, device(), 9),
            code(nvmlDeviceSetMigMode, device(), 0)]
everyone = [len(migs()), nvmlDeviceGetMigMode(device()), code(nvmlDeviceGetGpuInstanceProfileInfo, device(), 0)]
result = [listing, changing, everyone]
"""
    )
    assert result == [[4] * 4 if not privileged else [0] * 4, [4, 4, 4], [1, [1, 1], 0]]


def test_privileges_can_go_under_a_running_process(bench: Bench) -> None:
    bench.describe(node(A100))
    with bench.session() as session:
        assert session("gi = make(9, 4, 4); ci, uuid = fill(gi, 3); result = listed()") == [[9, 4, 4]]
        bench.control.configures(False)
        assert session("result = [code(nvmlComputeInstanceDestroy, ci), code(nvmlGpuInstanceDestroy, gi)]") == [4, 4]
        assert session("result = listed()") == [[9, 4, 4]]
        bench.control.privileged(False)
        assert session("result = [code(nvmlGpuInstanceGetInfo, gi), code(nvmlComputeInstanceGetInfo, ci)]") == [4, 4]
        bench.control.clear()
        assert session("result = [code(nvmlComputeInstanceDestroy, ci), code(nvmlGpuInstanceDestroy, gi)]") == [0, 0]


def geometry_listed(geometry: Geometry) -> dict[str, list[object]]:
    return {
        f"MIG {p.name}": [
            p.id,
            p.compute_slices,
            p.memory_mib,
            sorted([start, p.size] for start in p.starts),
            [dict(p.engines).get(name, 0) for name in ("decoder", "encoder", "jpeg", "ofa")],
        ]
        for p in geometry.profiles
    }


def test_every_product_is_listed_as_its_table_says(bench: Bench) -> None:
    """One node with a GPU of each MIG product: what pynvml lists is what `solver.products` has."""
    base = node("8xH100").gpus[0]
    products = [product for product in PRODUCTS if product.geometry is not None]
    gpus = tuple(
        replace(
            base, uuid=f"GPU-{product.key}", name=product.name, memory_mib=product.memory_mib, geometry=product.geometry
        )
        for product in products
    )
    bench.describe(replace(node("8xH100"), gpus=gpus))
    result = bench.pynvml(
        """
result = {}
for index in range(nvmlDeviceGetCount()):
    gpu = device(index)
    found = result[nvmlDeviceGetUUID(gpu)] = {}
    for number in range(18):
        try:
            info = nvmlDeviceGetGpuInstanceProfileInfo(gpu, number)
        except NVMLError:
            continue
        places, count = (c_nvmlGpuInstancePlacement_t * 32)(), c_uint(32)
        nvmlDeviceGetGpuInstancePossiblePlacements(gpu, info.id, places, byref(count))
        found[info.name] = [
            info.id, info.sliceCount, info.memorySizeMB, sorted([p.start, p.size] for p in places[:count.value]),
            [info.decoderCount, info.encoderCount, info.jpegCount, info.ofaCount]]
"""
    )
    for product in products:
        assert product.geometry is not None
        assert result[f"GPU-{product.key}"] == geometry_listed(product.geometry), product.key
