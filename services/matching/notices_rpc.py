"""The gRPC edge of notices."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.matching.service import Matching
from smdih.matching.v1 import notices_pb2 as pb
from smdih.matching.v1 import notices_pb2_grpc


class NoticeServicer(notices_pb2_grpc.NoticeServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._notices = matching.notices

    async def ListNotices(self, request: pb.ListNoticesRequest, context: Any) -> pb.ListNoticesResponse:
        found, token = await self._notices.list_notices(
            current_caller(), unread=request.unread, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListNoticesResponse(notices=[message_of(pb.Notice, each) for each in found], next_page_token=token)

    async def MarkNoticeRead(self, request: pb.MarkNoticeReadRequest, context: Any) -> pb.MarkNoticeReadResponse:
        read = await self._notices.mark_read(current_caller(), request.notice_id)
        return pb.MarkNoticeReadResponse(notice=message_of(pb.Notice, read))
