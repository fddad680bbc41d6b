"""One pod, now: which devices, and how much work it is to know."""

import pytest

from solver import rank
from solver.cluster import Device
from solver.demand import Demand
from solver.geometry import Slice
from solver.goals import MAKE_MILLI, REMOVE_MILLI
from solver.rank import Ranking, price, quote
from solver.samples import parse_samples, sample_node
from tests.builders import A100, indices, mig_node, node, one, part, slices, whole

LARGE = ("3g.40gb", "4g.40gb")


def test_the_fullest_node_that_fits_is_the_cheapest() -> None:
    """Best fit: whole nodes stay whole for those who need them whole."""
    ranking = Ranking()
    ranking.put(node("empty"))
    ranking.put(node("half"), whole("half", 0, 1, 2, 3))
    ranking.put(node("nearly"), whole("nearly", 0, 1, 2, 3, 4, 5))
    ranking.put(node("full"), whole("full", *range(8)))

    two, four = ranking.prices(Demand.of(2)), ranking.prices(Demand.of(4))

    assert sorted(two, key=two.__getitem__) == ["nearly", "half", "empty"]
    assert sorted(four, key=four.__getitem__) == ["half", "empty"]


def test_a_small_slice_goes_where_large_ones_still_fit() -> None:
    """Case 7: at a start in the lower half it would close 4g, in the upper half it closes a 3g only."""
    placement = quote(mig_node("n"), (), one("1g.10gb"))

    assert placement is not None
    assert placement.devices == (part("n", 0, "1g.10gb", 6),)


def test_slices_pile_up_on_gpus_that_are_cut_already() -> None:
    """Case 7: of four GPUs, small slices that fit on one use one."""
    cluster, taken = mig_node("n", 4), list[Device]()
    for _ in range(4):
        placement = quote(cluster, taken, one("1g.10gb"))
        assert placement is not None
        taken += placement.devices

    assert len({device.gpu for device in taken}) == 1
    for profile in LARGE:
        more = quote(cluster, taken, one(profile))
        assert more is not None


def test_an_idle_instance_is_handed_out_before_one_is_made() -> None:
    """Making one costs time on the node and opens nothing."""
    placement = quote(mig_node("n", 2, idle=[Slice("1g.10gb", 6)]), (), one("1g.10gb"))

    assert placement is not None
    assert placement.devices == (part("n", 0, "1g.10gb", 6),)
    assert dict(placement.prices)["repartition"] == 0


def test_an_idle_instance_in_a_bad_place_is_left_alone() -> None:
    """At start 0 it keeps the 4g away, which is worth more than the making of another."""
    placement = quote(mig_node("n", 1, idle=[Slice("1g.10gb", 0)]), (part("n", 0, "3g.40gb", 4),), one("1g.10gb"))

    assert placement is not None
    assert indices(mig_node("n"), placement.devices) == [0]


def test_idle_instances_are_no_obstacle() -> None:
    """Room that nobody uses is room: the 4g is made over three 1g, and the fourth stays."""
    idle = [Slice("1g.10gb", start) for start in (0, 1, 3, 5)]
    placement = quote(mig_node("n", 1, idle=idle), (), one("4g.40gb"))

    assert placement is not None
    assert placement.devices == (part("n", 0, "4g.40gb", 0),)
    assert dict(placement.prices)["repartition"] == MAKE_MILLI + 3 * REMOVE_MILLI


def test_of_two_equal_starts_the_one_where_nothing_goes_is_taken() -> None:
    """Somebody may want what stands there as it is."""
    cluster = mig_node("n", 2, idle=[Slice("1g.10gb", start) for start in range(7)])
    placement = quote(cluster, (), one("7g.80gb"))

    assert placement is not None
    assert indices(cluster, placement.devices) == [1]
    assert dict(placement.prices)["repartition"] == MAKE_MILLI


def test_a_slice_goes_where_it_belongs_whatever_small_idle_ones_stand_there() -> None:
    """On the cut GPU the 3g takes nothing from tomorrow's 7g; four idle 1g must go for it."""
    cluster = mig_node("n", 2, idle=[Slice("1g.10gb", start) for start in range(4)])
    placement = quote(cluster, (part("n", 0, "3g.40gb", 4),), one("3g.40gb"))

    assert placement is not None
    assert placement.devices == (part("n", 0, "3g.40gb", 0),)
    assert dict(placement.prices)["repartition"] == MAKE_MILLI + 4 * REMOVE_MILLI


def test_links_have_no_price_for_slices() -> None:
    """Case 12: slices have no peer-to-peer."""
    placement = quote(sample_node("n", "8xA100-mig"), (), slices(**{"3g.40gb": 3}))

    assert placement is not None
    assert dict(placement.prices)["links"] == dict(placement.prices)["numa"] == 0


def test_a_pod_may_ask_for_gpus_and_slices_of_several_kinds_at_once() -> None:
    """All on one node, each where it belongs."""
    cluster = sample_node("n", "8xA100-mig2")
    demand = slices(2, **{"1g.10gb": 3, "2g.20gb": 1, "4g.40gb": 1})
    placement = quote(cluster, (), demand)

    assert placement is not None
    assert sum(device.slice is None for device in placement.devices) == 2
    assert sorted(d.slice.profile for d in placement.devices if d.slice) == [
        "1g.10gb",
        "1g.10gb",
        "1g.10gb",
        "2g.20gb",
        "4g.40gb",
    ]


