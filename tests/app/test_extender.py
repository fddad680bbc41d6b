"""The story of one pod up to its bind: filter, prioritize, preempt, and what makes room. Bind is in test_binder.py."""

from collections.abc import AsyncIterator

import pytest

from app.errors import Unknown
from app.ledger import Phase
from app.translate import PLACEMENT_ANNOTATION, WAKE_ANNOTATION, Written, read_placement
from app.wire import Args, PreemptArgs, Victims
from tests.app.world import GPU, World

MIG = "nvidia.com/mig-3g.40gb"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"h1": "8xH100", "h2": "8xH100", "m1": "8xA100-mig"}).running() as running:
        yield running


def phase(world: World, name: str) -> Phase | None:
    hold = world.service.ledger.get(f"uid-{name}")
    return hold.phase if hold else None


# -- filter and prioritize ----------------------------------------------------------------------------


async def test_case_17_all_feasible_nodes_are_returned_and_prioritize_carries_our_wish(world):
    """HAMi #124, #2264, #3062: answering with one node ignored the pod's own preferences."""
    world.add_pod("p", {GPU: "1"})

    assert world.filter("p").fitting == ["h1", "h2"]
    scores = world.prioritize("p", ["h1", "h2"])
    assert set(scores) == {"h1", "h2"}
    assert max(scores.values()) % 1000 == 1


async def test_names_in_any_order_are_answered_in_that_order(world):
    world.add_pod("p", {GPU: "1"})
    assert world.filter("p", ["h2", "m1", "nobody", "h1"]).fitting == ["h2", "h1"]


async def test_every_node_that_is_left_out_has_a_reason(world):
    world.add_pod("p", {GPU: "9"})
    result = world.filter("p", ["h1", "m1", "nobody"])

    assert {*result.failed, *result.unresolvable} == {"h1", "m1", "nobody"}
    assert "9" in result.unresolvable["h1"]
    assert "no agent" in result.unresolvable["nobody"]


async def test_reasons_stay_short_on_many_nodes_and_one_is_told_in_full():
    """kube-scheduler joins all reasons that differ into the pod's condition."""
    async with World({f"m{number}": "8xA100-mig" for number in range(10)}).running() as world:
        for number in range(80):
            world.add_pod(f"p{number}", {"nvidia.com/mig-7g.80gb": "1"})
            assert await world.schedule(f"p{number}")
        world.add_pod("q", {MIG: "1"})
        assert set(world.filter("q").failed.values()) == {"no legal start for 3g.40gb"}
        reason = world.service.truth.waiting["uid-q"].reason
        assert reason.startswith("10 nodes: no legal start for 3g.40gb (on m0: ")
        assert "7g.80gb@0 in the way" in reason


async def test_a_pod_that_asks_nothing_of_us_passes_untouched(world):
    world.add_pod("p")
    assert world.filter("p", ["h1", "nobody"]).fitting == ["h1", "nobody"]
    assert world.prioritize("p") == {}


async def test_a_malformed_ask_is_refused_in_words_on_every_node(world):
    world.add_pod("p", {GPU: "one"})
    result = world.filter("p")

    assert not result.fitting
    assert set(result.unresolvable) == set(world.nodes)
    assert "one" in result.unresolvable["h1"]


async def test_filter_proposes_only_when_it_returns_one_node(world):
    world.add_pod("p", {GPU: "1"})
    world.add_pod("q", {GPU: "1"})

    world.filter("p")
    assert phase(world, "p") is None
    world.filter("q", ["h1", "m1"])
    assert phase(world, "q") is Phase.PROPOSED


async def test_a_proposal_makes_others_look_elsewhere_first_but_never_refuses_them(world):
    world.add_pod("p", {GPU: "8"})
    world.add_pod("q", {GPU: "8"})
    world.prioritize("p", ["h1", "h2"])

    assert world.filter("q").fitting == ["h1", "h2"]
    scores = world.prioritize("q", ["h1", "h2"])
    assert scores["h2"] > scores["h1"] > 0

    world.add_pod("r", {GPU: "8"})
    assert world.filter("r").fitting == ["h1", "h2"]


