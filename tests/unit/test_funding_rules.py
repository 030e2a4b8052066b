"""The fund's rules at their limits: one unit below, equal, one unit above, in the unit of the field."""

from datetime import date
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.funding.operations import run_operation
from services.funding.parameters import load_parameters
from services.funding.rules import assessment, assistance, claims, costs, eligibility, transparency
from services.funding.rules.exact import InvalidFact, decimal

TABLE = load_parameters()
AS_OF = date(2026, 11, 23)
NOW = TABLE.at(AS_OF)


def ask(operation: str, **facts: Any) -> dict[str, Any]:
    return run_operation(operation, facts, table=TABLE, as_of=AS_OF)


# Intensity

RATES = [
    ("feasibility", {"micro": "0.70", "small": "0.70", "medium": "0.60", "large": "0.50"}),
    ("industrial_research", {"micro": "0.70", "small": "0.70", "medium": "0.60", "large": "0.50"}),
    ("experimental_development", {"micro": "0.45", "small": "0.45", "medium": "0.35", "large": "0.25"}),
]


@pytest.mark.parametrize(("category", "rates"), RATES)
def test_rates_by_category_and_size(category: str, rates: dict[str, str]) -> None:
    for firm_size, rate in rates.items():
        answer = ask("grant_cap", org_type="business", size=firm_size, category=category, eligible_p=100)
        assert (answer["max_rate"], answer["max_grant_p"]) == (rate, int(Fraction(rate) * 100))
        assert answer["max_grant_p"] + answer["min_match_p"] == 100


@pytest.mark.parametrize(
    ("organisation", "rate"),
    [
        ("research_organisation", "1.00"),
        ("rto", "1.00"),
        ("public_sector", "1.00"),
        ("charity", "1.00"),
        ("academic", "0.80"),
    ],
)
def test_research_organisations_are_not_capped_by_size(organisation: str, rate: str) -> None:
    answer = ask("grant_cap", org_type=organisation, size=None, category="experimental_development", eligible_p=101)
    assert (answer["max_rate"], answer["max_grant_p"]) == (rate, int(Fraction(rate) * 101))


@pytest.mark.parametrize(
    ("firm_size", "eligible_p", "grant_p"),
    [
        ("medium", 111_111, 38_888),  # 38,888.85: floor and half-up differ
        ("large", 10, 2),  # 2.5: half-up would give 3
        ("large", 6, 1),  # 1.5: half-even would give 2
        ("medium", 0, 0),
        ("medium", 1, 0),
    ],
)
def test_grants_are_rounded_down_to_the_penny(firm_size: str, eligible_p: int, grant_p: int) -> None:
    facts = {
        "org_type": "business",
        "size": firm_size,
        "category": "experimental_development",
        "eligible_p": eligible_p,
    }
    answer = ask("grant_cap", **facts)
    assert (answer["max_grant_p"], answer["min_match_p"]) == (grant_p, eligible_p - grant_p)


@pytest.mark.parametrize(("other_p", "grant_p"), [(0, 600), (1, 599), (599, 1), (600, 0), (601, 0)])
def test_other_public_money_for_the_same_costs_is_taken_off(other_p: int, grant_p: int) -> None:
    facts = {"org_type": "business", "size": "medium", "category": "feasibility", "eligible_p": 1_000}
    answer = ask("grant_cap", **facts, other_public_same_costs_p=other_p, other_public_other_costs_p=10**9)
    assert (answer["max_grant_p"], answer["min_match_p"]) == (grant_p, 1_000 - grant_p)


@pytest.mark.parametrize(
    ("call_rate", "rate"), [("0.59", "0.59"), ("0.60", "0.60"), ("0.61", "0.60"), ("0.455", "0.455")]
)
def test_a_call_may_lower_a_rate_and_never_raise_it(call_rate: str, rate: str) -> None:
    facts = {"org_type": "business", "size": "medium", "category": "feasibility", "eligible_p": 1_000}
    assert ask("grant_cap", **facts, call_rate=call_rate)["max_rate"] == rate


