"""A Kubernetes cluster for end-to-end tests and for `make cluster`.

    open_cluster() ─┬─ ControlPlane     etcd, kube-apiserver, kube-controller-manager, KWOK: started here
                    ├─ KindCluster      TANGRAM_CLUSTER=kind: needs Docker and the kind command
                    └─ ExistingCluster  TANGRAM_CLUSTER=kubeconfig: whatever KUBECONFIG points to

All three give the same calls, start kube-schedulers on this machine, and let KWOK play the nodes that are
added. A `KUBECONFIG` that happens to be exported is never used unless TANGRAM_CLUSTER says so: these tests
delete things.
"""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import os
import random
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import yaml

from tests.e2e import toolchain
from tests.e2e.nodes import KubernetesObject
from tests.e2e.pki import Authority, signing_key_pair
from tests.e2e.processes import INHERITED, Processes

HERE = Path(__file__).parent

READY_SECONDS = 60.0  # about two are needed; a machine under load gets more
POLL_SECONDS = 0.05
KUBECTL_SECONDS = 60.0
REQUEST_SECONDS = 30.0
CONNECTIONS = 16  # requests in flight while many objects are created

SERVICE_RANGE = "10.0.0.0/24"
NOT_READY = "node.kubernetes.io/not-ready"
SCHEDULER = "kube-scheduler"
SCHEDULER_USER = "system:kube-scheduler"
CONTROLLER_MANAGER_USER = "system:kube-controller-manager"

# A test must wait for what it tests, not for a client's own rate limit.
CLIENT_QPS = 5000

Found = TypeVar("Found")
SchedulerConfig = Mapping[str, Any]


