"""Co-investors' money for a call as a whole, in the database. Every function works in the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection

_POOL_PLEDGE_ROWS = (
    "SELECT id, request_id, content_sha256, call_id, co_investor, amount_pence, supports, evidence, added, added_by FROM "
    "pool_pledge "
)
_POOL_SPREAD_ROWS = (
    "SELECT id, call_id, state, input, certificate, problems, created, created_by, confirmed, confirmed_by, "
    "confirmed_reason FROM pool_spread "
)

_problems = TypeAdapter(tuple[str, ...])


@dataclass(frozen=True, kw_only=True)
class PoolPledge:
    """A co-investor's confirmed money for a call, and the applications it would pay for."""

    id: str
    call_id: str
    co_investor: str
    amount_pence: int
    supports: tuple[str, ...]
    evidence: str
    added_us: int


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A proposal of who pays for what, with its two documents byte for byte."""

    id: str
    call_id: str
    confirmed: bool
    input: str
    certificate: str
    problems: tuple[str, ...]
    created_us: int
    created_by: int
    confirmed_us: int | None = None


async def add_pledge(
    connection: Connection, pledge: PoolPledge, *, request_id: str, content_sha256: bytes, credential_id: int
) -> None:
    await connection.execute(
        "INSERT INTO pool_pledge (id, request_id, content_sha256, call_id, co_investor, amount_pence, supports, evidence, "
        "added, added_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        pledge.id,
        request_id,
        content_sha256,
        pledge.call_id,
        pledge.co_investor,
        pledge.amount_pence,
        pledge.supports,
        pledge.evidence,
        from_us(pledge.added_us),
        credential_id,
    )


async def content_of(connection: Connection, call_id: str, request_id: str) -> bytes | None:
    """Content of the pledge that was made by this request."""
    found: bytes | None = await connection.fetchval(
        "SELECT content_sha256 FROM pool_pledge WHERE call_id = $1 AND request_id = $2", call_id, request_id
    )
    return found


async def pledges_of(connection: Connection, call_id: str) -> list[PoolPledge]:
    """Oldest first."""
    rows = await connection.fetch(_POOL_PLEDGE_ROWS + "WHERE call_id = $1 ORDER BY added, id", call_id)
    return [
        PoolPledge(
            id=row["id"],
            call_id=row["call_id"],
            co_investor=row["co_investor"],
            amount_pence=row["amount_pence"],
            supports=tuple(row["supports"]),
            evidence=row["evidence"],
            added_us=to_us(row["added"]),
        )
        for row in rows
    ]


async def lock_call(connection: Connection, call_id: str) -> None:
    """Nobody else changes the call's pool until the transaction ends."""
    await connection.execute("SELECT FROM call WHERE id = $1 FOR NO KEY UPDATE", call_id)


async def of_call(connection: Connection, call_id: str, application_ids: Sequence[str]) -> set[str]:
    """Which of these are applications of the call that wait for a decision, or are drafts."""
    rows = await connection.fetch(
        "SELECT id FROM application WHERE call_id = $1 AND id = ANY($2::text[]) AND state IN ('draft', 'submitted')",
        call_id,
        application_ids,
    )
    return {row["id"] for row in rows}


async def chosen_by(connection: Connection, call_id: str, application_ids: Sequence[str], *, least: int) -> set[str]:
    """Which of these that many co-investors of the call's pool have chosen."""
    rows = await connection.fetch(
        "SELECT chosen FROM pool_pledge CROSS JOIN unnest(supports) AS chosen WHERE call_id = $1 AND chosen = ANY($2::text[]) "
        "GROUP BY chosen HAVING count(*) >= $3",
        call_id,
        application_ids,
        least,
    )
    return {row["chosen"] for row in rows}


async def add_spread(connection: Connection, spread: Spread) -> None:
    await connection.execute(
        "INSERT INTO pool_spread (id, call_id, input, certificate, problems, created, created_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        spread.id,
        spread.call_id,
        spread.input,
        spread.certificate,
        _problems.dump_json(spread.problems).decode(),
        from_us(spread.created_us),
        spread.created_by,
    )


async def is_spread(connection: Connection, call_id: str) -> bool:
    """Whether the call's pool has been spread for good."""
    found = "SELECT EXISTS (SELECT FROM pool_spread WHERE call_id = $1 AND state = 'confirmed')"
    return bool(await connection.fetchval(found, call_id))


async def spread_of(connection: Connection, spread_id: str) -> Spread | None:
    row = await connection.fetchrow(_POOL_SPREAD_ROWS + "WHERE id = $1", spread_id)
    return None if row is None else _spread(row)


async def set_confirmed(
    connection: Connection, spread_id: str, *, credential_id: int, reason: str, now_us: int
) -> None:
    await connection.execute(
        "UPDATE pool_spread SET state = 'confirmed', confirmed = $2, confirmed_by = $3, confirmed_reason = $4 WHERE id = $1",
        spread_id,
        from_us(now_us),
        credential_id,
        reason,
    )


def _spread(row: asyncpg.Record) -> Spread:
    return Spread(
        id=row["id"],
        call_id=row["call_id"],
        confirmed=row["state"] == "confirmed",
        input=row["input"],
        certificate=row["certificate"],
        problems=_problems.validate_json(row["problems"]),
        created_us=to_us(row["created"]),
        created_by=row["created_by"],
        confirmed_us=row["confirmed"] and to_us(row["confirmed"]),
    )
