"""The HTTP edge of self-assessments and reports."""

from collections.abc import Mapping
from datetime import date

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.matching.domain import Urgency
from services.matching.fairness import GROUP_MIN, GroupFigures
from services.matching.forms import Body, RegistryId, TimeUs
from services.matching.maturity import Assessment, Topic
from services.matching.messages import asked_time
from services.matching.need_api import OpenedView, opened_view
from services.matching.service import Matching


class QuestionView(Body):
    id: str
    topic: Topic
    text: str
    # Answer n is worth n points.
    answers: list[str]


class QuestionnaireView(Body):
    version: str
    valid_from: date
    questions: list[QuestionView]


class AnswersBody(Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    version: str
    # Question to number of the answer, from 0.
    answers: dict[str, int]


class AssessmentView(Body):
    id: str
    firm_id: int
    version: str
    answers: Mapping[str, int]
    # 0 to 1, of all points.
    share: float
    level: str
    topics: Mapping[Topic, float]
    # What the firm might ask for; it decides.
    need_draft: str
    taken_us: int
    need_id: str


class AssessmentsView(Body):
    assessments: list[AssessmentView]


class DraftBody(Body):
    # In place of the draft.
    text: str = ""
    urgency: Urgency = Urgency.NORMAL


class GroupView(Body):
    group: str
    # Too few needs: its figures would be those of single firms.
    suppressed: bool
    needs: int | None
    offers_mean: float | None
    first_offer_s_median: float | None
    matched_share: float | None
    without_offer_share: float | None
    unanswered_share: float | None
    accepted_rank_mean: float | None


class FairnessView(Body):
    group_min: int
    by_size: list[GroupView]
    by_region: list[GroupView]


def router(matching: Matching) -> APIRouter:
    every = APIRouter(prefix="/v1")
    every.include_router(_maturity(matching))
    every.include_router(_reports(matching))
    return every


def _maturity(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/maturity", tags=["maturity"])
    maturity = matching.maturity

    @routes.get("/questionnaire")
    async def questionnaire(caller: Authenticated) -> QuestionnaireView:
        """The one that is asked today."""
        found = maturity.questionnaire(caller)
        return QuestionnaireView(
            version=found.version,
            valid_from=found.valid_from,
            questions=[
                QuestionView(id=each.id, topic=each.topic, text=each.text, answers=list(each.answers))
                for each in found.questions
            ],
        )

    @routes.post("/assessments", status_code=201)
    async def assess(caller: Authenticated, body: AnswersBody) -> AssessmentView:
        """Score the firm's answers, keep them, and draft a need."""
        assessed = await maturity.assess(caller, body.firm_id, body.version, body.answers, request_id=body.request_id)
        return _assessment_view(assessed)

    @routes.get("/assessments")
    async def list_assessments(caller: Authenticated, firm_id: RegistryId = 0) -> AssessmentsView:
        """The newest 100 of a firm, newest first."""
        found = await maturity.list_assessments(caller, firm_id)
        return AssessmentsView(assessments=[_assessment_view(each) for each in found])

    @routes.get("/assessments/{assessment_id}")
    async def get_assessment(caller: Authenticated, assessment_id: str) -> AssessmentView:
        return _assessment_view(await maturity.get_assessment(caller, assessment_id))

    @routes.post("/assessments/{assessment_id}/need", status_code=201)
    async def open_need(caller: Authenticated, assessment_id: str, body: DraftBody) -> OpenedView:
        """Open the drafted need, or the text that the firm made of it, and make offers for it."""
        return opened_view(await maturity.open_need(caller, assessment_id, body.text, body.urgency))

    return routes


def _reports(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/reports", tags=["reports"])

    @routes.get("/fairness")
    async def fairness(caller: Authenticated, from_us: TimeUs = 0, until_us: TimeUs = 0) -> FairnessView:
        """How firms of each size and region fare; of needs opened in the period, by default the last 90 days."""
        found = await matching.reports.fairness(
            caller, asked_time("from_us", from_us), asked_time("until_us", until_us)
        )
        return FairnessView(
            group_min=GROUP_MIN,
            by_size=[_group_view(each) for each in found.by_size],
            by_region=[_group_view(each) for each in found.by_region],
        )

    return routes


def _assessment_view(assessment: Assessment) -> AssessmentView:
    return AssessmentView(
        id=assessment.id,
        firm_id=assessment.firm_id,
        version=assessment.version,
        answers=assessment.answers,
        share=assessment.scoring.share,
        level=assessment.scoring.level,
        topics=assessment.scoring.topics,
        need_draft=assessment.need_draft,
        taken_us=to_us(assessment.taken),
        need_id=assessment.need_id,
    )


def _group_view(group: GroupFigures) -> GroupView:
    return GroupView(
        group=group.group or "not said",
        suppressed=group.suppressed,
        needs=group.needs,
        offers_mean=group.offers_mean,
        first_offer_s_median=group.first_offer_s_median,
        matched_share=group.matched_share,
        without_offer_share=group.without_offer_share,
        unanswered_share=group.unanswered_share,
        accepted_rank_mean=group.accepted_rank_mean,
    )
