"""A server that does nothing: what Tangram is compared with. `python -m loadtests.echo --port 9900`

The stack of the extender listener (uvicorn, httptools, uvloop, FastAPI; TLS where Tangram has it), reading a request
as Tangram must (all of its body, through orjson) and answering with the bytes it was told last: PUT /taught/filter.
"""

import argparse
import ssl

import orjson
import uvicorn
from fastapi import FastAPI, Request, Response

from app.serve import BACKLOG, KEEP_ALIVE_SECONDS


def create_echo() -> FastAPI:
    """The verbs, as `app.routes` has them, and a way to tell the replies."""
    echo = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    replies: dict[str, bytes] = {}

    def answer(verb: str) -> None:
        @echo.post(f"/{verb}")
        async def repeat(request: Request) -> Response:
            orjson.loads(await request.body())
            return Response(replies[verb], media_type="application/json")

    for verb in ("filter", "prioritize", "bind"):
        answer(verb)

    @echo.put("/taught/{verb}")
    async def teach(verb: str, request: Request) -> Response:
        replies[verb] = await request.body()
        return Response()

    @echo.get("/readyz")
    async def readyz() -> Response:
        return Response("ok")

    return echo


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
        create_echo(),
        host=options.host,
        port=options.port,
        http="httptools",
        loop="uvloop",
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
