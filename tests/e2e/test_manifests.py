"""What is shipped in `manifests/`, on the real API server and with the real kube-scheduler."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.certs import NAMESPACE, create_certificates
from app.manifests import Form, managed_resource_names, scheduler_configuration
from tests.e2e.cluster import Cluster, free_port, open_cluster
from tests.e2e.fake_extender import FakeExtender
from tests.e2e.nodes import gpu_node, gpu_pod

pytestmark = pytest.mark.e2e

MANIFESTS = Path(__file__).resolve().parents[2] / "manifests"
KUSTOMIZATIONS = ("base", "overlays/second-scheduler", "overlays/first-scheduler", "samples")
SLICES = {"nvidia.com/mig-1g.10gb": 28, "nvidia.com/mig-2g.20gb": 12, "nvidia.com/mig-3g.40gb": 8}
NODE = gpu_node("node-a", allocatable={"nvidia.com/gpu": 8, **SLICES}, labels={"nvidia.com/gpu.present": "true"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with open_cluster() as cluster:
        cluster.kubectl("apply", "-f", str(MANIFESTS / "base" / "namespace.yaml"))
        cluster.kubectl("apply", "-f", str(MANIFESTS / "base" / "rbac.yaml"))
        cluster.add_nodes([NODE])
        yield cluster


# -- accepted -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_is_accepted_by_the_api_server(cluster: Cluster, name: str) -> None:
    """Server-side dry run: unknown fields are errors, and admission runs."""
    rendered = list(yaml.safe_load_all(cluster.kubectl("kustomize", str(MANIFESTS / name))))

    accepted = cluster.kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(MANIFESTS / name))

    assert len(accepted.splitlines()) == len(rendered)
    assert all("server dry run" in line for line in accepted.splitlines())


def test_the_nvidia_runtime_class_can_be_added(cluster: Cluster, tmp_path: Path) -> None:
    """A component in use, from outside the repository's tree."""
    text = (
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{_relative(tmp_path, 'base')}]\n"
        f"components: [{_relative(tmp_path, 'components/nvidia-runtime-class')}]\n"
    )
    (tmp_path / "kustomization.yaml").write_text(text)

    rendered = yaml.safe_load_all(cluster.kubectl("kustomize", str(tmp_path)))

    (agent,) = [each for each in rendered if each["kind"] == "DaemonSet"]
    assert agent["spec"]["template"]["spec"]["runtimeClassName"] == "nvidia"


def test_agents_can_take_the_device_plugins_place(cluster: Cluster, tmp_path: Path) -> None:
    text = (
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [{_relative(tmp_path, 'base')}]\n"
        f"components: [{_relative(tmp_path, 'components/device-plugin')}]\n"
    )
    (tmp_path / "kustomization.yaml").write_text(text)

    rendered = yaml.safe_load_all(cluster.kubectl("kustomize", str(tmp_path)))

    (agent,) = [each for each in rendered if each["kind"] == "DaemonSet"]
    args = agent["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--hand=plugin", "--mig=make"} <= set(args)
    assert not {"--hand=observe", "--mig=observe"} & set(args)


def _relative(start: Path, name: str) -> str:
    return str(Path(*[".."] * (len(start.parts) - 1), *(MANIFESTS / name).parts[1:]))


def test_what_is_installed_runs_and_can_be_taken_away_again(cluster: Cluster) -> None:
    """The whole second-scheduler form, applied: its pods pass admission, are scheduled and start."""
    overlay = str(MANIFESTS / "overlays" / "second-scheduler")
    cluster.start_scheduler()
    cluster.kubectl("apply", "-k", overlay)

    for workload in ("deployment/tangram", "deployment/tangram-scheduler", "daemonset/tangram-agent"):
        cluster.kubectl("-n", NAMESPACE, "rollout", "status", workload, "--timeout=60s", timeout=70)
    cluster.kill_scheduler()

    cluster.kubectl("-n", NAMESPACE, "delete", "deployment,daemonset,service,networkpolicy", "--all")
    cluster.kubectl("delete", "-f", str(MANIFESTS / "base" / "admission.yaml"))


# -- rights -------------------------------------------------------------------------------------------

