"""The held request for orders: the thread that keeps one open, and what that thread and the agent's loop share.

    Agent's loop ── a report was taken ──▶ Standing ── listening() ──▶ Feed ── POST /v1/orders, held ──▶ service
                 ◀── wait() is woken ─────          ◀── heard() ──────      ◀── OrdersReply ───────────
                                       who hands out devices ◀── placements ┘

While the feed works its requests are the agent's beats. Where it fails (an older service has no such path; a proxy cuts
held requests) the loop beats through its reports instead: a node must not look dead because its orders cannot come.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from app.agent.service import ReportError
from app.report import Listening, OrderList, OrdersReply, Placements

log = logging.getLogger(__name__)

WAIT_SECONDS = 10.0
"""How long the service may hold a request, and so the time between beats of a quiet node."""

RETRY_SECONDS = (1.0, 15.0)
"""After a request that failed, report or held one: the first wait, doubled each time up to the last. The last is what a
node stays unknown for after a long outage of the service; 5,000 agents then knock 600 times a second, each for a report
and for orders. A report that is taken again ends the wait for orders, too."""

OLDER_SERVICE_SECONDS = 60.0
"""Before asking again a service that has no orders: it may have been replaced by a newer one."""

SHORTEST_SECONDS = 1.0
"""A held request that is answered sooner and brings no orders is followed by the next one only after this (or when
another service has taken our report)."""

JITTER = 0.1
"""Part of each wait that is random, so that a thousand agents that start together drift apart."""


class Orders(Protocol):
    """Where orders come from: the service, or a test."""

    def listen(self, listening: Listening) -> OrdersReply:
        """Wait for them. Raises `ReportError`."""


@dataclass(frozen=True, slots=True)
class _Has:
    """The lists that we have, by version, and whose they are."""

    service: str = ""
    orders: int = 0
    placements: int = 0

    def of(self, service: str) -> _Has:
        """What we have of this service's lists: nothing if those that we have are another's."""
        return self if service == self.service else _Has(service)


class Standing:
    """What agent and service have last told each other. The two threads meet here; each method is atomic."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version: int | None = None
        self._service = ""
        self._has = _Has()
        self._orders: OrderList | None = None
        self._placements: Placements | None = None
        self._woken = False
        self._listening = False
        self._reached = False

    # ---- the agent's loop ----

    @property
    def version(self) -> int | None:
        """The version of the report that the service has; None: it may have none of ours."""
        return self._version

    @property
    def listening(self) -> bool:
        """Whether the held requests are the beats."""
        return self._listening

    def taken(self, version: int, service: str) -> None:
        """The service has this report; `service` is the id it answered with."""
        with self._changed:
            self._reached = self._reached or service != self._service
            self._version = version
            self._service = service
            self._changed.notify_all()

    def reached(self) -> None:
        """A report was taken again after some that were not: the feed need not wait any longer either."""
        with self._changed:
            self._reached = True
            self._changed.notify_all()

    def untold(self) -> None:
        """The service may not have our report: no request is held before it has."""
        with self._changed:
            self._version = None

    def take_orders(self) -> OrderList | None:
        """The newest list that was not carried out yet, once; none of a service that has been followed by another."""
        with self._changed:
            orders, self._orders = self._orders, None
            return orders if orders is not None and orders.service == self._service else None

    def wake(self) -> None:
        """End the loop's wait: there is something to report."""
        with self._changed:
            self._wake()

    def wait(self, seconds: float) -> None:
        """Sleep so long, or until there are orders, a report is wanted, or something else has to be reported."""
        with self._changed:
            self._changed.wait_for(lambda: self._woken, max(0.0, seconds))
            self._woken = False

    # ---- the feed ----

    def next_listening(self, node: str, boot: str, wait_seconds: float) -> Listening:
        """What to ask next, once the service has a report of ours."""
        with self._changed:
            self._changed.wait_for(lambda: self._version is not None)
            assert self._version is not None
            self._reached = False
            return Listening(
                node=node,
                boot=boot,
                version=self._version,
                service=self._has.service,
                orders=self._has.orders,
                placements=self._has.placements,
                wait_seconds=wait_seconds,
            )

    def rest(self, seconds: float) -> None:
        """Sleep so long, or until it is known (or has been since the last request) that the service is back."""
        with self._changed:
            self._changed.wait_for(lambda: self._reached, seconds)

    def set_listening(self, listening: bool) -> None:
        """Take over the beats, or hand them to the loop."""
        self._listening = listening

    def heard(self, asked: Listening, reply: OrdersReply) -> str:
        """Pass on what came. Words where a list was dropped since another service takes our reports."""
        with self._changed:
            if reply.resend and self._version == asked.version:
                self._want_report()
            services = [each.service for each in (reply.orders, reply.placements) if each is not None]
            strangers = [service for service in services if not service or service != self._service]
            if strangers:
                self._want_report()
                return (
                    ""
                    if reply.resend
                    else f"orders of service {strangers[0]!r} dropped: {self._service!r} took the last report"
                )
            if reply.orders is not None:
                self._has = replace(self._has.of(self._service), orders=reply.orders.version)
                self._orders = reply.orders
                self._wake()
            if reply.placements is not None:
                self._has = replace(self._has.of(self._service), placements=reply.placements.version)
                self._placements = reply.placements
            return ""

    def take_placements(self) -> Placements | None:
        """The newest list of who gets which device, once."""
        with self._changed:
            placements, self._placements = self._placements, None
            return placements

    def _want_report(self) -> None:
        self._version = None
        self._wake()

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify_all()


