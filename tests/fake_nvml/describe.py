"""Describes nodes to the fake NVML library: Python values to the text that `description.c` reads.

    describe(sample_node("a", "8xA100-mig")).write(path)

    description = describe(node).with_gpu(3, lost=True).with_rules("hang nvmlDeviceGetName")

Facts that a solver's `Node` does not have are filled in: architecture, power limit and MIG capability from
`solver.products`, NVLinks from the bandwidths, the fabric and the tray where the product is built into an NVL72,
SM counts, CPU ranges and serial numbers by feel (nothing reads them). What goes wrong on a node while agents look
at it, and what else happens there, is said through `control`.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from solver.cluster import Gpu, Node
from solver.geometry import Geometry, Profile
from solver.products import PRODUCTS, Product
from solver.topology import PCIE_GBS

ARCHITECTURES = {"volta": 5, "turing": 6, "ampere": 7, "ada": 8, "hopper": 9, "blackwell": 10}  # nvml.h
ANCESTORS = {"internal": 0, "single": 10, "multiple": 20, "hostbridge": 30, "node": 40, "system": 50}  # nvml.h
NVLINK_MBPS = {"volta": 25781, "ampere": 25000, "hopper": 26562, "blackwell": 53125}  # as `nvidia-smi nvlink -s`
NVLINK_GBS_BOTH_WAYS = {"volta": 50, "ampere": 50, "hopper": 50, "blackwell": 100}
NVLINK_VERSIONS = {"volta": 2, "ampere": 5, "hopper": 6, "blackwell": 7}  # nvml.h's enum; A100: hwloc issue 658
BRAND_TESLA, BRAND_NVIDIA_RTX, BRAND_NVIDIA = 2, 13, 14
NVML_MAX_LINKS = 36
REMOTE_GPU, REMOTE_SWITCH, REMOTE_UNKNOWN = 0, 2, 255
MOST_MIG_DEVICES = 7
RESERVED_MIB = 512
IN_NVL72 = ("NVIDIA GB200", "NVIDIA GB300")
MODULE_IDS = (2, 1, 4, 3)  # of a GB200 tray's GPUs in index order, as listed
ENGINES = ("decoder", "encoder", "jpeg", "ofa")
NO_CLUSTER = "00000000-0000-0000-0000-000000000000"
ALL_WELL = 2 | 2 << 2 | 2 << 4 | 2 << 6 | 1 << 8 | 1 << 12 | 1 << 14
"""Fabric health: no degraded bandwidth, routes well, configuration right, partition and fabric manager there."""


@dataclass(frozen=True, slots=True)
class LinkEnd:
    """One NVLink of a GPU: whether it is up, and what is at its far end."""

    active: bool
    remote_type: int
    remote_bus_id: str


@dataclass(frozen=True, slots=True)
class Instance:
    """A GPU instance. Without `uuid` it holds no compute instance, so there is no MIG device to see.

    `parts` over 1 cuts it into so many compute instances of one slice each (their UUIDs are derived).
    """

    id: int
    profile: str
    start: int
    uuid: str | None
    mig_index: int
    parts: int = 1


@dataclass(frozen=True, slots=True)
class Process:
    """A process on a GPU, or in one of its instances. `kind` is c(ompute), g(raphics) or m(ps)."""

    pid: int
    instance: int = -1
    kind: str = "c"
    used_mib: int = 1024


@dataclass(frozen=True, slots=True)
class Fabric:
    """The NVLink fabric beyond the node: NVML's state (3: completed), and who shares it (HGX: no cluster)."""

    cluster: str = NO_CLUSTER
    clique: int = 0
    state: int = 3
    status: int = 0
    mask: int = ALL_WELL
    summary: int = 1


@dataclass(frozen=True, slots=True)
class Tray:
    """Where a GPU is in a rack."""

    module: int
    slot: int = 1
    tray: int = 0
    host: int = 1
    chassis: str = "1820000000001"


