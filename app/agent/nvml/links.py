"""How the GPUs of a node reach each other: NVLinks, PCIe paths, and whether the driver allows peer-to-peer.

Whether each link is up is asked at every look, so that one that goes down is seen; where it leads (about 33 ms a link
on real boards) is asked once. Peer-to-peer is asked again every minute, and at once when a mode or a link has changed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pynvml

from app.agent.nvml.device import A_WHILE_SECONDS, Device, bus_id, words
from app.report import Gpu, Link, NvLink, Signal

Common = Literal["internal", "single", "multiple", "hostbridge", "node", "system"]
Kind = Literal["switch", "direct", "bridge", "unknown"]

ANCESTORS: dict[int, Common] = {
    pynvml.NVML_TOPOLOGY_INTERNAL: "internal",
    pynvml.NVML_TOPOLOGY_SINGLE: "single",
    pynvml.NVML_TOPOLOGY_MULTIPLE: "multiple",
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: "hostbridge",
    pynvml.NVML_TOPOLOGY_NODE: "node",
    pynvml.NVML_TOPOLOGY_SYSTEM: "system",
}
REMOTE_GPU = 0
REMOTE_SWITCH = 2
REMOTE_UNKNOWN = 255  # virtual machines hide the switches
FIELD_LINK_SPEED = 164  # per link (scope), MB/s each way
FIELD_COMMON_SPEED = 90
P2P_READ = 0  # pynvml's NVML_P2P_CAPS_INDEX_READ is a tuple by mistake
NVLINK_GBS_EACH_WAY = {"pascal": 20.0, "volta": 25.0, "ampere": 25.0, "hopper": 25.0, "blackwell": 50.0}
"""Nominal GB/s each way of one link, where the driver does not tell the speed."""

CARDS = re.compile(r"\b(pcie|nvl|rtx|quadro|geforce|titan|a30|a40|a[456]000)\b", re.IGNORECASE)
"""Products that are cards: what links two of them is a bridge. NVML has no fact for this (the PCIe ancestor does not
tell modules of one board from cards), so it is by name, and only this word of the report hangs on it."""


@dataclass(frozen=True, slots=True)
class FarEnd:
    """Where an NVLink leads: to a GPU of this node (its bus id), or beyond (empty); what NVML calls it."""

    gpu: str
    kind: int | None


@dataclass(frozen=True, slots=True)
class NvLinks:
    """One GPU's NVLinks now: each by its number and whether it is up; how many of those that are up lead to each GPU
    (by bus id), and how many to switches.
    """

    states: tuple[tuple[int, bool], ...]
    to_gpu: dict[str, int]
    to_switches: int
    kind: Kind
    version: int | None
    gbs_each_way: float
    in_mig_mode: bool

    @property
    def active(self) -> int:
        """How many are up."""
        return sum(active for _, active in self.states)


NO_LINKS = NvLinks((), {}, 0, "unknown", None, 0.0, in_mig_mode=False)


def read_links(devices: Sequence[Device], gpus: Sequence[Gpu]) -> tuple[tuple[NvLink | None, ...], tuple[Link, ...]]:
    """Each GPU's NVLinks together, and every pair that is closer than across the sockets or has NVLink."""
    bus_ids = {device.bus_id for device in devices}
    nvlinks = [_nvlinks(device, gpu, bus_ids) for device, gpu in zip(devices, gpus, strict=True)]
    products = [gpu.product for gpu in gpus]
    own = tuple(_summary(of, _peers(number, nvlinks, products)) for number, of in enumerate(nvlinks))
    for number, device in enumerate(devices):
        peers = () if CARDS.search(products[number]) else _peers(number, nvlinks, products)
        device.signals += _signals(device, nvlinks[number], peers)
    links = []
    for i, a in enumerate(devices):
        for j in range(i + 1, len(devices)):
            b = devices[j]
            count, gbs = _between(a, nvlinks[i], b, nvlinks[j])
            pcie = _ancestor(a, b)
            if count or pcie != "system":
                p2p = _p2p(a, nvlinks[i], b, nvlinks[j])
                links.append(Link(a=a.uuid, b=b.uuid, nvlinks=count, gbs=gbs, pcie=pcie, p2p=p2p))
    return own, tuple(links)


