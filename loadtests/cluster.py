"""What a load test must know of a deployment: the nodes' names, and whether Kubernetes is behind it."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from urllib.parse import quote

DRY_RUN = {"X-Tangram-Dry-Run": "true"}
"""With this header filter and prioritize leave no trace."""

PAGE = 500  # nodes at once: the service answers nobody else while it writes a page
ANSWER_SECONDS = 30.0


class NoCluster(Exception):
    """The nodes could not be learnt, in words."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """What `/v1/cluster` says. A service that does not say that it is standalone is taken to be live."""

    live: bool
    names: tuple[str, ...]


def learn(url: str, context: ssl.SSLContext | None = None) -> Cluster:
    """Ask the public listener. Raises NoCluster."""
    names: list[str] = []
    live, after = True, ""
    while True:
        where = f"{url}/v1/cluster?limit={PAGE}&after={quote(after)}"
        try:
            with urllib.request.urlopen(where, timeout=ANSWER_SECONDS, context=context) as answer:
                page = json.load(answer)
            names += [node["name"] for node in page["nodes"]]
            live, after = page.get("mode") != "standalone", page["next"] or ""
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise NoCluster(f"{url} does not tell its nodes: {problem}") from None
        if not after:
            break
    if not names:
        raise NoCluster(f"{url} has no nodes: start it with `tangram serve --nodes FILE`")
    return Cluster(live, tuple(names))
