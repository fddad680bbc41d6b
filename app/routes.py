"""Paths: parse, one call, render. No decisions.

A request that we cannot read gets words: kube-scheduler gets them in a 200, because it reads no other body;
everybody else gets a 4xx.
"""

import logging
from collections.abc import Callable
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import ValidationError

from app import wire
from app.errors import BadInput
from app.report import NodeReport, ReportReply, Unchanged
from app.service import Service

log = logging.getLogger(__name__)

T = TypeVar("T")

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


def extender_routes(service: Service) -> APIRouter:
    """The four verbs that kube-scheduler calls."""
    router = APIRouter()
    extender, metrics = service.extender, service.metrics
    limit = service.settings.request_limit_bytes

    @router.post("/filter")
    async def filter_nodes(request: Request) -> Response:
        args: wire.Args | None = None
        with metrics.timed("filter"):
            try:
                args = wire.parse_args(await body_of(request, limit))
                result = _guarded("filter", lambda: extender.filter(args), lambda error: wire.Filtered(error=error))
            except BadInput as error:
                result = wire.Filtered(error=str(error))
            metrics.answers.labels("filter", _kind(result)).inc()
            return _json(wire.render_filter(result, args))

    @router.post("/prioritize")
    async def prioritize_nodes(request: Request) -> Response:
        with metrics.timed("prioritize"):
            try:
                args = wire.parse_args(await body_of(request, limit))
                scores = _guarded("prioritize", lambda: extender.prioritize(args), lambda _: [])
            except BadInput as error:
                log.warning("prioritize: %s", error)
                scores = []
            metrics.answers.labels("prioritize", "scored" if scores else "empty").inc()
            return _json(wire.render_scores(scores))

    @router.post("/bind")
    async def bind_pod(request: Request) -> Response:
        with metrics.timed("bind"):
            try:
                error = await extender.bind(wire.parse_bind(await body_of(request, limit)))
            except BadInput as bad:
                error = str(bad)
            except Exception as crash:
                log.exception("bind")
                error = f"a fault inside Tangram: {type(crash).__name__}"
            metrics.answers.labels("bind", "refused" if error else "bound").inc()
            return _json(wire.render_error(error))

    @router.post("/preempt")
    async def preempt_pods(request: Request) -> Response:
        with metrics.timed("preempt"):
            try:
                args = wire.parse_preempt(await body_of(request, limit))
                victims = _guarded("preempt", lambda: extender.preempt(args), lambda _: {})
            except BadInput as error:
                log.warning("preempt: %s", error)
                victims = {}
            metrics.answers.labels("preempt", "kept" if victims else "none").inc()
            return _json(wire.render_preempt(victims))

    return router


def public_routes(service: Service) -> APIRouter:
    """Health, metrics, agents, the read API and the page."""
    router = APIRouter()

    @router.get("/healthz")
    async def healthz() -> Response:
        return Response(service.broken or "ok", status_code=500 if service.broken else 200, media_type="text/plain")

    @router.get("/readyz")
    async def readyz() -> Response:
        waiting_for = service.waiting_for()
        state = {"ready": not waiting_for, "waiting_for": waiting_for, "warnings": service.warnings()}
        return _json(orjson.dumps(state), status=503 if waiting_for else 200)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.post("/v1/reports")
    async def take_report(request: Request) -> ReportReply:
        try:
            report = read_report(await body_of(request, service.settings.report_limit_bytes))
        except BadInput as error:
            service.metrics.reports.labels("bad").inc()
            raise HTTPException(422, str(error)) from None
        if isinstance(report, Unchanged):
            service.metrics.reports.labels("unchanged").inc()
            return ReportReply(resend=not service.beat(report))
        service.metrics.reports.labels("full").inc()
        return ReportReply(resend=not service.report(report))

    @router.get("/v1/cluster")
    async def cluster(limit: Annotated[int, Query(ge=1, le=10_000)] = 200, after: str = "") -> Response:
        service.offers.refresh(now=service.clock())
        waiting_for = service.waiting_for()
        about = {
            "ready": not waiting_for,
            "mode": "kubernetes" if service.kube is not None else "standalone",
            "waiting_for": waiting_for,
            "warnings": service.warnings(),
        }
        return _json(orjson.dumps({**about, **service.views.cluster(limit=limit, after=after)}))

    @router.get("/v1/nodes/{name}")
    async def node(name: str) -> Response:
        if name not in service.views.names():
            raise HTTPException(404, f"no agent has reported a node {name}, and nothing is held there")
        return _json(orjson.dumps(service.views.node(name)))

    @router.get("/v1/pods")
    async def pods(phase: str = "") -> Response:
        return _json(orjson.dumps({"pods": service.views.pods(phase=phase)}))

    @router.get("/v1/pods/{uid}")
    async def pod(uid: str) -> Response:
        found = service.views.pod(uid)
        if found is None:
            raise HTTPException(404, f"Tangram knows no pod with UID {uid}: it asks for no GPU, is gone, or never came")
        return _json(orjson.dumps(found))

    @router.get("/v1/plan")
    async def plan() -> Response:
        return _json(orjson.dumps(service.views.plan(service.schedule, service.planner)))

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
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise BadInput(f"the request is larger than {limit} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def read_report(body: bytes) -> NodeReport | Unchanged:
    """An agent's report, full or unchanged. Raises BadInput naming the first field that is wrong."""
    try:
        value = orjson.loads(body)
        if isinstance(value, dict) and "gpus" not in value and "schema" not in value:
            return Unchanged.model_validate(value)
        return NodeReport.model_validate(value)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the report is not JSON: {error}") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the report"
        raise BadInput(f"{where}: {first['msg']} ({error.error_count()} faults in all)") from None


def _guarded(verb: str, call: Callable[[], T], failed: Callable[[str], T]) -> T:
    """Our own bugs become words for the caller and a traceback in our log; the ledger is never half changed."""
    try:
        return call()
    except BadInput:
        raise
    except Exception as crash:
        log.exception("%s", verb)
        return failed(f"a fault inside Tangram: {type(crash).__name__}")


def _kind(result: wire.Filtered) -> str:
    if result.error:
        return "error"
    return "fits" if result.fitting else "refused"


def _page(name: str, kind: str) -> Callable[[], Any]:
    async def page() -> Response:
        return Response(files("app.web").joinpath(name).read_bytes(), media_type=kind, headers=PAGE_HEADERS)

    return page


def _json(content: bytes, *, status: int = 200) -> Response:
    return Response(content, status_code=status, media_type="application/json")
