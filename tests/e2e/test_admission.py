"""The admission policy on the real API server: only Tangram's own service account writes placements.

The forger may do anything that RBAC can give (cluster-admin): the policy must hold against everybody.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.certs import NAMESPACE
from app.kube import connect
from app.manifests import SERVICE_ACCOUNT
from app.translate import PLACEMENT_ANNOTATION
from tests.e2e.cluster import Cluster, open_cluster
from tests.e2e.nodes import KubernetesObject, gpu_node, gpu_pod

pytestmark = pytest.mark.e2e

BASE = Path(__file__).resolve().parents[2] / "manifests" / "base"
PODS = "/api/v1/namespaces/default/pods"
MERGE = "application/merge-patch+json"
OURS = f"system:serviceaccount:{NAMESPACE}:{SERVICE_ACCOUNT}"
FORGER = "alice"
FORGED = '{"v":1,"uid":"forged","node":"node-a","devices":["GPU-0"]}'
WRITTEN = '{"v":1,"uid":"written","node":"node-a","devices":["GPU-1"]}'
BY_US_ONLY = f"annotation {PLACEMENT_ANNOTATION} is written by Tangram ({OURS}) only, and "

_numbers = itertools.count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        for file in ("namespace", "rbac", "admission"):
            cluster.kubectl("apply", "-f", str(BASE / f"{file}.yaml"))
        cluster.add_nodes([gpu_node("node-a", allocatable={"nvidia.com/gpu": 8})])
        subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": FORGER}
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
        cluster.request(
            "POST",
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
            {"metadata": {"name": "forger"}, "roleRef": role, "subjects": [subject]},
        )
        cluster.wait_for(lambda: _is_refused(cluster), "the policy to take effect", 30)
        yield cluster


def _is_refused(cluster: Cluster) -> bool:
    pod = gpu_pod("probe", annotations={PLACEMENT_ANNOTATION: FORGED})
    try:
        cluster.request("POST", PODS, pod, params={"dryRun": "All"})
    except httpx.HTTPStatusError as error:
        return BY_US_ONLY in str(error)
    return False


def as_user(
    cluster: Cluster, user: str, method: str, path: str, body: Any = None, content_type: str = "application/json"
) -> Any:
    headers = {"Impersonate-User": user, "Content-Type": content_type}
    return cluster.request(method, path, body, headers=headers)


def new_pod(cluster: Cluster, annotation: str | None = None) -> KubernetesObject:
    """A pod with a name of its own; with `annotation`, we have written that."""
    name = f"pod-{next(_numbers)}"
    cluster.add_pods([gpu_pod(name, {"nvidia.com/gpu": 1})])
    if annotation is not None:
        annotate(cluster, OURS, name, annotation)
    return cluster.pod(name)


def annotate(cluster: Cluster, user: str, name: str, value: str | None, subresource: str = "") -> Any:
    patch = {"metadata": {"annotations": {PLACEMENT_ANNOTATION: value}}}
    return as_user(cluster, user, "PATCH", f"{PODS}/{name}{subresource}", patch, MERGE)


def placement_of(pod: KubernetesObject) -> str | None:
    value: str | None = pod["metadata"].get("annotations", {}).get(PLACEMENT_ANNOTATION)
    return value


# -- case 16: ways to forge ---------------------------------------------------------------------------


def create(cluster: Cluster, pod: KubernetesObject) -> None:
    forged = gpu_pod(f"forged-{next(_numbers)}", annotations={PLACEMENT_ANNOTATION: FORGED})
    as_user(cluster, FORGER, "POST", PODS, forged)


def create_empty(cluster: Cluster, pod: KubernetesObject) -> None:
    forged = gpu_pod(f"forged-{next(_numbers)}", annotations={PLACEMENT_ANNOTATION: ""})
    as_user(cluster, FORGER, "POST", PODS, forged)


def update(cluster: Cluster, pod: KubernetesObject) -> None:
    pod["metadata"].setdefault("annotations", {})[PLACEMENT_ANNOTATION] = FORGED
    as_user(cluster, FORGER, "PUT", f"{PODS}/{pod['metadata']['name']}", pod)


def merge_patch(cluster: Cluster, pod: KubernetesObject) -> None:
    annotate(cluster, FORGER, pod["metadata"]["name"], FORGED)


def json_patch(cluster: Cluster, pod: KubernetesObject) -> None:
    path = "/metadata/annotations"
    operation = {"op": "add", "path": path, "value": {PLACEMENT_ANNOTATION: FORGED}}
    name = pod["metadata"]["name"]
    as_user(cluster, FORGER, "PATCH", f"{PODS}/{name}", [operation], "application/json-patch+json")


def server_side_apply(cluster: Cluster, pod: KubernetesObject) -> None:
    name = pod["metadata"]["name"]
    metadata = {"name": name, "annotations": {PLACEMENT_ANNOTATION: FORGED}}
    applied = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
    path = f"{PODS}/{name}?fieldManager=forger&force=true"
    as_user(cluster, FORGER, "PATCH", path, applied, "application/apply-patch+yaml")


def status_patch(cluster: Cluster, pod: KubernetesObject) -> None:
    annotate(cluster, FORGER, pod["metadata"]["name"], FORGED, "/status")


def status_update(cluster: Cluster, pod: KubernetesObject) -> None:
    pod["metadata"].setdefault("annotations", {})[PLACEMENT_ANNOTATION] = FORGED
    as_user(cluster, FORGER, "PUT", f"{PODS}/{pod['metadata']['name']}/status", pod)


def _binding(pod: KubernetesObject) -> KubernetesObject:
    return {
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": pod["metadata"]["name"], "annotations": {PLACEMENT_ANNOTATION: FORGED}},
        "target": {"apiVersion": "v1", "kind": "Node", "name": "node-a"},
    }


def binding(cluster: Cluster, pod: KubernetesObject) -> None:
    as_user(cluster, FORGER, "POST", f"{PODS}/{pod['metadata']['name']}/binding", _binding(pod))


def old_binding(cluster: Cluster, pod: KubernetesObject) -> None:
    as_user(cluster, FORGER, "POST", "/api/v1/namespaces/default/bindings", _binding(pod))


def resize(cluster: Cluster, pod: KubernetesObject) -> None:
    annotate(cluster, FORGER, pod["metadata"]["name"], FORGED, "/resize")


def ephemeral_containers(cluster: Cluster, pod: KubernetesObject) -> None:
    annotate(cluster, FORGER, pod["metadata"]["name"], FORGED, "/ephemeralcontainers")


FORGING = (
    create, create_empty, update, merge_patch, json_patch, server_side_apply, status_patch, status_update,
    binding, old_binding,
)  # fmt: skip
DROPPED = (resize, ephemeral_containers)


@pytest.mark.parametrize("forge", FORGING, ids=lambda forge: forge.__name__)
def test_case_16_users_cannot_forge_the_placement_annotation(
    cluster: Cluster, forge: Callable[[Cluster, KubernetesObject], None]
) -> None:
    """Not with any right that RBAC can give, on any way by which an annotation reaches a pod."""
    pod = new_pod(cluster)

    with pytest.raises(httpx.HTTPStatusError) as refused:
        forge(cluster, pod)

    assert refused.value.response.status_code == httpx.codes.FORBIDDEN
    message = refused.value.response.json()["message"]
    assert BY_US_ONLY + FORGER in message
    assert "take it out of the object (or of the template that it is made from)" in message
    assert placement_of(cluster.pod(pod["metadata"]["name"])) is None


@pytest.mark.parametrize("forge", DROPPED, ids=lambda forge: forge.__name__)
def test_case_16_the_other_ways_of_updating_a_pod_do_not_carry_annotations(
    cluster: Cluster, forge: Callable[[Cluster, KubernetesObject], None]
) -> None:
    """kube-apiserver drops them itself; the policy names these ways too, should that ever change."""
    pod = new_pod(cluster)

    with contextlib.suppress(httpx.HTTPStatusError):
        forge(cluster, pod)

    assert placement_of(cluster.pod(pod["metadata"]["name"])) is None


@pytest.mark.parametrize("value", [FORGED, "", None], ids=["other", "empty", "removed"])
@pytest.mark.parametrize("subresource", ["", "/status"], ids=["pod", "status"])
def test_case_16_users_cannot_change_or_remove_what_we_wrote(
    cluster: Cluster, value: str | None, subresource: str
) -> None:
    """A removed placement would free devices that are in use."""
    name = new_pod(cluster, WRITTEN)["metadata"]["name"]

    with pytest.raises(httpx.HTTPStatusError) as refused:
        annotate(cluster, FORGER, name, value, subresource)

    said = " has removed it" if value is None else " has changed it"
    assert BY_US_ONLY + FORGER + said in refused.value.response.json()["message"]
    assert placement_of(cluster.pod(name)) == WRITTEN


@pytest.mark.parametrize(
    "user", ["system:kube-scheduler", "system:node:node-a", "system:serviceaccount:default:tangram"]
)
def test_case_16_no_component_and_no_namesake_can_forge_either(cluster: Cluster, user: str) -> None:
    """kube-scheduler and kubelets have the right to write a pod's status, and a namesake is not us."""
    name = new_pod(cluster)["metadata"]["name"]
    patch = {"metadata": {"annotations": {PLACEMENT_ANNOTATION: FORGED}}}
    groups = {"system:node:node-a": ["system:nodes"]}.get(user, ["system:masters"])
    headers = [("Impersonate-User", user), ("Content-Type", MERGE)]
    headers += [("Impersonate-Group", group) for group in [*groups, "system:masters"]]

    with pytest.raises(httpx.HTTPStatusError, match="is written by Tangram"):
        cluster.request("PATCH", f"{PODS}/{name}/status", patch, headers=headers)


