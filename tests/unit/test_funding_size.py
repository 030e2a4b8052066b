"""Size of a firm at its limits: one unit below, equal, one unit above; with and without its group."""

from datetime import date
from typing import Any

import pytest

from services.funding.operations import run_operation
from services.funding.parameters import load_parameters
from services.funding.rules.exact import InvalidFact

TABLE = load_parameters()
AS_OF = date(2026, 11, 23)


def ask(operation: str, **facts: Any) -> dict[str, Any]:
    return run_operation(operation, facts, table=TABLE, as_of=AS_OF)


# Size: EU definition


def eu_firm(headcount: str, turnover_c: int, balance_c: int) -> dict[str, Any]:
    return {"headcount_awu": headcount, "turnover_c": turnover_c, "balance_c": balance_c}


def eu_size_of(own: dict[str, Any], *relations: dict[str, Any]) -> dict[str, Any]:
    return ask("sme_status", definition="EU_2003_361", own=own, relations=list(relations))


def holding(percent: str, *, upstream: bool = True, investor: str = "company", **other: Any) -> dict[str, Any]:
    figures = eu_firm("100", 1_000_000_000, 1_000_000_000)
    return {
        "kind": "shareholding",
        "percent": percent,
        "upstream": upstream,
        "investor_type": investor,
        **figures,
        **other,
    }


@pytest.mark.parametrize(
    ("headcount", "expected"),
    [
        ("9.99", "micro"), ("10", "small"), ("10.01", "small"),
        ("49.99", "small"), ("50", "medium"), ("50.01", "medium"),
        ("249.99", "medium"), ("250", "large"), ("250.01", "large"),
    ],
)  # fmt: skip
def test_eu_headcount_limits_are_strict(headcount: str, expected: str) -> None:
    answer = eu_size_of(eu_firm(headcount, 0, 0))
    assert (answer["size"], answer["is_sme"]) == (expected, expected != "large")


@pytest.mark.parametrize(
    ("limit_turnover_c", "limit_balance_c", "inside", "outside"),
    [
        (200_000_000, 200_000_000, "micro", "small"),
        (1_000_000_000, 1_000_000_000, "small", "medium"),
        (5_000_000_000, 4_300_000_000, "medium", "large"),
    ],
)
def test_eu_money_limits_are_inclusive_and_one_is_enough(
    limit_turnover_c: int, limit_balance_c: int, inside: str, outside: str
) -> None:
    far = 10**13
    for cents in (-1, 0):
        assert eu_size_of(eu_firm("1", limit_turnover_c + cents, far))["size"] == inside
        assert eu_size_of(eu_firm("1", far, limit_balance_c + cents))["size"] == inside
    assert eu_size_of(eu_firm("1", limit_turnover_c + 1, limit_balance_c + 1))["size"] == outside


def test_a_firm_without_people_or_money_is_micro() -> None:
    assert eu_size_of(eu_firm("0", 0, 0))["size"] == "micro"


