"""A server that does nothing: what Tangram is compared with. `python -m loadtests.echo --port 9900`

The stack of the extender listener (uvicorn, httptools, uvloop, bare ASGI; TLS where Tangram has it), reading a request
as Tangram must (all of its body, through orjson) and answering with the bytes it was told last: PUT /taught/filter.
"""

from __future__ import annotations

import argparse
import ssl
from pathlib import PurePosixPath

import orjson
import uvicorn

from app.asgi import Message, Receive, Send, answer, refuse
from app.serve import BACKLOG, KEEP_ALIVE_SECONDS


class Echo:
    """Every verb, and a way to tell its reply."""

    def __init__(self) -> None:
        self._replies: dict[str, bytes] = {}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        path, body = scope["path"], await _body(receive)
        if scope["method"] == "PUT":
            self._replies[f"/{PurePosixPath(path).name}"] = body
            await answer(send, b"{}")
        elif path in self._replies and scope["method"] == "POST":
            orjson.loads(body)
            await answer(send, self._replies[path])
        elif path == "/readyz":
            await answer(send, b"{}")
        else:
            await refuse(send, 404, "nobody has told what to answer")


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9900)
    parser.add_argument("--cert", help="server certificate (PEM): TLS, as the extender listener has it")
    parser.add_argument("--key", help="its private key (PEM)")
    parser.add_argument("--client-ca", help="CA of the client certificates that must be shown (PEM)")
    options = parser.parse_args()
    uvicorn.run(
        Echo(),
        host=options.host,
        port=options.port,
        http="httptools",
        loop="uvloop",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ssl_certfile=options.cert,
        ssl_keyfile=options.key,
        ssl_ca_certs=options.client_ca,
        ssl_cert_reqs=ssl.CERT_REQUIRED if options.client_ca else ssl.CERT_NONE,
    )


if __name__ == "__main__":
    main()
