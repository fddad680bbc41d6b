"""`tangram certs`: a small CA of our own, and the two certificates that the service's listeners need.

    CA ──signs──▶ server   the service, found under its Service's DNS names (and what --dns and --ip add)
       ├─signs──▶ client   kube-scheduler, the only caller that the extender verbs are for
       └─known to agents   they check the server's certificate, and show a token instead of one of their own

The service lets in whoever shows a client certificate of this CA, so the CA must sign nothing else. Keys are
EC P-256. Files are written so that only their owner can read them.
"""

import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from app.errors import BadInput

NAMESPACE = "tangram-system"
SERVICE_NAME = "tangram"
CLIENT_NAME = "tangram-scheduler-client"
SECRET_NAME = "tangram"  # noqa: S105  (a name, not a secret) becomes tangram-server-tls, tangram-client-tls, tangram-ca

CERTIFICATE_DAYS = 365
CA_DAYS = 3650  # a new CA means changing both sides at once, so it outlives many certificates
CLOCK_SKEW = timedelta(minutes=5)  # a machine whose clock is late must not find the certificate not yet valid

CA_FILES = ("ca.crt", "ca.key")
PEM_FILES = ("server.crt", "server.key", "client.crt", "client.key")
OBJECT_FILES = ("server-secret.yaml", "client-secret.yaml", "ca-configmap.yaml")


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its private key, both PEM."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class Certificates:
    """Everything that one installation needs."""

    ca: Pair
    server: Pair
    client: Pair


def create_certificates(
    out: Path,
    *,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: int = CERTIFICATE_DAYS,
    namespace: str = NAMESPACE,
    secret: str | None = None,
    force: bool = False,
) -> list[Path]:
    """Write CA, server and client certificates into `out`; with `secret`, also what to apply: two Secrets
    and the CA's ConfigMap.

    With `force` the certificates there are replaced. The CA there is used again while it outlives them, so
    that the service and kube-scheduler can be renewed one after the other. Raises BadInput in words.
    """
    files = [out / name for name in (*CA_FILES, *PEM_FILES, *(OBJECT_FILES if secret else ()))]
    there = [file.name for file in files if file.exists()]
    if there and not force:
        raise BadInput(f"{out} already has {', '.join(there)}; --force replaces them (and keeps a valid CA)")
    ca = _ca_in(out, days) if force else None
    certificates = issue(dns=dns, ips=ips, days=days, namespace=namespace, ca=ca)
    texts = {
        "ca.crt": certificates.ca.certificate,
        "ca.key": certificates.ca.key,
        "server.crt": certificates.server.certificate,
        "server.key": certificates.server.key,
        "client.crt": certificates.client.certificate,
        "client.key": certificates.client.key,
    }
    if secret:
        server, client = secrets(certificates, name=secret, namespace=namespace)
        authority = ca_config_map(certificates.ca.certificate, name=secret, namespace=namespace)
        objects = (server, client, authority)
        texts |= {file: text.encode() for file, text in zip(OBJECT_FILES, objects, strict=True)}
    try:
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, text in texts.items():
            _write_private(out / name, text)
    except OSError as error:
        raise BadInput(f"cannot write certificates to {out}: {error}") from error
    return files


def issue(
    *,
    dns: Sequence[str] = (),
    ips: Sequence[str] = (),
    days: int = CERTIFICATE_DAYS,
    namespace: str = NAMESPACE,
    ca: Pair | None = None,
) -> Certificates:
    """Make the certificates, under `ca` or under a new CA. Raises BadInput for a name that cannot be one."""
    if not 1 <= days < CA_DAYS:
        raise BadInput(f"--days must be from 1 to {CA_DAYS - 1}, not {days}")
    names = _server_names(dns, ips, namespace)
    if ca is None:
        ca = _new_ca()
    issuer = x509.load_pem_x509_certificate(ca.certificate)
    issuer_key = _load_key(ca.key)
    server = _sign(SERVICE_NAME, names, ExtendedKeyUsageOID.SERVER_AUTH, issuer, issuer_key, days)
    client = _sign(CLIENT_NAME, (), ExtendedKeyUsageOID.CLIENT_AUTH, issuer, issuer_key, days)
    return Certificates(ca, server, client)


