"""Awards on a real database with a clock that the test turns, for the tests of what follows them."""

import secrets
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from services.common.clock import to_us
from services.common.database import Pool, create_pool, transaction
from services.common.directory import Directory
from services.common.errors import HubError
from services.common.evidence import Signer, Verifier, new_key
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.funding import call_store, ledger
from services.funding.agreement import Agreement, CostLine
from services.funding.agreement_changes import AgreementChanges
from services.funding.agreements import AgreementService
from services.funding.applications import ApplicationService
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.change_requests import Change, ChangeKind, ChangeService
from services.funding.claims import ClaimService
from services.funding.decisions import DecisionService
from services.funding.domain import Cost, CostCategory, Declaration, Match, SizeFigures
from services.funding.impacts import ImpactService
from services.funding.journal import Journal
from services.funding.judging import Judge
from services.funding.ledger_replay import replay
from services.funding.milestones import MilestoneService
from services.funding.parameters import load_parameters
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition
from smdih.directory.v1 import directory_pb2

FIRM_ID = 21
FIRM, OTHER = Caller(1, Role.FIRM, firm_id=FIRM_ID), Caller(2, Role.FIRM, firm_id=22)
FIRST, SECOND = Caller(3, Role.OPERATOR), Caller(4, Role.OPERATOR)
START = date(2026, 6, 1)
GRANT, COST = 4_000_00, 10_000_00
MACHINE = 7
SIGNER = Signer(new_key())
# Gross: the rest of the cost is business money.
BUSINESS = COST - GRANT


class TurnedClock:
    """Says the day that the test has turned it to."""

    def __init__(self) -> None:
        self.day = START

    def now_us(self) -> int:
        return to_us(datetime(self.day.year, self.day.month, self.day.day, 12, tzinfo=UTC))


@dataclass
class Fund:
    pool: Pool
    clock: TurnedClock
    calls: CallService
    applications: ApplicationService
    decisions: DecisionService
    agreements: AgreementService
    claims: ClaimService
    whole: BalanceService
    milestones: MilestoneService
    impacts: ImpactService
    changes: ChangeService

    async def award(self, *, accept: bool = True, confirm: bool = True) -> str:
        """An award of GRANT on COST, made on START; the project runs from June to the end of August."""
        self.clock.day = START
        now_us = self.clock.now_us()
        match_id = secrets.token_hex(8)
        match = Match(
            id=match_id,
            event_id=match_id,
            firm_id=FIRM_ID,
            need_id=match_id,
            offer_id=match_id,
            provider_id="p",
            provider_title="Spindle clinic",
            accepted_us=now_us,
            correlation_id=f"corr-{match_id}",
        )
        async with transaction(self.pool) as connection:
            await call_store.add_match(connection, match)
        call = await self.calls.create_call(
            FIRST,
            request_id=match_id,
            title="Digital spindles",
            budget_pence=GRANT,
            opens_us=now_us - 1,
            closes_us=now_us + 1_000_000,
            category=Category.EXPERIMENTAL_DEVELOPMENT,
            size_definition=Definition.COMPANIES_ACT,
            rate_max="",
            in_kind_allowed=False,
        )
        size = SizeFigures(headcount="9", turnover_minor=1, balance_minor=1, period_start="2026-01-01")
        view = await self.applications.create_application(
            FIRM,
            request_id=match_id,
            call_id=call.id,
            match_id=match_id,
            costs=[Cost(category=CostCategory.LABOUR, amount_pence=COST)],
            declaration=Declaration(size=size, uk_registered=True),
            requested_pence=GRANT,
            other_public_pence=0,
        )
        application_id = view.application.id
        pledge = await self.applications.add_pledge(
            FIRM,
            application_id,
            request_id="p",
            co_investor="The firm",
            kind=PledgeKind.CASH,
            public_body=False,
            amount_pence=BUSINESS,
        )
        await self.applications.confirm_pledge(FIRST, application_id, pledge.id, evidence="statement")
        await self.applications.submit(FIRM, application_id)
        decided = await self.decisions.decide(FIRST, application_id, award=True, reason="best")
        assert decided.application.award is not None
        award_id = decided.application.award.id
        if accept:
            await self.agreements.accept(FIRM, award_id, project_start="2026-06-01", project_end="2026-08-31")
        if confirm:
            await self.agreements.confirm_assistance(FIRM, award_id, elsewhere_pence=0, statement="none")
        return award_id

    async def claim(self, award_id: str, month: int, pence: int, *, day: date | None = None, **changes: Any) -> str:
        """A claim for a month's labour, sent on the last day of the month."""
        first = date(2026, month, 1)
        last = date(2026, month + 1, 1) - timedelta(days=1)
        self.clock.day = day or last
        wanted = {
            "request_id": secrets.token_hex(8),
            "period_start": first.isoformat(),
            "period_end": last.isoformat(),
            "costs": [line(pence)],
            "is_final": month == 8,
            **changes,
        }
        return (await self.claims.submit_claim(FIRM, award_id, **wanted)).claims[-1].id

    async def decide(self, award_id: str, claim_id: str, *, accept: bool = True) -> Agreement:
        return await self.claims.decide_claim(FIRST, award_id, claim_id, accept=accept, reason="papers seen")

    async def settle(self, award_id: str, claim_id: str, *, release: bool = True, caller: Caller = SECOND) -> Agreement:
        return await self.claims.settle_claim(caller, award_id, claim_id, release=release, reason="checked")

    async def paid(self, award_id: str, month: int, pence: int) -> Agreement:
        claim_id = await self.claim(award_id, month, pence)
        await self.decide(award_id, claim_id)
        return await self.settle(award_id, claim_id)

    async def reports(self, award_id: str) -> None:
        await self.agreements.record_reports(FIRST, award_id, final_report="R-1", accountant_report="A-1")

    async def balances(self, award_id: str) -> dict[str, int]:
        """Of the award's call, which has this award alone; what is zero is left out."""
        agreement = await self.agreements.get_agreement(FIRST, award_id)
        async with transaction(self.pool) as connection:
            found = await ledger.balances(connection, agreement.award.call_id)
        return {str(kind): pence for kind, pence in found.items() if pence}

    async def assert_in_order(self) -> None:
        async with self.pool.acquire() as connection, connection.transaction(isolation="repeatable_read"):
            assert (await ledger.trial_balance(connection)).in_order
            assert (await replay(connection)).faults == ()


