"""How far topics go."""

import asyncio

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import (
    KafkaError,
)

from services.common.kafka.cluster import Cluster, stop_consumer
from services.common.logs import get_logger

log = get_logger(__name__)


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
                        await stop_consumer(consumer)
                        raise
                    self._consumer = consumer
                end: int = (await self._consumer.end_offsets([where]))[where]
                return end
        except (KafkaError, OSError, TimeoutError) as error:
            log.info("no end of the partition", topic=topic, partition=partition, error=repr(error))
            return None

    async def close(self) -> None:
        if self._consumer is not None:
            await stop_consumer(self._consumer)