@pytest.mark.parametrize(
    ("percent", "relation", "headcount"),
    [
        ("0", "autonomous", "10.00"), ("24.99", "autonomous", "10.00"), ("25", "partner", "35.00"),
        ("25.01", "partner", "35.01"), ("49.99", "partner", "59.99"), ("50.00", "partner", "60.00"),
        ("50.01", "linked", "110.00"), ("100", "linked", "110.00"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("upstream", [True, False])
def test_holdings_become_partner_at_25_and_linked_above_50(
    percent: str, relation: str, headcount: str, upstream: bool
) -> None:
    answer = eu_size_of(eu_firm("10", 0, 0), holding(percent, upstream=upstream))
    assert (answer["relation"], answer["aggregated"]["headcount_awu"]) == (relation, headcount)


@pytest.mark.parametrize(
    "investor", ["venture_capital", "business_angel", "university", "institutional", "local_authority"]
)
def test_exempt_investors_may_hold_up_to_half(investor: str) -> None:
    own = eu_firm("10", 0, 0)
    assert eu_size_of(own, holding("25", investor=investor))["relation"] == "autonomous"
    assert eu_size_of(own, holding("50.00", investor=investor))["relation"] == "autonomous"
    assert eu_size_of(own, holding("50.01", investor=investor))["relation"] == "linked"


def test_the_exemption_is_for_owners_not_for_firms_owned() -> None:
    answer = eu_size_of(eu_firm("10", 0, 0), holding("30", upstream=False, investor="venture_capital"))
    assert (answer["relation"], answer["aggregated"]["headcount_awu"]) == ("partner", "40.00")


def test_exempt_investors_linked_to_each_other_lose_the_exemption() -> None:
    circle = [holding("20", investor="venture_capital", acts_with="fund family") for _ in range(3)]
    assert eu_size_of(eu_firm("10", 0, 0), *circle[:1])["relation"] == "autonomous"
    assert eu_size_of(eu_firm("10", 0, 0), *circle[:2])["relation"] == "partner"
    assert eu_size_of(eu_firm("10", 0, 0), *circle)["relation"] == "linked"


@pytest.mark.parametrize(("invested_c", "relation"), [(124_999_999, "autonomous"), (125_000_000, "partner")])
def test_angels_together_must_stay_below_their_limit(invested_c: int, relation: str) -> None:
    angels = [
        holding("30", investor="business_angel", investment_c=invested_c - 1),
        holding("5", investor="business_angel", investment_c=1),
    ]
    assert eu_size_of(eu_firm("10", 0, 0), *angels)["relation"] == relation


@pytest.mark.parametrize(
    ("budget_c", "inhabitants", "relation"),
    [(999_999_999, 4_999, "autonomous"), (1_000_000_000, 4_999, "partner"), (999_999_999, 5_000, "partner")],
)
def test_only_small_local_authorities_are_exempt(budget_c: int, inhabitants: int, relation: str) -> None:
    owner = holding("30", investor="local_authority", budget_c=budget_c, inhabitants=inhabitants)
    assert eu_size_of(eu_firm("10", 0, 0), owner)["relation"] == relation


def test_dominant_influence_links_at_any_percentage() -> None:
    assert eu_size_of(eu_firm("10", 0, 0), {**holding("1"), "kind": "dominant_influence"})["relation"] == "linked"


def test_a_partners_linked_firms_are_added_before_its_share() -> None:
    partner = holding("40", linked_to_it=[eu_firm("50", 0, 0)])
    assert eu_size_of(eu_firm("10", 0, 0), partner)["aggregated"]["headcount_awu"] == "70.00"


def test_cross_holdings_count_once_at_the_higher_percentage() -> None:
    answer = eu_size_of(
        eu_firm("10", 0, 0),
        holding("30", enterprise="B", investor="university"),
        holding("20", enterprise="B", upstream=False),
    )
    assert (answer["relation"], answer["aggregated"]["headcount_awu"]) == ("partner", "40.00")


def test_limits_are_tested_on_exact_shares_and_shown_rounded_down() -> None:
    # 33.33 % of 0.03 staff is 0.009999: the firm stays a hair below 250 and the text must not say 250.00.
    other = {**holding("33.33"), "headcount_awu": "0.03", "turnover_c": 1, "balance_c": 0}
    answer = eu_size_of(eu_firm("249.99", 0, 0), other)
    assert (answer["size"], answer["aggregated"]["headcount_awu"]) == ("medium", "249.99")
    over = eu_size_of(eu_firm("1", 5_000_000_000, 4_300_000_001), other)
    assert over["size"] == "large", "a third of a cent over the turnover limit is over"


# Size: Companies Act


def act_size_of(employees: int, turnover_p: int, balance_p: int, start: str = "2025-04-06") -> str:
    group = {"employees_avg": employees, "turnover_p": turnover_p, "balance_p": balance_p}
    answer = ask("sme_status", definition="COMPANIES_ACT_2006", group_total=group, period_start=start)
    return str(answer["size"])


ACT_LIMITS = [
    ("2025-04-06", "micro", 10, 100_000_000, 50_000_000),
    ("2025-04-06", "small", 50, 1_500_000_000, 750_000_000),
    ("2025-04-06", "medium", 250, 5_400_000_000, 2_700_000_000),
    ("2025-04-05", "micro", 10, 63_200_000, 31_600_000),
    ("2025-04-05", "small", 50, 1_020_000_000, 510_000_000),
    ("2025-04-05", "medium", 250, 3_600_000_000, 1_800_000_000),
]


@pytest.mark.parametrize(("start", "inside", "staff", "turnover_p", "balance_p"), ACT_LIMITS)
def test_companies_act_limits_are_inclusive_and_two_of_three_are_enough(
    start: str, inside: str, staff: int, turnover_p: int, balance_p: int
) -> None:
    far = 10**12
    for less in (1, 0):
        assert act_size_of(staff - less, turnover_p - less, far, start) == inside
        assert act_size_of(staff - less, far, balance_p - less, start) == inside
        assert act_size_of(10**6, turnover_p - less, balance_p - less, start) == inside
    assert act_size_of(staff + 1, turnover_p + 1, balance_p, start) != inside
    assert act_size_of(staff + 1, turnover_p, balance_p + 1, start) != inside
    assert act_size_of(staff, turnover_p + 1, balance_p + 1, start) != inside


def test_the_same_group_changes_class_on_the_first_day_of_the_new_limits() -> None:
    group = (60, 1_500_000_000, 750_000_000)
    assert [act_size_of(*group, start) for start in ("2025-04-05", "2025-04-06")] == ["medium", "small"]


def test_fifty_staff_are_small_under_one_definition_and_medium_under_the_other() -> None:
    assert act_size_of(50, 0, 10**12) == "small"
    assert eu_size_of(eu_firm("50", 0, 10**13))["size"] == "medium"


# Size over periods


def series(starting: str | None, headcounts: list[str], **facts: Any) -> str:
    periods = [eu_firm(headcount, 0, 0) for headcount in headcounts]
    given_facts = {"autonomous": True, "starting_status": starting, **facts}
    return str(ask("sme_status_series", definition="EU_2003_361", periods=periods, **given_facts)["size"])


@pytest.mark.parametrize(
    ("starting", "headcounts", "expected"),
    [
        ("medium", ["250"], "medium"),
        ("medium", ["250", "250"], "large"),
        ("medium", ["250", "249.99", "250"], "medium"),
        ("medium", ["250", "250", "249.99"], "large"),
        ("large", ["249.99"], "large"),
        ("large", ["249.99", "249.99"], "medium"),
        ("small", ["60", "300"], "medium"),
        ("small", ["300", "60"], "medium"),
        ("large", ["5", "60"], "medium"),
        ("micro", ["5", "5"], "micro"),
        (None, ["60"], "medium"),
        (None, ["60", "5"], "medium"),
    ],
)
def test_status_changes_after_two_periods_in_a_row(starting: str | None, headcounts: list[str], expected: str) -> None:
    assert series(starting, headcounts) == expected


def test_a_takeover_makes_a_firm_larger_at_once_but_not_smaller() -> None:
    assert series("medium", ["250"], autonomous=False) == "large"
    assert series("large", ["249"], autonomous=False) == "large"
    assert series("large", ["249", "249"], autonomous=False) == "medium"


def test_companies_act_judges_the_period_before_by_the_limits_of_the_period_at_hand() -> None:
    periods = [
        {"employees_avg": 60, "turnover_p": 1_200_000_000, "balance_p": 600_000_000, "period_start": start}
        for start in ("2024-05-01", "2025-05-01")
    ]
    answer = ask(
        "sme_status_series", definition="COMPANIES_ACT_2006", autonomous=True, starting_status="medium", periods=periods
    )
    assert answer["size"] == "small"


def test_a_series_needs_a_period() -> None:
    with pytest.raises(InvalidFact):
        series("small", [])


@pytest.mark.parametrize(
    ("starting", "headcounts", "expected"),
    [("sme", ["250"], "medium"), ("sme", ["20", "20"], "small"), ("not_sme", ["249"], "large")],
)
def test_a_series_may_start_from_no_more_than_being_an_sme(starting: str, headcounts: list[str], expected: str) -> None:
    assert series(starting, headcounts) == expected