def test_a_full_node_of_slices_for_one_pod() -> None:
    """Fifty-six slices on eight GPUs, which greedy choices would also find but brute force would not."""
    everything = slices(**{"1g.10gb": 56})
    cluster = sample_node("n", "8xA100-mig")
    placement = quote(cluster, (), everything)

    assert placement is not None
    assert len(set(placement.devices)) == 56
    assert quote(cluster, placement.devices[:1], everything) is None


def test_the_answer_is_always_the_same() -> None:
    """Lowest price, an idle instance, the lowest start, the lowest index: never chance."""
    cluster = sample_node("n", "8xA100-mig4")
    for demand in (Demand.of(1), Demand.of(3), one("2g.20gb"), slices(**{"2g.20gb": 2, "1g.10gb": 2})):
        assert quote(cluster, (), demand) == quote(sample_node("n", "8xA100-mig4"), [], demand)


def test_a_gpu_withheld_or_in_doubt_is_not_offered() -> None:
    """Held whole while it is in MIG mode now, or holding slices that cannot both be there: offer less."""
    cluster = mig_node("n", 1, A100)

    assert price(cluster, whole("n", 0), one("1g.10gb")) is None
    assert price(cluster, (part("n", 0, "9g.1gb", 0),), one("1g.10gb")) is None
    assert price(node("m", 1), (part("m", 0, "1g.10gb", 0),), Demand.of(1)) is None
    assert price(node("m", 1), whole("gone", 0), Demand.of(1)) is not None


def test_a_change_costs_one_entry_per_known_demand() -> None:
    """Case 10: work grows with changes, never with nodes × pods."""
    ranking = Ranking()
    cluster = parse_samples("8xH100:50,8xA100-mig:50")
    for each in cluster:
        ranking.put(each)
    demands = [Demand.of(1), Demand.of(2), one("1g.10gb")]
    for demand in demands:
        ranking.prices(demand)

    def asked_again() -> int:
        before = ranking.quoted
        for _ in range(100):
            for demand in demands:
                ranking.prices(demand)
        return ranking.quoted - before

    assert asked_again() == 0
    ranking.put(cluster[0], [Device(cluster[0].gpus[0].uuid)])
    assert asked_again() == len(demands)
    ranking.put(cluster[0], [Device(cluster[0].gpus[1].uuid)])
    assert asked_again() == 0, "which GPU of a NUMA node is taken changes no price"


def test_a_node_that_is_removed_is_offered_no_more() -> None:
    """And comes back with what is true then."""
    ranking = Ranking()
    ranking.put(node("n"))
    assert set(ranking.prices(Demand.of(1))) == {"n"}

    ranking.remove("n")
    assert ranking.prices(Demand.of(1)) == {}
    assert ranking.best(Demand.of(1), "n") is None
    assert ranking.refusal(Demand.of(1), "n") is not None

    ranking.put(node("n"), whole("n", *range(8)))
    assert ranking.prices(Demand.of(1)) == {}


def test_prices_by_name_are_kept_of_the_latest_demands_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster where each share is another amount of MiB would else fill the memory; the prices stay right."""
    monkeypatch.setattr(rank, "NAMED_DEMANDS", 3)
    ranking = Ranking()
    for name in "abc":
        ranking.put(node(name))
    demands = [Demand(share_mib=1000 + i) for i in range(9)]
    for demand in demands:
        assert len(ranking.prices(demand)) == 3
    assert sum(len(row.named.by_name) for row in ranking._rows.values()) == 9

    ranking.put(node("b"), whole("b", *range(8)))
    for demand in demands:
        fresh = Ranking()
        for name in "ac":
            fresh.put(node(name))
        assert ranking.prices(demand) == fresh.prices(demand)


def test_it_says_how_many_different_things_its_nodes_are() -> None:
    """What a new demand costs grows with these; they are counted as states come and go, so asking costs nothing."""
    ranking = Ranking()
    nodes = parse_samples("8xH100:3,8xA100-mig:2")
    for each in nodes:
        ranking.put(each)
    ranking.prices(Demand.of(1))
    alike = ranking.variety
    assert (alike.nodes, alike.states, alike.hosts, alike.cuts, alike.demands) == (5, 2, 2, 1, 1)

    busy = nodes[0]
    ranking.put(busy, [Device(busy.gpus[0].uuid)])
    ranking.prices(Demand.of(1))
    assert (ranking.variety.states, ranking.variety.hosts, ranking.variety.cuts) == (3, 3, 1)

    ranking.put(busy)
    ranking.remove(nodes[-1].name)
    ranking.remove(nodes[-2].name)
    ranking.prices(Demand.of(1))
    assert (ranking.variety.nodes, ranking.variety.states, ranking.variety.hosts, ranking.variety.cuts) == (3, 1, 1, 0)
