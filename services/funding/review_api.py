"""Assessment over HTTP: for operators, and for the partners whose experts assess. Means are exact; decimals beside them are cut."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from services.common.http import Authenticated
from services.common.identity import bearer_key
from services.funding import panel_sheet
from services.funding.domain import CostCategory
from services.funding.reviewing import DeclinedAs, ModerationOutcome, ReviewState, Verdict
from services.funding.reviews import Judged, PanelRow, ReviewService, Task
from services.funding.rules.exact import fixed_down


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class InviteIn(_In):
    provider_ids: list[str] = Field(description="of proposed assessors")


class ReasonIn(_In):
    reason: str


class AcceptIn(_In):
    no_conflict: StrictBool = Field(description="I have no part in this application")
    declaration: str = Field(description="the words of the declaration, and who gives it")


class DeclineIn(_In):
    declined_as: DeclinedAs
    reason: str


class ScoreIn(_In):
    percent: str = Field(description='0 to 100 with at most two decimals, such as "72.5"')
    in_scope: StrictBool
    justification: str


class ModerationIn(_In):
    outcome: ModerationOutcome
    reason: str


class _Out(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class ProposedOut(_Out):
    provider_id: str
    name: str
    partner_id: int
    score: float
    reasons: list[str]


class ExcludedOut(_Out):
    provider_id: str
    name: str
    codes: list[str]
    reasons: list[str]


class ProposalOut(_Out):
    assessors: list[ProposedOut]
    excluded: list[ExcludedOut]
    ranker_version: str


class ReviewOut(_Out):
    id: str
    application_id: str
    provider_id: str
    partner_id: int
    name: str
    reasons: list[str]
    state: ReviewState
    invited_us: int
    answered_us: int | None
    declined_as: DeclinedAs | None
    answer: str
    percent: str
    in_scope: bool | None
    justification: str
    scored_us: int | None


class ReviewPageOut(_Out):
    reviews: list[ReviewOut]
    next_page_token: str


class CostOut(_Out):
    category: CostCategory
    amount_pence: int


class TaskOut(_Out):
    review: ReviewOut
    call_title: str
    provider_title: str = Field(description="who would do the work")
    firm_name: str
    costs: list[CostOut]
    answers: dict[str, str]
    grant_pence: int | None


class VerdictOut(_Out):
    mean: str | None = Field(description='exact, as a fraction such as "211/3"')
    mean_shown: str | None = Field(description="two decimals, cut and never rounded up")
    scores: list[str]
    spread: str
    in_scope: int
    needs_moderation: bool
    code: str
    text: str


class ModerationOut(_Out):
    outcome: ModerationOutcome
    reason: str
    at_us: int


class JudgedOut(_Out):
    application_id: str
    reviews: list[ReviewOut]
    moderations: list[ModerationOut]
    verdict: VerdictOut


class PanelRowOut(_Out):
    rank: int | None
    tied: bool
    application_id: str
    firm_id: int
    firm_name: str
    region: str
    state: str
    grant_pence: int | None
    verdict: VerdictOut


class PanelOut(_Out):
    rows: list[PanelRowOut]


PageSize = Annotated[int, Query(description="at most 100; 0 means 50")]


def router(service: ReviewService) -> APIRouter:
    """Proposals, invitations, scores, moderation and the panel sheet."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/applications/{application_id}/assessors")
    async def propose(caller: Authenticated, request: Request, application_id: str, count: int = 10) -> ProposalOut:
        """Operators: who fits best without a conflict, and who was left out and why."""
        key = bearer_key(request.headers.get("authorization", ""))
        return ProposalOut.model_validate(await service.propose(caller, application_id, key=key, count=count))

    @routes.post("/applications/{application_id}/assessors")
    async def invite(caller: Authenticated, request: Request, application_id: str, body: InviteIn) -> JudgedOut:
        """Operators: invite assessors; each is asked for once more at the matching service, so no conflict slips in."""
        key = bearer_key(request.headers.get("authorization", ""))
        return _judged(await service.invite(caller, application_id, key=key, provider_ids=body.provider_ids))

    @routes.get("/applications/{application_id}/reviews")
    async def get_judged(caller: Authenticated, application_id: str) -> JudgedOut:
        """Operators."""
        return _judged(await service.get_judged(caller, application_id))

    @routes.post("/applications/{application_id}/moderate")
    async def moderate(caller: Authenticated, application_id: str, body: ModerationIn) -> JudgedOut:
        """Operators: scores that lie far apart stand, or are asked for again."""
        return _judged(await service.moderate(caller, application_id, **body.model_dump()))

    @routes.get("/calls/{call_id}/panel")
    async def panel(caller: Authenticated, call_id: str) -> PanelOut:
        """Operators: the highest exact mean first."""
        return PanelOut(rows=[_row(row) for row in await service.panel(caller, call_id)])

    @routes.get("/calls/{call_id}/panel.csv", response_class=Response)
    async def panel_csv(caller: Authenticated, call_id: str) -> Response:
        text = panel_sheet.as_csv(await service.panel(caller, call_id))
        headers = {"Content-Disposition": 'attachment; filename="panel.csv"'}
        return Response(text, media_type="text/csv; charset=utf-8", headers=headers)

    @routes.get("/calls/{call_id}/panel.html", response_class=Response)
    async def panel_html(caller: Authenticated, call_id: str) -> Response:
        text = panel_sheet.as_html(await service.panel(caller, call_id))
        return Response(text, media_type="text/html; charset=utf-8")

    @routes.get("/reviews")
    async def list_tasks(
        caller: Authenticated, state: ReviewState | None = None, page_size: PageSize = 0, page_token: str = ""
    ) -> ReviewPageOut:
        """Partners: what their experts are asked to assess."""
        found, token = await service.list_tasks(caller, state=state, page_size=page_size, page_token=page_token)
        return ReviewPageOut(reviews=[ReviewOut.model_validate(one) for one in found], next_page_token=token)

    @routes.get("/reviews/{review_id}")
    async def get_task(caller: Authenticated, review_id: str) -> TaskOut:
        return _task(await service.get_task(caller, review_id))

    @routes.post("/reviews/{review_id}/accept")
    async def accept(caller: Authenticated, review_id: str, body: AcceptIn) -> TaskOut:
        """Partners: with the declaration that there is no conflict."""
        return _task(await service.accept(caller, review_id, **body.model_dump()))

    @routes.post("/reviews/{review_id}/decline")
    async def decline(caller: Authenticated, review_id: str, body: DeclineIn) -> TaskOut:
        return _task(await service.decline(caller, review_id, **body.model_dump()))

    @routes.post("/reviews/{review_id}/score")
    async def score(caller: Authenticated, review_id: str, body: ScoreIn) -> TaskOut:
        return _task(await service.score(caller, review_id, **body.model_dump()))

    @routes.post("/reviews/{review_id}/take-back")
    async def take_back(caller: Authenticated, review_id: str, body: ReasonIn) -> JudgedOut:
        """Operators: the assessor does not judge this application after all."""
        return _judged(await service.take_back(caller, review_id, reason=body.reason))

    return routes


