"""What tests of the ledger share: calls with a budget, events of one transfer, and the proof that all is in order."""

import random

from services.common.clock import SystemClock
from services.common.database import Pool, transaction
from services.funding import call_store, ledger, programme
from services.funding.domain import Call
from services.funding.ledger import PROGRAMME, Account, AccountKind, Event, Posted, Transfer
from services.funding.ledger_replay import replay
from services.funding.rules.intensity import Category
from services.funding.rules.size import Definition

CLOCK = SystemClock()


async def new_call(pool: Pool, budget_pence: int = 0) -> str:
    """A call with its accounts and its budget, for which the programme is given as much."""
    call_id = f"call-{random.getrandbits(64):x}"
    call = Call(
        id=call_id,
        title="Digital plants",
        budget_pence=budget_pence or 1,
        opens_us=1_000_000_000_000_000,
        closes_us=2_000_000_000_000_000,
        category=Category.FEASIBILITY,
        size_definition=Definition.EU,
        rate_max="",
        in_kind_allowed=False,
        created_us=CLOCK.now_us(),
    )
    async with transaction(pool) as connection:
        await call_store.add_call(connection, call, request_id=call_id, content_sha256=b"")
        await ledger.open_accounts(connection, call_id)
        if budget_pence:
            to = AccountKind.PROGRAMME_BUDGET
            given = one_transfer(PROGRAMME, AccountKind.PUBLIC_SOURCE, to, budget_pence, call_id)
            await ledger.post(connection, CLOCK, given)
            await programme.allot(connection, CLOCK, call_id=call_id, budget_pence=budget_pence, credential_id=1)
    return call_id


def one_transfer(call_id: str, debit: AccountKind, credit: AccountKind, pence: int, name: str) -> Event:
    transfer = Transfer(
        debit=Account(call_id, debit),
        credit=Account(call_id, credit),
        amount_pence=pence,
        purpose="test",
        subject_id=f"{call_id}/{name}",
    )
    return Event(request_id=f"{call_id}/{name}", kind="test", transfers=(transfer,), credential_id=1)


def commitment(call_id: str, pence: int, name: str) -> Event:
    return one_transfer(call_id, AccountKind.PUBLIC_BUDGET, AccountKind.PUBLIC_COMMITTED, pence, name)


async def post(pool: Pool, *events: Event) -> list[Posted]:
    async with transaction(pool) as connection:
        return await ledger.post(connection, CLOCK, *events)


async def balance(pool: Pool, call_id: str, kind: AccountKind) -> int:
    async with transaction(pool) as connection:
        return (await ledger.balances(connection, call_id))[kind]


async def assert_in_order(pool: Pool) -> None:
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
        trial = await ledger.trial_balance(connection)
        read = await replay(connection)
    assert (trial.total_pence, trial.in_order) == (0, True)
    assert read.faults == ()
    assert (read.events, read.head_hash) == (trial.events, trial.head_hash)
