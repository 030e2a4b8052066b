"""An application against every rule: what is told and judged, at the limits."""

from dataclasses import replace
from datetime import UTC, date, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.funding import checks, domain
from services.funding.domain import (
    Assessment,
    Call,
    CallState,
    Content,
    Cost,
    CostCategory,
    Declaration,
    EarlierAssistance,
    Pledge,
    ProjectPartner,
    Refused,
    Relation,
    SizeFigures,
    Terms,
)
from services.funding.ledger import Account, AccountKind, Event, Transfer, event_hash
from services.funding.parameters import load_parameters
from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.intensity import Category, Organisation
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition, Investor, Size
from services.funding.terms import checked_content

TABLE = load_parameters()
DAY = date(2026, 11, 23)
SMALL = SizeFigures(headcount="38", turnover_minor=420_000_000, balance_minor=210_000_000, period_start="2026-01-01")

HOLDING = Relation(
    percent="60", upstream=True, investor=Investor.COMPANY, headcount="10", turnover_minor=1, balance_minor=1
)


def call(**changes: Any) -> Call:
    fields: dict[str, Any] = {
        "id": "c",
        "title": "Digital spindles",
        "budget_pence": 100_000_00,
        "opens_us": 1_000,
        "closes_us": 2_000,
        "category": Category.EXPERIMENTAL_DEVELOPMENT,
        "size_definition": Definition.COMPANIES_ACT,
        "rate_max": "",
        "in_kind_allowed": False,
        "created_us": 0,
    }
    return Call(**{**fields, **changes})


def pledge(pence: int, **changes: Any) -> Pledge:
    fields: dict[str, Any] = {
        "id": "p",
        "application_id": "a",
        "co_investor": "Northgate Capital",
        "kind": PledgeKind.CASH,
        "public_body": False,
        "amount_pence": pence,
        "added_us": 0,
        "confirmed_us": 1,
    }
    return Pledge(**{**fields, **changes})


def assess(
    *,
    eligible: int = 100_000_00,
    requested: int = 0,
    pledges: list[Pledge] | None = None,
    left: int = 100_000_00,
    public: int = 0,
    business: int = 0,
    call_: Call | None = None,
    given_: list[checks.Given] | None = None,
    sic: str = "25.62",
    other_public: int = 0,
    partners: tuple[ProjectPartner, ...] = (),
    related: list[checks.Related] | None = None,
    **declared: Any,
) -> Assessment:
    facts = checks.Facts(
        sic=sic,
        declaration=Declaration(**{"size": SMALL, "uk_registered": True, **declared}),
        eligible_pence=eligible,
        requested_pence=requested,
        other_public_pence=other_public,
        partners=partners,
        related=related or (),
        pledges=pledges,
        given=given_ or (),
    )
    fund = checks.Fund(left_pence=left, public_committed_pence=public, business_committed_pence=business)
    return checks.assess(facts, call_ or call(), fund, TABLE, DAY)


def codes(assessment: Assessment) -> list[str]:
    return [finding.code for finding in assessment.against]


def test_without_a_request_the_grant_is_the_most_that_every_limit_leaves() -> None:
    assert assess().grant_pence == 45_000_00
    assert assess(left=30_000_00).grant_pence == 30_000_00
    assert assess(call_=call(rate_max="0.40")).grant_pence == 40_000_00
    # A call never raises the lawful rate.
    assert assess(call_=call(rate_max="0.90")).grant_pence == 45_000_00
    used = EarlierAssistance(given_on="2026-05-01", amount_pence=300_000_00, kind=AssistanceKind.MFA)
    assert assess(earlier_assistance=(used,)).grant_pence == 15_000_00
    here = [checks.Given(on=date(2024, 4, 1), amount_pence=10_000_00)]
    assert assess(earlier_assistance=(used,), given_=here).grant_pence == 5_000_00
    # The day before the window opened does not count.
    before = [checks.Given(on=date(2024, 3, 31), amount_pence=10_000_00)]
    assert assess(earlier_assistance=(used,), given_=before).grant_pence == 15_000_00


@pytest.mark.parametrize(
    ("requested", "expected"), [(44_999_99, []), (45_000_00, []), (45_000_01, ["INTENSITY_EXCEEDED"])]
)
def test_a_penny_over_the_intensity_is_refused(requested: int, expected: list[str]) -> None:
    assert codes(assess(requested=requested)) == expected


