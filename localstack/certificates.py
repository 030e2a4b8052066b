"""A certificate authority for local servers and tests, which writes files as a mounted secret has them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Pair:
    """Paths of a certificate and its key."""

    certificate: Path
    key: Path

    def replace_by(self, other: "Pair") -> None:
        """As a rotation does: each file at once, one after the other."""
        other.certificate.replace(self.certificate)
        other.key.replace(self.key)


class Authority:
    def __init__(self, folder: Path, name: str = "authority") -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        self.ends = now + timedelta(days=30)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name)
            .issuer_name(self._name)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(self.ends)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def issue(
        self,
        names: Sequence[str],
        *,
        uris: Sequence[str] = (),
        addresses: Sequence[str] = (),
        valid: timedelta = timedelta(days=1),
    ) -> Pair:
        """A certificate for these names and addresses, also for this machine; `valid` may be negative."""
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        alternatives = [
            *map(x509.DNSName, names),
            *map(x509.UniformResourceIdentifier, uris),
            *(x509.IPAddress(ip_address(address)) for address in dict.fromkeys((*addresses, "127.0.0.1"))),
        ]
        number = next(_numbers)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"number-{number}")]))
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(number)
            .not_valid_before(now - timedelta(days=2))
            .not_valid_after(now + valid)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        pair = Pair(self._folder / f"{number}.crt", self._folder / f"{number}.key")
        pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
        pair.key.touch(mode=0o600)
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair
