"""The held request for orders: real agents towards a real server that holds it, and the laws of the feed by itself."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from app.agent.agent import OBSERVES, Agent
from app.agent.child import CHANGE_SECONDS, NoAnswer
from app.agent.feed import Feed, Standing
from app.agent.reading import Reading
from app.agent.service import ReportError, Service
from app.report import (
    Failed,
    Gpu,
    Listening,
    Make,
    NodeReport,
    OrderList,
    OrdersReply,
    ReportReply,
    SliceAt,
    Switch,
    Unchanged,
)
from solver.samples import sample_node
from tests.agent.conftest import ROOT, Bench
from tests.fake_nvml.describe import NodeDescription, describe

Start = Callable[..., "subprocess.Popen[bytes]"]
HELD_SECONDS = 0.5
"""How long this server holds a request at most, whatever the agent allows."""


@dataclass
class Asked:
    """One request that came in."""

    path: str
    body: dict[str, Any]
    authorization: str | None
    at: float = field(default_factory=time.monotonic)

    @property
    def is_full(self) -> bool:
        return "gpus" in self.body and not self.body["error"]


@dataclass
class Desk:
    """A service of one node, small: it holds requests for orders, and its list can be changed."""

    url: str = ""
    service: str = "service-1"
    has_orders: bool = True
    orders: OrderList | None = None
    known: tuple[str, int] | None = None
    asked: list[Asked] = field(default_factory=list)
    moved: threading.Condition = field(default_factory=threading.Condition)

    def order(self, version: int, *, service: str = "", **lists: Any) -> None:
        with self.moved:
            self.orders = OrderList(service=service or self.service, version=version, **lists)
            self.moved.notify_all()

    def restart(self) -> None:
        """Another service: it knows no report and has no list."""
        with self.moved:
            self.service += "'"
            self.known, self.orders = None, None
            self.moved.notify_all()

    def wait(self, condition: Callable[[Asked], bool], *, timeout: float = 20.0) -> Asked:
        """The first request that fulfils the condition, waiting for it."""
        with self.moved:
            assert self.moved.wait_for(lambda: any(map(condition, self.asked)), timeout), f"never came: {self.asked}"
            return next(request for request in self.asked if condition(request))

    def take(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if path == "/v1/reports":
            if "gpus" in body:
                self.known = body["boot"], body["version"]
            return 200, {"resend": self.known != (body["boot"], body["version"]), "service": self.service}
        if not self.has_orders:
            return 404, {"detail": "Not Found"}
        until = time.monotonic() + HELD_SECONDS
        while True:
            if self.known != (body["boot"], body["version"]):
                return 200, {"resend": True, "service": self.service}
            if self.orders is not None and (self.orders.service, self.orders.version) != (
                body["service"],
                body["orders"],
            ):
                return 200, {"service": self.service, "orders": self.orders.model_dump()}
            if not self.moved.wait(max(0.0, until - time.monotonic())) and time.monotonic() >= until:
                return 200, {"service": self.service}


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with desk.moved:
                desk.asked.append(Asked(self.path, body, self.headers.get("Authorization")))
                desk.moved.notify_all()
                status, answer = desk.take(self.path, body)
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """An agent that a test killed resets its connection."""

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    desk.url = f"http://127.0.0.1:{server.server_port}"
    yield desk
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def start(bench: Bench, desk: Desk) -> Iterator[Start]:
    """Starts real agents with their children, which look only each minute: what happens sooner was woken."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, interval: float = 60.0) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "app.agent", "--node", "n1", "--service", desk.url]
        command += ["--interval", str(interval), "--proc", str(bench.proc), *options]
        running.append(subprocess.Popen(command, env=bench.environment, cwd=ROOT, stderr=subprocess.PIPE))
        return running[-1]

    yield start
    for agent in running:
        agent.kill()
        agent.communicate()


def sliced() -> NodeDescription:
    """GPUs in MIG mode with nothing on them."""
    return describe(sample_node("n1", "8xA100-40-mig"))


def make(gpu: str, profile: str = "1g.5gb", start: int = 0) -> Make:
    return Make(gpu=gpu, profile=profile, start=start)


