"""What an agent says about its node, and what it is told to do: the wire form shared by agent, service and files.

    agent ── POST /v1/reports ── NodeReport, or Unchanged ──▶ service      what is there
    agent ── POST /v1/orders ─── Listening (held open) ─────▶ service      what shall be there
          ◀───────────────────── OrdersReply ────────────────      and who gets which device
    agent ── POST /v1/exchange ─ Exchange ──────────────────▶ service      the kubelet took others
          ◀───────────────────── ExchangeReply ──────────────

A full report carries everything and a version; an unchanged one is a few bytes. An order list is level-triggered:
it says everything that is wanted now, so that both sides agree by comparing, whatever was lost. No decisions here;
`inventory` turns a report into the solver's `Node`, `orders` makes the lists.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal

import orjson
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    WrapValidator,
    model_validator,
)

NodeName = Annotated[str, StringConstraints(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9._-]+$")]
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


MOST_PROFILES_BYTES = 16 << 10
"""What is shared is kept, so it must not be made up at will. The largest board that there is needs 2 kB."""


@lru_cache(maxsize=1024)
def _profiles(text: bytes) -> tuple[Profile, ...]:
    return TypeAdapter(tuple[Profile, ...]).validate_json(text)


def _once(value: object, validate: Callable[[object], tuple[Profile, ...]]) -> tuple[Profile, ...]:
    """Equal boards share what their profiles are: those of 5,000 nodes with 8 GPUs would be 700 MB."""
    try:
        text = orjson.dumps(value)
    except TypeError:  # already models
        return validate(value)
    if len(text) > MOST_PROFILES_BYTES:
        raise ValueError(f"the profiles of one board are more than {MOST_PROFILES_BYTES} bytes")
    try:
        return _profiles(text)
    except ValueError:  # the usual way says where
        return validate(value)


Profiles = Annotated[tuple[Profile, ...], WrapValidator(_once)]


class Process(_Wire):
    """A process on a device. `pod` is its pod's UID, empty where it belongs to none (or that cannot be seen).

    `used_mib` is rounded up to multiples of 256 (None: the driver does not say), so that a report does not
    change with every allocation.
    """

    pid: int = Field(ge=0)
    pod: Annotated[str, StringConstraints(max_length=100)] = ""
    kind: Literal["compute", "graphics", "mps"] = "compute"
    used_mib: int | None = Field(default=None, ge=0)


class ComputeInstance(_Wire):
    """A compute instance within a GPU instance; each is a MIG device with a UUID. `start` is None where unseen."""

    id: int = Field(ge=0)
    slices: int = Field(default=0, ge=0, le=64)
    start: int | None = Field(default=None, ge=0, le=63)
    uuid: Uuid | None = None


class Instance(_Wire):
    """A GPU instance that exists. `uuid` is the MIG device's, absent while it has no compute instance.

    `start` and `size` are None where the agent may not see them (an unprivileged agent). `compute` has every compute
    instance, `processes` every process in it.
    """

    profile: Text
    gi_id: int = Field(ge=0)
    start: int | None = Field(default=None, ge=0, le=63)
    size: int | None = Field(default=None, ge=1, le=64)
    uuid: Uuid | None = None
    pods: tuple[Uuid, ...] = ()
    compute: tuple[ComputeInstance, ...] = Field(default=(), max_length=64)
    processes: tuple[Process, ...] = Field(default=(), max_length=1024)


class Mig(_Wire):
    """MIG on one GPU: mode now and after the next reset (None: the same), what can be made, what exists.

    `switches`: the mode changes without a reset (Hopper and later). `note` says in words what an operator must do
    before the mode can be other than it is; empty where nothing.
    """

    enabled: bool
    pending: bool | None = None
    switches: bool = False
    note: Text = ""
    profiles: Profiles = Field(default=(), max_length=64)
    instances: tuple[Instance, ...] = Field(default=(), max_length=64)


Health = Literal["ok", "suspect", "bad"]


class Signal(_Wire):
    """One sign of a GPU's health that is not "ok", by its name: "xid", "ecc", "rows", "lost", "nvlink", "clocks", …"""

    name: Text
    state: Health
    reason: Text = ""


class NvLink(_Wire):
    """A GPU's NVLinks together: how many are active of how many there are, and to what they lead.

    `kind` is "switch" (NVSwitch), "direct" (to GPUs of this board), "bridge" (a bridge between cards) or "unknown".
    `version` is NVML's enum, not a generation. `gbs_each_way` is the nominal speed of one link.
    """

    active: int = Field(ge=0, le=64)
    total: int = Field(ge=0, le=64)
    kind: Literal["switch", "direct", "bridge", "unknown"] = "unknown"
    version: int | None = Field(default=None, ge=0)
    gbs_each_way: float = Field(default=0.0, ge=0)
    out_of_mesh: bool = False


