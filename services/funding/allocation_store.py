"""Allocations in the database: SQL in, domain types out. Every function works in the caller's transaction."""

from dataclasses import dataclass
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection

_ALLOCATION_ROWS = (
    "SELECT id, call_id, state, input, certificate, certificate_sha256, left_out, problems, proof, created, created_by, "
    "confirmed, confirmed_by, confirmed_reason FROM allocation "
)


_left_out = TypeAdapter(dict[str, dict[str, str]])
_problems = TypeAdapter(tuple[str, ...])


@dataclass(frozen=True, kw_only=True)
class StoredAllocation:
    """A proposal with its two documents, byte for byte, and what became of it."""

    id: str
    call_id: str
    confirmed: bool
    input: str
    certificate: str
    certificate_sha256: bytes
    # By application: code and text of why it was not ranked at all.
    left_out: dict[str, dict[str, str]]
    problems: tuple[str, ...]
    proof: str
    created_us: int
    created_by: int
    confirmed_us: int | None = None
    confirmed_by: int | None = None
    confirmed_reason: str = ""


async def add_allocation(connection: Connection, allocation: StoredAllocation) -> None:
    await connection.execute(
        "INSERT INTO allocation (id, call_id, input, certificate, certificate_sha256, left_out, problems, proof, created, "
        "created_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        allocation.id,
        allocation.call_id,
        allocation.input,
        allocation.certificate,
        allocation.certificate_sha256,
        _left_out.dump_json(allocation.left_out).decode(),
        _problems.dump_json(allocation.problems).decode(),
        allocation.proof,
        from_us(allocation.created_us),
        allocation.created_by,
    )


_ALLOCATION = _ALLOCATION_ROWS + "WHERE id = $1"
_ALLOCATION_LOCKED = _ALLOCATION_ROWS + "WHERE id = $1 FOR NO KEY UPDATE"


async def allocation_of(connection: Connection, allocation_id: str, *, lock: bool = False) -> StoredAllocation | None:
    row = await connection.fetchrow(_ALLOCATION_LOCKED if lock else _ALLOCATION, allocation_id)
    return None if row is None else _allocation(row)


async def set_confirmed(
    connection: Connection, allocation_id: str, *, credential_id: int, reason: str, now_us: int
) -> None:
    await connection.execute(
        "UPDATE allocation SET state = 'confirmed', confirmed = $2, confirmed_by = $3, confirmed_reason = $4 WHERE id = $1",
        allocation_id,
        from_us(now_us),
        credential_id,
        reason,
    )


async def submitted_ids(connection: Connection, call_id: str) -> set[str]:
    """Applications of a call that wait for a decision."""
    rows = await connection.fetch("SELECT id FROM application WHERE call_id = $1 AND state = 'submitted'", call_id)
    return {row["id"] for row in rows}


def _allocation(row: asyncpg.Record) -> StoredAllocation:
    fields: dict[str, Any] = {
        name: row[name]
        for name in (
            *("id", "call_id", "input", "certificate", "certificate_sha256", "proof", "created_by", "confirmed_by"),
        )
    }
    return StoredAllocation(
        confirmed=row["state"] == "confirmed",
        left_out=_left_out.validate_json(row["left_out"]),
        problems=_problems.validate_json(row["problems"]),
        created_us=to_us(row["created"]),
        confirmed_us=row["confirmed"] and to_us(row["confirmed"]),
        confirmed_reason=row["confirmed_reason"] or "",
        **fields,
    )
