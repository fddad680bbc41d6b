"""Who gets which device: agents know it before kubelets ask, exchanges keep the law, what was handed is the truth."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.errors import Conflict, Refused, Unknown
from app.handing import Unanswered
from app.handing import _device as _known
from app.report import DeviceAt, ExchangeReply, Handed
from app.simulate import report_of
from app.translate import PLACEMENT_ANNOTATION, Written, read_placement
from solver.samples import sample_node
from tests.app.hands import Hands
from tests.app.law import beyond_the_law
from tests.app.world import GPU, World
from tests.fakes import pod_json

KIND = "8xH100"
CUT = "4xA100PCIe-mig1"
SMALL = "nvidia.com/mig-1g.10gb"
SHARE = "tangram.gpu/share"


def a_world(kind: str = KIND, **knobs: Any) -> World:
    return World({"a": kind}, lease_seconds=1000, idle_slice_seconds=0, **knobs)


def plugin_on(world: World, kind: str = KIND, **said: Any) -> Hands:
    """The node's agent is the kubelet's device plugin."""
    hands = Hands(world.service, report_of(sample_node("a", kind)))
    hands.tell(hands=said.pop("hands", "plugin"), **said)
    return hands


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with a_world().running() as running:
        yield running


@pytest.fixture
def hands(world: World) -> Hands:
    return plugin_on(world)


async def bound(world: World, *names: str, limits: dict[str, str] | None = None, **more: Any) -> None:
    """Pods of one GPU each, on the node."""
    for name in names:
        world.add_pod(name, limits or {GPU: "1"}, **more)
        assert await world.bind(name, "a") == ""
    await world.until(lambda: all(written(world, name) for name in names))


def written(world: World, name: str) -> tuple[str, ...]:
    found = read_placement(world.kube.annotations(name).get(PLACEMENT_ANNOTATION))
    return tuple(map(str, found.devices)) if isinstance(found, Written) else ()


def at(world: World, index: int) -> DeviceAt:
    return DeviceAt(gpu=world.gpus("a")[index])


def of(world: World, name: str) -> DeviceAt:
    """The one GPU that a pod has."""
    (device,) = world.devices(name)
    return DeviceAt(gpu=device)


def free(world: World, *names: str) -> list[DeviceAt]:
    taken = {device for name in names for device in world.devices(name)}
    return [DeviceAt(gpu=gpu) for gpu in world.gpus("a") if gpu not in taken]


def handed(name: str, *devices: DeviceAt, **more: Any) -> Handed:
    said = {"uid": f"uid-{name}", "namespace": "default", "container": "main", "resource": GPU, **more}
    return Handed(name=name, devices=devices, **said)


async def granted(hands: Hands, pod: str, give: DeviceAt, take: DeviceAt) -> ExchangeReply:
    reply = await hands.exchange(pod, give, take)
    assert isinstance(reply, ExchangeReply)
    assert reply.granted, reply.reason
    return reply


async def why_not(hands: Hands, pod: str, give: DeviceAt, take: DeviceAt) -> str:
    reply = await hands.exchange(pod, give, take)
    assert isinstance(reply, ExchangeReply)
    assert not reply.granted
    return reply.reason


def metric(world: World, line: str) -> float:
    lines = world.service.metrics.text().decode().splitlines()
    return next((float(each.rsplit(" ", 1)[1]) for each in lines if each.startswith(line + " ")), 0.0)


# -- placements ---------------------------------------------------------------------------------------


async def test_an_agent_knows_a_pods_devices_before_its_bind_is_made(world, hands):
    world.kube.hold["bind"] = asyncio.Event()
    assert await hands.placements() == {}
    world.add_pod("p", {GPU: "1"})
    asked = asyncio.create_task(hands.listen(seconds=9))
    bind = asyncio.create_task(world.bind("p", "a"))

    await asyncio.wait_for(asked, 5)
    (pod,) = hands.placed.pods

    assert pod.uid == "uid-p"
    assert pod.devices == (of(world, "p"),)
    assert [(each.name, each.resources) for each in pod.containers] == [("main", {GPU: 1})]
    assert not bind.done()
    world.kube.hold["bind"].set()
    assert await bind == ""


async def test_a_withdrawn_promise_is_taken_off_the_list(world, hands):
    def refused() -> None:
        raise Unknown("the API server is away")

    world.kube.before["bind"] = world.kube.before["annotate_pod"] = refused
    world.add_pod("p", {GPU: "1"})
    assert await world.bind("p", "a")
    assert "p" in await hands.placements()
    world.kube.before.clear()
    await world.until(lambda: not world.devices("p"))
    world.service._order()
    assert await hands.placements() == {}


async def test_containers_that_ask_are_named_in_the_order_in_which_the_kubelet_admits_them(world, hands):
    asking = {"resources": {"limits": {GPU: "1"}}}
    spec = {"initContainers": [{"name": "first", **asking}], "containers": [{"name": "main", **asking}, {"name": "no"}]}
    world.add_pod("p", spec=spec)
    assert await world.bind("p", "a") == ""
    assert [each.name for each in (await hands.placements())["p"].containers] == ["first", "main"]


async def test_a_pod_that_tangram_has_not_placed_is_named_without_devices(world, hands):
    world.kube.add_pod(pod_json("p", {GPU: "2"}, spec={"nodeName": "a"}))
    await world.until(lambda: world.service.ledger.get("uid-p") is not None)
    world.service._order()
    pod = (await hands.placements())["p"]
    assert pod.devices == ()
    assert pod.containers[0].resources == {GPU: 2}


async def test_only_what_has_changed_is_sent_and_only_to_device_plugins(world, hands):
    await bound(world, "p")
    assert (await hands.listen()).placements is not None
    before = hands.placed
    hands.tell()
    assert (await hands.listen()).placements is None

    await bound(world, "q")
    await hands.listen()
    assert hands.placed.version > before.version
    assert hands.placed.pods[0] is before.pods[0]

    hands.tell(hands=None)
    world.service.ledger.release("uid-q")
    world.service._order()
    assert (await hands.listen()).placements is None


async def test_profiles_and_places_are_said_in_nvmls_own_names():
    async with a_world(CUT).running() as world:
        hands = plugin_on(world, CUT)
        world.add_pod("p", {"nvidia.com/mig-1g.10gb.me": "1"})
        assert await world.bind("p", "a") == ""
        (device,) = (await hands.placements())["p"].devices
        assert device.profile == "1g.10gb+me"


@pytest.mark.parametrize("allowed", [True, False])
async def test_gpus_whose_mode_may_be_switched_are_offered_in_both_forms(allowed):
    async with a_world("4xH100-mig", mig_modes=allowed).running() as world:
        hands = plugin_on(world, "4xH100-mig", makes_slices=True)
        gpus = [
            gpu.model_copy(update={"mig": gpu.mig.model_copy(update={"switches": True})}) if gpu.mig else gpu
            for gpu in hands.report.gpus
        ]
        hands.tell(gpus=tuple(gpus))
        placements = (await hands.listen()).placements
        assert placements is not None
        assert set(placements.either) == ({gpu.uuid for gpu in gpus if gpu.mig} if allowed else set())


async def test_a_new_service_sends_its_own_list_to_an_agent_that_has_an_old_one(world, hands):
    await bound(world, "p")
    await hands.listen()
    async with World({"a": KIND}, on=world.kube, lease_seconds=1000).running() as after:
        again = Hands(after.service, hands.report, placed=hands.placed)
        again.tell()
        placements = (await again.listen()).placements
        assert placements is not None
        assert placements.service == after.service.id
        assert [pod.uid for pod in placements.pods] == ["uid-p"]


# -- exchanges ----------------------------------------------------------------------------------------


async def test_a_free_gpu_is_had_for_the_promised_one_and_the_annotation_says_so(world, hands):
    await bound(world, "p")
    give, take = of(world, "p"), free(world, "p")[0]

    reply = await granted(hands, "p", give, take)

    assert reply.swapped == ()
    assert world.devices("p") == written(world, "p") == (take.gpu,)
    assert (await hands.placements())["p"].devices == (take,)
    world.add_pod("q", {GPU: "7"})
    assert await world.bind("q", "a") == "", "what was given back is free"


async def test_a_gpu_promised_to_a_pod_that_has_not_been_handed_it_is_swapped(world, hands):
    await bound(world, "p", "q")
    give, take = of(world, "p"), of(world, "q")

    reply = await granted(hands, "p", give, take)

    assert reply.swapped == ("uid-q",)
    assert world.devices("p") == written(world, "p") == (take.gpu,)
    assert world.devices("q") == written(world, "q") == (give.gpu,)
    assert not world.service.truth.unexplained


async def test_asked_again_the_answer_is_the_same(world, hands):
    await bound(world, "p", "q")
    give, take = of(world, "p"), of(world, "q")
    first = await granted(hands, "p", give, take)
    assert await granted(hands, "p", give, take) == first
    assert world.devices("p") == (take.gpu,)
    assert metric(world, 'tangram_exchanges_total{outcome="swapped"}') == 1
    assert metric(world, 'tangram_exchanges_total{outcome="again"}') == 1


async def test_what_was_handed_or_is_in_use_is_not_swapped(world, hands):
    await bound(world, "p", "q", "r")
    hands.hand(handed("q", of(world, "q")))
    assert "has been handed it" in await why_not(hands, "p", of(world, "p"), of(world, "q"))

    world.kube.change_pod("r", lambda pod: pod["status"].update(phase="Running"))
    await world.until(lambda: world.service.truth.pods["uid-r"].admitted)
    assert "r" in await why_not(hands, "p", of(world, "p"), of(world, "r"))


async def test_like_is_exchanged_for_like_and_only_what_one_has():
    async with a_world(CUT).running() as world:
        hands = plugin_on(world, CUT)
        await bound(world, "p")
        board = world.gpus("a")[3]
        give = of(world, "p")
        spare = free(world, "p")
        slice_ = DeviceAt(gpu=board, profile="1g.10gb", start=0)
        assert "like for like" in await why_not(hands, "p", give, slice_)
        assert "does not have" in await why_not(hands, "p", spare[0], spare[1])
        assert "promised nothing" in await why_not(hands, "nobody", give, spare[0])
        assert "not on a" in await why_not(hands, "p", give, DeviceAt(gpu="GPU-of-another-node"))
        assert "MIG mode" in await why_not(hands, "p", give, DeviceAt(gpu=board))
        assert world.devices("p") == (give.gpu,)


async def test_an_agent_exchanges_nothing_of_another_node(world, hands):
    other = World({"a": KIND, "b": KIND}, lease_seconds=1000)
    async with other.running():
        other.add_pod("p", {GPU: "1"})
        assert await other.bind("p", "b") == ""
        stranger = Hands(other.service, report_of(sample_node("a", KIND)))
        reply = await stranger.exchange("p", DeviceAt(gpu=other.devices("p")[0]), DeviceAt(gpu=other.gpus("b")[7]))
        assert isinstance(reply, ExchangeReply)
        assert not reply.granted


async def test_a_gpu_that_is_bad_or_could_be_somebodys_is_not_had(world, hands):
    await bound(world, "p")
    bad, used = free(world, "p")[:2]
    gpus = {gpu.uuid: gpu for gpu in hands.report.gpus}
    gpus[bad.gpu] = gpus[bad.gpu].model_copy(update={"health": "bad", "health_reason": "fell off the bus"})
    gpus[used.gpu] = gpus[used.gpu].model_copy(update={"pods": ("uid-of-a-stranger",)})
    hands.tell(gpus=tuple(gpus.values()))
    assert "fell off the bus" in await why_not(hands, "p", of(world, "p"), bad)
    assert "stranger" in await why_not(hands, "p", of(world, "p"), used)


async def test_everybodys_terms_hold_on_the_new_devices():
    """A share may not come beside a tenant who wants to be apart, nor be pushed there."""
    async with a_world("4xL4").running() as world:
        hands = plugin_on(world, "4xL4")
        apart = {"metadata": {"annotations": {"tangram.gpu/tenant": "red", "tangram.gpu/isolation": "gpu"}}}
        await bound(world, "p", limits={SHARE: "8"}, metadata={"annotations": {"tangram.gpu/tenant": "blue"}})
        await bound(world, "q", limits={SHARE: "8"}, **apart)
        (mine,), (theirs,) = world.devices("p"), world.devices("q")
        milli = int(mine.rpartition(":")[2][:-1])
        give = DeviceAt(gpu=mine.partition(":")[0], milli=milli)
        take = DeviceAt(gpu=theirs.partition(":")[0], milli=milli)
        assert "not to share a GPU" in await why_not(hands, "p", give, take)
        elsewhere = next(gpu for gpu in world.gpus("a") if gpu not in (give.gpu, take.gpu))
        await granted(hands, "p", give, DeviceAt(gpu=elsewhere, milli=milli + 1))
        assert world.devices("p") == (f"{elsewhere}:{milli}m",), "as large as it asked, however ids are rounded"


async def test_pods_that_need_nvlink_keep_it():
    async with a_world("8xV100").running() as world:
        hands = plugin_on(world, "8xV100")
        link = {"metadata": {"annotations": {"tangram.gpu/link": "nvlink"}}}
        await bound(world, "p", limits={GPU: "2"}, **link)
        first, second = world.devices("p")
        words = []
        for gpu in (gpu for gpu in world.gpus("a") if gpu not in (first, second)):
            reply = await hands.exchange("p", DeviceAt(gpu=second), DeviceAt(gpu=gpu))
            assert isinstance(reply, ExchangeReply)
            if reply.granted:
                await granted(hands, "p", DeviceAt(gpu=gpu), DeviceAt(gpu=second))
            words.append(reply.reason)
        assert any("NVLink" in each for each in words)


async def test_a_write_that_arrives_late_does_not_undo_what_was_exchanged_since(world, hands):
    await bound(world, "p")
    original, late = world.kube.annotate_pod, []

    async def still_under_way(*args: Any, **more: Any) -> str:
        world.kube.annotate_pod = original
        late.append((args, more))
        raise Unknown("timeout")

    world.kube.annotate_pod = still_under_way
    first, second = free(world, "p")[:2]
    await granted(hands, "p", of(world, "p"), first)
    await granted(hands, "p", first, second)
    assert written(world, "p") == (second.gpu,)

    ((args, more),) = late
    with contextlib.suppress(Conflict):
        await original(*args, **more)
    await world.until(lambda: not world.service.handing.unwritten)
    assert written(world, "p") == (second.gpu,)


async def test_an_annotation_is_written_before_the_answer_to_a_pod_that_has_just_changed(world, hands):
    await bound(world, "p")
    world.kube.before["annotate_pod"] = lambda: (
        world.kube.before.pop("annotate_pod")
        and world.kube.change_pod("p", lambda pod: pod["metadata"].update(labels={"touched": "yes"}))
    )
    take = free(world, "p")[0]
    await granted(hands, "p", of(world, "p"), take)
    assert written(world, "p") == (take.gpu,)


@pytest.mark.parametrize("error", [Conflict("409 for a reason of its own"), Refused("403 forbidden")])
async def test_an_annotation_that_is_refused_while_its_pod_is_there_is_tried_again(world, hands, error):
    await bound(world, "p")
    left = [2]

    def refuse() -> None:
        if left[0]:
            left[0] -= 1
            raise type(error)(str(error))

    world.kube.before["annotate_pod"] = refuse
    take = free(world, "p")[0]
    await granted(hands, "p", of(world, "p"), take)
    await world.until(lambda: written(world, "p") == (take.gpu,), 5)
    await world.until(lambda: not world.service.handing.unwritten)


async def test_the_new_name_of_a_slice_does_not_undo_an_exchange(world, hands):
    """Both come after a reboot: slices are made again, and kubelets admit their pods anew."""
    await bound(world, "p")
    before = world.service.truth.pods["uid-p"]
    assert isinstance(before.written, Written)
    take = free(world, "p")[0]
    await granted(hands, "p", of(world, "p"), take)
    await world.service._name_slices_of(world.kube, before.ref, before.written)
    assert written(world, "p") == (take.gpu,)
    await world.until(lambda: not world.service.handing.unwritten)
    await world.service._name_slices_of(world.kube, before.ref, before.written)
    assert written(world, "p") == (take.gpu,)


async def test_an_annotation_that_cannot_be_written_now_is_written_later(world, hands):
    await bound(world, "p")

    def away() -> None:
        raise Unknown("the API server is away")

    world.kube.before["annotate_pod"] = away
    take = free(world, "p")[0]
    await granted(hands, "p", of(world, "p"), take)
    assert written(world, "p") != (take.gpu,)
    assert metric(world, 'tangram_devices_differ{state="unwritten"}') == 1

    world.kube.before.clear()
    await world.until(lambda: written(world, "p") == (take.gpu,))
    await world.until(lambda: not world.service.handing.unwritten)
    assert not world.service.truth.unexplained


async def test_who_is_not_ready_says_neither_yes_nor_no(world, hands, monkeypatch):
    await bound(world, "p")
    give, take = of(world, "p"), free(world, "p")[0]
    monkeypatch.setattr(world.service.lease, "held", lambda: False)
    reply = await hands.exchange("p", give, take)
    assert isinstance(reply, Unanswered)
    assert not reply.perhaps
    assert world.devices("p") == (give.gpu,)


async def test_an_exchange_during_which_the_lease_is_lost_is_perhaps_made(world, hands, monkeypatch):
    await bound(world, "p")

    def lost() -> None:
        monkeypatch.setattr(world.service.lease, "held", lambda: False)

    world.kube.after["annotate_pod"] = lost
    reply = await hands.exchange("p", of(world, "p"), free(world, "p")[0])
    assert isinstance(reply, Unanswered)
    assert reply.perhaps


async def test_a_slice_that_does_not_exist_yet_is_ordered_and_its_uuid_written():
    async with a_world(CUT).running() as world:
        hands = plugin_on(world, CUT, makes_slices=True)
        obeying = asyncio.create_task(hands.keep_obeying())
        await bound(world, "p", limits={SMALL: "1"})
        (device,) = world.devices("p")
        board, _, place = device.partition("/")
        start = int(place[-1])
        take = DeviceAt(gpu=board, profile="1g.10gb", start=(start + 1) % 7)
        await granted(hands, "p", DeviceAt(gpu=board, profile="1g.10gb", start=start), take)
        await world.until(lambda: ("1g.10gb", take.start) in hands.instances(board))
        await world.until(lambda: _uuid_of(world, "p") == hands.instances(board)["1g.10gb", take.start].uuid)
        obeying.cancel()


def _uuid_of(world: World, name: str) -> str | None:
    found = read_placement(world.kube.annotations(name).get(PLACEMENT_ANNOTATION))
    return next((uuid for _, uuid in found.uuids), None) if isinstance(found, Written) else None


async def test_slices_that_nobody_would_make_are_not_had():
    async with a_world(CUT).running() as world:
        hands = plugin_on(world, CUT)
        board = world.gpus("a")[3]
        hands.put(board, "1g.10gb", 0)
        hands.put(board, "1g.10gb", 2)
        hands.tell(makes_slices=False)
        await bound(world, "p", limits={SMALL: "1"})
        start = int(world.devices("p")[0][-1])
        give = DeviceAt(gpu=board, profile="1g.10gb", start=start)
        assert "does not exist" in await why_not(hands, "p", give, give.model_copy(update={"start": 4}))
        await granted(hands, "p", give, give.model_copy(update={"start": 2 - start}))


async def test_a_bind_goes_on_with_what_its_pod_is_promised_after_an_exchange(world, hands):
    """The kubelet of another pod took what this one was promised, while its annotation was being written."""
    await bound(world, "p")
    give = of(world, "p")
    released = world.kube.hold["annotate_pod"] = asyncio.Event()
    world.add_pod("q", {GPU: "1"})
    bind = asyncio.create_task(world.bind("q", "a"))
    await world.until(lambda: world.devices("q"))
    swap = asyncio.create_task(hands.exchange("p", give, of(world, "q")))
    await world.until(lambda: world.devices("q") == (give.gpu,))
    released.set()

    assert await bind == ""
    reply = await swap
    assert isinstance(reply, ExchangeReply)
    assert reply.granted
    await world.until(lambda: written(world, "q") == world.devices("q") == (give.gpu,))
    assert world.kube.pod("q")["spec"]["nodeName"] == "a"


@pytest.mark.parametrize("seed", range(4))
async def test_exchanges_keep_the_law(seed):
    """Random wishes for random devices, with pods that come and go and are handed theirs."""
    chance = random.Random(seed)
    kind = "4xA100PCIe-mig2"
    node = sample_node("a", kind)
    async with a_world(kind).running() as world:
        hands = plugin_on(world, kind)
        places = [DeviceAt(gpu=gpu.uuid) for gpu in node.gpus[:2]]
        places += [
            DeviceAt(gpu=gpu.uuid, profile="1g.10gb", start=start) for gpu in node.gpus[2:] for start in range(7)
        ]
        places += [DeviceAt(gpu=gpu.uuid, profile="3g.40gb", start=start) for gpu in node.gpus[2:] for start in (0, 4)]
        yes, has = 0, dict[str, Handed]()
        for number in range(60):
            name = f"p{number}"
            world.add_pod(name, {chance.choice([GPU, SMALL, SMALL, "nvidia.com/mig-3g.40gb"]): "1"})
            await world.bind(name, "a")
            told = await hands.placements()
            waiting = [pod for pod in told if pod not in has]
            for pod in chance.sample(waiting, min(4, len(waiting))):
                (give,) = (await hands.placements())[pod].devices
                take = chance.choice([each for each in places if each.profile == give.profile or chance.random() < 0.1])
                reply = await hands.exchange(pod, give, take)
                assert isinstance(reply, ExchangeReply)
                yes += reply.granted
                assert beyond_the_law(node, world.service.ledger.taken("a")) == []
                assert {each.devices for each in (await hands.placements()).values()} == _told_by_the_ledger(world)
            now = await hands.placements()
            has |= {pod: handed(pod, *now[pod].devices) for pod in chance.sample(waiting, len(waiting) // 3)}
            for pod in chance.sample(list(now), len(now) // 4):
                world.kube.change_pod(pod, lambda each: each["status"].update(phase="Succeeded"))
                await world.until(lambda ended=pod: not world.devices(ended))
                has.pop(pod, None)
            hands.hand(*has.values())
        assert yes > 10
        assert world.service.handing.followed == 0


@pytest.mark.parametrize("seed", range(4))
async def test_ledger_annotations_and_containers_agree_in_the_end_through_restarts_and_lost_answers(seed):
    """A kubelet admits pods with ids of its own choice, the API server fails at random, the service restarts."""
    chance = random.Random(seed)
    kind = "4xA100PCIe-mig2"
    node = sample_node("a", kind)
    places = [DeviceAt(gpu=gpu.uuid) for gpu in node.gpus[:2]]
    places += [DeviceAt(gpu=gpu.uuid, profile="1g.10gb", start=start) for gpu in node.gpus[2:] for start in range(7)]
    world, has, number, exchanged = a_world(kind), dict[str, Handed](), 0, 0

    def fails(_: str = "") -> None:
        if chance.random() < 0.2:
            raise Unknown("the API server is away")

    for round_ in range(3):
        if round_:
            world = World(world.nodes, on=world.kube, lease_seconds=1000, idle_slice_seconds=0)
            world.kube.objects["leases"].clear()
        async with world.running():
            hands = plugin_on(world, kind, handed=tuple(has.values()), boot=f"boot {round_}")
            world.kube.before["annotate_pod"] = world.kube.after["annotate_pod"] = fails
            for _ in range(15):
                number += 1
                world.add_pod(f"p{number}", {chance.choice([GPU, SMALL, SMALL, SMALL]): "1"})
                await world.bind(f"p{number}", "a")
                told = await hands.placements()
                waiting = [pod for pod in told if pod not in has and world.kube.pod(pod)["spec"].get("nodeName")]
                for pod in chance.sample(waiting, min(2, len(waiting))):
                    give, counted = told[pod].devices[0], [each.devices[0] for each in has.values()]
                    take = chance.choice([at for at in places if at.profile == give.profile and at not in counted])
                    reply = await hands.exchange(pod, give, take) if take != give else None
                    yes = take == give or (isinstance(reply, ExchangeReply) and reply.granted)
                    exchanged += yes and take != give
                    got = take if yes else give
                    if got not in counted:
                        has[pod] = handed(pod, got, how="placed" if yes else "overridden")
                    hands.hand(*has.values())
                    told = await hands.placements()
                for pod in chance.sample(list(has), len(has) // 4):
                    world.kube.change_pod(pod, lambda each: each["status"].update(phase="Succeeded"))
                    del has[pod]
                    await world.until(lambda ended=pod, at=world: not at.devices(ended))
                world.service._order()
            world.kube.before.clear()
            world.kube.after.clear()
            hands.hand(*has.values())
            for pod, each in has.items():
                assert world.devices(pod) == tuple(str(_known(at)) for at in each.devices)
            assert beyond_the_law(node, world.service.ledger.taken("a")) == []
            await all_are_written(world)
            assert not world.service.truth.unexplained
    assert exchanged > 10


async def all_are_written(world: World) -> None:
    """Each bound pod's annotation comes to say what the ledger says."""
    names = [hold.pod.name for hold in world.service.ledger.on("a") if hold.phase.value == "held"]
    await world.until(lambda: all(written(world, each) == world.devices(each) for each in names))


