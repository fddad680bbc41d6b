"""A cluster and pods from CSV files in the openb format, the pods in their order of arrival, and what is left.

No policy here: `Books` only knows what fits, and refuses what does not.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.errors import BadInput

GPU_MILLI = 1000

MOST_LOAD = 1.3
"""Arrivals go on until this much of the cluster's GPUs has been asked for."""

NODE_COLUMNS = ("sn", "cpu_milli", "memory_mib", "gpu", "model")
POD_COLUMNS = ("cpu_milli", "memory_mib", "num_gpu", "gpu_milli")
MODEL_COLUMN = "gpu_spec"  # some lists do without it

MOST = 10**9
"""No number in a list is larger: sums of them stay exact."""


class Machine(NamedTuple):
    """A node: its GPUs are all of one model."""

    name: str
    cpu_milli: int
    memory_mib: int
    gpus: int
    model: str


class Pod(NamedTuple):
    """What one pod asks for: `gpus` GPUs of `milli` each, on models it may use (sorted; none: on any)."""

    cpu_milli: int
    memory_mib: int
    gpus: int
    milli: int
    models: tuple[str, ...] = ()

    @property
    def demand_milli(self) -> int:
        """What it asks of GPUs in all."""
        return self.gpus * self.milli

    @property
    def is_share(self) -> bool:
        """Whether it wants part of one GPU."""
        return self.gpus == 1 and self.milli < GPU_MILLI

    @property
    def size(self) -> str:
        """Its class, in the words of the tables."""
        if not self.gpus:
            return CPU_ONLY
        if self.gpus > 1:
            return MULTI_GPU
        return SHARE if self.is_share else ONE_GPU


CPU_ONLY, MULTI_GPU, ONE_GPU, SHARE = SIZES = ("CPU-only", "multi-GPU", "one GPU", "shares")


# --- reading ---


def read_machines(path: Path) -> tuple[Machine, ...]:
    """The nodes of a CSV file; BadInput with the line where it is not one."""
    machines: dict[str, Machine] = {}
    for line, row in _rows(path, NODE_COLUMNS):
        where = f"{path}, line {line}"
        cpu, memory, gpus = (_number(row, column, where) for column in ("cpu_milli", "memory_mib", "gpu"))
        name, model = row["sn"].strip(), row["model"].strip()
        if not name or name in machines:
            raise BadInput(f"{where}: {'a node without a name' if not name else f'{name} is there twice'}")
        if gpus and not model:
            raise BadInput(f"{where}: {name} has GPUs of no model")
        machines[name] = Machine(name, cpu, memory, gpus, model)
    if not any(machine.gpus for machine in machines.values()):
        raise BadInput(f"{path}: no node has a GPU")
    return tuple(machines.values())


def read_pods(path: Path) -> tuple[Pod, ...]:
    """The pods of a CSV file; BadInput with the line where it is not one."""
    pods = []
    for line, row in _rows(path, POD_COLUMNS):
        where = f"{path}, line {line}"
        cpu, memory, count, milli = (_number(row, column, where) for column in POD_COLUMNS)
        if count and not 0 < milli <= GPU_MILLI:
            raise BadInput(f"{where}: gpu_milli is {milli}, and must be 1 to {GPU_MILLI}")
        if count > 1 and milli < GPU_MILLI:
            raise BadInput(f"{where}: a share of {count} GPUs at once; shares are of one GPU")
        models = tuple(sorted({name.strip() for name in (row.get(MODEL_COLUMN) or "").split("|")} - {""}))
        pods.append(Pod(cpu, memory, count, milli if count else 0, models if count else ()))
    if not any(pod.gpus for pod in pods):
        raise BadInput(f"{path}: no pod asks for a GPU")
    return tuple(pods)


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in wanted if column not in (reader.fieldnames or ())]
            if missing:
                raise BadInput(f"{path}: no column {', '.join(missing)} in the first line")
            for row in reader:
                if None in row or None in row.values():
                    raise BadInput(f"{path}, line {reader.line_num}: not as many fields as the first line has")
                yield reader.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        reason = problem.strerror if isinstance(problem, OSError) else problem
        raise BadInput(f"cannot read {path}: {reason}") from None


def _number(row: Mapping[str, str], column: str, where: str) -> int:
    try:
        number = int(row[column])
    except ValueError:
        raise BadInput(f"{where}: {column} is {row[column]!r}, not a whole number") from None
    if not 0 <= number <= MOST:
        raise BadInput(f"{where}: {column} is {number}, and must be 0 to {MOST}")
    return number


# --- arriving ---


def arrivals(pods: Sequence[Pod], capacity_milli: int, seed: int) -> list[Pod]:
    """The list, shuffled; then pods drawn from it again, until 1.3 of the cluster's GPUs are asked for.

    As in the FGD simulator the test for the end adds one pod's milli per GPU, not its total. A list that asks
    for more is thinned at random.
    """
    chance = random.Random(seed)  # noqa: S311  not a secret
    most = MOST_LOAD * capacity_milli
    coming = list(pods)
    chance.shuffle(coming)
    asked = sum(pod.demand_milli for pod in coming)
    while asked > most:
        i = chance.randrange(len(coming))
        coming[i], coming[-1] = coming[-1], coming[i]
        asked -= coming.pop().demand_milli
    while True:
        pod = chance.choice(pods)
        if asked + pod.milli > most:
            return coming
        asked += pod.demand_milli
        coming.append(pod)


# --- what is left ---

Ints = NDArray[np.int64]


class Books:
    """What is left of each node's CPU, memory and GPUs (`left[node, gpu]`, in milli; -1: there is no such GPU)."""

    def __init__(self, machines: Sequence[Machine]) -> None:
        widest = max((machine.gpus for machine in machines), default=0)
        self.machines = tuple(machines)
        self.models = tuple(sorted({machine.model for machine in machines}))
        self.model = np.array([self.models.index(machine.model) for machine in machines], dtype=np.int64)
        self.cpu = np.array([machine.cpu_milli for machine in machines], dtype=np.int64)
        self.memory = np.array([machine.memory_mib for machine in machines], dtype=np.int64)
        self.left: Ints = np.full((len(machines), widest), -1, dtype=np.int64)
        for node, machine in enumerate(machines):
            self.left[node, : machine.gpus] = GPU_MILLI

    @property
    def capacity_milli(self) -> int:
        """All GPUs of the cluster."""
        return GPU_MILLI * sum(machine.gpus for machine in self.machines)

    def of_node(self, node: int) -> Ints:
        """What is left of each of one node's GPUs."""
        return self.left[node, : self.machines[node].gpus]

    def take(self, pod: Pod, node: int, gpus: Iterable[int]) -> None:
        """The pod is placed there; ValueError where that is not possible."""
        chosen = tuple(gpus)
        machine = self.machines[node]
        if (
            len(chosen) != pod.gpus
            or len(set(chosen)) != pod.gpus
            or not all(0 <= gpu < machine.gpus and self.left[node, gpu] >= pod.milli for gpu in chosen)
            or (pod.models and machine.model not in pod.models)
            or pod.cpu_milli > self.cpu[node]
            or pod.memory_mib > self.memory[node]
        ):
            raise ValueError(f"{pod} cannot be on GPUs {chosen} of {machine.name}")
        self.cpu[node] -= pod.cpu_milli
        self.memory[node] -= pod.memory_mib
        for gpu in chosen:
            self.left[node, gpu] -= pod.milli
