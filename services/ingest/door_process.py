"""The process that takes telemetry, and serves the registry, the queries and what firms need besides, by gRPC and HTTP."""

import functools

from services.common import memory, topics
from services.common.database import create_pool
from services.common.entrance import open_entrance
from services.common.evidence import Signer
from services.common.kafka import TopicEnds
from services.common.outbox import OutboxRelay
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.ingest import edges
from services.ingest.diagnosis.diagnosis import Partitions
from services.ingest.queries.rooms import RoomReads, Rooms
from services.ingest.registry.claim_rpc import OPEN_METHODS
from services.ingest.settings import SCHEMA
from services.ingest.taking import open_taking
from services.ingest.telemetry.api import note_too_large
from services.ingest.use_cases import UseCases

# What other services call here, by the name in their certificate.
INTERNAL_CALLS = {"anomaly": ("/smdih.ingest.v1.QueryService/History",)}


async def start(runtime: Runtime, settings: Settings) -> None:
    memory.keep_freed()
    entrance = open_entrance(runtime, settings, takes_keys=True)
    kinds = ("firm", "site", "machine", "partner")
    taking = await open_taking(runtime, settings, kinds=kinds, keys_are_seen=True)
    clock, cluster, pool, directory = taking.clock, taking.cluster, taking.pool, taking.directory
    relay = OutboxRelay(pool, taking.publisher, schema=SCHEMA)
    runtime.background("outbox", relay.run())
    ends = TopicEnds(cluster)
    runtime.on_stop(ends.close)
    rooms = Rooms(cluster, clock=clock)
    runtime.background("rooms", rooms.run())
    # Of its own: a query holds a connection of the other pool while its read is noted.
    log_pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=1)
    runtime.on_stop(log_pool.close)
    room_reads = RoomReads(log_pool, rooms, clock=clock)
    runtime.on_stop(room_reads.flush)
    runtime.background("room reads", room_reads.run())
    cases = UseCases(
        pool,
        directory=directory,
        relay=relay,
        clock=clock,
        door=taking.door,
        sightings=taking.sightings,
        ends=ends,
        samples=Partitions(cluster.name(topics.SAMPLES), taking.partitions),
        rooms=rooms,
        room_reads=room_reads,
        signer=Signer(settings.evidence_key) if settings.evidence_key else None,
        disk_bytes=settings.database_disk_bytes,
    )
    runtime.background("claim codes", cases.claims.run())
    runtime.background("ended keys", cases.credentials.run())
    await entrance.serve(
        "SMDIH ingest",
        directory=directory,
        pool=pool,
        servicers=edges.servicers(taking.door, cases),
        routers=edges.routers(taking.door, cases),
        open_routers=edges.open_routers(cases),
        open_methods=OPEN_METHODS,
        internal_calls=INTERNAL_CALLS,
        apart=edges.TELEMETRY,
        on_malformed=taking.door.note_malformed,
        on_too_large=functools.partial(note_too_large, door=taking.door),
    )
    # Not the database: telemetry is taken while it is away, and what needs it says so itself.
    runtime.ready_when("kafka", taking.publisher.answers)
    runtime.ready_when("directory", directory.is_caught_up)
