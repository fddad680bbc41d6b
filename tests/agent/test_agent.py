"""The agent's protocol towards a real HTTP server: what is sent, when, and how it takes refusals."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from app.agent.agent import Agent
from app.agent.child import NoAnswer
from app.agent.reading import Reading
from app.agent.service import ReportError, Service, encode
from app.report import Failed, Gpu, NodeReport, OrderList, ReportReply, Unchanged
from solver.samples import sample_node
from tests.agent.conftest import ROOT, Bench, Post, Received
from tests.fake_nvml.describe import NodeDescription, describe

Start = Callable[..., "subprocess.Popen[bytes]"]


def hgx() -> NodeDescription:
    return describe(sample_node("n1", "8xH100"))


def is_full(request: Received) -> bool:
    return "gpus" in request.body and not request.body["error"]


@pytest.fixture
def start(bench: Bench, post: Post) -> Iterator[Start]:
    """Starts real agents, as in the DaemonSet, and ends them."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*options: str, url: str = "") -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "app.agent", "--service", url or post.url, "--interval", "0.1", *options]
        environment = {**bench.environment, "NODE_NAME": "n1"}
        running.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE))
        return running[-1]

    yield start
    for agent in running:
        agent.kill()
        agent.communicate()


def test_everything_once_then_a_few_bytes(bench: Bench, post: Post, start: Start) -> None:
    bench.describe(hgx())
    start()
    full = post.wait(is_full)
    assert len(NodeReport.model_validate(full.body).gpus) == 8
    post.forget()
    for request in post.take(4)[1:]:
        assert request.body == {"node": "n1", "boot": full.body["boot"], "version": full.body["version"]}
        assert request.size < 200


def test_a_change_is_sent_in_full_under_a_new_version(bench: Bench, post: Post, start: Start) -> None:
    bench.describe(hgx())
    start()
    first = post.wait(is_full).body
    post.forget()
    bench.describe(hgx().with_gpu(3, lost=True))
    second = post.wait(is_full).body
    assert (second["boot"], second["version"]) == (first["boot"], first["version"] + 1)
    lost = second["gpus"][3]
    assert (lost["uuid"], lost["health"]) == (first["gpus"][3]["uuid"], "bad"), "its last known identity"
    assert lost["memory_mib"] == 81559


def test_resend_is_answered_at_once(bench: Bench, post: Post, start: Start) -> None:
    """The service was started anew and does not hold that version."""
    bench.describe(hgx())
    start()
    first = post.wait(is_full).body
    with post.arrived:
        post.received.clear()
        post.answers.append((200, {"resend": True}))
    assert post.wait(is_full).body == first


def test_each_start_is_another_boot(bench: Bench, post: Post, start: Start) -> None:
    bench.describe(hgx())
    agent = start()
    first = post.wait(is_full).body["boot"]
    agent.kill()
    agent.wait()
    post.forget()
    start()
    assert post.wait(is_full).body["boot"] != first


@pytest.mark.parametrize("status", [401, 503])
def test_a_refusal_is_said_and_tried_again(bench: Bench, post: Post, start: Start, status: int) -> None:
    bench.describe(hgx())
    post.answers += [(status, "this is why")] * 2
    agent = start()
    post.take(4)
    assert is_full(post.wait(is_full))
    agent.terminate()
    _, errors = agent.communicate(timeout=10)
    assert f"the service answers {status}: this is why".encode() in errors
    assert errors.count(b"this is why") == 1, "the same words are not repeated"


def test_the_service_comes_late(bench: Bench, post: Post, start: Start) -> None:
    """Refused connections end nothing."""
    bench.describe(hgx())
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        agent = start(url=f"http://127.0.0.1:{reserved.getsockname()[1]}")
        time.sleep(1.5)
        assert agent.poll() is None


def test_a_rotated_token_is_read_again(bench: Bench, post: Post, start: Start) -> None:
    bench.describe(hgx())
    token = bench.directory / "token"
    token.write_text("first\n")
    start("--token-file", str(token))
    assert post.take(1)[0].authorization == "Bearer first"
    token.write_text("second\n")
    post.wait(lambda request: request.authorization == "Bearer second")


def test_sigterm_ends_it_at_once(bench: Bench, post: Post, start: Start) -> None:
    """Also while NVML hangs: the DaemonSet's pod must not need its grace period. Its child goes with it."""
    bench.describe(hgx())
    agent = start()
    post.wait(is_full)
    bench.describe(hgx().with_rules("hang nvmlDeviceGetName"))
    time.sleep(0.5)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(children) == 1
    started = time.monotonic()
    os.kill(agent.pid, signal.SIGTERM)
    assert agent.wait(timeout=5) == 0
    assert time.monotonic() - started < 1.5
    assert not Path(f"/proc/{children[0]}").exists()


def test_wrong_options_are_said_in_words(bench: Bench) -> None:
    def words(*options: str) -> str:
        command = [sys.executable, "-m", "app.agent", *options]
        environment = {key: value for key, value in os.environ.items() if key != "NODE_NAME"}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 2
        return done.stderr

    assert "name the node" in words("--once")
    assert "name the service" in words("--node", "n1")
    assert "must be http://" in words("--node", "n1", "--service", "tangram:8080")


# ---- without processes: the agent's own laws ----


