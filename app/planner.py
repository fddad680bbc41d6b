"""The planning process beside the service: what is said to it, how it is kept alive, and when it is asked.

    service                                                    child (app.plan_process)
      Begin: policy, tables known ─────────────────────────────▶ its own picture of the cluster
      News: nodes that have changed, as they are offered ──────▶ brought up to date
      MakePlan: pending pods, counted by demand ───────────────▶ solver.flow.solve
                                          JointPlan ◀───────────
      MakeTable: a geometry seen for the first time ───────────▶ solver.market.solve_table, in a thread of its own
                                              Table ◀───────────
      Foresee: what pods have asked for ───────────────────────▶ solver.forecast, for the nodes as they are
                                           Forecast ◀───────────

Building models and tables holds Python's lock, so it is done in a process of its own (docs/decisions/0006). The
messages are pickled frames on its pipes. What is sent grows with what has changed, and with the kinds of pending pods,
not with the cluster or with the pods; it is made in pieces, with turns for others between them. If the child dies or
hangs it is started again, later each time, and until then pods are placed one by one as ever.
"""

import asyncio
import logging
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from app.inventory import Inventory
from app.ledger import Ledger
from app.offers import Offers, View
from app.schedule import JointPlan, Schedule
from app.truth import Truth
from solver import Demand, Geometry, Policy
from solver.forecast import Forecast
from solver.market import Table
from solver.values import Values

log = logging.getLogger(__name__)

NODES_IN_A_PIECE = 40  # pickled at once: about 1.5 ms for eight GPUs each
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LIVED_SECONDS = 60.0  # a child that lived so long has not failed at its start
REST = 9  # times as long as a plan took, nothing is planned after it: a tenth of a core goes into planning at most
LONGEST_REST_SECONDS = 5.0  # a plan is much older than that only where planning takes seconds
GRACE_SECONDS = 30.0  # to hear what is said; and beyond a plan's time limit: its model, and a busy machine
SETTLE_SECONDS = 0.01  # between two turns of bringing old prices up to date
HEADER_BYTES = 8
FORECAST_PODS = 100  # fewer say little of what comes next
FORECAST_KINDS = 500  # of pods, the most frequent: what is rarer moves nothing
FORECAST_SECONDS = 60.0  # between two forecasts: which blocks of GPUs are short changes as the cluster fills


