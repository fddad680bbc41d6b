"""Plays the containers that real device managers have admitted: each has a process on every device that it was given.

What a container was given is what its environment says (NVIDIA_VISIBLE_DEVICES), not what anybody had promised it. As
on a real node its processes show in NVML, their cgroups name the pod, and a slice under one cannot be destroyed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.e2e.checker import Piece
from tests.e2e.kubelet import ContainerEvent, Kubelet
from tests.fake_nvml.fleet import Fleet
from tests.fake_nvml.state import read_state

LOOK_SECONDS = 0.1
VISIBLE = "NVIDIA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Running:
    """A container that runs: whose it is, and the UUIDs of the GPUs and MIG devices that it sees."""

    node: str
    uid: str
    pod: str
    container: str
    visible: tuple[str, ...]
    ids: tuple[str, ...]


def running_on(node: str, kubelet: Kubelet) -> dict[tuple[str, str], Running]:
    """The containers of a node that were given devices, by pod UID and name."""
    return {key: _running(node, event) for key, event in kubelet.containers().items() if event.devices}


def _running(node: str, event: ContainerEvent) -> Running:
    visible = tuple(each for each in event.envs.get(VISIBLE, "").split(",") if each)
    ids = tuple(sorted(itertools.chain.from_iterable(event.devices.values())))
    return Running(node, event.uid, event.pod, event.container, visible, ids)


def pieces_on(fleet: Fleet, node: str) -> dict[str, Piece]:
    """What the board says that each UUID is: a GPU, or an instance at its place."""
    pieces: dict[str, Piece] = {}
    for uuid, gpu in read_state(fleet.description(node)).gpus.items():
        pieces[uuid] = Piece(uuid)
        for instance in gpu.instances:
            if instance.uuid:
                pieces[instance.uuid] = Piece(uuid, instance.profile.replace("+", "."), instance.start)
    return pieces


class Containers:
    """One thread that puts the processes of all nodes' containers onto the boards, and takes them off again."""

    def __init__(self, kubelets: Mapping[str, Kubelet], fleet: Fleet) -> None:
        self._kubelets = kubelets
        self._fleet = fleet
        self._pids = itertools.count(20_000)
        self._begun: dict[tuple[str, str], tuple[str, list[int]]] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="containers")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_SECONDS):
            for node, kubelet in self._kubelets.items():
                self._look(node, kubelet)

    def _look(self, node: str, kubelet: Kubelet) -> None:
        now = running_on(node, kubelet)
        for key in [key for key, (at, _) in self._begun.items() if at == node and key not in now]:
            for pid in self._begun.pop(key)[1]:
                self._fleet.control(node).clear_process(pid)
        new = [container for key, container in now.items() if key not in self._begun]
        if new:
            pieces = pieces_on(self._fleet, node)
            for container in new:
                self._begin(container, pieces)

    def _begin(self, container: Running, pieces: Mapping[str, Piece]) -> None:
        pids = []
        for uuid in container.visible:
            piece = pieces.get(uuid)
            if piece is None:
                continue  # the check of the sources says so
            pid = next(self._pids)
            self._fleet.add_process(container.node, pid, container.uid)
            control = self._fleet.control(container.node)
            if piece.profile:
                control.process(pid, gpu=piece.gpu, profile=piece.profile, start=piece.start)
            else:
                control.process(pid, gpu=piece.gpu)
            pids.append(pid)
        self._begun[container.uid, container.container] = container.node, pids
