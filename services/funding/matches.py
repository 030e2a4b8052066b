"""What follows for applications when a match begins or ends. Every function works in the caller's transaction.

An application whose match has ended is kept where it is: it can be neither submitted nor awarded, until the firm accepts another
offer for the same need. The new match takes the place of the old one, so what was answered, pledged and scored is not lost.
"""

from services.common.clock import Clock
from services.common.database import Connection
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import application_store, call_store, review_store
from services.funding.domain import Application, Match
from services.funding.judging import audit_application
from services.funding.reviewing import ACTIVE

log = get_logger(__name__)

# Nobody's key: the hub does it, because of what a match came to.
HUB = Caller(0, Role.OPERATOR)


async def begin(connection: Connection, clock: Clock, match: Match) -> None:
    """Keep the match; an application that lost the one before goes on with it. A repeat changes nothing."""
    if not await call_store.add_match(connection, match):
        return
    log.info("match known", match_id=match.id, firm_id=match.firm_id)
    application = await application_store.without_match(connection, match)
    if application is not None:
        await replace(connection, clock, HUB, application, match, reason="another offer for the same need was accepted")


async def replace(
    connection: Connection, clock: Clock, caller: Caller, application: Application, match: Match, *, reason: str
) -> None:
    """The application rests on this match from now on. Raises MatchInUse."""
    await application_store.set_match(connection, application.id, match.id)
    told: dict[str, str | int] = {"match_id": match.id, "before": application.match_id, "reason": reason}
    await audit_application(connection, clock, caller, "match_replaced", application, told)
    log.info("application goes on with another match", application_id=application.id, match_id=match.id)
    # Who takes part in a project does not judge it.
    for review in (await review_store.reviews_of(connection, [application.id])).get(application.id, ()):
        if review.provider_id == match.provider_id and review.state in ACTIVE:
            await review_store.set_withdrawn(connection, review.id)
            detail: dict[str, str | int] = {"review_id": review.id, "percent": review.percent}
            detail["reason"] = "the new match is with this assessor"
            await audit_application(connection, clock, caller, "assessor_taken_back", application, detail)


async def end(connection: Connection, clock: Clock, match: Match) -> None:
    """It was cancelled or has expired. A repeat changes nothing; neither does the end of a match that was never known."""
    assert match.ended_us is not None, "it has ended"
    if not await call_store.end_match(connection, match.id, ended_us=match.ended_us):
        return
    log.info("match ended", match_id=match.id, firm_id=match.firm_id)
    application = await application_store.live_of_match(connection, match.id)
    if application is not None:
        await audit_application(connection, clock, HUB, "match_ended", application, {"match_id": match.id})
