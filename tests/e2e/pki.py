"""A certificate authority for one test cluster. No decisions: who gets a certificate is cluster.py's part."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=30)  # longer than any `make cluster` stays up


class Authority:
    """Signs server certificates for loopback and client certificates that say who a Kubernetes user is."""

    def __init__(self, directory: Path) -> None:
        self.certificate_file = directory / "ca.crt"
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("tangram-test-ca")
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate_file.write_bytes(_pem(certificate))

    def server(self, name: str) -> tuple[Path, Path]:
        """Certificate and key files of a server on loopback."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [
            x509.DNSName("localhost"),
            x509.DNSName("kubernetes.default.svc"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        ]
        builder = self._builder(_name(name), key).add_extension(x509.SubjectAlternativeName(names), critical=False)
        return self._sign(name, builder, key, ExtendedKeyUsageOID.SERVER_AUTH)

    def client(self, user: str, groups: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Certificate and key files with which kube-apiserver sees `user`, a member of `groups`."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = self._builder(_name(user, groups), key)
        file_name = "client-" + user.replace(":", "-").replace("/", "-")
        return self._sign(file_name, builder, key, ExtendedKeyUsageOID.CLIENT_AUTH)

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + LIFETIME)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )

    def _sign(
        self,
        file_name: str,
        builder: x509.CertificateBuilder,
        key: ec.EllipticCurvePrivateKey,
        purpose: x509.ObjectIdentifier,
    ) -> tuple[Path, Path]:
        certificate = (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        certificate_file = self._directory / f"{file_name}.crt"
        certificate_file.write_bytes(_pem(certificate))
        return certificate_file, write_key(self._directory / f"{file_name}.key", key)


def signing_key_pair(directory: Path) -> tuple[Path, Path]:
    """Public and private key files for service-account tokens."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = directory / "service-account.pub"
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public, write_key(directory / "service-account.key", key)


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    """Write `key` where only this user can read it."""
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def _name(common_name: str, organizations: tuple[str, ...] = ()) -> x509.Name:
    parts = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in organizations]
    return x509.Name([*parts, x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