def test_case_16_a_template_that_copied_the_annotation_is_refused_in_words(cluster: Cluster) -> None:
    """As from `kubectl get -o yaml` of a running pod; its owner reads why at the Deployment."""
    pod = gpu_pod("unused", {"nvidia.com/gpu": 1}, annotations={PLACEMENT_ANNOTATION: FORGED}, labels={"app": "copy"})
    pod["spec"] = {key: value for key, value in pod["spec"].items() if key in ("containers",)}
    template = {"metadata": {key: pod["metadata"][key] for key in ("labels", "annotations")}, "spec": pod["spec"]}
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": "copy"}}, "template": template}
    path = "/apis/apps/v1/namespaces/default/deployments"
    as_user(cluster, FORGER, "POST", path, {"metadata": {"name": "copy"}, "spec": spec})

    def failure() -> str | None:
        conditions = cluster.get(f"{path}/copy")["status"].get("conditions", [])
        return next((each["message"] for each in conditions if each["type"] == "ReplicaFailure"), None)

    message = cluster.wait_for(failure, "the Deployment to say why", 30)
    cluster.request("DELETE", f"{path}/copy")
    assert BY_US_ONLY in message
    assert "or of the template that it is made from" in message


# -- what must pass -----------------------------------------------------------------------------------


def test_we_write_change_and_remove_under_our_own_token(cluster: Cluster) -> None:
    """Under the shipped RBAC, not by impersonation."""
    name = new_pod(cluster)["metadata"]["name"]
    kubeconfig = cluster.kubeconfig_for_service_account(SERVICE_ACCOUNT, namespace=NAMESPACE)

    def kubectl(*args: str) -> None:
        cluster.kubectl(f"--kubeconfig={kubeconfig}", *args)

    kubectl("annotate", "pod", name, f"{PLACEMENT_ANNOTATION}={WRITTEN}")
    assert placement_of(cluster.pod(name)) == WRITTEN
    kubectl("annotate", "pod", name, "--overwrite", f"{PLACEMENT_ANNOTATION}={FORGED}")
    kubectl("annotate", "pod", name, f"{PLACEMENT_ANNOTATION}-")
    assert placement_of(cluster.pod(name)) is None


