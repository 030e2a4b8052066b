"""The gRPC edge of sessions and bookings."""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.rpc import current_caller
from services.matching.messages import BOOKING_STATES, asked_time
from services.matching.service import Matching
from services.matching.sessions import Booking, BookingState, Session, SessionState
from smdih.matching.v1 import sessions_pb2 as pb
from smdih.matching.v1 import sessions_pb2_grpc

CONFIRM_WITHIN_DEFAULT_S = 172_800

_STATES: Mapping[int, BookingState] = {number: state for state, number in BOOKING_STATES.items()}


class SessionServicer(sessions_pb2_grpc.SessionServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._sessions = matching.sessions

    async def PutSession(self, request: pb.PutSessionRequest, context: Any) -> pb.PutSessionResponse:
        put = await self._sessions.put_session(current_caller(), _session(request.session))
        return pb.PutSessionResponse(session=_session_message(put))

    async def CancelSession(self, request: pb.CancelSessionRequest, context: Any) -> pb.CancelSessionResponse:
        cancelled = await self._sessions.cancel_session(current_caller(), request.session_id, request.reason)
        return pb.CancelSessionResponse(session=_session_message(cancelled))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Any) -> pb.ListSessionsResponse:
        found, token = await self._sessions.list_sessions(
            current_caller(),
            provider_id=request.provider_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListSessionsResponse(sessions=map(_session_message, found), next_page_token=token)

    async def Book(self, request: pb.BookRequest, context: Any) -> pb.BookResponse:
        booked = await self._sessions.book(
            current_caller(),
            request.firm_id,
            request.session_id,
            match_id=request.match_id,
            request_id=request.request_id,
        )
        return pb.BookResponse(booking=_booking_message(booked))

    async def ConfirmBooking(self, request: pb.ConfirmBookingRequest, context: Any) -> pb.ConfirmBookingResponse:
        confirmed = await self._sessions.confirm_booking(current_caller(), request.booking_id)
        return pb.ConfirmBookingResponse(booking=_booking_message(confirmed))

    async def CancelBooking(self, request: pb.CancelBookingRequest, context: Any) -> pb.CancelBookingResponse:
        cancelled = await self._sessions.cancel_booking(current_caller(), request.booking_id, request.reason)
        return pb.CancelBookingResponse(booking=_booking_message(cancelled))

    async def ListBookings(self, request: pb.ListBookingsRequest, context: Any) -> pb.ListBookingsResponse:
        if request.state and request.state not in _STATES:
            raise Invalid(f"state {request.state} is not one of the contract's.", reason="BAD_STATE")
        found, token = await self._sessions.list_bookings(
            current_caller(),
            session_id=request.session_id,
            state=_STATES.get(request.state),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListBookingsResponse(bookings=map(_booking_message, found), next_page_token=token)

    async def GetCalendar(self, request: pb.GetCalendarRequest, context: Any) -> pb.GetCalendarResponse:
        files = {
            "session_id": self._sessions.session_calendar,
            "booking_id": self._sessions.booking_calendar,
            "provider_id": self._sessions.provider_calendar,
        }
        of = request.WhichOneof("of")
        if of is None:
            raise Invalid("Name a session, a booking or a provider.", reason="NOTHING_NAMED")
        file = await files[of](current_caller(), getattr(request, of))
        return pb.GetCalendarResponse(file_name=file.name, content=file.content)


def _session(message: pb.Session) -> Session:
    starts, ends = asked_time("starts_us", message.starts_us), asked_time("ends_us", message.ends_us)
    if starts is None or ends is None:
        raise Invalid("A session has a time: set starts_us and ends_us.", reason="BAD_TIME")
    return Session(
        id=message.id,
        provider_id=message.provider_id,
        title=message.title,
        place=message.place,
        starts=starts,
        ends=ends,
        seats=message.seats,
        confirm_within=timedelta(seconds=message.confirm_within_s or CONFIRM_WITHIN_DEFAULT_S),
    )


def _session_message(session: Session) -> pb.Session:
    return pb.Session(
        id=session.id,
        provider_id=session.provider_id,
        title=session.title,
        place=session.place,
        starts_us=to_us(session.starts),
        ends_us=to_us(session.ends),
        seats=session.seats,
        confirm_within_s=session.confirm_within // timedelta(seconds=1),
        taken=session.taken,
        waiting=session.waiting,
        cancelled=session.state is SessionState.CANCELLED,
        cancel_reason=session.cancel_reason,
        sequence=session.sequence,
        changed_us=_us(session.changed),
    )


def _booking_message(booking: Booking) -> pb.Booking:
    return pb.Booking(
        id=booking.id,
        session_id=booking.session_id,
        firm_id=booking.firm_id,
        partner_id=booking.partner_id,
        match_id=booking.match_id,
        state=BOOKING_STATES[booking.state],
        in_line=booking.in_line,
        confirm_by_us=_us(booking.confirm_by),
        end_reason=booking.end_reason,
        booked_us=to_us(booking.booked),
        changed_us=to_us(booking.changed),
        correlation_id=booking.correlation_id,
    )


def _us(time_: datetime | None) -> int:
    return 0 if time_ is None else to_us(time_)
