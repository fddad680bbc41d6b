"""An extender that agrees with everything, on the service's own server stack: what being asked costs by itself.

    python -m tests.bench.nothing --port PORT --cert FILE --key FILE --client-ca FILE [--most-nodes 100]

FastAPI on uvicorn with httptools and uvloop, behind mutual TLS, set up by the very functions that set up `tangram
serve`. All nodes pass (or the first few: `--most-nodes`), with equal scores; kube-scheduler binds by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import orjson
import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response

from app.serve import listener_config, secure
from app.settings import Settings


def agreeing(most_nodes: int) -> FastAPI:
    """Filter and prioritize; `most_nodes` 0: all."""
    app = FastAPI()

    @app.post("/filter")
    async def filter_nodes(request: Request) -> Response:
        names = orjson.loads(await request.body())["NodeNames"][: most_nodes or None]
        reply = {"NodeNames": names, "FailedNodes": {}, "FailedAndUnresolvableNodes": {}, "Error": ""}
        return Response(orjson.dumps(reply), media_type="application/json")

    @app.post("/prioritize")
    async def prioritize_nodes(request: Request) -> Response:
        names = orjson.loads(await request.body())["NodeNames"]
        return Response(orjson.dumps([{"Host": name, "Score": 0} for name in names]), media_type="application/json")

    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Until killed."""
    parser = argparse.ArgumentParser(description="An extender that agrees with everything.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cert", type=Path, required=True)
    parser.add_argument("--key", type=Path, required=True)
    parser.add_argument("--client-ca", type=Path, required=True)
    parser.add_argument("--most-nodes", type=int, default=0, help="filter returns the first so many; 0: all")
    options = parser.parse_args(argv)
    settings = Settings(cert=options.cert, key=options.key, client_ca=options.client_ca)
    config = listener_config(agreeing(options.most_nodes), settings.extender_host, options.port)
    secure(config, settings, client_ca=settings.client_ca)
    uvloop.run(uvicorn.Server(config).serve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
