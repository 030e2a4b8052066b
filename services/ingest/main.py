"""The processes of ingest: `python -m services.ingest.main door|historian|mqtt`, and `... operator-key` to make the first key."""

import asyncio
import functools
import sys

from pydantic import Field

from services.common import logs, topics, tracing
from services.common.audit_api import change_log_router
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool, transaction
from services.common.directory import Directory
from services.common.entrance import NotForProduction, open_entrance
from services.common.evidence import Signer
from services.common.http import application
from services.common.http import serve as serve_http
from services.common.identity import Role
from services.common.kafka import Cluster, PositionedConsumer, Publisher, TopicEnds
from services.common.metrics import keep_measuring, name_process
from services.common.outbox import OutboxRelay
from services.common.rpc import serve as serve_rpc
from services.common.runtime import Runtime, run
from services.common.settings import Settings
from services.ingest.diagnosis.api import diagnosis_router
from services.ingest.diagnosis.diagnosis import Diagnoses, Partitions
from services.ingest.diagnosis.rpc import DiagnosisServicer
from services.ingest.diagnosis.sightings import Sightings, SightingsWriter
from services.ingest.historian.historian import MEASURE_INTERVAL_S, Historian, StoredGauges
from services.ingest.kpi.api import kpi_router
from services.ingest.kpi.rpc import KpiServicer
from services.ingest.kpi.service import KpiService
from services.ingest.mqtt.bridge import Births, Bridge, Host, Share
from services.ingest.mqtt.link import Broker
from services.ingest.proposals.api import proposal_router
from services.ingest.proposals.rpc import ProposalServicer
from services.ingest.proposals.service import Proposals
from services.ingest.queries.access import Access
from services.ingest.queries.api import query_router
from services.ingest.queries.export import Export
from services.ingest.queries.queries import Queries
from services.ingest.queries.rooms import RoomReads, Rooms
from services.ingest.queries.rooms_api import rooms_router
from services.ingest.queries.rooms_rpc import RoomReadServicer
from services.ingest.queries.rpc import QueryServicer
from services.ingest.queries.series_api import series_router
from services.ingest.queries.series_rpc import SeriesServicer
from services.ingest.queries.turns import Turns
from services.ingest.registry import credential_store
from services.ingest.registry.api import registry_router
from services.ingest.registry.audit import Audit
from services.ingest.registry.audit_api import audit_router
from services.ingest.registry.claim_api import claim_code_router, claim_router
from services.ingest.registry.claim_rpc import OPEN_METHODS, ClaimServicer
from services.ingest.registry.claims import Claims
from services.ingest.registry.credential_api import credential_router
from services.ingest.registry.credentials import Credentials, make_credential
from services.ingest.registry.import_api import import_router
from services.ingest.registry.imports import Imports
from services.ingest.registry.quota_api import quota_router
from services.ingest.registry.quota_rpc import QuotaServicer
from services.ingest.registry.quotas import Quotas
from services.ingest.registry.registry import Registry
from services.ingest.registry.rpc import RegistryServicer
from services.ingest.retention.api import retention_router
from services.ingest.retention.service import MEASURE_INTERVAL_S as STORAGE_INTERVAL_S
from services.ingest.retention.service import Enforcer, Retention
from services.ingest.telemetry import api
from services.ingest.telemetry.buckets import Buckets, BucketsSharer
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.groupcommit import GroupCommit
from services.ingest.telemetry.quarantine import Quarantine
from services.ingest.telemetry.quarantine_api import quarantine_router
from services.ingest.telemetry.rpc import TelemetryServicer
from smdih.ingest.v1 import (
    claim_pb2_grpc,
    diagnosis_pb2_grpc,
    kpi_pb2_grpc,
    proposal_pb2_grpc,
    query_pb2_grpc,
    quota_pb2_grpc,
    registry_pb2_grpc,
    rooms_pb2_grpc,
    series_pb2_grpc,
    telemetry_pb2_grpc,
)

