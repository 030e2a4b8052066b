"""Rooms: exactly these signals, lent to the partner of an engaged match for a time and a purpose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


class RoomState(StrEnum):
    OPEN = "open"
    # Taken back by the firm.
    RECALLED = "recalled"
    # Its time is over.
    EXPIRED = "expired"
    # The match that it was opened for has ended.
    MATCH_ENDED = "match_ended"


@dataclass(frozen=True, kw_only=True)
class NewRoom:
    """What a firm lends. `signals` are ids by machine. Samples of [data_from, data_until) may be read until `closes`."""

    match_id: str
    signals: Mapping[int, Sequence[int]]
    purpose: str
    data_from: datetime
    # None: until the room closes.
    data_until: datetime | None
    closes: datetime


@dataclass(frozen=True, kw_only=True)
class Room:
    id: str
    match_id: str
    firm_id: int
    partner_id: int
    provider_id: str
    machine_ids: tuple[int, ...]
    signal_ids: tuple[int, ...]
    purpose: str
    data_from: datetime
    data_until: datetime
    opens: datetime
    closes: datetime
    opened_by: int
    correlation_id: str
    state: RoomState = RoomState.OPEN
    ended: datetime | None = None
    end_reason: str = ""


@dataclass(frozen=True)
class LentSignal:
    """What the borrower needs to know of a signal."""

    id: int
    machine_id: int
    machine_kind: str
    name: str
    unit: str