def service_dns_names(namespace: str = NAMESPACE) -> tuple[str, ...]:
    """The names under which pods of a cluster reach the Service; the third is the one that we ship."""
    short = f"{SERVICE_NAME}.{namespace}"
    return (SERVICE_NAME, short, f"{short}.svc", f"{short}.svc.cluster.local")


def secrets(certificates: Certificates, *, name: str = SECRET_NAME, namespace: str = NAMESPACE) -> tuple[str, str]:
    """Two Secrets as YAML, one for the service and one for kube-scheduler; neither holds the CA's key."""
    ca = certificates.ca.certificate
    return (
        _secret(f"{name}-server-tls", namespace, certificates.server, ca),
        _secret(f"{name}-client-tls", namespace, certificates.client, ca),
    )


def ca_config_map(certificate: bytes, *, name: str = SECRET_NAME, namespace: str = NAMESPACE) -> str:
    """A ConfigMap as YAML: by what agents know the service. There is nothing secret in it."""
    data = {"ca.crt": certificate.decode()}
    return yaml.safe_dump(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(f"{name}-ca", namespace), "data": data},
        sort_keys=False,
    )


def _secret(name: str, namespace: str, pair: Pair, ca: bytes) -> str:
    data: Mapping[str, str] = {
        "tls.crt": pair.certificate.decode(),
        "tls.key": pair.key.decode(),
        "ca.crt": ca.decode(),
    }
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "type": "kubernetes.io/tls",
        "metadata": _metadata(name, namespace),
        "stringData": dict(data),
    }
    return yaml.safe_dump(secret, sort_keys=False)


def _metadata(name: str, namespace: str) -> dict[str, object]:
    return {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "tangram"}}


def _server_names(dns: Sequence[str], ips: Sequence[str], namespace: str) -> tuple[x509.GeneralName, ...]:
    """The Service's names, loopback (for port-forward and trials), and what was asked for."""
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((*service_dns_names(namespace), "localhost", *dns)):
        labels = name.removeprefix("*.").split(".")
        if not all(label and label.replace("-", "a").isalnum() and label.isascii() for label in labels):
            raise BadInput(f"--dns {name!r} is not a DNS name (an address goes into --ip)")
        names.append(x509.DNSName(name))
    for text in dict.fromkeys(("127.0.0.1", *ips)):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(text)))
        except ValueError:
            raise BadInput(f"--ip {text!r} is not an IP address (a name goes into --dns)") from None
    return tuple(names)


def _new_ca() -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("tangram-ca")
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(name, name, key.public_key(), key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(certificate, key)


def _sign(
    common_name: str,
    names: Sequence[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
    issuer: x509.Certificate,
    issuer_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(common_name), issuer.subject, key.public_key(), issuer_key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return _pair(builder.sign(issuer_key, hashes.SHA256()), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    return Pair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def _load_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput("ca.key is not an EC key: it is not one that `tangram certs` made")
    return key


def _ca_in(out: Path, days: int) -> Pair | None:
    """The CA whose files are in `out`, where it is whole and outlives a certificate of `days`."""
    certificate_file, key_file = (out / name for name in CA_FILES)
    if not (certificate_file.exists() and key_file.exists()):
        return None
    try:
        pair = Pair(certificate_file.read_bytes(), key_file.read_bytes())
        certificate = x509.load_pem_x509_certificate(pair.certificate)
        key = _load_key(pair.key)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BadInput(f"cannot use the CA in {out}: {error}; remove {' and '.join(CA_FILES)} for a new one") from error
    if certificate.public_key() != key.public_key():
        raise BadInput(f"ca.crt and ca.key in {out} do not belong together; remove both for a new CA")
    lasts = certificate.not_valid_after_utc >= datetime.now(UTC) + timedelta(days=days)
    return pair if lasts else None


def _write_private(path: Path, text: bytes) -> None:
    """Replace `path` in one step; at no moment can anybody else read it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
    partial.replace(path)