# -- what is said ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """The first word to a new child."""

    policy: Policy
    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class News:
    """Nodes as they are offered now, and nodes that are not offered any more."""

    nodes: tuple[View, ...]
    gone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MakePlan:
    """Plan so many pods of each demand and priority, within so many seconds."""

    wanted: tuple[tuple[Demand, int, int], ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class MakeTable:
    """Find what states of this geometry are worth."""

    geometry: Geometry


@dataclass(frozen=True, slots=True)
class Foresee:
    """Find what nodes are worth to pods like these, so many of each."""

    seen: tuple[tuple[Demand, int], ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """A plan could not be made, or something else that is named."""

    reason: str
    geometry: Geometry | None = None
    forecast: bool = False

    @property
    def plan(self) -> bool:
        """Whether it was a plan."""
        return self.geometry is None and not self.forecast


Message = Begin | News | MakePlan | MakeTable | Foresee
Heard = JointPlan | Table | Forecast | Failed


def frame(message: object) -> bytes:
    """A message with its length before it."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(HEADER_BYTES) + body


# -- the process ----------------------------------------------------------------------------------------------


class Child:
    """One life of the planning process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._to, self._from = process.stdin, process.stdout

    @classmethod
    async def start(cls) -> "Child":
        """It finds our modules where we found them. It has one thread of arithmetic, and no terminal of its own."""
        path = os.pathsep.join(each for each in sys.path if each)
        env = {**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "app.plan_process",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=env,
                start_new_session=True,  # an interrupt from the terminal is ours to hear
            )
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def say(self, message: Message) -> None:
        """Send, waiting while its pipe is full. Raises OSError when it is gone, TimeoutError when it hangs."""
        self._to.write(frame(message))
        async with asyncio.timeout(GRACE_SECONDS):
            await self._to.drain()

    async def hear(self) -> Heard:
        """Its next word. Raises EOFError when it is gone."""
        size = int.from_bytes(await self._from.readexactly(HEADER_BYTES))
        heard: Heard = pickle.loads(await self._from.readexactly(size))  # noqa: S301  our own child's
        return heard

    async def end(self) -> None:
        """Kill it, whatever it does."""
        if self._process.returncode is None:
            try:
                self._process.kill()
            except ProcessLookupError:
                log.debug("the planning process was gone already")
        self._to.close()
        await self._process.wait()


# -- when it is asked -----------------------------------------------------------------------------------------


class Planner:
    """Plans what is pending whenever something has changed, and adopts value tables; a background task of the service.

    `made` hears of each plan and how many seconds it took in all. `ready` says whether things are as they seem.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        offers: Offers,
        inventory: Inventory,
        truth: Truth,
        schedule: Schedule,
        policy: Policy,
        ready: Callable[[], bool],
        made: Callable[[JointPlan, float], None],
        clock: Callable[[], float],
        interval_seconds: float,
        limit_seconds: float,
        with_tables: bool,
        with_forecast: bool,
    ) -> None:
        self._ledger = ledger
        self._offers = offers
        self._inventory = inventory
        self._truth = truth
        self._schedule = schedule
        self._policy = policy
        self._ready = ready
        self._made = made
        self._clock = clock
        self._interval_seconds = interval_seconds
        self._limit_seconds = limit_seconds
        self._with_tables = with_tables
        self._with_forecast = with_forecast
        self.foreseen_from = 0
        """How many pods the forecast knows of; 0: there is none."""
        self._foreseen_at = float("-inf")
        self.child: Child | None = None
        self.words = "starting"
        """How it stands, for people."""
        self.starts = 0
        self.made_at: float | None = None
        """When the latest plan was made."""
        self.seconds = 0.0
        """What it took from the first byte sent to its adoption."""
        self.tables: dict[Geometry, Table] = {}
        self._asked_tables: set[Geometry] = set()
        self._unsent: set[str] = set()
        self._pending_seen = -1
        self._answer: asyncio.Future[JointPlan | Failed] | None = None
        self._settling: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Keep a child alive for ever; cancellation ends both."""
        pause = FIRST_PAUSE_SECONDS
        try:
            while True:
                began = self._clock()
                try:
                    await self._live()
                except (OSError, EOFError, TimeoutError) as error:
                    self.words = f"not running: {type(error).__name__} {error}".rstrip()
                    log.warning("the planning process is %s; a new one in %.0f s", self.words, pause)
                except Exception as error:  # planning is a refinement: our faults in it must not end the service
                    self.words = f"not running: a fault inside Tangram, {type(error).__name__}"
                    log.exception("planning; a new process in %.0f s", pause)
                if self._clock() - began > LIVED_SECONDS:
                    pause = FIRST_PAUSE_SECONDS
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        finally:
            if self._settling is not None:
                self._settling.cancel()

    async def _live(self) -> None:
        """One child's life, from its start to its end."""
        self.starts += 1
        child = self.child = await Child.start()
        ears = asyncio.create_task(self._listen(child), name="planner hears")
        try:
            self._offers.drain_news()
            self._unsent = set(self._offers.names())
            self._pending_seen = -1
            self._asked_tables = set(self.tables)
            await child.say(Begin(self._policy, tuple(self.tables.values())))
            self.words = "running"
            spent = 0.0
            while not ears.done():
                await asyncio.sleep(max(self._interval_seconds, min(REST * spent, LONGEST_REST_SECONDS)))
                spent = 0.0
                if self._ready():
                    await self._ask_for_tables(child)
                    began = self._clock()
                    await self._plan_if_changed(child, ears)
                    spent = self._clock() - began
                    await self._ask_for_a_forecast(child)
            ears.result()
        finally:
            self.child = None
            ears.cancel()
            await child.end()
            await asyncio.gather(ears, return_exceptions=True)

    # -- plans ----------------------------------------------------------------------------------------

    async def _plan_if_changed(self, child: Child, ears: asyncio.Task[None]) -> None:
        self._offers.refresh(now=self._clock())
        self._unsent |= self._offers.drain_news()
        if not self._unsent and self._truth.pending_changes == self._pending_seen:
            return
        if not self._truth.pending:
            self._pending_seen = self._truth.pending_changes
            self._schedule.clear()
            return
        began = self._clock()
        await self._tell(child)
        self._pending_seen = self._truth.pending_changes
        wanted = self._wanted()  # in the same turn as the last piece of news: both are of one moment
        if not wanted:
            self._schedule.clear()
            return
        self._schedule.begin()
        try:
            answer = await self._answer_to(child, MakePlan(wanted, self._limit_seconds), ears)
            if isinstance(answer, Failed):
                log.error("no plan could be made: %s", answer.reason)
                return
            self._schedule.adopt(answer)
        finally:
            self._schedule.end()
        self.made_at = self._clock()
        self.seconds = self.made_at - began
        self._made(answer, self.seconds)

    async def _answer_to(self, child: Child, order: MakePlan, ears: asyncio.Task[None]) -> JointPlan | Failed:
        """The plan. Raises EOFError where the child has ended, TimeoutError where it hangs."""
        self._answer = asyncio.get_running_loop().create_future()
        await child.say(order)
        awaited: set[asyncio.Future[Any]] = {self._answer, ears}
        async with asyncio.timeout(order.seconds + GRACE_SECONDS):
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if not self._answer.done():
            ears.result()
            raise EOFError("it ended while it made a plan")
        return self._answer.result()

    async def _tell(self, child: Child) -> None:
        """Send what has changed, piece by piece, until nothing is left."""
        while self._unsent:
            piece = [self._unsent.pop() for _ in range(min(NODES_IN_A_PIECE, len(self._unsent)))]
            gone = [name for name in piece if self._offers.fault(name)]
            nodes = [self._offers.view(name) for name in piece if not self._offers.fault(name)]
            await child.say(News(tuple(nodes), tuple(gone)))
            await asyncio.sleep(0)
            self._offers.refresh(now=self._clock())
            self._unsent |= self._offers.drain_news()

    def _wanted(self) -> tuple[tuple[Demand, int, int], ...]:
        """The pending pods that no bind is under way for and that a scheduler of ours will ask about, counted."""
        counted = Counter(self._truth.kinds)
        for uid in self._ledger.under_way():
            pod = self._truth.pending.get(uid)
            if pod is not None:
                counted[pod.ask, pod.priority, pod.scheduler] -= 1
        wanted: Counter[tuple[Demand, int]] = Counter()
        for (ask, priority, scheduler), count in counted.items():
            if count > 0 and isinstance(ask, Demand) and self._truth.asks_us(scheduler):
                wanted[ask, priority] += count
        return tuple([(demand, priority, count) for (demand, priority), count in wanted.items()])

    # -- what it says ---------------------------------------------------------------------------------

    async def _listen(self, child: Child) -> None:
        while True:
            heard = await child.hear()
            if isinstance(heard, JointPlan) or (isinstance(heard, Failed) and heard.plan):
                if self._answer is not None and not self._answer.done():
                    self._answer.set_result(heard)
            elif isinstance(heard, Failed):
                log.error("no %s could be made: %s", "forecast" if heard.forecast else "value table", heard.reason)
            elif isinstance(heard, Forecast):
                self._rank_by(with_forecast(self._policy, heard))
            else:
                self._adopt(heard)

    # -- value tables ---------------------------------------------------------------------------------

    async def _ask_for_tables(self, child: Child) -> None:
        if not self._with_tables:
            return
        for geometry in self._inventory.geometries - self._asked_tables:
            self._asked_tables.add(geometry)
            await child.say(MakeTable(geometry))

    def _adopt(self, table: Table) -> None:
        self.tables[table.geometry] = table
        log.info("a value table for a board of %d units: %s", table.geometry.width, table.method)
        self._rank_by(with_tables(self._policy, self.tables.values()))

    # -- forecasts ------------------------------------------------------------------------------------

    async def _ask_for_a_forecast(self, child: Child) -> None:
        """Now and then, once enough pods have come to say what comes next."""
        seen, now = self._truth.arrivals, self._clock()
        if not self._with_forecast or seen.total() < FORECAST_PODS or now < self._foreseen_at + FORECAST_SECONDS:
            return
        self._foreseen_at, self.foreseen_from = now, seen.total()
        await self._tell(child)
        await child.say(Foresee(tuple(seen.most_common(FORECAST_KINDS))))

    def _rank_by(self, policy: Policy) -> None:
        """From now on: changed nodes at once, the others in many small turns."""
        self._policy = policy
        self._offers.renew(policy)
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle(), name="planner settles")

    async def _settle(self) -> None:
        while self._offers.settle():
            await asyncio.sleep(SETTLE_SECONDS)


def with_tables(policy: Policy, tables: Iterable[Table]) -> Policy:
    """The policy with these tables for its values."""
    return replace(policy, values=Values({table.geometry: table for table in tables}, policy.values.forecast))


def with_forecast(policy: Policy, forecast: Forecast) -> Policy:
    """The policy with this forecast for its values."""
    return replace(policy, values=Values(policy.values.tables, forecast))