@pytest.mark.parametrize(
    ("requested_p", "allowed", "excess_p", "code"),
    [(44_999, True, 0, None), (45_000, True, 0, None), (45_001, False, 1, "INTENSITY_EXCEEDED"), (0, True, 0, None)],
)
def test_a_request_one_penny_over_the_cap_is_refused(
    requested_p: int, allowed: bool, excess_p: int, code: str | None
) -> None:
    facts = {"org_type": "business", "size": "small", "category": "experimental_development", "eligible_p": 100_000}
    answer = ask("grant_request", **facts, requested_p=requested_p)
    assert (answer["allowed"], answer["excess_p"], answer["code"]) == (allowed, excess_p, code)
    assert answer["max_grant_p"] == 45_000


def project(research_p: int, business_p: int, limit: str = "0.30") -> dict[str, Any]:
    partners = [
        {"org_type": "business", "size": "small", "category": "industrial_research", "eligible_p": business_p},
        {"org_type": "research_organisation", "eligible_p": research_p},
    ]
    return ask("consortium", max_research_share=limit, partners=partners)


@pytest.mark.parametrize(
    ("research_p", "business_p", "share_text", "allowed"),
    [
        (29_999_999, 70_000_001, "0.30", True),
        (30_000_000, 70_000_000, "0.30", True),
        (30_000_001, 69_999_999, "0.31", False),
        (0, 100, "0.00", True),
        (0, 0, "0.00", True),
        (1, 10**9, "0.01", True),
    ],
)
def test_research_share_is_rounded_up(research_p: int, business_p: int, share_text: str, allowed: bool) -> None:
    answer = project(research_p, business_p)
    assert (answer["research_share"], answer["allowed"]) == (share_text, allowed)
    assert answer["code"] == (None if allowed else "RESEARCH_SHARE_EXCEEDED")
    assert answer["max_grant_p"] == research_p + business_p * 7 // 10


def test_a_limit_in_percent_points_is_answered_in_percent_points() -> None:
    assert project(3_000_001, 6_999_999, "30.00")["research_share"] == "30.01"


def test_a_partner_without_a_size_leaves_the_share_known_and_the_cap_open() -> None:
    partners = [{"org_type": "business", "eligible_p": 70}, {"org_type": "academic", "eligible_p": 30}]
    answer = ask("consortium", max_research_share="0.30", partners=partners)
    assert (answer["research_share"], answer["allowed"], answer["max_grant_p"]) == ("0.30", True, None)


# Minimal financial assistance


def mfa(
    proposed_p: int, *history: tuple[str, int, str, str], award: str = "2026-06-15", group: tuple[str, ...] = ("X",)
) -> Any:
    items = [{"date": d, "amount_p": p, "kind": k, "enterprise": e} for d, p, k, e in history]
    return ask("mfa_check", award_date=award, proposed_p=proposed_p, history=items, enterprise_group=list(group))


@pytest.mark.parametrize(
    ("proposed_p", "allowed", "code", "max_offer_p"),
    [
        (11_499_999, True, None, 11_499_999),
        (11_500_000, True, None, 11_500_000),
        (11_500_001, False, "MFA_LIMIT", 11_500_000),
    ],
)
def test_mfa_limit_is_inclusive(proposed_p: int, allowed: bool, code: str | None, max_offer_p: int) -> None:
    answer = mfa(proposed_p, ("2025-01-01", 20_000_000, "MFA", "X"))
    assert (answer["allowed"], answer["code"], answer["max_offer_p"]) == (allowed, code, max_offer_p)
    assert (answer["counted_p"], answer["headroom_p"]) == (20_000_000, 11_500_000)


