"""The demo's kube-scheduler against what the real one sent."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.driver import (
    PodSpec,
    Queue,
    args_body,
    binding_body,
    choose,
    fit_error,
    pod_object,
    refused_condition,
    request_bytes,
)

RECORDED = Path(__file__).parents[1] / "data" / "extender"


def _spec_of(pod: dict[str, Any]) -> PodSpec:
    """What the recorded pod's owner and the API server chose; the rest the driver must know by itself."""
    meta, spec = pod["metadata"], pod["spec"]
    requests = spec["containers"][0]["resources"]["requests"]
    return PodSpec(
        name=meta["name"],
        uid=meta["uid"],
        namespace=meta["namespace"],
        created=meta["creationTimestamp"],
        resource_version=int(meta["resourceVersion"]),
        resources=tuple((name, int(count)) for name, count in requests.items()),
        token=spec["volumes"][0]["name"].removeprefix("kube-api-access-"),
        image=spec["containers"][0]["image"],
        grace_seconds=spec["terminationGracePeriodSeconds"],
        node_selector=tuple(spec.get("nodeSelector", {}).items()),
    )


@pytest.mark.parametrize("name", ["filter", "filter-mig", "filter-one-node", "prioritize"])
def test_asks_with_the_very_bytes_of_kube_scheduler(name: str) -> None:
    """What the demo shows holds for the real caller only if the requests are the same."""
    recorded = (RECORDED / f"{name}.json").read_bytes()
    args = json.loads(recorded)

    assert args_body(pod_object(_spec_of(args["Pod"])), args["NodeNames"]) == recorded


def test_binds_with_the_very_bytes_of_kube_scheduler() -> None:
    recorded = (RECORDED / "bind.json").read_bytes()
    args = json.loads(recorded)
    pod = PodSpec(args["PodName"], args["PodUID"], (), namespace=args["PodNamespace"])

    assert binding_body(pod, args["Node"]) == recorded


@pytest.mark.parametrize("name", ["filter", "prioritize", "bind"])
def test_sends_the_headers_of_go_in_their_order(name: str) -> None:
    recorded = json.loads((RECORDED / f"{name}.headers.json").read_text())
    body = (RECORDED / f"{name}.json").read_bytes()
    head = f"{recorded['method']} {recorded['path']} HTTP/1.1\r\n"
    head += "".join(f"{key}: {value}\r\n" for key, value in recorded["headers"])

    assert request_bytes(recorded["headers"][0][1], recorded["path"], body) == head.encode() + b"\r\n" + body


def test_a_refused_pod_comes_back_with_its_condition() -> None:
    """kube-scheduler writes the refusal to the pod, so the next request is longer; recorded with a preemption."""
    recorded = json.loads((RECORDED / "filter-nominated.json").read_bytes())["Pod"]["status"]["conditions"][0]

    mine = refused_condition(recorded["message"], recorded["lastTransitionTime"])

    assert json.dumps(mine) == json.dumps(recorded)


def test_escapes_as_go_does() -> None:
    pod = PodSpec("a", "<&>\u2028é", ())

    assert b'"PodUID":"\\u003c\\u0026\\u003e\\u2028\xc3\xa9"' in binding_body(pod, "n")


class _First:
    def choice(self, names: list[str]) -> str:
        return names[0]


def test_scored_nodes_win_ties() -> None:
    rng: Any = _First()

    assert choose(["a", "b", "c"], {"b": 3, "c": 5}, rng) == "c"
    assert choose(["a", "b"], {"b": 0}, rng) == "b"
    assert choose(["a", "b"], {}, rng) == "a"


def test_refusals_are_counted_as_kube_scheduler_counts_them() -> None:
    assert fit_error({"a": "y", "b": "x", "c": "y"}, 3) == "0/3 nodes are available: 1 x, 2 y."


def test_a_refused_pod_sleeps_until_a_pod_is_deleted() -> None:
    queue = Queue()
    queue.add("a", now=0)
    assert queue.pop(now=0) == "a"
    queue.refused("a", now=0)

    assert queue.pop(now=100) is None

    queue.pod_deleted(now=100)
    assert queue.pop(now=100) == "a"


def test_backoff_doubles_up_to_its_limit() -> None:
    queue = Queue()
    queue.add("a", now=0)
    now, waits = 0.0, []
    for _ in range(6):
        assert queue.pop(now=now) == "a"
        queue.failed("a", now=now)
        at = queue.next_at()
        assert at is not None
        waits.append(at - now)
        assert queue.pop(now=at - 0.01) is None
        now = at

    assert waits == [1, 2, 4, 8, 10, 10]


def test_pods_are_tried_in_order_of_arrival() -> None:
    queue = Queue()
    for uid in ("b", "a", "c"):
        queue.add(uid, now=0)
    queue.done("a")

    assert [queue.pop(now=0) for _ in range(3)] == ["b", "c", None]
