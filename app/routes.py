"""Paths of agents, people and probes: parse, one call, render. No decisions. kube-scheduler's are in `verbs`.

A request that we cannot read gets words and a 4xx.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response
from prometheus_client import Counter
from pydantic import ValidationError
from starlette.requests import ClientDisconnect

from app.asgi import App, Message, Receive, Send, answer, refuse
from app.errors import BadInput, KubeError
from app.handing import Unanswered
from app.report import Exchange, ExchangeReply, Listening, NodeReport, OrdersReply, ReportReply, Unchanged
from app.service import Service
from app.trust import Distrust, Trust

log = logging.getLogger(__name__)

T = TypeVar("T")
Said = TypeVar("Said", NodeReport | Unchanged, Listening, Exchange)

ORDERS_LIMIT_BYTES = 16 << 10  # a request for orders is a few names and numbers
EXCHANGE_LIMIT_BYTES = 64 << 10  # two lists of 64 devices at most

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/app.js": ("app.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def agent_routes(service: Service, trust: Trust, *, closing: asyncio.Event) -> APIRouter:
    """What agents call but for their reports. Their held requests end when the caller leaves or `closing` is set.

    An exchange is carried out to its end whether its caller still waits or not: it will ask again.
    """
    router = APIRouter()
    listens = service.metrics.listens

    @router.post("/v1/orders", response_model=OrdersReply)
    async def hand_out_orders(request: Request) -> Response:
        listening = await _said(request, read_listening, limit=ORDERS_LIMIT_BYTES, trust=trust, counter=listens)
        with service.metrics.held.track_inprogress():
            reply = await _held(request, service.orders.listen(listening), closing=closing)
        if reply is None:
            listens.labels("ended").inc()
            raise HTTPException(503, "the service is stopping, or you were gone before there was an answer")
        listens.labels(_brought(reply)).inc()
        return _json(reply.model_dump_json().encode())  # once: a node may have many pods

    @router.post("/v1/exchange")
    async def exchange(request: Request) -> ExchangeReply:
        counter = service.metrics.exchanges
        asked = await _said(request, read_exchange, limit=EXCHANGE_LIMIT_BYTES, trust=trust, counter=counter)
        reply = await service.handing.exchange(asked)
        if isinstance(reply, Unanswered):
            raise HTTPException(500 if reply.perhaps else 503, f"{reply.reason}; ask again")
        return reply

    return router


REPORTS = "/v1/reports"
AGENT_PATHS = (REPORTS, "/v1/orders", "/v1/exchange")


def report_path(service: Service, trust: Trust) -> App:
    """POST /v1/reports, as bare ASGI: 5,000 agents make 500 requests a second, nearly all of a few bytes."""
    reports, limit = service.metrics.reports, service.settings.report_limit_bytes

    async def take_report(scope: Message, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            await refuse(send, 405, "Method Not Allowed", {"Allow": "POST"})
            return
        try:
            report = await _said(Request(scope, receive), read_report, limit=limit, trust=trust, counter=reports)
        except HTTPException as error:
            await refuse(send, error.status_code, str(error.detail), error.headers)
            return
        if isinstance(report, Unchanged):
            reports.labels("unchanged").inc()
            known = service.beat(report)
        else:
            reports.labels("full").inc()
            known = service.report(report)
        await answer(send, ReportReply(resend=not known, service=service.id).model_dump_json().encode())

    return take_report


def public_routes(service: Service, trust: Trust) -> APIRouter:
    """Health, metrics, the read API and the page."""
    router = APIRouter()

    def warnings() -> list[str]:
        return [*service.warnings(), *trust.warnings()]

    @router.get("/healthz")
    async def healthz() -> Response:
        return Response(service.broken or "ok", status_code=500 if service.broken else 200, media_type="text/plain")

    @router.get("/readyz")
    async def readyz() -> Response:
        waiting_for = service.waiting_for()
        state = {"ready": not waiting_for, "waiting_for": waiting_for, "warnings": warnings()}
        return _json(orjson.dumps(state), status=503 if waiting_for else 200)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/cluster")
    async def cluster(limit: Annotated[int, Query(ge=1, le=10_000)] = 200, after: str = "") -> Response:
        service.offers.refresh(now=service.clock())
        waiting_for = service.waiting_for()
        about = {
            "ready": not waiting_for,
            "mode": "kubernetes" if service.kube is not None else "standalone",
            "waiting_for": waiting_for,
            "warnings": warnings(),
        }
        return _json(orjson.dumps({**about, **await service.views.cluster(limit=limit, after=after)}))

    @router.get("/v1/nodes/{name}")
    async def node(name: str) -> Response:
        if not service.views.knows(name):
            raise HTTPException(404, f"no agent has reported a node {name}, and nothing is held there")
        return _json(orjson.dumps(service.views.node(name)))

    @router.get("/v1/pods")
    async def pods(phase: str = "") -> Response:
        return _json(orjson.dumps({"pods": await service.views.pods(phase=phase)}))

    @router.get("/v1/pods/{uid}")
    async def pod(uid: str) -> Response:
        found = service.views.pod(uid)
        if found is None:
            raise HTTPException(404, f"Tangram knows no pod with UID {uid}: it asks for no GPU, is gone, or never came")
        return _json(orjson.dumps(found))

    @router.get("/v1/plan")
    async def plan() -> Response:
        return _json(orjson.dumps(service.views.plan(service.schedule, service.planner)))

    @router.get("/v1/costs")
    async def costs() -> Response:
        return _json(orjson.dumps(service.costs.shown()))

    if service.kube is None:

        @router.delete("/v1/pods/{uid}")
        async def release(uid: str) -> Response:
            if not service.release(uid):
                raise HTTPException(404, f"no pod with UID {uid}")
            return _json(orjson.dumps({"released": uid}))

    for path, (name, kind) in PAGE_FILES.items():
        router.add_api_route(path, _page(name, kind), methods=["GET"], include_in_schema=False)
    return router


async def body_of(request: Request, limit: int) -> bytes:
    """The whole body, or BadInput as soon as it is larger than the limit."""
    chunks = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BadInput(f"the request is larger than {limit} bytes")
            chunks.append(chunk)
    except ClientDisconnect:
        raise BadInput("the connection ended within the request") from None
    return b"".join(chunks)


def read_report(body: bytes) -> NodeReport | Unchanged:
    """An agent's report, full or unchanged. Raises BadInput naming the first field that is wrong."""
    value = _value(body, "the report")
    try:
        if isinstance(value, dict) and "gpus" not in value and "schema" not in value:
            return Unchanged.model_validate(value)
        return NodeReport.model_validate(value)
    except ValidationError as error:
        raise _first_fault(error, "the report") from None