@pytest.mark.parametrize(
    ("award", "window_start"),
    [
        ("2025-03-31", "2022-04-01"), ("2025-04-01", "2023-04-01"), ("2028-02-29", "2025-04-01"),
        ("2026-12-31", "2024-04-01"), ("2027-01-01", "2024-04-01"),
    ],
)  # fmt: skip
def test_mfa_window_starts_on_1_april_two_years_before(award: str, window_start: str) -> None:
    assert mfa(0, award=award)["window_start"] == window_start


@pytest.mark.parametrize(
    ("given_on", "counted_p"),
    [("2024-03-31", 0), ("2024-04-01", 7), ("2026-06-14", 7), ("2026-06-15", 7), ("2026-06-16", 0)],
)
def test_mfa_counts_from_the_first_day_of_the_window_to_the_day_of_giving(given_on: str, counted_p: int) -> None:
    assert mfa(0, (given_on, 7, "MFA", "X"))["counted_p"] == counted_p


@pytest.mark.parametrize(
    ("kind", "counted_p"),
    [("MFA", 7), ("SPEI", 7), ("SAFA", 7), ("DE_MINIMIS", 7), ("SUBSIDY_SCHEME", 0), ("OTHER", 0)],
)
def test_kinds_that_count_towards_mfa(kind: str, counted_p: int) -> None:
    assert mfa(0, ("2026-01-01", 7, kind, "X"))["counted_p"] == counted_p


def test_sister_firms_share_one_limit_and_strangers_do_not() -> None:
    history = (("2026-01-01", 20_000_000, "MFA", "SISTER"), ("2026-01-01", 5_000_000, "MFA", "STRANGER"))
    assert mfa(11_500_001, *history, group=("X", "SISTER"))["allowed"] is False
    assert mfa(11_500_001, *history, group=("X",))["allowed"] is True


def test_nothing_can_be_offered_without_headroom() -> None:
    for counted_p in (31_500_000, 31_500_001):
        answer = mfa(1, ("2026-01-01", counted_p, "MFA", "X"))
        assert (answer["headroom_p"], answer["max_offer_p"], answer["code"]) == (0, 0, "MFA_LIMIT")


@pytest.mark.parametrize(("proposed_p", "entry"), [(9_999_999, False), (10_000_000, False), (10_000_001, True)])
def test_mfa_above_100000_pounds_needs_a_database_entry(proposed_p: int, entry: bool) -> None:
    assert mfa(proposed_p)["database_entry_required"] is entry
    assert ask("transparency", route="MFA", amount_p=proposed_p)["database_entry_required"] is entry


@pytest.mark.parametrize(
    ("given_on", "counted"), [("2023-06-15", 0), ("2023-06-16", 7), ("2026-06-15", 7), ("2026-06-16", 0)]
)
def test_northern_ireland_window_is_three_rolling_years(given_on: str, counted: int) -> None:
    check = ni_check(date(2026, 6, 15), 0, date.fromisoformat(given_on), 7)
    assert check.counted == counted


def ni_check(award: date, proposed_c: int, given_on: date, amount: int) -> assistance.AssistanceCheck:
    kind = assistance.AssistanceKind.DE_MINIMIS
    history = [assistance.Assistance(given_on=given_on, amount=amount, kind=kind, enterprise="X")]
    return assistance.ni_de_minimis_check(
        award_date=award, proposed_c=proposed_c, history=history, single_undertaking=frozenset({"X"}), table=TABLE
    )


@pytest.mark.parametrize(("proposed_c", "allowed"), [(9_999_999, True), (10_000_000, True), (10_000_001, False)])
def test_northern_ireland_limit_is_inclusive(proposed_c: int, allowed: bool) -> None:
    check = ni_check(date(2026, 6, 15), proposed_c, date(2025, 1, 1), 20_000_000)
    assert (check.allowed, check.code) == (allowed, None if allowed else "DE_MINIMIS_LIMIT")


# Transparency and referral


