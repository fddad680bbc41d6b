"""What the kubelet says its pods have."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import pytest

from app.agent.kubelet.pod_resources import ContainerHas, KubeletSilent, PodHas, PodResources
from tests.agent.kubelet.fake import Pods

Ask = Callable[[PodResources], tuple[PodHas, ...]]


@pytest.fixture(params=["list", "read"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Both ways to ask promise the same."""
    if request.param == "read":
        return lambda resources: resources.read()
    return lambda resources: asyncio.run(resources.list())


@pytest.fixture
def pods(folder: Path) -> Iterator[Pods]:
    made = Pods(folder / "kubelet.sock")
    yield made
    made.close()


def test_every_pod_is_listed_with_the_ids_of_each_container(folder: Path, pods: Pods, ask: Ask):
    pods.pods = [
        ("ml", "train", {"main": [("nvidia.com/gpu", ["GPU-1", "GPU-2"])], "sidecar": []}),
        ("ml", "fresh", {}),
    ]

    assert ask(PodResources(folder / "kubelet.sock")) == (
        PodHas(
            "ml",
            "train",
            (ContainerHas("main", {"nvidia.com/gpu": ("GPU-1", "GPU-2")}), ContainerHas("sidecar", {})),
        ),
        PodHas("ml", "fresh", ()),
    )


def test_the_parts_of_a_resource_on_several_numa_nodes_are_one(folder: Path, pods: Pods, ask: Ask):
    listed = [("nvidia.com/gpu", ["GPU-1"]), ("example.com/nic", ["a"]), ("nvidia.com/gpu", ["GPU-5"])]
    pods.pods = [("ml", "train", {"main": listed})]

    ((pod),) = ask(PodResources(folder / "kubelet.sock"))

    assert pod.containers[0].devices == {"nvidia.com/gpu": ("GPU-1", "GPU-5"), "example.com/nic": ("a",)}


def test_a_kubelet_that_is_not_there_is_said_in_words(folder: Path, ask: Ask):
    with pytest.raises(KubeletSilent, match=r"does not say what its pods have .*/kubelet.sock\): No such file"):
        ask(PodResources(folder / "kubelet.sock"))


def test_a_kubelet_that_is_asked_too_often_is_asked_again(folder: Path, pods: Pods, ask: Ask):
    """Everybody on the node shares its hundred answers a second."""
    pods.pods = [("ml", "train", {})]
    pods.answers = iter(["rejected by rate limit", "rejected by rate limit"])

    assert [pod.name for pod in ask(PodResources(folder / "kubelet.sock"))] == ["train"]


def test_a_refusal_is_said_in_the_kubelets_words(folder: Path, pods: Pods, ask: Ask):
    pods.answers = repeat("too many requests")

    with pytest.raises(KubeletSilent, match="too many requests"):
        ask(PodResources(folder / "kubelet.sock"))


def test_a_long_list_is_taken_whole(folder: Path, pods: Pods, ask: Ask):
    """gRPC's own limit is 4 MiB; two hundred pods with a thousand shares each are more."""
    ids = [f"GPU-12345678-1234-1234-1234-123456789abc::{number}" for number in range(1000)]
    pods.pods = [("ml", f"pod-{number}", {"main": [("tangram.gpu/share-milli", ids)]}) for number in range(200)]

    assert len(ask(PodResources(folder / "kubelet.sock"))) == 200


def test_a_restarted_kubelet_is_found_at_once(folder: Path, ask: Ask):
    resources = PodResources(folder / "kubelet.sock")
    for name in ("before", "after"):
        pods = Pods(folder / "kubelet.sock")
        pods.pods = [("ml", name, {})]
        assert [pod.name for pod in ask(resources)] == [name]
        pods.close()
        with pytest.raises(KubeletSilent):
            ask(resources)


def test_a_kubelet_of_which_the_old_one_still_answers_is_asked(folder: Path, pods: Pods, ask: Ask):
    """The old process may hang in its shutdown; its socket's place is the new one's."""
    resources = PodResources(folder / "kubelet.sock")
    pods.pods = [("ml", "before", {})]
    ask(resources)
    (folder / "kubelet.sock").rename(folder / "old.sock")
    new = Pods(folder / "kubelet.sock")
    new.pods = [("ml", "after", {})]

    assert [pod.name for pod in ask(resources)] == ["after"]
    new.close()
