"""Child processes that certainly end: when told to, when we end, and when we are killed.

Knows nothing of Kubernetes. Each child writes to its own log file and has its own process group, so that a
Ctrl-C in the terminal reaches only us and we take them down in order.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 5.0  # between SIGTERM and SIGKILL
LOG_TAIL_LINES = 30

# Our Go programs end when the process named here is no longer their parent (controlplane/parent.go).
PARENT_VARIABLE = "TANGRAM_PARENT_PID"

# For programs that do not watch their parent: the kernel kills them when the thread that started them ends.
TIE_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None, use_errno=True).prctl(1, 9); "
    "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)

# A child gets these and nothing else of our environment: no proxy, no CA bundle, no kubeconfig.
INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "TZ")


class ProcessFailed(Exception):
    """A child ended or did not get ready; the message ends with the tail of its log."""


@dataclass(frozen=True, slots=True)
class _Command:
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    throwaway: bool


class Processes:
    """Named children with one directory for their logs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._commands: dict[str, _Command] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        atexit.register(self.stop_all)

    def start(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        throwaway: bool = False,
    ) -> None:
        """Start `argv`. A `throwaway` heeds TANGRAM_PARENT_PID itself and is stopped by SIGKILL."""
        command = tuple(str(part) for part in argv)
        if not throwaway:
            command = (sys.executable, "-S", "-c", TIE_TO_PARENT, str(os.getpid()), *command)
        self._commands[name] = _Command(command, dict(environment or {}), throwaway)
        self._spawn(name)

    def restart(self, name: str) -> None:
        """Start `name` again, with the same command; its log goes on."""
        self.kill(name)
        self._spawn(name)

    def kill(self, name: str) -> None:
        """SIGKILL: the child runs no clean-up. Returns when it has gone."""
        child = self._running.pop(name, None)
        if child is not None:
            child.kill()
            child.wait(timeout=STOP_SECONDS)

    def pause(self, name: str) -> None:
        """Freeze the child, as if its machine hung."""
        self._running[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """Let a frozen child go on."""
        self._running[name].send_signal(signal.SIGCONT)

    def stop_all(self) -> None:
        """Ask all to end, the last started first, and kill those that do not. Throwaways go at once."""
        polite = [name for name in self._running if not self._commands[name].throwaway]
        children = [self._running.pop(name) for name in reversed(polite)]
        for child in children:
            child.terminate()
            child.send_signal(signal.SIGCONT)  # it may be paused
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            try:
                child.wait(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(timeout=STOP_SECONDS)
        for name in reversed(self.names()):
            self.kill(name)
        atexit.unregister(self.stop_all)

    def is_running(self, name: str) -> bool:
        """Whether the child is there and has not ended by itself."""
        child = self._running.get(name)
        return child is not None and child.poll() is None

    def pid(self, name: str) -> int:
        """The child's process id."""
        return self._running[name].pid

    def names(self) -> list[str]:
        """The children that were started and not stopped, in order."""
        return list(self._running)

    def rss_mib(self, name: str) -> float:
        """Resident memory of the child, in MiB."""
        for line in Path(f"/proc/{self.pid(name)}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    def logs(self, name: str) -> str:
        """All that the child has written so far."""
        return self._log_file(name).read_text(errors="replace")

    def failed(self, name: str, what: str) -> ProcessFailed:
        """An error about `name` that carries the end of its log."""
        tail = "\n".join(self.logs(name).splitlines()[-LOG_TAIL_LINES:])
        return ProcessFailed(f"{name} {what}; the end of {self._log_file(name)}:\n{tail}")

    def _spawn(self, name: str) -> None:
        if self.is_running(name):
            raise ValueError(f"{name} is already running")
        command = self._commands[name]
        environment = {key: os.environ[key] for key in INHERITED if key in os.environ}
        environment |= {
            "HOME": str(self._directory),
            PARENT_VARIABLE: str(os.getpid()),
            **command.environment,
        }
        with self._log_file(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                command.argv,
                env=environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def _log_file(self, name: str) -> Path:
        return self._directory / f"{name}.log"
