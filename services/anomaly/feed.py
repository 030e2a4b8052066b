"""Alarm changes as they are published, for those who watch."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from google.protobuf.message import DecodeError

from services.anomaly.service import AlarmFeed, Place
from services.common import topics
from services.common.errors import NotFound
from services.common.kafka import Cluster, stop_consumer
from services.common.logs import get_logger
from smdih.anomaly.v1 import events_pb2 as events_pb

log = get_logger(__name__)

FEED_POLL_MS = 500
FEED_RETRY_DELAY_S = 1.0


class AlarmFeedConsumer:
    """Reads alarm changes as they are published, from now on, and passes them to the feed. In no group: every process reads all."""

    def __init__(self, cluster: Cluster, feed: AlarmFeed) -> None:
        self._cluster = cluster
        self._feed = feed
        self._positions: dict[TopicPartition, int] = {}
        self._reading = False

    async def run(self) -> None:
        while True:
            try:
                await self._follow()
            except (KafkaError, OSError) as error:
                log.warning("alarm changes cannot be read", error=repr(error))
            self._reading = False
            await asyncio.sleep(FEED_RETRY_DELAY_S)

    async def is_reading(self) -> bool:
        return self._reading

    async def _follow(self) -> None:
        async with _alarm_consumer(self._cluster) as (consumer, partitions):
            ends = await consumer.end_offsets(partitions)
            for partition in partitions:
                # After a lost connection: from where we were, not from the end.
                consumer.seek(partition, self._positions.setdefault(partition, ends[partition]))
            self._feed.stand(self._place())
            self._reading = bool(partitions)
            while self._reading:
                for partition, records in (await consumer.getmany(timeout_ms=FEED_POLL_MS)).items():
                    for record in records:
                        self._positions[partition] = record.offset + 1
                        event = _alarm_event(record)
                        if event is not None:
                            self._feed.tell(event, self._place())

    def _place(self) -> Place:
        return tuple(offset for _, offset in sorted(self._positions.items()))


class AlarmRecall:
    """Reads alarm changes of before from the topic, for those who watched and come back."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def between(self, start: Place, end: Place) -> AsyncIterator[tuple[events_pb.AlarmEvent, Place]]:
        async with _alarm_consumer(self._cluster) as (consumer, partitions):
            firsts = await consumer.beginning_offsets(partitions)
            if any(at < firsts[partition] for partition, at in zip(partitions, start, strict=True)):
                raise NotFound("Changes of so long ago are not kept; list the alarms, then watch without resume_token.")
            place = list(start)
            for number, partition in enumerate(partitions):
                consumer.seek(partition, start[number])
                if start[number] >= end[number]:
                    consumer.pause(partition)
            while any(at < to for at, to in zip(place, end, strict=True)):
                for partition, records in (await consumer.getmany(timeout_ms=FEED_POLL_MS)).items():
                    number = partitions.index(partition)
                    for record in records:
                        if place[number] >= end[number]:
                            break
                        place[number] = record.offset + 1
                        event = _alarm_event(record)
                        if event is not None:
                            yield event, tuple(place)


@asynccontextmanager
async def _alarm_consumer(cluster: Cluster) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """A consumer in no group with all partitions of the alarm topic, in order."""
    topic = cluster.name(topics.ALARMS)
    consumer = AIOKafkaConsumer(
        **cluster.client(),
        group_id=None,
        enable_auto_commit=False,
        auto_offset_reset="latest",
        fetch_max_wait_ms=FEED_POLL_MS,
    )
    await consumer.start()
    try:
        await consumer._client.force_metadata_update()
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        yield consumer, partitions
    finally:
        await stop_consumer(consumer)


def _alarm_event(record: Any) -> events_pb.AlarmEvent | None:
    try:
        return events_pb.AlarmEvent.FromString(record.value or b"")
    except DecodeError:
        log.error("alarm event unreadable", offset=record.offset)
        return None
