"""XIDs as they come: a thread waits for NVML's events, and each look takes what has come since the last.

    watch(devices) ──registers──▶ event set ──wait, 1 s at a time──▶ thread ──▶ bounded, once ──take()──▶ look
         ▲                                                             │ an error
         └── a new set at the next look, or when GPUs have changed ◀───┘

Events are registered on the GPU, never on a MIG device; their data names the instances. An event about memory is no
XID: it says that the GPU's ECC and row counts are to be asked again at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from ctypes import c_void_p, cast
from typing import Any

import pynvml

from app.agent.nvml.device import A_WHILE_SECONDS, ABSENT, Device, words
from app.agent.reading import Xid

log = logging.getLogger(__name__)

XID = pynvml.nvmlEventTypeXidCriticalError
WANTED = (
    XID
    | pynvml.nvmlEventTypeDoubleBitEccError
    | pynvml.nvmlEventTypeDramRetirementEvent
    | pynvml.nvmlEventTypeDramRetirementFailure
    | pynvml.nvmlEventTypeGpuUnavailableError
    | pynvml.nvmlEventTypeGpuRecoveryAction
)
WAIT_MILLISECONDS = 1000
"""How long one wait takes at most, and so how long ending the session may take."""

HUNG_SECONDS = 30.0
"""A wait that has not returned for so long is stuck in the driver, and XIDs are missed."""

MOST_EVENTS = 1024
"""Kept between two looks, each once: a program in a loop of faults must neither fill the memory nor push out others."""

NO_INSTANCE = 0xFFFFFFFF


class Events:
    """The events of all GPUs. Nothing here raises: without events a GPU is read as before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._xids: dict[Xid, None] = {}
        self._touched: set[str] = set()
        self._lock = threading.Lock()
        self._set: Any = None
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._watched: frozenset[str] = frozenset()
        self._failed: dict[str, str] = {}
        self._waiting_since = 0.0
        self._retry_at = 0.0
        self._absent = False

    def begin(self) -> None:
        """A new session: what the last one did not have, this one may. What has come and was not taken stays."""
        self._absent = False
        self._failed = {}

    def watch(self, devices: Iterable[Device]) -> None:
        """See to it that these GPUs' events arrive. Where a GPU cannot be registered its notes say so."""
        devices = list(devices)
        uuids = frozenset(device.uuid for device in devices)
        healthy = self._thread is not None and self._thread.is_alive() and uuids == self._watched
        retry = bool(self._failed) and self._clock() >= self._retry_at
        if not self._absent and devices and (not healthy or retry):
            self.close()
            self._open(devices)
        hung = self._thread is not None and time.monotonic() - self._waiting_since > HUNG_SECONDS
        for device in devices:
            if hung:
                device.notes.append("events: NVML's wait for them does not return")
            if device.uuid in self._failed:
                device.notes.append(f"events: {self._failed[device.uuid]}")

    def take(self) -> tuple[Xid, ...]:
        """The XIDs that came since the last time."""
        with self._lock:
            taken = tuple(self._xids)
            self._xids.clear()
        return taken

    def take_touched(self) -> set[str]:
        """GPUs (UUIDs) whose memory had an event since the last time."""
        with self._lock:
            taken, self._touched = self._touched, set()
        return taken

    def close(self) -> None:
        """Stop waiting. A thread that is stuck in the driver keeps its set: freeing it would pull it from under it."""
        thread, self._thread = self._thread, None
        self._ending.set()
        if thread is not None:
            thread.join(3 * WAIT_MILLISECONDS / 1000)
            if thread.is_alive():
                log.warning("NVML's wait for events does not end; it is left behind")
                self._set = None
        self._free()
        self._watched = frozenset()

    def _open(self, devices: list[Device]) -> None:
        self._retry_at = self._clock() + A_WHILE_SECONDS
        try:
            self._set = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            self._absent = error.value in ABSENT
            self._failed = {} if self._absent else {device.uuid: words(error) for device in devices}
            return
        self._failed = {}
        owners = {}
        for device in devices:
            if self._register(device):
                owners[_address(device.handle)] = device.uuid
        if not owners and not self._failed:
            self._absent = True  # no GPU of this node has events
            self._free()
            return
        self._watched = frozenset(device.uuid for device in devices)
        self._ending = threading.Event()
        arguments = (self._set, owners, self._ending)
        self._waiting_since = time.monotonic()
        self._thread = threading.Thread(target=self._wait, args=arguments, name="nvml-events", daemon=True)
        self._thread.start()

    def _register(self, device: Device) -> bool:
        try:
            mask = pynvml.nvmlDeviceGetSupportedEventTypes(device.handle) & WANTED
            if mask:
                pynvml.nvmlDeviceRegisterEvents(device.handle, mask, self._set)
            return bool(mask)
        except pynvml.NVMLError as error:
            if error.value not in ABSENT:
                self._failed[device.uuid] = words(error)
            return False

    def _wait(self, event_set: Any, owners: Mapping[int | None, str], ending: threading.Event) -> None:
        while not ending.is_set():
            self._waiting_since = time.monotonic()
            try:
                event = pynvml.nvmlEventSetWait_v2(event_set, WAIT_MILLISECONDS)
            except pynvml.NVMLError as error:
                if error.value == pynvml.NVML_ERROR_TIMEOUT:
                    continue
                log.warning("waiting for NVML's events failed, begun anew at the next look: %s", words(error))
                return
            self._put(event, owners.get(_address(event.device)) or _uuid(event.device))

    def _put(self, event: Any, uuid: str) -> None:
        if not uuid:
            log.warning("an event of an unknown GPU: type %#x, data %d", event.eventType, event.eventData)
            return
        with self._lock:
            if event.eventType == XID:
                gi_id, ci_id = _instance(event.gpuInstanceId), _instance(event.computeInstanceId)
                if len(self._xids) < MOST_EVENTS:
                    self._xids[Xid(gpu=uuid, code=event.eventData, gi_id=gi_id, ci_id=ci_id)] = None
            else:
                self._touched.add(uuid)

    def _free(self) -> None:
        event_set, self._set = self._set, None
        if event_set is not None:
            try:
                pynvml.nvmlEventSetFree(event_set)
            except pynvml.NVMLError as error:
                log.warning("NVML did not free its event set: %s", words(error))


def _address(handle: Any) -> int | None:
    """Handles are pointers, the same for one GPU during a session: a lost GPU cannot be asked for its UUID."""
    return cast(handle, c_void_p).value


def _uuid(handle: Any) -> str:
    try:
        return str(pynvml.nvmlDeviceGetUUID(handle))
    except pynvml.NVMLError:
        return ""


def _instance(number: int) -> int | None:
    return None if number == NO_INSTANCE else number
