"""The use cases of sessions and bookings: a date or slot is put, seats are booked, freed seats go to the first in line."""

import uuid
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from prometheus_client import Counter

from services.common import outbox, topics
from services.common.clock import Clock, from_us, today
from services.common.database import Connection, Pool, transaction_for_all_firms
from services.common.errors import AlreadyExists, Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching import notices
from services.matching.calendar_file import booking_file, sessions_file
from services.matching.domain import Kind
from services.matching.matches import MatchState
from services.matching.messages import booking_event
from services.matching.needs import quarter_of
from services.matching.service.checks import (
    CHOSEN_ID,
    NOTE_CHARACTERS_MAX,
    TITLE_CHARACTERS_MAX,
    Known,
    before_token,
    check_text,
    checked_request_id,
    chosen_id,
    known_form,
    page_size_of,
    page_token_of,
    session_token,
)
from services.matching.service.sight import SUPPLIERS, match_seen_by
from services.matching.sessions import NO_SEAT, Booking, BookingState, Session, SessionState
from services.matching.store import needs as needs_store
from services.matching.store import notices as notices_store
from services.matching.store import providers as providers_store
from services.matching.store import sessions as sessions_store

log = get_logger(__name__)

SEATS_MAX = 1_000
WAITING_MAX = 200
BOOKINGS_OF_A_FIRM_MAX = 10
LENGTH_MAX = timedelta(days=31)
AHEAD_MAX = timedelta(days=3 * 366)
CONFIRM_WITHIN_MIN, CONFIRM_WITHIN_MAX = timedelta(minutes=5), timedelta(days=30)
CALENDAR_EVENTS_MAX = 500
EXPIRIES_AT_ONCE_MAX = 200

# Bookings by the state that they came into.
bookings_total = Counter("smdih_matching_bookings_total", "Bookings confirmed, waiting, offered and ended", ["state"])

_WHY_EXPIRED = {BookingState.OFFERED: "NOT_CONFIRMED", BookingState.WAITING: NO_SEAT}


@dataclass(frozen=True)
class CalendarFile:
    name: str
    content: bytes


