"""The HTTP edge of sessions and bookings."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import Field

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.http import Authenticated
from services.matching.calendar_file import MEDIA_TYPE
from services.matching.forms import Body, PageSize, PageToken, RegistryId, TimeUs, us
from services.matching.messages import asked_time
from services.matching.service import Matching
from services.matching.service.sessions import CalendarFile
from services.matching.sessions import Booking, BookingState, Session, SessionState


class SessionBody(Body):
    # A workshop or a facility.
    provider_id: str
    title: str
    # Where it is, or how to join.
    place: str = ""
    starts_us: TimeUs
    ends_us: TimeUs
    seats: int
    # How long a seat that has come free is kept for the first in line.
    confirm_within_s: Annotated[int, Field(ge=300, le=2_592_000)] = 172_800

    def session(self, session_id: str) -> Session:
        starts, ends = asked_time("starts_us", self.starts_us), asked_time("ends_us", self.ends_us)
        if starts is None or ends is None:
            raise Invalid("A session has a time: set starts_us and ends_us.", reason="BAD_TIME")
        return Session(
            id=session_id,
            provider_id=self.provider_id,
            title=self.title,
            place=self.place,
            starts=starts,
            ends=ends,
            seats=self.seats,
            confirm_within=timedelta(seconds=self.confirm_within_s),
        )


class SessionView(SessionBody):
    id: str
    state: SessionState
    cancel_reason: str
    taken: int
    waiting: int
    sequence: int
    changed_us: int


class SessionsPage(Body):
    sessions: list[SessionView]
    next_page_token: str


class BookBody(Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    session_id: str
    # Of a standing match with the session's provider, if the booking belongs to one.
    match_id: str = ""


class ReasonBody(Body):
    reason: str = ""


class BookingView(Body):
    id: str
    session_id: str
    firm_id: int
    partner_id: int
    match_id: str
    state: BookingState
    # Place in the line, from 1; 0: not waiting.
    in_line: int
    # A seat that was offered goes to the next in line then.
    confirm_by_us: int | None
    end_reason: str
    booked_us: int
    changed_us: int
    correlation_id: str


class BookingsPage(Body):
    bookings: list[BookingView]
    next_page_token: str


def router(matching: Matching) -> APIRouter:
    every = APIRouter(prefix="/v1")
    every.include_router(_sessions(matching))
    every.include_router(_bookings(matching))
    return every


def _sessions(matching: Matching) -> APIRouter:
    routes = APIRouter(tags=["sessions"])
    sessions = matching.sessions

    @routes.put("/sessions/{session_id}")
    async def put_session(caller: Authenticated, session_id: str, body: SessionBody) -> SessionView:
        """Create a workshop's date or a facility's slot, or change the one with this id."""
        return _session_view(await sessions.put_session(caller, body.session(session_id)))

    @routes.post("/sessions/{session_id}/cancel")
    async def cancel_session(caller: Authenticated, session_id: str, body: ReasonBody) -> SessionView:
        """It does not take place; every booking ends."""
        return _session_view(await sessions.cancel_session(caller, session_id, body.reason))

    @routes.get("/sessions")
    async def list_sessions(
        caller: Authenticated, provider_id: str = "", page_size: PageSize = 0, page_token: PageToken = ""
    ) -> SessionsPage:
        """Those that have not begun, in order of time. Firms see open ones only."""
        found, token = await sessions.list_sessions(
            caller, provider_id=provider_id, page_size=page_size, page_token=page_token
        )
        return SessionsPage(sessions=[_session_view(each) for each in found], next_page_token=token)

    @routes.get("/sessions/{session_id}")
    async def get_session(caller: Authenticated, session_id: str) -> SessionView:
        return _session_view(await sessions.get_session(caller, session_id))

    @routes.get("/sessions/{session_id}/calendar.ics")
    async def session_calendar(caller: Authenticated, session_id: str) -> Response:
        return _file(await sessions.session_calendar(caller, session_id))

    @routes.get("/providers/{provider_id}/calendar.ics")
    async def provider_calendar(caller: Authenticated, provider_id: str) -> Response:
        """All sessions that have not begun."""
        return _file(await sessions.provider_calendar(caller, provider_id))

    return routes


def _bookings(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/bookings", tags=["bookings"])
    sessions = matching.sessions

    @routes.post("", status_code=201)
    async def book(caller: Authenticated, body: BookBody) -> BookingView:
        """A seat if one is free and nobody waits, else the end of the line."""
        booked = await sessions.book(
            caller, body.firm_id, body.session_id, match_id=body.match_id, request_id=body.request_id
        )
        return _booking_view(booked)

    @routes.get("")
    async def list_bookings(
        caller: Authenticated,
        session_id: str = "",
        state: BookingState | None = None,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> BookingsPage:
        """A firm's own, those at a partner's sessions; newest first."""
        found, token = await sessions.list_bookings(
            caller, session_id=session_id, state=state, page_size=page_size, page_token=page_token
        )
        return BookingsPage(bookings=[_booking_view(each) for each in found], next_page_token=token)

    @routes.get("/{booking_id}")
    async def get_booking(caller: Authenticated, booking_id: str) -> BookingView:
        return _booking_view(await sessions.get_booking(caller, booking_id))

    @routes.post("/{booking_id}/confirm")
    async def confirm_booking(caller: Authenticated, booking_id: str) -> BookingView:
        """Take the seat that was offered."""
        return _booking_view(await sessions.confirm_booking(caller, booking_id))

    @routes.post("/{booking_id}/cancel")
    async def cancel_booking(caller: Authenticated, booking_id: str, body: ReasonBody | None = None) -> BookingView:
        """By the firm, or by the partner with a reason. A freed seat is offered to the first in line."""
        reason = body.reason if body else ""
        return _booking_view(await sessions.cancel_booking(caller, booking_id, reason))

    @routes.get("/{booking_id}/calendar.ics")
    async def booking_calendar(caller: Authenticated, booking_id: str) -> Response:
        return _file(await sessions.booking_calendar(caller, booking_id))

    return routes


def _file(file: CalendarFile) -> Response:
    headers = {"Content-Disposition": f'attachment; filename="{file.name}"'}
    return Response(file.content, media_type=MEDIA_TYPE, headers=headers)


def _session_view(session: Session) -> SessionView:
    return SessionView(
        id=session.id,
        provider_id=session.provider_id,
        title=session.title,
        place=session.place,
        starts_us=to_us(session.starts),
        ends_us=to_us(session.ends),
        seats=session.seats,
        confirm_within_s=session.confirm_within // timedelta(seconds=1),
        state=session.state,
        cancel_reason=session.cancel_reason,
        taken=session.taken,
        waiting=session.waiting,
        sequence=session.sequence,
        changed_us=0 if session.changed is None else to_us(session.changed),
    )


def _booking_view(booking: Booking) -> BookingView:
    return BookingView(
        id=booking.id,
        session_id=booking.session_id,
        firm_id=booking.firm_id,
        partner_id=booking.partner_id,
        match_id=booking.match_id,
        state=booking.state,
        in_line=booking.in_line,
        confirm_by_us=us(booking.confirm_by),
        end_reason=booking.end_reason,
        booked_us=to_us(booking.booked),
        changed_us=to_us(booking.changed),
        correlation_id=booking.correlation_id,
    )