def _told_by_the_ledger(world: World) -> set[tuple[DeviceAt, ...]]:
    held = [hold for hold in world.service.ledger.on("a") if hold.phase.value in ("assumed", "held")]
    return {
        tuple(
            DeviceAt(gpu=each.gpu, profile=each.slice.profile, start=each.slice.start)
            if each.slice
            else DeviceAt(gpu=each.gpu)
            for each in hold.devices
        )
        for hold in held
    }


# -- what was handed ----------------------------------------------------------------------------------


async def test_a_pod_that_tangram_did_not_place_has_what_the_kubelet_gave_it_and_keeps_nothing_else_back(world, hands):
    world.kube.add_pod(pod_json("p", {GPU: "1"}, spec={"nodeName": "a"}))
    await world.until(lambda: world.service.ledger.get("uid-p") is not None)
    world.add_pod("q", {GPU: "7"})
    assert world.filter("q").fitting == []

    hands.hand(handed("p", at(world, 5), how="unplaced"))

    assert world.devices("p") == (world.gpus("a")[5],)
    assert world.filter("q").fitting == ["a"]
    assert not world.service.truth.unexplained
    assert written(world, "p") == (), "a pod of others is not written to"


async def test_a_report_that_comes_before_the_pod_is_known_counts_as_soon_as_it_is(world, hands):
    hands.hand(handed("p", at(world, 5), how="unplaced", uid=""))
    world.kube.add_pod(pod_json("p", {GPU: "1"}, spec={"nodeName": "a"}))
    await world.until(lambda: world.devices("p") == (world.gpus("a")[5],))


