"""Over HTTP: what kube-scheduler, agents, the page and strangers get."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.asgi import App
from app.errors import Unknown
from app.handing import Moved
from app.kube import Json
from app.main import agent_app, build, create_app, public_app, trust_of
from app.report import Listening, OrdersReply
from app.routes import AGENT_PATHS
from app.settings import Settings
from app.simulate import report_of
from solver import Device
from solver.samples import parse_samples, sample_node
from tests.fakes import FakeKube, pod_json

GPU = "nvidia.com/gpu"


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    path = tmp_path / "nodes.json"
    reports = [
        report_of(node).model_dump(mode="json", by_alias=True) for node in parse_samples("8xH100:2,8xA100-mig:1")
    ]
    path.write_text(json.dumps(reports))
    return path


@pytest.fixture
async def client(inventory: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(nodes=inventory, planning=False, report_limit_bytes=20_000, request_limit_bytes=200_000))
    async with (
        LifespanManager(app) as running,
        httpx.AsyncClient(transport=httpx.ASGITransport(running.app), base_url="http://tangram") as client,
    ):
        yield client


async def nodes(client: httpx.AsyncClient) -> list[str]:
    return [node["name"] for node in (await client.get("/v1/cluster")).json()["nodes"]]


async def place(client: httpx.AsyncClient, pod: Json) -> Json:
    """Filter, prioritize, bind; the placement as `/v1/` tells it."""
    names = await nodes(client)
    fits = (await client.post("/filter", json={"Pod": pod, "Nodes": None, "NodeNames": names})).json()["NodeNames"]
    scores = (await client.post("/prioritize", json={"Pod": pod, "Nodes": None, "NodeNames": fits})).json()
    node = max(scores, key=lambda each: each["Score"])["Host"]
    meta = pod["metadata"]
    bind = {"PodName": meta["name"], "PodNamespace": "default", "PodUID": meta["uid"], "Node": node}
    assert (await client.post("/bind", json=bind)).json() == {"Error": ""}
    placed: Json = (await client.get(f"/v1/pods/{meta['uid']}")).json()
    return placed


async def test_a_pod_is_placed_shown_and_released(client):
    placed = await place(client, pod_json("p", {GPU: "2"}))
    assert placed["phase"] == "held"
    assert len(placed["devices"]) == 2
    assert placed["prices"]
    assert "cheapest" in placed["reason"]

    cluster = (await client.get("/v1/cluster")).json()
    assert cluster["totals"]["gpus_held"] == 2
    assert (await client.get("/v1/pods", params={"phase": "held"})).json()["pods"][0]["uid"] == "uid-p"

    assert (await client.delete("/v1/pods/uid-p")).status_code == 200
    assert (await client.get("/v1/cluster")).json()["totals"]["gpus_held"] == 0
    assert (await client.get("/v1/pods/uid-p")).status_code == 404
    assert (await client.delete("/v1/pods/uid-p")).status_code == 404


async def test_slices_are_shown_where_they_stand(client):
    placed = await place(client, pod_json("p", {"nvidia.com/mig-3g.40gb": "1"}))
    node = (await client.get(f"/v1/nodes/{placed['node']}")).json()
    (piece,) = [piece for gpu in node["gpus"] for piece in gpu["slices"]]
    assert (piece["profile"], piece["size"], piece["pod"]["name"]) == ("3g.40gb", 4, "p")


async def test_shares_are_shown_on_their_gpu_and_counted(client):
    for name, milli in (("p", "250"), ("q", "500")):
        placed = await place(client, pod_json(name, {"tangram.gpu/share-milli": milli}))
    node = (await client.get(f"/v1/nodes/{placed['node']}")).json()
    (gpu,) = [gpu for gpu in node["gpus"] if gpu["shares"]]
    assert (gpu["phase"], gpu["pod"]) == ("shared", None)
    assert [(share["milli"], share["phase"], share["pod"]["name"]) for share in gpu["shares"]] == [
        (250, "held", "p"),
        (500, "held", "q"),
    ]
    assert placed["devices"] == [f"{gpu['uuid']}:500m"]
    assert placed["devices_in_words"] == [f"500 milli of GPU {gpu['index']}"]
    totals = (await client.get("/v1/cluster")).json()["totals"]
    assert (totals["gpus_held"], totals["gpus_shared"], totals["shares_held"], totals["milli_held"]) == (0, 1, 2, 750)


async def test_the_plan_says_that_planning_is_off(client):
    plan = (await client.get("/v1/plan")).json()
    assert (plan["planning"], plan["status"], plan["demands"]) == (False, None, [])


async def test_the_service_says_what_it_costs(client):
    """One pod went through every verb; the numbers themselves are in `test_costs`."""
    await place(client, pod_json("p", {GPU: "2"}))
    costs = (await client.get("/v1/costs")).json()

    assert {verb: said["answers"] for verb, said in costs["verbs"].items()} == {"filter": 1, "prioritize": 1, "bind": 1}
    assert all(0 < said["lately"]["p50_seconds"] <= 12 for said in costs["verbs"].values())
    assert (costs["sizes"]["nodes"], costs["sizes"]["pods_held"], costs["sizes"]["demands"]) == (3, 1, 1)


async def test_waiting_pods_are_shown_with_the_reason(client):
    names = await nodes(client)
    await client.post("/filter", json={"Pod": pod_json("p", {GPU: "9"}), "Nodes": None, "NodeNames": names})
    (pod,) = (await client.get("/v1/pods")).json()["pods"]
    assert pod["phase"] == "waiting"
    assert "9" in pod["reason"]


async def test_the_cluster_is_paged(client):
    first = (await client.get("/v1/cluster", params={"limit": 2})).json()
    rest = (await client.get("/v1/cluster", params={"limit": 2, "after": first["next"]})).json()
    assert len(first["nodes"]) == 2
    assert len(rest["nodes"]) == 1
    assert rest["next"] is None


@pytest.mark.parametrize("verb", ["filter", "prioritize", "bind", "preempt"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"Pod": {"metadata": 7}}', b"x" * 300_000])
async def test_broken_bodies_get_words_with_status_200_and_no_traceback(client, verb, body):
    """kube-scheduler reads no body but that of a 200."""
    answer = await client.post(f"/{verb}", content=body)
    assert answer.status_code == 200
    assert "Traceback" not in answer.text
    if verb in ("filter", "bind"):
        assert answer.json()["Error"]


pods = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["metadata", "spec", "uid", "name", "containers", "resources", "limits", GPU, "annotations", "status"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(pod=pods)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
async def test_no_pod_however_broken_makes_a_fault_inside(client, pod):
    for verb in ("filter", "prioritize"):
        answer = await client.post(f"/{verb}", json={"Pod": pod, "Nodes": None, "NodeNames": ["8xh100-0"]})
        assert answer.status_code == 200
        assert "fault inside" not in answer.text


async def test_reports_are_taken_in_full_and_then_in_a_few_bytes(client):
    report = report_of(parse_samples("8xL40S:1")[0]).model_copy(update={"boot": "b", "version": 3})
    unchanged = {"node": report.node, "boot": "b", "version": 3}
    assert (await client.post("/v1/reports", json=unchanged)).json()["resend"] is True
    full = await client.post("/v1/reports", content=report.model_dump_json(by_alias=True))
    assert (full.status_code, full.json()["resend"]) == (200, False)
    assert full.json()["service"]
    assert (await client.post("/v1/reports", json=unchanged)).json() == full.json()
    assert (await client.post("/v1/reports", json={**unchanged, "boot": "c"})).json()["resend"] is True
    assert report.node in await nodes(client)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "NodeReport"),
        (b'{"schema": 2, "node": "n", "version": 1}', "schema"),
        (b'{"schema": 1, "node": "", "version": 1}', "node"),
        (b'{"schema": 1, "node": "n", "version": 1, "gpus": [{"uuid": "a", "index": 0}]}', "gpus.0.product"),
        (b'{"schema": 1, "node": "n", "version": 1, "gpus": [], "links": [{"a": "x", "b": "y"}]}', "link"),
        (b'{"node": "n"}', "boot"),
        (b'"' + b"x" * 30_000 + b'"', "larger"),
    ],
)
async def test_broken_reports_are_refused_in_words_and_change_nothing(client, report, words):
    before = (await client.get("/v1/cluster")).json()["totals"]
    answer = await client.post("/v1/reports", content=report)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert (await client.get("/v1/cluster")).json()["totals"] == before


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "Listening"),
        (b'{"node": "n", "version": 1}', "boot"),
        (b'{"node": "n", "boot": "b", "version": 1, "wait_seconds": 3600}', "wait_seconds"),
        (b'"' + b"x" * 17_000 + b'"', "larger"),
    ],
)
async def test_broken_requests_for_orders_are_refused_in_words(client, body, words):
    answer = await client.post("/v1/orders", content=body)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]


async def test_who_asks_for_orders_without_a_report_is_asked_for_one_at_once(client):
    asked = {"node": "stranger", "boot": "b", "version": 1, "wait_seconds": 60}
    answer = (await client.post("/v1/orders", json=asked)).json()
    assert (answer["resend"], answer["orders"]) == (True, None)
    assert answer["service"]
    assert 'tangram_listens_total{kind="resend"} 1.0' in (await client.get("/metrics")).text


async def test_health_readiness_and_metrics_answer(client):
    assert (await client.get("/healthz")).text == "ok"
    assert (await client.get("/readyz")).json()["ready"] is True
    await client.post("/filter", json={"Pod": pod_json("p", {GPU: "1"}), "Nodes": None, "NodeNames": ["8xh100-0"]})
    text = (await client.get("/metrics")).text
    assert 'tangram_answers_total{kind="fits",verb="filter"} 1.0' in text
    assert "tangram_pods" in text


async def test_a_profile_missing_from_managed_resources_is_a_warning(client):
    report = report_of(parse_samples("8xA100-mig:1")[0])
    assert report.gpus[0].mig is not None
    profile = report.gpus[0].mig.profiles[0].model_copy(update={"name": "1g.11gb"})
    mig = report.gpus[0].mig.model_copy(update={"profiles": (profile,)})
    strange = report.model_copy(
        update={"node": "odd", "gpus": (report.gpus[0].model_copy(update={"mig": mig}),), "links": ()}
    )
    await client.post("/v1/reports", content=strange.model_dump_json(by_alias=True))

    assert any("nvidia.com/mig-1g.11gb" in warning for warning in (await client.get("/readyz")).json()["warnings"])
    assert 'tangram_unmanaged_profiles{state="now"} 1.0' in (await client.get("/metrics")).text


async def test_the_page_is_served_with_a_policy_that_allows_nothing_foreign(client):
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]


async def test_two_apps_do_not_leak_into_each_other(client, inventory):
    await place(client, pod_json("p", {GPU: "2"}))
    other = create_app(Settings(nodes=inventory, planning=False))
    async with (
        LifespanManager(other) as running,
        httpx.AsyncClient(transport=httpx.ASGITransport(running.app), base_url="http://other") as second,
    ):
        assert (await second.get("/v1/cluster")).json()["totals"]["gpus_held"] == 0


# -- agents in Kubernetes: who speaks, and for which node ---------------------------------------------


class Agents:
    """The agents' listener of a service on a fake API server that knows the token of node n1's agent.

    `requests`: what reached it; `orders` answers requests for orders.
    """

    def __init__(self, **knobs: Any) -> None:
        self.kube = FakeKube()
        self.kube.add_token("of-n1", "tangram-system:tangram-agent", node="n1")
        self.service = build(Settings(plain=True, planning=False, **knobs), kube=self.kube)
        self.closing = asyncio.Event()
        self.app = agent_app(self.service, trust_of(self.service), closing=self.closing)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://agents")

    async def post(self, path: str, body: object, *, token: str | None = "of-n1") -> httpx.Response:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return await self.http.post(path, json=body, headers=headers)

    def reports(self, kind: str) -> float:
        return self.service.metrics.registry.get_sample_value("tangram_reports_total", {"kind": kind}) or 0.0


def full_report(node: str) -> Json:
    found: Json = report_of(sample_node(node, "8xL40S")).model_dump(mode="json", by_alias=True)
    return found


@pytest.fixture
def agents() -> Agents:
    return Agents()


async def test_an_agent_speaks_for_its_own_node(agents):
    answer = await agents.post("/v1/reports", full_report("n1"))
    assert (answer.status_code, answer.json()) == (200, {"resend": False, "service": agents.service.id})
    assert list(agents.service.inventory) == ["n1"]


@pytest.mark.parametrize("path", ["/v1/reports", "/v1/orders", "/v1/exchange"])
async def test_what_is_said_of_another_node_is_refused_and_changes_nothing(agents, path):
    for body in (full_report("n2"), {"node": "n2", "boot": "b", "version": 1}):
        if path == "/v1/orders":
            body = {"node": "n2", "boot": "b", "version": 1}
        if path == "/v1/exchange":
            body = {"node": "n2", "uid": "u", "give": [{"gpu": "A"}], "take": [{"gpu": "B"}]}
        answer = await agents.post(path, body)
        assert answer.status_code == 403
        assert answer.json()["detail"].startswith("this token speaks for node n1, not for n2")
    assert not list(agents.service.inventory)
    assert agents.reports("refused") == (2 if path == "/v1/reports" else 0)


async def test_an_exchange_is_answered_or_it_is_said_whether_it_was_perhaps_made(agents, monkeypatch):
    asked = {"node": "n1", "uid": "u", "give": [{"gpu": "A"}], "take": [{"gpu": "B"}]}
    answer = await agents.post("/v1/exchange", asked)
    assert answer.status_code == 503
    assert "not ready" in answer.json()["detail"]

    monkeypatch.setattr(agents.service.handing, "_not_ready", list)
    answer = await agents.post("/v1/exchange", asked)
    assert (answer.status_code, answer.json()["granted"]) == (200, False)

    gone = Moved(frozenset({Device("B")}), (), report_of(sample_node("n1", "8xL40S")))
    monkeypatch.setattr(agents.service.handing, "_exchange", lambda _: gone)
    assert (await agents.post("/v1/exchange", asked)).status_code == 500

    assert (await agents.post("/v1/exchange", {**asked, "take": []})).status_code == 422


@pytest.mark.parametrize("token", [None, "garbage"])
@pytest.mark.parametrize("path", ["/v1/reports", "/v1/orders", "/v1/exchange"])
async def test_without_a_good_token_not_even_the_body_is_read(agents, path, token):
    answer = await agents.post(path, "x" * (2 << 20), token=token)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "token" in answer.json()["detail"]


async def test_while_tokens_cannot_be_reviewed_agents_are_told_to_come_again(agents):
    def away() -> None:
        raise Unknown("POST tokenreviews: TimeoutError")

    agents.kube.before["review_token"] = away
    answer = await agents.post("/v1/reports", full_report("n1"))
    assert answer.status_code == 503
    assert "try again" in answer.json()["detail"]
    assert not list(agents.service.inventory)

    agents.kube.before.clear()
    assert (await agents.post("/v1/reports", full_report("n1"))).status_code == 200


async def test_the_public_listener_takes_no_reports_in_kubernetes(agents):
    """Tokens must not travel in the clear."""
    public = public_app(agents.service, trust_of(agents.service), closing=agents.closing)
    assert await posts_to(public) == set()
    assert await posts_to(agents.app) == set(AGENT_PATHS)


async def test_unauthenticated_agents_are_believed_everywhere_and_that_is_said():
    agents = Agents(unauthenticated_agents=True)
    public = public_app(agents.service, trust_of(agents.service), closing=agents.closing)
    assert await posts_to(public) == set(AGENT_PATHS)
    assert (await agents.post("/v1/reports", full_report("n2"), token=None)).status_code == 200
    async with httpx.AsyncClient(transport=httpx.ASGITransport(public), base_url="http://public") as client:
        warnings = (await client.get("/readyz")).json()["warnings"]
    assert any("--unauthenticated-agents" in warning for warning in warnings)


@pytest.mark.parametrize("where", ["host", "agent_host"])
def test_unauthenticated_agents_are_for_this_machine_only(where):
    with pytest.raises(ValidationError, match="--unauthenticated-agents is for loopback"):
        Settings.model_validate({"standalone": True, "unauthenticated_agents": True, where: "10.0.0.1"})


async def posts_to(app: App) -> set[str]:
    """The agents' paths that it serves: what it cannot read there is no 404."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tangram") as client:
        return {path for path in AGENT_PATHS if (await client.post(path, content=b"?")).status_code != 404}