MAY = (
    "get pods", "list pods", "watch pods", "patch pods", "create pods/binding",
    "get nodes", "list nodes", "watch nodes", "patch nodes", "create tokenreviews.authentication.k8s.io",
    "create events.events.k8s.io",
)  # fmt: skip
MAY_IN_ITS_NAMESPACE = (
    "create leases.coordination.k8s.io", "get leases.coordination.k8s.io tangram",
    "update leases.coordination.k8s.io tangram",
    "create configmaps", "get configmaps tangram-binds", "update configmaps tangram-binds",
)  # fmt: skip
MAY_NOT = (
    "create pods", "update pods", "delete pods", "deletecollection pods", "create pods/eviction", "create pods/exec",
    "patch pods/status", "update pods/status", "create bindings", "get pods/log",
    "update nodes", "delete nodes", "create nodes", "patch nodes/status", "get nodes/proxy",
    "get secrets", "list secrets", "get configmaps", "list configmaps", "create serviceaccounts/token",
    "impersonate users", "impersonate serviceaccounts", "create events", "list events", "delete events",
    "update leases.coordination.k8s.io kube-scheduler", "delete leases.coordination.k8s.io tangram",
    "list leases.coordination.k8s.io", "create subjectaccessreviews.authorization.k8s.io",
    "update validatingadmissionpolicies.admissionregistration.k8s.io",
    "delete validatingadmissionpolicybindings.admissionregistration.k8s.io",
    "create clusterrolebindings.rbac.authorization.k8s.io", "escalate clusterroles.rbac.authorization.k8s.io",
)  # fmt: skip


@pytest.mark.parametrize("ask", MAY)
def test_the_service_may_do_what_it_does_everywhere(cluster: Cluster, ask: str) -> None:
    assert may(cluster, "tangram", ask, namespace="anywhere")


@pytest.mark.parametrize("ask", MAY_IN_ITS_NAMESPACE)
def test_the_service_keeps_its_lease_in_its_own_namespace_only(cluster: Cluster, ask: str) -> None:
    assert may(cluster, "tangram", ask, namespace=NAMESPACE)
    assert not may(cluster, "tangram", ask, namespace="kube-system")


@pytest.mark.parametrize("ask", MAY_NOT)
def test_the_service_may_do_nothing_else(cluster: Cluster, ask: str) -> None:
    assert not may(cluster, "tangram", ask, namespace=NAMESPACE)
    assert not may(cluster, "tangram", ask, namespace="anywhere")


@pytest.mark.parametrize("ask", [*MAY, *MAY_IN_ITS_NAMESPACE, *MAY_NOT])
def test_an_agent_may_do_nothing_at_all(cluster: Cluster, ask: str) -> None:
    assert not may(cluster, "tangram-agent", ask, namespace=NAMESPACE)


def may(cluster: Cluster, account: str, ask: str, *, namespace: str) -> bool:
    """`verb resource[/subresource][.group] [name]`, answered by the API server's authorizer."""
    verb, what, *name = ask.split()
    what, _, group = what.partition(".")
    resource, _, subresource = what.partition("/")
    attributes = {
        "namespace": namespace,
        "verb": verb,
        "group": group,
        "resource": resource,
        "subresource": subresource,
        "name": name[0] if name else "",
    }
    groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
    user = f"system:serviceaccount:{NAMESPACE}:{account}"
    review = {"spec": {"user": user, "groups": groups, "resourceAttributes": attributes}}
    reply = cluster.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(reply["status"]["allowed"])


# -- kube-scheduler -----------------------------------------------------------------------------------


class TlsExtender(FakeExtender):
    """Behind the certificates of `tangram certs`, as the extender listener is."""

    def __init__(self, cluster: Cluster, directory: Path) -> None:
        super().__init__(lambda body: bind(cluster, body))
        create_certificates(directory)
        self.client_directory = directory / "client"
        self.client_directory.mkdir()
        for name, file in {"tls.crt": "client.crt", "tls.key": "client.key", "ca.crt": "ca.crt"}.items():
            (self.client_directory / name).symlink_to(directory / file)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(directory / "ca.crt"))
        context.load_cert_chain(directory / "server.crt", directory / "server.key")
        context.verify_mode = ssl.CERT_REQUIRED
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    def configuration(self, form: Form) -> dict[str, Any]:
        """What is shipped, changed only in where the extender and the files are."""
        url = self.url.replace("http:", "https:")
        return scheduler_configuration(form, url=url, tls_directory=str(self.client_directory))


def bind(cluster: Cluster, body: dict[str, Any]) -> None:
    path = f"/api/v1/namespaces/{body['PodNamespace']}/pods/{body['PodName']}/binding"
    target = {"apiVersion": "v1", "kind": "Node", "name": body["Node"]}
    cluster.request("POST", path, {"metadata": {"name": body["PodName"], "uid": body["PodUID"]}, "target": target})


@pytest.fixture
def extender(cluster: Cluster, tmp_path: Path) -> Iterator[TlsExtender]:
    with TlsExtender(cluster, tmp_path / "certificates") as extender:
        yield extender
        for name in cluster.processes.names():
            if "scheduler" in name:
                cluster.kill_scheduler(name)
    cluster.delete_all_pods()


