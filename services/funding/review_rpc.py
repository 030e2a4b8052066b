"""Reviews over gRPC, for partners' programs: the same abilities as over HTTP."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.reviewing import DeclinedAs, Review, ReviewState
from services.funding.reviews import ReviewService, Task
from services.funding.words import word_of
from smdih.funding.v1 import review_pb2 as pb
from smdih.funding.v1.review_pb2_grpc import ReviewServiceServicer


class ReviewRpc(ReviewServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: ReviewService) -> None:
        self._service = service

    async def ListReviews(self, request: pb.ListReviewsRequest, context: Any) -> pb.ListReviewsResponse:
        state = word_of(ReviewState, pb.ReviewState, request.state) if request.state else None
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
            declined_as=word_of(DeclinedAs, pb.DeclinedAs, request.declined_as),
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
    return message_of(pb.Review, review)


def _task(task: Task) -> pb.ReviewTask:
    application = task.application
    return message_of(
        pb.ReviewTask,
        task,
        call_title=task.call.title,
        scope=task.call.terms.scope,
        provider_title=task.match.provider_title,
        costs=application.costs,
        answers=dict(application.content.answers),
        grant_pence=application.grant_pence,
    )
