"""The simulated fleet: reports that mean what they were made from, and an auditor that objects."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app import inventory
from app.simulate import (
    FLEET,
    Arrival,
    Fleet,
    Tally,
    Use,
    WrongPlacement,
    arrivals,
    first_fit,
    report_of,
    run_first_fit,
    sample_reports,
)
from solver.cluster import Node
from solver.samples import KINDS, sample_node


def _kinds() -> list[str]:
    kinds = list(KINDS)
    for kind in KINDS:
        try:
            sample_node("n", f"{kind}-mig")
        except ValueError:
            continue
        kinds.append(f"{kind}-mig")
    return kinds


def _as_asked(node: Node) -> Node:
    """Profile names as pods ask for them ('+' is '.'), which is how the inventory spells them."""
    gpus = []
    for gpu in node.gpus:
        geometry = gpu.geometry and replace(
            gpu.geometry,
            profiles=tuple(replace(p, name=p.name.replace("+", ".")) for p in gpu.geometry.profiles),
        )
        gpus.append(replace(gpu, geometry=geometry))
    return replace(node, gpus=tuple(gpus))


@pytest.mark.parametrize("kind", _kinds())
def test_a_report_means_the_node_it_was_made_from(kind: str) -> None:
    """The inventory reads back the same GPUs, geometry and links; a sample without a driver gets one."""
    node = sample_node("n", kind)

    assert inventory.node_of(report_of(node)) == replace(_as_asked(node), driver=(580, 95, 5), cuda=(13, 0))


def test_the_fleet_of_the_demo_is_forty_nodes() -> None:
    assert len(sample_reports(FLEET)) == 40


def test_arrivals_repeat_with_their_seed() -> None:
    reports = sample_reports("8xH100:2,8xA100-mig:2")

    once = arrivals(reports, pods=50, seconds=100, seed=1)

    assert once == arrivals(reports, pods=50, seconds=100, seed=1)
    assert once != arrivals(reports, pods=50, seconds=100, seed=2)
    assert all(0 <= arrival.at <= 100 and arrival.holds > 0 for arrival in once)


SLICE = Arrival("s", "s", 0, 1, profile="3g.40gb")
PAIR = Arrival("p", "p", 0, 1, gpus=2)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(sample_reports("8xA100-mig:1,8xH100:1"))


def _gpus(fleet: Fleet, node: str) -> list[str]:
    return [board.uuid for board in fleet.nodes[node]]


def test_the_auditor_objects_to_a_gpu_given_twice(fleet: Fleet) -> None:
    a, b, c, *_ = _gpus(fleet, "8xh100-0")
    fleet.place("p", "8xh100-0", [a, b], PAIR)

    with pytest.raises(WrongPlacement, match="while p has it"):
        fleet.place("q", "8xh100-0", [b, c], PAIR)


def test_the_auditor_objects_to_overlapping_slices(fleet: Fleet) -> None:
    gpu = _gpus(fleet, "8xa100-mig-0")[0]
    fleet.place("s", "8xa100-mig-0", [f"{gpu}/3g.40gb@4"], SLICE)
    small = Arrival("t", "t", 0, 1, profile="1g.10gb")

    with pytest.raises(WrongPlacement, match="while s has it"):
        fleet.place("t", "8xa100-mig-0", [f"{gpu}/1g.10gb@6"], small)
    fleet.release("s")
    fleet.place("t", "8xa100-mig-0", [f"{gpu}/1g.10gb@6"], small)


@pytest.mark.parametrize(
    ("node", "devices", "asks"),
    [
        ("8xa100-mig-0", ["{cut}/3g.40gb@3"], SLICE),
        ("8xa100-mig-0", ["{cut}/4g.40gb@0"], SLICE),
        ("8xa100-mig-0", ["{cut}"], SLICE),
        ("8xh100-0", ["{cut}/3g.40gb@0"], SLICE),
        ("8xh100-0", ["{whole}"], PAIR),
        ("8xh100-0", ["{whole}", "{whole}"], PAIR),
        ("8xh100-0", ["{whole}", "GPU-unknown"], PAIR),
        ("8xa100-mig-0", ["{cut}", "{cut}"], PAIR),
    ],
)
def test_the_auditor_objects_to_what_was_not_asked_or_cannot_be(
    fleet: Fleet, node: str, devices: list[str], asks: Arrival
) -> None:
    names = {"cut": _gpus(fleet, "8xa100-mig-0")[0], "whole": _gpus(fleet, "8xh100-0")[0]}

    with pytest.raises(WrongPlacement):
        fleet.place("x", node, [device.format(**names) for device in devices], asks)


def test_first_fit_takes_the_lowest_of_everything(fleet: Fleet) -> None:
    assert first_fit(fleet, PAIR) == ("8xh100-0", _gpus(fleet, "8xh100-0")[:2])
    assert first_fit(fleet, SLICE) == ("8xa100-mig-0", [f"{_gpus(fleet, '8xa100-mig-0')[0]}/3g.40gb@0"])
    assert first_fit(fleet, Arrival("x", "x", 0, 1, gpus=9)) is None


def test_what_is_lost_is_counted_as_it_is_defined(fleet: Fleet) -> None:
    """Two GPUs taken: the six left are lost to asks for 8; a 3g at 0: the other half is lost to 7g."""
    before = fleet.use()
    fleet.place("p", "8xh100-0", _gpus(fleet, "8xh100-0")[:2], PAIR)
    fleet.place("s", "8xa100-mig-0", [f"{_gpus(fleet, '8xa100-mig-0')[0]}/3g.40gb@0"], SLICE)
    use = fleet.use()

    assert (before.gpus_stranded, before.units_stranded, before.gpus_lost, before.units_lost) == (0, 0, 0, 0)
    assert (use.gpus, use.gpus_held, use.gpus_stranded) == (8, 2, 6)
    assert (use.units, use.units_held, use.units_stranded) == (64, 4, 4)
    assert use.gpus_lost == pytest.approx(6 * 3 / 20)
    assert use.units_lost == pytest.approx(4 * 2 / 21)
    fleet.release("p")
    fleet.release("s")
    assert fleet.use() == before


def test_means_are_over_time_after_the_beginning() -> None:
    tally = Tally(since=10)
    tally.observe(Use(gpus=10, gpus_held=10), waiting=1, now=0)
    tally.observe(Use(gpus=10, gpus_held=0), waiting=0, now=15)
    tally.observe(Use(gpus=10), waiting=0, now=20)

    assert tally.means()["gpus_held"] == pytest.approx(0.5)
    assert tally.means()["waiting"] == pytest.approx(0.5)


def test_first_fit_loses_no_pod() -> None:
    reports = sample_reports("8xH100:1,8xA100-mig:1")
    coming = arrivals(reports, pods=60, seconds=600, seed=3)

    tally, waiting = run_first_fit(reports, coming, seconds=600)

    assert tally.arrived == 60
    assert tally.placed + len(waiting) == 60
    assert 0 < tally.left <= tally.placed
