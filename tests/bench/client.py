"""A client that costs little: one kept connection, one request at a time, over a bare socket, as kube-scheduler's
one scheduling loop asks. Whatever a client library would spend would be counted for Tangram and the echo alike, and
so make their ratio look better than it is.
"""

from __future__ import annotations

import socket
import time


class Client:
    """One connection to one server on loopback. `nanoseconds` is what the last request took, to its last byte."""

    def __init__(self, port: int, *, host: str = "127.0.0.1", timeout_seconds: float = 60.0) -> None:
        self._host = f"{host}:{port}"
        self._socket = socket.create_connection((host, port), timeout_seconds)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 22)
        self.nanoseconds = 0

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def post(self, path: str, body: bytes) -> bytes:
        """The body of a 200; anything else is a fault of the bench."""
        status, reply = self.ask("POST", path, body)
        if status != 200:
            raise RuntimeError(f"{path} was answered with {status}: {reply[:300].decode(errors='replace')}")
        return reply

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and body. The clock runs from the first byte sent to the last received."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\nUser-Agent: Go-http-client/1.1\r\n"
            f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\nAccept-Encoding: gzip\r\n\r\n"
        )
        request = head.encode() + body
        began = time.perf_counter_ns()
        self._socket.sendall(request)
        status, start, end = self._received()
        self.nanoseconds = time.perf_counter_ns() - began
        return status, bytes(self._buffer[start:end])

    def _received(self) -> tuple[int, int, int]:
        """Status, and where the body lies in the buffer."""
        have, end_of_head = 0, -1
        while end_of_head < 0:
            have += self._read(have)
            end_of_head = self._buffer.find(b"\r\n\r\n", 0, have)
        body = end_of_head + 4
        head = bytes(self._buffer[:body]).lower()
        length = int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0])
        while have < body + length:
            have += self._read(have)
        return int(head[9:12]), body, body + length

    def _read(self, have: int) -> int:
        if have == len(self._buffer):
            self._buffer.extend(bytes(len(self._buffer)))
        got = self._socket.recv_into(memoryview(self._buffer)[have:])
        if not got:
            raise ConnectionError(f"{self._host} closed the connection within a reply")
        return got
