"""Reports become nodes; age and faults become words."""

import pytest
from pydantic import ValidationError

from app.inventory import Inventory, node_of, users_of
from app.report import Instance, Mig, NodeReport, Placement, Process, Profile, Unchanged
from app.simulate import report_of
from app.translate import versions_of
from solver import Demand, Device, Slice
from solver.fits import refusal
from solver.samples import parse_samples, sample_node

SAMPLES = "8xH100:1,8xA100-mig:1,8xV100:1,8xL40S:1,4xA30-mig:1"


@pytest.fixture
def inventory() -> Inventory:
    return Inventory(stale_seconds=30)


@pytest.mark.parametrize("node", parse_samples(SAMPLES), ids=lambda node: node.name)
def test_a_report_of_a_sample_reads_back_as_the_sample(node):
    again = node_of(report_of(node))
    assert again.links == node.links
    for seen, made in zip(again.gpus, node.gpus, strict=True):
        assert (seen.uuid, seen.index, seen.numa, seen.memory_mib) == (
            made.uuid,
            made.index,
            made.numa,
            made.memory_mib,
        )
        assert (seen.geometry is None) == (made.geometry is None)


def report(**changes: object) -> NodeReport:
    return report_of(sample_node("n", "8xA100-mig")).model_copy(update=changes)


def test_the_geometry_is_the_reports_not_a_tables():
    """Case 20 is about tables; here a board reports a profile that no table has."""
    gpu = report().gpus[0]
    assert gpu.mig is not None
    odd = gpu.mig.profiles[0].model_copy(update={"name": "1g.11gb+me"})
    changed = gpu.model_copy(update={"mig": Mig(enabled=True, profiles=(odd,))})
    geometry = node_of(report(gpus=(changed,), links=())).gpus[0].geometry
    assert geometry is not None
    assert [profile.name for profile in geometry.profiles] == ["1g.11gb.me"]


def test_a_silent_agent_makes_its_node_stale_and_its_next_word_brings_it_back(inventory):
    inventory.accept(report(boot="b", version=1), now=0)
    assert inventory.fault("n", now=30) == ""
    assert "not heard for 31 s" in inventory.fault("n", now=31)
    assert inventory.beat(Unchanged(node="n", boot="b", version=1), now=40)
    assert inventory.fault("n", now=41) == ""


def test_a_version_that_we_do_not_hold_is_asked_for(inventory):
    assert not inventory.beat(Unchanged(node="n", boot="b", version=1), now=0)
    inventory.accept(report(boot="b", version=1), now=0)
    assert not inventory.beat(Unchanged(node="n", boot="b", version=2), now=0)
    assert not inventory.beat(Unchanged(node="n", boot="restarted", version=1), now=0)


def test_a_file_never_goes_stale(inventory):
    inventory.accept(report(), now=0, lasting=True)
    assert inventory.fault("n", now=1e9) == ""


def test_an_agent_that_cannot_read_nvml_says_so(inventory):
    inventory.accept(report(error="stale since 12:00"), now=0)
    assert "stale since 12:00" in inventory.fault("n", now=0)


def test_a_node_without_a_report_has_a_reason(inventory):
    assert "no agent" in inventory.fault("nobody", now=0)


def test_bad_gpus_hidden_instances_and_pending_modes_are_withheld_in_words():
    first, second, third, *rest = report().gpus
    assert first.mig is not None
    hidden = Instance(profile="1g.10gb", gi_id=3)
    gpus = (
        first.model_copy(update={"health": "bad", "health_reason": "lost"}),
        second.model_copy(update={"mig": first.mig.model_copy(update={"instances": (hidden,)})}),
        third.model_copy(update={"mig": first.mig.model_copy(update={"pending": False})}),
        *rest,
    )
    words = [gpu.withheld for gpu in node_of(report(gpus=gpus)).gpus]
    assert "lost" in words[0]
    assert "not privileged" in words[1]
    assert "next reset" in words[2]
    assert not any(words[3:])


def test_who_uses_which_device_is_read_from_the_report():
    gpu = report().gpus[0]
    assert gpu.mig is not None
    instance = Instance(profile="3g.40gb", gi_id=1, start=4, size=4, pods=("u",))
    used = gpu.model_copy(update={"mig": gpu.mig.model_copy(update={"instances": (instance,)})})
    assert users_of(report(gpus=(used,), links=())) == {Device(gpu.uuid, Slice("3g.40gb", 4)): frozenset({"u"})}


# -- what a GPU and its driver are ---------------------------------------------------------------------------


def test_driver_cuda_and_kind_reach_the_solver():
    node = node_of(report(driver="570.133.20", cuda="12.8"))
    assert (node.driver, node.cuda) == ((570, 133, 20), (12, 8))
    assert (node.gpus[0].architecture, node.gpus[0].compute_capability) == ("ampere", (8, 0))


