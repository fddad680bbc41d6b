"""What the page, the CLI and `/v1/` show: the ledger and the inventory as JSON (`docs/api.md`). Reads only.

What is shown of one node or pod is of one moment. What is shown of all of them is made in turns, with others' work
between them, and each is put into JSON at once, since that too would take long for all together.
"""

from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import groupby
from typing import Any

import orjson

from app.handing import Handing
from app.inventory import Entry, Inventory
from app.ledger import Hold, Ledger, Phase
from app.loop import Turns, in_turns
from app.offers import Offers
from app.orders import Orders
from app.planner import Planner
from app.report import DeviceAt, Gpu, Handed, NodeReport
from app.schedule import Planned, Schedule
from app.translate import Malformed, PodRef, profile_as_asked
from app.truth import Truth, Waiting
from solver import Device, Slice
from solver.market import Table

Json = dict[str, Any]
NODES_SHOWN = 100  # of one demand in the plan

SORTED_AT_ONCE = 1000  # pods: about a millisecond

MOST_BITS = 14_000  # Python prints no number of more than 4,300 digits


class Views:
    """The read side."""

    def __init__(
        self,
        ledger: Ledger,
        inventory: Inventory,
        offers: Offers,
        orders: Orders,
        handing: Handing,
        truth: Truth,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._ledger = ledger
        self._inventory = inventory
        self._offers = offers
        self._orders = orders
        self._handing = handing
        self._truth = truth
        self._clock = clock

    def names(self) -> list[str]:
        """Every node that has reported or that holds something."""
        return sorted({*self._inventory, *self._ledger.nodes()})

    def knows(self, name: str) -> bool:
        """Whether it is one of them."""
        return self._inventory.get(name) is not None or bool(self._ledger.on(name))

    async def cluster(self, *, limit: int, after: str) -> Json:
        """Totals, and one page of nodes."""
        names = [name for name in self.names() if name > after]
        page = names[:limit]
        return {
            "totals": await self.totals(),
            "next": page[-1] if len(names) > limit else None,
            "nodes": [orjson.Fragment(orjson.dumps(self.node(name))) async for name in in_turns(page)],
        }

    async def totals(self) -> dict[str, int]:
        """Whole-cluster counts; MIG units are memory slices of the boards' own grids, shares are in milli of a GPU."""
        totals = dict.fromkeys(COUNTED, 0)
        async for name in in_turns(list(self._inventory)):
            for what, count in self._counts(name).items():
                totals[what] += count
        return {**totals, **{f"pods_{phase}": count for phase, count in self.phases().items()}}

    def _counts(self, name: str) -> dict[str, int]:
        """What one node adds to the totals; nothing where it has just gone."""
        entry = self._inventory.get(name)
        if entry is None:
            return {}
        taken = [device for hold in self._ledger.firmly(name) for device in hold.devices]
        whole = {device.gpu for device in taken if device.whole}
        given = [device.milli for device in taken if device.milli]
        slices = {device for device in taken if device.slice is not None}
        sizes = _sizes(entry) if slices else {}
        widths = [gpu.geometry.width for gpu in entry.node.gpus if gpu.geometry is not None]
        return {
            "nodes": 1,
            "nodes_offered": int(not self._offers.fault(name)),
            "gpus": len(entry.node.gpus),
            "gpus_held": sum(gpu.uuid in whole for gpu in entry.node.gpus if gpu.geometry is None),
            "gpus_shared": len({device.gpu for device in taken if device.milli}),
            "shares_held": len(given),
            "milli_held": sum(given),
            "mig_gpus": len(widths),
            "mig_units": sum(widths),
            "mig_units_held": sum(sizes.get((each.gpu, each.slice.profile), 0) for each in slices if each.slice),
            "slices_held": len(slices),
        }

    def plan(self, schedule: Schedule, planner: Planner | None) -> Json:
        """The latest joint plan: how good it is, and what it says of each kind of pending pod."""
        plan = schedule.plan
        about: Json = {
            "planning": planner is not None,
            "process": planner.words if planner is not None else "planning is switched off",
            "value_tables": [_table(table) for table in planner.tables.values()] if planner is not None else [],
            "forecast_pods": planner.foreseen_from if planner is not None else 0,
            "binds": {
                "followed": schedule.followed,
                "aside": schedule.aside,
                "unplanned": schedule.unplanned,
            },
        }
        if plan is None or planner is None or planner.made_at is None:
            return {**about, "status": None, "demands": []}
        return {
            **about,
            "status": plan.status,
            "cost": _whole(plan.cost),
            "bound": _whole(plan.bound),
            "gap": plan.gap,
            "seconds": round(planner.seconds, 4),
            "solving_seconds": round(plan.solving_seconds, 4),
            "age_seconds": round(self._clock() - planner.made_at, 1),
            "pods": sum(each.placed + each.unplaced for each in plan.planned),
            "planned": sum(each.placed for each in plan.planned),
            "unplaced": sum(each.unplaced for each in plan.planned),
            "demands": [_planned(each, schedule) for each in plan.planned],
        }

    def phases(self) -> dict[str, int]:
        """How many pods stand in which phase, the waiting ones included."""
        counted = self._ledger.counts()
        waiting = sum(1 for uid in self._truth.waiting if self._ledger.get(uid) is None)
        return {WAITING: waiting, **{phase.value: counted[phase] for phase in Phase}}

    def node(self, name: str) -> Json:
        """One node with its GPUs and slices."""
        entry = self._inventory.get(name)
        fault = self._offers.fault(name)
        holds = self._ledger.on(name)
        report = entry.report if entry else None
        silent = self._inventory.silent_for(name, now=self._clock()) if entry else None
        return {
            "name": name,
            "offered": not fault,
            "reason": fault,
            "reported_seconds_ago": None if silent is None else round(silent, 1),
            "product": ", ".join(sorted({gpu.product for gpu in report.gpus})) if report else "",
            "slices": self._inventory.why_no_slices(name),
            "orders": self._ordered(name),
            "handing": self._handed(name, report, holds),
            "driver": report.driver if report else "",
            "cuda": report.cuda if report else "",
            "versions": self._inventory.versions(name),
            "gpus": [self._gpu(entry, gpu, holds) for gpu in report.gpus] if entry and report else [],
            "not_in_inventory": self._strays(entry, holds),
        }

    def _ordered(self, name: str) -> Json:
        """What the node's agent is told to change and has not changed yet."""
        orders = self._orders.list_of(name)
        if orders is None:
            return {"make": [], "remove": [], "switch": []}
        return {
            "make": [f"{each.gpu}/{each.profile}@{each.start}" for each in orders.make],
            "remove": [f"{each.gpu}/{each.profile}@{each.start}" for each in orders.remove],
            "switch": [f"{each.gpu}: MIG {'on' if each.enabled else 'off'}" for each in orders.switch],
        }

    def _handed(self, name: str, report: NodeReport | None, holds: tuple[Hold, ...]) -> Json:
        """How devices come to containers there, and where that is not as it should be."""
        shared = any(device.milli for hold in holds for device in hold.devices)
        return {
            "by": report.hands if report else None,
            "none": report.hands_none if report else "",
            "shares": _not_enforced(report) if shared else "",
            "counts": dict(report.handing) if report else {},
            "differ": [_differing(each) for each in self._handing.differing(name)],
            "overlaps": self._handing.overlaps(name),
        }

    async def pods(self, *, phase: str = "") -> list[orjson.Fragment]:
        """Every pod that holds, is promised, or waits; by namespace and name."""
        found: list[orjson.Fragment] = []
        async for uid in in_turns(await self._in_order(phase)):
            row = self.pod_in_brief(uid)
            if row is not None and phase in ("", row["phase"]):
                found.append(orjson.Fragment(orjson.dumps(row)))
        return found

    async def _in_order(self, phase: str) -> Iterator[str]:
        """The UIDs of the pods that may be in that phase, by namespace and name."""
        turns = Turns()
        refs = [hold.pod for hold in self._ledger if phase in ("", hold.phase.value)]
        refs += [each.pod.ref for each in self._truth.waiting.values() if phase in ("", WAITING)]
        await turns.over()
        runs: list[list[tuple[str, str, str]]] = []
        for first in range(0, len(refs), SORTED_AT_ONCE):
            run = refs[first : first + SORTED_AT_ONCE]
            runs.append(sorted((ref.namespace, ref.name, ref.uid) for ref in run))
            await turns.over()
        return _uids(merge(*runs))

    def pod_in_brief(self, uid: str) -> Json | None:
        """One pod as it is now; None where nothing is known of it."""
        hold = self._ledger.get(uid)
        if hold is not None:
            return self._held(hold)
        waiting = self._truth.waiting.get(uid)
        return None if waiting is None else self._waiting(uid, waiting)

    def pod(self, uid: str) -> Json | None:
        """One pod, with the price of its placement by goal."""
        brief = self.pod_in_brief(uid)
        hold = self._ledger.get(uid)
        if brief is None or hold is None:
            return brief and {**brief, "devices_in_words": [], "prices": {}}
        words = [self._in_words(hold.node, device) for device in hold.devices]
        return {**brief, "devices_in_words": words, "prices": dict(hold.prices)}

    def _in_words(self, node: str, device: Device) -> str:
        entry = self._inventory.get(node)
        gpus = entry.node.gpus if entry else ()
        index = next((gpu.index for gpu in gpus if gpu.uuid == device.gpu), None)
        gpu = f"GPU {index}" if index is not None else "a GPU that is not in the inventory"
        if device.slice is not None:
            return f"{device.slice.profile} at {device.slice.start} of {gpu}"
        return f"{device.milli} milli of {gpu}" if device.milli else gpu

    def _held(self, hold: Hold) -> Json:
        return {
            **_pod(hold.pod),
            "phase": hold.phase.value,
            "demand": str(hold.demand),
            "node": hold.node,
            "devices": [str(device) for device in hold.devices],
            "since_seconds": round(self._clock() - hold.since, 1),
            "reason": self._reason(hold),
            "annotated": hold.pod.uid not in self._handing.unwritten,
        }

    def _reason(self, hold: Hold) -> str:
        if hold.pod.uid in self._truth.unexplained:
            return self._truth.unexplained[hold.pod.uid]
        if hold.phase is Phase.LEAVING:
            return "the pod is gone; its devices have not been seen idle yet"
        if hold.phase is Phase.ASSUMED:
            return "its bind is under way, or its outcome is being read"
        priced = {goal: price for goal, price in hold.prices if price}
        if not hold.prices:
            return "placed before this process started"
        cost = ", ".join(f"{goal} {price}" for goal, price in priced.items()) or "nothing"
        return f"the cheapest step on {hold.node} when it was decided; it cost {cost} (milli-GPU)"

    def _waiting(self, uid: str, waiting: Waiting) -> Json:
        ask = waiting.pod.ask
        return {
            **_pod(waiting.pod.ref),
            "phase": WAITING,
            "demand": "malformed" if isinstance(ask, Malformed) else str(ask),
            "node": None,
            "devices": [],
            "since_seconds": round(self._clock() - waiting.since, 1),
            "reason": waiting.reason,
            "annotated": False,
        }

    def _gpu(self, entry: Entry, gpu: Gpu, holds: tuple[Hold, ...]) -> Json:
        seen = next(each for each in entry.node.gpus if each.uuid == gpu.uuid)
        phase, reason, pod = "free", "", None
        whole = _first(holds, Device(gpu.uuid))
        shares = list(_shares(gpu, holds))
        slices = list(_slices(entry, gpu, holds)) if seen.geometry is not None else []
        if whole is not None:
            phase, pod = whole.phase.value, _pod(whole.pod)
        elif seen.withheld:
            phase, reason = "withheld", seen.withheld
        elif any(each["pod"] for each in slices) or any(each["phase"] != Phase.PROPOSED.value for each in shares):
            phase = "shared"
        elif shares:
            phase = Phase.PROPOSED.value
        elif not self._offers.fault(entry.node.name):
            kept = next(g for g in self._offers.view(entry.node.name)[0].gpus if g.uuid == gpu.uuid).withheld
            phase, reason = ("withheld", kept) if kept else ("free", "")
        return {
            "uuid": gpu.uuid,
            "index": gpu.index,
            "product": gpu.product,
            "memory_mib": gpu.memory_mib,
            "numa": gpu.numa,
            "phase": phase,
            "pod": pod,
            "reason": reason,
            "health": gpu.health,
            "signals": [f"{each.name}: {each.state}: {each.reason}" for each in gpu.signals if each.state != "ok"],
            "note": gpu.mig.note if gpu.mig else "",
            "nvlink": _nvlink(gpu),
            "mig": seen.geometry is not None,
            "width": seen.geometry.width if seen.geometry else 0,
            "slices": slices,
            "shares": shares,
        }

    @staticmethod
    def _strays(entry: Entry | None, holds: tuple[Hold, ...]) -> list[Json]:
        """Devices that pods hold and the inventory does not have: they stay held, and are shown."""
        known = {gpu.uuid for gpu in entry.node.gpus} if entry else set()
        return [
            {"device": str(device), "pod": _pod(hold.pod)}
            for hold in holds
            for device in hold.devices
            if device.gpu not in known
        ]


COUNTED = (
    "nodes",
    "nodes_offered",
    "gpus",
    "gpus_held",
    "gpus_shared",
    "shares_held",
    "milli_held",
    "mig_gpus",
    "mig_units",
    "mig_units_held",
    "slices_held",
)
WAITING = "waiting"


def _uids(ordered: Iterable[tuple[str, str, str]]) -> Iterator[str]:
    """Each once: a pod that waits may hold something by now."""
    return (uid for (_, _, uid), _ in groupby(ordered))


def _differing(handed: Handed) -> Json:
    return {
        "pod": {"uid": handed.uid, "namespace": handed.namespace, "name": handed.name},
        "container": handed.container,
        "resource": handed.resource,
        "devices": [_at(device) for device in handed.devices],
        "kubelet": list(handed.ids),
    }


def _at(device: DeviceAt) -> str:
    if device.profile:
        return f"{device.gpu}/{profile_as_asked(device.profile)}@{device.start}"
    return f"{device.gpu}:{device.milli}m" if device.milli else device.gpu


def _not_enforced(report: NodeReport | None) -> str:
    """What holds nobody to his share; empty where something may."""
    if report is not None and report.hands == "plugin":
        return "not enforced but by MPS: without it a container can use more memory than its share"
    return "not enforced: nothing of Tangram hands out devices here, so a container can use all of the GPU"


def _planned(planned: Planned, schedule: Schedule) -> Json:
    left = schedule.nodes_for(planned.demand)
    return {
        "demand": str(planned.demand),
        "priority": planned.priority,
        "planned": planned.placed,
        "unplaced": planned.unplaced,
        "reason": planned.reason,
        "prices": dict(planned.prices),
        "nodes": len(planned.on),
        "still_to_come": dict(list(left.items())[:NODES_SHOWN]),
    }


def _whole(number: int) -> str:
    """As text, since it may be too long for JSON; with hundreds of priorities it is too long for anything."""
    return str(number) if number.bit_length() <= MOST_BITS else f"about 2^{number.bit_length()}"


def _table(table: Table) -> Json:
    geometry = table.geometry
    names = [profile.name for profile in geometry.profiles]
    return {"width": geometry.width, "profiles": names, "method": table.method, "states": table.states}


def _nvlink(gpu: Gpu) -> str:
    """A GPU's NVLinks and fabric in words; empty where it has none."""
    words = []
    if gpu.nvlink is not None:
        kind = {"switch": " to switches", "direct": "", "bridge": " over bridges", "unknown": ""}[gpu.nvlink.kind]
        words.append(f"{gpu.nvlink.active} of {gpu.nvlink.total} NVLinks{kind}")
        words += ["out of the mesh"] if gpu.nvlink.out_of_mesh else []
    if gpu.fabric is not None and gpu.fabric.cluster:
        words.append(f"fabric {gpu.fabric.cluster}, clique {gpu.fabric.clique}")
    return ", ".join(words)


def _shares(gpu: Gpu, holds: tuple[Hold, ...]) -> Iterator[Json]:
    """The shares of a GPU, oldest first."""
    for hold in holds:
        for device in hold.devices:
            if device.gpu == gpu.uuid and device.milli:
                yield {"milli": device.milli, "phase": hold.phase.value, "pod": _pod(hold.pod)}


def _slices(entry: Entry, gpu: Gpu, holds: tuple[Hold, ...]) -> Iterator[Json]:
    sizes = _sizes(entry)
    exists = {
        Slice(profile_as_asked(each.profile), each.start)
        for each in (gpu.mig.instances if gpu.mig else ())
        if each.start is not None
    }
    held = {d.slice: hold for hold in reversed(holds) for d in hold.devices if d.gpu == gpu.uuid and d.slice}
    for piece in sorted({*exists, *held}, key=lambda each: each.start):
        hold = held.get(piece)
        yield {
            "profile": piece.profile,
            "start": piece.start,
            "size": sizes.get((gpu.uuid, piece.profile), 1),
            "phase": hold.phase.value if hold else "idle",
            "pod": _pod(hold.pod) if hold else None,
            "exists": piece in exists,
            "uuid": entry.uuids.get(Device(gpu.uuid, piece)),
        }


def _sizes(entry: Entry) -> dict[tuple[str, str], int]:
    return {
        (gpu.uuid, profile.name): profile.size
        for gpu in entry.node.gpus
        if gpu.geometry is not None
        for profile in gpu.geometry.profiles
    }


def _first(holds: tuple[Hold, ...], device: Device) -> Hold | None:
    firm = [hold for hold in holds if device in hold.devices]
    return min(firm, key=lambda hold: not hold.firm, default=None)


def _pod(ref: PodRef) -> Json:
    return {"uid": ref.uid, "namespace": ref.namespace, "name": ref.name}
