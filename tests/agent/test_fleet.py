"""Many real agents in one small machine, for the end-to-end tests: cheap, and each of them to be steered."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.report import Listening, Make, NodeReport, OrderList, OrdersReply, ReportReply, SliceAt, Unchanged
from solver.samples import sample_node
from tests.agent.conftest import Post, Received
from tests.fake_nvml.describe import Process, describe
from tests.fake_nvml.fleet import Fleet

HELD_SECONDS = 0.5
POD = "11111111-2222-3333-4444-555555555555"


def full_of(name: str) -> object:
    return lambda request: request.body["node"] == name and "gpus" in request.body and not request.body["error"]


def test_each_agent_is_itself_and_can_be_steered(tmp_path: Path, post: Post) -> None:
    kinds = {"a": "8xH100", "b": "8xA100-40-mig", "c": "8xV100"}
    with Fleet(tmp_path / "fleet", service=post.url, interval_seconds=0.1) as fleet:
        for name, kind in kinds.items():
            fleet.start(sample_node(name, kind))
        for name, kind in kinds.items():
            body = post.wait(full_of(name)).body
            assert [gpu["uuid"] for gpu in body["gpus"]] == [gpu.uuid for gpu in sample_node(name, kind).gpus]
            assert body["sees_pods"]

        fleet.silence("a")
        time.sleep(0.3)
        post.forget()
        time.sleep(0.5)
        assert {request.body["node"] for request in post.received} == {"b", "c"}
        fleet.resume("a")
        post.wait(lambda request: request.body["node"] == "a")

        post.forget()
        fleet.add_process("c", 4711, POD)
        described = describe(sample_node("c", "8xV100")).with_gpu(2, processes=(Process(4711),))
        fleet.describe("c", described.with_gpu(5, lost=True))
        changed = post.wait(full_of("c")).body
        assert changed["gpus"][2]["pods"] == [POD]
        assert changed["gpus"][5]["health"] == "bad"

        fleet.stop("b")
        time.sleep(0.3)
        post.forget()
        time.sleep(0.4)
        assert "b" not in {request.body["node"] for request in post.received}
        fleet.start("b")
        post.wait(full_of("b"))


def test_forty_agents_are_cheap(tmp_path: Path, post: Post) -> None:
    """Under 25 MiB each for itself, and all have reported within seconds."""
    names = [f"n{number}" for number in range(40)]

    def reported(received: list[Received]) -> set[str]:
        return {request.body["node"] for request in received if request.body.get("gpus")}

    with Fleet(tmp_path / "fleet", service=post.url, interval_seconds=1.0) as fleet:
        for name in names:
            fleet.start(sample_node(name, "8xA100-40-mig"))
        with post.arrived:
            assert post.arrived.wait_for(lambda: reported(post.received) == set(names), timeout=60)
        heaviest = max(fleet.memory_kib(name) for name in names)
        print(f"heaviest agent: {heaviest / 1024:.1f} MiB private")
        assert heaviest < 25 * 1024
        pids = [fleet.pid(name) for name in names]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/smaps").exists() and _alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "agents outlive their fleet"
        time.sleep(0.05)


class Service:
    """Takes reports and hands out order lists, as the real one does, for one node."""

    def __init__(self) -> None:
        self.orders = OrderList(service="s", version=0)
        self.known: tuple[str, int] | None = None
        self.reports: list[NodeReport] = []
        self.moved = threading.Condition()
        service = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                with service.moved:
                    reply = service.report(body) if self.path == "/v1/reports" else service.listen(body)
                answer = reply.model_dump_json().encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """An agent was killed."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def report(self, body: bytes) -> ReportReply:
        if b'"gpus"' in body:
            report = NodeReport.model_validate_json(body)
            self.known = report.boot, report.version
            self.reports.append(report)
            self.moved.notify_all()
            return ReportReply(service="s")
        beat = Unchanged.model_validate_json(body)
        return ReportReply(resend=self.known != (beat.boot, beat.version), service="s")

    def listen(self, body: bytes) -> OrdersReply:
        said = Listening.model_validate_json(body)
        until = time.monotonic() + HELD_SECONDS
        while self.known == (said.boot, said.version) and time.monotonic() < until:
            if self.orders.version not in (0, said.orders):
                return OrdersReply(service="s", orders=self.orders)
            self.moved.wait(until - time.monotonic())
        return OrdersReply(service="s", resend=self.known != (said.boot, said.version))

    def order(self, *make: Make, remove: tuple[SliceAt, ...] = ()) -> int:
        with self.moved:
            version = self.orders.version + 1
            self.orders = OrderList(service="s", version=version, make=make, remove=remove)
            self.moved.notify_all()
        return version

    def wait(self, condition: Callable[[NodeReport], bool]) -> NodeReport:
        """The newest report, once it fulfils the condition."""
        with self.moved:
            newest = self.reports[-1] if self.reports else None
            assert self.moved.wait_for(lambda: bool(self.reports) and condition(self.reports[-1]), 20), newest
            return self.reports[-1]


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.server.shutdown()
    service.server.server_close()


