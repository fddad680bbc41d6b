"""Terms that begin and end at the worst moment: in the middle of fencing, of a bind, of an exchange."""

import asyncio
import copy
from collections.abc import AsyncIterator
from typing import Any

import pytest

from app.errors import Conflict, Unknown
from app.journal import HOLDER, SUFFIX, Intent, line_of
from app.ledger import Phase
from app.report import DeviceAt, Handed
from app.simulate import report_of
from app.translate import FENCE_ANNOTATION, PodRef
from solver import Device
from solver.samples import sample_node
from tests.app.hands import Hands
from tests.app.world import GPU, World


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"h1": "8xH100", "h2": "8xH100"}).running() as running:
        yield running


def phase(world: World, name: str) -> Phase | None:
    hold = world.service.ledger.get(f"uid-{name}")
    return hold.phase if hold else None


def take_journal(world: World, *declared: Intent, binds: str | None = None) -> None:
    """Another process has written its name into the journal, and binds of its own, or something else."""
    key = f"{world.settings.namespace}/{world.settings.lease_name}{SUFFIX}"
    journal = copy.deepcopy(world.kube.objects["configmaps"][key])
    journal["metadata"]["annotations"][HOLDER] = "another"
    journal["data"]["binds"] = "\n".join(line_of(each) for each in declared) if binds is None else binds
    world.kube._put("configmaps", key, journal, "MODIFIED")


async def until_retaken(world: World) -> None:
    """The journal is found to be another's, and is taken again."""
    journal = world.service.journal
    assert journal is not None
    takes = journal.takes
    with pytest.raises(Conflict):
        await journal.declare(Intent(PodRef("uid-x", "default", "x"), "h1", (Device("GPU-x"),)))
    await world.until(lambda: journal.takes > takes and journal.taken)


async def test_a_pod_that_was_to_be_fenced_in_an_earlier_term_and_is_gone_keeps_nobody_waiting(world):
    world.add_pod("p", {GPU: "1"})
    await world.until(lambda: "uid-p" in world.service.truth.pods)
    world.kube.hold["annotate_pod"] = asyncio.Event()
    take_journal(world, binds="nonsense")
    await until_retaken(world)
    await world.until(lambda: world.service.binder.unfenced)

    world.service.lease._renewed = None  # the term ends in the middle of it
    await world.until(lambda: not world.service.binder._settling)
    world.kube.remove_pod("p")
    world.kube.hold.pop("annotate_pod").set()
    await world.until(lambda: not world.service.waiting_for(), 5)


async def test_a_bind_that_began_in_the_term_before_declares_nothing_in_this_one(world):
    """Between taking the journal and adopting it nobody knows yet what another holder has declared for the pod."""
    world.add_pod("p", {GPU: "1"})
    await world.until(lambda: "uid-p" in world.service.truth.pods)
    del world.service.truth.pods["uid-p"]
    world.kube.hold["get_pod"] = asyncio.Event()
    bind = asyncio.create_task(world.bind("p", "h1"))
    await world.until(lambda: "get_pod" in world.kube.calls)

    world.kube.hold["list"] = asyncio.Event()
    theirs = Intent(PodRef("uid-p", "default", "p"), "h2", (Device(world.gpus("h2")[5]),))
    take_journal(world, theirs)
    await until_retaken(world)
    world.kube.hold["annotate_pod"] = asyncio.Event()
    made = world.service.orders.made

    async def made_late(*args: Any) -> Any:
        await world.until(lambda: not world.service.waiting_for())
        return await made(*args)

    world.service.orders.made = made_late
    world.kube.hold.pop("get_pod").set()
    for _ in range(20):
        await asyncio.sleep(0)
    world.kube.hold.pop("list").set()
    assert await bind != ""
    await world.until(lambda: not world.service.waiting_for())
    assert "bind" not in world.kube.calls
    assert (phase(world, "p"), world.devices("p")) == (Phase.ASSUMED, (str(theirs.devices[0]),))
    assert world.journal()["uid-p"][0] == "h2"
    world.kube.hold.pop("annotate_pod").set()
    await world.until(lambda: phase(world, "p") is None)


