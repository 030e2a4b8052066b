"""Groups of firms and what the limit leaves them, over gRPC: the same abilities as over HTTP."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.groups import GroupService
from smdih.funding.v1 import group_pb2 as pb
from smdih.funding.v1.group_pb2_grpc import GroupServiceServicer


class GroupRpc(GroupServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: GroupService) -> None:
        self._service = service

    async def SetGroup(self, request: pb.SetGroupRequest, context: Any) -> pb.SetGroupResponse:
        group = await self._service.set_group(
            current_caller(), request.group_id, firm_ids=list(request.firm_ids), source=request.source
        )
        return pb.SetGroupResponse(group=message_of(pb.Group, group))

    async def GetGroup(self, request: pb.GetGroupRequest, context: Any) -> pb.GetGroupResponse:
        group = await self._service.get_group(current_caller(), request.group_id)
        return pb.GetGroupResponse(group=message_of(pb.Group, group))

    async def SetHolding(self, request: pb.SetHoldingRequest, context: Any) -> pb.SetHoldingResponse:
        enterprise = await self._service.set_holding(
            current_caller(),
            request.owner_firm_id,
            request.owned_firm_id,
            percent=request.percent,
            dominant_influence=request.dominant_influence,
            source=request.source,
        )
        return pb.SetHoldingResponse(enterprise=message_of(pb.Enterprise, enterprise))

    async def GetEnterprise(self, request: pb.GetEnterpriseRequest, context: Any) -> pb.GetEnterpriseResponse:
        enterprise = await self._service.enterprise(current_caller(), request.firm_id)
        return pb.GetEnterpriseResponse(enterprise=message_of(pb.Enterprise, enterprise))

    async def GetAssistance(self, request: pb.GetAssistanceRequest, context: Any) -> pb.GetAssistanceResponse:
        return message_of(pb.GetAssistanceResponse, await self._service.headroom(current_caller(), request.firm_id))
