"""The HTTP edge of rounds."""

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.matching.forms import Body, us
from services.matching.rounds import Round, RoundState
from services.matching.service import Matching


class RoundBody(Body):
    # Chosen by the operator; a repeat with the same id begins no second round.
    round_id: str


class RoundView(Body):
    id: str
    state: RoundState
    started_us: int
    ended_us: int | None
    # Made by it, each with a place reserved until it lapses.
    offers: int
    # Of them the nearest workshop or course, where nobody nearer to the need had a place.
    from_safety_net: int
    # Needs that nobody could take.
    unplaced: int
    # Needs and providers that would both rather have had each other; 0 unless something is wrong.
    blocking_pairs: int
    ranker_version: str


class RoundsView(Body):
    rounds: list[RoundView]


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/rounds", tags=["rounds"])

    @routes.post("", status_code=202)
    async def start_round(caller: Authenticated, body: RoundBody) -> RoundView:
        """Begin a round over the open needs without offers; it is carried out in the background."""
        return _round_view(await matching.rounds.start_round(caller, body.round_id))

    @routes.get("")
    async def list_rounds(caller: Authenticated) -> RoundsView:
        """The newest 100, newest first."""
        return RoundsView(rounds=[_round_view(each) for each in await matching.rounds.list_rounds(caller)])

    @routes.get("/{round_id}")
    async def get_round(caller: Authenticated, round_id: str) -> RoundView:
        return _round_view(await matching.rounds.get_round(caller, round_id))

    return routes


def _round_view(found: Round) -> RoundView:
    return RoundView(
        id=found.id,
        state=found.state,
        started_us=to_us(found.started),
        ended_us=us(found.ended),
        offers=found.offers,
        from_safety_net=found.from_safety_net,
        unplaced=found.unplaced,
        blocking_pairs=found.blocking_pairs,
        ranker_version=found.ranker_version,
    )