async def test_a_pod_of_two_containers_is_unknown_until_both_have_theirs(world, hands):
    two = [{"name": name, "resources": {"limits": {GPU: "1"}}} for name in ("one", "two")]
    world.kube.add_pod(pod_json("p", spec={"nodeName": "a", "containers": two}))
    await world.until(lambda: world.service.ledger.get("uid-p") is not None)
    first, second = (handed("p", at(world, i), container=name, how="unplaced") for i, name in ((3, "one"), (6, "two")))
    hands.hand(first)
    assert world.devices("p") == ()
    hands.hand(first, second)
    assert set(world.devices("p")) == {world.gpus("a")[3], world.gpus("a")[6]}


async def test_beside_another_plugin_the_ledger_follows_what_it_gave_and_so_does_the_annotation():
    async with a_world().running() as world:
        hands = plugin_on(world, hands="observe")
        await bound(world, "p", "q")
        was, other = of(world, "p"), of(world, "q")

        hands.hand(handed("p", other, how="observed"))

        assert world.devices("p") == (other.gpu,)
        assert world.devices("q") != (other.gpu,), "who has not been given it is promised something else"
        await world.until(lambda: written(world, "p") == (other.gpu,))
        await world.until(lambda: written(world, "q") == world.devices("q"))
        assert was.gpu in world.gpus("a")
        assert metric(world, 'tangram_devices_followed{state="total"}') == 1