class Cluster:
    """What every kind of cluster can do. Sub-classes say how it starts and how one logs in."""

    api_url: str
    kubeconfig: Path
    admin_token: str | None = None

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tangram-cluster-"))
        self.processes = Processes(self.directory)
        self._controlplane = toolchain.build(toolchain.CONTROLPLANE)
        self._kwok = toolchain.build(toolchain.KWOK)
        self._ready_urls: dict[str, str] = {}
        self._http = httpx.Client(trust_env=False)

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End every process and remove every file (TANGRAM_KEEP_LOGS=1 keeps them); safe to call twice."""
        self.processes.stop_all()
        self._http.close()
        if os.environ.get("TANGRAM_KEEP_LOGS"):
            print(f"kept {self.directory}", flush=True)
        else:
            shutil.rmtree(self.directory, ignore_errors=True)

    # kubectl and HTTP

    def kubectl(self, *args: str, input: str | None = None, timeout: float = KUBECTL_SECONDS) -> str:
        """Run kubectl as the administrator and return what it prints; raise what it complains about."""
        done = subprocess.run(
            [*self.kubectl_command(), *args],
            input=input,
            env=self._own_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def kubectl_command(self) -> list[str]:
        """The words before kubectl's own, for a person to copy."""
        return [str(self._controlplane), "kubectl", f"--kubeconfig={self.kubeconfig}"]

    def request(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """One call to the API server as its administrator; the decoded reply, or httpx.HTTPStatusError."""
        reply = self._http.request(method, path, json=body, **options)
        if reply.is_error:
            raise httpx.HTTPStatusError(
                f"{method} {path}: {reply.status_code} {reply.text[:500]}",
                request=reply.request,
                response=reply,
            )
        return reply.json()

    def get(self, path: str, **query: str) -> Any:
        """GET `path` as the administrator."""
        return self.request("GET", path, params=query)

    def text(self, path: str) -> str:
        """GET what is not JSON: metrics, say."""
        reply = self._http.get(path)
        reply.raise_for_status()
        return reply.text

    def add_nodes(self, nodes: Iterable[KubernetesObject]) -> None:
        """Create nodes, many at a time. KWOK takes over those that say so."""
        self._create_all(("/api/v1/nodes", node) for node in nodes)

    def add_pods(self, pods: Iterable[KubernetesObject]) -> None:
        """Create pods, many at a time; their order of arrival is not promised."""
        self._create_all((_pods_path(_namespace_of(pod)), pod) for pod in pods)

    def _create_all(self, objects: Iterable[tuple[str, KubernetesObject]]) -> None:
        everything = list(objects)
        shares = [everything[first::CONNECTIONS] for first in range(CONNECTIONS)]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            for _ in pool.map(self._create_some, filter(None, shares)):
                pass

    def _create_some(self, objects: Sequence[tuple[str, KubernetesObject]]) -> None:
        """Create these one after the other on one connection, at a quarter of what httpx costs us."""
        connection, headers = self.connection()
        with contextlib.closing(connection):
            for path, wanted in objects:
                connection.request("POST", path, json.dumps(wanted), {"Content-Type": "application/json", **headers})
                reply = connection.getresponse()
                reply.read()
                if reply.status >= httpx.codes.BAD_REQUEST:
                    self.request("POST", path, wanted)  # once more, for its words, or since it was only busy

    def connection(self) -> tuple[http.client.HTTPConnection, dict[str, str]]:
        """A plain connection to the API server, and the headers that say who we are; for whoever sends a lot."""
        url = httpx.URL(self.api_url)
        headers = {} if self.admin_token is None else {"Authorization": f"Bearer {self.admin_token}"}
        if url.scheme == "https":
            secure = http.client.HTTPSConnection(url.host, url.port, timeout=REQUEST_SECONDS, context=self._trust())
            return secure, headers
        return http.client.HTTPConnection(url.host, url.port, timeout=REQUEST_SECONDS), headers

    def add_namespace(self, name: str) -> None:
        """Create a namespace and wait for its default service account, without which it takes no pods."""
        self.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        self._wait_for_default_service_account(name)

    def pod(self, name: str, namespace: str = "default") -> KubernetesObject:
        """The pod as the API server has it now."""
        found: KubernetesObject = self.get(f"{_pods_path(namespace)}/{name}")
        return found

    def pods(self, namespace: str = "default") -> list[KubernetesObject]:
        """All pods of a namespace as the API server has them now."""
        found: list[KubernetesObject] = self.get(_pods_path(namespace))["items"]
        return found

    def delete_pod(self, name: str, namespace: str = "default", *, grace_seconds: int | None = None) -> None:
        """Delete a pod; `grace_seconds=0` is the forced form, which does not wait for the kubelet."""
        query = {} if grace_seconds is None else {"gracePeriodSeconds": str(grace_seconds)}
        self.request("DELETE", f"{_pods_path(namespace)}/{name}", params=query)

    def delete_all_pods(self, namespace: str = "default", *, timeout: float = 60.0) -> None:
        """Delete every pod of a namespace at once and wait until none is left."""
        self.request("DELETE", _pods_path(namespace), params={"gracePeriodSeconds": "0"})
        self.wait_for(lambda: not self.pods(namespace), f"{namespace} to have no pods", timeout)

    def wait_pod(
        self,
        name: str,
        condition: Callable[[KubernetesObject], Any],
        *,
        namespace: str = "default",
        timeout: float = 30.0,
    ) -> KubernetesObject:
        """Wait until the pod fulfils `condition`, and return it."""
        seen: dict[str, KubernetesObject] = {}

        def look() -> KubernetesObject | None:
            seen["pod"] = self.pod(name, namespace)
            return seen["pod"] if condition(seen["pod"]) else None

        try:
            return self.wait_for(look, f"pod {name}", timeout)
        except TimeoutError as late:
            raise TimeoutError(f"{late}; its status is {json.dumps(seen['pod']['status'])}") from None

    def wait_scheduled(self, name: str, *, namespace: str = "default", timeout: float = 30.0) -> str:
        """Wait until the pod has a node, and return the node's name."""
        pod = self.wait_pod(name, lambda pod: pod["spec"].get("nodeName"), namespace=namespace, timeout=timeout)
        return str(pod["spec"]["nodeName"])

    def wait_phase(
        self, name: str, phase: str, *, namespace: str = "default", timeout: float = 30.0
    ) -> KubernetesObject:
        """Wait until the pod is Pending, Running, Succeeded or Failed, and return it."""
        return self.wait_pod(
            name, lambda pod: pod["status"].get("phase") == phase, namespace=namespace, timeout=timeout
        )

    def wait_gone(self, name: str, *, namespace: str = "default", timeout: float = 30.0) -> None:
        """Wait until the API server knows no pod of that name."""

        def gone() -> bool:
            path = f"{_pods_path(namespace)}/{name}"
            return self._http.get(path).status_code == httpx.codes.NOT_FOUND

        self.wait_for(gone, f"pod {name} to be gone", timeout)

    def wait_for(self, look: Callable[[], Found | None], what: str, timeout: float = READY_SECONDS) -> Found:
        """Ask `look` again and again until it has an answer that counts as true, and return that."""
        deadline = time.monotonic() + timeout
        while True:
            found = look()
            if found:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:.0f} s for {what}")
            time.sleep(POLL_SECONDS)

    # kube-scheduler

    def start_scheduler(
        self, config: SchedulerConfig | Path | None = None, *, name: str = SCHEDULER, verbosity: int = 2
    ) -> None:
        """Start a kube-scheduler on this machine with that configuration; return when its caches are full.

        How it reaches the API server is filled in here; all else is used as it stands. Several may run, each
        under its own `name` (and its own profile's `schedulerName`).
        """
        file = self.directory / f"{name}.yaml"
        file.write_text(json.dumps(self._completed(config)))
        port = free_port()
        certificate, key = self._serving_certificate()
        argv: list[str | Path] = [
            self._controlplane,
            "kube-scheduler",
            f"--config={file}",
            f"--v={verbosity}",
        ]
        argv += ["--bind-address=127.0.0.1", f"--secure-port={port}"]
        argv += [f"--tls-cert-file={certificate}", f"--tls-private-key-file={key}"]
        self._launch(name, argv, f"https://127.0.0.1:{port}/readyz")

    def kill_scheduler(self, name: str = SCHEDULER) -> None:
        """SIGKILL."""
        self.processes.kill(name)

    def restart(self, name: str = SCHEDULER) -> None:
        """Kill the process called `name` if it runs, start it again the same way, wait until it is ready."""
        self.processes.restart(name)
        self._wait_ready(name)

    def _completed(self, config: SchedulerConfig | Path | None) -> dict[str, Any]:
        given = yaml.safe_load(config.read_text()) if isinstance(config, Path) else config
        whole: dict[str, Any] = copy.deepcopy(dict(given or {}))
        whole.setdefault("apiVersion", "kubescheduler.config.k8s.io/v1")
        whole.setdefault("kind", "KubeSchedulerConfiguration")
        connection = whole.setdefault("clientConnection", {})
        connection["kubeconfig"] = str(self._scheduler_kubeconfig())
        connection.setdefault("qps", CLIENT_QPS)
        connection.setdefault("burst", CLIENT_QPS)
        whole["leaderElection"] = {"leaderElect": False}
        return whole

    def _scheduler_kubeconfig(self) -> Path:
        return self.kubeconfig

    # who may talk to the API server

    def service_account_token(
        self,
        name: str,
        *,
        namespace: str = "default",
        audiences: Sequence[str] = (),
        pod: str = "",
        seconds: int = 3600,
    ) -> str:
        """A token for a service account, as a kubelet would fetch it; bound to the pod of that name if one is given."""
        spec: dict[str, Any] = {"expirationSeconds": seconds}
        if audiences:
            spec["audiences"] = list(audiences)
        if pod:
            uid = self.pod(pod, namespace)["metadata"]["uid"]
            spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        return str(self.request("POST", path, {"spec": spec})["status"]["token"])

    def kubeconfig_for_service_account(self, name: str, *, namespace: str = "default") -> Path:
        """A kubeconfig file with which one is that service account, under real RBAC."""
        token = self.service_account_token(name, namespace=namespace)
        return self._write_kubeconfig(f"sa-{namespace}-{name}", {"token": token})

    def _write_kubeconfig(self, name: str, user: Mapping[str, str]) -> Path:
        cluster = self._cluster_for_kubeconfig()
        context = {"cluster": "tangram", "user": name, "namespace": "default"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tangram", "cluster": cluster}],
            "users": [{"name": name, "user": dict(user)}],
            "contexts": [{"name": "tangram", "context": context}],
            "current-context": "tangram",
        }
        file = self.directory / f"{name}.kubeconfig"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config, indent=1))
        return file

    def _cluster_for_kubeconfig(self) -> dict[str, Any]:
        """The server and its CA, in a kubeconfig's words."""
        raise NotImplementedError

    # processes

    def logs(self, name: str) -> str:
        """What a process of ours has written; `processes.names()` are the names."""
        return self.processes.logs(name)

    def be_still(self) -> None:
        """Nodes' leases are not renewed and no controller runs from now on, so that nothing is done in between.

        For measurements: 5,000 nodes renew 500 leases a second, and controllers follow every pod.
        """
        self.processes.kill("kube-controller-manager")
        self.processes.kill("kwok")
        config = self.directory / "still-stages.yaml"
        stages = (HERE / "kwok" / "stages.yaml").read_text()
        config.write_text(re.sub(r"(nodeLeaseDurationSeconds:) \d+", r"\1 0", stages))
        self._start_kwok(config)

    def _start_kwok(self, config: Path = HERE / "kwok" / "stages.yaml") -> None:
        port = free_port()
        argv: list[str | Path] = [self._kwok, f"--kubeconfig={self.kubeconfig}"]
        argv += [f"--config={config}", f"--server-address=127.0.0.1:{port}"]
        self._launch("kwok", argv, f"http://127.0.0.1:{port}/healthz")

    def _launch(self, name: str, argv: Sequence[str | Path], ready_url: str) -> None:
        self._ready_urls[name] = ready_url
        self.processes.start(name, argv, throwaway=True, environment=self._own_environment())
        self._wait_ready(name)

    def _wait_ready(self, name: str) -> None:
        last = "nothing"
        deadline = time.monotonic() + READY_SECONDS
        with httpx.Client(trust_env=False, verify=self._trust(), timeout=5) as client:
            while time.monotonic() < deadline:
                if not self.processes.is_running(name):
                    raise self.processes.failed(name, "ended while it was starting")
                try:
                    reply = client.get(self._ready_urls[name])
                    if reply.is_success:
                        return
                    last = f"{reply.status_code} {reply.text[-500:]}"
                except httpx.TransportError as error:
                    last = repr(error)
                time.sleep(POLL_SECONDS)
        raise self.processes.failed(name, f"was not ready after {READY_SECONDS:.0f} s ({last})")

    def _wait_for_default_service_account(self, namespace: str) -> None:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/default"
        self.wait_for(lambda: self._http.get(path).is_success, f"service account default in {namespace}")

    def _own_environment(self) -> dict[str, str]:
        """What our programs are given of the outer environment: enough to run, no proxy and no CA bundle."""
        kept = {key: os.environ[key] for key in INHERITED if key in os.environ}
        return {**kept, "HOME": str(self.directory)}

    def _trust(self) -> ssl.SSLContext:
        raise NotImplementedError

    def _serving_certificate(self) -> tuple[Path, Path]:
        raise NotImplementedError


