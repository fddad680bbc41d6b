"""MIG slices on the fly: made before the bind, removed when idle or in the way, and never on a guess."""

from __future__ import annotations

import asyncio
import copy
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from app.errors import Unknown
from app.report import Fabric, Mig, NvLink, OrderList, Signal
from app.simulate import report_of
from app.translate import PLACEMENT_ANNOTATION, Written, pod_of, read_placement
from solver.samples import sample_node
from tests.app.hands import Hands
from tests.app.law import beyond_the_law
from tests.app.world import GPU, World
from tests.fakes import pod_json

BIG, HALF, SMALL = "nvidia.com/mig-7g.80gb", "nvidia.com/mig-3g.40gb", "nvidia.com/mig-1g.10gb"
KIND = "4xA100PCIe-mig1"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"a": KIND}, idle_slice_seconds=0, lease_seconds=1000).running() as running:
        yield running


@pytest.fixture
def hands(world: World) -> Hands:
    """The node's agent makes slices; nothing is on its board."""
    hands = Hands(world.service, report_of(sample_node("a", KIND)))
    hands.tell(makes_slices=True)
    return hands


@contextmanager
def at_work(hands: Hands) -> Iterator[None]:
    task = asyncio.create_task(hands.keep_obeying())
    try:
        yield
    finally:
        task.cancel()


def written(world: World, name: str) -> Written | None:
    found = read_placement(world.kube.pod(name)["metadata"].get("annotations", {}).get(PLACEMENT_ANNOTATION))
    assert found is None or isinstance(found, Written)
    return found


def label(world: World, name: str, labels: dict[str, str | None]) -> None:
    node = copy.deepcopy(world.kube.objects["nodes"][name])
    now = {**node["metadata"].get("labels", {}), **labels}
    node["metadata"]["labels"] = {key: value for key, value in now.items() if value is not None}
    world.kube._put("nodes", name, node, "MODIFIED")


def uuids(world: World, name: str) -> tuple[tuple[str, str], ...]:
    found = written(world, name)
    return found.uuids if found else ()


def told(world: World) -> OrderList:
    """What the agent is told now."""
    orders = world.service.orders.list_of("a")
    assert orders is not None
    return orders


async def obeyed(hands: Hands) -> OrderList:
    orders = await hands.obey()
    assert orders is not None
    return orders


def board(world: World) -> str:
    return world.gpus("a")[3]


def reason(world: World) -> str:
    gpus = world.service.views.node("a")["gpus"]
    return str(next(gpu["reason"] for gpu in gpus if gpu["uuid"] == board(world)))


async def later(world: World, hands: Hands, seconds: float) -> None:
    """So much later; the Lease, which went by meanwhile, is ours again, and the agent has reported."""
    world.clock.advance(seconds)
    await world.until(lambda: not world.service.waiting_for())
    hands.tell()
    world.service.orders.sweep()


async def until_ordered(world: World) -> None:
    await world.until(lambda: (found := world.service.orders.list_of("a")) is not None and found.make)


# -- made before the bind -----------------------------------------------------------------------------


async def test_a_pod_is_bound_only_when_its_slice_is_there_and_carries_its_uuid(world, hands):
    world.add_pod("p", {HALF: "1"})
    bind = asyncio.create_task(world.bind("p", "a"))
    await until_ordered(world)
    assert written(world, "p") is None
    assert not bind.done()

    await hands.obey()

    assert await bind == ""
    ((place, uuid),) = uuids(world, "p")
    assert hands.instances(board(world))["3g.40gb", int(place[-1])].uuid == uuid


async def test_a_pod_with_an_idle_slice_waits_for_nobody(world, hands):
    hands.put(board(world), "3g.40gb", 4)
    hands.tell()
    world.add_pod("p", {HALF: "1"})

    assert await world.bind("p", "a") == ""
    assert world.devices("p") == (f"{board(world)}/3g.40gb@4",)
    assert await hands.obey() is None