class Fabric(_Wire):
    """The NVLink fabric that reaches beyond the node (GB200 NVL72): GPUs with equal `cluster` and `clique` share it."""

    state: Literal["not-started", "in-progress", "completed"]
    cluster: Text = ""
    clique: int | None = Field(default=None, ge=0)
    health: Text = ""


class Gpu(_Wire):
    """One physical GPU. `mig` is None on boards without MIG. `pods` are UIDs of pods with a process on it.

    `nic` numbers the network card that is nearest to it, `watts` is its power limit; both may be unknown.
    `free_mib` is rounded down to multiples of 256. `ecc` is whether it is on (None: the board has none). `health` is
    the worst of `signals`. What an agent does not know is absent.
    """

    uuid: Uuid
    index: int = Field(ge=0, le=1023)
    minor: int | None = None
    serial: Text = ""
    product: Text
    brand: Text = ""
    architecture: Text = "unknown"
    compute_capability: Text = ""
    memory_mib: int = Field(ge=0)
    reserved_mib: int | None = Field(default=None, ge=0)
    free_mib: int | None = Field(default=None, ge=0)
    pci: Text = ""
    numa: int | None = None
    nic: int | None = Field(default=None, ge=0, le=1023)
    watts: int = Field(default=0, ge=0, le=100_000)
    ecc: bool | None = None
    ecc_pending: bool | None = None
    compute_mode: Text = ""
    health: Health = "ok"
    health_reason: Text = ""
    signals: tuple[Signal, ...] = Field(default=(), max_length=64)
    nvlink: NvLink | None = None
    fabric: Fabric | None = None
    mig: Mig | None = None
    pods: tuple[Uuid, ...] = ()
    processes: tuple[Process, ...] = Field(default=(), max_length=1024)


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
    p2p: bool | None = None
    """Whether the driver allows peer-to-peer (read) between them; None: it does not say."""


class SliceAt(_Wire):
    """A place on a board: the profile by NVML's own name, from this memory-slice unit."""

    gpu: Uuid
    profile: Text
    start: int = Field(ge=0, le=63)


class Make(SliceAt):
    """Make this slice (or leave it if it is there), after removing the instances that are in its way.

    Those of one `group` are for one pod: if one of them fails, those that were made in the same turn are removed again.
    """

    group: Text = ""
    remove: tuple[SliceAt, ...] = Field(default=(), max_length=64)


class Switch(_Wire):
    """Turn MIG mode on or off on this GPU, if that needs no reset and nobody uses it."""

    gpu: Uuid
    enabled: bool


class DeviceAt(_Wire):
    """A device as promised: a whole GPU, a slice (`profile` by NVML's own name, `start`), or a share (`milli`)."""

    gpu: Uuid
    profile: Text = ""
    start: int = Field(default=0, ge=0, le=63)
    milli: int = Field(default=0, ge=0, le=1000)


class ContainerAsk(_Wire):
    """What a container asks the kubelet for, by resource name; only resources that Tangram places."""

    name: Text
    resources: dict[Text, int]


class PodAt(_Wire):
    """A pod of this node that asks for devices. `devices` are empty where Tangram has not placed it and does not know.

    `containers` are those that ask, in the order in which the kubelet admits them: init containers first.
    """

    uid: Uuid
    namespace: Text
    name: Text
    devices: tuple[DeviceAt, ...] = Field(default=(), max_length=1024)
    containers: tuple[ContainerAsk, ...] = Field(default=(), max_length=256)


class Placements(_Wire):
    """Every pod of this node that has devices, or will have once its bind is made; with its own service and version.

    `either`: GPUs whose MIG mode the service may switch, so they are offered to the kubelet in both forms.
    """

    service: Text
    version: int = Field(ge=0)
    pods: tuple[PodAt, ...] = Field(default=(), max_length=4096)
    either: tuple[Uuid, ...] = Field(default=(), max_length=64)


class Exchange(_Wire):
    """An agent asks: the kubelet counts `take` for this pod, not `give`; may it have those instead? Both of one kind.

    It may be asked again until it is answered: where the pod already has `take` the answer is yes.
    """

    node: NodeName
    uid: Uuid
    give: tuple[DeviceAt, ...] = Field(min_length=1, max_length=64)
    take: tuple[DeviceAt, ...] = Field(min_length=1, max_length=64)


