"""Who holds what: each transition, and the law in any order of events."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from app.ledger import Hold, Ledger, Phase
from app.offers import legal
from app.translate import PodRef
from solver import Demand, Device, Node, Placement, Refusal, quote
from solver.cluster import Allocation, devices_of
from solver.demand import Terms
from solver.guests import Guest
from solver.samples import sample_node
from tests.app.law import beside_the_wrong, beyond_the_law


def ref(name: str) -> PodRef:
    return PodRef(f"uid-{name}", "default", name)


def free(taken: tuple[Allocation, ...], wanted: Allocation) -> Refusal | None:
    return Refusal("taken") if set(devices_of(taken)) & set(wanted.devices) else None


ONE = Demand(1)
A, B = Device("GPU-a"), Device("GPU-b")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


def on(node: str, *devices: Device) -> Placement:
    return Placement(node, devices)


def test_a_proposal_refuses_nobody(ledger):
    ledger.propose(ref("p"), ONE, on("n", A), now=0)

    assert ledger.taken("n") == ()
    assert devices_of(ledger.proposed("n")) == (A,)
    assert ledger.assume(ref("q"), ONE, on("n", A), now=0, legal=free) is None


def test_a_proposal_lapses_when_bind_never_comes(ledger):
    """kube-scheduler does not tell us when it drops a pod, so a promise must end by itself."""
    ledger.propose(ref("p"), ONE, on("n", A), now=0)

    assert ledger.expire(before=0) == []
    assert [hold.pod for hold in ledger.expire(before=1)] == [ref("p")]
    assert ledger.get("uid-p") is None
    assert ledger.nodes_with_proposals() == frozenset()


def test_a_newer_proposal_replaces_the_older_one_also_on_another_node(ledger):
    ledger.propose(ref("p"), ONE, on("n", A), now=0)
    ledger.propose(ref("p"), ONE, on("m", B), now=1)

    assert ledger.proposed("n") == ()
    assert devices_of(ledger.proposed("m")) == (B,)


def test_an_assumed_placement_refuses_others_in_words(ledger):
    ledger.assume(ref("p"), ONE, on("n", A), now=0, legal=free)

    refusal = ledger.assume(ref("q"), ONE, on("n", A), now=0, legal=free)

    assert refusal is not None
    assert ledger.get("uid-q") is None


def test_an_assumed_pod_is_not_assumed_again_elsewhere(ledger):
    ledger.assume(ref("p"), ONE, on("n", A), now=0, legal=free)

    assert ledger.assume(ref("p"), ONE, on("m", B), now=0, legal=free) is not None
    assert ledger.taken("m") == ()


def test_time_alone_never_ends_an_assumed_placement(ledger):
    ledger.assume(ref("p"), ONE, on("n", A), now=0, legal=free)

    assert ledger.expire(before=1e9) == []
    assert devices_of(ledger.taken("n")) == (A,)


def test_confirm_forget_and_release_end_where_the_drawing_says(ledger):
    ledger.assume(ref("p"), ONE, on("n", A), now=0, legal=free)
    ledger.confirm("uid-p", now=1)
    ledger.forget("uid-p")
    assert ledger.get("uid-p") == Hold(ref("p"), "n", ONE, (A,), Phase.HELD, 1)

    ledger.leave("uid-p", now=2, not_before=2)
    assert devices_of(ledger.taken("n")) == (A,)
    assert [hold.pod for hold in ledger.leaving()] == [ref("p")]

    ledger.release("uid-p")
    assert ledger.taken("n") == ()
    assert len(ledger) == 0


def test_a_confirmation_that_comes_after_the_release_changes_nothing(ledger):
    """The pod may be deleted while its Binding's answer is on the way."""
    ledger.assume(ref("p"), ONE, on("n", A), now=0, legal=free)
    ledger.forget("uid-p")

    ledger.confirm("uid-p", now=1)

    assert ledger.get("uid-p") is None


def test_a_device_that_two_pods_have_on_the_api_server_is_free_when_both_are_gone(ledger):
    for name in ("p", "q"):
        ledger.restore(Hold(ref(name), "n", ONE, (A,), Phase.HELD, 0))
    ledger.release("uid-p")
    assert devices_of(ledger.taken("n")) == (A,)
    ledger.release("uid-q")
    assert ledger.taken("n") == ()


def test_changes_name_only_nodes_whose_firm_holds_changed(ledger):
    ledger.propose(ref("p"), ONE, on("n", A), now=0)
    assert ledger.drain_changes() == set()
    ledger.assume(ref("q"), ONE, on("m", B), now=0, legal=free)
    assert ledger.drain_changes() == {"m"}
    ledger.release("uid-q")
    assert ledger.drain_changes() == {"m"}


