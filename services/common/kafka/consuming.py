"""Consuming with the position in the database, and what can be seen of it."""

import asyncio
import functools
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import asyncpg
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaConnectionError,
    KafkaError,
    NoOffsetForPartitionError,
)
from prometheus_client import Counter, Gauge

from services.common import tracing
from services.common.database import AWAY, REFUSED, Connection, Pool
from services.common.errors import TryAgain
from services.common.kafka.attempts import ATTEMPT_S_MAX, SILENCE_S_MAX, Attempts
from services.common.kafka.cluster import Cluster, stop_consumer
from services.common.kafka.deadletters import DeadLetters, dead_letters_total
from services.common.kafka.positions import load_positions
from services.common.kafka.publishing import Publisher
from services.common.kafka.topicids import topic_ids
from services.common.logs import get_logger

log = get_logger(__name__)

POLL_TIMEOUT_MS = 200
RETRY_DELAY_S_MAX = 5
OFFSET_COMMIT_INTERVAL_S = 5
REASON_LENGTH_MAX = 300

# Records whose effects are stored, by the group that took them.
consumed_total = Counter("smdih_kafka_consumed_total", "Records taken in", ["topic", "group"])
# Records between the stored position and the end of the partitions of this process.
lag_records = Gauge("smdih_kafka_lag_records", "Records not yet taken in", ["topic", "group"])
# For how long there has been work and no stored progress; 0 when all is well.
stalled_seconds = Gauge("smdih_kafka_stalled_seconds", "Time without progress while there is work", ["topic", "group"])
# The longest run of unreadable records up to now; past DEAD_LETTERS_IN_A_ROW_MAX the consumer stops.
unreadable_in_a_row = Gauge("smdih_kafka_unreadable_in_a_row", "Unreadable records in a row", ["topic", "group"])


class Fenced(Exception):
    """Another process has stored past our position: the partition is no longer ours."""


Note = Callable[[Connection, Sequence[ConsumerRecord]], Awaitable[None]]
Handler = Callable[[Connection, Sequence[ConsumerRecord]], Awaitable[Sequence[tuple[ConsumerRecord, str]]]]