class ExchangeReply(_Wire):
    """Whether the placement is now as the kubelet counts; if not, why. `swapped`: pods that got devices in return."""

    granted: bool
    reason: Text = ""
    swapped: tuple[Uuid, ...] = ()


Handing = Literal["placed", "free", "swapped", "overridden", "unplaced", "observed"]
"""How a container came by its devices: the placed ones; after an exchange for free ones or with another pod; the
placed ones although the kubelet counts others; those that the kubelet chose for a pod that Tangram had not placed; or
by another device plugin, as PodResources says."""


class Handed(_Wire):
    """What a container really has of one resource. `ids`: what the kubelet counts, where that names other devices.

    `uid` is empty where only the names are known.
    """

    uid: Annotated[str, StringConstraints(max_length=100)] = ""
    namespace: Text
    name: Text
    container: Text
    resource: Text
    devices: tuple[DeviceAt, ...] = Field(default=(), max_length=1024)
    ids: tuple[Text, ...] = Field(default=(), max_length=1024)
    how: Handing = "placed"


class OrderList(_Wire):
    """Everything that this node shall have changed now. `service` tells a restarted service from an old one.

    `make` and `remove` never concern the same place; `remove` names idle instances that nobody wants.
    """

    service: Text
    version: int = Field(ge=0)
    make: tuple[Make, ...] = Field(default=(), max_length=1024)
    remove: tuple[SliceAt, ...] = Field(default=(), max_length=1024)
    switch: tuple[Switch, ...] = Field(default=(), max_length=64)


class Failed(_Wire):
    """An order that could not be carried out, in words. Without `profile`: switching the mode of the GPU."""

    gpu: Uuid
    profile: Text = ""
    start: int = Field(default=0, ge=0, le=63)
    reason: Text


class OrdersDone(_Wire):
    """The last list that the agent has worked through before it read what it reports, and what of it failed."""

    service: Text
    version: int = Field(ge=0)
    failed: tuple[Failed, ...] = Field(default=(), max_length=1024)


class NodeReport(_Wire):
    """Everything an agent knows about its node.

    `version` grows with each change (within one `boot` of the agent); `boot` tells a restarted agent from an
    old one. `sees_pods` is true where the agent can tell which pods have processes on a device.
    `makes_slices`: whether it makes and removes MIG slices when told to; False with `makes_none` in words (it can see
    and cannot change, say), None where nobody says (simulated nodes: slices are taken to be made on paper).
    `versions` are of what else is on the node: "kernel", "toolkit", "runtime".
    `hands`: whether the agent is the kubelet's device plugin, or reads from the kubelet what another plugin gave; None:
    neither. `hands_none` says in words why it cannot just now. `handed` is what containers have, `handing` counts since
    the agent's start how each came about and by which rule the pod was found.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    node: NodeName
    boot: Text = ""
    version: int = Field(ge=0)
    driver: Text = ""
    cuda: Text = ""
    nvml: Text = ""
    versions: dict[str, Text] = Field(default_factory=dict)
    sees_pods: bool = False
    makes_slices: bool | None = None
    makes_none: Text = ""
    orders: OrdersDone | None = None
    hands: Literal["plugin", "observe"] | None = None
    hands_none: Text = ""
    handed: tuple[Handed, ...] = Field(default=(), max_length=4096)
    handing: dict[Text, int] = Field(default_factory=dict)
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
    """What the service answers: `resend` asks for the full report (it does not hold that version).

    `service` is the running service's own id: order lists of another must not be carried out any more.
    """

    resend: bool = False
    service: Text = ""


class Listening(_Wire):
    """An agent waits for orders: its report's version, the lists that it has (none: empty, 0), and how long it waits.

    It also says "nothing new" as `Unchanged` does. Answered at once where there is a newer list, or a report to
    send; else when `wait_seconds` are over.
    """

    node: NodeName
    boot: Text
    version: int = Field(ge=0)
    service: Text = ""
    orders: int = Field(default=0, ge=0)
    placements: int = Field(default=0, ge=0)
    wait_seconds: float = Field(default=10.0, ge=0, le=60)


class OrdersReply(_Wire):
    """`resend` as in ReportReply; `orders` and `placements` where the list is another than the agent has, else None.

    Placements go only to agents that are the kubelet's device plugin.
    """

    resend: bool = False
    service: Text = ""
    orders: OrderList | None = None
    placements: Placements | None = None