class ControlPlane(Cluster):
    """A whole control plane on loopback, in about three seconds, with real RBAC and service accounts."""

    signing_key: Path
    """With which it signs service accounts' tokens."""

    def _start(self) -> None:
        self._authority = Authority(self.directory)
        self._serving = self._authority.server("loopback")
        self.admin_token = secrets.token_urlsafe(24)
        self._start_etcd()
        self._start_api_server()
        self.kubeconfig = self._write_kubeconfig("admin", {"token": self.admin_token})
        self._http.close()
        self._http = httpx.Client(
            base_url=self.api_url,
            verify=self._trust(),
            headers={"Authorization": f"Bearer {self.admin_token}"},
            timeout=REQUEST_SECONDS,
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=False,
        )
        self._start_controller_manager()
        self._start_kwok()
        self._wait_for_default_service_account("default")

    @property
    def ca_file(self) -> Path:
        """The certificate of the CA that signed every certificate here."""
        return self._authority.certificate_file

    def kubeconfig_for(self, user: str, *groups: str) -> Path:
        """A kubeconfig file with which one is `user`, a member of `groups`, by client certificate."""
        certificate, key = self._authority.client(user, groups)
        files = {"client-certificate": str(certificate), "client-key": str(key)}
        return self._write_kubeconfig(user.replace(":", "-").replace("/", "-"), files)

    def _start_etcd(self) -> None:
        client, peer = free_port(), free_port()
        self._etcd_url = f"http://127.0.0.1:{client}"
        argv: list[str | Path] = [
            self._controlplane,
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            "--unsafe-no-fsync",
        ]
        argv += [f"--listen-client-urls={self._etcd_url}", f"--listen-peer-urls=http://127.0.0.1:{peer}"]
        self._launch("etcd", argv, f"{self._etcd_url}/health")

    def _start_api_server(self) -> None:
        port = free_port()
        self.api_url = f"https://127.0.0.1:{port}"
        tokens = self.directory / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text(f'{self.admin_token},admin,admin,"system:masters"\n')
        public_key, private_key = signing_key_pair(self.directory)
        certificate, key = self._serving
        flags = {
            "etcd-servers": self._etcd_url,
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",  # without it a default route is looked for
            "endpoint-reconciler-type": "none",  # and a loopback endpoint would be refused
            "secure-port": port,
            "tls-cert-file": certificate,
            "tls-private-key-file": key,
            "client-ca-file": self._authority.certificate_file,
            "token-auth-file": tokens,
            "authorization-mode": "RBAC",
            "service-cluster-ip-range": SERVICE_RANGE,
            "service-account-issuer": self.api_url,
            "service-account-key-file": public_key,
            "service-account-signing-key-file": private_key,
            "allow-privileged": "true",
            # Nodes are created Ready, so that they can be used at once; this plugin would taint each new one.
            "disable-admission-plugins": "TaintNodesByCondition",
            "max-requests-inflight": 4000,  # a burst of pods is to meet kube-scheduler's limits, not these
            "max-mutating-requests-inflight": 2000,
        }
        self.signing_key = private_key
        self._launch("kube-apiserver", self._program("kube-apiserver", flags), f"{self.api_url}/readyz")

    def _start_controller_manager(self) -> None:
        port = free_port()
        certificate, key = self._serving
        flags = {
            "kubeconfig": self.kubeconfig_for(CONTROLLER_MANAGER_USER),
            "bind-address": "127.0.0.1",
            "secure-port": port,
            "tls-cert-file": certificate,
            "tls-private-key-file": key,
            "leader-elect": "false",
            "use-service-account-credentials": "true",
            "service-account-private-key-file": self.signing_key,
            "root-ca-file": self._authority.certificate_file,
            "kube-api-qps": CLIENT_QPS,
            "kube-api-burst": CLIENT_QPS,
        }
        argv = self._program("kube-controller-manager", flags)
        self._launch("kube-controller-manager", argv, f"https://127.0.0.1:{port}/healthz")

    def _program(self, name: str, flags: Mapping[str, object]) -> list[str]:
        return [str(self._controlplane), name, *(f"--{flag}={value}" for flag, value in flags.items())]

    def _scheduler_kubeconfig(self) -> Path:
        return self.kubeconfig_for(SCHEDULER_USER)

    def _cluster_for_kubeconfig(self) -> dict[str, Any]:
        return {"server": self.api_url, "certificate-authority": str(self.ca_file)}

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.ca_file))

    def _serving_certificate(self) -> tuple[Path, Path]:
        return self._serving


