"""The agent's side of `POST /v1/reports`, `/v1/orders` and `/v1/exchange`: one kept connection, the standard library's
client.

httpx would cost an agent some 15 MiB for three kinds of request. Proxies of the environment are not used: the
service is in the cluster. A request that is held open wants a connection of its own, so a second `Service`; so do
exchanges, which other threads ask for, so a third.
"""

from __future__ import annotations

import contextlib
import http.client
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from app.report import Exchange, ExchangeReply, Listening, NodeReport, OrdersReply, ReportReply, Unchanged

TIMEOUT_SECONDS = 5.0
"""For connecting, and for each answer beyond what it may be held. The service only puts the report into a table."""

MAX_ANSWER_BYTES = 1 << 20
"""An order list for 8 GPUs of 7 slices is some 10 kB, the placements of 110 pods some 30."""

Reply = TypeVar("Reply", ReportReply, OrdersReply, ExchangeReply)


class ReportError(Exception):
    """The service could not be reached or did not take it. `status` is 0 where there was no answer.

    `arrived`: whether the request may have been carried out all the same; False only where it certainly was not (no
    connection; a request that is refused as such; a service that is not there for the one who forwards to it).
    """

    def __init__(self, text: str, status: int = 0, *, arrived: bool = True) -> None:
        super().__init__(text)
        self.status = status
        self.arrived = arrived


class Service:
    """Where reports go and orders come from; not for two threads.

    The token is read for each request (the kubelet rotates it), the CA when connecting.
    """

    def __init__(
        self,
        url: str,
        *,
        token_file: Path | None = None,
        ca_file: Path | None = None,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the service's URL must be http://host:port or https://host:port, not {url!r}")
        self._https = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port or (443 if self._https else 80)
        self._root = parts.path.rstrip("/")
        self._token_file = token_file
        self._ca_file = ca_file
        self._timeout = timeout_seconds
        self._connection: http.client.HTTPConnection | None = None

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        """Send it. Raises `ReportError`."""
        return self._ask("/v1/reports", encode(report), self._timeout, ReportReply)

    def listen(self, listening: Listening) -> OrdersReply:
        """Wait for orders, as long as `listening` says. Raises `ReportError`."""
        return self._ask("/v1/orders", encode(listening), listening.wait_seconds + self._timeout, OrdersReply)

    def exchange(self, exchange: Exchange) -> ExchangeReply:
        """Ask whether a pod may have what the kubelet counts for it. Raises `ReportError`.

        On a connection of its own: one that was closed while idle would leave open whether it has arrived.
        """
        self.close()
        try:
            self._connection = self._connect()
            self._connection.connect()
        except (OSError, ValueError) as error:
            self.close()
            raise ReportError(self._unreached(error), arrived=False) from error
        try:
            return self._ask("/v1/exchange", encode(exchange), self._timeout, ExchangeReply, anew=False)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def _ask(self, path: str, body: bytes, seconds: float, reply: type[Reply], *, anew: bool = True) -> Reply:
        """A kept connection that was closed meanwhile is opened again (`anew`), once."""
        try:
            kept = anew and self._connection is not None
            try:
                status, answer = self._exchange(path, body, seconds)
            except (ConnectionError, http.client.HTTPException):
                self.close()
                if not kept:
                    raise
                status, answer = self._exchange(path, body, seconds)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            raise ReportError(self._unreached(error)) from error
        if status != 200:
            words = f"the service answers {status}: {answer.decode(errors='replace')[:300]}"
            raise ReportError(words, status, arrived=status >= 500 and status != 503)
        try:
            return reply.model_validate_json(answer)
        except ValueError as error:
            raise ReportError(f"the service's answer is not understood: {answer[:100]!r}", status) from error

    def _exchange(self, path: str, body: bytes, seconds: float) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = self._connect()
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None:
            headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        if self._connection.sock is None:
            self._connection.connect()
        self._connection.sock.settimeout(seconds)
        self._connection.request("POST", self._root + path, body, headers)
        response = self._connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES)
        if response.will_close or not response.isclosed():
            self.close()
        return response.status, answer

    def _unreached(self, error: Exception) -> str:
        return f"cannot reach {self._host}:{self._port}: {error or type(error).__name__}"

    def _connect(self) -> http.client.HTTPConnection:
        if not self._https:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        import ssl  # only where it is used

        context = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context)


def encode(message: NodeReport | Unchanged | Listening | Exchange) -> bytes:
    """The bytes that go over the wire."""
    return message.model_dump_json(by_alias=True).encode()
