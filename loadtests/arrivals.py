"""Which pods come and when: named mixes, traces in the openb format, Poisson arrivals. Knows nothing of locust."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.driver import PodSpec
from app.replay.trace import Pod, read_pods

GPU, MIG, SHARE = "nvidia.com/gpu", "nvidia.com/mig-", "tangram.gpu/share-milli"

Ask = tuple[str, int]
"""A resource and how much of it."""

Weights = dict[Ask, int]

WHOLE: Weights = {(GPU, 1): 8, (GPU, 2): 5, (GPU, 4): 4, (GPU, 8): 3}
SLICES: Weights = {(f"{MIG}1g.10gb", 1): 8, (f"{MIG}2g.20gb", 1): 6, (f"{MIG}3g.40gb", 1): 5, (f"{MIG}7g.80gb", 1): 1}
SHARES: Weights = {(SHARE, 250): 3, (SHARE, 500): 2, (SHARE, 100): 1}

MIXES: dict[str, Weights] = {"whole": WHOLE, "mig": SLICES, "shares": SHARES, "mixed": {**WHOLE, **SLICES, **SHARES}}


class BadMix(ValueError):
    """A mix that cannot be read, in words."""


def asks(mix: str, trace: str, rng: random.Random) -> Iterator[Ask]:
    """The pods to come, without end: of the trace in its order again and again, or drawn from the mix."""
    if trace:
        return itertools.cycle(asks_of_trace(Path(trace)))
    weights = mix_called(mix)
    return iter(lambda: rng.choices(list(weights), list(weights.values()))[0], None)


def mix_called(text: str) -> Weights:
    """A named mix, or one that is written out: `nvidia.com/gpu=4:1,nvidia.com/mig-1g.10gb=1:3`."""
    if text in MIXES:
        return MIXES[text]
    mix: Weights = {}
    for part in text.split(","):
        resource, equals, numbers = part.strip().rpartition("=")
        count, _, weight = numbers.partition(":")
        if not equals or not count.isdecimal() or not (weight or "1").isdecimal():
            raise BadMix(f"{part!r} is no mix ({', '.join(MIXES)}) and not RESOURCE=COUNT:WEIGHT")
        mix[resource, int(count)] = int(weight or 1)
    return mix


@cache
def asks_of_trace(path: Path) -> tuple[Ask, ...]:
    """What a trace's pods ask of us, in their order; those without a GPU are none of ours. Raises BadInput.

    CPU, memory and models are left out: kube-scheduler looks after the former, and the trace's models are not those
    of the cluster that is tested.
    """
    return tuple(_ask_of(pod) for pod in read_pods(path) if pod.gpus)


def _ask_of(pod: Pod) -> Ask:
    return (SHARE, pod.milli) if pod.is_share else (GPU, pod.gpus)


def pod_of(ask: Ask) -> PodSpec:
    """A pod that asks for this, like no other."""
    uid = str(uuid.uuid4())
    return PodSpec(name=f"loadtest-{uid[:8]}", uid=uid, resources=(ask,))


@dataclass(frozen=True, slots=True)
class Coming:
    """A pod to come: so long after the one before it, what it asks for, and how long it stays once it is bound."""

    after_seconds: float
    ask: Ask
    holds_seconds: float


def poisson(pods: Iterator[Ask], rng: random.Random, *, per_second: float, holding_seconds: float) -> Iterator[Coming]:
    """Each moment is as likely as any other to bring a pod, and each pod as likely as any other to leave."""
    for ask in pods:
        yield Coming(rng.expovariate(per_second), ask, rng.expovariate(1 / holding_seconds))
