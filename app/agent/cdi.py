"""The node's CDI spec: a file that tells a container runtime what each GPU and MIG slice needs inside a container.

    NodeReport + device files + driver files ──▶ spec_of ──▶ CdiFile.keep ──▶ <cdi-dir>/tangram.json

One file, ours alone. It is written anew when it would say something else, and by rename, since runtimes read it at
any time. The form is the CDI specification's; what is in it is what `nvidia-ctk cdi generate` puts there for compute.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from app.agent.device_files import Found, Host, NoFile, capabilities_of, common_files, files_of, make_file, place_name
from app.agent.driver_files import DriverFiles, find_driver_files
from app.report import DeviceAt, Gpu, Instance, NodeReport

log = logging.getLogger(__name__)

FILE = "tangram.json"
"""NVIDIA's tools write nvidia.yaml, and names that begin with k8s. or nvidia.com-."""

KIND = "tangram.gpu/gpu"
"""Of a vendor of our own, so that no name is ever in two files: such a name is none (docs/containers.md)."""

VERSION = "0.5.0"
"""The lowest with `hostPath` of device nodes and names that begin with a digit."""
VERSION_WITH_DOTS = "0.6.0"
"""The lowest with a dot in the kind's class."""

MOUNT_OPTIONS = ("ro", "nosuid", "nodev", "rbind", "rprivate")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """A device of the spec: its names and its own device files."""

    names: tuple[str, ...]
    files: tuple[str, ...]


class CdiFile:
    """Keeps the node's spec file as the reports say. `trouble`: why it is of no use to any container, or empty.

    A device whose device files are missing is left out; `why_not` says so when it is asked for.
    Used by two threads: the agent's after each look, and the device plugin's before it names a device.
    """

    def __init__(self, directory: Path, *, host: Host | None = None, driver_root: str = "/", kind: str = KIND) -> None:
        self.kind = kind
        self.trouble = ""
        self._path = directory / FILE
        self._host = host or Host()
        self._root = driver_root
        self._driver = DriverFiles()
        self._driver_version: str | None = None
        self._lock = Lock()
        self._written = self._read()
        self._last: NodeReport | None = None
        self._left_out: dict[str, str] = {}
        self._names: frozenset[str] = frozenset()

    def keep(self, report: NodeReport) -> bool:
        """Make the file say what this report says; whether it was written or removed. Never raises for the disk.

        To be called also where nothing is new: /run may be emptied. That costs one look at the file.
        """
        with self._lock:
            return self._keep(report)

    def why_not(self, name: str, report: NodeReport) -> str:
        """Brings the file up to this report; why a runtime would then not find the name in it, or nothing."""
        with self._lock:
            self._keep(report)
            if name in self._names:
                return ""
            return self._left_out.get(name) or self.trouble or "it is not in the CDI file"

    def _keep(self, report: NodeReport) -> bool:
        if not report.gpus and report.error:
            return False  # nothing has been read yet: what is there is of the agent before, and containers use it
        settled = not self.trouble and not self._left_out
        if report is self._last and settled and self._path.exists() == bool(self._written):
            return False
        said, self.trouble, self._last = self.trouble, "", report
        entries = self._entries(report)
        text = self._text(entries, report) if entries else ""
        changed = False
        if text != self._written or (text and not self._path.exists()):
            changed = self._put(text)
        if text == self._written:
            self._names = frozenset(name for entry in entries for name in entry.names)
        if self.trouble and self.trouble != said:
            log.warning("CDI: %s", self.trouble)
        return changed

    def _text(self, entries: Sequence[Entry], report: NodeReport) -> str:
        return json.dumps(spec_of(entries, self._driver_of(report), self._host, kind=self.kind), indent=1) + "\n"

    def _entries(self, report: NodeReport) -> list[Entry]:
        """The devices whose files are all there; a runtime would refuse a container with one whose are not."""
        entries = []
        left_out: dict[str, str] = {}
        for names, found in (named for gpu in report.gpus for named in devices_of(gpu)):
            try:
                entries.append(Entry(names, self._files(found)))
            except NoFile as error:
                left_out |= dict.fromkeys(names, str(error))
                if self._left_out.get(names[0]) != str(error):
                    log.warning("CDI: %s is left out: %s", names[-1], error)
        self._left_out = left_out
        if left_out and not entries:
            self.trouble = f"no device has its device files: {next(iter(left_out.values()))}"
        return entries

    def _files(self, found: Found) -> tuple[str, ...]:
        if found.instance is not None:
            self._make_missing(found.gpu, found.instance)
        files = files_of(self._host, found)
        missing = [self._host.device(path) for path in files if not self._host.has_device(path)]
        if missing:
            raise NoFile(f"the host has no {', '.join(missing)}")
        return files

    def _make_missing(self, gpu: Gpu, instance: Instance) -> None:
        """Device files of a new slice that the driver wants made by whoever needs them."""
        for capability in capabilities_of(self._host, gpu, instance):
            if capability.made_by_others and not self._host.has_device(capability.path):
                try:
                    make_file(self._host, capability)
                except OSError as error:
                    raise NoFile(f"{capability.path} cannot be made: {error.strerror or error}") from error

    def _driver_of(self, report: NodeReport) -> DriverFiles:
        """Looked for again only while no library is found, or when the driver is another: it reads whole folders."""
        if self._driver_version != report.driver or not self._driver.libraries:
            self._driver = find_driver_files(self._host, report.driver, root=self._root)
            self._driver_version = report.driver
        if not self._driver.libraries:
            self.trouble = self.trouble or (
                f"no library of driver {report.driver or 'unknown'} is under {self._root}: containers get devices only"
            )
        return self._driver

    def _put(self, text: str) -> bool:
        try:
            if text:
                _replace(self._path, text)
            else:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            self.trouble = f"{self._path} cannot be written: {error.strerror or error}"
            return False
        self._written = text
        return True

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except (OSError, UnicodeDecodeError):
            return ""


