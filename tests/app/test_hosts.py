"""CPU and memory by node: what is given and requested, in any order of events."""

import hypothesis.strategies as st
from hypothesis import given

from app.hosts import NONE, Amount, Hosts
from app.translate import allocatable_of

GIVEN = Amount(10_000, 10_000)
events = st.lists(
    st.tuples(
        st.sampled_from("pqr"), st.sampled_from(["", "a", "b"]), st.builds(Amount, st.integers(0, 9), st.integers(0, 9))
    )
)


@given(events, st.sets(st.sampled_from("pqr")))
def test_what_is_left_is_what_the_latest_word_on_each_pod_leaves(events, counted_elsewhere):
    hosts = Hosts()
    hosts.node_gives("a", GIVEN)
    latest = {}
    for uid, node, amount in events:
        hosts.pod_requests(uid, node, amount)
        latest[uid] = (node, amount)
    left = GIVEN
    for uid, (node, amount) in latest.items():
        if node == "a" and uid not in counted_elsewhere:
            left = left.minus(amount)
    assert hosts.given_but_for("a", counted_elsewhere) == left
    assert hosts.given_but_for("b", ()) is None


def test_only_what_changes_is_named():
    hosts = Hosts()
    hosts.node_gives("a", GIVEN)
    hosts.pod_requests("p", "b", Amount(1, 1))
    assert hosts.drain_changes() == {"a", "b"}
    hosts.node_gives("a", GIVEN)
    hosts.pod_requests("p", "b", Amount(1, 1))
    hosts.pod_requests("q", "", NONE)
    assert hosts.drain_changes() == set()
    hosts.pod_requests("p", "a", Amount(1, 1))
    assert hosts.drain_changes() == {"a", "b"}


def test_a_list_ends_the_requests_of_pods_that_are_missing_from_it():
    hosts = Hosts()
    hosts.node_gives("a", GIVEN)
    hosts.pod_requests("p", "a", Amount(1, 1))
    hosts.pod_requests("q", "a", Amount(2, 2))
    list(hosts.pods_are({"q"}))
    assert hosts.given_but_for("a", ()) == GIVEN.minus(Amount(2, 2))


def test_a_node_that_asks_more_than_it_gives_has_nothing_left():
    hosts = Hosts()
    hosts.node_gives("a", Amount(1, 1))
    hosts.pod_requests("p", "a", Amount(2, 0))
    assert hosts.given_but_for("a", ()) == Amount(0, 1)


def test_allocatable_is_read_and_what_cannot_be_read_is_unknown():
    def node(**amounts: object) -> dict[str, object]:
        return {"status": {"allocatable": amounts}}

    assert allocatable_of(node(cpu="7910m", memory="32000Ki")) == (7910, 31)
    odd: list[dict[str, object]] = [{}, {"status": None}, {"status": {}}, node(cpu="1"), node(cpu="x", memory="1Gi")]
    assert [allocatable_of(each) for each in odd] == [None] * len(odd)


def test_allocatable_that_no_node_has_counts_as_very_much():
    """Prices are made in machine words; a negative amount is none."""

    def given_by(**amounts: object) -> tuple[int, int] | None:
        return allocatable_of({"status": {"allocatable": amounts}})

    assert given_by(cpu="9223372036854775807", memory="7E") == (2**31, 2**31)
    assert given_by(cpu="-5", memory="-5Gi") == (0, 0)
