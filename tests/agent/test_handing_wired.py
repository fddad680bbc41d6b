"""The agent with `--hand`: what it offers, reports and asks, towards a kubelet's sockets and a service's port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from app.agent.agent import Agent
from app.agent.feed import Feed, Standing
from app.agent.giving import Giving
from app.agent.handing import Said
from app.agent.hands import Hands, Observed, hands_of
from app.agent.kubelet.ids import offered
from app.agent.kubelet.pod_resources import ContainerHas, KubeletSilent, PodHas
from app.agent.reading import Reading
from app.agent.service import ReportError, Service
from app.report import (
    ContainerAsk,
    DeviceAt,
    Exchange,
    Gpu,
    Handed,
    Listening,
    NodeReport,
    OrderList,
    OrdersReply,
    Placements,
    PodAt,
)
from tests.agent.kubelet.conftest import folder
from tests.agent.kubelet.fake import Kubelet, Pods, until
from tests.agent.node_at_work import mixed_report, whole

GPU = "nvidia.com/gpu"

__all__ = ["folder"]  # a fixture: a folder whose sockets have short paths


# ---- the feed ----


class Lists:
    """A service whose answers are given in turn."""

    def __init__(self, *replies: OrdersReply) -> None:
        self.replies = list(replies)
        self.asked: list[Listening] = []

    def listen(self, listening: Listening) -> OrdersReply:
        self.asked.append(listening)
        return self.replies.pop(0)


def test_placements_are_passed_on_and_acknowledged_beside_orders() -> None:
    lists = Lists(
        OrdersReply(service="s", placements=Placements(service="s", version=4)),
        OrdersReply(service="s", orders=OrderList(service="s", version=7)),
        OrdersReply(service="s"),
    )
    standing, heard = Standing(), list[Placements]()
    standing.taken(1, "s")
    feed = Feed(lists, standing, node="n", boot="b", placed=heard.append)
    assert feed._once() == 0.0, "there may be more at once"
    feed._once()
    feed._once()
    assert [one.version for one in heard] == [4]
    assert [(one.orders, one.placements) for one in lists.asked] == [(0, 0), (0, 4), (7, 4)]


def test_placements_of_a_service_that_takes_no_reports_of_ours_are_dropped() -> None:
    lists = Lists(OrdersReply(service="s", placements=Placements(service="yesterday's", version=4)))
    standing, heard = Standing(), list[Placements]()
    standing.taken(1, "s")
    assert Feed(lists, standing, node="n", boot="b", placed=heard.append)._once() > 0
    assert heard == []
    assert standing.version is None, "it is told everything, which says who it is"


def test_another_services_lists_begin_anew() -> None:
    standing = Standing()
    standing.taken(1, "s")
    asked = standing.next_listening("n", "b", 1)
    standing.heard(asked, OrdersReply(placements=Placements(service="s", version=9)))
    standing.taken(1, "t")
    standing.heard(asked, OrdersReply(orders=OrderList(service="t", version=2)))
    again = standing.next_listening("n", "b", 1)
    assert (again.service, again.orders, again.placements) == ("t", 2, 0)


# ---- exchanges ----


ASKED = Exchange(node="n", uid="u", give=(whole("a"),), take=(whole("b"),))


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """A service that gives one answer to everything; its URL."""
    servers: list[HTTPServer] = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/exchange"
                self.rfile.read(int(self.headers["Content-Length"]))
                if status:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_an_exchange_is_answered(answering: Callable[[int, bytes], str]) -> None:
    reply = Service(answering(200, b'{"granted": true, "swapped": ["v"]}')).exchange(ASKED)
    assert (reply.granted, reply.swapped) == (True, ("v",))


@pytest.mark.parametrize(
    ("status", "arrived"), [(0, True), (500, True), (502, True), (401, False), (404, False), (503, False)]
)
def test_whether_it_may_have_arrived_is_known(
    answering: Callable[[int, bytes], str], status: int, arrived: bool
) -> None:
    """`0`: the connection is closed without an answer."""
    with pytest.raises(ReportError) as raised:
        Service(answering(status, b"no")).exchange(ASKED)
    assert raised.value.arrived == arrived


def test_a_refused_connection_has_certainly_not_asked() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        with pytest.raises(ReportError, match="cannot reach") as raised:
            Service(f"http://127.0.0.1:{reserved.getsockname()[1]}").exchange(ASKED)
    assert not raised.value.arrived


# ---- the report ----


class Scripted:
    """A reader that always reads the same."""

    reading = Reading(gpus=(Gpu(uuid="a", index=0, product="P", memory_mib=1),))

    def look(self, wait_seconds: float) -> Reading:
        return self.reading

    def change(self, orders: OrderList, seconds: float) -> tuple[()]:
        return ()

    def close(self) -> None:
        pass


class Mute:
    """Hands that say what they are told to."""

    def __init__(self) -> None:
        self.now = Said("plugin", "not registered", (), {})
        self.reports: list[NodeReport] = []

    def start(self, changed: Callable[[], None]) -> None:
        pass

    def reported(self, report: NodeReport) -> None:
        self.reports.append(report)

    def placements(self, placements: Placements) -> None:
        pass

    def said(self) -> Said:
        return self.now

    def close(self) -> None:
        pass


def test_the_report_has_what_was_handed_and_is_the_same_until_that_changes() -> None:
    hands = Mute()
    agent = Agent(node="n1", reader=Scripted(), hands=hands)
    agent.look(0)
    assert (agent.report.hands, agent.report.hands_none) == ("plugin", "not registered")
    version = agent.report.version
    assert not agent.look(0)
    handed = Handed(uid="u", namespace="n", name="p", container="c", resource=GPU, devices=(whole("a"),))
    hands.now = Said("plugin", "", (handed,), {"placed": 1})
    assert agent.look(0)
    assert (agent.report.version, agent.report.handed, agent.report.handing) == (version + 1, (handed,), {"placed": 1})
    assert hands.reports[-1] is agent.report


def test_an_agent_that_hands_out_nothing_says_nothing_of_it() -> None:
    agent = Agent(node="n1", reader=Scripted())
    agent.look(0)
    assert agent.report.hands is None


# ---- observing ----


def test_what_another_plugin_gave_is_reported_when_it_changes() -> None:
    pods: list[PodHas] = []
    silent = [False]

    def read() -> list[PodHas]:
        if silent[0]:
            raise KubeletSilent("nobody listens")
        return list(pods)

    changed = threading.Event()
    observed = Observed(read, seconds=0.01)
    observed.reported(mixed_report())
    observed.start(changed.set)
    until(lambda: not observed.said().none)
    changed.clear()
    pods.append(PodHas("default", "p", (ContainerHas("main", {GPU: ("w-1",), "example.com/nic": ("x",)}),)))
    assert changed.wait(10)
    (handed,) = observed.said().handed
    assert (handed.name, handed.uid, handed.devices, handed.how) == ("p", "", (DeviceAt(gpu="w-1"),), "observed")
    assert observed.said().counts == {"observed": 1}
    pods[:] = [PodHas("default", "q", (ContainerHas("main", {GPU: ("w-0",)}),))]
    until(lambda: [one.name for one in observed.said().handed] == ["q"])
    assert observed.said().counts == {"observed": 2}, "a count, which never falls"
    said = observed.said()
    silent[0] = True
    until(lambda: observed.said().none == "nobody listens")
    assert observed.said().handed == said.handed, "containers keep what they have"


def test_the_kubelet_is_asked_only_when_it_has_allocated_something(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.write_text("{}")
    reads: list[int] = []
    observed = Observed(lambda: reads.append(1) or [], checkpoint=checkpoint, seconds=0.005)  # type: ignore[func-returns-value]
    observed.reported(mixed_report())
    observed.start(lambda: None)
    until(lambda: reads)
    before = len(reads)
    for number in range(3):
        (tmp_path / "new").write_text(str(number))
        (tmp_path / "new").replace(checkpoint)
        until(lambda number=number: len(reads) > before + number)  # type: ignore[misc]
    assert len(reads) <= before + 4, "and not all the time"


# ---- everything together ----


@pytest.fixture
def plugin(folder: Path) -> Iterator[Hands]:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        made = hands_of(
            "plugin",
            node="n1",
            service=Service(f"http://127.0.0.1:{reserved.getsockname()[1]}"),
            giving=Giving(),
            shares=False,
            kubelet_dir=folder,
            state_dir=folder / "state",
            proc=folder,
        )
        assert made is not None
        yield made
        made.close()


def test_a_placed_pod_gets_its_gpu_through_the_kubelets_sockets(folder: Path, plugin: Hands) -> None:
    for name in ("device-plugins", "pod-resources"):
        (folder / name).mkdir()
    kubelet = Kubelet(folder / "device-plugins")
    pods = Pods(folder / "pod-resources" / "kubelet.sock")
    changed = threading.Event()
    plugin.start(changed.set)
    plugin.reported(mixed_report())
    pod = PodAt(
        uid="u",
        namespace="default",
        name="p",
        devices=(whole("w-1"),),
        containers=(ContainerAsk(name="main", resources={GPU: 1}),),
    )
    plugin.placements(Placements(service="s", version=1, pods=(pod,)))
    pods.pods = [("default", "p", {"main": []})]
    asked = kubelet.knows(*offered(mixed_report(), ()))[GPU]
    until(lambda: asked.heard[-1])
    assert asked.prefer(["w-0", "w-1"], [], 1) == ("w-1",)
    asked.allocate(["w-1"])
    until(lambda: plugin.said().handed)
    assert [(one.name, one.devices, one.how) for one in plugin.said().handed] == [("p", (whole("w-1"),), "placed")]
    assert changed.is_set()
    kubelet.close()
    pods.close()


def test_handing_out_needs_a_place_to_remember_it(folder: Path) -> None:
    with pytest.raises(ValueError, match="--state-dir"):
        hands_of(
            "plugin",
            node="n1",
            service=Service("http://127.0.0.1:1"),
            giving=Giving(),
            shares=False,
            kubelet_dir=folder,
            state_dir=None,
            proc=folder,
        )
