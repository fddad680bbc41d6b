"""`python -m app.agent`: the agent without the rest of the command line (which loads the whole service)."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from app.agent.agent import INTERVAL_SECONDS, run_agent
from app.agent.giving import add_arguments, giving_of
from app.agent.health import Patience


def main(argv: list[str] | None = None) -> int:
    """Parse and run; the exit status."""
    parser = argparse.ArgumentParser(prog="tangram agent", description="Reports this node's GPUs to Tangram.")
    parser.add_argument(
        "--service", metavar="URL", help="where reports go, for example https://tangram.tangram-system.svc:8444"
    )
    parser.add_argument("--node", default=os.environ.get("NODE_NAME"), help="this node's name (or NODE_NAME)")
    parser.add_argument("--interval", type=float, default=INTERVAL_SECONDS, metavar="SECONDS", help="between looks")
    parser.add_argument("--token-file", type=Path, help="bearer token; read again for each request")
    parser.add_argument("--ca-file", type=Path, help="certificate authority of the service")
    parser.add_argument(
        "--mig",
        choices=("observe", "make"),
        default="make",
        help="whether MIG slices are made and removed when the service orders it (make), or never (observe)",
    )
    parser.add_argument(
        "--hand",
        choices=("plugin", "observe", "no"),
        default="no",
        help="whether devices are handed to containers as the kubelet's device plugin (plugin), or what another one "
        "hands out is read from the kubelet (observe)",
    )
    parser.add_argument(
        "--hand-over",
        choices=("env", "cdi"),
        default="env",
        help="how containers are given devices: by environment to NVIDIA's runtime, or by CDI names",
    )
    parser.add_argument("--shares", action="store_true", help="hand out parts of GPUs (tangram.gpu/share) as well")
    parser.add_argument(
        "--kubelet-dir", type=Path, default=Path("/var/lib/kubelet"), metavar="FOLDER", help="the kubelet's own folder"
    )
    parser.add_argument(
        "--cdi-dir", type=Path, default=Path("/var/run/cdi"), metavar="FOLDER", help="where CDI specs are written"
    )
    add_arguments(parser)
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="FOLDER",
        help="where GPUs' health, and what was handed out, is remembered over restarts (default: nowhere)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="how long a GPU must be well before it counts as better, times this (1: a minute; for tests)",
    )
    parser.add_argument("--once", action="store_true", help="print the report as JSON and exit")
    parser.add_argument("--proc", type=Path, default=Path("/proc"), help="where the host's /proc is seen")
    parser.add_argument("--sys", type=Path, default=Path("/sys"), help="where the host's /sys is seen")
    parser.add_argument("--in-process-nvml", action="store_true", help="no child process around NVML, so no deadline")
    options = parser.parse_args(argv)
    if not options.node:
        parser.error("name the node: --node or NODE_NAME")
    if not options.once and not options.service:
        parser.error("name the service: --service URL (or use --once)")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        run_agent(
            service=options.service,
            node=options.node,
            interval_seconds=options.interval,
            token_file=options.token_file,
            ca_file=options.ca_file,
            mig=options.mig,
            hand=options.hand,
            giving=giving_of(options),
            shares=options.shares,
            kubelet_dir=options.kubelet_dir,
            state_dir=options.state_dir,
            patience=Patience().scaled(options.patience),
            once=options.once,
            nvml_in_process=options.in_process_nvml,
            proc=options.proc,
            sys=options.sys,
        )
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