class Scripted:
    """A reader that says what it is told to."""

    def __init__(self, *answers: Reading | NoAnswer) -> None:
        self.answers = list(answers)

    def look(self, wait_seconds: float) -> Reading | NoAnswer:
        return self.answers.pop(0)

    def change(self, orders: OrderList, seconds: float) -> tuple[Failed, ...] | NoAnswer:
        raise AssertionError("nobody ordered anything")

    def close(self) -> None:
        pass


class Listener:
    """A service that notes what it gets and can refuse."""

    def __init__(self) -> None:
        self.heard: list[NodeReport | Unchanged] = []
        self.refuse: ReportError | None = None

    def post(self, report: NodeReport | Unchanged) -> ReportReply:
        self.heard.append(report)
        if self.refuse is not None:
            raise self.refuse
        return ReportReply()

    def close(self) -> None:
        pass


def reading(driver: str = "1") -> Reading:
    return Reading(driver=driver, gpus=(Gpu(uuid="a", index=0, product="P", memory_mib=1),))


def agent_with(*answers: Reading | NoAnswer) -> Agent:
    return Agent(node="n1", reader=Scripted(*answers), utc_now=lambda: datetime(2026, 11, 21, 5, 0, tzinfo=UTC))


def test_version_grows_only_with_the_content() -> None:
    agent = agent_with(reading(), reading(), reading("2"), reading("2"))
    assert [agent.look(0) for _ in range(4)] == [True, False, True, False]
    assert agent.report.version == 2


def test_a_slow_reading_changes_nothing() -> None:
    agent = agent_with(reading(), NoAnswer("still being read", failed=False))
    agent.look(0)
    assert not agent.look(0)
    assert agent.report.error == ""


def test_stale_keeps_the_facts_and_recovers() -> None:
    failed = NoAnswer("hung", failed=True)
    agent = agent_with(reading(), failed, failed, reading())
    agent.look(0)
    assert agent.look(0)
    assert agent.report.error == "stale since 2026-11-21T05:00:00Z: hung"
    assert agent.report.gpus
    assert not agent.look(0), "said once"
    assert agent.look(0)
    assert agent.report.error == ""


def test_what_cannot_be_reported_is_said_and_ends_nothing() -> None:
    """Two GPUs with one UUID, say: a report must not have them, and the agent must not end over it."""
    twice = reading().model_copy(update={"gpus": (*reading().gpus, *reading().gpus)})
    agent = agent_with(reading(), twice, twice, reading())
    agent.look(0)
    assert agent.look(0)
    assert agent.report.error.startswith("stale since 2026-11-21T05:00:00Z: what NVML says makes no sense: ")
    assert "same uuid" in agent.report.error
    assert len(agent.report.gpus) == 1
    assert not agent.look(0)
    assert agent.look(0)
    assert agent.report.error == ""


def test_a_refused_heartbeat_is_followed_by_everything() -> None:
    agent, listener = agent_with(reading()), Listener()
    agent.look(0)
    agent.tell(listener)
    listener.refuse = ReportError("no", status=404)
    with pytest.raises(ReportError):
        agent.tell(listener)
    listener.refuse = None
    agent.tell(listener)
    assert [type(report) for report in listener.heard] == [NodeReport, Unchanged, NodeReport]


def test_a_lost_heartbeat_is_only_repeated() -> None:
    agent, listener = agent_with(reading()), Listener()
    agent.look(0)
    agent.tell(listener)
    listener.refuse = ReportError("cannot reach")
    with pytest.raises(ReportError):
        agent.tell(listener)
    listener.refuse = None
    agent.tell(listener)
    assert [type(report) for report in listener.heard] == [NodeReport, Unchanged, Unchanged]


def test_a_heartbeat_stays_small() -> None:
    """Also with the longest name that Kubernetes allows and after years of changes, apart from the name itself."""
    longest = Unchanged(node="n" * 63, boot="0" * 16, version=10**9)
    assert len(encode(longest)) < 200


def test_a_kept_connection_that_was_closed_is_opened_again(post: Post) -> None:
    """The service closes idle connections; that is no failure."""
    service = Service(post.url)
    service.post(Unchanged(node="n1", boot="b", version=1))
    assert service._connection is not None
    assert service._connection.sock is not None
    service._connection.sock.shutdown(socket.SHUT_RDWR)
    assert service.post(Unchanged(node="n1", boot="b", version=1)) == ReportReply(resend=False)
    service.close()
    assert len(post.received) == 2


def test_an_answer_that_is_not_ours_is_an_error(post: Post) -> None:
    post.answers.append((200, "<html>a proxy</html>"))
    service = Service(post.url)
    with pytest.raises(ReportError, match="not understood"):
        service.post(Unchanged(node="n1", boot="b", version=1))
    service.close()


def test_https_trusts_the_given_authority_only(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tangram")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - timedelta(hours=1), now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (tmp_path / "server.pem").write_bytes(private + certificate.public_bytes(pem))
    (tmp_path / "ca.pem").write_bytes(certificate.public_bytes(pem))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"resend": true}')

        def log_message(self, format: str, *args: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{server.server_port}"
    beat = Unchanged(node="n1", boot="b", version=1)
    try:
        assert Service(url, ca_file=tmp_path / "ca.pem").post(beat).resend
        with pytest.raises(ReportError, match="CERTIFICATE_VERIFY_FAILED"):
            Service(url).post(beat)
        with pytest.raises(ReportError, match="cannot reach"):
            Service(url, ca_file=tmp_path / "absent.pem").post(beat)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