def line(pence: int, category: CostCategory = CostCategory.LABOUR, evidence: str = "") -> CostLine:
    return CostLine(category=category, amount_pence=pence, evidence=evidence or f"INV-{secrets.token_hex(6)}")


async def refused(reason: str, asked: Awaitable[object]) -> str:
    with pytest.raises(HubError) as error:
        await asked
    assert error.value.reason == reason, error.value.detail
    return error.value.detail


@asynccontextmanager
async def running_fund(dsn: str, cluster: Cluster) -> AsyncIterator[Fund]:
    """The use cases on a database, with a clock that the test turns."""
    pool = await create_pool(dsn, schema="funding", size_max=12)
    clock, table = TurnedClock(), load_parameters()
    directory = Directory(cluster, clock=clock, kinds=("firm",))
    directory.firms[FIRM_ID] = directory_pb2.Firm(id=FIRM_ID, name="Firm", sic="25.62")
    for machine_id, firm_id in ((MACHINE, FIRM_ID), (MACHINE + 1, 22)):
        machine = directory_pb2.Machine(id=machine_id, firm_id=firm_id, path=f"firm-{firm_id}/site/spindle")
        directory.machines.entries[machine_id] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
    judge = Judge(table=table, clock=clock)
    calls = CallService(pool, journal=Journal(pool, clock), table=table, clock=clock)
    applications = ApplicationService(pool, judge=judge, directory=directory, clock=clock)
    decisions = DecisionService(pool, judge=judge, table=table, clock=clock, kick=lambda: None)
    await calls.open_programme()
    milestones = MilestoneService(pool, verifier=Verifier([SIGNER.public_key]), directory=directory, clock=clock)
    changes = AgreementChanges(pool, table=table, clock=clock, kick=lambda: None)
    agreements = AgreementService(pool, changes=changes, table=table, clock=clock)
    claims = ClaimService(changes=changes, milestones=milestones, table=table, clock=clock)
    impacts = ImpactService(pool, table=table, directory=directory, clock=clock)
    yield Fund(
        pool,
        clock,
        calls,
        applications,
        decisions,
        agreements,
        claims,
        BalanceService(pool, table=table, clock=clock),
        milestones,
        impacts,
        ChangeService(pool, clock=clock),
    )
    await pool.close()


async def asked(fund: Fund, award_id: str, kind: ChangeKind, **fields: Any) -> Change:
    wanted = {"request_id": secrets.token_hex(6), "reason": "the machine comes later", **fields}
    return (await fund.changes.request(FIRM, award_id, kind=kind, **wanted))[-1]


async def decided(fund: Fund, award_id: str, change: Change, *, approve: bool = True) -> Change:
    return (await fund.changes.decide(FIRST, award_id, change.id, approve=approve, reason="seen"))[-1]
