"""One node's kubelet as far as devices go: upstream's device manager, topology manager, admission and PodResources
server (controlplane/kubelet.go), in a mount namespace in which /var/lib/kubelet is a directory of the test's.

    directory/              the node's /var/lib/kubelet, seen from outside
      device-plugins/       plugins' sockets, the kubelet's own and the checkpoint of what was given
      pod-resources/        kubelet.sock

It runs no containers; what each would have got is a line in a file, which outlives the kubelet as containers do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self

import pytest

from tests.e2e import toolchain
from tests.e2e.processes import Processes

READY_SECONDS = 30.0
STOP_SECONDS = 5.0
POLL_SECONDS = 0.05

Policy = Literal["none", "best-effort", "restricted", "single-numa-node"]
Scope = Literal["container", "pod"]

# Root may have a mount namespace of its own; others get one with a user namespace, where the machine allows that.
WAYS = (("unshare", "--mount"), ("unshare", "--map-root-user", "--mount"))

# Where there is no /var/lib/kubelet, an empty /var/lib covers the machine's.
ENTER = """set -e
[ -d /var/lib/kubelet ] || { mount -t tmpfs tangram /var/lib; mkdir /var/lib/kubelet; }
mount --bind "$1" /var/lib/kubelet
shift
exec "$@"
"""


class NoMountNamespace(Exception):
    """This machine lets us have no mount namespace, so no kubelet can be given a /var/lib/kubelet of its own."""


@dataclass(frozen=True, slots=True)
class ContainerEvent:
    """One line: a container started or ended, or a pod was refused (then `container` is empty)."""

    event: Literal["started", "ended", "refused"]
    time: datetime
    uid: str
    namespace: str
    pod: str
    container: str
    devices: Mapping[str, tuple[str, ...]]
    """The ids that the device manager gave, by resource."""
    envs: Mapping[str, str]
    annotations: Mapping[str, str]
    cdi_devices: tuple[str, ...]
    device_nodes: tuple[str, ...]
    """Paths on the host."""
    mounts: Mapping[str, str]
    """Path in the container by path on the host."""
    reason: str
    message: str

    @classmethod
    def read(cls, line: str) -> Self:
        """What controlplane/kubelet_containers.go wrote."""
        said: dict[str, Any] = json.loads(line)
        return cls(
            event=said["event"],
            time=datetime.fromisoformat(said["time"]),
            uid=said["uid"],
            namespace=said["namespace"],
            pod=said["pod"],
            container=said.get("container", ""),
            devices={resource: tuple(ids) for resource, ids in said.get("devices", {}).items()},
            envs=said.get("envs", {}),
            annotations=said.get("annotations", {}),
            cdi_devices=tuple(said.get("cdi_devices", ())),
            device_nodes=tuple(node["host"] for node in said.get("device_nodes", ())),
            mounts={mount["host"]: mount["container"] for mount in said.get("mounts", ())},
            reason=said.get("reason", ""),
            message=said.get("message", ""),
        )


class Kubelet:
    """The kubelet of the node `node`, which must exist before `start()`."""

    def __init__(
        self,
        processes: Processes,
        node: str,
        kubeconfig: Path,
        *,
        policy: Policy = "none",
        scope: Scope = "container",
        numa_nodes: int = 2,
        longest_delay_seconds: float = 0.3,
        end_within_seconds: float = 0.5,
        seed: int = 1,
    ) -> None:
        self.node = node
        self.name = f"kubelet-{node}"
        self._processes = processes
        self._kubeconfig = kubeconfig
        self._root = Path(tempfile.mkdtemp(prefix="tangram-kubelet-"))  # a socket's path may have 107 characters
        self.directory = self._root / "kubelet"
        self._out = self._root / "out"
        self._log = self._out / "containers.jsonl"
        flags = {
            "node": node,
            "kubeconfig": kubeconfig,
            "out": self._out,
            "topology-policy": policy,
            "topology-scope": scope,
            "numa-nodes": numa_nodes,
            "longest-delay": f"{longest_delay_seconds}s",
            "end-within": f"{end_within_seconds}s",
            "seed": seed,
            "v": 3,
        }
        self._flags = [f"--{flag}={value}" for flag, value in flags.items()]
        self._reading = threading.Lock()
        self._events: list[ContainerEvent] = []
        self._read_bytes = 0

    @property
    def plugin_dir(self) -> Path:
        """Where plugins put their sockets and find the kubelet's."""
        return self.directory / "device-plugins"

    @property
    def pod_resources_socket(self) -> Path:
        """Where PodResources answers."""
        return self.directory / "pod-resources" / "kubelet.sock"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start it and wait until both of its sockets answer."""
        for directory in (self.directory, self._out):
            directory.mkdir(exist_ok=True)
        program = toolchain.build(toolchain.CONTROLPLANE)
        enter = [*mount_namespace(), "sh", "-c", ENTER, "sh", str(self.directory)]
        self._remove_sockets()
        self._processes.start(self.name, [*enter, str(program), "kubelet", *self._flags], throwaway=True)
        self._wait_ready()

    def kill(self) -> None:
        """SIGKILL. Containers go on, and plugins keep their sockets."""
        self._processes.kill(self.name)

    def restart(self) -> None:
        """Kill it if it runs and start it again; it has forgotten its plugins but not what it gave."""
        self.kill()
        self._remove_sockets()
        self._processes.restart(self.name)
        self._wait_ready()

    def stop(self) -> None:
        """SIGTERM; then what it left behind is removed."""
        if self._processes.is_running(self.name):
            os.kill(self._processes.pid(self.name), signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while self._processes.is_running(self.name) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        self._processes.kill(self.name)
        shutil.rmtree(self._root, ignore_errors=True)

    def events(self) -> list[ContainerEvent]:
        """Everything that happened to containers here, in order; any thread may ask, and often."""
        with self._reading, contextlib.suppress(FileNotFoundError), self._log.open("rb") as log:
            log.seek(self._read_bytes)
            for line in log:
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._events.append(ContainerEvent.read(line.decode()))
                self._read_bytes += len(line)
        return list(self._events)

    def containers(self) -> dict[tuple[str, str], ContainerEvent]:
        """What runs now, by pod uid and container name: how each started."""
        running: dict[tuple[str, str], ContainerEvent] = {}
        for event in self.events():
            if event.event == "started":
                running[event.uid, event.container] = event
            elif event.event == "ended":
                running.pop((event.uid, event.container), None)
        return running

    def logs(self) -> str:
        """What the kubelet has written so far."""
        return self._processes.logs(self.name)

    def _remove_sockets(self) -> None:
        """A killed kubelet leaves its sockets; they would look like a new one's."""
        for socket in (self.plugin_dir / "kubelet.sock", self.pod_resources_socket):
            socket.unlink(missing_ok=True)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not (self.plugin_dir / "kubelet.sock").exists() or not self.pod_resources_socket.exists():
            if not self._processes.is_running(self.name):
                raise self._processes.failed(self.name, "ended while it was starting")
            if time.monotonic() > deadline:
                raise self._processes.failed(self.name, f"was not ready after {READY_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)


@functools.cache
def mount_namespace() -> tuple[str, ...]:
    """The command that gives what follows it a mount namespace of its own, tried out on this machine."""
    said = []
    for way in WAYS:
        try:
            done = subprocess.run(
                [*way, "mount", "-t", "tmpfs", "tangram", "/mnt"],
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
        except OSError as error:
            said.append(str(error))
            continue
        if done.returncode == 0:
            return way
        said.append(f"{' '.join(way)}: {done.stderr.strip()}")
    raise NoMountNamespace(f"{NoMountNamespace.__doc__} {'; '.join(said)}")


def need_mount_namespace() -> None:
    """For fixtures: where the machine lets nobody have one, a test is skipped in words; in CI that is a failure."""
    try:
        mount_namespace()
    except NoMountNamespace as refused:
        if os.environ.get("CI") == "true":
            pytest.fail(str(refused))
        pytest.skip(str(refused))
