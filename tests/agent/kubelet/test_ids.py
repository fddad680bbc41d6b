"""Device ids: one for each real thing, and back."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import translate
from app.agent.kubelet import ids
from app.agent.kubelet.ids import Offered, devices_of, gpu_of, id_of, offered, resource_of
from app.inventory import node_of
from app.report import DeviceAt, Gpu, Instance, Mig, NodeReport, Placement, Profile
from app.simulate import report_of, sample_reports
from solver.products import PRODUCTS
from tests import strategies

(H100S,) = sample_reports("8xH100")
(A100S,) = sample_reports("8xA100-mig")
UUID = "GPU-12345678-1234-1234-1234-123456789abc"


def one(uuid: str = UUID, *, mig: Mig | None = None, **more: object) -> Gpu:
    return Gpu.model_validate({"uuid": uuid, "index": 0, "product": "H100", "memory_mib": 81559, "mig": mig, **more})


def report(*gpus: Gpu, **more: object) -> NodeReport:
    return NodeReport.model_validate({"node": "n", "version": 1, "makes_slices": True, "gpus": gpus, **more})


def board(*instances: Instance, enabled: bool = True) -> Mig:
    """An H100's 1g.10gb, its variant with media engines, and 3g.40gb."""
    places = {
        "1g.10gb": [(start, 1) for start in range(7)],
        "1g.10gb+me": [(start, 1) for start in range(7)],
        "3g.40gb": [(0, 4), (4, 4)],
    }
    profiles = tuple(
        Profile(
            name=name,
            id=number,
            compute_slices=1,
            memory_mib=9856,
            placements=tuple(Placement(start=start, size=size) for start, size in at),
        )
        for number, (name, at) in enumerate(places.items())
    )
    return Mig(enabled=enabled, profiles=profiles, instances=instances)


@st.composite
def reports(draw: st.DrawFn) -> NodeReport:
    """Random nodes as the solver's laws have them, real and odd boards, with agents that make slices or do not."""
    made = report_of(draw(strategies.nodes(real=draw(st.booleans()))))
    return made.model_copy(update={"makes_slices": draw(st.sampled_from((True, False, None)))})


@given(reports(), st.data())
def test_every_offered_id_is_a_device_and_the_device_has_this_id(made: NodeReport, data: st.DataObject):
    either = data.draw(st.sets(st.sampled_from([gpu.uuid for gpu in made.gpus])))
    for resource, devices in offered(made, either).items():
        for device in devices:
            (found,) = devices_of(resource, [device.id], made)
            assert (resource_of(found), id_of(found)) == (resource, device.id)
            assert gpu_of(device.id) == found.gpu


@given(reports(), st.booleans())
def test_ids_are_unique_and_short_over_all_resources_of_a_node(made: NodeReport, every: bool):
    either = {gpu.uuid for gpu in made.gpus} if every else ()
    found = [device.id for devices in offered(made, either).values() for device in devices]

    assert len(set(found)) == len(found)
    assert max(map(len, found), default=0) <= 63


@pytest.mark.parametrize("made", [H100S, A100S], ids=["8xH100", "8xA100-mig"])
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("shares", [False, True])
def test_sample_nodes_offer_unique_short_ids_that_carry_their_numa_node(made: NodeReport, every: bool, shares: bool):
    either = {gpu.uuid for gpu in made.gpus} if every else ()
    numa = {gpu.uuid: gpu.numa for gpu in made.gpus}

    for resource, devices in offered(made, either, share_resources=shares).items():
        found = [device.id for device in devices]
        assert len(set(found)) == len(found)
        assert max(map(len, found)) <= 63
        assert all(device.healthy and device.numa == numa[gpu_of(device.id)] for device in devices)
        assert len(devices_of(resource, found, made)) == (8 if "share" in resource else len(found))


def test_every_known_profile_has_ids_that_are_short_enough():
    cut = [product.geometry for product in PRODUCTS if product.geometry is not None]
    longest = max((profile.name for geometry in cut for profile in geometry.profiles), key=len)

    assert len(id_of(DeviceAt(gpu=UUID, profile=longest, start=11))) <= 63


def test_names_are_those_of_the_service():
    assert ids.GPU_RESOURCE == translate.GPU_RESOURCE
    assert ids.MIG_RESOURCE_PREFIX == translate.MIG_RESOURCE_PREFIX
    assert ids.SHARE_RESOURCE == translate.SHARE_RESOURCE
    assert ids.SHARE_MILLI_RESOURCE == translate.SHARE_MILLI_RESOURCE
    assert resource_of(DeviceAt(gpu=UUID, profile="1g.10gb+me")) == translate.resource_of_profile("1g.10gb+me")