def read_listening(body: bytes) -> Listening:
    """An agent's request for orders. Raises BadInput naming the first field that is wrong."""
    try:
        return Listening.model_validate(_value(body, "the request for orders"))
    except ValidationError as error:
        raise _first_fault(error, "the request for orders") from None


def read_exchange(body: bytes) -> Exchange:
    """An agent's wish for an exchange. Raises BadInput naming the first field that is wrong."""
    try:
        return Exchange.model_validate(_value(body, "the request for an exchange"))
    except ValidationError as error:
        raise _first_fault(error, "the request for an exchange") from None


def _value(body: bytes, what: str) -> object:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{what} is not JSON: {error}") from None


def _first_fault(error: ValidationError, what: str) -> BadInput:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or what
    return BadInput(f"{where}: {first['msg']} ({error.error_count()} faults in all)")


async def _said(request: Request, read: Callable[[bytes], Said], *, limit: int, trust: Trust, counter: Counter) -> Said:
    """What an agent says of its own node: who it is comes first, so that strangers' bodies are not even read."""
    speaker = await _speaker(request, trust, counter) if trust.checks else None
    try:
        said = read(await body_of(request, limit))
    except BadInput as error:
        counter.labels("bad").inc()
        raise HTTPException(422, str(error)) from None
    if speaker is not None and said.node != speaker:
        counter.labels("refused").inc()
        raise HTTPException(403, f"this token speaks for node {speaker}, not for {said.node}: nothing was changed")
    return said


async def _speaker(request: Request, trust: Trust, counter: Counter) -> str:
    try:
        found = await trust.node_of(request.headers.get("Authorization", ""))
    except KubeError:
        counter.labels("unchecked").inc()
        raise HTTPException(503, "the API server cannot be asked about this token now; try again") from None
    if isinstance(found, Distrust):
        counter.labels("unknown").inc()
        raise HTTPException(401, found.reason, headers={"WWW-Authenticate": "Bearer"})
    return found


async def _held(request: Request, answer: Coroutine[Any, Any, T], *, closing: asyncio.Event) -> T | None:
    """The answer, however long it takes; None, and no more work for it, if the caller leaves or we close."""
    answering = asyncio.create_task(answer)
    ends = (asyncio.create_task(_left(request)), asyncio.create_task(closing.wait()))
    try:
        await asyncio.wait((answering, *ends), return_when=asyncio.FIRST_COMPLETED)
        return answering.result() if answering.done() else None
    finally:
        for waiting in (answering, *ends):
            waiting.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _brought(reply: OrdersReply) -> str:
    if reply.orders is not None:
        return "orders"
    if reply.placements is not None:
        return "placements"
    return "resend" if reply.resend else "nothing"


def _page(name: str, kind: str) -> Callable[[], Any]:
    async def page() -> Response:
        return Response(files("app.web").joinpath(name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    return page


def _json(content: bytes, *, status: int = 200) -> Response:
    return Response(content, status_code=status, media_type="application/json")
