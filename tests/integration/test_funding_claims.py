"""From an award to its last penny, on a real database with a clock that the test turns: claims, retention, races, ends."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from services.common.clock import to_us
from services.common.database import Pool, create_pool, transaction
from services.common.directory import Directory
from services.common.errors import HubError
from services.common.evidence import Signer, Statement, Verifier, new_key
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.funding import call_store, ledger
from services.funding.agreement import Agreement, AgreementState, ClaimState, CostLine
from services.funding.agreement_changes import AgreementChanges
from services.funding.agreements import AgreementService
from services.funding.applications import ApplicationService
from services.funding.award_store import given_to
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.change_requests import Change, ChangeKind, ChangeService, ChangeState
from services.funding.claims import ClaimService
from services.funding.decisions import DecisionService
from services.funding.domain import Cost, CostCategory, Declaration, Match, SizeFigures
from services.funding.gauges import ProgressGauges
from services.funding.impact import Figures, ImpactKind, change_between
from services.funding.impacts import Impact, ImpactService
from services.funding.journal import Journal
from services.funding.judging import Judge
from services.funding.ledger import AccountKind
from services.funding.ledger_replay import replay
from services.funding.milestone import Comparison, Milestone
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


@pytest_asyncio.fixture(scope="module")
async def fund(dsn: str, cluster: Cluster) -> AsyncIterator[Fund]:
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


async def test_an_award_is_accepted_claimed_retained_and_completed_to_the_penny(fund: Fund) -> None:
    award_id = await fund.award()
    first = await fund.paid(award_id, 6, 5_000_00)
    assert (first.paid_pence, first.held_pence, first.business_paid_pence) == (2_000_00, 0, 3_000_00)
    # 40 % of 4,900.00 is 1,960.00; with 2,000.00 paid, 90 % of 4,000.00 leaves 1,600.00 now and 360.00 held.
    second = await fund.paid(award_id, 7, 4_900_00)
    assert (second.paid_pence, second.held_pence, second.left_pence) == (3_600_00, 360_00, 40_00)
    assert await fund.balances(award_id) == {
        "public_committed": 40_00,
        "public_held": 360_00,
        "public_paid": 3_600_00,
        "co_investment_source": -BUSINESS,
        "co_investment_committed": 60_00,
        "co_investment_paid": 5_940_00,
    }
    final = await fund.claim(award_id, 8, 50_00)
    await refused("REPORTS_MISSING", fund.decide(award_id, final))
    await fund.reports(award_id)
    await fund.decide(award_id, final)
    done = await fund.settle(award_id, final)
    # The retention is released with 20.00 for the last costs; 20.00 of the grant was not needed.
    assert (done.state, done.paid_pence, done.held_pence) == (AgreementState.COMPLETE, 3_980_00, 0)
    assert (done.restored_pence, done.left_pence) == (20_00, 0)
    assert await fund.balances(award_id) == {
        "public_budget": 20_00,
        "public_paid": 3_980_00,
        "co_investment_source": -5_970_00,
        "co_investment_paid": 5_970_00,
    }
    await refused("AWARD_COMPLETE", fund.claim(award_id, 7, 1))
    await fund.assert_in_order()
    async with transaction(fund.pool) as connection:
        rows = await connection.fetch(
            "SELECT action FROM audit WHERE application_id = $1 ORDER BY id", done.award.application_id
        )
        topics = await connection.fetchval("SELECT count(*) FROM outbox WHERE key = $1", award_id.encode())
    assert [row["action"] for row in rows][-4:] == [
        "claim_submitted",
        "reports_recorded",
        "claim_decided",
        "claim_paid",
    ]
    # Awarded, accepted, paid three times.
    assert topics == 5


async def test_without_the_firms_written_confirmation_nothing_is_paid(fund: Fund) -> None:
    award_id = await fund.award(confirm=False)
    claim_id = await fund.claim(award_id, 6, 1_000_00)
    await fund.decide(award_id, claim_id)
    await refused("ASSISTANCE_UNCONFIRMED", fund.settle(award_id, claim_id))
    async with transaction(fund.pool) as connection:
        # This grant is one of them.
        here = sum(item.amount_pence for item in await given_to(connection, FIRM_ID))
    limit = 315_000_00 - here
    confirm = fund.agreements.confirm_assistance
    await refused("MFA_LIMIT", confirm(FIRM, award_id, elsewhere_pence=limit + 1, statement="we, the board"))
    for _ in range(2):
        await confirm(FIRM, award_id, elsewhere_pence=limit, statement="we, the board")
    await refused("ALREADY_CONFIRMED", confirm(FIRM, award_id, elsewhere_pence=0, statement="no"))
    assert (await fund.settle(award_id, claim_id)).paid_pence == 400_00


async def test_who_decides_a_claim_does_not_release_its_money(fund: Fund) -> None:
    award_id = await fund.award()
    claim_id = await fund.claim(award_id, 6, 1_000_00)
    await refused("CLAIM_SUBMITTED", fund.settle(award_id, claim_id))
    await fund.decide(award_id, claim_id)
    await refused("SECOND_PERSON", fund.settle(award_id, claim_id, caller=FIRST))
    with pytest.raises(asyncpg.CheckViolationError, match="claim_paid_by_check"):
        await fund.pool.execute(
            "UPDATE claim SET state = 'paid', paid = now(), paid_by = decided_by WHERE id = $1", claim_id
        )
    back = await fund.settle(award_id, claim_id, release=False)
    assert back.claims[0].state is ClaimState.SUBMITTED
    await fund.claims.decide_claim(SECOND, award_id, claim_id, accept=True, reason="again")
    assert (await fund.settle(award_id, claim_id, caller=FIRST)).paid_pence == 400_00


async def test_a_claim_waits_until_the_second_person_has_released_its_money(fund: Fund) -> None:
    award_id = await fund.award()
    first = date(2026, 6, 2)
    claim_id = await fund.claim(award_id, 6, 1_000_00, day=first, period_end=first.isoformat())
    sent_us = fund.clock.now_us()
    await fund.decide(award_id, claim_id)

    async def waiting_since() -> float:
        await ProgressGauges(fund.pool).measure()
        return time.time() - (REGISTRY.get_sample_value("smdih_funding_claim_waiting_seconds") or 0)

    assert await waiting_since() == pytest.approx(sent_us / 1e6, abs=60)
    await fund.settle(award_id, claim_id)
    assert await waiting_since() > sent_us / 1e6 + 86_400


async def test_payments_that_race_and_repeat_pay_once(fund: Fund) -> None:
    award_id = await fund.award()
    claim_id = await fund.claim(award_id, 6, 1_000_00)
    await fund.decide(award_id, claim_id)
    answers = await asyncio.gather(*(fund.settle(award_id, claim_id) for _ in range(8)))
    assert {answer.paid_pence for answer in answers} == {400_00}
    assert (await fund.balances(award_id))["public_paid"] == 400_00
    await fund.assert_in_order()


async def test_two_claims_that_race_are_settled_one_after_the_other(fund: Fund) -> None:
    award_id = await fund.award()
    june, july = await fund.claim(award_id, 6, 6_000_00), await fund.claim(award_id, 7, 6_000_00)
    await refused("CLAIM_OUT_OF_TURN", fund.decide(award_id, july))
    outcomes = await asyncio.gather(
        *(fund.decide(award_id, one) for one in (june, july, june, july)), return_exceptions=True
    )
    assert all(isinstance(one, Agreement) or getattr(one, "reason", "") == "CLAIM_OUT_OF_TURN" for one in outcomes)
    await refused("CLAIM_OUT_OF_TURN", fund.decide(award_id, july))
    await fund.settle(award_id, june)
    await fund.decide(award_id, july)
    both = await fund.settle(award_id, july)
    # 2,400.00 twice is over the grant: 90 % is paid, the rest of the grant held, 800.00 is nobody's.
    assert (both.paid_pence, both.held_pence, both.left_pence) == (3_600_00, 400_00, 0)
    assert both.claims[1].decision is not None
    assert both.claims[1].decision.over_grant_pence == 800_00
    await fund.assert_in_order()


async def test_the_same_days_or_the_same_paper_are_claimed_once(fund: Fund) -> None:
    award_id, other_award = await fund.award(), await fund.award()
    shared = [line(1_000_00, evidence="INV-SHARED")]
    outcomes = await asyncio.gather(
        fund.claim(award_id, 6, 0, costs=shared),
        fund.claim(award_id, 6, 1_000_00),
        fund.claim(other_award, 6, 0, costs=shared),
        return_exceptions=True,
    )
    assert {getattr(one, "reason", "") for one in outcomes} <= {"", "CLAIM_PERIOD_OVERLAPS", "EVIDENCE_USED"}
    async with transaction(fund.pool) as connection:
        papers = await connection.fetchval("SELECT count(*) FROM claimed_evidence WHERE evidence = 'INV-SHARED'")
    assert papers == 1
    claims = (await fund.agreements.get_agreement(FIRM, award_id)).claims
    assert len(claims) == 1
    await refused("CLAIM_PERIOD_OVERLAPS", fund.claim(award_id, 6, 1))
    # What a person rejected may be claimed again, the same papers too.
    await fund.decide(award_id, claims[0].id, accept=False)
    again: dict[str, Any] = {"request_id": "again", "costs": list(claims[0].costs)}
    claim_id = await fund.claim(award_id, 6, 0, **again)
    assert await fund.claim(award_id, 6, 0, **again) == claim_id
    await refused("REQUEST_ID_REUSED", fund.claim(award_id, 6, 5, request_id="again"))


async def test_a_claim_that_was_rejected_may_be_corrected_within_thirty_days(fund: Fund) -> None:
    for day, state in ((date(2026, 9, 19), ClaimState.DECIDED), (date(2026, 9, 20), ClaimState.LAPSED)):
        award_id = await fund.award()
        june = await fund.claim(award_id, 6, 1_000_00, day=date(2026, 7, 30))
        fund.clock.day = date(2026, 8, 20)
        await fund.decide(award_id, june, accept=False)
        again = await fund.claim(award_id, 6, 1_000_00, day=day)
        corrected = (await fund.decide(award_id, again)).claims[1]
        assert corrected.state is state, corrected.decision
    # One that was late when it came stays late.
    july = await fund.claim(award_id, 7, 1_000_00, day=date(2026, 8, 31))
    await fund.decide(award_id, july, accept=False)
    late = await fund.claim(award_id, 7, 1_000_00, day=date(2026, 9, 1))
    assert (await fund.decide(award_id, late)).claims[-1].state is ClaimState.LAPSED
    # Neither is the award closed while the final claim may be corrected.
    final = await fund.claim(award_id, 8, 1_00, day=date(2026, 11, 30))
    fund.clock.day = date(2026, 12, 10)
    await fund.decide(award_id, final, accept=False)
    fund.clock.day = date(2027, 1, 9)
    await refused("CLOSE_EARLY", fund.agreements.close(FIRST, award_id, reason="late"))
    fund.clock.day = date(2027, 1, 10)
    await fund.agreements.close(FIRST, award_id, reason="late")


async def test_a_claim_is_in_time_on_day_30_and_lapses_on_day_31(fund: Fund) -> None:
    award_id = await fund.award()
    end_of_june = date(2026, 6, 30)
    await refused("CLAIM_EARLY", fund.claim(award_id, 6, 1, day=end_of_june - timedelta(days=1)))
    june = await fund.claim(award_id, 6, 1_000_00, day=end_of_june + timedelta(days=31))
    lapsed = (await fund.decide(award_id, june)).claims[0]
    assert (lapsed.state, lapsed.decision and lapsed.decision.code) == (ClaimState.LAPSED, "CLAIM_LATE")
    await refused("CLAIM_LAPSED", fund.settle(award_id, june))
    july = await fund.claim(award_id, 7, 1_000_00, day=date(2026, 7, 31) + timedelta(days=30))
    assert (await fund.decide(award_id, july)).claims[1].state is ClaimState.DECIDED


async def test_withdrawing_restores_the_budget_and_frees_the_headroom(fund: Fund) -> None:
    untouched = await fund.award(accept=False, confirm=False)
    for _ in range(2):
        ended = await fund.agreements.withdraw(FIRM, untouched, reason="sold")
        assert (ended.state, ended.restored_pence) == (AgreementState.WITHDRAWN, GRANT)
    assert await fund.balances(untouched) == {"public_budget": GRANT}
    begun = await fund.award()
    paid = await fund.paid(begun, 6, 1_000_00)
    claim_id = await fund.claim(begun, 7, 1_000_00)
    await refused("CLAIM_OPEN", fund.agreements.withdraw(FIRM, begun, reason="sold"))
    await fund.decide(begun, claim_id, accept=False)
    ended = await fund.agreements.withdraw(FIRM, begun, reason="sold")
    assert (ended.paid_pence, ended.restored_pence) == (400_00, GRANT - 400_00)
    assert (await fund.balances(begun))["public_budget"] == GRANT - 400_00
    async with transaction(fund.pool) as connection:
        given = await given_to(connection, FIRM_ID)
    assert sum(item.amount_pence == 400_00 for item in given) >= 1
    assert paid.award.firm_id == FIRM_ID
    await fund.assert_in_order()


async def test_a_final_claim_without_costs_releases_what_is_held(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.paid(award_id, 6, COST)
    await refused("COSTS_MISSING", fund.claim(award_id, 7, 0, costs=[]))
    final = await fund.claim(award_id, 8, 0, costs=[])
    await fund.reports(award_id)
    await fund.decide(award_id, final)
    done = await fund.settle(award_id, final)
    assert (done.state, done.paid_pence, done.held_pence) == (AgreementState.COMPLETE, GRANT, 0)
    await fund.assert_in_order()


async def test_without_a_final_claim_in_time_the_retention_lapses(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.paid(award_id, 6, 9_500_00)
    fund.clock.day = date(2026, 11, 30)
    await refused("CLOSE_EARLY", fund.agreements.close(FIRST, award_id, reason="late"))
    fund.clock.day = date(2026, 12, 1)
    ended = await fund.agreements.close(FIRST, award_id, reason="late")
    assert (ended.state, ended.paid_pence, ended.held_pence) == (AgreementState.LAPSED, 3_600_00, 0)
    assert ended.restored_pence == 400_00
    assert (await fund.balances(award_id))["public_budget"] == 400_00
    await fund.assert_in_order()


async def test_money_taken_back_is_a_new_transfer_and_never_more_than_was_paid(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.paid(award_id, 6, 1_000_00)

    def recover(request_id: str, pence: int) -> Awaitable[Agreement]:
        return fund.agreements.recover(
            FIRST, award_id, request_id=request_id, amount_pence=pence, reason="not defrayed"
        )

    answers = await asyncio.gather(*(recover("r1", 300_00) for _ in range(4)))
    assert {answer.recovered_pence for answer in answers} == {300_00}
    await refused("REQUEST_ID_REUSED", recover("r1", 1_00))
    await refused("RECOVERY_OVER_PAID", recover("r2", 100_01))
    await recover("r2", 100_00)
    after = await fund.balances(award_id)
    assert (after["public_recovered"], after.get("public_paid", 0)) == (400_00, 0)
    await fund.assert_in_order()


@pytest.mark.parametrize(
    ("statement", "constraint"),
    [
        ("UPDATE agreement SET paid_pence = 1 WHERE award_id = $1", "follows the ledger"),
        ("UPDATE agreement SET grant_pence = grant_pence + 1 WHERE award_id = $1", "follows the ledger"),
        ("DELETE FROM agreement WHERE award_id = $1", "append-only"),
        ("UPDATE claim SET state = 'submitted', paid = NULL, paid_by = NULL WHERE award_id = $1", "append-only"),
        ("DELETE FROM claim WHERE award_id = $1", "append-only"),
    ],
)
async def test_what_is_paid_cannot_be_rewritten(fund: Fund, statement: str, constraint: str) -> None:
    award_id = await fund.award()
    await fund.paid(award_id, 6, 1_000_00)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match=constraint):
        await fund.pool.execute(statement, award_id)


@pytest.mark.parametrize(
    ("purpose", "pence", "constraint"),
    [
        ("claim_paid", 3_600_01, "agreement_before_completion_check"),
        ("claim_held", 4_000_01, "agreement_grant_pence_check"),
        ("grant_recovered", 1, "agreement_recovered_of_paid_check"),
        ("business_paid", BUSINESS + 1, "agreement_business_of_co_investment_check"),
    ],
)
async def test_the_database_itself_refuses_a_payment_past_its_limits(
    fund: Fund, purpose: str, pence: int, constraint: str
) -> None:
    """Whatever code posts it: the accounts of the call have the money, the award does not."""
    award_id = await fund.award()
    async with fund.pool.acquire() as connection:
        undone = connection.transaction()
        await undone.start()
        try:
            # A transfer straight into the table, between accounts that do not mind.
            accounts = await connection.fetch(
                "SELECT id FROM ledger_account WHERE kind = 'co_investment_source' LIMIT 1"
            )
            target = await connection.fetchval(
                "SELECT id FROM ledger_account WHERE kind = 'co_investment_pledged' LIMIT 1"
            )
            with pytest.raises(asyncpg.CheckViolationError, match=constraint):
                await connection.execute(
                    "INSERT INTO ledger_transfer SELECT sequence, 99, $1, $2, $3, $4, $5 FROM ledger_head",
                    accounts[0]["id"],
                    target,
                    pence,
                    purpose,
                    f"{award_id}/forged",
                )
        finally:
            await undone.rollback()


async def test_a_claim_that_does_not_fit_the_award_is_refused_with_its_reason(fund: Fund) -> None:
    award_id = await fund.award()
    for reason, changes in (
        ("CATEGORY_NOT_AWARDED", {"costs": [line(1, CostCategory.TRAVEL)]}),
        ("CLAIM_PERIOD_OUTSIDE", {"period_start": "2026-05-31"}),
        ("CLAIM_PERIOD_OUTSIDE", {"period_start": "2026-07-01"}),
        ("CLAIM_NOT_FINAL", {"is_final": True}),
        ("COSTS_MISSING", {"costs": []}),
        ("EVIDENCE_MISSING", {"costs": [CostLine(category=CostCategory.LABOUR, amount_pence=1, evidence=" ")]}),
        ("EVIDENCE_REPEATED", {"costs": [line(1, evidence="A"), line(1, evidence="A")]}),
        ("AMOUNT_OUT_OF_RANGE", {"costs": [line(2**63)]}),
        ("DATE_INVALID", {"period_end": "2026-06-31"}),
        ("REQUEST_ID_INVALID", {"request_id": "a b"}),
    ):
        await refused(reason, fund.claim(award_id, 6, 1, **changes))
    await refused("AWARD_UNKNOWN", fund.agreements.get_agreement(OTHER, award_id))
    accept: Callable[..., Awaitable[Agreement]] = fund.agreements.accept
    await refused("AWARD_UNKNOWN", accept(OTHER, award_id, project_start="2026-06-01", project_end="2026-08-31"))
    await refused("ALREADY_ACCEPTED", accept(FIRM, award_id, project_start="2026-06-02", project_end="2026-08-31"))
    await refused("FORBIDDEN", fund.claims.decide_claim(FIRM, award_id, "x", accept=True, reason="mine"))
    fresh = await fund.award(accept=False, confirm=False)
    await refused("AWARD_OFFERED", fund.claim(fresh, 6, 1))
    for start in ("2026-05-31", "2026-08-31"):
        await refused("PROJECT_START_OUT_OF_RANGE", accept(FIRM, fresh, project_start=start, project_end="2026-12-31"))
    await accept(FIRM, fresh, project_start="2026-08-30", project_end="2026-12-31")


async def test_the_fund_watches_its_ratio_on_promises_and_on_payments(fund: Fund) -> None:
    view = await fund.whole.get_fund(SECOND)
    assert view.programme_pence == 20_000_000_00
    async with transaction(fund.pool) as connection:
        found = await ledger.balances(connection)
    assert view.public_paid_pence == found[AccountKind.PUBLIC_PAID] > 0
    # 6,000.00 beside 4,000.00, in every promise; where over the grant was claimed, business paid more.
    assert view.on_promises.ratio is not None
    assert view.on_promises.met
    assert view.on_payments.ratio is not None
    await refused("FORBIDDEN", fund.whole.get_fund(FIRM))


def evidence(signer: Signer = SIGNER, **changes: Any) -> dict[str, Any]:
    """Signed: 900 kWh of the firm's machine in the week from 8 June, data for 95 % of it."""

    def at(day: int) -> int:
        return to_us(datetime(2026, 6, day, tzinfo=UTC))

    fields = {
        "measure": "energy_kwh",
        "firm_id": FIRM_ID,
        "machine_id": MACHINE,
        "machine_path": "firm-21/site/spindle",
        "from_us": at(8),
        "to_us": at(15),
        "value": "900.00",
        "unit": "kWh",
        "coverage": "0.95",
        "method": "sum over minutes",
        "issued_us": at(16),
        **changes,
    }
    return signer.sign(Statement(**fields))


