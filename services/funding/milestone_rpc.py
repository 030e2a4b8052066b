"""Milestones of awards over gRPC: the same abilities as over HTTP."""

import json
from collections.abc import Iterable
from typing import Any

from services.common.errors import Invalid
from services.common.evidence import BAD_EVIDENCE
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.domain import checked_date
from services.funding.milestone import COVERAGE_MIN, Comparison, Milestone
from services.funding.milestones import MilestoneService
from services.funding.requests import understood
from services.funding.words import word_of
from smdih.funding.v1 import milestone_pb2 as pb
from smdih.funding.v1.milestone_pb2_grpc import MilestoneServiceServicer


class MilestoneRpc(MilestoneServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: MilestoneService) -> None:
        self._service = service

    async def ListMilestones(self, request: pb.ListMilestonesRequest, context: Any) -> pb.ListMilestonesResponse:
        found = await self._service.get(current_caller(), request.award_id)
        return pb.ListMilestonesResponse(milestones=_messages(found))

    async def SetMilestones(self, request: pb.SetMilestonesRequest, context: Any) -> pb.SetMilestonesResponse:
        wanted = [_wanted(milestone) for milestone in request.milestones]
        there = await self._service.set(current_caller(), request.award_id, wanted)
        return pb.SetMilestonesResponse(milestones=_messages(there))

    async def ShowMilestone(self, request: pb.ShowMilestoneRequest, context: Any) -> pb.ShowMilestoneResponse:
        there = await self._service.show(
            current_caller(), request.award_id, request.milestone_id, evidence_of(request.evidence_json)
        )
        return pb.ShowMilestoneResponse(milestones=_messages(there))

    async def SendMilestoneDocument(
        self, request: pb.SendMilestoneDocumentRequest, context: Any
    ) -> pb.SendMilestoneDocumentResponse:
        there = await self._service.send_document(
            current_caller(),
            request.award_id,
            request.milestone_id,
            reference=request.reference,
            sha256=request.sha256,
        )
        return pb.SendMilestoneDocumentResponse(milestones=_messages(there))

    async def ConfirmMilestone(self, request: pb.ConfirmMilestoneRequest, context: Any) -> pb.ConfirmMilestoneResponse:
        there = await self._service.confirm(
            current_caller(), request.award_id, request.milestone_id, sha256=request.sha256, reason=request.reason
        )
        return pb.ConfirmMilestoneResponse(milestones=_messages(there))


def evidence_of(text: str) -> dict[str, Any]:
    """Evidence as it was given out. Raises Invalid for what is no JSON object; what it says is checked elsewhere."""
    try:
        evidence = json.loads(text)
    except (ValueError, RecursionError):
        evidence = None
    if not isinstance(evidence, dict):
        raise Invalid("Send the evidence exactly as GetEvidence gave it out, a JSON object.", reason=BAD_EVIDENCE)
    return evidence


def _wanted(message: pb.Milestone) -> Milestone:
    with understood():
        return Milestone(
            id=message.id,
            title=message.title,
            measure=message.measure,
            machine_id=message.machine_id if message.HasField("machine_id") else None,
            comparison=word_of(Comparison, pb.Comparison, message.comparison) if message.measure else None,
            threshold=message.threshold,
            days_min=message.days_min,
            coverage_min=message.coverage_min or (COVERAGE_MIN if message.measure else ""),
            due=checked_date("due", message.due),
        )


def _messages(milestones: Iterable[Milestone]) -> list[pb.Milestone]:
    return [message_of(pb.Milestone, milestone) for milestone in milestones]
