"""Versions of what else is on the node, as far as the agent can see: kernel, NVIDIA's container toolkit and runtime.

The kubelet's version is in the Node object, so the service has it from there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess

TIMEOUT_SECONDS = 2.0
"""For a tool to say its version; one that hangs (it may open the driver) is done without."""

TOOLS = {
    "toolkit": ("nvidia-ctk", "nvidia-container-cli"),
    "runtime": ("nvidia-container-runtime",),
}
"""What to ask, the first that is on PATH and answers. In a container they are where someone has mounted them."""

_VERSION = re.compile(r"version:? +v?(\d+\.\d+[\w.+~-]*)")


def node_versions() -> dict[str, str]:
    """Read once, when the agent starts: neither kernel nor toolkit changes under a running agent."""
    found = {"kernel": os.uname().release}
    for what, tools in TOOLS.items():
        for tool in tools:
            version = _ask(tool)
            if version:
                found[what] = version
                break
    return found


def _ask(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        return ""
    try:
        done = subprocess.run(  # noqa: S603 — a fixed name, found on our own PATH
            [path, "--version"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    found = _VERSION.search(done.stdout)
    return found[1][:100] if found else ""