async def test_idle_slices_in_the_way_are_removed_with_the_same_order(world, hands):
    """Kept for reuse, destroyed when room is wanted."""
    hands.put(board(world), "1g.10gb", 2)
    hands.put(board(world), "1g.10gb", 6)
    hands.tell()
    world.add_pod("p", {BIG: "1"})
    with at_work(hands):
        assert await world.bind("p", "a") == ""
    assert set(hands.instances(board(world))) == {("7g.80gb", 0)}


async def test_an_idle_slice_that_gives_way_to_another_is_not_handed_out(world, hands):
    """Either of the two could go: not a place runs out but an engine."""
    for_two = {"engines": {"jpeg": 1}, "max_instances": 2}
    mig = next(gpu.mig for gpu in hands.report.gpus if gpu.uuid == board(world))
    scarce = ("1g.10gb", "1g.20gb")
    profiles = [each.model_copy(update=for_two if each.name in scarce else {}) for each in mig.profiles]
    hands.change(board(world), profiles=tuple(profiles))
    hands.put(board(world), "1g.10gb", 0)
    hands.put(board(world), "1g.10gb", 1)
    hands.tell()
    world.add_pod("p", {"nvidia.com/mig-1g.20gb": "1"})
    world.add_pod("q", {SMALL: "1"})
    bind = asyncio.create_task(world.bind("p", "a"))
    await until_ordered(world)
    going = await hands.hear()

    assert "used up" in await world.bind("q", "a")
    hands.carry_out(going)

    assert await bind == ""
    assert len(hands.removed) == 1
    with at_work(hands):
        assert await world.bind("q", "a") == ""
    assert world.service.ledger.get("uid-q").devices[0] in world.service.inventory.get("a").uuids


async def test_pods_of_a_burst_share_a_board_that_is_being_cleared_for_the_first(world, hands):
    hands.put(board(world), "7g.80gb", 0)
    hands.tell()
    binds = []
    for number in range(3):
        world.add_pod(f"p{number}", {SMALL: "1"})
        binds.append(asyncio.create_task(world.bind(f"p{number}", "a")))
    await until_ordered(world)
    with at_work(hands):
        assert await asyncio.gather(*binds) == ["", "", ""]


async def test_slices_in_use_are_never_in_an_order(world, hands):
    with at_work(hands):
        for number in range(7):
            world.add_pod(f"p{number}", {SMALL: "1"})
            assert await world.bind(f"p{number}", "a") == ""
    world.add_pod("big", {BIG: "1"})

    assert "7g.80gb" in await world.bind("big", "a")
    assert told(world).remove == ()
    assert not [make for make in told(world).make if make.remove]


async def test_an_instance_without_compute_instance_is_completed(world, hands):
    """An agent died between the two calls."""
    hands.put(board(world), "7g.80gb", 0, uuid=None)
    hands.tell()
    world.add_pod("p", {BIG: "1"})
    with at_work(hands):
        assert await world.bind("p", "a") == ""
    assert uuids(world, "p")


async def test_what_is_known_of_a_gpu_is_shown_in_words(world, hands):
    nvlink = NvLink(active=17, total=18, kind="switch", out_of_mesh=True)
    fabric = Fabric(state="completed", cluster="c1", clique=4)
    signal = Signal(name="nvlink", state="suspect", reason="1 of 18 links is down")
    first = hands.report.gpus[0].model_copy(
        update={"nvlink": nvlink, "fabric": fabric, "signals": (signal,), "health": "suspect"}
    )
    hands.tell(gpus=(first, *hands.report.gpus[1:]))

    shown = world.service.views.node("a")["gpus"][0]

    assert shown["nvlink"] == "17 of 18 NVLinks to switches, out of the mesh, fabric c1, clique 4"
    assert shown["signals"] == ["nvlink: suspect: 1 of 18 links is down"]
    assert shown["health"] == "suspect"
    assert shown["phase"] == "free", "a suspect GPU is shown, and still offered"


