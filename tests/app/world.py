"""A small world for tests of the shell: sample nodes that have reported, a fake API server, a clock that we move."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

from app.journal import SUFFIX
from app.kube import Kube
from app.main import build
from app.service import Service
from app.settings import Settings
from app.simulate import report_of
from app.translate import PodRef
from app.wire import Args, BindArgs, Filtered
from solver.samples import sample_node
from tests.fakes import Clock, FakeKube, pod_json

GPU = "nvidia.com/gpu"


class World:
    """A service on sample nodes. `nodes` maps names to sample kinds ("8xH100", "8xA100-mig", ...).

    `on`: the API server of an earlier world, as after a restart. `line`: how the service reaches it, if not directly.
    """

    def __init__(
        self,
        nodes: dict[str, str],
        *,
        kube: bool = True,
        on: FakeKube | None = None,
        line: Callable[[FakeKube], Kube] = lambda kube: kube,
        **knobs: Any,
    ) -> None:
        self.clock = Clock()
        self.kube = on or FakeKube()
        self.settings = Settings(
            standalone=not kube, plain=True, identity="us", **{"blind_seconds": 0, "planning": False, **knobs}
        )
        self.nodes = nodes
        self.service: Service = build(self.settings, kube=line(self.kube) if kube else None, clock=self.clock)
        self.with_kube = kube
        for name in nodes:
            if name not in self.kube.objects["nodes"]:
                self.kube.add_node(name)

    def report(self, name: str, **changes: Any) -> None:
        """The node's agent reports, with these fields changed."""
        report = report_of(sample_node(name, self.nodes[name]))
        self.service.report(report.model_copy(update=changes))

    def gpus(self, name: str) -> list[str]:
        return [gpu.uuid for gpu in sample_node(name, self.nodes[name]).gpus]

    @asynccontextmanager
    async def running(self) -> AsyncIterator["World"]:
        """Started, ready, and every node reported."""
        await self.service.start()
        try:
            await self.until(lambda: not self.service.waiting_for())
            for name in self.nodes:
                self.report(name)
            yield self
        finally:
            await self.service.stop()

    async def crash(self) -> None:
        """As after SIGKILL: nothing is ended, written or given back."""
        service, binder = self.service, self.service.binder
        binds = [task for _, task in binder._binds.values()]
        for tasks in ([*service._tasks, *binds], binder._settling.values(), binder._checking.values()):
            dying = list(tasks)
            for task in dying:
                task.cancel()
            await asyncio.gather(*dying, return_exceptions=True)

    def journal(self) -> dict[str, tuple[str, list[str]]]:
        """What the journal on the API server names: node and devices by pod UID."""
        settings = self.settings
        written = self.kube.objects["configmaps"][f"{settings.namespace}/{settings.lease_name}{SUFFIX}"]
        lines = [json.loads(line) for line in written["data"]["binds"].split("\n") if line]
        return {said["uid"]: (said["node"], said["devices"]) for said in lines}

    async def until(self, true: Any, seconds: float = 60.0) -> None:
        """Wait for a condition that background tasks bring about."""
        async with asyncio.timeout(seconds):
            while not true():
                await asyncio.sleep(0.005)

    # -- what kube-scheduler does ---------------------------------------------------------------------

    def add_pod(self, name: str, limits: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        return self.kube.add_pod(pod_json(name, limits, **more))

    def filter(self, name: str, names: Iterable[str] | None = None) -> Filtered:
        args = Args(self.kube.pod(name), list(names if names is not None else self.nodes))
        return self.service.extender.filter(args)

    def prioritize(self, name: str, names: Iterable[str] | None = None) -> dict[str, int]:
        args = Args(self.kube.pod(name), list(names if names is not None else self.nodes))
        return dict(self.service.extender.prioritize(args))

    async def bind(self, name: str, node: str, *, uid: str = "") -> str:
        ref = PodRef(uid or f"uid-{name}", "default", name)
        return await self.service.binder.bind(BindArgs(ref, node))

    async def schedule(self, name: str) -> str:
        """One whole cycle, as kube-scheduler runs it; the node's name, or "" when nothing fits."""
        fits = self.filter(name)
        assert not fits.error, fits.error
        if not fits.fitting:
            return ""
        node = fits.fitting[0]
        if len(fits.fitting) > 1:
            scores = self.prioritize(name, fits.fitting)
            node = max(scores, key=lambda each: scores[each])
        error = await self.bind(name, node)
        assert not error, error
        return node

    def devices(self, name: str) -> tuple[str, ...]:
        hold = self.service.ledger.get(f"uid-{name}")
        return tuple(str(device) for device in hold.devices) if hold else ()
