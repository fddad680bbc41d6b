"""Reads what the fake library has on its boards, without the library: the third source for a checker.

    read_state(path_of_the_description).gpus["GPU-…"].instances

The layout is `nvml_fake.h`'s. Reading takes no lock and holds nobody up: there are two copies, `turn` says which one is
true, and if it has moved while we were copying we copy again. About 0.1 ms for eight full GPUs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_GPUS, MAX_INSTANCES, MAX_COMPUTES, MAX_EVENTS, MAX_COUNTED = 64, 32, 64, 64, 64
MAGIC = 0x3147494D

_FILE = struct.Struct("=IIQ48x")  # magic, size, turn
_STATE = struct.Struct("=IIIIQQ")  # boots, gpu_count, next_generation, unused, acted, sequence
_GPU = struct.Struct("=96sQIIIIII")  # uuid, described, generation, current, pending, instances, computes, unused
_INSTANCE = struct.Struct("=IIIII44s")  # id, profile_id, start, size, generation, profile
_COMPUTE = struct.Struct("=IIIIII64s")  # gi, id, mig_index, slices, start, generation, uuid

_GPUS_AT = _STATE.size + MAX_EVENTS * 32 + MAX_COUNTED * 16
_GPU_SIZE = _GPU.size + MAX_INSTANCES * _INSTANCE.size + MAX_COMPUTES * _COMPUTE.size
_STATE_SIZE = _GPUS_AT + MAX_GPUS * _GPU_SIZE
_FILE_SIZE = _FILE.size + 2 * _STATE_SIZE


@dataclass(frozen=True, slots=True)
class FakeCompute:
    """A compute instance, and so a MIG device."""

    uuid: str
    id: int
    mig_index: int
    slices: int
    start: int


@dataclass(frozen=True, slots=True)
class FakeInstance:
    """A GPU instance at its place. `compute` is empty where an agent died between the two creating calls."""

    profile: str
    profile_id: int
    start: int
    size: int
    gi: int
    compute: tuple[FakeCompute, ...]

    @property
    def uuid(self) -> str | None:
        """Its first MIG device's."""
        return self.compute[0].uuid if self.compute else None


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """A GPU's MIG: mode now and after a reset, and what is on it."""

    uuid: str
    index: int
    mig: bool
    mig_pending: bool
    instances: tuple[FakeInstance, ...]


@dataclass(frozen=True, slots=True)
class FakeNode:
    """All GPUs of a node by UUID, at one moment. `turn` grows with every change, `boots` with every reboot."""

    turn: int
    boots: int
    gpus: Mapping[str, FakeGpu]


def read_state(description: Path) -> FakeNode:
    """The state beside this description. `FileNotFoundError` while no process has opened the library there."""
    path = description.with_name(description.name + ".state")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        turn, raw = _true_copy(descriptor, path)
    finally:
        os.close(descriptor)
    boots, count, *_ = _STATE.unpack_from(raw)
    if not count:
        raise FileNotFoundError(f"{path} is being made")
    gpus = (_gpu(raw, index) for index in range(count))
    return FakeNode(turn, boots, {gpu.uuid: gpu for gpu in gpus})


def _true_copy(descriptor: int, path: Path) -> tuple[int, bytes]:
    """A copy is written to only while the other one is true, so it is whole if it is still true after copying."""
    turn = _turn(descriptor, path)
    while True:
        at = _FILE.size + (turn & 1) * _STATE_SIZE
        head = os.pread(descriptor, _STATE.size, at)
        raw = os.pread(descriptor, _GPUS_AT + _STATE.unpack(head)[1] * _GPU_SIZE, at)
        now = _turn(descriptor, path)
        if now == turn:
            return turn, raw
        turn = now


def _turn(descriptor: int, path: Path) -> int:
    head = os.pread(descriptor, _FILE.size, 0)
    if len(head) < _FILE.size:
        raise FileNotFoundError(f"{path} is being made")
    magic, size, turn = _FILE.unpack(head)
    if magic != MAGIC or size != _FILE_SIZE:
        raise FileNotFoundError(f"{path} is being made, or of another library")
    return int(turn)


def _gpu(raw: bytes, index: int) -> FakeGpu:
    at = _GPUS_AT + index * _GPU_SIZE
    uuid, _, _, current, pending, instances, computes, _ = _GPU.unpack_from(raw, at)
    at += _GPU.size
    compute_at = at + MAX_INSTANCES * _INSTANCE.size
    by_gi: dict[int, list[FakeCompute]] = {}
    for i in range(computes):
        gi, number, mig_index, slices, start, _, name = _COMPUTE.unpack_from(raw, compute_at + i * _COMPUTE.size)
        by_gi.setdefault(gi, []).append(FakeCompute(_text(name), number, mig_index, slices, start))
    found = []
    for i in range(instances):
        gi, profile_id, start, size, _, profile = _INSTANCE.unpack_from(raw, at + i * _INSTANCE.size)
        compute = tuple(sorted(by_gi.get(gi, ()), key=lambda part: part.id))
        found.append(FakeInstance(_text(profile), profile_id, start, size, gi, compute))
    found.sort(key=lambda instance: instance.start)
    return FakeGpu(_text(uuid), index, bool(current), bool(pending), tuple(found))


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode()
