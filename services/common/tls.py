"""Certificates of this process, and the authorities of whom it calls and who calls it; files may be replaced while it runs.

A rotated certificate serves new connections from the next look on (RELOAD_INTERVAL_S); connections that stand go on with theirs.
Files that do not fit together, as half way through a rotation, are left alone until they do.
"""

import asyncio
import os
import ssl
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from prometheus_client import Counter, Gauge

from services.common.errors import Forbidden
from services.common.logs import get_logger

log = get_logger(__name__)

RELOAD_INTERVAL_S = 5.0
# Calls on the channel of the certificate before may take so long to end.
OLD_CHANNEL_GRACE_S = 60.0

# When the first certificate of a chain ends, and when the last of a bundle of authorities does (seconds since 1970).
expires = Gauge("smdih_tls_certificate_expires_timestamp_seconds", "When the certificate ends", ["file"])
# Files taken in anew, and looks at which they did not fit together.
reloads_total = Counter("smdih_tls_reloads_total", "Certificates taken in anew", ["outcome"])
for _outcome in ("taken", "refused"):
    reloads_total.labels(_outcome)


class BadCertificate(Exception):
    """The files do not make a certificate to serve with; the message says which and why."""


@dataclass(frozen=True)
class Files:
    """Paths, as a mounted secret has them; "": none. Certificates are PEM, the process's own with its chain."""

    certificate: str = ""
    key: str = ""
    # Authority of who calls: where it is given a client certificate is asked for.
    client_ca: str = ""
    # Authority of the services that this one calls.
    ca: str = ""


@dataclass(frozen=True)
class _Loaded:
    certificate: bytes
    key: bytes
    client_ca: bytes
    ca: bytes


class Tls:
    """What the files say now. Raises BadCertificate when they cannot be used at the start."""

    def __init__(self, files: Files) -> None:
        if bool(files.certificate) != bool(files.key):
            raise BadCertificate("SMDIH_TLS_CERTIFICATE and SMDIH_TLS_KEY go together; one of them is not set.")
        self._files = files
        self._stamps = self._stat()
        self._loaded = self._read()
        self._contexts: list[ssl.SSLContext] = []
        self.version = 1
        self._tell_expiry()

    @property
    def serves(self) -> bool:
        """There is a certificate to serve with."""
        return bool(self._loaded.certificate)

    @property
    def asks_clients(self) -> bool:
        """There is an authority of clients, so a server may ask for their certificates."""
        return bool(self._loaded.client_ca)

    @property
    def calls(self) -> bool:
        """There is an authority to know the other services by."""
        return bool(self._loaded.ca)

    async def run(self) -> None:
        """Look for new files until cancelled."""
        while True:
            await asyncio.sleep(RELOAD_INTERVAL_S)
            self.reload()

    def reload(self) -> bool:
        """Take in files that changed; False where none did or where they do not fit together."""
        try:
            stamps = self._stat()
            if stamps == self._stamps:
                return False
            loaded = self._read()
        except (BadCertificate, OSError) as error:
            reloads_total.labels("refused").inc()
            log.warning("certificates not taken in", error=str(error))
            return False
        self._stamps = stamps
        if loaded == self._loaded:
            return False
        self._loaded = loaded
        self.version += 1
        for context in self._contexts:
            _load_into(context, loaded)
        self._tell_expiry()
        reloads_total.labels("taken").inc()
        log.info("certificates taken in", version=self.version)
        return True

    def server_credentials(self, *, mutual: bool) -> grpc.ServerCredentials:
        """For a gRPC port; each handshake gets what is loaded then. `mutual`: it asks for a certificate of `client_ca`."""
        told = 0

        def configuration() -> grpc.ServerCertificateConfiguration:
            nonlocal told
            told = self.version
            loaded = self._loaded
            return grpc.ssl_server_certificate_configuration(
                [(loaded.key, loaded.certificate)], loaded.client_ca if mutual else None
            )

        # Called on every new connection, so it only looks into memory. None is "no change", which its stubs do not know.
        fetch: Any = lambda: None if told == self.version else configuration()  # noqa: E731
        return grpc.dynamic_ssl_server_credentials(configuration(), fetch, mutual)

    def server_context(self) -> ssl.SSLContext:
        """For an HTTP port; it goes on changing with the files."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        _load_into(context, self._loaded)
        self._contexts.append(context)
        return context

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """To call another service: known by `ca`, and shown this process's certificate."""
        loaded = self._loaded
        return grpc.ssl_channel_credentials(loaded.ca, loaded.key or None, loaded.certificate or None)

    def _stat(self) -> tuple[tuple[int, int, int], ...]:
        paths = (self._files.certificate, self._files.key, self._files.client_ca, self._files.ca)
        found = [os.stat(path) for path in paths if path]
        return tuple((one.st_mtime_ns, one.st_ino, one.st_size) for one in found)

    def _read(self) -> _Loaded:
        files = self._files
        try:
            loaded = _Loaded(*(_bytes(path) for path in (files.certificate, files.key, files.client_ca, files.ca)))
        except OSError as error:
            raise BadCertificate(f"{error.filename} cannot be read: {error.strerror}") from error
        if loaded.certificate:
            (leaf, *_), key = _certificates(loaded.certificate, files.certificate), _private_key(loaded.key, files.key)
            if _public(leaf.public_key()) != _public(key.public_key()):
                raise BadCertificate(f"{files.key} is not the key of {files.certificate}.")
            try:
                _load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), loaded)
            except ssl.SSLError as error:  # as for a key that is too short
                raise BadCertificate(f"{files.certificate} cannot be served with: {error}") from error
        for data, path in ((loaded.client_ca, files.client_ca), (loaded.ca, files.ca)):
            if path:
                _certificates(data, path)
        return loaded

    def _tell_expiry(self) -> None:
        for name, data, of in (
            ("certificate", self._loaded.certificate, min),
            ("client_ca", self._loaded.client_ca, max),
            ("ca", self._loaded.ca, max),
        ):
            if data:
                ends = [one.not_valid_after_utc for one in _certificates(data, name)]
                expires.labels(name).set(of(ends).timestamp())
                if of(ends) <= datetime.now(UTC):
                    log.error("certificate has ended", file=name, ended=of(ends).isoformat())


