"""CDI files of ours as real parts read them: the CDI project's library, and an OCI runtime that starts a container.

    CdiFile ──▶ tangram.json ──▶ `controlplane cdi` (the library of containerd and CRI-O) ──▶ config.json ──▶ runc

The GPUs are device files with NVIDIA's numbers and nothing behind them, the driver is a folder of small files.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.agent.cdi import CdiFile
from app.agent.device_files import Host
from app.agent.gift import Giver, Mps
from app.report import DeviceAt, NodeReport
from tests.agent.driver_host import DRIVER, DriverHost, gpu, instance, report
from tests.e2e.runtime import runtime
from tests.e2e.toolchain import CONTROLPLANE, Program, build

pytestmark = pytest.mark.e2e

SEEN = Program("seen", usually="seconds")

NVIDIA, CAPS = 195, 237
"""Major numbers of the driver's devices; that of capabilities differs from boot to boot."""
CTL = 255

SLICE = instance("1g.10gb", 3, 9, "MIG-1")
REPORT = report(gpu(0, SLICE), gpu(1), gpu(2))


def controlplane(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the tool around the CDI library."""
    return subprocess.run(
        [build(CONTROLPLANE), "cdi", *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


# ---- the library ----


@pytest.mark.parametrize("kind", ["tangram.gpu/gpu", "nvidia.com/gpu", "example.com/gpu.b"])
def test_the_cdi_library_takes_the_file_at_the_version_that_it_says(tmp_path, kind):
    """It refuses unknown fields, bad names, and files that use what their version does not have."""
    there = DriverHost(tmp_path / "host")
    there.devices(0, 1, 2)
    there.driver()
    there.slice(0, 9, (84, 85))
    there.file("usr/bin/nvidia-cdi-hook")
    CdiFile(tmp_path / "cdi", host=there.host, kind=kind).keep(REPORT)
    done = controlplane("validate", "--dir", str(tmp_path / "cdi"))

    assert done.returncode == 0, done.stderr
    names = ["1", "2", "GPU-0:1g.10gb:3", "GPU-1", "GPU-2", "MIG-1", "all"]
    assert json.loads(done.stdout) == sorted(f"{kind}={name}" for name in names)


def test_two_files_of_one_kind_with_equal_names_make_those_unusable(tmp_path):
    """Why our kind is our own: beside a file of NVIDIA's tool, containers of both would fail."""
    there = DriverHost(tmp_path / "host")
    there.devices(1)
    CdiFile(tmp_path / "cdi", host=there.host, kind="nvidia.com/gpu").keep(report(gpu(1)))
    (tmp_path / "cdi/nvidia.json").write_text((tmp_path / "cdi/tangram.json").read_text())
    config = json.dumps({"ociVersion": "1.0.2"})
    done = controlplane("inject", "--dir", str(tmp_path / "cdi"), "--device", "nvidia.com/gpu=GPU-1", stdin=config)

    assert done.returncode != 0
    assert "conflicting device" in done.stderr


# ---- a container ----


@dataclass(frozen=True)
class Bundle:
    """A folder from which a runtime starts containers, with a driver and GPUs of the test's own on the host."""

    folder: Path
    runc: Path
    there: DriverHost
    cdi: CdiFile
    host: Host

    def run(self, names: tuple[str, ...], patterns: tuple[str, ...], *, env: tuple[str, ...] = ()) -> Any:
        """Start a container with these CDI devices, as containerd does; what its program saw."""
        config = json.dumps(self._config(patterns, env))
        asked = [argument for name in names for argument in ("--device", name)]
        done = controlplane("inject", "--dir", str(self.folder / "cdi"), *asked, stdin=config)
        assert done.returncode == 0, done.stderr
        (self.folder / "bundle/config.json").write_text(done.stdout)
        ran = self._runc("run", "--bundle", str(self.folder / "bundle"), f"tangram-{os.getpid()}-{self.folder.name}")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    def _runc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.runc, "--root", str(self.folder / "state"), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def _config(self, patterns: tuple[str, ...], env: tuple[str, ...]) -> dict[str, Any]:
        """The runtime's own default, without a terminal; /host-dev has every device file, allowed or not."""
        (self.folder / "bundle/config.json").unlink(missing_ok=True)
        made = self._runc("spec", "--bundle", str(self.folder / "bundle"))
        assert made.returncode == 0, made.stderr
        config: dict[str, Any] = json.loads((self.folder / "bundle/config.json").read_text())
        config["process"] |= {"terminal": False, "args": ["/seen", *patterns]}
        config["process"]["env"] += env
        source = str(self.there.root / "dev")
        config["mounts"].append({"destination": "/host-dev", "type": "bind", "source": source, "options": ["bind"]})
        return config


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Everything for a container; skipped in words where this machine cannot start one."""
    if os.geteuid() != 0:
        pytest.skip("only root can make device files and start this container")
    runc = runtime()
    if isinstance(runc, str):
        if os.environ.get("CI") == "true":
            pytest.fail(runc)
        pytest.skip(runc)
    there = DriverHost(tmp_path / "host")
    there.driver()
    for minor in (0, 1, 2, CTL):
        name = "nvidiactl" if minor == CTL else f"nvidia{minor}"
        character_device(there.root / "dev" / name, NVIDIA, minor)
    there.slice(0, 9, (84, 85))
    for minor in (84, 85):
        (there.root / f"dev/nvidia-caps/nvidia-cap{minor}").unlink()
        character_device(there.root / f"dev/nvidia-caps/nvidia-cap{minor}", CAPS, minor)
    rootfs = tmp_path / "bundle/rootfs"
    rootfs.mkdir(parents=True)
    shutil.copy(build(SEEN), rootfs / "seen")
    host = Host(proc=there.root / "proc", dev_root=str(there.root))
    cdi = CdiFile(tmp_path / "cdi", host=host, driver_root=str(there.root))
    return Bundle(tmp_path, runc, there, cdi, host)


def character_device(path: Path, major: int, minor: int) -> None:
    """A device file; in a file system that refuses those the test is skipped in words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
    except OSError as error:
        pytest.skip(f"this machine does not let root make device files: {error}")


def given(bundle: Bundle, device: DeviceAt, now: NodeReport = REPORT) -> tuple[str, ...]:
    """The CDI names with which the device plugin hands out this device."""
    return Giver(host=bundle.host, cdi=bundle.cdi).gift([device], now).cdi_names


def test_a_container_gets_its_gpu_and_no_other(bundle):
    """runc makes the device files and sets the cgroup; NVIDIA's numbers without a driver answer "no such device"."""
    saw = bundle.run(given(bundle, DeviceAt(gpu="GPU-1")), ("/dev/nvidia*", "/host-dev/nvidia[012]"))

    allowed = {"number": "195:1", "opens": "allowed, no driver"}
    assert saw["devices"]["/dev/nvidia1"] == allowed
    assert saw["devices"]["/dev/nvidiactl"] == {"number": "195:255", "opens": "allowed, no driver"}
    assert set(saw["devices"]) == {
        "/dev/nvidia1",
        "/dev/nvidiactl",
        "/host-dev/nvidia0",
        "/host-dev/nvidia1",
        "/host-dev/nvidia2",
    }
    assert saw["devices"]["/host-dev/nvidia1"] == allowed
    assert saw["devices"]["/host-dev/nvidia0"]["opens"] == "operation not permitted"
    assert saw["devices"]["/host-dev/nvidia2"]["opens"] == "operation not permitted"


def test_a_container_gets_its_slice_and_both_capabilities(bundle):
    saw = bundle.run(
        given(bundle, DeviceAt(gpu="GPU-0", profile="1g.10gb", start=3)), ("/dev/nvidia*", "/dev/nvidia-caps/*")
    )

    assert {path: each["number"] for path, each in saw["devices"].items()} == {
        "/dev/nvidia0": "195:0",
        "/dev/nvidia-caps/nvidia-cap84": "237:84",
        "/dev/nvidia-caps/nvidia-cap85": "237:85",
        "/dev/nvidiactl": "195:255",
    }
    assert {each["opens"] for each in saw["devices"].values()} == {"allowed, no driver"}


def test_a_container_gets_the_drivers_libraries_under_the_names_that_programs_ask_for(bundle):
    library = "/usr/lib/x86_64-linux-gnu/libcuda.so"
    saw = bundle.run(given(bundle, DeviceAt(gpu="GPU-1")), (f"{library}*", "/usr/bin/nvidia-smi"))

    assert saw["files"] == {
        f"{library}.{DRIVER}": "libcuda.so",
        f"{library}.1": "libcuda.so",
        library: "libcuda.so",
        "/usr/bin/nvidia-smi": "",
    }


def test_an_image_that_asks_nvidias_runtime_for_all_gpus_gets_none_from_it(bundle):
    """CUDA images set NVIDIA_VISIBLE_DEVICES=all; what comes last counts, and the file's edits come last."""
    saw = bundle.run(given(bundle, DeviceAt(gpu="GPU-1")), (), env=("NVIDIA_VISIBLE_DEVICES=all",))

    last = dict(entry.split("=", 1) for entry in saw["env"])
    assert last["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_devices_of_two_kinds_are_given_together(bundle):
    names = (
        *given(bundle, DeviceAt(gpu="GPU-1")),
        *given(bundle, DeviceAt(gpu="GPU-0", profile="1g.10gb", start=3)),
    )
    saw = bundle.run(names, ("/dev/nvidia[0-9]",))

    assert set(saw["devices"]) == {"/dev/nvidia0", "/dev/nvidia1"}


def test_a_slice_made_anew_is_what_the_same_name_means(bundle):
    """After a reboot the kubelet starts its containers with the names of its checkpoint."""
    names = given(bundle, DeviceAt(gpu="GPU-0", profile="1g.10gb", start=3))
    bundle.there.slice(0, 4, (40, 41))
    for minor in (40, 41):
        (bundle.there.root / f"dev/nvidia-caps/nvidia-cap{minor}").unlink()
        character_device(bundle.there.root / f"dev/nvidia-caps/nvidia-cap{minor}", CAPS, minor)
    bundle.cdi.keep(report(gpu(0, instance("1g.10gb", 3, 4, "MIG-new")), gpu(1), gpu(2)))
    saw = bundle.run(names, ("/dev/nvidia-caps/*",))

    assert set(saw["devices"]) == {"/dev/nvidia-caps/nvidia-cap40", "/dev/nvidia-caps/nvidia-cap41"}


def test_limits_of_a_share_are_the_plugins_and_its_gpu_is_the_files(bundle):
    """The kubelet gives the runtime the gift's environment beside the names."""
    gift = Giver(host=bundle.host, cdi=bundle.cdi, mps=Mps("/p")).gift([DeviceAt(gpu="GPU-2", milli=250)], REPORT)
    saw = bundle.run(gift.cdi_names, ("/dev/nvidia[0-9]",), env=tuple(f"{k}={v}" for k, v in gift.envs.items()))

    assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=25" in saw["env"]
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=20480M" in saw["env"]
    assert set(saw["devices"]) == {"/dev/nvidia2"}
