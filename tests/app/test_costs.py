"""What `/v1/costs` says of a service that has answered a few calls."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.costs import LATELY_SECONDS, memory_mib, quantile
from app.metrics import BUCKETS
from tests.app.world import GPU, World
from tests.fakes import pod_json


def answer(world: World, verb: str, times: int = 1) -> None:
    """As if it had answered so often, in no time at all."""
    for _ in range(times):
        with world.service.metrics.timed(verb):
            pass


async def test_a_fresh_service_has_cost_nothing_yet():
    """No percentile of nothing, and no division by no time."""
    costs = World({"a": "8xH100"}).service.costs.shown()
    assert costs["verbs"]["filter"] == {
        "answers": 0,
        "p50_seconds": None,
        "p99_seconds": None,
        "lately": {"per_second": 0.0, "p50_seconds": None, "p99_seconds": None},
    }
    assert costs["rows"] == {"updated": 0, "per_second": 0.0, "last_seconds_ago": None}
    assert costs["loop"]["wall"] == {"longest_seconds": 0.0, "longest_lately_seconds": 0.0, "over_20_ms": 0}


async def test_it_counts_answers_sizes_and_what_is_different():
    world = World({"a": "8xH100", "b": "8xH100", "c": "8xA100-mig"})
    async with world.running():
        world.kube.add_pod(pod_json("p", {GPU: 2}))
        assert await world.schedule("p")
        answer(world, "filter", 3)
        world.kube.add_pod(pod_json("q", {GPU: 2}))
        world.filter("q")
        costs = world.service.costs.shown()

    assert costs["verbs"]["filter"]["answers"] == 3
    assert 0 < costs["verbs"]["filter"]["p50_seconds"] <= costs["verbs"]["filter"]["p99_seconds"] <= BUCKETS[-1]
    assert costs["verbs"]["bind"]["answers"] == 0
    sizes = costs["sizes"]
    assert (sizes["nodes"], sizes["nodes_offered"], sizes["demands"]) == (3, 3, 1)
    assert sizes["pods_held"] == 1
    assert (sizes["states"], sizes["hosts"], sizes["mig_gpus"]) == (3, 3, 1), "free, with a pod, and in MIG mode"
    assert costs["rows"]["updated"] >= 4
    assert costs["memory_mib"]["planning"] is None


async def test_lately_forgets_what_is_long_ago():
    """Since the start all is kept; lately is from one to two times ten seconds."""
    world = World({"a": "8xH100"})
    costs = world.service.costs
    answer(world, "bind", 100)
    world.service.loop.wall.note(0.3)
    for _ in range(2):
        world.clock.advance(LATELY_SECONDS)
        costs.look()
        costs.look()
        assert costs.shown()["loop"]["wall"]["longest_lately_seconds"] in (0.3, 0.0)
    world.clock.advance(LATELY_SECONDS / 2)
    answer(world, "bind", 30)
    shown = costs.shown()

    assert shown["lately_seconds"] == 1.5 * LATELY_SECONDS
    assert shown["verbs"]["bind"]["answers"] == 130
    assert shown["verbs"]["bind"]["lately"]["per_second"] == pytest.approx(30 / (1.5 * LATELY_SECONDS))
    assert shown["loop"]["wall"]["longest_seconds"] == 0.3
    assert shown["loop"]["wall"]["over_20_ms"] == 1


async def test_a_block_is_told_lately_and_then_only_as_the_longest():
    world = World({})
    late, costs = world.service.loop.own, world.service.costs

    def told() -> tuple[float, float]:
        own = costs.shown()["loop"]["own"]
        return own["longest_seconds"], own["longest_lately_seconds"]

    late.note(0.05)
    assert told() == (0.05, 0.05)
    seen = []
    for _ in range(3):
        world.clock.advance(LATELY_SECONDS)
        costs.look()
        seen.append(told())
    assert seen == [(0.05, 0.05), (0.05, 0.0), (0.05, 0.0)]
    late.note(0.02)
    assert told() == (0.05, 0.02)
    assert costs.shown()["loop"]["own"]["over_20_ms"] == 1, "20 ms are not over 20 ms"


def test_a_percentile_is_interpolated_within_its_bucket():
    counts = [0] * (len(BUCKETS) + 1)
    assert quantile(counts, 0.5) is None
    counts[BUCKETS.index(0.002)] = 10  # 1.5 to 2 ms
    assert quantile(counts, 0.5) == pytest.approx(0.00175)
    assert quantile(counts, 1.0) == 0.002
    counts[-1] = 90
    assert quantile(counts, 0.99) == BUCKETS[-1], "beyond the last bound nothing more is known"


@given(st.lists(st.integers(0, 50), min_size=len(BUCKETS) + 1, max_size=len(BUCKETS) + 1).filter(any))
def test_percentiles_never_go_down(counts):
    found = [quantile(counts, share / 100) or 0.0 for share in range(1, 101)]
    assert found == sorted(found)
    assert all(0 < each <= BUCKETS[-1] for each in found)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="this system does not say")
def test_memory_is_that_of_the_process_and_of_nobody_who_is_gone():
    mine = memory_mib(os.getpid())
    assert mine is not None
    assert 10 < mine < 10_000
    assert memory_mib(2**22 + 1) is None
