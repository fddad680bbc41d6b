"""The CDI file of a node, on small hosts made of plain files. Real runtimes read it in tests/e2e/test_cdi.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from app.agent.cdi import CdiFile
from app.agent.device_files import place_name
from app.agent.driver_files import find_driver_files
from app.report import ComputeInstance, DeviceAt
from solver.products import PRODUCTS
from tests.agent.driver_host import DRIVER, DriverHost, gpu, instance, report

LIB = "/usr/lib/x86_64-linux-gnu"


@pytest.fixture
def there(tmp_path: Path) -> DriverHost:
    """A host with a driver and the device files of two GPUs."""
    host = DriverHost(tmp_path / "host")
    host.devices(0, 1)
    host.driver()
    return host


@pytest.fixture
def file(there: DriverHost, tmp_path: Path) -> CdiFile:
    """The CDI file of that host."""
    return CdiFile(tmp_path / "cdi", host=there.host)


def spec(tmp_path: Path) -> Any:
    """What is in the folder: one file of ours and nothing else."""
    (only,) = (tmp_path / "cdi").iterdir()
    assert only.name == "tangram.json"
    assert only.stat().st_mode & 0o777 == 0o644
    return json.loads(only.read_text())


def names(tmp_path: Path) -> set[str]:
    """The devices that it names."""
    return {device["name"] for device in spec(tmp_path)["devices"]}


def nodes(tmp_path: Path, name: str) -> list[str]:
    """The device files of one of them."""
    (device,) = (each for each in spec(tmp_path)["devices"] if each["name"] == name)
    return [node["path"] for node in device["containerEdits"]["deviceNodes"]]


def mounts(tmp_path: Path) -> dict[str, str]:
    """What is mounted into every container: its path there, and the host's."""
    return {mount["containerPath"]: mount["hostPath"] for mount in spec(tmp_path)["containerEdits"]["mounts"]}


# ---- devices ----


def test_gpus_have_their_index_and_uuid_and_all_has_all(there, file, tmp_path):
    file.keep(report(gpu(0), gpu(1)))

    assert names(tmp_path) == {"0", "GPU-0", "1", "GPU-1", "all"}
    assert nodes(tmp_path, "1") == nodes(tmp_path, "GPU-1") == ["/dev/nvidia1"]
    assert nodes(tmp_path, "all") == ["/dev/nvidia0", "/dev/nvidia1"]
    assert file.trouble == ""


def test_slices_have_their_uuid_and_place_and_both_capabilities(there, file, tmp_path):
    there.slice(0, 9, (84, 85))
    file.keep(report(gpu(0, instance("1g.10gb+me", 3, 9, "MIG-1")), gpu(1)))

    assert names(tmp_path) == {"MIG-1", "GPU-0:1g.10gb.me:3", "1", "GPU-1", "all"}
    assert nodes(tmp_path, "MIG-1") == nodes(tmp_path, "GPU-0:1g.10gb.me:3")
    assert nodes(tmp_path, "MIG-1") == [
        "/dev/nvidia0",
        "/dev/nvidia-caps/nvidia-cap84",
        "/dev/nvidia-caps/nvidia-cap85",
    ]


def test_the_capability_is_that_of_the_compute_instance_whose_uuid_it_is(there, file, tmp_path):
    """Two compute instances in one GPU instance are two MIG devices; who has the first must not open the second."""
    there.slice(0, 9, (84, 85))
    there.capability(0, 9, 87, ci_id=2)
    found = instance("2g.20gb", 4, 9, "MIG-2")
    both = (ComputeInstance(id=0, uuid="MIG-0"), ComputeInstance(id=2, uuid="MIG-2"))
    file.keep(report(gpu(0, found.model_copy(update={"compute": both}))))

    assert nodes(tmp_path, "MIG-2")[1:] == ["/dev/nvidia-caps/nvidia-cap84", "/dev/nvidia-caps/nvidia-cap87"]


def test_a_container_may_use_its_device_files_and_make_none(there, file, tmp_path):
    """Without a word of permissions CDI means "rwm", with which a container may make the file anew."""
    file.keep(report(gpu(0)))
    written = spec(tmp_path)
    edits = [written["containerEdits"], *(device["containerEdits"] for device in written["devices"])]

    assert {node["permissions"] for edit in edits for node in edit["deviceNodes"]} == {"rw"}


