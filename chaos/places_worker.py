"""One process that works through its share of a round: places reserved, confirmed, cancelled, expired, capacities changed, each
batch one transaction.

    python -m chaos.places_worker DSN SEED WORKER OPERATIONS QUARTER FIRST_BATCH

It prints a JSON line after each batch that was committed. Killed and started again with the first batch that it has not
told of, it repeats what may have been committed already.
"""

import asyncio
import functools
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import asyncpg

from services.common import logs
from services.common.database import AWAY, Connection, Pool, create_pool_when_it_answers
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store.places import Ask, Why

WORKERS = 3
PROVIDERS = 400
CAPACITY_MAX = 20
BATCH = 100
# Providers whose capacity is changed in one batch.
CAPACITIES = 10
BATCHES_AT_ONCE = 4
# One transaction of many is tried again so often before the round counts as broken.
ATTEMPTS_MAX = 100
LATER = datetime(2100, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Batch:
    kind: str
    # Of places; of a capacity batch "provider=capacity".
    ids: tuple[str, ...]


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
    """What a worker does in a round. All workers share one set of ids, so the same place is worked on from several sides."""
    rng = random.Random(f"{seed}/{worker}")
    ids = [f"{seed}-{number}" for number in range(operations * WORKERS // 3)]
    batches: list[Batch] = []
    while sum(len(batch.ids) for batch in batches) < operations:
        if batches and rng.random() < 0.1:
            batches.append(rng.choice(batches))  # a repeat, word for word
            continue
        # The newest ids are asked for, those before are confirmed and cancelled.
        reach = min(len(ids), (len(batches) + 2) * BATCH * WORKERS // 2)
        kind = rng.choices(["reserve", "confirm", "cancel", "expire", "capacity"], [48, 19, 19, 9, 5])[0]
        if kind == "capacity":
            numbers = sorted(rng.sample(range(PROVIDERS), CAPACITIES))
            changes = tuple(f"{provider_id(number)}={rng.randint(1, CAPACITY_MAX)}" for number in numbers)
            batches.append(Batch(kind, changes))
            continue
        low = max(0, reach - 10 * BATCH) if kind == "reserve" else max(0, reach - 30 * BATCH)
        batches.append(Batch(kind, tuple(rng.sample(ids[low:reach], min(BATCH, reach - low)))))
    return batches


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


@asynccontextmanager
async def connected(pool: Pool) -> AsyncIterator[Connection]:
    async with pool.acquire(timeout=10) as connection, connection.transaction():
        yield connection


async def work(pool: Pool, batch: Batch, quarter: date) -> tuple[Any, int]:
    """The answer, and how often it was tried: a connection that dies in COMMIT leaves the outcome open, so it is repeated."""
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            async with connected(pool) as connection:
                return await perform(connection, batch, quarter), attempt
        except (*AWAY, asyncpg.DeadlockDetectedError):
            await pool.expire_connections()
            await asyncio.sleep(0.05 * min(attempt, 20))
    raise TimeoutError(f"{batch.kind}: not done in {ATTEMPTS_MAX} attempts")


async def tell_batches(first: int, works: Sequence[Callable[[], Awaitable[tuple[Any, int]]]]) -> None:
    """Do them from the first on, BATCHES_AT_ONCE at a time, and tell of them once they are done."""
    for start in range(first, len(works), BATCHES_AT_ONCE):
        answers = await asyncio.gather(*(work() for work in works[start : start + BATCHES_AT_ONCE]))
        told = [
            {"batch": start + number, "answer": answer, "attempts": attempts}
            for number, (answer, attempts) in enumerate(answers)
        ]
        print(json.dumps(told), flush=True)


async def main() -> None:
    dsn, seed, worker, operations, quarter, first = sys.argv[1:]
    logs.configure("chaos", "ERROR")
    pool = await create_pool_when_it_answers(dsn, schema="matching", size_max=BATCHES_AT_ONCE)
    day = date.fromisoformat(quarter)
    batches = plan(int(seed), int(worker), int(operations))
    await tell_batches(int(first), [functools.partial(work, pool, batch, day) for batch in batches])
    await pool.close()


if __name__ == "__main__":
    asyncio.run(main())
