"""The options of how containers are given devices, and what they make: a `Giver` and, by CDI, the node's file."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.agent.cdi import KIND, CdiFile
from app.agent.device_files import Host
from app.agent.gift import SHM, Giver, Mps

HandOver = Literal["env", "cdi"]

_KIND = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Giving:
    """The options, as docs/containers.md has them. Folders are the host's; `host_root` is where the agent sees them."""

    over: HandOver = "env"
    cdi_dir: Path = Path("/var/run/cdi")
    cdi_kind: str = KIND
    host_root: Path = Path("/")
    dev_root: str = "/"
    driver_root: str = "/"
    mps_dir: str = ""
    mps_shm: str = SHM

    def build(self, proc: Path = Path("/proc")) -> tuple[Giver, CdiFile | None]:
        """What gives, and the file to `keep` after each look where it is by CDI. Raises ValueError for a wrong kind."""
        host = Host(root=self.host_root, proc=proc, dev_root=self.dev_root)
        mps = Mps(self.mps_dir, self.mps_shm) if self.mps_dir else None
        if self.over == "env":
            return Giver(host=host, mps=mps), None
        if not _KIND.fullmatch(self.cdi_kind):
            raise ValueError(f"--cdi-kind {self.cdi_kind!r} is no CDI kind: <vendor>/<class>, like {KIND}")
        cdi = CdiFile(self.cdi_dir, host=host, driver_root=self.driver_root, kind=self.cdi_kind)
        return Giver(host=host, cdi=cdi, mps=mps), cdi


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but `--hand-over` and `--cdi-dir`."""
    parser.add_argument("--cdi-kind", default=KIND, metavar="VENDOR/CLASS", help="kind of our CDI devices")
    parser.add_argument(
        "--host-root", type=Path, default=Path("/"), metavar="FOLDER", help="where the host's file system is seen"
    )
    parser.add_argument("--driver-root", default="/", metavar="FOLDER", help="where the driver is on the host")
    parser.add_argument(
        "--dev-root",
        default="/",
        metavar="FOLDER",
        help="what stands before /dev of the GPUs' device files on the host",
    )
    parser.add_argument(
        "--mps-dir",
        default="",
        metavar="FOLDER",
        help="the MPS control daemon's pipe directory on the host; shares are its clients (default: time slicing)",
    )
    parser.add_argument(
        "--mps-shm", default=SHM, metavar="FOLDER", help="the MPS control daemon's /dev/shm on the host"
    )


def giving_of(options: argparse.Namespace) -> Giving:
    """What was said on the command line."""
    return Giving(
        over=options.hand_over,
        cdi_dir=options.cdi_dir,
        cdi_kind=options.cdi_kind,
        host_root=options.host_root,
        dev_root=options.dev_root,
        driver_root=options.driver_root,
        mps_dir=options.mps_dir,
        mps_shm=options.mps_shm,
    )
