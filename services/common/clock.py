"""Now, as something that can be given: event times never come from here, only times of what the hub itself does."""

import time
from datetime import UTC, date, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    def now_us(self) -> int:
        """Microseconds since 1970 UTC."""
        ...


class SystemClock:
    def now_us(self) -> int:
        return time.time_ns() // 1000


def from_us(time_us: int) -> datetime:
    """The time as an aware datetime, exact to the microsecond. Raises OverflowError outside the years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=time_us)


def to_us(time_: datetime) -> int:
    """Microseconds since 1970 UTC of an aware datetime, without rounding."""
    delta = time_ - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def today(clock: Clock) -> date:
    return from_us(clock.now_us()).date()


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
