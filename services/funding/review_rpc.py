"""Reviews over gRPC, for partners' programs: the same abilities as over HTTP."""

from typing import Any

from services.common.rpc import current_caller
from services.funding.domain import CostCategory
from services.funding.reviewing import DeclinedAs, Review, ReviewState
from services.funding.reviews import ReviewService, Task
from services.funding.words import number_of, word_of
from smdih.funding.v1 import funding_pb2
from smdih.funding.v1 import review_pb2 as pb
from smdih.funding.v1.review_pb2_grpc import ReviewServiceServicer


class ReviewRpc(ReviewServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: ReviewService) -> None:
        self._service = service

    async def ListReviews(self, request: pb.ListReviewsRequest, context: Any) -> pb.ListReviewsResponse:
        state = word_of(ReviewState, pb.ReviewState, "REVIEW_STATE", request.state) if request.state else None
        found, token = await self._service.list_tasks(
            current_caller(), state=state, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListReviewsResponse(reviews=[_review(one) for one in found], next_page_token=token)

    async def GetReview(self, request: pb.GetReviewRequest, context: Any) -> pb.GetReviewResponse:
        return pb.GetReviewResponse(task=_task(await self._service.get_task(current_caller(), request.review_id)))

    async def AcceptReview(self, request: pb.AcceptReviewRequest, context: Any) -> pb.AcceptReviewResponse:
        task = await self._service.accept(
            current_caller(), request.review_id, no_conflict=request.no_conflict, declaration=request.declaration
        )
        return pb.AcceptReviewResponse(task=_task(task))

    async def DeclineReview(self, request: pb.DeclineReviewRequest, context: Any) -> pb.DeclineReviewResponse:
        task = await self._service.decline(
            current_caller(),
            request.review_id,
            declined_as=word_of(DeclinedAs, pb.DeclinedAs, "DECLINED_AS", request.declined_as),
            reason=request.reason,
        )
        return pb.DeclineReviewResponse(task=_task(task))

    async def ScoreReview(self, request: pb.ScoreReviewRequest, context: Any) -> pb.ScoreReviewResponse:
        task = await self._service.score(
            current_caller(),
            request.review_id,
            percent=request.percent,
            in_scope=request.in_scope,
            justification=request.justification,
        )
        return pb.ScoreReviewResponse(task=_task(task))


def _review(review: Review) -> pb.Review:
    return pb.Review(
        id=review.id,
        application_id=review.application_id,
        provider_id=review.provider_id,
        name=review.name,
        state=number_of(pb.ReviewState, "REVIEW_STATE", review.state),
        reasons=review.reasons,
        invited_us=review.invited_us,
        percent=review.percent,
        in_scope=review.in_scope,
        justification=review.justification,
        answer=review.answer,
        declined_as=number_of(pb.DeclinedAs, "DECLINED_AS", review.declined_as)
        if review.declined_as
        else pb.DECLINED_AS_UNSPECIFIED,
    )


def _task(task: Task) -> pb.ReviewTask:
    return pb.ReviewTask(
        review=_review(task.review),
        call_title=task.call.title,
        scope=task.call.terms.scope,
        provider_title=task.match.provider_title,
        firm_name=task.firm_name,
        costs=[
            funding_pb2.Cost(
                category=number_of(funding_pb2.CostCategory, "COST_CATEGORY", CostCategory(cost.category)),
                amount_pence=cost.amount_pence,
            )
            for cost in task.application.costs
        ],
        answers=dict(task.application.content.answers),
        grant_pence=task.application.grant_pence or 0,
    )
