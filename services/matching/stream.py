"""Raised alarms into needs."""

from collections.abc import Sequence

from aiokafka import ConsumerRecord

from services.common import topics
from services.common.database import Connection, Pool
from services.common.kafka import Cluster, PositionedConsumer, Publisher
from services.matching.alarms import Alarm
from services.matching.messages import raised_alarm
from services.matching.service import Matching

GROUP = "smdih.matching.needs"
# Each may be ranked (10 to 30 ms) inside the transaction, which should stay short.
RECORDS_MAX = 50


def alarm_consumer(cluster: Cluster, pool: Pool, publisher: Publisher, matching: Matching) -> PositionedConsumer:
    async def take(connection: Connection, records: Sequence[ConsumerRecord]) -> Sequence[tuple[ConsumerRecord, str]]:
        alarms: list[Alarm] = []
        bad: list[tuple[ConsumerRecord, str]] = []
        for record in records:
            try:
                alarm = raised_alarm(record.value)
            except ValueError as error:
                bad.append((record, str(error)))
                continue
            if alarm is not None:
                alarms.append(alarm)
        await matching.needs.take_alarms(connection, alarms)
        return bad

    return PositionedConsumer(
        cluster,
        pool,
        publisher,
        topic_names=[topics.ALARMS],
        group=GROUP,
        handler=take,
        records_max=RECORDS_MAX,
    )
