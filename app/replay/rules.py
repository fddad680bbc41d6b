"""The placement rules that a replay is compared with: small scorers over what is left of one node.

    a node changes ──Rule.score()──▶ one score for every kind of pod ──▶ a column of the Board
    a pod arrives  ──Board.choose()──▶ the highest score of its row, ties by a fixed order or at random

The definitions are those of the FGD simulator (USENIX ATC'23): scores are truncated to whole numbers, which
makes many ties, and how they are broken is part of the result.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from app.replay.trace import GPU_MILLI, Books, Ints, Machine, Pod
from solver.forecast import Shape, typical_shapes

Floats = NDArray[np.float64]

LARGEST_CPU_MILLI = 128_000
LARGEST_GPU_MILLI = 8 * GPU_MILLI
"""What CPU and GPU are divided by before they are added: the largest node of the simulator."""

SCORES = 100  # the highest score of kube-scheduler's framework

NO_FIT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Kinds:
    """Every kind of pod that will come, as columns."""

    pods: tuple[Pod, ...]
    cpu: Ints
    memory: Ints
    count: Ints
    milli: Ints

    @classmethod
    def of(cls, pods: Sequence[Pod]) -> Kinds:
        """The different pods among these."""
        kinds = tuple(sorted(set(pods)))
        cpu, memory, count, milli = (np.array([pod[i] for pod in kinds], dtype=np.int64) for i in range(4))
        return cls(kinds, cpu, memory, count, milli)

    def may_use(self, model: str) -> NDArray[np.bool_]:
        """Which kinds may be on a node of that model."""
        return np.array([not pod.models or model in pod.models for pod in self.pods])


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One node, as a rule sees it, beside all kinds of pods; `room[kind, gpu]`: that GPU can serve it."""

    kinds: Kinds
    machine: Machine
    place: int
    cpu: int
    left: Ints
    room: NDArray[np.bool_]


Scored = tuple[NDArray[np.generic], Ints]
"""By kind of pod: its score on the node, and the GPU for it if it is a share."""

Rule = Callable[[View], Scored]


def first_fit(view: View) -> Scored:
    """The first node of the list, the first GPU."""
    return np.full(len(view.kinds.pods), -view.place), _where_most(view, view.room)


def best_fit(view: View) -> Scored:
    """The node with the least left in CPU and GPU together, the GPU with the least."""
    cpu = (view.cpu - view.kinds.cpu) / LARGEST_CPU_MILLI
    gpu = (view.left.sum() - view.kinds.count * view.kinds.milli) / LARGEST_GPU_MILLI
    return _whole((1 - (cpu + gpu) / 2) * SCORES), _smallest(view)


def dot_product(view: View) -> Scored:
    """The node whose room points least the way the demand does (Tetris, as the simulator has it)."""
    cpu = view.cpu * view.kinds.cpu / LARGEST_CPU_MILLI**2
    gpu = view.left.sum() * view.kinds.count * view.kinds.milli / LARGEST_GPU_MILLI**2
    return _whole((1 - (cpu + gpu) / 2) * SCORES), _smallest(view)


def _whole(scores: Floats) -> Ints:
    whole: Ints = scores.astype(np.int64)
    return whole


def _smallest(view: View) -> Ints:
    """The GPU with the least left that is enough, by kind of pod."""
    return _where_most(view, np.where(view.room, -view.left, -GPU_MILLI - 1))


def _where_most(view: View, by_gpu: NDArray[np.generic]) -> Ints:
    """The first GPU with the largest number, by kind of pod; 0 where the node has none."""
    first: Ints = by_gpu.argmax(axis=1) if len(view.left) else np.zeros(len(view.kinds.pods), dtype=np.int64)
    return first


class Fgd:
    """The node whose fragmentation grows least: the gradient of the milli that typical pods cannot use."""

    def __init__(self, fragmentation: Fragmentation) -> None:
        self._fragmentation = fragmentation

    def __call__(self, view: View) -> Scored:
        """Every kind on every GPU that is different, all at once."""
        kinds = view.kinds
        _, first = np.unique(view.left, return_index=True)
        different = np.zeros(view.left.shape, dtype=bool)
        different[first] = True
        shares = (kinds.count == 1) & (kinds.milli < GPU_MILLI)
        whole = np.flatnonzero(~shares)
        kind, gpu = np.nonzero(view.room & different & shares[:, None])

        after = np.repeat(view.left[None, :], 1 + len(kind) + len(whole), axis=0)
        after[1 + np.arange(len(kind)), gpu] -= kinds.milli[kind]
        idle = view.left == GPU_MILLI
        taken = idle & (np.cumsum(idle) <= kinds.count[whole][:, None])
        after[1 + len(kind) :][taken] = 0
        cpu = view.cpu - np.concatenate(([0], kinds.cpu[kind], kinds.cpu[whole]))

        amount = self._fragmentation.of(view.machine.model, cpu, after)
        score = _whole(SCORES / (1 + np.exp((amount[1:] - amount[0]) / GPU_MILLI)))
        scores, gpus = np.full(len(kinds.pods), NO_FIT), np.zeros(len(kinds.pods), dtype=np.int64)
        scores[whole] = score[len(kind) :]
        order = np.lexsort((-gpu, score[: len(kind)]))  # the best comes last, and of equal ones the first GPU
        scores[kind[order]], gpus[kind[order]] = score[order], gpu[order]
        return scores, gpus