def _verdict(found: Verdict) -> VerdictOut:
    return VerdictOut(
        mean=None if found.mean is None else str(found.mean),
        mean_shown=None if found.mean is None else fixed_down(found.mean),
        scores=[fixed_down(one) for one in found.scores],
        spread=fixed_down(found.spread),
        in_scope=found.in_scope,
        needs_moderation=found.needs_moderation,
        code=found.code,
        text=found.text,
    )


def _judged(judged: Judged) -> JudgedOut:
    return JudgedOut(
        application_id=judged.application_id,
        reviews=[ReviewOut.model_validate(one) for one in judged.reviews],
        moderations=[ModerationOut.model_validate(one) for one in judged.moderations],
        verdict=_verdict(judged.verdict),
    )


def _task(task: Task) -> TaskOut:
    return TaskOut(
        review=ReviewOut.model_validate(task.review),
        call_title=task.call.title,
        provider_title=task.match.provider_title,
        firm_name=task.firm_name,
        costs=[CostOut.model_validate(cost) for cost in task.application.costs],
        answers=dict(task.application.content.answers),
        grant_pence=task.application.grant_pence,
    )


def _row(row: PanelRow) -> PanelRowOut:
    return PanelRowOut(
        rank=row.rank,
        tied=row.tied,
        application_id=row.application.id,
        firm_id=row.application.firm_id,
        firm_name=row.firm_name,
        region=row.region,
        state=row.application.state,
        grant_pence=row.application.grant_pence,
        verdict=_verdict(row.verdict),
    )
