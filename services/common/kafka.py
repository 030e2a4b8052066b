"""Kafka at its edges: making topics, publishing durably, and consuming with the position in the database."""

import asyncio
import functools
import ssl
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import asyncpg
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NoOffsetForPartitionError,
    TopicAlreadyExistsError,
)
from prometheus_client import Counter, Gauge

from services.common import topics, tracing
from services.common.database import AWAY, Connection, Pool
from services.common.errors import TooLarge, TryAgain
from services.common.logs import get_logger
from services.common.settings import Settings

log = get_logger(__name__)

REQUEST_BYTES_MAX = 8 * 1024 * 1024
PUBLISH_TIMEOUT_S = 10
RETRY_AFTER_S = 3
POLL_TIMEOUT_MS = 200
RETRY_DELAY_S_MAX = 5
# A consumer that has work and stores nothing for this long is stuck and should be started anew.
STALLED_S_MAX = 60
OFFSET_COMMIT_INTERVAL_S = 5
DEAD_LETTERS_IN_A_ROW_MAX = 100

# Records that a consumer could not read, by topic; each stands in the topic's dead letters.
dead_letters_total = Counter("smdih_kafka_dead_letters_total", "Records put into dead letters", ["topic"])
# Records that the brokers hold now, and publishes that were not acknowledged in time.
published_total = Counter("smdih_kafka_published_total", "Records published", ["topic"])
publish_failures_total = Counter("smdih_kafka_publish_failures_total", "Publishes that were not acknowledged")
# Records whose effects are stored, by the group that took them.
consumed_total = Counter("smdih_kafka_consumed_total", "Records taken in", ["topic", "group"])
# Records between the stored position and the end of the partitions of this process.
lag_records = Gauge("smdih_kafka_lag_records", "Records not yet taken in", ["topic", "group"])
# For how long there has been work and no stored progress; 0 when all is well.
stalled_seconds = Gauge("smdih_kafka_stalled_seconds", "Time without progress while there is work", ["topic", "group"])
# The longest run of unreadable records up to now; past DEAD_LETTERS_IN_A_ROW_MAX the consumer stops.
unreadable_in_a_row = Gauge("smdih_kafka_unreadable_in_a_row", "Unreadable records in a row", ["topic", "group"])


@dataclass(frozen=True)
class Identity:
    """As whom we come to the brokers, and how the connection is guarded; the default is nobody, in the clear."""

    protocol: str = "PLAINTEXT"
    mechanism: str = "SCRAM-SHA-512"
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    @property
    def is_sasl(self) -> bool:
        return self.protocol.startswith("SASL")

    def tls(self) -> ssl.SSLContext | None:
        """None: the connection is in the clear. Raises OSError when a file cannot be read."""
        if not self.protocol.endswith("SSL"):
            return None
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context


@dataclass(frozen=True)
class Cluster:
    """Where the brokers are, and the prefix that keeps this hub's topics and groups apart on a shared cluster."""

    bootstrap: str
    prefix: str = ""
    identity: Identity = Identity()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            settings.kafka_bootstrap,
            settings.kafka_topic_prefix,
            Identity(
                settings.kafka_security_protocol,
                settings.kafka_sasl_mechanism,
                settings.kafka_username,
                settings.kafka_password,
                settings.kafka_ca_file,
                settings.kafka_certificate_file,
                settings.kafka_key_file,
            ),
        )

    def name(self, topic_or_group: str) -> str:
        return self.prefix + topic_or_group

    def client(self) -> dict[str, Any]:
        """What every client of aiokafka is made with: where the brokers are, and as whom to come."""
        identity = self.identity
        made: dict[str, Any] = {"bootstrap_servers": self.bootstrap, "security_protocol": identity.protocol}
        if (tls := identity.tls()) is not None:
            made["ssl_context"] = tls
        if identity.is_sasl:
            made["sasl_mechanism"] = identity.mechanism
            made["sasl_plain_username"], made["sasl_plain_password"] = identity.username, identity.password
        return made