@given(reports())
def test_what_the_solver_may_choose_is_offered(made: NodeReport):
    """Where it is not, the kubelet could never count what was placed."""
    node = node_of(made, as_it_is=made.makes_slices is False)
    found = {device.id for devices in offered(made, ()).values() for device in devices}

    for gpu in node.gpus:
        if gpu.geometry is None:
            assert gpu.uuid in found
        else:
            places = [(profile.name, start) for profile in gpu.geometry.profiles for start in profile.starts]
            assert {f"{gpu.uuid}/{name}@{start}" for name, start in places} <= found


# ---- what is offered ----


def test_a_whole_gpu_is_offered_where_mig_is_off_and_its_places_where_it_is_on():
    assert set(offered(H100S, ())) == {"nvidia.com/gpu"}
    assert len(offered(H100S, ())["nvidia.com/gpu"]) == 8

    places = offered(report(one(mig=board())), ())

    assert set(places) == {"nvidia.com/mig-1g.10gb", "nvidia.com/mig-1g.10gb.me", "nvidia.com/mig-3g.40gb"}
    assert [each.id for each in places["nvidia.com/mig-3g.40gb"]] == [f"{UUID}/3g.40gb@0", f"{UUID}/3g.40gb@4"]
    assert places["nvidia.com/mig-1g.10gb.me"][6].id == f"{UUID}/1g.10gb.me@6"


@pytest.mark.parametrize("enabled", [False, True])
def test_a_gpu_whose_mode_may_be_switched_is_offered_in_both_forms(enabled: bool):
    found = offered(report(one(mig=board(enabled=enabled))), {UUID})

    assert {resource: len(devices) for resource, devices in found.items()} == {
        "nvidia.com/gpu": 1,
        "nvidia.com/mig-1g.10gb": 7,
        "nvidia.com/mig-1g.10gb.me": 7,
        "nvidia.com/mig-3g.40gb": 2,
    }


def test_where_no_slices_are_made_only_those_with_a_uuid_and_a_known_place_are_offered():
    there = Instance(profile="3g.40gb", gi_id=1, start=4, size=4, uuid="MIG-1")
    empty = Instance(profile="1g.10gb", gi_id=2, start=0, size=1)
    unseen = Instance(profile="1g.10gb", gi_id=3, uuid="MIG-3")
    made = report(one(mig=board(there, empty, unseen)), makes_slices=False)

    assert offered(made, ()) == {"nvidia.com/mig-3g.40gb": (Offered(f"{UUID}/3g.40gb@4", True, None),)}


def test_a_bad_gpu_is_unhealthy_and_a_suspect_one_is_not():
    assert offered(report(one(health="bad")), ()) == {"nvidia.com/gpu": (Offered(UUID, False, None),)}
    assert offered(report(one(health="suspect")), ()) == {"nvidia.com/gpu": (Offered(UUID, True, None),)}


def test_nothing_is_healthy_while_nvml_does_not_answer():
    (devices,) = offered(report(one(), error="NVML hangs"), ()).values()

    assert [device.healthy for device in devices] == [False]


def test_an_unknown_numa_node_is_not_said():
    assert offered(report(one(numa=-1)), ())["nvidia.com/gpu"][0].numa is None
    assert offered(report(one(numa=1)), ())["nvidia.com/gpu"][0].numa == 1


def test_shares_are_offered_only_where_asked_for_and_only_of_gpus_that_are_not_cut():
    whole, cut = one(), one("GPU-cut", index=1, mig=board())

    assert "tangram.gpu/share" not in offered(report(whole), ())
    found = offered(report(whole, cut), {"GPU-cut"}, share_resources=True)
    assert [len(found[name]) for name in ("tangram.gpu/share", "tangram.gpu/share-milli")] == [79, 1000]
    assert found["tangram.gpu/share"][78].id == f"{UUID}::78"
    assert {gpu_of(each.id) for each in found["tangram.gpu/share-milli"]} == {UUID}


def test_an_id_that_the_kubelet_would_not_take_is_not_offered():
    made = report(one("GPU-" + "x" * 60))

    assert offered(made, ()) == {}
    with pytest.raises(ValueError, match="the kubelet takes 63"):
        id_of(DeviceAt(gpu=made.gpus[0].uuid))


# ---- what an id stands for ----


def test_a_place_is_a_device_by_nvmls_own_name_of_the_profile():
    found = devices_of("nvidia.com/mig-1g.10gb.me", [f"{UUID}/1g.10gb.me@3"], report(one(mig=board())))

    assert found == (DeviceAt(gpu=UUID, profile="1g.10gb+me", start=3),)