def acknowledges(version: int) -> Callable[[Asked], bool]:
    return lambda asked: (
        bool(asked.body.get("orders")) and asked.path == "/v1/reports" and (asked.body["orders"]["version"] == version)
    )


def at(report: dict[str, Any], gpu: str) -> list[tuple[str, int]]:
    """What is on a GPU, as reported, with UUIDs."""
    found = next(each for each in report["gpus"] if each["uuid"] == gpu)
    return [(i["profile"], i["start"]) for i in found["mig"]["instances"] if i["uuid"]]


# ---- real agents ----


def test_a_slice_is_made_and_reported_at_once(bench: Bench, desk: Desk, start: Start) -> None:
    """The next look is a minute away: the order itself wakes the agent."""
    bench.describe(sliced())
    start()
    report = desk.wait(lambda asked: asked.is_full).body
    assert (report["makes_slices"], report["orders"]) == (True, None)
    gpu = report["gpus"][0]["uuid"]
    desk.wait(lambda asked: asked.path == "/v1/orders")

    ordered = time.monotonic()
    desk.order(1, make=(make(gpu),))
    done = desk.wait(acknowledges(1))
    assert done.at - ordered < 5
    assert done.body["orders"] == {"service": "service-1", "version": 1, "failed": []}
    assert done.body["version"] > report["version"]
    assert at(done.body, gpu) == [("1g.5gb", 0)]

    desk.order(2, remove=(SliceAt(gpu=gpu, profile="1g.5gb", start=0),))
    assert at(desk.wait(acknowledges(2)).body, gpu) == []


def test_what_fails_comes_back_in_words(bench: Bench, desk: Desk, start: Start) -> None:
    """Also where nothing has changed on the node: the service waits for the answer."""
    bench.describe(sliced())
    start()
    report = desk.wait(lambda asked: asked.is_full).body
    gpu = report["gpus"][0]["uuid"]
    desk.order(7, make=(make(gpu, "5g.nonsense"),))
    done = desk.wait(acknowledges(7)).body
    (failed,) = done["orders"]["failed"]
    assert (failed["gpu"], failed["profile"]) == (gpu, "5g.nonsense")
    assert failed["reason"]
    assert [gpu["mig"] for gpu in done["gpus"]] == [gpu["mig"] for gpu in report["gpus"]]


def test_a_restarted_agent_gets_the_list_again(bench: Bench, desk: Desk, start: Start) -> None:
    """It may have died before, during or after carrying it out."""
    bench.describe(sliced())
    agent = start()
    gpu = desk.wait(lambda asked: asked.is_full).body["gpus"][0]["uuid"]
    desk.order(3, make=(make(gpu),))
    first = desk.wait(acknowledges(3)).body
    agent.kill()
    agent.wait()
    with desk.moved:
        desk.asked.clear()
    start()
    again = desk.wait(acknowledges(3)).body
    assert again["boot"] != first["boot"]
    assert at(again, gpu) == [("1g.5gb", 0)], "made once"


def test_held_requests_are_the_beats(bench: Bench, desk: Desk, start: Start) -> None:
    """A quiet node sends no reports beside them."""
    bench.describe(sliced())
    start(interval=0.1)
    read = desk.wait(lambda asked: asked.is_full).body["version"]
    desk.wait(lambda asked: asked.path == "/v1/orders" and asked.body["version"] == read)
    with desk.moved:
        desk.asked.clear()
    desk.wait(lambda asked: len(desk.asked) >= 2)
    assert {asked.path for asked in desk.asked} == {"/v1/orders"}, desk.asked
    held = desk.asked[0].body
    assert (held["service"], held["orders"], held["wait_seconds"]) == ("", 0, 10.0)
    assert len(json.dumps(held)) < 200


def test_an_older_service_gets_beats(bench: Bench, desk: Desk, start: Start) -> None:
    desk.has_orders = False
    bench.describe(sliced())
    start(interval=0.1)
    desk.wait(lambda asked: set(asked.body) == {"node", "boot", "version"})
    desk.wait(lambda asked: len(desk.asked) > 8)
    assert [asked.path for asked in desk.asked].count("/v1/orders") == 1


