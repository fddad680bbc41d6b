"""One user is one kube-scheduler: filter, prioritize, bind, and later the pod is gone; one pod after another.

Its pods are its own (a closed loop: the next pod comes when the last one is done), or those of `Tenant`s where there
are some (an open loop: they come whether it is done or not). With Kubernetes behind the service only filter and
prioritize are sent, marked as a dry run, and the first pod tells whether the service keeps to that.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections.abc import Sequence
from typing import Any

import gevent
import orjson
from gevent.lock import Semaphore
from locust import FastHttpUser, task
from locust.env import Environment

from app.driver import FIRST_BACKOFF_SECONDS, PodSpec, args_body, binding_body, choose, pod_object
from loadtests.arrivals import asks, pod_of
from loadtests.baseline import DESK, Exchange
from loadtests.cluster import DRY_RUN, Cluster, NoCluster, learn
from loadtests.options import Options, connect, context_of, give_up, options_of, payload, session
from loadtests.summary import SET_UP
from loadtests.tenants import WAITING, Tenant

JSON = {"Content-Type": "application/json", "User-Agent": "Go-http-client/1.1"}
IDLE_SECONDS = 0.5
REFUSED = "refused"
ARRIVAL = "arrival to node"


class Broken(Exception):
    """A call failed; it has been counted, and the pod is tried again later."""


_known: dict[str, Cluster] = {}
_learning = Semaphore()
numbers = itertools.count()


def cluster_of(options: Options) -> Cluster:
    """Asked once by each process. Raises NoCluster."""
    with _learning:
        if options.host not in _known:
            context = context_of(options) if options.host.startswith("https:") else None
            _known[options.host] = learn(options.host, context)
        return _known[options.host]


def sizes_of(text: str, nodes: int) -> list[int]:
    """`100,500,all` for so many nodes: each size once, none larger than there are nodes."""
    return sorted({nodes if part.strip() == "all" else min(nodes, int(part)) for part in text.split(",")})


class KubeScheduler(FastHttpUser):
    """Pods come one after another; each takes the whole way."""

    def __init__(self, environment: Environment) -> None:
        self.options = options_of(environment)
        connect(self, self.options.extender_url, self.options)
        super().__init__(environment)
        self.public = session(self, self.options.host, self.options)
        self.serves_tenants = Tenant in environment.user_classes
        self.bound: list[tuple[float, str]] = []

    def on_start(self) -> None:
        """Learn the nodes' names, as kube-scheduler knows them from its own cache."""
        try:
            self.cluster = cluster_of(self.options)
        except NoCluster as problem:
            give_up(self.environment, str(problem))
        self.dry_run = self.cluster.live or self.options.dry_run
        self.headers = {**JSON, **DRY_RUN} if self.dry_run else JSON
        self.rng = random.Random(f"{self.options.seed} {next(numbers)}")
        self.asks = asks(self.options.mix, self.options.trace, self.rng)
        self.sizes = sizes_of(self.options.sizes, len(self.cluster.names))
        self.turn = self.rng.randrange(1000)
        self.checked = False
        self.pause_seconds = 0.0

    def on_stop(self) -> None:
        """Leave nothing behind."""
        self.release(len(self.bound))

    def wait_time(self) -> float:
        """Its own work for a pod: filters and scores of its own, its cache."""
        mean = self.options.think_seconds
        self.pause_seconds = self.rng.expovariate(1 / mean) if mean else 0.0
        return self.pause_seconds

    @task
    def schedule_one(self) -> None:
        """The next pod, of a Tenant or of its own."""
        if self.serves_tenants:
            self._schedule_a_tenants_pod()
        else:
            self._schedule_an_own_pod()

    def _schedule_an_own_pod(self) -> None:
        pod = pod_of(next(self.asks))
        try:
            node = self.place(pod)
        except Broken:
            gevent.sleep(FIRST_BACKOFF_SECONDS)
            return
        if node:
            self._keep(pod, time.monotonic())
        if self.bound and (not node or len(self.bound) > self.options.kept):
            self.release(1)

    def _schedule_a_tenants_pod(self) -> None:
        now = time.monotonic()
        gone = sum(1 for until, _ in self.bound if until <= now)
        if gone:
            self.release(gone)
            WAITING.some_have_gone()
        pod = WAITING.next()
        if pod is None:
            WAITING.wait(min(IDLE_SECONDS, max(0.001, self.bound[0][0] - now)) if self.bound else IDLE_SECONDS)
            return
        try:
            node = self.place(pod)
        except Broken:
            WAITING.failed(pod.uid)
            return
        if not node:
            WAITING.refused(pod.uid)
            return
        seconds, holds = WAITING.placed(pod.uid)
        self._keep(pod, time.monotonic() + holds)
        self.environment.events.request.fire(
            request_type="POD", name=ARRIVAL, response_time=1000 * seconds, response_length=0, exception=None
        )

    def place(self, pod: PodSpec) -> str:
        """Filter; prioritize if more than one node fits; bind. The node, or nothing where the answer is no."""
        size = self.sizes[self.turn % len(self.sizes)]
        names = self._window(size)
        self.turn += 1
        fits = self._filter(pod, names)
        if not fits:
            return ""
        node = fits[0] if len(fits) == 1 else self._best(pod, fits, size)
        if not self.dry_run:
            return node if self._bind(pod, node) else ""
        if not self.checked:
            self._check_that_nothing_is_proposed(pod)
        return node

    def _window(self, size: int) -> list[str]:
        """So many names from where the last pod's ended, as kube-scheduler goes round its nodes."""
        names = self.cluster.names
        first = self.turn * size % len(names)
        return list(names[first : first + size] + names[: max(0, first + size - len(names))])

    def _filter(self, pod: PodSpec, names: Sequence[str]) -> list[str]:
        answer = self._call("/filter", len(names), args_body(pod_object(pod), names), offered=names)
        if answer["Error"]:
            raise Broken(answer["Error"])
        return answer["NodeNames"] or []

    def _best(self, pod: PodSpec, fits: Sequence[str], size: int) -> str:
        scores = self._call("/prioritize", size, args_body(pod_object(pod), fits), offered=fits)
        return choose(fits, {each["Host"]: each["Score"] for each in scores}, self.rng)

    def _bind(self, pod: PodSpec, node: str) -> bool:
        return not self._call("/bind", None, binding_body(pod, node))["Error"]

    def _call(self, path: str, size: int | None, body: bytes, *, offered: Sequence[str] = ()) -> Any:
        """One call; raises Broken where kube-scheduler would count an error. A bind may be refused in good order."""
        name = path[1:] if size is None else f"{path[1:]} {size}"
        context: dict[str, Any] = {}
        with self.client.post(
            path, data=payload(body), headers=self.headers, name=name, catch_response=True, context=context
        ) as answer:
            if answer.status_code != 200:
                answer.failure(getattr(answer, "error", None) or f"status {answer.status_code}, only 200 counts")
                raise Broken(path)
            reply: bytes = answer.content
            value = orjson.loads(reply)
            if path == "/filter" and value["Error"]:
                answer.failure(value["Error"])
            if not _nodes_in(path, value) <= set(offered):
                answer.failure("answered with a node that was not asked about")
            if path == "/bind":
                answer.request_meta["context"][REFUSED] = bool(value["Error"])
        pause = self.pause_seconds if path == "/filter" else 0.0
        DESK.leave(Exchange(name, path, self.headers, body, reply, pause))
        return value

    def _check_that_nothing_is_proposed(self, pod: PodSpec) -> None:
        """A service that does not know the mark would make promises to pods that there are not: stop at the first."""
        self.checked = True
        with self.public.get(f"/v1/pods/{pod.uid}", name=SET_UP, catch_response=True) as answer:
            if answer.status_code == 404:
                answer.success()
            else:
                mark = next(iter(DRY_RUN))
                give_up(
                    self.environment, f"{self.host} does not keep to {mark}: it knows the first pod that was asked for"
                )

    def _keep(self, pod: PodSpec, until: float) -> None:
        if not self.dry_run:
            heapq.heappush(self.bound, (until, pod.uid))

    def release(self, count: int) -> None:
        """The pods that are to go first are gone."""
        for _ in range(count):
            self.public.delete(f"/v1/pods/{heapq.heappop(self.bound)[1]}", name="release")


def _nodes_in(path: str, value: Any) -> set[str]:
    if path == "/filter":
        return set(value["NodeNames"] or ())
    return {each["Host"] for each in value} if path == "/prioritize" else set()