@pytest.mark.parametrize(("left", "expected"), [(40_000_01, []), (40_000_00, []), (39_999_99, ["BUDGET_EXHAUSTED"])])
def test_a_penny_over_the_budget_is_refused(left: int, expected: list[str]) -> None:
    assert codes(assess(requested=40_000_00, left=left)) == expected


@pytest.mark.parametrize(("used", "expected"), [(274_999_99, []), (275_000_00, []), (275_000_01, ["MFA_LIMIT"])])
def test_a_penny_over_the_headroom_is_refused(used: int, expected: list[str]) -> None:
    earlier = EarlierAssistance(given_on="2026-05-01", amount_pence=used, kind=AssistanceKind.MFA)
    assert codes(assess(requested=40_000_00, earlier_assistance=(earlier,))) == expected


@pytest.mark.parametrize(
    ("pledged", "expected"), [(60_000_01, []), (60_000_00, []), (59_999_99, ["MATCH_SHORTFALL", "FUND_RATIO"])]
)
def test_a_penny_less_than_the_match_and_the_ratio_is_refused(pledged: int, expected: list[str]) -> None:
    assert codes(assess(requested=40_000_00, pledges=[pledge(pledged)])) == expected


def test_the_ratio_is_of_the_whole_fund_with_this_award() -> None:
    pledges = [pledge(55_000_00)]
    assert codes(assess(requested=45_000_00, pledges=pledges)) == ["FUND_RATIO"]
    assert codes(assess(requested=45_000_00, pledges=pledges, public=100, business=12_500_00 + 150)) == []
    assert codes(assess(requested=45_000_00, pledges=pledges, public=100, business=12_500_00 + 149)) == ["FUND_RATIO"]


def test_what_is_unconfirmed_public_or_in_kind_is_no_match() -> None:
    pledges = [
        pledge(1, confirmed_us=None),
        pledge(10, public_body=True),
        pledge(100, kind=PledgeKind.IN_KIND),
        pledge(1_000),
    ]
    assert assess(pledges=pledges).match_counted_pence == 1_000
    assert assess(pledges=pledges, call_=call(in_kind_allowed=True)).match_counted_pence == 1_100
    assert [checks.counted_pence(one, call()) for one in pledges] == [1, 0, 0, 1_000]


def test_a_public_pledge_lowers_the_cap_even_before_it_is_confirmed() -> None:
    promised = pledge(5_000_00, public_body=True, confirmed_us=None)
    assert assess(pledges=[promised], other_public=1_00).max_grant_pence == 39_999_00


def test_nothing_to_grant_is_said_with_its_reason() -> None:
    used_up = EarlierAssistance(given_on="2026-05-01", amount_pence=315_000_00, kind=AssistanceKind.DE_MINIMIS)
    assert codes(assess(other_public=45_000_00)) == ["NOTHING_TO_GRANT"]
    assert codes(assess(left=0)) == ["BUDGET_EXHAUSTED"]
    assert codes(assess(earlier_assistance=(used_up,))) == ["MFA_LIMIT"]
    assert codes(assess(eligible=1)) == ["NOTHING_TO_GRANT"]


def test_a_firm_that_may_not_apply_could_be_granted_nothing() -> None:
    software = assess(sic="62.01")
    assert (codes(software), software.max_grant_pence) == (["NOT_MANUFACTURING"], 0)
    assert codes(assess(insolvent=True)) == ["INSOLVENT"]
    assert codes(assess(earlier_project_open=True)) == ["EARLIER_PROJECT_OPEN"]


def test_the_call_names_the_definition_of_size() -> None:
    fifty = SizeFigures(
        headcount="50", turnover_minor=900_000_000, balance_minor=700_000_000, period_start="2026-01-01"
    )
    assert assess(size=fifty).size is Size.SMALL
    assert assess(size=fifty, call_=call(size_definition=Definition.EU)).size is Size.MEDIUM