def test_a_restarted_service_gets_everything_at_once(bench: Bench, desk: Desk, start: Start) -> None:
    """It asks in its answer to the held request, and its list is then taken."""
    bench.describe(sliced())
    start()
    first = desk.wait(lambda asked: asked.is_full).body
    desk.wait(lambda asked: asked.path == "/v1/orders")
    with desk.moved:
        desk.asked.clear()
    desk.restart()
    assert desk.wait(lambda asked: asked.is_full).body == first
    desk.order(1, make=(make(first["gpus"][0]["uuid"]),))
    assert desk.wait(acknowledges(1)).body["orders"]["service"] == "service-1'"


def test_a_list_of_a_service_that_is_no_more_is_dropped(bench: Bench, desk: Desk, start: Start) -> None:
    bench.describe(sliced())
    agent = start(interval=0.2)
    gpu = desk.wait(lambda asked: asked.is_full).body["gpus"][0]["uuid"]
    desk.order(5, service="of-yesterday", make=(make(gpu),))
    held = desk.wait(lambda asked: asked.path == "/v1/orders")
    desk.wait(lambda asked: asked.path == "/v1/orders" and asked.at > held.at)
    desk.order(6, make=(make(gpu, start=1),))
    done = desk.wait(acknowledges(6)).body
    assert at(done, gpu) == [("1g.5gb", 1)], "and the other was never made"
    agent.terminate()
    words = agent.communicate(timeout=10)[1]
    assert words.count(b"orders of service 'of-yesterday' dropped: 'service-1' took the last report") == 1