async def test_equal_prices_get_equal_ranks_so_that_the_pods_own_preferences_decide(world):
    world.add_pod("p", {GPU: "1"})
    first, second = sorted(world.prioritize("p", ["h1", "h2"]).values())
    assert second - first == 1


async def test_a_partly_used_node_is_preferred_to_an_empty_one(world):
    world.add_pod("p", {GPU: "1"})
    world.add_pod("q", {GPU: "1"})
    node = await world.schedule("p")

    scores = world.prioritize("q", ["h1", "h2"])

    assert max(scores, key=lambda each: scores[each]) == node


@pytest.mark.parametrize(("cuda", "fits"), [("13.0", False), ("12.9", True), ("11.8", True)])
async def test_case_18_cuda_above_the_drivers_major_is_refused_in_words(world, cuda, fits):
    """LLMKube #1424: it crash-looped with no hint. Minor versions within a major are compatible."""
    world.report("h1", version=2, driver="550.54.14", cuda="12.4")
    world.add_pod("p", {GPU: "1"}, metadata={"annotations": {"tangram.gpu/cuda": cuda}})

    result = world.filter("p", ["h1"])

    assert bool(result.fitting) is fits
    if not fits:
        assert result.unresolvable["h1"] == "needs CUDA 13.0, its driver serves CUDA 12.4 (driver 550.54.14)"


async def test_floors_and_products_are_refused_in_words(world):
    notes = {"tangram.gpu/product": "A100", "tangram.gpu/gpu-memory": "40Gi"}
    world.add_pod("p", {GPU: "1"}, metadata={"annotations": notes})
    assert "needs A100 with 40960 MiB or more" in world.filter("p").unresolvable["h1"]


async def test_a_pod_that_asks_for_a_share_is_placed_and_told(world):
    world.add_pod("p", {"tangram.gpu/share-milli": "250"})
    node = await world.schedule("p")
    written = read_placement(world.kube.annotations("p")[PLACEMENT_ANNOTATION])
    assert isinstance(written, Written)
    assert (written.node, [device.milli for device in written.devices]) == (node, [250])


async def test_not_ready_is_an_error_not_a_refusal():
    """A refusal would let kube-scheduler preempt; an error is tried again."""
    world = World({"h1": "8xH100"})
    world.add_pod("p", {GPU: "1"})

    assert "not ready" in world.filter("p").error
    assert "not ready" in await world.bind("p", "h1")


# -- pods that we did not place -----------------------------------------------------------------------


async def test_nothing_is_offered_that_could_be_the_device_of_a_pod_that_was_there_before_us():
    world = World({"h1": "8xH100", "h2": "8xH100"})
    for number in range(50):
        world.add_pod(f"old{number}", {GPU: "1"}, spec={"nodeName": "h1" if number < 8 else f"other{number}"})
    world.add_pod("p", {GPU: "1"})
    async with world.running():
        result = world.filter("p")
        assert result.fitting == ["h2"]
        assert "Tangram did not place" in str(result)
        assert world.service.views.phases()["held"] == 50

        gpus = world.gpus("h1")
        entry = world.service.inventory.get("h1")
        assert entry is not None
        users = tuple(
            gpu.model_copy(update={"pods": (f"uid-old{gpus.index(gpu.uuid)}",)} if gpu.uuid in gpus[:7] else {})
            for gpu in entry.report.gpus
        )
        world.report("h1", gpus=users, sees_pods=True, version=2)
        assert world.devices("old3") == (gpus[3],)
        assert world.filter("p").fitting == ["h2"], "one of the eight is still not known"

        world.kube.change_pod("old7", lambda pod: pod["status"].update(phase="Succeeded"))
        await world.until(lambda: phase(world, "old7") is None)
        assert set(world.filter("p").fitting) == {"h1", "h2"}
        assert await world.bind("p", "h1") == ""
        assert world.devices("p") == (gpus[7],)


