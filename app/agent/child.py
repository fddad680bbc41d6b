"""A deadline around NVML: it runs in a process of its own, since a call into a wedged driver may never return.

    agent ── {"do": "read"} ───────────────────────▶ child ── pynvml ──▶ driver
          ◀── a Reading, or "=": as the last one ──
          ── {"do": "change", "orders": OrderList} ─▶
          ◀── {"failed": [Failed, …]} ─────────────          one line of JSON each, one request at a time

        (none) ──look()──▶ reading ──answer──▶ idle ──look()──▶ reading
           ▲                  │                  └──change()──▶ changing ──answer──▶ idle
           │ dead             ▼ deadline, or it died               │
           └─────────────── killed ◀───────────────────────────────┘
                              └── cannot be killed ──▶ abandoned: wait, never start a second

A process in uninterruptible sleep inside the driver cannot be killed. A second one would only get stuck beside
it, so while the old one is there no new one starts. The child compares what it read with what it last answered,
since parsing 30 kB every five seconds was most of what a resting agent did.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Protocol

from pydantic import BaseModel

from app.agent.reading import Reading
from app.report import Failed, OrderList

log = logging.getLogger(__name__)

DEADLINE_SECONDS = 20.0
"""For one reading. They take well under a second; under load, finding a MIG device has been seen to take 10 s."""

START_DEADLINE_SECONDS = 120.0
"""For a child's first reading: without persistence mode each GPU is initialised (seconds each), and the far ends of
NVLinks are asked for (33 ms per link, 5 s on an 8-GPU board)."""

CHANGE_SECONDS = 20.0
"""For carrying out one list of a few orders. Removing an instance has been seen to take about a second, making one
less; a bind waits 8 s, and what comes later is reported all the same."""

INSTANCE_SECONDS = 3.0
"""For each instance of a list that is longer."""

BACKOFF_SECONDS = (1.0, 60.0)
"""Before a new child after a failure: the first wait, doubled each time up to the last, and the first again after a
child that was well for as long as the last."""

KILL_SECONDS = 1.0
"""How long a killed child may take to go before it counts as stuck."""

PR_SET_PDEATHSIG = 1


UNCHANGED = b"="
"""The child's answer where it read just what it read before."""


class Changed(BaseModel):
    """The child's answer to a change: what of it failed."""

    failed: tuple[Failed, ...] = ()


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """Why there is no new reading, or no change; `failed` is False while one is merely still under way."""

    reason: str
    failed: bool


class Reader(Protocol):
    """Where the agent gets its readings from."""

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        """A new reading, waiting for it at most so long. The same object as last time where nothing has changed."""

    def change(self, orders: OrderList, seconds: float) -> tuple[Failed, ...] | NoAnswer:
        """Carry out a list, waiting at most so long; what of it failed, or why nobody knows."""

    def close(self) -> None:
        """Let go of NVML."""


