"""Bind, with the API server failing in every way: at each point of it, and whoever comes after."""

import asyncio
import copy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from app.errors import Conflict, Refused, Unknown
from app.journal import HOLDER, SUFFIX, Intent, line_of
from app.kube import Kube
from app.ledger import Phase
from app.translate import FENCE_ANNOTATION, PLACEMENT_ANNOTATION, PodRef, Written, read_placement, write_placement
from solver import Device
from tests.app.line import TURNS_UNDER_WAY, Fate, Line, Post
from tests.app.world import GPU, World
from tests.fakes import FakeKube

MIG = "nvidia.com/mig-3g.40gb"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"h1": "8xH100", "h2": "8xH100", "m1": "8xA100-mig"}).running() as running:
        yield running


def phase(world: World, name: str) -> Phase | None:
    hold = world.service.ledger.get(f"uid-{name}")
    return hold.phase if hold else None


def taken_by_another(world: World, *declared: Intent) -> None:
    """Another process has written its name into the journal, and binds of its own."""
    settings = world.settings
    key = f"{settings.namespace}/{settings.lease_name}{SUFFIX}"
    journal = copy.deepcopy(world.kube.objects["configmaps"][key])
    journal["metadata"]["annotations"][HOLDER] = "another"
    journal["data"]["binds"] = "\n".join(line_of(each) for each in declared)
    world.kube._put("configmaps", key, journal, "MODIFIED")


# -- bind ---------------------------------------------------------------------------------------------


async def test_the_placement_comes_with_the_binding_which_the_journal_has_named_before(world):
    world.add_pod("p", {GPU: "2"})
    named = []
    world.kube.before["bind"] = lambda: named.append(world.journal())
    node = await world.schedule("p")

    assert "annotate_pod" not in world.kube.calls
    written = read_placement(world.kube.annotations("p")[PLACEMENT_ANNOTATION])
    assert isinstance(written, Written)
    assert (written.uid, written.node, len(written.devices)) == ("uid-p", node, 2)
    assert world.kube.pod("p")["spec"]["nodeName"] == node
    assert named == [{"uid-p": (node, [str(device) for device in written.devices])}]
    assert phase(world, "p") is Phase.HELD


async def test_what_was_bound_leaves_the_journal(world):
    world.add_pod("p", {GPU: "1"})
    world.add_pod("q", {GPU: "1"})
    await world.schedule("p")
    await world.schedule("q")

    assert "uid-p" not in world.journal()
    world.clock.advance(6)
    await world.until(lambda: not world.journal())


async def test_bind_decides_again_on_the_node_that_it_is_given(world):
    world.add_pod("p", {GPU: "1"})
    world.prioritize("p", ["h1", "h2"])
    other = next(name for name in ("h1", "h2") if name != world.service.ledger.get("uid-p").node)

    assert await world.bind("p", other) == ""
    assert world.service.ledger.get("uid-p").node == other


async def test_a_full_node_refuses_the_bind_in_words_and_nothing_is_lost(world):
    world.add_pod("p", {GPU: "8"})
    world.add_pod("q", {GPU: "8"})
    assert await world.bind("p", "h1") == ""

    assert "h1" in await world.bind("q", "h1")
    assert phase(world, "q") is None
    assert PLACEMENT_ANNOTATION not in world.kube.annotations("q")
    assert await world.bind("q", "h2") == ""


async def test_case_15_a_bind_needs_a_pod_that_exists_with_that_uid(world):
    """HAMi #3030: anyone could call /bind. (That callers must show a certificate is tested in e2e.)"""
    world.add_pod("p", {GPU: "1"})

    assert "UID" in await world.bind("p", "h1", uid="uid-forged")
    assert "not found" in await world.bind("nobody", "h1")
    assert len(world.service.ledger) == 0


async def test_a_repeated_bind_joins_the_one_in_flight(world):
    world.add_pod("p", {GPU: "1"})
    world.kube.hold["bind"] = asyncio.Event()
    first = asyncio.create_task(world.bind("p", "h1"))
    await world.until(lambda: "bind" in world.kube.calls)
    second = asyncio.create_task(world.bind("p", "h1"))
    elsewhere = await world.bind("p", "h2")
    world.kube.hold.pop("bind").set()

    assert (await first, await second) == ("", "")
    assert "being bound to h1" in elsewhere
    assert world.kube.calls.count("bind") == 1


