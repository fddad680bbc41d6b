"""An NVML session of ours against the fake library, in a process of its own: looks, orders, and what happens between.

session = Session(bench, description)
session.control("set 0 lost 1")                          lines of the fake's control file, from now on
outcome = session.run("nvml.read()", "nvml.change(order_list(0))", …)
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from app.agent.reading import Reading
from app.report import Failed, Gpu, Instance, Make, OrderList, SliceAt, Switch
from tests.agent.conftest import ROOT, Bench
from tests.fake_nvml.control import Control
from tests.fake_nvml.describe import NodeDescription

KILLED = 137  # 128 + SIGKILL, as the library ends a process that it lets die
PROLOGUE = """
import ctypes, time
from pathlib import Path
from app.agent.nvml import Nvml
from app.report import OrderList
from tests.fake_nvml.control import Control
now = [1000.0]
nvml = Nvml(proc=Path({proc!r}), sys=Path({sys!r}), clock=lambda: now[0])
orders = [OrderList.model_validate(one) for one in json.loads({orders!r})]
control = Control(Path({file!r}))
def calls(symbol):
    return ctypes.CDLL("libnvidia-ml.so.1").fake_nvml_calls(symbol.encode())
def read():
    return nvml.read().model_dump(mode="json")
def change(number):
    return [failed.model_dump(mode="json") for failed in nvml.change(orders[number])]
"""


@dataclass
class Session:
    """A described node, and a program that looks at it and changes it. The library's state lasts over programs."""

    bench: Bench
    description: NodeDescription

    def __post_init__(self) -> None:
        self.bench.describe(self.description)

    @property
    def control(self) -> Control:
        """What goes wrong, and what else happens on the node."""
        return Control(self.bench.file)

    def program(self, code: str, *orders: OrderList) -> str:
        """The code with `read()`, `change(number)`, `calls(symbol)`, `control` and `now` before it."""
        prologue = PROLOGUE.format(
            proc=str(self.bench.proc),
            sys=str(self.bench.directory / "sys"),
            orders=json.dumps([one.model_dump(mode="json") for one in orders]),
            file=str(self.bench.file),
        )
        return prologue + code

    def python(self, code: str, *orders: OrderList) -> Any:
        """Run it; its `result` comes back."""
        return self.bench.python(self.program(code, *orders))

    def dies(self, code: str, *orders: OrderList) -> None:
        """Run code that the library ends half-way, as if killed."""
        program = "import json\n" + self.program(code, *orders)
        done = subprocess.run(
            [sys.executable, "-c", program], env=self.bench.environment, cwd=ROOT, capture_output=True, timeout=60
        )
        assert done.returncode == KILLED, done.stderr

    def read(self) -> Reading:
        """One look by a new session."""
        return Reading.model_validate(self.python("result = read()"))

    def change(self, *orders: OrderList) -> tuple[list[list[Failed]], Reading]:
        """Look, carry out each list in turn, look again: what failed of each list, and what is there then."""
        found = self.python(
            f"read()\nfailed = [change(number) for number in range({len(orders)})]\nresult = [failed, read()]", *orders
        )
        failed = [[Failed.model_validate(one) for one in of_list] for of_list in found[0]]
        return failed, Reading.model_validate(found[1])

    def gpu(self, index: int) -> str:
        """A GPU's UUID."""
        return self.description.gpus[index].uuid


def order_list(
    *, make: tuple[Make, ...] = (), remove: tuple[SliceAt, ...] = (), switch: tuple[Switch, ...] = ()
) -> OrderList:
    return OrderList(service="s", version=1, make=make, remove=remove, switch=switch)


def instances(gpu: Gpu) -> list[Instance]:
    """In order of place."""
    assert gpu.mig is not None
    return sorted(gpu.mig.instances, key=lambda one: -1 if one.start is None else one.start)


def places(gpu: Gpu) -> list[tuple[str, int | None]]:
    return [(one.profile, one.start) for one in instances(gpu)]
