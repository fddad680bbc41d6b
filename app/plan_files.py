"""A joint plan from files: nodes as `tangram nodes` or the agents write them, pods as `kubectl get pods -o json`
or manifests have them. Pods that are bound with a placement hold it; pods without a node are planned.

    [{"node": "a", "gpus": [...], "allocatable": {"cpu": "96", "memory": "512Gi"}}, ...]

`allocatable` is read where it is given (as Kubernetes writes it); without it CPU and memory never bind.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson
import yaml

from app.errors import BadInput
from app.inventory import node_of
from app.main import read_inventory
from app.translate import Malformed, Pod, Written, allocatable_of, pod_of
from solver import Ask, Demand, Node, Plan, Policy, Problem, Snapshot
from solver.cluster import Allocation, Device, Taken
from solver.guests import NOBODY, Guest
from solver.plan import Placement
from solver.values import Values


@dataclass(frozen=True, slots=True)
class Files:
    """What the files say: the problem, the pending pods by ask id, and pods that cannot be planned, with why."""

    problem: Problem
    pods: Mapping[str, Pod]
    malformed: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def read_files(nodes: Path, pods: Path) -> Files:
    """The problem that the two files describe. Raises BadInput with the file and what is wrong in it."""
    inventory = {node.name: node for node in read_nodes(nodes)}
    taken: dict[str, list[Taken]] = {}
    pending: dict[str, Pod] = {}
    malformed: list[tuple[str, str]] = []
    warnings: list[str] = []
    for pod in read_pods(pods):
        if pod.node:
            node = inventory.get(pod.node)
            if node is None or pod.finished or not pod.concerns_us:
                continue
            if isinstance(pod.written, Written) and pod.written.node == pod.node:
                held = Allocation(pod.written.devices, pod.need.cpu_milli, pod.need.memory_mib, _guest(pod))
                taken.setdefault(pod.node, []).append(held)
            else:
                warnings.append(f"{pod.ref} is on {pod.node} without a placement: that node's GPUs are left out")
                why = f"may be in use by {pod.ref}, whose placement is not known"
                inventory[pod.node] = replace(node, gpus=tuple(replace(gpu, withheld=why) for gpu in node.gpus))
        elif isinstance(pod.ask, Malformed):
            malformed.append((str(pod.ref), pod.ask.reason))
        elif pod.ask.takes_devices:
            pending[pod.ref.uid] = pod
    asks = tuple(Ask(uid, pod.ask, pod.priority) for uid, pod in pending.items() if isinstance(pod.ask, Demand))
    snapshot = Snapshot(tuple(inventory.values()), {name: tuple(held) for name, held in taken.items()})
    return Files(Problem(snapshot, asks), pending, tuple(malformed), tuple(warnings))


def _guest(pod: Pod) -> Guest:
    return pod.ask.terms.guest if isinstance(pod.ask, Demand) else NOBODY


def read_nodes(path: Path) -> list[Node]:
    """Nodes of an inventory file, with CPU and memory where it has them. Raises BadInput."""
    reports = list(read_inventory(path))
    said = {each["node"]: each.get("allocatable") for each in orjson.loads(path.read_bytes())}
    nodes = []
    for report in reports:
        node = node_of(report)
        allocatable = said[report.node]
        if allocatable is not None:
            given = allocatable_of({"status": {"allocatable": allocatable}})
            if given is None:
                raise BadInput(f"{path}: {report.node}: allocatable: quantities named cpu and memory are needed")
            node = replace(node, cpu_milli=given[0], memory_mib=given[1])
        nodes.append(node)
    return nodes


def read_pods(path: Path) -> list[Pod]:
    """Pods of a file: a List, a JSON array, or YAML documents. Raises BadInput."""
    pods = []
    seen: set[str] = set()
    for number, said in enumerate(_objects(path), start=1):
        if not isinstance(said, Mapping) or said.get("kind", "Pod") != "Pod":
            kind = said.get("kind") if isinstance(said, Mapping) else type(said).__name__
            raise BadInput(f"{path}: object {number} is a {kind}; only pods (or a List of them) can be planned")
        meta = dict(said.get("metadata") or {})
        meta.setdefault("uid", f"{meta.get('namespace') or 'default'}/{meta.get('name')}")
        try:
            pod = pod_of({**said, "metadata": meta})
        except (ValueError, TypeError, AttributeError) as wrong:
            raise BadInput(f"{path}: pod {number}: {wrong}") from None
        if pod.ref.uid in seen:
            raise BadInput(f"{path}: pod {pod.ref} is there twice")
        seen.add(pod.ref.uid)
        pods.append(pod)
    return pods


def _objects(path: Path) -> Iterable[Any]:
    try:
        text = path.read_bytes()
    except OSError as problem:
        raise BadInput(f"cannot read {path}: {problem.strerror}") from None
    try:
        documents = [orjson.loads(text)]
    except orjson.JSONDecodeError:
        try:
            documents = [each for each in yaml.safe_load_all(text) if each is not None]
        except (yaml.YAMLError, UnicodeDecodeError) as problem:
            raise BadInput(f"{path} is neither JSON nor YAML: {' '.join(str(problem).split())}") from None
    for document in documents:
        if isinstance(document, list):
            yield from document
        elif isinstance(document, Mapping) and isinstance(document.get("items"), list):
            yield from document["items"]
        else:
            yield document


def with_tables(policy: Policy, nodes: Iterable[Node]) -> Policy:
    """The same policy with market tables for every geometry of these nodes (a second or so each)."""
    from solver.market import solve_table

    geometries = {gpu.geometry for node in nodes for gpu in node.gpus if gpu.geometry is not None}
    tables = {geometry: solve_table(geometry) for geometry in geometries}
    return replace(policy, values=Values(tables, policy.values.forecast))


def plan_as_json(files: Files, plan: Plan, policy: Policy) -> dict[str, Any]:
    """The plan with pods by name."""
    placed, unplaced = [], []
    indices = {gpu.uuid: gpu.index for node in files.problem.snapshot.nodes for gpu in node.gpus}
    for uid, outcome in plan.outcomes:
        pod = files.pods[uid]
        row: dict[str, Any] = {"pod": str(pod.ref), "uid": uid, "asks": str(pod.ask), "priority": pod.priority}
        if isinstance(outcome, Placement):
            devices = [str(device) for device in outcome.devices]
            prices = {name: milli for name, milli in outcome.prices if milli}
            where = _in_words(outcome.devices, indices)
            placed.append({**row, "node": outcome.node, "devices": devices, "where": where, "prices": prices})
        else:
            unplaced.append({**row, "reason": outcome.reason})
    return {
        "status": plan.status.value,
        "policy": policy.name,
        "weighed": [name for name, factor in policy.factors().items() if factor],
        "cost": plan.cost,
        "bound": plan.bound,
        "gap": plan.gap,
        "seconds": plan.seconds,
        "tiers": [
            {"name": tier.name, "value": tier.value, "bound": tier.bound, "status": tier.status.value}
            for tier in plan.tiers
        ],
        "placed": placed,
        "unplaced": unplaced,
        "malformed": [{"pod": pod, "reason": reason} for pod, reason in files.malformed],
        "warnings": list(files.warnings),
    }


def _in_words(devices: Iterable[Device], indices: Mapping[str, int]) -> str:
    """GPU 0, 1, 4; GPU 5 3g.40gb@4; GPU 6 250 milli."""
    whole = sorted(indices[device.gpu] for device in devices if device.whole)
    parts = [f"GPU {', '.join(map(str, whole))}"] if whole else []
    for device in devices:
        if not device.whole:
            parts.append(f"GPU {indices[device.gpu]} {device.slice or f'{device.milli} milli'}")
    return "; ".join(parts)