SCHEMA = "ingest"
# What other services call here, by the name in their certificate.
INTERNAL_CALLS = {"anomaly": ("/smdih.ingest.v1.QueryService/History",)}
# Goes into the message log, not into the change log.
TELEMETRY = (
    *("POST /v1/telemetry", "POST /api/v2/write", "POST /write"),
    "/smdih.ingest.v1.TelemetryService/SendBatches",
)
USAGE = "usage: python -m services.ingest.main door|historian|mqtt|operator-key"

HISTORIANS = 2
HISTORIAN_RECORDS_MAX = 500
# A partition's share of a poll. Small polls let fetching and storing overlap and stay in the processor's caches: from a full
# topic 2 MiB stored 3.7-4.0 million samples a second, 8 MiB 2.2-2.8 million, 0.5 MiB 1.8-3.0 million.
HISTORIAN_POLL_BYTES_MAX = 2 * 1024 * 1024


async def start_door(runtime: Runtime, settings: Settings) -> None:
    """Telemetry, registry and queries, by gRPC and HTTP."""
    entrance = open_entrance(runtime, settings, takes_keys=True)
    clock = SystemClock()
    cluster = Cluster.of(settings)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    sightings = Sightings(clock)
    writer = SightingsWriter(pool, sightings, clock)
    runtime.on_stop(writer.close)
    runtime.background("sightings", writer.run())
    directory = Directory(cluster, clock=clock, kinds=("firm", "site", "machine", "partner"), key_watch=sightings)
    runtime.background("directory", directory.run())
    gate, change_log = entrance.gate(directory), entrance.changes(pool, apart=TELEMETRY)
    relay = OutboxRelay(pool, publisher, schema=SCHEMA)
    runtime.background("outbox", relay.run())
    partitions = await publisher.partitions(topics.SAMPLES)
    group_commit = GroupCommit(publisher, partitions=partitions)
    runtime.on_stop(group_commit.close)
    ends = TopicEnds(cluster)
    runtime.on_stop(ends.close)
    buckets = Buckets(directory)
    runtime.background("quotas", BucketsSharer(pool, buckets, clock).run())
    door = Door(directory, group_commit, clock, sightings, buckets)
    samples = Partitions(cluster.name(topics.SAMPLES), partitions)
    quotas = Quotas(pool, relay, clock)
    claims = Claims(pool, relay, directory, clock)
    runtime.background("claim codes", claims.run())
    diagnoses = Diagnoses(pool, directory, clock, writer, ends=ends, partitions=samples)
    registry = Registry(pool, relay, directory, clock)
    credentials = Credentials(pool, relay, directory, clock, writer)
    rooms = Rooms(cluster, clock=clock)
    runtime.background("rooms", rooms.run())
    # Of its own: a query holds a connection of the other pool while its read is noted.
    log_pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=1)
    runtime.on_stop(log_pool.close)
    room_reads = RoomReads(log_pool, rooms, clock=clock)
    runtime.on_stop(room_reads.flush)
    runtime.background("room reads", room_reads.run())
    access, turns = Access(rooms.grants, note=room_reads.note), Turns()
    queries, export = Queries(pool, directory, access, turns), Export(pool, directory, access)
    signer = Signer(settings.evidence_key) if settings.evidence_key else None
    kpi = KpiService(pool, directory, clock, turns, signer)
    retention = Retention(pool, clock, disk_bytes=settings.database_disk_bytes)
    quarantine = Quarantine(pool, directory, door, ends)
    proposals = Proposals(pool, relay, clock, writer, registry, quarantine)
    await runtime.enter(
        serve_rpc(
            host=settings.grpc_host,
            port=settings.grpc_port,
            directory=directory,
            tls=entrance.tls,
            gate=gate,
            changes=change_log,
            internal_port=settings.grpc_internal_port,
            internal_calls=INTERNAL_CALLS,
            register=[
                (telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server, TelemetryServicer(door)),
                (registry_pb2_grpc.add_RegistryServiceServicer_to_server, RegistryServicer(registry, credentials)),
                (query_pb2_grpc.add_QueryServiceServicer_to_server, QueryServicer(queries, quarantine)),
                (proposal_pb2_grpc.add_ProposalServiceServicer_to_server, ProposalServicer(proposals, quarantine)),
                (claim_pb2_grpc.add_ClaimServiceServicer_to_server, ClaimServicer(claims)),
                (quota_pb2_grpc.add_QuotaServiceServicer_to_server, QuotaServicer(quotas)),
                (diagnosis_pb2_grpc.add_DiagnosisServiceServicer_to_server, DiagnosisServicer(diagnoses)),
                (series_pb2_grpc.add_SeriesServiceServicer_to_server, SeriesServicer(queries, export)),
                (kpi_pb2_grpc.add_KpiServiceServicer_to_server, KpiServicer(kpi)),
                (rooms_pb2_grpc.add_RoomReadServiceServicer_to_server, RoomReadServicer(room_reads)),
            ],
            service_names=[
                "smdih.ingest.v1.TelemetryService",
                "smdih.ingest.v1.RegistryService",
                "smdih.ingest.v1.QueryService",
                "smdih.ingest.v1.DiagnosisService",
                "smdih.ingest.v1.QuotaService",
                "smdih.ingest.v1.ClaimService",
                "smdih.ingest.v1.ProposalService",
                "smdih.ingest.v1.SeriesService",
                "smdih.ingest.v1.KpiService",
                "smdih.ingest.v1.RoomReadService",
            ],
            on_malformed=door.note_malformed,
            open_methods=OPEN_METHODS,
        )
    )
    app = application(
        "SMDIH ingest",
        runtime=runtime,
        directory=directory,
        gate=gate,
        changes=change_log,
        routers=[
            api.telemetry_router(door),
            api.lines_router(door),
            registry_router(registry),
            credential_router(credentials),
            query_router(queries),
            series_router(queries, export),
            kpi_router(kpi),
            retention_router(retention),
            quarantine_router(quarantine),
            diagnosis_router(diagnoses),
            quota_router(quotas),
            claim_code_router(claims),
            audit_router(Audit(pool)),
            change_log_router(change_log),
            rooms_router(room_reads),
            import_router(Imports(pool, relay, directory, clock)),
            proposal_router(proposals),
        ],
        open_routers=[claim_router(claims)],
        on_too_large=functools.partial(api.note_too_large, door=door),
    )
    await runtime.enter(serve_http(app, host=settings.http_host, port=settings.http_port, tls=entrance.tls))
    # Not the database: telemetry is taken while it is away, and what needs it says so itself.
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("directory", directory.is_caught_up)


