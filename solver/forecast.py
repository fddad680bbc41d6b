"""What a node's room is worth to the pods that keep coming: the potential of `prices.md`, part B.

    mix of pods ──from_mix()─────▶ worth of a residual, typical pods, scarce models, need of CPU   (once per mix)
    nodes now   ──with_blocks()──▶ which blocks of idle GPUs are short                             (now and then)
    a state     ──of()───────────▶ milli-GPU; a step's price is what it takes away

For one GPU model, with residuals r (milli left on each GPU), their sum R and so many idle GPUs:

    Φ =  θ Σ U(r)  +  (1-θ) Σ_m w_m · usable_m                    what a share, what a typical pod can still use
       + B Σ_j ω_j · 1000 · count_j · blocks_j                    room for pods of several GPUs, where it is short
       + λ_model · R / 1000                                       models that some pods cannot do without

and for the node, over all its models, the CPU that its GPUs will want: + c_v · min(cpu, ζ · need · R).

Everything is added up in whole 2⁻²⁰ of a milli-GPU, held in floats far below 2⁵³, so that no order of adding
matters: a batch of states and a single one give the same number to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import ortools.linear_solver.pywraplp as pywraplp
from numpy.typing import NDArray

from solver.cluster import GPU_MILLI
from solver.demand import Demand
from solver.geometry import Kind
from solver.steps import Host, terms_allow_kind

FINE = 2**20
"""Parts of a milli-GPU that the sums are kept in."""

SHARE_WORTH = 0.7
"""θ: how much of a node's worth is the worth of each residual by itself; the rest is what typical pods can use."""

SIZE_EXPONENT = -2.0
"""α: a typical pod of a tenth of a GPU counts a hundred times as much as one of a whole GPU, since it is the one
that finds room anywhere. At -2.5 some traces gain 0.05 points, at -3.5 others lose three."""

BLOCK_WORTH = 0.3
"""B: from 0.2 to 0.8 the results change by at most 0.3 points."""

BLOCK_POWER = 2
"""k: how sharply a block's worth falls when there are more of them than the mix will ask for. At 1 half a point is
lost, at 3 large pods are dropped too early on some seeds (0.1 point on openb's default at 95 % load)."""

SCARCE_MILLI = 1000.0
"""Λ: what a GPU of a model that is asked for more than it exists costs the pods that could go elsewhere."""

CPU_MILLI_GPU = 12.0
"""c_v: what a core costs that the idle GPUs beside it will want, in milli-GPU."""

CPU_MARGIN = 1.4
"""ζ: how much more CPU than the mix's mean is kept beside an idle GPU."""

TYPICAL_PODS = 0.95
"""Typical pods are the commonest shapes that make up this part of all pods, as FGD has them."""

DRAWS = 40
"""Poisson draws of the mix that the worth of a residual is averaged over. One alone is almost as good."""

SHARE_SIZES = 48
"""The sizes of shares that the worth of a residual is made of, commonest first."""

MODEL_SETS = 3
"""Scarcity looks at the demand confined to the union of up to so many of the mix's sets of models."""

CUTS = 2000
"""Fillings that the linear program is given before it is taken as it is. Dozens are usual."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A kind of pod in the mix: `count` GPUs of `milli` each (a share: one GPU, fewer than 1000), or none.

    `models` are the ones it may use (empty: any); `frequency` is how often it comes, in any unit.
    """

    cpu_milli: int
    count: int
    milli: int
    models: tuple[str, ...] = ()
    frequency: float = 1.0

    @property
    def demand_milli(self) -> int:
        """What it takes of GPUs, in milli."""
        return self.count * self.milli

    @property
    def is_share(self) -> bool:
        """Whether it takes part of one GPU."""
        return self.count == 1 and self.milli < GPU_MILLI


