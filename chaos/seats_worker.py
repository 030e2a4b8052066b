"""One process that works through its share of a round: seats booked, confirmed, cancelled, expired, dates made larger and smaller.

    python -m chaos.seats_worker DSN SEED WORKER OPERATIONS FIRST_BATCH

By the production use cases, one transaction each.
"""

import asyncio
import functools
import random
import sys
from datetime import timedelta
from typing import Any

from chaos import batches
from chaos.batches import Batch
from services.common import logs
from services.common.clock import SystemClock, from_us
from services.common.database import Pool, create_pool_when_it_answers, transaction_for_all_firms
from services.common.errors import Conflict
from services.common.identity import Caller, Role
from services.common.kafka import Cluster, Publisher
from services.common.outbox import OutboxRelay
from services.matching.service.checks import Known
from services.matching.service.sessions import CONFIRM_WITHIN_MIN, Sessions
from services.matching.sessions import Session
from services.matching.store import sessions as sessions_store

PROVIDER = "chaos-workshop"
SESSIONS = 30
SEATS_MAX = 12
# Bookings that a batch books, confirms or cancels.
BATCH = 10
OPERATOR = Caller(credential_id=1, role=Role.OPERATOR)


class LaterClock(SystemClock):
    """By whose time every offered seat is to be confirmed by now."""

    def now_us(self) -> int:
        return super().now_us() + 2 * CONFIRM_WITHIN_MIN // timedelta(microseconds=1)


class AllKnown(Known):
    """Firms are numbers here."""

    def __init__(self) -> None:
        pass

    async def firm(self, firm_id: int) -> int:
        return firm_id


def sessions_by(pool: Pool, clock: SystemClock) -> Sessions:
    # Events stay in the outbox.
    relay = OutboxRelay(pool, Publisher(Cluster("", "")), schema="matching")
    return Sessions(pool, relay, AllKnown(), clock=clock)


def session(seed: int, number: int, seats: int) -> Session:
    # In a year's time, to the day of the seed: a repeat puts the same.
    starts = from_us(SystemClock().now_us() // 86_400_000_000 * 86_400_000_000) + timedelta(days=300)
    return Session(
        id=f"{seed}-{number}",
        provider_id=PROVIDER,
        title="Under fire",
        place="",
        starts=starts,
        ends=starts + timedelta(hours=6),
        seats=seats,
        confirm_within=CONFIRM_WITHIN_MIN,
    )


def session_of(request_id: str) -> str:
    """Each booking is at the same date always; some dates are asked for much more often than others."""
    number = random.Random(request_id).random()
    return f"{request_id.partition('-')[0]}-{int(SESSIONS * number * number)}"


def firm_of(request_id: str) -> int:
    return 1 + int(request_id.rpartition("-")[2])


def plan(seed: int, worker: int, operations: int) -> list[Batch]:
    weights = {"book": 50, "confirm": 20, "cancel": 20, "expire": 5, "seats": 5}
    return batches.plan(seed, worker, operations, size=BATCH, weights=weights, change="seats", changes=_seats)


def _seats(rng: random.Random) -> tuple[str, ...]:
    return (f"{rng.randrange(SESSIONS)}={rng.randint(1, SEATS_MAX)}",)


async def perform(pool: Pool, seed: int, batch: Batch) -> Any:
    """What became of each booking, by its request; each is a transaction of its own."""
    now, later = sessions_by(pool, SystemClock()), sessions_by(pool, LaterClock())
    if batch.kind == "expire":
        return {"expired": str(await later.expire_due_bookings())}
    if batch.kind == "seats":
        number, _, seats = batch.ids[0].partition("=")
        return {batch.ids[0]: await _answer(now.put_session(OPERATOR, session(seed, int(number), int(seats))))}
    return {each: await _one(pool, now, batch.kind, each) for each in batch.ids}


async def _one(pool: Pool, sessions: Sessions, kind: str, request_id: str) -> str:
    firm_id = firm_of(request_id)
    if kind == "book":
        return await _answer(
            sessions.book(OPERATOR, firm_id, session_of(request_id), match_id="", request_id=request_id)
        )
    async with transaction_for_all_firms(pool) as connection:
        booking = await sessions_store.booking_by_request(connection, firm_id, request_id)
    if booking is None:
        return "none"
    if kind == "confirm":
        return await _answer(sessions.confirm_booking(OPERATOR, booking.id))
    return await _answer(sessions.cancel_booking(OPERATOR, booking.id, "chaos"))


async def _answer(asked: Any) -> str:
    """The state it is in now, or why not."""
    try:
        return str((await asked).state)
    except Conflict as error:
        return error.reason


async def main() -> None:
    dsn, seed, worker, operations, first = sys.argv[1:]
    logs.configure("chaos", "ERROR")
    pool = await create_pool_when_it_answers(dsn, schema="matching", size_max=batches.BATCHES_AT_ONCE)
    planned = plan(int(seed), int(worker), int(operations))
    await batches.tell_batches(int(first), [functools.partial(perform, pool, int(seed), batch) for batch in planned])
    await pool.close()


if __name__ == "__main__":
    asyncio.run(main())
