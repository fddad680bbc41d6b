"""Which GPUs of a board are alike, and which sets are best, on the wiring of real nodes."""

from itertools import combinations, permutations

import pytest

from solver.cluster import Device, Node
from solver.demand import Demand
from solver.geometry import Kind
from solver.rank import quote
from solver.samples import KINDS, sample_node
from solver.steps import read
from solver.topology import SUBSETS, bandwidth, best_bandwidth, board, canonical, everything, subsets
from tests.builders import indices


def chosen(node: Node, gpus: int, taken: tuple[int, ...] = ()) -> list[int]:
    """The indices that the one-pod path gives where these are taken."""
    placement = quote(node, [Device(node.gpus[i].uuid) for i in taken], Demand.of(gpus))
    assert placement is not None
    return indices(node, placement.devices)


def inside(node: Node, gpus: list[int] | tuple[int, ...]) -> int:
    """GB/s inside a set, from the node's own matrix."""
    return sum(node.links[a][b] for a, b in combinations(gpus, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gpus", [2, 3, 4])
def test_an_empty_node_gives_the_best_set_by_brute_force(kind: str, gpus: int) -> None:
    """Nothing is taken, so no set may have more bandwidth than the one given."""
    node = sample_node("n", kind)
    if len(node.gpus) < gpus:
        return
    best = max(inside(node, some) for some in combinations(range(len(node.gpus)), gpus))

    assert inside(node, chosen(node, gpus)) == best


def test_four_of_a_dgx_1v_are_one_of_its_two_quads() -> None:
    """Only two of the 70 subsets have nine links; an index order that starts at 2 would have six."""
    assert sorted(chosen(sample_node("n", "8xV100"), 4)) in ([0, 1, 2, 3], [4, 5, 6, 7])


def test_two_of_a_dgx_1v_are_joined_by_two_links() -> None:
    """The pair in index order, 0 and 1, has half of that."""
    node = sample_node("n", "8xV100")
    a, b = chosen(node, 2)

    assert node.links[a][b] == 100


@pytest.mark.parametrize("kind", ["8xH100", "8xB200", "8xH200"])
def test_four_of_an_nvswitch_board_share_a_numa_node(kind: str) -> None:
    """Bandwidth is the same everywhere, so NUMA decides, also where both nodes have some taken."""
    node = sample_node("n", kind)

    assert sorted(chosen(node, 4)) in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert sorted(chosen(node, 4, taken=(0,))) == [4, 5, 6, 7]
    assert sorted(chosen(node, 2, taken=(0, 1, 2, 4, 5))) == [6, 7]


def test_one_gpu_goes_where_a_numa_node_is_broken_already() -> None:
    """The whole NUMA node is kept for the next four."""
    assert chosen(sample_node("n", "8xH100"), 1, taken=(4,)) in ([5], [6], [7])


def test_a_gpu_out_of_the_mesh_is_used_alone_and_first() -> None:
    """With others it falls back to PCIe; alone it is as good as any, and the mesh stays whole."""
    node = sample_node("n", "8xH100-one-out")

    assert chosen(node, 1) == [2]
    for gpus in (2, 3, 4, 5, 6, 7):
        assert 2 not in chosen(node, gpus)


def test_one_gpu_does_not_break_a_bridged_pair() -> None:
    """Where a pair is broken already, its other half goes first."""
    assert chosen(sample_node("n", "4xH100NVL"), 1, taken=(2,)) == [3]
    assert sorted(chosen(sample_node("n", "8xA100PCIe"), 2, taken=(0, 2))) in ([4, 5], [6, 7])


def test_l40s_are_chosen_by_switch_then_socket() -> None:
    """There is no NVLink at all; two behind one PCIe switch, four in one socket."""
    node = sample_node("n", "8xL40S")

    assert sorted(chosen(node, 2)) in ([0, 1], [2, 3], [4, 5], [6, 7])
    assert sorted(chosen(node, 4)) in ([0, 1, 2, 3], [4, 5, 6, 7])
    assert sorted(chosen(node, 2, taken=(0, 2, 4))) == [6, 7]


def test_states_of_an_nvswitch_board_are_counts_per_numa_node() -> None:
    """Nine times nine sets of free GPUs are fifteen states."""
    wiring = read(sample_node("n", "8xH100")).host.board
    states = {canonical(wiring, ((a, ()), (b, ()))) for a in range(5) for b in range(5)}

    assert wiring.classes == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert len(states) == 15


def test_states_of_a_dgx_1v_are_sets_up_to_symmetry() -> None:
    """No two GPUs are interchangeable, but the board has mirror images."""
    wiring = read(sample_node("n", "8xV100")).host.board

    assert len(wiring.classes) == 8
    assert len(wiring.symmetries) == symmetries_by_brute_force(sample_node("n", "8xV100"))


def symmetries_by_brute_force(node: Node) -> int:
    size = range(len(node.gpus))
    return sum(
        all(
            node.links[a][b] == node.links[image[a]][image[b]]
            and (node.gpus[a].numa == node.gpus[b].numa) == (node.gpus[image[a]].numa == node.gpus[image[b]].numa)
            for a, b in combinations(size, 2)
        )
        for image in permutations(size)
    )


def test_a_large_board_that_is_all_different_is_served_without_trying_every_set() -> None:
    """Sixteen GPUs have 12,870 sets of eight: then greedy, legal, and not worse than taking the first eight."""
    size = 16
    links = tuple(
        tuple(0 if a == b else 20 + (min(a, b) * 7 + max(a, b) * 13) % 97 for b in range(size)) for a in range(size)
    )
    wiring = board(links, tuple(range(size)), (Kind("x"),) * size)
    sets = subsets(wiring, everything(wiring), 8)

    assert len(wiring.classes) == size
    assert 0 < len(sets) <= SUBSETS
    assert all(sum(some) == 8 and max(some) == 1 for some in sets)
    assert best_bandwidth(wiring, 8) >= bandwidth(wiring, (1,) * 8 + (0,) * 8)


def test_sixteen_alike_are_a_count() -> None:
    """A DGX-2 is no harder than a board of two."""
    wiring = board(
        tuple(tuple(0 if a == b else 300 for b in range(16)) for a in range(16)), (0,) * 8 + (1,) * 8, (Kind("x"),) * 16
    )

    assert len(wiring.classes) == 2
    assert len(subsets(wiring, everything(wiring), 8)) == 9


def test_a_gpu_in_mig_mode_is_not_part_of_the_board() -> None:
    """It has no peer-to-peer, so its row of the link matrix means nothing."""
    node = sample_node("n", "8xA100-mig2")

    assert read(node).host.board.size == 6
    assert quote(node, (), Demand.of(7)) is None
