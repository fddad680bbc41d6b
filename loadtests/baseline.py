"""The echo as a user: repeats every call of a kube-scheduler at a server that does nothing but read and answer.

    KubeScheduler ── request ──▶ Tangram          then, while that user waits:
                  ◀── reply ────
    Echo ────────── same reply ─▶ echo            (told beforehand, where it is another than the last one)
         ────────── same request ▶ echo
         ◀───────── same reply ───

So both have the same bytes both ways, through the same client, moments apart, and never at the same time: neither
waits for a core that the other has. And the echo has rested as long: a call after a pause takes longer, whoever is
asked. With many kube-schedulers only those wait that an echo is made for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import gevent
from gevent.event import Event
from gevent.queue import Empty, Queue
from locust import FastHttpUser, constant, task
from locust.env import Environment

from loadtests.options import ANSWER_SECONDS, connect, options_of, payload
from loadtests.summary import ECHO, SET_UP

REST_SECONDS = 0.001
"""Between telling the echo its reply and asking for it: about as long as Tangram has rested meanwhile."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A call that was answered: its name in the tables, what went both ways, and the pause that came before it."""

    name: str
    path: str
    headers: dict[str, str]
    request: bytes
    reply: bytes
    pause_seconds: float
    repeated: Event = field(default_factory=Event)


class Desk:
    """Where kube-schedulers leave their exchanges, for an echo that is free."""

    def __init__(self) -> None:
        self._free = 0
        self._left: Queue[Exchange] = Queue()

    def leave(self, exchange: Exchange) -> None:
        """Wait until it is repeated; at once where no echo is free, or there is none."""
        if self._free > self._left.qsize():
            self._left.put(exchange)
            exchange.repeated.wait(2 * ANSWER_SECONDS)

    def take(self) -> Exchange:
        """The next exchange; raises Empty where none comes for a while."""
        self._free += 1
        try:
            exchange: Exchange = self._left.get(timeout=1.0)
            return exchange
        finally:
            self._free -= 1


DESK = Desk()


class Echo(FastHttpUser):
    """Repeats what kube-schedulers of this process exchange with Tangram."""

    fixed_count = 1  # it keeps one reply for each verb
    wait_time = constant(0)

    def __init__(self, environment: Environment) -> None:
        options = options_of(environment)
        connect(self, options.echo.rstrip("/"), options)
        super().__init__(environment)
        self.taught: dict[str, bytes] = {}

    @task
    def repeat(self) -> None:
        """One exchange."""
        try:
            exchange = DESK.take()
        except Empty:
            return
        try:
            if self.taught.get(exchange.path) != exchange.reply:
                self.client.put(f"/taught{exchange.path}", data=payload(exchange.reply), name=SET_UP)
                self.taught[exchange.path] = exchange.reply
            gevent.sleep(max(exchange.pause_seconds, REST_SECONDS))
            self._repeat(exchange)
        finally:
            exchange.repeated.set()

    def _repeat(self, exchange: Exchange) -> None:
        name, headers = ECHO + exchange.name, exchange.headers
        with self.client.post(
            exchange.path, data=payload(exchange.request), headers=headers, name=name, catch_response=True
        ) as answer:
            if answer.status_code == 200 and answer.content != exchange.reply:
                answer.failure("the echo answered something else")
