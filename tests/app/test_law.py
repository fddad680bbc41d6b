"""Orders of events in which a device was once given away twice, or room never came back. Each was found by a review.

The ledger's own law is in test_ledger.py; these go through the whole service.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import Conflict, NotFound, Refused, Unknown
from app.kube import Kube
from app.ledger import Phase
from app.offers import legal
from app.report import NodeReport
from app.simulate import report_of
from app.translate import PLACEMENT_ANNOTATION, PodRef, Written, pod_of, write_placement
from solver import Demand, Device, Placement
from solver.cluster import Allocation
from solver.demand import Terms
from solver.guests import Guest
from solver.samples import sample_node
from solver.steps import read
from tests.app.law import beside_the_wrong, beyond_the_law
from tests.app.line import FATES, TURNS_UNDER_WAY, Line, Post
from tests.app.world import GPU, World
from tests.fakes import FakeKube

EIGHT = {GPU: "8"}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"h1": "8xH100", "h2": "8xH100"}, lease_seconds=1000).running() as running:
        yield running


def phase(world: World, name: str) -> Phase | None:
    hold = world.service.ledger.get(f"uid-{name}")
    return hold.phase if hold else None


def failing(error: Exception, *, times: int = 1) -> Any:
    """A fault that happens so many times."""
    left = [times]

    def fail() -> None:
        if left[0] > 0:
            left[0] -= 1
            raise error

    return fail


# -- bound pods hold what their resources count, whatever their annotations say -------------------------


@pytest.mark.parametrize(
    "annotations",
    [
        {"tangram.gpu/colour": "x"},
        {PLACEMENT_ANNOTATION: '{"v":1,"uid":"u","node":"h1","devices":["GPU-x","GPU-x/1g.10gb@0"]}'},
        {PLACEMENT_ANNOTATION: "nonsense"},
    ],
)
async def test_a_bound_pod_holds_its_count_however_odd_its_annotations(annotations):
    world = World({"h1": "8xH100"})
    world.add_pod("p", EIGHT, metadata={"annotations": annotations}, spec={"nodeName": "h1"})
    world.add_pod("q", {GPU: "1"})
    async with world.running():
        assert phase(world, "p") is Phase.HELD
        assert not world.filter("q").fitting


async def test_a_placement_is_believed_after_a_restart_although_an_unknown_annotation_was_added():
    world = World({"h1": "8xH100"})
    gpus = world.gpus("h1")
    text = write_placement("uid-p", "h1", [Device(gpus[0])])
    notes = {"annotations": {PLACEMENT_ANNOTATION: text, "tangram.gpu/colour": "x"}}
    world.add_pod("p", {GPU: "1"}, metadata=notes, spec={"nodeName": "h1"})
    world.add_pod("q", {GPU: "7"})
    async with world.running():
        assert world.devices("p") == (gpus[0],)
        assert world.filter("q").fitting == ["h1"]


async def test_a_held_pod_whose_annotation_is_spoilt_stays_held_through_a_relist(world):
    world.add_pod("p", EIGHT)
    await world.bind("p", "h1")
    odd = '{"v":1,"uid":"uid-p","node":"h1","devices":["GPU-x","GPU-x/1g.10gb@0"]}'
    world.kube.change_pod("p", lambda pod: pod["metadata"]["annotations"].update({PLACEMENT_ANNOTATION: odd}))
    listed = await world.kube.list("pods")
    world.clock.advance(60)
    world.service.truth.pods_listed(listed.items, asked_at=world.clock())
    world.report("h1", version=2)
    assert phase(world, "p") is Phase.HELD


async def test_a_pod_whose_count_cannot_be_read_keeps_its_whole_node_back():
    world = World({"m1": "8xA100-mig2"})
    world.add_pod("p", {GPU: "many"}, spec={"nodeName": "m1"})
    world.add_pod("q", {GPU: "1"})
    world.add_pod("r", {"nvidia.com/mig-1g.10gb": "1"})
    async with world.running():
        assert not world.filter("q").fitting
        assert not world.filter("r").fitting


# -- binds whose outcome is not what it seems ----------------------------------------------------------


async def test_a_second_bind_that_cannot_fence_the_pod_keeps_what_a_first_binding_may_still_take(world):
    world.add_pod("p", EIGHT)
    late: list[Any] = []
    original = world.kube.bind

    async def still_under_way(*args: Any, **more: Any) -> None:
        late.append((args, more))
        raise Unknown("timeout")

    world.kube.bind = still_under_way
    world.kube.before["get_pod"] = failing(Unknown("away"), times=1000)
    await world.bind("p", "h1")
    world.kube.before["annotate_pod"] = failing(Refused("403"), times=1000)
    assert await world.bind("p", "h1") != ""

    assert phase(world, "p") is Phase.ASSUMED
    world.add_pod("q", EIGHT)
    assert world.filter("q").fitting == ["h2"]

    world.kube.before.clear()
    ((args, more),) = late
    await original(*args, **more)
    await world.until(lambda: phase(world, "p") is Phase.HELD)


async def test_a_pod_that_was_bound_while_its_bind_was_refused_keeps_its_devices(world):
    """By somebody else: no other Binding of ours can have been under way."""
    world.add_pod("p", EIGHT)

    def bound_by_others() -> None:
        world.kube.before.pop("bind")
        world.kube.change_pod("p", lambda pod: pod["spec"].update(nodeName="h1"))
        raise Refused("422 denied by admission")

    world.kube.before["bind"] = bound_by_others
    assert await world.bind("p", "h1") != ""
    await world.until(lambda: phase(world, "p") is Phase.HELD)


async def test_bind_again_after_success_is_a_success_before_the_watch_has_seen_it(world):
    world.add_pod("p", {GPU: "1"})
    await world.bind("p", "h1")
    unseen = world.service.truth.pods["uid-p"]
    world.service.truth.pods["uid-p"] = unseen.__class__(ref=unseen.ref, ask=unseen.ask, need=unseen.need)
    assert await world.bind("p", "h1") == ""


async def test_bind_ends_in_time_even_when_the_undo_hangs(world):
    """12 s in all; kube-scheduler gives up after 15. The clock here is the event loop's, so it is made short."""
    world = World({"h1": "8xH100"}, bind_deadline_seconds=0.3, lease_seconds=1000)
    async with world.running():
        world.add_pod("p", {GPU: "1"})
        world.kube.before["bind"] = failing(Conflict("409"), times=9)
        world.kube.hold["get_pod"] = asyncio.Event()
        async with asyncio.timeout(5):
            assert await world.bind("p", "h1") != ""
        assert phase(world, "p") is Phase.ASSUMED


