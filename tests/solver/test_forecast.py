"""The worth of room to a mix of pods: what is known of it by hand, and what holds for any mix."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solver.demand import Demand, Terms
from solver.forecast import FINE, SCARCE_MILLI, Forecast, Shape, shapes_of, typical_shapes
from solver.geometry import Kind
from solver.steps import Host, read
from tests.builders import whole
from tests.solver.test_batch import plain_node

HALF, WHOLE, EIGHT = Shape(4000, 1, 500), Shape(8000, 1, 1000), Shape(64000, 8, 1000)
CPU_ONLY = Shape(4000, 0, 0)

shapes = st.builds(
    Shape,
    cpu_milli=st.sampled_from((0, 500, 4000, 64000)),
    count=st.sampled_from((0, 1, 1, 1, 2, 8)),
    milli=st.just(1000),
    models=st.sampled_from(((), (), ("A",), ("B",), ("A", "B"), ("gone",))),
    frequency=st.sampled_from((0.0, 0.001, 1.0, 7.0, 1e6)),
) | st.builds(
    Shape,
    cpu_milli=st.sampled_from((0, 3000)),
    count=st.just(1),
    milli=st.integers(1, 999),
    models=st.sampled_from(((), ("A",), ("B", "A"))),
    frequency=st.sampled_from((1.0, 30.0)),
)
mixes = st.lists(shapes, max_size=5)
capacities = st.dictionaries(st.sampled_from(("A", "B", "C")), st.sampled_from((0, 1, 8, 5000)), max_size=3)
relaxed = settings(deadline=None, max_examples=50)


# --- what is known by hand ---


def test_a_residual_is_worth_the_shares_that_fill_it() -> None:
    """Halves only: what is left of a GPU is worth half of it from 500 milli on, and nothing below."""
    worth = Forecast.from_mix([HALF], {"A": 8}).share_worth

    assert [worth[r] for r in (0, 499, 500, 999, 1000)] == pytest.approx([0, 0, 500, 500, 1000])


def test_thirds_fill_a_gpu_although_a_milli_is_left() -> None:
    worth = Forecast.from_mix([Shape(1000, 1, 333)], {"A": 8}).share_worth

    assert [worth[r] for r in (332, 333, 666, 999)] == pytest.approx([0, 1000 / 3, 2000 / 3, 1000])


def test_a_share_that_leaves_nothing_useful_is_worth_the_whole_gpu() -> None:
    """810 milli beside shares of 500 and 190 nobody wants: it takes the GPU for itself."""
    worth = Forecast.from_mix([Shape(4000, 1, 810), HALF], {"A": 100}).share_worth

    assert worth[190] == 0
    assert worth[810] == pytest.approx(1000)


def test_one_draw_and_many_agree_where_only_one_size_is_asked_for() -> None:
    few, many = (Forecast.from_mix([HALF, WHOLE], {"A": 8}, draws=draws) for draws in (1, 40))

    assert few.share_worth == pytest.approx(many.share_worth)


def test_a_model_that_some_pods_need_is_scarce_and_others_are_not() -> None:
    """Half of the demand is confined to a tenth of the cluster."""
    forecast = Forecast.from_mix([WHOLE, replace(WHOLE, models=("A",))], {"A": 10, "B": 90})

    assert forecast.scarcity == {"A": SCARCE_MILLI, "B": 0}


def test_a_model_that_few_pods_need_is_a_little_scarce() -> None:
    """A tenth of the demand is confined to half of the cluster: a fifth of what it would be when it is full."""
    forecast = Forecast.from_mix([replace(WHOLE, frequency=9), replace(WHOLE, models=("A",))], {"A": 10, "B": 10})

    assert forecast.scarcity["A"] == pytest.approx(0.2 * SCARCE_MILLI)


def test_cpu_need_is_the_cores_that_go_with_a_gpu() -> None:
    """Four cores for half a GPU and eight for a whole one; pods without GPUs do not count."""
    assert Forecast.from_mix([HALF, WHOLE, CPU_ONLY], {"A": 8}).cpu_need == pytest.approx(8)


def test_typical_pods_are_the_commonest_until_they_are_nearly_all() -> None:
    mix = [replace(HALF, frequency=60), replace(CPU_ONLY, frequency=36), replace(WHOLE, frequency=4)]

    assert [shape.milli for shape in typical_shapes(mix)] == [500, 0]
    assert [shape.milli for shape in Forecast.from_mix(mix, {"A": 8}).typical] == [500]


def test_the_same_models_in_another_order_are_the_same_kind_of_pod() -> None:
    mix = [replace(EIGHT, models=("A", "B")), replace(EIGHT, models=("B", "A", "A"))]

    assert [shape.frequency for shape in Forecast.from_mix(mix, {"A": 8, "B": 8}).blocks] == [2]


def test_a_block_is_worth_most_where_there_are_too_few() -> None:
    """The same idle GPUs, once in eights and once one by one."""
    forecast = Forecast.from_mix([replace(EIGHT, frequency=0.05), WHOLE], {"A": 16})
    plenty = forecast.with_blocks([("A", 96000, 8)] * 2 + [("A", 96000, 0)] * 14)
    short = forecast.with_blocks([("A", 96000, 8)] + [("A", 96000, 1)] * 8)
    none = forecast.with_blocks([("A", 96000, 1)] * 16)

    assert 0 < plenty.block_worth[0] < short.block_worth[0] < none.block_worth[0] == 1


def test_idle_gpus_without_cpu_are_no_block() -> None:
    forecast = Forecast.from_mix([EIGHT, WHOLE], {"A": 16})

    assert forecast.with_blocks([("A", 1000, 8)]).block_worth[0] == 1
    assert forecast.with_blocks([("A", None, 8)]).block_worth[0] < 1


def test_a_node_with_cpu_is_worth_more_than_one_without() -> None:
    forecast = Forecast.from_mix([HALF, WHOLE, EIGHT], {"A": 64})

    worth = [forecast.potential("A", cpu, [1000] * 8) for cpu in (0, 8000, 64000, None)]
    assert worth == sorted(worth)
    assert worth[0] < worth[1]


def test_models_of_one_node_are_valued_apart_and_share_its_cpu() -> None:
    """No pod can use a GPU of each, but the CPU that is kept beside them is one."""
    forecast = Forecast.from_mix([HALF, replace(WHOLE, models=("A",))], {"A": 8, "B": 8})
    rows = np.array([[1000, 300]])
    together, alone = (
        forecast.of_many(left, np.array([np.inf]), np.zeros(1, int), np.zeros(1, int))[0]
        for left in ({"A": rows, "B": rows}, {"A": rows})
    )

    assert together == pytest.approx(alone + forecast.potential("B", None, [1000, 300]), abs=2)


# --- what holds for any mix ---


@relaxed
@given(mixes, capacities, st.integers(0, 3))
def test_any_mix_makes_finite_values(mix: list[Shape], capacity: dict[str, float], seed: int) -> None:
    """No pods, one kind, only CPU, models that are not there, nothing in the cluster."""
    forecast = Forecast.from_mix(mix, capacity, seed=seed, draws=seed).with_blocks(
        [(model, 5000 if seed else None, 2) for model in capacity]
    )

    assert np.isfinite(forecast.share_worth).all()
    assert (np.diff(forecast.share_worth) >= -1e-9).all()
    assert (forecast.block_worth >= 0).all()
    assert (forecast.block_worth <= 1).all()
    assert all(0 <= milli <= SCARCE_MILLI for milli in forecast.scarcity.values())
    for model in ("A", "B", "C", "never heard of"):
        for cpu in (None, 0, 3500, 10**9):
            for residuals in ([], [0], [1000] * 8, [1000, 999, 1, 0]):
                worth = forecast.potential(model, cpu, residuals)
                assert math.isfinite(worth)
                assert worth >= 0
                assert worth * FINE == int(worth * FINE), "whole parts, so that no order of adding matters"


@relaxed
@given(mixes, st.lists(st.integers(0, 1000), min_size=1, max_size=4), st.integers(0, 20000))
def test_less_room_is_never_worth_more(mix: list[Shape], residuals: list[int], cpu: int) -> None:
    """Taking something can cost nothing, and cannot pay."""
    forecast = Forecast.from_mix(mix, {"A": 8}, draws=0)
    now = forecast.potential("A", cpu, residuals)

    assert forecast.potential("A", cpu // 2, residuals) <= now
    assert forecast.potential("A", cpu, [0, *residuals[1:]]) <= now


@relaxed
@given(
    mixes,
    st.lists(st.lists(st.sampled_from((0, 190, 500, 1000)), min_size=2, max_size=2), min_size=1, max_size=6),
    st.lists(st.integers(0, 9000), min_size=1, max_size=4),
)
def test_a_batch_of_states_has_the_values_of_each(mix: list[Shape], rows: list[list[int]], cpus: list[int]) -> None:
    forecast = Forecast.from_mix(mix, {"A": 8, "B": 3}, draws=0).with_blocks([("A", 8000, 2)])
    left_of, cpu_of = np.divmod(np.arange(len(rows) * len(cpus)), len(cpus))
    found = forecast.of_many({"A": np.array(rows)}, np.array(cpus, dtype=float), left_of, cpu_of)

    one_by_one = [math.floor(forecast.potential("A", cpu, row) + 0.5) for row in rows for cpu in cpus]
    assert found.tolist() == one_by_one


@relaxed
@given(mixes)
def test_a_forecast_travels_to_another_process(mix: list[Shape]) -> None:
    """The planning process makes it."""
    forecast = Forecast.from_mix(mix, {"A": 8}, draws=1).with_blocks([("A", 9000, 3)])
    there = pickle.loads(pickle.dumps(forecast))

    assert there.potential("A", 7000, [1000, 400]) == forecast.potential("A", 7000, [1000, 400])


def test_a_host_is_worth_what_its_gpus_are() -> None:
    """The same from a node and what is held on it; which of its GPUs are held makes no difference."""
    forecast = Forecast.from_mix([HALF, WHOLE, EIGHT], {"H": 8})
    node = plain_node("n", 4, "H", cpu_milli=9000)
    states: list[Host] = [read(node, whole("n", *held)).host for held in ((0, 1), (2, 3))]

    assert [forecast.of(state) for state in states] == [round(forecast.potential("H", 9000, [1000, 1000, 0, 0]))] * 2


def test_pods_that_were_seen_become_a_mix() -> None:
    """Terms become models, MiB the part of the smallest GPU that holds them; slices say nothing of hosts."""
    large, small = Kind("NVIDIA H100 80GB HBM3", memory_mib=80_000), Kind("Tesla T4", memory_mib=16_000)
    seen = {
        Demand(gpus=2, cpu_milli=4000): 5,
        Demand(gpus=1, terms=Terms(products=("h100",))): 3,
        Demand(share_mib=8_000): 2,
        Demand(share_mib=20_000): 1,
        Demand.of(**{"1g.10gb": 1}): 9,
        Demand(gpus=1, terms=Terms(products=("B200",))): 4,
    }

    assert shapes_of(seen, [large, small, small]) == [
        Shape(4000, 2, 1000, (), 5.0),
        Shape(0, 1, 1000, ("NVIDIA H100 80GB HBM3",), 3.0),
        Shape(0, 1, 500, (), 2.0),
        Shape(0, 1, 250, ("NVIDIA H100 80GB HBM3",), 1.0),
    ]
