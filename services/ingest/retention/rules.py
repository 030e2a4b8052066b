"""How long data are kept, and until which time they may therefore be removed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from services.ingest.domain import QUOTA_STORED_DAYS_DEFAULT, STORED_DAYS_MIN

HOUR_US: Final = 3_600 * 1_000_000
DAY_US: Final = 24 * HOUR_US

# Coarser data are kept longer: an hour of a signal takes a thousandth of what its samples take.
MINUTE_DAYS_DEFAULT: Final = 1_100
HOUR_DAYS_DEFAULT: Final = 3_660
# What was refused and why, with what was sent, to be mended and replayed.
QUARANTINE_DAYS: Final = 90
# History that was loaded stays so long before its age counts, to be looked at, exported and scored.
GRACE_DAYS: Final = 30
DAYS_MAX: Final = 36_600


@dataclass(frozen=True)
class Store:
    """One resolution, in the order in which it outlives the ones before."""

    name: str
    table: str
    chunk_days: int
    days_default: int


STORES: Final = (
    Store("raw", "frame", 7, QUOTA_STORED_DAYS_DEFAULT),
    Store("minute", "rollup_1m", 30, MINUTE_DAYS_DEFAULT),
    Store("hour", "rollup_1h", 365, HOUR_DAYS_DEFAULT),
)
# Rows, not chunks, and for all firms the same time.
QUARANTINE: Final = Store("quarantine", "quarantine", 0, QUARANTINE_DAYS)
# It is filled by what goes wrong, which is news for some days; whole ones, and today.
QUARANTINE_GROWTH_DAYS: Final = 7


@dataclass(frozen=True)
class Rule:
    """What an operator decided for a firm; None: the quota for samples, else the default."""

    raw_days: int | None = None
    minute_days: int | None = None
    hour_days: int | None = None
    # Nothing is removed, whatever the days say.
    is_on_hold: bool = False
    reason: str = ""
    # The firm's quota of stored days; None: it has none of its own.
    quota_days: int | None = None

    def days(self, store: Store) -> int:
        """Coarser data are never kept for less time than finer."""
        raw = self.raw_days or self.quota_days or STORES[0].days_default
        minute = max(raw, self.minute_days or STORES[1].days_default)
        return {"raw": raw, "minute": minute, "hour": max(minute, self.hour_days or STORES[2].days_default)}[store.name]

    def check(self) -> None:
        """Raises ValueError with what is wrong."""
        said = (self.raw_days, self.minute_days, self.hour_days)
        if not all(number is None or STORED_DAYS_MIN <= number <= DAYS_MAX for number in said):
            raise ValueError(f"days: {STORED_DAYS_MIN} to {DAYS_MAX}, or left out")
        if any(number is not None and number != self.days(store) for number, store in zip(said, STORES, strict=True)):
            raise ValueError("hours must be kept at least as long as minutes, and minutes as long as raw samples")


@dataclass(frozen=True)
class Cutoffs:
    """Of one store at one time: before them nothing needs to be kept."""

    # Of all firms together; None: somebody's data are on hold.
    everybody_us: int | None
    # Of the firms whose data need not wait for everybody's.
    firms_us: Mapping[int, int]


def cutoffs(store: Store, firm_ids: Sequence[int], rules: Mapping[int, Rule], now_us: int) -> Cutoffs:
    """Whole hours, so that no bucket loses a part of its frames."""
    by_firm: dict[int, int] = {}
    is_held = False
    for firm_id in firm_ids:
        rule = rules.get(firm_id, Rule())
        if rule.is_on_hold:
            is_held = True
        else:
            by_firm[firm_id] = (now_us - rule.days(store) * DAY_US) // HOUR_US * HOUR_US
    everybody = None if is_held or not by_firm else min(by_firm.values())
    return Cutoffs(everybody, {firm_id: us for firm_id, us in by_firm.items() if everybody is None or us > everybody})


@dataclass(frozen=True)
class ChunkSize:
    start_us: int
    end_us: int
    size_bytes: int


# What is grown by is taken from the chunks of the last days.
GROWTH_DAYS: Final = 28
# Less time says nothing about a day.
KNOWN_DAYS_MIN: Final = 0.5


def growth_bytes_a_day(chunks: Sequence[ChunkSize], first_us: int, now_us: int) -> float | None:
    """By the size of the newest chunks over the time that they cover so far; None: too little is known.

    `first_us`: before it nothing arrived as it happened (what was loaded as history is not growth).
    """
    recent = [chunk for chunk in chunks if chunk.end_us > now_us - GROWTH_DAYS * DAY_US and chunk.start_us < now_us]
    covered_us = sum(
        min(chunk.end_us, now_us) - max(chunk.start_us, first_us) for chunk in recent if chunk.end_us > first_us
    )
    if covered_us < KNOWN_DAYS_MIN * DAY_US:
        return None
    return sum(chunk.size_bytes for chunk in recent if chunk.end_us > first_us) / covered_us * DAY_US
