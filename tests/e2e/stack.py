"""All of Tangram on a real control plane, for the end-to-end tests, the throughput bench and `make cluster`.

    ControlPlane ── KWOK nodes
         ▲  ▲
         │  └── tangram serve ◀── reports over TLS, with tokens ── agents (real ones on the fake NVML library)
         │      (own account)
         └───── kube-scheduler ── extender verbs over mutual TLS ──▶ tangram serve

What is shipped is what runs: the RBAC and the admission policy of manifests/base, and the kube-scheduler
configuration that `tangram manifests` generates, changed only in where the service is found. Each real agent has a
pod on its node (KWOK plays it) and that pod's token, as the kubelet would fetch it for the DaemonSet's pod.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self, TypeVar

import httpx
import yaml

from app.certs import create_certificates
from app.manifests import Form, scheduler_configuration
from app.simulate import report_of
from app.trust import AUDIENCE
from solver import Node
from tests.e2e.cluster import SCHEDULER, Cluster, free_port, open_cluster
from tests.e2e.kubelet import Kubelet, Policy, need_mount_namespace
from tests.e2e.nodes import KubernetesObject, gpu_node, gpu_pod, kubelet_node
from tests.fake_nvml.describe import NodeDescription, Process, describe
from tests.fake_nvml.fleet import Fleet

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "manifests" / "base"

SERVICE = "tangram"
AGENT_ACCOUNT = "tangram-agent"
GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-"
PLACEMENT = "tangram.gpu/placement"

APPLIED = (
    "Namespace",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
)
"""What is applied of manifests/base. The rest (Deployment, DaemonSet, Service) are the processes started here."""

READY_SECONDS = 60.0
POLL_SECONDS = 0.1
TOKEN_SECONDS = 30 * 24 * 3600  # `make cluster` may stay up for long, and nobody renews these tokens

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Knobs:
    """The service's and the agents' times, short so that a test need not wait long for what they bring about."""

    agent_interval_seconds: float = 1.0
    stale_seconds: float = 5.0
    orphan_seconds: float = 4.0
    lease_seconds: float = 15.0
    patience: float = 0.02
    """How long a GPU must be well again before it is offered, as a part of what is usual (a minute)."""
    unauthenticated_agents: bool = False
    """Agents are believed without a token, over plain HTTP: for reports that the test posts itself."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of `tangram serve`, without the dashes."""
    flags: tuple[str, ...] = ()
    """Further options that take no value, with their dashes."""


class Agents(Protocol):
    """Somebody who reports every node."""

    def start(self) -> None:
        """Begin to report."""

    def stop(self) -> None:
        """End for good."""

    def freeze(self, node: str) -> None:
        """The node falls silent, as if its agent hung."""

    def thaw(self, node: str) -> None:
        """It reports again."""

    def use(self, node: str, gpu: str, pod_uids: Sequence[str]) -> None:
        """From now on processes of exactly these pods run on that GPU (by UUID)."""


