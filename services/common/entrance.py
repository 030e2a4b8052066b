"""What the doors of a process have in common, wired once from the settings."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI

from services.common import http, rpc
from services.common.audit import ChangeLog
from services.common.audit_api import change_log_router
from services.common.clock import SystemClock
from services.common.database import Pool
from services.common.directory import Directory
from services.common.gate import Gate
from services.common.limits import Limits
from services.common.logs import get_logger
from services.common.metrics import expect_faults
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.common.tls import BadCertificate, Files, PeerChannel, Tls

log = get_logger(__name__)

if TYPE_CHECKING:
    from services.common.tokens import Tokens


class NotForProduction(Exception):
    """A setting that is fine on a developer's machine only; the message names it."""


class Entrance:
    """`tls`: none on a developer's machine. `tokens`: none where people come with keys only."""

    def __init__(self, runtime: Runtime, settings: Settings, *, tls: Tls | None, tokens: "Tokens | None") -> None:
        self.tls = tls
        self._runtime = runtime
        self._production = settings.production
        self._tokens = tokens
        self._limits = _limits(settings)
        self._http = settings.http_host, settings.http_port
        self._probe_port = settings.probe_port
        self._grpc = settings.grpc_host, settings.grpc_port
        self._grpc_internal_port = settings.grpc_internal_port

    def peer(self, target: str) -> PeerChannel:
        """Another service at host:port ("": it is not told where). Raises NotForProduction."""
        if target and self._production and (self.tls is None or not self.tls.calls):
            raise NotForProduction(
                f"SMDIH_PRODUCTION is on, and {target} would be called without TLS: set SMDIH_TLS_CA to its authority."
            )
        return PeerChannel(target, self.tls)

    async def serve(
        self,
        title: str,
        *,
        directory: Directory,
        pool: Pool,
        servicers: Sequence[rpc.Registered],
        routers: Sequence[APIRouter],
        open_routers: Sequence[APIRouter] = (),
        open_methods: Sequence[str] = (),
        internal_calls: Mapping[str, Collection[str]] = MappingProxyType({}),
        apart: Collection[str] = (),
        on_malformed: rpc.OnMalformed | None = None,
        on_too_large: http.OnTooLarge | None = None,
    ) -> None:
        """Answer by gRPC and HTTP until the process stops: behind one gate, and what people change is noted in the pool's schema.

        `apart`: routes and methods of telemetry, which are not noted. The others: see rpc.serve and http.application.
        """
        gate = Gate(directory, tokens=self._tokens, limits=self._limits)
        expect_faults(apart)
        changes = ChangeLog(pool, clock=SystemClock(), apart=apart)
        self._runtime.on_stop(changes.close)
        self._runtime.background("change log", changes.run())
        host, port = self._grpc
        by_grpc = rpc.serve(
            host=host,
            port=port,
            directory=directory,
            register=servicers,
            on_malformed=on_malformed,
            open_methods=open_methods,
            tls=self.tls,
            internal_port=self._grpc_internal_port,
            internal_calls=internal_calls,
            gate=gate,
            changes=changes,
        )
        await self._runtime.enter(by_grpc)
        app = http.application(
            title,
            runtime=self._runtime,
            directory=directory,
            routers=[*routers, change_log_router(changes)],
            open_routers=open_routers,
            on_too_large=on_too_large,
            gate=gate,
            changes=changes,
            has_probes=not self._probe_port,
        )
        if self._probe_port:
            await self.serve_probes(title)
        await self._answer(app)

    async def serve_probes(self, title: str) -> None:
        """Whether the process lives, is ready, and its metrics; all that one has to say that nobody calls."""
        app = http.application(title, runtime=self._runtime, directory=None)
        if not self._probe_port:
            await self._answer(app)
            return
        # In the clear: the orchestrator knows no certificate of ours, and the port is for inside.
        await self._runtime.enter(http.serve(app, host=self._http[0], port=self._probe_port))

    async def _answer(self, app: FastAPI) -> None:
        host, port = self._http
        await self._runtime.enter(http.serve(app, host=host, port=port, tls=self.tls))


def open_entrance(runtime: Runtime, settings: Settings, *, takes_keys: bool) -> Entrance:
    """`takes_keys`: callers come with keys, so in production there must be TLS; a process with nothing but probes may do without.

    Raises NotForProduction, BadCertificate.
    """
    files = Files(settings.tls_certificate, settings.tls_key, settings.tls_client_ca, settings.tls_ca)
    if settings.production and takes_keys and not files.certificate:
        raise NotForProduction(
            "SMDIH_PRODUCTION is on, and keys would come in the clear: set SMDIH_TLS_CERTIFICATE and SMDIH_TLS_KEY."
        )
    if settings.production:
        _tell_what_is_in_the_clear(settings)
    if settings.production and takes_keys and not settings.probe_port:
        raise NotForProduction(
            "SMDIH_PRODUCTION is on, and whoever comes could read /metrics: set SMDIH_PROBE_PORT to a port that only the "
            "orchestrator and Prometheus reach."
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
    return Entrance(runtime, settings, tls=tls, tokens=tokens)


def _tell_what_is_in_the_clear(settings: Settings) -> None:
    """Not refused: inside a cluster the network's policies may be what guards these ways (docs/threat-model.md)."""
    if not settings.kafka_security_protocol.endswith("SSL"):
        log.warning("Kafka is reached without TLS", setting="SMDIH_KAFKA_SECURITY_PROTOCOL")
    if settings.database_in_the_clear:
        log.warning("the database may be reached without TLS", setting="SMDIH_DATABASE_IN_THE_CLEAR")


def _tokens(settings: Settings) -> "Tokens":
    if not (settings.oidc_audience and settings.oidc_keys):
        raise NotForProduction("SMDIH_OIDC_ISSUER needs SMDIH_OIDC_AUDIENCE and SMDIH_OIDC_KEYS.")
    if settings.production and settings.oidc_keys.startswith("http://"):
        raise NotForProduction("SMDIH_PRODUCTION is on, and SMDIH_OIDC_KEYS would be read without TLS: use https.")
    # Loads an HTTP client and cryptography, which a hub without tokens does without.
    from services.common.tokens import Issuer, Tokens

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
