"""Planning beside the service, with the real process: plans rank, and nothing waits for them."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

import app.planner as planner_module
from app.planner import Begin, Child, MakePlan, News, Planner
from app.schedule import JointPlan, Planned
from app.simulate import report_of
from solver import DEFAULT_POLICY, Demand
from solver.samples import sample_node
from tests.app.world import GPU, World

QUICK: dict[str, Any] = {"planning": True, "plan_interval_seconds": 0.02, "value_tables": False, "lease_seconds": 1000}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"h1": "8xH100", "h2": "8xH100"}, **QUICK).running() as running:
        yield running


def planner(world: World) -> Planner:
    assert world.service.planner is not None
    return world.service.planner


def planned(world: World) -> dict[str, tuple[int, int]]:
    """Pods planned and unplaced by demand."""
    plan = world.service.schedule.plan
    return {str(each.demand): (each.placed, each.unplaced) for each in plan.planned} if plan else {}


async def test_what_is_pending_is_planned_and_planned_again_when_it_changes(world):
    world.add_pod("p", {GPU: "8"})
    world.add_pod("q", {GPU: "8"})
    world.add_pod("r", {GPU: "8"}, spec={"priority": 7})
    await world.until(lambda: len(_groups(world)) == 2)
    groups = _groups(world)
    assert [(each.priority, each.placed, each.unplaced) for each in groups] == [(0, 1, 1), (7, 1, 0)]
    assert next(each.reason for each in groups if each.unplaced)

    world.kube.remove_pod("q")
    await world.until(lambda: all(not each.unplaced for each in _groups(world)))


def _groups(world: World) -> list[Planned]:
    plan = world.service.schedule.plan
    return sorted(plan.planned, key=lambda each: each.priority) if plan else []


async def test_gated_and_bound_pods_and_those_that_ask_nothing_of_us_are_not_planned(world):
    world.add_pod("gated", {GPU: "1"}, spec={"schedulingGates": [{"name": "later"}]})
    world.add_pod("bound", {GPU: "2"}, spec={"nodeName": "h1"})
    world.add_pod("other", {"cpu": "1"})
    world.add_pod("p", {GPU: "4"})
    await world.until(lambda: planned(world) == {"4 GPUs": (1, 0)})


SIZES = ("4", "3", "5", "4")


@pytest.mark.parametrize(("planning", "placed"), [(False, 3), (True, 4)])
async def test_a_burst_that_follows_its_plan_places_more_than_one_by_one(planning, placed):
    """Each to the node that it fills best: 4 + 3 and 5, and the last has no place. Together: 4 + 4 and 5 + 3."""
    async with World({"h1": "8xH100", "h2": "8xH100"}, **{**QUICK, "planning": planning}).running() as world:
        for number, size in enumerate(SIZES):
            world.add_pod(f"p{number}", {GPU: size})
        if planning:
            await world.until(lambda: planned(world) == {"3 GPUs": (1, 0), "4 GPUs": (2, 0), "5 GPUs": (1, 0)})
        bound = [bool(await world.schedule(f"p{number}")) for number in range(len(SIZES))]
        assert sum(bound) == placed


async def test_pods_of_schedulers_that_never_ask_us_are_not_planned(world):
    """They would hold room in the plan for ever."""
    world.add_pod("other", {GPU: "8"}, spec={"schedulerName": "another"})
    world.add_pod("p", {GPU: "4"})
    await world.until(lambda: planned(world) == {"8 GPUs": (1, 0), "4 GPUs": (1, 0)})
    world.filter("p")
    await world.until(lambda: planned(world) == {"4 GPUs": (1, 0)})


async def test_planned_nodes_are_ranked_first_and_the_others_stay_feasible(world):
    """One GPU each by itself would go to the node that is in use; the plan keeps it for seven."""
    world.add_pod("p", {GPU: "1"})
    await world.bind("p", "h1")
    demand = Demand(1)
    world.service.schedule.adopt(JointPlan("optimal", 0, 0, 0.0, 0.0, (Planned(demand, 0, (("h2", 1),)),)))
    world.add_pod("q", {GPU: "1"})

    assert world.filter("q").fitting == ["h1", "h2"]
    scores = world.prioritize("q")
    assert scores["h2"] > scores["h1"] > 0
    assert await world.bind("q", "h2") == ""
    assert world.service.schedule.followed == 1


async def test_a_plan_for_a_node_that_is_full_refuses_nobody(world):
    world.add_pod("p", {GPU: "8"})
    await world.bind("p", "h2")
    world.service.schedule.adopt(JointPlan("optimal", 0, 0, 0.0, 0.0, (Planned(Demand(8), 0, (("h2", 1),)),)))
    world.add_pod("q", {GPU: "8"})
    assert world.filter("q").fitting == ["h1"]
    assert await world.schedule("q") == "h1"


async def test_with_nothing_pending_no_plan_is_made(world):
    await world.until(lambda: planner(world).words == "running")
    world.report("h1", version=2)
    await asyncio.sleep(0.3)
    assert world.service.schedule.plan is None


async def test_when_nothing_changes_no_plan_is_made_again(world):
    world.add_pod("p", {GPU: "9"})
    await world.until(lambda: planned(world) == {"9 GPUs": (0, 1)})
    await asyncio.sleep(0.1)
    plan = world.service.schedule.plan
    await asyncio.sleep(0.3)
    assert world.service.schedule.plan is plan


async def child_of(world: World) -> int:
    await world.until(lambda: planner(world).child)
    child = planner(world).child
    assert child is not None
    return child.pid


async def test_a_killed_process_is_started_again_and_pods_are_placed_meanwhile(world):
    os.kill(await child_of(world), signal.SIGKILL)
    await world.until(lambda: planner(world).child is None)
    world.add_pod("p", {GPU: "1"})
    assert await world.schedule("p")
    world.add_pod("q", {GPU: "8"})
    await world.until(lambda: planned(world) == {"8 GPUs": (1, 0)})
    assert planner(world).starts == 2
    assert not world.service.waiting_for()


async def test_the_process_ends_with_the_service():
    async with World({"h1": "8xH100"}, **QUICK).running() as world:
        pid = await child_of(world)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_process_ends_by_itself_when_its_parent_is_gone():
    child = await Child.start()
    await child.say(Begin(DEFAULT_POLICY, ()))
    child._to.close()
    async with asyncio.timeout(20):
        assert await child._process.wait() == 0


async def test_a_fault_in_planning_is_told_and_the_next_plan_is_made():
    child = await Child.start()
    try:
        await child.say(Begin(DEFAULT_POLICY, ()))
        node = sample_node("a", "8xH100")
        await child.say(News(((node, ("no device",)),), ()))  # type: ignore[arg-type]
        await child.say(MakePlan(((Demand(1), 0, 1),), 2.0))
        assert "Error" in (await child.hear()).reason  # type: ignore[union-attr]
        await child.say(News(((node, ()),), ()))
        await child.say(MakePlan(((Demand(1), 0, 2),), 2.0))
        heard = await child.hear()
        assert isinstance(heard, JointPlan)
        assert [(each.placed, each.unplaced) for each in heard.planned] == [(2, 0)]
    finally:
        await child.end()


async def test_value_tables_are_found_and_adopted():
    """On a board with two profiles only: a real one takes seconds."""
    knobs = {**QUICK, "value_tables": True}
    async with World({"h1": "8xH100"}, **knobs).running() as world:
        gpu = report_of(sample_node("h1", "4xA30-mig")).gpus[0]
        assert gpu.mig is not None
        few = gpu.mig.model_copy(update={"profiles": gpu.mig.profiles[:2]})
        world.report("h1", version=2, gpus=(gpu.model_copy(update={"mig": few}),), links=())
        (geometry,) = world.service.inventory.geometries
        await world.until(lambda: geometry in planner(world).tables, seconds=60)
        assert geometry in world.service.offers._policy.values.tables
        await world.until(lambda: not world.service.offers.settle())
        (shown,) = world.service.views.plan(world.service.schedule, planner(world))["value_tables"]
        assert shown["profiles"] == [profile.name for profile in geometry.profiles]
        world.add_pod("p", {f"nvidia.com/mig-{geometry.profiles[0].name}": "1"})
        assert await world.schedule("p") == "h1"


async def test_nodes_are_valued_by_the_pods_that_came(monkeypatch):
    """Many pods need eight GPUs of a node that has few CPUs left over: small ones keep away from such nodes."""
    monkeypatch.setattr("app.planner.FORECAST_PODS", 20)
    async with World({"h1": "8xH100", "h2": "8xV100"}, **QUICK, forecast=True).running() as world:
        for i in range(20):
            world.add_pod(f"p{i}", {GPU: "8"} if i % 2 else {"tangram.gpu/share-milli": "300"})
        await world.until(lambda: world.service.offers._policy.values.forecast is not None)
        forecast = world.service.offers._policy.values.forecast
        assert forecast is not None
        assert [(shape.count, shape.milli) for shape in forecast.blocks] == [(8, 1000)]
        assert forecast.share_worth[300] > 0
        await world.until(lambda: not world.service.offers.settle())
        shown = world.service.views.plan(world.service.schedule, planner(world))
        assert shown["forecast_pods"] == 20
        assert await world.schedule("p1") in ("h1", "h2")


async def test_the_plan_is_shown_with_its_words(world):
    world.add_pod("p", {GPU: "8"})
    world.add_pod("q", {GPU: "9"})
    await world.until(lambda: len(planned(world)) == 2)
    shown = world.service.views.plan(world.service.schedule, world.service.planner)
    assert (shown["planning"], shown["process"], shown["pods"], shown["planned"], shown["unplaced"]) == (
        True, "running", 2, 1, 1,
    )  # fmt: skip
    by_demand = {each["demand"]: each for each in shown["demands"]}
    assert by_demand["9 GPUs"]["reason"]
    assert by_demand["8 GPUs"]["still_to_come"]
    assert by_demand["8 GPUs"]["prices"]
    assert b'tangram_plans_total{status="optimal"}' in world.service.metrics.text()


async def test_without_planning_it_says_so():
    async with World({"h1": "8xH100"}, planning=False).running() as world:
        shown = world.service.views.plan(world.service.schedule, world.service.planner)
        assert (shown["planning"], shown["status"]) == (False, None)


async def test_a_child_that_does_not_hear_what_it_is_told_counts_as_hung(monkeypatch):
    """Stopped between two plans it answers to nothing, and its pipe is full after a few hundred nodes."""
    monkeypatch.setattr(planner_module, "GRACE_SECONDS", 0.5)
    child = await Child.start()
    try:
        os.kill(child.pid, signal.SIGSTOP)
        node = sample_node("h1", "8xH100")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(20):
                await child.say(News(tuple((node, ()) for _ in range(100)), ("x" * 1_000_000,)))
    finally:
        await child.end()


async def test_a_cost_of_any_length_can_be_shown(world):
    """With hundreds of priorities it has thousands of digits, more than Python prints."""
    world.add_pod("p", {GPU: "1"})
    await world.until(lambda: world.service.schedule.plan and planner(world).made_at)
    plan = world.service.schedule.plan
    assert plan is not None
    world.service.schedule.plan = replace(plan, cost=10**5000, bound=0)
    shown = world.service.views.plan(world.service.schedule, planner(world))
    assert (shown["cost"], shown["bound"]) == ("about 2^16610", "0")
