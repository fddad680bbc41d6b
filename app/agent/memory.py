"""The agent's small file: what of the GPUs' health a restarted agent must know. `health` says what is in it.

Nothing here may keep an agent from reporting: a file that is damaged, of another node, of another version or of
the time before a reboot is said in the log and left aside; one that cannot be written is said once.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from app.agent.health import Memory

log = logging.getLogger(__name__)

NAME = "agent.json"

BOOT_ID = Path("sys/kernel/random/boot_id")
"""Under /proc; the same in each container, and another after each boot."""


def boot_id(proc: Path) -> str:
    """The host's boot, or "" where it cannot be told."""
    try:
        return (proc / BOOT_ID).read_text().strip()
    except OSError as error:
        log.warning("which boot of the node this is cannot be read: %s", error)
        return ""


class MemoryFile:
    """Where an agent keeps its memory. Without a folder, or where no boot can be told, there is none."""

    def __init__(self, directory: Path | None, *, node: str, boot: str) -> None:
        self._file = directory / NAME if directory is not None and boot else None
        self._node = node
        self._boot = boot
        self._kept: Memory | None = None
        self._said = ""

    def recall(self) -> Memory | None:
        """What the agent before this one has kept, if it still holds."""
        if self._file is None:
            return None
        try:
            memory = Memory.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is not understood and left aside: %s", self._file, str(error)[:300])
            return None
        if memory.node != self._node:
            log.warning("%s is of node %r and left aside", self._file, memory.node)
            return None
        if memory.boot != self._boot:
            log.info("%s is of before the node was booted and left aside", self._file)
            return None
        self._kept = memory
        return memory

    def keep(self, memory: Memory) -> None:
        """Write it where it differs from what is there; all of it or nothing, whenever the agent is killed."""
        if self._file is None or memory == self._kept:
            return
        new = self._file.with_suffix(".new")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with new.open("wb") as out:
                out.write(memory.model_dump_json().encode())
                out.flush()
                os.fsync(out.fileno())
            new.replace(self._file)
        except OSError as error:
            if str(error) != self._said:
                log.warning("what was seen of the GPUs' health is not kept: %s", error)
            self._said = str(error)
            return
        self._kept = memory
