"""Which of the driver's files a container needs that is not started by NVIDIA's runtime: libraries, programs, sockets.

The places are those where distributions and NVIDIA's installers put them, and where `nvidia-ctk cdi generate` looks.
Nothing is opened: a library belongs to the driver when its name ends in the driver's version.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

from app.agent.device_files import Host

LIBRARY_FOLDERS = (
    "/usr/lib64",
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib/aarch64-linux-gnu/nvidia/current",
    "/lib64",
    "/lib/x86_64-linux-gnu",
    "/lib/aarch64-linux-gnu",
    "/lib/x86_64-linux-gnu/nvidia/current",
    "/lib/aarch64-linux-gnu/nvidia/current",
    "/usr/local/nvidia/lib64",
)
"""Debian has the driver's libraries in two of them. The last is Google's COS."""

PROGRAM_FOLDERS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
PROGRAMS = (
    "nvidia-smi",
    "nvidia-debugdump",
    "nvidia-persistenced",
    "nvidia-cuda-mps-control",
    "nvidia-cuda-mps-server",
    "nvidia-imex",
    "nvidia-imex-ctl",
)

SOCKETS = ("/var/run/nvidia-persistenced/socket", "/var/run/nvidia-fabricmanager/socket")

HOOK_PROGRAMS = ("/usr/bin/nvidia-cdi-hook", "/usr/local/nvidia/toolkit/nvidia-cdi-hook", "/usr/bin/nvidia-ctk")
"""NVIDIA's toolkit as a package, as the GPU Operator installs it, and as older packages have it (`nvidia-ctk hook`)."""


@dataclass(frozen=True, slots=True)
class DriverFile:
    """A file under the driver's root; `path` is without that root, as the container sees it."""

    path: str
    host_path: str


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link beside a library, as the driver's installer made it: libcuda.so.1 to libcuda.so.550.54.15."""

    path: str
    target: str
    library: DriverFile


@dataclass(frozen=True, slots=True)
class DriverFiles:
    """What was found. `sockets` are the host's own, whatever the driver's root; `hook` is the hook program's path."""

    libraries: tuple[DriverFile, ...] = ()
    links: tuple[Link, ...] = ()
    programs: tuple[DriverFile, ...] = ()
    firmware: tuple[DriverFile, ...] = ()
    sockets: tuple[str, ...] = ()
    hook: str = ""


def find_driver_files(host: Host, version: str, *, root: str = "/") -> DriverFiles:
    """Look through the driver's root on this host. `version` is the driver's, as NVML says it."""
    libraries, links = _libraries(host, version, root)
    return DriverFiles(
        libraries=libraries,
        links=links,
        programs=tuple(_programs(host, root)),
        firmware=tuple(_matching(host, root, f"/lib/firmware/nvidia/{version}", "gsp*.bin")) if version else (),
        sockets=tuple(path for path in SOCKETS if host.has(path)),
        hook=next((path for path in HOOK_PROGRAMS if host.has(path)), ""),
    )


def _libraries(host: Host, version: str, root: str) -> tuple[tuple[DriverFile, ...], tuple[Link, ...]]:
    if not version:
        return (), ()
    libraries: list[DriverFile] = []
    links: list[Link] = []
    for folder in _folders(host, root):
        found = tuple(_matching(host, root, folder, f"*.so.{version}"))
        libraries += found
        links += _links(host, root, folder, found)
    return tuple(libraries), tuple(links)


def _folders(host: Host, root: str) -> Iterator[str]:
    """Those that are there, each once: on most hosts /lib is a link to /usr/lib."""
    seen = set()
    for folder in (each for library in LIBRARY_FOLDERS for each in (library, f"{library}/vdpau")):
        at = host.at(posixpath.join(root, folder[1:]))
        if at.is_dir() and at.resolve() not in seen:
            seen.add(at.resolve())
            yield folder


def _links(host: Host, root: str, folder: str, libraries: tuple[DriverFile, ...]) -> Iterator[Link]:
    """Links in this folder that lead, by way of others beside them, to one of these libraries."""
    by_name = {posixpath.basename(file.path): file for file in libraries}
    entries = sorted(host.at(posixpath.join(root, folder[1:])).iterdir()) if libraries else ()
    targets = {entry.name: posixpath.basename(entry.readlink()) for entry in entries if entry.is_symlink()}
    for name, target in targets.items():
        end, steps = target, 0
        while end in targets and steps < len(targets):
            end, steps = targets[end], steps + 1
        if name not in by_name and end in by_name:
            yield Link(f"{folder}/{name}", target, by_name[end])


def _programs(host: Host, root: str) -> Iterator[DriverFile]:
    for program in PROGRAMS:
        for folder in PROGRAM_FOLDERS:
            path = posixpath.join(root, folder[1:], program)
            if host.has(path):
                yield DriverFile(f"{folder}/{program}", path)
                break


def _matching(host: Host, root: str, folder: str, pattern: str) -> Iterator[DriverFile]:
    under = posixpath.join(root, folder[1:])
    for found in sorted(host.at(under).glob(pattern)):
        if not found.is_symlink() or posixpath.basename(found.readlink()) != found.name:
            yield DriverFile(f"{folder}/{found.name}", f"{under}/{found.name}")
