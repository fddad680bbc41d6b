"""An NVML session of ours against the fake library, in a process of its own: looks, orders, and what happens between.

session = Session(bench, description)
session.control("set 0 lost 1")                          lines of the fake's control file, from now on
outcome = session.run("nvml.read()", "nvml.change(order_list(0))", …)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.agent.reading import Reading
from app.report import Failed, Gpu, Instance, Make, OrderList, SliceAt, Switch
from tests.agent.conftest import Bench
from tests.fake_nvml.describe import NodeDescription

PROLOGUE = """
import ctypes, time
from pathlib import Path
from app.agent.nvml import Nvml
from app.report import OrderList
now = [1000.0]
nvml = Nvml(proc=Path({proc!r}), sys=Path({sys!r}), clock=lambda: now[0])
orders = [OrderList.model_validate(one) for one in json.loads({orders!r})]
control = Path({control!r})
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
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bench.describe(self.description)

    @property
    def control_file(self) -> Path:
        return Path(f"{self.bench.file}.control")

    def control(self, *lines: str) -> None:
        """These lines from now on, after those that are there."""
        self.lines += lines
        self.control_file.write_text("\n".join(self.lines) + "\n")

    def python(self, code: str, *orders: OrderList) -> Any:
        """Run code that has `read()`, `change(number)`, `calls(symbol)` and `now`; its `result` comes back."""
        prologue = PROLOGUE.format(
            proc=str(self.bench.proc),
            sys=str(self.bench.directory / "sys"),
            orders=json.dumps([one.model_dump(mode="json") for one in orders]),
            control=str(self.control_file),
        )
        return self.bench.python(prologue + code)

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
