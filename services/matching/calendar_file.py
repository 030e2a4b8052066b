"""Sessions and bookings as calendar files (RFC 5545), to be taken into any calendar; a later file replaces an earlier one."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from icalendar import Calendar, Event, Timezone, TimezoneDaylight, TimezoneStandard

from services.matching.sessions import Booking, BookingState, Session, SessionState

MEDIA_TYPE = "text/calendar; charset=utf-8; method=PUBLISH"
LONDON = ZoneInfo("Europe/London")

_BOOKING_STATUS = {
    BookingState.CONFIRMED: "CONFIRMED",
    BookingState.WAITING: "TENTATIVE",
    BookingState.OFFERED: "TENTATIVE",
    BookingState.CANCELLED: "CANCELLED",
    BookingState.EXPIRED: "CANCELLED",
}


def sessions_file(sessions: Sequence[Session]) -> bytes:
    """One event a session; its id never changes, and its sequence counts up with each change of the session."""
    return _file([_session_event(session) for session in sessions])


def booking_file(booking: Booking, session: Session) -> bytes:
    """One event for a firm's booking, tentative until it has a seat."""
    event = _event(f"booking-{booking.id}@smdih", session, max(booking.changed, session.changed or booking.changed))
    event.add("sequence", session.sequence + booking.sequence)
    cancelled = session.state is SessionState.CANCELLED
    event.add("status", "CANCELLED" if cancelled else _BOOKING_STATUS[booking.state])
    event.add("description", f"Booking {booking.id}, {booking.state}.")
    return _file([event])


def _session_event(session: Session) -> Event:
    event = _event(f"session-{session.id}@smdih", session, session.changed or session.starts)
    event.add("sequence", session.sequence)
    event.add("status", "CANCELLED" if session.state is SessionState.CANCELLED else "CONFIRMED")
    event.add("description", f"{session.seats - session.taken} of {session.seats} seats free.")
    return event


def _event(uid: str, session: Session, changed: datetime) -> Event:
    event = Event()
    event.add("uid", uid)
    event.add("summary", session.title)
    event.add("dtstart", _local(session.starts))
    event.add("dtend", _local(session.ends))
    # Of the last change rather than of the download: the same state gives the same file.
    event.add("dtstamp", changed.astimezone(UTC))
    event.add("last-modified", changed.astimezone(UTC))
    if session.place:
        event.add("location", session.place)
    return event


def _local(time: datetime) -> datetime:
    """British time, or UTC where that comes twice: readers take it for the first."""
    local = time.astimezone(LONDON)
    return time.astimezone(UTC) if local.fold else local


def _file(events: Sequence[Event]) -> bytes:
    calendar = Calendar()
    calendar.add("prodid", "-//SMDIH//matching//EN")
    calendar.add("version", "2.0")
    calendar.add("method", "PUBLISH")
    calendar.add_component(_london())
    for event in events:
        calendar.add_component(event)
    text: bytes = calendar.to_ical()
    return text


def _london() -> Timezone:
    """British time as it has been since 1996: clocks change on the last Sundays of March and October at 1:00 UTC."""
    zone = Timezone()
    zone.add("tzid", "Europe/London")
    summer = TimezoneDaylight()
    summer.add("dtstart", datetime(1996, 3, 31, 1))  # noqa: DTZ001  local times, as the standard asks
    summer.add("tzoffsetfrom", timedelta(0))
    summer.add("tzoffsetto", timedelta(hours=1))
    summer.add("tzname", "BST")
    summer.add("rrule", {"freq": "yearly", "bymonth": 3, "byday": "-1su"})
    winter = TimezoneStandard()
    winter.add("dtstart", datetime(1996, 10, 27, 2))  # noqa: DTZ001
    winter.add("tzoffsetfrom", timedelta(hours=1))
    winter.add("tzoffsetto", timedelta(0))
    winter.add("tzname", "GMT")
    winter.add("rrule", {"freq": "yearly", "bymonth": 10, "byday": "-1su"})
    zone.add_component(summer)
    zone.add_component(winter)
    return zone
