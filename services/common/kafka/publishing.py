"""Publishing durably."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    MessageSizeTooLargeError,
    ProducerClosed,
)
from prometheus_client import Counter

from services.common.errors import TooLarge, TryAgain
from services.common.kafka.cluster import REQUEST_BYTES_MAX, Cluster
from services.common.logs import get_logger

log = get_logger(__name__)

PUBLISH_TIMEOUT_S = 10
RETRY_AFTER_S = 3
# What is on its way when a process stops may take so long; then it is given up.
FLUSH_TIMEOUT_S = 5
CLOSE_TIMEOUT_S = 1

# Records that the brokers hold now, and publishes that were not acknowledged in time.
published_total = Counter("smdih_kafka_published_total", "Records published", ["topic"])
publish_failures_total = Counter("smdih_kafka_publish_failures_total", "Publishes that were not acknowledged")


@dataclass(frozen=True)
class Message:
    """A record to publish. A value of None is a tombstone; a partition of None is found from the key."""

    topic: str
    value: bytes | None
    key: bytes | None = None
    partition: int | None = None
    headers: tuple[tuple[str, bytes], ...] = ()


class Publisher:
    """Publishes records; returns only when every in-sync replica holds them. It connects when it is first asked for something.

    What was given up is not sent any more: when `publish_all` has raised, nothing of it leaves this process later.
    """

    def __init__(self, cluster: Cluster, *, timeout_s: float = PUBLISH_TIMEOUT_S) -> None:
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._producer: _Producer | None = None
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._producer is not None:
            try:
                async with asyncio.timeout(FLUSH_TIMEOUT_S):
                    await self._producer.stop()
            except (KafkaError, OSError, TimeoutError) as failed:
                log.warning("not everything was published before the stop", error=repr(failed))
                await self._producer.abort()

    async def partitions(self, topic: str) -> int:
        """How many partitions the topic has. Raises TryAgain when no broker answers."""
        producer = await self._started()
        try:
            async with asyncio.timeout(self._timeout_s):
                return len(await producer.partitions_for(self._cluster.name(topic)))
        except (KafkaError, OSError, TimeoutError) as error:
            raise self._away() from error

    async def partitions_when_it_answers(self, topic: str) -> int:
        """The same for the start of a process, which may come before its brokers: it waits for them."""
        while True:
            try:
                return await self.partitions(topic)
            except TryAgain as error:
                log.warning("no broker answers yet", topic=topic)
                await asyncio.sleep(error.retry_after_s or RETRY_AFTER_S)

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

        Raises TryAgain when it was not acknowledged in time. It may have arrived all the same: what is sent again must carry the
        id by which a repeat is recognised.
        """
        (offset,) = await self.publish_all([Message(topic, value, key, partition, tuple(headers))])
        return offset

    async def publish_all(self, messages: Sequence[Message]) -> list[int]:
        """Publish records together and return their offsets; on each partition they stand in the order given.

        Raises as `publish` does; then some may have arrived, and all are to be sent again, in the same order.
        """
        producer = await self._started()
        try:
            async with asyncio.timeout(self._timeout_s):
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
                offsets = [int(stored.offset) for stored in await asyncio.gather(*sent)]
        except MessageSizeTooLargeError as error:
            raise TooLarge() from error
        except (KafkaError, OSError, TimeoutError) as error:
            publish_failures_total.inc()
            log.warning("publish failed", topics=sorted({message.topic for message in messages}), error=repr(error))
            # After an error that leaves the outcome open only a new producer has a sequence that the broker will accept for sure.
            if self._producer is producer:
                self._producer = None
            await producer.abort()
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

    async def _started(self) -> "_Producer":
        async with self._starting:
            if self._producer is None:
                producer = _Producer(
                    **self._cluster.client(),
                    acks="all",
                    enable_idempotence=True,
                    max_request_size=REQUEST_BYTES_MAX,
                    max_batch_size=REQUEST_BYTES_MAX,
                    request_timeout_ms=PUBLISH_TIMEOUT_S * 1000,
                )
                try:
                    async with asyncio.timeout(self._timeout_s):
                        await producer.start()
                except BaseException as error:
                    await producer.abort()
                    if isinstance(error, (KafkaError, OSError, TimeoutError)):
                        raise self._away() from error
                    raise
                self._producer = producer
            return self._producer


class _Producer(AIOKafkaProducer):  # type: ignore[misc]  # untyped base
    """One that can be ended at once.

    The library's `stop` waits until everything is sent, for ever where brokers refuse it; cancelled, it leaves tasks behind that
    connect anew and go on sending.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._requests: set[asyncio.Task[Any]] = set()
        self._aborted = False
        self._send_request = self._sender._send_produce_req
        self._sender._send_produce_req = self._send_noted

    async def _send_noted(self, node_id: int, batches: Mapping[Any, Any]) -> None:
        task = asyncio.current_task()
        if task is None or self._aborted:
            return
        self._requests.add(task)
        try:
            await self._send_request(node_id, batches)
        finally:
            self._requests.discard(task)

    async def abort(self) -> None:
        """Send nothing more, from now on; what waits fails with ProducerClosed."""
        self._aborted = self._closed = True
        sending = {*self._requests, *filter(None, [self._sender.sender_task])}
        for task in sending:
            task.cancel()
        if sending:
            await asyncio.wait(sending, timeout=CLOSE_TIMEOUT_S)
        waiting = self._message_accumulator
        # Batches that are not on their way: as if they were, which is how the library expects them to end.
        for batch in [batch for batches in waiting._batches.values() for batch in batches]:
            batch.drain_ready()
            waiting._pending_batches.add(batch)
        waiting.fail_all(ProducerClosed())
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.client.close()
        except (KafkaError, OSError, TimeoutError) as error:
            log.info("connections were not closed in time", error=repr(error))
