"""Notices to firms over gRPC: the same as over HTTP."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.notices import NoticeService
from smdih.funding.v1 import notice_pb2 as pb
from smdih.funding.v1.notice_pb2_grpc import NoticeServiceServicer


class NoticeRpc(NoticeServiceServicer):
    """Translates; who may see what is the service's business."""

    def __init__(self, service: NoticeService) -> None:
        self._service = service

    async def ListNotices(self, request: pb.ListNoticesRequest, context: Any) -> pb.ListNoticesResponse:
        found, token = await self._service.list_notices(
            current_caller(),
            after_id=request.after_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListNoticesResponse(notices=[message_of(pb.Notice, one) for one in found], next_page_token=token)