@dataclass(frozen=True, slots=True, eq=False)
class _Uses:
    """What the pods of the mix can use of one GPU model, as arrays with one entry per kind of pod."""

    thresholds: Ints  # the different milli of typical pods, ascending
    threshold_of: Ints  # per typical pod: its place among them
    typical_cpu: Floats
    typical_count: Ints
    typical_weight: Floats  # (1-θ) · w, fine
    block_cpu: Floats
    block_count: Ints
    block_of: Ints  # its place among the forecast's blocks
    scarcity: float  # λ per milli, fine


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Forecast:
    """The mix of pods to come, ready to value states. Made by `Forecast.from_mix`; renewed by `with_blocks`.

    `share_worth[r]` is U(r) in milli-GPU, `scarcity` λ by model, `cpu_need` cores per GPU, `typical` the typical
    pods (GPU pods only) with their `weights`, `blocks` the shapes of several GPUs with `block_share` (q) and
    `block_worth` (ω; nothing until `with_blocks`).
    """

    share_worth: Floats
    scarcity: Mapping[str, float]
    cpu_need: float
    typical: tuple[Shape, ...]
    weights: Floats
    blocks: tuple[Shape, ...]
    block_share: Floats
    block_worth: Floats
    _worth: Floats
    _uses: Mapping[str, _Uses]
    _any: _Uses

    @classmethod
    def from_mix(
        cls, shapes: Iterable[Shape], capacity: Mapping[str, float], *, seed: int = 0, draws: int = DRAWS
    ) -> Forecast:
        """Learn from a mix, for a cluster with so many GPUs of each model. `draws` 0: the expected mix alone."""
        mix = _merged(shapes)
        wanting = [shape for shape in mix if shape.count]
        total = sum(shape.frequency * shape.demand_milli for shape in wanting)
        gpus = float(sum(capacity.values()))
        worth = _share_worth(wanting, gpus * GPU_MILLI / total if total else 0.0, seed, draws)
        typical = tuple(shape for shape in typical_shapes(mix) if shape.count)
        weights = _weights(typical)
        blocks = tuple(shape for shape in wanting if shape.count > 1)
        shares = np.array([shape.frequency * shape.demand_milli / total for shape in blocks], dtype=np.float64)
        cores = sum(shape.frequency * shape.cpu_milli for shape in wanting)
        scarcity = _scarcity(wanting, capacity)
        named = {model for shape in wanting for model in shape.models} | set(capacity)
        return cls(
            share_worth=worth,
            scarcity=scarcity,
            cpu_need=cores / total if total else 0.0,
            typical=typical,
            weights=weights,
            blocks=blocks,
            block_share=shares,
            block_worth=np.zeros(len(blocks)),
            _worth=np.rint(worth * SHARE_WORTH * FINE),
            _uses={model: _uses_of(model, typical, weights, blocks, scarcity) for model in sorted(named)},
            _any=_uses_of(None, typical, weights, blocks, scarcity),
        )

    def with_blocks(self, rooms: Iterable[tuple[str, int | None, int]]) -> Forecast:
        """The same forecast for the cluster as it is: (model, CPU left, idle GPUs) of every node, once for each of
        its models.

        Asks whether the idle GPUs, filled with the mix, would need more blocks of a shape than exist.
        """
        by_model: dict[str, list[tuple[float, int]]] = {}
        for model, cpu, idle in rooms:
            by_model.setdefault(model, []).append((np.inf if cpu is None else cpu, idle))
        columns = {model: np.array(seen, dtype=np.float64).T for model, seen in by_model.items()}
        all_idle = float(sum(idle.sum() for _, idle in columns.values()))

        together: dict[int, float] = {}
        for shape, share in zip(self.blocks, self.block_share, strict=True):
            together[shape.count] = together.get(shape.count, 0.0) + float(share)
        worth = np.zeros(len(self.blocks))
        for i, (shape, share) in enumerate(zip(self.blocks, self.block_share, strict=True)):
            existing = sum(
                float(np.minimum(idle // shape.count, _times(cpu, np.array([float(shape.cpu_milli)]))[:, 0]).sum())
                for model, (cpu, idle) in columns.items()
                if not shape.models or model in shape.models
            )
            asked = together[shape.count]
            short = min(1.0, asked * all_idle / (shape.count * existing)) if existing else 1.0
            worth[i] = share / asked * short**BLOCK_POWER if asked else 0.0
        return replace(self, block_worth=worth)

    def of(self, state: Host) -> int:
        """What the room of a node is worth, in whole milli-GPU. A GPU's model is its product."""
        left: dict[str, list[int]] = {}
        for kind, members, idle, parts in zip(
            state.board.kinds, state.board.classes, state.idle, state.shared, strict=True
        ):
            full = len(members) - idle - len(parts)
            residuals = [GPU_MILLI] * idle + [part.milli for part in parts] + [0] * full
            left.setdefault(kind.product, []).extend(residuals)
        rows = {model: np.array([residuals], dtype=np.int64) for model, residuals in left.items()}
        return int(self.of_many(rows, _cpu(state.cpu_milli), ONLY, ONLY)[0])

    def of_many(self, left: Mapping[str, Ints], cpu_milli: Floats, left_of: Ints, cpu_of: Ints) -> Ints:
        """The same for many states at once: state i has the residuals `left[model][left_of[i]]` (0: nothing is
        left of that GPU) and the CPU `cpu_milli[cpu_of[i]]` (infinite where it is not known).
        """
        worth = np.floor(self._fine(left, cpu_milli, left_of, cpu_of) / FINE + 0.5)
        return worth.astype(np.int64)

    def potential(self, model: str, cpu_milli: int | None, residuals: Sequence[int]) -> float:
        """The worth of a node with GPUs of one model, not rounded."""
        rows = np.array([residuals], dtype=np.int64).reshape(1, -1)
        return float(self._fine({model: rows}, _cpu(cpu_milli), ONLY, ONLY)[0]) / FINE

    def _fine(self, left: Mapping[str, Ints], cpu: Floats, left_of: Ints, cpu_of: Ints) -> Floats:
        """In whole parts of 1/FINE of a milli-GPU."""
        worth = np.zeros(len(left_of))
        together = np.zeros(len(next(iter(left.values()), ())))
        for model, rows in left.items():
            worth += self._of_model(self._uses.get(model, self._any), rows, cpu, left_of, cpu_of)
            together += rows.sum(axis=1)
        reserve = round(CPU_MILLI_GPU * FINE / 1000)
        wanted = round(CPU_MILLI_GPU * FINE / 1000 * CPU_MARGIN * self.cpu_need)
        return worth + np.minimum((cpu * reserve)[cpu_of], (together * wanted)[left_of])

    def _of_model(self, uses: _Uses, rows: Ints, cpu: Floats, left_of: Ints, cpu_of: Ints) -> Floats:
        alone: Floats = self._worth[rows].sum(axis=1) + uses.scarcity * rows.sum(axis=1)
        worth = alone[left_of]
        if len(uses.typical_count):
            width = rows.shape[1] + 1
            largest_first = np.zeros((len(rows), width))
            np.cumsum(-np.sort(-rows, axis=1), axis=1, out=largest_first[:, 1:])
            fitting = (rows[:, :, None] >= uses.thresholds).sum(axis=1)[:, uses.threshold_of]
            fitting[fitting < uses.typical_count] = 0
            enough = np.minimum(_times(cpu, uses.typical_cpu) * uses.typical_count, width).astype(np.int64)
            used = np.minimum(fitting[left_of], enough[cpu_of]) + (width * left_of)[:, None]
            worth += largest_first.ravel()[used] @ uses.typical_weight
        if len(uses.block_count):
            idle = (rows == GPU_MILLI).sum(axis=1)
            blocks = np.minimum((idle[:, None] // uses.block_count)[left_of], _times(cpu, uses.block_cpu)[cpu_of])
            each = self.block_worth[uses.block_of] * (BLOCK_WORTH * GPU_MILLI * FINE) * uses.block_count
            worth += blocks @ np.rint(each)
        return worth


ONLY: Ints = np.zeros(1, dtype=np.int64)
"""The one state of a batch of one."""


def _cpu(cpu_milli: int | None) -> Floats:
    return np.array([np.inf if cpu_milli is None else cpu_milli], dtype=np.float64)


def _times(cpu: Floats, each: Floats) -> Floats:
    """By state and kind of pod, how many the CPU is enough for; a pod without any never runs out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        times = np.floor(cpu[:, None] / each)
    return np.where(each == 0, np.inf, times)


def _merged(shapes: Iterable[Shape]) -> list[Shape]:
    """Each kind of pod once, with its whole frequency; the same set of models is the same kind."""
    seen: dict[tuple[int, int, int, tuple[str, ...]], float] = {}
    for shape in shapes:
        if shape.frequency > 0:
            key = (shape.cpu_milli, shape.count, shape.milli if shape.count else 0, tuple(sorted(set(shape.models))))
            seen[key] = seen.get(key, 0.0) + shape.frequency
    return sorted(Shape(*key, frequency) for key, frequency in seen.items())


def typical_shapes(shapes: Iterable[Shape]) -> list[Shape]:
    """FGD's typical pods: the commonest kinds, until they are 95 % of all pods."""
    by_frequency = sorted(
        _merged(shapes),
        key=lambda shape: (shape.frequency, shape.cpu_milli, shape.milli, shape.count, shape.models),
        reverse=True,
    )
    wanted = TYPICAL_PODS * sum(shape.frequency for shape in by_frequency)
    chosen: list[Shape] = []
    so_far = 0.0
    for shape in by_frequency:
        if so_far >= wanted:
            break
        so_far += shape.frequency
        chosen.append(shape)
    return chosen


def _weights(typical: Sequence[Shape]) -> Floats:
    weights = np.array([shape.frequency * (shape.milli / GPU_MILLI) ** SIZE_EXPONENT for shape in typical])
    return weights / weights.sum() if len(weights) else weights


def _scarcity(wanting: Sequence[Shape], capacity: Mapping[str, float]) -> dict[str, float]:
    """λ by model: how much of the demand is confined to it, against how much of the cluster it is."""
    sets = sorted({frozenset(shape.models) for shape in wanting if shape.models}, key=sorted)
    everything = sum(capacity.values())
    demand = sum(shape.frequency * shape.demand_milli for shape in wanting)
    confined = dict.fromkeys(sets, 0.0)
    for shape in wanting:
        if shape.models:
            confined[frozenset(shape.models)] += shape.frequency * shape.demand_milli / demand
    pressure = dict.fromkeys(capacity, 0.0)
    unions = {frozenset().union(*some) for n in range(1, MODEL_SETS + 1) for some in combinations(sets, n)}
    for union in unions:
        here = sum(gpus for model, gpus in capacity.items() if model in union)
        if not 0 < here < everything:
            continue
        against = sum(share for models, share in confined.items() if models <= union) * everything / here
        for model in union & pressure.keys():
            pressure[model] = max(pressure[model], against)
    return {model: SCARCE_MILLI * min(1.0, against) for model, against in sorted(pressure.items())}


def _uses_of(
    model: str | None,
    typical: Sequence[Shape],
    weights: Floats,
    blocks: Sequence[Shape],
    scarcity: Mapping[str, float],
) -> _Uses:
    """What may use that model; None: a model that nobody named and that is not in the cluster yet."""
    usable = [i for i, shape in enumerate(typical) if not shape.models or model in shape.models]
    placed = [i for i, shape in enumerate(blocks) if not shape.models or model in shape.models]
    milli = np.array([typical[i].milli for i in usable], dtype=np.int64)
    thresholds, threshold_of = np.unique(milli, return_inverse=True)
    return _Uses(
        thresholds=thresholds,
        threshold_of=threshold_of.astype(np.int64),
        typical_cpu=np.array([typical[i].cpu_milli for i in usable], dtype=np.float64),
        typical_count=np.array([typical[i].count for i in usable], dtype=np.int64),
        typical_weight=np.rint(weights[usable] * ((1 - SHARE_WORTH) * FINE)),
        block_cpu=np.array([blocks[i].cpu_milli for i in placed], dtype=np.float64),
        block_count=np.array([blocks[i].count for i in placed], dtype=np.int64),
        block_of=np.array(placed, dtype=np.int64),
        scarcity=float(round(scarcity.get(model or "", 0.0) * FINE / GPU_MILLI)),
    )


# --- pods that were seen, as a mix ---


def shapes_of(seen: Mapping[Demand, int], kinds: Iterable[Kind]) -> list[Shape]:
    """What was asked for, and how often, as a mix for a cluster with GPUs of these kinds.

    A pod's terms become the models that meet them; a share in MiB is counted on the smallest GPU that holds it.
    Slices, and what no GPU here could serve, are left out.
    """
    there = sorted(set(kinds))
    shapes = []
    for demand, count in seen.items():
        parts = {kind: demand.share_of(kind.memory_mib) for kind in there if terms_allow_kind(demand.terms, kind)}
        allowed = [kind for kind, part in parts.items() if part <= GPU_MILLI]
        is_share = demand.is_shared and not demand.gpus
        if not allowed or not (demand.gpus or is_share):
            continue
        gpus, milli = (1, max(parts[kind] for kind in allowed)) if is_share else (demand.gpus, GPU_MILLI)
        models = sorted({kind.product for kind in allowed})
        everywhere = models == sorted({kind.product for kind in there})
        shapes.append(Shape(demand.cpu_milli, gpus, milli, () if everywhere else tuple(models), float(count)))
    return shapes


def rooms_of(hosts: Iterable[Host]) -> Iterator[tuple[str, int | None, int]]:
    """What `Forecast.with_blocks` wants to know of nodes: model, CPU left, idle GPUs."""
    for state in hosts:
        idle: dict[str, int] = {}
        for kind, count in zip(state.board.kinds, state.idle, strict=True):
            idle[kind.product] = idle.get(kind.product, 0) + count
        for model, count in idle.items():
            yield model, state.cpu_milli, count


# --- the worth of a residual ---


def _share_worth(wanting: Sequence[Shape], scale: float, seed: int, draws: int) -> Floats:
    """U(r) for r = 0 … 1000: what the best shares that fit into r are worth, where a whole GPU is worth 1000."""
    expected: dict[int, float] = {}
    for shape in wanting:
        if shape.is_share:
            expected[shape.milli] = expected.get(shape.milli, 0.0) + shape.frequency * scale
    sizes = np.array(sorted(sorted(expected, key=lambda size: -expected[size])[:SHARE_SIZES]), dtype=np.int64)
    if not len(sizes):
        return np.where(np.arange(GPU_MILLI + 1) == GPU_MILLI, float(GPU_MILLI), 0.0)
    counts = np.array([expected[int(size)] for size in sizes])
    chance = np.random.default_rng(seed)
    market = _Market(sizes)
    found = [market.worth(chance.poisson(counts).astype(np.float64) if draws else counts) for _ in range(max(1, draws))]
    worth = GPU_MILLI * np.mean(found, axis=0)
    worth[GPU_MILLI] = GPU_MILLI
    return np.asarray(worth, dtype=np.float64)


class _Market:
    """Prices of share sizes at which no filling of one GPU is worth more than the GPU.

    The linear program max Σ d·π, Σ n(P)·π ≤ 1 for every filling P, with the fillings found as they are needed.
    """

    def __init__(self, sizes: Ints) -> None:
        self._sizes = sizes
        self._solver = pywraplp.Solver.CreateSolver("GLOP")
        self._prices = [self._solver.NumVar(0, 1, f"price of {size}") for size in sizes]
        self._rows = GPU_MILLI + np.arange(GPU_MILLI + 1)[:, None] - sizes

    def worth(self, counts: Floats) -> Floats:
        """The best that fits into 0 … 1000 milli, at the prices of this demand."""
        objective = self._solver.Objective()
        for price, count in zip(self._prices, counts, strict=True):
            objective.SetCoefficient(price, float(count))
        objective.SetMaximization()
        while True:
            self._solver.Solve()
            prices = np.array([price.solution_value() for price in self._prices])
            best, chosen = self._fill(prices)
            if best[GPU_MILLI] <= 1 + 1e-9 or self._solver.NumConstraints() >= CUTS:
                return np.minimum(best, 1.0)
            self._forbid(chosen)

    def _fill(self, prices: Floats) -> tuple[Floats, Ints]:
        """By room: the most that shares in it are worth, and the last of them (-1: leave a milli empty)."""
        best = np.full(2 * GPU_MILLI + 1, -np.inf)
        best[GPU_MILLI] = 0.0
        chosen = np.full(GPU_MILLI + 1, -1, dtype=np.int64)
        for room in range(1, GPU_MILLI + 1):
            offers = best[self._rows[room]] + prices
            last = int(offers.argmax())
            best[GPU_MILLI + room] = best[GPU_MILLI + room - 1]
            if offers[last] > best[GPU_MILLI + room] + 1e-12:
                best[GPU_MILLI + room], chosen[room] = offers[last], last
        return best[GPU_MILLI:], chosen

    def _forbid(self, chosen: Ints) -> None:
        """The filling that was worth more than a GPU must not be."""
        taken = np.zeros(len(self._sizes))
        room = GPU_MILLI
        while room:
            last = chosen[room]
            room -= 1 if last < 0 else int(self._sizes[last])
            taken[last] += last >= 0
        row = self._solver.Constraint(-self._solver.infinity(), 1.0)
        for price, count in zip(self._prices, taken, strict=True):
            if count:
                row.SetCoefficient(price, float(count))
