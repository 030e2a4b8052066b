"""Counters, energy, local time, tariffs and carbon, on figures that can be checked by hand."""

from datetime import UTC, date, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from services.ingest.kpi.calendar import Span, day_number, local_minutes, span_of
from services.ingest.kpi.counts import counted, flowed, spread
from services.ingest.kpi.tariff import CarbonFactor, Rate, Tariff, carbon, costs, total_pence

LONDON = ZoneInfo("Europe/London")
NAN = np.nan


def _minute(year: int, month: int, day: int, hour: int = 0, minute: int = 0, zone: ZoneInfo = LONDON) -> int:
    return int(datetime(year, month, day, hour, minute, tzinfo=zone).timestamp()) // 60


def _counts(samples: list[list[float]], rollover: float = 0.0) -> tuple[list[float], int]:
    mins, maxs, lasts = (
        np.array([function(minute) if minute else NAN for minute in samples])
        for function in (min, max, lambda minute: minute[-1])
    )
    added, anew = counted(mins, maxs, lasts, rollover)
    return added.tolist(), int(anew.sum())


def test_counters_count_on_over_gaps_and_resets() -> None:
    assert _counts([[100, 101, 103], [105], [], [110, 112]]) == ([3, 2, 0, 7], 0)
    # Set to 0 between two minutes, within one (after 12 more), and by a programme that starts at 1.
    assert _counts([[100], [0, 2], [5]]) == ([0, 2, 3], 1)
    assert _counts([[100], [112, 0, 4], [5]]) == ([0, 12 + 4, 1], 1)
    assert _counts([[1000], [1]]) == ([0, 1], 1)
    # A counter of four digits that rolls over, within a minute and between two.
    assert _counts([[9_990], [9_998, 3], [9_999], [1]], rollover=10_000) == ([0, 13, 9_996, 2], 2)
    assert _counts([[], []]) == ([0, 0], 0)


def test_what_a_counter_added_over_a_gap_is_spread_over_it() -> None:
    added, known = np.array([0, 3.0, 0, 0, 6, 0]), np.array([False, True, False, False, True, False])
    evenly, accounted = spread(added, known)
    assert evenly.tolist() == [0, 3, 2, 2, 2, 0]
    assert accounted.tolist() == [False, True, True, True, True, False]


def test_power_is_integrated_and_short_gaps_are_drawn_as_a_line() -> None:
    power = np.array([NAN, 60, 60, NAN, NAN, 120, NAN, NAN, NAN, 60, NAN])
    energy, accounted = flowed(power, gap_minutes=2)
    np.testing.assert_allclose(energy, [0, 1, 1, 4 / 3, 5 / 3, 2, 0, 0, 0, 1, 0])
    assert accounted.tolist() == [False, True, True, True, True, True, False, False, False, True, False]
    assert flowed(np.full(3, NAN))[0].tolist() == [0, 0, 0]


def test_days_at_the_change_of_the_clocks_have_23_and_25_hours() -> None:
    for day, hours in (((2026, 3, 29), 23), ((2026, 10, 25), 25), ((2026, 6, 1), 24)):
        start = _minute(*day)
        local = local_minutes(start, hours * 60, LONDON)
        assert set(local.days) == {day_number(date(*day))}
        assert set(local_minutes(start + hours * 60, 1, LONDON).days) == {day_number(date(*day)) + 1}
        # A night shift from 22:00 on the evening before has an hour less, or more.
        night = Span(frozenset(range(7)), 22 * 60, 6 * 60)
        local = local_minutes(start - 12 * 60, 24 * 60, LONDON)
        assert int(local.within(night).sum()) == (hours - 24 + 8) * 60


