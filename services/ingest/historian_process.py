"""The process that brings telemetry from the message log into the database."""

import functools

from services.common import memory, topics
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool
from services.common.entrance import open_entrance
from services.common.kafka import Cluster, PositionedConsumer, Publisher
from services.common.metrics import keep_measuring
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.ingest.backups import BackupGauge
from services.ingest.historian.historian import MEASURE_INTERVAL_S, Historian, StoredGauges
from services.ingest.retention.service import MEASURE_INTERVAL_S as STORAGE_INTERVAL_S
from services.ingest.retention.service import Enforcer
from services.ingest.settings import SCHEMA

HISTORIANS = 2
HISTORIAN_RECORDS_MAX = 500
# A partition's share of a poll: 8 million samples from a full topic went at 7.2-7.5 million a second with 2 MiB and at 8.9 with
# 4 MiB, until the system began to write back. 8 MiB gave no more, and holds more memory.
HISTORIAN_POLL_BYTES_MAX = 4 * 1024 * 1024


async def start(runtime: Runtime, settings: Settings) -> None:
    memory.keep_freed()
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
            note=functools.partial(historian.note_numbers, topics.SAMPLES),
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
        note=functools.partial(set_aside.note_numbers, topics.QUARANTINE),
        on_change=set_aside.forget,
    )
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await entrance.serve_probes("SMDIH historian")
    gauges = StoredGauges(historians, pool, clock)
    runtime.background("gauges", keep_measuring(gauges.measure, interval_s=MEASURE_INTERVAL_S))
    runtime.background("backups", keep_measuring(BackupGauge(pool).measure, interval_s=STORAGE_INTERVAL_S))
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