async def test_truths_that_overlap_are_kept_shown_and_counted(world, hands):
    await bound(world, "p", "q")
    both = of(world, "q")
    hands.hand(handed("p", both), handed("q", both))
    assert world.devices("p") == world.devices("q") == (both.gpu,)
    assert metric(world, 'tangram_devices_differ{state="overlapping"}') == 1
    (words,) = world.service.views.node("a")["handing"]["overlaps"]
    assert "default/p" in words
    assert "default/q" in words
    world.add_pod("r", {GPU: "8"})
    assert world.filter("r").fitting == []


async def test_a_part_of_the_truth_moves_only_that_part(world, hands):
    await bound(world, "p", limits={GPU: "3"})
    mine = world.devices("p")
    other = free(world, "p")[0]
    hands.hand(handed("p", DeviceAt(gpu=mine[0]), other))
    assert len(world.devices("p")) == 3
    assert {mine[0], other.gpu} < set(world.devices("p"))


async def test_devices_that_the_kubelet_counts_differently_are_shown_and_counted(world, hands):
    await bound(world, "p")
    counted = free(world, "p")[0].gpu
    hands.hand(handed("p", of(world, "p"), how="overridden", ids=(counted,)))
    assert world.devices("p") == (of(world, "p").gpu,)
    assert metric(world, 'tangram_devices_differ{state="kubelet"}') == 1
    (shown,) = world.service.views.node("a")["handing"]["differ"]
    assert shown["pod"]["name"] == "p"
    assert shown["kubelet"] == [counted]