# -- not made -----------------------------------------------------------------------------------------


async def test_case_08_a_slice_that_cannot_be_made_is_said_in_words_and_its_gpu_kept_back_until_it_has_changed(
    world, hands
):
    """nos #21, #25: a set of instances was left half made."""
    hands.fail[("7g.80gb", 0)] = "NVML: Insufficient Resources (23)"
    world.add_pod("p", {BIG: "1"})
    with at_work(hands):
        refusal = await world.bind("p", "a")
    assert "Insufficient Resources" in refusal
    assert world.devices("p") == ()
    assert written(world, "p") is None
    await hands.obey()
    assert "Insufficient Resources" in reason(world)
    assert world.filter("p").fitting == []

    hands.fail.clear()
    hands.put(board(world), "1g.10gb", 0)
    hands.tell()

    assert world.filter("p").fitting == ["a"]


async def test_a_gpu_whose_order_failed_is_tried_again_after_a_while_even_if_nothing_changed(world, hands):
    hands.fail[("7g.80gb", 0)] = "NVML: Unknown Error (999)"
    world.add_pod("p", {BIG: "1"})
    with at_work(hands):
        assert "Unknown" in await world.bind("p", "a")
        await world.until(lambda: "Unknown" in reason(world))
        await later(world, hands, 61)
        await world.until(lambda: world.filter("p").fitting == ["a"])


async def test_a_slice_not_made_in_time_is_withdrawn_and_its_gpu_kept_back_until_the_agent_knows(world, hands):
    world.add_pod("p", {BIG: "1"})
    bind = asyncio.create_task(world.bind("p", "a"))
    await until_ordered(world)
    late = await hands.hear()
    world.clock.advance(9)
    hands.tell()

    assert "was not made within 8 s" in await bind
    assert world.devices("p") == ()
    assert "confirmed" in reason(world)
    assert world.filter("p").fitting == []

    hands.carry_out(late)  # too late, and nobody wants it any more
    assert world.filter("p").fitting == []
    await hands.obey()
    assert hands.instances(board(world)) == {}, "what a withdrawn order made is removed again"
    assert world.filter("p").fitting == ["a"]


async def test_a_pod_deleted_while_its_slice_is_made_leaves_no_promise(world, hands):
    world.add_pod("p", {BIG: "1"})
    await world.until(lambda: "uid-p" in world.service.truth.pods)
    bind = asyncio.create_task(world.bind("p", "a"))
    await until_ordered(world)
    world.kube.remove_pod("p")

    assert "gone" in await bind
    assert world.devices("p") == ()
    with at_work(hands):
        await world.until(lambda: told(world).make == () and not reason(world))


async def test_nothing_is_ordered_where_agents_say_nothing_of_slices(world):
    """Simulated nodes: slices are made on paper."""
    world.add_pod("p", {BIG: "1"})
    assert await world.bind("p", "a") == ""
    assert world.service.orders.list_of("a") is None


# -- idle for too long --------------------------------------------------------------------------------