@pytest.mark.parametrize(
    ("confirmed", "due"),
    [
        ("2026-08-31", "2026-11-30"), ("2026-11-30", "2027-02-28"), ("2027-11-30", "2028-02-29"),
        ("2027-11-29", "2028-02-29"), ("2026-02-28", "2026-05-28"), ("2026-10-15", "2027-01-15"),
    ],
)  # fmt: skip
def test_entry_is_due_three_months_after_confirmation(confirmed: str, due: str) -> None:
    answer = ask("transparency", route="STANDALONE", amount_p=1, decision_confirmed=confirmed)
    assert (answer["database_entry_required"], answer["entry_due_by"]) == (True, due)


@pytest.mark.parametrize(
    ("amount_p", "entered", "required"),
    [(9_999_999, True, False), (10_000_000, True, False), (10_000_001, True, True), (1, False, True)],
)
def test_awards_under_an_entered_scheme_are_entered_above_100000(amount_p: int, entered: bool, required: bool) -> None:
    facts = {"route": "SCHEME", "amount_p": amount_p, "decision_confirmed": "2026-01-31"}
    answer = ask("transparency", **facts, scheme_in_database=entered)
    assert answer["database_entry_required"] is required
    assert answer["entry_due_by"] == ("2026-04-30" if required else None)


@pytest.mark.parametrize(
    ("day", "sectors", "threshold_p"),
    [
        (date(2025, 8, 3), frozenset[str](), 1_000_000_000),
        (date(2025, 8, 4), frozenset[str](), 2_500_000_000),
        (date(2025, 8, 4), frozenset({"vehicles"}), 500_000_000),
    ],
)
def test_referral_is_mandatory_strictly_above_the_threshold_of_the_day(
    day: date, sectors: frozenset[str], threshold_p: int
) -> None:
    for pence, required in ((-1, False), (0, False), (1, True)):
        found = transparency.referral(
            amount_p=threshold_p - 100 + pence, related_p=100, sectors=sectors, parameters=TABLE.at(day)
        )
        assert (found.required, found.code) == (required, "REFERRAL_REQUIRED" if required else None)


def test_an_unknown_sensitive_sector_is_refused() -> None:
    with pytest.raises(InvalidFact):
        transparency.referral(amount_p=1, sectors={"cheese"}, parameters=NOW)


# Match, adoption, programme ratio


@pytest.mark.parametrize(
    ("eligible_p", "grant_p"),
    [(3_999_999, 1_999_999), (4_000_000, 2_000_000), (4_000_001, 2_000_000), (9_000_000, 2_000_000), (0, 0)],
)
def test_adoption_grant_is_half_up_to_its_maximum(eligible_p: int, grant_p: int) -> None:
    answer = ask("adoption_grant", sic="25.62", is_sme=True, eligible_p=eligible_p, rate="0.50", max_grant_p=2_000_000)
    assert (answer["grant_p"], answer["match_p"]) == (grant_p, eligible_p - grant_p)


@pytest.mark.parametrize(
    ("sic", "is_sme", "code"),
    [
        ("09.90", True, "NOT_MANUFACTURING"), ("10.11", True, None), ("33.20", True, None), ("33200", True, None),
        ("35.11", True, "NOT_MANUFACTURING"), ("62.01", False, "NOT_MANUFACTURING"), ("C 28", False, "NOT_SME"),
    ],
)  # fmt: skip
def test_adoption_grants_are_for_small_manufacturers(sic: str, is_sme: bool, code: str | None) -> None:
    answer = ask("adoption_grant", sic=sic, is_sme=is_sme, eligible_p=100, rate="0.50", max_grant_p=100)
    assert (answer["eligible"], answer["code"], answer["grant_p"]) == (code is None, code, 0 if code else 50)


def matched(*pledges: tuple[str, str, int, bool], in_kind_allowed: bool = False) -> dict[str, Any]:
    items = [{"kind": k, "source": s, "amount_p": p, "confirmed": c} for k, s, p, c in pledges]
    return ask("match_check", eligible_p=1_000, grant_p=600, pledges=items, in_kind_allowed=in_kind_allowed)


