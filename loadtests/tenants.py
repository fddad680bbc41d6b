"""Pods that come at their own times: Tenants submit them, and a kube-scheduler finds them in its queue."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import dataclass, field

import gevent
from gevent.event import Event
from locust import FastHttpUser, constant, task
from locust.env import Environment

from app.driver import PodSpec, Queue
from loadtests.arrivals import Coming, asks, pod_of, poisson
from loadtests.options import connect, options_of


@dataclass
class Waiting:
    """Pods without a node, in kube-scheduler's own queue: refused ones sleep until a pod has gone."""

    _queue: Queue = field(default_factory=Queue)
    _pods: dict[str, tuple[PodSpec, float, float]] = field(default_factory=dict)
    _came: Event = field(default_factory=Event)

    def submit(self, coming: Coming) -> None:
        """A pod comes."""
        pod, now = pod_of(coming.ask), time.monotonic()
        self._pods[pod.uid] = (pod, now, coming.holds_seconds)
        self._queue.add(pod.uid, now=now)
        self._came.set()

    def next(self) -> PodSpec | None:
        """The pod to try now, if any."""
        uid = self._queue.pop(now=time.monotonic())
        return None if uid is None else self._pods[uid][0]

    def wait(self, seconds: float) -> None:
        """Until a pod comes, but no longer than this."""
        self._came.clear()
        self._came.wait(seconds)

    def refused(self, uid: str) -> None:
        """No node fits."""
        self._queue.refused(uid, now=time.monotonic())

    def failed(self, uid: str) -> None:
        """A call has failed."""
        self._queue.failed(uid, now=time.monotonic())

    def placed(self, uid: str) -> tuple[float, float]:
        """It has a node: how long that took from its arrival, and how long it will stay."""
        self._queue.done(uid)
        _, came, holds = self._pods.pop(uid)
        return time.monotonic() - came, holds

    def some_have_gone(self) -> None:
        """There is room again."""
        self._queue.pod_deleted(now=time.monotonic())


WAITING = Waiting()
numbers = itertools.count()


class Tenant(FastHttpUser):
    """Submits pods at random times and does not care how long they wait. One kube-scheduler serves all Tenants."""

    wait_time = constant(0)

    def __init__(self, environment: Environment) -> None:
        options = options_of(environment)
        connect(self, options.host, options)
        super().__init__(environment)
        rng = random.Random(f"{options.seed} {next(numbers)}")
        self.coming = poisson(
            asks(options.mix, options.trace, rng),
            rng,
            per_second=options.arrivals_per_second,
            holding_seconds=options.holding_seconds,
        )

    def on_start(self) -> None:
        """From now on."""
        self.due = time.monotonic()

    @task
    def submit(self) -> None:
        """The next pod at its time, whether the last one has a node or not."""
        coming = next(self.coming)
        self.due += coming.after_seconds
        gevent.sleep(max(0.0, self.due - time.monotonic()))
        WAITING.submit(coming)
