"""Reads three sources of who has which slice at one moment (API server, ledger, boards) and says where they differ."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.e2e.checker import Piece, is_live, read_annotation, uuids_of
from tests.e2e.nodes import KubernetesObject
from tests.e2e.stack import Stack
from tests.fake_nvml.state import read_state


@dataclass
class Sources:
    """Reads the API server, the ledger and the boards, and says where they differ."""

    stack: Stack
    before_bind: bool = True
    """Whether slices are there, and named, before a pod is bound; an exchange makes others only before containers."""
    faults: list[str] = field(default_factory=list)
    steps: int = 0
    compared: int = 0
    seen_made: int = 0
    seen_removed: int = 0
    _boards: dict[tuple[str, str, int], str] = field(default_factory=dict)
    _unwritten: set[str] = field(default_factory=set)

    def look(self) -> None:
        """One step. Only pods that were the same before and after the other two were read are compared."""
        before = self._bound()
        ledger = self._ledger()
        boards = self._read_boards()
        after = self._bound()
        self.steps += 1
        for uid, pod in before.items():
            if uid in after and read_annotation(pod) == read_annotation(after[uid]):
                self.compared += 1
                self._compare(uid, pod, after[uid], ledger, boards)

    def _compare(
        self,
        uid: str,
        before: KubernetesObject,
        after: KubernetesObject,
        ledger: dict[str, list[str]] | None,
        boards: dict[tuple[str, str, int], str],
    ) -> None:
        name, given = before["metadata"]["name"], read_annotation(before)
        if given is None:
            self._say(f"{name} is bound without a placement")
            return
        if uid in self._unwritten:
            return  # the service says that this pod's annotation is being written; `until_owned` waits for all of them
        if ledger is not None and ledger.get(uid) != sorted(str(piece) for piece in given.pieces):
            self._say(f"{name}: its annotation says {[*map(str, given.pieces)]}, the ledger {ledger.get(uid)}")
        named = [uuids_of(before), uuids_of(after)]
        for piece in given.pieces:
            if piece.profile:
                found = boards.get((piece.gpu, piece.profile, piece.start))
                unnamed = not self.before_bind and any(str(piece) not in uuids for uuids in named)
                if not unnamed and (found is None or all(found != uuids.get(str(piece)) for uuids in named)):
                    said = named[0].get(str(piece))
                    self._say(f"{name} has {piece} as {said}; on the board there is {found}")

    def _bound(self) -> dict[str, KubernetesObject]:
        return {
            pod["metadata"]["uid"]: pod
            for pod in self.stack.cluster.pods()
            if is_live(pod) and pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]
        }

    def _ledger(self) -> dict[str, list[str]] | None:
        """Devices by pod, noting whose annotation the service says is still old; None while it is not ready."""
        try:
            if not self.stack.service.readiness()["ready"]:
                return None
            pods = self.stack.service.get("/v1/pods")["pods"]
            if not self.stack.service.readiness()["ready"]:
                return None
        except httpx.HTTPError:
            return None
        self._unwritten = {each["uid"] for each in pods if each["devices"] and not each["annotated"]}
        return {each["uid"]: sorted(each["devices"]) for each in pods if each["phase"] in ("assumed", "held")}

    def _read_boards(self) -> dict[tuple[str, str, int], str]:
        """MIG UUIDs by GPU, profile and start; "" for an instance without a compute instance. Overlaps are faults."""
        found: dict[tuple[str, str, int], str] = {}
        for node in self.stack.nodes:
            state = read_state(self.stack.real_agents.fleet.description(node.name))
            for uuid, gpu in state.gpus.items():
                units: Counter[int] = Counter()
                for instance in gpu.instances:
                    units.update(range(instance.start, instance.start + instance.size))
                    found[uuid, instance.profile.replace("+", "."), instance.start] = instance.uuid or ""
                if any(count > 1 for count in units.values()):
                    self._say(f"{uuid}: instances overlap: {gpu.instances}")
        self.seen_made += len(found.keys() - self._boards.keys())
        self.seen_removed += len(self._boards.keys() - found.keys())
        self._boards = found
        return found

    def until_owned(self, seconds: float) -> int:
        """Wait until the boards have exactly the slices of bound pods; how many."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            owned = {
                (piece.gpu, piece.profile, piece.start)
                for pod in self._bound().values()
                for piece in self._pieces(pod)
                if piece.profile
            }
            if owned == set(self._boards) and not self._unwritten:
                return len(owned)
            if time.monotonic() > deadline:
                without, missing = set(self._boards) - owned, owned - set(self._boards)
                raise AssertionError(f"slices without an owner: {without}; pods without their slice: {missing}")
            time.sleep(0.3)

    def _pieces(self, pod: KubernetesObject) -> tuple[Piece, ...]:
        given = read_annotation(pod)
        return given.pieces if given else ()

    def times(self) -> str:
        """How long binds waited, by the service's own histogram since its last start."""
        metric = "tangram_slices_made_seconds"
        count = self.stack.service.metric(f'{metric}_count{{outcome="made"}}')
        total = self.stack.service.metric(f'{metric}_sum{{outcome="made"}}')
        return f"{1000 * total / count:.0f} ms on average" if count else "none"

    def _say(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)