# -- the Lease ------------------------------------------------------------------------------------------


async def test_when_the_lease_comes_back_nothing_is_decided_before_all_is_listed_anew(world):
    lease = world.service.lease
    assert lease is not None
    lease._renewed = None
    assert world.service.waiting_for()
    await lease._turn()
    assert lease.held()
    assert world.service.waiting_for(), "what we know is from before"
    await world.until(lambda: not world.service.waiting_for())


async def test_a_bind_begun_in_one_term_is_not_ended_in_the_next(world):
    world.add_pod("p", EIGHT)
    lease = world.service.lease
    assert lease is not None

    def another_term() -> None:
        world.kube.after.pop("replace_config_map")
        lease.term += 1
        world.service._rebuilt_in_term = lease.term

    world.kube.after["replace_config_map"] = another_term
    assert await world.bind("p", "h1") != ""
    assert "bind" not in world.kube.calls


# -- when a device is free -------------------------------------------------------------------------------


async def test_failed_by_pod_garbage_collection_is_not_ended():
    """It fails pods of nodes that it believes lost; nobody has asked their kubelet."""
    world = World({"h1": "8xH100"}, lease_seconds=1000)
    async with world.running():
        world.add_pod("p", EIGHT)
        await world.bind("p", "h1")
        await world.until(lambda: world.service.truth.pods["uid-p"].node)
        lost = {"phase": "Failed", "conditions": [{"type": "DisruptionTarget", "reason": "DeletionByPodGC"}]}
        world.kube.change_pod("p", lambda pod: pod.update(status=lost))
        world.kube.remove_pod("p")
        await world.until(lambda: phase(world, "p") is Phase.LEAVING)


async def test_failed_with_a_container_that_still_runs_is_not_ended(world):
    world.add_pod("p", EIGHT)
    await world.bind("p", "h1")
    running = {"phase": "Failed", "containerStatuses": [{"state": {"running": {"startedAt": "x"}}}]}
    world.kube.change_pod("p", lambda pod: pod.update(status=running))
    await world.until(lambda: world.service.truth.pods["uid-p"].resource_version == str(world.kube.version))
    assert phase(world, "p") is Phase.HELD


