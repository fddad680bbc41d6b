"""Says whether a cluster keeps Tangram's promises, from what the API server says and how the boards are made.

It asks neither the service nor any code that decides: placements are read from the pods' annotations, bound
nodes from the pods, and legality is counted here from the boards' profiles and placements as agents report
them. `Checker.following()` applies every watch event in order and looks after each, so that a device which is
given twice for a moment only is seen as well.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import httpx

from app.certs import NAMESPACE
from app.inventory import node_of
from app.report import Gpu, NodeReport
from solver import Demand, Device, Node, Slice, Snapshot
from solver.verify import legal_step_exists
from tests.e2e.cluster import Cluster, ControlPlane
from tests.e2e.nodes import KubernetesObject

PLACEMENT = "tangram.gpu/placement"
GPU = "nvidia.com/gpu"
MIG = "nvidia.com/mig-"
OVER = ("Succeeded", "Failed")
OF_USERS = {"fieldSelector": f"metadata.namespace!={NAMESPACE}"}
"""All pods but our own: the agents' ask for nothing and are given nothing."""

CATCH_UP_SECONDS = 30.0
MOST_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Piece:
    """What a pod was given: a whole GPU, or a profile at a start."""

    gpu: str
    profile: str = ""
    start: int = -1

    def __str__(self) -> str:
        return f"{self.gpu}/{self.profile}@{self.start}" if self.profile else self.gpu


@dataclass(frozen=True, slots=True)
class Shape:
    """A profile of a board: where it may start, how wide it is, and what it takes besides."""

    size: int
    starts: frozenset[int]
    takes: Mapping[str, int]


class Board:
    """One GPU as its agent reports it."""

    def __init__(self, node: str, gpu: Gpu) -> None:
        self.uuid = gpu.uuid
        self.node = node
        self.in_mig_mode = gpu.mig is not None and gpu.mig.enabled
        self.shapes: dict[str, Shape] = {}
        self.totals: dict[str, int] = {}
        if gpu.mig is None or not self.in_mig_mode:
            return
        for profile in gpu.mig.profiles:
            if not profile.placements:
                continue
            starts = frozenset(placement.start for placement in profile.placements)
            takes = {"compute slices": profile.compute_slices, **profile.engines}
            self.shapes[profile.name.replace("+", ".")] = Shape(profile.placements[0].size, starts, takes)
            for what, count in profile.engines.items():
                self.totals[what] = max(self.totals.get(what, 0), count * max(1, profile.max_instances))
        self.totals["compute slices"] = max(shape.takes["compute slices"] for shape in self.shapes.values())

    def fault(self, pieces: Sequence[Piece]) -> str:
        """Why these pieces cannot all be given out on this board; empty if they can.

        Instances that nobody has are no obstacle: they are destroyed where a slice is made over them.
        """
        if not self.in_mig_mode:
            if any(piece.profile for piece in pieces):
                return f"{pieces[0]}: the GPU is not in MIG mode"
            return f"{self.uuid} is given {len(pieces)} times" if len(pieces) > 1 else ""
        if len(set(pieces)) < len(pieces):
            return f"a slice is given twice: {', '.join(map(str, pieces))}"
        units: dict[int, Piece] = {}
        used: Counter[str] = Counter()
        for piece in pieces:
            shape = self.shapes.get(piece.profile)
            if shape is None or piece.start not in shape.starts:
                return f"{piece} is not a slice that this board can be cut into"
            for unit in range(piece.start, piece.start + shape.size):
                if unit in units:
                    return f"{piece} overlaps {units[unit]}"
                units[unit] = piece
            used.update(shape.takes)
        for what, count in used.items():
            if what in self.totals and count > self.totals[what]:
                return f"{self.uuid}: {count} {what} used, the board has {self.totals[what]}"
        return ""


@dataclass(frozen=True, slots=True)
class Given:
    """A pod's annotation, read."""

    uid: str
    node: str
    pieces: tuple[Piece, ...]


