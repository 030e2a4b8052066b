"""Removes alarms that ended long ago, and tunings that nobody reads any more."""

import asyncio
from collections.abc import Awaitable, Callable

import asyncpg
from prometheus_client import Counter

from services.anomaly.domain import MICROSECONDS
from services.common.clock import Clock, from_us
from services.common.database import AWAY, Connection, Pool, transaction
from services.common.errors import TryAgain
from services.common.logs import get_logger

log = get_logger(__name__)

INTERVAL_S = 3600
RETRY_DELAY_S = 60
# Alarms, or tunings, in one transaction; and the pause before the next.
BATCH = 500
PAUSE_S = 0.2
_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('smdih-anomaly-retention'))"
# Deliveries that went out are kept for less, so they are gone before their alarm, but for those sent again late. An alarm on which
# something was taken off the list stays as long as that lasts.
_PARTS = ("delivery", "escalation_due", "rating", "alarm_change")
# Not the last word on its subject.
_SUPERSEDED = (
    "EXISTS (SELECT FROM tuning n WHERE n.machine_id = t.machine_id AND n.id > t.id AND n.kind = t.kind "
    "AND n.position IS NOT DISTINCT FROM t.position AND n.rule_id = t.rule_id)"
)

# Alarms that retention removed.
alarms_removed_total = Counter("smdih_anomaly_alarms_removed_total", "Alarms that retention removed")


class AlarmRetention:
    """Any number of processes may do this; one does at a time."""

    def __init__(self, pool: Pool, clock: Clock, *, kept_days: int, topic: str) -> None:
        self._pool = pool
        self._clock = clock
        self._kept_us = kept_days * 86_400 * MICROSECONDS
        self._topic = topic  # of the samples: what holds below its positions is never asked for again

    async def run(self) -> None:
        while True:
            try:
                await self.remove()
                await asyncio.sleep(INTERVAL_S)
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("retention of alarms waits", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)

    async def remove(self) -> None:
        """All that may go now, a batch at a time. Raises TryAgain."""
        before_us = self._clock.now_us() - self._kept_us
        alarms = await self._batches(self._remove_alarms, before_us)
        tunings = await self._batches(self._remove_tunings, before_us)
        if alarms or tunings:
            log.info("removed what ended long ago", alarms=alarms, tunings=tunings)

    async def _batches(self, remove: Callable[[Connection, int], Awaitable[int]], before_us: int) -> int:
        total, removed = 0, BATCH
        while removed == BATCH:
            async with transaction(self._pool) as connection:
                removed = await remove(connection, before_us) if await connection.fetchval(_LOCK) else 0
            total += removed
            await asyncio.sleep(PAUSE_S)
        return total

    async def _remove_alarms(self, connection: Connection, before_us: int) -> int:
        rows = await connection.fetch(
            "SELECT id FROM alarm a WHERE raised < $1 AND ended < $1 "
            "AND NOT EXISTS (SELECT FROM suppression WHERE alarm_id = a.id) ORDER BY raised LIMIT $2 FOR UPDATE SKIP LOCKED",
            from_us(before_us),
            BATCH,
        )
        ids = [row["id"] for row in rows]
        for table in _PARTS:
            await connection.execute(f"DELETE FROM {table} WHERE alarm_id = ANY($1::text[])", ids)  # noqa: S608  # of _PARTS
        await connection.execute("DELETE FROM alarm WHERE id = ANY($1::text[])", ids)
        alarms_removed_total.inc(len(ids))
        return len(ids)

    async def _remove_tunings(self, connection: Connection, before_us: int) -> int:
        # Of what holds below a partition's position, only the last word of each kind is ever read (HorizonStore.load).
        await connection.execute(
            "DELETE FROM tuning_start s USING (SELECT b.partition, b.tuning_id, t.kind, row_number() OVER ("
            "PARTITION BY b.partition, t.kind, t.machine_id, t.position, t.rule_id ORDER BY t.id DESC) AS newest "
            "FROM tuning_start b JOIN tuning t ON t.id = b.tuning_id JOIN position p ON p.topic = $1 AND p.partition = b.partition "
            "WHERE b.from_offset < p.next_offset) AS below "
            "WHERE s.partition = below.partition AND s.tuning_id = below.tuning_id "
            "AND (below.newest > 1 OR below.kind = 'relearn')",
            self._topic,
        )
        status = await connection.execute(
            f"DELETE FROM tuning WHERE id IN (SELECT id FROM tuning t WHERE made < $1 AND {_SUPERSEDED} "  # noqa: S608
            "AND NOT EXISTS (SELECT FROM tuning_start WHERE tuning_id = t.id) ORDER BY id LIMIT $2)",
            from_us(before_us),
            BATCH,
        )
        return int(status.rpartition(" ")[2])
