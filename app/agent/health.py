"""What a GPU's signs and XIDs mean over time: worse at once, better only after a while.

No NVML, no files, and time is an argument.

    signals of this look ─┐                          ┌─▶ Gpu.signals, health (the worst), health_reason
    XIDs since the last ──┴──▶ Judge.judge(…, now) ──┤
                                                     └─▶ Judge.memory: what a restarted agent must know

        ok ──seen──▶ suspect ──worse──▶ bad            each sign of each GPU by itself
         ▲             │  ▲               │
         └──gone long──┘  └───gone long───┘            "long" doubles with each relapse

A sign that comes and goes with every look is therefore there all the time. An XID is an event, so what it says lasts
until the driver's own recovery field has said "nothing to be done" for a while, or, on drivers without that field,
for a longer time; and at most until the node is booted again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict

from app.agent.reading import Xid
from app.report import Gpu, Health, Signal

CLEAR_SECONDS = 60.0
"""How long a sign must be gone before the GPU counts as better. Chosen by feel: a dozen looks."""

RECOVER_SECONDS = 60.0
"""How long the driver's recovery field must say "nothing to be done" after an XID. Chosen: field and event need not
change in the same moment, and a pod started on a GPU that fails again costs more than a minute."""

UNTOLD_SECONDS = 3600.0
"""How long an XID that wants a reset counts where the driver has no recovery field. Chosen: nobody says that the
GPU was reset, and a card that never comes back is a card lost; a GPU that still is broken will say so again."""

LONGEST_SECONDS = 4 * 3600.0
"""Relapses double each of the times above up to this."""

RELAPSE_FACTOR = 10.0
"""A sign that is back within so many times the time it had to be gone is a relapse."""

EVENT_SECONDS = 3600.0
"""How long an XID that is no fault of the GPU is still mentioned."""

RANK: dict[Health, int] = {"ok": 0, "suspect": 1, "bad": 2}
ORDER: tuple[Health, ...] = ("ok", "suspect", "bad")

Kind = Literal["program", "nothing", "reset", "reboot", "nvlink", "support", "look", "follows", "recovery", "unknown"]


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a kind of XID says about the GPU, and in which words."""

    health: Health
    words: str


MEANINGS: dict[Kind, Meaning] = {
    "program": Meaning("ok", "a program's fault; it must be started again"),
    "nothing": Meaning("ok", "for information"),
    "follows": Meaning("ok", "follows another fault"),
    "recovery": Meaning("ok", "the recovery action has changed"),
    "nvlink": Meaning("suspect", "an NVLink fault; fit for work on this GPU alone"),
    "look": Meaning("suspect", "power, mechanics or software of the GPU need a look"),
    "unknown": Meaning("suspect", "an XID that is not in the table"),
    "support": Meaning("bad", "NVIDIA's support must be asked"),
    "reset": Meaning("bad", "the GPU must be reset"),
    "reboot": Meaning("bad", "the node must be booted again"),
}

