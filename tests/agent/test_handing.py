"""What the kubelet is answered, with the real decisions, a kubelet's rules and a service's: `node_at_work`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from app.agent.gift import CannotHand
from app.agent.handing import Handing, Waits
from app.agent.record import NAME, RecordFile
from app.report import Placements
from tests.agent.node_at_work import Container, Giver, Pod, World, part, taking, whole

GPU = "nvidia.com/gpu"
SLICE = "nvidia.com/mig-1g.10gb"


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.close()


@pytest.fixture
def patient() -> Iterator[World]:
    """With some time to wait, of the real clock's kind."""
    world = World(waits=Waits(name=2, room=2, ready=2, answer=0.3, reach=0.1, again=0.05, look=0.05))
    numbers = count()
    world._clock = lambda: next(numbers) * 0.01  # type: ignore[method-assign]
    world.handing = world._agent()
    yield world
    world.close()


def soon(act: Callable[[], None]) -> None:
    """While somebody waits."""
    timer = threading.Timer(0.1, act)
    timer.daemon = True
    timer.start()


def test_a_placed_pod_gets_its_placement_although_others_are_free(world: World) -> None:
    pod = world.place("p", whole("w-1"))
    assert world.admit(pod) == {f"main {GPU}": (whole("w-1"),)}
    assert world.counts() == {"placed": 1, "only-one": 1}
    assert not world.service.asked


def test_an_exchange_for_what_is_free_follows_the_kubelet(world: World) -> None:
    pod = world.place("p", whole("w-1"))
    assert world.admit(pod, taking("w-0")) == {f"main {GPU}": (whole("w-0"),)}
    assert world.hows() == {"p": "free"}
    assert world.service.pods[pod.uid].devices == (whole("w-0"),)


def test_an_exchange_with_a_pod_that_waits_leaves_both_with_what_the_kubelet_counts(world: World) -> None:
    """The other's next call is answered by the new promise, even if the list that says so is still on its way."""
    world.place("p", whole("w-0"))
    q = world.place("q", whole("w-1"))
    world.told = False
    world.admit(q, taking("w-0"))
    p = next(one for one in world.service.pods.values() if one.name == "p")
    assert p.devices == (whole("w-1"),)
    got = world.admit(Pod(p.uid, "p", (Container("main", {GPU: 1}),)))
    assert got == {f"main {GPU}": (whole("w-1"),)}
    assert world.hows() == {"p": "placed", "q": "swapped"}


def test_a_refused_exchange_leaves_the_placement_and_says_what_the_kubelet_counts(world: World) -> None:
    world.service.says = "refuse"
    pod = world.place("p", part("m-0", "1g.10gb", 3))
    assert world.admit(pod, taking("m-1/1g.10gb@6")) == {f"main {SLICE}": (part("m-0", "1g.10gb", 3),)}
    (said,) = world.handing.said().handed
    assert (said.how, said.ids) == ("overridden", ("m-1/1g.10gb@6",))


def test_what_a_pod_was_handed_is_not_exchanged_before_the_service_has_heard_of_it(world: World) -> None:
    world.service.says = "refuse"
    first = world.place("first", whole("w-0"))
    world.admit(first, taking("w-1"))
    world.service.says = "grant"
    world.service.handed.clear()
    second = world.place("second", whole("w-1"))
    assert world.admit(second, taking("w-0")) == {f"main {GPU}": (whole("w-1"),)}
    assert world.hows() == {"first": "overridden", "second": "overridden"}


def test_a_pod_gets_its_own_devices_although_the_kubelet_still_listed_the_one_before_of_that_name(world: World) -> None:
    old = world.place("x-0", whole("w-0"))
    world.admit(old)
    world.service.pods.pop(old.uid)
    new = world.place("x-0", whole("w-1"))
    world.agree()
    assert [(one.uid, one.devices) for one in world.handing.said().handed] == [(old.uid, (whole("w-0"),))]
    world.kubelet.forget(old.uid)
    assert world.admit(new) == {f"main {GPU}": (whole("w-1"),)}
    assert [one.uid for one in world.handing.said().handed] == [new.uid]


def test_what_was_certainly_not_asked_is_a_refusal_and_what_may_have_been_is_none(world: World) -> None:
    """The outcome of an exchange is never guessed."""
    world.service.says = "down"
    first = world.place("first", whole("w-0"))
    assert world.admit(first, taking("w-1")) == {f"main {GPU}": (whole("w-0"),)}
    world.end(first)
    world.service.says = "lost"
    second = world.place("second", whole("w-0"))
    with pytest.raises(CannotHand, match="is not known: the connection was reset"):
        world.admit(second, taking("w-1"))
    assert world.hows() == {}


