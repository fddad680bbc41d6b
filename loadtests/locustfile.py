"""What locust runs: the users, the shape that LOAD_SHAPE names, the summary and the exit status.

    locust -f loadtests/locustfile.py KubeScheduler --host http://127.0.0.1:8080 --headless -u 1 -t 30s

From the repository's folder; `loadtests/README.md` has every way to use it. Without names it is KubeScheduler alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import gevent
from locust import LoadTestShape, events
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner

from app.errors import BadInput
from loadtests.agents import LATE, Agents, muster
from loadtests.arrivals import BadMix, asks_of_trace, mix_called
from loadtests.baseline import Echo
from loadtests.cluster import NoCluster
from loadtests.kube_scheduler import REFUSED, KubeScheduler, cluster_of
from loadtests.options import add_options, options_of
from loadtests.shapes import SHAPES
from loadtests.summary import Histogram, Recorder, console, table_of
from loadtests.tenants import Tenant

__all__ = ["Agents", "Echo", "KubeScheduler", "Tenant"]

MISUSE = 2
LOOK_SECONDS = 0.02
SHAPE_SECONDS = 60.0  # unless -t says more
STOP_SECONDS = 5.0  # for users to finish what they are at, and to leave nothing behind

recorder, lateness = Recorder(), Histogram()
began, ended = {"wall": 0.0, "cpu": 0.0}, {"wall": 0.0, "cpu": 0.0}

if os.environ.get("LOAD_SHAPE"):
    plan = SHAPES[os.environ["LOAD_SHAPE"]]

    class Shape(LoadTestShape):
        """Asks the plan every second."""

        use_common_options = True

        def tick(self) -> tuple[int, float] | None:
            """Users now, beside those that there is one of; all of a change at once. None when the time is over."""
            assert self.runner is not None
            given: Any = self.runner.environment.parsed_options
            most, seconds, at = given.num_users or 1, given.run_time or SHAPE_SECONDS, self.get_run_time()
            single = sum(each.fixed_count for each in self.runner.user_classes)
            return None if at >= seconds else (plan(at, most, seconds) + single, float(most))


@events.init_command_line_parser.add_listener
def take_options(parser: LocustArgumentParser, **_: object) -> None:
    """Ours beside locust's."""
    add_options(parser)


@events.init.add_listener
def check_options(environment: Environment, **_: object) -> None:
    """Who takes part, and whether they have what they need."""
    options, given = options_of(environment), environment.parsed_options
    if given is not None and not given.user_classes:
        environment.user_classes[:] = [KubeScheduler]
    if Tenant in environment.user_classes:
        KubeScheduler.fixed_count = 1
    try:
        mix_called(options.mix)
        if options.trace:
            asks_of_trace(Path(options.trace))
        if Agents in environment.user_classes:
            muster(options)
        if KubeScheduler in environment.user_classes and options.host:
            cluster_of(options)  # now, and not on the test's own time
        if Echo in environment.user_classes and not options.echo:
            raise BadInput("Echo needs --echo URL (python -m loadtests.echo)")
    except (BadInput, BadMix, NoCluster, OSError) as wrong:
        print(f"loadtests: {wrong}", file=sys.stderr)
        sys.exit(MISUSE)
    environment.stop_timeout = environment.stop_timeout or STOP_SECONDS
    gevent.get_hub().loop.update_now()  # else the time this took is taken off the test's


@events.test_start.add_listener
def begin(**_: object) -> None:
    """The clock runs from here, and so does a watch over locust itself."""
    began.update(wall=time.monotonic(), cpu=time.process_time())
    gevent.spawn(watch_ourselves)


def watch_ourselves() -> None:
    """How late locust comes to what it wants to do: by as much its times may be wrong."""
    while not ended["wall"]:
        due = time.monotonic() + LOOK_SECONDS
        gevent.sleep(LOOK_SECONDS)
        lateness.add(1000 * (time.monotonic() - due))


@events.test_stopping.add_listener
def end(**_: object) -> None:
    """To here: users still finish what they are at."""
    ended.update(wall=time.monotonic(), cpu=time.process_time())


@events.request.add_listener
def record(
    name: str, response_time: float, exception: object = None, context: dict[str, Any] | None = None, **_: object
) -> None:
    """Every call of every user."""
    about = context or {}
    error = "" if exception is None else str(exception)[:200] or type(exception).__name__
    recorder.record(
        name, response_time, error=error, late_ms=about.get(LATE), refused=bool(about.get(REFUSED)) and not error
    )


@events.report_to_master.add_listener
def send(data: dict[str, Any], **_: object) -> None:
    """A worker's part goes to the master, which writes the summary."""
    data["recorder"] = recorder.take().wire()


@events.worker_report.add_listener
def receive(data: dict[str, Any], **_: object) -> None:
    """A worker's part comes."""
    recorder.add(Recorder.read(data["recorder"]))


@events.quitting.add_listener
def sum_up(environment: Environment, **_: object) -> None:
    """Table, file and exit status."""
    if isinstance(environment.runner, WorkerRunner):
        return
    options, seconds = options_of(environment), max(0.001, ended["wall"] - began["wall"])
    failures = recorder.failures()
    if environment.runner is not None:
        failures += [str(each["msg"]) for each in environment.runner.exceptions.values()]
    rows = recorder.rows(seconds)
    summary = {
        "host": options.extender_url,
        "users": sorted(each.__name__ for each in environment.user_classes),
        "shape": os.environ.get("LOAD_SHAPE", ""),
        "seconds": round(seconds, 2),
        "driver_cpu_share": round((ended["cpu"] - began["cpu"]) / seconds, 3),
        "driver_late": lateness.as_json(),
        "rows": rows,
        "failures": failures,
    }
    if options.summary:
        Path(options.summary).parent.mkdir(parents=True, exist_ok=True)
        Path(options.summary).write_text(json.dumps(summary, indent=1) + "\n")
    paper = console()
    paper.print(table_of(f"{seconds:.0f} s against {options.extender_url}, milliseconds", rows))
    for words in failures:
        paper.print(f"FAILED: {words}", markup=False)
    environment.process_exit_code = 1 if failures else 0