async def test_what_cannot_be_changes_nothing_and_is_said(caplog):
    world = World({"a": KIND, "b": KIND}, lease_seconds=1000)
    async with world.running():
        hands = plugin_on(world)
        await bound(world, "p")
        mine = world.devices("p")
        world.add_pod("other", {GPU: "1"})
        assert await world.bind("other", "b") == ""
        theirs = world.devices("other")
        with caplog.at_level(logging.WARNING):
            hands.hand(
                handed("p", DeviceAt(gpu="GPU-that-is-nowhere")),
                handed("p", DeviceAt(gpu=world.gpus("b")[0])),
                handed("p", DeviceAt(gpu=mine[0], profile="1g.10gb", start=3)),
                handed("other", at(world, 7)),
                handed("q", at(world, 6), uid="uid-p"),
                handed("nobody", at(world, 5)),
            )
        assert world.devices("p") == mine
        assert world.devices("other") == theirs
        assert len([each for each in caplog.records if "cannot be" in each.message]) == 3
        assert "2 more such things" in caplog.text
        world.add_pod("r", {GPU: "7"})
        assert set(world.filter("r").fitting) == {"a", "b"}


async def test_an_exchange_stands_against_a_report_from_before_it(world, hands):
    """One container was handed its device, another asks for an exchange; the old report is looked at again."""
    await bound(world, "p", limits={GPU: "2"})
    first, second = world.devices("p")
    hands.hand(handed("p", DeviceAt(gpu=first), DeviceAt(gpu=second)))
    take = free(world, "p")[0]
    await granted(hands, "p", DeviceAt(gpu=second), take)
    world.service.offers.touch("a")
    world.service._order()
    assert set(world.devices("p")) == {first, take.gpu}


