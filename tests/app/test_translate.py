"""Asks, placements and names as they stand on pods."""

from collections.abc import Mapping

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.translate import (
    FENCE_ANNOTATION,
    PLACEMENT_ANNOTATION,
    TERMS,
    Container,
    Malformed,
    Written,
    device_of,
    pod_of,
    read_placement,
    resource_of_profile,
    terms_of,
    write_placement,
)
from solver import Demand, Device, Slice
from solver.demand import Terms
from solver.guests import Guest
from tests.fakes import pod_json

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-1g.10gb"
SHARE = "tangram.gpu/share"
MILLI = "tangram.gpu/share-milli"


def container(**resources: object) -> dict[str, object]:
    return {"name": "c", "resources": {"limits": resources}}


def ask(spec: Mapping[str, object], **annotations: str) -> Demand | Malformed:
    return pod_of({"metadata": {"uid": "u", "name": "p", "annotations": annotations}, "spec": spec}).ask


def test_containers_add_up():
    assert ask({"containers": [container(**{GPU: "2"}), container(**{GPU: 1, MIG: "3"})]}) == Demand(
        3, (("1g.10gb", 3),)
    )


def test_case_02_a_request_only_in_an_init_container_counts():
    """HAMi #2640: it was not counted, and the next pod got its card."""
    spec = {"initContainers": [container(**{GPU: "4"})], "containers": [container()]}
    assert ask(spec) == Demand(4)


def test_init_containers_run_one_after_another_and_the_largest_counts():
    inits = [container(**{GPU: "4"}), container(**{GPU: "2"})]
    assert ask({"initContainers": inits, "containers": [container(**{GPU: "1"})]}) == Demand(4)


def test_a_sidecar_stays_beside_later_init_containers_and_all_containers():
    sidecar = {**container(**{GPU: "1"}), "restartPolicy": "Always"}
    inits = [container(**{GPU: "2"}), sidecar, container(**{GPU: "4"})]
    assert ask({"initContainers": inits, "containers": [container(**{GPU: "3"})]}) == Demand(5)


def test_each_resource_takes_its_own_largest():
    spec = {"initContainers": [container(**{GPU: "2"})], "containers": [container(**{MIG: "1"})]}
    assert ask(spec) == Demand(2, (("1g.10gb", 1),))


@pytest.mark.parametrize(
    "quantity", ["two", "", "1.5", "-1", "NaN", "1e400", True, None, [1], {"a": 1}, "1Zi", "٢", "1_0", "1e-999999999"]
)
def test_a_malformed_quantity_becomes_words(quantity):
    wrong = ask({"containers": [container(**{GPU: quantity})]})

    assert isinstance(wrong, Malformed)
    assert GPU in wrong.reason


@pytest.mark.parametrize(("quantity", "count"), [("2", 2), (2, 2), ("2e0", 2), ("1k", 1000)])
def test_quantities_that_kubernetes_writes_are_read(quantity, count):
    assert ask({"containers": [container(**{GPU: quantity})]}) == Demand(count)


@pytest.mark.parametrize("spec", [{"containers": "x"}, {"containers": [1]}, {"containers": [{"resources": 3}]}])
def test_a_broken_spec_becomes_words(spec):
    assert isinstance(ask(spec), Malformed)


def test_an_annotation_of_ours_that_we_do_not_know_is_refused_not_ignored():
    wrong = ask({"containers": [container(**{GPU: 1})]}, **{"tangram.gpu/lnk": "nvlink"})
    assert isinstance(wrong, Malformed)
    assert "tangram.gpu/lnk" in wrong.reason


# -- shares -----------------------------------------------------------------------------------------------


def test_shares_of_several_containers_add_up_to_one_share():
    assert ask({"containers": [container(**{SHARE: "4"}), container(**{SHARE: 1})]}) == Demand(share_mib=5120)
    assert ask({"containers": [container(**{MILLI: 250})] * 3}) == Demand(share_milli=750)


