"""Why not, in words that name what is in the way."""

from dataclasses import replace

import pytest

from solver.cluster import Allocation, Device, Node
from solver.demand import Demand, Terms
from solver.fits import refusal
from solver.geometry import Slice
from solver.guests import NOBODY, Guest
from solver.rank import quote
from tests.builders import A100, H100, mig_node, node, one, part, slices, whole


@pytest.mark.parametrize(
    ("cluster", "taken", "demand", "reason", "resolvable"),
    [
        (Node("n", (), ()), (), Demand.of(1), "has no GPUs", False),
        (node("n", 4), whole("n", 0, 1), Demand.of(4), "needs 4 free GPUs, has 2", True),
        (node("n", 4), (), Demand.of(8), "needs 8 GPUs, has 4 in all", False),
        (mig_node("n", 2), (), Demand.of(1), "needs 1 GPU, has 0 in all (2 more in MIG mode)", False),
        (node("n", 4), (), one("1g.10gb"), "needs 1 × 1g.10gb, no GPU here is in MIG mode", False),
        (
            mig_node("n"),
            (part("n", 0, "1g.10gb", 2), part("n", 0, "1g.10gb", 6)),
            one("4g.40gb"),
            "no legal start for 4g.40gb: GPU 0: 1g.10gb@2 in the way",
            True,
        ),
        (
            mig_node("n", 1, A100, idle=[Slice("1g.10gb", 0), Slice("2g.20gb", 2)]),
            (part("n", 0, "2g.20gb", 2),),
            one("4g.40gb"),
            "no legal start for 4g.40gb: GPU 0: 2g.20gb@2 in the way",
            True,
        ),
        (
            mig_node("n", 1, H100),
            (part("n", 0, "1g.10gb+me", 3),),
            one("1g.10gb+me"),
            "no legal start for 1g.10gb+me: GPU 0: media engines or compute slices are used up by 1g.10gb+me@3",
            True,
        ),
        (
            mig_node("n"),
            (),
            slices(**{"4g.40gb": 2}),
            "2 × 4g.40gb do not fit together here",
            False,
        ),
    ],
)
def test_a_refusal_says_what_was_wanted_and_what_was_found(
    cluster: Node, taken: tuple[Device, ...], demand: Demand, reason: str, resolvable: bool
) -> None:
    """`resolvable` tells kube-scheduler whether evicting pods is worth a thought."""
    refused = refusal(cluster, taken, demand)

    assert refused is not None
    assert (refused.reason, refused.resolvable) == (reason, resolvable)


def old_node() -> Node:
    """Two H100s of 80 GB and two A100s of 40 GB, without NVLink, on a driver of CUDA 12."""
    made = node("n", 4, gbs=32)
    h100 = {"product": "NVIDIA H100 80GB HBM3", "architecture": "hopper", "compute_capability": (9, 0)}
    a100 = {"product": "NVIDIA A100-SXM4-40GB", "architecture": "ampere", "compute_capability": (8, 0)}
    gpus = tuple(
        replace(gpu, **(h100 if i < 2 else a100), memory_mib=80_000 if i < 2 else 40_000)  # type: ignore[arg-type]
        for i, gpu in enumerate(made.gpus)
    )
    return replace(made, gpus=gpus, cpu_milli=8000, memory_mib=64_000, driver=(550, 54), cuda=(12, 4))


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        (Demand(1, terms=Terms(cuda=(13, 0))), "needs CUDA 13.0, its driver serves CUDA 12.4 (driver 550.54)"),
        (Demand(1, terms=Terms(driver=(570,))), "needs driver 570, has 550.54"),
        (
            Demand(1, terms=Terms(products=("B200",))),
            "needs B200; the GPUs here are NVIDIA A100-SXM4-40GB, NVIDIA H100 80GB HBM3",
        ),
        (
            Demand(3, terms=Terms(architectures=("hopper",))),
            "needs 3 GPUs, has 2 in all (2 more that are not a GPU of architecture hopper)",
        ),
        (
            Demand(3, terms=Terms(compute_capability=(8, 9))),
            "needs 3 GPUs, has 2 in all (2 more that are not a GPU with compute capability 8.9 or more)",
        ),
        (
            Demand(1, terms=Terms(gpu_memory_mib=90_000)),
            "needs a GPU with 90000 MiB or more; the GPUs here are NVIDIA A100-SXM4-40GB, NVIDIA H100 80GB HBM3",
        ),
        (Demand(2, terms=Terms(nvlink=True)), "no 2 of the free GPUs here are all joined by NVLink"),
        (Demand(1, cpu_milli=9000), "needs 9 CPU, has 8 free"),
        (Demand(1, memory_mib=65_000), "needs 65000 MiB of memory, has 64000 free"),
    ],
)
def test_a_floor_that_is_not_met_is_named_with_what_is_here(demand: Demand, reason: str) -> None:
    """Product, architecture, compute capability, memory, NVLink, driver, CUDA; and the node's own room."""
    refused = refusal(old_node(), (), demand)

    assert refused is not None
    assert (refused.reason, refused.resolvable) == (reason, False)


