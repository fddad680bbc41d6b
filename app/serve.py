"""`tangram serve`: one process, one event loop, and its listeners.

    public    health, metrics, read API, page                        plain
    extender  kube-scheduler's four verbs                            TLS, client certificate
    agents    reports and orders                                     TLS, bearer token (decision 0008)

Without Kubernetes there are no tokens, so agents are on the public listener then, and only on loopback.
"""

import asyncio
import logging
import resource
import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
import uvloop

from app.asgi import App, beside
from app.errors import BadInput
from app.kube import connect
from app.loop import Tidying
from app.main import agent_app, build, public_app, trust_of
from app.service import Service
from app.settings import Settings
from app.verbs import Verbs

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120  # Go keeps idle connections for 90; the server must not be the first to close
BACKLOG = 4096  # agents that may knock at once after a restart; Linux allows no more by default


class _Listener(uvicorn.Server):
    """A uvicorn server that leaves the signals to us: there are several of them in this process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises BadInput for what cannot be read."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    _allow_many_connections()
    kube = None if settings.without_kubernetes else await connect(settings.kubeconfig)
    closing = asyncio.Event()
    listeners = _listeners(build(settings, kube=kube), closing)

    def stop() -> None:
        closing.set()
        for listener in listeners:
            listener.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    tidying = asyncio.create_task(Tidying().run())
    async with asyncio.TaskGroup() as group:
        for listener in listeners:
            group.create_task(_serve_one(listener, stop))
    tidying.cancel()


def _allow_many_connections() -> None:
    """Every agent keeps two connections; shells and service managers often allow 1,024 files unless asked."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve_one(listener: _Listener, stop: Callable[[], None]) -> None:
    """Serve one listener; where one ends (a taken port, say), all end."""
    try:
        await listener.serve()
    finally:
        stop()


def _listeners(service: Service, closing: asyncio.Event) -> list[_Listener]:
    settings, trust = service.settings, trust_of(service)
    for warning in trust.warnings():
        log.warning("%s", warning)
    public = public_app(service, trust, closing=closing)
    if settings.one_listener:
        return [_Listener(listener_config(beside(Verbs(service).paths, public), settings.host, settings.port))]
    extender = listener_config(Verbs(service), settings.extender_host, settings.extender_port)
    extender.lifespan = "off"
    secure(extender, settings, client_ca=settings.client_ca)
    configs = [listener_config(public, settings.host, settings.port), extender]
    if not settings.without_kubernetes:
        agents = listener_config(agent_app(service, trust, closing=closing), settings.agent_host, settings.agent_port)
        secure(agents, settings, client_ca=None)
        configs.append(agents)
    return [_Listener(config) for config in configs]


def secure(config: uvicorn.Config, settings: Settings, *, client_ca: Path | None) -> None:
    """TLS where there are certificates; with `client_ca`, only for clients that show one of it."""
    if settings.cert is not None and settings.key is not None:
        config.ssl_certfile = settings.cert
        config.ssl_keyfile = settings.key
        if client_ca is not None:
            config.ssl_ca_certs = str(client_ca)
            config.ssl_cert_reqs = ssl.CERT_REQUIRED
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"cannot use {settings.cert}, {settings.key} and {settings.client_ca}: {error}") from error
    if config.ssl is not None:
        config.ssl.num_tickets = 0  # kube-scheduler opens a connection for most binds, and resumes no session


def listener_config(app: App, host: str, port: int) -> uvicorn.Config:
    """How each of our listeners is served; benches serve what they compare with in the same way."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=20,
    )
