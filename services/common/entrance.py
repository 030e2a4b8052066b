"""What the doors of a process have in common, wired once from the settings."""

from collections.abc import Collection
from dataclasses import dataclass

from services.common.audit import ChangeLog
from services.common.clock import SystemClock
from services.common.database import Pool
from services.common.directory import Directory
from services.common.gate import Gate
from services.common.limits import Limits
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.common.tls import BadCertificate, Files, PeerChannel, Tls
from services.common.tokens import Issuer, Tokens


class NotForProduction(Exception):
    """A setting that is fine on a developer's machine only; the message names it."""


@dataclass(frozen=True)
class Entrance:
    """`tls`: none on a developer's machine. `tokens`: none where people come with keys only."""

    runtime: Runtime
    production: bool
    tls: Tls | None
    tokens: Tokens | None
    limits: Limits

    def changes(self, pool: Pool, *, apart: Collection[str] = ()) -> ChangeLog:
        """Where what people change is noted; started and stopped with the process."""
        made = ChangeLog(pool, clock=SystemClock(), apart=apart)
        self.runtime.on_stop(made.close)
        self.runtime.background("change log", made.run())
        return made

    def gate(self, directory: Directory) -> Gate:
        """One for all doors of the process."""
        return Gate(directory, tokens=self.tokens, limits=self.limits)

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
    tls = Tls(files) if files != Files() else None
    if tls is not None:
        runtime.background("certificates", tls.run())
    tokens = _tokens(settings) if settings.oidc_issuer and takes_keys else None
    if tokens is not None:
        runtime.background("token keys", tokens.run())
    return Entrance(runtime, settings.production, tls, tokens, _limits(settings))


def _tokens(settings: Settings) -> Tokens:
    if not (settings.oidc_audience and settings.oidc_keys):
        raise NotForProduction("SMDIH_OIDC_ISSUER needs SMDIH_OIDC_AUDIENCE and SMDIH_OIDC_KEYS.")
    if settings.production and settings.oidc_keys.startswith("http://"):
        raise NotForProduction("SMDIH_PRODUCTION is on, and SMDIH_OIDC_KEYS would be read without TLS: use https.")
    return Tokens(
        Issuer(
            settings.oidc_issuer,
            settings.oidc_audience,
            settings.oidc_keys,
            settings.oidc_role_claim,
            settings.oidc_firm_claim,
            settings.oidc_partner_claim,
            settings.oidc_provider_claim,
        ),
        clock=SystemClock(),
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        settings.limit_requests_per_s,
        settings.limit_operator_requests_per_s,
        settings.limit_burst_s,
        settings.limit_streams,
        settings.limit_failures_per_minute,
    )
