"""extender/v1 as kube-scheduler speaks it, from requests that it really sent (tests/data/extender)."""

import contextlib
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import wire
from app.errors import BadInput
from app.translate import pod_of
from app.wire import Filtered
from solver import Refusal

RECORDED = Path(__file__).parents[1] / "data" / "extender"


def recorded(name: str) -> bytes:
    return (RECORDED / f"{name}.json").read_bytes()


@pytest.mark.parametrize("name", ["filter", "filter-mig", "filter-one-node", "filter-nominated", "prioritize"])
def test_recorded_requests_by_name_are_read(name):
    args = wire.parse_args(recorded(name))

    assert args.nodes is None
    assert args.names == json.loads(recorded(name))["NodeNames"]
    assert pod_of(args.pod).ref.uid == args.pod["metadata"]["uid"]


def test_case_09_names_only_on_the_wire_and_full_nodes_still_accepted():
    """kubernetes #72634, #121527: full Node objects cost most of the time above 1,000 nodes."""
    args = wire.parse_args(recorded("filter-nodes"))
    reply = json.loads(wire.render_filter(wire.Filtered(args.names[:1]), args))

    assert reply["NodeNames"] is None
    assert [node["metadata"]["name"] for node in reply["Nodes"]["items"]] == args.names[:1]
    assert reply["Nodes"]["items"][0] == (args.nodes or [])[0], "kube-scheduler trusts the objects that come back"


def test_recorded_binds_are_read():
    args = wire.parse_bind(recorded("bind"))
    sent = json.loads(recorded("bind"))
    assert (args.pod.uid, args.pod.namespace, args.pod.name, args.node) == (
        sent["PodUID"],
        sent["PodNamespace"],
        sent["PodName"],
        sent["Node"],
    )


@pytest.mark.parametrize("name", ["preempt", "preempt-nodes"])
def test_recorded_preemptions_are_read_in_both_forms_and_answered_in_meta_form(name):
    args = wire.parse_preempt(recorded(name))
    assert args.victims
    assert all(each.uids for each in args.victims.values())

    reply = json.loads(wire.render_preempt(args.victims))
    assert {node: len(v["Pods"]) for node, v in reply["NodeNameToMetaVictims"].items()} == {
        node: len(each.uids) for node, each in args.victims.items()
    }


def test_keys_are_read_as_go_reads_them():
    args = wire.parse_args(b'{"pod": {}, "nodenames": ["a"], "nodes": null}')
    assert args.names == ["a"]


def test_an_empty_answer_is_a_list_never_null():
    """Both null would mean that no node fits; null NodeNames falls through to Nodes."""
    assert json.loads(wire.render_filter(wire.Filtered(), None))["NodeNames"] == []
    assert wire.render_scores(wire.Scored()) == b"[]"


def test_scores_are_whole_numbers():
    assert orjson.loads(wire.render_scores(wire.Scored([(2000, ["a"]), (-3, ["b"])], "a"))) == [
        {"Host": "a", "Score": 2001},
        {"Host": "b", "Score": -3},
    ]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{}",
        b'{"Pod": 3}',
        b'{"Pod": {}, "NodeNames": "a"}',
        b'{"Pod": {}, "NodeNames": [1]}',
        b'{"Pod": {}, "Nodes": {"items": [{}]}}',
        b'{"Pod": {}, "Nodes": {"items": 3}}',
        b'{"Pod": {}, "Nodes": 3}',
        b"\xff\xfe",
    ],
)
def test_broken_requests_are_refused_in_words(body):
    with pytest.raises(BadInput):
        wire.parse_args(body)


@pytest.mark.parametrize("number", ["1e300", "1.5", "true", '"1"', "9223372036854775808"])
def test_victims_with_an_impossible_count_are_refused(number):
    body = b'{"Pod": {}, "NodeNameToMetaVictims": {"n": {"Pods": [], "NumPDBViolations": %s}}}' % number.encode()
    with pytest.raises(BadInput):
        wire.parse_preempt(body)


@pytest.mark.parametrize(
    "change",
    [{"PodUID": ""}, {"Node": None}, {"PodName": 3}, {"PodNamespace": "a/b"}, {"Node": "x?y"}, {"PodName": "x" * 300}],
)
def test_binds_that_name_nothing_are_refused(change):
    good = {"PodName": "p", "PodNamespace": "d", "PodUID": "u", "Node": "n"}
    wire.parse_bind(orjson.dumps(good))
    with pytest.raises(BadInput):
        wire.parse_bind(orjson.dumps({**good, **change}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["Pod", "Nodes", "NodeNames", "NodeNameToMetaVictims", "Node"]), json_values))
def test_no_json_crashes_a_parser(request_):
    body = orjson.dumps(request_) if _fits(request_) else b"{}"
    for parse in (wire.parse_args, wire.parse_bind, wire.parse_preempt):
        with contextlib.suppress(BadInput):
            parse(body)


def _fits(value: object) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def test_a_reason_without_nodes_names_none():
    """A pod that cannot be understood, asked about no node at all."""
    rendered = orjson.loads(wire.render_filter(Filtered(left={Refusal("why"): []}), None))
    assert rendered["FailedAndUnresolvableNodes"] == rendered["FailedNodes"] == {}
