"""The gRPC edge of rooms."""

from typing import Any

from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.matching.messages import asked_filter, asked_time
from services.matching.rooms import NewRoom, Room, RoomState
from services.matching.service import Matching
from smdih.matching.v1 import events_pb2, rooms_pb2_grpc
from smdih.matching.v1 import rooms_pb2 as pb


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
            signals=[message_of(pb.LentSignal, each) for each in signals],
        )

    async def ListRooms(self, request: pb.ListRoomsRequest, context: Any) -> pb.ListRoomsResponse:
        found, token = await self._rooms.list_rooms(
            current_caller(),
            state=asked_filter("state", RoomState, events_pb2.RoomState, request.state),
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
    return message_of(pb.Room, room)
