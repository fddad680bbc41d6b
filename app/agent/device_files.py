"""The device files of GPUs and MIG slices as the host has them: which they are, and whether they are there.

A GPU is /dev/nvidia<minor>; a slice is its GPU's file and two capabilities, one for the GPU instance and one for the
compute instance. What a container does with them is `gift` and `cdi`.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from app.report import DeviceAt, Gpu, Instance

COMMON = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
"""Every container with a GPU gets these, as far as the host has them."""

_SETTING = re.compile(r"^(DeviceFile\w+): *(\d+)\s*$", re.MULTILINE)


class NoFile(LookupError):
    """A device has no device file, in words."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where the agent sees the host's file system and /proc. Paths that are handed out are the host's own.

    `dev_root` is what the host has before "/dev" of the GPUs' device files: some driver containers have their own.
    """

    root: Path = Path("/")
    proc: Path = Path("/proc")
    dev_root: str = "/"

    def at(self, path: str) -> Path:
        """Where this path of the host is seen from here."""
        return self.root / path.lstrip("/")

    def has(self, path: str) -> bool:
        """Whether the host has it. Links lead where they lead on the host, so a link counts by itself."""
        return os.path.lexists(self.at(path))

    def device(self, path: str) -> str:
        """Where the host has the device file that a container sees at `path`."""
        return posixpath.join(self.dev_root, path.lstrip("/"))

    def has_device(self, path: str) -> bool:
        """Whether the host has the device file that a container sees at `path`."""
        return self.has(self.device(path))


@dataclass(frozen=True, slots=True)
class Capability:
    """A MIG capability as the driver describes it. `made_by_others`: it wants its file made by whoever needs it."""

    minor: int
    mode: int = 0o444
    made_by_others: bool = False

    @property
    def path(self) -> str:
        """Its device file."""
        return f"/dev/nvidia-caps/nvidia-cap{self.minor}"


@dataclass(frozen=True, slots=True)
class Found:
    """A device as a report shows it: a GPU, or a slice (`instance`) with its own UUID."""

    gpu: Gpu
    uuid: str
    instance: Instance | None = None


def place_name(device: DeviceAt) -> str:
    """A slice's name by its place, which outlives the UUID: after a reboot it is the slice made anew.

    In characters that CDI allows in names, so profiles are spelled as pods do.
    """
    return f"{device.gpu}:{device.profile.replace('+', '.')}:{device.start}"


def files_of(host: Host, found: Found) -> tuple[str, ...]:
    """The files of this device alone, whether the host has them or not. Raises `NoFile` where they are not known."""
    own = gpu_file(found.gpu.minor)
    if found.instance is None:
        return (own,)
    return (own, *(capability.path for capability in capabilities_of(host, found.gpu, found.instance)))


def capabilities_of(host: Host, gpu: Gpu, instance: Instance) -> tuple[Capability, ...]:
    """Those of a slice. Its MIG device is the compute instance with its UUID; one that is alone has number 0."""
    compute = next((compute.id for compute in instance.compute if compute.uuid == instance.uuid), 0)
    return slice_capabilities(host, gpu.minor, instance.gi_id, compute)


def common_files(host: Host) -> tuple[str, ...]:
    """Those of `COMMON` that this host has."""
    return tuple(path for path in COMMON if host.has_device(path))


def gpu_file(minor: int | None) -> str:
    """The GPU's own file. Raises `NoFile` where NVML did not say the minor number."""
    if minor is None:
        raise NoFile("NVML does not say which device file the GPU has")
    return f"/dev/nvidia{minor}"


def slice_capabilities(host: Host, minor: int | None, gi_id: int, ci_id: int) -> tuple[Capability, ...]:
    """The capabilities of a slice, from the driver's files in /proc.

    Raises `NoFile` where it does not show them: the instance is gone or not there yet, or this is not the host's.
    """
    of_gpu = f"gpu{minor}"
    within = (f"gi{gi_id}/access", f"gi{gi_id}/ci{ci_id}/access")
    shown = host.proc / "driver/nvidia/capabilities" / of_gpu / "mig"
    if shown.is_dir():
        return tuple(_described(shown / path) for path in within)
    minors = _minors(host)
    try:
        return tuple(Capability(minors[f"{of_gpu}/{path}"]) for path in within)
    except KeyError as missing:
        raise NoFile(f"the driver shows no MIG capability {missing.args[0]}") from None


def make_file(host: Host, capability: Capability) -> None:
    """Make the file of a capability that has none, as the driver describes it; raises OSError where that fails.

    NVIDIA's container runtime does the same before it starts a container; with CDI nobody does.
    """
    path = host.at(host.device(capability.path))
    path.parent.mkdir(mode=0o755, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | capability.mode, os.makedev(_capability_major(host), capability.minor))
    path.chmod(capability.mode)  # whatever the umask


def _described(access: Path) -> Capability:
    try:
        settings = dict(_SETTING.findall(access.read_text()))
        return Capability(
            minor=int(settings["DeviceFileMinor"]),
            mode=int(settings.get("DeviceFileMode", 0o444)) & 0o777,
            made_by_others=settings.get("DeviceFileModify") == "1",
        )
    except (OSError, KeyError) as error:
        raise NoFile(f"the driver does not describe its device file ({access.parent.name}/{access.name})") from error


def _minors(host: Host) -> dict[str, int]:
    """The driver's table of every capability that there can be: "gpu0/gi1/ci0/access 13"."""
    try:
        lines = (host.proc / "driver/nvidia-caps/mig-minors").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _capability_major(host: Host) -> int:
    for line in (host.proc / "devices").read_text().splitlines():
        number, _, name = line.strip().partition(" ")
        if name == "nvidia-caps" and number.isdigit():
            return int(number)
    raise OSError("/proc/devices has no nvidia-caps")