def test_an_answer_that_was_lost_is_asked_for_again(patient: World) -> None:
    patient.service.says = "lost"
    pod = patient.place("p", whole("w-1"))
    soon(lambda: setattr(patient.service, "says", "grant"))
    assert patient.admit(pod, taking("w-0")) == {f"main {GPU}": (whole("w-0"),)}
    assert len(patient.service.asked) > 1
    assert len(set(map(str, patient.service.asked))) == 1, "the same question"


def test_a_pod_that_the_service_has_not_named_yet_is_waited_for(patient: World) -> None:
    patient.told = False
    pod = patient.place("p", whole("w-1"))
    soon(lambda: patient.tell(always=True))
    assert patient.admit(pod) == {f"main {GPU}": (whole("w-1"),)}
    assert patient.counts() == {"placed": 1, "waited": 1}


def test_a_pod_is_waited_for_although_the_one_just_before_it_was_unknown(patient: World) -> None:
    patient.admit(patient.pod("stranger", Container("main", {GPU: 1})))
    patient.told = False
    pod = patient.place("p", whole("w-1"))
    soon(lambda: patient.tell(always=True))
    patient.admit(pod)
    assert patient.counts() == {"unplaced": 1, "nobody": 1, "placed": 1, "waited": 1}


def test_a_slice_that_is_being_made_is_waited_for(patient: World) -> None:
    slice_ = part("m-0", "1g.10gb", 3)
    pod = patient.pod("p", Container("main", {SLICE: 1}))
    patient.handing.placements(Placements(service="s", version=1, pods=(pod.at([slice_]),)))

    def made() -> None:
        patient.service.pods[pod.uid] = pod.at([slice_])
        patient.look()

    soon(made)
    assert patient.admit(pod, taking("m-0/1g.10gb@3")) == {f"main {SLICE}": (slice_,)}


def test_a_slice_that_never_comes_is_a_refusal_in_words_and_no_record(world: World) -> None:
    pod = world.pod("p", Container("main", {SLICE: 1}))
    world.handing.placements(Placements(service="s", version=1, pods=(pod.at([part("m-0", "1g.10gb", 3)]),)))
    with pytest.raises(CannotHand, match="is not there"):
        world.admit(pod)
    assert world.handing.said().handed == ()
    assert world.counts()["refused"] == 1


def test_a_device_that_another_pod_is_about_to_leave_is_waited_for(patient: World) -> None:
    """The ledger hands it on when the pod has ended; the kubelet may say so a moment later."""
    old = patient.place("old", whole("w-0"))
    patient.admit(old)
    ids = patient.kubelet.counted.pop((old.uid, "main", GPU))
    patient.kubelet.counted[old.uid, "main", GPU + ".elsewhere"] = ids
    patient.service.pods.pop(old.uid)
    new = patient.place("new", whole("w-0"))
    patient.kubelet.counted[old.uid, "main", GPU] = patient.kubelet.counted.pop((old.uid, "main", f"{GPU}.elsewhere"))
    soon(lambda: patient.end(old))
    patient.service.says = "refuse"
    assert patient.admit(new, taking("w-1")) == {f"main {GPU}": (whole("w-0"),)}


def test_a_pod_that_nobody_placed_gets_what_is_free_and_promised_to_nobody(world: World) -> None:
    world.place("p", whole("w-0"))
    stranger = world.pod("stranger", Container("main", {GPU: 1}))
    assert world.admit(stranger) == {f"main {GPU}": (whole("w-1"),)}
    world.agree()
    (said,) = world.handing.said().handed
    assert (said.name, said.uid, said.how) == ("stranger", "", "unplaced"), "named by what the kubelet lists"
    assert world.counts() == {"unplaced": 1, "nobody": 1}
    another = world.pod("another", Container("main", {GPU: 1}))
    with pytest.raises(CannotHand, match="promised to default/p"):
        world.admit(another, taking("w-0"))


