"""Matches and calls in the database: SQL in, domain types out. Every function works in the caller's transaction."""

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.funding.domain import Call, Match, Terms
from services.funding.paging import Place
from services.funding.rules.intensity import Category
from services.funding.rules.size import Definition

_MATCH_ROWS = (
    "SELECT id, event_id, firm_id, need_id, offer_id, provider_id, provider_title, accepted, ended, correlation_id "
    "FROM match "
)

_terms = TypeAdapter(Terms)

# Matches


async def add_match(connection: Connection, match: Match) -> bool:
    """False when it is known already."""
    done = await connection.execute(
        "INSERT INTO match (id, event_id, firm_id, need_id, offer_id, provider_id, provider_title, accepted, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (id) DO NOTHING",
        match.id,
        match.event_id,
        match.firm_id,
        match.need_id,
        match.offer_id,
        match.provider_id,
        match.provider_title,
        from_us(match.accepted_us),
        match.correlation_id,
    )
    return done == "INSERT 0 1"


async def match_of(connection: Connection, match_id: str) -> Match | None:
    row = await connection.fetchrow(_MATCH_ROWS + "WHERE id = $1", match_id)
    if row is None:
        return None
    fields = dict(row)
    accepted, ended = fields.pop("accepted"), fields.pop("ended")
    return Match(accepted_us=to_us(accepted), ended_us=ended and to_us(ended), **fields)


async def end_match(connection: Connection, match_id: str, *, ended_us: int) -> bool:
    """False when it is not known, or has ended already."""
    done = await connection.execute(
        "UPDATE match SET ended = $2 WHERE id = $1 AND ended IS NULL", match_id, from_us(ended_us)
    )
    return done == "UPDATE 1"


# Calls

# The budget is what the ledger has of it: what the call was given, with what was moved in or out since.
_CALL = (
    "SELECT c.id, c.request_id, c.content_sha256, c.title, c.budget_pence, c.opens, c.closes, c.category, "
    "c.size_definition, c.rate_max, c.in_kind_allowed, c.created, c.terms, a.committed_pence, a.left_pence FROM call c "
    "CROSS JOIN LATERAL ("
    "  SELECT coalesce(sum(balance_pence) FILTER (WHERE kind <> 'public_budget'), 0)::bigint AS committed_pence, "
    "    coalesce(sum(balance_pence) FILTER (WHERE kind = 'public_budget'), 0)::bigint AS left_pence "
    "  FROM ledger_account WHERE call_id = c.id AND kind IN "
    "    ('public_budget', 'public_committed', 'public_held', 'public_paid', 'public_recovered')) a "
)


async def add_call(connection: Connection, call: Call, *, request_id: str, content_sha256: bytes) -> bool:
    """False when there is one of that request id already."""
    done = await connection.execute(
        "INSERT INTO call (id, request_id, content_sha256, title, budget_pence, opens, closes, category, size_definition, "
        "rate_max, in_kind_allowed, created, terms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) "
        "ON CONFLICT (request_id) DO NOTHING",
        call.id,
        request_id,
        content_sha256,
        call.title,
        call.budget_pence,
        from_us(call.opens_us),
        from_us(call.closes_us),
        call.category,
        call.size_definition,
        call.rate_max,
        call.in_kind_allowed,
        from_us(call.created_us),
        _terms.dump_json(call.terms).decode(),
    )
    return done == "INSERT 0 1"


async def call_by_request(connection: Connection, request_id: str) -> tuple[bytes, Call] | None:
    row = await connection.fetchrow(_CALL + "WHERE c.request_id = $1", request_id)
    return None if row is None else (row["content_sha256"], _call(row))


async def call_of(connection: Connection, call_id: str) -> Call | None:
    row = await connection.fetchrow(_CALL + "WHERE c.id = $1", call_id)
    return None if row is None else _call(row)


async def calls(connection: Connection, *, after: Place | None, limit: int) -> list[Call]:
    """Newest first."""
    rows = await connection.fetch(
        _CALL
        + "WHERE $1::timestamptz IS NULL OR (c.created, c.id) < ($1, $2) ORDER BY c.created DESC, c.id DESC LIMIT $3",
        from_us(after.created_us) if after else None,
        after.id if after else None,
        limit,
    )
    return [_call(row) for row in rows]


def _call(row: asyncpg.Record) -> Call:
    return Call(
        id=row["id"],
        title=row["title"],
        budget_pence=row["committed_pence"] + row["left_pence"],
        opens_us=to_us(row["opens"]),
        closes_us=to_us(row["closes"]),
        category=Category(row["category"]),
        size_definition=Definition(row["size_definition"]),
        rate_max=row["rate_max"],
        in_kind_allowed=row["in_kind_allowed"],
        created_us=to_us(row["created"]),
        terms=_terms.validate_json(row["terms"]),
        committed_pence=row["committed_pence"],
    )
