"""What the CLI prints about a service: the page's tables, in the page's words, for a terminal."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

Json = Mapping[str, Any]

TAKEN = ("assumed", "held", "leaving")  # a proposal takes nothing yet
PHASE_STYLES = {"waiting": "yellow", "proposed": "dim", "assumed": "cyan", "held": "green", "leaving": "magenta"}


def show_cluster(cluster: Json, *, match: str, console: Console) -> None:
    """Totals in a line, what is wrong, and a row per node."""
    _state(cluster, console)
    t = cluster["totals"]
    console.print(
        f"{t['nodes_offered']} of {t['nodes']} nodes offered · "
        f"{t['gpus_held']} of {t['gpus'] - t['mig_gpus']} whole GPUs held · "
        + (f"{t['shares_held']} shares on {t['gpus_shared']} more · " if t["shares_held"] else "")
        + f"{t['mig_units_held']} of {t['mig_units']} MIG units held ({t['slices_held']} slices) · "
        f"pods: {t['pods_held']} held, {t['pods_assumed']} assumed, {t['pods_waiting']} waiting"
    )
    table = Table()
    for title in ("Node", "GPUs", "Offered"):
        table.add_column(title)
    for title in ("GPUs free", "MIG units free", "Pods"):
        table.add_column(title, justify="right")
    for node in cluster["nodes"]:
        if match.lower() in f"{node['name']} {node['product']}".lower():
            table.add_row(*_node_row(node))
    console.print(table)


def _state(cluster: Json, console: Console) -> None:
    if not cluster["ready"]:
        console.print(f"[yellow]Not ready. Waiting for: {escape(', '.join(cluster['waiting_for']))}.[/]")
    for warning in cluster["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}")


def _node_row(node: Json) -> tuple[Text, ...]:
    whole = [gpu for gpu in node["gpus"] if not gpu["mig"]]
    cut = [gpu for gpu in node["gpus"] if gpu["mig"]]
    units = sum(gpu["width"] for gpu in cut)
    taken = sum(s["size"] for gpu in cut for s in gpu["slices"] if s["phase"] in TAKEN)
    free = sum(1 for gpu in whole if gpu["phase"] in ("free", "proposed"))
    return (
        Text(node["name"], style="bold"),
        Text(f"{len(node['gpus'])} × {node['product'].removeprefix('NVIDIA ')}"),
        Text("yes") if node["offered"] else Text(f"no: {node['reason']}", style="red"),
        Text(f"{free} of {len(whole)}" if whole else "–"),
        Text(f"{units - taken} of {units}" if cut else "–"),
        Text(str(len(_pods_on(node["gpus"])))),
    )


def _pods_on(gpus: Iterable[Json]) -> set[str]:
    parts = [part for gpu in gpus for part in (gpu, *gpu["slices"], *gpu["shares"])]
    return {part["pod"]["uid"] for part in parts if part["pod"]}


def show_pods(pods: Sequence[Json], *, console: Console) -> None:
    """A row per pod; those that wait come last, with their reasons."""
    table = Table()
    for title in ("Pod", "Asks", "Phase", "Node", "Devices"):
        table.add_column(title)
    table.add_column("For", justify="right")
    for pod in pods:
        if pod["phase"] != "waiting":
            devices = "\n".join(_short(device) for device in pod["devices"])
            table.add_row(
                Text(_name(pod)), Text(pod["demand"]), _phase(pod), Text(pod["node"] or "–"), Text(devices), _since(pod)
            )
    if table.row_count:
        console.print(table)
    show_waiting(pods, console=console)
    if not pods:
        console.print("No pod.")


def show_waiting(pods: Sequence[Json], *, console: Console) -> None:
    """A row per ask that waits."""
    groups = waiting(pods)
    if not groups:
        return
    table = Table(title="Waiting, and why", title_justify="left")
    table.add_column("Pods", justify="right")
    table.add_column("Asks")
    table.add_column("Reason")
    for group in groups:
        table.add_row(str(group.pods), Text(group.asks), Text(group.reason))
    console.print(table)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Pods that wait for the same thing, with the reason of the first: reasons differ in small print only."""

    pods: int
    asks: str
    reason: str