@pytest.mark.parametrize(
    ("said", "read"), [("", ()), ("unknown", ()), ("N/A", ()), ("560.35.03-open", (560, 35, 3)), ("12.4\n", (12, 4))]
)
def test_a_version_that_cannot_be_read_is_unknown(said, read):
    assert node_of(report(driver=said)).driver == read


def test_an_unknown_architecture_is_none_that_can_be_asked_for():
    gpu = report().gpus[0].model_copy(update={"architecture": "unknown", "compute_capability": ""})
    seen = node_of(report(gpus=(gpu,), links=())).gpus[0]
    assert (seen.architecture, seen.compute_capability) == ("", ())


def test_a_board_that_no_one_could_have_built_is_kept_back_in_words():
    """A report may describe anything; reckoning with sixty-four units would hold up everybody."""
    gpu = report_of(sample_node("a", "4xA30-mig")).gpus[0]
    assert gpu.mig is not None
    many = tuple(
        Profile(
            name=f"p{size}.{kind}",
            id=kind,
            compute_slices=1,
            memory_mib=1,
            placements=tuple(Placement(start=start, size=size) for start in range(64 - size)),
        )
        for kind, size in enumerate(range(1, 40))
    )
    absurd = gpu.model_copy(update={"mig": gpu.mig.model_copy(update={"profiles": many})})
    node = node_of(report_of(sample_node("a", "4xA30-mig")).model_copy(update={"gpus": (absurd,), "links": ()}))

    assert node.gpus[0].withheld.startswith("its MIG geometry (63 units, 39 profiles")
    refused = refusal(node, (), Demand.of(**{"p1.0": 5}))
    assert refused is not None
    assert not refused.resolvable


# -- boards that nobody cuts, processes of nobody, and what runs on a node ------------------------------


def test_a_board_that_nobody_cuts_has_the_places_that_exist_and_no_others():
    said = report_of(sample_node("a", "4xA100PCIe-mig1"))
    (board,) = [gpu for gpu in said.gpus if gpu.mig and gpu.mig.enabled]
    assert board.mig is not None
    there = (
        Instance(profile="3g.40gb", gi_id=1, start=4, size=4, uuid="MIG-1"),
        Instance(profile="1g.10gb", gi_id=2, start=0, size=1, uuid="MIG-2"),
        Instance(profile="1g.10gb", gi_id=3, start=1, size=1, uuid=None),
    )
    cut = board.model_copy(update={"mig": board.mig.model_copy(update={"instances": there})})
    node = node_of(said.model_copy(update={"gpus": (*said.gpus[:3], cut)}), as_it_is=True)

    geometry = node.gpus[3].geometry
    assert geometry is not None
    assert {(profile.name, profile.starts) for profile in geometry.profiles} == {("3g.40gb", (4,)), ("1g.10gb", (0,))}
    assert not refusal(node, (), Demand.of(0, **{"3g.40gb": 1, "1g.10gb": 1})), (
        "what has no MIG device is in nobody's way"
    )


def test_a_process_of_no_pod_keeps_its_gpu_back_where_pods_can_be_seen():
    said = report_of(sample_node("a", "4xL4"))
    processes = (Process(pid=7), Process(pid=8, kind="graphics"), Process(pid=9, pod="uid-p"))
    busy = said.gpus[0].model_copy(update={"processes": processes, "pods": ("uid-p",)})
    said = said.model_copy(update={"gpus": (busy, *said.gpus[1:])})

    assert users_of(said) == {Device(busy.uuid): {"uid-p"}}
    assert users_of(said.model_copy(update={"sees_pods": True})) == {Device(busy.uuid): {"uid-p", "process 7"}}


def test_the_chain_of_versions_has_what_agent_and_api_server_say():
    inventory = Inventory(stale_seconds=30)
    said = report_of(sample_node("a", "4xL4"))
    inventory.accept(said.model_copy(update={"versions": {"toolkit": "1.18.0", "kernel": "6.8"}}), now=0)
    inventory.runs("a", versions_of({"status": {"nodeInfo": {"kubeletVersion": "v1.37.1", "kernelVersion": "6.8.0"}}}))

    assert inventory.versions("a") == {
        "driver": said.driver,
        "cuda": said.cuda,
        "nvml": said.nvml,
        "toolkit": "1.18.0",
        "kernel": "6.8.0",
        "kubelet": "v1.37.1",
    }


def test_profiles_beyond_any_board_are_refused_in_words():
    """They are kept for the next board of the kind, so nobody shall fill the memory with them."""
    profile = {"name": "x", "id": 1, "compute_slices": 1, "memory_mib": 1, "placements": [{"start": 0, "size": 1}]}
    engines = {f"engine-{number}": 1 for number in range(2000)}
    with pytest.raises(ValidationError, match="more than 16384 bytes"):
        Mig.model_validate({"enabled": True, "profiles": [profile | {"engines": engines}]})
    assert Mig.model_validate({"enabled": True, "profiles": [profile]}).profiles[0].name == "x"
