"""create_app(): builds every object of the service, opens and closes it. Nothing is built elsewhere, or at import."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
from fastapi import FastAPI
from pydantic import TypeAdapter, ValidationError

from app.asgi import App, beside
from app.errors import BadInput
from app.kube import Kube
from app.report import NodeReport
from app.routes import AGENT_PATHS, REPORTS, agent_routes, public_routes, report_path
from app.service import Service
from app.settings import Settings
from app.trust import Trust
from app.verbs import Verbs


def create_app(settings: Settings, *, kube: Kube | None = None, clock: Callable[[], float] = time.monotonic) -> App:
    """The service as one app with every route: for tests and for standalone use."""
    service = build(settings, kube=kube, clock=clock)
    trust, closing = trust_of(service), asyncio.Event()
    public = public_app(service, trust, closing=closing)
    if not settings.agents_are_public:
        agents = agent_app(service, trust, closing=closing)
        public = beside(dict.fromkeys(AGENT_PATHS, agents), public)
    return beside(Verbs(service).paths, public)


def build(settings: Settings, *, kube: Kube | None, clock: Callable[[], float] = time.monotonic) -> Service:
    """The service, with the inventory file read. Raises BadInput."""
    service = Service(settings, kube=kube, clock=clock)
    if settings.nodes is not None:
        for report in read_inventory(settings.nodes):
            service.report(report, lasting=True)
    return service


def trust_of(service: Service) -> Trust:
    """Who checks the service's agents."""
    settings = service.settings
    return Trust(
        service.kube,
        namespace=settings.namespace,
        account=settings.agent_account,
        seconds=settings.token_review_seconds,
        clock=service.clock,
        believe_all=settings.unauthenticated_agents,
    )


def public_app(service: Service, trust: Trust, *, closing: asyncio.Event) -> App:
    """Health, read API and page, and agents where the settings say so. Its lifespan is the service's."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Service]]:
        await service.start()
        yield {"service": service}
        await service.stop()

    app = FastAPI(title="Tangram", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.include_router(public_routes(service, trust))
    if not service.settings.agents_are_public:
        return app
    app.include_router(agent_routes(service, trust, closing=closing))
    return beside({REPORTS: report_path(service, trust)}, app)


def agent_app(service: Service, trust: Trust, *, closing: asyncio.Event) -> App:
    """Reports and orders alone, for the listener that agents reach. `closing` ends the requests that are held."""
    app = FastAPI(title="Tangram agents", openapi_url=None, docs_url=None, redoc_url=None)
    app.include_router(agent_routes(service, trust, closing=closing))
    return beside({REPORTS: report_path(service, trust)}, app)


def read_inventory(path: Path) -> Iterable[NodeReport]:
    """Read an inventory file: a JSON list of node reports, as `tangram nodes` writes it. Raises BadInput."""
    try:
        reports = TypeAdapter(list[NodeReport]).validate_python(orjson.loads(path.read_bytes()))
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except orjson.JSONDecodeError as error:
        raise BadInput(f"{path} is not JSON: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the list"
        raise BadInput(f"{path}: {where}: {first['msg']}") from error
    names = [report.node for report in reports]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise BadInput(f"{path} names {sorted(twice)[0]} more than once")
    return reports
