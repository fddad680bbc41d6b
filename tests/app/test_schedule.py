"""A plan that is used up: it only ranks, and what happened while it was made has its part already."""

from app.schedule import JointPlan, Planned, Schedule
from solver import Demand

ONE, TWO = Demand(1), Demand(2)


def plan(*planned: Planned) -> JointPlan:
    return JointPlan("optimal", 0, 0, 0.0, 0.0, planned)


def test_without_a_plan_no_node_is_preferred():
    schedule = Schedule()
    assert not schedule.nodes_for(ONE)
    schedule.use(ONE, "a")
    assert (schedule.followed, schedule.aside, schedule.unplanned) == (0, 0, 1)


def test_pods_use_up_what_is_planned_for_their_like():
    schedule = Schedule()
    schedule.adopt(plan(Planned(ONE, 0, (("a", 2), ("b", 1))), Planned(TWO, 0, (("b", 1),))))
    schedule.use(ONE, "a")
    assert schedule.nodes_for(ONE) == {"a": 1, "b": 1}
    schedule.use(ONE, "c")
    schedule.use(ONE, "a")
    schedule.use(ONE, "b")
    assert not schedule.nodes_for(ONE)
    assert schedule.nodes_for(TWO) == {"b": 1}
    schedule.use(ONE, "a")
    assert (schedule.followed, schedule.aside, schedule.unplanned) == (3, 1, 1)


def test_priorities_of_one_demand_are_planned_together():
    schedule = Schedule()
    schedule.adopt(plan(Planned(ONE, 5, (("a", 1),)), Planned(ONE, 0, (("a", 1), ("b", 1)))))
    assert schedule.nodes_for(ONE) == {"a": 2, "b": 1}


def test_what_is_assumed_while_a_plan_is_made_has_its_part_already():
    """The plan was made for it too: without this the next of its kind would follow it there."""
    schedule = Schedule()
    schedule.begin()
    schedule.use(ONE, "a")
    schedule.adopt(plan(Planned(ONE, 0, (("a", 1), ("b", 1)))))
    assert schedule.nodes_for(ONE) == {"b": 1}


def test_when_nothing_is_pending_nothing_is_left_to_come():
    schedule = Schedule()
    schedule.adopt(plan(Planned(ONE, 0, (("a", 1),))))
    schedule.clear()
    assert not schedule.nodes_for(ONE)
