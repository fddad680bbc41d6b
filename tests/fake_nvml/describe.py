"""Describes nodes to the fake NVML library: Python values to the text that `description.c` reads.

    describe(sample_node("a", "8xA100-mig")).write(path)

    description = describe(node).with_gpu(3, lost=True).with_rules("hang nvmlDeviceGetName")

Facts that a solver's `Node` does not have are filled in: architecture and MIG capability from `solver.products`,
NVLinks from the bandwidths, SM counts by feel (nothing reads them).
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
from solver.products import PRODUCTS
from solver.topology import PCIE_GBS

ARCHITECTURES = {"volta": 5, "turing": 6, "ampere": 7, "ada": 8, "hopper": 9, "blackwell": 10}  # nvml.h
ANCESTORS = {"internal": 0, "single": 10, "multiple": 20, "hostbridge": 30, "node": 40, "system": 50}  # nvml.h
NVLINK_MBPS = {"volta": 25781, "ampere": 25000, "hopper": 26562, "blackwell": 53125}  # as `nvidia-smi nvlink -s`
NVLINK_GBS_BOTH_WAYS = {"volta": 50, "ampere": 50, "hopper": 50, "blackwell": 100}
NVML_MAX_LINKS = 36
REMOTE_GPU, REMOTE_SWITCH, REMOTE_UNKNOWN = 0, 2, 255
RESERVED_MIB = 512


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


@dataclass(frozen=True, slots=True)
class GpuDescription:
    """One GPU as the fake shows it. `geometry` None: no MIG on this board.

    `lost` True: every call on its handle fails; "index": not even a handle can be had.
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
        ]
        if self.numa is not None:
            lines.append(f"numa {self.numa}")
        if self.lost:
            lines.append(f"lost {2 if self.lost == 'index' else 1}")
        if self.link_mbps:
            lines.append(f"speed {self.link_mbps}")
        for number, end in enumerate(self.links):
            lines.append(f"link {number} {int(end.active)} {end.remote_type} {end.remote_bus_id}")
        if self.geometry is not None:
            lines += self._mig_lines(self.geometry)
        lines += [f"process {process.kind} {process.pid} {process.instance}" for process in self.processes]
        return lines

    def _mig_lines(self, geometry: Geometry) -> list[str]:
        pending = self.mig if self.mig_pending is None else self.mig_pending
        lines = [f"mig {int(self.mig)} {int(pending)}", f"profiles_need_mig {int(self.profiles_need_mig)}"]
        profiles = {profile.name: profile for profile in geometry.profiles}
        for profile in geometry.profiles:
            engines = dict(profile.engines)
            media = " ".join(str(engines.get(name, 0)) for name in ("decoder", "encoder", "jpeg", "ofa"))
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

    `rules` are lines like `delay nvmlDeviceGetName 30`, `hang nvmlDeviceGetName`, `fail nvmlDeviceGetName 15 2`.
    """

    gpus: tuple[GpuDescription, ...]
    driver: str = "580.95.05"
    nvml: str = "13.580.95.05"
    cuda: int = 13000
    privileged: bool = True
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
            )
        )
    return NodeDescription(gpus=tuple(gpus), ancestors=_ancestors(node))


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
            mig_index=1 + number,
        )
        for number, slice_ in enumerate(reversed(gpu.instances))
    )