@pytest.mark.parametrize(("pledged_p", "shortfall_p"), [(399, 1), (400, 0), (401, 0), (0, 400)])
def test_match_must_cover_what_the_grant_leaves(pledged_p: int, shortfall_p: int) -> None:
    answer = matched(("cash", "private", pledged_p, True))
    assert (answer["required_p"], answer["counted_p"], answer["shortfall_p"]) == (400, pledged_p, shortfall_p)
    assert (answer["ok"], answer["code"]) == (not shortfall_p, "MATCH_SHORTFALL" if shortfall_p else None)


@pytest.mark.parametrize(
    ("pledge", "in_kind_allowed", "counted_p", "public_p"),
    [
        (("cash", "private", 400, False), False, 0, 0),
        (("in_kind", "private", 400, True), False, 0, 0),
        (("in_kind", "private", 400, True), True, 400, 0),
        (("in_kind", "private", 400, False), True, 0, 0),
        (("cash", "public", 400, True), False, 0, 400),
        (("in_kind", "local_authority", 400, True), True, 0, 400),
        (("cash", "council", 400, False), False, 0, 0),
        (("cash", "bank", 400, True), False, 400, 0),
    ],
)
def test_what_counts_as_match(
    pledge: tuple[str, str, int, bool], in_kind_allowed: bool, counted_p: int, public_p: int
) -> None:
    answer = matched(pledge, in_kind_allowed=in_kind_allowed)
    assert (answer["counted_p"], answer["public_same_costs_p"]) == (counted_p, public_p)


@pytest.mark.parametrize(
    ("business_p", "ratio", "met"),
    [(2_999_999_999, "1.49", False), (3_000_000_000, "1.50", True), (3_000_000_001, "1.50", True)],
)
def test_programme_ratio_is_tested_exactly(business_p: int, ratio: str, met: bool) -> None:
    facts = {"public_committed_p": 2_000_000_000, "target_business_per_public": "1.5"}
    answer = ask("fund_ratio", **facts, business_committed_p=business_p)
    assert (answer["ratio"], answer["met"]) == (ratio, met)


def test_programme_ratio_without_public_money_is_met_and_has_no_value() -> None:
    for business_p in (0, 5):
        facts = {"public_committed_p": 0, "business_committed_p": business_p, "target_business_per_public": "1.5"}
        answer = ask("fund_ratio", **facts)
        assert (answer["ratio"], answer["met"]) == (None, True)


# Claims


def claimed(**facts: Any) -> dict[str, Any]:
    usual = {
        "max_grant_p": 1_000_000, "award_rate": "0.50", "paid_so_far_p": 0, "held_so_far_p": 0, "defrayed_costs_p": 0,
        "is_final": False, "final_report_received": False, "iar_received": False, "retention_rate": "0.10",
        "period_end": "2026-06-30", "submitted": "2026-07-15",
    }  # fmt: skip
    return ask("claim", **{**usual, **facts})


@pytest.mark.parametrize(
    ("submitted", "days", "code"),
    [
        ("2026-06-29", -1, "CLAIM_EARLY"), ("2026-06-30", 0, None), ("2026-07-29", 29, None), ("2026-07-30", 30, None),
        ("2026-07-31", 31, "CLAIM_LATE"),
    ],
)  # fmt: skip
def test_day_30_is_in_and_day_31_is_late(submitted: str, days: int, code: str | None) -> None:
    answer = claimed(submitted=submitted, defrayed_costs_p=200, held_so_far_p=7)
    assert (answer["accepted"], answer["days_after_period_end"], answer["code"]) == (code is None, days, code)
    assert (answer["payable_now_p"], answer["held_p"]) == ((107, 0) if code is None else (0, 7))


@pytest.mark.parametrize(
    ("submitted", "code"), [("2027-02-27", None), ("2027-02-28", None), ("2027-03-01", "CLAIM_LATE")]
)
def test_a_final_claim_has_three_months(submitted: str, code: str | None) -> None:
    assert claimed(is_final=True, period_end="2026-11-30", submitted=submitted)["code"] == code