class ExistingCluster(Cluster):
    """A cluster that is already there, reached through `kubectl proxy` so that any kind of login works.

    Deletes only what a test deletes. Its own kubelets keep its own nodes; KWOK plays those that are added.
    """

    def __init__(self, kubeconfig: Path) -> None:
        super().__init__()
        self.kubeconfig = kubeconfig.resolve()

    def _start(self) -> None:
        authority = Authority(self.directory)
        self._serving = authority.server("loopback")
        self._ca_file = authority.certificate_file
        port = free_port()
        self.api_url = f"http://127.0.0.1:{port}"
        proxy = [*self.kubectl_command(), "proxy", f"--port={port}"]
        self._launch("kubectl-proxy", proxy, f"{self.api_url}/readyz")
        self._http.close()
        self._http = httpx.Client(base_url=self.api_url, timeout=REQUEST_SECONDS, trust_env=False)
        self._start_kwok()
        self._wait_for_default_service_account("default")

    def add_nodes(self, nodes: Iterable[KubernetesObject]) -> None:
        """Create nodes and wait until the cluster has taken away the taint that it gives to every new one."""
        added = list(nodes)
        super().add_nodes(added)
        names = {node["metadata"]["name"] for node in added}

        def usable() -> bool:
            tainted = {
                node["metadata"]["name"]
                for node in self.get("/api/v1/nodes")["items"]
                if any(taint["key"] == NOT_READY for taint in node["spec"].get("taints", []))
            }
            return not names & tainted

        self.wait_for(usable, f"{len(names)} nodes to be ready")

    def _own_environment(self) -> dict[str, str]:
        """A login helper named in the kubeconfig may need anything of ours, a proxy included."""
        return dict(os.environ)

    def _cluster_for_kubeconfig(self) -> dict[str, Any]:
        view = json.loads(self.kubectl("config", "view", "--raw", "--flatten", "--minify", "-o", "json"))
        cluster: dict[str, Any] = view["clusters"][0]["cluster"]
        return cluster

    def _trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self._ca_file))

    def _serving_certificate(self) -> tuple[Path, Path]:
        return self._serving


