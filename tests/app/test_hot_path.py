"""filter and prioritize answer from what they remember. Here: they answer as if they remembered nothing.

A small world changes in every way in which a node's answer can change, and after each change the answers are those
that are worked out from scratch, node by node.
"""

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from app.extender import DETAILED_NODES, RANK_STEP
from app.hosts import Amount
from app.inventory import Ownership
from app.ledger import Hold, Phase
from app.offers import Offers, head, on_any_host
from app.planner import with_forecast
from app.schedule import JointPlan, Planned
from app.service import Service
from app.simulate import report_of
from app.translate import Pod, PodRef, pod_of
from app.wire import Args
from solver import DEFAULT_POLICY, Demand, Device, Placement, Refusal, price
from solver.fits import refusal
from solver.forecast import Forecast, Shape
from solver.samples import sample_node
from tests.app.world import GPU, World
from tests.fakes import pod_json


class TwoLooks:
    """A turn that is over at the third look at the clock; it fails when so many have not been enough."""

    turns = 0

    def __init__(self) -> None:
        TwoLooks.turns += 1
        assert TwoLooks.turns < 200, "filter gets no further"
        self.left = 2

    def lasts(self) -> bool:
        self.left -= 1
        return self.left >= 0


def world_of(nodes, **knobs) -> World:
    """Without Kubernetes and with nothing running: all that happens is what a test does."""
    world = World(nodes, kube=False, **knobs)
    for name in nodes:
        world.report(name)
    return world


async def test_filter_in_turns_gets_to_its_end_however_many_nodes_have_no_agent_or_were_refused(monkeypatch):
    monkeypatch.setattr("app.extender.Turns", TwoLooks)
    world = world_of({f"n{number}": "4xT4" for number in range(300)})
    extender, refusals = world.service.extender, world.service.refusals
    names = [*world.nodes, *(f"without-{number}" for number in range(300))]
    for name in world.nodes:
        refusals.refused(Demand(gpus=2), name, "TopologyAffinityError")

    monkeypatch.setattr(TwoLooks, "turns", 0)
    result = await extender.filter_in_turns(Args(pod_json("p", {GPU: "5"}), names))
    assert set(result.unresolvable) == set(names)

    monkeypatch.setattr(TwoLooks, "turns", 0)
    result = await extender.filter_in_turns(Args(pod_json("q", {GPU: "2"}), list(world.nodes)))
    assert set(result.failed) == set(world.nodes)


async def test_a_node_is_offered_whole_again_when_a_hold_under_another_name_of_its_boards_ends():
    """Nodes are renamed and boards are moved; no agent has anything new to say when such a pod ends."""
    world = world_of({"new": "4xT4"})
    pod, ledger = pod_json("p", {GPU: "4"}), world.service.ledger
    old = Hold(
        PodRef("uid-old", "default", "old"), "old", Demand(gpus=1), (Device(world.gpus("new")[0]),), Phase.HELD, 0
    )

    assert world.service.extender.filter(Args(pod, ["new"]), trial=True).fitting
    ledger.restore(old)
    assert not world.service.extender.filter(Args(pod, ["new"]), trial=True).fitting
    ledger.release("uid-old")
    assert world.service.extender.filter(Args(pod, ["new"]), trial=True).fitting


def test_a_node_that_comes_back_after_it_was_forgotten_has_nothing_kept_back_for_old_orders():
    """Nobody has orders for a node without MIG, so nobody would say that they are over."""
    world = world_of({"t": "4xT4"})
    offers, pod = world.service.offers, pod_json("p", {GPU: "4"})
    offers.keep_back("t", {world.gpus("t")[0]: "an order failed"}, frozenset())
    assert not world.service.extender.filter(Args(pod, ["t"]), trial=True).fitting

    world.service.inventory.drop("t")
    offers.forget("t")
    world.service.orders.forget("t")
    world.report("t")

    assert world.service.extender.filter(Args(pod, ["t"]), trial=True).fitting


def test_what_is_promised_to_others_does_not_take_up_the_answer():
    """A gang's pods are all proposed before any is bound, and more than fit into one answer."""
    world = world_of({f"t{number}": "4xT4" for number in range(6)}, most_nodes=2)
    extender, chosen = world.service.extender, []

    for number in range(6):
        pod = pod_json(f"p{number}", {GPU: "4"})
        scored = extender.prioritize(Args(pod, list(extender.filter(Args(pod, list(world.nodes))).fitting)))
        chosen.append(scored.choice)

    assert sorted(chosen) == sorted(world.nodes)


