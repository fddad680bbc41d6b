"""Order lists carried out on the fake library: what shall be there is there, and what cannot be is said in words."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest

from app.agent.reading import Reading
from app.report import Failed, Make, OrderList, SliceAt, Switch
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.agent.session import Session, instances, order_list, places
from tests.fake_nvml.describe import Instance, NodeDescription, bus_id, describe

Place = tuple[str, str, int]


def small(kind: str, gpus: int = 2) -> NodeDescription:
    """The first GPUs of a sample node."""
    described = describe(sample_node("n1", kind))
    return replace(described, gpus=described.gpus[:gpus], ancestors={})


@pytest.fixture
def a100(bench: Bench) -> Session:
    """Two A100-40 in MIG mode, empty."""
    return Session(bench, small("8xA100-40-mig"))


@pytest.fixture
def h100(bench: Bench) -> Session:
    """Two H100, MIG off."""
    return Session(bench, small("8xH100"))


def test_a_slice_is_made_at_the_place_that_was_ordered(a100: Session) -> None:
    make = Make(gpu=a100.gpu(1), profile="3g.20gb", start=4)
    failed, after = a100.change(order_list(make=(make,)))
    assert failed == [[]]
    assert places(after.gpus[0]) == []
    (made,) = instances(after.gpus[1])
    assert (made.profile, made.start, made.size) == ("3g.20gb", 4, 4)
    assert made.uuid is not None
    assert [(one.slices, one.start, one.uuid) for one in made.compute] == [(3, 0, made.uuid)]


def test_being_told_again_changes_nothing(a100: Session) -> None:
    """A list is carried out again after every lost answer."""
    told = order_list(make=(Make(gpu=a100.gpu(0), profile="1g.5gb", start=3),))
    _, once = a100.change(told)
    failed, again = a100.change(told, told)
    assert failed == [[], []]
    assert instances(again.gpus[0]) == instances(once.gpus[0])


def test_every_order_of_making_ends_with_the_same_set(a100: Session) -> None:
    """Left to itself the driver places 1g, 1g, 2g so that the 3g finds no room (hardware.md 1.4)."""
    wanted = (("1g.5gb", 0), ("1g.5gb", 1), ("2g.10gb", 2), ("3g.20gb", 4))
    for way in (*list(permutations(wanted))[::6], wanted):
        make = tuple(Make(gpu=a100.gpu(0), profile=profile, start=start, group="pod") for profile, start in way)
        remove = tuple(SliceAt(gpu=a100.gpu(0), profile=profile, start=start) for profile, start in way)
        failed, after = a100.change(order_list(remove=remove), order_list(make=make))
        assert failed == [[], []]
        assert places(after.gpus[0]) == list(wanted)


def test_what_an_agent_left_half_made_is_completed(bench: Bench) -> None:
    """An agent that died between the two calls left a GPU instance without compute instance."""
    half = Instance(id=5, profile="2g.10gb", start=2, uuid=None, mig_index=0)
    session = Session(bench, small("8xA100-40-mig").with_gpu(0, instances=(half,)))
    assert [one.uuid for one in instances(session.read().gpus[0])] == [None]
    failed, after = session.change(order_list(make=(Make(gpu=session.gpu(0), profile="2g.10gb", start=2),)))
    assert failed == [[]]
    (whole,) = instances(after.gpus[0])
    assert whole.gi_id == 5
    assert whole.uuid is not None


def test_only_what_an_order_names_makes_room(a100: Session) -> None:
    gpu = a100.gpu(0)
    small_ones = tuple(Make(gpu=gpu, profile="1g.5gb", start=start) for start in (0, 1, 4))
    in_the_way = tuple(SliceAt(gpu=gpu, profile="1g.5gb", start=start) for start in (0, 1))
    large = Make(gpu=gpu, profile="3g.20gb", start=0, remove=in_the_way)
    failed, after = a100.change(order_list(make=small_ones), order_list(make=(large,)))
    assert failed == [[], []]
    assert places(after.gpus[0]) == [("3g.20gb", 0), ("1g.5gb", 4)]


def test_what_a_list_makes_it_does_not_remove(a100: Session) -> None:
    """Its pod has no process yet. The service orders no such thing; a list that does is not obeyed in that."""
    first = Make(gpu=a100.gpu(0), profile="1g.5gb", start=0)
    _, before = a100.change(order_list(make=(first,)))
    place = SliceAt(gpu=first.gpu, profile=first.profile, start=first.start)
    over = Make(gpu=a100.gpu(0), profile="2g.10gb", start=0, remove=(place,))
    (failed,), after = a100.change(order_list(make=(first, over), remove=(place,)))
    assert [one.profile for one in failed] == ["1g.5gb", "2g.10gb"]
    assert all("1g.5gb at 0 is to be there by the same list" in one.reason for one in failed)
    assert instances(after.gpus[0]) == instances(before.gpus[0])


def test_what_is_in_the_way_goes_also_when_the_first_slice_is_there_already(a100: Session) -> None:
    """The service names what is in the way on a GPU once, at its first slice; its report may be under way."""
    idle = Make(gpu=a100.gpu(0), profile="2g.10gb", start=2)
    first = Make(gpu=a100.gpu(0), profile="1g.5gb", start=0)
    way = SliceAt(gpu=idle.gpu, profile=idle.profile, start=idle.start)
    second = Make(gpu=a100.gpu(0), profile="1g.5gb", start=3)
    both = order_list(make=(first.model_copy(update={"remove": (way,)}), second))
    failed, after = a100.change(order_list(make=(idle, first)), both)
    assert failed == [[], []]
    assert places(after.gpus[0]) == [("1g.5gb", 0), ("1g.5gb", 3)]


def test_an_instance_in_use_is_never_removed(a100: Session) -> None:
    """Not when told to remove it, and not when told to make something in its place."""
    gpu = a100.gpu(0)
    used = Make(gpu=gpu, profile="2g.10gb", start=0)
    _, before = a100.change(order_list(make=(used,)))
    a100.control.process(4711, gpu=0, profile="2g.10gb", used_mib=300)
    larger = Make(gpu=gpu, profile="4g.20gb", start=0, remove=(SliceAt(gpu=gpu, profile="2g.10gb", start=0),))
    failed, after = a100.change(order_list(remove=(used,)), order_list(make=(larger,)))
    assert [[one.reason for one in of_list] for of_list in failed] == [["2g.10gb at 0 is in use by PID 4711"]] * 2
    assert [(one.uuid, one.processes[0].pid, one.processes[0].used_mib) for one in instances(after.gpus[0])] == [
        (instances(before.gpus[0])[0].uuid, 4711, 512)
    ]


def test_the_driver_has_the_last_word_on_what_is_in_use(a100: Session) -> None:
    used = Make(gpu=a100.gpu(0), profile="2g.10gb", start=0)
    a100.change(order_list(make=(used,)))
    a100.control.refuse_remove(0, "2g.10gb", 0)
    failed, after = a100.change(order_list(remove=(used,)))
    assert "removing the compute instance of 2g.10gb at 0: NVML:" in failed[0][0].reason
    assert "(19)" in failed[0][0].reason
    assert instances(after.gpus[0])[0].uuid is not None


def test_what_cannot_be_seen_is_not_taken_for_idle(a100: Session) -> None:
    used = Make(gpu=a100.gpu(0), profile="2g.10gb", start=0)
    a100.change(order_list(make=(used,)))
    a100.control.fail("nvmlDeviceGetComputeRunningProcesses_v3", 999)
    failed, after = a100.change(order_list(remove=(used,)))
    words = "whether 2g.10gb at 0 is in use cannot be seen: processes: Unknown Error (999)"
    assert [one.reason for one in failed[0]] == [words]
    assert places(after.gpus[0]) == [("2g.10gb", 0)]


def test_what_cannot_be_listed_is_not_taken_for_removed(a100: Session) -> None:
    a100.control.fail("nvmlDeviceGetGpuInstances", 999)
    failed, _ = a100.change(order_list(remove=(SliceAt(gpu=a100.gpu(0), profile="1g.5gb", start=0),)))
    assert failed[0][0].reason.startswith("the instances of this GPU cannot be listed: MIG instances: Unknown Error")


def test_a_mode_that_cannot_be_read_is_not_taken_for_no_mig(a100: Session) -> None:
    place = SliceAt(gpu=a100.gpu(0), profile="1g.5gb", start=0)
    a100.control.fail("nvmlDeviceGetMigMode", 999)
    told = order_list(
        remove=(place,),
        make=(Make(gpu=place.gpu, profile="1g.5gb", start=1),),
        switch=(Switch(gpu=place.gpu, enabled=True),),
    )
    failed, _ = a100.change(told)
    assert [one.reason for one in failed[0]] == ["MIG mode: Unknown Error (999)"] * 3


def test_an_instance_that_took_anothers_ids_is_seen_as_it_is(a100: Session) -> None:
    """Ids are used again: what was kept of the first must not be said of the second."""
    first = Make(gpu=a100.gpu(0), profile="3g.20gb", start=4)
    second = Make(gpu=a100.gpu(0), profile="2g.10gb", start=4, remove=(SliceAt(**first.model_dump()),))
    found = a100.python(
        "result = [[change(n), read()][1] for n in range(2)]", order_list(make=(first,)), order_list(make=(second,))
    )
    made = [instances(Reading.model_validate(one).gpus[0])[0] for one in found]
    assert made[0].gi_id == made[1].gi_id
    assert [(one.profile, one.compute[0].slices) for one in made] == [("3g.20gb", 3), ("2g.10gb", 2)]


def test_what_is_not_there_counts_as_removed(a100: Session) -> None:
    failed, after = a100.change(order_list(remove=(SliceAt(gpu=a100.gpu(0), profile="1g.5gb", start=2),)))
    assert failed == [[]]
    assert places(after.gpus[0]) == []


def test_a_group_is_made_together_or_not_at_all(a100: Session) -> None:
    """A pod with half of its slices is of no use; what another pod gets stays."""
    a100.control.refuse_make(1, "3g.20gb", 4)
    gpu = a100.gpu(0)
    make = (
        Make(gpu=gpu, profile="1g.5gb", start=0, group="pod-a"),
        Make(gpu=gpu, profile="1g.5gb", start=1, group="pod-b"),
        Make(gpu=a100.gpu(1), profile="3g.20gb", start=4, group="pod-a"),
        Make(gpu=gpu, profile="1g.5gb", start=2, group="pod-a"),
    )
    failed, after = a100.change(order_list(make=make))
    assert [(one.gpu, one.profile, one.start) for one in failed[0]] == [
        (gpu, "1g.5gb", 0), (a100.gpu(1), "3g.20gb", 4), (gpu, "1g.5gb", 2)
    ]  # fmt: skip
    assert len({one.reason for one in failed[0]}) == 1
    assert "making 3g.20gb at 4: NVML:" in failed[0][0].reason
    assert (places(after.gpus[0]), places(after.gpus[1])) == ([("1g.5gb", 1)], [])


def test_a_group_that_fails_leaves_what_was_there_before(a100: Session) -> None:
    there = Make(gpu=a100.gpu(0), profile="1g.5gb", start=0, group="pod")
    impossible = Make(gpu=a100.gpu(0), profile="3g.20gb", start=1, group="pod")
    failed, after = a100.change(order_list(make=(there,)), order_list(make=(there, impossible)))
    assert len(failed[1]) == 2
    assert places(after.gpus[0]) == [("1g.5gb", 0)]


def test_a_gpu_instance_goes_again_when_its_compute_instance_fails(a100: Session) -> None:
    a100.control.fail("nvmlGpuInstanceCreateComputeInstance", 999, times=1)
    told = order_list(make=(Make(gpu=a100.gpu(0), profile="2g.10gb", start=4),))
    failed, after = a100.change(told)
    assert failed[0][0].reason == "making the compute instance of 2g.10gb at 4: NVML: Unknown Error (999)"
    assert places(after.gpus[0]) == []
    failed, _ = a100.change(told)
    assert failed == [[]], "the next time it is made"


def test_whatever_fails_between_the_two_calls_leaves_nothing(a100: Session) -> None:
    """Not only the second call itself: that its profile cannot be found, too."""
    a100.control.fail("nvmlGpuInstanceGetComputeInstanceProfileInfoV", 999)
    failed, after = a100.change(order_list(make=(Make(gpu=a100.gpu(0), profile="2g.10gb", start=4),)))
    words = "making the compute instance of 2g.10gb at 4: NVML: Unknown Error (999)"
    assert [one.reason for one in failed[0]] == [words]
    assert places(after.gpus[0]) == []


def test_what_cannot_be_undone_is_said(a100: Session) -> None:
    a100.control.fail("nvmlGpuInstanceCreateComputeInstance", 999)
    a100.control.refuse_remove(0, "2g.10gb", 4)
    failed, after = a100.change(order_list(make=(Make(gpu=a100.gpu(0), profile="2g.10gb", start=4),)))
    assert "(999); not removed again: removing 2g.10gb at 4: NVML:" in failed[0][0].reason
    assert [one.uuid for one in instances(after.gpus[0])] == [None]


def test_an_agent_that_dies_between_the_two_calls_finishes_when_told_again(a100: Session) -> None:
    told = order_list(make=(Make(gpu=a100.gpu(0), profile="2g.10gb", start=4),))
    a100.control.die("nvmlDeviceCreateGpuInstanceWithPlacement")
    a100.dies("change(0)", told)
    assert [one.uuid for one in instances(a100.read().gpus[0])] == [None]
    failed, after = a100.change(told)
    assert failed == [[]]
    assert [one.uuid is not None for one in instances(after.gpus[0])] == [True]


def test_no_room_says_what_is_there(a100: Session) -> None:
    there = Make(gpu=a100.gpu(0), profile="2g.10gb", start=2)
    failed, _ = a100.change(
        order_list(make=(there,)), order_list(make=(Make(gpu=a100.gpu(0), profile="3g.20gb", start=0),))
    )
    assert failed[1][0].reason.startswith("making 3g.20gb at 0: NVML:")
    assert failed[1][0].reason.endswith("(23); there is 2g.10gb at 2")


def test_an_order_that_cannot_be_says_what_was_wanted_and_what_was_found(bench: Bench) -> None:
    described = small("8xA100-40-mig", gpus=3).with_gpu(1, mig=False).with_gpu(2, lost=True)
    session = Session(bench, described)
    wanted = ((0, "5g.25gb", 0), (0, "3g.20gb", 2), (1, "1g.5gb", 0), (2, "1g.5gb", 0))
    make = tuple(Make(gpu=session.gpu(gpu), profile=profile, start=start) for gpu, profile, start in wanted)
    failed, _ = session.change(order_list(make=make))
    reasons = [one.reason for one in failed[0]]
    assert "5g.25gb at 0 is wanted, and this board has 1g.5gb, 2g.10gb," in reasons[0]
    assert reasons[1] == "3g.20gb cannot start at 2 on this board; it can at 0, 4"
    assert reasons[2] == "1g.5gb at 0 is wanted, and MIG is off on this GPU"
    assert reasons[3].startswith(f"no GPU {session.gpu(2)} can be read on this node; there are {session.gpu(0)}")


def test_a_board_without_mig_is_told_so(bench: Bench) -> None:
    session = Session(bench, small("8xL40S"))
    make = (Make(gpu=session.gpu(0), profile="1g.5gb", start=0),)
    switch = (Switch(gpu=session.gpu(1), enabled=True),)
    failed, after = session.change(order_list(make=make, switch=switch))
    assert [one.reason for one in failed[0]] == [
        "MIG cannot be turned on: this board has no MIG",
        "1g.5gb at 0 is wanted, and this board has no MIG",
    ]
    assert (after.makes_slices, after.makes_none) == (False, "no GPU of this node can do MIG")


def test_without_the_capability_it_sees_and_cannot_change(a100: Session) -> None:
    """A container without mig/config lists everything; only the first order shows that it may not change it."""
    a100.control.configures(False)
    assert a100.read().makes_slices
    failed, after = a100.change(order_list(make=(Make(gpu=a100.gpu(0), profile="1g.5gb", start=0),)))
    for words in (failed[0][0].reason, after.makes_none):
        assert "it can see and cannot change" in words
        assert "NVIDIA_MIG_CONFIG_DEVICES=all and CAP_SYS_ADMIN" in words
    assert not after.makes_slices


def test_without_privileges_nothing_is_taken_for_empty(a100: Session) -> None:
    """What cannot be listed may be there: an order to remove it has not been carried out."""
    place = SliceAt(gpu=a100.gpu(0), profile="1g.5gb", start=0)
    a100.control.privileged(False)
    failed, after = a100.change(order_list(remove=(place,)))
    assert "it can see and cannot change" in failed[0][0].reason
    assert not after.makes_slices


def test_nvml_failing_fails_every_order_in_words(a100: Session) -> None:
    a100.bench.describe(a100.description.with_rules("fail nvmlInitWithFlags 9"))
    place = SliceAt(gpu=a100.gpu(0), profile="1g.5gb", start=0)
    told = order_list(make=(Make(**place.model_dump()),), remove=(place,), switch=(Switch(gpu="g", enabled=True),))
    found = a100.python("result = [change(0), read()['error']]", told)
    assert [one["reason"] for one in found[0]] == ["NVML: Driver Not Loaded (9)"] * 3
    assert found[1] == "NVML: Driver Not Loaded (9)"


# ---- whatever is told ----

GRID = (("1g.5gb", range(7)), ("2g.10gb", (0, 2, 4)), ("3g.20gb", (0, 4)), ("4g.20gb", (0,)), ("7g.40gb", (0,)))
PLACES = tuple((profile, start) for profile, starts in GRID for start in starts)


def told_at_random(gpus: tuple[str, ...], rng: Random) -> OrderList:
    """Orders that need not make sense together; but no place is for two, and none is to be made and removed."""
    places = [SliceAt(gpu=gpu, profile=profile, start=start) for gpu in gpus for profile, start in PLACES]
    rng.shuffle(places)
    wanted, unwanted = places[:5], places[5:]
    make = tuple(
        Make(
            **place.model_dump(),
            group=rng.choice(("", "pod-a", "pod-b")),
            remove=tuple(other for other in rng.sample(unwanted, 4) if other.gpu == place.gpu),
        )
        for place in wanted[: rng.randrange(1, 6)]
    )
    return order_list(make=make, remove=tuple(unwanted[: rng.randrange(4)]))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_told_nothing_is_lost_that_was_in_use_or_not_named(a100: Session, seed: int) -> None:
    """After each of many lists: no overlap; what was used or not named is as before; what did not fail is as told."""
    rng = Random(seed)
    gpus = (a100.gpu(0), a100.gpu(1))
    used = ((0, "2g.10gb", 2), (1, "1g.5gb", 6))
    first = order_list(make=tuple(Make(gpu=gpus[gpu], profile=profile, start=start) for gpu, profile, start in used))
    for number, (gpu, profile, start) in enumerate(used):
        a100.control.process(100 + number, gpu=gpu, profile=profile, start=start)
    lists = [first, *(told_at_random(gpus, rng) for _ in range(40))]
    found = a100.python(f"result = [[change(number), read()] for number in range({len(lists)})]", *lists)
    before: dict[Place, str | None] = {}
    for told, (said, read) in zip(lists, found, strict=True):
        failed = {place_of(Failed.model_validate(one)) for one in said}
        after = uuids(Reading.model_validate(read))
        assert not_overlapping(Reading.model_validate(read))
        named = {place_of(place) for make in told.make for place in make.remove} | set(map(place_of, told.remove))
        kept = set(before) - (named - {(gpus[gpu], profile, start) for gpu, profile, start in used})
        assert {place: after.get(place) for place in kept} == {place: before[place] for place in kept}
        made = {place_of(make) for make in told.make} - failed
        assert made <= set(after) <= made | set(before)
        assert None not in after.values()
        before = after
    assert len(before) >= len(used)


def place_of(place: SliceAt | Failed) -> Place:
    return (place.gpu, place.profile, place.start)


def uuids(reading: Reading) -> dict[Place, str | None]:
    return {(gpu.uuid, one.profile, one.start or 0): one.uuid for gpu in reading.gpus for one in instances(gpu)}


def not_overlapping(reading: Reading) -> bool:
    for gpu in reading.gpus:
        taken = [(one.start or 0) + unit for one in instances(gpu) for unit in range(one.size or 0)]
        if len(set(taken)) != len(taken):
            return False
    return True


# ---- modes ----


def test_an_idle_hopper_is_switched_and_sliced_in_one_list(h100: Session) -> None:
    """Its handle ends with the switch; the others keep their links."""
    before = h100.read()
    assert before.gpus[0].mig is not None
    assert (before.gpus[0].mig.switches, before.gpus[0].mig.note) == (True, "")
    told = order_list(
        switch=(Switch(gpu=h100.gpu(0), enabled=True),),
        make=(Make(gpu=h100.gpu(0), profile="3g.40gb", start=0),),
    )
    failed, after = h100.change(told)
    assert failed == [[]]
    assert after.gpus[0].mig is not None
    assert after.gpus[0].mig.enabled
    assert places(after.gpus[0]) == [("3g.40gb", 0)]
    assert after.gpus[0].nvlink is not None
    assert after.gpus[0].nvlink.out_of_mesh, "MIG ends peer-to-peer"


def test_after_a_switch_nothing_of_before_is_believed(h100: Session) -> None:
    """The GPU may have been reset: its minor number may be another. Peer-to-peer has ended, for its peers, too. Our own
    event set, which holds the GPU open, is let go of first."""
    told = order_list(switch=(Switch(gpu=h100.gpu(1), enabled=True),))
    found = h100.python(
        """
