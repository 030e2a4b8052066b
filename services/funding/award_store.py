"""Awards and the audit record in the database: SQL in, domain types out. Every function works in the caller's transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection, all_firms_within
from services.common.logs import current_correlation_id
from services.funding.checks import Given
from services.funding.domain import Award, Finding

_findings = TypeAdapter(tuple[Finding, ...])
_detail = TypeAdapter(dict[str, str | int])


async def add_award(connection: Connection, award: Award) -> None:
    await connection.execute(
        "INSERT INTO award (id, application_id, call_id, firm_id, match_id, grant_pence, co_investment_pence, awarded, "
        "awarded_on, parameters_version, database_entry_due, findings, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        award.id,
        award.application_id,
        award.call_id,
        award.firm_id,
        award.match_id,
        award.grant_pence,
        award.co_investment_pence,
        from_us(award.awarded_us),
        award.awarded_on,
        award.parameters_version,
        award.database_entry_due,
        _findings.dump_json(award.findings).decode(),
        award.correlation_id,
    )


async def given_to(connection: Connection, firm_id: int) -> list[Given]:
    """What this fund has awarded to the firm and its enterprise; of an award that has ended, what it came to."""
    async with all_firms_within(connection):  # firms of an enterprise share its limits
        rows = await connection.fetch(
            "SELECT w.awarded_on, w.grant_pence - coalesce(g.restored_pence, 0) AS grant_pence "
            "FROM award w LEFT JOIN agreement g ON g.award_id = w.id "
            "WHERE w.firm_id IN (SELECT kin_of($1))",
            firm_id,
        )
    return [Given(on=row["awarded_on"], amount_pence=row["grant_pence"]) for row in rows]


def award_from(row: asyncpg.Record) -> Award:
    fields: dict[str, Any] = dict(row)
    findings = _findings.validate_json(fields.pop("findings"))
    return Award(awarded_us=to_us(fields.pop("awarded")), findings=findings, **fields)


@dataclass(frozen=True, kw_only=True)
class Note:
    """What the audit record says of something that was done."""

    action: str
    call_id: str | None = None
    application_id: str | None = None
    detail: Mapping[str, str | int]


async def audit_all(connection: Connection, notes: Sequence[tuple[int, Note, str]], *, now_us: int) -> None:
    """Notes of several people, each with the credential and the correlation id, in one statement."""
    await connection.execute(
        "INSERT INTO audit (at, credential_id, action, call_id, application_id, detail, correlation_id) "
        "SELECT $1, n.* FROM unnest($2::bigint[], $3::text[], $4::text[], $5::text[], $6::jsonb[], $7::text[]) AS n",
        from_us(now_us),
        [credential_id for credential_id, _, _ in notes],
        [note.action for _, note, _ in notes],
        [note.call_id for _, note, _ in notes],
        [note.application_id for _, note, _ in notes],
        [_detail.dump_json(dict(note.detail)).decode() for _, note, _ in notes],
        [correlation_id for _, _, correlation_id in notes],
    )


async def audit_note(connection: Connection, credential_id: int, note: Note, *, now_us: int) -> None:
    """One note, under the correlation id of what is being done."""
    await audit_all(connection, [(credential_id, note, current_correlation_id())], now_us=now_us)


async def audit(
    connection: Connection,
    action: str,
    *,
    credential_id: int,
    now_us: int,
    call_id: str,
    application_id: str | None = None,
    detail: Mapping[str, str | int],
) -> None:
    """Who did what. Append-only, in the transaction of what was done."""
    await connection.execute(
        "INSERT INTO audit (at, credential_id, action, call_id, application_id, detail, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        from_us(now_us),
        credential_id,
        action,
        call_id,
        application_id,
        _detail.dump_json(dict(detail)).decode(),
        current_correlation_id(),
    )