class PositionedConsumer(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped base
    """Consumes topics in a group; effects and position are stored in one transaction.

    `handler(connection, records)` gets the records of one poll, in order within each partition, and stores their effects through
    the connection; the consumer opens and commits the transaction. It returns the records that it could not read, each with the
    reason; they are in the dead letters, durably, before the position moves past them. So are records whose content the database
    refuses: after such a refusal the records of the poll are handed over one by one. A crash at any point therefore loses nothing
    and repeats nothing.

    `note` is told of all records first, in the same transaction; what it stores stays, whatever becomes of a record.

    Kafka's own rebalancing decides who reads a partition; the database decides whose work counts: the position is a fence, so
    a process that was declared dead but still runs cannot store anything. With the position the topic's id is kept: the consumer
    stops (MadeAnew) where the topic was deleted and made again.
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
        note: Note | None = None,
        records_max: int = 500,
        poll_bytes_max: int = 16 * 1024 * 1024,
        on_change: Callable[[], Awaitable[None]] | None = None,
        silence_s_max: float = SILENCE_S_MAX,
    ) -> None:
        self._cluster = cluster
        self._pool = pool
        self._topics = {cluster.name(name): name for name in topic_names}
        self._group = cluster.name(group)
        self._group_label = group
        self._handler = handler
        self._note = note
        self._records_max = records_max
        self._poll_bytes_max = poll_bytes_max
        self._on_change = on_change
        self._positions: dict[TopicPartition, int] = {}
        self._topic_ids: Mapping[str, str] = {}
        self._unreadable_in_a_row: dict[TopicPartition, int] = {}
        self._assigned = asyncio.Event()
        self._working = asyncio.Lock()
        self._broken: BaseException | None = None
        self._dead_letters = DeadLetters(publisher)
        self._attempts = Attempts(publisher.answers, silence_s_max=silence_s_max)
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
            await stop_consumer(consumer)

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
        """Liveness: the loop tries, or has nothing to do."""
        return self._broken is None and await self._attempts.go_on()

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
                await self._changed()
                self._topic_ids = await self._ask_topic_ids({partition.topic for partition in assigned})
                self._positions = await self._load_positions(assigned)
                self._seek(self._positions)
            self._last_progress = time.monotonic()
            self._attempts.ended()
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
                self._attempts.ended()
        await self._tell_broker(consumer)

    async def _store(self, records: Sequence[ConsumerRecord]) -> bool:
        """False: another process has stored some of them; they are to be read anew."""
        by_partition: dict[TopicPartition, list[ConsumerRecord]] = {}
        for record in records:
            by_partition.setdefault(TopicPartition(record.topic, record.partition), []).append(record)
        ends = {partition: found[-1].offset + 1 for partition, found in by_partition.items()}
        runs: dict[TopicPartition, int] = {}
        tracing.remember(records)
        delay_s = 0.1
        one_by_one = False
        while True:
            try:
                async with (
                    asyncio.timeout(ATTEMPT_S_MAX),
                    self._connection() as connection,
                    connection.transaction(),
                ):
                    if self._note is not None:
                        await self._note(connection, records)
                    handle = self._handle_one_by_one if one_by_one else self._handler
                    bad = await handle(connection, records)
                    for partition, found in by_partition.items():
                        mine = [one for one in bad if (one[0].topic, one[0].partition) == tuple(partition)]
                        runs[partition] = await self._dead_letters.bury(
                            self._topics[partition.topic], found, mine, in_a_row=self._unreadable_in_a_row[partition]
                        )
                        await self._move(connection, partition, ends[partition], runs[partition])
                break
            except Fenced:
                log.warning("fenced: another process stored these records")
                await self._changed()
                self._positions.update(await self._load_positions(list(ends)))
                self._seek({partition: self._positions[partition] for partition in ends})
                return False
            except TimeoutError as error:
                log.warning("store took too long, trying half of it", error=repr(error), records=len(records))
                self._attempts.ended()
                await self._changed()
                half = len(records) // 2
                if half:
                    return await self._store(records[:half]) and await self._store(records[half:])
                await asyncio.sleep(RETRY_DELAY_S_MAX)
            except REFUSED as error:
                if one_by_one:
                    raise  # what is refused is not of one record
                log.warning("the database refuses a record, looking which", error=repr(error))
                self._attempts.ended()
                one_by_one = True
                await self._changed()
            except (*AWAY, asyncpg.DeadlockDetectedError, asyncpg.SerializationError, TryAgain) as error:
                # The outcome of a COMMIT may be open: the position in the database tells, and the fence refuses a repeat.
                log.warning("store failed, trying again", error=repr(error), delay_s=delay_s)
                self._attempts.ended()
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_DELAY_S_MAX)
                await self._changed()
        self._positions.update(ends)
        self._unreadable_in_a_row.update(runs)
        for partition, found in by_partition.items():
            consumed_total.labels(self._topics[partition.topic], self._group_label).inc(len(found))
        self._last_progress = time.monotonic()
        self._attempts.ended()
        return True

    async def _handle_one_by_one(
        self, connection: Connection, records: Sequence[ConsumerRecord]
    ) -> Sequence[tuple[ConsumerRecord, str]]:
        bad: list[tuple[ConsumerRecord, str]] = []
        for record in records:
            try:
                async with connection.transaction():
                    bad += await self._handler(connection, [record])
            except REFUSED as error:
                bad.append((record, f"REFUSED_BY_DATABASE: {error}"[:REASON_LENGTH_MAX]))
                await self._changed()
        return bad

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Connection]:
        """Raises TryAgain where none is to be had: that is no store that took too long."""
        try:
            connection = await self._pool.acquire(timeout=10)
        except TimeoutError as error:
            raise TryAgain("No connection to the database was to be had.") from error
        try:
            yield connection
        finally:
            await self._pool.release(connection)

    async def _changed(self) -> None:
        if self._on_change is not None:
            await self._on_change()

    async def _move(self, connection: Connection, partition: TopicPartition, end: int, run: int) -> None:
        expected = self._positions[partition]
        moved = await connection.fetchval(
            "UPDATE position SET next_offset = $4, unreadable_in_a_row = $5 "
            "WHERE topic = $1 AND partition = $2 AND next_offset = $3 RETURNING 1",
            *(partition.topic, partition.partition, expected, end, run),
        )
        if moved is None:
            raise Fenced(f"{partition} is not at {expected} any more")

    async def _ask_topic_ids(self, names: Collection[str]) -> Mapping[str, str]:
        while True:
            try:
                return await topic_ids(self._cluster, names) if names else {}
            except (KafkaError, OSError) as error:
                log.warning("no broker tells the ids of topics yet", error=repr(error))
                await asyncio.sleep(1)

    async def _load_positions(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        assert self._consumer is not None
        delay_s = 0.1
        while True:
            try:
                async with self._pool.acquire(timeout=10) as connection:
                    loaded = await load_positions(
                        connection,
                        partitions,
                        topic_ids=self._topic_ids,
                        first_offsets=self._consumer.beginning_offsets,
                    )
                break
            except (*AWAY, KafkaError) as error:
                log.warning("positions cannot be loaded yet", error=repr(error))
                self._attempts.ended()
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_DELAY_S_MAX)
        self._unreadable_in_a_row.update({at: position.unreadable_in_a_row for at, position in loaded.items()})
        return {at: position.next_offset for at, position in loaded.items()}

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
