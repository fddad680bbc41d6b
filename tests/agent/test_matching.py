"""Which pod it is, what it is to have, and whose device is whose."""

from __future__ import annotations

from collections.abc import Mapping

from app.agent.matching import (
    Ask,
    Give,
    Held,
    Listed,
    Match,
    Not,
    Scene,
    blocked,
    decide,
    exchanged,
    observed,
    overlap,
    preferred,
    settle,
    who,
)
from app.report import ContainerAsk, DeviceAt, Instance, NodeReport, PodAt
from tests.agent.node_at_work import mixed_report, part, whole

GPU = "nvidia.com/gpu"
REPORT = mixed_report(4, 2)


def with_slice(of: str, profile: str, start: int) -> NodeReport:
    """The node with one slice made."""
    made = Instance(profile=profile, gi_id=1, start=start, size=1, uuid=f"MIG-{start}")
    gpus = [
        gpu.model_copy(update={"mig": gpu.mig.model_copy(update={"instances": (made,)})})
        if gpu.uuid == of and gpu.mig is not None
        else gpu
        for gpu in REPORT.gpus
    ]
    return REPORT.model_copy(update={"gpus": tuple(gpus)})


def pod(name: str, *devices: DeviceAt, asks: Mapping[str, int] | None = None, resource: str = GPU) -> PodAt:
    counts = asks or {"main": max(1, len(devices))}
    containers = tuple(ContainerAsk(name=one, resources={resource: size}) for one, size in counts.items())
    return PodAt(uid=f"uid-{name}", namespace="default", name=name, devices=devices, containers=containers)


def held(of: PodAt, *devices: DeviceAt, container: str = "main", ids: tuple[str, ...] | None = None) -> Held:
    counted = ids if ids is not None else tuple(one.gpu for one in devices)
    return Held(
        uid=of.uid,
        namespace="default",
        name=of.name,
        container=container,
        resource=GPU,
        devices=devices,
        ids=counted,
        how="placed",
    )


def shows(*pods: PodAt, **counted: tuple[str, ...]) -> Listed:
    """What the kubelet lists: these pods, with a container main that has the ids given for it."""
    return Listed(
        {("default", one.name): {"main": {GPU: counted[one.name]} if one.name in counted else {}} for one in pods}
    )


def found(scene: Scene, size: int = 1, ids: tuple[str, ...] = (), *, late: bool = False) -> tuple[str, str, str]:
    match = who(scene, GPU, size, ids, late=late)
    return (match.pod.name, match.container, match.rule) if match else ("", "", "")


# ---- who is it? ----


def test_the_only_pod_that_lacks_devices_is_asked_for() -> None:
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    scene = Scene(REPORT, (a, b), (held(a, whole("w-0")),), shows(a, b, a=("w-0",)))
    assert found(scene) == ("b", "main", "only-one")


def test_a_pod_that_the_kubelet_does_not_list_yet_is_not_asked_for() -> None:
    """The service names a pod before it is bound; the kubelet takes one after the other."""
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    assert found(Scene(REPORT, (a, b), (), shows(b))) == ("b", "main", "only-one")


def test_counts_then_ids_then_age_tell_pods_apart() -> None:
    a, b, c = pod("a", whole("w-0")), pod("b", whole("w-1")), pod("c", whole("w-2"), whole("w-3"))
    assert found(Scene(REPORT, (a, c), (), shows(a, c)), 2) == ("c", "main", "count")
    assert found(Scene(REPORT, (a, b, c), (), shows(a, b, c)), 1, ("w-1",)) == ("b", "main", "ids")
    assert found(Scene(REPORT, (a, b, c), (), shows(a, b, c)), 1, ("w-2",)) == ("a", "main", "oldest")


def test_a_silent_kubelet_leaves_those_that_were_handed_nothing() -> None:
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    assert found(Scene(REPORT, (a, b), (held(a, whole("w-0")),))) == ("b", "main", "only-one")


def test_containers_are_asked_for_in_their_order() -> None:
    """Init containers come first, and are not listed."""
    a = pod("a", whole("w-0"), whole("w-1"), asks={"first": 1, "main": 1})
    assert found(Scene(REPORT, (a,), (), shows(a)))[1] == "first"
    first = held(a, whole("w-0"), container="first")
    assert found(Scene(REPORT, (a,), (first,), shows(a)))[1] == "main"


def test_a_pod_that_was_refused_is_asked_for_only_where_nobody_else_is() -> None:
    """It has failed for good, and may be listed for a while."""
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    refused = frozenset({a.uid})
    assert found(Scene(REPORT, (a, b), (), shows(a, b), refused)) == ("b", "main", "only-one")
    assert found(Scene(REPORT, (a,), (), shows(a), refused)) == ("", "", "")
    assert found(Scene(REPORT, (a,), (), shows(a), refused), late=True)[0] == "a"