@pytest.mark.parametrize(
    ("paid_p", "payable_p", "held_p"),
    [(399_999, 500_000, 0), (400_000, 500_000, 0), (400_001, 499_999, 1), (900_000, 0, 100_000)],
)
def test_at_most_nine_tenths_are_paid_before_completion(paid_p: int, payable_p: int, held_p: int) -> None:
    answer = claimed(paid_so_far_p=paid_p, defrayed_costs_p=1_000_000)
    assert (answer["claimed_grant_p"], answer["payable_now_p"], answer["held_p"]) == (500_000, payable_p, held_p)


def test_the_retention_line_is_rounded_down_and_covers_all_claims() -> None:
    first = claimed(max_grant_p=1_001, defrayed_costs_p=2_002)
    assert (first["payable_now_p"], first["held_p"]) == (900, 101)
    second = claimed(max_grant_p=1_001, paid_so_far_p=900, held_so_far_p=101, defrayed_costs_p=2)
    assert (second["payable_now_p"], second["held_p"], second["unpaid_over_grant_p"]) == (0, 101, 1)


@pytest.mark.parametrize(
    ("final_report", "accountant", "payable_p", "held_p"),
    [(True, True, 100_000, 0), (True, False, 0, 100_000), (False, True, 0, 100_000), (False, False, 0, 100_000)],
)
def test_what_is_held_is_released_with_both_reports(
    final_report: bool, accountant: bool, payable_p: int, held_p: int
) -> None:
    reports = {"is_final": True, "final_report_received": final_report, "iar_received": accountant}
    answer = claimed(paid_so_far_p=900_000, held_so_far_p=40_000, defrayed_costs_p=120_000, **reports)
    assert (answer["payable_now_p"], answer["held_p"], answer["unpaid_over_grant_p"]) == (payable_p, held_p, 0)


@pytest.mark.parametrize(("costs_p", "over_p"), [(199_998, 0), (200_000, 0), (200_002, 1), (400_000, 100_000)])
def test_never_above_the_grant_in_total(costs_p: int, over_p: int) -> None:
    complete = {"is_final": True, "final_report_received": True, "iar_received": True}
    answer = claimed(paid_so_far_p=900_000, defrayed_costs_p=costs_p, **complete)
    assert answer["payable_now_p"] == costs_p // 2 - over_p
    assert (answer["unpaid_over_grant_p"], answer["held_p"]) == (over_p, 0)


@given(
    grant_p=st.integers(0, 10**7),
    costs_p=st.lists(st.integers(0, 10**7), min_size=1, max_size=8),
    rate_percent=st.integers(0, 100),
    retention_percent=st.integers(0, 100),
    reports=st.booleans(),
)
def test_claims_add_up_whatever_their_order(
    grant_p: int, costs_p: list[int], rate_percent: int, retention_percent: int, reports: bool
) -> None:
    """Paid and held never pass the grant, and every claimed penny is paid, held or over the grant."""
    paid = held = over = claimed_p = 0
    for number, cost_p in enumerate(costs_p, start=1):
        final = number == len(costs_p)
        facts = claims.ClaimFacts(
            max_grant_p=grant_p, award_rate=Fraction(rate_percent, 100),
            retention_rate=Fraction(retention_percent, 100),
            paid_so_far_p=paid, held_so_far_p=held, defrayed_costs_p=cost_p, is_final=final,
            final_report_received=reports, iar_received=reports, period_end=AS_OF, submitted=AS_OF,
        )  # fmt: skip
        decision = claims.decide_claim(facts, NOW)
        paid, held = paid + decision.payable_now_p, decision.held_p
        over, claimed_p = over + decision.unpaid_over_grant_p, claimed_p + decision.claimed_grant_p
        if not (final and reports):
            assert 100 * paid <= (100 - retention_percent) * grant_p
    assert paid + held <= grant_p
    assert paid + held + over == claimed_p
    if reports:
        assert held == 0