async def create_topics(cluster: Cluster, *, partitions: int, replication: int, deadline_s: float = 60) -> None:
    """Create the topics that are missing. Raises TryAgain when no broker answers by the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        admin = AIOKafkaAdminClient(**cluster.client())
        try:
            await admin.start()
            existing = set(await admin.list_topics())
            missing = [
                _new_topic(cluster, topic, partitions=partitions, replication=replication)
                for topic in topics.TOPICS
                if cluster.name(topic.name) not in existing
            ]
            response = await admin.create_topics(missing)
            for name, code, *rest in response.topic_errors:
                if code not in (0, TopicAlreadyExistsError.errno):
                    raise TryAgain(f"Topic {name} could not be created: error {code} {rest}")
            return
        except (KafkaError, OSError) as error:
            if time.monotonic() > until:
                raise TryAgain(f"No broker answers at {cluster.bootstrap}: {error}") from error
            await asyncio.sleep(0.2)
        finally:
            await admin.close()


def _new_topic(cluster: Cluster, topic: topics.Topic, *, partitions: int, replication: int) -> NewTopic:
    config = {"cleanup.policy": "compact"} if topic.retention_ms is None else {"retention.ms": str(topic.retention_ms)}
    config["max.message.bytes"] = str(REQUEST_BYTES_MAX)
    return NewTopic(cluster.name(topic.name), topic.partitions or partitions, replication, topic_configs=config)


@dataclass(frozen=True)
class Message:
    """A record to publish. A value of None is a tombstone; a partition of None is found from the key."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


