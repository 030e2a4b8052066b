"""Between messages and values: what both edges and the stream need."""

from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError

from services.common.clock import from_us, to_us
from services.common.errors import Invalid
from services.common.logs import accepted_correlation_id
from services.common.messages import message_of, number_of, word_of
from services.matching.alarms import Alarm
from services.matching.consents import Severity
from services.matching.matches import Match, MatchState
from services.matching.needs import Offer, event_id
from services.matching.rooms import Room
from services.matching.sessions import Booking, Session
from smdih.anomaly.v1 import events_pb2 as anomaly_pb
from smdih.matching.v1 import events_pb2 as pb

Word = TypeVar("Word", bound=StrEnum)

# What from_us raises for a number that is no time.
_NO_TIME = (OverflowError, ValueError, OSError)


def asked_time(name: str, time_us: int | None) -> datetime | None:
    """A time in a request; 0 or nothing: none. Raises Invalid."""
    try:
        return from_us(time_us) if time_us else None
    except _NO_TIME as error:
        raise Invalid(f"{name} {time_us} is not a time in the years 1 to 9999.", reason="BAD_TIME") from error


def asked_word(name: str, words: type[Word], numbers: Any, number: int) -> Word:
    """The word for a number in a request. Raises Invalid."""
    word = word_of(words, numbers, number)
    if word is None:
        raise Invalid(f"{name} {number} is not one of the contract's.", reason=f"BAD_{name.upper()}")
    return word


def asked_filter(name: str, words: type[Word], numbers: Any, number: int) -> Word | None:
    """0, unspecified, filters nothing. Raises Invalid."""
    return None if number == 0 else asked_word(name, words, numbers, number)


def offer_message(offer: Offer) -> pb.Offer:
    return pb.Offer(
        id=offer.id,
        need_id=offer.need_id,
        firm_id=offer.firm_id,
        provider_id=offer.provider_id,
        partner_id=offer.partner_id,
        provider_title=offer.provider_title,
        provider_kind=number_of(pb.ProviderKind, offer.provider_kind),
        rank=offer.rank,
        score=offer.score,
        reasons=offer.reasons,
        match_id=offer.match_id,
        need_text=offer.need_text,
        alarm_id=offer.alarm_id,
        machine_id=offer.machine_id,
        correlation_id=offer.correlation_id,
    )


def offer_event(offer: Offer) -> bytes:
    """The event of the change that brought the offer into its state."""
    return pb.OfferEvent(
        event_id=event_id(offer.id, offer.state),
        change=number_of(pb.OfferChange, offer.state),
        changed_us=to_us(offer.decided or offer.made),
        offer=offer_message(offer),
    ).SerializeToString()


def match_event(match: Match) -> bytes:
    """The event of the change that brought the match into its state, or corrected its result."""
    change = (
        f"{match.state}-{to_us(match.finished)}"
        if match.state is MatchState.FINISHED and match.finished
        else match.state
    )
    return message_of(
        pb.MatchEvent, match, event_id=event_id(match.id, change), change=match.state, match_id=match.id
    ).SerializeToString()


def booking_event(booking: Booking, session: Session) -> bytes:
    """The event of the change that brought the booking into its state, or moved its session."""
    return message_of(
        pb.BookingEvent,
        booking,
        event_id=event_id(booking.id, f"{booking.state}-{booking.sequence + session.sequence}"),
        changed_us=max(booking.changed, session.changed or booking.changed),
        booking_id=booking.id,
        provider_id=session.provider_id,
        title=session.title,
        starts_us=session.starts,
        ends_us=session.ends,
    ).SerializeToString()


def room_event(room: Room) -> bytes:
    """The room as it is now."""
    return message_of(
        pb.RoomEvent,
        room,
        event_id=event_id(room.id, room.state),
        changed_us=room.ended or room.opens,
        room_id=room.id,
    ).SerializeToString()


def raised_alarm(value: bytes | None) -> Alarm | None:
    """The alarm, if the event says that one was raised that people want to hear of. Raises ValueError when it cannot be read."""
    if value is None:
        raise ValueError("a tombstone; alarms are never removed")
    try:
        event = anomaly_pb.AlarmEvent.FromString(value)
    except DecodeError as error:
        raise ValueError(f"not an AlarmEvent: {error}") from error
    if event.change != anomaly_pb.ALARM_CHANGE_RAISED or event.alarm.suppressed_or_shelved:
        return None
    alarm = event.alarm
    if not alarm.id or alarm.firm_id <= 0 or alarm.machine_id <= 0:
        raise ValueError("an alarm without id, firm or machine")
    try:
        raised = from_us(event.changed_us)
    except _NO_TIME as error:
        raise ValueError(f"time {event.changed_us} is out of range") from error
    return Alarm(
        id=alarm.id,
        firm_id=alarm.firm_id,
        machine_id=alarm.machine_id,
        machine_kind=alarm.machine_kind,
        signal_name=alarm.signal_name if alarm.signal_id else "",
        component=alarm.component,
        explanation=alarm.explanation,
        severity=Severity(alarm.severity) if alarm.severity in _SEVERITIES else Severity.MEDIUM,
        raised=raised,
        correlation_id=accepted_correlation_id(alarm.correlation_id),
        shares=tuple(share.signal_name for share in alarm.shares),
    )


_SEVERITIES = frozenset({anomaly_pb.SEVERITY_LOW, anomaly_pb.SEVERITY_MEDIUM, anomaly_pb.SEVERITY_HIGH})
