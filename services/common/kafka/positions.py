"""Where a consumer goes on, as the database has it."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

from aiokafka import TopicPartition

from services.common.database import Connection
from services.common.logs import get_logger

log = get_logger(__name__)

FirstOffsets = Callable[[Collection[TopicPartition]], Awaitable[Mapping[TopicPartition, int]]]


class MadeAnew(Exception):
    """A topic is not the one that the stored positions are of: going on at them would skip what stands before them."""


@dataclass(frozen=True)
class Position:
    """The offset to go on from, and how many records directly before it could not be read."""

    next_offset: int
    unreadable_in_a_row: int


async def load_positions(
    connection: Connection,
    partitions: Collection[TopicPartition],
    *,
    topic_ids: Mapping[str, str],
    first_offsets: FirstOffsets,
) -> dict[TopicPartition, Position]:
    """The stored positions; where there is none yet, that of the first record that the topic still has, which is stored.

    Raises MadeAnew, and what `first_offsets` raises.
    """
    known = await connection.fetch(
        "SELECT topic, partition FROM position WHERE topic = ANY($1::text[])",
        [partition.topic for partition in partitions],
    )
    begun = {TopicPartition(row["topic"], row["partition"]) for row in known}
    new = [partition for partition in partitions if partition not in begun]
    firsts = await first_offsets(new) if new else {}
    loaded: dict[TopicPartition, Position] = {}
    for partition in partitions:
        topic_id, first = topic_ids[partition.topic], firsts.get(partition, 0)
        row = await connection.fetchrow(
            "INSERT INTO position AS p (topic, partition, next_offset, topic_id) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT (topic, partition) DO UPDATE "
            "SET topic_id = CASE WHEN p.topic_id = '' OR p.next_offset = 0 THEN excluded.topic_id ELSE p.topic_id END "
            "RETURNING next_offset, unreadable_in_a_row, topic_id",
            *(partition.topic, partition.partition, first, topic_id),
        )
        assert row is not None
        if row["topic_id"] != topic_id:
            raise MadeAnew(
                f"{partition.topic} is not the topic that was taken in up to {row['next_offset']}: it was deleted and made again. "
                "Stop the hub and run python -m services.reconcile after-kafka-loss."
            )
        if first:
            log.warning(
                "beginning behind records that were deleted",
                topic=partition.topic,
                partition=partition.partition,
                records=first,
            )
        loaded[partition] = Position(row["next_offset"], row["unreadable_in_a_row"])
    return loaded
