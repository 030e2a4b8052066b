"""How the client knows the hub, and how the hub knows the client, where the door has TLS."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class Tls:
    """PEM files, read anew for every connection, so that a rotated certificate needs no restart.

    `ca`: the authority of the hub's certificate; None: those of the system. `certificate` and `key`: where the hub asks for them.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes() if self.ca else None,
            self.key.read_bytes() if self.key else None,
            self.certificate.read_bytes() if self.certificate else None,
        )

    @classmethod
    def named_in(cls, environment: Mapping[str, str] = os.environ) -> "Tls | None":
        """SMDIH_TLS_CA (a file, or `system` for the system's authorities), SMDIH_TLS_CERTIFICATE, SMDIH_TLS_KEY; None: no TLS."""
        ca, certificate, key = (environment.get(f"SMDIH_TLS_{name}", "") for name in ("CA", "CERTIFICATE", "KEY"))
        if not (ca or certificate):
            return None
        return cls(
            Path(ca) if ca not in ("", "system") else None,
            Path(certificate) if certificate else None,
            Path(key) if key else None,
        )


def open_channel(target: str, credentials: grpc.ChannelCredentials | Tls | None) -> grpc.aio.Channel:
    """None: without TLS, as on a developer's machine. Raises OSError."""
    if credentials is None:
        return grpc.aio.insecure_channel(target)
    if isinstance(credentials, Tls):
        credentials = credentials.credentials()
    return grpc.aio.secure_channel(target, credentials)