class Publisher:
    """Publishes records; returns only when every in-sync replica holds them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._producer: AIOKafkaProducer | None = None
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """For who has not entered it, so as to start while no broker answers: it connects when something is published."""
        if self._producer is not None:
            await self._producer.stop()

    async def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises TryAgain when no broker answers."""
        producer = await self._started()
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                return len(await producer.partitions_for(self._cluster.name(topic)))
        except (KafkaError, OSError, TimeoutError) as error:
            raise self._away() from error

    async def publish(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None = None,
        partition: int | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> int:
        """Publish one record and return its offset.

        Raises TryAgain when it was not acknowledged in PUBLISH_TIMEOUT_S. It may then still arrive: what is sent again must carry
        the id by which a repeat is recognised.
        """
        (offset,) = await self.publish_all([Message(topic, value, key, partition, tuple(headers))])
        return offset

    async def publish_all(self, messages: Sequence[Message]) -> list[int]:
        """Publish records together and return their offsets; on each partition they stand in the order given.

        Raises as `publish` does; then some may have arrived, and all are to be sent again, in the same order.
        """
        producer = await self._started()
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                sent = [
                    await producer.send(
                        self._cluster.name(message.topic),
                        message.value,
                        key=message.key,
                        partition=message.partition,
                        headers=list(message.headers),
                    )
                    for message in messages
                ]
                offsets = [int((await future).offset) for future in sent]
        except MessageSizeTooLargeError as error:
            raise TooLarge() from error
        except (KafkaError, OSError, TimeoutError) as error:
            publish_failures_total.inc()
            log.warning("publish failed", topics=sorted({message.topic for message in messages}), error=repr(error))
            self._forget(producer)
            raise self._away() from error
        for message in messages:
            published_total.labels(message.topic).inc()
        return offsets

    async def answers(self) -> bool:
        """Readiness: a broker answers."""
        try:
            producer = await self._started()
            async with asyncio.timeout(3):
                await producer.client.fetch_all_metadata()
        except (TryAgain, KafkaError, OSError, TimeoutError):
            return False
        return True

    def _away(self) -> TryAgain:
        return TryAgain(
            "The message log does not answer; nothing was acknowledged, send again.", retry_after_s=RETRY_AFTER_S
        )

    async def _started(self) -> AIOKafkaProducer:
        async with self._starting:
            if self._producer is None:
                producer = AIOKafkaProducer(
                    **self._cluster.client(),
                    acks="all",
                    enable_idempotence=True,
                    max_request_size=REQUEST_BYTES_MAX,
                    max_batch_size=REQUEST_BYTES_MAX,
                    request_timeout_ms=PUBLISH_TIMEOUT_S * 1000,
                )
                try:
                    async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                        await producer.start()
                except (KafkaError, OSError, TimeoutError) as error:
                    await _abandon(producer)
                    raise self._away() from error
                self._producer = producer
            return self._producer

    def _forget(self, producer: AIOKafkaProducer) -> None:
        # After an error that leaves the outcome open only a new producer has a sequence that the broker will accept for sure.
        if self._producer is producer:
            self._producer = None
            task = asyncio.create_task(_abandon(producer))
            _abandoned.add(task)
            task.add_done_callback(_abandoned.discard)


_abandoned: set[asyncio.Task[None]] = set()


async def _abandon(producer: AIOKafkaProducer) -> None:
    try:
        async with asyncio.timeout(1):
            await producer.stop()
    except (KafkaError, OSError, TimeoutError):
        await producer.client.close()


class TopicEnds:
    """Where the partitions of topics end now, for those who want to know how much is still on its way."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._consumer: AIOKafkaConsumer | None = None
        self._asking = asyncio.Lock()

    def full_name(self, topic: str) -> str:
        return self._cluster.name(topic)

    async def end_of(self, topic: str, partition: int, *, timeout_s: float) -> int | None:
        """Offset of the next record of the partition; None when no broker says so in time."""
        where = TopicPartition(self._cluster.name(topic), partition)
        try:
            async with asyncio.timeout(timeout_s), self._asking:
                if self._consumer is None:
                    consumer = AIOKafkaConsumer(**self._cluster.client(), group_id=None)
                    try:
                        await consumer.start()
                    except BaseException:
                        await consumer.stop()
                        raise
                    self._consumer = consumer
                end: int = (await self._consumer.end_offsets([where]))[where]
                return end
        except (KafkaError, OSError, TimeoutError) as error:
            log.info("no end of the partition", topic=topic, partition=partition, error=repr(error))
            return None

    async def close(self) -> None:
        if self._consumer is not None:
            await self._consumer.stop()


class Poison(Exception):
    """A record that cannot be read; it goes to the dead letters."""


class Fenced(Exception):
    """Another process has stored past our position: the partition is no longer ours."""


class TooManyDeadLetters(Exception):
    """So many unreadable records in a row mean a bad release, not bad records: stop rather than empty the topic."""


class DeadLetters:
    """Takes the records that a consumer could not read, durably, and stops the consumer at a run of them.

    The length of the run is stored with the position: a consumer that is started again and again does not empty the topic
    bit by bit.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def bury(self, topic: str, records: Sequence[Any], bad: Sequence[tuple[Any, str]], *, in_a_row: int) -> int:
        """Keep the bad ones among these records of one partition (topic named without prefix), each with its reason.

        `in_a_row` is how many unreadable ones came directly before; returns how many there are at the end, once the
        dead-letter topic holds them. Raises TooManyDeadLetters, before anything is kept, and TryAgain.
        """
        offsets = {record.offset for record, _ in bad}
        for record in records:
            in_a_row = in_a_row + 1 if record.offset in offsets else 0
            if in_a_row > DEAD_LETTERS_IN_A_ROW_MAX:
                raise TooManyDeadLetters(
                    f"{topic}/{record.partition}: {in_a_row} unreadable records in a row at offset {record.offset} ({bad[0][1]}). "
                    "They stay where they are. Run a release that reads them; or, if they are rightly unreadable, set "
                    "position.unreadable_in_a_row of this partition to minus the number that may be buried."
                )
        for record, reason in bad:
            headers = [
                ("topic", record.topic.encode()),
                ("partition", str(record.partition).encode()),
                ("offset", str(record.offset).encode()),
                ("reason", reason.encode()),
            ]
            await self._publisher.publish(
                topic + topics.DEAD_LETTERS_SUFFIX, record.value, key=record.key, headers=headers
            )
            dead_letters_total.labels(topic=topic).inc()
            log.error("dead letter", topic=topic, partition=record.partition, offset=record.offset, reason=reason)
        return in_a_row


Handler = Callable[[Connection, Sequence[ConsumerRecord]], Awaitable[Sequence[tuple[ConsumerRecord, str]]]]


class PositionedConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped base
    """Consumes topics in a group; effects and position are stored in one transaction.

    `handler(connection, records)` gets the records of one poll, in order within each partition, and stores their effects through
    the connection; the consumer opens and commits the transaction. It returns the records that it could not read, each with the
    reason; they are in the dead letters, durably, before the position moves past them. A crash at any point therefore
    loses nothing and repeats nothing.

    Kafka's own rebalancing decides who reads a partition; the database decides whose work counts: the position is a fence, so
    a process that was declared dead but still runs cannot store anything.
    """

    def __init__(
        self,
        cluster: Cluster,
        pool: Pool,
        publisher: Publisher,
        *,
        topic_names: Sequence[str],
        group: str,
        handler: Handler,
        records_max: int = 500,
        poll_bytes_max: int = 16 * 1024 * 1024,
        on_change: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._cluster = cluster
        self._pool = pool
        self._topics = {cluster.name(name): name for name in topic_names}
        self._group = cluster.name(group)
        self._group_label = group
        self._handler = handler
        self._records_max = records_max
        self._poll_bytes_max = poll_bytes_max
        self._on_change = on_change
        self._positions: dict[TopicPartition, int] = {}
        self._unreadable_in_a_row: dict[TopicPartition, int] = {}
        self._assigned = asyncio.Event()
        self._working = asyncio.Lock()
        self._broken: BaseException | None = None
        self._dead_letters = DeadLetters(publisher)
        self._last_progress = time.monotonic()
        self._last_offset_commit = 0.0
        self._consumer: AIOKafkaConsumer | None = None

    async def run(self) -> None:
        """Consume until cancelled. Raises what cannot be waited out."""
        consumer = AIOKafkaConsumer(
            **self._cluster.client(),
            group_id=self._group,
            enable_auto_commit=False,
            # A stored position that retention has deleted is an error to be seen, not a silent jump.
            auto_offset_reset="none",
            max_partition_fetch_bytes=self._poll_bytes_max,
            fetch_max_bytes=self._poll_bytes_max,
            session_timeout_ms=10_000,
            heartbeat_interval_ms=2_000,
        )
        await _start_when_it_answers(consumer)
        self._consumer = consumer
        _running.add(self)
        show_consumer(_running, self._topics.values(), self._group_label)
        try:
            consumer.subscribe(list(self._topics), listener=self)
            while True:
                await self._turn(consumer)
        finally:
            await consumer.stop()

    @property
    def stalled_s(self) -> float:
        """For how long there has been work and no stored progress; 0 when all is well."""
        if self._assigned.is_set() and self.lag == 0:
            return 0.0
        return time.monotonic() - self._last_progress

    async def is_assigned(self) -> bool:
        """Readiness: it is known which partitions are ours, and where they stand."""
        return self._assigned.is_set() and self._broken is None

    async def is_turning(self) -> bool:
        """Liveness: the loop makes progress, or has nothing to do."""
        return self._broken is None and self.stalled_s < STALLED_S_MAX

    @property
    def lag(self) -> int:
        """Records between the stored positions and the ends of the partitions; a partition whose end is not known counts 1."""
        return sum(self.lag_of(name) for name in self._topics.values())

    def lag_of(self, name: str) -> int:
        """The same of one topic."""
        if self._consumer is None:
            return 0
        ends = (
            (self._consumer.highwater(partition), position)
            for partition, position in self._positions.items()
            if self._topics[partition.topic] == name
        )
        return sum(1 if end is None else max(0, end - position) for end, position in ends)

    def unreadable_of(self, name: str) -> int:
        """The longest run of unreadable records of a topic's partitions that are ours."""
        runs = (run for partition, run in self._unreadable_in_a_row.items() if self._topics[partition.topic] == name)
        return max(runs, default=0)

    def is_of(self, name: str, group: str) -> bool:
        return group == self._group_label and name in self._topics.values()

    async def on_partitions_revoked(self, revoked: Sequence[TopicPartition]) -> None:
        self._assigned.clear()
        async with self._working:  # finish the transaction in flight before the partitions go
            self._positions.clear()
            self._unreadable_in_a_row.clear()

    async def on_partitions_assigned(self, assigned: Sequence[TopicPartition]) -> None:
        # aiokafka swallows what is raised here, and polls go on meanwhile: so the loop waits for this event, and a failure
        # is kept for it.
        try:
            async with self._working:
                if self._on_change is not None:
                    await self._on_change()
                self._positions = await self._load_positions(assigned)
                self._seek(self._positions)
            self._last_progress = time.monotonic()
            self._assigned.set()
            log.info("partitions assigned", partitions=sorted(f"{p.topic}/{p.partition}" for p in assigned))
        except BaseException as error:
            self._broken = error
            self._assigned.set()
            raise

    async def _turn(self, consumer: AIOKafkaConsumer) -> None:
        await self._assigned.wait()
        if self._broken is not None:
            raise RuntimeError("positions could not be loaded") from self._broken
        try:
            polled = await consumer.getmany(timeout_ms=POLL_TIMEOUT_MS, max_records=self._records_max)
        except (NoOffsetForPartitionError, IllegalStateError):
            if self._assigned.is_set():
                raise
            return  # a rebalance came between; ask again after it
        async with self._working:
            if not self._assigned.is_set():
                return
            records = [
                record
                for partition, found in polled.items()
                for record in found
                if record.offset >= self._positions.get(partition, record.offset + 1)
            ]
            if records:
                await self._store(records)
            if records or self.lag == 0:
                self._last_progress = time.monotonic()
        await self._tell_broker(consumer)

    async def _store(self, records: Sequence[ConsumerRecord]) -> None:
        by_partition: dict[TopicPartition, list[ConsumerRecord]] = {}
        for record in records:
            by_partition.setdefault(TopicPartition(record.topic, record.partition), []).append(record)
        ends = {partition: found[-1].offset + 1 for partition, found in by_partition.items()}
        runs: dict[TopicPartition, int] = {}
        tracing.remember(records)
        delay_s = 0.1
        while True:
            try:
                async with self._pool.acquire(timeout=10) as connection, connection.transaction():
                    bad = await self._handler(connection, records)
                    for partition, found in by_partition.items():
                        mine = [one for one in bad if (one[0].topic, one[0].partition) == tuple(partition)]
                        runs[partition] = await self._dead_letters.bury(
                            self._topics[partition.topic], found, mine, in_a_row=self._unreadable_in_a_row[partition]
                        )
                        await self._move(connection, partition, ends[partition], runs[partition])
                break
            except Fenced:
                log.warning("fenced: another process stored these records")
                if self._on_change is not None:
                    await self._on_change()
                self._positions.update(await self._load_positions(list(ends)))
                self._seek({partition: self._positions[partition] for partition in ends})
                return
            except (*AWAY, asyncpg.DeadlockDetectedError, asyncpg.SerializationError, TryAgain) as error:
                # The outcome of a COMMIT may be open: the position in the database tells, and the fence refuses a repeat.
                log.warning("store failed, trying again", error=repr(error), delay_s=delay_s)
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_DELAY_S_MAX)
                if self._on_change is not None:
                    await self._on_change()
        self._positions.update(ends)
        self._unreadable_in_a_row.update(runs)
        for partition, found in by_partition.items():
            consumed_total.labels(self._topics[partition.topic], self._group_label).inc(len(found))

    async def _move(self, connection: Connection, partition: TopicPartition, end: int, run: int) -> None:
        expected = self._positions[partition]
        moved = await connection.fetchval(
            "UPDATE position SET next_offset = $4, unreadable_in_a_row = $5 "
            "WHERE topic = $1 AND partition = $2 AND next_offset = $3 RETURNING 1",
            *(partition.topic, partition.partition, expected, end, run),
        )
        if moved is None:
            raise Fenced(f"{partition} is not at {expected} any more")

    async def _load_positions(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        loaded: dict[TopicPartition, int] = {}
        delay_s = 0.1
        while True:
            try:
                async with self._pool.acquire(timeout=10) as connection:
                    for partition in partitions:
                        row = await connection.fetchrow(
                            "INSERT INTO position AS p (topic, partition, next_offset) VALUES ($1, $2, 0) "
                            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = p.next_offset "
                            "RETURNING next_offset, unreadable_in_a_row",
                            partition.topic,
                            partition.partition,
                        )
                        assert row is not None
                        loaded[partition] = row["next_offset"]
                        self._unreadable_in_a_row[partition] = row["unreadable_in_a_row"]
                return loaded
            except AWAY as error:
                log.warning("positions cannot be loaded yet", error=repr(error))
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_DELAY_S_MAX)

    def _seek(self, positions: dict[TopicPartition, int]) -> None:
        assert self._consumer is not None
        for partition, offset in positions.items():
            self._consumer.seek(partition, offset)

    async def _tell_broker(self, consumer: AIOKafkaConsumer) -> None:
        # Only for those who watch lag from outside: nothing here ever reads it back.
        if not self._positions or time.monotonic() - self._last_offset_commit < OFFSET_COMMIT_INTERVAL_S:
            return
        self._last_offset_commit = time.monotonic()
        try:
            await consumer.commit(dict(self._positions))
        except (CommitFailedError, IllegalStateError, KafkaError) as error:
            log.info("offsets not committed to the broker", error=repr(error))


# Several may share a process and a topic.
_running: weakref.WeakSet[PositionedConsumer] = weakref.WeakSet()


class Shown(Protocol):
    """What the gauges ask of a consumer."""

    @property
    def stalled_s(self) -> float: ...
    def lag_of(self, name: str) -> int: ...
    def unreadable_of(self, name: str) -> int: ...
    def is_of(self, name: str, group: str) -> bool: ...


def show_consumer(consumers: Iterable[Shown], topic_names: Iterable[str], group: str) -> None:
    """Let the gauges of these topics and this group show those of the consumers that are of it."""

    def ours(name: str) -> list[Shown]:
        return [consumer for consumer in consumers if consumer.is_of(name, group)]

    def sum_of_lags(name: str) -> float:
        return sum(consumer.lag_of(name) for consumer in ours(name))

    def longest_stall(name: str) -> float:
        return max((consumer.stalled_s for consumer in ours(name)), default=0.0)

    def longest_run(name: str) -> float:
        return max((consumer.unreadable_of(name) for consumer in ours(name)), default=0.0)

    for name in topic_names:
        lag_records.labels(name, group).set_function(functools.partial(sum_of_lags, name))
        stalled_seconds.labels(name, group).set_function(functools.partial(longest_stall, name))
        unreadable_in_a_row.labels(name, group).set_function(functools.partial(longest_run, name))
        consumed_total.labels(name, group)
        dead_letters_total.labels(name)


async def _start_when_it_answers(consumer: Any) -> None:
    while True:
        try:
            await consumer.start()
            return
        except KafkaConnectionError as error:
            log.warning("no broker answers yet", error=repr(error))
            await asyncio.sleep(1)
