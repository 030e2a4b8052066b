"""Events leave with the change that caused them: written in its transaction, published afterwards, at least once."""

import asyncio
from collections.abc import Sequence

import asyncpg

from services.common.database import AWAY, Connection, Pool
from services.common.errors import TryAgain
from services.common.kafka import Publisher
from services.common.logs import current_correlation_id, get_logger

log = get_logger(__name__)

BATCH_MAX = 500
POLL_INTERVAL_S = 0.25
RETRY_DELAY_S = 1.0


async def write(connection: Connection, topic: str, *, key: str, value: bytes | None) -> None:
    """Put an event into the outbox, in the caller's transaction. Consumers keep the event's own id: it may arrive twice."""
    await write_all(connection, topic, [(key, value)])


async def write_all(connection: Connection, topic: str, events: Sequence[tuple[str, bytes | None]]) -> None:
    """The same for several events, each with its key, in one round trip; they leave in this order."""
    await connection.execute(
        "INSERT INTO outbox (topic, key, value, correlation_id) "
        "SELECT $1, key, value, $2 FROM unnest($3::bytea[], $4::bytea[]) WITH ORDINALITY AS event (key, value, number) "
        "ORDER BY number",
        topic,
        current_correlation_id(),
        [key.encode() for key, _ in events],
        [value for _, value in events],
    )


class OutboxRelay:
    """Publishes what stands in the outbox of one schema, in order, one relay at a time."""

    def __init__(self, pool: Pool, publisher: Publisher, *, schema: str) -> None:
        self._pool = pool
        self._publisher = publisher
        self._lock_name = f"smdih-outbox-{schema}"
        self._kicked = asyncio.Event()

    def kick(self) -> None:
        """Look now rather than at the next poll; call it after a commit that wrote events."""
        self._kicked.set()

    async def run(self) -> None:
        while True:
            try:
                while await self._relay_some() == BATCH_MAX:
                    pass
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("outbox waits", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
            try:
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await self._kicked.wait()
            except TimeoutError:
                pass
            self._kicked.clear()

    async def _relay_some(self) -> int:
        async with self._pool.acquire(timeout=10) as connection, connection.transaction():
            if not await connection.fetchval("SELECT pg_try_advisory_xact_lock(hashtext($1))", self._lock_name):
                return 0
            rows = await connection.fetch(
                "SELECT id, topic, key, value, correlation_id FROM outbox ORDER BY id LIMIT $1", BATCH_MAX
            )
            # One after the other: a later event never overtakes an earlier one that failed.
            for row in rows:
                await self._publisher.publish(
                    row["topic"],
                    row["value"],
                    key=row["key"],
                    headers=[("correlation_id", row["correlation_id"].encode())],
                )
            if rows:
                await connection.execute("DELETE FROM outbox WHERE id = ANY($1::bigint[])", [row["id"] for row in rows])
            return len(rows)
