"""What every process needs that takes telemetry, wired once from the settings."""

from collections.abc import Collection
from dataclasses import dataclass

from services.common import topics
from services.common.clock import Clock, SystemClock
from services.common.database import Pool, create_pool
from services.common.directory import Directory
from services.common.kafka import Cluster, Publisher
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.ingest.diagnosis.sightings import Sightings, SightingsWriter
from services.ingest.settings import SCHEMA
from services.ingest.telemetry.buckets import Buckets, BucketsSharer
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.groupcommit import GroupCommit


@dataclass(frozen=True)
class Taking:
    """`partitions`: of the topic of samples. `sightings`: writes what the door sees."""

    clock: Clock
    cluster: Cluster
    pool: Pool
    publisher: Publisher
    directory: Directory
    partitions: int
    sightings: SightingsWriter
    door: Door


async def open_taking(
    runtime: Runtime, settings: Settings, *, kinds: Collection[str], keys_are_seen: bool = False
) -> Taking:
    """Started, and stopped with the process. `kinds`: what the directory holds. `keys_are_seen`: note which keys come, and how."""
    clock = SystemClock()
    cluster = Cluster.of(settings)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    sightings = Sightings(clock)
    writer = SightingsWriter(pool, sightings, clock)
    runtime.on_stop(writer.close)
    runtime.background("sightings", writer.run())
    directory = Directory(cluster, clock=clock, kinds=kinds, key_watch=sightings if keys_are_seen else None)
    runtime.background("directory", directory.run())
    partitions = await publisher.partitions_when_it_answers(topics.SAMPLES)
    group_commit = GroupCommit(publisher, partitions=partitions)
    runtime.on_stop(group_commit.close)
    buckets = Buckets(directory)
    runtime.background("quotas", BucketsSharer(pool, buckets, clock).run())
    door = Door(directory, group_commit, clock, sightings, buckets)
    return Taking(clock, cluster, pool, publisher, directory, partitions, writer, door)
