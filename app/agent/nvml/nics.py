"""Which network card is nearest to a GPU, from sysfs: the one with which it shares the longest way through PCIe.

Cards are numbered in order of their PCI addresses. Where any card does RDMA only those that do are looked at: they are
the rails, and a board's management ports would be nearest to somebody, too. No NVML here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NETWORK_CLASS = "0x02"
"""A PCI network controller's class begins so: Ethernet 0x0200, InfiniBand 0x0207."""

SWITCHED = 2
"""So many common steps mean a common bridge beneath a root (`pci0000:10/0000:10:01.0/…`), not only the host bridge."""

Way = tuple[str, ...]
"""A device's place in PCIe, from the root complex down to the device without its function."""


class Nics:
    """The network cards of a node as the /sys at `sys` shows them, looked for once."""

    def __init__(self, sys: Path) -> None:
        self._pci = sys / "bus/pci/devices"
        cards = {_way(path) for path in _rdma(sys)} or {_way(path) for path in self._network()}
        self._cards = sorted(cards - {()}, key=lambda way: way[-1])

    def nearest(self, bus_id: str) -> int | None:
        """The number of the card that is nearest to the GPU at this address.

        Of several beneath the same switch the first, so that GPUs which share them have the same number. None where
        several are equally near only across the host bridge: then none of them is the GPU's own.
        """
        own = _way(self._pci / bus_id)
        if not own or not self._cards:
            return None
        shared = [_shared(own, way) for way in self._cards]
        nearest = [number for number, steps in enumerate(shared) if steps == max(shared)]
        return nearest[0] if max(shared) >= SWITCHED or len(nearest) == 1 else None

    def _network(self) -> list[Path]:
        """By PCI class: /sys/class/net shows only the cards of the agent's own network namespace."""
        return [path for path in _entries(self._pci) if _read(path / "class").startswith(NETWORK_CLASS)]


def _rdma(sys: Path) -> list[Path]:
    return [path / "device" for path in _entries(sys / "class/infiniband")]


def _way(device: Path) -> Way:
    """Empty where it is no PCI device, or a virtual function: that is no card of its own."""
    if not device.exists() or (device / "physfn").exists():
        return ()
    parts = device.resolve().parts
    roots = [number for number, part in enumerate(parts) if part.startswith("pci") and ":" in part]
    if not roots:
        return ()
    *way, last = parts[roots[0] :]
    return (*way, last.rpartition(".")[0] or last)


def _shared(a: Way, b: Way) -> int:
    for steps, (of_a, of_b) in enumerate(zip(a, b, strict=False)):
        if of_a != of_b:
            return steps
    return min(len(a), len(b))


def _entries(directory: Path) -> Iterable[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return ()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
