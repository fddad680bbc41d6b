"""How we speak gRPC over a unix socket, and how its errors read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # shared connections would remember an old kubelet's silence
    ("grpc.max_receive_message_length", 16 << 20),  # as the kubelet's own clients allow
)


Inode = tuple[int, int, int]
"""Device, number and time of change: some file systems use a number again at once."""


def inode_of(path: Path) -> Inode | None:
    """Which file is there now; None where none is."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def target(socket: Path) -> str:
    """The socket's address, as gRPC spells it."""
    return f"unix:{socket}"


def words_of(error: Any) -> str:
    """What a gRPC error says; of a failed connection only why, not to which address in three forms."""
    said = str(error.details() or error.code().name)
    return said.rpartition(" error: ")[2] if said.startswith("failed to connect") else said
