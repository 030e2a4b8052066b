"""What an award brought, and changes that are asked for while it runs."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import date, timedelta
from fractions import Fraction
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from services.common.database import transaction
from services.common.errors import HubError
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.funding.agreement import AgreementState
from services.funding.award_store import given_to
from services.funding.change_requests import ChangeKind, ChangeState
from services.funding.domain import Cost, CostCategory
from services.funding.impact import Figures, ImpactKind, change_between
from services.funding.impacts import Impact
from tests.integration.funding_awards import (
    BUSINESS,
    COST,
    FIRM,
    FIRM_ID,
    FIRST,
    GRANT,
    OTHER,
    Fund,
    asked,
    decided,
    line,
    refused,
    running_fund,
)


@pytest_asyncio.fixture(scope="module")
async def fund(dsn: str, cluster: Cluster) -> AsyncIterator[Fund]:
    async with running_fund(dsn, cluster) as running:
        yield running


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
