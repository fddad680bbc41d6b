"""What we rely on of an API server, as checks that run against the fake and against the real one.

Each check takes a `Kube` and `make`, which creates or deletes objects the way a user would.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import pytest

from app.errors import Conflict, NotFound, Refused
from app.events import Note, event_of
from app.kube import Event, Kube, Reviewed
from app.translate import PodRef

NOTE = "tangram.gpu/placement"


class Make(Protocol):
    """Creates and deletes, and knows a node that exists."""

    node: str

    def pod(self, name: str) -> str:
        """Create an unbound pod that no scheduler takes; its UID."""
        ...

    def delete_pod(self, name: str) -> None:
        """Delete it at once."""
        ...

    def token(self, *, audience: str, pod: str = "") -> str:
        """A token of the service account default/default, bound to that pod if one is named."""
        ...


async def a_patch_returns_the_version_that_a_binding_may_demand(kube: Kube, make: Make) -> None:
    uid = make.pod("bound")
    version = await kube.annotate_pod("default", "bound", {NOTE: "x"}, uid=uid, timeout=5)
    await kube.bind("default", "bound", make.node, uid=uid, resource_version=version, timeout=5)

    pod = await kube.get_pod("default", "bound")
    assert pod["spec"]["nodeName"] == make.node
    assert pod["metadata"]["annotations"][NOTE] == "x"


async def a_binding_brings_its_annotations(kube: Kube, make: Make) -> None:
    """In the write that sets the node, beside those that the pod has; for the version that was demanded."""
    uid = make.pod("annotated")
    version = await kube.annotate_pod("default", "annotated", {"kept": "k", "changed": "before"}, uid=uid, timeout=5)
    notes = {NOTE: "x", "changed": "after"}
    await kube.bind("default", "annotated", make.node, uid=uid, resource_version=version, annotations=notes, timeout=5)

    pod = await kube.get_pod("default", "annotated")
    assert pod["spec"]["nodeName"] == make.node
    assert pod["metadata"]["annotations"].items() >= {"kept": "k", **notes}.items()


async def a_binding_that_conflicts_brings_nothing(kube: Kube, make: Make) -> None:
    uid = make.pod("untouched")
    before = (await kube.get_pod("default", "untouched"))["metadata"]["resourceVersion"]
    await kube.annotate_pod("default", "untouched", {"other": "x"}, uid=uid, timeout=5)
    for wrong in ({"uid": uid, "resource_version": before}, {"uid": "0-0", "resource_version": ""}):
        with pytest.raises(Conflict):
            await kube.bind("default", "untouched", make.node, **wrong, annotations={NOTE: "x"}, timeout=5)
    assert NOTE not in (await kube.get_pod("default", "untouched"))["metadata"]["annotations"]


async def a_patch_that_changes_nothing_keeps_the_version(kube: Kube, make: Make) -> None:
    """So it makes no Binding conflict: a fence must really change the pod."""
    uid = make.pod("same")
    version = await kube.annotate_pod("default", "same", {"a": "x"}, uid=uid, timeout=5)
    for nothing in ({"a": "x"}, {NOTE: None}):
        assert await kube.annotate_pod("default", "same", nothing, uid=uid, timeout=5) == version
    await kube.bind("default", "same", make.node, uid=uid, resource_version=version, timeout=5)


async def a_binding_with_an_old_version_conflicts(kube: Kube, make: Make) -> None:
    uid = make.pod("late")
    version = await kube.annotate_pod("default", "late", {NOTE: "x"}, uid=uid, timeout=5)
    await kube.annotate_pod("default", "late", {NOTE: None}, uid=uid, timeout=5)
    with pytest.raises(Conflict):
        await kube.bind("default", "late", make.node, uid=uid, resource_version=version, timeout=5)
    pod = await kube.get_pod("default", "late")
    assert not pod["spec"].get("nodeName")
    assert NOTE not in (pod["metadata"].get("annotations") or {})


async def a_second_binding_conflicts(kube: Kube, make: Make) -> None:
    uid = make.pod("twice")
    await kube.bind("default", "twice", make.node, uid=uid, resource_version="", timeout=5)
    with pytest.raises(Conflict):
        await kube.bind("default", "twice", make.node, uid=uid, resource_version="", timeout=5)


async def another_uid_is_another_pod(kube: Kube, make: Make) -> None:
    """A patch is refused as invalid (422: the uid is immutable), a Binding conflicts (409)."""
    make.pod("other")
    with pytest.raises(Refused):
        await kube.annotate_pod("default", "other", {NOTE: "x"}, uid="0-0", timeout=5)
    with pytest.raises(Conflict):
        await kube.bind("default", "other", make.node, uid="0-0", resource_version="", timeout=5)


async def a_patch_may_demand_a_version(kube: Kube, make: Make) -> None:
    uid = make.pod("versioned")
    before = (await kube.get_pod("default", "versioned"))["metadata"]["resourceVersion"]
    await kube.annotate_pod("default", "versioned", {NOTE: "x"}, uid=uid, timeout=5)
    with pytest.raises(Conflict):
        await kube.annotate_pod("default", "versioned", {NOTE: None}, uid=uid, resource_version=before, timeout=5)


async def what_is_not_there_is_not_found(kube: Kube, make: Make) -> None:
    for call in (
        kube.get_pod("default", "nobody"),
        kube.get_node("nobody"),
        kube.annotate_pod("default", "nobody", {NOTE: "x"}, uid="u", timeout=5),
        kube.bind("default", "nobody", make.node, uid="u", resource_version="", timeout=5),
        kube.get_lease("default", "nobody"),
        kube.get_config_map("default", "nobody"),
    ):
        with pytest.raises(NotFound):
            await call


async def what_happens_after_a_list_is_watched(kube: Kube, make: Make) -> None:
    make.pod("first")
    listed = await kube.list("pods")
    assert "first" in {item["metadata"]["name"] for item in listed.items}
    uid = make.pod("second")
    await kube.annotate_pod("default", "second", {NOTE: "x"}, uid=uid, timeout=5)
    make.delete_pod("second")

    seen: list[tuple[str, str]] = []

    def of_second(event: Event) -> bool:
        return event.type != "BOOKMARK" and event.object["metadata"]["name"] == "second"

    async with asyncio.timeout(20):
        async for event in kube.watch("pods", resource_version=listed.resource_version, seconds=15):
            if of_second(event):
                seen.append((event.type, event.object["metadata"]["uid"]))
            if seen and seen[-1][0] == "DELETED":
                break
    assert seen[0] == ("ADDED", uid)
    assert ("MODIFIED", uid) in seen


async def the_pods_of_one_node_can_be_listed(kube: Kube, make: Make) -> None:
    uid = make.pod("here")
    make.pod("nowhere")
    await kube.bind("default", "here", make.node, uid=uid, resource_version="", timeout=5)
    names = {item["metadata"]["name"] for item in (await kube.list("pods", fields=f"spec.nodeName={make.node}")).items}
    assert "here" in names
    assert "nowhere" not in names


async def a_node_can_be_touched(kube: Kube, make: Make) -> None:
    await kube.annotate_node(make.node, {"tangram.gpu/wake": "now"})
    node = await kube.get_node(make.node)
    assert node["metadata"]["annotations"]["tangram.gpu/wake"] == "now"


async def one_of_two_takes_a_lease(kube: Kube, make: Make) -> None:
    body: dict[str, Any] = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "contract", "namespace": "default"},
        "spec": {"holderIdentity": "a"},
    }
    made = await kube.create_lease("default", body)
    with pytest.raises(Conflict):
        await kube.create_lease("default", body)
    first = {**made, "spec": {"holderIdentity": "b"}}
    await kube.replace_lease("default", "contract", first)
    with pytest.raises(Conflict):
        await kube.replace_lease("default", "contract", {**made, "spec": {"holderIdentity": "c"}})
    assert (await kube.get_lease("default", "contract"))["spec"]["holderIdentity"] == "b"


async def one_of_two_replaces_a_config_map(kube: Kube, make: Make) -> None:
    body: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "contract", "namespace": "default"},
        "data": {"binds": ""},
    }
    with pytest.raises(NotFound):
        await kube.get_config_map("default", "contract")
    made = await kube.create_config_map("default", body)
    with pytest.raises(Conflict):
        await kube.create_config_map("default", body)
    first = await kube.replace_config_map("default", "contract", {**made, "data": {"binds": "first"}}, timeout=5)
    with pytest.raises(Conflict):
        await kube.replace_config_map("default", "contract", {**made, "data": {"binds": "second"}}, timeout=5)
    found = await kube.get_config_map("default", "contract")
    assert found["data"] == {"binds": "first"}
    assert found["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]


async def a_pods_token_names_its_account_and_its_node(kube: Kube, make: Make) -> None:
    uid = make.pod("speaker")
    await kube.bind("default", "speaker", make.node, uid=uid, resource_version="", timeout=5)
    reviewed = await kube.review_token(make.token(audience="tangram", pod="speaker"), audience="tangram")
    assert reviewed == Reviewed(True, "system:serviceaccount:default:default", ("tangram",), make.node)


async def a_token_that_is_bound_to_no_pod_names_no_node(kube: Kube, make: Make) -> None:
    reviewed = await kube.review_token(make.token(audience="tangram"), audience="tangram")
    assert (reviewed.authenticated, reviewed.node) == (True, "")


async def what_is_no_token_for_us_is_not_authenticated(kube: Kube, make: Make) -> None:
    for token in (make.token(audience="somebody-else"), "garbage", "a.b.c"):
        reviewed = await kube.review_token(token, audience="tangram")
        assert not reviewed.authenticated
        assert reviewed.error


async def an_event_of_a_pod_lives_in_the_pods_namespace(kube: Kube, make: Make) -> None:
    pod = PodRef(make.pod("refused"), "default", "refused")
    event = event_of(Note(pod, "KubeletRefused", "words " * 500, "Admitting"), instance="us")
    await kube.create_event("default", event)
    with pytest.raises(Refused):
        await kube.create_event("kube-system", event)


CHECKS: tuple[Callable[[Kube, Make], Awaitable[None]], ...] = (
    a_patch_returns_the_version_that_a_binding_may_demand,
    a_binding_brings_its_annotations,
    a_binding_that_conflicts_brings_nothing,
    a_patch_that_changes_nothing_keeps_the_version,
    a_binding_with_an_old_version_conflicts,
    a_second_binding_conflicts,
    another_uid_is_another_pod,
    a_patch_may_demand_a_version,
    what_is_not_there_is_not_found,
    what_happens_after_a_list_is_watched,
    the_pods_of_one_node_can_be_listed,
    a_node_can_be_touched,
    one_of_two_takes_a_lease,
    one_of_two_replaces_a_config_map,
    a_pods_token_names_its_account_and_its_node,
    a_token_that_is_bound_to_no_pod_names_no_node,
    what_is_no_token_for_us_is_not_authenticated,
    an_event_of_a_pod_lives_in_the_pods_namespace,
)
