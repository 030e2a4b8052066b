"""The HTTP edge of matches."""

from datetime import date
from typing import Annotated

from fastapi import APIRouter
from pydantic import Field

from services.common.clock import to_us
from services.common.http import Authenticated
from services.matching.forms import Body, PageSize, PageToken, us
from services.matching.matches import Match, MatchState, Result, Side
from services.matching.service import Matching


class ScoreView(Body):
    side: Side
    points: int
    comment: str
    scored_us: int


class MatchView(Body):
    id: str
    need_id: str
    offer_id: str
    firm_id: int
    provider_id: str
    partner_id: int
    # First day of the quarter whose capacity it takes.
    quarter: date
    accepted_us: int
    correlation_id: str
    state: MatchState
    # It expires then unless one side engages.
    engage_by_us: int | None
    engaged_us: int | None
    finished_us: int | None
    result: Result | None
    result_note: str
    # Once finished: scores may be given and changed until then.
    scores_until_us: int | None
    ended_us: int | None
    end_reason: str
    # The other side's is shown once the match is closed.
    scores: list[ScoreView]


class MatchesPage(Body):
    matches: list[MatchView]
    next_page_token: str


class FinishBody(Body):
    result: Result
    note: str = ""


class ScoreBody(Body):
    points: Annotated[int, Field(description="1 (poor) to 5 (excellent)")]
    comment: str = ""


class CancelBody(Body):
    reason: str
    # The need is closed rather than opened again.
    close_need: bool = False


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/matches", tags=["matches"])

    @routes.get("")
    async def list_matches(
        caller: Authenticated,
        state: MatchState | None = None,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> MatchesPage:
        """The caller's own, newest first."""
        found, token = await matching.matches.list_matches(
            caller, state=state, page_size=page_size, page_token=page_token
        )
        return MatchesPage(matches=[match_view(match) for match in found], next_page_token=token)

    @routes.get("/{match_id}")
    async def get_match(caller: Authenticated, match_id: str) -> MatchView:
        return match_view(await matching.matches.get_match(caller, match_id))

    @routes.post("/{match_id}/engage")
    async def engage(caller: Authenticated, match_id: str) -> MatchView:
        """Both sides work together from now on; by either."""
        return match_view(await matching.matches.engage(caller, match_id))

    @routes.post("/{match_id}/finish")
    async def finish(caller: Authenticated, match_id: str, body: FinishBody) -> MatchView:
        """The work is done; by either side. Both may score it until `scores_until_us`."""
        return match_view(await matching.matches.finish(caller, match_id, body.result, body.note))

    @routes.post("/{match_id}/score")
    async def score(caller: Authenticated, match_id: str, body: ScoreBody) -> MatchView:
        """Give or change the score of the caller's side."""
        return match_view(await matching.matches.score(caller, match_id, body.points, body.comment))

    @routes.post("/{match_id}/cancel")
    async def cancel(caller: Authenticated, match_id: str, body: CancelBody) -> MatchView:
        """By either side, before the work is done. The need is open again, with new offers, unless it is to be closed."""
        cancelled = await matching.matches.cancel(caller, match_id, body.reason, reopen=not body.close_need)
        return match_view(cancelled)

    return routes


def match_view(match: Match) -> MatchView:
    return MatchView(
        id=match.id,
        need_id=match.need_id,
        offer_id=match.offer_id,
        firm_id=match.firm_id,
        provider_id=match.provider_id,
        partner_id=match.partner_id,
        quarter=match.quarter,
        accepted_us=to_us(match.accepted),
        correlation_id=match.correlation_id,
        state=match.state,
        engage_by_us=us(match.engage_by),
        engaged_us=us(match.engaged),
        finished_us=us(match.finished),
        result=match.result,
        result_note=match.result_note,
        scores_until_us=us(match.scores_until),
        ended_us=us(match.ended),
        end_reason=match.end_reason,
        scores=[
            ScoreView(side=each.side, points=each.points, comment=each.comment, scored_us=to_us(each.scored))
            for each in match.scores
        ],
    )