def test_capabilities_are_found_in_the_drivers_table_where_it_shows_nothing_else(there, file, tmp_path):
    there.file(
        "proc/driver/nvidia-caps/mig-minors", "config 1\nmonitor 2\ngpu0/gi9/access 84\ngpu0/gi9/ci0/access 85\n"
    )
    there.file("dev/nvidia-caps/nvidia-cap84")
    there.file("dev/nvidia-caps/nvidia-cap85")
    file.keep(report(gpu(0, instance("1g.10gb", 3, 9, "MIG-1"))))

    assert nodes(tmp_path, "MIG-1")[1:] == ["/dev/nvidia-caps/nvidia-cap84", "/dev/nvidia-caps/nvidia-cap85"]


def test_a_device_without_its_files_is_left_out_and_said(there, file, tmp_path, caplog):
    """A runtime refuses every container that names such a device; the others must not suffer."""
    now = report(gpu(0), gpu(2))
    file.keep(now)
    file.keep(now)

    assert names(tmp_path) == {"0", "GPU-0", "all"}
    assert [record.getMessage() for record in caplog.records] == [
        "CDI: GPU-2 is left out: the host has no /dev/nvidia2"
    ]
    assert file.trouble == ""
    assert file.why_not("GPU-2", report(gpu(0), gpu(2))) == "the host has no /dev/nvidia2"


def test_a_host_without_any_device_file_is_trouble(tmp_path):
    """An agent in a container that does not see the host's /dev, say."""
    there = DriverHost(tmp_path / "host")
    there.driver()
    file = CdiFile(tmp_path / "cdi", host=there.host)
    file.keep(report(gpu(0)))

    assert file.trouble == "no device has its device files: the host has no /dev/nvidia0"
    assert not (tmp_path / "cdi/tangram.json").exists()


def test_the_file_of_a_capability_that_the_driver_wants_made_is_made(there, file, tmp_path, monkeypatch):
    """NVIDIA's runtime makes them before a container; with CDI nobody else does."""
    made = []

    def mknod(path: Path, _mode: int, device: int) -> None:
        made.append((path.name, device))
        path.touch()

    monkeypatch.setattr("os.mknod", mknod)
    there.file("proc/devices", "Character devices:\n195 nvidia\n237 nvidia-caps\n")
    there.capability(0, 9, 84, modify=1)
    there.capability(0, 9, 85, ci_id=0, modify=1)
    file.keep(report(gpu(0, instance("1g.10gb", 3, 9, "MIG-1"))))

    assert made == [("nvidia-cap84", 237 << 8 | 84), ("nvidia-cap85", 237 << 8 | 85)]
    assert "MIG-1" in names(tmp_path)


def test_every_profile_makes_a_name_that_cdi_allows():
    geometries = (product.geometry for product in PRODUCTS)
    profiles = {profile.name for geometry in geometries if geometry for profile in geometry.profiles}
    assert any("+" in profile for profile in profiles)
    for profile in profiles:
        name = place_name(DeviceAt(gpu="GPU-8a3f1c52-0d4e-4b6f-9a77-5e2c81d0b9aa", profile=profile, start=3))
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?", name)


# ---- what every container gets ----


def test_a_container_gets_what_all_need_and_nvidias_runtime_adds_nothing(there, file, tmp_path):
    file.keep(report(gpu(0)))
    edits = spec(tmp_path)["containerEdits"]

    assert edits["env"] == ["NVIDIA_VISIBLE_DEVICES=void"]
    assert [node["path"] for node in edits["deviceNodes"]] == [
        "/dev/nvidiactl",
        "/dev/nvidia-uvm",
        "/dev/nvidia-uvm-tools",
        "/dev/nvidia-modeset",
    ]
    assert mounts(tmp_path)["/usr/bin/nvidia-smi"] == "/usr/bin/nvidia-smi"
    assert mounts(tmp_path)[f"{LIB}/libcuda.so.{DRIVER}"] == f"{LIB}/libcuda.so.{DRIVER}"
    assert f"{LIB}/libother.so.1.2.3" not in mounts(tmp_path)