# Costs, eligibility, assessment


def test_cost_rules_round_down_and_survive_zero_days() -> None:
    assert costs.labour(gross_yearly_p=4_000_001, working_days=220, days=Fraction(10)).eligible_p == 181_818
    assert costs.labour(gross_yearly_p=4_000_001, working_days=0, days=Fraction(10)).eligible_p == 0
    assert costs.labour(gross_yearly_p=100, working_days=220, days=Fraction(220)).eligible_p == 100
    assert costs.overhead(labour_p=104, parameters=NOW).eligible_p == 20
    usage = costs.capital_usage(value_p=10_001, residual_p=1_000, utilisation=Fraction(1, 2))
    assert usage.eligible_p == 4_500
    with pytest.raises(InvalidFact):
        costs.labour(gross_yearly_p=100, working_days=220, days=Fraction(221))
    with pytest.raises(InvalidFact):
        costs.capital_usage(value_p=1, residual_p=2, utilisation=Fraction(1))


SOUND = eligibility.FirmFacts(
    sic="28.41", uk_registered=True, insolvent=False, ailing=False, recovery_order_outstanding=False,
    earlier_projects_finished=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, None),
        ({"sic": "62.01"}, "NOT_MANUFACTURING"),
        ({"uk_registered": False}, "NOT_UK_REGISTERED"),
        ({"insolvent": True}, "INSOLVENT"),
        ({"ailing": True}, "AILING"),
        ({"recovery_order_outstanding": True}, "RECOVERY_ORDER"),
        ({"earlier_projects_finished": False}, "EARLIER_PROJECT_OPEN"),
    ],
)
def test_eligibility_names_each_reason(change: dict[str, Any], code: str | None) -> None:
    found = eligibility.eligibility(eligibility.FirmFacts(**{**vars(SOUND), **change}), NOW)
    assert (found.eligible, found.code) == (code is None, code)


def test_a_call_may_admit_other_divisions() -> None:
    software = eligibility.FirmFacts(**{**vars(SOUND), "sic": "62.01"})
    assert eligibility.eligibility(software, NOW, also_divisions={62}).eligible


@pytest.mark.parametrize("sic", ["", "C", "steel", "1", "123456", "10.711"])
def test_what_is_not_a_sic_code_is_refused(sic: str) -> None:
    with pytest.raises(InvalidFact):
        eligibility.sic_division(sic)


def scores(*percents: str, conflicts: int = 0, out_of_scope: int = 0) -> list[assessment.Score]:
    return [
        assessment.Score(
            assessor=str(number), percent=decimal(percent), in_scope=number >= out_of_scope, conflict=number < conflicts
        )
        for number, percent in enumerate(percents)
    ]


@pytest.mark.parametrize(
    ("given_scores", "code"),
    [
        (scores("70", "70", "70"), None),
        (scores("69", "70", "71"), None),
        (scores("69", "70", "70"), "BELOW_THRESHOLD"),  # 69.67 would be shown as 70
        (scores("69.5", "69.5", "69.5"), "BELOW_THRESHOLD"),
        (scores("90", "90"), "TOO_FEW_ASSESSORS"),
        (scores("90", "90", "90", conflicts=1), "TOO_FEW_ASSESSORS"),
        (scores("1", "70", "70", "70", conflicts=1), None),
        (scores(*["90"] * 5), None),
        (scores(*["90"] * 6), "TOO_MANY_ASSESSORS"),
        (scores("90", "90", "90", out_of_scope=1), None),
        (scores("90", "90", "90", "90", out_of_scope=2), "OUT_OF_SCOPE"),
        ([], "TOO_FEW_ASSESSORS"),
    ],
)
def test_assessment_uses_the_exact_mean(given_scores: list[assessment.Score], code: str | None) -> None:
    found = assessment.assess(given_scores, NOW)
    assert (found.passed, found.code) == (code is None, code)