def test_a_shift_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    night = span_of(["fri"], "22:00", "06:00")
    start = _minute(2026, 7, 3)  # a Friday
    local = local_minutes(start, 3 * 1440, LONDON)
    assert np.flatnonzero(local.within(night)).tolist() == list(range(22 * 60, 30 * 60))
    closed = frozenset({day_number(date(2026, 7, 4))})
    assert local.within(night, closed).sum() == 8 * 60
    assert local.within(night, frozenset({day_number(date(2026, 7, 3))})).sum() == 0
    assert span_of([], "00:00", "24:00") == Span(frozenset(range(7)), 0, 1440)
    for days, begin, end in (
        (["someday"], "06:00", "07:00"),
        ([], "06:00", "06:00"),
        ([], "25:00", "06:00"),
        ([], "6", "07:00"),
    ):
        with pytest.raises(ValueError, match=r"is not one of|is no time"):
            span_of(days, begin, end)


def _tariff(number: int, valid_from: date, day: str, night: str) -> Tariff:
    rates = [
        Rate("night", Decimal(night), [span_of([], "00:30", "07:30")]),
        Rate("day", Decimal(day), None),
    ]
    return Tariff(number, valid_from, rates, "the contract", False, None)


def test_energy_costs_by_the_local_time_and_the_tariff_of_its_day() -> None:
    tariffs = [_tariff(1, date(2026, 1, 1), "30", "10"), _tariff(2, date(2026, 7, 2), "31.5", "12.25")]
    start = _minute(2026, 7, 1)
    local = local_minutes(start, 2 * 1440, LONDON)
    found, covered = costs(np.full(2 * 1440, 0.1), local, tariffs)
    assert covered.all()
    assert [(one.tariff_id, one.rate, one.kwh, one.pence) for one in found] == [
        (1, "night", Decimal(42), Decimal(420)),
        (1, "day", Decimal(102), Decimal(3060)),
        (2, "night", Decimal(42), Decimal("514.5")),
        (2, "day", Decimal(102), Decimal("3213")),
    ]
    assert total_pence(found) == 7208
    # In summer the night at the site begins at 23:30 UTC.
    utc = np.zeros(2 * 1440)
    utc[30] = 1.0
    assert [one.rate for one in costs(utc, local, tariffs)[0] if one.kwh] == ["night"]
    assert datetime.fromtimestamp((start + 30) * 60, UTC).hour == 23
    _, covered = costs(np.ones(2 * 1440), local, tariffs[1:])
    assert covered.sum() == 1440
    assert costs(np.ones(10), local_minutes(start, 10, LONDON), [])[0] == []


def test_nights_at_the_change_of_the_clocks_are_an_hour_shorter_and_longer() -> None:
    tariff = _tariff(1, date(2020, 1, 1), "30", "10")
    for day, hours in (((2026, 3, 29), 23), ((2026, 10, 25), 25)):
        local = local_minutes(_minute(*day), hours * 60, LONDON)
        found, _ = costs(np.full(hours * 60, 1 / 60), local, [tariff])
        by_rate = {one.rate: round(one.kwh, 3) for one in found}
        assert by_rate == {"night": Decimal(7 + hours - 24), "day": Decimal(17)}


def test_carbon_takes_the_factor_of_the_year_and_says_where_it_is_an_older_one() -> None:
    factors = {
        year: CarbonFactor(year, "UK", year, Decimal(kg), "a table", "memory", None)
        for year, kg in ((2024, "0.20705"), (2025, "0.177"))
    }
    start = _minute(2025, 12, 31, 12)
    found, missing = carbon(np.full(1440, 0.5), local_minutes(start, 1440, LONDON), factors)
    assert [(one.year, one.factor.year, one.kwh, one.kg, one.is_provisional) for one in found] == [
        (2025, 2025, Decimal(360), Decimal("63.72"), False),
        (2026, 2025, Decimal(360), Decimal("63.72"), True),
    ]
    assert missing == []
    found, missing = carbon(np.ones(10), local_minutes(_minute(2023, 5, 1), 10, LONDON), factors)
    assert (found, missing) == ([], [2023])
