"""The throughput bench's own parts, as far as they need no control plane."""

from __future__ import annotations

import json

import pytest

from app.simulate import report_of
from tests.bench.agents import MIXES, _is_whole, fleet, reports
from tests.bench.throughput import CONFIGURATIONS, NONE, STOCK, _rotated


@pytest.mark.parametrize("mix", MIXES)
def test_a_simulated_agent_reports_what_the_service_would_be_told_of_that_node(mix: str) -> None:
    """Reports are written once a kind and then changed as text, which must not be seen."""
    nodes = fleet(mix, 5)

    said = [json.loads(report) for report in reports(mix, 5)]

    assert [json.loads(report_of(node).model_dump_json(by_alias=True)) for node in nodes] == said


def test_a_reply_is_whole_when_its_body_has_come() -> None:
    """The service's replies may come in pieces: head and body are written apart."""
    head, body = b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n", b'{"resend":false}'

    assert [_is_whole(part) for part in (head[:20], head, head + body[:5], head + body)] == [False, False, False, True]


def test_everybody_has_the_first_turn_in_some_round() -> None:
    """Who is first finds a calmer machine, say: nobody is it twice before everybody was."""
    configurations = list(CONFIGURATIONS.values())[:4]

    rounds = [_rotated(configurations, number) for number in range(4)]

    assert all(set(order) == set(configurations) for order in rounds)
    assert len({order[0].name for order in rounds}) == 4


def test_every_configuration_is_compared_with_the_same_sampling_without_an_extender() -> None:
    """Otherwise the ratio would be of kube-scheduler's sampling, not of us."""
    for each in CONFIGURATIONS.values():
        base = CONFIGURATIONS[each.base]

        assert (base.extender, base.adaptive) == ("", each.adaptive)
        assert base.name in (STOCK, NONE)