async def test_prices_that_count_cpu_are_not_taken_for_done_when_a_turn_ends_before_they_are(monkeypatch):
    """The best few by prices without CPU can be other nodes."""
    monkeypatch.setattr("app.extender.Turns", TwoLooks)
    monkeypatch.setattr(TwoLooks, "turns", 0)
    world = world_of({f"t{number}": "4xT4" for number in range(6)}, most_nodes=1)
    for number, name in enumerate(world.nodes):
        world.service.hosts.node_gives(name, Amount(2000 * (1 + number), 9000))
    world.service.offers.renew(FORESEEN)
    in_turns, at_once = Args(asking("p", ASKS[1]), list(world.nodes)), Args(asking("q", ASKS[1]), list(world.nodes))

    result = await world.service.extender.filter_in_turns(in_turns, trial=True)

    assert result.fitting == world.service.extender.filter(at_once, trial=True).fitting


# -- as if nothing were remembered ----------------------------------------------------------------------------

NODES = {
    **{f"t{number}": "4xT4" for number in range(7)},
    **{f"a{number}": "2xA30-mig" for number in range(3)},
    **{f"h{number}": "4xH100" for number in range(2)},
}
MOVED = "moved"  # a name under which the boards of another node are reported, too
ASKS: tuple[tuple[dict[str, str], str], ...] = (
    ({GPU: "1"}, "0"),
    ({GPU: "1"}, "2"),
    ({GPU: "2"}, "0"),
    ({GPU: "4"}, "7"),
    ({GPU: "5"}, "0"),
    ({"nvidia.com/mig-1g.6gb": "1"}, "0"),
    ({"nvidia.com/mig-2g.12gb": "2"}, "1"),
    ({"tangram.gpu/share-milli": "400"}, "0"),
)
PODS = [f"p{number}" for number in range(8)]
MIX = [Shape(4000, 1, 1000), Shape(1000, 1, 400), Shape(7000, 4, 1000)]
FORESEEN = with_forecast(DEFAULT_POLICY, Forecast.from_mix(MIX, {"NVIDIA T4": 28, "NVIDIA A30": 6}))


def asking(name: str, ask: tuple[dict[str, str], str]) -> dict[str, Any]:
    limits, cpu = ask
    resources = {"limits": limits, "requests": {"cpu": cpu}}
    return {**pod_json(name, spec={"containers": [{"name": "main", "resources": resources}]})}


