"""Records that cannot be read."""

from collections.abc import Sequence
from typing import Any

from prometheus_client import Counter

from services.common import topics
from services.common.kafka.publishing import Publisher
from services.common.logs import get_logger

log = get_logger(__name__)

DEAD_LETTERS_IN_A_ROW_MAX = 100

# Records that a consumer could not read, by topic; each stands in the topic's dead letters.
dead_letters_total = Counter("smdih_kafka_dead_letters_total", "Records put into dead letters", ["topic"])


class Poison(Exception):
    """A record that cannot be read; it goes to the dead letters."""


class TooManyDeadLetters(Exception):
    """So many unreadable records in a row mean a bad release, not bad records: stop rather than empty the topic."""


class DeadLetters:
    """Takes the records that a consumer could not read, durably, and stops the consumer at a run of them.

    The length of the run is stored with the position: a consumer that is started again and again does not empty the topic
    bit by bit.
    """

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def answers(self) -> bool:
        """A broker answers."""
        return await self._publisher.answers()

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
