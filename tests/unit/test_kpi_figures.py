"""Counters, energy, local time, tariffs and carbon, on figures that can be checked by hand."""

import time
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from services.ingest.kpi.calendar import Span, day_number, local_minutes, span_of, week_of
from services.ingest.kpi.counts import FAULT_VALUES_MAX, Floats, _dips, counted, flowed, made, spread
from services.ingest.kpi.figures import Figure, Figures, Flow, Minutes
from services.ingest.kpi.settings import KpiSettings, Shift
from services.ingest.kpi.states import State
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
    found = counted(mins, maxs, lasts, rollover)
    return found.added.tolist(), int(found.anew.sum())


def test_counters_count_on_over_gaps_and_resets() -> None:
    assert _counts([[100, 101, 103], [105], [], [110, 112]]) == ([3, 2, 0, 7], 0)
    # Set to 0 between two minutes, within one (after 12 more), and by a programme that starts at 1.
    assert _counts([[100], [0, 2], [5]]) == ([0, 2, 3], 1)
    assert _counts([[100], [112, 0, 4], [5]]) == ([0, 12 + 4, 1], 1)
    assert _counts([[1000], [1]]) == ([0, 1], 1)
    # A counter of four digits that rolls over, within a minute and between two.
    assert _counts([[9_990], [9_998, 3], [12], [9_985], [9_999], [1]], rollover=10_000) == ([0, 13, 9, 9_973, 14, 2], 0)
    assert _counts([[500], [3], [5]], rollover=10_000) == ([0, 3, 2], 1)
    assert _counts([[], []]) == ([0, 0], 0)


def test_read_faults_of_a_counter_count_for_nothing() -> None:
    life = [[1_000_000.0 + 5 * n] for n in range(100)]
    assert sum(_counts(life)[0]) == 495

    def with_fault(*at: int, value: float, before: float | None = None) -> list[list[float]]:
        return [([before, value] if before else [value]) if n in at else minute for n, minute in enumerate(life)]

    for faulty in (
        with_fault(50, value=0),
        with_fault(50, 51, 52, value=0),
        with_fault(50, value=0, before=1_000_247),
        with_fault(20, 40, 60, value=0),
        with_fault(*range(30, 90), value=7),
        with_fault(50, value=2**31),
        with_fault(50, 51, value=1_500_000),
        with_fault(50, 52, value=2**31),
        # Within a minute, too.
        [[*minute, 2**31, minute[0]] if n == 50 else minute for n, minute in enumerate(life)],
        [[*minute, 0] if n == 50 else minute for n, minute in enumerate(life)],
        # It trembles by less than it may fall.
        [[minute[0] - (n % 3 == 1) * 6] for n, minute in enumerate(life)],
    ):
        assert (sum(_counts(faulty)[0]), _counts(faulty)[1]) == (495, 0)
        assert (sum(_counts(faulty, 10_000_000)[0]), _counts(faulty)[1]) == (495, 0)
    assert _counts([[1_000_000], [0], [1_000_005]]) == ([0, 0, 5], 0)
    often = [[0.0] if n % 5 == 2 else minute for n, minute in enumerate(life)]
    assert sum(_counts(often)[0]) == 495
    # Also where nothing else moves.
    still = [[1_000_000.0]] * 40 + [[0.0]] + [[1_000_000.0]] * 40
    assert sum(_counts(still)[0]) == 0
    # A range may begin with them; a counter that begins at 0 counts from there, also behind a gap.
    assert sum(_counts([[0.0]] * 20 + life)[0]) == 495
    assert sum(_counts([[5.0 * n] for n in range(100)])[0]) == 495
    assert sum(_counts([[0.0]] * 5 + [[]] * 94 + [[495.0 + 5 * n] for n in range(100)])[0]) == 990


def _dips_one_by_one(values: Floats) -> list[tuple[int, int]]:
    """By the words of what a dip is, and nothing spared."""
    found = []
    for before in range(len(values) - 1):
        back = np.flatnonzero(values[before + 1 :] >= values[before])
        if values[before + 1] >= values[before] or not len(back):
            continue
        start, end = before + 1, before + 1 + int(back[0])
        depth = values[before] - values[start:end].min()
        if end - start <= FAULT_VALUES_MAX and values[end] - values[end - 1] > depth / 2:
            found.append((start, end))
    return found