class Feed:
    """Asks for orders again and again, in a thread of its own that ends with the process."""

    def __init__(
        self,
        orders: Orders,
        standing: Standing,
        *,
        node: str,
        boot: str,
        placed: Callable[[Placements], None] | None = None,
        wait_seconds: float = WAIT_SECONDS,
    ) -> None:
        self._orders = orders
        self._placed = placed
        self._standing = standing
        self._node = node
        self._boot = boot
        self._wait_seconds = wait_seconds
        self._failures = 0
        self._said = ""

    def start(self) -> None:
        """Begin; the beats are the feed's from here on, as long as it works."""
        self._standing.set_listening(True)
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def _run(self) -> None:
        while True:
            wait = self._once()
            if wait:
                self._standing.rest(wait)

    def _once(self) -> float:
        """One request; how long to wait before the next."""
        asked = self._standing.next_listening(self._node, self._boot, self._wait_seconds)
        started = time.monotonic()
        try:
            reply = self._orders.listen(asked)
            dropped = self._standing.heard(asked, reply)
            placements = self._standing.take_placements()
            if placements is not None and self._placed is not None:
                self._placed(placements)
        except ReportError as error:
            return self._failed(str(error), error.status)
        except Exception as error:  # a bug of ours must not silence the node
            log.exception("asking for orders failed")
            return self._failed(repr(error))
        if dropped:
            return self._failed(dropped)
        if self._said:
            log.info("the service has orders again")
        self._failures, self._said = 0, ""
        self._standing.set_listening(True)
        return 0.0 if _brings_news(asked, reply) else max(0.0, SHORTEST_SECONDS - (time.monotonic() - started))

    def _failed(self, reason: str, status: int = 0) -> float:
        self._standing.set_listening(False)
        if reason != self._said:
            log.warning("no orders: %s", reason)
        self._said = reason
        if status == 404:
            return jittered(OLDER_SERVICE_SECONDS)
        self._failures += 1
        return backoff(self._failures)


def _brings_news(asked: Listening, reply: OrdersReply) -> bool:
    """Whether it has a list that we had not."""
    pairs = ((reply.orders, asked.orders), (reply.placements, asked.placements))
    return any(each is not None and (each.service, each.version) != (asked.service, had) for each, had in pairs)


def backoff(failures: int) -> float:
    """How long to wait after so many failures in a row (at least one)."""
    first, last = RETRY_SECONDS
    return jittered(min(last, first * 2 ** min(failures - 1, 16)))


def jittered(seconds: float) -> float:
    """About so long."""
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 — spreads load, guards nothing
