"""Pods that come and go at random, for the end-to-end tests: what they ask for, how they end, and when all is quiet."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

from tests.e2e.checker import Checker, is_live, is_refused
from tests.e2e.nodes import FINISH_AFTER, KubernetesObject, gpu_pod
from tests.e2e.sources import Sources
from tests.e2e.stack import Stack

QUIET_SECONDS = 90.0

Asks = Sequence[tuple[Mapping[str, int], int]]
"""What pods ask for, and how often."""


def mortal(rng: random.Random, name: str, asks: Asks) -> KubernetesObject:
    """A pod that ends by itself, or waits to be deleted."""
    (chosen,) = rng.choices([dict(ask) for ask, _ in asks], [weight for _, weight in asks])
    pod = gpu_pod(name, chosen)
    if rng.random() < 0.6:
        pod["metadata"].setdefault("annotations", {})[FINISH_AFTER] = f"{rng.randint(3, 30)}s"
        pod["spec"]["restartPolicy"] = "Never"
    pod["spec"]["terminationGracePeriodSeconds"] = 2
    return pod


def delete_some(stack: Stack, rng: random.Random) -> None:
    """Now and then one pod is deleted: waiting, being bound, running or finished; some by force."""
    if rng.random() > 0.15:
        return
    pods = stack.cluster.pods()
    if not pods:
        return
    try:
        stack.cluster.delete_pod(rng.choice(pods)["metadata"]["name"], grace_seconds=rng.choice([None, None, 0]))
    except Exception as gone:  # it may just have gone by itself
        if "404" not in str(gone):
            raise


def settle(stack: Stack, checker: Checker, sources: Sources) -> int:
    """Wait until nobody who waits has a legal step and all who are bound stay as they are; how many wait."""
    deadline = time.monotonic() + QUIET_SECONDS
    before: set[str] | None = None
    while True:
        sources.look()
        pods = [pod for pod in stack.cluster.pods() if is_live(pod)]
        waiting = [pod for pod in pods if not pod["spec"].get("nodeName")]
        now = {pod["metadata"]["uid"] for pod in pods}
        fitting = checker.pending_with_a_legal_step(pods)
        if now == before and not fitting and all(is_refused(pod) for pod in waiting):
            return len(waiting)
        assert time.monotonic() < deadline, f"{len(waiting)} wait, of whom these would fit: {fitting}"
        before = now
        time.sleep(1.0)
