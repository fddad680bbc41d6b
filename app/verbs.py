"""kube-scheduler's four verbs over HTTP, as a bare ASGI application: parse, one call, render. No decisions.

Every pod waits for these on kube-scheduler's one serial path, so nothing is between them and the server: a web
framework's routing, validation and responses cost more here than the answers themselves (docs/decisions/0013). What we
cannot read gets words in a 200, since kube-scheduler reads no other body.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from app import wire
from app.asgi import App, Message, Receive, Send, answer, refuse
from app.errors import BadInput
from app.service import Service

log = logging.getLogger(__name__)

TRIAL_HEADER = b"x-tangram-dry-run"
"""With `true` filter and prioritize leave no trace: load testers ask a live service so."""


class Verbs:
    """POST /filter, /prioritize, /bind and /preempt."""

    def __init__(self, service: Service) -> None:
        self._extender, self._binder, self._metrics = service.extender, service.binder, service.metrics
        self._limit = service.settings.request_limit_bytes
        self._verbs = {
            "/filter": self._filter,
            "/prioritize": self._prioritize,
            "/bind": self._bind,
            "/preempt": self._preempt,
        }

    @property
    def paths(self) -> Mapping[str, App]:
        """What it answers."""
        return dict.fromkeys(self._verbs, self)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        verb = self._verbs.get(scope["path"])
        if verb is None:
            await refuse(send, 404, "Not Found")
        elif scope["method"] != "POST":
            await refuse(send, 405, "Method Not Allowed", {"Allow": "POST"})
        else:
            with self._metrics.timed(scope["path"][1:]):
                body: bytes | BadInput
                try:
                    body = await _body(receive, self._limit)
                except BadInput as error:
                    body = error
                content = await verb(body, scope)
            await answer(send, content)

    async def _filter(self, body: bytes | BadInput, scope: Message) -> bytes:
        args: wire.Args | None = None
        try:
            args = wire.parse_args(_readable(body))
            result = await self._extender.filter_in_turns(args, trial=_is_trial(scope))
        except BadInput as error:
            result = wire.Filtered(error=str(error))
        except Exception as crash:
            result = wire.Filtered(error=_fault("filter", crash))
        self._metrics.answers.labels("filter", _kind(result)).inc()
        return wire.render_filter(result, args)

    async def _prioritize(self, body: bytes | BadInput, scope: Message) -> bytes:
        try:
            args = wire.parse_args(_readable(body))
            scores = self._extender.prioritize(args, trial=_is_trial(scope))
        except BadInput as error:
            log.warning("prioritize: %s", error)
            scores = wire.Scored()
        except Exception as crash:
            _fault("prioritize", crash)
            scores = wire.Scored()
        self._metrics.answers.labels("prioritize", "scored" if scores else "empty").inc()
        return wire.render_scores(scores)

    async def _bind(self, body: bytes | BadInput, _: Message) -> bytes:
        try:
            error = await self._binder.bind(wire.parse_bind(_readable(body)))
        except BadInput as bad:
            error = str(bad)
        except Exception as crash:
            error = _fault("bind", crash)
        self._metrics.answers.labels("bind", "refused" if error else "bound").inc()
        return wire.render_error(error)

    async def _preempt(self, body: bytes | BadInput, _: Message) -> bytes:
        try:
            victims = self._extender.preempt(wire.parse_preempt(_readable(body)))
        except BadInput as error:
            log.warning("preempt: %s", error)
            victims = {}
        except Exception as crash:
            _fault("preempt", crash)
            victims = {}
        self._metrics.answers.labels("preempt", "kept" if victims else "none").inc()
        return wire.render_preempt(victims)


async def _body(receive: Receive, limit: int) -> bytes:
    """The whole body, or BadInput as soon as it is larger than the limit."""
    chunks = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BadInput("the connection ended within the request")
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BadInput(f"the request is larger than {limit} bytes")
        chunks.append(chunk)
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _readable(body: bytes | BadInput) -> bytes:
    if isinstance(body, BadInput):
        raise body
    return body


def _is_trial(scope: Message) -> bool:
    return any(name == TRIAL_HEADER and value.lower() == b"true" for name, value in scope["headers"])


def _fault(verb: str, crash: Exception) -> str:
    """Our own bugs become words for the caller and a traceback in our log; the ledger is never half changed."""
    log.error("%s", verb, exc_info=crash)
    return f"a fault inside Tangram: {type(crash).__name__}"


def _kind(result: wire.Filtered) -> str:
    if result.error:
        return "error"
    return "fits" if result.fitting else "refused"