async def test_case_06_many_pods_of_one_node_are_in_flight_at_once(world):
    """HAMi #1130, #1655: an annotation lock let one pod per node through, and could be left behind."""
    for number in range(8):
        world.add_pod(f"p{number}", {GPU: "1"})
    world.kube.hold["bind"] = asyncio.Event()
    binds = [asyncio.create_task(world.bind(f"p{number}", "h1")) for number in range(8)]
    await world.until(lambda: world.kube.calls.count("bind") == 8)
    world.kube.hold.pop("bind").set()

    assert await asyncio.gather(*binds) == [""] * 8
    assert len({device for number in range(8) for device in world.devices(f"p{number}")}) == 8


async def test_case_01_concurrent_filters_and_binds_never_give_one_card_twice(world):
    """HAMi #1330, #1896: two concurrent filters gave one GPU twice."""
    for number in range(30):
        world.add_pod(f"p{number}", {GPU: str(1 + number % 3)})
    for number in range(30):
        world.filter(f"p{number}")
        world.prioritize(f"p{number}", ["h1", "h2"])
    errors = await asyncio.gather(*(world.bind(f"p{number}", f"h{1 + number % 2}") for number in range(30)))

    bound = [number for number, error in enumerate(errors) if not error]
    given = [device for number in bound for device in world.devices(f"p{number}")]
    assert len(given) == len(set(given)) == 16


async def test_a_bind_that_cannot_be_declared_is_refused_in_words_and_nothing_is_sent(world):
    """Somebody else has taken the journal: they may have given the devices to others."""
    world.add_pod("p", {GPU: "1"})
    taken_by_another(world)

    assert "could not be declared" in await world.bind("p", "h1")
    assert phase(world, "p") is None
    assert "bind" not in world.kube.calls
    await world.until(lambda: not world.service.waiting_for())
    assert await world.bind("p", "h1") == ""


async def test_a_refused_binding_frees_the_devices_and_writes_nothing(world):
    world.add_pod("p", {GPU: "1"})

    def refuse() -> None:
        raise Refused("422 no such node")

    world.kube.before["bind"] = refuse
    assert "no such node" in await world.bind("p", "h1")

    assert phase(world, "p") is None
    assert PLACEMENT_ANNOTATION not in world.kube.annotations("p")
    assert "annotate_pod" not in world.kube.calls


async def test_a_pod_that_changed_since_it_was_watched_is_bound_in_its_new_version(world):
    """kube-scheduler writes conditions, users label: none of it is a reason to give up."""
    world.add_pod("p", {GPU: "1"})
    changes = iter(range(3))

    def touched() -> None:
        if (change := next(changes, None)) is not None:
            world.kube.change_pod("p", lambda pod: pod["metadata"].update(labels={"touch": str(change)}))

    world.kube.before["bind"] = touched
    assert await world.bind("p", "h1") == ""
    assert world.kube.calls.count("bind") == 4


async def test_a_conflict_for_another_reason_than_the_version_is_a_refusal(world):
    world.add_pod("p", {GPU: "1"})

    def conflict() -> None:
        raise Conflict("409 for a reason of its own")

    world.kube.before["bind"] = conflict
    assert "a reason of its own" in await world.bind("p", "h1")
    assert world.kube.calls.count("bind") == 1
    assert phase(world, "p") is None


async def test_a_pod_that_somebody_has_fenced_meanwhile_is_not_bound(world):
    """Whoever fences has given its devices up on our behalf."""
    world.add_pod("p", {GPU: "1"})
    fence = {"annotations": {FENCE_ANNOTATION: "theirs"}}
    world.kube.before["bind"] = lambda: world.kube.change_pod("p", lambda pod: pod["metadata"].update(fence))

    assert "fenced" in await world.bind("p", "h1")
    assert not world.kube.pod("p")["spec"].get("nodeName")


