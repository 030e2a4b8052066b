"""A process that works on the ledger until all its operations are answered; its parent kills it now and then and starts it again.

What an operation is follows from its number alone, so a process that starts anew asks again for exactly the same. Each answer is
one line on standard output, written only once the ledger has given it:
    N posted SEQUENCE HASH | N refused REASON | N repeated SEQUENCE HASH
"""

import asyncio
import os
import random
import sys
from collections.abc import Iterator

import asyncpg

from services.common import logs
from services.common.clock import SystemClock
from services.common.database import Pool, create_pool, transaction
from services.common.errors import Conflict, HubError, TryAgain
from services.funding import ledger
from services.funding.journal import Journal
from services.funding.ledger import Account, AccountKind, Event, Posted, RequestIdReused, Transfer

CALLS = 6
BUDGET_PENCE = 40_000
TASKS = 16
REPEAT_SHARE = 0.1
# Done in a transaction of its own, as decisions and payments are, in place of the journal.
OWN_TRANSACTION_SHARE = 0.15

PATHS = (
    (AccountKind.PUBLIC_BUDGET, AccountKind.PUBLIC_COMMITTED),
    (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_BUDGET),
    (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_HELD),
    (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_PAID),
    (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_BUDGET),
    (AccountKind.PUBLIC_PAID, AccountKind.PUBLIC_RECOVERED),
    (AccountKind.PUBLIC_RECOVERED, AccountKind.PUBLIC_BUDGET),
    (AccountKind.CO_INVESTMENT_SOURCE, AccountKind.CO_INVESTMENT_PLEDGED),
    (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_COMMITTED),
    (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_PAID),
    (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_SOURCE),
)


def call_name(number: int) -> str:
    return f"chaos-{number}"


def operation(seed: int, number: int) -> Event:
    """One to three transfers, some of which no account can pay."""
    chance = random.Random(f"{seed}/{number}")
    transfers = []
    for position in range(chance.choice((1, 1, 1, 2, 3))):
        call_id, (debit, credit) = call_name(chance.randrange(CALLS)), chance.choice(PATHS)
        amount = chance.choice((1, 7, 100, 2_500, 12_000))
        transfers.append(
            Transfer(
                debit=Account(call_id, debit),
                credit=Account(call_id, credit),
                amount_pence=amount,
                purpose="chaos",
                subject_id=f"{number}/{position}",
            )
        )
    return Event(request_id=f"chaos:{number}", kind="chaos", transfers=tuple(transfers), credential_id=1)


class Client:
    """Asks for operations until each is answered, and for some a second time."""

    def __init__(self, pool: Pool, seed: int, numbers: list[int]) -> None:
        self._pool = pool
        self._seed = seed
        self._journal = Journal(pool, SystemClock())
        self._chance = random.Random()
        self._numbers = iter(numbers)

    async def run(self) -> None:
        await asyncio.gather(*(self._work(self._numbers) for _ in range(TASKS)))

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._answered(number)
            if self._chance.random() < REPEAT_SHARE:
                await self._answered(number)

    async def _answered(self, number: int) -> None:
        event = operation(self._seed, number)
        while True:
            try:
                posted = await self._post(event)
                word = "repeated" if posted.repeated else "posted"
                say(f"{number} {word} {posted.sequence} {posted.hash.hex()}")
                return
            except TryAgain:
                await asyncio.sleep(0.05)
            except RequestIdReused:
                raise
            except Conflict as refused:
                say(f"{number} refused {refused.reason}")
                return

    async def _post(self, event: Event) -> Posted:
        if self._chance.random() >= OWN_TRANSACTION_SHARE:
            return await self._journal.post(event)
        async with transaction(self._pool) as connection:
            (posted,) = await ledger.post(connection, SystemClock(), event)
            return posted


def say(line: str) -> None:
    # One write a line: a line is there whole or not at all, however the process ends.
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


async def main() -> None:
    logs.configure("chaos", "CRITICAL")
    dsn, seed = sys.argv[1], int(sys.argv[2])
    numbers = [int(line) for line in sys.stdin.read().split()]
    while True:
        try:
            pool = await create_pool(dsn, schema="funding", size_max=6)
            break
        except (OSError, asyncpg.PostgresError):
            await asyncio.sleep(0.1)
    try:
        await Client(pool, seed, numbers).run()
    except HubError as error:
        sys.exit(f"{error.reason}: {error.detail}")
    finally:
        await pool.close()


if __name__ == "__main__":
    asyncio.run(main())
