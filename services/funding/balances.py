"""The ledger as people and machines watch it: the trial balance, and the gauges of the fund's money."""

import asyncio
import time

import asyncpg
from prometheus_client import Gauge

from services.common.database import Pool, transaction
from services.common.errors import TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import ledger
from services.funding.ledger import AccountKind, TrialBalance

log = get_logger(__name__)

WATCH_INTERVAL_S = 5
# It reads every transfer there is.
TRIAL_BALANCE_INTERVAL_S = 300

# The fund's money by kind of account, as the ledger has it.
balance_pence = Gauge("smdih_funding_balance_pence", "Balance of all accounts of a kind", ["account"])
# Zero when the ledger is in order: total of all balances, and accounts whose balance is not what their transfers make.
trial_balance_pence = Gauge("smdih_funding_trial_balance_pence", "Total of all balances; must be zero")
disagreeing_accounts = Gauge(
    "smdih_funding_disagreeing_accounts", "Accounts whose balance differs from their transfers; must be zero"
)


class BalanceService:
    """The use cases. Every method that takes a caller raises Forbidden where it may not."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def trial_balance(self, caller: Caller) -> TrialBalance:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await ledger.trial_balance(connection)

    async def observe_balances(self) -> None:
        """Set the gauges of the fund's money from the running balances."""
        async with transaction(self._pool) as connection:
            running = await ledger.balances(connection)
        for kind in AccountKind:
            balance_pence.labels(kind).set(running[kind])
        trial_balance_pence.set(sum(running.values()))

    async def observe_trial_balance(self) -> None:
        """Add every transfer up, and say aloud when a balance is something else.

        The line about the head is the note, outside the database, that shows a past rewritten whole.
        """
        async with transaction(self._pool) as connection:
            trial = await ledger.trial_balance(connection)
        disagreeing_accounts.set(sum(not account.agrees for account in trial.accounts))
        if trial.in_order:
            log.info("ledger is in order", events=trial.events, head_hash=trial.head_hash)
        else:
            log.error("ledger is not in order", total_pence=trial.total_pence, events=trial.events)


async def watch(service: BalanceService) -> None:
    """Look at the running balances often and at the whole ledger now and then, until cancelled."""
    next_trial_s = 0.0
    while True:
        try:
            await service.observe_balances()
            if time.monotonic() >= next_trial_s:
                await service.observe_trial_balance()
                next_trial_s = time.monotonic() + TRIAL_BALANCE_INTERVAL_S
        except (TryAgain, asyncpg.PostgresError) as error:
            log.warning("ledger cannot be observed", error=repr(error))
        await asyncio.sleep(WATCH_INTERVAL_S)