def test_first_form_asks_us_for_each_managed_name_and_only_then(cluster: Cluster, extender: TlsExtender) -> None:
    """Over mutual TLS, with the server's name checked although it is called by its address.

    A pod of no concern is scheduled without us. A managed name that the node lacks is refused in-tree (only
    the marker is not counted), so one node is made to have them all.
    """
    everything = gpu_node("node-all", allocatable=dict.fromkeys(set(managed_resource_names()) - {"tangram.gpu/ask"}, 1))
    cluster.add_nodes([everything])
    cluster.start_scheduler(extender.configuration("first"))
    names = {f"asks-{number}": name for number, name in enumerate(managed_resource_names())}
    cluster.add_pods([gpu_pod("plain")])
    cluster.add_pods(gpu_pod(pod, {resource: 1}) for pod, resource in names.items())

    cluster.wait_scheduled("plain")
    for pod in names:
        cluster.wait_scheduled(pod, timeout=60)

    assert extender.verbs_asked_about("plain") == []
    asked = {pod: extender.verbs_asked_about(pod) for pod in names}
    assert {pod: verbs for pod, verbs in asked.items() if (verbs[0], verbs[-1]) != ("filter", "bind")} == {}
    cluster.request("DELETE", "/api/v1/nodes/node-all")


def test_first_form_asks_us_for_what_only_an_init_container_wants(cluster: Cluster, extender: TlsExtender) -> None:
    cluster.start_scheduler(extender.configuration("first"))
    cluster.kubectl("apply", "-f", str(MANIFESTS / "samples" / "init-container.yaml"))

    cluster.wait_scheduled("prepares-on-two")
    assert extender.verbs_asked_about("prepares-on-two") == ["filter", "bind"]


def test_first_form_loads_as_it_is_shipped(cluster: Cluster, extender: TlsExtender) -> None:
    """The committed file, with only the place of its TLS files changed: nobody calls its address here."""
    text = (MANIFESTS / "overlays/first-scheduler/scheduler-configuration.yaml").read_text()
    cluster.start_scheduler(yaml.safe_load(text.replace("/etc/kubernetes/tangram", str(extender.client_directory))))
    cluster.add_pods([gpu_pod("plain")])

    cluster.wait_scheduled("plain")


def test_second_form_works_under_its_own_account_and_lease(
    cluster: Cluster, extender: TlsExtender, tmp_path: Path
) -> None:
    """As it is deployed: in the overlay's RBAC, with leader election, beside a first kube-scheduler.

    The zero-cost marker works here too, so that the same pod runs in both forms.
    """
    scheduler = MANIFESTS / "overlays/second-scheduler/scheduler.yaml"
    rights = [each for each in yaml.safe_load_all(scheduler.read_text()) if each["kind"] != "Deployment"]
    cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(rights))
    kubeconfig = cluster.kubeconfig_for_service_account("tangram-scheduler", namespace=NAMESPACE)
    configuration = extender.configuration("second")
    configuration["clientConnection"] = {"kubeconfig": str(kubeconfig)}  # in the cluster: the pod's own account
    file = tmp_path / "scheduler-configuration.yaml"
    file.write_text(json.dumps(configuration))
    kube_scheduler = [cluster.kubectl_command()[0], "kube-scheduler", f"--config={file}", "--v=2"]
    port = free_port()
    kube_scheduler += ["--bind-address=127.0.0.1", f"--secure-port={port}", f"--cert-dir={tmp_path}"]
    kube_scheduler += [f"--authentication-kubeconfig={kubeconfig}", f"--authorization-kubeconfig={kubeconfig}"]
    cluster.start_scheduler()
    cluster.processes.start("second-scheduler", kube_scheduler, throwaway=True)

    wanted = {"nvidia.com/gpu": 1, "tangram.gpu/ask": 1}
    cluster.add_pods([gpu_pod("ours", wanted, scheduler_name="tangram"), gpu_pod("theirs", {"nvidia.com/gpu": 1})])
    cluster.kubectl("apply", "-f", str(MANIFESTS / "samples" / "second-scheduler.yaml"))
    for name in ("ours", "theirs", "chooses-tangram"):
        cluster.wait_scheduled(name, timeout=60)

    assert extender.verbs_asked_about("theirs") == []
    assert extender.verbs_asked_about("ours") == ["filter", "bind"]
    lease = cluster.get(f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/tangram-scheduler")
    assert lease["spec"]["holderIdentity"]
    log = cluster.logs("second-scheduler")
    assert "is forbidden" not in log, [line for line in log.splitlines() if "is forbidden" in line][:5]


def test_extender_calls_need_our_client_certificate(extender: TlsExtender) -> None:
    """The stand-in listens as the service does, so that the tests above prove the certificates."""
    url = extender.url.replace("http:", "https:") + "/filter"
    trust = ssl.create_default_context(cafile=str(extender.client_directory / "ca.crt"))
    with httpx.Client(verify=trust, trust_env=False) as stranger, pytest.raises(httpx.TransportError):
        stranger.post(url, json={})
