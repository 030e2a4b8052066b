"""The gRPC edge of the log of reads through rooms."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.ingest.queries.rooms import RoomReads
from smdih.ingest.v1 import rooms_pb2 as pb
from smdih.ingest.v1 import rooms_pb2_grpc


class RoomReadServicer(rooms_pb2_grpc.RoomReadServiceServicer):
    def __init__(self, log: RoomReads) -> None:
        self._log = log

    async def ListRoomReads(self, request: pb.ListRoomReadsRequest, context: Any) -> pb.ListRoomReadsResponse:
        found, token = await self._log.page(current_caller(), request.room_id, request.page_size, request.page_token)
        return pb.ListRoomReadsResponse(reads=[message_of(pb.RoomRead, each) for each in found], next_page_token=token)