def test_a_share_of_an_init_container_counts_as_everything_else_does():
    spec = {"initContainers": [container(**{MILLI: 500})], "containers": [container(**{MILLI: 200})]}
    assert ask(spec) == Demand(share_milli=500)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({SHARE: 1, MILLI: 1}, "said in one of them"),
        ({MILLI: 1000}, "1 to 999"),
        ({MILLI: 600, GPU: 1}, "beside whole GPUs"),
        ({SHARE: 600, MIG: 1}, "beside whole GPUs or MIG slices"),
        ({SHARE: "0.5"}, "whole number"),
        ({SHARE: 2**30}, "more than any GPU has"),
    ],
)
def test_a_share_that_is_none_is_refused_in_words_and_a_bound_pod_still_holds_something(resources, words):
    pod = pod_of(pod_json("p", resources))
    assert isinstance(pod.ask, Malformed)
    assert words in pod.ask.reason
    assert pod.need.gpus > 0


# -- the kubelet's side -----------------------------------------------------------------------------------


def test_containers_that_ask_are_listed_as_the_kubelet_admits_them():
    spec = {
        "initContainers": [{**container(**{GPU: 2}), "name": "first"}, {**container(), "name": "asks for nothing"}],
        "containers": [{**container(**{MIG: 1, GPU: 1}), "name": "main"}, {**container(**{GPU: 0}), "name": "none"}],
    }
    pod = pod_of({"metadata": {"uid": "u", "name": "p"}, "spec": spec})
    assert pod.containers == (Container("first", ((GPU, 2),)), Container("main", ((GPU, 1), (MIG, 1))))


@pytest.mark.parametrize("reason", ["UnexpectedAdmissionError", "TopologyAffinityError", "OutOfnvidia.com/gpu"])
def test_a_pod_that_its_kubelet_refused_is_finished_and_says_so_in_the_kubelets_words(reason):
    pod = pod_of(pod_json("p", {GPU: 1}, status={"phase": "Failed", "reason": reason, "message": "Pod was rejected"}))
    assert pod.refused == f"{reason}: Pod was rejected"
    assert pod.finished
    assert not pod.admitted


def test_a_pod_that_failed_by_itself_or_was_evicted_was_not_refused():
    evicted = pod_of(pod_json("p", {GPU: 1}, status={"phase": "Failed", "reason": "Evicted"}))
    failed = pod_of(pod_json("p", {GPU: 1}, status={"phase": "Failed", "containerStatuses": [{"state": {}}]}))
    assert (evicted.refused, failed.refused) == ("", "")
    assert failed.admitted


# -- CPU and memory ---------------------------------------------------------------------------------------


def requesting(**amounts: object) -> dict[str, object]:
    return {"name": "c", "resources": {"requests": amounts}}


@pytest.mark.parametrize(
    ("amount", "cpu"), [("100m", 100), ("2", 2000), (2, 2000), ("0.1", 100), ("1e3m", 1000), ("1u", 1), ("2k", 2000000)]
)
def test_cpu_is_counted_in_thousandths_rounded_up(amount, cpu):
    assert ask({"containers": [requesting(cpu=amount)]}) == Demand(cpu_milli=cpu)


@pytest.mark.parametrize(
    ("amount", "memory"),
    [("1Gi", 1024), ("128974848", 123), ("129e6", 124), ("2048Ki", 2), ("129M", 124), ("1500m", 1), ("1.5Gi", 1536)],
)
def test_memory_is_counted_in_mib_rounded_up(amount, memory):
    assert ask({"containers": [requesting(memory=amount)]}) == Demand(memory_mib=memory)