def devices_of(gpu: Gpu) -> Iterable[tuple[tuple[str, ...], Found]]:
    """A GPU's devices with their names: itself (index and UUID), or its slices (UUID and place) in MIG mode.

    NVIDIA's tool also names a slice by two indices. We do not: they are NVML's at one moment, and the next slice that
    is made or removed moves them.
    """
    if gpu.mig is None or not gpu.mig.enabled:
        yield (str(gpu.index), gpu.uuid), Found(gpu, gpu.uuid)
        return
    for instance in gpu.mig.instances:
        if instance.uuid is None:
            continue
        names = [instance.uuid]
        if instance.start is not None:
            names.append(place_name(DeviceAt(gpu=gpu.uuid, profile=instance.profile, start=instance.start)))
        yield tuple(names), Found(gpu, instance.uuid, instance)


def spec_of(entries: Sequence[Entry], driver: DriverFiles, host: Host, *, kind: str = KIND) -> Json:
    """The spec: one device per name, "all" for every file at once, and what each container with any of them gets."""
    devices = [_device(name, entry.files, host) for entry in entries for name in entry.names]
    everything = tuple(dict.fromkeys(path for entry in entries for path in entry.files))
    return {
        "cdiVersion": VERSION_WITH_DOTS if "." in kind.partition("/")[2] else VERSION,
        "kind": kind,
        "devices": [*devices, _device("all", everything, host)],
        "containerEdits": _common(driver, host),
    }


def _device(name: str, files: Iterable[str], host: Host) -> Json:
    return {"name": name, "containerEdits": {"deviceNodes": [_node(path, host) for path in files]}}


def _node(path: str, host: Host) -> Json:
    return {"path": path, "hostPath": host.device(path), "permissions": "rw"}


def _common(driver: DriverFiles, host: Host) -> Json:
    """`void` keeps NVIDIA's runtime, where it is the default, from adding all GPUs for an image that asks for them."""
    files = (*driver.libraries, *driver.programs, *driver.firmware)
    mounts = [_mount(file.host_path, file.path) for file in files]
    mounts += [_mount(path, path, "noexec") for path in driver.sockets]
    if not driver.hook:
        mounts += [_mount(link.library.host_path, link.path) for link in driver.links]
    edits: Json = {"env": ["NVIDIA_VISIBLE_DEVICES=void"], "mounts": mounts}
    nodes = [_node(path, host) for path in common_files(host)]
    if nodes:
        edits["deviceNodes"] = nodes
    if driver.hook and driver.libraries:
        edits["hooks"] = _hooks(driver)
    return edits


def _mount(host_path: str, container_path: str, *options: str) -> Json:
    return {"hostPath": host_path, "containerPath": container_path, "options": [*MOUNT_OPTIONS, *options]}


def _hooks(driver: DriverFiles) -> list[Json]:
    """Links to the libraries, then the loader's cache. Only hooks that every version of NVIDIA's toolkit has."""
    links = [argument for link in driver.links for argument in ("--link", f"{link.target}::{link.path}")]
    folders = dict.fromkeys(posixpath.dirname(file.path) for file in driver.libraries)
    within = [argument for folder in folders for argument in ("--folder", folder)]
    hooks = [_hook(driver.hook, "create-symlinks", links)] if links else []
    return [*hooks, _hook(driver.hook, "update-ldcache", within)]


def _hook(program: str, name: str, arguments: Sequence[str]) -> Json:
    base = posixpath.basename(program)
    called = [base, "hook"] if base == "nvidia-ctk" else [base]
    return {"hookName": "createContainer", "path": program, "args": [*called, name, *arguments]}


def _replace(path: Path, text: str) -> None:
    """Write it beside, and rename: nobody ever reads half a file, and a name with this ending is no spec."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o644)
        beside.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