class InProcess:
    """NVML in this very process: no deadline. For simulated fleets, where a process per node is all one can afford."""

    def __init__(self, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        from app.agent.nvml import Nvml  # here, since an agent with a child never loads pynvml itself

        self._nvml = Nvml(proc=proc, sys=sys)
        self._last = Reading()

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        """Read now, however long it takes."""
        reading = self._nvml.read()
        if reading != self._last:
            self._last = reading
        return self._last

    def change(self, orders: OrderList, seconds: float) -> tuple[Failed, ...] | NoAnswer:
        """Carry it out, however long it takes."""
        return self._nvml.change(orders)

    def close(self) -> None:
        """End the NVML session."""
        self._nvml.close()


class Child:
    """NVML in a child process. `look` never takes longer than it is told to, whatever the driver does.

    `kill` is an argument so that a test can have a child that cannot be killed.
    """

    def __init__(
        self,
        *,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        deadline_seconds: float = DEADLINE_SECONDS,
        start_deadline_seconds: float = START_DEADLINE_SECONDS,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        kill: Callable[[subprocess.Popen[bytes]], None] = subprocess.Popen.kill,
    ) -> None:
        self._roots = {"proc": str(proc), "sys": str(sys)}
        self._deadline = deadline_seconds
        self._start_deadline = start_deadline_seconds
        self._backoff = backoff_seconds
        self._clock = clock
        self._kill = kill
        self._process: subprocess.Popen[bytes] | None = None
        self._asked_at: float | None = None
        self._answered = False  # whether this child has answered before
        self._abandoned = False
        self._started_at = 0.0
        self._failures = 0
        self._not_before = 0.0
        self._reason = ""
        self._buffer = b""
        self._last: Reading | None = None

    @property
    def pid(self) -> int | None:
        """The child's, for tests and for the log."""
        return self._process.pid if self._process else None

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        """A new reading if the child gives one within so many seconds; a slow one is picked up by a later call."""
        now = self._clock()
        if self._abandoned and not self._is_gone():
            return NoAnswer(self._reason, failed=True)
        if self._process is None:
            if now < self._not_before:
                return NoAnswer(self._reason, failed=True)
            try:
                self._start()
            except OSError as error:  # no process number, memory or file is left for it
                return self._fail(f"NVML's process cannot be started: {error}")
        if self._asked_at is None:
            self._asked_at = now
            if not self._send(b'{"do":"read"}\n', now + self._deadline):
                return self._fail("NVML's process ended")
        due = self._asked_at + (self._deadline if self._answered else self._start_deadline)
        line = self._line(min(wait_seconds, max(0.0, due - now)))
        if line is not None:
            return self._take(line)
        if self._clock() >= due:
            return self._fail(f"NVML has not answered for {due - self._asked_at:.0f} s")
        return NoAnswer("NVML is still being read", failed=False)

    def change(self, orders: OrderList, seconds: float = CHANGE_SECONDS) -> tuple[Failed, ...] | NoAnswer:
        """Have the child carry it out. One that does not within so many seconds is ended, half-way or not.

        A reading that is under way is waited for first; if it takes too long nothing is changed.
        """
        if self._process is None or self._abandoned or self._asked_at is not None:
            answer = self.look(seconds)
            if isinstance(answer, NoAnswer):
                return answer
        until = self._clock() + seconds  # all of it, however long the reading took: nothing is to be ended half-way
        request = b'{"do":"change","orders":%b}\n' % orders.model_dump_json().encode()
        self._send(request, until)  # where that fails, its other pipe says why
        line = self._line(until - self._clock())
        if line is None:
            return self._fail(f"NVML has not carried out orders within {seconds:.0f} s")
        try:
            return Changed.model_validate_json(line).failed
        except ValueError:
            return self._fail(self._nonsense(line))

    def close(self) -> None:
        """End the child, or leave it where it cannot be ended."""
        if self._process is not None:
            self._end()

    def _start(self) -> None:
        command = [sys.executable, "-m", "app.agent.child", json.dumps(self._roots)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0)  # noqa: S603 — ourselves
        self._started_at = self._clock()
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._answered, self._asked_at, self._buffer, self._last = False, None, b"", None
        log.info("NVML runs in process %d", self._process.pid)

    def _send(self, request: bytes, until: float) -> bool:
        """Whether the child has got all of it; one that is stopped does not empty its pipe."""
        assert self._process is not None
        assert self._process.stdin is not None
        pipe = self._process.stdin.fileno()
        try:
            while request:
                _, ready, _ = select.select([], [pipe], [], max(0.0, until - self._clock()))
                if not ready:
                    return False
                request = request[os.write(pipe, request) :]
        except OSError:
            return False
        return True

    def _line(self, wait_seconds: float) -> bytes | None:
        """The child's next line, b"" when it has ended, None when there is none yet."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        until = self._clock() + max(0.0, wait_seconds)
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, until - self._clock()))
            if not ready:
                return None
            piece = os.read(pipe, 1 << 16)
            if not piece:
                return b""
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _take(self, line: bytes) -> Reading | NoAnswer:
        try:
            reading = self._last if line == UNCHANGED and self._last else Reading.model_validate_json(line)
        except ValueError:
            return self._fail(self._nonsense(line))
        self._asked_at = None
        self._answered = True
        if reading.error:
            return self._fail(reading.error)
        if self._clock() - self._started_at >= self._backoff[1]:
            self._failures = 0  # one that has answered and died at once was not well
        self._last = reading
        return reading

    def _nonsense(self, line: bytes) -> str:
        return "NVML's process talks nonsense" if line else f"NVML's process {self._how_it_ended()}"

    def _how_it_ended(self) -> str:
        assert self._process is not None
        try:
            status = self._process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if status < 0:
            known = {each.value: each.name for each in signal.Signals}
            return f"was ended by {known.get(-status, f'signal {-status}')}"
        return f"ended with status {status}"

    def _fail(self, reason: str) -> NoAnswer:
        """Start over with a new child, later and later; a driver in trouble is not helped by haste."""
        first, last = self._backoff
        wait = min(last, first * 2 ** min(self._failures, 16))
        self._failures += 1
        self._not_before = self._clock() + wait * random.uniform(0.8, 1.2)  # noqa: S311 — spreads a fleet's restarts
        self._reason = reason
        self.close()
        if self._abandoned:
            self._reason += f"; its process {self.pid} is stuck in the driver and cannot be ended"
        log.warning("%s; trying again in %.0f s", self._reason, wait)
        return NoAnswer(self._reason, failed=True)

    def _end(self) -> None:
        assert self._process is not None
        self._kill(self._process)
        self._abandoned = True
        self._is_gone(KILL_SECONDS)

    def _is_gone(self, wait_seconds: float = 0.0) -> bool:
        assert self._process is not None
        try:
            self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            return False
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        self._asked_at = None
        self._abandoned = False
        return True


def serve(roots: dict[str, str]) -> None:
    """The child: an answer for each line that comes in, until the agent closes the pipe or dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a hung call could not notice the closed pipe
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    from app.agent.nvml import Nvml

    nvml = Nvml(proc=Path(roots["proc"]), sys=Path(roots["sys"]))
    last = b""
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "change":
            failed = nvml.change(OrderList.model_validate(request["orders"]))
            answer = Changed(failed=failed).model_dump_json().encode()
        else:
            read = nvml.read().model_dump_json().encode()
            answer, last = (UNCHANGED if read == last else read), read
        _write(answers, answer + b"\n")
    nvml.close()


def _write(pipe: RawIOBase, answer: bytes) -> None:
    view = memoryview(answer)
    while view:
        view = view[pipe.write(view) or 0 :]


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