def test_cpu_and_memory_are_the_most_at_any_one_time_and_the_overhead():
    """As kube-scheduler counts them: sidecars stay, init containers come one by one, overhead is added."""
    sidecar = {**requesting(cpu="500m"), "restartPolicy": "Always"}
    spec = {
        "initContainers": [requesting(cpu=4), sidecar, requesting(cpu=3, memory="3Gi")],
        "containers": [requesting(cpu=1, memory="1Gi"), requesting(cpu=1, memory="1Gi")],
        "overhead": {"cpu": "250m", "memory": "64Mi"},
    }
    assert ask(spec) == Demand(cpu_milli=4250, memory_mib=3072 + 64)


def test_requests_of_the_whole_pod_replace_those_of_its_containers():
    spec = {"containers": [requesting(cpu=1, memory="1Gi")], "resources": {"requests": {"cpu": "3"}}}
    assert ask(spec) == Demand(cpu_milli=3000, memory_mib=1024)


def test_a_limit_without_a_request_is_the_request():
    assert ask({"containers": [container(cpu="2")]}) == Demand(cpu_milli=2000)


@pytest.mark.parametrize("amount", ["much", -1, "1e99", [], True])
def test_unreadable_cpu_is_refused_in_words_beside_devices_only(amount):
    wrong = ask({"containers": [container(**{GPU: 1, "cpu": amount})]})
    assert isinstance(wrong, Malformed)
    assert "cpu" in wrong.reason
    assert ask({"containers": [container(cpu=amount)]}) == Demand()


def test_a_pod_without_devices_does_not_concern_us():
    assert not pod_of(pod_json("p", {"cpu": "2", "memory": "1Gi"})).concerns_us


# -- terms ------------------------------------------------------------------------------------------------


def test_annotations_become_terms():
    notes = {
        "tangram.gpu/product": "L40S, A100 80GB",
        "tangram.gpu/architecture": "Hopper",
        "tangram.gpu/compute-capability": "9.0",
        "tangram.gpu/gpu-memory": "40Gi",
        "tangram.gpu/link": "nvlink",
        "tangram.gpu/driver": "550.54",
        "tangram.gpu/cuda": "12.4",
        "tangram.gpu/tenant": "red",
        "tangram.gpu/isolation": "gpu",
        "tangram.gpu/workload": "training",
    }
    terms = Terms(
        products=("A100 80GB", "L40S"),
        architectures=("Hopper",),
        compute_capability=(9, 0),
        gpu_memory_mib=40960,
        nvlink=True,
        driver=(550, 54),
        cuda=(12, 4),
        guest=Guest("red", "training", "gpu"),
    )
    assert ask({"containers": [container(**{GPU: 2})]}, **notes) == Demand(2, terms=terms)


def test_who_wants_to_be_apart_without_a_tenant_is_one_of_the_namespace():
    meta = {"uid": "u", "name": "p", "namespace": "team-a", "annotations": {"tangram.gpu/isolation": "node"}}
    pod = pod_of({"metadata": meta, "spec": {"containers": [container(**{GPU: 1})]}})
    assert isinstance(pod.ask, Demand)
    assert pod.ask.terms.guest == pod.need.terms.guest == Guest("team-a", "", "node")


def test_isolation_none_is_no_wish():
    assert ask({"containers": [container(**{GPU: 1})]}, **{"tangram.gpu/isolation": "none"}) == Demand(1)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("product", ", ,", "H100"),
        ("architecture", "", "Hopper"),
        ("compute-capability", "nine", "9.0"),
        ("gpu-memory", "40", "40Gi"),
        ("gpu-memory", "forty", "40Gi"),
        ("link", "pcie", "nvlink"),
        ("driver", "550.", "550.54"),
        ("cuda", "v12", "12.4"),
        ("cuda", "１２", "12.4"),
        ("tenant", "a b", "63 letters"),
        ("isolation", "rack", "none, gpu or node"),
        ("workload", "game", "training, batch or serving"),
    ],
)
def test_a_malformed_annotation_is_refused_and_told_what_would_be_right(name, text, words):
    wrong = ask({"containers": [container(**{GPU: 1})]}, **{f"tangram.gpu/{name}": text})
    assert isinstance(wrong, Malformed)
    assert f"tangram.gpu/{name}" in wrong.reason
    assert words in wrong.reason


