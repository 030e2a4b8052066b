"""Settings from the environment: SMDIH_<SECTION>_<FIELD>. Read once, in a service's main."""

from typing import Literal, Self
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from pydantic import AliasChoices, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class DatabaseSettings(BaseSettings):
    """How whatever comes to the database gets there; `database_dsn` is then as it is to be used."""

    # Messages about settings that do not fit together show none of them: some are secrets.
    model_config = SettingsConfigDict(env_prefix="SMDIH_", extra="ignore", hide_input_in_errors=True)

    production: bool = Field(False, description="refuse to start with what is fine on a developer's machine only")
    database_dsn: str = Field(repr=False)
    database_ca_file: str = Field(
        "",
        description="the database's certificate authority (PEM); only a server that it vouches for by name is then used",
    )
    database_in_the_clear: bool = Field(
        False, description="production goes without TLS to the database, on a network that guards the way by itself"
    )

    @model_validator(mode="after")
    def _database_is_guarded(self) -> Self:
        if self.database_ca_file:
            self.database_dsn = _verified(self.database_dsn, self.database_ca_file)
        is_verified = dict(parse_qsl(urlsplit(self.database_dsn).query)).get("sslmode") == "verify-full"
        if self.production and not is_verified and not self.database_in_the_clear:
            raise ValueError(
                "SMDIH_PRODUCTION is on, and the database could be another one, or be reached in the clear: set "
                "SMDIH_DATABASE_CA_FILE to the file of its authority (or sslmode=verify-full in SMDIH_DATABASE_DSN). Where the "
                "network alone is to guard the way, say so by SMDIH_DATABASE_IN_THE_CLEAR=true."
            )
        return self


def _verified(dsn: str, ca_file: str) -> str:
    at = urlsplit(dsn)
    kept = [(name, value) for name, value in parse_qsl(at.query) if name not in ("sslmode", "sslrootcert")]
    query = urlencode([*kept, ("sslmode", "verify-full"), ("sslrootcert", ca_file)], safe="/", quote_via=quote)
    return urlunsplit(at._replace(query=query))


class Settings(DatabaseSettings):
    """What every process needs; a service adds its own fields."""

    kafka_bootstrap: str = Field(description="host:port of a broker")
    # Lets several hubs (or tests) share one cluster.
    kafka_topic_prefix: str = ""
    kafka_partitions: int = Field(
        4, ge=1, le=1024, description="partitions of smdih.ingest.samples.v1 when it is created"
    )
    kafka_replication: int = Field(1, ge=1, le=7)
    # As whom a process comes to the brokers; what it may do there is in services/common/access.py.
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["SCRAM-SHA-512", "SCRAM-SHA-256"] = "SCRAM-SHA-512"
    kafka_username: str = ""
    kafka_password: str = Field("", repr=False)
    kafka_ca_file: str = Field("", description="the brokers' certificate authority (PEM); the system's without it")
    kafka_certificate_file: str = Field("", description="PEM; for brokers that ask for a certificate")
    kafka_key_file: str = Field("", description="the private key of kafka_certificate_file (PEM)")
    database_pool_max: int = Field(8, ge=1, le=100)
    database_disk_bytes: int = Field(
        0, ge=0, description="size of the disk (or share of it) that the database may fill; 0: not known"
    )
    http_host: str = "127.0.0.1"
    http_port: int = Field(0, ge=0, le=65535)
    probe_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="/livez, /readyz and /metrics, for orchestrator and Prometheus, in the clear; 0: at the HTTP port",
    )
    grpc_host: str = "127.0.0.1"
    grpc_port: int = Field(0, ge=0, le=65535)
    grpc_internal_port: int = Field(
        0, ge=0, le=65535, description="gRPC for the hub's own services, with client certificates; 0: none"
    )
    tls_certificate: str = Field("", description="PEM file: certificate of this process with its chain")
    tls_key: str = Field("", description="PEM file: its key")
    tls_client_ca: str = Field("", description="PEM file: authority of the clients; they then need a certificate")
    tls_ca: str = Field("", description="PEM file: authority of the services that this one calls")
    oidc_issuer: str = Field("", description="whose tokens are taken (claim iss); none without it")
    oidc_audience: str = Field("", description="what the tokens have to be for (claim aud)")
    oidc_keys: str = Field("", description="https address or file of the issuer's JSON Web Key Set")
    oidc_role_claim: str = "smdih_role"
    oidc_firm_claim: str = "smdih_firm_id"
    oidc_partner_claim: str = "smdih_partner_id"
    oidc_provider_claim: str = "smdih_provider_id"
    limit_requests_per_s: float = Field(100, gt=0, description="of one key or person")
    limit_operator_requests_per_s: float = Field(1_000, gt=0, description="of one operator")
    limit_burst_s: float = Field(20, ge=1, description="seconds' worth of requests that may come at once")
    limit_streams: int = Field(200, ge=1, description="streams and requests of one key at a time")
    limit_failures_per_minute: float = Field(60, gt=0, description="requests without a good key, of one address")
    evidence_key: str = Field(
        "", repr=False, description="base64 of the private Ed25519 key that the ingest door signs evidence with"
    )
    drain_s: float = Field(
        0,
        ge=0,
        le=300,
        description="how long a process that is told to stop still answers; more behind a load balancer",
    )
    log_level: str = "INFO"
    trace_endpoint: str = Field(
        "",
        validation_alias=AliasChoices("SMDIH_TRACE_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
        description="http(s)://host:port of an OTLP receiver (gRPC) for traces; without it there are none",
    )
    trace_ratio: float = Field(0.1, ge=0, le=1, description="share of the traces that are kept")

    @model_validator(mode="after")
    def _kafka_identity_is_whole(self) -> Self:
        if self.kafka_security_protocol.startswith("SASL") and not (self.kafka_username and self.kafka_password):
            raise ValueError(
                f"SMDIH_KAFKA_SECURITY_PROTOCOL={self.kafka_security_protocol} needs SMDIH_KAFKA_USERNAME and SMDIH_KAFKA_PASSWORD"
            )
        if bool(self.kafka_certificate_file) != bool(self.kafka_key_file):
            raise ValueError("SMDIH_KAFKA_CERTIFICATE_FILE and SMDIH_KAFKA_KEY_FILE come together")
        return self