async def test_a_report_that_saw_nothing_proves_nothing(world):
    world.add_pod("p", EIGHT, spec={"terminationGracePeriodSeconds": 0})
    await world.bind("p", "h1")
    await world.until(lambda: world.service.truth.pods["uid-p"].node)
    world.kube.remove_pod("p")
    await world.until(lambda: phase(world, "p") is Phase.LEAVING)
    world.clock.advance(1)

    world.report("h1", version=2, error="stale since 12:00", gpus=(), links=())
    assert phase(world, "p") is Phase.LEAVING
    world.report("h1", version=3)
    assert phase(world, "p") is None


async def test_after_a_start_an_agent_that_sees_no_pods_is_waited_for():
    world = World({"h1": "8xH100", "h2": "8xH100"}, blind_seconds=30, lease_seconds=1000)
    world.add_pod("p", EIGHT)
    async with world.running():
        world.report("h2", sees_pods=True, version=2)
        result = world.filter("p")
        assert result.fitting == ["h2"]
        assert "does not see" in result.unresolvable["h1"]
        world.clock.advance(31)
        world.report("h1", version=3)
        world.report("h2", version=3)
        await world.until(lambda: set(world.filter("p").fitting) == {"h1", "h2"})


# -- inventory ---------------------------------------------------------------------------------------------


def renamed(report: NodeReport, name: str) -> NodeReport:
    return report.model_copy(update={"node": name})


async def test_a_gpu_held_under_another_node_name_is_not_given_again(world):
    world.add_pod("p", EIGHT)
    await world.bind("p", "h1")
    world.kube.add_node("new")
    world.service.report(renamed(report_of(sample_node("h1", "8xH100")), "new"))
    world.add_pod("q", {GPU: "1"})

    refused = world.filter("q", ["new"])
    assert not refused.fitting
    assert "under the node name h1" in str(refused)


async def test_a_gpu_that_two_nodes_report_is_kept_back_until_one_is_gone(world):
    world.service.report(renamed(report_of(sample_node("h1", "8xH100")), "new"))
    world.add_pod("q", {GPU: "1"})
    assert world.filter("q", ["h1", "new"]).fitting == []
    world.kube.add_node("new")
    world.kube.remove_node("h1")
    await world.until(lambda: "h1" not in world.service.truth.nodes)
    world.clock.advance(200)
    world.service.report(renamed(report_of(sample_node("h1", "8xH100")), "new").model_copy(update={"version": 2}))
    await world.until(lambda: world.service.inventory.get("h1") is None)
    assert world.filter("q", ["h1", "new"]).fitting == ["new"]


async def test_an_older_report_does_not_replace_a_newer_one(world):
    newest = report_of(sample_node("h1", "8xH100")).model_copy(update={"boot": "b", "version": 7})
    assert world.service.report(newest)
    assert not world.service.report(newest.model_copy(update={"version": 6, "gpus": (), "links": ()}))
    entry = world.service.inventory.get("h1")
    assert entry is not None
    assert len(entry.node.gpus) == 8


# -- shares, and who stands beside whom ----------------------------------------------------------------------

SHARE, MILLI = "tangram.gpu/share", "tangram.gpu/share-milli"
ASKS: tuple[dict[str, str], ...] = (
    {GPU: "1"},
    {GPU: "2"},
    {MILLI: "300"},
    {MILLI: "500"},
    {MILLI: "700"},
    {SHARE: "8"},
    {SHARE: "20"},
    {"nvidia.com/mig-1g.10gb": "1"},
    {"nvidia.com/mig-3g.40gb": "1"},
)
NOTES: tuple[dict[str, str], ...] = (
    {},
    {},
    {"tangram.gpu/tenant": "red"},
    {"tangram.gpu/tenant": "blue", "tangram.gpu/isolation": "gpu"},
    {"tangram.gpu/tenant": "green", "tangram.gpu/isolation": "node"},
)


def on_the_api_server(world: World) -> dict[str, list[Allocation]]:
    """What pods that may run have been given, as their annotations say it."""
    given: dict[str, list[Allocation]] = {}
    for item in world.kube.objects["pods"].values():
        pod = pod_of(item)
        if pod.node and not pod.finished and isinstance(pod.written, Written):
            given.setdefault(pod.node, []).append(Allocation(pod.written.devices, guest=pod.need.terms.guest))
    return given