async def test_a_fence_of_the_term_before_does_not_free_what_was_declared_after_it(world):
    """It came before the journal was taken: a former holder may have read the pod since, and sent a Binding."""
    world.add_pod("p", {GPU: "1"})
    theirs = Intent(PodRef("uid-p", "default", "p"), "h2", (Device(world.gpus("h2")[5]),))
    answer = asyncio.Event()
    annotate, fenced = world.kube.annotate_pod, []

    async def answers_late(*args: Any, **more: Any) -> str:
        version: str = await annotate(*args, **more)
        fenced.append(version)
        await (asyncio.sleep(0) if len(fenced) > 1 else answer.wait())
        return version

    world.kube.annotate_pod = answers_late
    world.kube.hold["bind"] = asyncio.Event()
    bind = asyncio.create_task(world.bind("p", "h1"))
    await world.until(lambda: "bind" in world.kube.calls)
    world.kube.hold["get_config_map"] = asyncio.Event()
    world.service.lease.term += 1
    await world.until(lambda: world.service.journal and not world.service.journal.taken)

    fence = {"annotations": {FENCE_ANNOTATION: "theirs"}}
    world.kube.change_pod("p", lambda pod: pod["metadata"].update(fence))
    world.kube.hold.pop("bind").set()
    assert await bind != ""
    await world.until(lambda: fenced)  # by us, while the journal is still theirs
    take_journal(world, theirs)
    world.kube.hold["get_pod"] = asyncio.Event()
    world.kube.hold.pop("get_config_map").set()
    await world.until(lambda: not world.service.waiting_for())
    assert (phase(world, "p"), world.devices("p")) == (Phase.ASSUMED, (str(theirs.devices[0]),))
    answer.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert (phase(world, "p"), world.devices("p")) == (Phase.ASSUMED, (str(theirs.devices[0]),))
    world.kube.hold.pop("get_pod").set()
    await world.until(lambda: phase(world, "p") is None)


async def test_what_was_exchanged_during_a_bind_is_not_promised_twice_once_the_journal_is_taken_again():
    """The journal still names what the pod was promised first; others have that by now."""
    async with World({"a": "8xH100"}, lease_seconds=1000).running() as world:
        hands = Hands(world.service, report_of(sample_node("a", "8xH100")))
        hands.tell(hands="plugin")
        world.add_pod("p", {GPU: "1"})
        world.add_pod("q", {GPU: "1"})
        assert await world.bind("q", "a") == ""

        def never_arrives() -> None:
            world.kube.before.pop("bind")
            raise Unknown("timeout")

        world.kube.before["bind"] = never_arrives
        await world.until(lambda: world.service.truth.pods["uid-q"].node)
        world.kube.hold["get_pod"] = asyncio.Event()
        assert "not known" in await world.bind("p", "a")
        (had,), (wanted,) = world.devices("q"), world.devices("p")
        exchange = asyncio.create_task(hands.exchange("q", DeviceAt(gpu=had), DeviceAt(gpu=wanted)))
        await world.until(lambda: world.devices("q") == (wanted,) and world.devices("p") == (had,))
        hands.hand(
            Handed(
                namespace="default",
                name="q",
                uid="uid-q",
                container="main",
                resource=GPU,
                devices=(DeviceAt(gpu=wanted),),
                how="swapped",
            )
        )

        take_journal(world, Intent(PodRef("uid-p", "default", "p"), "a", (Device(wanted),)))
        await until_retaken(world)
        await world.until(lambda: not world.service.waiting_for())
        await world.until(lambda: phase(world, "p") is Phase.ASSUMED and world.devices("p") != (wanted,), 5)
        world.kube.hold.clear()
        exchange.cancel()


async def test_a_fault_while_the_journal_is_adopted_is_seen(monkeypatch):
    """Not ready for ever, with nothing but the journal's name to say why, would be worse than a restart."""
    world = World({"a": "8xH100"})

    def fault(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(world.service.binder, "adopt", fault)
    await world.service.start()
    await world.until(lambda: world.service.broken, 5)
    await world.service.stop()