def slices(report: NodeReport) -> list[tuple[str, int | None]]:
    """What is on the first GPU and has a UUID."""
    mig = report.gpus[0].mig if report.gpus else None
    return [(i.profile, i.start) for i in mig.instances if i.uuid] if mig else []


def test_killed_at_any_moment_and_started_again_it_does_what_is_ordered(tmp_path: Path, service: Service) -> None:
    """Twenty times, somewhere between the order and its report; in the end there is what shall be there."""
    with Fleet(tmp_path / "fleet", service=service.url, interval_seconds=0.2) as fleet:
        fleet.start(sample_node("a", "8xA100-40-mig"))
        gpu = service.wait(lambda report: bool(report.gpus) and not report.error).gpus[0].uuid
        for turn in range(20):
            start = turn % 7
            gone = SliceAt(gpu=gpu, profile="1g.5gb", start=(turn - 1) % 7)
            service.order(Make(gpu=gpu, profile="1g.5gb", start=start), remove=(gone,) if turn else ())
            time.sleep(0.003 * turn)
            fleet.stop("a")
            fleet.start("a")
            done = service.wait(lambda report: report.orders is not None and report.orders.version == turn + 1)  # noqa: B023 — called here
            assert done.orders is not None
            assert done.orders.failed == ()
            assert slices(done) == [("1g.5gb", start)]


def test_what_was_seen_of_health_outlives_the_agent_and_not_the_boot(tmp_path: Path, service: Service) -> None:
    with Fleet(tmp_path / "fleet", service=service.url, interval_seconds=0.1, patience=0.01) as fleet:
        fleet.start(sample_node("a", "8xH100"))
        service.wait(lambda report: bool(report.gpus))
        fleet.control("a").set(3, "recovery", 2)
        fleet.control("a").xid(3, 79)
        bad = service.wait(lambda report: report.gpus[3].health == "bad")
        assert "XID 79" in bad.gpus[3].health_reason
        others = [gpu for gpu in bad.gpus if gpu.index != 3]
        assert {signal.name for gpu in others for signal in gpu.signals} == {"node"}
        fleet.stop("a")
        fleet.start("a")
        again = service.wait(lambda report: report.boot != bad.boot and bool(report.gpus))
        assert again.gpus[3].health_reason == bad.gpus[3].health_reason
        fleet.control("a").unset(3, "recovery")
        fleet.reboot("a")
        service.wait(lambda report: report.boot not in (bad.boot, again.boot) and bool(report.gpus))
        assert service.reports[-1].gpus[3].health == "ok"


def test_a_gpu_that_was_unwell_comes_back(tmp_path: Path, service: Service) -> None:
    """Case 14, with a driver that says when it is over."""
    with Fleet(tmp_path / "fleet", service=service.url, interval_seconds=0.1, patience=0.01) as fleet:
        fleet.start(sample_node("a", "8xH100"))
        service.wait(lambda report: bool(report.gpus))
        control = fleet.control("a")
        control.set(3, "recovery", 1)
        control.xid(3, 95)
        bad = service.wait(lambda report: "XID 95" in report.gpus[3].health_reason)
        assert {signal.name for signal in bad.gpus[3].signals} == {"recovery", "xid"}
        control.set(3, "recovery", 0)
        service.wait(lambda report: report.gpus[3].health == "ok")


def _alive(pid: int) -> bool:
    try:
        return "Z (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
