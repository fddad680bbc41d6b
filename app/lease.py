"""One at a time: the Lease that its holder renews and everybody else waits out.

A holder serves only while its last successful renewal is younger than the lease, by its own monotonic clock;
a newcomer takes over only after it has itself watched the lease not change for its whole length (clocks of
two machines are never compared). A restart under the same identity need not wait: that process is dead.
Binds of a former holder are declared in the journal, which its successor takes first, so that they are known and fail
on their resourceVersion: the Lease guards order, not safety.
"""

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from app.errors import Conflict, KubeError, NotFound
from app.kube import Kube

log = logging.getLogger(__name__)


class Lease:
    """Ours while `held()`."""

    def __init__(
        self, kube: Kube, *, namespace: str, name: str, identity: str, seconds: float, clock: Callable[[], float]
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._seconds = seconds
        self._clock = clock
        self._renewed: float | None = None
        self._seen: tuple[str, str] | None = None
        self._seen_at = 0.0
        self.made = False
        """Whether there was no such Lease before ours: nobody has served under its name."""
        self.holder = ""
        self.term = 0
        """Counts how often the Lease became ours: what was decided in one term is not valid in the next."""

    def held(self) -> bool:
        """Whether the lease is ours right now, with a margin for a call in flight."""
        return self._renewed is not None and self._clock() - self._renewed < 0.8 * self._seconds

    async def run(self) -> None:
        """Acquire and renew for ever."""
        while True:
            try:
                await self._turn()
            except KubeError as error:
                log.warning("lease %s/%s: %s", self._namespace, self._name, error)
            await asyncio.sleep(self._seconds / 5 if self.held() else min(1.0, self._seconds / 5))

    async def release(self) -> None:
        """Give it back, so that a successor need not wait."""
        if not self.held():
            return
        self._renewed = None
        try:
            lease = await self._kube.get_lease(self._namespace, self._name)
            if lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"]["holderIdentity"] = ""
                await self._kube.replace_lease(self._namespace, self._name, lease)
        except KubeError as error:
            log.warning("could not give the lease back: %s", error)

    async def _turn(self) -> None:
        """Look once; take, renew or wait."""
        asked = self._clock()
        try:
            lease = await self._kube.get_lease(self._namespace, self._name)
        except NotFound:
            await self._take(None, asked)
            return
        spec = lease.get("spec") or {}
        self.holder = spec.get("holderIdentity") or ""
        if self.holder in ("", self._identity) or self._waited_out(spec, asked):
            await self._take(lease, asked)
        else:
            self._renewed = None

    def _waited_out(self, spec: dict[str, Any], now: float) -> bool:
        """Whether another's lease has been still for its whole length while we watched."""
        mark = (str(spec.get("holderIdentity")), str(spec.get("renewTime")))
        if mark != self._seen:
            self._seen, self._seen_at = mark, now
        length = float(spec.get("leaseDurationSeconds") or self._seconds)
        return now - self._seen_at > max(length, self._seconds)

    async def _take(self, lease: dict[str, Any] | None, asked: float) -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        before = (lease or {}).get("spec") or {}
        changes = before.get("holderIdentity") != self._identity
        spec = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": max(1, round(self._seconds)),
            "renewTime": stamp,
            "acquireTime": stamp if changes else before.get("acquireTime", stamp),
            "leaseTransitions": int(before.get("leaseTransitions") or 0) + int(changes and lease is not None),
        }
        try:
            if lease is None:
                metadata = {"name": self._name, "namespace": self._namespace}
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
                await self._kube.create_lease(self._namespace, body)
                self.made = True
            else:
                await self._kube.replace_lease(self._namespace, self._name, {**lease, "spec": spec})
        except Conflict:
            self._renewed = None
            return
        if not self.held():
            self.term += 1
        self.holder = self._identity
        self._renewed = asked