class Checker:
    """What must hold at every moment, and at the end."""

    def __init__(self, cluster: Cluster, reports: Iterable[NodeReport], *, strangers: Iterable[str] = ()) -> None:
        """`strangers` are names of pods that were bound without Tangram, on purpose."""
        self._cluster = cluster
        self._strangers = set(strangers)
        self.boards: dict[str, Board] = {}
        self.by_node: dict[str, list[Board]] = {}
        self._nodes: dict[str, Node] = {}
        for report in reports:
            self._nodes[report.node] = node_of(report)
            boards = [Board(report.node, gpu) for gpu in report.gpus]
            self.by_node[report.node] = boards
            self.boards |= {board.uuid: board for board in boards}

    # -- at one moment --------------------------------------------------------------------------------

    def pods(self) -> list[KubernetesObject]:
        """Every pod of the cluster's users, as of one moment."""
        found: list[KubernetesObject] = self._cluster.get("/api/v1/pods", **OF_USERS)["items"]
        return found

    def check(self) -> list[KubernetesObject]:
        """Raise AssertionError with what is wrong now; else return the pods."""
        pods = self.pods()
        wrong = self.faults(pods)
        assert not wrong, "\n".join(wrong[:MOST_FAULTS])
        return pods

    def faults(self, pods: Iterable[KubernetesObject]) -> list[str]:
        """What is wrong with these pods, in words."""
        wrong: list[str] = []
        on_board: dict[str, list[tuple[Piece, str]]] = {}
        for pod in pods:
            if not is_live(pod):
                continue
            given, faults = self._given(pod)
            wrong += faults
            for piece in given.pieces if given else ():
                on_board.setdefault(piece.gpu, []).append((piece, pod["metadata"]["name"]))
        for uuid, owners in on_board.items():
            fault = self.boards[uuid].fault([piece for piece, _ in owners])
            if fault:
                wrong.append(f"{fault} (pods {', '.join(sorted(name for _, name in owners))})")
        return wrong

    def _given(self, pod: KubernetesObject) -> tuple[Given | None, list[str]]:
        """What the pod has, and what is wrong with it by itself."""
        name, asked, node = pod["metadata"]["name"], asks_of(pod), pod["spec"].get("nodeName", "")
        given = read_annotation(pod)
        if given is None:
            missing = bool(node and asked) and name not in self._strangers
            return None, [f"{name} is bound to {node} without a placement"] if missing else []
        wrong = []
        if given.uid != pod["metadata"]["uid"]:
            wrong.append(f"{name} has the placement of UID {given.uid}")
        if node and node != given.node:
            wrong.append(f"{name} is on {node}, its placement says {given.node}")
        got: Counter[str] = Counter(MIG + piece.profile if piece.profile else GPU for piece in given.pieces)
        if dict(got) != asked:
            wrong.append(f"{name} asks for {asked} and got {dict(got)}")
        strays = [piece for piece in given.pieces if piece.gpu not in {board.uuid for board in self.on(given.node)}]
        wrong += [f"{name} got {piece}, which is not on {given.node}" for piece in strays]
        return Given(given.uid, given.node, tuple(piece for piece in given.pieces if piece not in strays)), wrong

    def on(self, node: str) -> list[Board]:
        """The node's boards."""
        return self.by_node.get(node, [])

    # -- who could still be placed --------------------------------------------------------------------

    def pending_with_a_legal_step(self, pods: Sequence[KubernetesObject] | None = None) -> dict[str, str]:
        """Pods without a node that would fit somewhere, each with such a node: tried one by one, board by board."""
        pods = self.pods() if pods is None else pods
        nodes = {
            node["metadata"]["name"]: node
            for node in self._cluster.get("/api/v1/nodes")["items"]
            if not node["spec"].get("unschedulable")
        }
        taken = self.taken(pods)
        found: dict[str, str] = {}
        impossible: set[tuple[str, str, str]] = set()
        for pod in pods:
            asked = asks_of(pod)
            waits = is_live(pod) and not pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]
            if not asked or not waits or read_annotation(pod) is not None:
                continue
            selector = pod["spec"].get("nodeSelector") or {}
            for name, node in nodes.items():
                key = (name, json.dumps(asked), json.dumps(selector))
                if key in impossible:
                    continue
                chosen = selector.items() <= (node["metadata"].get("labels") or {}).items()
                if chosen and (self.fits(asked, name, taken) or self._verify_fits(asked, name, taken)):
                    found[pod["metadata"]["name"]] = name
                    break
                impossible.add(key)
        return found

    def taken(self, pods: Iterable[KubernetesObject]) -> dict[str, list[Piece]]:
        """Pieces that live pods have, by GPU."""
        taken: dict[str, list[Piece]] = {}
        for pod in pods:
            given = read_annotation(pod) if is_live(pod) else None
            for piece in given.pieces if given else ():
                taken.setdefault(piece.gpu, []).append(piece)
        return taken

    def fits(self, asked: Mapping[str, int], node: str, taken: Mapping[str, Sequence[Piece]]) -> bool:
        """Whether there is any legal way to serve this on that node, by trying every way."""
        boards = self.on(node)
        free = [board for board in boards if not board.in_mig_mode and not taken.get(board.uuid)]
        if len(free) < asked.get(GPU, 0):
            return False
        wanted = [name.removeprefix(MIG) for name, count in asked.items() if name != GPU for _ in range(count)]
        cut = {board.uuid: list(taken.get(board.uuid, ())) for board in boards if board.in_mig_mode}
        return self._serve(wanted, cut)

    def _verify_fits(self, asked: Mapping[str, int], node: str, taken: Mapping[str, Sequence[Piece]]) -> bool:
        """The same question to solver.verify's brute force, which knows nothing of prices or steps either."""
        seen = self._nodes.get(node)
        if seen is None:
            return False
        devices = [
            Device(piece.gpu, Slice(piece.profile, piece.start) if piece.profile else None)
            for board in self.on(node)
            for piece in taken.get(board.uuid, ())
        ]
        slices = {name.removeprefix(MIG): count for name, count in asked.items() if name != GPU}
        snapshot = Snapshot((seen,), {node: tuple(devices)})
        return legal_step_exists(snapshot, Demand.of(asked.get(GPU, 0), **slices))

    def _serve(self, wanted: Sequence[str], cut: dict[str, list[Piece]]) -> bool:
        if not wanted:
            return True
        for uuid, pieces in cut.items():
            board = self.boards[uuid]
            shape = board.shapes.get(wanted[0])
            for start in sorted(shape.starts) if shape else ():
                piece = Piece(uuid, wanted[0], start)
                if board.fault([*pieces, piece]):
                    continue
                if self._serve(wanted[1:], {**cut, uuid: [*pieces, piece]}):
                    return True
        return False

    # -- at every moment ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def following(self) -> Iterator[Follower]:
        """Follow all pods meanwhile; AssertionError at the end with everything that was wrong at any moment."""
        follower = Follower(self, self._cluster)
        follower.start()
        try:
            yield follower
        finally:
            follower.stop()
        assert not follower.faults, "\n".join(follower.faults[:MOST_FAULTS])