async def start_historian(runtime: Runtime, settings: Settings) -> None:
    """From the message log into the database."""
    cluster = Cluster.of(settings)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    # Each with partitions, memory and a connection of its own: while the database copies for one, the other makes ready.
    clock = SystemClock()
    historians = [Historian(clock) for _ in range(HISTORIANS)]
    samples = [
        PositionedConsumer(
            cluster,
            pool,
            publisher,
            topic_names=[topics.SAMPLES],
            group="smdih.ingest.historian",
            handler=historian.store,
            records_max=HISTORIAN_RECORDS_MAX,
            poll_bytes_max=HISTORIAN_POLL_BYTES_MAX,
            on_change=historian.forget,
        )
        for historian in historians
    ]
    set_aside = Historian(clock)
    quarantine = PositionedConsumer(
        cluster,
        pool,
        publisher,
        topic_names=[topics.QUARANTINE],
        group="smdih.ingest.quarantine",
        handler=set_aside.store_quarantine,
        on_change=set_aside.forget,
    )
    app = application("SMDIH historian", runtime=runtime, directory=None)
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await runtime.enter(serve_http(app, host=settings.http_host, port=settings.http_port, tls=entrance.tls))
    gauges = StoredGauges(historians, pool, clock)
    runtime.background("gauges", keep_measuring(gauges.measure, interval_s=MEASURE_INTERVAL_S))
    enforcer = Enforcer(pool, clock, disk_bytes=settings.database_disk_bytes)
    runtime.background("retention", enforcer.run())
    runtime.background("storage", keep_measuring(enforcer.measure, interval_s=STORAGE_INTERVAL_S))
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("database", functools.partial(can_write, pool))
    for number, consumer in enumerate(samples):
        runtime.background(f"samples-{number}", consumer.run())
        runtime.ready_when(f"partitions-{number}", consumer.is_assigned)
        runtime.alive_when(f"samples-{number}", consumer.is_turning)
    runtime.background("quarantine", quarantine.run())
    runtime.alive_when("quarantine", quarantine.is_turning)


