"""Why not, in words that name what is in the way."""

from dataclasses import replace

import pytest

from solver.cluster import Device, Node
from solver.demand import Demand
from solver.fits import refusal
from solver.geometry import Slice
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
            mig_node("n", 1, A100, idle=[Slice("2g.20gb", 0)]),
            (),
            one("4g.40gb"),
            "no legal start for 4g.40gb: GPU 0: 2g.20gb@0 (idle) in the way",
            False,
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
