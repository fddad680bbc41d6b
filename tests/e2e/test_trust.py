"""Who is believed: real agents with their pods' tokens, and everybody else, on the real API server."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from app.trust import AUDIENCE
from solver.samples import parse_samples
from tests.e2e.cluster import ControlPlane
from tests.e2e.stack import AGENT_ACCOUNT, Knobs, Stack, agent_pod, agent_pod_name

pytestmark = pytest.mark.e2e

NODES = parse_samples("4xL4:2")
HERE, THERE = (node.name for node in NODES)
REVIEW_SECONDS = 2.0
SERVER_REMEMBERS_SECONDS = 10.0  # kube-apiserver itself looks again at a token it has accepted after this
REPORTS, ORDERS = "/v1/reports", "/v1/orders"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    knobs = Knobs(options={"token-review-seconds": str(REVIEW_SECONDS)})
    with Stack(NODES, knobs=knobs, gateways=True, form=None) as stack:
        yield stack


@pytest.fixture(scope="module")
def token(stack: Stack) -> str:
    """Of the agent on HERE."""
    return stack.agent_token(HERE)


def report(node: str) -> dict[str, Any]:
    """A report that would take all GPUs of the node away."""
    return {"schema": 1, "node": node, "boot": "the-test", "version": 1, "gpus": [], "links": []}


def listening(node: str) -> dict[str, Any]:
    return {"node": node, "boot": "the-test", "version": 1, "wait_seconds": 0}


# -- believed -----------------------------------------------------------------------------------------


def test_every_real_agent_is_believed(stack: Stack) -> None:
    """The stack is up only when all nodes are offered; nobody had to be turned away for it."""
    assert stack.service.metric('tangram_reports_total{kind="full"}') >= len(NODES)
    assert stack.service.metric('tangram_reports_total{kind="unknown"}') == 0
    assert stack.service.readiness()["warnings"] == []


def test_the_public_listener_takes_nothing_from_agents(stack: Stack, token: str) -> None:
    reply = stack.service.public_post(REPORTS, report(HERE), token=token)
    assert reply.status_code == 404


# -- not believed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [REPORTS, ORDERS])
def test_what_an_agent_says_of_another_node_is_refused_and_changes_nothing(stack: Stack, token: str, path: str) -> None:
    body = report(THERE) if path == REPORTS else listening(THERE)

    reply = stack.service.as_agent(path, body, token=token)

    assert reply.status_code == 403
    assert reply.json()["detail"] == f"this token speaks for node {HERE}, not for {THERE}: nothing was changed"
    assert len(stack.service.node(THERE)["gpus"]) == 4


def _no_token(stack: Stack) -> str | None:
    return None


def _garbage(stack: Stack) -> str:
    return "garbage"


def _changed(stack: Stack) -> str:
    """For another node, without the key to sign that."""
    head, claims, signature = stack.agent_token(HERE).split(".")
    said = _decoded(claims)
    said["kubernetes.io"]["node"]["name"] = THERE
    return ".".join((head, _encoded(said), signature))


def _expired(stack: Stack) -> str:
    """As the API server signs it, for a time that is over: it issues none for less than ten minutes."""
    head, claims, _ = stack.agent_token(HERE).split(".")
    said = _decoded(claims)
    past = int(time.time()) - 3600
    signed = f"{head}.{_encoded({**said, 'iat': past - 600, 'nbf': past - 600, 'exp': past})}"
    assert isinstance(stack.cluster, ControlPlane)
    key = serialization.load_pem_private_key(stack.cluster.signing_key.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    r, s = decode_dss_signature(key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{signed}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _for_the_api_server(stack: Stack) -> str:
    pod = agent_pod_name(HERE)
    return stack.cluster.service_account_token(AGENT_ACCOUNT, namespace=stack.namespace, pod=pod)


def _for_somebody_else(stack: Stack) -> str:
    pod = agent_pod_name(HERE)
    return stack.cluster.service_account_token(AGENT_ACCOUNT, namespace=stack.namespace, audiences=["vault"], pod=pod)


def _bound_to_no_pod(stack: Stack) -> str:
    return stack.cluster.service_account_token(AGENT_ACCOUNT, namespace=stack.namespace, audiences=[AUDIENCE])


def _of_the_services_own_account(stack: Stack) -> str:
    return stack.cluster.service_account_token(stack.account, namespace=stack.namespace, audiences=[AUDIENCE])


def _of_that_name_in_another_namespace(stack: Stack) -> str:
    """Whoever may make a service account and a pod in a namespace of their own is no agent."""
    path = "/api/v1/namespaces/default/serviceaccounts"
    stack.cluster.request("POST", path, {"metadata": {"name": AGENT_ACCOUNT}})
    stack.cluster.add_pods([agent_pod(HERE, "default")])
    return stack.cluster.service_account_token(AGENT_ACCOUNT, audiences=[AUDIENCE], pod=agent_pod_name(HERE))


NO_AGENTS = {
    _no_token: "shows its service account's token",
    _garbage: "does not accept this token",
    _changed: "does not accept this token",
    _expired: "does not accept this token",
    _for_the_api_server: "does not accept this token",
    _for_somebody_else: "does not accept this token",
    _bound_to_no_pod: "bound to no pod",
    _of_the_services_own_account: "agents are system:serviceaccount:tangram-system:tangram-agent",
    _of_that_name_in_another_namespace: "agents are system:serviceaccount:tangram-system:tangram-agent",
}


@pytest.mark.parametrize("who", NO_AGENTS, ids=lambda who: who.__name__.strip("_"))
def test_who_is_no_agent_of_ours_is_turned_away_in_words(stack: Stack, who: Any) -> None:
    shown = who(stack)
    for path, body in ((REPORTS, report(HERE)), (ORDERS, listening(HERE))):
        reply = stack.service.as_agent(path, body, token=shown)
        assert reply.status_code == 401
        assert NO_AGENTS[who] in reply.json()["detail"]
    assert len(stack.service.node(HERE)["gpus"]) == 4
    stack.cluster.delete_all_pods()


def test_no_token_is_in_any_log(stack: Stack, token: str) -> None:
    _, claims, signature = token.split(".")
    agents = (stack.cluster.directory / "agents" / "agents.log").read_text()
    for log in (stack.cluster.logs("tangram"), agents):
        assert claims not in log
        assert signature not in log


# -- bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "size"), [(REPORTS, (1 << 20) + 1), (ORDERS, (16 << 10) + 1)])
def test_a_body_that_is_too_large_is_refused_in_words(stack: Stack, token: str, path: str, size: int) -> None:
    reply = stack.service.as_agent(path, b" " * size, token=token)
    assert reply.status_code == 422
    assert "larger than" in reply.json()["detail"]


def test_a_strangers_body_is_not_even_read(stack: Stack) -> None:
    reply = stack.service.as_agent(REPORTS, b" " * (8 << 20), token=None)
    assert reply.status_code == 401


# -- what passes --------------------------------------------------------------------------------------


def test_a_deleted_agents_token_stops_working_and_a_new_agent_is_believed(stack: Stack) -> None:
    """Its node is not offered meanwhile. A new pod of the DaemonSet has a new token."""
    old = stack.agent_token(THERE)
    assert stack.service.as_agent(ORDERS, listening(THERE), token=old).status_code == 200

    stack.cluster.delete_pod(agent_pod_name(THERE), stack.namespace, grace_seconds=0)
    stack.cluster.wait_gone(agent_pod_name(THERE), namespace=stack.namespace)
    stack.wait_for(
        lambda: stack.service.as_agent(ORDERS, listening(THERE), token=old).status_code == 401,
        "the token to be refused",
        SERVER_REMEMBERS_SECONDS + REVIEW_SECONDS + 20,
    )
    stack.wait_for(lambda: not stack.service.node(THERE)["offered"], "the node to be withdrawn", 20)

    stack.cluster.add_pods([agent_pod(THERE, stack.namespace)])
    stack.real_agents.renew_token(THERE)
    stack.wait_for(lambda: stack.service.node(THERE)["offered"], "the node to be offered again", 30)


def test_while_the_api_server_is_away_nobody_new_is_believed_and_agents_come_back(stack: Stack, token: str) -> None:
    stack.api_gateway.cut()
    try:
        stack.wait_for(
            lambda: stack.service.as_agent(ORDERS, listening(HERE), token=token).status_code == 503,
            "the token to need a review",
            REVIEW_SECONDS + 10,
        )
        reply = stack.service.as_agent(REPORTS, report(HERE), token=token)
        assert (reply.status_code, "try again" in reply.json()["detail"]) == (503, True)
        stack.wait_for(lambda: not stack.service.node(HERE)["offered"], "the node to fall silent", 30)
        warnings = stack.service.readiness()["warnings"]
        assert any("tokens cannot be checked" in warning for warning in warnings), warnings
    finally:
        stack.api_gateway.mend()

    stack.service.wait_ready()
    stack.wait_reported()
    assert not any("tokens" in warning for warning in stack.service.readiness()["warnings"])


def _decoded(part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


def _encoded(claims: dict[str, Any]) -> str:
    return _base64(json.dumps(claims).encode())


def _base64(text: bytes) -> str:
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()