@pytest.mark.parametrize("spoiled", ["deletionTimestamp", "schedulingGates"])
async def test_a_pod_that_cannot_be_bound_any_more_is_not_tried_again(world, spoiled):
    world.add_pod("p", {GPU: "1"})

    def spoil() -> None:
        world.kube.before.pop("bind")
        part = "spec" if spoiled == "schedulingGates" else "metadata"
        world.kube.change_pod("p", lambda pod: pod[part].update({spoiled: ["x"]}))

    world.kube.before["bind"] = spoil
    assert await world.bind("p", "h1") != ""
    assert world.kube.calls.count("bind") == 1
    assert phase(world, "p") is None


async def test_case_04_a_node_that_refused_a_bind_is_read_again_before_it_is_offered(world):
    """KAI #848: a full node was chosen again and again for hours."""
    world.add_pod("p", {GPU: "1"})
    world.add_pod("stranger", {GPU: "8"})
    world.kube.hold["get_node"] = asyncio.Event()

    def refuse() -> None:
        world.kube.before.pop("bind")
        raise Refused("422 refused for a reason of its own")

    world.kube.before["bind"] = refuse
    await world.bind("p", "h1")
    kept_back = world.filter("p")
    assert kept_back.fitting == ["h2"]
    assert "refused" in kept_back.unresolvable["h1"]

    world.kube.change_pod("stranger", lambda pod: pod["spec"].update(nodeName="h1"))
    world.kube.hold.pop("get_node").set()
    await world.until(lambda: not world.service.offers.fault("h1") and phase(world, "stranger"))
    assert "may be in use by default/stranger" in str(world.filter("p").unresolvable["h1"])


async def test_an_unknown_outcome_keeps_the_devices_until_a_read_tells_that_it_was_bound(world):
    world.add_pod("p", {GPU: "1"})

    def lose_the_answer() -> None:
        world.kube.after.pop("bind")
        raise Unknown("connection reset")

    world.kube.after["bind"] = lose_the_answer
    world.kube.hold["get_pod"] = asyncio.Event()
    assert "not known" in await world.bind("p", "h1")
    assert phase(world, "p") in (Phase.ASSUMED, Phase.HELD)

    world.kube.hold.pop("get_pod").set()
    await world.until(lambda: phase(world, "p") is Phase.HELD)


async def test_an_unknown_outcome_that_was_not_made_frees_by_fencing_the_pod_first(world):
    world.add_pod("p", {GPU: "1"})

    def never_arrive() -> None:
        world.kube.before.pop("bind")
        raise Unknown("timeout")

    world.kube.before["bind"] = never_arrive
    await world.bind("p", "h1")
    assert phase(world, "p") is Phase.ASSUMED

    await world.until(lambda: phase(world, "p") is None)
    assert FENCE_ANNOTATION in world.kube.annotations("p")
    assert await world.bind("p", "h1") == ""


async def test_a_binding_that_arrives_late_conflicts_once_its_pod_is_fenced(world):
    """The Binding carries the resourceVersion that the pod had before."""
    world.add_pod("p", {GPU: "1"})
    seen = []
    original = world.kube.bind

    async def late(*args: object, **more: object) -> None:
        seen.append((args, more))
        raise Unknown("timeout; the request is still on its way")

    world.kube.bind = late
    await world.bind("p", "h1")
    await world.until(lambda: phase(world, "p") is None)

    ((args, more),) = seen
    with pytest.raises(Conflict):
        await original(*args, **more)


async def test_a_second_bind_fences_the_first_before_it_declares_anything(world):
    """Of two Bindings with different devices the wrong one could arrive last."""
    world.add_pod("p", {GPU: "1"})
    late: list[Any] = []
    original = world.kube.bind

    async def still_under_way(*args: Any, **more: Any) -> None:
        late.append((args, more))
        raise Unknown("timeout")

    world.kube.bind = still_under_way
    world.kube.hold["get_pod"] = asyncio.Event()
    await world.bind("p", "h1")
    world.kube.bind = original
    world.kube.hold.pop("get_pod").set()
    assert await world.bind("p", "h1") == ""

    assert FENCE_ANNOTATION in world.kube.annotations("p")
    ((args, more),) = late
    with pytest.raises(Conflict):
        await original(*args, **more)


