"""Asks, placements and names as they stand on pods."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.translate import (
    PLACEMENT_ANNOTATION,
    Malformed,
    Written,
    device_of,
    pod_of,
    read_placement,
    resource_of_profile,
    write_placement,
)
from solver import Demand, Device, Slice
from tests.fakes import pod_json

GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-1g.10gb"


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


@pytest.mark.parametrize("quantity", ["two", "", "1.5", "-1", "NaN", "1e400", True, None, [1], {"a": 1}, "1Zi"])
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


def test_shares_are_refused_in_words_until_they_are_served():
    assert isinstance(ask({"containers": [container(**{"tangram.gpu/share": "4096"})]}), Malformed)


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
    ),
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


@pytest.mark.parametrize("text", ["GPU-1/", "GPU-1/3g.40gb", "GPU-1/3g.40gb@x", "/3g@0", "GPU-1/@0", "GPU-1/3g@-1", ""])
def test_what_is_no_device_is_refused(text):
    with pytest.raises(ValueError, match="not a device"):
        device_of(text)


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
    "pod", [{}, {"metadata": {}}, {"metadata": {"uid": "u"}, "spec": {}}, {"metadata": 1, "spec": 2}]
)
def test_what_is_no_pod_raises_value_error(pod):
    with pytest.raises(ValueError, match=r"metadata|spec"):
        pod_of(pod)