async def test_a_slice_that_is_idle_for_long_is_removed_and_not_handed_out_meanwhile():
    async with World({"a": KIND}, idle_slice_seconds=30, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", KIND)))
        hands.put(board(world), "7g.80gb", 0)
        hands.tell(makes_slices=True)
        await later(world, hands, 20)
        assert await hands.obey() is None

        await later(world, hands, 20)
        world.add_pod("p", {BIG: "1"})
        assert world.filter("p").fitting == []

        assert [each.profile for each in (await obeyed(hands)).remove] == ["7g.80gb"]
        assert hands.instances(board(world)) == {}
        assert world.filter("p").fitting == ["a"]


async def test_a_slice_that_is_busy_after_all_is_kept(world, hands):
    """NVML refuses to destroy what has a process: the report says so, and it counts as taken."""
    hands.put(board(world), "7g.80gb", 0)
    hands.fail[("7g.80gb", 0)] = "in use by process 17"
    hands.tell()
    world.service.orders.clear("a", board(world))
    await hands.obey()
    assert "in use by process 17" in reason(world)


async def test_an_acknowledgement_of_an_older_list_does_not_hand_out_what_a_newer_one_still_removes():
    async with World({"a": "4xA100PCIe-mig2"}, idle_slice_seconds=30, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", "4xA100PCIe-mig2")))
        hands.put(world.gpus("a")[2], "7g.80gb", 0)
        hands.tell(makes_slices=True)
        await later(world, hands, 40)
        older = await hands.hear()
        world.add_pod("p", {SMALL: "1"})
        bind = asyncio.create_task(world.bind("p", "a"))
        await until_ordered(world)
        newer = await hands.hear()
        assert older.remove == newer.remove != ()

        hands.fail[("7g.80gb", 0)] = "NVML: Unknown Error (999)"
        hands.carry_out(older)
        hands.fail.clear()
        world.service.orders.refresh(["a"])
        world.add_pod("q", {BIG: "1"})
        assert world.filter("q").fitting == []

        hands.carry_out(newer)
        assert await bind == ""
        assert hands.instances(world.gpus("a")[2]) == {}


async def test_a_slice_idle_on_a_board_that_left_mig_mode_is_not_idle_for_long_when_it_is_back():
    async with World({"a": KIND}, idle_slice_seconds=30, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", KIND)))
        hands.put(board(world), "3g.40gb", 0)
        hands.tell(makes_slices=True)
        hands.change(board(world), mig_enabled=False, instances=())
        await later(world, hands, 40)
        hands.change(board(world), mig_enabled=True)
        hands.put(board(world), "3g.40gb", 0)
        hands.tell()
        assert await hands.obey() is None


# -- what could be somebody's ---------------------------------------------------------------------------


async def test_slices_that_pods_hold_under_the_nodes_old_name_are_not_idle():
    """A node was renamed: its pods have not gone yet."""
    async with World({"a": KIND, "b": KIND}, idle_slice_seconds=30, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", KIND)))
        hands.tell(makes_slices=True)
        world.add_pod("p", {HALF: "1"})
        with at_work(hands):
            assert await world.bind("p", "a") == ""
        renamed = Hands(world.service, hands.report.model_copy(update={"node": "b", "boot": "the next"}))
        renamed.tell(orders=None)
        await later(world, renamed, 40)
        assert await renamed.obey() is None


@pytest.mark.parametrize("count", ["2", "nonsense"])
async def test_slices_that_could_belong_to_a_pod_placed_by_others_stay(count):
    """It need not have a process in them yet."""
    async with World({"a": KIND}, idle_slice_seconds=30, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", KIND)))
        hands.put(board(world), "3g.40gb", 0)
        hands.put(board(world), "1g.10gb", 4)
        hands.tell(makes_slices=True)
        world.kube.add_pod(pod_json("p", {HALF: count}, spec={"nodeName": "a"}))
        await world.until(lambda: world.service.ledger.get("uid-p") is not None)
        await later(world, hands, 40)
        assert await hands.obey() is None


# -- who may cut the boards ---------------------------------------------------------------------------


async def test_an_agent_that_can_see_and_cannot_change_offers_what_exists(world, hands):
    hands.put(board(world), "3g.40gb", 0)
    hands.tell(makes_slices=False, makes_none="it can see and cannot change: no CAP_SYS_ADMIN")
    for name in ("p", "q"):
        world.add_pod(name, {HALF: "1"})

    assert await world.bind("p", "a") == ""
    assert uuids(world, "p")
    assert world.filter("q").fitting == []
    assert world.service.orders.list_of("a") is None


async def test_nodes_of_the_mig_manager_are_never_changed(world, hands):
    """Both on one node would undo each other's instances."""
    hands.put(board(world), "3g.40gb", 0)
    hands.tell()
    label(world, "a", {"nvidia.com/mig.config": "all-3g.40gb", "nvidia.com/mig.config.state": "success"})
    await world.until(lambda: not world.service.inventory.slices_are_made("a"))
    for name in ("p", "q"):
        world.add_pod(name, {HALF: "1"})

    assert await world.bind("p", "a") == ""
    assert world.filter("q").fitting == []
    assert "MIG manager" in world.service.views.node("a")["slices"]

    label(world, "a", {"nvidia.com/mig.config": None})
    await world.until(lambda: world.service.inventory.slices_are_made("a"))
    assert world.filter("q").fitting == ["a"]


async def test_the_mig_manager_still_owns_a_node_whose_object_was_deleted(world, hands):
    """It works on: only its labels have gone, and come back after the kubelet has registered the node again."""
    label(world, "a", {"nvidia.com/mig.config": "all-1g.10gb", "nvidia.com/mig.config.state": "success"})
    await world.until(lambda: not world.service.inventory.slices_are_made("a"))
    world.kube.remove_node("a")
    await world.until(lambda: "a" not in world.service.truth.nodes)
    assert not world.service.inventory.slices_are_made("a")

    world.kube.add_node("a")
    await world.until(lambda: world.service.inventory.slices_are_made("a"))


async def test_a_node_that_the_mig_manager_is_changing_is_not_offered(world, hands):
    label(world, "a", {"nvidia.com/mig.config": "all-1g.10gb", "nvidia.com/mig.config.state": "pending"})
    world.add_pod("p", {GPU: "1"})
    await world.until(lambda: world.filter("p").fitting == [])
    assert "is changing its boards" in world.service.views.node("a")["reason"]


# -- agreeing again -----------------------------------------------------------------------------------


async def test_after_a_reboot_held_slices_are_made_again_and_pods_get_their_new_uuids(world, hands):
    world.add_pod("p", {HALF: "1"})
    with at_work(hands):
        assert await world.bind("p", "a") == ""
        before = uuids(world, "p")
        await world.until(lambda: world.service.truth.pods["uid-p"].written is not None)
        hands.reboot()
        hands.tell(boot="the next")
        await world.until(lambda: uuids(world, "p") != before)
    assert [place for place, _ in uuids(world, "p")] == [place for place, _ in before]


async def test_new_uuids_that_could_not_be_written_are_written_later(world, hands, monkeypatch):
    world.add_pod("p", {HALF: "1"})
    with at_work(hands):
        assert await world.bind("p", "a") == ""
        before = uuids(world, "p")
        await world.until(lambda: world.service.truth.pods["uid-p"].written is not None)
        write, failures = world.kube.annotate_pod, [Unknown("the API server is away")]

        async def fail_once(*args: Any, **more: Any) -> Any:
            if failures:
                raise failures.pop()
            return await write(*args, **more)

        monkeypatch.setattr(world.kube, "annotate_pod", fail_once)
        hands.reboot()
        hands.tell(boot="the next")
        await world.until(lambda: uuids(world, "p") != before)
    assert not failures


async def test_a_node_that_was_forgotten_and_is_back_acknowledges_nothing_new_by_its_old_report():
    """The agent's report names the last list that it carried out, of before."""
    async with World({"a": KIND}, idle_slice_seconds=0, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", KIND)))
        hands.tell(makes_slices=True)
        for _ in range(3):
            hands.put(board(world), "1g.10gb", 0)
            hands.tell()
            world.service.orders.clear("a", board(world))
            await hands.obey()
        world.kube.remove_node("a")
        await world.until(lambda: "a" not in world.service.truth.nodes)
        world.clock.advance(200)
        await world.until(lambda: world.service.inventory.get("a") is None)
        world.kube.add_node("a")
        await world.until(lambda: "a" in world.service.truth.nodes)
        hands.tell()

        world.add_pod("p", {BIG: "1"})
        bind = asyncio.create_task(world.bind("p", "a"))
        await until_ordered(world)
        world.clock.advance(9)
        hands.tell()
        assert "was not made" in await bind
        hands.tell()
        assert "confirmed" in reason(world)


async def test_nothing_is_ordered_before_the_ledger_is_the_whole_truth():
    """Else a slice whose pod is not known yet would be taken for idle."""
    world = World({"a": KIND}, idle_slice_seconds=1)
    hands = Hands(world.service, report_of(sample_node("a", KIND)))
    hands.put(board(world), "7g.80gb", 0)
    hands.tell(makes_slices=True)
    world.clock.advance(100)
    hands.tell()
    world.service.orders.sweep()
    assert (await hands.listen()).orders is None


async def test_a_new_service_says_what_it_wants_to_an_agent_with_an_old_list(world, hands):
    world.add_pod("p", {HALF: "1"})
    with at_work(hands):
        assert await world.bind("p", "a") == ""
    async with World({"a": KIND}, on=world.kube, idle_slice_seconds=0).running() as after:
        again = Hands(after.service, hands.report, got=hands.got)
        again.tell(makes_slices=True)
        again.take_away(board(world), *next(iter(again.instances(board(world)))))
        again.tell()
        assert (await again.hear()).service == after.service.id


async def test_a_held_request_is_answered_as_soon_as_there_is_an_order(world, hands):
    asked = asyncio.create_task(hands.hear(seconds=9))
    await asyncio.sleep(0)
    assert not asked.done()
    world.add_pod("p", {BIG: "1"})
    bind = asyncio.create_task(world.bind("p", "a"))

    hands.carry_out(await asyncio.wait_for(asked, 5))

    assert await bind == ""


async def test_listening_is_a_sign_of_life_and_an_unknown_version_is_asked_for(world, hands):
    world.clock.advance(20)
    assert not (await hands.listen()).resend
    assert world.service.views.node("a")["reported_seconds_ago"] == 0
    hands.report = hands.report.model_copy(update={"version": 99})
    assert (await hands.listen()).resend


# -- the law --------------------------------------------------------------------------------------------

SLICES = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb")


@pytest.mark.parametrize("seed", range(6))
async def test_slices_keep_the_law_through_failures_restarts_and_reboots(seed):
    """Random pods come and go; agents fail, restart and act late; the service restarts; boards refuse overlaps."""
    chance = random.Random(seed)
    report = report_of(sample_node("a", "4xA100PCIe-mig2")).model_copy(update={"makes_slices": True})
    world, number, bound = World({"a": "4xA100PCIe-mig2"}, lease_seconds=1000), 0, 0
    hands = Hands(world.service, report)
    for round_ in range(3):
        if round_:
            world = World(world.nodes, on=world.kube, lease_seconds=1000, idle_slice_seconds=chance.choice([0, 20]))
            world.kube.objects["leases"].clear()
        async with world.running():
            hands = Hands(world.service, hands.report, got=hands.got, removed=[])
            hands.tell(orders=None)
            for _ in range(25):
                names = [f"p{number + each}" for each in range(chance.randint(0, 3))]
                number += len(names)
                for name in names:
                    world.add_pod(name, {f"nvidia.com/mig-{chance.choice(SLICES)}": "1"})
                binds = [asyncio.create_task(world.bind(name, "a")) for name in names]
                await asyncio.sleep(0)
                hands.fail = {(p, s): "trouble" for p in SLICES for s in range(8) if chance.random() < 0.1}
                _end_some(world, chance, 0.2)
                held_before = slices_of_bound_pods(world)
                hands.removed.clear()
                for _ in range(4):
                    if chance.random() < 0.8:
                        await hands.obey()
                    if chance.random() < 0.1:
                        hands.tell(boot=f"boot {chance.random()}", orders=None)
                        hands.got = None
                    if chance.random() < 0.05:
                        hands.reboot()
                        hands.tell()
                    await asyncio.sleep(0.001)
                assert not set(hands.removed) & held_before & slices_of_bound_pods(world)
                world.clock.advance(9)
                hands.tell()
                bound += sum(not error for error in await asyncio.gather(*binds))
                overlaps = beyond_the_law(sample_node("a", "4xA100PCIe-mig2"), world.service.ledger.taken("a"))
                assert overlaps == []
            hands.fail = {}
            world.clock.advance(70)
            hands.tell()
            await all_are_there(world, hands)
    assert bound > 15


async def all_are_there(world: World, hands: Hands) -> None:
    """In the end every bound pod has its slice."""
    with at_work(hands):
        await world.until(lambda: slices_of_bound_pods(world) <= on_boards(world, hands))


def _end_some(world: World, chance: random.Random, part: float) -> None:
    for key in [key for key in world.kube.objects["pods"] if chance.random() < part]:
        world.kube.change_pod(key.removeprefix("default/"), lambda pod: pod["status"].update(phase="Succeeded"))


def slices_of_bound_pods(world: World) -> set[tuple[str, str, int]]:
    found = set()
    for item in world.kube.objects["pods"].values():
        pod = pod_of(item)
        if pod.node and not pod.finished and isinstance(pod.written, Written):
            found |= {(each.gpu, each.slice.profile, each.slice.start) for each in pod.written.devices if each.slice}
    return found


def on_boards(world: World, hands: Hands) -> set[tuple[str, str, int]]:
    return {(gpu, *place) for gpu in world.gpus("a")[2:] for place in hands.instances(gpu)}


# -- MIG modes ----------------------------------------------------------------------------------------


def not_in_mig_mode(mig: Mig | None, *, switches: bool) -> Mig:
    assert mig is not None
    return mig.model_copy(update={"enabled": False, "pending": False, "switches": switches})


async def _modes(*, allowed: bool, switches: bool) -> tuple[World, Hands]:
    world = World({"a": "4xH100-mig"}, mig_modes=allowed, idle_slice_seconds=0, lease_seconds=1000)
    await world.service.start()
    await world.until(lambda: not world.service.waiting_for())
    hands = Hands(world.service, report_of(sample_node("a", "4xH100-mig")))
    gpus = tuple(
        gpu.model_copy(update={"mig": not_in_mig_mode(gpu.mig, switches=switches)}) for gpu in hands.report.gpus
    )
    hands.tell(makes_slices=True, gpus=gpus)
    world.add_pod("p", {HALF: "1"})
    assert world.filter("p").fitting == []
    world.clock.advance(3)
    world.service.modes.sweep() if allowed else None
    return world, hands


async def test_no_mode_is_switched_any_more_once_the_mig_manager_has_the_node():
    world, hands = await _modes(allowed=True, switches=True)
    try:
        assert told(world).switch
        label(world, "a", {"nvidia.com/mig.config": "all-1g.10gb", "nvidia.com/mig.config.state": "success"})
        await world.until(lambda: not told(world).switch)
        assert not world.service.orders.is_switching("a")
        assert not hands.removed
    finally:
        await world.service.stop()


async def test_one_idle_gpu_is_switched_for_pods_that_wait_for_slices():
    world, hands = await _modes(allowed=True, switches=True)
    try:
        orders = await hands.hear()
        assert [switch.enabled for switch in orders.switch] == [True]
        assert "being switched" in str(world.service.views.node("a")["gpus"])
        hands.carry_out(orders)
        assert world.filter("p").fitting == ["a"]
        world.service.modes.sweep()
        assert not told(world).switch
    finally:
        await world.service.stop()


@pytest.mark.parametrize(("allowed", "switches"), [(False, True), (True, False)])
async def test_no_mode_is_switched_without_leave_or_where_it_needs_a_reset(allowed, switches):
    world, hands = await _modes(allowed=allowed, switches=switches)
    try:
        assert (await hands.listen()).orders is None
    finally:
        await world.service.stop()