@pytest.mark.parametrize("seed", range(6))
async def test_case_01_shares_and_isolation_keep_the_law_through_restarts(seed):
    """Random pods on random nodes, several binds at once, ends and restarts; the API server's word is checked."""
    chance = random.Random(seed)
    kinds = {"l1": "4xL4", "v1": "8xV100", "m1": "8xA100-mig2"}
    nodes = {name: sample_node(name, kind) for name, kind in kinds.items()}
    kube, number, bound = None, 0, 0
    for _ in range(3):
        world = World(kinds, on=kube, lease_seconds=1000)
        kube = world.kube
        if world.kube.objects["leases"]:
            world.kube.objects["leases"].clear()
        async with world.running():
            for _ in range(12):
                names = [f"p{number + each}" for each in range(4)]
                number += 4
                for name in names:
                    notes = {"annotations": chance.choice(NOTES)}
                    world.add_pod(name, dict(chance.choice(ASKS)), metadata=notes)
                where = [chance.choice(world.filter(name).fitting or ["l1"]) for name in names]
                errors = await asyncio.gather(*[world.bind(name, at) for name, at in zip(names, where, strict=True)])
                bound += sum(not error for error in errors)
                for name in [name for name in list(world.kube.objects["pods"]) if chance.random() < 0.1]:
                    short = name.removeprefix("default/")
                    world.kube.change_pod(short, lambda pod: pod["status"].update(phase="Succeeded"))
                for at, given in on_the_api_server(world).items():
                    assert beyond_the_law(nodes[at], given) == []
                    assert beside_the_wrong(given) == []
                for at, node in nodes.items():
                    assert beyond_the_law(node, world.service.ledger.taken(at)) == []
    assert bound > 30


async def test_shares_fill_one_gpu_and_no_more_and_come_back_after_a_restart():
    world = World({"l1": "4xL4"}, lease_seconds=1000)
    async with world.running():
        for name, milli in (("p", "300"), ("q", "700"), ("r", "300")):
            world.add_pod(name, {MILLI: milli})
            assert await world.schedule(name) == "l1"
        assert {device.split(":")[0] for name in "pq" for device in world.devices(name)} == {
            world.devices("p")[0].split(":")[0]
        }
        assert world.devices("r")[0].split(":")[0] != world.devices("p")[0].split(":")[0]
        before = {name: world.devices(name) for name in "pqr"}
    again = World({"l1": "4xL4"}, on=world.kube, lease_seconds=1000)
    again.add_pod("s", {GPU: "3"})
    again.add_pod("t", {GPU: "2"})
    async with again.running():
        assert {name: again.devices(name) for name in "pqr"} == before
        assert not again.filter("s").fitting
        assert again.filter("t").fitting == ["l1"]


