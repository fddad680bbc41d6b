"""filter and prioritize answer from what they remember. Here: they answer as if they remembered nothing.

A small world changes in every way in which a node's answer can change, and after each change the answers are those
that are worked out from scratch, node by node.
"""

from app.wire import Args
from solver import Demand
from tests.app.world import GPU, World
from tests.fakes import pod_json


class TwoLooks:
    """A turn that is over at the third look at the clock; it fails when so many have not been enough."""

    turns = 0

    def __init__(self) -> None:
        TwoLooks.turns += 1
        assert TwoLooks.turns < 200, "filter gets no further"
        self.left = 2

    def lasts(self) -> bool:
        self.left -= 1
        return self.left >= 0


def world_of(nodes, **knobs) -> World:
    """Without Kubernetes and with nothing running: all that happens is what a test does."""
    world = World(nodes, kube=False, **knobs)
    for name in nodes:
        world.report(name)
    return world


async def test_filter_in_turns_gets_to_its_end_however_many_nodes_have_no_agent_or_were_refused(monkeypatch):
    monkeypatch.setattr("app.extender.Turns", TwoLooks)
    world = world_of({f"n{number}": "4xT4" for number in range(300)})
    extender, refusals = world.service.extender, world.service.refusals
    names = [*world.nodes, *(f"without-{number}" for number in range(300))]
    for name in world.nodes:
        refusals.refused(Demand(gpus=2), name, "TopologyAffinityError")

    monkeypatch.setattr(TwoLooks, "turns", 0)
    result = await extender.filter_in_turns(Args(pod_json("p", {GPU: "5"}), names))
    assert set(result.unresolvable) == set(names)

    monkeypatch.setattr(TwoLooks, "turns", 0)
    result = await extender.filter_in_turns(Args(pod_json("q", {GPU: "2"}), list(world.nodes)))
    assert set(result.failed) == set(world.nodes)