def test_without_nvidias_hook_libraries_are_mounted_at_their_links_too(there, file, tmp_path):
    """Programs ask for libcuda.so.1, and nobody makes that link in the container."""
    file.keep(report(gpu(0)))

    assert "hooks" not in spec(tmp_path)["containerEdits"]
    assert mounts(tmp_path)[f"{LIB}/libcuda.so.1"] == f"{LIB}/libcuda.so.{DRIVER}"
    assert mounts(tmp_path)[f"{LIB}/libcuda.so"] == f"{LIB}/libcuda.so.{DRIVER}"


@pytest.mark.parametrize(
    ("program", "called"), [("nvidia-cdi-hook", ["nvidia-cdi-hook"]), ("nvidia-ctk", ["nvidia-ctk", "hook"])]
)
def test_nvidias_hook_makes_the_links_and_updates_the_loaders_cache(there, file, tmp_path, program, called):
    there.file(f"usr/bin/{program}")
    file.keep(report(gpu(0)))
    links, cache = spec(tmp_path)["containerEdits"]["hooks"]

    assert links["args"][: len(called) + 1] == [*called, "create-symlinks"]
    assert f"libcuda.so.{DRIVER}::{LIB}/libcuda.so.1" in links["args"]
    assert f"libcuda.so.1::{LIB}/libcuda.so" in links["args"]
    assert cache["args"] == [*called, "update-ldcache", "--folder", LIB]
    assert {hook["path"] for hook in (links, cache)} == {f"/usr/bin/{program}"}
    assert {hook["hookName"] for hook in (links, cache)} == {"createContainer"}
    assert f"{LIB}/libcuda.so.1" not in mounts(tmp_path)


def test_a_driver_under_a_root_of_its_own_is_where_it_belongs_in_the_container(tmp_path):
    """The GPU Operator's driver container has its files under /run/nvidia/driver."""
    there = DriverHost(tmp_path / "host")
    there.devices(0)
    DriverHost(there.root / "run/nvidia/driver").driver()
    CdiFile(tmp_path / "cdi", host=there.host, driver_root="/run/nvidia/driver").keep(report(gpu(0)))

    assert mounts(tmp_path)["/usr/bin/nvidia-smi"] == "/run/nvidia/driver/usr/bin/nvidia-smi"
    assert mounts(tmp_path)[f"{LIB}/libcuda.so.{DRIVER}"] == f"/run/nvidia/driver{LIB}/libcuda.so.{DRIVER}"


@pytest.mark.parametrize(
    "folder", ["usr/lib64", "usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu/nvidia/current"]
)
def test_libraries_are_found_where_distributions_have_them(tmp_path, folder):
    there = DriverHost(tmp_path)
    there.driver(folder=folder)
    there.file(f"{folder}/vdpau/libvdpau_nvidia.so.{DRIVER}")
    found = find_driver_files(there.host, DRIVER)

    assert f"/{folder}/libcuda.so.{DRIVER}" in {library.path for library in found.libraries}
    assert f"/{folder}/vdpau/libvdpau_nvidia.so.{DRIVER}" in {library.path for library in found.libraries}


def test_a_folder_that_is_seen_in_two_places_is_one(tmp_path):
    there = DriverHost(tmp_path)
    there.driver()
    (tmp_path / "lib").symlink_to("usr/lib")
    (tmp_path / "usr/lib/x86_64-linux-gnu/nvidia/current").mkdir(parents=True)
    there.file(f"usr/lib/x86_64-linux-gnu/nvidia/current/libnvidia-cfg.so.{DRIVER}")
    found = find_driver_files(there.host, DRIVER)

    assert sorted(library.path for library in found.libraries) == [
        f"{LIB}/libcuda.so.{DRIVER}",
        f"{LIB}/libnvidia-ml.so.{DRIVER}",
        f"{LIB}/libnvidia-ptxjitcompiler.so.{DRIVER}",
        f"{LIB}/nvidia/current/libnvidia-cfg.so.{DRIVER}",
    ]
    assert len(found.links) == 4


