"""Certificates as `tangram certs` makes them, proved by real TLS handshakes on loopback."""

import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from app.certs import CA_FILES, OBJECT_FILES, PEM_FILES, create_certificates, issue, secrets, service_dns_names
from app.errors import BadInput


@pytest.fixture
def made(tmp_path: Path) -> Path:
    create_certificates(tmp_path / "certs", dns=["gpu.example.test"], ips=["10.1.2.3", "fd00::1"])
    return tmp_path / "certs"


def handshake(directory: Path, *, client: str | None = "client", name: str = "tangram.tangram-system.svc") -> None:
    """A whole mutual handshake in memory; raises ssl.SSLError where either side refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(directory / "ca.crt"))
    server_context.load_cert_chain(directory / "server.crt", directory / "server.key")
    server_context.verify_mode = ssl.CERT_REQUIRED
    client_context = ssl.create_default_context(cafile=str(directory / "ca.crt"))
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    server_context.verify_flags |= ssl.VERIFY_X509_STRICT
    if client:
        client_context.load_cert_chain(directory / f"{client}.crt", directory / f"{client}.key")
    ends = (
        client_context.wrap_bio(to_client, to_server, server_hostname=name),
        server_context.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(6):
        for end in ends:
            with wants_more():
                end.do_handshake()
    ends[0].write(b"hello")
    assert ends[1].read() == b"hello"


@contextmanager
def wants_more() -> Iterator[None]:
    with suppress(ssl.SSLWantReadError):
        yield


@pytest.mark.parametrize(
    "name", [*service_dns_names(), "localhost", "gpu.example.test", "127.0.0.1", "10.1.2.3", "fd00::1"]
)
def test_kube_scheduler_and_service_trust_each_other(made: Path, name: str) -> None:
    handshake(made, name=name)


def test_another_name_is_not_ours(made: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="elsewhere"):
        handshake(made, name="elsewhere")


def test_no_certificate_no_entry(made: Path) -> None:
    with pytest.raises(ssl.SSLError):
        handshake(made, client=None)


def test_the_servers_certificate_does_not_open_the_door(made: Path) -> None:
    """The service's pod holds it; it is for being called only."""
    with pytest.raises(ssl.SSLError):
        handshake(made, client="server")


def test_a_client_of_another_ca_is_not_let_in(made: Path, tmp_path: Path) -> None:
    create_certificates(tmp_path / "other")
    for end in ("crt", "key"):
        (made / f"stranger.{end}").write_bytes((tmp_path / "other" / f"client.{end}").read_bytes())

    with pytest.raises(ssl.SSLError):
        handshake(made, client="stranger")


def test_only_the_owner_can_read_any_file(made: Path) -> None:
    assert sorted(file.name for file in made.iterdir()) == sorted([*CA_FILES, *PEM_FILES])
    for file in made.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_client_is_named_and_lives_as_long_as_asked(tmp_path: Path) -> None:
    create_certificates(tmp_path, days=7)
    client = x509.load_pem_x509_certificate((tmp_path / "client.crt").read_bytes())

    assert client.subject.rfc4514_string() == "CN=tangram-scheduler-client"
    left = client.not_valid_after_utc - datetime.now(UTC)
    assert timedelta(days=6, hours=23) < left <= timedelta(days=7)


def test_what_is_there_is_not_overwritten(made: Path) -> None:
    before = (made / "server.key").read_bytes()

    with pytest.raises(BadInput, match=r"already has ca.crt.*--force"):
        create_certificates(made)

    assert (made / "server.key").read_bytes() == before


def test_forced_renewal_keeps_the_ca(made: Path) -> None:
    """So that the service and kube-scheduler can be renewed one after the other."""
    old_client = {end: (made / f"client.{end}").read_bytes() for end in ("crt", "key")}
    ca = (made / "ca.crt").read_bytes()

    create_certificates(made, force=True)

    assert (made / "ca.crt").read_bytes() == ca
    assert (made / "client.crt").read_bytes() != old_client["crt"]
    handshake(made)
    for end, text in old_client.items():
        (made / f"old.{end}").write_bytes(text)
    handshake(made, client="old")


def test_ca_that_would_end_first_is_replaced(made: Path) -> None:
    ca = (made / "ca.crt").read_bytes()
    create_certificates(made, force=True, days=3649)
    assert (made / "ca.crt").read_bytes() == ca  # made just now, so it still lasts

    with pytest.raises(BadInput, match="--days"):
        create_certificates(made, force=True, days=3650)


def test_half_a_ca_is_said_to_be_broken(made: Path) -> None:
    (made / "ca.key").write_text("nonsense")

    with pytest.raises(BadInput, match="cannot use the CA"):
        create_certificates(made, force=True)


def test_keys_of_two_cas_are_not_mixed(made: Path, tmp_path: Path) -> None:
    create_certificates(tmp_path / "other")
    (made / "ca.key").write_bytes((tmp_path / "other" / "ca.key").read_bytes())

    with pytest.raises(BadInput, match="do not belong together"):
        create_certificates(made, force=True)


@pytest.mark.parametrize(
    ("dns", "ips", "words"),
    [
        (["a b"], [], "--dns 'a b'"),
        ([""], [], "--dns ''"),
        (["x..y"], [], "--dns"),
        ([], ["x"], "--ip 'x' is not"),
        (["ü.de"], [], "--dns"),
    ],
)
def test_names_that_cannot_be_are_refused_in_words(dns: list[str], ips: list[str], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        create_certificates(tmp_path, dns=dns, ips=ips)
    assert list(tmp_path.iterdir()) == []


def test_secrets_hold_what_each_side_mounts_and_never_the_ca_key() -> None:
    certificates = issue()
    texts = secrets(certificates, name="mine", namespace="gpu")

    server, client = (yaml.safe_load(text) for text in texts)
    assert [server["metadata"]["name"], client["metadata"]["name"]] == ["mine-server-tls", "mine-client-tls"]
    assert server["metadata"]["namespace"] == client["metadata"]["namespace"] == "gpu"
    assert server["stringData"]["tls.key"].encode() == certificates.server.key
    assert client["stringData"]["tls.crt"].encode() == certificates.client.certificate
    assert all(certificates.ca.key.decode() not in text for text in texts)
    assert all(set(each["stringData"]) == {"tls.crt", "tls.key", "ca.crt"} for each in (server, client))


def test_agents_get_the_ca_and_no_key(tmp_path: Path) -> None:
    """They prove themselves by a token; a client certificate of this CA would open the extender verbs to them."""
    create_certificates(tmp_path, secret="mine", namespace="gpu")

    found = yaml.safe_load((tmp_path / "ca-configmap.yaml").read_text())
    assert (found["kind"], found["metadata"]["name"], found["metadata"]["namespace"]) == ("ConfigMap", "mine-ca", "gpu")
    assert found["data"] == {"ca.crt": (tmp_path / "ca.crt").read_text()}


def test_secret_files_are_private_too(tmp_path: Path) -> None:
    written = create_certificates(tmp_path, secret="tangram")

    assert {file.name for file in written} >= set(OBJECT_FILES)
    assert stat.S_IMODE((tmp_path / "client-secret.yaml").stat().st_mode) == 0o600


def test_folder_that_cannot_be_written_is_said_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(BadInput, match="cannot write certificates"):
        create_certificates(tmp_path / "file" / "below")
