"""The agent's second small file: which device each container was handed, which pods were refused, and what the service
has promised.

Unlike `memory` it outlives the node's boot, as the kubelet's own checkpoint does, and a write that fails is said to the
caller: a device must not be handed out that a restarted agent would not know of.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel

from app.agent.matching import Held
from app.report import Placements

log = logging.getLogger(__name__)

NAME = "handed.json"


class Record(BaseModel):
    """What is in it. `refused`: UIDs of pods that have failed by our word, and may be listed as waiting for a while."""

    node: str
    held: tuple[Held, ...] = ()
    placements: Placements | None = None
    refused: tuple[str, ...] = ()


class RecordFile:
    """Where an agent keeps its record. Without a folder there is none, and a restarted agent relies on the kubelet."""

    def __init__(self, directory: Path | None, *, node: str) -> None:
        self._file = directory / NAME if directory is not None else None
        self._node = node

    def recall(self) -> Record:
        """What the agent before this one has kept; nothing where that is not understood, which is said in the log."""
        nothing = Record(node=self._node)
        if self._file is None:
            return nothing
        try:
            record = Record.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return nothing
        except (OSError, ValueError) as error:
            log.warning("%s is not understood and left aside: %s", self._file, str(error)[:300])
            return nothing
        if record.node != self._node:
            log.warning("%s is of node %r and left aside", self._file, record.node)
            return nothing
        return record

    def keep(self, held: tuple[Held, ...], placements: Placements | None, refused: Iterable[str] = ()) -> None:
        """Write it, all of it or nothing; it is on the disk when this returns. Raises OSError."""
        if self._file is None:
            return
        new = self._file.with_suffix(".new")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as out:
            record = Record(node=self._node, held=held, placements=placements, refused=tuple(sorted(refused)))
            out.write(record.model_dump_json().encode())
            out.flush()
            os.fsync(out.fileno())
        new.replace(self._file)
        folder = os.open(self._file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
