"""Exact numbers, dates, the dated parameter table, and the evaluation command."""

import json
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.funding import evaluate
from services.funding.operations import OPERATIONS, UnknownOperation, run_operation
from services.funding.parameters import ParameterMissing, ParametersInvalid, load_parameters
from services.funding.rules import size
from services.funding.rules.calendar import add_months, financial_year_start, rolling_years_start
from services.funding.rules.exact import InvalidFact, decimal, fixed_down, fixed_up, rate_text, share

TABLE = load_parameters()
AS_OF = date(2026, 11, 23)


def ask(operation: str, **facts: Any) -> dict[str, Any]:
    return run_operation(operation, facts, table=TABLE, as_of=AS_OF)


# Exact numbers, dates, parameters


@pytest.mark.parametrize("text", ["", "-1", "1e3", "0.5.1", ".5", "5.", " 1", "NaN", "1/2", "٣"])
def test_only_plain_decimal_text_is_a_number(text: str) -> None:
    with pytest.raises(InvalidFact):
        decimal(text)


@given(amount=st.integers(0, 10**12), rate=st.fractions(0, 1))
def test_shares_are_rounded_down_and_never_more_than_a_penny_short(amount: int, rate: Fraction) -> None:
    assert 0 <= amount * rate - share(amount, rate) < 1


def test_numbers_are_shown_without_hiding_an_excess() -> None:
    assert (fixed_down(Fraction("249.999")), fixed_up(Fraction("0.300001"))) == ("249.99", "0.31")
    assert (rate_text(Fraction("0.6")), rate_text(Fraction("0.455"))) == ("0.60", "0.455")


def test_dates_at_month_ends_and_leap_days() -> None:
    assert add_months(date(2028, 2, 29), -12) == date(2027, 2, 28)
    assert financial_year_start(date(2027, 3, 31)) == date(2026, 4, 1)
    assert financial_year_start(date(2027, 4, 1)) == date(2027, 4, 1)
    assert rolling_years_start(date(2028, 2, 29), 3) == date(2025, 3, 1)
    with pytest.raises(InvalidFact):
        add_months(date(9999, 12, 1), 3)


def test_a_number_is_looked_up_on_the_day_of_the_event() -> None:
    assert TABLE.at(date(2025, 4, 5)).whole("companies_act.small.turnover_p_max") == 1_020_000_000
    assert TABLE.at(date(2025, 4, 6)).whole("companies_act.small.turnover_p_max") == 1_500_000_000
    with pytest.raises(ParameterMissing):
        TABLE.at(date(2023, 1, 3)).whole("mfa.limit_p")


def changed_table(tmp_path: Path, **change: Any) -> Path:
    row = {
        "name": "a", "value": "1", "unit": "pence", "valid_from": "2025-01-01", "valid_to": "2025-12-31", "source": "s",
        "sure": "own", "note": "", "confirmed_by": None,
    }  # fmt: skip
    path = tmp_path / "parameters.json"
    path.write_text(json.dumps({"checked_on": "2026-11-23", "rows": [row, {**row, **change}]}))
    return path


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"valid_from": "2025-12-31", "valid_to": None},
        {"valid_from": None, "valid_to": "2025-01-01"},
        {"name": "b", "value": "1.5"},
        {"name": "b", "value": "-1"},
        {"name": "b", "unit": "furlongs"},
        {"name": "b", "valid_from": "2026-02-01"},
    ],
)
def test_a_contradictory_table_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ParametersInvalid):
        load_parameters(changed_table(tmp_path, **change))


def test_the_version_follows_the_numbers_and_not_the_confirmation(tmp_path: Path) -> None:
    later = {"valid_from": "2026-01-01", "valid_to": None}
    versions = [
        load_parameters(changed_table(tmp_path, **later, **change)).version
        for change in ({}, {"confirmed_by": "A. Person"}, {"value": "2"})
    ]
    assert versions[0] == versions[1] != versions[2]


def test_nothing_is_confirmed_until_a_person_does_it() -> None:
    assert set(TABLE.unconfirmed) == set(TABLE.rows)


# The evaluation command


def run_cases(tmp_path: Path, text: str) -> tuple[int, Path]:
    cases, output = tmp_path / "cases.json", tmp_path / "out" / "actual.json"
    cases.write_text(text)
    return evaluate.main(["--cases", str(cases), "--output", str(output)]), output


def test_evaluation_writes_actual_beside_expected_and_goes_on_after_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratio = {"public_committed_p": 2, "business_committed_p": 3, "target_business_per_public": "1.5"}
    checks = [
        {"operation": "fund_ratio", "input": ratio, "expected": {"met": True}},
        {"operation": "fund_ratio", "input": ratio, "expected": {"met": 1}},
        {"operation": "fly", "input": {}, "expected": {}},
        {"operation": "fund_ratio", "input": {**ratio, "public_committed_p": 2.0}, "expected": {"met": True}},
        {"operation": "fund_ratio", "input": None, "expected": {"met": True}},
        {"operation": ["fund_ratio"]},
        {
            "operation": "transparency",
            "input": {"route": "STANDALONE", "amount_p": 1, "decision_confirmed": "9999-12-01"},
        },
    ]
    code, output = run_cases(tmp_path, json.dumps({"cases": [{"id": "1", "checks": checks}]}))
    written = json.loads(output.read_text())["cases"][0]["checks"]
    assert code == 0
    assert written[0]["actual"]["ratio"] == "1.50"
    assert [set(check["actual"]) == {"error"} for check in written[2:]] == [True] * 5
    assert capsys.readouterr().out == "1 of 7 checks agree, 6 differ\n"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"cases": [{}]}', '{"cases": [{"checks": [1]}]}', '{"cases": [], "as_of": 5}']
)
def test_evaluation_refuses_malformed_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    code, output = run_cases(tmp_path, text)
    captured = capsys.readouterr()
    assert (code, output.exists(), captured.out, captured.err.count("\n")) == (2, False, "", 1)


def test_evaluation_refuses_a_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--cases", str(tmp_path / "none"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_operation_refuses_an_empty_input_with_the_name_of_a_field() -> None:
    for operation in OPERATIONS:
        if operation != "consortium":  # no partners: a share of nothing
            with pytest.raises(InvalidFact, match="missing"):
                ask(operation)
    with pytest.raises(UnknownOperation):
        ask("allocate")


def test_size_is_ordered() -> None:
    assert [each.is_sme for each in size.Size] == [True, True, True, False]
