"""From a process on the host to the pod that it belongs to, by the cgroup that the kubelet put it in."""

from __future__ import annotations

import re
from pathlib import Path

INITIAL_PID_NAMESPACE = "pid:[4026531836]"
"""The host's own PID namespace has this inode on every Linux (PROC_PID_INIT_INO in include/linux/proc_ns.h)."""

_POD = re.compile(
    r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12}|[0-9a-f]{32})(?![0-9a-f])"
)
"""…/kubepods/burstable/pod<uid>/… (cgroupfs) or …/kubepods-burstable-pod<uid, "-" as "_">.slice/… (systemd), cgroup v1
and v2. A static pod's UID is 32 hex digits without dashes."""


class Pods:
    """Looks up pods in the /proc seen at `proc`."""

    def __init__(self, proc: Path) -> None:
        self._proc = proc

    def host_pids(self) -> bool:
        """Whether PIDs mean here what NVML means by them: it counts in the host's namespace (`hostPID: true`)."""
        try:
            return str((self._proc / "self/ns/pid").readlink()) == INITIAL_PID_NAMESPACE
        except OSError:
            return False

    def of(self, pid: int) -> str:
        """The UID of the pod that this process belongs to; empty where it belongs to none, or has ended.

        Empty as well where PIDs are not the host's: a wrong pod would be worse than none.
        """
        if not self.host_pids():
            return ""
        try:
            cgroups = (self._proc / str(pid) / "cgroup").read_text(errors="replace")
        except OSError:
            return ""
        found = _POD.findall(cgroups)
        return found[-1].replace("_", "-") if found else ""  # the innermost: a kubelet may run inside a pod