async def test_a_conflict_because_our_earlier_binding_was_made_is_a_success(world):
    world.add_pod("p", {GPU: "1"})

    def made_already() -> None:
        world.kube.before.pop("bind")
        world.kube.change_pod("p", lambda pod: pod["spec"].update(nodeName="h1"))

    world.kube.before["bind"] = made_already
    assert await world.bind("p", "h1") == ""
    assert phase(world, "p") is Phase.HELD


async def test_after_the_deadline_no_binding_is_sent(world):
    world.add_pod("p", {GPU: "1"})
    world.kube.after["replace_config_map"] = lambda: world.clock.advance(13)

    assert "no time" in await world.bind("p", "h1")
    assert "bind" not in world.kube.calls


async def test_without_the_lease_no_binding_is_sent(world):
    world.add_pod("p", {GPU: "1"})
    world.kube.after["replace_config_map"] = lambda: setattr(world.service.lease, "_renewed", None)

    assert await world.bind("p", "h1") != ""
    assert "bind" not in world.kube.calls


async def test_a_pod_deleted_while_it_is_bound_gives_its_devices_back(world):
    world.add_pod("p", {GPU: "1"})
    world.kube.before["bind"] = lambda: (
        world.kube.remove_pod("p") if "default/p" in world.kube.objects["pods"] else None
    )

    assert await world.bind("p", "h1") != ""
    await world.until(lambda: phase(world, "p") is None)


# -- a process that died in the middle of a bind ----------------------------------------------------------


async def died(at: str, fate: Fate) -> tuple[World, Post]:
    """A world whose service died at its first call of that verb, binding `p` to all of h1."""
    post, lines = Post(), []

    def through(kube: FakeKube) -> Kube:
        lines.append(Line(kube, post, at=1, of="none", fate=fate))
        return cast(Kube, lines[0])

    world = World({"h1": "8xH100"}, line=through)
    await world.service.start()
    await world.until(lambda: not world.service.waiting_for())
    world.report("h1")
    world.add_pod("p", {GPU: "8"})
    lines[0].of = at
    bind = asyncio.create_task(world.bind("p", "h1"))
    await lines[0].cut.wait()
    for _ in range(2 * TURNS_UNDER_WAY):
        await asyncio.sleep(0)
    await world.crash()
    bind.cancel()
    await asyncio.gather(bind, return_exceptions=True)
    return world, post


@asynccontextmanager
async def another(before: World, **knobs: Any) -> AsyncIterator[World]:
    """The process after it, with `q`, which wants all of h1, too."""
    world = World({"h1": "8xH100"}, on=before.kube, **knobs)
    world.add_pod("q", {GPU: "8"})
    async with world.running():
        yield world


async def test_dying_before_the_declaration_leaves_nothing():
    before, _ = await died("replace_config_map", "lost")
    async with another(before) as world:
        assert phase(world, "p") is None
        assert await world.bind("q", "h1") == ""


@pytest.mark.parametrize(("at", "fate"), [("replace_config_map", "unanswered"), ("bind", "lost")])
async def test_what_was_declared_is_held_after_a_restart_until_the_pod_is_fenced(at, fate):
    before, _ = await died(at, fate)
    before.kube.hold["get_pod"] = asyncio.Event()
    async with another(before) as world:
        assert phase(world, "p") is Phase.ASSUMED
        assert set(world.devices("p")) == set(world.gpus("h1"))
        assert not world.filter("q").fitting

        world.kube.hold.pop("get_pod").set()
        await world.until(lambda: phase(world, "p") is None)
        assert FENCE_ANNOTATION in world.kube.annotations("p")
        assert await world.bind("q", "h1") == ""


async def test_a_binding_of_a_dead_process_that_arrives_after_the_fence_conflicts():
    before, post = await died("bind", "late")
    async with another(before) as world:
        await world.until(lambda: phase(world, "p") is None)
        assert await world.bind("q", "h1") == ""
        await post.deliver(all_of_it=True)
        assert post.arrived == 0
        assert not world.kube.pod("p")["spec"].get("nodeName")


