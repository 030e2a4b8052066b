"""Change requests of awards over gRPC: the same abilities as over HTTP."""

from collections.abc import Iterable
from typing import Any

from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.change_requests import Change, ChangeKind, ChangeService
from services.funding.terms_rpc import costs_of
from services.funding.words import word_of
from smdih.funding.v1 import change_pb2 as pb
from smdih.funding.v1.change_pb2_grpc import ChangeServiceServicer


class ChangeRpc(ChangeServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: ChangeService) -> None:
        self._service = service

    async def ListChanges(self, request: pb.ListChangesRequest, context: Any) -> pb.ListChangesResponse:
        found = await self._service.get(current_caller(), request.award_id)
        return pb.ListChangesResponse(changes=_messages(found))

    async def RequestChange(self, request: pb.RequestChangeRequest, context: Any) -> pb.RequestChangeResponse:
        there = await self._service.request(
            current_caller(),
            request.award_id,
            request_id=request.request_id,
            kind=word_of(ChangeKind, pb.ChangeKind, request.kind),
            reason=request.reason,
            project_end=request.project_end,
            costs=costs_of(request.costs),
            reduction_pence=request.reduction_pence,
        )
        return pb.RequestChangeResponse(changes=_messages(there))

    async def DecideChange(self, request: pb.DecideChangeRequest, context: Any) -> pb.DecideChangeResponse:
        if request.verdict not in (pb.CHANGE_VERDICT_APPROVE, pb.CHANGE_VERDICT_REFUSE):
            raise Invalid("verdict is CHANGE_VERDICT_APPROVE or CHANGE_VERDICT_REFUSE.", reason="VERDICT_MISSING")
        there = await self._service.decide(
            current_caller(),
            request.award_id,
            request.change_id,
            approve=request.verdict == pb.CHANGE_VERDICT_APPROVE,
            reason=request.reason,
        )
        return pb.DecideChangeResponse(changes=_messages(there))


def _messages(changes: Iterable[Change]) -> list[pb.ChangeRequest]:
    return [message_of(pb.ChangeRequest, change) for change in changes]