def test_dips_that_lie_in_each_other_are_found_as_one_by_one() -> None:
    random = np.random.default_rng(5)
    for _ in range(2_000):
        values = random.integers(-6, random.integers(-4, 30), random.integers(1, 40)).astype(float)
        assert _dips(values) == _dips_one_by_one(values)


def _totalled(samples: list[list[float]]) -> tuple[float, int]:
    added, anew = _counts(samples)
    return sum(added), anew


def test_a_counter_that_is_often_set_back_is_not_taken_for_a_faulty_one() -> None:
    # Once an hour, at a box of ten, and at one that is full within minutes.
    for box, resets, total in ((range(60), 29, 30 * 59), (range(10), 29, 30 * 9), ([3, 9, 10, 4], 59, 30 * 14 - 3)):
        assert _totalled([[float(n)] for _ in range(30) for n in box]) == (total, resets)
    # Within every minute.
    assert _totalled([[1.0], *[[2.0, 10.0, 3.0]] * 30]) == (9 + 29 * 7 + 30 * 3, 30)
    # It comes back to where it was, but step by step.
    assert sum(_counts([[22.0]] * 10 + [[2.0 * n] for n in range(20)])[0]) == 38


def test_what_a_counter_added_over_a_gap_is_spread_over_it() -> None:
    added, known = np.array([0, 3.0, 0, 0, 6, 0]), np.array([False, True, False, False, True, False])
    evenly, accounted = spread(added, known)
    assert evenly.tolist() == [0, 3, 2, 2, 2, 0]
    assert accounted.tolist() == [False, True, True, True, True, False]


def test_items_of_a_long_gap_are_known_for_no_part_of_it_but_where_there_are_none() -> None:
    known = np.zeros(1000, dtype=bool)
    known[[10, 13, 400, 700]] = True
    added = np.zeros(1000)
    added[[13, 700]] = [6, 50]
    items, accounted = made(added, known)
    assert items[10:14].tolist() == [0, 2, 2, 2]
    assert (items[401:700].sum(), items[700], items.sum()) == (0, 50, 56)
    assert np.flatnonzero(accounted).tolist() == list(range(10, 401))
    assert made(np.zeros(5), np.zeros(5, dtype=bool))[1].tolist() == [False] * 5


def _day(total: Flow | None, good: Flow | None = None) -> Figures:
    minutes = Minutes(
        start=_minute(2026, 6, 1),
        local=local_minutes(_minute(2026, 6, 1), 1440, LONDON),
        codes=np.full(1440, State.WORKING, dtype=np.int8),
        planned=np.arange(1440) < 480,
        total=total,
        good=good,
        energy=None,
        ideal_cycle_s=30,
        missing={"total_count": "NO_TOTAL_COUNT", "good_count": "NO_GOOD_COUNT", "energy": "NO_ENERGY_SIGNAL"},
    )
    return minutes.figures(slice(0, 1440))


def _flow(values: dict[int, float], before: dict[int, float] | None = None) -> Flow:
    stood = np.full(2 * 1440, NAN)
    for at, value in ({at - 1440: value for at, value in (before or {}).items()} | values).items():
        stood[at + 1440] = value
    found = counted(stood, stood, stood)
    added, accounted = made(found.added, found.known)
    return Flow(added[1440:], accounted[1440:], found.anew[1440:])


def test_a_counter_that_sends_nothing_has_made_what_nobody_knows() -> None:
    for nothing in (_flow({}), _flow({}, {5: 70.0, 7: 72.0}), _flow({1439: 960.0}, {1439: 0.0})):
        day = _day(nothing, nothing)
        for figure in (day.total_count, day.good_count, day.effectiveness, day.quality, day.oee):
            assert figure == Figure(None, "NO_DATA")
    # It stood still, and told so.
    still = _day(_flow({1439: 5.0}, {1439: 5.0}))
    assert (still.total_count, still.effectiveness) == (Figure(0.0), Figure(0.0))
    # It tells of every item, and nothing in between.
    told = _day(_flow({100: 10.0, 101: 12.0, 103: 13.0, 1439: 15.0}, {1000: 9.0}))
    assert (told.total_count, told.good_count) == (Figure(4.0), Figure(None, "NO_GOOD_COUNT"))
    # Read once an hour.
    hourly = _day(_flow({at: 2.0 * (at + 1) for at in range(59, 1440, 60)}, {1439: 0.0}))
    assert (hourly.total_count, hourly.effectiveness) == (Figure(960.0), Figure(1.0))


