"""The agent's side of `POST /v1/reports`: one kept connection, the standard library's client.

httpx would cost an agent some 15 MiB for one kind of request. Proxies of the environment are not used: the
service is in the cluster.
"""

from __future__ import annotations

import contextlib
import http.client
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from app.report import NodeReport, ReportReply, Unchanged

TIMEOUT_SECONDS = 5.0
"""For connecting and for each answer. The service only puts the report into a table."""

MAX_ANSWER_BYTES = 64 * 1024


class ReportError(Exception):
    """The service could not be reached or did not take the report. `status` is 0 where there was no answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Service:
    """Where reports go. The token is read for each report (the kubelet rotates it), the CA when connecting."""

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
        self._path = parts.path.rstrip("/") + "/v1/reports"
        self._token_file = token_file
        self._ca_file = ca_file
        self._timeout = timeout_seconds
        self._connection: http.client.HTTPConnection | None = None

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        """Send it. Raises `ReportError`. A kept connection that was closed meanwhile is opened again, once."""
        body = encode(report)
        try:
            kept = self._connection is not None
            try:
                status, answer = self._exchange(body)
            except (ConnectionError, http.client.HTTPException):
                self.close()
                if not kept:
                    raise
                status, answer = self._exchange(body)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            raise ReportError(f"cannot reach {self._host}:{self._port}: {error or type(error).__name__}") from error
        if status != 200:
            raise ReportError(f"the service answers {status}: {answer.decode(errors='replace')[:300]}", status)
        try:
            return ReportReply.model_validate_json(answer)
        except ValueError as error:
            raise ReportError(f"the service's answer is not understood: {answer[:100]!r}", status) from error

    def close(self) -> None:
        """Close the connection; the next report opens a new one."""
        if self._connection is not None:
            with contextlib.suppress(OSError):
                self._connection.close()
            self._connection = None

    def _exchange(self, body: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = self._connect()
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None:
            headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        self._connection.request("POST", self._path, body, headers)
        response = self._connection.getresponse()
        answer = response.read(MAX_ANSWER_BYTES)
        if response.will_close or not response.isclosed():
            self.close()
        return response.status, answer

    def _connect(self) -> http.client.HTTPConnection:
        if not self._https:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        context = ssl.create_default_context(cafile=str(self._ca_file) if self._ca_file else None)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout, context=context)


def encode(report: NodeReport | Unchanged) -> bytes:
    """The bytes that go over the wire."""
    return report.model_dump_json(by_alias=True).encode()
