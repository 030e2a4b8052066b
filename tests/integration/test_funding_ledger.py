"""The ledger on a real database: what it refuses, what survives races, and what gives tampering away."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import asyncpg
import pytest
import pytest_asyncio

from services.common.database import Pool, create_pool, transaction
from services.common.errors import Invalid
from services.funding import award_store, ledger, programme
from services.funding.domain import AMOUNT_PENCE_MAX
from services.funding.ledger import (
    CALL_KINDS,
    PROGRAMME,
    AccountKind,
    Event,
    Overdrawn,
    Posted,
    RequestIdReused,
)
from services.funding.ledger_replay import replay
from tests.integration.funding_ledger import (
    CLOCK,
    assert_in_order,
    balance,
    commitment,
    new_call,
    one_transfer,
    post,
)


@pytest_asyncio.fixture(scope="module")
async def pool(dsn: str) -> AsyncIterator[Pool]:
    made = await create_pool(dsn, schema="funding", size_max=16)
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module")
async def owners(dsn: str) -> AsyncIterator[Pool]:
    """Of the tables' owner, who may do what the service's role may not."""
    made = await asyncpg.create_pool(dsn, min_size=1, max_size=1, server_settings={"search_path": "funding,public"})
    yield made
    await made.close()


async def test_an_event_moves_money_and_the_trial_balance_stays_zero(pool: Pool) -> None:
    call_id = await new_call(pool, 1_000)
    await post(pool, commitment(call_id, 400, "a"))
    assert await balance(pool, call_id, AccountKind.PUBLIC_BUDGET) == 600
    assert await balance(pool, call_id, AccountKind.PUBLIC_COMMITTED) == 400
    await assert_in_order(pool)


async def test_a_repeat_gets_the_first_answer_and_other_content_is_refused(pool: Pool) -> None:
    call_id = await new_call(pool, 1_000)
    event = commitment(call_id, 400, "a")
    (first,) = await post(pool, event)
    again, within_one_post = await post(pool, event, event)
    assert again == within_one_post == replace(first, repeated=True)
    with pytest.raises(RequestIdReused):
        await post(pool, commitment(call_id, 401, "a"))
    assert await balance(pool, call_id, AccountKind.PUBLIC_COMMITTED) == 400


async def test_one_event_has_all_its_transfers_or_none(pool: Pool) -> None:
    call_id = await new_call(pool, 1_000)
    enough, too_much = commitment(call_id, 900, "a").transfers[0], commitment(call_id, 101, "b").transfers[0]
    event = Event(request_id=f"{call_id}/both", kind="test", transfers=(enough, too_much), credential_id=1)
    with pytest.raises(Overdrawn) as refused:
        await post(pool, event)
    assert refused.value.reason == "BUDGET_EXHAUSTED"
    assert await balance(pool, call_id, AccountKind.PUBLIC_COMMITTED) == 0
    await assert_in_order(pool)


async def test_of_many_that_race_for_the_last_pound_exactly_one_gets_it(pool: Pool) -> None:
    call_id = await new_call(pool, 100)
    outcomes = await asyncio.gather(
        *(post(pool, commitment(call_id, 100, str(number))) for number in range(12)), return_exceptions=True
    )
    assert sum(isinstance(outcome, list) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Overdrawn) for outcome in outcomes) == 11
    assert await balance(pool, call_id, AccountKind.PUBLIC_BUDGET) == 0
    await assert_in_order(pool)


async def test_random_operations_with_repeats_at_once_lose_and_create_nothing(pool: Pool) -> None:
    seeded = random.Random(20261123)
    calls = [await new_call(pool, 20_000) for _ in range(3)]
    paths = (
        (AccountKind.PUBLIC_BUDGET, AccountKind.PUBLIC_COMMITTED),
        (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_BUDGET),
        (AccountKind.CO_INVESTMENT_SOURCE, AccountKind.CO_INVESTMENT_PLEDGED),
        (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_COMMITTED),
        (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_SOURCE),
    )
    events = [
        one_transfer(seeded.choice(calls), *seeded.choice(paths), seeded.randint(1, 4_000), f"random-{number}")
        for number in range(150)
    ]
    work = events + seeded.sample(events, 100)
    seeded.shuffle(work)
    done: dict[str, set[Posted]] = {}

    async def worker(share: Sequence[Event]) -> None:
        for event in share:
            try:
                (posted,) = await post(pool, event)
                done.setdefault(event.request_id, set()).add(replace(posted, repeated=False))
            except Overdrawn:
                pass

    await asyncio.gather(*(worker(work[start::12]) for start in range(12)))
    # Whoever asked and however often: one answer for each request that went through.
    assert all(len(answers) == 1 for answers in done.values())
    expected = {(call_id, kind): 0 for call_id in calls for kind in CALL_KINDS}
    for call_id in calls:
        expected[call_id, AccountKind.PUBLIC_BUDGET] = 20_000
    for event in events:
        if event.request_id in done:
            (item,) = event.transfers
            expected[item.debit.call_id, item.debit.kind] -= item.amount_pence
            expected[item.credit.call_id, item.credit.kind] += item.amount_pence
    for (call_id, kind), pence in expected.items():
        assert await balance(pool, call_id, kind) == pence
    await assert_in_order(pool)


@pytest.mark.parametrize("pence", [0, -1, AMOUNT_PENCE_MAX + 1, 2**63 - 1, 2**63, -(2**63)])
async def test_an_amount_out_of_range_is_refused_clearly(pool: Pool, pence: int) -> None:
    call_id = await new_call(pool, 1_000)
    with pytest.raises(Invalid) as refused:
        await post(pool, commitment(call_id, pence, "a"))
    assert refused.value.reason == "AMOUNT_OUT_OF_RANGE"


async def test_the_largest_amount_is_taken(pool: Pool) -> None:
    call_id = await new_call(pool, AMOUNT_PENCE_MAX)
    await post(pool, commitment(call_id, AMOUNT_PENCE_MAX, "all"))
    assert await balance(pool, call_id, AccountKind.PUBLIC_COMMITTED) == AMOUNT_PENCE_MAX


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE ledger_transfer SET amount_pence = amount_pence + 1",
        "DELETE FROM ledger_transfer",
        "TRUNCATE ledger_transfer",
        "UPDATE ledger_event SET correlation_id = 'x'",
        "DELETE FROM ledger_event",
        "TRUNCATE ledger_event CASCADE",
        "UPDATE ledger_account SET balance_pence = balance_pence + 1",
        "DELETE FROM ledger_account",
        "TRUNCATE ledger_account CASCADE",
        "UPDATE ledger_head SET sequence = sequence - 1",
        "DELETE FROM ledger_head",
        "TRUNCATE ledger_head",
        "TRUNCATE award CASCADE",
        "TRUNCATE agreement CASCADE",
        "TRUNCATE claim CASCADE",
        "UPDATE audit SET action = 'x'",
        "TRUNCATE audit",
    ],
)
async def test_what_is_written_stays_written(pool: Pool, owners: Pool, statement: str) -> None:
    call_id = await new_call(pool, 1_000)
    if "audit" in statement:
        async with transaction(pool) as connection:
            await award_store.audit(connection, "a", credential_id=1, now_us=1, call_id=call_id, detail={})
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="refused"):
        await owners.execute(statement)
    if statement.startswith("TRUNCATE"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute(statement)
    await assert_in_order(pool)


async def test_an_event_that_does_not_follow_the_newest_cannot_be_written(pool: Pool) -> None:
    await new_call(pool, 1_000)
    insert = (
        "INSERT INTO ledger_event (sequence, request_id, content_sha256, kind, recorded, credential_id, correlation_id, "
        "previous_hash, hash) SELECT {sequence}, 'forged', '', 'x', now(), 1, 'x', hash, sha256('forged') "
        "FROM ledger_event WHERE sequence = {after}"
    )
    newest = await pool.fetchval("SELECT sequence FROM ledger_head")
    for sequence, after in ((newest + 1, newest - 1), (newest + 2, newest), (newest, newest - 1)):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await pool.execute(insert.format(sequence=sequence, after=after))


@pytest.mark.parametrize(
    ("tampering", "shown"),
    [
        ("UPDATE ledger_transfer SET amount_pence = 401 WHERE subject_id = '{call}/a'", "was altered"),
        ("UPDATE ledger_transfer SET subject_id = 'x' WHERE subject_id = '{call}/a'", "was altered"),
        ("UPDATE ledger_transfer SET purpose = 'x' WHERE subject_id = '{call}/a'", "was altered"),
        ("DELETE FROM ledger_transfer WHERE subject_id = '{call}/a'", "was altered"),
        (
            "INSERT INTO ledger_transfer SELECT event_sequence, 9, debit_account, credit_account, 5, 'x', '{call}/x' "
            "FROM ledger_transfer WHERE subject_id = '{call}/a'",
            "was altered",
        ),
        ("UPDATE ledger_event SET recorded = recorded - interval '1 day' WHERE sequence = {newest}", "was altered"),
        ("UPDATE ledger_event SET credential_id = 2 WHERE sequence = {newest}", "was altered"),
        ("UPDATE ledger_event SET correlation_id = 'x' WHERE sequence = {newest}", "was altered"),
        ("UPDATE ledger_event SET hash = sha256('x') WHERE sequence = {newest} - 1", "does not follow"),
        ("DELETE FROM ledger_event WHERE sequence = {newest} - 1", "missing"),
        ("DELETE FROM ledger_event WHERE sequence = {newest}", "the newest event is not the one that the head names"),
        (
            "UPDATE ledger_account SET balance_pence = 999 WHERE call_id = '{call}' AND kind = 'public_committed'",
            "shows 999",
        ),
        (
            "DELETE FROM ledger_account WHERE call_id = '{call}' AND kind = 'co_investment_pledged'; "
            "UPDATE ledger_account SET kind = 'co_investment_pledged' WHERE call_id = '{call}' AND kind = 'public_committed'",
            "was altered",
        ),
    ],
)
async def test_tampering_past_the_triggers_is_found(pool: Pool, owners: Pool, tampering: str, shown: str) -> None:
    """By whoever owns the server: triggers and foreign keys are off."""
    call_id = await new_call(pool, 1_000)
    await post(pool, commitment(call_id, 400, "a"))
    (newest,) = await post(pool, commitment(call_id, 600, "b"))
    async with owners.acquire() as connection:
        undone = connection.transaction()
        await undone.start()
        try:
            await connection.execute("SET LOCAL session_replication_role = replica")
            done = await connection.execute(tampering.format(newest=newest.sequence, call=call_id))
            assert not done.endswith(" 0"), "the tampering met no row"
            faults = (await replay(connection)).faults
        finally:
            await undone.rollback()
    assert any(shown in fault for fault in faults), faults
    await assert_in_order(pool)


async def test_an_end_cut_off_with_everything_else_put_right_shows_against_a_hash_noted_elsewhere(
    pool: Pool, owners: Pool
) -> None:
    call_id = await new_call(pool, 1_000)
    (noted,) = await post(pool, commitment(call_id, 400, "a"))
    async with owners.acquire() as connection:
        undone = connection.transaction()
        await undone.start()
        try:
            await connection.execute("SET LOCAL session_replication_role = replica")
            await connection.execute("DELETE FROM ledger_transfer WHERE event_sequence = $1", noted.sequence)
            await connection.execute("DELETE FROM ledger_event WHERE sequence = $1", noted.sequence)
            await connection.execute(
                "UPDATE ledger_head SET (sequence, hash) = "
                "(SELECT sequence, hash FROM ledger_event ORDER BY sequence DESC LIMIT 1)"
            )
            await connection.execute(
                "UPDATE ledger_account SET balance_pence = CASE kind WHEN 'public_budget' THEN 1000 ELSE 0 END "
                "WHERE call_id = $1 AND kind IN ('public_budget', 'public_committed')",
                call_id,
            )
            read = await replay(connection)
        finally:
            await undone.rollback()
    assert read.faults == ()
    assert read.head_hash != noted.hash.hex()


async def test_posting_in_batches_keeps_order_and_speed(pool: Pool) -> None:
    call_id = await new_call(pool, AMOUNT_PENCE_MAX)
    events = [commitment(call_id, 1, f"batch-{number}") for number in range(500)]
    started = time.perf_counter()
    posted = await post(pool, *events)
    elapsed_s = time.perf_counter() - started
    assert [item.sequence for item in posted] == list(range(posted[0].sequence, posted[0].sequence + 500))
    assert await balance(pool, call_id, AccountKind.PUBLIC_COMMITTED) == 500
    assert elapsed_s < 10
    await assert_in_order(pool)


async def programme_given(pool: Pool) -> int:
    return -await balance(pool, PROGRAMME, AccountKind.PUBLIC_SOURCE)


async def open_programme(pool: Pool, public_pence: int) -> None:
    async with transaction(pool) as connection:
        await programme.open_programme(connection, CLOCK, public_pence=public_pence)


async def test_the_programme_is_opened_once_and_a_higher_figure_adds_the_difference(pool: Pool) -> None:
    given = await programme_given(pool)
    for figure in (given + 500, given + 700):
        await asyncio.gather(*(open_programme(pool, figure) for _ in range(6)))
        assert await programme_given(pool) == figure
    await open_programme(pool, given)
    assert await programme_given(pool) == given + 700
    await assert_in_order(pool)


async def test_a_call_with_a_source_of_its_own_is_taken_over_by_the_programme(pool: Pool, owners: Pool) -> None:
    call_id = await new_call(pool)
    await open_programme(pool, await programme_given(pool) + 400)
    async with transaction(owners) as connection:
        # As it was before there was a programme.
        await connection.execute("ALTER TABLE ledger_account DROP CONSTRAINT ledger_account_call_source_check")
        await connection.execute("INSERT INTO ledger_account (call_id, kind) VALUES ($1, 'public_source')", call_id)
        own = one_transfer(call_id, AccountKind.PUBLIC_SOURCE, AccountKind.PUBLIC_BUDGET, 400, "own")
        await ledger.post(connection, CLOCK, own)
        await connection.execute(
            "ALTER TABLE ledger_account ADD CONSTRAINT ledger_account_call_source_check "
            "CHECK (kind <> 'public_source' OR call_id = 'programme' OR balance_pence = 0) NOT VALID"
        )
    left = await balance(pool, PROGRAMME, AccountKind.PROGRAMME_BUDGET)
    for _ in range(2):
        await open_programme(pool, await programme_given(pool))
    assert await balance(pool, call_id, AccountKind.PUBLIC_SOURCE) == 0
    assert await balance(pool, call_id, AccountKind.PUBLIC_BUDGET) == 400
    assert await balance(pool, PROGRAMME, AccountKind.PROGRAMME_BUDGET) == left - 400
    with pytest.raises(asyncpg.CheckViolationError):
        await post(pool, one_transfer(call_id, AccountKind.PUBLIC_SOURCE, AccountKind.PUBLIC_BUDGET, 1, "again"))
    await assert_in_order(pool)
