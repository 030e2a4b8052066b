"""The gRPC edge of self-assessments and reports."""

from typing import Any

from services.common.messages import message_of, number_of
from services.common.rpc import current_caller
from services.matching.fairness import GROUP_MIN, GroupFigures
from services.matching.maturity import Assessment
from services.matching.messages import asked_time
from services.matching.rpc import asked_urgency, need_message, offer_details
from services.matching.service import Matching
from smdih.matching.v1 import maturity_pb2, maturity_pb2_grpc, reports_pb2, reports_pb2_grpc


class MaturityServicer(maturity_pb2_grpc.MaturityServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._maturity = matching.maturity

    async def GetQuestionnaire(
        self, request: maturity_pb2.GetQuestionnaireRequest, context: Any
    ) -> maturity_pb2.GetQuestionnaireResponse:
        asked = self._maturity.questionnaire(current_caller())
        return maturity_pb2.GetQuestionnaireResponse(questionnaire=message_of(maturity_pb2.Questionnaire, asked))

    async def Assess(self, request: maturity_pb2.AssessRequest, context: Any) -> maturity_pb2.AssessResponse:
        assessed = await self._maturity.assess(
            current_caller(), request.firm_id, request.version, dict(request.answers), request_id=request.request_id
        )
        return maturity_pb2.AssessResponse(assessment=_assessment_message(assessed))

    async def GetAssessment(
        self, request: maturity_pb2.GetAssessmentRequest, context: Any
    ) -> maturity_pb2.GetAssessmentResponse:
        found = await self._maturity.get_assessment(current_caller(), request.assessment_id)
        return maturity_pb2.GetAssessmentResponse(assessment=_assessment_message(found))

    async def ListAssessments(
        self, request: maturity_pb2.ListAssessmentsRequest, context: Any
    ) -> maturity_pb2.ListAssessmentsResponse:
        found = await self._maturity.list_assessments(current_caller(), request.firm_id)
        return maturity_pb2.ListAssessmentsResponse(assessments=map(_assessment_message, found))

    async def OpenAssessedNeed(
        self, request: maturity_pb2.OpenAssessedNeedRequest, context: Any
    ) -> maturity_pb2.OpenAssessedNeedResponse:
        opened = await self._maturity.open_need(
            current_caller(), request.assessment_id, request.text, asked_urgency(request.urgency)
        )
        return maturity_pb2.OpenAssessedNeedResponse(
            need=need_message(opened.need), offers=map(offer_details, opened.offers)
        )


class ReportServicer(reports_pb2_grpc.ReportServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._reports = matching.reports

    async def GetFairness(
        self, request: reports_pb2.GetFairnessRequest, context: Any
    ) -> reports_pb2.GetFairnessResponse:
        found = await self._reports.fairness(
            current_caller(), asked_time("from_us", request.from_us), asked_time("until_us", request.until_us)
        )
        return reports_pb2.GetFairnessResponse(
            group_min=GROUP_MIN,
            by_size=map(_group_message, found.by_size),
            by_region=map(_group_message, found.by_region),
        )


def _assessment_message(assessment: Assessment) -> maturity_pb2.Assessment:
    scoring = assessment.scoring
    return message_of(
        maturity_pb2.Assessment,
        assessment,
        share=scoring.share,
        level=scoring.level,
        topics=[
            maturity_pb2.TopicShare(topic=number_of(maturity_pb2.Topic, topic), share=share)
            for topic, share in scoring.topics.items()
        ],
    )


def _group_message(group: GroupFigures) -> reports_pb2.GroupFigures:
    return message_of(reports_pb2.GroupFigures, group, group=group.group or "not said")
