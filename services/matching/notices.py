"""Notices: what happened to a firm or a partner while it was not there, in a sentence with what to do now."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, time
from enum import StrEnum
from zoneinfo import ZoneInfo

from services.common.logs import current_correlation_id
from services.matching.matches import Match, MatchState, Side
from services.matching.needs import CloseReason, Need, Offer, notice_id
from services.matching.providers import ProviderRecord
from services.matching.sessions import NO_SEAT, Booking, BookingState, Session

LONDON = ZoneInfo("Europe/London")
NEED_CHARACTERS_SHOWN = 80


class NoticeKind(StrEnum):
    """The subject is a booking for seats, a need for offers and its end, a provider for its days, and a match for the others."""

    SEAT_OFFERED = "seat_offered"
    # It was not confirmed in time.
    SEAT_LOST = "seat_lost"
    # None came free before the session began.
    NO_SEAT = "no_seat"
    # To another time or place, or under another name.
    SESSION_MOVED = "session_moved"
    # By the partner.
    BOOKING_CANCELLED = "booking_cancelled"
    # By a round, by a partner, for an alarm, or for a need that had none before.
    OFFERS_MADE = "offers_made"
    OFFER_ACCEPTED = "offer_accepted"
    # By the other side.
    MATCH_ENGAGED = "match_engaged"
    # To both: score it.
    MATCH_FINISHED = "match_finished"
    # By the other side.
    MATCH_CANCELLED = "match_cancelled"
    MATCH_EXPIRED = "match_expired"
    # By others than its firm; the hub looks for more.
    OFFERS_ENDED = "offers_ended"
    NEED_CLOSED = "need_closed"
    # A provider is soon not offered any more, or is not from today.
    PROVIDER_DUE = "provider_due"


@dataclass(frozen=True, kw_only=True)
class Notice:
    """For a firm or for a partner; the other id is 0."""

    id: str
    kind: NoticeKind
    subject_id: str
    text: str
    made: datetime
    correlation_id: str
    firm_id: int = 0
    partner_id: int = 0
    # What there is to do is to be done by then.
    act_by: datetime | None = None
    read: datetime | None = None


_OF_BOOKINGS = {
    BookingState.OFFERED: NoticeKind.SEAT_OFFERED,
    BookingState.EXPIRED: NoticeKind.SEAT_LOST,
    BookingState.CANCELLED: NoticeKind.BOOKING_CANCELLED,
}


def of_booking(booking: Booking, session: Session, *, reason: str = "") -> Notice:
    """For its firm: a seat was offered, lost, or taken back for a reason."""
    kind = NoticeKind.NO_SEAT if booking.end_reason == NO_SEAT else _OF_BOOKINGS[booking.state]
    what = f'"{session.title}" on {_day(session.starts)}'
    if kind is NoticeKind.SEAT_OFFERED:
        assert booking.confirm_by is not None, "an offered seat has its time"
        until = _time(booking.confirm_by)
        text = f"A seat at {what} has come free for you. Confirm it by {until}; then it goes to the next in line."
    elif kind is NoticeKind.SEAT_LOST:
        text = f"Your seat at {what} was not confirmed in time and went to the next in line. Book again to stand in line anew."
    elif kind is NoticeKind.NO_SEAT:
        text = f"No seat at {what} came free for you before it began. Book another date."
    else:
        text = f"Your booking of {what} was cancelled: {reason}"
    return Notice(
        id=notice_id(booking.id, kind, str(booking.sequence)),
        kind=kind,
        subject_id=booking.id,
        text=text,
        made=booking.changed,
        correlation_id=booking.correlation_id,
        firm_id=booking.firm_id,
        act_by=booking.confirm_by if kind is NoticeKind.SEAT_OFFERED else None,
    )


def of_moved_session(booking: Booking, before: Session, session: Session) -> Notice:
    """For the firm of a booking that stands."""
    where = f", {session.place}" if session.place else ""
    text = f'"{before.title}" on {_time(before.starts)} has moved: it is now "{session.title}" on {_time(session.starts)}{where}.'
    if booking.confirm_by is not None:
        text += f" Confirm your seat by {_time(booking.confirm_by)}."
    return Notice(
        id=notice_id(booking.id, NoticeKind.SESSION_MOVED, str(session.sequence)),
        kind=NoticeKind.SESSION_MOVED,
        subject_id=booking.id,
        text=f"{text} Cancel the booking if that does not suit you.",
        made=session.changed or booking.changed,
        correlation_id=booking.correlation_id,
        firm_id=booking.firm_id,
        act_by=booking.confirm_by or session.starts,
    )


def of_offers(offers: Sequence[Offer]) -> Notice:
    """For the firm of one need that these offers were made for."""
    first = offers[0]
    lapse = min(offer.expires for offer in offers)
    waits = "An offer waits" if len(offers) == 1 else f"{len(offers)} offers wait"
    return Notice(
        id=notice_id(first.need_id, NoticeKind.OFFERS_MADE, first.id),
        kind=NoticeKind.OFFERS_MADE,
        subject_id=first.need_id,
        text=f'{waits} for your answer to "{_shown(first.need_text)}". Accept or decline by {_time(lapse)}.',
        made=first.made,
        correlation_id=first.correlation_id,
        firm_id=first.firm_id,
        act_by=lapse,
    )


def of_ended_offers(need: Need, ended: datetime) -> Notice:
    """For the firm: its need stands, and has no offers any more."""
    return Notice(
        id=notice_id(need.id, NoticeKind.OFFERS_ENDED, str(need.attempt)),
        kind=NoticeKind.OFFERS_ENDED,
        subject_id=need.id,
        text=f'Those who were offered for "{_shown(need.text)}" cannot take it any more. The hub looks for others.',
        made=ended,
        correlation_id=need.correlation_id,
        firm_id=need.firm_id,
    )


_WHY_CLOSED = {
    CloseReason.DECLINED: "you declined all that was offered",
    CloseReason.NOT_ANSWERED: "its offers ran out without an answer",
    CloseReason.EXPIRED: "nobody could be found for it in time",
    CloseReason.CONSENT_ENDED: "your consent does not cover it any more",
}


def of_closed_need(need: Need) -> Notice:
    """For its firm."""
    assert need.ended is not None, "whoever closes a need says when"
    why = _WHY_CLOSED.get(CloseReason(need.close_reason)) or need.close_note.rstrip(".")
    return Notice(
        id=notice_id(need.id, NoticeKind.NEED_CLOSED, str(need.attempt)),
        kind=NoticeKind.NEED_CLOSED,
        subject_id=need.id,
        text=f'Your need "{_shown(need.text)}" is closed: {why}. Open another if you still want help.',
        made=need.ended,
        correlation_id=need.correlation_id,
        firm_id=need.firm_id,
    )


def of_due_provider(provider: ProviderRecord, days_ahead: int, *, made: datetime) -> Notice:
    """For its partner, so many days before it is not offered any more; 0: it is not."""
    day, what = min(provider.ends)
    when = "is not offered any more" if days_ahead == 0 else f"will not be offered from {day:%-d %B %Y}"
    return Notice(
        id=notice_id(provider.id, NoticeKind.PROVIDER_DUE, day.isoformat(), str(days_ahead)),
        kind=NoticeKind.PROVIDER_DUE,
        subject_id=provider.id,
        text=f'"{provider.title}" {when}: {what}. Put the profile anew to keep it offered.',
        made=made,
        correlation_id=current_correlation_id(),
        partner_id=provider.partner_id,
        act_by=datetime.combine(day, time(), LONDON),
    )


def of_acceptance(match: Match, offer: Offer) -> Notice:
    """For the partner: a firm has accepted its provider."""
    assert match.engage_by is not None, "a new match has its time"
    return Notice(
        id=notice_id(match.id, NoticeKind.OFFER_ACCEPTED),
        kind=NoticeKind.OFFER_ACCEPTED,
        subject_id=match.id,
        text=f'A firm has accepted "{offer.provider_title}". Engage by {_time(match.engage_by)}, or the match expires.',
        made=match.accepted,
        correlation_id=match.correlation_id,
        partner_id=match.partner_id,
        act_by=match.engage_by,
    )


def of_engaged_match(match: Match, offer: Offer, side: Side) -> Notice:
    """For a side that did not say so itself."""
    assert match.engaged is not None, "whoever engages says when"
    text = (
        f'The work with "{offer.provider_title}" begins. Whoever sees it done finishes the match with what came of it.'
    )
    return _of_match(match, side, NoticeKind.MATCH_ENGAGED, text, made=match.engaged)


def of_finished_match(match: Match, offer: Offer, side: Side) -> Notice:
    """For both sides: now each scores the other."""
    assert match.finished is not None, "whoever finishes says when"
    assert match.result is not None, "and with what result"
    assert match.scores_until is not None, "and until when it is scored"
    came_to = match.result.replace("_", " ")
    text = f'The work with "{offer.provider_title}" is finished: {came_to}. Score it by {_time(match.scores_until)}'
    text += ", and correct the result if it was another." if side is Side.FIRM else "."
    change = str(match.finished)
    return _of_match(
        match, side, NoticeKind.MATCH_FINISHED, text, change, made=match.finished, act_by=match.scores_until
    )


def of_ended_match(match: Match, offer: Offer, side: Side, *, reopened: bool) -> Notice:
    """For a side that did not end it itself."""
    assert match.ended is not None, "whoever ends a match says when"
    expired = match.state is MatchState.EXPIRED
    why = "nobody said in time that work begins" if expired else match.end_reason.rstrip(".")
    text = f'The match with "{offer.provider_title}" has ended: {why}.'
    if side is Side.FIRM:
        text += " Your need is open again and gets new offers." if reopened else " Your need is closed."
    kind = NoticeKind.MATCH_EXPIRED if expired else NoticeKind.MATCH_CANCELLED
    return _of_match(match, side, kind, text, made=match.ended)


def _of_match(
    match: Match,
    side: Side,
    kind: NoticeKind,
    text: str,
    *change: str,
    made: datetime,
    act_by: datetime | None = None,
) -> Notice:
    return Notice(
        id=notice_id(match.id, kind, side, *change),
        kind=kind,
        subject_id=match.id,
        text=text,
        made=made,
        correlation_id=match.correlation_id,
        firm_id=match.firm_id if side is Side.FIRM else 0,
        partner_id=match.partner_id if side is Side.PARTNER else 0,
        act_by=act_by,
    )


def _shown(need_text: str) -> str:
    return need_text if len(need_text) <= NEED_CHARACTERS_SHOWN else f"{need_text[:NEED_CHARACTERS_SHOWN]}..."


def _day(time_: datetime) -> str:
    return f"{time_.astimezone(LONDON):%-d %B %Y}"


def _time(time_: datetime) -> str:
    return f"{time_.astimezone(LONDON):%-d %B %Y, %H:%M}"
