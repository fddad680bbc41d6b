"""What went wrong for others at the boundary to the hardware, played through the real agent: report, inventory, answer.

Numbers are those of the project's list of cases. Case 8 is in tests/app/test_orders.py.
"""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from app.agent.health import Judge, Patience
from app.hosts import Hosts
from app.inventory import Inventory, node_of
from app.ledger import Ledger
from app.offers import Offers, legal
from app.report import NodeReport, Signal
from app.translate import PodRef
from solver import DEFAULT_POLICY, Demand, Placement
from solver.cluster import Device
from solver.geometry import Slice
from solver.samples import sample_node
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import Instance, describe


def offers_of(report: NodeReport) -> Offers:
    inventory = Inventory(stale_seconds=30)
    inventory.accept(report, now=0)
    offers = Offers(inventory, Ledger(), Hosts(), policy=DEFAULT_POLICY)
    offers.touch(report.node)
    offers.refresh(now=0)
    return offers


def placed(report: NodeReport, demand: Demand) -> Placement:
    best = offers_of(report).best(demand, report.node, uid="uid")
    assert isinstance(best, Placement), best
    return best


def test_case_07_a_small_slice_goes_where_large_ones_still_fit(bench: Bench) -> None:
    """DRA driver #932, #933: random starts left capacity with no legal start. Here seven small slices, one after the
    other, always leave the largest that can still be left."""
    report = bench.report(describe(sample_node("n1", "8xA100-mig")))
    (placement,) = placed(report, Demand.of(0, **{"1g.10gb": 1})).devices
    assert placement.slice is not None
    assert placement.slice.start in (4, 5, 6), "the lower half stays free for a 4g or a 3g"


def test_case_07_why_not_names_the_slices_that_block(bench: Bench) -> None:
    """Two small slices at bad starts: most of the board is free and a 4g has no legal start."""
    description = describe(sample_node("n1", "4xA100PCIe-mig1"))
    there = tuple(
        Instance(id=2 + start, profile="1g.10gb", start=start, uuid=f"MIG-{start}", mig_index=start) for start in (2, 6)
    )
    report = bench.report(description.with_gpu(3, instances=there))
    board = report.gpus[3].uuid
    inventory, ledger = Inventory(stale_seconds=30), Ledger()
    inventory.accept(report, now=0)
    offers = Offers(inventory, ledger, Hosts(), policy=DEFAULT_POLICY)
    ask = Demand.of(0, **{"4g.40gb": 1})
    offers.touch("n1")
    offers.refresh(now=0)
    prices = offers.prices(ask, lambda: True)
    assert prices is not None
    assert [*prices.by_name] == ["n1"], "idle slices are in nobody's way"

    _hold(offers, ledger, ask_of="1g.10gb", devices=[Device(board, Slice("1g.10gb", start)) for start in (2, 6)])
    offers.refresh(now=0)

    prices = offers.prices(ask, lambda: True)
    assert prices is not None
    assert not prices.by_name
    assert "1g.10gb@2" in offers.refusal(ask, "n1").reason


def _hold(offers: Offers, ledger: Ledger, *, ask_of: str, devices: list[Device]) -> None:
    for number, device in enumerate(devices):
        node, _ = offers.view("n1")
        demand = Demand.of(0, **{ask_of: 1})
        placement = Placement("n1", (device,), ())
        assert (
            ledger.assume(PodRef(f"u{number}", "d", f"p{number}"), demand, placement, now=0, legal=legal(node)) is None
        )


def test_case_11_links_to_a_switch_count_for_every_pair(bench: Bench) -> None:
    """HAMi #2103: on NVSwitch boards no NVLink pair was seen at all."""
    report = bench.report(describe(sample_node("n1", "8xH100")))
    assert len(report.links) == 28
    assert {(link.nvlinks, link.gbs) for link in report.links} == {(18, 900)}
    node = node_of(report)
    assert all(gbs == 900 for i, row in enumerate(node.links) for j, gbs in enumerate(row) if i != j)
    assert {(gpu.nvlink.active, gpu.nvlink.kind) for gpu in report.gpus if gpu.nvlink} == {(18, "switch")}


def test_case_12_no_link_is_priced_for_slices(bench: Bench) -> None:
    """k8s-device-plugin #296: slices have no peer-to-peer."""
    report = bench.report(describe(sample_node("n1", "8xA100-mig")))
    prices = dict(placed(report, Demand.of(0, **{"3g.40gb": 2})).prices)
    assert prices.get("links", 0) == 0


def test_case_14_a_gpu_that_was_bad_comes_back_when_it_has_been_well_for_a_while(bench: Bench) -> None:
    """HAMi #2200: an unhealthy card never came back."""
    gpus = bench.report(describe(sample_node("n1", "4xL4"))).gpus
    ill = gpus[0].model_copy(update={"signals": (Signal(name="rows", state="bad", reason="remapping failed"),)})
    judge = Judge(patience=Patience(), now=0.0)

    assert judge.judge((ill, *gpus[1:]), (), 0.0)[0].health == "bad"
    assert judge.judge(gpus, (), 1.0)[0].health == "bad"
    now, health = 1.0, "bad"
    while health != "ok":
        now += 30.0
        assert now < 24 * 3600
        health = judge.judge(gpus, (), now)[0].health
    assert [gpu.health for gpu in judge.judge(gpus, (), now)] == ["ok"] * 4


def test_case_14_silence_means_stale_and_not_gone(bench: Bench) -> None:
    """HAMi #1839: a live node was marked deleted."""
    report = bench.report(describe(sample_node("n1", "4xL4")))
    inventory = Inventory(stale_seconds=30)
    began = time.monotonic()
    inventory.accept(report, now=began)
    assert not inventory.fault("n1", now=began + 29)
    assert "silent" in inventory.fault("n1", now=began + 31)
    assert inventory.get("n1") is not None


@pytest.mark.parametrize("kind", ["4xH100NVL", "8xH200NVL", "8xRTXPRO6000", "4xA30"])
def test_case_20_geometry_is_what_nvml_reports(bench: Bench, kind: str) -> None:
    """HAMi #1014, #1950, #2131: hand-written tables were wrong for H100 NVL, H200 NVL, RTX PRO 6000 and A30."""
    description = describe(sample_node("n1", f"{kind}-mig"))
    geometry = description.gpus[0].geometry
    assert geometry is not None
    odd = geometry.profiles[0]
    changed = replace(geometry, profiles=(replace(odd, starts=odd.starts[1:]), *geometry.profiles[1:]))
    for index in range(len(description.gpus)):
        description = description.with_gpu(index, geometry=changed)
    seen = node_of(bench.report(description)).gpus[0].geometry
    assert seen is not None
    assert {(profile.id, profile.size, profile.starts) for profile in seen.profiles} == {
        (profile.id, profile.size, profile.starts) for profile in changed.profiles
    }