XIDS_OF: dict[Kind, tuple[int | tuple[int, int], ...]] = {
    "program": (8, 11, 13, 31, (39, 41), 60, (68, 72), (75, 77), 80, (82, 86), 88, 89, 94, (96, 105), (126, 135), 139),
    "nothing": (37, 38, 43, 44, 63, 66, 67, 92, 93, (106, 108), 121, 137, 141, 157, 160, 161),
    "reset": (46, 48, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    "reboot": (79, 151),
    "nvlink": (74, (144, 150)),
    "support": (142,),
    "look": (54, 78),
    "follows": (45,),
    "recovery": (154,),
}
"""NVIDIA's XID catalogue (docs.nvidia.com/deploy/xid-errors), its immediate actions, condensed. Where the catalogue
says "it depends" the harmful reading is taken: 48 (double-bit ECC) as a reset, 74 and 144-150 as NVLink. 45 comes after
what caused it, which has its own XID. 151 asks for the virtual machine to be restarted, which is the node. 154 only
points to the recovery field, which is read anyway."""


def _table() -> dict[int, Kind]:
    table: dict[int, Kind] = {}
    for kind, codes in XIDS_OF.items():
        for code in codes:
            first, last = code if isinstance(code, tuple) else (code, code)
            table.update(dict.fromkeys(range(first, last + 1), kind))
    return table


XIDS: dict[int, Kind] = _table()


def kind_of(code: int) -> Kind:
    """What an XID means."""
    return XIDS.get(code, "unknown")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things must be gone. Tests and demonstrations take shorter times."""

    clear_seconds: float = CLEAR_SECONDS
    recover_seconds: float = RECOVER_SECONDS
    untold_seconds: float = UNTOLD_SECONDS
    longest_seconds: float = LONGEST_SECONDS

    def scaled(self, factor: float) -> Patience:
        """All of them so many times as long."""
        return Patience(
            self.clear_seconds * factor,
            self.recover_seconds * factor,
            self.untold_seconds * factor,
            self.longest_seconds * factor,
        )


class Sign(BaseModel):
    """A sign as it is reported, and how often it has come back. With its times it would be written at each look."""

    model_config = ConfigDict(frozen=True)

    state: Health
    reason: str
    relapses: int = 0


class Remembered(BaseModel):
    """What is to be remembered of one GPU: who it is (it may be lost when the agent starts), its signs, its XIDs."""

    model_config = ConfigDict(frozen=True)

    gpu: Gpu
    signs: dict[str, Sign] = {}
    xids: tuple[int, ...] = ()


class Memory(BaseModel):
    """What outlives an agent, but not the node's boot: a reboot ends what XIDs have said, and signs show again."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    node: str
    boot: str
    gpus: tuple[Remembered, ...] = ()


@dataclass(frozen=True, slots=True)
class _Held:
    """A sign that is reported: when it was last as bad as that, and when it last gave this reason."""

    sign: Sign
    seen: float
    reason_seen: float


@dataclass(slots=True)
class _History:
    """One GPU's signs by name, those that are gone (when, after how many relapses), and its XIDs by code (when)."""

    gpu: Gpu
    held: dict[str, _Held] = field(default_factory=dict)
    gone: dict[str, tuple[float, int]] = field(default_factory=dict)
    xids: dict[int, float] = field(default_factory=dict)
    events: dict[int, float] = field(default_factory=dict)


class Judge:
    """Says how healthy each GPU is. GPUs are told apart by UUID; the clock must not go back."""

    def __init__(self, memory: Memory | None = None, *, patience: Patience | None = None, now: float = 0.0) -> None:
        self._patience = patience or Patience()
        self._histories: dict[str, _History] = {}
        for known in memory.gpus if memory else ():
            held = {name: _Held(sign, now, now) for name, sign in known.signs.items()}
            xids = dict.fromkeys(known.xids, now)
            self._histories[known.gpu.uuid] = _History(known.gpu, held, xids=xids)

    def judge(self, gpus: Iterable[Gpu], xids: Iterable[Xid], now: float) -> tuple[Gpu, ...]:
        """The GPUs with what their signs and XIDs mean; their `signals` are those of this look."""
        by_gpu: dict[str, list[int]] = {}
        for xid in xids:
            by_gpu.setdefault(xid.gpu, []).append(xid.code)
        judged = tuple(self._judged(gpu, by_gpu.get(gpu.uuid, []), now) for gpu in gpus)
        self._forget_unknown({gpu.uuid for gpu in judged})
        wanting = [gpu for gpu in judged if self._wants_reboot(gpu.uuid)]
        return tuple(_beside(gpu, wanting) for gpu in judged) if wanting else judged

    def _forget_unknown(self, there: set[str]) -> None:
        """A GPU that had no name but its index has one now, and a history under it."""
        for uuid in [uuid for uuid in self._histories if uuid.startswith("unknown-") and uuid not in there]:
            del self._histories[uuid]

    def _wants_reboot(self, uuid: str) -> bool:
        history = self._histories[uuid]
        return "xid" in history.held and any(kind_of(code) == "reboot" for code in history.xids)

    @property
    def moving(self) -> bool:
        """Whether time alone can change what is reported."""
        return any(history.held or history.events for history in self._histories.values())

    @property
    def known(self) -> tuple[Gpu, ...]:
        """Every GPU that was ever judged, as it was identified."""
        return tuple(history.gpu for history in self._histories.values())

    def memory(self, *, node: str, boot: str) -> Memory:
        """What to hand to the judge of the next agent. Equal as long as nothing has happened."""
        return Memory(
            node=node,
            boot=boot,
            gpus=tuple(
                Remembered(
                    gpu=history.gpu,
                    signs={name: held.sign for name, held in sorted(history.held.items())},
                    xids=tuple(sorted(history.xids)),
                )
                for uuid, history in sorted(self._histories.items())
                if not uuid.startswith("unknown-")
            ),
        )

    def _judged(self, gpu: Gpu, codes: list[int], now: float) -> Gpu:
        history = self._histories.setdefault(gpu.uuid, _History(_identity(gpu)))
        if gpu.product != "unknown":
            history.gpu = _identity(gpu)
        harmful = {code for code in codes if MEANINGS[kind_of(code)].health != "ok"}
        history.xids.update(dict.fromkeys(harmful, now))
        history.events.update(dict.fromkeys(set(codes) - harmful, now))
        raw = {signal.name: signal for signal in gpu.signals if signal.name != "xid"}
        for name in sorted({*raw, *history.held} - {"xid"}):
            self._step(history, name, raw.get(name), now, self._patience.clear_seconds)
        self._step_xids(history, raw.get("recovery"), new=bool(harmful), now=now)
        for code in [code for code, at in history.events.items() if now - at >= EVENT_SECONDS]:
            del history.events[code]
        return _told(gpu, history)

    def _step_xids(self, history: _History, recovery: Signal | None, *, new: bool, now: float) -> None:
        """Together the XIDs are one sign, "seen" with each new one and while something is to be done about it."""
        if not history.xids:
            return
        told = recovery is not None
        final = not told and any(kind_of(code) == "reboot" for code in history.xids)
        pending = recovery is not None and recovery.state != "ok"
        sign = _sign_of(history.xids) if new or pending or final or "xid" not in history.held else None
        seconds = self._patience.recover_seconds if told else self._patience.untold_seconds
        self._step(history, "xid", sign, now, seconds)
        if "xid" not in history.held:
            history.xids.clear()

    def _step(self, history: _History, name: str, raw: Signal | None, now: float, seconds: float) -> None:
        """One sign at one look."""
        held = history.held.get(name)
        state: Health = raw.state if raw else "ok"
        if held is None:
            if raw and state != "ok":
                sign = Sign(state=state, reason=raw.reason, relapses=self._relapses(history, name, now, seconds))
                history.held[name] = _Held(sign, now, now)
            return
        if raw and RANK[state] >= RANK[held.sign.state]:
            history.held[name] = self._seen_again(held, raw, now)
            return
        if now - held.seen < self._hold(seconds, held.sign.relapses):
            return
        if raw and state != "ok":
            sign = held.sign.model_copy(update={"state": state, "reason": raw.reason})
            history.held[name] = _Held(sign, now, now)
        else:
            del history.held[name]
            history.gone[name] = (now, held.sign.relapses)

    def _seen_again(self, held: _Held, raw: Signal, now: float) -> _Held:
        """The reason changes only when the state does, or when it has not been given for a while: two that take
        turns, or a counter in its words, must not make a report of each look."""
        if raw.state == held.sign.state:
            if raw.reason == held.sign.reason:
                return replace(held, seen=now, reason_seen=now)
            if raw.name != "xid" and now - held.reason_seen < self._patience.clear_seconds:
                return replace(held, seen=now)
        return _Held(held.sign.model_copy(update={"state": raw.state, "reason": raw.reason}), now, now)

    def _relapses(self, history: _History, name: str, now: float, seconds: float) -> int:
        gone_at, relapses = history.gone.pop(name, (None, 0))
        if gone_at is None or now - gone_at > RELAPSE_FACTOR * self._hold(seconds, relapses):
            return 0
        return relapses + 1

    def _hold(self, seconds: float, relapses: int) -> float:
        return max(seconds, min(self._patience.longest_seconds, seconds * float(2 ** min(relapses, 30))))


def _sign_of(xids: Iterable[int]) -> Signal:
    """The worst of them, with every code of that state."""
    worst = ORDER[max(RANK[MEANINGS[kind_of(code)].health] for code in xids)]
    kinds: dict[Kind, list[str]] = {}
    for code in sorted(xids):
        if MEANINGS[kind_of(code)].health == worst:
            kinds.setdefault(kind_of(code), []).append(str(code))
    reason = "; ".join(f"XID {', '.join(codes)}: {MEANINGS[kind].words}" for kind, codes in kinds.items())
    return Signal(name="xid", state=worst, reason=reason[:500])


def _told(gpu: Gpu, history: _History) -> Gpu:
    """The GPU as it is reported.

    Without a sign its reason keeps what could not be read, and XIDs that are no fault of it.
    """
    signals = tuple(
        Signal(name=name, state=held.sign.state, reason=held.sign.reason[:500])
        for name, held in sorted(history.held.items(), key=lambda item: (-RANK[item[1].sign.state], item[0]))
    )
    words = [signal.reason or signal.name for signal in signals]
    if not signals:
        words = [gpu.health_reason] if gpu.health_reason else []
        if history.events:
            codes = ", ".join(map(str, sorted(history.events)))
            words.append(f"XID {codes} within the last hour: no fault of the GPU")
    health = signals[0].state if signals else "ok"
    return gpu.model_copy(update={"signals": signals, "health": health, "health_reason": "; ".join(words)[:500]})


def _beside(gpu: Gpu, wanting: list[Gpu]) -> Gpu:
    """Another GPU wants the node to be booted again: what is newly placed on this one would be in the way of that."""
    others = [str(each.index) for each in wanting if each.uuid != gpu.uuid]
    if not others:
        return gpu
    reason = f"GPU {', '.join(others)} of this node: {MEANINGS['reboot'].words}"
    signals = (Signal(name="node", state="bad", reason=reason), *gpu.signals)
    words = "; ".join(each for each in (reason, gpu.health_reason) if each)
    return gpu.model_copy(update={"signals": signals, "health": "bad", "health_reason": words[:500]})


def _identity(gpu: Gpu) -> Gpu:
    """What stays of a GPU that cannot be read when the agent starts."""
    kept = ("uuid", "index", "minor", "serial", "product", "brand", "architecture", "compute_capability", "memory_mib")
    return Gpu(pci=gpu.pci, numa=gpu.numa, **{name: getattr(gpu, name) for name in kept})
