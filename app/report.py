"""What an agent says about its node: the wire form shared by agent, service and inventory files.

A full report carries everything and a version; an unchanged one is `{"node": ..., "version": ...}` and
nothing else. No decisions here; `inventory` turns a report into the solver's `Node`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

NodeName = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Uuid = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Text = Annotated[str, StringConstraints(max_length=500)]


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Placement(_Wire):
    """A legal position of a profile on the board's grid, in memory-slice units."""

    start: int = Field(ge=0, le=63)
    size: int = Field(ge=1, le=64)


class Profile(_Wire):
    """A GPU instance profile as NVML lists it for this board (`name` without the leading "MIG ")."""

    name: Text
    id: int = Field(ge=0)
    compute_slices: int = Field(ge=0, le=64)
    memory_mib: int = Field(ge=0)
    placements: tuple[Placement, ...] = Field(max_length=64)
    engines: dict[str, int] = Field(default_factory=dict)
    max_instances: int = Field(default=0, ge=0)


class Instance(_Wire):
    """A GPU instance that exists. `uuid` is the MIG device's, absent while it has no compute instance.

    `start` and `size` are None where the agent may not see them (an unprivileged agent).
    """

    profile: Text
    gi_id: int = Field(ge=0)
    start: int | None = Field(default=None, ge=0, le=63)
    size: int | None = Field(default=None, ge=1, le=64)
    uuid: Uuid | None = None
    pods: tuple[Uuid, ...] = ()


class Mig(_Wire):
    """MIG on one GPU: mode now and after the next reset (None: the same), what can be made, what exists."""

    enabled: bool
    pending: bool | None = None
    profiles: tuple[Profile, ...] = Field(default=(), max_length=64)
    instances: tuple[Instance, ...] = Field(default=(), max_length=64)


class Gpu(_Wire):
    """One physical GPU. `mig` is None on boards without MIG. `pods` are UIDs of pods with a process on it.

    `nic` numbers the network card that is nearest to it, `watts` is its power limit; both may be unknown.
    """

    uuid: Uuid
    index: int = Field(ge=0, le=1023)
    minor: int | None = None
    product: Text
    architecture: Text = "unknown"
    compute_capability: Text = ""
    memory_mib: int = Field(ge=0)
    pci: Text = ""
    numa: int | None = None
    nic: int | None = Field(default=None, ge=0, le=1023)
    watts: int = Field(default=0, ge=0, le=100_000)
    health: Literal["ok", "suspect", "bad"] = "ok"
    health_reason: Text = ""
    mig: Mig | None = None
    pods: tuple[Uuid, ...] = ()


class Link(_Wire):
    """How two GPUs (by UUID) reach each other. Pairs that are not listed are reached at class SYS.

    `nvlinks` counts active links (through switches: the smaller of both ends); `gbs` is their nominal
    bandwidth both ways; `pcie` is NVML's common ancestor of the PCIe path.
    """

    a: Uuid
    b: Uuid
    nvlinks: int = Field(default=0, ge=0, le=64)
    gbs: int = Field(default=0, ge=0)
    pcie: Literal["internal", "single", "multiple", "hostbridge", "node", "system"] = "system"


class NodeReport(_Wire):
    """Everything an agent knows about its node.

    `version` grows with each change (within one `boot` of the agent); `boot` tells a restarted agent from an
    old one. `sees_pods` is true where the agent can tell which pods have processes on a device.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    node: NodeName
    boot: Text = ""
    version: int = Field(ge=0)
    driver: Text = ""
    cuda: Text = ""
    nvml: Text = ""
    sees_pods: bool = False
    error: Text = ""
    gpus: tuple[Gpu, ...] = Field(default=(), max_length=64)
    links: tuple[Link, ...] = Field(default=(), max_length=4096)

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> "NodeReport":
        uuids = [gpu.uuid for gpu in self.gpus]
        if len(set(uuids)) != len(uuids):
            raise ValueError("two GPUs have the same uuid")
        if len({gpu.index for gpu in self.gpus}) != len(uuids):
            raise ValueError("two GPUs have the same index")
        known = set(uuids)
        for link in self.links:
            if link.a not in known or link.b not in known or link.a == link.b:
                raise ValueError(f"link between {link.a} and {link.b} does not join two GPUs of this node")
        return self


class Unchanged(_Wire):
    """The few bytes of a report that says nothing new."""

    node: NodeName
    boot: Text
    version: int = Field(ge=0)


class ReportReply(_Wire):
    """What the service answers: `resend` asks for the full report (it does not hold that version)."""

    resend: bool = False
