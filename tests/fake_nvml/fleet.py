"""Many real agents on one small machine.

    with Fleet(directory, service="http://127.0.0.1:8000", interval_seconds=1.0) as fleet:
        fleet.start(sample_node("a", "8xH100"))
        fleet.silence("a"); fleet.resume("a"); fleet.stop("a"); fleet.start("a"); fleet.reboot("a")
        fleet.describe("a", description.with_gpu(3, lost=True))

One Python process imports everything once and forks for each node; each fork loads the real pynvml and the real
.so by itself (LD_LIBRARY_PATH, its own TANGRAM_FAKE_NVML) and runs the real agent. What differs from production,
deliberately: NVML is read in the agent's own process (`--in-process-nvml`), not in a child with a deadline, since
two Pythons a node are too much for 40 nodes on two cores. The child has its own tests.

    test ──{"start": name}──▶ nursery ──fork──▶ agent a, agent b, …
         ◀──{"pid": 17}──────    │ reaps
         ──SIGSTOP, SIGCONT, SIGKILL, description files─────▶ agents
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from app.agent.memory import BOOT_ID
from solver.cluster import Node
from tests.fake_nvml.build import build
from tests.fake_nvml.control import Control
from tests.fake_nvml.describe import NodeDescription, describe

ROOT = Path(__file__).resolve().parents[2]
MPS_DIRECTORY = "/run/nvidia/mps"
"""Where nodes with shares have the pipes of their MPS control daemon."""
INITIAL_PID_NAMESPACE = "pid:[4026531836]"


class Fleet:
    """Simulated GPU nodes, each with a real agent. Files are under `directory`; a closed fleet leaves no process.

    `token_file`, `ca_file`, `mig` and `patience` are as for `tangram agent`; "{node}" in `token_file` stands for the
    node's name. Each agent remembers in a folder of its own (`state`), and each node has its own boot id. `kubelets`
    are the folders of the nodes' kubelets (/var/lib/kubelet on a real node): the agents are their device plugins, or
    with `hand="observe"` read what another plugin has given; `shares`: parts of GPUs, too, as clients of MPS.
    """

    def __init__(
        self,
        directory: Path,
        *,
        service: str,
        interval_seconds: float = 1.0,
        token_file: Path | None = None,
        ca_file: Path | None = None,
        mig: str = "make",
        patience: float = 1.0,
        kubelets: Mapping[str, Path] | None = None,
        hand: str = "plugin",
        shares: bool = False,
    ) -> None:
        self._directory = directory
        self._directory.mkdir(parents=True, exist_ok=True)
        for name, kubelet in (kubelets or {}).items():
            _kubelet(directory, name).symlink_to(kubelet)
        self._pids: dict[str, int] = {}
        self._log = (directory / "agents.log").open("ab")
        options = ["--service", service, "--interval", str(interval_seconds), "--directory", str(directory)]
        options += ["--mig", mig, "--patience", str(patience), "--hand", hand]
        options += ["--shares"] if shares else []
        if token_file is not None:
            options += ["--token-file", str(token_file)]
        if ca_file is not None:
            options += ["--ca-file", str(ca_file)]
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_nvml.fleet", *options],
            cwd=ROOT,
            env={**os.environ, "LD_LIBRARY_PATH": str(build())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pids)

    def start(self, node: Node | str, description: NodeDescription | None = None) -> int:
        """Start the agent of a node (by default described as the sample is) and return its PID.

        With only a name, the description that is there already is used: the same node after a restart.
        """
        name = node if isinstance(node, str) else node.name
        if description is None and not isinstance(node, str):
            description = describe(node)
        if description is not None:
            self.describe(name, description)
        if name in self._pids:
            self.stop(name)
        pid = int(self._tell({"start": name})["pid"])
        self._pids[name] = pid
        return pid

    def describe(self, name: str, description: NodeDescription) -> None:
        """Change what the node is; its agent sees that at its next look."""
        description.write(self._path(name))

    def description(self, name: str) -> Path:
        """The node's description; faults (`Control`) and the boards' state (`read_state`) are found by it."""
        return self._path(name)

    def control(self, name: str) -> Control:
        """What goes wrong on the node, and what happens there while its agent looks on."""
        return Control(self._path(name))

    def processes_root(self, name: str) -> Path:
        """The node's own /proc, as its agent sees it: put `<pid>/cgroup` files there (`add_process`)."""
        return _proc(self._directory, name)

    def add_process(self, name: str, pid: int, pod_uid: str) -> None:
        """Give a process to a pod; the description must list the PID on some device."""
        write_cgroup(self.processes_root(name), pid, pod_uid)

    def pid(self, name: str) -> int:
        """The agent's process."""
        return self._pids[name]

    def silence(self, name: str) -> None:
        """The agent says nothing any more, and keeps its connection open (SIGSTOP)."""
        os.kill(self._pids[name], signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """A silenced agent goes on where it was."""
        os.kill(self._pids[name], signal.SIGCONT)

    def stop(self, name: str) -> None:
        """The agent is gone without a word (SIGKILL)."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pids.pop(name), signal.SIGKILL)

    def reboot(self, name: str, description: NodeDescription | None = None) -> int:
        """The node goes down and comes up again, as described (else as it was): no instances, another boot id."""
        self.stop(name)
        self.control(name).reboot()
        if description is not None:
            self.describe(name, description)
        new_boot(self.processes_root(name))
        return self.start(name)

    def state(self, name: str) -> Path:
        """The folder where the agent keeps what it remembers."""
        return _state(self._directory, name)

    def memory_kib(self, name: str) -> int:
        """What the agent uses for itself: private pages, not those it shares with the others."""
        rollup = Path(f"/proc/{self._pids[name]}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in rollup if line.startswith(("Private_Clean", "Private_Dirty")))

    def close(self) -> None:
        """End every agent."""
        for name in list(self._pids):
            self.stop(name)
        self._nursery.kill()
        self._nursery.wait()
        for pipe in (self._nursery.stdin, self._nursery.stdout):
            if pipe is not None:
                pipe.close()
        self._log.close()

    def _path(self, name: str) -> Path:
        return _description(self._directory, name)

    def _tell(self, order: dict[str, str]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        self._nursery.stdin.flush()
        line = self._nursery.stdout.readline()
        if not line:
            words = Path(self._log.name).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the nursery of agents has ended:\n{words}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def write_cgroup(proc: Path, pid: int, pod_uid: str, *, systemd: bool = True) -> None:
    """A process's cgroup file as the kubelet's two drivers make it."""
    slice_ = f"kubepods-burstable-pod{pod_uid.replace('-', '_')}.slice"
    path = (
        f"/kubepods.slice/kubepods-burstable.slice/{slice_}/cri-containerd-{'ab' * 32}.scope"
        if systemd
        else f"/kubepods/burstable/pod{pod_uid}/{'ab' * 32}"
    )
    (proc / str(pid)).mkdir(parents=True, exist_ok=True)
    (proc / str(pid) / "cgroup").write_text(f"0::{path}\n")


def new_boot(proc: Path) -> str:
    """Give the node whose /proc this is another boot id, as a reboot does."""
    file = proc / BOOT_ID
    file.parent.mkdir(parents=True, exist_ok=True)
    boot = str(uuid.uuid4())
    file.write_text(boot + "\n")
    return boot


def host_proc(proc: Path) -> Path:
    """A /proc in the host's PID namespace, with no process yet; it keeps its boot id."""
    if not (proc / BOOT_ID).exists():
        new_boot(proc)
    (proc / "self/ns").mkdir(parents=True, exist_ok=True)
    link = proc / "self/ns/pid"
    if not link.is_symlink():
        link.symlink_to(INITIAL_PID_NAMESPACE)
    return proc


def _description(directory: Path, name: str) -> Path:
    return directory / f"{name}.nvml"


def _proc(directory: Path, name: str) -> Path:
    return host_proc(directory / f"{name}.proc")


def _state(directory: Path, name: str) -> Path:
    return directory / f"{name}.state"


def _kubelet(directory: Path, name: str) -> Path:
    return directory / f"{name}.kubelet"


# ---- the nursery: the process that forks ----


def _nursery(options: argparse.Namespace) -> None:
    import app.agent.agent
    import app.agent.nvml  # imports pynvml, which loads no library before nvmlInit  # noqa: F401

    gc.collect()
    gc.freeze()  # the collector must not touch, and so copy, the pages that the forks share
    directory: Path = options.directory
    pending = b""
    while True:
        ready, _, _ = select.select([0], [], [], 0.2)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not ready:
            continue
        piece = os.read(0, 1 << 16)
        if not piece:
            return
        *lines, pending = (pending + piece).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                _agent(json.loads(line)["start"], directory, options)
            os.write(1, json.dumps({"pid": pid}).encode() + b"\n")


def _agent(name: str, directory: Path, options: argparse.Namespace) -> None:
    """In the fork: become the agent of one node; never returns."""
    import ctypes
    import random

    from app.agent.agent import run_agent
    from app.agent.giving import Giving
    from app.agent.health import Patience

    status = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no agent outlives the nursery
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        random.seed()
        os.environ["TANGRAM_FAKE_NVML"] = str(_description(directory, name))
        logging.basicConfig(level=logging.WARNING, format=f"%(asctime)s {name} %(levelname)s %(message)s")
        token = Path(str(options.token_file).replace("{node}", name)) if options.token_file else None
        time.sleep(random.random() * min(0.5, options.interval))
        kubelet = _kubelet(directory, name)
        hands: dict[str, Any] = {}
        if kubelet.exists():  # resolved, since a socket's path may have 107 characters
            hands = {"hand": options.hand, "kubelet_dir": kubelet.resolve(), "shares": options.shares}
            hands |= {"giving": Giving(mps_dir=MPS_DIRECTORY if options.shares else "")}
        run_agent(
            service=options.service,
            node=name,
            interval_seconds=options.interval,
            token_file=token,
            ca_file=options.ca_file,
            mig=options.mig,
            state_dir=_state(directory, name),
            patience=Patience().scaled(options.patience),
            nvml_in_process=True,
            proc=_proc(directory, name),
            sys=directory / f"{name}.sys",
            **hands,
        )
        status = 0
    except SystemExit:
        status = 0
    except BaseException:
        logging.exception("agent %s failed", name)
    finally:
        os._exit(status)  # not through the nursery's own clean-up


def main() -> None:
    """The nursery's command line; started by `Fleet`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--service", required=True)
    parser.add_argument("--interval", type=float, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--ca-file", type=Path)
    parser.add_argument("--mig", choices=("observe", "make"), default="make")
    parser.add_argument("--patience", type=float, default=1.0)
    parser.add_argument("--hand", choices=("plugin", "observe"), default="plugin")
    parser.add_argument("--shares", action="store_true")
    _nursery(parser.parse_args())


if __name__ == "__main__":
    main()