def test_a_container_that_the_kubelet_has_forgotten_is_asked_for_again_when_nobody_new_is() -> None:
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    scene = Scene(REPORT, (a, b), (held(a, whole("w-0")),), shows(a, b, b=("w-1",)))
    assert found(scene) == ("", "", ""), "somebody may still be named"
    assert found(scene, late=True) == ("a", "main", "again")
    newer = Scene(REPORT, (a, b), (held(a, whole("w-0")),), shows(a, b))
    assert found(newer, late=True) == ("b", "main", "only-one"), "or a running container's would be another's"


# ---- what shall it have? ----


def match(of: PodAt, container: str = "main") -> Match:
    return Match(of, container, "only-one")


def test_placed_ids_in_any_order_are_the_placement() -> None:
    a = pod("a", whole("w-0"), whole("w-1"), asks={"one": 1, "two": 1})
    scene = Scene(REPORT, (a,), (), shows(a))
    assert decide(scene, match(a, "one"), GPU, ["w-1"]) == Give((whole("w-1"),), "placed")


def test_other_ids_ask_for_an_exchange_of_just_what_differs() -> None:
    a = pod("a", whole("w-0"), whole("w-1"))
    ask = decide(Scene(REPORT, (a,)), match(a), GPU, ["w-3", "w-1"])
    assert ask == Ask(give=(whole("w-0"),), take=(whole("w-3"),), both=(whole("w-1"),))
    assert ask.granted(swapped=False) == Give((whole("w-1"), whole("w-3")), "free")
    assert ask.refused() == Give((whole("w-1"), whole("w-0")), "overridden")


def test_what_a_sibling_keeps_is_not_given_twice_but_an_init_containers_may_be() -> None:
    a = pod("a", whole("w-0"), whole("w-1"), asks={"first": 1, "main": 1})
    first = held(a, whole("w-0"), container="first")
    listed = Listed({("default", "a"): {"main": {}}})
    assert decide(Scene(REPORT, (a,), (first,), listed), match(a), GPU, ["w-0"]) == Give((whole("w-0"),), "placed")
    sidecar = Listed({("default", "a"): {"first": {GPU: ("w-0",)}, "main": {}}})
    assert isinstance(decide(Scene(REPORT, (a,), (first,), sidecar), match(a), GPU, ["w-2"]), Ask)
    assert preferred(Scene(REPORT, (a,), (first,), sidecar), match(a), GPU, ["w-0", "w-1", "w-2"], [], 1) == ("w-1",)


def test_what_the_kubelet_takes_from_a_sibling_that_it_counts_wrongly_is_not_asked_for() -> None:
    """The sibling has w-1, whatever is counted for it; there is one device left for this container."""
    a = pod("a", whole("w-0"), whole("w-1"), asks={"one": 1, "main": 1})
    one = held(a, whole("w-1"), container="one", ids=("w-3",))
    listed = Listed({("default", "a"): {"one": {GPU: ("w-3",)}, "main": {}}})
    assert decide(Scene(REPORT, (a,), (one,), listed), match(a), GPU, ["w-1"]) == Give((whole("w-0"),), "overridden")


def test_what_an_init_container_was_handed_is_not_given_away_for_what_the_kubelet_counts() -> None:
    """It was refused an exchange for w-2 and has used w-0; the kubelet counts w-2 again. The pod has one device."""
    a = pod("a", whole("w-0"), asks={"prepare": 1, "main": 1})
    prepare = held(a, whole("w-0"), container="prepare", ids=("w-2",))
    scene = Scene(REPORT, (a,), (prepare,), Listed({("default", "a"): {"main": {}}}))
    assert decide(scene, match(a), GPU, ["w-2"]) == Give((whole("w-0"),), "overridden")


def test_only_what_no_init_container_was_handed_is_exchanged() -> None:
    a = pod("a", whole("w-0"), whole("w-1"), asks={"prepare": 1, "main": 2})
    prepare = held(a, whole("w-1"), container="prepare", ids=("w-2",))
    listed = Listed({("default", "a"): {"main": {}}})
    ask = decide(Scene(REPORT, (a,), (prepare,), listed), match(a), GPU, ["w-2", "w-3"])
    assert ask == Ask(give=(whole("w-0"),), take=(whole("w-3"),), both=(whole("w-1"),), true=False)


def test_an_init_containers_share_is_not_given_away() -> None:
    share, resource = DeviceAt(gpu="w-0", milli=250), "tangram.gpu/share-milli"
    a = pod("a", share, resource=resource, asks={"prepare": 250, "main": 250})
    taken = tuple(f"w-1::{number}" for number in range(250))
    prepare = held(a, share, container="prepare", ids=taken).model_copy(update={"resource": resource})
    listed = Listed({("default", "a"): {"main": {}}})
    assert decide(Scene(REPORT, (a,), (prepare,), listed), match(a), resource, taken) == Give((share,), "overridden")


