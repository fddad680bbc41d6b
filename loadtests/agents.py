"""A user is a hundred agents, each with its own times: an open loop, whatever the service does.

An agent says something every few seconds from a moment of its own: mostly that nothing is new, sometimes a full report.
When the one before is not answered yet it waits for that, as a real agent does, and what it is late by is counted
too: `from due` in the summary. Otherwise a service that stands still for a second would look as if only one call
had been slow.
"""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from typing import Any

import gevent
import orjson
from gevent.pool import Group
from locust import FastHttpUser, constant, task
from locust.env import Environment

from loadtests.fleet import HOLD_SECONDS, Agent, read_agents
from loadtests.options import ANSWER_SECONDS, Options, connect, options_of, payload

SPARE_CONNECTIONS = 10
LATE = "late_ms"

_unplayed: list[Agent] = []
numbers = itertools.count()


def muster(options: Options) -> None:
    """Read the agents that users will play. Raises BadInput."""
    tokens = Path(options.agents_token) if options.agents_token else None
    _unplayed.extend(reversed(read_agents(Path(options.agents_file), tokens)))


class Agents(FastHttpUser):
    """Plays the next agents of the file, as many as there are left."""

    wait_time = constant(1)

    def __init__(self, environment: Environment) -> None:
        self.options = options_of(environment)
        connect(self, self.options.agents_url, self.options)
        if self.options.agents_hold:
            self.concurrency = self.options.agents_per_user + SPARE_CONNECTIONS
            self.network_timeout = HOLD_SECONDS + ANSWER_SECONDS
        super().__init__(environment)
        self.rng = random.Random(f"{self.options.seed} {next(numbers)}")
        self.alive = Group()
        self.mine: list[Agent] = []

    def on_start(self) -> None:
        """All at work, each at its own moment."""
        for _ in range(min(self.options.agents_per_user, len(_unplayed))):
            self.mine.append(_unplayed.pop())
        for agent in self.mine:
            self.alive.spawn(self._live, agent)

    def on_stop(self) -> None:
        """All silent; others may play them."""
        self.alive.kill()
        _unplayed.extend(self.mine)

    @task
    def stand_by(self) -> None:
        """The agents work by themselves."""

    def _live(self, agent: Agent) -> None:
        every = self.options.agents_every_seconds
        due = time.monotonic() + self.rng.random() * every
        while True:
            gevent.sleep(max(0.0, due - time.monotonic()))
            if self.rng.random() < self.options.agents_changes:
                self._report(agent, "full report", agent.changed(self.rng), due)
            elif self.options.agents_hold:
                self._listen(agent)
            else:
                self._beat(agent, due)
            due = time.monotonic() if self.options.agents_hold else due + every

    def _beat(self, agent: Agent, due: float) -> None:
        reply = self._send(agent, "/v1/reports", "beat", agent.beat(), due)
        if reply.get("resend"):
            self._report(agent, "report asked for", agent.asked_again(), time.monotonic())

    def _report(self, agent: Agent, name: str, body: bytes, due: float) -> None:
        if self._send(agent, "/v1/reports", name, body, due).get("resend"):
            self._send(agent, "/v1/reports", "report asked for", agent.asked_again(), time.monotonic())

    def _listen(self, agent: Agent) -> None:
        reply = self._send(agent, "/v1/orders", "orders (held)", agent.listening(), None)
        agent.heard(reply)
        if reply.get("resend"):
            self._report(agent, "report asked for", agent.asked_again(), time.monotonic())

    def _send(self, agent: Agent, path: str, name: str, body: bytes, due: float | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if agent.token:
            headers["Authorization"] = f"Bearer {agent.token}"
        context = {} if due is None else {LATE: 1000 * (time.monotonic() - due)}
        with self.client.post(
            path, data=payload(body), headers=headers, name=name, context=context, catch_response=True
        ) as answer:
            if answer.status_code != 200:
                answer.failure(getattr(answer, "error", None) or f"status {answer.status_code}")
                return {}
            reply: dict[str, Any] = orjson.loads(answer.content)
            return reply
