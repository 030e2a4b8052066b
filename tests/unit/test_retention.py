"""Until when data may be removed, and for how long the disk lasts."""

import pytest

from services.ingest.retention.rules import (
    DAY_US,
    HOUR_US,
    STORES,
    ChunkSize,
    Rule,
    cutoffs,
    growth_bytes_a_day,
)

RAW, MINUTE, HOUR = STORES
NOW_US = 1_764_000_000_000_000 + 1


def _days_back(time_us: int | None) -> float:
    assert time_us is not None
    assert time_us % HOUR_US == 0
    return round((NOW_US - time_us) / DAY_US)


def test_firms_without_a_rule_go_by_whole_chunks_and_coarser_data_stay_longer() -> None:
    found = [cutoffs(store, [1, 2, 3], {}, NOW_US) for store in STORES]
    assert [_days_back(one.everybody_us) for one in found] == [400, 1_100, 3_660]
    assert all(not one.firms_us for one in found)
    assert cutoffs(RAW, [], {}, NOW_US).everybody_us is None


def test_a_firm_that_keeps_less_goes_ahead_and_one_that_keeps_more_holds_the_chunks() -> None:
    rules = {2: Rule(raw_days=30), 3: Rule(raw_days=800)}
    found = cutoffs(RAW, [1, 2, 3], rules, NOW_US)
    assert _days_back(found.everybody_us) == 800
    assert {firm: _days_back(us) for firm, us in found.firms_us.items()} == {1: 400, 2: 30}


def test_a_firm_on_hold_keeps_every_chunk_and_nobody_elses_rows() -> None:
    found = cutoffs(RAW, [1, 2, 3], {2: Rule(raw_days=30), 3: Rule(raw_days=10, is_on_hold=True)}, NOW_US)
    assert found.everybody_us is None
    assert {firm: _days_back(us) for firm, us in found.firms_us.items()} == {1: 400, 2: 30}


@pytest.mark.parametrize(
    "rule",
    [
        Rule(raw_days=6),
        Rule(hour_days=36_601),
        Rule(minute_days=300),
        Rule(minute_days=2_000, hour_days=1_999),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rule: Rule) -> None:
    with pytest.raises(ValueError, match=r"days|kept"):
        rule.check()
    Rule(raw_days=7, minute_days=7, hour_days=7).check()


def test_a_quota_of_stored_days_holds_where_no_rule_says_otherwise() -> None:
    assert [Rule(quota_days=90).days(store) for store in STORES] == [90, 1_100, 3_660]
    assert [Rule(quota_days=2_000).days(store) for store in STORES] == [2_000, 2_000, 3_660]
    assert Rule(raw_days=30, quota_days=90).days(RAW) == 30
    with pytest.raises(ValueError, match="kept"):
        Rule(quota_days=2_000, minute_days=1_500).check()


def test_growth_is_what_the_newest_chunks_took_while_data_came_in() -> None:
    day = DAY_US
    chunks = [ChunkSize(NOW_US - (n + 1) * 7 * day, NOW_US - n * 7 * day, 700) for n in range(1, 9)]
    chunks.append(ChunkSize(NOW_US - 7 * day // 2, NOW_US + 7 * day // 2, 350))
    first = NOW_US - 365 * day
    assert growth_bytes_a_day(chunks, first, NOW_US) == pytest.approx(100)
    # A history that was loaded in one go is no growth.
    assert growth_bytes_a_day([*chunks, ChunkSize(0, 7 * day, 10**9)], first, NOW_US) == pytest.approx(100)
    # The hub began within the only chunk.
    chunk = [ChunkSize(NOW_US - 5 * day, NOW_US + 2 * day, 600)]
    assert growth_bytes_a_day(chunk, NOW_US - 3 * day, NOW_US) == pytest.approx(200)
    assert growth_bytes_a_day(chunk, NOW_US - day // 4, NOW_US) is None
    assert growth_bytes_a_day([], first, NOW_US) is None