def test_init_containers_sidecars_and_siblings_share_a_placement_as_the_kubelet_does(world: World) -> None:
    containers = [
        Container("fetch", {GPU: 2}, "init"),
        Container("proxy", {SLICE: 1}, "sidecar"),
        Container("one", {GPU: 1}),
        Container("two", {GPU: 1, SLICE: 1}),
    ]
    devices = [whole("w-0"), whole("w-1"), part("m-0", "1g.10gb", 2), part("m-1", "1g.10gb", 5)]
    got = world.admit(world.place("p", *devices, containers=containers))
    assert set(got[f"fetch {GPU}"]) == {whole("w-0"), whole("w-1")}
    assert {*got[f"one {GPU}"], *got[f"two {GPU}"]} == {whole("w-0"), whole("w-1")}
    assert {*got[f"proxy {SLICE}"], *got[f"two {SLICE}"]} == set(devices[2:])
    assert world.counts()["placed"] == 5


def test_a_container_that_is_asked_for_again_gets_the_same_devices(world: World) -> None:
    """The kubelet has lost its checkpoint, and the container is started again: it does not run meanwhile."""
    pod = world.place("p", whole("w-1"))
    first = world.admit(pod)
    world.running.clear()
    world.look()
    world.kubelet.counted.clear()
    assert world.admit(pod, taking("w-0")) == first
    assert world.hows() == {"p": "overridden"}
    assert world.counts()["again"] == 1
    assert not world.service.asked


def test_of_two_that_the_kubelet_has_forgotten_the_one_that_does_not_run_is_asked_for(world: World) -> None:
    first, second = world.place("first", whole("w-0")), world.place("second", whole("w-1"))
    world.admit(first)
    world.admit(second)
    world.kubelet.counted.clear()
    world.running.pop(second.uid)
    world.look()
    assert world.admit(second) == {f"main {GPU}": (whole("w-1"),)}


def test_a_running_containers_devices_are_not_handed_out_again(world: World) -> None:
    """A kubelet that has lost its checkpoint asks for somebody whom nobody has named; the one it forgot still runs."""
    world.admit(world.place("p", whole("w-1")))
    world.kubelet.counted.clear()
    stranger = world.pod("stranger", Container("main", {GPU: 1}))
    with pytest.raises(CannotHand, match="in use"):
        world.admit(stranger, taking("w-1"))


def test_a_restarted_agent_knows_what_was_promised_and_handed_without_anybody(world: World) -> None:
    handed = world.place("handed", whole("w-0"))
    world.admit(handed)
    waiting = world.place("waiting", whole("w-1"))
    world.told, world.kubelet.silent, world.service.says = False, True, "down"
    world.restart()
    assert world.hows() == {"handed": "placed"}
    assert world.admit(waiting) == {f"main {GPU}": (whole("w-1"),)}


def test_a_restarted_agent_knows_whom_it_has_refused(world: World) -> None:
    """The kubelet may list a failed pod, as lacking its devices, longer than the agent lives."""
    failed = world.place("failed", whole("w-0"))
    world.service.says = "lost"
    with pytest.raises(CannotHand):
        world.admit(failed, taking("w-1"))
    world.service.says = "grant"
    world.restart()
    world.service.pods[failed.uid] = failed.at([whole("w-0")])
    other = world.place("other", whole("w-1"))
    assert world.admit(other, taking("w-0", "w-1")) != {}
    assert world.counts()["only-one"] == 1


def test_an_exchange_outlives_the_agent(world: World) -> None:
    """The list on the disk is that of after it."""
    pod = world.place("p", whole("w-0"), part("m-0", "1g.10gb", 0))
    world.told = False
    world.admit(pod, taking("w-1", "m-0/1g.10gb@0"))
    kept = json.loads((world.directory / NAME).read_text())
    assert {one["gpu"] for one in kept["placements"]["pods"][0]["devices"]} == {"w-1", "m-0"}


def test_nothing_is_handed_out_that_cannot_be_remembered(world: World) -> None:
    class FullDisk(RecordFile):
        def keep(self, *_: object) -> None:
            raise OSError("no space left on device")

    world.handing = Handing(
        report=world.report,
        kubelet=world.kubelet,
        giver=Giver(),
        exchange=world.service.exchange,
        record=FullDisk(world.directory, node="n1"),
        waits=world.waits,
    )
    pod = world.place("p", whole("w-0"))
    with pytest.raises(CannotHand, match="no space left"):
        world.admit(pod)
    assert world.handing.said().handed == ()


@pytest.mark.parametrize("text", ["", "{", '{"node": "n2", "held": []}', '{"node": "n1", "held": [{"ids": 3}]}'])
def test_a_damaged_file_is_left_aside_and_the_kubelets_list_stands_in(world: World, text: str) -> None:
    world.admit(world.place("p", whole("w-0")))
    (world.directory / NAME).write_text(text)
    world.restart()
    assert world.hows() == {}
    world.agree()
    assert world.hows() == {"p": "observed"}