class MqttSettings(Settings):
    """What the MQTT bridge needs besides: the broker, and as whom to come."""

    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = Field(1883, ge=1, le=65535)
    mqtt_user: str = ""
    mqtt_password: str = Field("", repr=False)
    mqtt_tls: bool = False
    mqtt_ca: str = Field("", description="file of the broker's certificate authority; the system's without it")
    mqtt_host_id: str = Field("smdih", description="the Sparkplug host that nodes wait for: spBv1.0/STATE/<this>")


async def start_mqtt(runtime: Runtime, settings: Settings) -> None:
    """From an MQTT broker into the message log."""
    found = MqttSettings()
    if settings.production and not found.mqtt_tls:
        raise NotForProduction(
            "SMDIH_PRODUCTION is on, and the broker would be reached without TLS: set SMDIH_MQTT_TLS."
        )
    broker = Broker(
        found.mqtt_host, found.mqtt_port, found.mqtt_user, found.mqtt_password, found.mqtt_tls, found.mqtt_ca
    )
    clock = SystemClock()
    cluster = Cluster.of(settings)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    sightings = Sightings(clock)
    writer = SightingsWriter(pool, sightings, clock)
    runtime.on_stop(writer.close)
    runtime.background("sightings", writer.run())
    directory = Directory(cluster, clock=clock, kinds=("firm", "machine"))
    runtime.background("directory", directory.run())
    group_commit = GroupCommit(publisher, partitions=await publisher.partitions(topics.SAMPLES))
    runtime.on_stop(group_commit.close)
    buckets = Buckets(directory)
    runtime.background("quotas", BucketsSharer(pool, buckets, clock).run())
    door = Door(directory, group_commit, clock, sightings, buckets)
    births = Births(cluster, publisher)
    name = cluster.name("smdih-bridge")

    def share(number: int, shares: int) -> Share:
        return Share(
            number,
            shares,
            broker=broker,
            client_id=f"{name}-{number}",
            births=births,
            directory=directory,
            door=door,
            clock=clock,
        )

    host = Host(broker, host_id=found.mqtt_host_id, client_id=f"{name}-host", clock=clock)
    bridge = Bridge(cluster, births, share=share, host=host)

    async def serve() -> None:
        await directory.wait_caught_up()  # a message of a firm that is not known yet would be nobody's
        await bridge.run()

    app = application("SMDIH MQTT bridge", runtime=runtime, directory=None)
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await runtime.enter(serve_http(app, host=settings.http_host, port=settings.http_port, tls=entrance.tls))
    runtime.background("bridge", serve())
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("mqtt", bridge.is_serving)


async def operator_key(settings: Settings) -> str:
    """Make an operator's key; needs the database only, so it is how the first one is had."""
    now_us = SystemClock().now_us()
    key, credential = make_credential(Role.OPERATOR, 0, 0, "made on the command line", now_us)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=1)
    try:
        async with transaction(pool) as connection:
            await credential_store.create(connection, credential, Role.OPERATOR, now_us)
    finally:
        await pool.close()
    return key


def main(arguments: list[str]) -> None:
    roles = {"door": start_door, "historian": start_historian, "mqtt": start_mqtt}
    if len(arguments) != 1 or arguments[0] not in (*roles, "operator-key"):
        print(USAGE, file=sys.stderr)  # noqa: T201  a command line
        sys.exit(2)
    settings = Settings()
    logs.configure(f"ingest-{arguments[0]}", settings.log_level)
    if arguments[0] == "operator-key":
        print(asyncio.run(operator_key(settings)))  # noqa: T201  a command line
        return
    name_process(f"ingest-{arguments[0]}")
    tracing.start(settings.trace_endpoint, process=f"ingest-{arguments[0]}", ratio=settings.trace_ratio)
    run(functools.partial(roles[arguments[0]], settings=settings), drain_s=settings.drain_s)


if __name__ == "__main__":
    main(sys.argv[1:])