async def test_after_a_restart_between_two_annotations_of_one_swap_both_pods_have_something(world, hands):
    await bound(world, "p", "q")
    give, take = of(world, "p"), of(world, "q")
    others = {"p": world.kube.annotations("q")[PLACEMENT_ANNOTATION].replace("uid-q", "uid-p")}
    world.kube.change_pod("p", lambda pod: pod["metadata"]["annotations"].update({PLACEMENT_ANNOTATION: others["p"]}))
    async with World({"a": KIND}, on=world.kube, lease_seconds=1000).running() as after:
        assert after.devices("p") == after.devices("q") == (take.gpu,)
        plugin_on(after, handed=(handed("p", take),), boot="later")
        assert after.devices("p") == (take.gpu,)
        assert after.devices("q") != (take.gpu,)
        await after.until(lambda: written(after, "q") == after.devices("q"))
        assert give.gpu != take.gpu


# -- counting -----------------------------------------------------------------------------------------


async def test_agents_counters_go_on_through_their_restarts(world, hands):
    hands.tell(boot="one", handing={"placed": 5, "only-one": 5})
    hands.tell(handing={"placed": 7, "only-one": 6, "ids": 1})
    hands.tell(boot="two", handing={"placed": 2, "only-one": 2})
    hands.tell(handing={"placed": 2, "only-one": 2, "x" * 400: 9, "refused": 10**400})
    assert metric(world, 'tangram_handed_total{how="placed"}') == 5 + 2 + 2
    assert metric(world, 'tangram_matching_total{rule="only-one"}') == 5 + 1 + 2
    assert metric(world, 'tangram_matching_total{rule="ids"}') == 1
    assert metric(world, 'tangram_matching_total{rule="other"}') == 9
    assert metric(world, 'tangram_handed_total{how="refused"}') == 1_000_000
