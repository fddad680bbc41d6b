"""Signs of a GPU's health, as they are at this moment. What they mean over time is `health`'s to say.

    recovery   the action that the driver asks for (the best single question, on drivers that have it)   every look
    clocks     the hardware slows itself down: heat, power brake                                         every look
    ecc        memory errors that could not be corrected since the driver was loaded                     every minute
    rows       remapped rows of memory (Ampere on)        pages   retired pages (before Ampere)          every minute

"nvlink" and "fabric" come from `links` and `fabric`; XIDs from `events`. A call that board or driver do not have gives
no signal.
"""

from __future__ import annotations

from collections.abc import Iterator

import pynvml

from app.agent.nvml.device import A_WHILE_SECONDS, Device
from app.report import Signal

FIELD_RECOVERY_ACTION = 230
FIT_ALONE = (3, 5)
"""Of peer-to-peer and of the IMEX domain: work on this GPU alone goes on."""

RECOVERY_ACTIONS = {
    1: "the driver asks for a reset of this GPU",
    2: "the driver asks for a reboot of the node",
    3: "the driver asks to end peer-to-peer on this GPU",
    4: "the driver asks to drain this GPU and then reset it",
    5: "the driver asks to recover the IMEX domain",
    6: "the driver asks for a reset of the bus",
    7: "the driver asks for a reboot of the system",
}
UNCORRECTED, VOLATILE = 1, 0
SLOWDOWNS = (
    (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "too hot"),
    (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "power brake"),
    (pynvml.nvmlClocksEventReasonHwSlowdown, "slowdown by the hardware"),
)
"""The plainest last: it is set together with the others. What software does to clocks (idle, power cap) is normal."""

SLOW = ("ECC errors", "remapped rows", "retired pages")
"""What is kept for a minute; an event that concerns memory makes it be asked at once."""


def read_signals(device: Device) -> Iterator[Signal]:
    """Every sign that can be had now. "recovery" is there with "ok", too: that the driver answers overrules XIDs."""
    for signal in (_recovery(device), _clocks(device), _ecc(device), _rows(device), _pages(device)):
        if signal is not None:
            yield signal


def _recovery(device: Device) -> Signal | None:
    if not device.keep("has recovery action", lambda: _recovery_action(device) is not None):
        return None
    action = _recovery_action(device)
    if action is None:
        return None
    if action == 0:
        return Signal(name="recovery", state="ok")
    reason = RECOVERY_ACTIONS.get(action, f"the driver asks for recovery action {action}")
    return Signal(name="recovery", state="suspect" if action in FIT_ALONE else "bad", reason=reason)


def _recovery_action(device: Device) -> int | None:
    return device.fields("recovery action", FIELD_RECOVERY_ACTION)[0]


def _clocks(device: Device) -> Signal | None:
    if not device.keep("has clock events", lambda: _clock_reasons(device) is not None):
        return None
    reasons = _clock_reasons(device) or 0
    for bit, words in SLOWDOWNS:
        if reasons & bit:
            return Signal(name="clocks", state="suspect", reason=f"clocks are held down: {words}")
    return None


def _clock_reasons(device: Device) -> int | None:
    reasons = device.ask("clocks", pynvml.nvmlDeviceGetCurrentClocksEventReasons, device.handle)
    if reasons is None:  # its name before R535
        reasons = device.ask("clocks", pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, device.handle)
    return None if reasons is None else int(reasons)


def _ecc(device: Device) -> Signal | None:
    count = device.keep(
        "ECC errors",
        lambda: device.ask("ECC errors", pynvml.nvmlDeviceGetTotalEccErrors, device.handle, UNCORRECTED, VOLATILE),
        seconds=A_WHILE_SECONDS,
    )
    if not count:
        return None
    return Signal(name="ecc", state="suspect", reason=f"{count} uncorrected ECC errors since the driver was loaded")


def _rows(device: Device) -> Signal | None:
    rows = device.keep_asking("remapped rows", pynvml.nvmlDeviceGetRemappedRows, seconds=A_WHILE_SECONDS)
    if rows is None:
        return None
    _, _, pending, failed = rows
    if failed:
        return Signal(name="rows", state="bad", reason="remapping a row of memory has failed: replace this GPU")
    if pending:
        return Signal(name="rows", state="suspect", reason="a row of memory is remapped at the next reset of this GPU")
    return None


def _pages(device: Device) -> Signal | None:
    pending = device.keep_asking(
        "retired pages", pynvml.nvmlDeviceGetRetiredPagesPendingStatus, seconds=A_WHILE_SECONDS
    )
    if pending != 1:
        return None
    return Signal(name="pages", state="suspect", reason="pages of memory are retired at the next reset of this GPU")
