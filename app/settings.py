"""Every knob of the service, its unit and why it has that default. Read once; handlers never see the environment."""

import socket
from pathlib import Path

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


def _host_identity() -> str:
    return socket.gethostname()


LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """`tangram serve`'s settings. Each can be given as an option or as `TANGRAM_<NAME>` in the environment."""

    model_config = SettingsConfigDict(env_prefix="TANGRAM_", frozen=True, extra="ignore")

    nodes: Path | None = Field(
        default=None, description="inventory file (a JSON list of node reports); implies --standalone"
    )
    standalone: bool = Field(default=False, description="run without Kubernetes")

    host: str = Field(default="127.0.0.1", description="address of the public listener")
    port: int = Field(default=8080, ge=0, le=65535, description="port of the public listener")
    extender_host: str = Field(default="127.0.0.1", description="address of the extender listener")
    extender_port: int = Field(default=8443, ge=0, le=65535, description="port of the extender listener")
    cert: Path | None = Field(
        default=None, description="server certificate of the extender's and the agents' listener (PEM)"
    )
    key: Path | None = Field(default=None, description="its private key (PEM)")
    client_ca: Path | None = Field(
        default=None, description="CA that has signed the client certificates kube-scheduler may show (PEM)"
    )
    plain: bool = Field(
        default=False, description="serve the extender verbs and agents without TLS; only on loopback addresses"
    )
    agent_host: str = Field(default="127.0.0.1", description="address of the agents' listener")
    agent_port: int = Field(
        default=8444,
        ge=0,
        le=65535,
        description="port of the agents' listener: TLS with the certificate above, agents show their tokens",
    )
    agent_account: str = Field(
        default="tangram-agent", description="service account, in our namespace, whose tokens agents show"
    )
    token_review_seconds: float = Field(
        default=300.0,
        gt=0,
        description="an accepted agent token is not reviewed again for so long: 5,000 agents make 17 reviews a second, "
        "and a deleted agent's token counts no longer than this",
    )
    unauthenticated_agents: bool = Field(
        default=False,
        description="believe agents without a token, on the public listener too; for tests, benches and simulated "
        "fleets, so only where both listen on loopback addresses",
    )

    kubeconfig: Path | None = Field(default=None, description="kubeconfig file; absent: the pod's own service account")
    namespace: str = Field(default="tangram-system", description="where the Lease and the agents' account live")
    lease_name: str = Field(
        default="tangram", description="name of the Lease: one holder serves; the Role that ships allows this name only"
    )
    identity: str = Field(
        default_factory=_host_identity,
        description="who we are in the Lease; a restarted container of the same pod keeps it, and so need not wait",
    )
    lease_seconds: float = Field(
        default=15.0,
        gt=0,
        description="how long a silent holder keeps the Lease; kube's own components use 15",
    )

    proposal_seconds: float = Field(
        default=10.0,
        gt=0,
        description="a proposal ends after this; kube-scheduler binds within a second or so",
    )
    stale_seconds: float = Field(
        default=30.0,
        gt=0,
        description="an agent silent for this long makes its node stale: six missed reports",
    )
    cycle_deadline_seconds: float = Field(
        default=1.0, gt=0, description="filter and prioritize answer within this, or say that they could not"
    )
    most_nodes: int = Field(
        default=100,
        ge=0,
        description="filter answers with at most so many of the nodes that fit, the best first, and says why not only "
        "where none does; 0: all, each other with its reason. kube-scheduler scores each node that it gets. Pods "
        "with preferences (preferred affinity, soft spreading) get all; 100 is kube-scheduler's own least sample",
    )
    bind_deadline_seconds: float = Field(
        default=12.0,
        gt=0,
        description="no Binding is sent later than this; below kube-scheduler's httpTimeout of 15",
    )
    slice_seconds: float = Field(
        default=8.0,
        gt=0,
        description="a bind waits so long for its MIG slices to be made; the rest of its 12 s is for the API server",
    )
    order_retry_seconds: float = Field(
        default=60.0,
        gt=0,
        description="a GPU on which an order failed is offered again after this, even if nothing has changed there",
    )
    idle_slice_seconds: float = Field(
        default=600.0,
        ge=0,
        description="an idle MIG slice is kept so long for the next pod of its size, then destroyed; "
        "0: kept until its room is wanted",
    )
    mig_modes: bool = Field(
        default=False,
        description="switch the MIG mode of idle GPUs that do it without a reset (Hopper and later) where that helps",
    )
    refused_seconds: float = Field(
        default=30.0,
        ge=0,
        description="a node whose kubelet has refused a pod is not offered for a like ask for so long, and until its "
        "agent has reported again; doubled each time up to 10 minutes, forgotten after a success",
    )
    orphan_seconds: float = Field(
        default=20.0,
        gt=0,
        description="an assumed pod that nobody binds for this long loses its annotation, and then its devices",
    )
    blind_seconds: float = Field(
        default=30.0,
        ge=0,
        description="after a start, nodes whose agents cannot see which pods use a GPU wait this long: "
        "pods deleted by force while nobody watched may still be ending (30 s is the usual grace time)",
    )
    wake_seconds: float = Field(
        default=1.0, gt=0, description="at most one node is touched in this time to wake refused pods"
    )
    resync_seconds: float = Field(
        default=300.0,
        gt=0,
        description="a watch is ended and lists again after this, should an event be lost",
    )
    planning: bool = Field(
        default=True,
        description="plan all pending pods together, in a process of its own; without it each is placed by itself",
    )
    plan_interval_seconds: float = Field(
        default=0.5,
        gt=0,
        description="at least so long between two plans: kube-scheduler places tens of pods in it",
    )
    plan_limit_seconds: float = Field(
        default=2.0,
        gt=0,
        description="a plan is the best found in this time; mostly it is proven to be the best in a tenth of it",
    )
    value_tables: bool = Field(
        default=True,
        description="find what states of each MIG geometry are worth (seconds each, in the planning process)",
    )
    forecast: bool = Field(
        default=False,
        description="value nodes by the pods that have come (shares, CPU, scarce models) instead of by best fit",
    )
    report_limit_bytes: int = Field(default=1 << 20, gt=0, description="largest agent report that is read")
    request_limit_bytes: int = Field(
        default=64 << 20,
        gt=0,
        description="largest extender request that is read: 5,000 full nodes are 43 MB",
    )
    tell_blocked_seconds: float = Field(
        default=0.0,
        ge=0,
        description="log what the event loop was doing when it was blocked for longer; 0: only count it (/metrics)",
    )
    log_level: str = Field(default="info", description="debug, info, warning or error")

    @model_validator(mode="after")
    def _agree(self) -> "Settings":
        if self.plain and not (self.extender_host in LOOPBACK and self.agent_host in LOOPBACK):
            raise ValueError("--plain is for loopback addresses only: give certificates, or bind to 127.0.0.1")
        if self.unauthenticated_agents and not (self.host in LOOPBACK and self.agent_host in LOOPBACK):
            raise ValueError(
                "--unauthenticated-agents is for loopback addresses only: anybody who reaches --host or --agent-host "
                "could say what is on every node"
            )
        given = [name for name in ("cert", "key", "client_ca") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"--cert, --key and --client-ca belong together; only {', '.join(given)} given")
        if not given and not self.plain and not self.without_kubernetes:
            raise ValueError(
                "the extender verbs need --cert, --key and --client-ca (see `tangram certs`), and so do agents, "
                "or --plain for a kube-scheduler on this very machine"
            )
        if not given and self.without_kubernetes and self.host not in LOOPBACK:
            raise ValueError("standalone without certificates listens on a loopback address only")
        return self

    @property
    def without_kubernetes(self) -> bool:
        """Standalone, asked for directly or by giving an inventory file."""
        return self.standalone or self.nodes is not None

    @property
    def one_listener(self) -> bool:
        """Standalone without certificates: one plain loopback listener has every route."""
        return self.without_kubernetes and self.cert is None

    @property
    def agents_are_public(self) -> bool:
        """Whether the public listener takes agents' reports: only where nobody else than this machine reaches it."""
        return self.host in LOOPBACK and (self.without_kubernetes or self.unauthenticated_agents)