async def test_we_bind_with_the_placement_in_the_binding_under_our_own_token(cluster: Cluster) -> None:
    """Under the shipped RBAC; who else may bind may not say a placement with it (`binding`, above)."""
    pod = new_pod(cluster)
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    kube = await connect(Path(cluster.kubeconfig_for_service_account(SERVICE_ACCOUNT, namespace=NAMESPACE)))
    try:
        version = pod["metadata"]["resourceVersion"]
        written = {PLACEMENT_ANNOTATION: WRITTEN}
        await kube.bind("default", name, "node-a", uid=uid, resource_version=version, annotations=written, timeout=5)
    finally:
        await kube.close()
    assert placement_of(cluster.pod(name)) == WRITTEN
    assert cluster.pod(name)["spec"]["nodeName"] == "node-a"


def test_others_go_on_with_a_placed_pod_as_long_as_they_leave_the_annotation(cluster: Cluster) -> None:
    """Labels, a whole update that carries it along, the kubelet's status, finalizers, the end."""
    name = new_pod(cluster, WRITTEN)["metadata"]["name"]
    as_user(cluster, FORGER, "PATCH", f"{PODS}/{name}", {"metadata": {"labels": {"a": "b"}}}, MERGE)
    whole = cluster.pod(name)
    whole["metadata"]["annotations"]["other"] = "is theirs"
    as_user(cluster, FORGER, "PUT", f"{PODS}/{name}", whole)
    condition = {"type": "example.test/ready", "status": "True"}
    as_user(cluster, FORGER, "PATCH", f"{PODS}/{name}/status", {"status": {"conditions": [condition]}}, MERGE)
    as_user(cluster, FORGER, "PATCH", f"{PODS}/{name}", {"metadata": {"finalizers": ["example.test/f"]}}, MERGE)
    as_user(cluster, FORGER, "PATCH", f"{PODS}/{name}", {"metadata": {"finalizers": None}}, MERGE)
    assert placement_of(cluster.pod(name)) == WRITTEN

    as_user(cluster, FORGER, "DELETE", f"{PODS}/{name}")
    cluster.wait_gone(name)