# -- requests that are held ---------------------------------------------------------------------------


class Never:
    """Orders that never come; knows who waits."""

    def __init__(self) -> None:
        self.waiting = 0
        self.asked = asyncio.Event()

    async def listen(self, said: Listening) -> OrdersReply:
        self.waiting += 1
        self.asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError


@pytest.fixture
def never(agents: Agents, monkeypatch: pytest.MonkeyPatch) -> Never:
    never = Never()
    monkeypatch.setattr(agents.service, "orders", never)
    return never


async def test_a_held_request_ends_when_the_service_stops(agents, never):
    """Else each restart would wait for thousands of them."""
    held = asyncio.create_task(agents.post("/v1/orders", {"node": "n1", "boot": "b", "version": 1}))
    await asyncio.wait_for(never.asked.wait(), 10)
    agents.closing.set()
    answer = await asyncio.wait_for(held, 10)
    assert (answer.status_code, never.waiting) == (503, 0)


async def test_who_leaves_is_not_waited_for_any_more(agents, never):
    body = b'{"node": "n1", "boot": "b", "version": 1}'
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/orders",
        "query_string": b"",
        "headers": [(b"authorization", b"Bearer of-n1")],
    }

    async def send(message: Any) -> None:
        pass

    held = asyncio.create_task(agents.app(scope, messages.get, send))
    await asyncio.wait_for(never.asked.wait(), 10)
    messages.put_nowait({"type": "http.disconnect"})
    await asyncio.wait_for(held, 10)
    assert never.waiting == 0
