"""Events leave with the change that caused them: written in its transaction, published afterwards, at least once."""

import asyncio
import time
from collections.abc import Sequence

import asyncpg
from prometheus_client import Counter, Gauge

from services.common import tracing
from services.common.database import AWAY, Connection, Pool
from services.common.errors import TooLarge, TryAgain
from services.common.kafka import REQUEST_BYTES_MAX, Message, Publisher
from services.common.logs import current_correlation_id, get_logger

log = get_logger(__name__)

BATCH_MAX = 500
# Of events in a batch: a process must hold them, and the brokers take them within the publisher's limit of time.
BATCH_BYTES_MAX = REQUEST_BYTES_MAX
# What the brokers take, less the key, headers and frame of a record.
EVENT_BYTES_MAX = REQUEST_BYTES_MAX - 64 * 1024
POLL_INTERVAL_S = 0.25
RETRY_DELAY_S = 1.0
MEASURE_INTERVAL_S = 5.0
COUNTED_MAX = 10_000

# Events that left.
published_total = Counter("smdih_outbox_published_total", "Events published from the outbox", ["schema", "topic"])
# Those that have not left: how many (counted to COUNTED_MAX) and how old the oldest is.
events_waiting = Gauge("smdih_outbox_events", "In the database: events that wait to be published", ["schema"])
oldest_seconds = Gauge("smdih_outbox_oldest_seconds", "In the database: age of the oldest waiting event", ["schema"])


async def write(connection: Connection, topic: str, *, key: str, value: bytes | None) -> None:
    """Put an event into the outbox, in the caller's transaction. Consumers keep the event's own id: it may arrive twice.

    Raises TooLarge for one that no broker would take, and that everything behind it would wait for.
    """
    await write_all(connection, topic, [(key, value)])


async def write_all(connection: Connection, topic: str, events: Sequence[tuple[str, bytes | None]]) -> None:
    """The same for several events, each with its key, in one round trip; they leave in this order."""
    if any(value is not None and len(value) > EVENT_BYTES_MAX for _, value in events):
        raise TooLarge(
            f"What this changes is more than {EVENT_BYTES_MAX} bytes to tell; change less of it, or split it."
        )
    correlation_id = current_correlation_id()
    await connection.execute(
        "INSERT INTO outbox (topic, key, value, correlation_id, traceparent) "
        "SELECT $1, key, value, $2, $5 FROM unnest($3::bytea[], $4::bytea[]) WITH ORDINALITY AS event (key, value, number) "
        "ORDER BY number",
        topic,
        correlation_id,
        [key.encode() for key, _ in events],
        [value for _, value in events],
        tracing.traceparent(correlation_id),
    )


def _together(rows: Sequence[asyncpg.Record]) -> int:
    """How many of these may be published together: one that the brokers might refuse goes alone, and holds up none before it."""
    large = (number for number, row in enumerate(rows) if len(row["value"] or b"") > EVENT_BYTES_MAX)
    return max(1, next(large, len(rows)))


class OutboxRelay:
    """Publishes what stands in the outbox of one schema, in order, one relay at a time."""

    def __init__(self, pool: Pool, publisher: Publisher, *, schema: str) -> None:
        self._pool = pool
        self._publisher = publisher
        self._schema = schema
        self._lock_name = f"smdih-outbox-{schema}"
        self._kicked = asyncio.Event()
        self._measure_due_s = 0.0

    def kick(self) -> None:
        """Look now rather than at the next poll; call it after a commit that wrote events."""
        self._kicked.set()

    async def run(self) -> None:
        while True:
            try:
                await self._measure()
                while await self._relay_some():
                    await self._measure()
            except (*AWAY, asyncpg.PostgresError, TryAgain, TooLarge) as error:
                log.warning("outbox waits", schema=self._schema, error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
            try:
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await self._kicked.wait()
            except TimeoutError:
                pass
            self._kicked.clear()

    async def _measure(self) -> None:
        if time.monotonic() < self._measure_due_s:
            return
        self._measure_due_s = time.monotonic() + MEASURE_INTERVAL_S
        async with self._pool.acquire(timeout=10) as connection:
            row = await connection.fetchrow(
                "SELECT (SELECT count(*) FROM (SELECT FROM outbox LIMIT $1) AS waiting) AS events, coalesce("
                "(SELECT extract(epoch FROM clock_timestamp() - created) FROM outbox ORDER BY id LIMIT 1), 0)::float8 AS oldest",
                COUNTED_MAX,
            )
        assert row is not None
        events_waiting.labels(self._schema).set(row["events"])
        oldest_seconds.labels(self._schema).set(max(0.0, row["oldest"]))

    async def _relay_some(self) -> bool:
        """Publish the oldest; tells whether there may be more."""
        async with self._pool.acquire(timeout=10) as connection, connection.transaction():
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock(hashtext($1))", self._lock_name):
                return False
            rows = await connection.fetch(
                "SELECT id, topic, key, value, correlation_id, traceparent, waiting FROM ("
                "SELECT id, topic, key, value, correlation_id, traceparent, count(*) OVER () AS waiting, min(id) OVER () AS first, "
                "coalesce(sum(octet_length(value)) OVER (ORDER BY id), 0) AS bytes "
                "FROM (SELECT id, topic, key, value, correlation_id, traceparent FROM outbox ORDER BY id LIMIT $1) AS oldest"
                # The first in any case: what is too large for the broker must be told by somebody.
                ") AS summed WHERE bytes <= $2 OR id = first ORDER BY id",
                BATCH_MAX,
                BATCH_BYTES_MAX,
            )
            if not rows:
                return False
            rows = rows[: _together(rows)]
            await self._publish(
                [
                    Message(
                        row["topic"],
                        row["value"],
                        row["key"],
                        headers=(
                            ("correlation_id", row["correlation_id"].encode()),
                            *tracing.record_headers(row["traceparent"]),
                        ),
                    )
                    for row in rows
                ]
            )
            await connection.execute("DELETE FROM outbox WHERE id = ANY($1::bigint[])", [row["id"] for row in rows])
        for row in rows:
            published_total.labels(self._schema, row["topic"]).inc()
        return len(rows) < rows[0]["waiting"] or len(rows) == BATCH_MAX

    async def _publish(self, messages: Sequence[Message]) -> None:
        """Together, in order. If one fails all are sent again in order, so a later event never has the last word.

        Nothing is on its way any more when this ends, not even when it is cancelled: the relay of another process takes the lock
        the moment it is free.
        """
        publishing = asyncio.create_task(self._publisher.publish_all(messages))
        try:
            await asyncio.shield(publishing)
        finally:
            await asyncio.gather(publishing, return_exceptions=True)