class Fragmentation:
    """How much of what is idle on a node typical pods cannot use, each counted as often as it comes."""

    def __init__(self, pods: Sequence[Pod], models: Sequence[str]) -> None:
        typical = typical_shapes(Shape(p.cpu_milli, p.gpus, p.milli, p.models) for p in pods)
        total = sum(shape.frequency for shape in typical)
        self._by_model = {}
        for model in models:
            usable = [s for s in typical if s.count and (not s.models or model in s.models)]
            milli = np.array([shape.milli for shape in usable], dtype=np.int64)
            thresholds, place = np.unique(milli, return_inverse=True)
            self._by_model[model] = (
                thresholds,
                place,
                np.array([shape.cpu_milli for shape in usable], dtype=np.int64),
                np.array([shape.count for shape in usable], dtype=np.int64),
                np.array([shape.frequency / total for shape in usable], dtype=np.float64),
            )

    def of(self, model: str, cpu: Ints, left: Ints) -> Floats:
        """In milli, for states of nodes of one model: CPU left, and what is left of each GPU."""
        thresholds, place, needed_cpu, needed_count, weight = self._by_model[model]
        enough = left[:, :, None] >= thresholds
        fitting = enough.sum(axis=1)[:, place]
        amount = (left[:, :, None] * enough).sum(axis=1)[:, place]
        can = (fitting >= needed_count) & (cpu[:, None] >= needed_cpu)
        idle: Floats = left.sum(axis=1) - (amount * can) @ weight
        return idle

    def of_node(self, books: Books, node: int) -> float:
        """That of one node as it is."""
        amount = self.of(books.machines[node].model, books.cpu[node : node + 1], books.of_node(node)[None, :])
        return float(amount[0])


RULES: Mapping[str, Rule | None] = {
    "first-fit": first_fit,
    "best-fit": best_fit,
    "dot-product": dot_product,
    "fgd": None,  # made for the trace: see `rule_called`
}


def rule_called(name: str, fragmentation: Fragmentation) -> Rule:
    """One of RULES."""
    return RULES[name] or Fgd(fragmentation)


class Board:
    """The scores of every kind of pod on every node, kept up as nodes change."""

    def __init__(self, books: Books, kinds: Kinds, rule: Rule, *, chance: random.Random, fixed_ties: bool) -> None:
        self._books, self._kinds, self._rule, self._chance = books, kinds, rule, chance
        self._fixed_ties = fixed_ties
        self._order = list(range(len(books.machines)))
        if fixed_ties:
            chance.shuffle(self._order)
        self._column = {node: column for column, node in enumerate(self._order)}
        self._row = {pod: row for row, pod in enumerate(kinds.pods)}
        self._may_use = [kinds.may_use(model) for model in books.models]
        lowest = np.iinfo(np.int64).min
        self._scores: Ints = np.full((len(kinds.pods), len(self._order)), lowest, dtype=np.int64)
        self._gpus: Ints = np.zeros(self._scores.shape, dtype=np.int64)
        self._lowest = lowest
        for node in range(len(self._order)):
            self.changed(node)

    def choose(self, pod: Pod) -> tuple[int, tuple[int, ...]] | None:
        """A node and its GPUs; None where nothing fits."""
        row = self._row[pod]
        scores = self._scores[row]
        column = int(scores.argmax())
        if scores[column] == self._lowest:
            return None
        if not self._fixed_ties:
            column = int(self._chance.choice(np.flatnonzero(scores == scores[column])))
        node = self._order[column]
        return node, gpus_for(pod, self._books.of_node(node), int(self._gpus[row, column]))

    def changed(self, node: int) -> None:
        """The node is no longer what it was: score it anew."""
        books, kinds = self._books, self._kinds
        left = books.of_node(node)
        room = left >= kinds.milli[:, None]
        fits = (
            self._may_use[books.model[node]]
            & (kinds.cpu <= books.cpu[node])
            & (kinds.memory <= books.memory[node])
            & (room.sum(axis=1) >= kinds.count)
        )
        column = self._column[node]
        self._scores[:, column] = self._lowest
        if fits.any():
            view = View(kinds, books.machines[node], node, int(books.cpu[node]), left, room)
            scores, self._gpus[:, column] = self._rule(view)
            self._scores[fits, column] = scores[fits]


class AtRandom:
    """Any node that can take the pod, and any GPU of it that can."""

    def __init__(self, books: Books, kinds: Kinds, *, chance: random.Random) -> None:
        self._books, self._chance = books, chance
        self._may_use = {pod: np.array([kinds.may_use(m)[i] for m in books.models]) for i, pod in enumerate(kinds.pods)}

    def choose(self, pod: Pod) -> tuple[int, tuple[int, ...]] | None:
        """A node and its GPUs; None where nothing fits."""
        books = self._books
        fits = (books.cpu >= pod.cpu_milli) & (books.memory >= pod.memory_mib) & self._may_use[pod][books.model]
        if pod.gpus:
            fits &= (books.left >= pod.milli).sum(axis=1) >= pod.gpus
        nodes = np.flatnonzero(fits)
        if not len(nodes):
            return None
        node = int(self._chance.choice(nodes))
        left = books.of_node(node)
        return node, gpus_for(pod, left, self._chance.choice(np.flatnonzero(left >= pod.milli)) if pod.gpus else 0)

    def changed(self, node: int) -> None:
        """Nothing is kept."""


def gpus_for(pod: Pod, left: Ints, share_gpu: int) -> tuple[int, ...]:
    """The GPUs of a pod: the one chosen for a share, or the first idle ones."""
    if pod.is_share:
        return (int(share_gpu),)
    return tuple(np.flatnonzero(left == GPU_MILLI)[: pod.gpus].tolist())
