"""extender/v1 JSON exactly as kube-scheduler speaks it: Go's field names live here and nowhere else.

Requests are raw bytes through one fast parser; 5,000 node names never become model objects. Keys are read
without regard to case, as Go reads them. Sources: k8s.io/kube-scheduler/extender/v1/types.go and
pkg/scheduler/extender.go of Kubernetes 1.34 to 1.37.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from app.errors import BadInput
from app.translate import PodRef
from solver import Refusal

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Args:
    """ExtenderArgs: a pod and the nodes that are still possible. `nodes` is set in the `Nodes` mode only."""

    pod: Json
    names: list[str]
    nodes: list[Json] | None = None


Left = Mapping[Refusal, Sequence[str]]
"""The nodes that are left out, by why."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """ExtenderFilterResult; `error` fails the whole call and is retried."""

    fitting: Sequence[str] = ()
    left: Left = field(default_factory=dict)
    error: str = ""

    @property
    def failed(self) -> dict[str, str]:
        """The words by node, where evicting pods could help."""
        return {name: why.reason for why, names in self.left.items() for name in names if why.resolvable}

    @property
    def unresolvable(self) -> dict[str, str]:
        """The words by node, where it could not."""
        return {name: why.reason for why, names in self.left.items() for name in names if not why.resolvable}


@dataclass(frozen=True, slots=True)
class Scored:
    """HostPriorityList: the nodes by their score, the best first, and the one of those that gets one more."""

    by_score: Sequence[tuple[int, Collection[str]]] = ()
    choice: str = ""

    def __bool__(self) -> bool:
        return bool(self.by_score)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        for score, names in self.by_score:
            yield from ((name, score + (name == self.choice)) for name in names)


@dataclass(frozen=True, slots=True)
class BindArgs:
    """ExtenderBindingArgs."""

    pod: PodRef
    node: str


@dataclass(frozen=True, slots=True)
class Victims:
    """The pods (UIDs) whose eviction kube-scheduler considers on one node."""

    uids: tuple[str, ...]
    pdb_violations: int


@dataclass(frozen=True, slots=True)
class PreemptArgs:
    """ExtenderPreemptionArgs, from either of its two forms."""

    pod: Json
    victims: Mapping[str, Victims]


def parse_args(body: bytes) -> Args:
    """Read a filter or prioritize request. Raises BadInput."""
    request = _request(body)
    pod = _pod(request)
    names = request.get("nodenames")
    if names is not None:
        return Args(pod, _names(names))
    nodes = request.get("nodes")
    if nodes is None:
        return Args(pod, [])
    items = nodes.get("items") if isinstance(nodes, dict) else None
    if items is None and isinstance(nodes, dict):
        items = []
    if not isinstance(items, list):
        raise BadInput("Nodes.items is not a list")
    try:
        return Args(pod, _names([item["metadata"]["name"] for item in items]), items)
    except (TypeError, KeyError):
        raise BadInput("Nodes.items has an entry without metadata.name") from None


def parse_bind(body: bytes) -> BindArgs:
    """Read a bind request. Raises BadInput."""
    request = _request(body)
    values = [request.get(key) for key in ("poduid", "podnamespace", "podname", "node")]
    for value, name in zip(values, ("PodUID", "PodNamespace", "PodName", "Node"), strict=True):
        if not isinstance(value, str) or not value or len(value) > 253 or not _plain(value):
            raise BadInput(f"{name} is {_short(value)}, wanted a name")
    uid, namespace, name, node = (str(value) for value in values)
    return BindArgs(PodRef(uid, namespace, name), node)


def parse_preempt(body: bytes) -> PreemptArgs:
    """Read a preempt request. Raises BadInput."""
    request = _request(body)
    by_node = request.get("nodenametometavictims")
    full = by_node is None
    if full:
        by_node = request.get("nodenametovictims") or {}
    if not isinstance(by_node, dict):
        raise BadInput("the victims are not an object of nodes")
    return PreemptArgs(_pod(request), {name: _victims(name, value, full=full) for name, value in by_node.items()})


def render_filter(result: Filtered, args: Args | None) -> bytes:
    """ExtenderFilterResult in the mode that was asked in. Lists are `[]`, never null."""
    nodes, names = b"null", b"null"
    if args is not None and args.nodes is not None:
        fitting = set(result.fitting)
        kept = [node for name, node in zip(args.names, args.nodes, strict=True) if name in fitting]
        nodes = orjson.dumps({"metadata": {}, "items": kept})
    else:
        names = orjson.dumps(result.fitting if isinstance(result.fitting, list) else [*result.fitting])
    return b'{"Nodes":%b,"NodeNames":%b,"FailedNodes":%b,"FailedAndUnresolvableNodes":%b,"Error":%b}' % (
        nodes,
        names,
        _render_left([each for each in result.left.items() if each[0].resolvable]),
        _render_left([each for each in result.left.items() if not each[0].resolvable]),
        orjson.dumps(result.error),
    )


def _render_left(left: Sequence[tuple[Refusal, Sequence[str]]]) -> bytes:
    """An object of node and words: thousands of nodes have few different reasons, so each is joined with its nodes."""
    parts = []
    for why, names in left:
        if not names:
            continue
        words = orjson.dumps(why.reason).decode()
        if _all_plain(names):
            parts.append('"' + f'":{words},"'.join(names) + f'":{words}')
        else:
            parts.append(orjson.dumps(dict.fromkeys(names, why.reason)).decode()[1:-1])
    return ("{" + ",".join(parts) + "}").encode()


def render_scores(scored: Scored) -> bytes:
    """HostPriorityList: a bare array, whole numbers only (Go refuses 5.0)."""
    parts = []
    for rank, (score, names) in enumerate(scored.by_score):
        if rank == 0 and scored.choice in names:
            parts.append(orjson.dumps({"Host": scored.choice, "Score": score + 1}).decode())
            names = [name for name in names if name != scored.choice]
        if not names:
            continue
        if _all_plain(names):
            parts.append('{"Host":"' + f'","Score":{score}}},{{"Host":"'.join(names) + f'","Score":{score}}}')
        else:
            parts.append(orjson.dumps([{"Host": name, "Score": score} for name in names]).decode()[1:-1])
    return ("[" + ",".join(parts) + "]").encode()


def _all_plain(names: Iterable[str]) -> bool:
    """Whether no name needs an escape in JSON. Names of Kubernetes never do; those from the wire may be anything."""
    together = "".join(names)
    return together.isascii() and together.isprintable() and '"' not in together and "\\" not in together


def render_error(error: str) -> bytes:
    """ExtenderBindingResult; empty for success."""
    return orjson.dumps({"Error": error})


def render_preempt(victims: Mapping[str, Victims]) -> bytes:
    """ExtenderPreemptionResult, always in meta form."""
    return orjson.dumps(
        {
            "NodeNameToMetaVictims": {
                name: {"Pods": [{"UID": uid} for uid in each.uids], "NumPDBViolations": each.pdb_violations}
                for name, each in victims.items()
            }
        }
    )


def _request(body: bytes) -> Json:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise BadInput(f"the request is {_short(request)}, wanted an object")
    return {key.lower(): value for key, value in request.items()}


def _pod(request: Json) -> Json:
    pod = request.get("pod")
    if not isinstance(pod, dict):
        raise BadInput(f"Pod is {_short(pod)}, wanted a pod")
    return pod


def _names(names: object) -> list[str]:
    if not isinstance(names, list):
        raise BadInput(f"NodeNames is {_short(names)}, wanted a list of names")
    try:
        "".join(names)  # a look at each of 5,000 names in Python would take as long as parsing them
    except TypeError:
        wrong = next(name for name in names if type(name) is not str)
        raise BadInput(f"NodeNames has {_short(wrong)}, wanted names") from None
    return names


def _victims(node: str, value: object, *, full: bool) -> Victims:
    pods = value.get("Pods") if isinstance(value, dict) else None
    if pods is None:
        pods = []
    if not isinstance(value, dict) or not isinstance(pods, list):
        raise BadInput(f"the victims on {node} are {_short(value)}, wanted an object with Pods")
    violations = value.get("NumPDBViolations") or 0
    try:
        uids = tuple(str(pod["metadata"]["uid"] if full else pod["UID"]) for pod in pods)
    except (TypeError, KeyError):
        raise BadInput(f"a victim on {node} has no UID") from None
    if type(violations) is not int or not -(2**63) <= violations < 2**63:
        raise BadInput(f"NumPDBViolations on {node} is {_short(violations)}, wanted a whole number")
    return Victims(uids, violations)


def _plain(text: str) -> bool:
    """Names of Kubernetes objects: nothing that could change a URL's path."""
    return all(char.isalnum() or char in "-._:" for char in text)


def _short(value: object) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