def test_libraries_of_another_driver_are_nobodys(there):
    """After an upgrade without a reboot both are on the disk, and only the one that is loaded works."""
    found = find_driver_files(there.host, "560.1")

    assert found.libraries == ()


def test_a_driver_without_libraries_is_said(there, tmp_path):
    file = CdiFile(tmp_path / "cdi", host=there.host)
    file.keep(report(gpu(0), driver="560.1"))

    assert "no library of driver 560.1" in file.trouble
    assert names(tmp_path) == {"0", "GPU-0", "all"}


# ---- keeping it ----


def test_nothing_is_written_while_nothing_changes(there, file, tmp_path):
    now = report(gpu(0))
    assert file.keep(now)
    before = (tmp_path / "cdi/tangram.json").stat()

    assert not file.keep(now)
    assert not file.keep(report(gpu(0)))  # another report that says the same of devices
    assert not CdiFile(tmp_path / "cdi", host=there.host).keep(now)  # an agent started again
    assert (tmp_path / "cdi/tangram.json").stat() == before


def test_slices_come_and_go(there, file, tmp_path):
    there.slice(0, 9, (84, 85))
    file.keep(report(gpu(0, mig=True), gpu(1)))
    assert names(tmp_path) == {"1", "GPU-1", "all"}

    file.keep(report(gpu(0, instance("1g.10gb", 3, 9, "MIG-1")), gpu(1)))
    assert "MIG-1" in names(tmp_path)

    file.keep(report(gpu(0, mig=True), gpu(1)))
    assert names(tmp_path) == {"1", "GPU-1", "all"}


def test_a_node_whose_devices_are_all_gone_has_no_file(there, file, tmp_path):
    """CDI wants at least one device in a file."""
    file.keep(report(gpu(0)))
    file.keep(report(gpu(0, mig=True)))

    assert list((tmp_path / "cdi").iterdir()) == []


def test_an_agent_that_has_not_read_nvml_yet_leaves_the_file_of_the_one_before(there, file, tmp_path):
    file.keep(report(gpu(0)))

    assert not CdiFile(tmp_path / "cdi", host=there.host).keep(report(error="NVML has not been read yet"))
    assert "GPU-0" in names(tmp_path)


def test_a_file_that_was_taken_away_is_written_again(there, file, tmp_path):
    now = report(gpu(0))
    file.keep(now)
    (tmp_path / "cdi/tangram.json").unlink()

    assert file.keep(now)
    assert "GPU-0" in names(tmp_path)


def test_a_folder_that_cannot_be_written_is_said_and_tried_again(there, tmp_path):
    (tmp_path / "cdi").write_text("a file")
    file = CdiFile(tmp_path / "cdi", host=there.host)
    now = report(gpu(0))
    assert not file.keep(now)
    assert "tangram.json cannot be written" in file.trouble
    assert "cannot be written" in file.why_not("GPU-0", now)

    (tmp_path / "cdi").unlink()
    assert file.keep(now)
    assert file.trouble == ""
    assert file.why_not("GPU-0", now) == ""


def test_device_files_that_come_late_are_found_without_a_new_report(there, file, tmp_path):
    now = report(gpu(0), gpu(2))
    file.keep(now)
    there.devices(2)

    assert file.keep(now)
    assert "GPU-2" in names(tmp_path)


def test_other_files_in_the_folder_are_not_touched(there, file, tmp_path):
    (tmp_path / "cdi").mkdir()
    (tmp_path / "cdi/nvidia.yaml").write_text("theirs")
    file.keep(report(gpu(0)))

    assert (tmp_path / "cdi/nvidia.yaml").read_text() == "theirs"


@pytest.mark.parametrize(
    ("kind", "version"), [("tangram.gpu/gpu", "0.5.0"), ("nvidia.com/gpu", "0.5.0"), ("example.com/gpu.b", "0.6.0")]
)
def test_the_kind_is_an_option_and_the_version_the_lowest_that_has_what_is_used(there, tmp_path, kind, version):
    CdiFile(tmp_path / "cdi", host=there.host, kind=kind).keep(report(gpu(0)))

    assert (spec(tmp_path)["kind"], spec(tmp_path)["cdiVersion"]) == (kind, version)