async def test_a_slice_that_could_be_in_use_is_not_given_to_another():
    world = World({"m1": "8xA100-mig"})
    world.add_pod("old", {MIG: "1"}, spec={"nodeName": "m1"})
    world.add_pod("p", {MIG: "1"})
    async with world.running():
        assert not world.filter("p").fitting, "no instance is shown, so any GPU could be the one"


# -- room ---------------------------------------------------------------------------------------------


async def test_case_13_finished_and_deleted_pods_release(world):
    """HAMi #2923: a deleted pod kept eight cards for ever."""
    world.add_pod("p", {GPU: "8"})
    world.add_pod("q", {GPU: "8"}, spec={"terminationGracePeriodSeconds": 0})
    await world.bind("p", "h1")
    await world.bind("q", "h2")
    await world.until(lambda: world.service.truth.pods["uid-q"].node)

    world.kube.change_pod("p", lambda pod: pod["status"].update(phase="Succeeded"))
    await world.until(lambda: phase(world, "p") is None)

    world.kube.change_pod("q", lambda pod: pod["metadata"].update(deletionTimestamp="2026-11-21T00:00:00Z"))
    world.kube.remove_pod("q")
    await world.until(lambda: phase(world, "q") is Phase.LEAVING)
    world.clock.advance(1)
    world.add_pod("r", {GPU: "8"})
    assert world.filter("r").fitting == ["h1"], "the devices of q have not been seen idle"
    world.report("h2", version=2)
    await world.until(lambda: phase(world, "q") is None)


async def test_a_forced_deletion_is_not_believed_before_the_grace_time_and_a_fresh_report(world):
    """The API server announces it like any other: MODIFIED with a deletionTimestamp, then DELETED at once."""
    world.add_pod("p", {GPU: "8"}, spec={"terminationGracePeriodSeconds": 30})
    await world.bind("p", "h1")
    await world.until(lambda: world.service.truth.pods["uid-p"].node)
    forced = {"deletionTimestamp": "2026-11-21T00:00:00Z", "deletionGracePeriodSeconds": 0}
    world.kube.change_pod("p", lambda pod: pod["metadata"].update(forced))
    world.kube.remove_pod("p")
    await world.until(lambda: phase(world, "p") is Phase.LEAVING)

    world.clock.advance(29)
    world.report("h1", version=2)
    assert phase(world, "p") is Phase.LEAVING
    world.clock.advance(2)
    world.service.truth.settle()
    assert phase(world, "p") is Phase.LEAVING, "nobody has looked at the devices since"
    world.report("h1", version=3)
    assert phase(world, "p") is None


async def test_the_grace_time_runs_from_when_the_pod_was_first_seen_terminating(world):
    """Whoever deletes may give more time than the pod asks for; forcing it later takes nothing away."""
    world.add_pod("p", {GPU: "8"}, spec={"terminationGracePeriodSeconds": 30})
    await world.bind("p", "h1")
    await world.until(lambda: world.service.truth.pods["uid-p"].node)
    deletion = {"deletionTimestamp": "2026-11-21T00:00:00Z", "deletionGracePeriodSeconds": 30}
    world.kube.change_pod("p", lambda pod: pod["metadata"].update(deletion))
    await world.until(lambda: world.service.truth.pods["uid-p"].terminating)
    world.clock.advance(25)
    world.kube.remove_pod("p")
    await world.until(lambda: phase(world, "p") is Phase.LEAVING)

    world.clock.advance(4)
    world.report("h1", version=2)
    assert phase(world, "p") is Phase.LEAVING
    world.clock.advance(2)
    world.report("h1", version=3)
    assert phase(world, "p") is None


