"""Pods that a kubelet refused: their devices are free at once, and the like goes elsewhere for a while."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from app.errors import Refused, Unknown
from app.events import MOST_WAITING, Events
from app.translate import PodRef
from app.wire import parse_preempt
from tests.app.world import GPU, World

MILLI = "tangram.gpu/share-milli"
WORDS = "Pod was rejected: Allocate failed due to no healthy devices present"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World({"a": "8xH100", "b": "8xH100"}, lease_seconds=10_000, stale_seconds=10_000).running() as running:
        yield running


async def refuse(world: World, name: str, node: str, asks: dict[str, str] | None = None, **more: Any) -> None:
    """A pod is bound there, and its kubelet refuses it."""
    world.add_pod(name, asks or {GPU: "2"}, **more)
    assert await world.bind(name, node) == ""
    await world.until(lambda: world.service.truth.pods[f"uid-{name}"].node)
    status = {"phase": "Failed", "reason": "UnexpectedAdmissionError", "message": WORDS}
    world.kube.change_pod(name, lambda pod: pod.update(status=status))
    await world.until(lambda: not world.devices(name))


def fitting(world: World, name: str, asks: dict[str, str] | None = None) -> list[str]:
    if f"default/{name}" not in world.kube.objects["pods"]:
        world.add_pod(name, asks or {GPU: "2"})
    return list(world.filter(name).fitting)


async def start_running(world: World, name: str) -> None:
    world.kube.change_pod(name, lambda pod: pod["status"].update(phase="Running"))
    await world.until(lambda: world.service.truth.pods[f"uid-{name}"].admitted)


async def test_a_refused_pods_devices_are_free_at_once_and_its_like_goes_elsewhere(world):
    await refuse(world, "p", "a")
    assert fitting(world, "again") == ["b"]
    failed = world.filter("again").failed["a"]
    assert "its kubelet has refused" in failed
    assert WORDS in failed
    assert fitting(world, "other", {GPU: "1"}) == ["a", "b"]
    assert fitting(world, "all", {GPU: "8"}) == ["a", "b"]
    assert "its kubelet has refused" in await world.bind("again", "a"), "a filter from before the refusal"


async def test_other_terms_and_cpu_are_the_same_ask_to_a_kubelet(world):
    await refuse(world, "p", "a")
    world.add_pod("q", {GPU: "2", "cpu": "3"}, metadata={"annotations": {"tangram.gpu/tenant": "red"}})
    assert world.filter("q").fitting == ["b"]


async def test_the_node_is_offered_again_when_time_has_passed_and_its_agent_has_reported(world):
    await refuse(world, "p", "a")
    world.clock.advance(31)
    assert fitting(world, "again") == ["b"]
    world.report("a")
    assert fitting(world, "again") == ["a", "b"]

    await refuse(world, "q", "a")
    world.report("a")
    assert fitting(world, "again") == ["b"]


async def test_each_further_refusal_is_waited_out_twice_as_long_up_to_ten_minutes(world):
    waited = []
    for number in range(7):
        await refuse(world, f"p{number}", "a")
        began = world.clock.now
        while fitting(world, "again") == ["b"]:
            world.clock.advance(10)
            world.report("a")
        waited.append(world.clock.now - began)
        world.service.refusals.sweep()
    assert waited == [30, 60, 120, 240, 480, 600, 600]


async def test_pods_refused_together_are_waited_out_once(world):
    for name in ("p", "q", "r"):
        world.add_pod(name, {GPU: "2"})
        assert await world.bind(name, "a") == ""
    for name in ("p", "q", "r"):
        world.kube.change_pod(name, lambda pod: pod.update(status={"phase": "Failed", "reason": "OutOfcpu"}))
        await world.until(lambda ended=name: not world.devices(ended))
    world.clock.advance(31)
    world.report("a")
    assert fitting(world, "again") == ["a", "b"]


async def test_a_success_ends_the_waiting_and_the_doubling(world):
    await refuse(world, "p", "a")
    world.clock.advance(31)
    world.report("a")
    world.add_pod("q", {GPU: "2"})
    assert await world.bind("q", "a") == ""
    await world.until(lambda: world.service.truth.pods["uid-q"].node)
    await start_running(world, "q")
    await refuse(world, "r", "a")
    world.clock.advance(31)
    world.report("a")
    assert fitting(world, "again") == ["a", "b"]


async def test_pods_that_have_run_since_before_say_nothing_about_the_kubelet_now(world):
    world.add_pod("old", {GPU: "2"})
    assert await world.bind("old", "a") == ""
    await world.until(lambda: world.service.truth.pods["uid-old"].node)
    await start_running(world, "old")
    await refuse(world, "p", "a")
    world.kube.change_pod("old", lambda pod: pod["metadata"].update(labels={"some": "change"}))
    await world.until(lambda: world.service.truth.pods["uid-old"].resource_version == str(world.kube.version))
    assert fitting(world, "again") == ["b"]


async def test_pods_that_others_put_on_a_node_do_not_close_it(world):
    """A ReplicaSet whose pods name their node makes thousands of them once the node is full."""
    for number in range(3):
        world.add_pod(f"p{number}", {GPU: "2"}, spec={"nodeName": "a"})
        await world.until(lambda uid=f"uid-p{number}": uid in world.service.truth.pods)
        status = {"phase": "Failed", "reason": "OutOfnvidia.com/gpu", "message": WORDS}
        world.kube.change_pod(f"p{number}", lambda pod: pod.update(status=status))  # noqa: B023
        await world.until(lambda uid=f"uid-p{number}": world.service.truth.pods[uid].finished)
    assert world.service.refusals.count == 0
    assert fitting(world, "again") == ["a", "b"]


async def test_preemption_does_not_go_where_the_kubelet_refuses(world):
    await refuse(world, "p", "a")
    world.add_pod("q", {GPU: "2"})
    args = {"Pod": world.kube.pod("q"), "NodeNameToMetaVictims": {name: {"Pods": []} for name in ("a", "b")}}
    assert set(world.service.extender.preempt(parse_preempt(orjson.dumps(args)))) == {"b"}


async def test_what_a_kubelet_refused_before_our_time_is_past(world):
    await refuse(world, "p", "a")
    async with World({"a": "8xH100", "b": "8xH100"}, on=world.kube, lease_seconds=10_000).running() as after:
        assert fitting(after, "again") == ["a", "b"]
        assert after.kube.events == world.kube.events


async def test_the_pod_has_an_event_with_the_kubelets_words(world):
    await refuse(world, "p", "a")
    await world.until(lambda: world.kube.events)
    (event,) = world.kube.events
    assert event["reason"] == "KubeletRefused"
    assert event["regarding"]["uid"] == "uid-p"
    assert WORDS in event["note"]
    assert 'tangram_kubelet_refusals{state="total"} 1.0' in world.service.metrics.text().decode()


async def test_events_are_few_at_a_time_tried_again_and_never_waited_for(world):
    events = Events(instance="us")
    for number in range(MOST_WAITING + 5):
        events.tell(PodRef(f"u{number}", "default", f"p{number}"), reason="R", action="A", words="é" * 3000)
    assert events.dropped == 5

    def away() -> None:
        raise Unknown("the API server is away")

    world.kube.before["create_event"] = away
    await events.write(world.kube)
    world.kube.before.clear()
    await events.write(world.kube)
    assert [event["regarding"]["name"] for event in world.kube.events] == [f"p{5 + each}" for each in range(10)]
    assert len(world.kube.events[0]["note"].encode()) <= 1000

    def refused() -> None:
        raise Refused("no such namespace")

    world.kube.before["create_event"] = refused
    await events.write(world.kube)
    assert events.dropped == 15
