"""Folders for sockets: pytest's own are too deep for a unix path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="kubelet-"))
    yield made
    shutil.rmtree(made, ignore_errors=True)