def test_where_a_counter_is_known_for_a_part_of_the_time_shares_are_of_that_part() -> None:
    total = _flow({at: 2.0 * (at + 1) for at in range(480)}, {1439: 0.0})
    assert _day(_flow({at: 2.0 * at for at in range(100)})).total_count == Figure(None, "TOO_LITTLE_DATA")
    some = _day(_flow({at: 2.0 * (at + 1) for at in range(300)}, {1439: 0.0}))
    assert (some.total_count, some.effectiveness) == (Figure(600.0), Figure(1.0))
    good = _flow({at: 1.5 * (at + 1) for at in range(300)}, {1439: 0.0})
    assert _day(total, good).quality == Figure(0.75)
    # Sent again after a gap of which nobody knows when they were made: counted, and told.
    gap = {at: 2.0 * (at + 1) for at in range(480) if not 200 <= at < 350}
    late = _day(_flow(gap, {1439: 0.0}))
    assert (late.total_count, late.effectiveness) == (Figure(960.0, "LONG_GAP"), Figure(1.0))


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
        assert int(local.within(week_of([night])).sum()) == (hours - 24 + 8) * 60


def test_a_shift_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    night = span_of(["fri"], "22:00", "06:00")
    start = _minute(2026, 7, 3)  # a Friday
    local = local_minutes(start, 3 * 1440, LONDON)
    assert np.flatnonzero(local.within(week_of([night]))).tolist() == list(range(22 * 60, 30 * 60))
    closed = frozenset({day_number(date(2026, 7, 4))})
    assert local.within(week_of([night]), closed).sum() == 8 * 60
    assert local.within(week_of([night]), frozenset({day_number(date(2026, 7, 3))})).sum() == 0
    assert span_of([], "00:00", "24:00") == Span(frozenset(range(7)), 0, 1440)
    for days, begin, end in (
        (["someday"], "06:00", "07:00"),
        ([], "06:00", "06:00"),
        ([], "25:00", "06:00"),
        ([], "6", "07:00"),
    ):
        with pytest.raises(ValueError, match=r"is not one of|is no time"):
            span_of(days, begin, end)


def test_many_shifts_and_breaks_take_no_time() -> None:
    local = local_minutes(_minute(2026, 6, 1), 100 * 1440, LONDON)
    breaks = tuple((f"{n // 4:02}:{n % 4 * 15:02}", f"{n // 4:02}:{n % 4 * 15 + 1:02}") for n in range(50))
    shifts = (Shift("22:00", "08:00", ("mon", "sat"), breaks), *[Shift("23:00", "06:00", ("mon",), breaks)] * 48)
    settings = KpiSettings(
        shifts=(*shifts, Shift("11:50", "12:10", (), (("23:00", "12:00"),))), closed_days=("2026-06-06",)
    )
    began_s = time.process_time()
    planned = settings.planned(local)
    assert time.process_time() - began_s < 1
    assert planned is not None
    # A night has 2 hours and 8 without 32 breaks; Saturday the 6th none; every day has ten minutes more.
    assert planned[:1440].sum() == 120 + 10
    assert planned[1440 : 2 * 1440].sum() == 480 - 32 + 10
    assert [planned[n * 1440 : (n + 1) * 1440].sum() for n in (5, 6)] == [0, 10]


def test_settings_from_before_there_were_bounds_count_as_not_said() -> None:
    sane = KpiSettings(volts=400, ideal_cycle_s=24)
    for stored in (replace(sane, energy_rollover=1e30), replace(sane, off_below=1e300, working_from=1e300)):
        assert KpiSettings.from_json(stored.as_json()) == sane


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
