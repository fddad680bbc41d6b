"""`tangram serve`: one process, one event loop, one or two listeners."""

import asyncio
import logging
import signal
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from fastapi import FastAPI

from app.errors import BadInput
from app.kube import connect
from app.main import build, extender_app, public_app
from app.routes import extender_routes
from app.service import Service
from app.settings import Settings

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 120  # Go keeps idle connections for 90; the server must not be the first to close


class _Listener(uvicorn.Server):
    """A uvicorn server that leaves the signals to us: there may be two of them in this process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises BadInput for what cannot be read."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings))


async def _serve(settings: Settings) -> None:
    kube = None if settings.without_kubernetes else await connect(settings.kubeconfig)
    listeners = _listeners(build(settings, kube=kube))

    def stop() -> None:
        for listener in listeners:
            listener.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    async with asyncio.TaskGroup() as group:
        for listener in listeners:
            group.create_task(_serve_one(listener, stop))


async def _serve_one(listener: _Listener, stop: Callable[[], None]) -> None:
    """Serve one listener; where one ends (a taken port, say), all end."""
    try:
        await listener.serve()
    finally:
        stop()


def _listeners(service: Service) -> list[_Listener]:
    settings = service.settings
    public = public_app(service)
    if settings.one_listener:
        public.include_router(extender_routes(service))
        return [_Listener(_config(public, settings.host, settings.port))]
    extender = _config(extender_app(service), settings.extender_host, settings.extender_port)
    if settings.cert is not None and settings.key is not None and settings.client_ca is not None:
        extender.ssl_certfile = settings.cert
        extender.ssl_keyfile = settings.key
        extender.ssl_ca_certs = str(settings.client_ca)
        extender.ssl_cert_reqs = ssl.CERT_REQUIRED
    try:
        extender.load()
    except (OSError, ssl.SSLError) as error:
        raise BadInput(f"cannot use {settings.cert}, {settings.key} and {settings.client_ca}: {error}") from error
    return [_Listener(_config(public, settings.host, settings.port)), _Listener(extender)]


def _config(app: FastAPI, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=20,
    )