SAVES = Milestone(
    id="saves",
    title="A week at 900 kWh or less",
    measure="energy_kwh",
    machine_id=MACHINE,
    comparison=Comparison.AT_MOST,
    threshold="900",
    days_min=7,
    coverage_min="0.95",
    due=date(2026, 6, 30),
)


async def test_a_milestone_is_met_by_signed_evidence_that_comes_with_a_claim(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.milestones.set(FIRST, award_id, [SAVES])
    claim_id = await fund.claim(award_id, 6, 1_000_00)
    detail = await refused("MILESTONE_UNMET", fund.decide(award_id, claim_id))
    assert "saves (A week at 900 kWh or less), due on 2026-06-30, is not met yet" in detail
    shown = evidence()
    for _ in range(2):  # the second is a repeat
        (met,) = await fund.milestones.show(FIRM, award_id, "saves", shown)
        assert (met.value, met.met_us is not None) == ("900.00", True)
    await fund.decide(award_id, claim_id)
    await refused("MILESTONE_MET", fund.milestones.show(FIRM, award_id, "saves", evidence(value="899")))
    await refused("MILESTONE_MET", fund.milestones.set(FIRST, award_id, []))
    # One statement shows one milestone, of whichever award.
    other = await fund.award()
    await fund.milestones.set(FIRST, other, [SAVES])
    await refused("EVIDENCE_USED", fund.milestones.show(FIRM, other, "saves", shown))
    fresh = ("saves", evidence(value="899.99"))
    await fund.claim(other, 6, 1_000_00, evidence=[fresh])
    assert (await fund.milestones.get(FIRM, other))[0].value == "899.99"


async def test_a_final_claim_waits_for_every_milestone_and_those_not_met_may_be_set_anew(fund: Fund) -> None:
    award_id = await fund.award()
    after = replace(SAVES, id="after", due=date(2026, 9, 30))
    await fund.milestones.set(FIRST, award_id, [SAVES, after])
    await fund.milestones.show(FIRM, award_id, "saves", evidence(value="899.98"))
    final = await fund.claim(award_id, 8, 1_00)
    await fund.reports(award_id)
    assert "after" in await refused("MILESTONE_UNMET", fund.decide(award_id, final))
    # It cannot be shown before the project's end: an operator sets another. What is met stays as it was.
    report = Milestone(id="report", title="Lessons are written down", due=date(2026, 8, 31))
    for wrong in ([report], [report, replace(SAVES, threshold="901")]):
        await refused("MILESTONE_MET", fund.milestones.set(FIRST, award_id, wrong))
    left = await fund.milestones.set(FIRST, award_id, [SAVES, report])
    assert [(one.id, one.met_us is not None) for one in left] == [("saves", True), ("report", False)]
    await refused("MILESTONE_UNMET", fund.decide(award_id, final))
    await fund.milestones.set(FIRST, award_id, [SAVES])
    await fund.decide(award_id, final)


async def test_a_week_in_which_the_clocks_change_is_a_week(fund: Fund) -> None:
    award_id = await fund.award()
    await decided(fund, award_id, await asked(fund, award_id, ChangeKind.TIME, project_end="2027-05-31"))
    # From midnight to midnight an hour less than seven times 24; and seven times 24, an hour less by the clock.
    spring: dict[str, Any] = {
        "from_us": to_us(datetime(2027, 3, 22, tzinfo=UTC)),
        "to_us": to_us(datetime(2027, 3, 28, 23, tzinfo=UTC)),
    }
    autumn: dict[str, Any] = {
        "from_us": to_us(datetime(2026, 10, 20, tzinfo=UTC)),
        "to_us": to_us(datetime(2026, 10, 27, tzinfo=UTC)),
    }
    for week in (spring, autumn):
        milestone = replace(SAVES, id=f"week-{week['from_us']}")
        there = [one.as_set for one in await fund.milestones.get(FIRM, award_id)]
        await fund.milestones.set(FIRST, award_id, [*there, milestone])
        short = evidence(**{**week, "from_us": week["from_us"] + 60_000_000})
        await refused("EVIDENCE_TOO_SHORT", fund.milestones.show(FIRM, award_id, milestone.id, short))
        await fund.milestones.show(FIRM, award_id, milestone.id, evidence(**week))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": "900.01"}, "MILESTONE_NOT_MET"),
        ({"firm_id": 22}, "EVIDENCE_OTHER_FIRM"),
        ({"machine_id": MACHINE + 1}, "EVIDENCE_OTHER_MACHINE"),
        ({"measure": "working_hours"}, "EVIDENCE_OTHER_MEASURE"),
        ({"coverage": "0.949999"}, "EVIDENCE_TOO_THIN"),
        # A minute less than seven days.
        ({"to_us": to_us(datetime(2026, 6, 14, 23, 59, tzinfo=UTC))}, "EVIDENCE_TOO_SHORT"),
        # The project began on 1 June, British time: an hour earlier than this in UTC.
        ({"from_us": to_us(datetime(2026, 5, 31, 22, 59, tzinfo=UTC))}, "EVIDENCE_OUTSIDE_PROJECT"),
        ({"to_us": to_us(datetime(2026, 8, 31, 23, 1, tzinfo=UTC))}, "EVIDENCE_OUTSIDE_PROJECT"),
        ({"signer": Signer(new_key())}, "UNKNOWN_EVIDENCE_KEY"),
    ],
)
async def test_evidence_that_does_not_show_the_milestone_is_refused(
    fund: Fund, changes: dict[str, Any], reason: str
) -> None:
    award_id = await fund.award()
    await fund.milestones.set(FIRST, award_id, [SAVES])
    await refused(reason, fund.milestones.show(FIRM, award_id, "saves", evidence(**changes)))
    assert (await fund.milestones.get(FIRM, award_id))[0].met_us is None


