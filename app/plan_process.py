"""The planning process: `python -m app.plan_process`, started by `app.planner`. Frames in, plans and tables out.

It keeps its own picture of the cluster, which is brought up to date by what has changed. It reads no settings, no
clock but for measuring, and talks to nobody but its parent; it ends when its pipe does.
"""

import ctypes
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter
from queue import SimpleQueue
from typing import BinaryIO

from app.offers import View
from app.planner import (
    HEADER_BYTES,
    Begin,
    Failed,
    Foresee,
    MakePlan,
    MakeTable,
    Message,
    News,
    frame,
    with_forecast,
    with_tables,
)
from app.schedule import JointPlan, Planned
from solver import DEFAULT_POLICY, Ask, Geometry, Placement, Plan, Policy, Problem, Snapshot, Status
from solver.flow import solve  # loads OR-Tools, which takes a second: the service itself never does
from solver.forecast import Forecast, rooms_of, shapes_of
from solver.market import Table, solve_table
from solver.steps import read

log = logging.getLogger("app.plan_process")

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
NICENESS = 5  # the service answers kube-scheduler first; at 10 and beside a busy control plane plans came too late


class Picture:
    """The cluster as it was last told, and the policy with the tables that are known."""

    def __init__(self) -> None:
        self.policy: Policy = DEFAULT_POLICY
        self.nodes: dict[str, View] = {}

    def take(self, news: News) -> None:
        """Bring it up to date."""
        for node, taken in news.nodes:
            self.nodes[node.name] = (node, taken)
        for name in news.gone:
            self.nodes.pop(name, None)

    def plan(self, order: MakePlan) -> JointPlan:
        """Solve for what is pending. Pods with one demand and priority are the same to the solver."""
        views = [self.nodes[name] for name in sorted(self.nodes)]
        snapshot = Snapshot(tuple(node for node, _ in views), {node.name: taken for node, taken in views})
        groups = [
            [Ask(f"{g}/{i}", demand, priority) for i in range(count)]
            for g, (demand, priority, count) in enumerate(order.wanted)
        ]
        asks = tuple(ask for group in groups for ask in group)
        began = time.monotonic()
        problem = Problem(snapshot, asks)
        plan = solve(problem, self.policy, time_limit_seconds=order.seconds, clock=time.monotonic)
        return _told(plan, order, time.monotonic() - began)

    def foresee(self, order: Foresee) -> Forecast:
        """What nodes are worth to pods like those that came, on the cluster as it is; plans go by it from now on."""
        hosts = [read(node, taken).host for node, taken in self.nodes.values()]
        gpus = [gpu for node, _ in self.nodes.values() for gpu in node.gpus if gpu.geometry is None]
        shapes = shapes_of(dict(order.seen), (gpu.kind for gpu in gpus))
        forecast = Forecast.from_mix(shapes, Counter(gpu.product for gpu in gpus)).with_blocks(rooms_of(hosts))
        self.policy = with_forecast(self.policy, forecast)
        return forecast


def _told(plan: Plan, order: MakePlan, seconds: float) -> JointPlan:
    outcomes = dict(plan.outcomes)
    planned = []
    for g, (demand, priority, count) in enumerate(order.wanted):
        on: Counter[str] = Counter()
        prices: Counter[str] = Counter()
        unplaced, reason = 0, ""
        for i in range(count):
            outcome = outcomes[f"{g}/{i}"]
            if isinstance(outcome, Placement):
                on[outcome.node] += 1
                prices.update(dict(outcome.prices))
            else:
                unplaced, reason = unplaced + 1, reason or outcome.reason
        planned.append(Planned(demand, priority, tuple(on.items()), unplaced, reason, tuple(prices.items())))
    known = plan.status is Status.OPTIMAL or bool(plan.tiers)
    gap = plan.gap if known else None
    return JointPlan(plan.status.value, plan.cost, plan.bound, gap, seconds, tuple(planned))


class Mouth:
    """What is said to the parent, by either thread."""

    def __init__(self, pipe: BinaryIO) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, message: object) -> None:
        """Send; where nobody listens any more, end."""
        with self._lock:
            try:
                self._pipe.write(frame(message))
                self._pipe.flush()
            except OSError:
                os._exit(0)


def _make_tables(orders: SimpleQueue[Geometry], mouth: Mouth, done: SimpleQueue[Table]) -> None:
    """Tables take seconds each, plans must not wait for them."""
    while True:
        geometry = orders.get()
        try:
            table = solve_table(geometry)
        except Exception as error:  # a table is a refinement: without it the formula stands
            log.exception("a value table")
            mouth.say(Failed(f"{type(error).__name__}: {error}", geometry))
            continue
        done.put(table)
        mouth.say(table)


def serve(source: BinaryIO, mouth: Mouth) -> None:
    """Hear orders until the pipe ends."""
    picture = Picture()
    orders: SimpleQueue[Geometry] = SimpleQueue()
    done: SimpleQueue[Table] = SimpleQueue()
    threading.Thread(target=_make_tables, args=(orders, mouth, done), daemon=True).start()
    tables: list[Table] = []
    while (message := _next(source)) is not None:
        while not done.empty():
            tables.append(done.get())
            picture.policy = with_tables(picture.policy, tables)
        match message:
            case Begin():
                tables = list(message.tables)
                picture.policy = with_tables(message.policy, message.tables)
            case News():
                picture.take(message)
            case MakeTable():
                orders.put(message.geometry)
            case MakePlan():
                mouth.say(_planned(picture, message))
            case Foresee():
                mouth.say(_foreseen(picture, message))


def _foreseen(picture: Picture, order: Foresee) -> Forecast | Failed:
    try:
        return picture.foresee(order)
    except Exception as error:  # a forecast is a refinement: without it best fit stands
        log.exception("a forecast")
        return Failed(f"{type(error).__name__}: {error}", forecast=True)


def _planned(picture: Picture, order: MakePlan) -> JointPlan | Failed:
    try:
        return picture.plan(order)
    except Exception as error:  # our own fault; the service goes on without a plan
        log.exception("a plan")
        return Failed(f"{type(error).__name__}: {error}")


def _next(source: BinaryIO) -> Message | None:
    header = source.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        return None
    size = int.from_bytes(header)
    body = source.read(size)
    if len(body) < size:
        return None
    message: Message = pickle.loads(body)  # noqa: S301  our own parent's
    return message


def _end_with_the_parent() -> None:
    """Even while stopped, when the end of the pipe is not heard (Linux; elsewhere the pipe must do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    """Serve on standard input and output; whatever else is printed goes to standard error."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICENESS)
    _end_with_the_parent()
    mouth = Mouth(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    serve(sys.stdin.buffer, mouth)
    os._exit(0)  # not waiting for a table that nobody wants any more


if __name__ == "__main__":
    main()
