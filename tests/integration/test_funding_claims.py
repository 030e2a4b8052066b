"""From an award to its last penny, on a real database with a clock that the test turns: claims, retention, races, ends."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import date, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from services.common.database import transaction
from services.common.kafka import Cluster
from services.funding import ledger
from services.funding.agreement import Agreement, AgreementState, ClaimState, CostLine
from services.funding.award_store import given_to
from services.funding.domain import CostCategory
from services.funding.gauges import ProgressGauges
from services.funding.ledger import AccountKind
from tests.integration.funding_awards import (
    BUSINESS,
    COST,
    FIRM,
    FIRM_ID,
    FIRST,
    GRANT,
    OTHER,
    SECOND,
    Fund,
    line,
    refused,
    running_fund,
)


@pytest_asyncio.fixture(scope="module")
async def fund(dsn: str, cluster: Cluster) -> AsyncIterator[Fund]:
    async with running_fund(dsn, cluster) as running:
        yield running


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
