"""Matches: an accepted offer and what becomes of it."""

from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

POINTS_MIN, POINTS_MAX = 1, 5


class MatchState(StrEnum):
    """accepted -> engaged -> finished -> closed; accepted or engaged -> cancelled; accepted -> expired."""

    ACCEPTED = "accepted"
    # Both sides work together.
    ENGAGED = "engaged"
    # The work is done; both sides may score it.
    FINISHED = "finished"
    # The scores stand.
    CLOSED = "closed"
    CANCELLED = "cancelled"
    # Nobody engaged in time.
    EXPIRED = "expired"


class Result(StrEnum):
    """What the firm's need came to."""

    SOLVED = "solved"
    PARTLY = "partly"
    NOT_SOLVED = "not_solved"


class Side(StrEnum):
    FIRM = "firm"
    PARTNER = "partner"


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one side found the work, 1 (poor) to 5 (excellent)."""

    side: Side
    points: int
    comment: str
    scored: datetime


@dataclass(frozen=True, kw_only=True)
class Match:
    id: str
    need_id: str
    offer_id: str
    firm_id: int
    provider_id: str
    partner_id: int
    quarter: date
    accepted: datetime
    accepted_by: int
    correlation_id: str
    engage_by: datetime | None
    state: MatchState = MatchState.ACCEPTED
    engaged: datetime | None = None
    finished: datetime | None = None
    result: Result | None = None
    result_note: str = ""
    # Scores may be given and changed until then.
    scores_until: datetime | None = None
    ended: datetime | None = None
    end_reason: str = ""
    scores: tuple[Score, ...] = ()

    @property
    def changed(self) -> datetime:
        """When it came into its state."""
        return self.ended or self.finished or self.engaged or self.accepted