@dataclass(frozen=True, slots=True)
class GpuDescription:
    """One GPU as the fake shows it. `geometry` None: no MIG on this board.

    `lost` True: every call on its handle fails; "index": not even a handle can be had. `ecc` and `recovery` None: board
    or driver do not have that. `cpus` are the first and last of its NUMA node and of its socket. `facts` are further
    lines of `description.c`, such as "rows 0 1 1 0".
    """

    uuid: str
    name: str
    memory_mib: int
    bus_id: str
    numa: int | None
    minor: int
    architecture: str
    compute_capability: str
    links: tuple[LinkEnd, ...] = ()
    link_mbps: int = 0
    geometry: Geometry | None = None
    mig: bool = False
    mig_pending: bool | None = None
    profiles_need_mig: bool = False
    instances: tuple[Instance, ...] = ()
    processes: tuple[Process, ...] = ()
    lost: bool | str = False
    serial: str = ""
    part: str = ""
    brand: int = BRAND_NVIDIA
    watts: int = 0
    ecc: bool | None = True
    ecc_pending: bool | None = None
    recovery: int | None = None
    compute_mode: int = 0
    persistence: bool = True
    gpu_numa: int | None = None
    cpus: tuple[int, int, int, int] | None = None
    nvlink_version: int = 0
    fabric: Fabric | None = None
    tray: Tray | None = None
    facts: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """This GPU's part of the description."""
        major, _, minor = self.compute_capability.partition(".")
        lines = [
            f"gpu {self.uuid}",
            f"name {self.name}",
            f"memory {self.memory_mib} {RESERVED_MIB}",
            f"pci {self.bus_id}",
            f"minor {self.minor}",
            f"architecture {ARCHITECTURES[self.architecture]}",
            f"capability {major} {minor}",
            f"brand {self.brand}",
            f"compute_mode {self.compute_mode}",
            f"persistence {int(self.persistence)}",
            f"power {1000 * self.watts} {100 * self.watts}",
        ]
        lines += [f"{word} {text}" for word, text in (("serial", self.serial), ("part", self.part)) if text]
        if self.ecc is not None:
            lines.append(f"ecc {int(self.ecc)} {int(self.ecc if self.ecc_pending is None else self.ecc_pending)}")
        if self.recovery is not None:
            lines.append(f"recovery {self.recovery}")
        if self.gpu_numa is not None:
            lines.append(f"gpu_numa {self.gpu_numa}")
        if self.cpus is not None:
            lines.append(f"cpus {' '.join(map(str, self.cpus))}")
        if self.numa is not None:
            lines.append(f"numa {self.numa}")
        if self.lost:
            lines.append(f"lost {2 if self.lost == 'index' else 1}")
        if self.link_mbps:
            lines += [f"speed {self.link_mbps}", f"nvlink_version {self.nvlink_version}"]
        for number, end in enumerate(self.links):
            lines.append(f"link {number} {int(end.active)} {end.remote_type} {end.remote_bus_id}")
        if self.fabric is not None:
            f = self.fabric
            lines.append(f"fabric {f.state} {f.status} {f.clique} {f.mask} {f.summary} {f.cluster}")
        if self.tray is not None:
            t = self.tray
            lines.append(f"platform {t.slot} {t.tray} {t.host} 1 {t.module} {t.chassis}")
        if self.geometry is not None:
            lines += self._mig_lines(self.geometry)
        for process in self.processes:
            lines.append(f"process {process.kind} {process.pid} {process.instance} {process.used_mib}")
        return [*lines, *self.facts]

    def _mig_lines(self, geometry: Geometry) -> list[str]:
        pending = self.mig if self.mig_pending is None else self.mig_pending
        totals = dict(geometry.engines)
        lines = [
            f"mig {int(self.mig)} {int(pending)}",
            f"profiles_need_mig {int(self.profiles_need_mig)}",
            f"board {geometry.width} {geometry.compute_slices} {' '.join(str(totals.get(e, -1)) for e in ENGINES)}",
        ]
        profiles = {profile.name: profile for profile in geometry.profiles}
        for profile in geometry.profiles:
            engines = dict(profile.engines)
            media = " ".join(str(engines.get(name, 0)) for name in ENGINES)
            lines.append(
                f"profile {enum_of(profile, geometry)} {profile.id} {profile.compute_slices} {profile.memory_mib} "
                f"{14 * profile.compute_slices} {profile.compute_slices} {media} "
                f"{most(profile, geometry)} 0 MIG {profile.name}"
            )
            lines += [f"placement {profile.id} {start} {profile.size}" for start in profile.starts]
        for instance in self.instances:
            profile = profiles[instance.profile]
            lines.append(f"instance {instance.id} {profile.id} {instance.start} {profile.size}")
            if instance.uuid is None:
                continue
            slices = 1 if instance.parts > 1 else profile.compute_slices
            for part in range(instance.parts):
                name = (
                    instance.uuid if part == 0 else f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, instance.uuid + str(part))}"
                )
                lines.append(f"compute {instance.id} {part} {instance.mig_index + part} {slices} {name}")
        return lines


