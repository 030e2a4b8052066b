"""The gRPC edge of sessions and bookings."""

from datetime import timedelta
from typing import Any

from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.matching.messages import asked_filter, asked_time
from services.matching.service import Matching
from services.matching.sessions import Booking, BookingState, Session, SessionState
from smdih.matching.v1 import events_pb2, sessions_pb2_grpc
from smdih.matching.v1 import sessions_pb2 as pb

CONFIRM_WITHIN_DEFAULT_S = 172_800


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

    async def GetSession(self, request: pb.GetSessionRequest, context: Any) -> pb.GetSessionResponse:
        found = await self._sessions.get_session(current_caller(), request.session_id)
        return pb.GetSessionResponse(session=_session_message(found))

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
        found, token = await self._sessions.list_bookings(
            current_caller(),
            session_id=request.session_id,
            state=asked_filter("state", BookingState, events_pb2.BookingState, request.state),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListBookingsResponse(bookings=map(_booking_message, found), next_page_token=token)

    async def GetBooking(self, request: pb.GetBookingRequest, context: Any) -> pb.GetBookingResponse:
        found = await self._sessions.get_booking(current_caller(), request.booking_id)
        return pb.GetBookingResponse(booking=_booking_message(found))

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
    return message_of(
        pb.Session,
        session,
        confirm_within_s=session.confirm_within // timedelta(seconds=1),
        cancelled=session.state is SessionState.CANCELLED,
    )


def _booking_message(booking: Booking) -> pb.Booking:
    return message_of(pb.Booking, booking)