# ---- one GPU ----


def _nvlinks(device: Device, gpu: Gpu, bus_ids: set[str]) -> NvLinks:
    in_mig_mode = gpu.mig is not None and gpu.mig.enabled
    try:
        return _read_nvlinks(device, gpu, bus_ids, in_mig_mode=in_mig_mode)
    except pynvml.NVMLError as error:  # lost while we looked; the next reading says so
        device.notes.append(f"NVLink: {words(error)}")
        return NO_LINKS


def _read_nvlinks(device: Device, gpu: Gpu, bus_ids: set[str], *, in_mig_mode: bool) -> NvLinks:
    states = _states(device, in_mig_mode=in_mig_mode)
    up = [link for link, active in states if active]
    ends = [_far_end(device, link, in_mig_mode=in_mig_mode) for link in up]
    to_gpu = Counter(end.gpu for end in ends if end.gpu in bus_ids)
    beyond = [end for end in ends if end.gpu not in bus_ids]
    version, gbs = None, NVLINK_GBS_EACH_WAY.get(gpu.architecture, 25.0) if states else 0.0
    if up:
        version, gbs = device.keep(
            "NVLink version and speed",
            lambda: (_version(device, up[0]), _gbs_each_way(device, up[0], gpu.architecture)),
            given=in_mig_mode,
        )
    return NvLinks(
        states=states,
        to_gpu=dict(to_gpu),
        to_switches=sum(end.kind in (REMOTE_SWITCH, REMOTE_UNKNOWN, None) for end in beyond),
        kind=_kind(ends, bus_ids, gpu.product),
        version=version,
        gbs_each_way=gbs,
        in_mig_mode=in_mig_mode,
    )


def _states(device: Device, *, in_mig_mode: bool) -> tuple[tuple[int, bool], ...]:
    """Each link and whether it is up. Which links there are is found once."""
    known = device.keep("NVLinks", lambda: _numbers(device), given=in_mig_mode)
    states = [device.ask(f"NVLink {link}", pynvml.nvmlDeviceGetNvLinkState, device.handle, link) for link in known]
    return tuple((link, bool(state)) for link, state in zip(known, states, strict=True))


def _numbers(device: Device) -> tuple[int, ...]:
    """INVALID_ARGUMENT is past the last link; NOT_SUPPORTED is one that this board does not have, and others may."""
    found = []
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        try:
            pynvml.nvmlDeviceGetNvLinkState(device.handle, link)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value == pynvml.NVML_ERROR_NOT_SUPPORTED:
                continue
            if error.value not in (pynvml.NVML_ERROR_FUNCTION_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT):
                device.notes.append(f"NVLink {link}: {words(error)}")
            break
        found.append(link)
    return tuple(found)


def _far_end(device: Device, link: int, *, in_mig_mode: bool) -> FarEnd:
    return device.keep(f"far end of NVLink {link}", lambda: _read_far_end(device, link), given=in_mig_mode)


def _read_far_end(device: Device, link: int) -> FarEnd:
    pci = device.ask(f"far end of NVLink {link}", pynvml.nvmlDeviceGetNvLinkRemotePciInfo, device.handle, link)
    kind = device.ask("kind of NVLink's far end", pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, device.handle, link)
    return FarEnd(bus_id(pci.domain, pci.bus, pci.device) if pci is not None else "", kind)


def _kind(ends: list[FarEnd], bus_ids: set[str], product: str) -> Kind:
    kinds = {REMOTE_GPU if end.gpu in bus_ids else end.kind for end in ends}
    if REMOTE_SWITCH in kinds:
        return "switch"
    if REMOTE_GPU in kinds:
        return "bridge" if CARDS.search(product) else "direct"
    return "unknown"


def _version(device: Device, link: int) -> int | None:
    version = device.ask("NVLink version", pynvml.nvmlDeviceGetNvLinkVersion, device.handle, link)
    return None if version is None else int(version)