@dataclass(frozen=True, slots=True)
class NodeDescription:
    """A whole node. `ancestors` has PCIe classes by pair of GPU positions; pairs that are not there are SYS.

    `privileged` False: an ordinary user, who cannot list instances; `configures` False: who can list, but not change.

    `rules` are lines like `delay nvmlDeviceGetName 30`, `hang nvmlDeviceGetName`, `fail nvmlDeviceGetName 15 2`.
    """

    gpus: tuple[GpuDescription, ...]
    driver: str = "580.95.05"
    nvml: str = "13.580.95.05"
    cuda: int = 13000
    privileged: bool = True
    configures: bool = True
    ancestors: Mapping[tuple[int, int], str] = field(default_factory=dict)
    rules: tuple[str, ...] = ()

    def with_gpu(self, index: int, **changes: object) -> NodeDescription:
        """The same node with one GPU changed."""
        changed: GpuDescription = replace(self.gpus[index], **changes)  # type: ignore[arg-type]
        return replace(self, gpus=(*self.gpus[:index], changed, *self.gpus[index + 1 :]))

    def with_rules(self, *rules: str) -> NodeDescription:
        """The same node with these delays, hangs and failures (and no others)."""
        return replace(self, rules=rules)

    def text(self) -> str:
        """What the library reads."""
        lines = [
            f"driver {self.driver}",
            f"nvml {self.nvml}",
            f"cuda {self.cuda}",
            f"privileged {int(self.privileged)}",
            f"configures {int(self.configures)}",
            *self.rules,
        ]
        for gpu in self.gpus:
            lines += gpu.lines()
        lines += [f"ancestor {a} {b} {ANCESTORS[common]}" for (a, b), common in self.ancestors.items()]
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> Path:
        """Put it there in one step, so that a library that follows the file never reads half of it."""
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as scratch:
            scratch.write(self.text())
        os.replace(scratch.name, path)
        return path


def describe(node: Node) -> NodeDescription:
    """The node as its NVML would show it: idle, healthy, with the instances that the sample has."""
    bus_ids = [bus_id(index) for index in range(len(node.gpus))]
    numa_nodes = 1 + max((gpu.numa or 0 for gpu in node.gpus), default=0)
    products = {product.name: product for product in PRODUCTS}
    gpus = []
    for position, gpu in enumerate(node.gpus):
        product = products[gpu.product]
        per_link = NVLINK_GBS_BOTH_WAYS.get(product.architecture, 0)
        links = _links(node.links[position], per_link, bus_ids, most_links=_most_links(node, per_link))
        gpus.append(
            GpuDescription(
                uuid=gpu.uuid,
                name=gpu.product,
                memory_mib=gpu.memory_mib,
                bus_id=bus_ids[position],
                numa=gpu.numa,
                minor=gpu.index,
                architecture=product.architecture,
                compute_capability=product.compute_capability,
                links=links,
                link_mbps=NVLINK_MBPS.get(product.architecture, 0) if links else 0,
                geometry=gpu.geometry or product.geometry,
                mig=gpu.geometry is not None,
                instances=_instances(gpu),
                serial=_serial(node, position),
                part=f"900-{product.memory_mib:05}-0000-000",
                brand=_brand(product.name),
                watts=product.watts,
                recovery=0 if product.architecture in ("hopper", "blackwell") else None,
                gpu_numa=2 + 8 * position if product.name in IN_NVL72 else None,
                cpus=_cpus(gpu.numa, numa_nodes, grace=product.name in IN_NVL72),
                nvlink_version=NVLINK_VERSIONS.get(product.architecture, 0),
                fabric=_fabric(product, links),
                tray=Tray(MODULE_IDS[position % 4]) if product.name in IN_NVL72 else None,
            )
        )
    return NodeDescription(gpus=tuple(gpus), ancestors=_ancestors(node))


def _serial(node: Node, position: int) -> str:
    """The board's: two GPUs of a superchip share it."""
    board = position // 2 if node.gpus[position].product in IN_NVL72 else position
    return f"{uuid.uuid5(uuid.NAMESPACE_OID, f'{node.name}/{board}').int % 10**13:013}"


def _brand(name: str) -> int:
    return BRAND_TESLA if name.startswith("Tesla") else BRAND_NVIDIA_RTX if " RTX " in name else BRAND_NVIDIA


