"""A GPU while it is being read: how it is asked, how its errors read, and what is kept of its answers over looks."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from math import inf
from typing import Any, TypeVar, cast

import pynvml

from app.report import Signal

ABSENT = (pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
"""The board or the driver does not have this; nothing is wrong."""

A_WHILE_SECONDS = 60.0
"""How long answers are kept that change rarely, or that cost much: modes, ECC counts, remapped rows, peer-to-peer."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer, since when we have it, and what it depended on."""

    value: Any
    at: float
    given: Hashable


@dataclass(slots=True)
class Device:
    """A GPU while it is being read: its handle, who it is, and what could not be read about it.

    `kept` belongs to the session and lives over looks; `now` is the look's time on the session's clock.
    """

    handle: Any
    uuid: str
    index: int
    kept: dict[str, Kept]
    now: float
    bus_id: str = ""
    notes: list[str] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)
    sees_processes: bool = True
    privileged: bool | None = None
    """Whether NVML's privileged calls answer; None while none was made."""

    def ask(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The call's answer, or None where board or driver lack it, or where it failed (then noted in words).

        Raises NVMLError when the GPU is lost: nothing else about it can be read.
        """
        try:
            return call(*arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise
            if error.value not in ABSENT:
                self.notes.append(f"{what}: {words(error)}")
        except UnicodeDecodeError:
            self.notes.append(f"{what}: what NVML says is no text")
        return None

    def ask_privileged(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """The same for a call that needs privileges: without them the answer is None, and nothing is wrong."""
        try:
            answer = call(*arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_NO_PERMISSION:
                self.privileged = False
                return None
            return self.ask(what, _raise, error)
        self.privileged = self.privileged is not False
        return answer

    def keep(self, what: str, find: Callable[[], T], *, seconds: float = inf, given: Hashable = None) -> T:
        """What was found last, or found anew: after so long, or when what it depends on (`given`) is another.

        An answer that came with a note is not kept: a failure may pass.
        """
        kept = self.kept.get(what)
        if kept is not None and kept.given == given and self.now - kept.at < seconds:
            return cast(T, kept.value)
        before = len(self.notes)
        value = find()
        if len(self.notes) == before:
            self.kept[what] = Kept(value, self.now, given)
        return value

    def keep_asking(self, what: str, call: Callable[..., Any], *, seconds: float = inf) -> Any:
        """`ask` about the GPU itself, kept."""
        return self.keep(what, lambda: self.ask(what, call, self.handle), seconds=seconds)

    def recall(self, what: str, otherwise: T) -> T:
        """What was remembered in this session."""
        kept = self.kept.get(what)
        return otherwise if kept is None else cast(T, kept.value)

    def remember(self, what: str, value: T) -> T:
        """Keep it for the session, instead of what was remembered before."""
        self.kept[what] = Kept(value, self.now, None)
        return value

    def fields(self, what: str, *fields: int | tuple[int, int]) -> list[int | None]:
        """Whole-number fields (each with a scope, if given); None for each that board or driver lack."""
        values = self.ask(what, pynvml.nvmlDeviceGetFieldValues, self.handle, list(fields))
        if values is None:
            return [None] * len(fields)
        return [whole_number(value) for value in values]


def _raise(error: pynvml.NVMLError) -> None:
    raise error


def whole_number(value: Any) -> int | None:
    """What an nvmlFieldValue_t holds, by its type: reading another member of the union could be rubbish."""
    if value.nvmlReturn != pynvml.NVML_SUCCESS:
        return None
    members = {
        pynvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        pynvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
        pynvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
        pynvml.NVML_VALUE_TYPE_UNSIGNED_SHORT: "usVal",
    }
    return int(getattr(value.value, members.get(value.valueType, "uiVal")))


def words(error: pynvml.NVMLError) -> str:
    """What NVML said, and its number for looking it up."""
    return f"{error} ({error.value})"


def text(value: str | bytes | None) -> str:
    """NVML's text as ours; none where it had none."""
    if value is None:
        return ""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def bus_id(domain: int, bus: int, device: int) -> str:
    """As sysfs writes it: a domain of at least four hex digits, in small letters."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.0"