def test_the_report_says_the_same_thing_while_nothing_changes(world: World) -> None:
    for name in ("b", "a"):
        world.admit(world.place(name, whole(f"w-{int(name == 'a')}")))
    said = world.handing.said()
    world.agree()
    assert world.handing.said() is said
    assert [one.name for one in said.handed] == ["a", "b"]


def test_a_silent_kubelet_is_said_and_does_not_stop_placed_pods(world: World) -> None:
    world.kubelet.silent = True
    pod = world.place("p", whole("w-1"))
    world.admit(pod)
    assert world.handing.said().none == "nobody listens"
    world.kubelet.silent = False
    world.agree()
    assert world.handing.said().none == ""


def test_two_pods_that_could_not_be_told_apart_are_put_right_by_the_kubelets_list(world: World) -> None:
    world.kubelet.silent = True
    world.place("older", whole("w-0"))
    newer = world.place("newer", whole("w-1"))
    assert world.admit(newer) == {f"main {GPU}": (whole("w-0"),)}, "taken for the older one"
    assert world.counts() == {"placed": 1, "ids": 1}
    world.kubelet.silent = False
    world.agree()
    assert world.hows() == {"newer": "placed"}
    assert world.counts()["moved"] == 1


def test_a_container_with_the_devices_of_its_init_container_has_not_been_mistaken(world: World) -> None:
    containers = Container("prepare", {GPU: 1}, "init"), Container("main", {GPU: 1})
    world.admit(world.place("p", whole("w-0"), containers=containers))
    other = world.place("q", whole("w-1"))
    world.admit(other)
    world.end(other)
    world.agree()
    assert world.hows() == {"p": "placed"}
    assert "moved" not in world.counts()


# -- one environment variable for all devices of a container --------------------------------------------------


THIRD = "nvidia.com/mig-3g.40gb"


@pytest.fixture
def by_environment() -> Iterator[World]:
    world = World()
    world.by_environment = True
    world.handing = world._agent()
    yield world
    world.close()


def test_each_answer_names_all_devices_of_a_container_that_asks_for_several_resources(by_environment: World) -> None:
    """The kubelet keeps one of two values of NVIDIA_VISIBLE_DEVICES, so both must be the same."""
    devices = part("m-0", "1g.10gb", 0), part("m-0", "3g.40gb", 4)
    got = by_environment.admit(by_environment.place("p", *devices))
    assert set(got) == {f"main {SLICE}", f"main {THIRD}"}
    for answer in got.values():
        assert answer == devices
    assert [set(one.devices) for one in by_environment.handing.said().handed] == [{devices[0]}, {devices[1]}]


@pytest.mark.parametrize("order", [(SLICE, THIRD), (THIRD, SLICE)])
def test_what_an_init_container_has_used_is_named_as_well(by_environment: World, order: tuple[str, str]) -> None:
    """The kubelet asks for a container's resources in any order, and uses an init container's devices again."""
    devices = part("m-0", "1g.10gb", 0), part("m-0", "3g.40gb", 4)
    containers = Container("prepare", {SLICE: 1}, "init"), Container("main", dict.fromkeys(order, 1))
    got = by_environment.admit(by_environment.place("p", *devices, containers=containers))
    assert got.pop(f"prepare {SLICE}") == devices[:1]
    assert set(got.values()) == {devices}


def test_what_the_first_answer_has_named_stays_whatever_the_kubelet_takes_next(by_environment: World) -> None:
    devices = part("m-0", "1g.10gb", 0), part("m-0", "3g.40gb", 4)
    pod = by_environment.place("p", *devices)
    got = by_environment.admit(pod, taking("m-1/1g.10gb@3", "m-1/3g.40gb@4"))
    assert set(got.values()) == {devices}
    assert not by_environment.service.asked
    assert by_environment.counts()["overridden"] == 2


def test_a_container_with_several_resources_that_nobody_placed_is_refused_in_words(by_environment: World) -> None:
    pod = by_environment.place("p", part("m-0", "1g.10gb", 0), part("m-0", "3g.40gb", 4))
    unplaced = by_environment.service.pods[pod.uid].model_copy(update={"devices": ()})
    by_environment.service.pods[pod.uid] = unplaced
    by_environment.tell()
    with pytest.raises(CannotHand, match="hand-over=cdi has no such limit"):
        by_environment.admit(pod)