def _cpus(numa: int | None, numa_nodes: int, *, grace: bool) -> tuple[int, int, int, int] | None:
    """Two sockets; of more NUMA nodes than two, each socket has one half."""
    if numa is None:
        return None
    each = 72 if grace else 56 if numa_nodes <= 2 else 16
    per_socket = max(1, numa_nodes // 2)
    socket = numa // per_socket
    last = each * per_socket * (socket + 1) - 1
    return each * numa, each * (numa + 1) - 1, each * per_socket * socket, last


def _fabric(product: Product, links: tuple[LinkEnd, ...]) -> Fabric | None:
    """Hopper and later with NVSwitches; in an NVL72 all trays are one clique of one cluster."""
    if product.architecture not in ("hopper", "blackwell") or not any(
        end.remote_type == REMOTE_SWITCH for end in links
    ):
        return None
    if product.name in IN_NVL72:
        return Fabric(cluster=str(uuid.uuid5(uuid.NAMESPACE_OID, "rack 1")))
    return Fabric()


def bus_id(index: int) -> str:
    """A made-up PCI bus id, as NVML writes it."""
    return f"00000000:{0x10 + 8 * index:02X}:00.0"


def enum_of(profile: Profile, geometry: Geometry) -> int:
    """NVML's GPU instance profile enum (nvml.h): by slices, attribute, and double memory for a larger 1g."""
    tail = profile.name.split("gb", 1)[1]
    plain = [other.size for other in geometry.profiles if other.compute_slices == profile.compute_slices]
    if profile.compute_slices == 1 and not tail and profile.size > min(plain):
        return 9
    by_tail = {
        "": {1: 0, 2: 1, 3: 2, 4: 3, 7: 4, 8: 5, 6: 6},
        "+me": {1: 7, 2: 8},
        "+gfx": {1: 10, 2: 11, 3: 17, 4: 12},
        "-me": {1: 13, 2: 14},
        "+me.all": {1: 15, 2: 16},
    }
    return by_tail[tail][profile.compute_slices]


def most(profile: Profile, geometry: Geometry) -> int:
    """How many instances of one profile the board takes: what its starts and the engine totals allow."""
    count, free_from = 0, 0
    for start in sorted(profile.starts):
        if start >= free_from:
            count, free_from = count + 1, start + profile.size
    totals = dict(geometry.engines)
    return min([count, *(totals[name] // use for name, use in profile.engines if name in totals and use)])


def _nvlink(gbs: int, per_link: int) -> int:
    """How many links make this bandwidth; PCIe classes are lower than any NVLink here and make none."""
    return gbs // per_link if per_link and gbs not in PCIE_GBS.values() else 0


def _most_links(node: Node, per_link: int) -> int:
    return max((_nvlink(gbs, per_link) for row in node.links for gbs in row), default=0)


def _links(row: Sequence[int], per_link: int, bus_ids: list[str], *, most_links: int) -> tuple[LinkEnd, ...]:
    """The links of one GPU. More than a GPU can have to its peers one by one means switches."""
    counts = [_nvlink(gbs, per_link) for gbs in row]
    if most_links and sum(counts) > NVML_MAX_LINKS:
        return tuple(LinkEnd(True, REMOTE_SWITCH, _switch(number)) for number in range(max(counts)))
    if most_links and not any(counts):  # out of the mesh: its links are down
        return tuple(LinkEnd(False, REMOTE_SWITCH, _switch(number)) for number in range(most_links))
    return tuple(LinkEnd(True, REMOTE_GPU, bus_ids[peer]) for peer, count in enumerate(counts) for _ in range(count))


def _switch(number: int) -> str:
    return f"00000000:{0xF0 + number % 4:02X}:00.0"


def _ancestors(node: Node) -> dict[tuple[int, int], str]:
    """The PCIe class of each pair; beneath NVLink it is not in a `Node`, so the socket decides."""
    by_gbs: dict[int, str] = {}
    for common, gbs in PCIE_GBS.items():
        if common != "internal":
            by_gbs.setdefault(gbs, common)
    found = {}
    for a, gpu in enumerate(node.gpus):
        for b in range(a + 1, len(node.gpus)):
            same_socket = gpu.numa is not None and gpu.numa == node.gpus[b].numa
            common = by_gbs.get(node.links[a][b], "node" if same_socket else "system")
            if common != "system":
                found[a, b] = common
    return found


def _instances(gpu: Gpu) -> tuple[Instance, ...]:
    """With ids and MIG indices that are not in order of place, and a hole, as on a node with a history."""
    return tuple(
        Instance(
            id=2 + number,
            profile=slice_.profile,
            start=slice_.start,
            uuid=f"MIG-{uuid.uuid5(uuid.NAMESPACE_OID, f'{gpu.uuid}/{slice_}')}",
            mig_index=number + (len(gpu.instances) < MOST_MIG_DEVICES),
        )
        for number, slice_ in enumerate(reversed(gpu.instances))
    )
