"""Brings the database and Kafka together again when one of them comes from a backup. Stop the hub's processes first.

    python -m services.reconcile after-restore [--accept-lost]    the database was restored, the topics have gone on
    python -m services.reconcile after-kafka-loss                 the topics are new and empty, the database is whole

Both may be repeated. See docs/operations.md.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from services.anomaly.rebase import rebase
from services.common import topics
from services.common.clock import SystemClock
from services.common.database import AWAY, CONNECT_TIMEOUT_S, Connection
from services.common.errors import TryAgain
from services.common.kafka import Cluster, Message, Publisher, stop_consumer, topic_ids
from services.common.settings import Settings
from services.ingest.registry import rebuild
from services.matching import room_rebuild
from services.migrate import SCHEMAS

PUBLISH_AT_ONCE = 2_000
READ_DEADLINE_S = 600


class ReconcileError(Exception):
    """Nothing was changed; the text says why and what to do."""


@dataclass(frozen=True)
class Found:
    """A stored position, and where the partition begins and ends now, and of which topic that is. `made_anew`: of another one."""

    schema: str
    topic: str
    partition: int
    position: int
    first: int
    end: int
    topic_id: str
    made_anew: bool

    def __str__(self) -> str:
        return (
            f"{self.schema} at {self.position} of {self.topic}/{self.partition}, which has {self.first} to {self.end}"
        )


async def after_restore(settings: Settings, *, accept_lost: bool) -> dict[str, object]:
    """The database is older than the topics: what they tell of the time between is taken in."""
    cluster, now_us = Cluster.of(settings), SystemClock().now_us()
    async with _consumer(cluster) as consumer, _alone(settings.database_dsn) as connection:
        found = await _positions(cluster, connection, consumer)
        others = [each for each in found if each.made_anew or each.position > each.end]
        if others:
            raise ReconcileError(
                f"The topics are not the ones that this database worked with: they are new, or end before stored positions "
                f"({others[0]}). If Kafka was lost as well, run after-kafka-loss instead."
            )
        deleted = [each for each in found if each.position < each.first]
        if deleted and not accept_lost:
            raise ReconcileError(
                f"Kafka has deleted records that this database has not taken in ({deleted[0]}): the dump is older than the topic "
                "keeps. Restore a newer dump, or go on without those records with --accept-lost."
            )
        directory = await _newest(consumer, cluster.name(topics.DIRECTORY))
        rooms = await _newest(consumer, cluster.name(topics.ROOMS))
        async with connection.transaction():
            for each in deleted:
                await _move(connection, each, each.first)
            await _into(connection, "ingest")
            try:
                adopted = await rebuild.adopt(connection, directory, now_us)
                await _into(connection, "matching")
                rooms_ended, messages = await room_rebuild.adopt(connection, rooms)
            except asyncpg.IntegrityConstraintViolationError as error:
                raise ReconcileError(
                    f"What the topics tell does not fit into this database ({error.detail or error}), and nothing was changed: "
                    "something was registered in it after the restore, or it is another hub's. Restore the dump once more into "
                    "an empty database, and run this before any process starts."
                ) from error
            await _check_alone(connection)
        await _publish(cluster, [*adopted.messages, *messages])
    return {
        "done": "after-restore",
        "taken_from_directory": adopted.taken,
        "keys_revoked": adopted.revoked,
        "rooms_ended": rooms_ended,
        "published": len(adopted.messages) + len(messages),
        "records_lost": sum(each.first - each.position for each in deleted),
        "records_to_take_in": sum(each.end - max(each.position, each.first) for each in found),
    }


async def after_kafka_loss(settings: Settings) -> dict[str, object]:
    """The topics are new: what must stand in them is published again, and consumers begin at their beginning."""
    cluster, now_us = Cluster.of(settings), SystemClock().now_us()
    async with _consumer(cluster) as consumer, _alone(settings.database_dsn) as connection:
        found = await _positions(cluster, connection, consumer)
        directory = await _newest(consumer, cluster.name(topics.DIRECTORY))
        rooms = await _newest(consumer, cluster.name(topics.ROOMS))
        samples = cluster.name(topics.SAMPLES)
        async with connection.transaction():
            await _into(connection, "ingest")
            # Before their ids were noted: the directory tells whether all are new. Doors that still ran may have filled new topics
            # past the positions in the old ones.
            all_new = _knows_little_of(directory, await rebuild.keys(connection))
            # A directory that is whole has what became of the hub since the dump, as after-restore takes it in.
            was_restored = not all_new and await rebuild.is_behind(connection, directory)
            adopted = rebuild.Adopted({}, 0, [])
            if was_restored:
                adopted = await rebuild.adopt(connection, directory, now_us)
                messages = adopted.messages
            else:
                messages = await rebuild.everything(connection, now_us)
            anew = [
                each
                for each in found
                if each.position > each.end or (each.position > each.first and (all_new or each.made_anew))
            ]
            for each in anew:
                await _move(connection, each, each.first)
            for each in found:
                await _note_topic_id(connection, each)
            await _into(connection, "anomaly")
            mine = [each for each in anew if (each.schema, each.topic) == ("anomaly", samples)]
            await rebase(connection, {each.partition: each.first for each in mine})
            await _into(connection, "matching")
            if was_restored:
                messages += (await room_rebuild.adopt(connection, rooms))[1]
            else:
                messages += await room_rebuild.everything(connection)
            await _check_alone(connection)
        await _publish(cluster, messages)
    return {
        "done": "after-kafka-loss",
        "taken_from_directory": adopted.taken,
        "keys_revoked": adopted.revoked,
        "published": len(messages),
        "positions_begun_anew": len(anew),
    }


def _knows_little_of(directory: Mapping[str, bytes | None], stored: Collection[str]) -> bool:
    """The directory topic is another one than this database published to: most of what the database has is not there. Some may be
    missing from the right one as well, as what was not sent yet, and some be in a new one, from processes that still ran."""
    missing = sum(1 for key in stored if key not in directory)
    return 2 * missing > len(stored)


@asynccontextmanager
async def _alone(dsn: str) -> AsyncIterator[Connection]:
    """A connection, once it is sure that no process of the hub has one, and no other of these."""
    try:
        connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, server_settings={"application_name": "reconcile", "timezone": "UTC"}
        )
    except AWAY as error:
        raise ReconcileError(f"The database does not answer: {error!r}. Look at SMDIH_DATABASE_DSN.") from error
    try:
        # Of this database, until the connection ends: what one publishes is not to be older than what another has.
        if not await connection.fetchval("SELECT pg_try_advisory_lock(hashtext('smdih-reconcile'))"):
            raise ReconcileError("Another reconcile is at work on this database; wait until it is done.")
        await _check_alone(connection)
        yield connection
    finally:
        await connection.close()


async def _check_alone(connection: Connection) -> None:
    """Asked again before a commit: an autoscaler may have started a process meanwhile."""
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    others = await connection.fetch(
        "SELECT DISTINCT application_name FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name LIKE 'smdih-%' ORDER BY 1"
    )
    if others:
        names = ", ".join(row["application_name"] for row in others)
        raise ReconcileError(
            f"Processes of the hub use the database ({names}), and nothing was changed: stop them, and whatever starts them."
        )


@asynccontextmanager
async def _consumer(cluster: Cluster) -> AsyncIterator[AIOKafkaConsumer]:
    consumer = AIOKafkaConsumer(
        **cluster.client(), group_id=None, enable_auto_commit=False, auto_offset_reset="earliest"
    )
    try:
        await consumer.start()
    except (KafkaError, OSError) as error:
        await stop_consumer(consumer)
        raise ReconcileError(f"No broker answers at {cluster.bootstrap}: {error!r}.") from error
    try:
        yield consumer
    finally:
        await stop_consumer(consumer)


async def _positions(cluster: Cluster, connection: Connection, consumer: AIOKafkaConsumer) -> list[Found]:
    existing = await consumer.topics()
    rows = []
    for schema in SCHEMAS:
        for row in await connection.fetch(
            f"SELECT topic, partition, next_offset, topic_id FROM {schema}.position ORDER BY 1, 2"  # noqa: S608
        ):
            if row["topic"] not in existing:
                raise ReconcileError(f"There is no topic {row['topic']}: run python -m services.migrate first.")
            rows.append((schema, TopicPartition(row["topic"], row["partition"]), row["next_offset"], row["topic_id"]))
    wanted = list({partition for _, partition, _, _ in rows})
    firsts = await consumer.beginning_offsets(wanted) if wanted else {}
    ends = await consumer.end_offsets(wanted) if wanted else {}
    ids = await topic_ids(cluster, {partition.topic for partition in wanted}) if wanted else {}
    # By topic, since not every consumer notes them.
    anew = {at.topic for _, at, _, noted in rows if noted not in ("", ids[at.topic])}
    return [
        Found(schema, at.topic, at.partition, position, firsts[at], ends[at], ids[at.topic], at.topic in anew)
        for schema, at, position, _ in rows
    ]


async def _newest(consumer: AIOKafkaConsumer, topic: str) -> Mapping[str, bytes | None]:
    """The newest record of each key of a topic with one partition."""
    at = TopicPartition(topic, 0)
    consumer.assign([at])
    await consumer.seek_to_beginning(at)
    end = (await consumer.end_offsets([at]))[at]
    newest: dict[str, bytes | None] = {}
    async with asyncio.timeout(READ_DEADLINE_S):
        while await consumer.position(at) < end:
            for record in (await consumer.getmany(at, timeout_ms=500)).get(at, ()):
                newest[record.key.decode()] = record.value
    return newest


async def _move(connection: Connection, found: Found, to: int) -> None:
    await connection.execute(
        f"UPDATE {found.schema}.position SET next_offset = $3, unreadable_in_a_row = 0 WHERE topic = $1 AND partition = $2",  # noqa: S608
        *(found.topic, found.partition, to),
    )


async def _note_topic_id(connection: Connection, found: Found) -> None:
    await connection.execute(
        f"UPDATE {found.schema}.position SET topic_id = $3 WHERE topic = $1 AND partition = $2",  # noqa: S608
        *(found.topic, found.partition, found.topic_id),
    )


async def _into(connection: Connection, schema: str) -> None:
    await connection.execute(f"SET LOCAL search_path TO {schema}, public")


async def _publish(cluster: Cluster, messages: Sequence[Message]) -> None:
    try:
        async with Publisher(cluster) as publisher:
            for start in range(0, len(messages), PUBLISH_AT_ONCE):
                await publisher.publish_all(messages[start : start + PUBLISH_AT_ONCE])
    except TryAgain as error:
        raise ReconcileError(
            "Kafka went away while the directory was published. The database is in order; run the same command again."
        ) from error


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m services.reconcile", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    restored = commands.add_parser("after-restore", help="the database was restored, the topics have gone on")
    restored.add_argument("--accept-lost", action="store_true", help="go on though Kafka has deleted some records")
    commands.add_parser("after-kafka-loss", help="the topics are new and empty, the database is whole")
    options = parser.parse_args(arguments)
    settings = Settings()
    work = (
        after_restore(settings, accept_lost=options.accept_lost)
        if options.command == "after-restore"
        else after_kafka_loss(settings)
    )
    try:
        told = asyncio.run(work)
    except ReconcileError as error:
        print(f"reconcile: {error}", file=sys.stderr)
        return 1
    except (*AWAY, asyncpg.PostgresError, KafkaError) as error:
        said = f"the database or Kafka did not do its part: {error!r}. Mend that, then run the same command again."
        print(f"reconcile: {said}", file=sys.stderr)
        return 1
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
