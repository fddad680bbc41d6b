"""The best set of GPUs on boards whose links differ."""

import pytest

from app.replay.boards import BOARDS, LINKS_FIRST, measure
from solver.goals import DEFAULT_POLICY


@pytest.mark.parametrize("board", BOARDS[:2])
def test_the_cheapest_set_is_always_taken_and_the_widest_on_an_empty_board(board: str) -> None:
    """A DGX-1V and bridged pairs, by brute force over every set of free GPUs."""
    row = measure(board, DEFAULT_POLICY)

    assert row.cheapest == row.choices
    assert row.empty_board_widest == row.empty_board


def test_with_links_first_the_widest_set_is_always_taken() -> None:
    """On an NVSwitch board with one GPU out of the mesh."""
    row = measure("8xH100-one-out", LINKS_FIRST)

    assert row.widest == row.choices == row.cheapest
