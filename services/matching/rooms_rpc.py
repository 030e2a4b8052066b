"""The gRPC edge of rooms."""

from collections.abc import Mapping
from typing import Any

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.rpc import current_caller
from services.matching.messages import ROOM_STATES, asked_time
from services.matching.rooms import NewRoom, Room, RoomState
from services.matching.service import Matching
from smdih.matching.v1 import rooms_pb2 as pb
from smdih.matching.v1 import rooms_pb2_grpc

_STATES: Mapping[int, RoomState] = {number: state for state, number in ROOM_STATES.items()}


class RoomServicer(rooms_pb2_grpc.RoomServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._rooms = matching.rooms

    async def OpenRoom(self, request: pb.OpenRoomRequest, context: Any) -> pb.OpenRoomResponse:
        opened = await self._rooms.open_room(current_caller(), _new_room(request), request_id=request.request_id)
        return pb.OpenRoomResponse(room=_room_message(opened))

    async def RecallRoom(self, request: pb.RecallRoomRequest, context: Any) -> pb.RecallRoomResponse:
        recalled = await self._rooms.recall_room(current_caller(), request.room_id, request.reason)
        return pb.RecallRoomResponse(room=_room_message(recalled))

    async def GetRoom(self, request: pb.GetRoomRequest, context: Any) -> pb.GetRoomResponse:
        found = await self._rooms.get_room(current_caller(), request.room_id)
        signals = await self._rooms.lent_signals(current_caller(), request.room_id)
        return pb.GetRoomResponse(
            room=_room_message(found),
            signals=[
                pb.LentSignal(
                    id=each.id,
                    machine_id=each.machine_id,
                    machine_kind=each.machine_kind,
                    name=each.name,
                    unit=each.unit,
                )
                for each in signals
            ],
        )

    async def ListRooms(self, request: pb.ListRoomsRequest, context: Any) -> pb.ListRoomsResponse:
        if request.state and request.state not in _STATES:
            raise Invalid(f"state {request.state} is not one of the contract's.", reason="BAD_STATE")
        found, token = await self._rooms.list_rooms(
            current_caller(),
            state=_STATES.get(request.state),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListRoomsResponse(rooms=map(_room_message, found), next_page_token=token)


def _new_room(request: pb.OpenRoomRequest) -> NewRoom:
    data_from, closes = asked_time("data_from_us", request.data_from_us), asked_time("closes_us", request.closes_us)
    if data_from is None or closes is None:
        raise Invalid("A room has a time: set data_from_us and closes_us.", reason="BAD_TIME")
    return NewRoom(
        match_id=request.match_id,
        signals={each.machine_id: list(each.signal_ids) for each in request.signals},
        purpose=request.purpose,
        data_from=data_from,
        data_until=asked_time("data_until_us", request.data_until_us),
        closes=closes,
    )


def _room_message(room: Room) -> pb.Room:
    return pb.Room(
        id=room.id,
        match_id=room.match_id,
        firm_id=room.firm_id,
        partner_id=room.partner_id,
        provider_id=room.provider_id,
        state=ROOM_STATES[room.state],
        signal_ids=room.signal_ids,
        purpose=room.purpose,
        data_from_us=to_us(room.data_from),
        data_until_us=to_us(room.data_until),
        opens_us=to_us(room.opens),
        closes_us=to_us(room.closes),
        ended_us=0 if room.ended is None else to_us(room.ended),
        end_reason=room.end_reason,
        correlation_id=room.correlation_id,
    )