def test_an_instance_that_no_profile_allows_is_still_a_device():
    """An agent without privileges sees no placements, and old drivers list fewer profiles than exist."""
    there = Instance(profile="2g.20gb", gi_id=1, start=2, size=2, uuid="MIG-1")
    made = report(one(mig=board(there)))

    assert devices_of("nvidia.com/mig-2g.20gb", [f"{UUID}/2g.20gb@2"], made) == (
        DeviceAt(gpu=UUID, profile="2g.20gb", start=2),
    )


def test_the_ids_of_a_share_are_one_device_for_each_gpu():
    made = report(one(), one("GPU-2", index=1, memory_mib=40960))
    both = [f"{UUID}::0", f"{UUID}::78", "GPU-2::5"]

    assert devices_of("tangram.gpu/share-milli", both, made) == (
        DeviceAt(gpu=UUID, milli=2),
        DeviceAt(gpu="GPU-2", milli=1),
    )
    assert devices_of("tangram.gpu/share", both, made) == (
        DeviceAt(gpu=UUID, milli=26),  # 2,048 of 81,559 MiB, rounded up
        DeviceAt(gpu="GPU-2", milli=25),
    )


@given(st.integers(1024, 300_000))
def test_a_share_of_all_gib_is_not_more_than_the_gpu(memory_mib: int):
    made = report(one(memory_mib=memory_mib))
    every = [device.id for device in offered(made, (), share_resources=True)["tangram.gpu/share"]]

    (share,) = devices_of("tangram.gpu/share", every, made)

    assert share.milli <= 1000


@pytest.mark.parametrize(
    ("resource", "id_", "words"),
    [
        ("nvidia.com/gpu", "GPU-other", "no such GPU"),
        ("nvidia.com/gpu", f"{UUID}/1g.10gb@0", "no such GPU"),
        ("nvidia.com/gpu", f"{UUID}::3", "no such GPU"),
        ("nvidia.com/gpu", "", "no such GPU"),
        ("nvidia.com/mig-1g.10gb", UUID, "no device id of nvidia.com/mig-1g.10gb"),
        ("nvidia.com/mig-1g.10gb", f"{UUID}/3g.40gb@0", "no device id of nvidia.com/mig-1g.10gb"),
        ("nvidia.com/mig-1g.10gb", f"{UUID}/1g.10gb@7", "no such place"),
        ("nvidia.com/mig-1g.10gb", f"{UUID}/1g.10gb@03", "no such place"),
        ("nvidia.com/mig-1g.10gb", f"{UUID}/1g.10gb@", "no such place"),
        ("nvidia.com/mig-9g.10gb", f"{UUID}/9g.10gb@0", "no such place"),
        ("nvidia.com/mig-1g.10gb", "GPU-other/1g.10gb@0", "no such GPU"),
        ("nvidia.com/mig-1g.10gb", "GPU-whole/1g.10gb@0", "no such place"),
        ("tangram.gpu/share", f"{UUID}::79", "the GPU has 79"),
        ("tangram.gpu/share-milli", f"{UUID}::1000", "the GPU has 1000"),
        ("tangram.gpu/share-milli", f"{UUID}::01", "no device id of tangram.gpu/share-milli"),
        ("tangram.gpu/share-milli", f"{UUID}::٣", "no device id of tangram.gpu/share-milli"),
        ("tangram.gpu/share-milli", f"{UUID}::-1", "no device id of tangram.gpu/share-milli"),
        ("tangram.gpu/share-milli", UUID, "no device id of tangram.gpu/share-milli"),
        ("tangram.gpu/share-milli", "GPU-other::1", "no such GPU"),
        ("example.com/other", UUID, "no device id of example.com/other"),
    ],
)
def test_what_is_no_device_id_of_this_node_is_refused_in_words(resource: str, id_: str, words: str):
    made = report(one(mig=board()), one("GPU-whole", index=1))

    with pytest.raises(ValueError, match=words):
        devices_of(resource, [id_], made)


def test_a_share_has_no_single_id():
    assert resource_of(DeviceAt(gpu=UUID, milli=250)) == "tangram.gpu/share-milli"
    with pytest.raises(ValueError, match="as many device ids"):
        id_of(DeviceAt(gpu=UUID, milli=250))


def test_ids_cost_an_agent_neither_grpc_nor_the_solver():
    code = "import sys, app.agent.kubelet.ids; print(*{'grpc', 'google', 'numpy', 'ortools'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert done.stdout.split() == []