class Sessions:
    """Dates of workshops and slots of facilities, and the firms that take part.

    Firms share a date's seats and its line: who frees a seat moves the next one up. So each transaction is for all firms, and
    every use case asks whose booking it is.
    """

    def __init__(self, pool: Pool, relay: OutboxRelay, known: Known, *, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._known = known
        self._clock = clock

    # --- sessions --------------------------------------------------------------------------------------------------

    async def put_session(self, caller: Caller, session: Session) -> Session:
        """Create or change a date or slot; who booked is told of a move. More seats go to those in line; fewer than are taken are
        refused."""
        caller.require(*SUPPLIERS, Role.OPERATOR)
        _check_session(session, self._now())
        async with transaction_for_all_firms(self._pool) as connection:
            await self._own_provider(connection, caller, session.provider_id)
            before = await sessions_store.lock_session(connection, session.id)
            now = self._now()
            if before is None:
                await sessions_store.put_session(connection, replace(session, changed=now))
            else:
                _check_change(before, session, now)
                shown = (before.title, before.place, before.starts, before.ends)
                moved = shown != (session.title, session.place, session.starts, session.ends)
                changed = replace(session, sequence=before.sequence + moved, changed=now)
                await sessions_store.put_session(connection, changed)
                if moved:
                    await self._move_bookings(connection, before)
                await self._fill(connection, session.id)
            stored = await self._session(connection, session.id)
            if stored.provider_id != session.provider_id:
                raise _taken_id()
        self._relay.kick()
        log.info("session put", session=session.id, provider=session.provider_id, seats=session.seats)
        return stored

    async def cancel_session(self, caller: Caller, session_id: str, reason: str) -> Session:
        """It does not take place; every booking ends. A repeat changes nothing."""
        caller.require(*SUPPLIERS, Role.OPERATOR)
        if not reason.strip():
            raise Invalid("Say why; those who booked will read it.", reason="REASON_MISSING")
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction_for_all_firms(self._pool) as connection:
            session = await sessions_store.lock_session(connection, chosen_id(session_id))
            if session is None or not _arranges(caller, session.provider_id, session.partner_id):
                raise NotFound(f"There is no session {session_id} of yours.")
            if session.state is SessionState.OPEN:
                now = self._now()
                _check_not_begun(session, now)
                for booking in await sessions_store.standing_bookings(connection, session.id):
                    ended = await self._end(connection, booking, BookingState.CANCELLED, "SESSION_CANCELLED", now)
                    notice = notices.of_booking(ended, session, reason=reason.strip())
                    await notices_store.add_notices(connection, [notice])
                cancelled = replace(session, state=SessionState.CANCELLED, cancel_reason=reason.strip(), changed=now)
                await sessions_store.put_session(connection, replace(cancelled, sequence=session.sequence + 1))
            stored = await self._session(connection, session_id)
        self._relay.kick()
        log.info("session cancelled", session=session_id)
        return stored

    async def get_session(self, caller: Caller, session_id: str) -> Session:
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction_for_all_firms(self._pool) as connection:
            return await self._session(connection, chosen_id(session_id))

    async def list_sessions(
        self, caller: Caller, *, provider_id: str, page_size: int, page_token: str
    ) -> tuple[list[Session], str]:
        """A page of those that have not begun, in order of time, and the token of the next. Firms see open ones only."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        limit = page_size_of(page_size)
        async with transaction_for_all_firms(self._pool) as connection:
            found = await sessions_store.list_sessions(
                connection,
                provider_id=chosen_id(provider_id) if provider_id else "",
                starts_from=self._now(),
                live_on=today(self._clock) if caller.role is Role.FIRM else None,
                after=session_token(page_token),
                limit=limit + 1,
            )
        token = page_token_of(found[limit - 1].starts, found[limit - 1].id) if len(found) > limit else ""
        return found[:limit], token

    # --- bookings --------------------------------------------------------------------------------------------------

    async def book(self, caller: Caller, firm_id: int, session_id: str, *, match_id: str, request_id: str) -> Booking:
        """A seat if one is free and nobody waits, else the end of the line. A repeat of the request gives the first answer."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        repeatable = checked_request_id(request_id)
        async with transaction_for_all_firms(self._pool) as connection:
            if repeatable:
                await needs_store.lock_requests(connection, firm_id, request_id)
                before = await sessions_store.booking_by_request(connection, firm_id, request_id)
                if before is not None:
                    if (before.session_id, before.match_id) != (session_id, match_id):
                        raise AlreadyExists(
                            "This request_id was used for a request with other content; use a new one.",
                            reason="REQUEST_ID_REUSED",
                        )
                    return before
            session = await sessions_store.lock_session(connection, chosen_id(session_id))
            if session is None:
                raise NotFound(f"There is no session {session_id}.")
            now = self._now()
            await self._check_bookable(connection, caller, session, firm_id, match_id, now)
            state = BookingState.CONFIRMED
            if session.taken >= session.seats or session.waiting:
                if session.waiting >= WAITING_MAX:
                    raise Conflict("Even the waiting list is full; book another date.", reason="WAITING_LIST_FULL")
                state = BookingState.WAITING
            booking = Booking(
                id=uuid.uuid4().hex,
                session_id=session.id,
                firm_id=firm_id,
                partner_id=session.partner_id,
                provider_id=session.provider_id,
                match_id=match_id,
                state=state,
                booked=now,
                booked_by=caller.credential_id,
                changed=now,
                correlation_id=current_correlation_id(),
            )
            await sessions_store.add_booking(connection, booking, request_id=request_id)
            if state.has_seat:
                await sessions_store.count_seats(connection, session.id, +1)
            booking = await self._tell(connection, booking.id)
        self._relay.kick()
        log.info("booked", booking=booking.id, session=session_id, firm=firm_id, state=booking.state)
        return booking

    async def confirm_booking(self, caller: Caller, booking_id: str) -> Booking:
        """Take the seat that was offered. A repeat changes nothing."""
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction_for_all_firms(self._pool) as connection:
            booking = await self._lock(connection, caller, booking_id)
            if booking.state is not BookingState.CONFIRMED:
                if booking.state is not BookingState.OFFERED:
                    raise Conflict(
                        f"This booking is {booking.state}; only a seat that was offered can be confirmed.",
                        reason=f"BOOKING_{booking.state.upper()}",
                    )
                now = self._now()
                _check_not_begun(await self._session(connection, booking.session_id), now)
                await sessions_store.change_booking(connection, booking.id, BookingState.CONFIRMED, changed=now)
                booking = await self._tell(connection, booking.id)
        self._relay.kick()
        return booking

    async def cancel_booking(self, caller: Caller, booking_id: str, reason: str) -> Booking:
        """By the firm, or by the other side with a reason. A freed seat goes to the first in line. A repeat changes nothing."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        if caller.role is not Role.FIRM and not reason.strip():
            raise Invalid("Say why; the firm will read it.", reason="REASON_MISSING")
        async with transaction_for_all_firms(self._pool) as connection:
            booking = await self._lock(connection, caller, booking_id)
            if booking.state not in (BookingState.CANCELLED, BookingState.EXPIRED):
                session, now = await self._session(connection, booking.session_id), self._now()
                _check_not_begun(session, now)
                why = reason.strip() or "by the firm"
                booking = await self._end(connection, booking, BookingState.CANCELLED, why, now)
                if caller.role is not Role.FIRM:
                    notice = notices.of_booking(booking, session, reason=booking.end_reason)
                    await notices_store.add_notices(connection, [notice])
                await self._fill(connection, booking.session_id)
        self._relay.kick()
        return booking

    async def get_booking(self, caller: Caller, booking_id: str) -> Booking:
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction_for_all_firms(self._pool) as connection:
            return await self._booking_seen_by(connection, caller, booking_id)

    async def list_bookings(
        self, caller: Caller, *, session_id: str, state: BookingState | None, page_size: int, page_token: str
    ) -> tuple[list[Booking], str]:
        """A page, newest first, and the token of the next: a firm's own, those at a partner's or provider's sessions."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        limit = page_size_of(page_size)
        async with transaction_for_all_firms(self._pool) as connection:
            found = await sessions_store.list_bookings(
                connection,
                firm_id=caller.firm_id if caller.role is Role.FIRM else 0,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else 0,
                provider_id=caller.provider_id if caller.role is Role.PROVIDER else "",
                session_id=chosen_id(session_id) if session_id else "",
                state=state,
                before=before_token(page_token),
                limit=limit + 1,
            )
        return found[:limit], page_token_of(found[limit - 1].booked, found[limit - 1].id) if len(found) > limit else ""

    # --- calendar files --------------------------------------------------------------------------------------------

    async def session_calendar(self, caller: Caller, session_id: str) -> CalendarFile:
        session = await self.get_session(caller, session_id)
        return CalendarFile(f"session-{session.id}.ics", sessions_file([session]))

    async def provider_calendar(self, caller: Caller, provider_id: str) -> CalendarFile:
        """All that have not begun, at most 500; cancelled ones too, so that a calendar drops them."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction_for_all_firms(self._pool) as connection:
            found = await sessions_store.list_sessions(
                connection,
                provider_id=chosen_id(provider_id),
                starts_from=self._now(),
                live_on=None,
                after=None,
                limit=CALENDAR_EVENTS_MAX,
            )
        return CalendarFile(f"provider-{provider_id}.ics", sessions_file(found))

    async def booking_calendar(self, caller: Caller, booking_id: str) -> CalendarFile:
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction_for_all_firms(self._pool) as connection:
            booking = await self._booking_seen_by(connection, caller, booking_id)
            session = await self._session(connection, booking.session_id)
        return CalendarFile(f"booking-{booking.id}.ics", booking_file(booking, session))

    # --- upkeep ----------------------------------------------------------------------------------------------------

    async def expire_due_bookings(self) -> int:
        """Pass on seats that were offered and not confirmed in time, and end the line of what has begun; returns how many."""
        now, expired = self._now(), 0
        async with transaction_for_all_firms(self._pool) as connection:
            due = await sessions_store.due_bookings(connection, now=now, limit=EXPIRIES_AT_ONCE_MAX)
        for booking_id, session_id in due:
            async with transaction_for_all_firms(self._pool) as connection:
                await sessions_store.lock_session(connection, session_id)
                booking = await sessions_store.booking(connection, booking_id)
                if booking is not None and booking.state in _WHY_EXPIRED:
                    await self._end(connection, booking, BookingState.EXPIRED, _WHY_EXPIRED[booking.state], now)
                    await self._fill(connection, session_id)
                    expired += 1
        if expired:
            self._relay.kick()
        return expired

    async def end_bookings_of_ended_matches(self) -> int:
        """Pass on the seats, to come, of matches that came to nothing; returns how many bookings were ended."""
        now, ended = self._now(), 0
        async with transaction_for_all_firms(self._pool) as connection:
            due = await sessions_store.bookings_of_ended_matches(connection, now=now, limit=EXPIRIES_AT_ONCE_MAX)
        for booking_id, session_id in due:
            async with transaction_for_all_firms(self._pool) as connection:
                session = await sessions_store.lock_session(connection, session_id)
                booking = await sessions_store.booking(connection, booking_id)
                assert session is not None and booking is not None  # noqa: PT018  they were found
                if booking.state in (BookingState.CANCELLED, BookingState.EXPIRED):
                    continue
                booking = await self._end(connection, booking, BookingState.CANCELLED, "MATCH_ENDED", now)
                notice = notices.of_booking(
                    booking, session, reason="its match has ended. Book again if you still come."
                )
                await notices_store.add_notices(connection, [notice])
                await self._fill(connection, session_id)
                ended += 1
        if ended:
            self._relay.kick()
        return ended

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _fill(self, connection: Connection, session_id: str) -> None:
        """Offer free seats to those in line, the first first. The session must be held."""
        session, now = await self._session(connection, session_id), self._now()
        if session.state is not SessionState.OPEN or session.starts <= now:
            return
        for _ in range(session.seats - session.taken):
            first = await sessions_store.first_waiting(connection, session_id)
            if first is None:
                return
            await sessions_store.count_seats(connection, session_id, +1)
            await sessions_store.change_booking(
                connection,
                first.id,
                BookingState.OFFERED,
                changed=now,
                confirm_by=min(now + session.confirm_within, session.starts),
            )
            await self._tell(connection, first.id)

    async def _move_bookings(self, connection: Connection, before: Session) -> None:
        """The session is another than those who booked it know; no seat is kept beyond its beginning."""
        await sessions_store.keep_until_start(connection, before.id)
        session = await self._session(connection, before.id)
        standing = await sessions_store.standing_bookings(connection, before.id)
        events = [(booking.id, booking_event(booking, session)) for booking in standing]
        await outbox.write_all(connection, topics.BOOKINGS, events)
        moved = [notices.of_moved_session(booking, before, session) for booking in standing]
        await notices_store.add_notices(connection, moved)

    async def _end(
        self, connection: Connection, booking: Booking, state: BookingState, reason: str, now: datetime
    ) -> Booking:
        if booking.state.has_seat:
            await sessions_store.count_seats(connection, booking.session_id, -1)
        await sessions_store.change_booking(connection, booking.id, state, changed=now, reason=reason)
        return await self._tell(connection, booking.id)

    async def _tell(self, connection: Connection, booking_id: str) -> Booking:
        """Publish the booking as it is now; its firm is told of a seat that it was offered or lost."""
        booking = await sessions_store.booking(connection, booking_id)
        assert booking is not None  # it was just written
        session = await self._session(connection, booking.session_id)
        with correlated(booking.correlation_id):
            await outbox.write(connection, topics.BOOKINGS, key=booking.id, value=booking_event(booking, session))
        if booking.state in (BookingState.OFFERED, BookingState.EXPIRED):
            await notices_store.add_notices(connection, [notices.of_booking(booking, session)])
        bookings_total.labels(booking.state).inc()
        return booking

    async def _check_bookable(
        self, connection: Connection, caller: Caller, session: Session, firm_id: int, match_id: str, now: datetime
    ) -> None:
        provider = await providers_store.provider(connection, session.provider_id, quarter=quarter_of(now.date()))
        assert provider is not None  # by foreign key
        if session.state is not SessionState.OPEN or not provider.is_live(today(self._clock)):
            raise Conflict("This session does not take place; book another date.", reason="SESSION_CANCELLED")
        _check_not_begun(session, now)
        if firm_id in provider.conflict_firm_ids:
            raise Conflict("This provider cannot work for the firm; look for another.", reason="NOT_SUITABLE")
        if await sessions_store.bookings_of_firm(connection, session.id, firm_id) >= BOOKINGS_OF_A_FIRM_MAX:
            raise Conflict(
                f"A firm has at most {BOOKINGS_OF_A_FIRM_MAX} bookings at a session; cancel one first.",
                reason="TOO_MANY_BOOKINGS",
            )
        if match_id:
            match = await match_seen_by(connection, caller, match_id)
            standing = match.state in (MatchState.ACCEPTED, MatchState.ENGAGED)
            if not standing or (match.firm_id, match.provider_id) != (firm_id, session.provider_id):
                raise Conflict("That is no standing match of the firm with this provider.", reason="OTHER_MATCH")

    async def _own_provider(self, connection: Connection, caller: Caller, provider_id: str) -> None:
        provider = await providers_store.lock_provider(connection, chosen_id(provider_id))
        if provider is None or not _arranges(caller, provider.id, provider.partner_id):
            raise NotFound(f"There is no provider {provider_id} of yours.")
        if provider.kind not in (Kind.WORKSHOP, Kind.FACILITY):
            raise Invalid("Only workshops have dates and only facilities have slots.", reason="NO_SESSIONS")

    async def _lock(self, connection: Connection, caller: Caller, booking_id: str) -> Booking:
        """The booking as it is now, with its session held. Raises NotFound for what the caller may not see."""
        seen = await self._booking_seen_by(connection, caller, booking_id)
        await sessions_store.lock_session(connection, seen.session_id)
        booking = await sessions_store.booking(connection, booking_id)
        assert booking is not None  # it was seen
        return booking

    async def _booking_seen_by(self, connection: Connection, caller: Caller, booking_id: str) -> Booking:
        found = await sessions_store.booking(connection, known_form(booking_id))
        if found is None or not caller.has_part_in(
            firm_id=found.firm_id, provider_id=found.provider_id, partner_id=found.partner_id
        ):
            raise NotFound()
        return found

    async def _session(self, connection: Connection, session_id: str) -> Session:
        found = await sessions_store.session(connection, session_id)
        if found is None:
            raise NotFound(f"There is no session {session_id}.")
        return found

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _arranges(caller: Caller, provider_id: str, partner_id: int) -> bool:
    return caller.role is Role.OPERATOR or caller.acts_for(provider_id=provider_id, partner_id=partner_id)


def _check_session(session: Session, now: datetime) -> None:
    if not CHOSEN_ID.fullmatch(session.id):
        raise Invalid("An id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_ID")
    if not session.title.strip():
        raise Invalid("A session has a title.", reason="TITLE_MISSING")
    check_text("title", session.title, TITLE_CHARACTERS_MAX)
    check_text("place", session.place, NOTE_CHARACTERS_MAX)
    if not now < session.starts < now + AHEAD_MAX:
        raise Invalid(f"A session begins later than now, within {AHEAD_MAX.days} days.", reason="BAD_TIME")
    if not timedelta(0) < session.ends - session.starts <= LENGTH_MAX:
        raise Invalid(f"A session ends after it begins, within {LENGTH_MAX.days} days.", reason="BAD_TIME")
    if not 1 <= session.seats <= SEATS_MAX:
        raise Invalid(f"seats are 1 to {SEATS_MAX}.", reason="BAD_SEATS")
    if not CONFIRM_WITHIN_MIN <= session.confirm_within <= CONFIRM_WITHIN_MAX:
        raise Invalid("A freed seat is kept for 5 minutes to 30 days.", reason="BAD_CONFIRM_WITHIN")


def _check_not_begun(session: Session, now: datetime) -> None:
    if session.starts <= now:
        raise Conflict("This session has begun; it stays as it is. Look for another date.", reason="SESSION_BEGUN")


def _check_change(before: Session, session: Session, now: datetime) -> None:
    if before.provider_id != session.provider_id:
        raise _taken_id()
    if before.state is SessionState.CANCELLED:
        raise Conflict("This session is cancelled; put another one.", reason="SESSION_CANCELLED")
    _check_not_begun(before, now)
    if session.seats < before.taken:
        raise Conflict(
            f"{before.taken} seats are taken; cancel bookings first, or keep as many seats.", reason="SEATS_TAKEN"
        )


def _taken_id() -> AlreadyExists:
    return AlreadyExists("A session of another provider has this id; choose another.", reason="ID_TAKEN")
