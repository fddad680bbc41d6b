"""The calls that we make to the API server: a narrow port (`Kube`) and its implementation.

The only file that imports a Kubernetes client. It uses `kubernetes.aio` for configuration, credentials and TLS, and
makes its calls itself, as plain JSON: model objects for every pod of a large cluster cost seconds, and on the client's
own way a call costs a third more. Errors become ours (`app.errors`): a 4xx is a definite no, all else is unknown.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import aiohttp
import orjson
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from app.errors import BadInput, Conflict, Gone, KubeError, NotFound, Refused, Unknown

Json = dict[str, Any]
FIRST_PAGE = 100  # objects; how many come next follows from how large these were
MOST_ON_A_PAGE = 500
PAGE_BYTES = 1 << 18  # reading it as JSON holds up everybody, for some 3 ms
NO_ANNOTATIONS: Mapping[str, str] = {}
CONNECTIONS = 200  # one for each bind in flight
LONGEST_LINE = 2**21  # a watch event may be larger than aiohttp's own limit
HEADERS: Mapping[str, str] = {
    "Accept": "application/json",
    "Accept-Encoding": "identity",  # else kube-apiserver packs larger answers, and unpacking is our work
    "Content-Type": "application/json",
    "User-Agent": "tangram",
}
PATCH_HEADERS: Mapping[str, str] = {**HEADERS, "Content-Type": "application/merge-patch+json"}
TOKEN_NODE = "authentication.kubernetes.io/node-name"  # noqa: S105  (the name of a fact in a TokenReview)
QUIET_SECONDS = 90.0  # API servers send bookmarks each minute; longer silence means a dead connection


@dataclass(frozen=True, slots=True)
class Listed:
    """One consistent list: its items and the resourceVersion from which to watch."""

    items: list[Json]
    resource_version: str


@dataclass(frozen=True, slots=True)
class Event:
    """One watch event: ADDED, MODIFIED, DELETED or BOOKMARK, and the object."""

    type: str
    object: Json


@dataclass(frozen=True, slots=True)
class Reviewed:
    """What the API server says of a bearer token.

    `audiences` are those that were asked about and that the token is for. `node` is where the pod runs to which the
    token is bound; kube-apiserver signs that into pods' tokens since Kubernetes 1.30. `error` says why it is none.
    """

    authenticated: bool
    username: str = ""
    audiences: tuple[str, ...] = ()
    node: str = ""
    error: str = ""


class Kube(Protocol):
    """The verbs we use. `resource` is "pods" or "nodes". All raise `KubeError`."""

    async def list(self, resource: str, *, fields: str = "") -> Listed:
        """Every object of the resource, as of now."""
        ...

    def pages(self, resource: str, *, fields: str = "") -> AsyncIterator[Listed]:
        """The same piece by piece: all of one moment, whose resourceVersion each has."""
        ...

    def watch(self, resource: str, *, resource_version: str, seconds: float) -> AsyncIterator[Event]:
        """Events after that version; ends by itself."""
        ...

    async def get_pod(self, namespace: str, name: str) -> Json:
        """The pod as it is now."""
        ...

    async def get_node(self, name: str) -> Json:
        """The node as it is now."""
        ...

    async def annotate_pod(
        self,
        namespace: str,
        name: str,
        annotations: Mapping[str, str | None],
        *,
        uid: str,
        resource_version: str = "",
        timeout: float,
    ) -> str:
        """Set annotations on the pod with that UID (and version, if given); its new resourceVersion."""
        ...

    async def annotate_node(self, name: str, annotations: Mapping[str, str | None]) -> None:
        """Set annotations; None removes one."""
        ...

    async def bind(
        self,
        namespace: str,
        name: str,
        node: str,
        *,
        uid: str,
        resource_version: str,
        annotations: Mapping[str, str] = NO_ANNOTATIONS,
        timeout: float,
    ) -> None:
        """Create the Binding, with uid and resourceVersion as preconditions; the pod gets the annotations with it."""
        ...

    async def get_lease(self, namespace: str, name: str) -> Json:
        """The Lease."""
        ...

    async def create_lease(self, namespace: str, lease: Json) -> Json:
        """A new Lease."""
        ...

    async def replace_lease(self, namespace: str, name: str, lease: Json) -> Json:
        """Replace that version of the Lease."""
        ...

    async def get_config_map(self, namespace: str, name: str) -> Json:
        """The ConfigMap."""
        ...

    async def create_config_map(self, namespace: str, config_map: Json) -> Json:
        """A new ConfigMap."""
        ...

    async def replace_config_map(self, namespace: str, name: str, config_map: Json, *, timeout: float) -> Json:
        """Replace that version of the ConfigMap."""
        ...

    async def review_token(self, token: str, *, audience: str) -> Reviewed:
        """Whose token it is, if it is one for that audience."""
        ...

    async def create_event(self, namespace: str, event: Json) -> None:
        """A new Event (events.k8s.io/v1)."""
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...


async def connect(kubeconfig: Path | None) -> "ApiServer":
    """Read the kubeconfig file, or the pod's own service account. Raises BadInput in words."""
    configuration = Configuration()
    try:
        if kubeconfig is not None:
            await load_kube_config(config_file=str(kubeconfig), client_configuration=configuration)
        else:
            load_incluster_config(client_configuration=configuration)
    except (ConfigException, OSError) as error:
        where = (
            f"kubeconfig {kubeconfig}" if kubeconfig else "the pod's service account (give --kubeconfig outside a pod)"
        )
        raise BadInput(f"cannot read {where}: {error}") from error
    return ApiServer(ApiClient(configuration))


