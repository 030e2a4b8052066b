"""Token buckets, and that the page of limits says what the code has."""

import importlib
import re
from pathlib import Path

import pytest

from services.common.limits import Allowances, Limits
from services.common.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
ROW = re.compile(r"\| .* \| ([\d,]+) \| .* \| `([\w.]+)` \|")


def test_the_page_of_limits_says_what_the_code_has() -> None:
    rows = ROW.findall(PAGE.read_text())
    assert len(rows) > 15
    for value, name in rows:
        if name.startswith("SMDIH_"):
            found = Settings.model_fields[name.removeprefix("SMDIH_").lower()].default
        else:
            module, _, constant = name.rpartition(".")
            found = getattr(importlib.import_module(module), constant)
        assert (name, found) == (name, float(value.replace(",", "")))
    named = {name for _, name in rows}
    assert {f"SMDIH_{field.upper()}" for field in Settings.model_fields if field.startswith("limit_")} <= named


def test_settings_and_limits_have_the_same_defaults() -> None:
    fields = Settings.model_fields
    assert Limits() == Limits(
        fields["limit_requests_per_s"].default,
        fields["limit_operator_requests_per_s"].default,
        fields["limit_burst_s"].default,
        fields["limit_streams"].default,
        fields["limit_failures_per_minute"].default,
    )


def test_a_burst_then_a_rate_and_the_wait_is_told() -> None:
    now_s = 0.0
    allowances = Allowances(monotonic_s=lambda: now_s)
    assert [allowances.take("a", per_s=2, most=4) for _ in range(5)] == [0, 0, 0, 0, 1]
    assert allowances.take("b", per_s=2, most=4) == 0
    now_s = 0.5
    assert [allowances.take("a", per_s=2, most=4) for _ in range(2)] == [0, 1]
    now_s = 100.0
    assert [allowances.take("a", per_s=2, most=4) for _ in range(5)] == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(("per_s", "wait_s"), [(0.1, 10), (1.0, 1), (1000.0, 1)])
def test_the_wait_is_whole_seconds_and_enough(per_s: float, wait_s: int) -> None:
    now_s = 0.0
    allowances = Allowances(monotonic_s=lambda: now_s)
    assert allowances.take("a", per_s=per_s, most=1) == 0
    assert allowances.take("a", per_s=per_s, most=1) == wait_s
    now_s = float(wait_s)
    assert allowances.take("a", per_s=per_s, most=1) == 0


def test_what_is_remembered_has_a_limit() -> None:
    allowances = Allowances(holders_max=10, monotonic_s=lambda: 0.0)
    assert all(allowances.take(holder, per_s=1, most=1) == 0 for holder in range(1000))
    assert allowances.take(999, per_s=1, most=1) == 1
    assert allowances.take(0, per_s=1, most=1) == 0
