"""The ledger as people and machines watch it: the trial balance, and the gauges of the fund's money."""

import asyncio
import time
from dataclasses import dataclass

import asyncpg
from prometheus_client import Gauge

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.errors import TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import ledger
from services.funding.domain import uk_day
from services.funding.ledger import PROGRAMME, AccountKind, TrialBalance
from services.funding.parameters import ParameterTable
from services.funding.rules.match import FundRatio, fund_ratio

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


@dataclass(frozen=True, kw_only=True)
class FundView:
    """The whole fund as the ledger has it. Promised includes what is held and paid; paid is what was not recovered."""

    programme_pence: int
    unallotted_pence: int
    unpromised_pence: int
    public_promised_pence: int
    public_held_pence: int
    public_paid_pence: int
    public_recovered_pence: int
    business_promised_pence: int
    business_paid_pence: int
    on_promises: FundRatio
    on_payments: FundRatio


class BalanceService:
    """The use cases. Every method that takes a caller raises Forbidden where it may not."""

    def __init__(self, pool: Pool, *, table: ParameterTable, clock: Clock) -> None:
        self._pool = pool
        self._table = table
        self._clock = clock

    async def trial_balance(self, caller: Caller) -> TrialBalance:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await ledger.trial_balance(connection)

    async def get_fund(self, caller: Caller) -> FundView:
        """The programme's figures, with business money per public money on promises and on payments."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            all_of, own = await ledger.balances(connection), await ledger.balances(connection, PROGRAMME)
        target = self._table.at(uk_day(from_us(self._clock.now_us()))).exact("programme.business_per_public")
        promised, business = ledger.public_promised(all_of), ledger.business_promised(all_of)
        paid, business_paid = all_of[AccountKind.PUBLIC_PAID], all_of[AccountKind.CO_INVESTMENT_PAID]
        return FundView(
            programme_pence=-own[AccountKind.PUBLIC_SOURCE],
            unallotted_pence=own[AccountKind.PROGRAMME_BUDGET],
            unpromised_pence=all_of[AccountKind.PUBLIC_BUDGET],
            public_promised_pence=promised,
            public_held_pence=all_of[AccountKind.PUBLIC_HELD],
            public_paid_pence=paid,
            public_recovered_pence=all_of[AccountKind.PUBLIC_RECOVERED],
            business_promised_pence=business,
            business_paid_pence=business_paid,
            on_promises=fund_ratio(public_p=promised, business_p=business, target=target),
            on_payments=fund_ratio(public_p=paid, business_p=business_paid, target=target),
        )

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
