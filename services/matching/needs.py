"""Needs, offers and matches: what is stored of them, their states and their derived ids."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from enum import StrEnum

from services.matching import domain
from services.matching.domain import Kind, Size, Source, Urgency

# Names derived ids; never change it.
_NAMESPACE = uuid.UUID("5b1c3f0e-5c68-4d0e-9a42-6f6d1d0c9b7e")


_SIZES = frozenset(Size)


class NeedState(StrEnum):
    OPEN = "open"
    MATCHED = "matched"
    CLOSED = "closed"


class OfferState(StrEnum):
    MADE = "made"
    ACCEPTED = "accepted"
    DECLINED = "declined"
    LAPSED = "lapsed"
    # It was accepted, and its match came to nothing.
    CANCELLED = "cancelled"


class Origin(StrEnum):
    """How an offer came about."""

    # When the need was opened, or by the upkeep.
    HUB = "hub"
    ROUND = "round"
    # Proposed by the provider's partner.
    PARTNER = "partner"


class Lapse(StrEnum):
    """Why an offer lapsed."""

    EXPIRED = "EXPIRED"
    OTHER_ACCEPTED = "OTHER_ACCEPTED"
    PROVIDER_GONE = "PROVIDER_GONE"
    # The firm accepted it when its provider had no place left.
    FULL = "FULL"
    NEED_CLOSED = "NEED_CLOSED"


class CloseReason(StrEnum):
    """Why a need was closed."""

    # By its firm, or for it, in words.
    BY_FIRM = "BY_FIRM"
    # The firm declined the last of its offers.
    DECLINED = "DECLINED"
    # The firm let the last of its offers run out.
    NOT_ANSWERED = "NOT_ANSWERED"
    # Nobody could be offered for as long as needs are kept open.
    EXPIRED = "EXPIRED"
    # Its match came to nothing, and it with it.
    MATCH_ENDED = "MATCH_ENDED"
    # It was made from an alarm, and the firm's consent does not cover that any more.
    CONSENT_ENDED = "CONSENT_ENDED"


class NoOffer(StrEnum):
    """Why a need has no offers."""

    NO_PROVIDER = "NO_PROVIDER"
    NONE_FITS = "NONE_FITS"
    ALL_FULL = "ALL_FULL"
    # It was matched and is open again; new offers follow.
    MATCH_ENDED = "MATCH_ENDED"
    # Somebody else than its firm ended the last of its offers; others follow.
    OFFERS_ENDED = "OFFERS_ENDED"
    # It gets one in the next round.
    WAITS_FOR_ROUND = "WAITS_FOR_ROUND"


@dataclass(frozen=True, kw_only=True)
class Need:
    """A need as stored; the ranker sees what of it bears on the order."""

    id: str
    firm_id: int
    source: Source
    text: str
    urgency: Urgency
    sic: str
    region: str
    size: str
    machine_id: int
    opened: datetime
    opened_by: int
    correlation_id: str
    state: NeedState = NeedState.OPEN
    alarm_ids: tuple[str, ...] = ()
    consent_id: str = ""
    # Made for it by the hub or a round in this attempt; 0: it waits for some. Proposals of partners do not count.
    offers: int = 0
    no_offer_reason: str = ""
    match_id: str = ""
    ended: datetime | None = None
    close_reason: str = ""
    # In the words of who closed it.
    close_note: str = ""
    # Counts up each time that it is to get offers again.
    attempt: int = 1
    # No offers before the next round.
    waits: bool = False
    # Partners may see its text and propose themselves.
    shown: bool = False
    # Addresses of terms of ESCO.
    esco_skills: tuple[str, ...] = ()

    def for_ranking(self) -> domain.Need:
        """What of it bears on the order."""
        return domain.Need(
            id=self.id,
            text=self.text,
            sic=self.sic,
            region=self.region,
            size=Size(self.size) if self.size in _SIZES else Size.SMALL,
            urgency=self.urgency,
            source=self.source,
            firm_id=str(self.firm_id),
            skills=frozenset(self.esco_skills),
        )


@dataclass(frozen=True, kw_only=True)
class Offer:
    id: str
    need_id: str
    firm_id: int
    provider_id: str
    partner_id: int
    provider_title: str
    provider_kind: Kind
    rank: int
    score: float
    parts: Mapping[str, float]
    reasons: tuple[str, ...]
    ranker_version: str
    made: datetime
    expires: datetime
    # Of its need.
    need_text: str
    machine_id: int
    alarm_id: str
    correlation_id: str
    state: OfferState = OfferState.MADE
    decided: datetime | None = None
    decision_reason: str = ""
    match_id: str = ""
    attempt: int = 1
    origin: Origin = Origin.HUB
    round_id: str = ""
    # A place of the provider is reserved for it; see `store.places`.
    holds_place: bool = False
    # Of the partner to the firm.
    message: str = ""
    # The consent that its need was made under has ended, and none that covers as much has followed.
    unshared: bool = False


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many offers a need gets, for how long they stand, and which alarms belong to one fault."""

    offers_max: int = 5
    # Providers looked at before giving up on finding one with a free place.
    candidates_max: int = 5_000
    offer_lifetime: timedelta = field(default=timedelta(days=14))
    # Alarms of a machine with less than this between them belong to one fault; so does one that comes after its need's end, so
    # long after the last before it.
    episode_gap: timedelta = field(default=timedelta(hours=24))
    # A match that nobody has engaged by then expires. Long enough to wait for money from the fund.
    engage_within: timedelta = field(default=timedelta(days=180))
    # Scores may be given and changed for so long after the work is finished.
    scores_for: timedelta = field(default=timedelta(days=30))
    # A need that gets no offer for so long is closed.
    need_lifetime: timedelta = field(default=timedelta(days=180))
    # How often a round is begun by itself while needs wait; 0: only by operators.
    round_every: timedelta = field(default=timedelta(0))
    # For so long partners of its region alone are shown a need.
    regional_head_start: timedelta = field(default=timedelta(days=3))


def alarm_need_id(alarm_id: str) -> str:
    """The same alarm always opens the same need."""
    return _derived("need", alarm_id)


def offer_id(need_id: str, provider_id: str, attempt: int = 1) -> str:
    return _derived("offer", need_id, provider_id, *([str(attempt)] if attempt > 1 else []))


def match_id(offer_id: str) -> str:
    return _derived("match", offer_id)


def event_id(of: str, change: str) -> str:
    """Of something that goes through each change once at most."""
    return _derived("event", of, change)


def notice_id(subject_id: str, *what: str) -> str:
    """What happens once is told once."""
    return _derived("notice", subject_id, *what)


def quarter_of(day: date) -> date:
    """First day of the calendar quarter."""
    return date(day.year, day.month - (day.month - 1) % 3, 1)


def _derived(*names: str) -> str:
    return uuid.uuid5(_NAMESPACE, "/".join(names)).hex
