"""What goes wrong on a node of the fake library, and what else happens there, while processes look at it.

    control = Control(path_of_the_description)
    control.process(4711, gpu=0, profile="3g.20gb", start=4)
    control.xid(gpu=0, code=79)
    control.fail("nvmlDeviceGetName", 999, gpu=3, times=1)

Each method writes the control file anew, in one step (`control.c` describes it), and every process that has the library
open follows at its next call. A GPU is an index or a UUID, a profile a name or an id. `times` 0 is always; counts hold
for all processes of the node together, so "once" is once. Several `Control`s may share a description.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Lines = list[str]

IN_USE, INSUFFICIENT_RESOURCES = 19, 23
RULES = ("hang", "delay", "fail", "die", "refuse")
ONCE = ("event", "reset", "reboot")
XID = 0x8  # NVML's event types
KEPT_ACTS = 200  # of what happens once, the youngest: the library reads at most 256


class Control:
    """The control file of one description. What is set stays until it is changed or `clear`ed, over restarts, too."""

    def __init__(self, description: Path) -> None:
        self.path = description.with_name(description.name + ".control")

    # ---- facts ----

    def set(self, gpu: int | str, word: str, *values: object) -> None:
        """A fact of the description anew: `set(3, "rows", 0, 1, 1, 0)`, `set(0, "recovery", 1)`; see description.c."""
        with self._lines() as lines:
            self._unset(lines, gpu, word, str(values[0]) if word in ("link", "link_errors") else "")
            lines.append(" ".join(["set", str(gpu), word, *map(str, values)]))

    def unset(self, gpu: int | str, word: str) -> None:
        """The fact is as the description says again."""
        with self._lines() as lines:
            self._unset(lines, gpu, word, "")

    def lose(self, gpu: int | str, *, handle: bool = True) -> None:
        """The GPU falls off the bus; without `handle` not even that can be had."""
        self.set(gpu, "lost", 1 if handle else 2)

    def find(self, gpu: int | str) -> None:
        """A lost GPU is back."""
        self.unset(gpu, "lost")

    def privileged(self, yes: bool) -> None:
        """Whether the caller may list instances (and change them, if `configures`)."""
        self._switch("privileged", yes)

    def configures(self, yes: bool) -> None:
        """Whether the caller may change MIG; else it can see and not change (no mig/config capability)."""
        self._switch("configures", yes)

    # ---- processes ----

    def process(
        self,
        pid: int,
        *,
        gpu: int | str,
        profile: str | int | None = None,
        start: int = 0,
        kind: str = "c",
        used_mib: int = 1024,
    ) -> None:
        """A process on the GPU, or in the instance at that place (while there is one). `kind`: c, g or m."""
        place = "-" if profile is None else str(profile)
        with self._lines() as lines:
            lines.append(f"process {kind} {pid} {gpu} {place} {start} {used_mib}")

    def clear_process(self, pid: int) -> None:
        """The process has ended."""
        with self._lines() as lines:
            lines[:] = [line for line in lines if not (line.startswith("process ") and line.split()[2] == str(pid))]

    # ---- calls that go wrong ----

    def hang(self, symbol: str, *, gpu: int | str | None = None, times: int = 0) -> None:
        """The call never returns."""
        self._rule("hang", symbol, gpu=gpu, times=times)

    def delay(self, symbol: str, milliseconds: int, *, gpu: int | str | None = None, times: int = 0) -> None:
        """The call takes so long."""
        self._rule("delay", symbol, milliseconds, gpu=gpu, times=times)

    def fail(self, symbol: str, code: int, *, gpu: int | str | None = None, times: int = 0) -> None:
        """The call answers this code."""
        self._rule("fail", symbol, code, gpu=gpu, times=times)

    def die(self, symbol: str, *, gpu: int | str | None = None, times: int = 1) -> None:
        """The process ends after the call has had its effect, as if killed (status 137)."""
        self._rule("die", symbol, gpu=gpu, times=times)

    def refuse_make(
        self, gpu: int | str, profile: str | int, start: int, *, code: int = INSUFFICIENT_RESOURCES, times: int = 0
    ) -> None:
        """No GPU instance can be made at this place."""
        self._refuse("make", code, gpu, profile, start, times)

    def refuse_remove(
        self, gpu: int | str, profile: str | int, start: int, *, code: int = IN_USE, times: int = 0
    ) -> None:
        """What is at this place cannot be removed, neither its compute instances nor itself."""
        self._refuse("remove", code, gpu, profile, start, times)

    # ---- what happens once ----

    def xid(self, gpu: int | str, code: int, *, gi: int | None = None, ci: int | None = None) -> None:
        """The driver tells every event set that has registered the GPU, once."""
        self.event(gpu, XID, code, gi=gi, ci=ci)

    def event(self, gpu: int | str, kind: int, data: int = 0, *, gi: int | None = None, ci: int | None = None) -> None:
        """As `xid`, of any of NVML's event types."""
        instances = ("-" if number is None else str(number) for number in (gi, ci))
        self._happens(f"event {{}} {gpu} {kind} {data} {' '.join(instances)}")

    def reset(self, gpu: int | str) -> None:
        """The GPU is reset: its instances are gone, a pending MIG mode is taken."""
        self._happens(f"reset {{}} {gpu}")

    def reboot(self) -> None:
        """The node boots: every instance is gone, Ampere keeps its MIG mode, Hopper and later forget it."""
        self._happens("reboot {}")

    # ---- all ----

    def clear(self, *words: str) -> None:
        """Everything is well again (or only these kinds of lines: "hang", "process", "set", …).

        What has happened once stays: it is not undone, and its numbers must not be given again.
        """
        with self._lines() as lines:
            lines[:] = [line for line in lines if _word(line) in ONCE or (words and _word(line) not in words)]

    def _switch(self, word: str, yes: bool) -> None:
        with self._lines() as lines:
            lines[:] = [line for line in lines if _word(line) != word]
            lines.append(f"{word} {int(yes)}")

    @staticmethod
    def _unset(lines: Lines, gpu: int | str, word: str, first: str) -> None:
        head = ["set", str(gpu), word, *([first] if first else [])]
        lines[:] = [line for line in lines if line.split()[: len(head)] != head]

    def _rule(self, what: str, symbol: str, *values: int, gpu: int | str | None, times: int) -> None:
        where = "-" if gpu is None else str(gpu)
        self._happens(" ".join([what, "{}", str(times), where, symbol, *map(str, values)]))

    def _refuse(self, act: str, code: int, gpu: int | str, profile: str | int, start: int, times: int) -> None:
        self._happens(f"refuse {{}} {times} {act} {code} {gpu} {profile} {start}")

    def _happens(self, line: str) -> None:
        """Add a line with the next number: the library tells by it what it has carried out or counted already."""
        with self._lines() as lines:
            lines.append(line.format(1 + _last_number(lines)))

    @contextmanager
    def _lines(self) -> Iterator[Lines]:
        """The file's lines, to be changed; written when the block ends. Others wait meanwhile."""
        with self.path.with_name(self.path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            last = _last_number(lines)
            yield lines
            acts = [line for line in lines if _word(line) in ONCE]
            forgotten = set(acts[:-KEPT_ACTS])
            kept = [line for line in lines if line not in forgotten and not line.startswith("# last")]
            _write(self.path, [f"# last {max(last, _last_number(kept))}", *kept])


def _word(line: str) -> str:
    return line.split(" ", 1)[0]


def _last_number(lines: Lines) -> int:
    """The highest number ever given, also where its line is gone."""
    numbers = [int(line.split()[2]) for line in lines if line.startswith("# last")]
    numbers += [int(line.split()[1]) for line in lines if _word(line) in (*RULES, *ONCE)]
    return max(numbers, default=0)


def _write(path: Path, lines: Lines) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as scratch:
        scratch.write("\n".join(lines) + "\n")
    os.replace(scratch.name, path)