def waiting(pods: Sequence[Json]) -> list[Waiting]:
    """What is waited for, the most wanted first."""
    refused = [pod for pod in pods if pod["phase"] == "waiting"]
    counts = Counter(pod["demand"] for pod in refused)
    reasons = {pod["demand"]: pod["reason"] for pod in reversed(refused)}
    return [Waiting(count, asks, reasons[asks]) for asks, count in counts.most_common()]


def show_pod(pod: Json, *, console: Console) -> None:
    """One pod: where, since when, at what price and why."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("Pod", Text(_name(pod), style="bold"))
    table.add_row("UID", Text(pod["uid"]))
    table.add_row("Phase", _phase(pod))
    table.add_row("For", _since(pod))
    table.add_row("Asks", Text(pod["demand"]))
    table.add_row("Node", Text(pod["node"] or "none yet"))
    for number, (device, words) in enumerate(zip(pod["devices"], pod["devices_in_words"], strict=True)):
        table.add_row("" if number else "Devices", Text(f"{words}  {device}"))
    title = "Why it waits" if pod["phase"] == "waiting" else "Why here"
    table.add_row(title, Text(pod["reason"] or "No reason was recorded."))
    for number, (goal, price) in enumerate(pod.get("prices", {}).items()):
        table.add_row("" if number else "Price", Text(f"{goal.replace('_', ' ')}: {price} milli-GPU"))
    console.print(table)


def show_plan(plan: Json, *, console: Console) -> None:
    """A joint plan: how good it is, where each pod goes and at what price, and why the others go nowhere."""
    proof = "proven optimal" if plan["status"] == "optimal" else f"{plan['status']}, gap {plan['gap']:.2%}"
    console.print(
        f"{len(plan['placed'])} of {len(plan['placed']) + len(plan['unplaced'])} pods placed · "
        f"{proof} under policy {escape(plan['policy'])} · {plan['seconds'] * 1000:.0f} ms in solvers"
    )
    for warning in plan["warnings"]:
        console.print(f"[yellow]Warning:[/] {escape(warning)}")
    tiers = Table()
    for title in ("Minimised in this order", "Value", "Bound", "Status"):
        tiers.add_column(title, justify="right" if title in ("Value", "Bound") else "left")
    for tier in plan["tiers"]:
        tiers.add_row(Text(tier["name"]), str(tier["value"]), str(tier["bound"]), tier["status"])
    console.print(tiers)
    if plan["placed"]:
        table = Table()
        for title in ("Placed", "Asks", "Node", "Devices", "Price, milli-GPU"):
            table.add_column(title)
        for row in plan["placed"]:
            weighed = {goal: price for goal, price in row["prices"].items() if goal in plan["weighed"]}
            prices = ", ".join(f"{goal} {price}" for goal, price in weighed.items()) or "0"
            table.add_row(*map(Text, (row["pod"], row["asks"], row["node"], row["where"], prices)))
        console.print(table)
    left = [(row["pod"], row["asks"], row["reason"]) for row in plan["unplaced"]]
    left += [(row["pod"], "", row["reason"]) for row in plan["malformed"]]
    if left:
        table = Table()
        for title in ("Not placed", "Asks", "Why"):
            table.add_column(title)
        for row in left:
            table.add_row(*map(Text, row))
        console.print(table)


def _name(pod: Json) -> str:
    return f"{pod['namespace']}/{pod['name']}"


def _phase(pod: Json) -> Text:
    return Text(pod["phase"], style=PHASE_STYLES.get(pod["phase"], ""))


def _since(pod: Json) -> Text:
    seconds = pod["since_seconds"]
    if seconds is None:
        return Text("–")
    return Text(f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min")


def _short(device: str) -> str:
    """A GPU's UUID to its first group: enough to tell two apart on a node."""
    gpu, sign, piece = re.match(r"([^/:]*)([/:]?)(.*)", device).groups()  # type: ignore[union-attr]  # it always does
    return f"{gpu[:12]}…{sign}{piece}"
