"""The HTTP edge of rooms."""

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.http import Authenticated
from services.matching.forms import Body, PageSize, PageToken, RegistryId, TimeUs, us
from services.matching.messages import asked_time
from services.matching.rooms import NewRoom, Room, RoomState
from services.matching.service import Matching


class MachineSignals(Body):
    machine_id: RegistryId
    signal_ids: list[RegistryId]


class RoomBody(Body):
    request_id: str = ""
    match_id: str
    # At most 500 signals of 50 machines.
    signals: list[MachineSignals]
    purpose: str
    # Samples of this time may be read; left out at the end: until the room closes.
    data_from_us: TimeUs
    data_until_us: TimeUs | None = None
    # At most 92 days from now.
    closes_us: TimeUs

    def new(self) -> NewRoom:
        data_from, closes = asked_time("data_from_us", self.data_from_us), asked_time("closes_us", self.closes_us)
        if data_from is None or closes is None:
            raise Invalid("A room has a time: set data_from_us and closes_us.", reason="BAD_TIME")
        return NewRoom(
            match_id=self.match_id,
            signals={each.machine_id: each.signal_ids for each in self.signals},
            purpose=self.purpose,
            data_from=data_from,
            data_until=asked_time("data_until_us", self.data_until_us),
            closes=closes,
        )


class RecallBody(Body):
    reason: str = ""


class RoomView(Body):
    id: str
    match_id: str
    firm_id: int
    partner_id: int
    provider_id: str
    state: RoomState
    signal_ids: list[int]
    purpose: str
    data_from_us: int
    data_until_us: int
    opens_us: int
    closes_us: int
    ended_us: int | None
    end_reason: str
    correlation_id: str


class LentSignalView(Body):
    id: int
    machine_id: int
    machine_kind: str
    name: str
    unit: str


class RoomDetails(Body):
    room: RoomView
    # For the partner while the room is open.
    signals: list[LentSignalView]


class RoomsPage(Body):
    rooms: list[RoomView]
    next_page_token: str


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/rooms", tags=["rooms"])
    rooms = matching.rooms

    @routes.post("", status_code=201)
    async def open_room(caller: Authenticated, body: RoomBody) -> RoomView:
        """Lend exactly these signals to the partner of an engaged match."""
        return _room_view(await rooms.open_room(caller, body.new(), request_id=body.request_id))

    @routes.get("")
    async def list_rooms(
        caller: Authenticated, state: RoomState | None = None, page_size: PageSize = 0, page_token: PageToken = ""
    ) -> RoomsPage:
        """The caller's own, newest first."""
        found, token = await rooms.list_rooms(caller, state=state, page_size=page_size, page_token=page_token)
        return RoomsPage(rooms=[_room_view(each) for each in found], next_page_token=token)

    @routes.get("/{room_id}")
    async def get_room(caller: Authenticated, room_id: str) -> RoomDetails:
        found = await rooms.get_room(caller, room_id)
        signals = await rooms.lent_signals(caller, room_id)
        return RoomDetails(
            room=_room_view(found),
            signals=[
                LentSignalView(
                    id=each.id,
                    machine_id=each.machine_id,
                    machine_kind=each.machine_kind,
                    name=each.name,
                    unit=each.unit,
                )
                for each in signals
            ],
        )

    @routes.post("/{room_id}/recall")
    async def recall_room(caller: Authenticated, room_id: str, body: RecallBody | None = None) -> RoomView:
        """From now on nothing of it may be read."""
        return _room_view(await rooms.recall_room(caller, room_id, body.reason if body else ""))

    return routes


def _room_view(room: Room) -> RoomView:
    return RoomView(
        id=room.id,
        match_id=room.match_id,
        firm_id=room.firm_id,
        partner_id=room.partner_id,
        provider_id=room.provider_id,
        state=room.state,
        signal_ids=list(room.signal_ids),
        purpose=room.purpose,
        data_from_us=to_us(room.data_from),
        data_until_us=to_us(room.data_until),
        opens_us=to_us(room.opens),
        closes_us=to_us(room.closes),
        ended_us=us(room.ended),
        end_reason=room.end_reason,
        correlation_id=room.correlation_id,
    )