class Follower:
    """Lists and watches pods in a thread of its own and checks the node that each event is about."""

    def __init__(self, checker: Checker, cluster: Cluster) -> None:
        self.faults: list[str] = []
        self.events = 0
        self.lists = 0
        self._checker = checker
        self._cluster = cluster
        self._pods: dict[str, KubernetesObject] = {}
        self._on: dict[str, set[str]] = {}
        self._version = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="checker")

    def start(self) -> None:
        """Begin; returns when the first list has been checked."""
        self._thread.start()
        self._cluster.wait_for(lambda: self.lists or not self._thread.is_alive(), "the checker's first list", 30)

    def stop(self) -> None:
        """See everything that happened until now, then end."""
        last = int(self._cluster.get("/api/v1/pods", limit="1")["metadata"]["resourceVersion"])
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while self._version < last and time.monotonic() < deadline and self._thread.is_alive():
            if self._nothing_came_since(last):
                break
            time.sleep(0.05)
        self._stopping = True
        self._thread.join(timeout=CATCH_UP_SECONDS)
        if self._thread.is_alive():
            self.faults.append("the checker hangs")

    def _nothing_came_since(self, last: int) -> bool:
        """The newest version of any pod may be older than the list's own version."""
        newest = max((int(pod["metadata"]["resourceVersion"]) for pod in self._checker.pods()), default=0)
        return self._version >= newest and {pod["metadata"]["uid"] for pod in self._checker.pods()} == set(self._pods)

    def _run(self) -> None:
        with client_of(self._cluster) as client:
            while not self._stopping:
                try:
                    self._list(client)
                    self._watch(client)
                except httpx.HTTPError:
                    time.sleep(0.2)  # the API server is being restarted: the next list sees what came of it
                except Exception as error:
                    self.faults.append(f"the checker failed: {error!r}")
                    return

    def _list(self, client: httpx.Client) -> None:
        reply = client.get("/api/v1/pods", params=OF_USERS)
        reply.raise_for_status()
        listed = reply.json()
        self._pods.clear()
        self._on.clear()
        for pod in listed["items"]:
            self._enter(pod)
        self._say(self._checker.faults(self._pods.values()))
        self._version = int(listed["metadata"]["resourceVersion"])
        self.lists += 1

    def _watch(self, client: httpx.Client) -> None:
        query = {"watch": "1", "resourceVersion": str(self._version), "allowWatchBookmarks": "true", **OF_USERS}
        timeout = httpx.Timeout(10, read=0.5)
        while not self._stopping:
            query["resourceVersion"] = str(self._version)
            with (
                contextlib.suppress(httpx.ReadTimeout),
                client.stream("GET", "/api/v1/pods", params=query, timeout=timeout) as stream,
            ):
                stream.raise_for_status()
                for line in stream.iter_lines():
                    event = json.loads(line)
                    if event["type"] == "ERROR":
                        return
                    self._apply(event["type"], event["object"])
                    if self._stopping:
                        return

    def _apply(self, kind: str, pod: KubernetesObject) -> None:
        self._version = int(pod["metadata"]["resourceVersion"])
        if kind == "BOOKMARK":
            return
        self.events += 1
        self._leave(pod["metadata"]["uid"])
        if kind == "DELETED":
            return
        node = self._enter(pod)
        if node:
            self._say(self._checker.faults(self._pods[uid] for uid in self._on[node]))

    def _enter(self, pod: KubernetesObject) -> str:
        given = read_annotation(pod)
        node = given.node if given else pod["spec"].get("nodeName", "")
        self._pods[pod["metadata"]["uid"]] = pod
        if node:
            self._on.setdefault(node, set()).add(pod["metadata"]["uid"])
        return str(node)

    def _leave(self, uid: str) -> None:
        before = self._pods.pop(uid, None)
        if before is not None:
            for uids in self._on.values():
                uids.discard(uid)

    def _say(self, faults: Iterable[str]) -> None:
        self.faults += [fault for fault in faults if fault not in self.faults]


