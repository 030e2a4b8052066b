"""What the doors of a process have in common, wired once from the settings."""

from dataclasses import dataclass

from services.common.runtime import Runtime
from services.common.settings import Settings
from services.common.tls import BadCertificate, Files, PeerChannel, Tls


class NotForProduction(Exception):
    """A setting that is fine on a developer's machine only; the message names it."""


@dataclass(frozen=True)
class Entrance:
    """`tls`: none on a developer's machine."""

    production: bool
    tls: Tls | None

    def peer(self, target: str) -> PeerChannel:
        """Another service at host:port ("": it is not told where). Raises NotForProduction."""
        if target and self.production and (self.tls is None or not self.tls.calls):
            raise NotForProduction(
                f"SMDIH_PRODUCTION is on, and {target} would be called without TLS: set SMDIH_TLS_CA to its authority."
            )
        return PeerChannel(target, self.tls)


def open_entrance(runtime: Runtime, settings: Settings, *, takes_keys: bool) -> Entrance:
    """`takes_keys`: callers come with keys, so in production there must be TLS; a process with nothing but probes may do without.

    Raises NotForProduction, BadCertificate.
    """
    files = Files(settings.tls_certificate, settings.tls_key, settings.tls_client_ca, settings.tls_ca)
    if settings.production and takes_keys and not files.certificate:
        raise NotForProduction(
            "SMDIH_PRODUCTION is on, and keys would come in the clear: set SMDIH_TLS_CERTIFICATE and SMDIH_TLS_KEY."
        )
    if settings.grpc_internal_port and not (files.certificate and files.client_ca):
        raise BadCertificate(
            "SMDIH_GRPC_INTERNAL_PORT needs SMDIH_TLS_CERTIFICATE, SMDIH_TLS_KEY and SMDIH_TLS_CLIENT_CA."
        )
    if files == Files():
        return Entrance(settings.production, None)
    tls = Tls(files)
    runtime.background("certificates", tls.run())
    return Entrance(settings.production, tls)