def test_holdings_on_record_that_are_not_declared_are_told_to_who_decides() -> None:
    eu = call(size_definition=Definition.EU)
    related = [checks.Related(firm_id=7, percent="60"), checks.Related(firm_id=9, percent="25")]

    def told(size: SizeFigures, call_: Call) -> str:
        (text,) = [one.text for one in assess(size=size, call_=call_, related=related).findings if one.rule == "SME"]
        return text

    assert "firm 7 (60 %), firm 9 (25 %) count in its size, and the declaration states 0" in told(SMALL, eu)
    small = replace(HOLDING, percent="24.99")
    assert "states 1 such" in told(replace(SMALL, relations=(HOLDING, small)), eu)
    assert "By record" not in told(replace(SMALL, relations=(HOLDING, replace(HOLDING, percent="25"))), eu)
    assert "its group has firm 7" in told(SMALL, call())


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        (SizeFigures(headcount="5", turnover_minor=0, balance_minor=0, period_start=""), "INVALID_FACT"),
        (SizeFigures(headcount="5", turnover_minor=0, balance_minor=0, period_start="1999-01-01"), "PARAMETER_MISSING"),
    ],
)
def test_facts_that_no_rule_can_read_are_refused(figures: SizeFigures, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        assess(size=figures)
    assert refused.value.reason == reason


@given(
    eligible=st.integers(1, domain.AMOUNT_PENCE_MAX),
    left=st.integers(0, domain.AMOUNT_PENCE_MAX),
    other=st.integers(0, domain.AMOUNT_PENCE_MAX),
    used=st.integers(1, 400_000_00),
)
def test_the_most_that_is_offered_passes_every_rule_when_it_is_asked_for(
    eligible: int, left: int, other: int, used: int
) -> None:
    earlier = EarlierAssistance(given_on="2026-05-01", amount_pence=used, kind=AssistanceKind.MFA)
    most = assess(eligible=eligible, left=left, other_public=other, earlier_assistance=(earlier,)).max_grant_pence
    if most:
        again = assess(eligible=eligible, left=left, other_public=other, earlier_assistance=(earlier,), requested=most)
        assert codes(again) == []
        assert 0 < most <= left
    over = assess(eligible=eligible, left=left, other_public=other, earlier_assistance=(earlier,), requested=most + 1)
    assert codes(over) != []


@pytest.mark.parametrize(
    ("now_us", "state"),
    [(999, CallState.ANNOUNCED), (1_000, CallState.OPEN), (1_999, CallState.OPEN), (2_000, CallState.CLOSED)],
)
def test_a_call_is_open_by_the_time_alone(now_us: int, state: CallState) -> None:
    assert call().state_at(now_us) is state


def test_the_day_of_an_award_is_the_day_in_the_united_kingdom() -> None:
    """At half past eleven in the evening of 31 March in UTC, summer time has made it 1 April: another financial year."""
    assert domain.uk_day(datetime(2026, 3, 31, 23, 30, tzinfo=UTC)) == date(2026, 4, 1)
    assert domain.uk_day(datetime(2026, 1, 31, 23, 30, tzinfo=UTC)) == date(2026, 1, 31)


@given(st.text(max_size=300))
def test_text_is_either_refused_or_can_be_stored(text: str) -> None:
    try:
        taken = domain.checked_text("title", text)
    except Refused:
        return
    assert taken
    assert "\x00" not in taken
    assert taken.encode()


def test_every_part_of_an_event_is_in_its_hash() -> None:
    transfer = Transfer(
        debit=Account("c", AccountKind.PUBLIC_BUDGET),
        credit=Account("c", AccountKind.PUBLIC_COMMITTED),
        amount_pence=5,
        purpose="grant_committed",
        subject_id="a",
    )

    def content(**changes: Any) -> bytes:
        moved = replace(transfer, **changes)
        return Event(request_id="r", kind="k", transfers=(moved,), credential_id=1).content_sha256()

    contents = {
        content(),
        content(amount_pence=6),
        content(purpose="x"),
        content(subject_id="x"),
        content(credit=Account("c", AccountKind.PUBLIC_SOURCE)),
        content(debit=Account("d", AccountKind.PUBLIC_BUDGET)),
    }
    assert len(contents) == 6
    base: dict[str, Any] = {
        "sequence": 1,
        "previous_hash": b"p",
        "recorded_us": 2,
        "credential_id": 3,
        "correlation_id": "c",
        "content": b"x",
    }
    changed: list[dict[str, Any]] = [
        {},
        {"sequence": 2},
        {"previous_hash": b"q"},
        {"recorded_us": 3},
        {"credential_id": 4},
        {"correlation_id": "d"},
        {"content": b"y"},
    ]
    assert len({event_hash(**{**base, **change}) for change in changed}) == 7


def partner(pence: int, organisation: Organisation = Organisation.RESEARCH, **changes: Any) -> ProjectPartner:
    costs = (Cost(category=CostCategory.LABOUR, amount_pence=pence),)
    return ProjectPartner(
        **{"name": f"{organisation} {pence}", "organisation": organisation, "costs": costs, **changes}
    )


def test_each_partner_has_its_own_cap_and_the_project_their_sum() -> None:
    large = SizeFigures(
        headcount="400", turnover_minor=9_000_000_000, balance_minor=9_000_000_000, period_start="2026-01-01"
    )
    business = partner(10_000_00, Organisation.BUSINESS, size=large)
    academic = partner(10_000_00, Organisation.ACADEMIC, other_public_pence=1_000_00)
    research = partner(10_000_00)
    # 45 % of 70,000.00, 25 % of 10,000.00, 80 % of 10,000.00 less what is given already, all of 10,000.00.
    found = assess(partners=(business, academic, research))
    assert found.max_grant_pence == 31_500_00 + 2_500_00 + 7_000_00 + 10_000_00
    assert codes(assess(partners=(business, academic, research), requested=51_000_00)) == []
    assert codes(assess(partners=(business, academic, research), requested=51_000_01)) == ["INTENSITY_EXCEEDED"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"period_start": "next spring"}, "DATE_INVALID"),
        ({"period_start": "\x00"}, "DATE_INVALID"),
        ({"relations": (replace(HOLDING, turnover_minor=-1),)}, "AMOUNT_OUT_OF_RANGE"),
        ({"relations": (replace(HOLDING, percent="100.01"),)}, "DECIMAL_INVALID"),
        ({"relations": (HOLDING,) * 201}, "DECLARATION_INVALID"),
    ],
)
def test_a_partners_figures_are_checked_as_the_applicants_are(changes: dict[str, Any], reason: str) -> None:
    business = partner(1_00, Organisation.BUSINESS, size=replace(SMALL, **changes))
    with pytest.raises(Refused) as refused:
        checked_content(Content(partners=(business,)), Terms())
    assert refused.value.reason == reason


