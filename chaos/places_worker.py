"""One process that works through its share of a round: places reserved, confirmed, cancelled, expired, capacities changed, each
batch one transaction.

    python -m chaos.places_worker DSN SEED WORKER OPERATIONS QUARTER FIRST_BATCH
"""

import asyncio
import functools
import random
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

from chaos import batches
from chaos.batches import Batch
from services.common import logs
from services.common.database import AWAY, Connection, Pool, create_pool_when_it_answers
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store.places import Ask, Why

PROVIDERS = 400
CAPACITY_MAX = 20
BATCH = 100
# Providers whose capacity is changed in one batch.
CAPACITIES = 10
LATER = datetime(2100, 1, 1, tzinfo=UTC)


def provider_of(place_id: str) -> str:
    """Each id always asks for the same provider; some providers are asked for much more often than others."""
    number = random.Random(place_id).random()
    return provider_id(int(PROVIDERS * number * number))


def provider_id(number: int) -> str:
    return f"chaos-{number:04d}"


def expires(place_id: str) -> datetime:
    """Two in five run out at once."""
    return LATER if int(place_id.rpartition("-")[2]) % 5 < 3 else LATER - timedelta(days=365 * 90)


def plan(seed: int, worker: int, operations: int) -> list[Batch]:
    weights = {"reserve": 48, "confirm": 19, "cancel": 19, "expire": 9, "capacity": 5}
    return batches.plan(seed, worker, operations, size=BATCH, weights=weights, change="capacity", changes=_capacities)


def _capacities(rng: random.Random) -> tuple[str, ...]:
    numbers = sorted(rng.sample(range(PROVIDERS), CAPACITIES))
    return tuple(f"{provider_id(number)}={rng.randint(1, CAPACITY_MAX)}" for number in numbers)


async def perform(connection: Connection, batch: Batch, quarter: date) -> Any:
    """In the caller's transaction, by the production store."""
    if batch.kind == "reserve":
        asks = [Ask(each, provider_of(each), quarter, expires(each)) for each in batch.ids]
        return await places_store.reserve(connection, asks)
    if batch.kind == "confirm":
        return sorted(await places_store.confirm(connection, batch.ids))
    if batch.kind == "capacity":
        return [await set_capacity(connection, *each.split("="), quarter=quarter) for each in batch.ids]
    if batch.kind == "cancel":
        return sorted(await places_store.release(connection, batch.ids, Why.CANCELLED))
    due = await places_store.due(connection, now=datetime.now(UTC), limit=BATCH)
    return sorted(await places_store.release(connection, due, Why.EXPIRED))


async def set_capacity(connection: Connection, provider: str, capacity: str, *, quarter: date) -> str:
    """As a partner that puts its provider anew."""
    change = await providers_store.next_provider_change(connection)
    before = await providers_store.lock_provider(connection, provider)
    assert before is not None, f"{provider} was put at the start"
    after = replace(before, capacity_per_quarter=int(capacity), change=change)
    await providers_store.put_provider(connection, after)
    await providers_store.set_quarter_capacities(connection, provider, int(capacity), since=quarter)
    return provider


async def work(pool: Pool, batch: Batch, quarter: date) -> Any:
    try:
        async with pool.acquire(timeout=10) as connection, connection.transaction():
            return await perform(connection, batch, quarter)
    except AWAY:
        await pool.expire_connections()
        raise


async def main() -> None:
    dsn, seed, worker, operations, quarter, first = sys.argv[1:]
    logs.configure("chaos", "ERROR")
    pool = await create_pool_when_it_answers(dsn, schema="matching", size_max=batches.BATCHES_AT_ONCE)
    day = date.fromisoformat(quarter)
    planned = plan(int(seed), int(worker), int(operations))
    await batches.tell_batches(int(first), [functools.partial(work, pool, batch, day) for batch in planned])
    await pool.close()


if __name__ == "__main__":
    asyncio.run(main())