class ApiServer:
    """`Kube` over HTTP."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._host = client.configuration.host
        self._session = _session(client)
        route = {
            "server_hostname": client.configuration.tls_server_name,
            "proxy": client.configuration.proxy,
            "proxy_headers": client.configuration.proxy_headers,
        }
        self._route: dict[str, Any] = {name: value for name, value in route.items() if value}

    async def list(self, resource: str, *, fields: str = "") -> Listed:
        """Every object, page by page, as of one moment (the most recent)."""
        pages = [page async for page in self.pages(resource, fields=fields)]
        return Listed([item for page in pages for item in page.items], pages[-1].resource_version)

    async def pages(self, resource: str, *, fields: str = "") -> AsyncIterator[Listed]:
        """Every object, page by page, as of one moment (the most recent); pages are about PAGE_BYTES large."""
        query = {"fieldSelector": fields} if fields else {}
        limit = FIRST_PAGE
        while True:
            query["limit"] = str(limit)
            text = await self._text("GET", f"/api/v1/{resource}", query=query, timeout=60)
            page = _parse(text, f"a page of {resource}")
            meta = page.get("metadata") or {}
            yield Listed(page.get("items") or [], meta.get("resourceVersion") or "")
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]
            limit = max(1, min(MOST_ON_A_PAGE, limit * PAGE_BYTES // len(text)))

    async def watch(self, resource: str, *, resource_version: str, seconds: float) -> AsyncIterator[Event]:
        """Events after that version, until the server or the time ends them. Raises Gone where it is too old."""
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=QUIET_SECONDS)
        async with self._response("GET", f"/api/v1/{resource}", query=query, timeout=timeout) as response:
            async for line in response.content:
                event = _parse(line, "a watch event")
                if event.get("type") == "ERROR":
                    raise _error(int(event["object"].get("code") or 500), f"watch {resource}", line)
                yield Event(event["type"], event["object"])

    async def get_pod(self, namespace: str, name: str) -> Json:
        """The pod as it is now."""
        return await self._json("GET", f"/api/v1/namespaces/{namespace}/pods/{name}", timeout=5)

    async def get_node(self, name: str) -> Json:
        """The node as it is now."""
        return await self._json("GET", f"/api/v1/nodes/{name}", timeout=5)

    async def annotate_pod(
        self,
        namespace: str,
        name: str,
        annotations: Mapping[str, str | None],
        *,
        uid: str,
        resource_version: str = "",
        timeout: float,
    ) -> str:
        """Set annotations (None removes) on the pod with that UID, and that version if given; the new version."""
        metadata: Json = {"uid": uid, "annotations": dict(annotations)}
        if resource_version:
            metadata["resourceVersion"] = resource_version
        patched = await self._json(
            "PATCH",
            f"/api/v1/namespaces/{namespace}/pods/{name}",
            body={"metadata": metadata},
            timeout=timeout,
        )
        return str(patched["metadata"]["resourceVersion"])

    async def annotate_node(self, name: str, annotations: Mapping[str, str | None]) -> None:
        """Set annotations on a node."""
        await self._json(
            "PATCH", f"/api/v1/nodes/{name}", body={"metadata": {"annotations": dict(annotations)}}, timeout=5
        )

    async def bind(
        self,
        namespace: str,
        name: str,
        node: str,
        *,
        uid: str,
        resource_version: str,
        annotations: Mapping[str, str] = NO_ANNOTATIONS,
        timeout: float,
    ) -> None:
        """Create the Binding. kube-apiserver honours uid and resourceVersion as preconditions (409 otherwise), and
        merges the annotations into the pod's in the same transaction that sets its node."""
        metadata: Json = {"name": name, "namespace": namespace, "uid": uid}
        if resource_version:
            metadata["resourceVersion"] = resource_version
        if annotations:
            metadata["annotations"] = dict(annotations)
        body: Json = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": metadata,
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        }
        await self._json("POST", f"/api/v1/namespaces/{namespace}/pods/{name}/binding", body=body, timeout=timeout)

    async def get_lease(self, namespace: str, name: str) -> Json:
        """The Lease, or NotFound."""
        return await self._json("GET", f"{_leases(namespace)}/{name}", timeout=5)

    async def create_lease(self, namespace: str, lease: Json) -> Json:
        """A new Lease; Conflict where somebody was faster."""
        return await self._json("POST", _leases(namespace), body=lease, timeout=5)

    async def replace_lease(self, namespace: str, name: str, lease: Json) -> Json:
        """Replace the Lease of that resourceVersion; Conflict where it has changed."""
        return await self._json("PUT", f"{_leases(namespace)}/{name}", body=lease, timeout=5)

    async def get_config_map(self, namespace: str, name: str) -> Json:
        """The ConfigMap, or NotFound."""
        return await self._json("GET", f"{_config_maps(namespace)}/{name}", timeout=5)

    async def create_config_map(self, namespace: str, config_map: Json) -> Json:
        """A new ConfigMap; Conflict where somebody was faster."""
        return await self._json("POST", _config_maps(namespace), body=config_map, timeout=5)

    async def replace_config_map(self, namespace: str, name: str, config_map: Json, *, timeout: float) -> Json:
        """Replace the ConfigMap of that resourceVersion; Conflict where it has changed."""
        return await self._json("PUT", f"{_config_maps(namespace)}/{name}", body=config_map, timeout=timeout)

    async def review_token(self, token: str, *, audience: str) -> Reviewed:
        """A TokenReview. The token is in the body only, so that no error and no log has it."""
        body: Json = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        return _reviewed(await self._json("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body, timeout=5))

    async def create_event(self, namespace: str, event: Json) -> None:
        """A new Event."""
        await self._json("POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", body=event, timeout=5)

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()
        await self._client.close()

    async def _json(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout: float,
    ) -> Json:
        text = await self._text(method, path, query=query, body=body, timeout=timeout)
        return _parse(text, f"the answer to {method} {path}")

    async def _text(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout: float,
    ) -> bytes:
        async with self._response(method, path, query=query, body=body, timeout=_within(timeout)) as response:
            return await response.read()

    @asynccontextmanager
    async def _response(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """One call; a 4xx raises `Refused`, all else that goes wrong raises `Unknown`."""
        url = f"{self._host}{path}?{urlencode(query)}" if query else self._host + path
        sent = None if body is None else orjson.dumps(body)
        try:
            async with self._session.request(
                method, url, headers=await self._headers(method), data=sent, timeout=timeout, **self._route
            ) as response:
                if response.status >= 300:
                    raise _error(response.status, f"{method} {path}", await response.read())
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unknown(f"{method} {path}: {type(error).__name__} {error}".rstrip()) from error

    async def _headers(self, method: str) -> Mapping[str, str]:
        """With the credentials, renewed where they rotate."""
        headers = PATCH_HEADERS if method == "PATCH" else HEADERS
        for credential in (await self._client.configuration.auth_settings()).values():
            headers = {**headers, credential["key"]: credential["value"]}
        return headers


def _session(client: ApiClient) -> aiohttp.ClientSession:
    """Connections with the client's certificates."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS, ssl=client.rest_client.ssl_context),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # else aiohttp looks for a netrc file in another thread at each call
        read_bufsize=LONGEST_LINE,
    )


def _within(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=seconds)


def _leases(namespace: str) -> str:
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"


def _config_maps(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/configmaps"


def _reviewed(review: Json) -> Reviewed:
    status = review.get("status") or {}
    user = status.get("user") or {}
    nodes = (user.get("extra") or {}).get(TOKEN_NODE) or [""]
    return Reviewed(
        authenticated=status.get("authenticated") is True,
        username=str(user.get("username") or ""),
        audiences=tuple(status.get("audiences") or ()),
        node=str(nodes[0]),
        error=str(status.get("error") or ""),
    )


def _parse(text: bytes, what: str) -> Json:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unknown(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Unknown(f"{what} is not an object")
    return value


def _error(status: int, what: str, body: bytes) -> KubeError:
    try:
        message = str(orjson.loads(body).get("message") or "")
    except (orjson.JSONDecodeError, AttributeError):
        message = body[:200].decode(errors="replace")
    kinds: dict[int, type[KubeError]] = {404: NotFound, 409: Conflict, 410: Gone, 429: Unknown}
    kind = kinds.get(status, Refused if 400 <= status < 500 else Unknown)
    return kind(f"{what}: {status} {message}".rstrip())