def _gbs_each_way(device: Device, link: int, architecture: str) -> float:
    """Nominal speed of one link. NVML gives the signalling rate (25.781, 26.562, 53.125): steps of 25 are nominal."""
    for mbs in device.fields("NVLink speed", (FIELD_LINK_SPEED, link), (FIELD_COMMON_SPEED, 0)):
        if mbs:
            gbs = mbs / 1000
            return gbs if gbs < 25 else 25.0 * (gbs // 25)
    return NVLINK_GBS_EACH_WAY.get(architecture, 25.0)


# ---- one GPU among its peers ----


def _peers(number: int, nvlinks: list[NvLinks], products: list[str]) -> tuple[NvLinks, ...]:
    """The other GPUs of the same product: what they have, this one should have."""
    return tuple(
        other
        for peer, other in enumerate(nvlinks)
        if peer != number and products[peer] == products[number] and not other.in_mig_mode
    )


def _summary(own: NvLinks, peers: Sequence[NvLinks]) -> NvLink | None:
    """None on boards without NVLink.

    Out of the mesh is a GPU that reaches no switch while its peers do, or that is in MIG mode, which ends
    peer-to-peer on it whatever its links say.
    """
    meshed = any(peer.to_switches for peer in peers) or bool(own.in_mig_mode and own.to_switches)
    out = meshed and (own.in_mig_mode or not own.to_switches)
    if not own.states and not out:
        return None
    return NvLink(
        active=own.active,
        total=len(own.states),
        kind="switch" if out else own.kind,
        version=own.version,
        gbs_each_way=own.gbs_each_way,
        out_of_mesh=out,
    )


def _signals(device: Device, own: NvLinks, peers: Sequence[NvLinks]) -> list[Signal]:
    """Fewer links up than there were in this session, or than peers on the same board have.

    Not simply fewer than there are: bridges that nobody bought leave links down for good, and boards for some
    markets come with links turned off.
    """
    if own.in_mig_mode or not own.states:
        return []
    most = device.remember("most NVLinks up", max(own.active, device.recall("most NVLinks up", 0)))
    if own.active >= max([most, *(peer.active for peer in peers)]):
        return []
    down = len(own.states) - own.active
    return [Signal(name="nvlink", state="suspect", reason=f"{down} of {len(own.states)} NVLinks are down")]


# ---- two GPUs ----


def _between(a: Device, of_a: NvLinks, b: Device, of_b: NvLinks) -> tuple[int, int]:
    """NVLinks between two GPUs and their GB/s both ways.

    Direct links count where both ends list them. Through switches a pair can use every link of the GPU that has
    fewer (as nvidia-smi counts; all of a GPU's links are shared by its peers).
    """
    direct = min(of_a.to_gpu.get(b.bus_id, 0), of_b.to_gpu.get(a.bus_id, 0))
    count = direct + min(of_a.to_switches, of_b.to_switches)
    return count, int(2 * count * min(of_a.gbs_each_way, of_b.gbs_each_way))


def _ancestor(a: Device, b: Device) -> Common:
    try:
        level = a.keep(
            f"PCIe path to {b.uuid}",
            lambda: a.ask("PCIe path", pynvml.nvmlDeviceGetTopologyCommonAncestor, a.handle, b.handle),
        )
    except pynvml.NVMLError:
        return "system"
    return ANCESTORS.get(level, "system")


def _p2p(a: Device, of_a: NvLinks, b: Device, of_b: NvLinks) -> bool | None:
    try:
        status = a.keep(
            f"peer-to-peer with {b.uuid}",
            lambda: a.ask("peer-to-peer", pynvml.nvmlDeviceGetP2PStatus, a.handle, b.handle, P2P_READ),
            seconds=A_WHILE_SECONDS,
            given=(of_a.states, of_a.in_mig_mode, of_b.states, of_b.in_mig_mode),
        )
    except pynvml.NVMLError:
        return None
    if status in (None, pynvml.NVML_P2P_STATUS_UNKNOWN):
        return None
    return bool(status == pynvml.NVML_P2P_STATUS_OK)