NODES = {name: sample_node(name, kind) for name, kind in (("h", "8xH100"), ("l", "4xL4"), ("a", "8xA100-mig"))}
RED, BLUE, ALONE = Guest("red"), Guest("blue", "serving"), Guest("green", "", "node")
APART = Guest("blue", "", "gpu")
DEMANDS = [
    Demand(1),
    Demand(2),
    Demand(4, terms=Terms(guest=ALONE)),
    Demand(0, (("1g.10gb", 1),)),
    Demand(0, (("1g.10gb", 1),), terms=Terms(guest=APART)),
    Demand(0, (("3g.40gb", 1),), terms=Terms(guest=RED)),
    Demand(0, (("7g.80gb", 1),)),
    Demand(share_milli=300),
    Demand(share_milli=500, terms=Terms(guest=RED)),
    Demand(share_milli=700, terms=Terms(guest=BLUE)),
    Demand(share_mib=10_000, terms=Terms(guest=APART)),
    Demand(share_milli=200, terms=Terms(guest=ALONE)),
]
PODS = [ref(f"p{number}") for number in range(16)]


class TheLaw(RuleBasedStateMachine):
    """In no order of events is a device, slice or share promised beyond what it has, or to the wrong neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.now = 0.0

    def stale_choice(self, node: Node, demand: Demand, seen: tuple[Allocation, ...]) -> Placement | None:
        return quote(node, seen, demand)

    @rule(
        pod=st.sampled_from(PODS),
        demand=st.sampled_from(DEMANDS),
        name=st.sampled_from(sorted(NODES)),
        blind=st.booleans(),
    )
    def propose(self, pod: PodRef, demand: Demand, name: str, blind: bool) -> None:
        """`blind`: chosen on a snapshot that was empty, as old as can be."""
        placement = self.stale_choice(NODES[name], demand, () if blind else self.ledger.taken(name))
        if placement:
            self.ledger.propose(pod, demand, placement, now=self.now)

    @rule(
        pod=st.sampled_from(PODS),
        demand=st.sampled_from(DEMANDS),
        name=st.sampled_from(sorted(NODES)),
        blind=st.booleans(),
    )
    def assume(self, pod: PodRef, demand: Demand, name: str, blind: bool) -> None:
        placement = self.stale_choice(NODES[name], demand, () if blind else self.ledger.taken(name))
        if placement:
            refusal = self.ledger.assume(pod, demand, placement, now=self.now, legal=legal(NODES[name]))
            holds = self.ledger.get(pod.uid)
            assert blind or refusal is None or (holds is not None and holds.firm), f"{demand}: {refusal}"

    @rule(pod=st.sampled_from(PODS))
    def assume_what_was_proposed(self, pod: PodRef) -> None:
        hold = self.ledger.get(pod.uid)
        if hold and not hold.firm:
            placement = Placement(hold.node, hold.devices)
            self.ledger.assume(pod, hold.demand, placement, now=self.now, legal=legal(NODES[hold.node]))

    @rule(pod=st.sampled_from(PODS), what=st.sampled_from(["confirm", "forget", "release", "leave"]))
    def end(self, pod: PodRef, what: str) -> None:
        if what == "confirm":
            self.ledger.confirm(pod.uid, now=self.now)
        elif what == "leave":
            self.ledger.leave(pod.uid, now=self.now, not_before=self.now)
        else:
            getattr(self.ledger, what)(pod.uid)

    @rule(seconds=st.floats(0, 20))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.ledger.expire(before=self.now - 10)

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        for name, node in NODES.items():
            taken = self.ledger.taken(name)
            assert beyond_the_law(node, taken) == []
            assert not beside_the_wrong(taken)

    @invariant()
    def the_indexes_agree_with_the_holds(self) -> None:
        holds = list(self.ledger)
        assert {hold.node for hold in holds if not hold.firm} == self.ledger.nodes_with_proposals()
        assert {h.pod for h in self.ledger.leaving()} == {h.pod for h in holds if h.phase is Phase.LEAVING}
        assert {h.pod for h in self.ledger.assumed()} == {h.pod for h in holds if h.phase is Phase.ASSUMED}
        assert {h.pod for name in NODES for h in self.ledger.on(name)} == {h.pod for h in holds}


TheLaw.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_case_01_the_law_holds_in_any_order_of_events = TheLaw.TestCase