async def test_evidence_that_was_touched_and_milestones_of_others_are_refused(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.milestones.set(FIRST, award_id, [SAVES])
    forged = evidence(value="950")
    forged["statement"]["value"] = "900"
    await refused("WRONG_SIGNATURE", fund.milestones.show(FIRM, award_id, "saves", forged))
    await refused("BAD_EVIDENCE", fund.milestones.show(FIRM, award_id, "saves", {"statement": {}}))
    await refused("MILESTONE_UNKNOWN", fund.milestones.show(FIRM, award_id, "else", evidence()))
    await refused("AWARD_UNKNOWN", fund.milestones.show(OTHER, award_id, "saves", evidence()))
    await refused("AWARD_UNKNOWN", fund.milestones.get(OTHER, award_id))
    await refused("FORBIDDEN", fund.milestones.show(FIRST, award_id, "saves", evidence()))
    await refused("FORBIDDEN", fund.milestones.set(FIRM, award_id, []))
    for changes in (
        {"id": "Bad id"},
        {"threshold": "much"},
        {"days_min": 0},
        {"coverage_min": "1.01"},
        {"coverage_min": "NaN"},
        {"title": " "},
    ):
        with pytest.raises(HubError) as error:
            await fund.milestones.set(FIRST, award_id, [replace(SAVES, **changes)])
        assert error.value.HTTP_STATUS == 400
    await refused("MACHINE_UNKNOWN", fund.milestones.set(FIRST, award_id, [replace(SAVES, machine_id=MACHINE + 1)]))
    await refused("MILESTONE_INVALID", fund.milestones.set(FIRST, award_id, [SAVES, SAVES]))


BEFORE = Figures(
    jobs_fte="12.5", value_added_pence=900_000_00, hours_worked="20000", energy_kwh="250000.5", carbon_kg_co2e="51750"
)
AFTER = Figures(
    jobs_fte="13", value_added_pence=1_050_000_00, hours_worked="21000", energy_kwh="240000", carbon_kg_co2e="48000.25"
)


async def reported(fund: Fund, award_id: str, kind: ImpactKind, figures: Figures, year_ending: str) -> Impact:
    return await fund.impacts.report(
        FIRM,
        award_id,
        kind,
        year_ending=year_ending,
        figures=figures,
        uncertainty_percent="5",
        method="meters and payroll",
    )


async def test_impact_is_reported_before_and_after_and_summed_exactly(fund: Fund) -> None:
    award_id, other = await fund.award(), await fund.award()
    fund.clock.day = date(2026, 7, 1)
    impact = await fund.impacts.get(FIRM, award_id)
    # Thirty days after 1 June; fifteen months after 31 August, in a month without a 31st.
    assert (impact.baseline_due, impact.follow_up_due) == (date(2026, 7, 1), date(2027, 11, 30))
    assert not {one.award_id for one in (await fund.impacts.overview(FIRST)).overdue} & {award_id, other}
    fund.clock.day = date(2026, 7, 2)
    overview = await fund.impacts.overview(FIRST)
    assert {award_id, other} <= {one.award_id for one in overview.overdue if one.kind is ImpactKind.BASELINE}
    wrong = await reported(fund, award_id, ImpactKind.BASELINE, AFTER, "2026-05-30")
    for _ in range(2):  # the second is a repeat
        corrected = await reported(fund, award_id, ImpactKind.BASELINE, BEFORE, "2026-05-31")
    assert [one.version for one in corrected.reports] == [1, 2]
    assert corrected.reports[0] == wrong.reports[0]
    before = await fund.impacts.overview(FIRST)
    await refused("YEAR_OPEN", reported(fund, award_id, ImpactKind.FOLLOW_UP, AFTER, "2027-08-31"))
    fund.clock.day = date(2027, 9, 1)
    await reported(fund, award_id, ImpactKind.FOLLOW_UP, AFTER, "2027-08-31")
    after = await fund.impacts.overview(Caller(9, Role.PARTNER, partner_id=1))
    assert after.totals.projects == before.totals.projects + 1
    assert after.totals.jobs_fte - before.totals.jobs_fte == Fraction("0.5")
    assert after.totals.energy_kwh - before.totals.energy_kwh == Fraction("-10000.5")
    assert after.totals.carbon_kg_co2e - before.totals.carbon_kg_co2e == Fraction("-3749.75")
    change = change_between(BEFORE, AFTER)
    assert (change.productivity_before, change.productivity_after) == (Fraction(4_500), Fraction(5_000))
    assert award_id not in {one.award_id for one in after.overdue}


async def test_impact_that_makes_no_sense_or_is_anothers_is_refused(fund: Fund) -> None:
    award_id = await fund.award()
    fund.clock.day = date(2026, 12, 1)
    await refused("YEAR_OUT_OF_RANGE", reported(fund, award_id, ImpactKind.BASELINE, BEFORE, "2026-06-01"))
    await refused("YEAR_OUT_OF_RANGE", reported(fund, award_id, ImpactKind.FOLLOW_UP, AFTER, "2026-08-31"))
    for changes in ({"jobs_fte": "-1"}, {"energy_kwh": "1e9"}, {"hours_worked": ""}, {"value_added_pence": -1}):
        with pytest.raises(HubError) as error:
            await reported(fund, award_id, ImpactKind.BASELINE, replace(BEFORE, **changes), "2026-05-31")
        assert error.value.HTTP_STATUS == 400
    await refused("AWARD_UNKNOWN", fund.impacts.get(OTHER, award_id))
    await refused("FORBIDDEN", fund.impacts.get(Caller(9, Role.PARTNER, partner_id=1), award_id))
    await refused("FORBIDDEN", fund.impacts.overview(FIRM))
    offered = await fund.award(accept=False, confirm=False)
    await refused("AWARD_OFFERED", fund.impacts.get(FIRM, offered))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await fund.pool.execute("TRUNCATE impact_report")


async def asked(fund: Fund, award_id: str, kind: ChangeKind, **fields: Any) -> Change:
    wanted = {"request_id": secrets.token_hex(6), "reason": "the machine comes later", **fields}
    return (await fund.changes.request(FIRM, award_id, kind=kind, **wanted))[-1]


async def decided(fund: Fund, award_id: str, change: Change, *, approve: bool = True) -> Change:
    return (await fund.changes.decide(FIRST, award_id, change.id, approve=approve, reason="seen"))[-1]


async def test_an_approved_change_takes_effect_once_and_a_reduction_in_the_ledger(fund: Fund) -> None:
    award_id = await fund.award()
    await fund.paid(award_id, 6, 5_000_00)
    reduction = await asked(fund, award_id, ChangeKind.REDUCTION, reduction_pence=500_00, request_id="less")
    assert (await asked(fund, award_id, ChangeKind.REDUCTION, reduction_pence=500_00, request_id="less")) == reduction
    await refused("CHANGE_OPEN", asked(fund, award_id, ChangeKind.OTHER))
    assert (await fund.balances(award_id))["public_committed"] == 2_000_00
    for _ in range(2):  # the second is a repeat
        assert (await decided(fund, award_id, reduction)).state is ChangeState.APPROVED
    await refused("ALREADY_DECIDED", decided(fund, award_id, reduction, approve=False))
    assert await fund.balances(award_id) == {
        "public_budget": 500_00,
        "public_committed": 1_500_00,
        "public_paid": 2_000_00,
        "co_investment_source": -BUSINESS,
        "co_investment_committed": 3_000_00,
        "co_investment_paid": 3_000_00,
    }
    # 90 % of what is left of the grant, 3,500.00, may be paid before completion.
    second = await fund.paid(award_id, 7, 4_900_00)
    assert (second.paid_pence, second.held_pence) == (3_150_00, 350_00)
    await fund.reports(award_id)
    last = await fund.paid(award_id, 8, 100_00)
    assert (last.state, last.paid_pence, last.restored_pence) == (AgreementState.COMPLETE, 3_500_00, 500_00)
    await fund.assert_in_order()


async def test_dates_and_cost_categories_change_within_what_was_awarded(fund: Fund) -> None:
    award_id = await fund.award()
    later = await decided(fund, award_id, await asked(fund, award_id, ChangeKind.TIME, project_end="2026-10-31"))
    assert later.project_end == date(2026, 10, 31)
    assert (await fund.agreements.get_agreement(FIRM, award_id)).project_end == date(2026, 10, 31)
    materials = [line(1_000_00, CostCategory.MATERIALS)]
    await refused("CATEGORY_NOT_AWARDED", fund.claim(award_id, 6, 0, costs=materials))
    moved = (
        Cost(category=CostCategory.LABOUR, amount_pence=COST - 1_000_00),
        Cost(category=CostCategory.MATERIALS, amount_pence=1_000_00),
    )
    await refused("COSTS_SUM_CHANGED", asked(fund, award_id, ChangeKind.COSTS, costs=moved[:1]))
    await decided(fund, award_id, await asked(fund, award_id, ChangeKind.COSTS, costs=moved))
    claim_id = await fund.claim(award_id, 6, 0, costs=materials)
    await refused("CLAIM_OPEN", asked(fund, award_id, ChangeKind.OTHER))
    await fund.decide(award_id, claim_id)
    await fund.settle(award_id, claim_id)
    rejected = await fund.claim(award_id, 7, 1)
    await fund.decide(award_id, rejected, accept=False)
    # June is claimed, July is not, and the final claim needs a day.
    for out in ("2026-06-30", "2036-06-02"):
        await refused("PROJECT_END_OUT_OF_RANGE", asked(fund, award_id, ChangeKind.TIME, project_end=out))
    for within in ("2036-06-01", "2026-07-01"):
        fund.clock.day += timedelta(days=1)
        await decided(fund, award_id, await asked(fund, award_id, ChangeKind.TIME, project_end=within))
    day: dict[str, Any] = {"period_start": "2026-07-01", "period_end": "2026-07-01", "is_final": True}
    final = await fund.claim(award_id, 7, 0, costs=[], **day)
    await fund.reports(award_id)
    await fund.decide(award_id, final)
    assert (await fund.settle(award_id, final)).state is AgreementState.COMPLETE


async def test_changes_that_make_no_sense_or_are_anothers_are_refused(fund: Fund) -> None:
    award_id = await fund.award()
    await refused("REDUCTION_TOO_LARGE", asked(fund, award_id, ChangeKind.REDUCTION, reduction_pence=GRANT))
    await refused("CHANGE_INVALID", asked(fund, award_id, ChangeKind.REDUCTION))
    await refused("CHANGE_INVALID", asked(fund, award_id, ChangeKind.TIME, reduction_pence=1))
    await refused("DATE_INVALID", asked(fund, award_id, ChangeKind.TIME, project_end="soon"))
    change = await asked(fund, award_id, ChangeKind.OTHER, request_id="same")
    await refused("REQUEST_ID_REUSED", asked(fund, award_id, ChangeKind.OTHER, request_id="same", reason="else"))
    assert (await decided(fund, award_id, change, approve=False)).state is ChangeState.REFUSED
    await refused("FORBIDDEN", fund.changes.decide(FIRM, award_id, change.id, approve=True, reason="mine"))
    await refused("AWARD_UNKNOWN", fund.changes.get(OTHER, award_id))
    await refused("CHANGE_UNKNOWN", fund.changes.decide(FIRST, award_id, "none", approve=True, reason="x"))
    offered = await fund.award(accept=False, confirm=False)
    await refused("AWARD_OFFERED", asked(fund, offered, ChangeKind.OTHER))
    # Before the firm confirms its assistance the smaller grant is what has to fit.
    unconfirmed = await fund.award(confirm=False)
    await decided(fund, unconfirmed, await asked(fund, unconfirmed, ChangeKind.REDUCTION, reduction_pence=1_00))
    async with transaction(fund.pool) as connection:
        here = sum(item.amount_pence for item in await given_to(connection, FIRM_ID))
    rest = 315_000_00 - here
    over = fund.agreements.confirm_assistance(FIRM, unconfirmed, elsewhere_pence=rest + 1, statement="x")
    await refused("MFA_LIMIT", over)
    await fund.agreements.confirm_assistance(FIRM, unconfirmed, elsewhere_pence=rest, statement="x")