@pytest.mark.parametrize(
    "terms",
    [
        Terms(cuda=(12, 9)),
        Terms(cuda=(11, 8)),
        Terms(products=("A100",)),
        Terms(products=("B200", "H100 80GB")),
        Terms(compute_capability=(9, 0), gpu_memory_mib=80_000, driver=(550, 54)),
    ],
)
def test_a_floor_that_is_met_is_no_reason(terms: Terms) -> None:
    """Minor versions of CUDA within the driver's major are fine, and so are older majors."""
    assert refusal(old_node(), (), Demand(1, terms=terms)) is None


def test_a_short_name_is_not_another_product() -> None:
    """An A10 is no A100."""
    assert refusal(old_node(), (), Demand(1, terms=Terms(products=("A10",)))) is not None


def test_shares_fill_a_gpu_and_not_more() -> None:
    """What is left of the fullest shared GPU is named."""
    cluster = node("n", 1)
    taken = (Device("n-0", milli=300), Device("n-0", milli=300))

    assert refusal(cluster, taken, Demand(share_milli=400)) is None
    refused = refusal(cluster, taken, Demand(share_milli=500))
    assert refused is not None
    assert refused.reason == "needs 500 milli of a GPU; the shared GPUs have 400 milli left at most"
    assert refused.resolvable
    assert refusal(cluster, taken, Demand.of(1)) is not None


def test_a_share_in_mib_is_counted_by_the_memory_of_the_gpu() -> None:
    """Rounded up to a thousandth, so the GPU never has less than was promised."""
    cluster = node("n", 1)  # 80,000 MiB

    assert quote(cluster, (), Demand(share_mib=20_001)) is not None
    found = quote(cluster, (), Demand(share_mib=20_001))
    assert found is not None
    assert found.devices == (Device("n-0", milli=251),)
    assert refusal(cluster, (), Demand(share_mib=80_001)) is not None


@pytest.mark.parametrize(
    ("there", "comes", "fits"),
    [
        (Guest("red"), Guest("blue"), True),
        (Guest("red", "", "gpu"), Guest("blue"), False),
        (Guest("red", "", "gpu"), Guest("red"), True),
        (Guest("red"), Guest("blue", "", "gpu"), False),
        (NOBODY, Guest("blue", "", "gpu"), False),
        (Guest("", "", "gpu"), Guest("", "", "gpu"), False),
        (Guest("red", "", "node"), Guest("blue"), False),
        (Guest("red"), Guest("red", "", "node"), True),
    ],
)
def test_a_wish_to_be_apart_holds_for_those_who_come_and_those_who_are_there(
    there: Guest, comes: Guest, fits: bool
) -> None:
    """Own GPU or own node; a pod without a tenant is nobody's friend."""
    taken = (Allocation((Device("n-0", milli=100),), guest=there),)
    demand = Demand(share_milli=100, terms=Terms(guest=comes))

    assert (refusal(node("n", 1), taken, demand) is None) == fits
    cut_up = mig_node("n")
    taken = (Allocation((part("n", 0, "1g.10gb", 0),), guest=there),)
    demand = replace(one("1g.10gb"), terms=Terms(guest=comes))
    assert (refusal(cut_up, taken, demand) is None) == fits


def test_a_tenant_with_its_own_node_leaves_no_place_for_others() -> None:
    """Even where GPUs are free."""
    taken = (Allocation(whole("n", 0), guest=Guest("red", "", "node")),)
    refused = refusal(node("n", 4), taken, Demand(1, terms=Terms(guest=Guest("blue"))))

    assert refused is not None
    assert refused.reason == "tenant blue and tenant red, who hold devices here, are not to share a node"
    assert refused.resolvable


def test_a_profile_that_is_not_offered_is_named_with_those_that_are() -> None:
    """1g.5gb is an A100-40's."""
    refused = refusal(mig_node("n"), (), one("1g.5gb"))

    assert refused is not None
    assert refused.reason.startswith("no GPU here offers 1g.5gb; they offer 1g.10gb, 1g.10gb+me")
    assert not refused.resolvable


def test_withheld_gpus_are_named_with_their_reasons() -> None:
    """A lost GPU stays in the inventory, and the refusal says what is wrong with it."""
    made = node("n", 2)
    lost = replace(made, gpus=(made.gpus[0], replace(made.gpus[1], withheld="fell off the bus")))
    refused = refusal(lost, whole("n", 0), Demand.of(1))

    assert refused is not None
    assert refused.reason == "needs 1 free GPU, has 0; withheld: GPU 1 (fell off the bus)"
    assert refused.resolvable
    hopeless = refusal(lost, (), Demand.of(2))
    assert hopeless is not None
    assert not hopeless.resolvable


def test_many_gpus_are_counted_and_not_listed() -> None:
    """A message on a pod is for people."""
    cluster = mig_node("n", 8)
    taken = tuple(part("n", i, "7g.80gb", 0) for i in range(8))
    refused = refusal(cluster, taken, one("1g.10gb"))

    assert refused is not None
    assert refused.reason.endswith("GPU 3: 7g.80gb@0 in the way; 4 more GPUs alike")