async def test_a_binding_of_a_dead_process_that_arrives_before_the_fence_stands():
    before, post = await died("bind", "late")
    before.kube.hold["get_pod"] = asyncio.Event()
    async with another(before) as world:
        assert phase(world, "p") is Phase.ASSUMED
        await post.deliver(all_of_it=True)
        world.kube.hold.pop("get_pod").set()
        await world.until(lambda: phase(world, "p") is Phase.HELD)
        assert set(world.devices("p")) == set(world.gpus("h1"))
        assert not world.filter("q").fitting


async def test_a_declaration_of_a_dead_process_that_arrives_late_conflicts():
    """Nothing was sent for it: nobody need know of it."""
    before, post = await died("replace_config_map", "late")
    async with another(before) as world:
        await post.deliver(all_of_it=True)
        assert post.arrived == 0
        assert await world.bind("q", "h1") == ""


async def test_what_was_bound_without_our_reading_the_answer_is_held_after_a_restart():
    before, _ = await died("bind", "unanswered")
    async with another(before) as world:
        assert phase(world, "p") is Phase.HELD
        assert set(world.devices("p")) == set(world.gpus("h1"))


async def test_a_pod_that_is_bound_again_before_it_is_settled_is_fenced_first():
    before, post = await died("bind", "late")
    before.kube.hold["get_pod"] = asyncio.Event()
    async with another(before) as world:
        binding = asyncio.create_task(world.bind("p", "h1"))
        await world.until(lambda: world.service.binder.is_binding("uid-p"))
        world.kube.hold.pop("get_pod").set()
        assert await binding == ""
        assert FENCE_ANNOTATION in world.kube.annotations("p")
        await post.deliver(all_of_it=True)
        assert post.arrived == 0


@pytest.mark.parametrize("spoil", ["edited", "deleted"])
async def test_without_a_readable_journal_every_pod_that_waits_is_fenced_before_anything_is_decided(spoil):
    before, post = await died("bind", "late")
    key = f"{before.settings.namespace}/{before.settings.lease_name}{SUFFIX}"
    if spoil == "edited":
        journal = copy.deepcopy(before.kube.objects["configmaps"][key])
        journal["data"]["binds"] = "nonsense"
        before.kube._put("configmaps", key, journal, "MODIFIED")
    else:
        before.kube._remove("configmaps", key)
    before.kube.hold["annotate_pod"] = asyncio.Event()
    world = World({"h1": "8xH100"}, on=before.kube)
    world.add_pod("q", {GPU: "8"})
    await world.service.start()
    await world.until(lambda: world.service.binder.unfenced)
    (waits,) = world.service.waiting_for()
    assert "2 pods to be fenced" in waits

    world.kube.hold.pop("annotate_pod").set()
    await world.until(lambda: not world.service.waiting_for())
    await post.deliver(all_of_it=True)
    assert post.arrived == 0
    world.report("h1")
    assert await world.bind("q", "h1") == ""
    await world.service.stop()


async def test_a_journal_that_may_not_be_written_is_said_in_words():
    """As after an upgrade without the new rights."""
    world = World({"h1": "8xH100"})

    def forbidden() -> None:
        raise Refused("403 configmaps is forbidden")

    world.kube.before["create_config_map"] = forbidden
    await world.service.start()
    await world.until(lambda: "forbidden" in str(world.service.waiting_for()))
    world.kube.before.clear()
    await world.until(lambda: not world.service.waiting_for())
    await world.service.stop()


async def test_a_process_that_ends_in_order_leaves_an_empty_journal():
    world = World({"h1": "8xH100"})
    async with world.running():
        world.add_pod("p", {GPU: "1"})
        assert await world.bind("p", "h1") == ""
    assert world.journal() == {}


async def test_a_bind_that_outlives_its_term_does_not_give_up_what_another_holder_has_declared(world):
    """Theirs may still arrive: only the fence frees it."""
    world.add_pod("p", {GPU: "1"})
    world.add_pod("q", {GPU: "1"})
    world.kube.hold["bind"] = asyncio.Event()
    bind = asyncio.create_task(world.bind("p", "h1"))
    await world.until(lambda: "bind" in world.kube.calls)
    theirs = Device(world.gpus("h2")[5])
    taken_by_another(world, Intent(PodRef("uid-p", "default", "p"), "h2", (theirs,)))
    assert "could not be declared" in await world.bind("q", "h1")
    await world.until(lambda: not world.service.waiting_for())

    world.kube.hold["annotate_pod"] = asyncio.Event()
    fence = {"annotations": {FENCE_ANNOTATION: "theirs"}}
    world.kube.change_pod("p", lambda pod: pod["metadata"].update(fence))
    world.kube.hold.pop("bind").set()
    assert await bind != ""
    assert (phase(world, "p"), world.devices("p")) == (Phase.ASSUMED, (str(theirs),))

    world.kube.hold.pop("annotate_pod").set()
    await world.until(lambda: phase(world, "p") is None)