class Stack:
    """Everything, started by `with`. `stack.service` is the first service, `stack.cluster` the control plane."""

    live: ClassVar[list[Stack]] = []
    """Those that are up, for the log of a failed test."""

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        knobs: Knobs | None = None,
        agents: Callable[[Stack, str], Agents] | None = None,
        form: Form | None = "first",
        gateways: bool = False,
        service: bool = True,
        port: int = 0,
        kubelets: Sequence[Policy] = (),
        hand: str = "plugin",
        shares: bool = False,
    ) -> None:
        """`kubelets`: real device managers on all nodes, with these topology policies in turn; else KWOK plays kubelet.
        `hand`: whether their device plugins are the agents, or somebody whom the agents observe; `shares`: of GPUs too.

        `form` is which shipped kube-scheduler configuration runs (None: none is started).

        `gateways` puts a TCP relay before the API server (for the service only), before the service's agents'
        and before its extender listener, so that a test can cut and turn connections. `port` is the
        public listener's (0: a free one).
        """
        self.nodes = tuple(nodes)
        self.knobs = knobs or Knobs()
        self.form = form
        self.services: dict[str, Service] = {}
        self._make_agents = agents or real_agents
        self._with_service = service
        self._with_gateways = gateways
        self._port = port
        self._policies = tuple(kubelets)
        self.hand = hand
        self.shares = shares
        self.kubelets: dict[str, Kubelet] = {}
        """By node, where they are real."""
        self._closing = contextlib.ExitStack()

    @property
    def service(self) -> Service:
        """The first service."""
        return self.services[SERVICE]

    @property
    def real_agents(self) -> RealAgents:
        """The agents, where they are real ones."""
        assert isinstance(self.agents, RealAgents)
        return self.agents

    # -- up and down ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._closing.close()
            raise
        self.live.append(self)
        self._closing.callback(self.live.remove, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    def _start(self) -> None:
        self.cluster: Cluster = self._closing.enter_context(open_cluster())
        self.namespace, self.account = self._apply_manifests()
        self.certificates = self._make_certificates()
        bare = bool(self._policies)
        self.cluster.add_nodes(kubelet_node(node.name) if bare else kubernetes_node(node) for node in self.nodes)
        if self._with_gateways:
            self.api_gateway = self._closing.enter_context(Gateway(_port_of(self.cluster.api_url)))
            self.agents_gateway = self._closing.enter_context(Gateway())
            self.extender_gateway = self._closing.enter_context(Gateway())
        self.kubeconfig = self._service_kubeconfig()
        first = self.add_service(SERVICE, start=False, port=self._port)
        if self._with_gateways:
            self.turn_to(first)
        if self._policies:
            self._start_kubelets()
        self.agents = self._make_agents(self, self._agents_url(first))
        self._closing.callback(self.agents.stop)
        if self._with_service:
            first.start()
        self.agents.start()
        if self._with_service:
            first.wait_ready()
            self.wait_reported()
        if self.form is not None:
            self.start_scheduler(self.form)

    def _start_kubelets(self) -> None:
        need_mount_namespace()
        for number, node in enumerate(self.nodes):
            kubelet = Kubelet(
                self.cluster.processes,
                node.name,
                self.cluster.kubeconfig,
                policy=self._policies[number % len(self._policies)],
                numa_nodes=1 + max(gpu.numa or 0 for gpu in node.gpus),
                seed=number,
            )
            self.kubelets[node.name] = self._closing.enter_context(kubelet)

    def _agents_url(self, service: Service) -> str:
        port = self.agents_gateway.port if self._with_gateways else service.port_for_agents
        return f"{'http' if self.knobs.unauthenticated_agents else 'https'}://127.0.0.1:{port}"

    def _apply_manifests(self) -> tuple[str, str]:
        """Apply what is shipped; returns our namespace and our service account's name."""
        rendered = self.cluster.kubectl("kustomize", str(BASE))
        objects = [each for each in yaml.safe_load_all(rendered) if each]
        chosen = [each for each in objects if each["kind"] in APPLIED]
        chosen.sort(key=lambda each: APPLIED.index(each["kind"]))
        self.cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(chosen))
        deployment = next(each for each in objects if each["kind"] == "Deployment")
        return deployment["metadata"]["namespace"], deployment["spec"]["template"]["spec"]["serviceAccountName"]

    def _make_certificates(self) -> Path:
        """What `tangram certs` makes; `client/` has kube-scheduler's under the names of a mounted Secret."""
        directory = self.cluster.directory / "certificates"
        create_certificates(directory, ips=("127.0.0.1",), namespace=self.namespace)
        (directory / "client").mkdir()
        for name, file in {"tls.crt": "client.crt", "tls.key": "client.key", "ca.crt": "ca.crt"}.items():
            (directory / "client" / name).symlink_to(directory / file)
        return directory

    def _service_kubeconfig(self) -> Path:
        """A kubeconfig with which the service is its own service account, under the shipped RBAC."""
        config = json.loads(
            self.cluster.kubeconfig_for_service_account(self.account, namespace=self.namespace).read_text()
        )
        token = self.cluster.service_account_token(self.account, namespace=self.namespace, seconds=TOKEN_SECONDS)
        config["users"][0]["user"] = {"token": token}
        if self._with_gateways:
            server = config["clusters"][0]["cluster"]["server"]
            config["clusters"][0]["cluster"]["server"] = server.replace(
                str(_port_of(server)), str(self.api_gateway.port)
            )
        file = self.cluster.directory / "tangram.kubeconfig"
        file.touch(mode=0o600)
        file.write_text(json.dumps(config))
        return file

    # -- agents ---------------------------------------------------------------------------------------

    @property
    def ca_file(self) -> Path:
        """By what agents and kube-scheduler know the service."""
        return self.certificates / "ca.crt"

    def add_agent_pods(self) -> None:
        """On every node the pod that the DaemonSet would have there. It outlives `empty()`: it is not in "default"."""
        self.cluster.add_pods(agent_pod(node.name, self.namespace) for node in self.nodes)

    def agent_token(self, node: str) -> str:
        """A token as the kubelet of that node would fetch it for the agent's pod."""
        return self.cluster.service_account_token(
            AGENT_ACCOUNT,
            namespace=self.namespace,
            audiences=[AUDIENCE],
            pod=agent_pod_name(node),
            seconds=TOKEN_SECONDS,
        )

    # -- services -------------------------------------------------------------------------------------

    def add_service(
        self, name: str, *, start: bool = True, port: int = 0, options: Mapping[str, str] | None = None
    ) -> Service:
        """One more `tangram serve`, under its own identity (its name); its `options` come after those of the knobs."""
        service = Service(self, name, port=port, options=options or {})
        self.services[name] = service
        self._closing.callback(service.close)
        if start:
            service.start()
        return service

    def turn_to(self, service: Service) -> None:
        """Send agents and kube-scheduler to this service, as a Kubernetes Service does with the ready one."""
        self.agents_gateway.turn_to(service.port_for_agents)
        self.extender_gateway.turn_to(service.extender_port)

    def wait_reported(self, timeout: float = READY_SECONDS) -> None:
        """Wait until every node is offered."""
        names = {node.name for node in self.nodes}

        def all_offered() -> bool:
            shown = self.service.get(f"/v1/cluster?limit={max(1, len(names))}")["nodes"]
            return names <= {node["name"] for node in shown if node["offered"]}

        self.wait_for(all_offered, f"{len(names)} nodes to be offered", timeout)

    # -- kube-scheduler -------------------------------------------------------------------------------

    def start_scheduler(
        self, form: Form | None = None, *, name: str = SCHEDULER, service: Service | None = None
    ) -> None:
        """Start a kube-scheduler with the shipped configuration of that form."""
        self.cluster.start_scheduler(self.scheduler_configuration(form or "first", service), name=name)

    def scheduler_configuration(self, form: Form, service: Service | None = None) -> dict[str, Any]:
        """What `tangram manifests` generates for this machine's address and files."""
        port = (service or self.service).extender_port
        if self._with_gateways and service is None:
            port = self.extender_gateway.port
        url = f"https://127.0.0.1:{port}"
        return scheduler_configuration(
            form, url=url, namespace=self.namespace, tls_directory=str(self.certificates / "client")
        )

    def scheduler_name(self) -> str:
        """What pods say in `schedulerName` to be scheduled with us."""
        if self.form is None:
            return "default-scheduler"
        (profile,) = scheduler_configuration(self.form)["profiles"]
        return str(profile["schedulerName"])

    # -- looking --------------------------------------------------------------------------------------

    def wait_for(self, look: Callable[[], Found | None], what: str, timeout: float) -> Found:
        """Like the cluster's, with the service's words when it takes too long."""
        deadline = time.monotonic() + timeout
        while True:
            found = look()
            if found:
                return found
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {timeout:.0f} s for {what}")
            time.sleep(POLL_SECONDS)

    def placement(self, name: str, namespace: str = "default") -> dict[str, Any] | None:
        """The placement annotation of a pod, decoded; None where it has none."""
        text = self.cluster.pod(name, namespace)["metadata"].get("annotations", {}).get(PLACEMENT)
        return None if text is None else json.loads(text)

    def empty(self, timeout: float = 60.0) -> None:
        """Delete all pods and wait until the service has nothing held, promised or waiting."""
        self.cluster.delete_all_pods(timeout=timeout)
        try:
            self.wait_for(lambda: not self.service.get("/v1/pods")["pods"], "the service to hold nothing", timeout)
        except TimeoutError as late:
            raise TimeoutError(f"{late}; it says {self.service.get('/v1/pods')['pods'][:5]}") from None

    def logs(self) -> dict[str, str]:
        """What the services and kube-schedulers have written."""
        names = [*self.services, *(name for name in self.cluster.processes.names() if "scheduler" in name)]
        return {name: self.cluster.logs(name) for name in names if self._has_log(name)}

    def _has_log(self, name: str) -> bool:
        return (self.cluster.directory / f"{name}.log").exists()