before = read()
control.set(1, "minor", 7)
failed = change(0)
result = [failed, before, read(), calls("nvmlEventSetFree"), calls("nvmlEventSetCreate")]
""",
        told,
    )
    before, after = (Reading.model_validate(one) for one in found[1:3])
    assert found[0] == []
    assert [[link.p2p for link in reading.links] for reading in (before, after)] == [[True], [False]]
    assert [reading.gpus[1].minor for reading in (before, after)] == [1, 7]
    assert found[3:] == [1, 2]


def test_a_gpu_is_switched_off_only_when_it_is_empty(h100: Session) -> None:
    slice_ = Make(gpu=h100.gpu(0), profile="1g.10gb", start=0)
    on, off = Switch(gpu=h100.gpu(0), enabled=True), Switch(gpu=h100.gpu(0), enabled=False)
    failed, after = h100.change(order_list(switch=(on,), make=(slice_,)), order_list(switch=(off,)))
    assert failed[0] == []
    assert [(one.profile, one.reason) for one in failed[1]] == [
        ("", "MIG cannot be turned off while there are instances: there is 1g.10gb at 0")
    ]
    assert places(after.gpus[0]) == [("1g.10gb", 0)]
    failed, after = h100.change(order_list(remove=(slice_,)), order_list(switch=(off,)))
    assert failed == [[], []]
    assert after.gpus[0].mig is not None
    assert not after.gpus[0].mig.enabled


def test_a_gpu_in_use_is_not_switched(h100: Session) -> None:
    h100.control.process(77, gpu=0)
    failed, after = h100.change(order_list(switch=(Switch(gpu=h100.gpu(0), enabled=True),)))
    assert [one.reason for one in failed[0]] == ["the GPU is in use by PID 77"]
    assert after.gpus[0].mig is not None
    assert (after.gpus[0].mig.enabled, after.gpus[0].mig.pending) == (False, False)


def test_a_switch_that_does_not_take_is_put_back(bench: Bench) -> None:
    """Something holds the GPU that its process lists do not show: the mode must not change at some later reset."""
    bench = Bench(bench.directory, without=("nvmlDeviceGetMPSComputeRunningProcesses_v3",))
    session = Session(bench, small("8xH100"))
    session.control.process(77, gpu=0, kind="m")
    failed, after = session.change(order_list(switch=(Switch(gpu=session.gpu(0), enabled=True),)))
    assert failed[0][0].reason.startswith("turning MIG on did not take effect: something on the node holds the GPU")
    assert failed[0][0].reason.endswith("; it was put back")
    assert after.gpus[0].mig is not None
    assert (after.gpus[0].mig.enabled, after.gpus[0].mig.pending) == (False, False)


def test_ampere_is_switched_by_an_operator(bench: Bench) -> None:
    session = Session(bench, small("8xA100"))
    failed, after = session.change(order_list(switch=(Switch(gpu=session.gpu(0), enabled=True),)))
    command = "nvidia-smi -i 0000:10:00.0 -mig 1, nvidia-smi --gpu-reset -i 0000:10:00.0"
    assert after.gpus[0].mig is not None
    assert not after.gpus[0].mig.switches
    for words in (failed[0][0].reason, after.gpus[0].mig.note):
        assert "drain the node" in words
        assert command in words
    assert after.gpus[0].mig.pending is False


def test_a_long_refusal_is_cut_to_what_a_report_may_hold(bench: Bench) -> None:
    """The words name every GPU of the node; sixteen UUIDs are more than a report takes."""
    described = small("8xH100", gpus=8)
    more = tuple(replace(gpu, uuid=f"{gpu.uuid}-again", bus_id=bus_id(8 + at)) for at, gpu in enumerate(described.gpus))
    session = Session(bench, replace(described, gpus=(*described.gpus, *more)))
    (failed,), after = session.change(order_list(switch=(Switch(gpu="GPU-of-another-node", enabled=True),)))
    assert [(one.gpu, len(one.reason)) for one in failed] == [("GPU-of-another-node", 500)]
    assert len(after.gpus) == 16
