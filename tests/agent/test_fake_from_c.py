"""The fake library from C's side: what a program sees that brings its own structs, pointers and version words."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest

from solver.geometry import is_maximal, placed_states
from solver.products import product
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.build import build_probe
from tests.fake_nvml.describe import describe


def probe(bench: Bench, kind: str, *words: str) -> str:
    bench.describe(describe(sample_node("n1", kind)))
    done = subprocess.run(
        [str(build_probe()), *words], env=bench.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ids(kind: str, names: list[str] | None = None) -> list[str]:
    """Hardware ids of the profiles of a sample's board (or of those named)."""
    geometry = sample_node("n1", kind).gpus[0].geometry
    assert geometry is not None
    return [str(profile.id) for profile in geometry.profiles if names is None or profile.name in names]


def test_a_c_program_finds_what_the_header_promises(bench: Bench) -> None:
    """Version words, NULL arguments, handles after their end, waiting for events, sessions."""
    assert probe(bench, "8xA100-40-mig", "checks") == ""


@pytest.mark.parametrize(
    ("kind", "names", "states", "maximal"),
    [
        ("8xA100-40-mig", ["1g.5gb", "2g.10gb", "3g.20gb", "4g.20gb", "7g.40gb"], 298, 19),
        ("8xA100-40-mig", None, 2319, 239),
        ("8xH100-mig", None, 2319, 239),
        ("4xA30-mig", ["1g.6gb", "2g.12gb", "4g.24gb"], 26, 5),
        ("4xA30-mig", None, 76, 17),
        ("8xRTXPRO6000-mig", ["1g.24gb", "2g.48gb", "4g.96gb"], 26, 5),
        ("8xRTXPRO6000-mig", None, 717, 302),
    ],
)
def test_making_instances_gives_the_published_number_of_states(
    bench: Bench, kind: str, names: list[str] | None, states: int, maximal: int
) -> None:
    """Every set that can be made, by making and removing instances: the figures of hardware.md section 6."""
    assert probe(bench, kind, "walk", *ids(kind, names)).split() == [str(states), str(maximal)]


def test_the_library_and_the_solver_cut_boards_alike(bench: Bench) -> None:
    """Two implementations of the same rules, in two languages."""
    geometry = product("A30-24").geometry
    assert geometry is not None
    sets = list(placed_states(geometry))
    maximal = sum(is_maximal(geometry, placed) for placed in sets)
    assert probe(bench, "2xA30-mig", "walk", *ids("2xA30-mig")).split() == [str(len(sets)), str(maximal)]


def test_without_totals_only_units_limit_a_board(bench: Bench) -> None:
    """One OFA a board is what limits 1g+me to one: a board without totals takes as many as it has places."""
    described = describe(sample_node("n1", "4xA30-mig"))
    geometry = described.gpus[0].geometry
    assert geometry is not None
    bench.describe(described.with_gpu(0, geometry=replace(geometry, engines=())))
    done = subprocess.run(
        [str(build_probe()), "walk", "21"], env=bench.environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["16", "1"]
