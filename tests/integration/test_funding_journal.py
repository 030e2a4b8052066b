"""Group commit of the ledger: many at once in one transaction, and each still judged and answered by itself."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import replace

import asyncpg
import pytest_asyncio

from services.common.database import Pool, create_pool
from services.common.errors import Invalid, SlowDown, TryAgain
from services.funding.journal import Journal
from services.funding.ledger import (
    Account,
    AccountKind,
    AccountUnknown,
    AlreadyMoved,
    Event,
    Overdrawn,
    Posted,
    RequestIdReused,
    Transfer,
)
from tests.integration.funding_ledger import CLOCK, assert_in_order, balance, commitment, new_call, post

COMMITTED, BUDGET = AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_BUDGET


@pytest_asyncio.fixture(scope="module")
async def pool(dsn: str) -> AsyncIterator[Pool]:
    made = await create_pool(dsn, schema="funding", size_max=8)
    yield made
    await made.close()


@pytest_asyncio.fixture
async def journal(pool: Pool) -> AsyncIterator[Journal]:
    made = Journal(pool, CLOCK)
    yield made
    await made.close()
    await assert_in_order(pool)


async def transactions(pool: Pool) -> int:
    """How many different transactions wrote the events that there are."""
    return int(await pool.fetchval("SELECT count(DISTINCT xmin::text) FROM ledger_event"))


async def test_what_waits_together_is_written_together_and_in_order(pool: Pool, journal: Journal) -> None:
    call_id = await new_call(pool, 1_000)
    before = await transactions(pool)
    posted = await asyncio.gather(*(journal.post(commitment(call_id, 1, str(number))) for number in range(200)))
    assert [item.sequence for item in posted] == list(range(posted[0].sequence, posted[0].sequence + 200))
    assert await balance(pool, call_id, COMMITTED) == 200
    assert await transactions(pool) - before <= 3


async def test_one_that_asks_too_much_is_refused_alone_and_those_behind_it_get_the_money(
    pool: Pool, journal: Journal
) -> None:
    call_id = await new_call(pool, 100)
    amounts = [60, 41, 40, 1]
    outcomes = await asyncio.gather(
        *(journal.post(commitment(call_id, pence, str(pence))) for pence in amounts), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [Posted, Overdrawn, Posted, Overdrawn]
    assert await balance(pool, call_id, BUDGET) == 0


async def test_of_many_that_race_for_the_last_pound_exactly_one_gets_it(pool: Pool) -> None:
    """Two processes, each with a journal of its own."""
    call_id = await new_call(pool, 100)
    journals = [Journal(pool, CLOCK), Journal(pool, CLOCK)]
    outcomes = await asyncio.gather(
        *(journals[number % 2].post(commitment(call_id, 100, str(number))) for number in range(24)),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Overdrawn"] * 23 + ["Posted"]
    await assert_in_order(pool)


async def test_a_repeat_gets_the_first_answer_also_while_the_first_is_on_its_way(pool: Pool, journal: Journal) -> None:
    call_id = await new_call(pool, 1_000)
    event = commitment(call_id, 400, "a")
    other = commitment(call_id, 401, "a")
    first, again, refused = await asyncio.gather(
        journal.post(event), journal.post(event), journal.post(other), return_exceptions=True
    )
    assert isinstance(first, Posted)
    assert again == replace(first, repeated=True)
    assert isinstance(refused, RequestIdReused)
    assert await journal.post(event) == again
    assert await balance(pool, call_id, COMMITTED) == 400


async def test_each_refusal_has_its_own_reason_and_hurts_nobody_else(pool: Pool, journal: Journal) -> None:
    call_id = await new_call(pool, 1_000)
    await post(pool, commitment(call_id, 1, "there"))
    taken = replace(commitment(call_id, 1, "there"), request_id=f"{call_id}/same subject again")
    nowhere = Transfer(
        debit=Account(call_id, BUDGET),
        credit=Account("no-such-call", COMMITTED),
        amount_pence=1,
        purpose="test",
        subject_id=f"{call_id}/nowhere",
    )
    unknown = Event(request_id=f"{call_id}/nowhere", kind="test", transfers=(nowhere,), credential_id=1)
    nul = commitment(call_id, 1, "n\x00ul")
    zero = commitment(call_id, 0, "zero")
    good = [commitment(call_id, 10, f"good {number}") for number in range(3)]
    outcomes = await asyncio.gather(
        *(journal.post(event) for event in (good[0], taken, good[1], unknown, nul, zero, good[2])),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds[:4] == [Posted, AlreadyMoved, Posted, AccountUnknown]
    assert isinstance(outcomes[4], Exception)
    assert kinds[5:] == [Invalid, Posted]
    assert await balance(pool, call_id, COMMITTED) == 31


async def test_a_lost_connection_leaves_nobody_waiting_and_a_repeat_is_safe(
    pool: Pool, journal: Journal, dsn: str
) -> None:
    call_id = await new_call(pool, 10_000)
    acknowledged: set[int] = set()
    stop = asyncio.Event()

    async def client(name: int) -> None:
        for number in range(40):
            event = commitment(call_id, 1, f"{name}/{number}")
            while True:
                try:
                    await journal.post(event)
                    break
                except TryAgain:
                    await asyncio.sleep(0.01)
            acknowledged.add(name * 100 + number)

    async def killer() -> None:
        """As a failover does: every connection of the service is cut, again and again."""
        admin = await asyncpg.connect(dsn)
        try:
            while not stop.is_set():
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE application_name = 'smdih-funding' AND datname = current_database() AND pid <> pg_backend_pid()"
                )
                await asyncio.sleep(random.uniform(0.02, 0.08))  # on a busy machine a connection takes that long
        finally:
            await admin.close()

    killing = asyncio.create_task(killer())
    await asyncio.gather(*(client(name) for name in range(8)))
    stop.set()
    await killing
    await pool.expire_connections()
    assert len(acknowledged) == 320
    assert await balance(pool, call_id, COMMITTED) == 320


async def test_who_goes_away_does_not_stop_the_others(pool: Pool, journal: Journal) -> None:
    call_id = await new_call(pool, 1_000)
    impatient = asyncio.create_task(journal.post(commitment(call_id, 1, "impatient")))
    patient = asyncio.create_task(journal.post(commitment(call_id, 2, "patient")))
    await asyncio.sleep(0)
    impatient.cancel()
    assert isinstance(await patient, Posted)
    assert (await balance(pool, call_id, COMMITTED)) in (2, 3)


async def test_the_queue_has_an_end(pool: Pool) -> None:
    journal, call_id = Journal(pool, CLOCK, waiting_max=3), await new_call(pool, 1_000)
    outcomes = await asyncio.gather(
        *(journal.post(commitment(call_id, 1, str(number))) for number in range(5)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [Posted] * 3 + [SlowDown] * 2
