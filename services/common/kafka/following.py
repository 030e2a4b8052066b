"""A compacted topic as a copy in memory."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Generic, TypeVar

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from services.common.kafka.cluster import Cluster, stop_consumer
from services.common.logs import get_logger

log = get_logger(__name__)

POLL_TIMEOUT_MS = 500
# A broker that says nothing for so long is not waited for.
REQUEST_TIMEOUT_MS = 10_000
RETRY_DELAY_S = 1.0
# No broker has answered for so long: the connection is made anew, whatever the client library waits for.
SILENCE_S_MAX = 60.0

T = TypeVar("T")


class Followed(Generic[T]):
    """What the one partition of a compacted topic tells, as last published.

    `empty` makes a T that knows nothing, `apply` takes a record into it.
    """

    def __init__(
        self,
        cluster: Cluster,
        topic: str,
        *,
        empty: Callable[[], T],
        apply: Callable[[T, ConsumerRecord], None],
    ) -> None:
        self._cluster = cluster
        self._topic = topic
        self._empty = empty
        self._apply = apply
        self.known = empty()
        # Everything that stood in the topic at the start has been read.
        self.caught_up = asyncio.Event()
        # The offset behind the newest record that is known.
        self._read_to = 0
        self._fresh_at = time.monotonic()
        self._changed = asyncio.Condition()

    @property
    def age_s(self) -> float:
        """For so long a record may stand in the topic and not be known: since a broker last said that there is none more."""
        return time.monotonic() - self._fresh_at

    async def wait_for(self, condition: Callable[[], bool], *, timeout_s: float) -> bool:
        """Wait until what is known is so; False when that takes too long."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(condition)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        while True:
            try:
                async with asyncio.timeout(SILENCE_S_MAX) as patience:
                    await self._follow(patience)
            except (KafkaError, OSError) as error:
                log.warning("a topic cannot be read now", topic=self._topic, error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)

    async def _follow(self, patience: asyncio.Timeout) -> None:
        """Read the topic from its beginning to its end, take that in place of what was known, and take in what comes.

        What was known stands meanwhile: record by record, a key that was revoked would be valid again until its end is read.
        """
        partition = TopicPartition(self._cluster.name(self._topic), 0)
        async with self._consumer() as consumer:
            consumer.assign([partition])
            await consumer.seek_to_beginning(partition)
            asked_at = time.monotonic()
            end = (await consumer.end_offsets([partition]))[partition]
            if end < self._read_to:
                raise KafkaError(f"{self._topic} ends at {end}, and was read to {self._read_to}: it lost records")
            fresh = self._empty()
            while await consumer.position(partition) < end:
                if await self._take_in(consumer, fresh):
                    _begin_anew(patience)
            self.known, self._read_to, self._fresh_at = fresh, end, asked_at
            self.caught_up.set()
            log.info("topic read", topic=self._topic, end=end)
            # A poll without records does not show that the broker is there; the library notes when it answered last. An answer was
            # asked for after the one before it had come, and that had not been there when it was looked for last.
            answer, looked_at = consumer.last_poll_timestamp(partition), time.monotonic()
            answered_at = seen_at = asked_at
            while True:
                async with self._changed:
                    self._changed.notify_all()
                await self._take_in(consumer, fresh)
                self._read_to = await consumer.position(partition)
                if consumer.last_poll_timestamp(partition) != answer:
                    answer = consumer.last_poll_timestamp(partition)
                    answered_at, seen_at = seen_at, looked_at
                    _begin_anew(patience)
                if self._read_to >= (consumer.highwater(partition) or 0):
                    self._fresh_at = answered_at
                looked_at = time.monotonic()

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            **self._cluster.client(),
            group_id=None,
            enable_auto_commit=False,
            # Records that are not where they were are read from the beginning too.
            auto_offset_reset="none",
            # The broker answers as soon as there is a change: new keys and machines are known within milliseconds.
            fetch_max_wait_ms=POLL_TIMEOUT_MS,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await stop_consumer(consumer)

    async def _take_in(self, consumer: AIOKafkaConsumer, known: T) -> bool:
        """Whether there was any record."""
        found = await consumer.getmany(timeout_ms=POLL_TIMEOUT_MS)
        for records in found.values():
            for record in records:
                self._apply(known, record)
        return bool(found)


def _begin_anew(patience: asyncio.Timeout) -> None:
    patience.reschedule(asyncio.get_running_loop().time() + SILENCE_S_MAX)
