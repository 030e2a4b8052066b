"""Minutes as people at the site count them: shifts, tariff periods, days; also when the clocks change."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from typing import Final, TypeAlias
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES: Final = 1_440
# No zone changes its clocks but at a quarter of an hour of UTC.
_QUARTER_MINUTES: Final = 15
_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()
_EPOCH_WEEKDAY: Final = date(1970, 1, 1).weekday()


@dataclass(frozen=True)
class Span:
    """A time of day on some days of the week, in local time; one that ends before it begins goes over midnight."""

    days: frozenset[int]
    start_minute: int
    # Behind the last; 1440: midnight.
    end_minute: int


@dataclass(frozen=True)
class Week:
    """Minutes of a week by the day on which their span begins: those on that day, and those on the next one (7 x 1,440)."""

    same_day: Bools
    next_day: Bools

    def __or__(self, other: "Week") -> "Week":
        return Week(self.same_day | other.same_day, self.next_day | other.next_day)

    @property
    def minutes(self) -> Bools:
        """By the day on which they are."""
        return self.same_day | np.roll(self.next_day, 1, axis=0)


def week_of(spans: Iterable[Span], breaks: Iterable[Span] = ()) -> Week:
    """The minutes of any of the spans; breaks are at their times of day, whichever day it is."""
    same_day, next_day = np.zeros((7, DAY_MINUTES), dtype=bool), np.zeros((7, DAY_MINUTES), dtype=bool)
    for span in spans:
        days = list(span.days)
        if span.start_minute < span.end_minute:
            same_day[days, span.start_minute : span.end_minute] = True
        else:
            same_day[days, span.start_minute :] = True
            next_day[days, : span.end_minute] = True
    for pause in breaks:
        parts = [slice(pause.start_minute, pause.end_minute)]
        if pause.start_minute >= pause.end_minute:
            parts = [slice(pause.start_minute, None), slice(pause.end_minute)]
        for part in parts:
            same_day[:, part] = next_day[:, part] = False
    return Week(same_day, next_day)


@dataclass(frozen=True)
class LocalMinutes:
    """The minutes from one UTC minute on, as they are called at the site."""

    # Days since 1970, of the local date.
    days: Ints
    minutes: Ints

    @property
    def weekdays(self) -> Ints:
        return (self.days + _EPOCH_WEEKDAY) % 7

    def within(self, week: Week, closed_days: frozenset[int] = frozenset()) -> Bools:
        """Which minutes lie in it. A span over midnight belongs to the day on which it begins, also where that is closed."""
        weekdays = self.weekdays
        begun, before = week.same_day[weekdays, self.minutes], week.next_day[weekdays - 1, self.minutes]
        if closed_days:
            closed = np.array(sorted(closed_days))
            begun, before = begun & ~np.isin(self.days, closed), before & ~np.isin(self.days - 1, closed)
        return begun | before


def local_minutes(start_minute: int, count: int, zone: ZoneInfo) -> LocalMinutes:
    """`count` minutes from `start_minute` (since 1970 UTC) on."""
    first = start_minute // _QUARTER_MINUTES
    quarters = range(first, (start_minute + count - 1) // _QUARTER_MINUTES + 1 if count else first)
    offsets = np.array([_offset_minutes(quarter * _QUARTER_MINUTES, zone) for quarter in quarters], dtype=np.int64)
    utc = np.arange(start_minute, start_minute + count, dtype=np.int64)
    local = utc + (offsets[utc // _QUARTER_MINUTES - first] if count else 0)
    return LocalMinutes(local // DAY_MINUTES, local % DAY_MINUTES)


def day_number(day: date) -> int:
    """Days since 1970."""
    return day.toordinal() - _EPOCH_ORDINAL


def day_of(number: int) -> date:
    return date.fromordinal(number + _EPOCH_ORDINAL)


def span_of(days: Sequence[str], start: str, end: str) -> Span:
    """From words: days of DAYS (none: all), "06:00" to "14:00"; "24:00" is the end of the day. Raises ValueError."""
    unknown = [day for day in days if day not in DAYS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not one of {', '.join(DAYS)}")
    begin_minute, end_minute = _minute(start), DAY_MINUTES if end == "24:00" else _minute(end)
    if begin_minute == end_minute:
        raise ValueError(f"from {start} to {end} is no time; write 00:00 to 24:00 for a whole day")
    return Span(frozenset(DAYS.index(day) for day in days or DAYS), begin_minute, end_minute)


def _minute(text: str) -> int:
    try:
        parsed = time_of_day.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no time of day such as 06:30") from error
    if parsed.second or parsed.microsecond or parsed.tzinfo or len(text) != 5:
        raise ValueError(f"{text!r} is no time of day such as 06:30")
    return parsed.hour * 60 + parsed.minute


def _offset_minutes(minute: int, zone: ZoneInfo) -> int:
    offset = datetime.fromtimestamp(minute * 60, UTC).astimezone(zone).utcoffset()
    assert offset is not None
    return round(offset.total_seconds() / 60)