def test_a_placed_pod_is_bound_runs_and_ends(cluster: Cluster) -> None:
    """We bind it; KWOK writes its status as a kubelet does."""
    pod = new_pod(cluster, WRITTEN)
    name = pod["metadata"]["name"]
    bare = _binding(pod)
    del bare["metadata"]["annotations"]
    as_user(cluster, OURS, "POST", f"{PODS}/{name}/binding", bare)

    running = cluster.wait_phase(name, "Running")
    assert placement_of(running) == WRITTEN
    cluster.delete_pod(name)
    cluster.wait_gone(name)


def test_pods_without_the_annotation_are_no_concern_of_the_policy(cluster: Cluster) -> None:
    notes = {"tangram.gpu/other": "x", "example.test/tangram.gpu": PLACEMENT_ANNOTATION}
    as_user(cluster, FORGER, "POST", PODS, gpu_pod("plain", annotations=notes))
    as_user(cluster, FORGER, "PATCH", f"{PODS}/plain", {"metadata": {"annotations": None}}, MERGE)
    as_user(cluster, FORGER, "DELETE", f"{PODS}/plain")
    cluster.wait_gone("plain")


def test_the_api_server_finds_nothing_odd_in_the_expressions(cluster: Cluster) -> None:
    path = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies/tangram-placement-annotation"

    def checked() -> Any:
        return cluster.get(path).get("status", {}).get("typeChecking")

    warnings = cluster.wait_for(lambda: [checked()] if checked() is not None else None, "its type check", 30)
    assert not warnings[0].get("expressionWarnings"), json.dumps(warnings, indent=1)
