"""Dates of workshops and slots of facilities (both are sessions), and the bookings of firms."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

NO_SEAT = "NO_SEAT"
"""End of a booking that waited until the session began."""


class SessionState(StrEnum):
    OPEN = "open"
    CANCELLED = "cancelled"


class BookingState(StrEnum):
    """confirmed or waiting -> offered -> confirmed; any -> cancelled; offered or waiting -> expired."""

    # It has a seat.
    CONFIRMED = "confirmed"
    # In line.
    WAITING = "waiting"
    # A seat has come free and is kept for it until `confirm_by`.
    OFFERED = "offered"
    CANCELLED = "cancelled"
    # A seat was offered and not confirmed in time, or none came free before the session began.
    EXPIRED = "expired"

    @property
    def has_seat(self) -> bool:
        return self in (BookingState.CONFIRMED, BookingState.OFFERED)


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a partner puts, and what the hub sets: taken, waiting, state, sequence, changed, partner_id."""

    id: str
    provider_id: str
    title: str
    place: str
    starts: datetime
    ends: datetime
    seats: int
    # How long a seat that has come free is kept for the first in line.
    confirm_within: timedelta
    partner_id: int = 0
    taken: int = 0
    waiting: int = 0
    state: SessionState = SessionState.OPEN
    cancel_reason: str = ""
    sequence: int = 0
    changed: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Booking:
    id: str
    session_id: str
    firm_id: int
    # Of the session.
    partner_id: int
    provider_id: str
    state: BookingState
    booked: datetime
    booked_by: int
    changed: datetime
    correlation_id: str
    match_id: str = ""
    # Place in the line, from 1; 0: not waiting.
    in_line: int = 0
    confirm_by: datetime | None = None
    end_reason: str = ""
    sequence: int = 0