class Service:
    """One `tangram serve` process."""

    def __init__(self, stack: Stack, name: str, *, port: int = 0, options: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._options = dict(options or {})
        self.port = port or free_port()
        self.extender_port = free_port()
        self.agent_port = free_port()
        self._stack = stack
        self._started = False
        self._http = httpx.Client(base_url=self.url, timeout=10, trust_env=False)

    @property
    def url(self) -> str:
        """The public listener."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def port_for_agents(self) -> int:
        """Where reports go: the agents' listener, or in plain HTTP the public one where nobody is authenticated."""
        return self.port if self._stack.knobs.unauthenticated_agents else self.agent_port

    def start(self) -> None:
        """Start it (again); does not wait until it is ready."""
        if self._started:
            self._processes.restart(self.name)
        else:
            self._processes.start(self.name, self._command(), environment={"PYTHONPATH": str(REPOSITORY)})
            self._started = True

    def close(self) -> None:
        """Close our own connections to it; the process ends with the cluster's."""
        self._http.close()

    def kill(self) -> None:
        """SIGKILL."""
        self._processes.kill(self.name)

    def restart(self) -> None:
        """Start it again after `kill` and wait until it is ready."""
        self.start()
        self.wait_ready()

    def freeze(self) -> None:
        """SIGSTOP."""
        self._processes.pause(self.name)

    def thaw(self) -> None:
        """SIGCONT."""
        self._processes.resume(self.name)

    def get(self, path: str) -> Any:
        """The decoded answer of its public listener."""
        reply = self._http.get(path)
        reply.raise_for_status()
        return reply.json()

    def readiness(self) -> dict[str, Any]:
        """What /readyz says, ready or not; not ready where it does not answer."""
        try:
            found: dict[str, Any] = self._http.get("/readyz").json()
        except httpx.TransportError as error:
            return {"ready": False, "waiting_for": [repr(error)], "warnings": []}
        return found

    def wait_ready(self, timeout: float = READY_SECONDS) -> None:
        """Wait until it may decide."""
        deadline = time.monotonic() + timeout
        while not (said := self.readiness())["ready"]:
            if not self._processes.is_running(self.name):
                raise self._processes.failed(self.name, "ended while it was starting")
            if time.monotonic() > deadline:
                raise self._processes.failed(self.name, f"is not ready: {said['waiting_for']}")
            time.sleep(POLL_SECONDS)

    def pod(self, uid: str) -> dict[str, Any] | None:
        """What it says of a pod; None where it knows none of that UID."""
        reply = self._http.get(f"/v1/pods/{uid}")
        return None if reply.status_code == httpx.codes.NOT_FOUND else dict(reply.json())

    def node(self, name: str) -> dict[str, Any]:
        """What it says of a node."""
        return dict(self.get(f"/v1/nodes/{name}"))

    def totals(self) -> dict[str, int]:
        """Its counts over the whole cluster."""
        return dict(self.get("/v1/cluster?limit=1")["totals"])

    def metric(self, name: str) -> float:
        """One sample of /metrics by its name and labels; 0 where it is not there yet."""
        for line in self._http.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def verb(self, verb: str, body: Any, *, certificate: tuple[Path, Path] | bool = True) -> Any:
        """One call to an extender verb, as kube-scheduler would make it; or with another client certificate."""
        files = self._stack.certificates
        context = ssl.create_default_context(cafile=str(files / "ca.crt"))
        if certificate is True:
            certificate = (files / "client.crt", files / "client.key")
        if certificate:
            context.load_cert_chain(*certificate)
        with httpx.Client(verify=context, timeout=20, trust_env=False) as client:
            reply = client.post(f"https://127.0.0.1:{self.extender_port}/{verb}", json=body)
            reply.raise_for_status()
            return reply.json()

    def as_agent(self, path: str, body: Any, *, token: str | None) -> httpx.Response:
        """One call to the agents' listener, whatever comes of it. `body`: bytes, or what JSON takes."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        sent: dict[str, Any] = {"content": body} if isinstance(body, bytes) else {"json": body}
        trust = ssl.create_default_context(cafile=str(self._stack.ca_file))
        with httpx.Client(verify=trust, timeout=30, trust_env=False) as client:
            return client.post(f"https://127.0.0.1:{self.agent_port}{path}", headers=headers, **sent)

    def public_post(self, path: str, body: Any, *, token: str) -> httpx.Response:
        """One POST to the public listener, with a token, whatever comes of it."""
        return self._http.post(path, json=body, headers={"Authorization": f"Bearer {token}"})

    def _command(self) -> list[str]:
        knobs = self._stack.knobs
        files = self._stack.certificates
        options = {
            "port": str(self.port),
            "extender-port": str(self.extender_port),
            "agent-port": str(self.agent_port),
            "cert": str(files / "server.crt"),
            "key": str(files / "server.key"),
            "client-ca": str(files / "ca.crt"),
            "kubeconfig": str(self._stack.kubeconfig),
            "namespace": self._stack.namespace,
            "identity": self.name,
            "lease-seconds": str(knobs.lease_seconds),
            "stale-seconds": str(knobs.stale_seconds),
            "orphan-seconds": str(knobs.orphan_seconds),
            **knobs.options,
            **self._options,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        words += knobs.flags
        if knobs.unauthenticated_agents:
            words.append("--unauthenticated-agents")
        return [sys.executable, "-m", "app.cli", "serve", *words]

    @property
    def _processes(self) -> Any:
        return self._stack.cluster.processes


# ------------------------------------------------------------------------------------------------------ agents


class RealAgents:
    """Real agents, one process for each node, that load the fake NVML library."""

    def __init__(
        self,
        nodes: Iterable[Node],
        url: str,
        directory: Path,
        *,
        interval_seconds: float,
        patience: float,
        tokens: Callable[[str], str] | None = None,
        ca_file: Path | None = None,
        kubelets: Mapping[str, Kubelet] | None = None,
        hand: str = "plugin",
        shares: bool = False,
    ) -> None:
        """`tokens` gives a node's agent its token; without it the agents show none.

        With `kubelets` the agents are these kubelets' device plugins, or observe others'.
        """
        self._descriptions = {node.name: describe(node) for node in nodes}
        self._tokens = tokens
        self._token_file = directory / "{node}.token"
        self.fleet = Fleet(
            directory,
            service=url,
            interval_seconds=interval_seconds,
            patience=patience,
            token_file=self._token_file if tokens else None,
            ca_file=ca_file,
            kubelets={name: kubelet.directory for name, kubelet in (kubelets or {}).items()},
            hand=hand,
            shares=shares,
        )
        self._next_pid = 1000

    def start(self) -> None:
        """Begin to report."""
        for name, description in self._descriptions.items():
            self.renew_token(name)
            self.fleet.describe(name, description)
            self.fleet.start(name)

    def stop(self) -> None:
        """End for good."""
        self.fleet.close()

    def freeze(self, node: str) -> None:
        """SIGSTOP: the agent keeps its connection and says nothing."""
        self.fleet.silence(node)

    def thaw(self, node: str) -> None:
        """SIGCONT."""
        self.fleet.resume(node)

    def use(self, node: str, gpu: str, pod_uids: Sequence[str]) -> None:
        """Processes of exactly these pods run on that GPU: NVML lists them, their cgroup files name the pods."""
        index = next(i for i, each in enumerate(self._descriptions[node].gpus) if each.uuid == gpu)
        processes = []
        for uid in pod_uids:
            self._next_pid += 1
            self.fleet.add_process(node, self._next_pid, uid)
            processes.append(Process(self._next_pid))
        self._descriptions[node] = self._descriptions[node].with_gpu(index, processes=tuple(processes))
        self.fleet.describe(node, self._descriptions[node])

    def change(self, node: str, change: Callable[[NodeDescription], NodeDescription]) -> None:
        """The node itself changes (a GPU is lost, say); its agent sees it at its next look."""
        self._descriptions[node] = change(self._descriptions[node])
        self.fleet.describe(node, self._descriptions[node])

    def renew_token(self, node: str) -> None:
        """A new token takes the old one's place in its file, as the kubelet does it; the agent reads it each time."""
        if self._tokens is None:
            return
        file = Path(str(self._token_file).replace("{node}", node))
        new = file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(self._tokens(node))
        new.replace(file)

    def restart(self, node: str) -> None:
        """The node is booted again, as it is described now: what its agent remembered was of the boot before."""
        self.fleet.reboot(node)


def real_agents(stack: Stack, url: str) -> Agents:
    """Real agents, each loading the fake NVML library."""
    directory = stack.cluster.directory / "agents"
    agents = partial(
        RealAgents,
        stack.nodes,
        url,
        directory,
        interval_seconds=stack.knobs.agent_interval_seconds,
        patience=stack.knobs.patience,
        kubelets=stack.kubelets,
        hand=stack.hand,
        shares=stack.shares,
    )
    if stack.knobs.unauthenticated_agents:
        return agents()
    stack.add_agent_pods()
    return agents(tokens=stack.agent_token, ca_file=stack.ca_file)


# ----------------------------------------------------------------------------------------------------- gateways


class Gateway:
    """A TCP relay on loopback that can be cut, mended and turned to another port.

    `delay_seconds` is how long what clients send is kept on its way.
    """

    def __init__(self, target: int = 0) -> None:
        self.port = free_port()
        self.delay_seconds = 0.0
        self._target = target
        self._open: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="gateway")

    def __enter__(self) -> Self:
        self._thread.start()
        self.mend()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._loop.close()

    def cut(self) -> None:
        """Close every connection and refuse new ones."""
        self._do(self._cut())

    def mend(self) -> None:
        """Take connections again."""
        self._do(self._mend())

    def turn_to(self, target: int) -> None:
        """Close every connection; new ones go to that port."""
        self._target = target
        self._do(self._drop())

    def _do(self, act: Any) -> None:
        asyncio.run_coroutine_threadsafe(act, self._loop).result(timeout=10)

    async def _mend(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port, reuse_address=True)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._drop()

    async def _drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0.05)  # let the relays see it

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, here = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, here}
        try:
            await asyncio.gather(self._pump(reader, here, slow=True), self._pump(there, writer))
        finally:
            for each in (writer, here):
                self._open.discard(each)
                each.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, slow: bool = False) -> None:
        try:
            while data := await source.read(1 << 16):
                if slow and self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                sink.write(data)
                await sink.drain()
            sink.write_eof()
        except OSError:
            sink.transport.abort()


