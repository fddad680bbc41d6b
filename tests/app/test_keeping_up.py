"""What a change means for the answers is worked out before anybody asks, once, and not while pods are being listed."""

from __future__ import annotations

import asyncio

from app.ledger import Hold, Phase
from app.translate import PodRef
from solver import Demand, Device
from tests.app.world import World


def take_a_gpu(world: World, number: int) -> None:
    gpu = world.service.inventory.get("h1").node.gpus[number]  # type: ignore[union-attr]
    pod = PodRef(f"uid-{number}", "default", f"p{number}")
    world.service.ledger.restore(Hold(pod, "h1", Demand.of(1), (Device(gpu.uuid),), Phase.HELD, 0.0))


async def test_several_changes_of_a_node_are_worked_out_once_before_the_next_request():
    world = World({"h1": "8xH100"}, kube=False)
    world.report("h1")
    offers, now = world.service.offers, world.clock()
    offers.refresh(now=now)
    before = offers.updated

    take_a_gpu(world, 0)
    take_a_gpu(world, 1)
    await asyncio.sleep(0)

    assert offers.updated == before + 1
    offers.refresh(now=now)
    assert offers.updated == before + 1, "nothing was left for a request to do"


async def test_nothing_is_worked_out_early_while_the_service_is_not_ready():
    """Else each of 40,000 listed pods would have its node's rows made anew."""
    world = World({"h1": "8xH100"})
    world.report("h1")
    world.service.offers.refresh(now=world.clock())
    before = world.service.offers.updated
    assert world.service.waiting_for()

    take_a_gpu(world, 0)
    await asyncio.sleep(0)

    assert world.service.offers.updated == before