class KindCluster(ExistingCluster):
    """A kind cluster of our own, made from kind/cluster.yaml and deleted at the end."""

    CREATE_SECONDS = 600.0

    def __init__(self) -> None:
        for tool in ("kind", "docker"):
            if shutil.which(tool) is None:
                raise RuntimeError(f"TANGRAM_CLUSTER=kind needs the command {tool}, which is not on PATH")
        self._name = f"tangram-{secrets.token_hex(3)}"
        self._made = False
        directory = Path(tempfile.mkdtemp(prefix="tangram-kind-"))
        super().__init__(directory / "kubeconfig")

    def _start(self) -> None:
        self._made = True
        config = HERE / "kind" / "cluster.yaml"
        self._kind("create", "cluster", f"--config={config}", f"--kubeconfig={self.kubeconfig}", "--wait=120s")
        super()._start()

    def load_image(self, image: str) -> None:
        """Make a local Docker image known to the cluster's node."""
        self._kind("load", "docker-image", image)

    def stop(self) -> None:
        """Delete the cluster, then what runs on this machine."""
        super().stop()
        if self._made:
            self._made = False
            self._kind("delete", "cluster")
        shutil.rmtree(self.kubeconfig.parent, ignore_errors=True)

    def _kind(self, *args: str) -> None:
        done = subprocess.run(
            ["kind", *args, f"--name={self._name}"],
            capture_output=True,
            text=True,
            timeout=self.CREATE_SECONDS,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"kind {' '.join(args)}: {done.stderr.strip()}")


def open_cluster() -> Cluster:
    """The cluster that TANGRAM_CLUSTER asks for, not yet started: use it in a `with`."""
    kind = os.environ.get("TANGRAM_CLUSTER", "built-in")
    match kind:
        case "built-in" | "":
            return ControlPlane()
        case "kind":
            return KindCluster()
        case "kubeconfig":
            return ExistingCluster(Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config"))
        case _:
            raise ValueError(f"TANGRAM_CLUSTER is {kind!r}; it may be built-in, kind or kubeconfig")


def free_port() -> int:
    """A loopback port that nobody listens on, outside the range that outgoing connections use."""
    for _ in range(100):
        port = random.randint(10_000, 30_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free loopback port found in a hundred tries")


def _pods_path(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


def _namespace_of(pod: KubernetesObject) -> str:
    return str(pod["metadata"].get("namespace", "default"))