def _port_of(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


# ------------------------------------------------------------------------------------------------ nodes and pods


def kubernetes_node(node: Node) -> KubernetesObject:
    """The node as its kubelet would register it beside NVIDIA's device plugin (`mixed` strategy).

    The counts of MIG profiles are upper bounds: as many of each as the boards take when they take nothing else.
    """
    allocatable: dict[str, int | str] = {}
    for gpu in report_of(node).gpus:
        if gpu.mig is None or not gpu.mig.enabled:
            allocatable[GPU] = int(allocatable.get(GPU, 0)) + 1
            continue
        for profile in gpu.mig.profiles:
            name = MIG + profile.name.replace("+", ".")
            allocatable[name] = int(allocatable.get(name, 0)) + profile.max_instances
    product = node.gpus[0].product.replace(" ", "-") if node.gpus else "none"
    return gpu_node(node.name, product, allocatable)


def agent_pod_name(node: str) -> str:
    """What the agent's pod on that node is called here."""
    return f"agent-{node}"


def agent_pod(node: str, namespace: str) -> KubernetesObject:
    """The agent's pod as far as its identity goes: the DaemonSet's account and priority, on that node."""
    pod = gpu_pod(agent_pod_name(node), namespace=namespace, priority_class="system-node-critical")
    pod["spec"] |= {
        "nodeName": node,
        "serviceAccountName": AGENT_ACCOUNT,
        "automountServiceAccountToken": False,
        "tolerations": [{"operator": "Exists"}],
    }
    return pod


GPU_ASKS = ((1, 8), (2, 5), (4, 4), (8, 3))
"""Whole GPUs asked for by a pod of a burst, and how often."""

SLICE_ASKS = (("1g.10gb", 8), ("1g.20gb", 4), ("2g.20gb", 5), ("3g.40gb", 5), ("7g.80gb", 2))
"""Five MIG profiles, and how often."""


def burst(
    count: int, *, seed: int, prefix: str = "pod", scheduler_name: str = "default-scheduler", **pod: Any
) -> list[KubernetesObject]:
    """A burst of pods, half of them for whole GPUs and half for one slice each, in random order."""
    rng = random.Random(seed)
    pods = []
    for number in range(count):
        if rng.random() < 0.5:
            (gpus,) = rng.choices([ask for ask, _ in GPU_ASKS], [weight for _, weight in GPU_ASKS])
            asks = {GPU: gpus}
        else:
            (profile,) = rng.choices([ask for ask, _ in SLICE_ASKS], [weight for _, weight in SLICE_ASKS])
            asks = {MIG + profile: 1}
        pods.append(gpu_pod(f"{prefix}-{number:03d}", asks, scheduler_name=scheduler_name, **pod))
    return pods