# -- restart ------------------------------------------------------------------------------------------


async def test_case_05_an_unbound_pod_with_our_annotation_is_assumed_after_a_restart():
    """Koordinator #1289, HAMi #2911: the same GPU was handed out again after a restart."""
    world = World({"h1": "8xH100"})
    device = Device(world.gpus("h1")[0])
    text = write_placement("uid-p", "h1", [device])
    world.add_pod("p", {GPU: "1"}, metadata={"annotations": {PLACEMENT_ANNOTATION: text}})
    world.add_pod("q", {GPU: "8"})
    async with world.running():
        assert phase(world, "p") is Phase.ASSUMED
        assert not world.filter("q").fitting
        assert world.filter("p").fitting == ["h1"]

        assert await world.bind("p", "h1") == ""
        assert world.devices("p") == (device.gpu,)


async def test_an_orphan_is_freed_only_by_removing_its_annotation():
    world = World({"h1": "8xH100"})
    text = write_placement("uid-p", "h1", [Device(world.gpus("h1")[0])])
    world.add_pod("p", {GPU: "1"}, metadata={"annotations": {PLACEMENT_ANNOTATION: text}})
    async with world.running():

        def refuse() -> None:
            raise Unknown("the API server is away")

        world.kube.before["annotate_pod"] = refuse
        world.clock.advance(world.settings.orphan_seconds + 1)
        await asyncio.sleep(1.0)
        assert phase(world, "p") is Phase.ASSUMED

        world.kube.before.pop("annotate_pod")
        await world.until(lambda: phase(world, "p") is None)
        assert PLACEMENT_ANNOTATION not in world.kube.annotations("p")


async def test_case_16_a_placement_that_the_ledger_cannot_explain_is_reported_not_trusted(world):
    """HAMi #3041, #3042: users forged allocation annotations."""
    gpu = world.gpus("h1")[0]
    forged = {"annotations": {PLACEMENT_ANNOTATION: write_placement("uid-p", "h1", [Device(gpu)])}}
    world.add_pod("p", {GPU: "1"}, metadata=forged)
    await world.until(lambda: PLACEMENT_ANNOTATION not in world.kube.annotations("p"))
    await world.until(lambda: phase(world, "p") is None)

    bound = {"annotations": {PLACEMENT_ANNOTATION: write_placement("uid-q", "h1", [Device(gpu)])}}
    world.add_pod("q", {GPU: "1"}, metadata=bound, spec={"nodeName": "h1"})
    await world.until(lambda: phase(world, "q"))
    assert world.devices("q") == ()
    assert any("default/q" in warning for warning in world.service.warnings())
    world.add_pod("r", {GPU: "1"})
    assert world.filter("r").fitting == ["h2"]


async def test_case_03_a_device_no_longer_in_the_inventory_stays_held_and_is_shown(world):
    """HAMi #2592: the allocation was dropped, so the capacity looked free."""
    world.add_pod("p", {GPU: "1"})
    await world.bind("p", "h1")
    (gone,) = world.devices("p")
    entry = world.service.inventory.get("h1")
    assert entry is not None
    report = entry.report
    kept = tuple(gpu for gpu in report.gpus if gpu.uuid != gone)
    links = tuple(link for link in report.links if gone not in (link.a, link.b))
    world.report("h1", gpus=kept, links=links, version=2)

    assert phase(world, "p") is Phase.HELD
    assert world.service.views.node("h1")["not_in_inventory"][0]["device"] == gone
    world.add_pod("q", {GPU: "8"})
    assert "h1" not in world.filter("q").fitting