class PeerChannel:
    """A channel to another service, made anew when the certificates change; plain where there is no authority to know it by."""

    def __init__(self, target: str, tls: Tls | None = None) -> None:
        self.target = target
        self._tls = tls if tls is not None and tls.calls else None
        self._channel: grpc.aio.Channel | None = None
        self._version = 0
        self._closing: set[asyncio.Task[None]] = set()

    def channel(self) -> grpc.aio.Channel:
        """For the next call."""
        version = self._tls.version if self._tls is not None else 0
        if self._channel is not None and version != self._version:
            task = asyncio.create_task(self._channel.close(OLD_CHANNEL_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._channel = None
        if self._channel is None:
            self._version = version
            if self._tls is None:
                self._channel = grpc.aio.insecure_channel(self.target)
            else:
                self._channel = grpc.aio.secure_channel(self.target, self._tls.channel_credentials())
        return self._channel

    async def close(self) -> None:
        for task in self._closing:
            task.cancel()
        if self._channel is not None:
            await self._channel.close()


def peer_names(auth_context: Mapping[str, Iterable[bytes]]) -> frozenset[str]:
    """The names in the certificate that a caller has shown: its alternative names, or where it has none its common name."""
    names = auth_context.get("x509_subject_alternative_name") or auth_context.get("x509_common_name") or ()
    return frozenset(name.decode(errors="replace") for name in names)


class Peers:
    """Which service of the hub may call what here.

    A service is known by the name `funding` or `spiffe://smdih/funding` in its certificate. It may call nothing else, so that its
    certificate is of no more use to a thief than it is to the service.
    """

    def __init__(self, calls: Mapping[str, Collection[str]], *, services_only: bool) -> None:
        """`calls`: service -> methods ("/package.Service/Method"). `services_only`: a certificate of nobody known is refused."""
        self._calls = {name: frozenset(methods) for name, methods in calls.items()}
        self._services_only = services_only

    def check(self, names: Collection[str], method: str) -> None:
        """Raise Forbidden unless who has shown a certificate with these names may call the method."""
        services = {name.removeprefix("spiffe://smdih/") for name in names}.intersection(HUB_SERVICES)
        if not services:
            if self._services_only:
                raise Forbidden("This port is for the hub's own services.", reason="PEER_UNKNOWN")
            return
        if not any(method in self._calls.get(service, ()) for service in services):
            raise Forbidden(
                f"The service {' and '.join(sorted(services))} does not call this.", reason="PEER_NOT_ALLOWED"
            )


# Names that only the hub's own services have in their certificates.
HUB_SERVICES = frozenset({"ingest", "anomaly", "matching", "funding"})


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes() if path else b""


def _certificates(data: bytes, path: str) -> list[x509.Certificate]:
    try:
        found = x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise BadCertificate(f"{path} holds no PEM certificate: {error}") from error
    if not found:
        raise BadCertificate(f"{path} holds no certificate.")
    return found


def _private_key(data: bytes, path: str) -> Any:
    try:
        return load_pem_private_key(data, None)
    except (ValueError, TypeError) as error:  # TypeError: it wants a password
        raise BadCertificate(f"{path} holds no PEM key without a password: {error}") from error


def _public(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _load_into(context: ssl.SSLContext, loaded: _Loaded) -> None:
    # Exactly the bytes that were checked: the files may be others by now, and a context that took half of a pair serves nobody.
    with _as_file(loaded.certificate) as certificate, _as_file(loaded.key) as key:
        context.load_cert_chain(certificate, key)


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """In memory: a key does not touch the disk, and the root file system may be read-only."""
    number = os.memfd_create("smdih-tls")
    try:
        os.write(number, data)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)