async def test_case_13_a_gap_in_the_watch_is_healed_by_listing_again(world):
    world.add_pod("p", {GPU: "8"}, spec={"terminationGracePeriodSeconds": 0})
    await world.bind("p", "h1")
    await world.until(lambda: world.service.truth.pods["uid-p"].node)
    world.clock.advance(1)

    del world.kube.objects["pods"]["default/p"]  # gone without an event
    world.kube.forget_history()
    world.kube.add_pod({"metadata": {"name": "x", "uid": "x"}, "spec": {}})
    for watch in world.service.watches:
        watch._resync_seconds = 0.0

    def drop() -> None:
        raise Unknown("connection reset")

    world.kube.before["watch"] = drop
    world.kube.add_node("h3")
    await world.until(lambda: phase(world, "p") is Phase.LEAVING)


async def test_case_19_freeing_room_wakes_refused_pods_by_touching_one_node():
    """kubernetes #122019, HAMi #1368: rejected pods slept five minutes although room was free."""
    world = World({"h1": "8xH100"}, stale_seconds=30, wake_seconds=0.05, lease_seconds=1000)
    async with world.running():
        world.add_pod("p", {GPU: "8"})
        world.clock.advance(31)
        await world.until(lambda: world.service.offers.fault("h1"))
        assert not world.filter("p").fitting
        assert world.service.truth.waiting["uid-p"].reason

        world.report("h1", version=2)
        await world.until(
            lambda: WAKE_ANNOTATION in (world.kube.objects["nodes"]["h1"]["metadata"].get("annotations") or {})
        )
        assert world.filter("p").fitting == ["h1"]


async def test_a_pod_that_is_gone_does_not_wait_although_it_is_asked_for_once_more(world):
    """kube-scheduler's watch may be behind ours."""
    world.add_pod("p", {GPU: "16"})
    gone = world.kube.pod("p")
    assert not world.filter("p").fitting
    assert "uid-p" in world.service.truth.waiting
    world.kube.remove_pod("p")
    await world.until(lambda: "uid-p" not in world.service.truth.waiting)

    assert not world.service.extender.filter(Args(gone, list(world.nodes))).fitting

    assert "uid-p" not in world.service.truth.waiting


async def test_nobody_is_woken_when_nobody_waits():
    world = World({"h1": "8xH100"}, wake_seconds=0.05, lease_seconds=1000)
    async with world.running():
        world.clock.advance(61)
        world.service.truth.chores.room.clear()
        world.kube.calls.clear()
        world.report("h1", version=2)
        await world.until(lambda: not world.service.truth.chores.room)
        assert "annotate_node" not in world.kube.calls


async def test_after_a_restart_pods_refused_before_it_are_woken():
    """They are in kube-scheduler's queue, and we know nothing of them."""
    async with World({"h1": "8xH100"}, wake_seconds=0.05).running() as world:
        await world.until(lambda: "annotate_node" in world.kube.calls)


# -- preempt ------------------------------------------------------------------------------------------


async def test_preempt_keeps_only_nodes_where_the_victims_make_room(world):
    world.add_pod("small", {GPU: "1"})
    world.add_pod("big", {GPU: "7"})
    world.add_pod("other", {GPU: "8"})
    await world.bind("small", "h1")
    await world.bind("big", "h1")
    await world.bind("other", "h2")
    world.add_pod("p", {GPU: "7"})
    victims = {"h1": Victims(("uid-small",), 0), "h2": Victims(("uid-other",), 1), "m1": Victims(("x",), 0)}

    kept = world.service.extender.preempt(PreemptArgs(world.kube.pod("p"), victims))

    assert kept == {"h2": Victims(("uid-other",), 1)}


async def test_case_10_the_view_of_a_node_is_made_anew_only_when_it_changes(world):
    """HAMi #3021, #2858: usage of all nodes and pods was rebuilt at every filter call."""
    world.add_pod("p", {GPU: "1"})
    world.add_pod("q", {GPU: "1"})
    world.filter("p")
    before = world.service.offers.updated
    for _ in range(50):
        world.filter("p")
        world.prioritize("p", ["h1", "h2"])
    assert world.service.offers.updated == before

    await world.bind("q", "h1")
    world.filter("p")
    assert world.service.offers.updated - before <= 2