def read_annotation(pod: KubernetesObject) -> Given | None:
    """The placement on a pod; None where it has none. One that cannot be read raises."""
    text = (pod["metadata"].get("annotations") or {}).get(PLACEMENT)
    if text is None:
        return None
    said = json.loads(text)
    pieces = []
    for device in said["devices"]:
        gpu, _, place = device.partition("/")
        profile, _, start = place.rpartition("@")
        pieces.append(Piece(gpu, profile, int(start)) if place else Piece(gpu))
    return Given(said["uid"], said["node"], tuple(pieces))


def uuids_of(pod: KubernetesObject) -> dict[str, str]:
    """The MIG devices that the placement names, by device as it writes them."""
    text = (pod["metadata"].get("annotations") or {}).get(PLACEMENT)
    return dict(json.loads(text).get("uuids", {})) if text else {}


def asks_of(pod: KubernetesObject) -> dict[str, int]:
    """GPUs and slices that the pod needs at once: the largest of its containers together and each step before."""
    sidecars: Counter[str] = Counter()
    need: Counter[str] = Counter()
    for container in pod["spec"].get("initContainers") or []:
        with_this = sidecars + _limits(container)
        need |= with_this
        if container.get("restartPolicy") == "Always":
            sidecars = with_this
    together = sidecars
    for container in pod["spec"]["containers"]:
        together = together + _limits(container)
    return dict(need | together)


def _limits(container: KubernetesObject) -> Counter[str]:
    limits = (container.get("resources") or {}).get("limits") or {}
    return Counter({name: int(count) for name, count in limits.items() if name == GPU or name.startswith(MIG)})


def is_live(pod: KubernetesObject) -> bool:
    """Whether it may still use its devices."""
    return pod["status"].get("phase") not in OVER


def is_refused(pod: KubernetesObject) -> bool:
    """Whether kube-scheduler has said that it finds no node."""
    conditions = pod["status"].get("conditions") or []
    return any(each["type"] == "PodScheduled" and each["status"] == "False" for each in conditions)


def refusal_of(pod: KubernetesObject) -> str:
    """Why kube-scheduler finds no node, in the words that `kubectl describe` shows."""
    conditions = pod["status"].get("conditions") or []
    return next((str(each.get("message", "")) for each in conditions if each["type"] == "PodScheduled"), "")


def client_of(cluster: Cluster) -> httpx.Client:
    """A client of the checker's own: the cluster's is for the test's thread."""
    headers = {"Authorization": f"Bearer {cluster.admin_token}"} if cluster.admin_token else {}
    trust = ssl.create_default_context(cafile=str(cluster.ca_file)) if isinstance(cluster, ControlPlane) else True
    return httpx.Client(base_url=cluster.api_url, verify=trust, headers=headers, timeout=10, trust_env=False)