@pytest.mark.parametrize("gib", [8, sample_node("l1", "4xL4").gpus[0].memory_mib // 1024])
async def test_a_share_of_unknown_place_keeps_back_every_gpu_it_could_be_on_until_it_is_seen(gib):
    world = World({"l1": "4xL4"}, lease_seconds=1000)
    world.add_pod("p", {SHARE: str(gib)}, spec={"nodeName": "l1"})
    world.add_pod("q", {MILLI: "100"})
    async with world.running():
        assert not world.filter("q").fitting
        report = report_of(sample_node("l1", "4xL4"))
        seen = report.gpus[2].model_copy(update={"pods": ("uid-p",)})
        world.report("l1", version=2, gpus=(*report.gpus[:2], seen, *report.gpus[3:]))
        (device,) = world.devices("p")
        assert device.startswith(seen.uuid + ":")
        assert world.filter("q").fitting == ["l1"]
        assert await world.bind("q", "l1") == ""


async def test_a_holder_of_a_share_that_is_seen_on_its_gpu_is_no_stranger(world):
    world.add_pod("p", {MILLI: "100"})
    world.add_pod("q", {MILLI: "100"})
    await world.bind("p", "h1")
    gpu = world.devices("p")[0].split(":")[0]
    report = report_of(sample_node("h1", "8xH100"))
    gpus = tuple(each.model_copy(update={"pods": ("uid-p",) if each.uuid == gpu else ()}) for each in report.gpus)
    world.report("h1", version=2, gpus=gpus)
    await world.bind("q", "h1")
    assert world.devices("q")[0].startswith(gpu)


async def test_a_share_of_all_of_a_gpu_is_still_known_after_a_restart():
    """Asked for in GiB it can be; unknown devices would keep back the whole node."""
    memory = sample_node("v1", "8xV100").gpus[0].memory_mib
    first = World({"v1": "8xV100"}, lease_seconds=1000)
    first.add_pod("p", {SHARE: str(memory // 1024)})
    async with first.running():
        assert await first.bind("p", "v1") == ""
        (device,) = first.devices("p")
    again = World({"v1": "8xV100"}, on=first.kube, lease_seconds=1000)
    again.add_pod("q", {GPU: "7"})
    async with again.running():
        assert again.devices("p") == (device,)
        assert again.filter("q").fitting == ["v1"]
        again.add_pod("r", {MILLI: "1"})
        assert await again.bind("q", "v1") == ""
        assert not again.filter("r").fitting


async def test_nodes_with_absurd_allocatable_are_offered_like_others():
    """One of them must not make every filter fail."""
    world = World({"h1": "8xH100", "h2": "8xH100"}, lease_seconds=1000)
    world.kube.remove_node("h1")
    world.kube.add_node("h1", cpu="9223372036854775807", memory="7E")
    world.add_pod("p", {GPU: "1", "cpu": "2000000"})
    async with world.running():
        assert set(world.filter("p").fitting) == {"h1", "h2"}
        assert set(world.prioritize("p")) == {"h1", "h2"}


async def test_a_proposal_is_void_once_somebody_who_wants_to_be_apart_stands_there(world):
    """Its devices are free, but not for this pod any more."""
    world.add_pod("p", {MILLI: "100"}, metadata={"annotations": {"tangram.gpu/tenant": "red"}})
    apart = {"annotations": {"tangram.gpu/tenant": "blue", "tangram.gpu/isolation": "gpu"}}
    world.add_pod("q", {MILLI: "100"}, metadata=apart)
    world.filter("p", ["h1"])
    (proposed,) = world.devices("p")
    taken = world.service.ledger.assume(
        PodRef("uid-q", "default", "q"),
        Demand(share_milli=100, terms=Terms(guest=Guest("blue", "", "gpu"))),
        Placement("h1", (Device(proposed.split(":")[0], milli=100),)),
        now=world.clock(),
        legal=legal(sample_node("h1", "8xH100")),
    )
    assert taken is None
    assert await world.bind("p", "h1") == ""
    assert world.devices("p")[0].split(":")[0] != proposed.split(":")[0]


# -- CPU and memory ------------------------------------------------------------------------------------------


async def test_cpu_that_seems_to_be_short_never_refuses_what_kube_scheduler_has_granted():
    """Its cache knows of a pod's end before our watch does."""
    world = World({"h1": "8xH100"}, lease_seconds=1000)
    world.kube.remove_node("h1")
    world.kube.add_node("h1", cpu="4", memory="8Gi")
    world.add_pod("other", {"cpu": "3"}, spec={"nodeName": "h1"})
    world.add_pod("p", {GPU: "1", "cpu": "3"})
    async with world.running():
        node, _ = world.service.offers.view("h1")
        assert (node.cpu_milli, node.memory_mib) == (1000, 8192)
        assert world.filter("p").fitting == ["h1"]
        assert world.prioritize("p", ["h1"])
        assert await world.bind("p", "h1") == ""


async def test_a_pods_requests_are_counted_once_from_assumption_to_release():
    world = World({"h1": "8xH100"}, lease_seconds=1000)
    world.kube.remove_node("h1")
    world.kube.add_node("h1", cpu="16", memory="64Gi")
    world.add_pod("p", {GPU: "1", "cpu": "3", "memory": "1Gi"})

    def left() -> tuple[int | None, int | None]:
        world.service.offers.refresh(now=world.clock())
        room = read(*world.service.offers.view("h1"))
        return room.host.cpu_milli, room.host.memory_mib

    async with world.running():
        assert left() == (16000, 65536)
        assert await world.bind("p", "h1") == ""
        assert left() == (13000, 64512)
        await world.until(lambda: world.service.truth.pods["uid-p"].node)
        assert left() == (13000, 64512)
        world.add_pod("daemon", {"cpu": "1"}, spec={"nodeName": "h1"})
        await world.until(lambda: left() == (12000, 64512))
        world.kube.change_pod("p", lambda pod: pod["status"].update(phase="Succeeded"))
        await world.until(lambda: phase(world, "p") is None)
        assert left() == (15000, 65536)
        world.kube.remove_pod("daemon")
        await world.until(lambda: left() == (16000, 65536))


# -- coming back, and going on -------------------------------------------------------------------------------


async def test_a_node_that_came_back_is_not_barred_by_a_late_not_found(world):
    world.kube.before["get_node"] = failing(NotFound("404"))
    world.service.binder.check("h1", "in doubt")
    await world.until(lambda: not world.service.offers.fault("h1"))


async def test_a_read_that_is_older_than_an_event_changes_nothing(world):
    world.add_pod("p", EIGHT, spec={"nodeName": "h1"})
    await world.until(lambda: phase(world, "p"))
    old = world.kube.pod("p")
    world.kube.change_pod("p", lambda pod: pod["status"].update(phase="Succeeded"))
    await world.until(lambda: phase(world, "p") is None)
    world.service.truth.json_seen(old)
    assert phase(world, "p") is None

    world.kube.remove_pod("p")
    await world.until(lambda: "uid-p" not in world.service.truth.pods)
    world.service.truth.json_seen(old)
    assert phase(world, "p") is None


async def test_a_pod_that_is_younger_than_a_list_is_seen_afterwards(world):
    """A bind may read a pod while a list of everything is still on its way."""
    listed = await world.kube.list("pods")
    asked_at = world.clock()
    world.add_pod("p", EIGHT)
    await world.until(lambda: "uid-p" in world.service.truth.pods)
    world.service.truth.pods_listed(listed.items, asked_at=asked_at)

    assert await world.bind("p", "h1") == ""
    world.kube.change_pod("p", lambda pod: pod["status"].update(phase="Succeeded"))
    await world.until(lambda: phase(world, "p") is None)


async def test_the_warning_ends_when_its_reason_does(world):
    gpu = world.gpus("h1")[0]
    forged = {"annotations": {PLACEMENT_ANNOTATION: write_placement("uid-p", "h1", [Device(gpu)])}}
    world.add_pod("p", {GPU: "1"}, metadata=forged)
    await world.until(lambda: PLACEMENT_ANNOTATION not in world.kube.annotations("p"))
    await world.until(lambda: not world.service.warnings())


async def test_one_pod_cannot_hold_up_the_service():
    """A mix of many slices on many fragmented boards: the deadline is kept, and asking again gets further."""
    names = {f"m{number}": "8xA100-mig" for number in range(30)}
    async with World(names, lease_seconds=1000).running() as world:
        mix = {"1g.20gb": 5, "1g.10gb": 7, "2g.20gb": 3, "3g.40gb": 3, "4g.40gb": 2}
        for number, name in enumerate(names):
            for piece in range(number % 7):
                world.add_pod(f"s{number}-{piece}", {"nvidia.com/mig-1g.10gb": "1"})
                assert await world.bind(f"s{number}-{piece}", name) == ""
        world.add_pod("p", {f"nvidia.com/mig-{profile}": str(count) for profile, count in mix.items()})
        looks = [0]

        def five_looks_a_second() -> float:
            looks[0] += 1
            return 1000.0 + 0.2 * looks[0]

        world.service.extender._clock = five_looks_a_second
        answers = []
        for _ in range(30):
            answers.append(world.filter("p"))
            if not answers[-1].error:
                break
        assert "longer than 1.0 s" in answers[0].error
        assert not answers[-1].error


# -- a process that dies at any call, and one that does not know that it is not the holder any more -----------

KINDS = {"l1": "4xL4"}  # small: what is given up is soon given to another
PIECES: tuple[dict[str, str], ...] = ({GPU: "1"}, {GPU: "2"}, {GPU: "3"}, {MILLI: "700"})


def check_the_law(world: World) -> None:
    """What pods that may run have been given keeps the law, and the ledger knows of it."""
    given_away = on_the_api_server(world)
    for at, kind in KINDS.items():
        node = sample_node(at, kind)
        assert beyond_the_law(node, given_away.get(at, [])) == []
        assert beside_the_wrong(given_away.get(at, [])) == []
        assert beyond_the_law(node, world.service.ledger.taken(at)) == []


def ready(world: World) -> bool:
    return not world.service.waiting_for()


async def some_binds(world: World, chance: random.Random) -> None:
    """A few pods at once: new ones, and some whose bind did not come to an end."""
    for _ in range(2):
        name = f"p{world.kube.version}"
        world.add_pod(name, dict(chance.choice(PIECES)), metadata={"annotations": chance.choice(NOTES)})
    unbound = [
        each["metadata"]["name"] for each in world.kube.objects["pods"].values() if not each["spec"].get("nodeName")
    ]
    chosen = chance.sample(unbound, min(4, len(unbound)))
    where = [chance.choice(world.filter(name).fitting or ["l1"]) for name in chosen]
    await asyncio.gather(*[world.bind(name, at) for name, at in zip(chosen, where, strict=True)])
    for name, pod in list(world.kube.objects["pods"].items()):
        if pod["spec"].get("nodeName") and chance.random() < 0.4:
            world.kube.change_pod(name.removeprefix("default/"), lambda pod: pod["status"].update(phase="Succeeded"))


def through(line: Line, kube: FakeKube) -> Kube:
    return cast(Kube, line)


async def serve_until_cut(world: World, cut: asyncio.Event, chance: random.Random) -> None:
    """Start, and bind until the line is cut, or enough has been done; then the process is gone."""

    async def serve() -> None:
        await world.service.start()
        await world.until(lambda: ready(world))
        for name in KINDS:
            world.report(name)
        for _ in range(8):
            await some_binds(world, chance)
            check_the_law(world)

    serving, dead = asyncio.create_task(serve()), asyncio.create_task(cut.wait())
    await asyncio.wait((serving, dead), return_when=asyncio.FIRST_COMPLETED)
    for _ in range(2 * TURNS_UNDER_WAY):
        await asyncio.sleep(0)  # what else was being called shares its fate
    if serving.done():
        serving.result()
    for each in (serving, dead):
        each.cancel()
    await asyncio.gather(serving, dead, return_exceptions=True)
    await world.crash()


DEATHS = st.tuples(
    st.sampled_from([("bind", 12), ("replace_config_map", 8), ("", 60)]).flatmap(
        lambda verb: st.tuples(st.just(verb[0]), st.integers(1, verb[1]))
    ),
    st.sampled_from(FATES),
    st.integers(10, 80),
)


@given(deaths=st.lists(DEATHS, min_size=1, max_size=4), seed=st.integers(0, 1 << 16))
@settings(max_examples=30, deadline=None)
def test_a_process_may_die_at_any_call_and_its_calls_may_arrive_late(deaths, seed):
    """Each process finds what the one before has left; a Binding on its way arrives whenever it likes."""

    async def story() -> None:
        chance, post, kube = random.Random(seed), Post(), None
        for (of, at), fate, after in deaths:
            kube = kube or FakeKube()
            line = Line(kube, post, at=at, of=of, fate=fate, after=after)
            world = World(KINDS, on=kube, line=partial(through, line), lease_seconds=1000)
            await serve_until_cut(world, line.cut, chance)
        last = World(KINDS, on=kube, lease_seconds=1000)
        async with last.running():
            await some_binds(last, chance)
            await post.deliver(all_of_it=True)
            check_the_law(last)
            await last.until(lambda: not last.service.ledger.assumed())
            await some_binds(last, chance)
            check_the_law(last)

    asyncio.run(story())


@given(
    turns=st.lists(st.tuples(st.booleans(), st.integers(0, 12)), min_size=4, max_size=16), seed=st.integers(0, 1 << 16)
)
@settings(max_examples=20, deadline=None)
def test_two_that_both_believe_to_be_the_holder_give_nothing_away_twice(turns, seed):
    """The Lease guards order only: clocks may be wrong, and a process may sleep between its look and its call."""

    async def story() -> None:
        chance = random.Random(seed)
        one = World(KINDS, lease_seconds=1000)
        other = World(KINDS, on=one.kube, lease_seconds=1000)
        async with one.running(), other.running():
            for which, rest in turns:
                world = one if which else other
                if not ready(world):
                    await world.until(lambda world=world: ready(world))
                binds = asyncio.create_task(some_binds(world, chance))
                for _ in range(rest):
                    await asyncio.sleep(0)
                for at, kind in KINDS.items():
                    assert beyond_the_law(sample_node(at, kind), on_the_api_server(one).get(at, [])) == []
                if chance.random() < 0.7:
                    await binds
            await asyncio.gather(*[task for world in (one, other) for _, task in world.service.binder._binds.values()])
            for at, kind in KINDS.items():
                assert beyond_the_law(sample_node(at, kind), on_the_api_server(one).get(at, [])) == []

    asyncio.run(story())
