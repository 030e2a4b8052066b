"""Milestones of an award: set, met by signed evidence of the firm's machines, and asked for before the last claim."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
import pytest_asyncio

from services.common.clock import to_us
from services.common.errors import HubError
from services.common.evidence import Signer, Statement, new_key
from services.common.kafka import Cluster
from services.funding.change_requests import ChangeKind
from services.funding.milestone import Comparison, Milestone
from tests.integration.funding_awards import (
    FIRM,
    FIRM_ID,
    FIRST,
    MACHINE,
    OTHER,
    SIGNER,
    Fund,
    asked,
    decided,
    refused,
    running_fund,
)


@pytest_asyncio.fixture(scope="module")
async def fund(dsn: str, cluster: Cluster) -> AsyncIterator[Fund]:
    async with running_fund(dsn, cluster) as running:
        yield running


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