def test_a_stale_list_gives_nothing_in_words() -> None:
    a = pod("a", whole("w-0"), asks={"main": 2})
    assert isinstance(decide(Scene(REPORT, (a,)), match(a), GPU, ["w-0", "w-1"]), Not)


def test_a_share_is_the_gpus_whatever_its_parts() -> None:
    share = DeviceAt(gpu="w-0", milli=250)
    a = pod("a", share, resource="tangram.gpu/share-milli", asks={"main": 250})
    scene, resource = Scene(REPORT, (a,)), "tangram.gpu/share-milli"
    ids = [f"w-0::{number}" for number in range(500, 750)]
    assert decide(scene, match(a), resource, ids) == Give((share,), "placed")
    available = [f"w-{gpu}::{number}" for gpu in range(2) for number in range(1000)]
    chosen = preferred(scene, match(a), resource, available, [], 250)
    assert len(chosen) == 250
    assert all(id_.startswith("w-0::") for id_ in chosen)


# ---- what stands in the way? ----


def test_slices_overlap_by_place_and_a_gpu_overlaps_all_of_its_own() -> None:
    big, small = part("m-0", "3g.40gb", 0), part("m-0", "1g.10gb", 3)
    assert overlap(big, small, REPORT)
    assert not overlap(big, part("m-0", "1g.10gb", 4), REPORT)
    assert not overlap(big, part("m-1", "3g.40gb", 0), REPORT)
    assert overlap(whole("m-0"), small, REPORT)
    assert overlap(part("m-0", "of.another.board", 6), small, REPORT), "nobody knows its size"


def test_what_another_pod_has_stays_with_it() -> None:
    a, b = pod("a", whole("w-0")), pod("b", whole("w-0"))
    scene = Scene(REPORT, (a, b), (held(a, whole("w-0")),))
    assert "handed to default/a" in blocked(scene, match(b), (whole("w-0"),), ["w-0"], placed=True)


def test_an_unplaced_pod_gets_nothing_that_was_promised() -> None:
    a, b = pod("a", part("m-0", "3g.40gb", 0)), pod("b")
    scene = Scene(REPORT, (a, b))
    assert "promised to default/a" in blocked(scene, match(b), (part("m-0", "1g.10gb", 1),), [], placed=False)
    assert blocked(scene, match(b), (part("m-0", "1g.10gb", 5),), [], placed=False) == ""


def test_shares_of_one_gpu_are_no_more_than_the_gpu() -> None:
    a, b = pod("a", DeviceAt(gpu="w-0", milli=600)), pod("b", DeviceAt(gpu="w-0", milli=500))
    has = Held(
        uid=a.uid, resource="tangram.gpu/share-milli", devices=a.devices, ids=("w-0::0",), how="placed", name="a"
    )
    assert "too little" in blocked(Scene(REPORT, (a, b), (has,)), match(b), b.devices, [], placed=True)
    assert not blocked(Scene(REPORT, (a, b), (has,)), match(b), (DeviceAt(gpu="w-0", milli=400),), [], placed=True)


def test_an_unplaced_pod_is_best_off_with_free_slices_that_are_there() -> None:
    report = with_slice("m-0", "1g.10gb", 5)
    available = [f"m-0/1g.10gb@{start}" for start in range(7)]
    assert preferred(Scene(report), None, "nvidia.com/mig-1g.10gb", available, [], 1) == ("m-0/1g.10gb@5",)
    assert preferred(Scene(report), None, "nvidia.com/mig-1g.10gb", available, [], 2) == ("m-0/1g.10gb@5",)


def test_an_unplaced_pod_is_offered_no_gpu_that_is_cut_into_slices() -> None:
    """Where modes may be switched the kubelet counts such a GPU as whole, too."""
    first = {"m-0": 0, "m-1": 1}
    gpus = tuple(gpu.model_copy(update={"index": first.get(gpu.uuid, gpu.index + 2)}) for gpu in REPORT.gpus)
    scene = Scene(REPORT.model_copy(update={"gpus": gpus}), (), (), Listed())
    assert preferred(scene, None, GPU, {"m-0", "w-0", "w-1"}, (), 1) == ("w-0",)
    assert preferred(scene, None, GPU, {"m-0", "w-0"}, (), 2) == ("w-0",)


def test_an_id_of_a_gpu_that_is_lost_does_not_stop_a_preference() -> None:
    scene = Scene(REPORT, (), (), Listed())
    assert preferred(scene, None, GPU, {"lost", "w-0"}, ("lost",), 2) == ("lost", "w-0")


# ---- whose is it? ----


