"""The audit record over gRPC: the same as over HTTP."""

import json
from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.audits import AuditService
from smdih.funding.v1 import audit_pb2 as pb
from smdih.funding.v1.audit_pb2_grpc import AuditServiceServicer


class AuditRpc(AuditServiceServicer):
    """Translates; who may see it is the service's business."""

    def __init__(self, service: AuditService) -> None:
        self._service = service

    async def ListAuditEntries(self, request: pb.ListAuditEntriesRequest, context: Any) -> pb.ListAuditEntriesResponse:
        found, token = await self._service.list_entries(
            current_caller(),
            call_id=request.call_id,
            application_id=request.application_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        entries = [
            message_of(pb.AuditEntry, entry, detail_json=json.dumps(entry.detail, ensure_ascii=False, sort_keys=True))
            for entry in found
        ]
        return pb.ListAuditEntriesResponse(entries=entries, next_page_token=token)