@given(st.dictionaries(st.sampled_from(sorted(TERMS)), st.text(max_size=20) | st.integers() | st.none()))
def test_no_annotation_of_a_pod_crashes_the_reader(notes):
    assert isinstance(terms_of(notes, "default"), Terms | Malformed)


def test_the_priority_is_kept():
    assert pod_of(pod_json("p", {GPU: 1}, spec={"priority": 1000})).priority == 1000


# -- names ------------------------------------------------------------------------------------------------


def test_a_profile_named_like_an_argument_is_only_a_profile():
    assert ask({"containers": [container(**{"nvidia.com/mig-gpus": 1})]}) == Demand(0, (("gpus", 1),))


def test_media_profiles_are_spelled_as_resources_spell_them():
    assert resource_of_profile("1g.10gb+me") == "nvidia.com/mig-1g.10gb.me"
    assert resource_of_profile("1g.24gb-me") == "nvidia.com/mig-1g.24gb-me"


devices = st.lists(
    st.builds(
        Device,
        st.from_regex(r"GPU-[0-9a-f]{8}", fullmatch=True),
        st.none() | st.builds(Slice, st.from_regex(r"[1-7]g\.[0-9]{1,2}gb(\.me)?", fullmatch=True), st.integers(0, 11)),
    )
    | st.builds(Device, st.from_regex(r"GPU-[0-9a-f]{8}", fullmatch=True), milli=st.integers(1, 999)),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(devices)
def test_a_placement_reads_back_as_it_was_written(devices):
    text = write_placement("u", "n", devices)
    assert read_placement(text) == Written("u", "n", tuple(sorted(devices)))


@given(st.text(max_size=30) | st.integers() | st.none() | st.lists(st.integers()))
def test_no_annotation_text_crashes_the_reader(text):
    assert read_placement(text) is None or isinstance(read_placement(text), Malformed)


@pytest.mark.parametrize(
    "text",
    [
        "GPU-1/",
        "GPU-1/3g.40gb",
        "GPU-1/3g.40gb@x",
        "/3g@0",
        "GPU-1/@0",
        "GPU-1/3g@-1",
        "",
        "GPU-1:",
        ":250m",
        "GPU-1:0m",
        "GPU-1:1001m",
        "GPU-1:00000m",
        "GPU-1:٢٥٠m",
        "GPU-1:25",
        "GPU-1:-1m",
    ],
)
def test_what_is_no_device_is_refused(text):
    with pytest.raises(ValueError, match="not a device"):
        device_of(text)


def test_a_share_that_is_all_of_its_gpu_is_read_as_it_was_written():
    """A share asked for in MiB may be; read as anything else, the pod's devices would be unknown after a restart."""
    device = Device("GPU-1", milli=1000)
    assert read_placement(write_placement("u", "n", [device])) == Written("u", "n", (device,))


@pytest.mark.parametrize("devices", [["GPU-1", "GPU-1"], ["GPU-1:250m", "GPU-1:0250m"], ["GPU-1/1g@0", "GPU-1/1g@00"]])
def test_a_placement_that_names_a_device_twice_is_not_believed(devices):
    """Counted it would give what the pod asks for, and leave another of its devices free."""
    text = orjson.dumps({"v": 1, "uid": "u", "node": "n", "devices": devices}).decode()
    assert isinstance(read_placement(text), Malformed)


def test_a_wish_to_be_apart_stands_whatever_is_wrong_with_other_annotations():
    """The ask is refused; of a pod that runs already the wish is still kept."""
    annotations = {"tangram.gpu/isolation": "node", "tangram.gpu/colour": "x", "tangram.gpu/workload": "??"}
    pod = pod_of(pod_json("p", {GPU: 1}, metadata={"annotations": annotations}))
    assert isinstance(pod.ask, Malformed)
    assert pod.need.terms.guest == Guest("default", "", "node")


def test_what_cannot_be_read_is_said_in_few_words():
    """They go to kube-scheduler for every node."""
    wrong = ask({"containers": [container(**{GPU: "1" * 100_000})]})
    assert isinstance(wrong, Malformed)
    assert len(wrong.reason) < 200


@pytest.mark.parametrize("amounts", [{"cpu": "9E"}, {"cpu": "1e9"}, {"memory": "7E"}])
def test_cpu_that_no_node_has_is_refused_in_words(amounts):
    """Thousandths of it are more than a machine word holds, and one such pod must not spoil the plan for all."""
    pod = pod_of(pod_json("p", {GPU: 1, **amounts}))
    assert isinstance(pod.ask, Malformed)
    assert "than any node has" in pod.ask.reason
    assert (pod.need.gpus, pod.need.cpu_milli, pod.need.memory_mib) == (1, 0, 0)
    assert pod_of(pod_json("p", amounts)).ask == Demand()


def test_the_pod_is_read_with_all_that_matters():
    pod = pod_of(
        pod_json(
            "p",
            {GPU: "1"},
            metadata={
                "deletionTimestamp": "2026-11-21T00:00:00Z",
                "resourceVersion": "7",
                "annotations": {PLACEMENT_ANNOTATION: write_placement("uid-p", "n", [Device("GPU-1")])},
            },
            spec={"nodeName": "n", "terminationGracePeriodSeconds": 5},
            status={"phase": "Succeeded"},
        )
    )
    assert (pod.node, pod.finished, pod.terminating, pod.grace_seconds) == ("n", True, True, 5.0)
    assert pod.written == Written("uid-p", "n", (Device("GPU-1"),))


@pytest.mark.parametrize(
    "pod",
    [
        {},
        {"metadata": {}},
        {"metadata": {"uid": "u"}, "spec": {}},
        {"metadata": 1, "spec": 2},
        {"metadata": {"uid": "u", "name": "p"}, "spec": {"schedulerName": {"a": 1}}},
        {"metadata": {"uid": "u", "name": "p"}, "spec": {"nodeName": ["n"]}},
        {"metadata": {"uid": "u", "name": "p", "resourceVersion": 7}, "spec": {}},
    ],
)
def test_what_is_no_pod_raises_value_error(pod):
    with pytest.raises(ValueError, match=r"metadata|spec"):
        pod_of(pod)


def test_what_containers_ask_is_read_the_same_a_second_time_and_when_it_is_long():
    """What was read once is remembered."""
    containers = [{"name": f"c{n}", "resources": {"limits": {GPU: "1"}}} for n in range(200)]
    for count in (1, 2, 2, 200, 200):
        read = pod_of(pod_json("p", spec={"containers": containers[:count]}))
        assert (read.need.gpus, len(read.containers)) == (count, count)
        assert read.containers[0].name == "c0"


def test_a_container_that_asks_for_another_number_is_another_pod():
    counts = [pod_of(pod_json("p", {GPU: number})).need.gpus for number in ("1", 2, "2", 1)]
    assert counts == [1, 2, 2, 1]


@pytest.mark.parametrize("count", [2**80, [1], {"a": 1}, True, None])
def test_counts_that_are_none_are_refused_each_time(count):
    reasons = [pod_of(pod_json("p", {GPU: count})).ask for _ in range(2)]
    assert reasons[0] == reasons[1]
    assert isinstance(reasons[0], Malformed) or count is None


def test_that_we_fenced_a_pod_asks_for_nothing():
    pod = pod_of(pod_json("p", {GPU: "1"}, metadata={"annotations": {FENCE_ANNOTATION: "then"}}))
    assert pod.fence == "then"
    assert pod.ask == pod.need