def test_a_record_of_a_pod_that_nobody_knows_goes_and_others_stay() -> None:
    a, b, c = pod("a", whole("w-0")), pod("b", whole("w-1")), pod("c", whole("w-2"))
    records = (held(a, whole("w-0")), held(b, whole("w-1")), held(c, whole("w-2")))
    scene = Scene(REPORT, (a,), records, shows(b, b=("w-1",)))
    assert [one.name for one in settle(scene, 10, 11)] == ["a", "b"], "the service knows a, the kubelet b"


def test_a_pod_of_the_same_name_with_another_uid_is_another_pod() -> None:
    old = pod("a", whole("w-0"))
    new = old.model_copy(update={"uid": "uid-a-2", "devices": (whole("w-1"),)})
    scene = Scene(REPORT, (new,), (held(old, whole("w-0")),), shows(new))
    assert settle(scene, 10, 11) == ()


def test_what_the_kubelet_still_shows_of_a_pod_is_not_the_next_ones_of_that_name() -> None:
    """A pod is deleted by force, and the next is named before the kubelet has heard of either."""
    old = pod("a", whole("w-0"))
    new = old.model_copy(update={"uid": "uid-a-2", "devices": (whole("w-1"),)})
    record = held(old, whole("w-0"))
    assert settle(Scene(REPORT, (new,), (record,), shows(new, a=("w-0",))), 10, 11) == (record,)


def test_what_was_handed_again_is_the_later_pods_of_that_name() -> None:
    """The service had not named that one yet, and the kubelet seemed to have forgotten the first."""
    old = pod("a", whole("w-0"))
    new = old.model_copy(update={"uid": "uid-a-2", "devices": (whole("w-1"),)})
    record = held(old, whole("w-0")).model_copy(update={"again": True})
    (moved,) = settle(Scene(REPORT, (new,), (record,), shows(new, a=("w-0",))), 10, 11)
    assert (moved.uid, moved.devices, moved.again) == ("uid-a-2", (whole("w-0"),), False)


def test_the_kubelets_ids_say_whose_a_device_is() -> None:
    """Two pods could not be told apart, and it was the other one."""
    a, b = pod("a", whole("w-0")), pod("b", whole("w-1"))
    scene = Scene(REPORT, (a, b), (held(a, whole("w-0")),), shows(a, b, b=("w-0",)))
    (record,) = settle(scene, 10, 11)
    assert (record.name, record.uid, record.devices) == ("b", "uid-b", (whole("w-0"),))


def test_what_was_handed_to_somebody_taken_for_a_pod_is_not_that_pods() -> None:
    """It has ended meanwhile; and the pod itself has been handed its own."""
    a = pod("a", whole("w-0"))
    mistaken, own = held(a, whole("w-1")), held(a, whole("w-0"))
    assert settle(Scene(REPORT, (a,), (mistaken, own), shows(a, a=("w-0",))), 10, 11) == (own,)


def test_what_was_handed_since_the_list_was_asked_for_is_left_alone() -> None:
    a = pod("a", whole("w-0"))
    fresh = held(a, whole("w-0")).model_copy(update={"since": 10.5})
    assert settle(Scene(REPORT, (), (fresh,), shows()), 10, 11) == (fresh,)


def test_ids_that_no_record_explains_are_taken_as_they_read() -> None:
    """An agent that has lost its file, or a plugin before this one, must not lead to a device handed out twice."""
    a = pod("a", whole("w-0"))
    (record,) = settle(Scene(REPORT, (a,), (), shows(a, a=("w-2",))), 10, 11)
    assert (record.name, record.uid, record.devices, record.how) == ("a", "uid-a", (whole("w-2"),), "observed")


def test_a_completed_pod_that_an_older_kubelet_still_lists_has_nothing() -> None:
    a = pod("a", whole("w-0"))
    assert settle(Scene(REPORT, (), (held(a, whole("w-0")),), shows(a)), 10, 11) == ()
    assert len(settle(Scene(REPORT, (a,), (held(a, whole("w-0")),), shows(a)), 10, 11)) == 1, "a lost checkpoint"


def test_an_exchange_is_applied_to_a_list_of_before_it_and_to_no_other() -> None:
    a = pod("a", whole("w-0"), whole("w-1"))
    (moved,) = exchanged([a], a.uid, (whole("w-0"),), (whole("w-2"),))
    assert moved.devices == (whole("w-1"), whole("w-2"))
    assert exchanged([moved], a.uid, (whole("w-0"),), (whole("w-2"),)) == (moved,)


def test_ids_of_nvidias_plugin_are_uuids_and_replicas_of_them() -> None:
    report = with_slice("m-0", "1g.10gb", 5)
    assert observed(["w-0", "MIG-5"], report) == (whole("w-0"), part("m-0", "1g.10gb", 5))
    assert observed(["w-0::1", "w-0::7"], report) == (whole("w-0"),)
    assert observed(["MIG-made-just-now"], report) == ()
