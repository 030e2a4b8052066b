"""SQL of matches and their scores."""

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from services.common.database import Connection
from services.matching.matches import Match, MatchState, Result, Score, Side

Row = asyncpg.Record


async def add_match(connection: Connection, match: Match) -> None:
    await connection.execute(
        "INSERT INTO match (id, need_id, offer_id, firm_id, provider_id, partner_id, quarter, accepted, accepted_by, "
        "correlation_id, engage_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        match.id,
        match.need_id,
        match.offer_id,
        match.firm_id,
        match.provider_id,
        match.partner_id,
        match.quarter,
        match.accepted,
        match.accepted_by,
        match.correlation_id,
        match.engage_by,
    )


async def match(connection: Connection, match_id: str) -> Match | None:
    row = await connection.fetchrow(f"{_MATCHES} WHERE m.id = $1", match_id)
    return None if row is None else _match(row)


async def match_of_offer(connection: Connection, offer_id: str) -> Match | None:
    row = await connection.fetchrow(f"{_MATCHES} WHERE m.offer_id = $1", offer_id)
    return None if row is None else _match(row)


async def list_matches(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    provider_id: str = "",
    state: MatchState | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Match]:
    """Newest first. 0 or "": of all."""
    accepted, match_id = before or (None, "")
    rows = await connection.fetch(
        f"{_MATCHES} WHERE ($1::bigint = 0 OR m.firm_id = $1) AND ($2::bigint = 0 OR m.partner_id = $2) "
        "AND ($7 = '' OR m.provider_id = $7) "
        "AND ($3::text IS NULL OR m.state = $3) AND ($4::timestamptz IS NULL OR (m.accepted, m.id) < ($4, $5)) "
        "ORDER BY m.accepted DESC, m.id DESC LIMIT $6",
        firm_id,
        partner_id,
        state,
        accepted,
        match_id,
        limit,
        provider_id,
    )
    return [_match(row) for row in rows]


async def keep_match(connection: Connection, match: Match, *, by: int | None) -> None:
    """Store its state; its need must be held. `by` is who ended it, None for the hub."""
    await connection.execute(
        "UPDATE match SET state = $2, engaged = $3, finished = $4, result = $5, result_note = $6, scores_until = $7, "
        "ended = $8, ended_by = CASE WHEN $8::timestamptz IS NOT NULL THEN $9::bigint END, end_reason = $10 WHERE id = $1",
        match.id,
        match.state,
        match.engaged,
        match.finished,
        match.result or "",
        match.result_note,
        match.scores_until,
        match.ended,
        by,
        match.end_reason,
    )


async def put_score(connection: Connection, match_id: str, score: Score, *, by: int) -> None:
    """Give or change the score of one side."""
    await connection.execute(
        "INSERT INTO match_score AS s (match_id, side, points, comment, scored, scored_by) VALUES ($1, $2, $3, $4, $5, $6) "
        "ON CONFLICT (match_id, side) DO UPDATE SET points = excluded.points, comment = excluded.comment, "
        "scored = excluded.scored, scored_by = excluded.scored_by",
        match_id,
        score.side,
        score.points,
        score.comment,
        score.scored,
        by,
    )


async def due_closings(connection: Connection, *, now: datetime, limit: int) -> list[str]:
    """Ids of finished matches whose time for scores has run out."""
    rows = await connection.fetch(
        "SELECT id FROM match WHERE state = 'finished' AND scores_until <= $1 ORDER BY scores_until, id LIMIT $2",
        now,
        limit,
    )
    return [row["id"] for row in rows]


async def who_works_for(connection: Connection, firm_ids: Sequence[int]) -> tuple[frozenset[str], frozenset[int]]:
    """Providers that have or had a match with one of the firms, and partners of those whose match came to something or may yet."""
    rows = await connection.fetch(
        "SELECT DISTINCT provider_id, CASE WHEN state NOT IN ('cancelled', 'expired') THEN partner_id END AS partner_id "
        "FROM match WHERE firm_id = ANY($1::bigint[])",
        list(firm_ids),
    )
    partners = {row["partner_id"] for row in rows if row["partner_id"] is not None}
    return frozenset(row["provider_id"] for row in rows), frozenset(partners)


_MATCHES = (
    "SELECT m.id, m.need_id, m.offer_id, m.firm_id, m.provider_id, m.partner_id, m.quarter, m.accepted, m.accepted_by, "
    "m.correlation_id, m.state, m.engage_by, m.engaged, m.finished, m.result, m.result_note, m.scores_until, m.ended, "
    "m.ended_by, m.end_reason, f.points AS firm_points, f.comment AS firm_comment, f.scored AS firm_scored, "
    "p.points AS partner_points, p.comment AS partner_comment, p.scored AS partner_scored FROM match m "
    "LEFT JOIN match_score f ON f.match_id = m.id AND f.side = 'firm' "
    "LEFT JOIN match_score p ON p.match_id = m.id AND p.side = 'partner'"
)


def _match(row: Row) -> Match:
    return Match(
        id=row["id"],
        need_id=row["need_id"],
        offer_id=row["offer_id"],
        firm_id=row["firm_id"],
        provider_id=row["provider_id"],
        partner_id=row["partner_id"],
        quarter=row["quarter"],
        accepted=row["accepted"],
        accepted_by=row["accepted_by"],
        correlation_id=row["correlation_id"],
        engage_by=row["engage_by"],
        state=MatchState(row["state"]),
        engaged=row["engaged"],
        finished=row["finished"],
        result=Result(row["result"]) if row["result"] else None,
        result_note=row["result_note"],
        scores_until=row["scores_until"],
        ended=row["ended"],
        end_reason=row["end_reason"],
        scores=tuple(
            Score(side=side, points=row[f"{side}_points"], comment=row[f"{side}_comment"], scored=row[f"{side}_scored"])
            for side in Side
            if row[f"{side}_points"] is not None
        ),
    )