class Changing:
    """A world in which one thing after another changes, by chance."""

    def __init__(self, chance: Random) -> None:
        self.chance = chance
        self.world = world_of(NODES, most_nodes=0)
        self.service = self.world.service
        self.version = 1
        self.changes = [getattr(self, name) for name in dir(self) if name.startswith("change_")]

    def node(self) -> str:
        return self.chance.choice([*NODES, MOVED])

    def ref(self) -> PodRef:
        name = self.chance.choice(PODS)
        return PodRef(f"uid-{name}", "default", name)

    def demand(self) -> Demand:
        ask = pod_of(asking("any", self.chance.choice(ASKS))).ask
        assert isinstance(ask, Demand)
        return ask

    def some_device(self) -> tuple[str, tuple[Device, ...]]:
        """A node that is known, and a device there."""
        name = self.chance.choice(list(self.service.inventory))
        entry = self.service.inventory.get(name)
        assert entry is not None
        gpu = self.chance.choice(entry.node.gpus)
        return name, (Device(gpu.uuid, self.chance.choice(gpu.instances) if gpu.instances else None),)

    # -- agents and nodes --

    def change_report(self) -> None:
        name = self.node()
        board = self.chance.choice(list(NODES)) if name == MOVED else name
        report = report_of(sample_node(board, NODES[board]))
        self.version += 1
        seen = self.ref().uid if self.chance.random() < 0.3 else ""
        gpus = tuple(
            gpu.model_copy(
                update={
                    "health": self.chance.choice([*["ok"] * 9, "bad"]),
                    "pods": (seen,) if seen and self.chance.random() < 0.5 else (),
                }
            )
            for gpu in report.gpus
        )
        changes = {
            "node": name,
            "gpus": gpus,
            "version": self.version,
            "error": self.chance.choice([*[""] * 7, "NVML: a word; another"]),
            "sees_pods": self.chance.random() < 0.5,
            "makes_slices": self.chance.choice([None, True, False]),
        }
        self.service.report(report.model_copy(update=changes))

    def change_age(self) -> None:
        self.world.clock.advance(self.chance.choice([1, 12, 31]))
        for name in self.service.inventory:
            entry = self.service.inventory.get(name)
            if entry is not None and self.chance.random() < 0.9:
                entry.heard = self.world.clock()

    def change_blindness(self) -> None:
        self.service.offers.keep_back_the_blind(until=self.world.clock() + 1)

    def change_standing(self) -> None:
        if self.chance.random() < 0.3:
            self.service.offers.bar(self.node(), self.chance.choice(["is being checked", "is no more: so it seems"]))
        else:
            self.service.offers.unbar(self.node())

    def change_what_orders_keep_back(self) -> None:
        name, devices = self.some_device()
        gpus = self.chance.choice([{}, {devices[0].gpu: "an order failed here"}])
        going = self.chance.choice([frozenset(), frozenset(devices)])
        self.service.offers.keep_back(name, gpus, going)

    def change_host(self) -> None:
        self.service.hosts.node_gives(self.node(), self.chance.choice([None, Amount(4000, 9000), Amount(16000, 9000)]))

    def change_owner(self) -> None:
        name = self.node()
        if self.service.inventory.owned(name, Ownership(*self.chance.choice([("", ""), ("GPU Operator", "")]))):
            self.service.offers.touch(name)

    def change_refused(self) -> None:
        self.service.refusals.refused(self.demand(), self.node(), "TopologyAffinityError: no")

    def change_plan(self) -> None:
        on = tuple((self.node(), 1) for _ in range(3))
        self.service.schedule.adopt(JointPlan("best", 0, 0, 0.0, 0.0, (Planned(self.demand(), 0, on),)))

    def change_policy(self) -> None:
        self.service.offers.renew(self.chance.choice([DEFAULT_POLICY, FORESEEN]))
        while self.service.offers.settle():
            pass

    # -- holds --

    def change_hold(self) -> None:
        ref, demand, name = self.ref(), self.demand(), self.node()
        if self.service.inventory.get(name) is None:
            return
        self.service.offers.refresh(now=self.world.clock())
        best = self.service.offers.best(demand, name, uid=ref.uid)
        if isinstance(best, Placement):
            if self.chance.random() < 0.5:
                self.service.ledger.propose(ref, demand, best, now=self.world.clock())
            else:
                self.service.ledger.assume(ref, demand, best, now=self.world.clock(), legal=lambda *_: None)

    def change_unknown(self) -> None:
        ref = self.ref()
        self.service.ledger.restore(Hold(ref, self.node(), self.demand(), (), Phase.HELD, self.world.clock()))

    def change_name_of_a_hold(self) -> None:
        _, devices = self.some_device()
        demand = Demand(gpus=1)
        self.service.ledger.restore(Hold(self.ref(), self.node(), demand, devices, Phase.HELD, self.world.clock()))

    def change_devices(self) -> None:
        _, devices = self.some_device()
        ledger, uid = self.service.ledger, self.ref().uid
        self.chance.choice([partial(ledger.explain, uid), partial(ledger.move, uid)])(devices)

    def change_end(self) -> None:
        uid, ledger, now = self.ref().uid, self.service.ledger, self.world.clock()
        ends = [ledger.release, ledger.forget]
        ends += [partial(ledger.confirm, now=now), partial(ledger.leave, now=now, not_before=now)]
        self.chance.choice(ends)(uid)

    # -- what is answered, and what should be --

    def check(self) -> None:
        offers, now = self.service.offers, self.world.clock()
        offers.sweep(list(self.service.inventory), now=now)
        self.service.ledger.expire(before=now - self.world.settings.proposal_seconds)
        pod = asking(self.chance.choice(PODS), self.chance.choice(ASKS))
        every = [*NODES, MOVED, "nobody", 'no"body']
        names = self.chance.sample(every, self.chance.choice([len(every), 5, 1]))
        args = Args(pod, names)
        most = self.chance.choice([1, 2, 3])
        held = repr(list(self.service.ledger)), repr(self.service.truth.waiting)
        result = self.service.extender.filter(args, trial=True)
        scores = dict(self.service.extender.prioritize(args, trial=True))
        self.service.extender._settings = self.world.settings.model_copy(update={"most_nodes": most})
        capped = self.service.extender.filter(args, trial=True)
        self.service.extender._settings = self.world.settings

        scratch = Scratch(self.service, pod_of(pod))
        assert {*result.failed.items(), *result.unresolvable.items()} == scratch.reasons(names, result.fitting)
        if scratch.held:
            return
        assert list(result.fitting) == [name for name in names if scratch.fits(name)]
        assert scores == scratch.scores(names)
        best = scratch.scores([name for name in names if scratch.fits(name)])
        if len(names) > most:
            assert len(capped.fitting) == min(most, len(result.fitting)) == len(set(capped.fitting))
            ranks = sorted((score // RANK_STEP for score in best.values()), reverse=True)
            assert (
                sorted((best[name] // RANK_STEP for name in capped.fitting), reverse=True)
                == ranks[: len(capped.fitting)]
            )
        if most == 1 and capped.fitting and len(names) > 1:
            assert best[capped.fitting[0]] == max(best.values())
        assert held == (repr(list(self.service.ledger)), repr(self.service.truth.waiting))


class Scratch:
    """What follows for a pod from inventory and ledger, worked out anew."""

    def __init__(self, service: Service, pod: Pod) -> None:
        known = service.offers
        self.uid, self.demand = pod.ref.uid, pod.ask
        assert isinstance(self.demand, Demand)
        self.plain = on_any_host(self.demand)
        self.policy = known._policy
        hold = service.ledger.get(self.uid)
        self.held = hold if hold is not None and hold.firm else None
        self.refused = service.refusals.on(self.demand)
        self.planned = service.schedule.nodes_for(self.demand)
        self.offers = Offers(service.inventory, service.ledger, service.hosts, policy=self.policy)
        self.offers._barred, self.offers.blind_until = known._barred, known.blind_until
        self.offers._kept_back, self.offers._going = known._kept_back, known._going
        for name in {*service.inventory, MOVED}:
            self.offers._update(name, now=service.clock())

    def price(self, name: str, demand: Demand | None = None) -> int | None:
        if self.offers.fault(name):
            return None
        return price(*self.offers.view(name), demand or self.plain, self.policy)

    def fits(self, name: str) -> bool:
        return name not in self.refused and self.price(name) is not None

    def reasons(self, names: list[str], fitting: Sequence[str]) -> set[tuple[str, str]]:
        others = [name for name in names if name not in fitting]
        if self.held:
            words = f"{self.held.pod} already has devices on {self.held.node} ({self.held.phase.value})"
            return {(name, words) for name in others}
        whole = {name: self.why(name) for name in others}
        if len(others) > DETAILED_NODES:
            return {(name, head(why.reason)) for name, why in whole.items()}
        return {(name, why.reason) for name, why in whole.items()}

    def why(self, name: str) -> Refusal:
        fault = self.offers.fault(name)
        if fault:
            return Refusal(fault)
        return Refusal(self.refused[name], True) if name in self.refused else self.without_cache(name)

    def without_cache(self, name: str) -> Refusal:
        found = refusal(*self.offers.view(name), self.plain)
        assert found is not None
        return found

    def scores(self, names: list[str]) -> dict[str, int]:
        keys: dict[str, tuple[int, int]] = {}
        for name in names:
            plain = self.price(name)
            if plain is None:
                continue
            assert isinstance(self.demand, Demand)
            exact = self.price(name, self.demand) if self.policy.values.forecast is not None else plain
            cost = plain if exact is None else exact
            soft = self.offers.soft_prices(self.demand, {name}, {name}, uid=self.uid).get(name, cost)
            keys[name] = (2, cost) if soft is None else (0 if name in self.planned else 1, soft)
        order = sorted(set(keys.values()), reverse=True)
        scores = {name: RANK_STEP * (1 + order.index(key)) for name, key in keys.items()}
        if scores:
            scores[min(name for name in scores if scores[name] == max(scores.values()))] += 1
        return scores


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_after_every_change_the_answers_are_those_that_are_worked_out_from_scratch(chance):
    changing = Changing(chance)
    for _ in range(25):
        for _ in range(chance.choice([1, 1, 3])):
            chance.choice(changing.changes)()
        changing.check()