def test_the_research_share_of_a_project_is_limited_to_the_penny() -> None:
    assert codes(assess(partners=(partner(30_000_00),))) == []
    assert codes(assess(partners=(partner(20_000_00), partner(10_000_01, Organisation.ACADEMIC)))) == [
        "RESEARCH_SHARE_EXCEEDED"
    ]


@pytest.mark.parametrize(
    ("eligible", "grant"),
    [(20_000_01, 10_000_00), (39_999_99, 19_999_99), (40_000_00, 20_000_00), (90_000_00, 20_000_00)],
)
def test_an_adoption_call_gives_half_up_to_its_maximum(eligible: int, grant: int) -> None:
    adoption = call(terms=Terms(adoption_max_pence=25_000_00))
    assert assess(call_=adoption, eligible=eligible).grant_pence == grant


def test_an_adoption_call_keeps_its_own_limits_and_is_for_small_manufacturers() -> None:
    lower = call(terms=Terms(adoption_max_pence=15_000_00), rate_max="0.40")
    assert assess(call_=lower, eligible=30_000_00).grant_pence == 12_000_00
    assert assess(call_=lower, eligible=90_000_00).grant_pence == 15_000_00
    # All public money together keeps the rate.
    assert assess(call_=lower, eligible=30_000_00, other_public=11_000_00).grant_pence == 1_000_00
    assert codes(assess(call_=lower, eligible=30_000_00, requested=12_000_01)) == ["INTENSITY_EXCEEDED"]
    large = SizeFigures(
        headcount="400", turnover_minor=9_000_000_000, balance_minor=9_000_000_000, period_start="2026-01-01"
    )
    assert codes(assess(call_=lower, eligible=30_000_00, size=large)) == ["NOT_SME"]
    assert "NOT_MANUFACTURING" in codes(assess(call_=lower, eligible=30_000_00, sic="62.01"))
    with pytest.raises(Refused):
        assess(call_=lower, partners=(partner(1_00),))