def test_a_change_that_hangs_fails_in_words_and_is_over(bench: Bench, desk: Desk, start: Start, tmp_path: Path) -> None:
    """The service must be able to go on, and the node is stale until somebody has read what is there."""
    bench.describe(sliced().with_rules("hang nvmlDeviceCreateGpuInstanceWithPlacement"))
    shorter = "a.CHANGE_SECONDS = a.INSTANCE_SECONDS = 1.0"
    program = f"import app.agent.agent as a, app.agent.__main__ as m; {shorter}; m.main()"
    agent = subprocess.Popen(
        [sys.executable, "-c", program, "--node", "n1", "--service", desk.url, "--interval", "0.2"],
        env=bench.environment,
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        gpu = desk.wait(lambda asked: asked.is_full).body["gpus"][0]["uuid"]
        desk.order(4, make=(make(gpu),))
        done = desk.wait(acknowledges(4)).body
        assert "not carried out orders within 1 s" in done["error"]
        assert done["error"].startswith("stale since")
        assert [each["reason"] for each in done["orders"]["failed"]] == ["NVML has not carried out orders within 1 s"]
        back = desk.wait(lambda asked: asked.is_full and bool(asked.body["orders"])).body
        assert back["orders"] == done["orders"]
    finally:
        agent.kill()
        agent.wait()


def test_an_agent_that_observes_makes_nothing(bench: Bench, desk: Desk, start: Start) -> None:
    bench.describe(sliced())
    start("--mig", "observe")
    report = desk.wait(lambda asked: asked.is_full).body
    assert (report["makes_slices"], report["makes_none"]) == (False, OBSERVES)
    gpu = report["gpus"][0]["uuid"]
    desk.order(1, make=(make(gpu),))
    done = desk.wait(acknowledges(1)).body
    assert [each["reason"] for each in done["orders"]["failed"]] == [OBSERVES]
    assert at(done, gpu) == []


def test_the_token_is_read_for_each_held_request(desk: Desk, tmp_path: Path) -> None:
    token = tmp_path / "token"
    desk.known = ("b", 1)
    service = Service(desk.url, token_file=token)
    for value in ("first", "second"):
        token.write_text(value + "\n")
        assert service.listen(Listening(node="n1", boot="b", version=1)) == OrdersReply(service="service-1")
    service.close()
    assert [asked.authorization for asked in desk.asked] == ["Bearer first", "Bearer second"]


# ---- the laws of obeying, without processes ----


class Scripted:
    """A reader whose readings never change, and whose changes go as told."""

    def __init__(self, *changes: tuple[Failed, ...] | NoAnswer) -> None:
        self.changes = list(changes)
        self.carried: list[OrderList] = []
        self.allowed: list[float] = []
        self.reading = Reading(makes_slices=True, gpus=(Gpu(uuid="a", index=0, product="P", memory_mib=1),))

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        return self.reading

    def change(self, orders: OrderList, seconds: float) -> tuple[Failed, ...] | NoAnswer:
        self.carried.append(orders)
        self.allowed.append(seconds)
        return self.changes.pop(0)

    def close(self) -> None:
        pass


class Taker:
    """A service that takes every report."""

    def __init__(self) -> None:
        self.heard: list[NodeReport | Unchanged] = []

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        self.heard.append(report)
        return ReportReply(service="s")

    def close(self) -> None:
        pass


def everything(version: int = 1) -> OrderList:
    return OrderList(
        service="s",
        version=version,
        make=(make("a"),),
        remove=(SliceAt(gpu="a", profile="2g.10gb", start=2),),
        switch=(Switch(gpu="b", enabled=True),),
    )


def test_the_same_list_twice_is_answered_twice() -> None:
    """The service sent it again, so it wants to hear again, although the report is the same."""
    agent, taker = Agent(node="n1", reader=Scripted((), ())), Taker()
    agent.look(0)
    agent.tell(taker)
    for _ in range(2):
        agent.obey(everything())
        agent.tell(taker)
    first, second, third = taker.heard
    assert isinstance(second, NodeReport)
    assert second.orders is not None
    assert second == third
    assert isinstance(first, NodeReport)
    assert second.version == first.version + 1


@pytest.mark.parametrize("failed", [True, False])
def test_when_nobody_knows_what_was_done_every_order_has_failed(failed: bool) -> None:
    """`failed`: the child was ended. Else it was still reading, so nothing was done and nothing is stale."""
    agent = Agent(node="n1", reader=Scripted(NoAnswer("hung", failed=failed)))
    agent.look(0)
    agent.obey(everything())
    done = agent.report.orders
    assert done is not None
    assert [(each.gpu, each.profile, each.start, each.reason) for each in done.failed] == [
        ("a", "1g.5gb", 0, "hung"),
        ("a", "2g.10gb", 2, "hung"),
        ("b", "", 0, "hung"),
    ]
    assert agent.report.error.startswith("stale since") == failed
    agent.look(0)
    assert agent.report.error == ""
    assert agent.report.orders == done, "it stays said"


def test_a_long_list_may_take_long() -> None:
    """Fifty idle slices that go together take about a minute; ended half-way the whole node would be stale."""
    reader = Scripted((), ())
    agent = Agent(node="n1", reader=reader)
    agent.obey(everything())
    gone = tuple(SliceAt(gpu="a", profile="1g.5gb", start=start) for start in range(50))
    agent.obey(
        OrderList(
            service="s", version=2, remove=gone[:25], make=(Make(**make("a").model_dump() | {"remove": gone[25:]}),)
        )
    )
    short, long = reader.allowed
    assert short == CHANGE_SECONDS
    assert long >= 2 * len(gone)


def test_an_acknowledgement_comes_only_with_what_was_read_afterwards() -> None:
    """A report of before the change under its version would say that the slices are not there."""

    class Slow(Scripted):
        def look(self, wait_seconds: float) -> Reading | NoAnswer:
            return NoAnswer("still being read", failed=False) if self.carried else super().look(wait_seconds)

    reader = Slow(())
    agent = Agent(node="n1", reader=reader)
    agent.look(0)
    agent.obey(everything())
    assert agent.report.orders is None
    reader.carried.clear()
    agent.look(0)
    assert agent.report.orders is not None


# ---- the feed by itself ----


class Line:
    """Answers as told; then it is silent."""

    def __init__(self, *answers: OrdersReply | ReportError) -> None:
        self.answers = list(answers)
        self.asked: list[Listening] = []

    def listen(self, listening: Listening) -> OrdersReply:
        self.asked.append(listening)
        answer = self.answers.pop(0)
        if isinstance(answer, ReportError):
            raise answer
        return answer


def feed_with(*answers: OrdersReply | ReportError) -> tuple[Feed, Standing, Line]:
    standing, line = Standing(), Line(*answers)
    standing.taken(4, "s")
    standing.set_listening(True)
    return Feed(line, standing, node="n1", boot="b"), standing, line


def orders(version: int, service: str = "s") -> OrdersReply:
    return OrdersReply(service=service, orders=OrderList(service=service, version=version))


def test_it_asks_with_what_it_has() -> None:
    feed, standing, line = feed_with(orders(3), orders(4))
    assert feed._once() == 0
    assert feed._once() == 0
    assert [(asked.version, asked.service, asked.orders) for asked in line.asked] == [(4, "", 0), (4, "s", 3)]
    newest = standing.take_orders()
    assert newest is not None
    assert newest.version == 4, "a list says everything, so an older one is not carried out any more"
    assert standing.take_orders() is None


@pytest.mark.parametrize("service", ["other", ""])
def test_lists_need_the_id_of_the_service_that_takes_our_reports(service: str) -> None:
    feed, standing, _ = feed_with(orders(3, service))
    if not service:
        standing.taken(4, "")
    assert feed._once() > 0.5, "and it does not ask at once for the same"
    assert standing.take_orders() is None
    assert standing.version is None, "a report tells whose lists count"


def test_a_list_that_was_not_begun_when_another_service_came_is_dropped() -> None:
    feed, standing, _ = feed_with(orders(3))
    feed._once()
    standing.taken(5, "another")
    assert standing.take_orders() is None


def test_failures_wait_longer_and_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    down = ReportError("cannot reach it")
    feed, standing, _ = feed_with(down, down, down, down, down, down, OrdersReply())
    waits = [feed._once() for _ in range(6)]
    for wait, expected in zip(waits, (1, 2, 4, 8, 15, 15), strict=True):
        assert 0.9 * expected <= wait <= 1.1 * expected
    assert not standing.listening, "the loop beats"
    feed._once()
    assert standing.listening
    assert [record.message for record in caplog.records] == [
        "no orders: cannot reach it",
        "the service has orders again",
    ]


def test_a_service_without_orders_is_asked_again_each_minute() -> None:
    feed, standing, _ = feed_with(ReportError("404", 404))
    assert 50 < feed._once() < 70
    assert not standing.listening


def test_a_service_that_is_back_is_asked_at_once() -> None:
    """However long the feed would still wait: a report has just been taken, or taken by another service."""
    for back in (lambda standing: standing.reached(), lambda standing: standing.taken(4, "another")):
        _, standing, _ = feed_with()
        standing.next_listening("n1", "b", 10)
        resting = threading.Thread(target=standing.rest, args=(60.0,), daemon=True)
        resting.start()
        standing.taken(5, "s")
        resting.join(0.05)
        assert resting.is_alive(), "a report taken as ever is no news"
        back(standing)
        resting.join(10)
        assert not resting.is_alive()


def test_a_service_that_does_not_hold_is_not_stormed() -> None:
    feed, _, _ = feed_with(OrdersReply(), orders(3), orders(3))
    assert feed._once() > 0.5
    assert feed._once() == 0
    assert feed._once() > 0.5, "the list that it has already"


def test_a_service_that_never_has_our_report_is_not_stormed() -> None:
    """Two processes behind one name, say: one takes the reports, the other has none of them when asked for orders."""
    feed, standing, _ = feed_with(OrdersReply(resend=True), OrdersReply(resend=True))
    for _ in range(2):
        assert feed._once() > 0.5
        assert standing.version is None
        standing.taken(4, "s")


def test_a_resend_for_an_older_report_is_late() -> None:
    """A newer one was taken while the request was under way."""
    standing = Standing()
    standing.taken(4, "s")
    asked = standing.next_listening("n1", "b", 10)
    standing.taken(5, "s")
    standing.heard(asked, OrdersReply(resend=True))
    assert standing.version == 5
    standing.heard(standing.next_listening("n1", "b", 10), OrdersReply(resend=True))
    assert standing.version is None


def test_a_bug_of_ours_hands_the_beats_back() -> None:
    feed, standing, line = feed_with()
    assert feed._once() > 0.5
    assert line.asked
    assert not standing.listening
