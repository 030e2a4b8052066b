"""Reviews and moderations in the database: SQL in, domain types out. Every function works in the caller's transaction."""

from collections import defaultdict
from collections.abc import Sequence

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.funding.paging import Place
from services.funding.reviewing import DeclinedAs, Moderation, ModerationOutcome, Review, ReviewState

_REVIEW_ROWS = (
    "SELECT id, application_id, provider_id, partner_id, name, reasons, ranker_version, state, invited, invited_by, "
    "answered, answered_by, declined_as, answer, percent, in_scope, justification, scored FROM review "
)
_MODERATION_ROWS = "SELECT id, application_id, at, credential_id, outcome, reason, scores FROM moderation "

_reasons = TypeAdapter(tuple[str, ...])
_scores = TypeAdapter(dict[str, str])


async def add_review(connection: Connection, review: Review, *, credential_id: int) -> bool:
    """False when this assessor was invited for this application before; one that was taken back is invited anew."""
    done = await connection.execute(
        "INSERT INTO review (id, application_id, provider_id, partner_id, name, reasons, ranker_version, invited, invited_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (application_id, provider_id) DO UPDATE "
        "SET state = 'invited', answered = NULL, answered_by = NULL, answer = NULL, invited = $8, invited_by = $9 "
        "WHERE review.state = 'withdrawn'",
        review.id,
        review.application_id,
        review.provider_id,
        review.partner_id,
        review.name,
        _reasons.dump_json(review.reasons).decode(),
        review.ranker_version,
        from_us(review.invited_us),
        credential_id,
    )
    return done == "INSERT 0 1"


_REVIEW = _REVIEW_ROWS + "WHERE id = $1"
_REVIEW_LOCKED = _REVIEW_ROWS + "WHERE id = $1 FOR NO KEY UPDATE"


async def review_of(connection: Connection, review_id: str, *, lock: bool = False) -> Review | None:
    row = await connection.fetchrow(_REVIEW_LOCKED if lock else _REVIEW, review_id)
    return None if row is None else _review(row)


async def reviews_of(connection: Connection, application_ids: Sequence[str]) -> dict[str, list[Review]]:
    """By application, in the order of invitation."""
    rows = await connection.fetch(
        _REVIEW_ROWS + "WHERE application_id = ANY($1::text[]) ORDER BY invited, id", application_ids
    )
    found: dict[str, list[Review]] = defaultdict(list)
    for row in rows:
        found[row["application_id"]].append(_review(row))
    return found


async def reviews_for(
    connection: Connection,
    *,
    partner_id: int | None,
    provider_id: str | None,
    state: ReviewState | None,
    after: Place | None,
    limit: int,
) -> list[Review]:
    """Those of a partner's experts, or of one expert; newest first."""
    rows = await connection.fetch(
        _REVIEW_ROWS + "WHERE (partner_id = $1 OR provider_id = $6) AND ($2::text IS NULL OR state = $2) "
        "AND ($3::timestamptz IS NULL OR (invited, id) < ($3, $4)) ORDER BY invited DESC, id DESC LIMIT $5",
        partner_id,
        state,
        from_us(after.created_us) if after else None,
        after.id if after else None,
        limit,
        provider_id,
    )
    return [_review(row) for row in rows]


async def set_answered(
    connection: Connection,
    review_id: str,
    *,
    state: ReviewState,
    declined_as: DeclinedAs | None,
    answer: str,
    credential_id: int,
    now_us: int,
) -> None:
    await connection.execute(
        "UPDATE review SET state = $2, declined_as = $3, answer = $4, answered = $5, answered_by = $6 WHERE id = $1",
        review_id,
        state,
        declined_as,
        answer,
        from_us(now_us),
        credential_id,
    )


async def set_scored(
    connection: Connection, review_id: str, *, percent: str, in_scope: bool, justification: str, now_us: int
) -> None:
    await connection.execute(
        "UPDATE review SET state = 'scored', percent = $2, in_scope = $3, justification = $4, scored = $5 WHERE id = $1",
        review_id,
        percent,
        in_scope,
        justification,
        from_us(now_us),
    )


async def set_withdrawn(connection: Connection, review_id: str) -> None:
    await connection.execute(
        "UPDATE review SET state = 'withdrawn', declined_as = NULL, percent = NULL, in_scope = NULL, justification = NULL, "
        "scored = NULL WHERE id = $1",
        review_id,
    )


async def reopen(connection: Connection, application_id: str) -> None:
    """The assessors are asked for their scores again."""
    await connection.execute(
        "UPDATE review SET state = 'accepted', percent = NULL, in_scope = NULL, justification = NULL, scored = NULL "
        "WHERE application_id = $1 AND state = 'scored'",
        application_id,
    )


async def add_moderation(
    connection: Connection, application_id: str, moderation: Moderation, *, credential_id: int
) -> None:
    await connection.execute(
        "INSERT INTO moderation (application_id, at, credential_id, outcome, reason, scores) VALUES ($1, $2, $3, $4, $5, $6)",
        application_id,
        from_us(moderation.at_us),
        credential_id,
        moderation.outcome,
        moderation.reason,
        _scores.dump_json(moderation.scores).decode(),
    )


async def moderations_of(connection: Connection, application_ids: Sequence[str]) -> dict[str, list[Moderation]]:
    """By application, oldest first."""
    rows = await connection.fetch(
        _MODERATION_ROWS + "WHERE application_id = ANY($1::text[]) ORDER BY id", application_ids
    )
    found: dict[str, list[Moderation]] = defaultdict(list)
    for row in rows:
        found[row["application_id"]].append(
            Moderation(
                outcome=ModerationOutcome(row["outcome"]),
                reason=row["reason"],
                at_us=to_us(row["at"]),
                scores=_scores.validate_json(row["scores"]),
            )
        )
    return found


def _review(row: asyncpg.Record) -> Review:
    return Review(
        id=row["id"],
        application_id=row["application_id"],
        provider_id=row["provider_id"],
        partner_id=row["partner_id"],
        name=row["name"],
        reasons=_reasons.validate_json(row["reasons"]),
        ranker_version=row["ranker_version"],
        state=ReviewState(row["state"]),
        invited_us=to_us(row["invited"]),
        answered_us=row["answered"] and to_us(row["answered"]),
        declined_as=DeclinedAs(row["declined_as"]) if row["declined_as"] else None,
        answer=row["answer"] or "",
        percent=row["percent"] or "",
        in_scope=row["in_scope"],
        justification=row["justification"] or "",
        scored_us=row["scored"] and to_us(row["scored"]),
    )
