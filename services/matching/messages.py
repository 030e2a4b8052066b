"""Between messages and values: what both edges and the stream need."""

from datetime import datetime

from google.protobuf.message import DecodeError

from services.common.clock import from_us, to_us
from services.common.errors import Invalid
from services.common.logs import accepted_correlation_id
from services.matching.alarms import Alarm
from services.matching.consents import Severity
from services.matching.domain import Kind
from services.matching.matches import Match, MatchState, Result
from services.matching.needs import Offer, OfferState, event_id
from services.matching.rooms import Room, RoomState
from services.matching.sessions import Booking, BookingState, Session
from smdih.anomaly.v1 import events_pb2 as anomaly_pb
from smdih.matching.v1 import events_pb2 as pb

KINDS = {
    Kind.EXPERT: pb.PROVIDER_KIND_EXPERT,
    Kind.FACILITY: pb.PROVIDER_KIND_FACILITY,
    Kind.WORKSHOP: pb.PROVIDER_KIND_WORKSHOP,
    Kind.COURSE: pb.PROVIDER_KIND_COURSE,
}
# What from_us raises for a number that is no time.
_NO_TIME = (OverflowError, ValueError, OSError)
_CHANGES = {
    OfferState.MADE: pb.OFFER_CHANGE_MADE,
    OfferState.ACCEPTED: pb.OFFER_CHANGE_ACCEPTED,
    OfferState.DECLINED: pb.OFFER_CHANGE_DECLINED,
    OfferState.LAPSED: pb.OFFER_CHANGE_LAPSED,
    OfferState.CANCELLED: pb.OFFER_CHANGE_CANCELLED,
}
_MATCH_CHANGES = {
    MatchState.ACCEPTED: pb.MATCH_CHANGE_ACCEPTED,
    MatchState.ENGAGED: pb.MATCH_CHANGE_ENGAGED,
    MatchState.FINISHED: pb.MATCH_CHANGE_FINISHED,
    MatchState.CLOSED: pb.MATCH_CHANGE_CLOSED,
    MatchState.CANCELLED: pb.MATCH_CHANGE_CANCELLED,
    MatchState.EXPIRED: pb.MATCH_CHANGE_EXPIRED,
}
RESULTS = {
    Result.SOLVED: pb.RESULT_SOLVED,
    Result.PARTLY: pb.RESULT_PARTLY,
    Result.NOT_SOLVED: pb.RESULT_NOT_SOLVED,
}


def asked_time(name: str, time_us: int | None) -> datetime | None:
    """A time in a request; 0 or nothing: none. Raises Invalid."""
    try:
        return from_us(time_us) if time_us else None
    except _NO_TIME as error:
        raise Invalid(f"{name} {time_us} is not a time in the years 1 to 9999.", reason="BAD_TIME") from error


def offer_message(offer: Offer) -> pb.Offer:
    return pb.Offer(
        id=offer.id,
        need_id=offer.need_id,
        firm_id=offer.firm_id,
        provider_id=offer.provider_id,
        partner_id=offer.partner_id,
        provider_title=offer.provider_title,
        provider_kind=KINDS[offer.provider_kind],
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
        change=_CHANGES[offer.state],
        changed_us=to_us(offer.decided or offer.made),
        offer=offer_message(offer),
    ).SerializeToString()


def match_event(match: Match) -> bytes:
    """The event of the change that brought the match into its state."""
    return pb.MatchEvent(
        event_id=event_id(match.id, match.state),
        change=_MATCH_CHANGES[match.state],
        changed_us=to_us(match.changed),
        match_id=match.id,
        need_id=match.need_id,
        offer_id=match.offer_id,
        firm_id=match.firm_id,
        provider_id=match.provider_id,
        partner_id=match.partner_id,
        result=pb.RESULT_UNSPECIFIED if match.result is None else RESULTS[match.result],
        correlation_id=match.correlation_id,
    ).SerializeToString()


BOOKING_STATES = {
    BookingState.CONFIRMED: pb.BOOKING_STATE_CONFIRMED,
    BookingState.WAITING: pb.BOOKING_STATE_WAITING,
    BookingState.OFFERED: pb.BOOKING_STATE_OFFERED,
    BookingState.CANCELLED: pb.BOOKING_STATE_CANCELLED,
    BookingState.EXPIRED: pb.BOOKING_STATE_EXPIRED,
}


def booking_event(booking: Booking, session: Session) -> bytes:
    """The event of the change that brought the booking into its state."""
    return pb.BookingEvent(
        event_id=event_id(booking.id, f"{booking.state}-{booking.sequence}"),
        state=BOOKING_STATES[booking.state],
        changed_us=to_us(booking.changed),
        booking_id=booking.id,
        session_id=session.id,
        provider_id=session.provider_id,
        partner_id=booking.partner_id,
        firm_id=booking.firm_id,
        title=session.title,
        starts_us=to_us(session.starts),
        ends_us=to_us(session.ends),
        confirm_by_us=0 if booking.confirm_by is None else to_us(booking.confirm_by),
        correlation_id=booking.correlation_id,
    ).SerializeToString()


ROOM_STATES = {
    RoomState.OPEN: pb.ROOM_STATE_OPEN,
    RoomState.RECALLED: pb.ROOM_STATE_RECALLED,
    RoomState.EXPIRED: pb.ROOM_STATE_EXPIRED,
    RoomState.MATCH_ENDED: pb.ROOM_STATE_MATCH_ENDED,
}


def room_event(room: Room) -> bytes:
    """The room as it is now."""
    return pb.RoomEvent(
        event_id=event_id(room.id, room.state),
        state=ROOM_STATES[room.state],
        changed_us=to_us(room.ended or room.opens),
        room_id=room.id,
        match_id=room.match_id,
        firm_id=room.firm_id,
        partner_id=room.partner_id,
        provider_id=room.provider_id,
        signal_ids=room.signal_ids,
        purpose=room.purpose,
        data_from_us=to_us(room.data_from),
        data_until_us=to_us(room.data_until),
        opens_us=to_us(room.opens),
        closes_us=to_us(room.closes),
        correlation_id=room.correlation_id,
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
