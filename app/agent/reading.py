"""What one look at NVML found: the value that the process beside the driver hands to the agent.

A reading is not yet a report: a GPU that could not be read has only its index and a reason here; what it was
before is the agent's to remember (`remember`). No NVML and no clock.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from app.report import Gpu, Link, Signal

GONE = "no longer listed by the driver"


class Unreadable(BaseModel):
    """A GPU that the driver lists but that cannot be read: fallen off the bus, or not to be attached."""

    model_config = ConfigDict(frozen=True)

    index: int
    reason: str


class Xid(BaseModel):
    """An XID event that NVML has delivered: on which GPU, and in which instances if it says."""

    model_config = ConfigDict(frozen=True)

    gpu: str
    code: int
    gi_id: int | None = None
    ci_id: int | None = None


class Reading(BaseModel):
    """Everything NVML said in one look. Where `error` is set NVML as a whole did not answer; the rest is empty.

    The GPUs' `signals` are of this moment; what they mean over time is `health`'s to say. `xids` came since the last
    look. `makes_slices` and `makes_none` are as in the report.
    """

    model_config = ConfigDict(frozen=True)

    driver: str = ""
    cuda: str = ""
    nvml: str = ""
    sees_pods: bool = False
    makes_slices: bool = False
    makes_none: str = ""
    xids: tuple[Xid, ...] = ()
    error: str = ""
    gpus: tuple[Gpu, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    links: tuple[Link, ...] = ()


def remember(known: tuple[Gpu, ...], reading: Reading) -> tuple[Gpu, ...]:
    """The node's GPUs: those just read, and those that cannot be read any more as they were last known.

    A GPU does not leave a running node, so one that is gone is broken, and it stays in the report to say so.
    What cannot be read is "bad" whatever the reason, and its pods stay as last seen: nothing should be placed on it
    and nothing be thought free. One that was never read since the agent started has no identity but its index.
    """
    gpus = list(reading.gpus)
    seen = {gpu.uuid for gpu in gpus}
    missing = {gpu.index: gpu for gpu in known if gpu.uuid not in seen}
    for unreadable in reading.unreadable:
        last = missing.pop(unreadable.index, None) or Gpu(
            uuid=f"unknown-{unreadable.index}", index=unreadable.index, product="unknown", memory_mib=0
        )
        gpus.append(_gone(last, "unreadable", unreadable.reason[:500]))
    for last in missing.values():
        if not last.uuid.startswith("unknown-"):
            gpus.append(_gone(last, "lost", GONE))
    return _with_unique_indices(gpus)


def _gone(last: Gpu, sign: str, reason: str) -> Gpu:
    signals = (Signal(name=sign, state="bad", reason=reason),)
    return last.model_copy(update={"health": "bad", "health_reason": reason, "signals": signals})


def _with_unique_indices(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """The driver closes the gap that a vanished GPU leaves, so its old index may be another's: it moves to the end."""
    taken: set[int] = set()
    placed = []
    for gpu in gpus:
        index = gpu.index
        while index in taken:
            index = max(taken) + 1
        taken.add(index)
        placed.append(gpu if index == gpu.index else gpu.model_copy(update={"index": index}))
    return tuple(sorted(placed, key=lambda gpu: gpu.index))
