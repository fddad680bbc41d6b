"""Which network card is nearest to a GPU, on made-up /sys trees."""

from __future__ import annotations

from pathlib import Path

from app.agent.nvml.nics import Nics
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import describe

NIC = "0x020000"
SWITCH = "pci0000:10/0000:10:01.0/0000:11:00.0"
FAR_SWITCH = "pci0000:80/0000:80:01.0/0000:81:00.0"


class Sysfs:
    """A made-up /sys: PCI devices at the ends of their ways, as the kernel links them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "bus/pci/devices").mkdir(parents=True)

    def add(self, way: str, *, pci_class: str = "0x030200", rdma: str = "", physical: str = "") -> None:
        device = self.root / "devices" / way
        device.mkdir(parents=True)
        (device / "class").write_text(pci_class + "\n")
        (self.root / "bus/pci/devices" / device.name).symlink_to(device)
        if physical:
            (device / "physfn").symlink_to(self.root / "bus/pci/devices" / physical)
        if rdma:
            (self.root / "class/infiniband" / rdma).mkdir(parents=True)
            (self.root / "class/infiniband" / rdma / "device").symlink_to(device)


def test_the_nearest_card_is_the_one_beneath_the_same_switch(tmp_path: Path) -> None:
    """Two GPUs and two cards beneath one switch share a number; another switch has its own; nobody's is unknown."""
    sys = Sysfs(tmp_path)
    for gpu in ("0000:12:00.0", "0000:13:00.0"):
        sys.add(f"{SWITCH}/0000:11:0{gpu[6]}.0/{gpu}")
    sys.add(f"{FAR_SWITCH}/0000:81:02.0/0000:82:00.0")
    sys.add("pci0000:c0/0000:c0:01.0/0000:c1:00.0")
    sys.add(f"{SWITCH}/0000:11:08.0/0000:18:00.0", rdma="mlx5_0")
    sys.add(f"{SWITCH}/0000:11:09.0/0000:19:00.0", rdma="mlx5_1")
    sys.add(f"{FAR_SWITCH}/0000:81:08.0/0000:88:00.0", rdma="mlx5_2")
    sys.add("pci0000:c0/0000:c0:02.0/0000:c2:00.0", pci_class=NIC)  # the board's own port: no RDMA
    nics = Nics(tmp_path)
    gpus = ("0000:12:00.0", "0000:13:00.0", "0000:82:00.0", "0000:c1:00.0", "0000:ff:00.0")
    assert [nics.nearest(gpu) for gpu in gpus] == [0, 0, 2, None, None]


def test_without_rdma_any_network_card_counts_by_its_class(tmp_path: Path) -> None:
    """Two ports of one card are one card, and a virtual function is none."""
    sys = Sysfs(tmp_path)
    sys.add(f"{SWITCH}/0000:11:00.0/0000:12:00.0")
    sys.add(f"{SWITCH}/0000:11:08.0/0000:18:00.0", pci_class=NIC)
    sys.add(f"{SWITCH}/0000:11:08.0/0000:18:00.1", pci_class=NIC)
    sys.add(f"{SWITCH}/0000:11:00.0/0000:17:00.1", pci_class=NIC, physical="0000:18:00.0")
    sys.add(f"{FAR_SWITCH}/0000:81:08.0/0000:88:00.0", pci_class=NIC)
    nics = Nics(tmp_path)
    assert [nics.nearest(gpu) for gpu in ("0000:12:00.0", "0000:88:00.0")] == [0, 1]


def test_cards_that_are_equally_far_belong_to_no_gpu(tmp_path: Path) -> None:
    sys = Sysfs(tmp_path)
    sys.add("pci0000:10/0000:10:01.0/0000:11:00.0")
    sys.add("pci0000:10/0000:10:02.0/0000:12:00.0", pci_class=NIC)
    sys.add("pci0000:80/0000:80:02.0/0000:82:00.0", pci_class=NIC)
    assert Nics(tmp_path).nearest("0000:11:00.0") == 0, "the only one at this host bridge"
    sys.add("pci0000:10/0000:10:03.0/0000:13:00.0", pci_class=NIC)
    assert Nics(tmp_path).nearest("0000:11:00.0") is None
    assert Nics(tmp_path / "nothing").nearest("0000:11:00.0") is None


def test_the_report_numbers_each_gpus_card(bench: Bench) -> None:
    sys = Sysfs(bench.directory / "sys")
    sys.add("pci0000:10/0000:10:00.0")
    sys.add("pci0000:18/0000:18:00.0")
    sys.add("pci0000:18/0000:18:01.0", pci_class=NIC)
    sys.add("pci0000:20/0000:20:01.0", pci_class=NIC)
    assert [gpu.nic for gpu in bench.report(describe(sample_node("n1", "4xH100"))).gpus] == [None, 0, None, None]
