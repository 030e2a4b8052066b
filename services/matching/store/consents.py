"""SQL of consents."""

from datetime import datetime

import asyncpg

from services.common.database import Connection
from services.matching.consents import Consent, Severity, SharedItem

Row = asyncpg.Record

_CONSENT_ROWS = (
    "SELECT id, firm_id, shared, machine_ids, severity_min, valid_from, valid_until, note, given, given_by, ended, "
    "ended_by, replaced, request_id, request_sha256, correlation_id FROM consent "
)


async def lock_firm_consents(connection: Connection, firm_id: int) -> None:
    """Changes of one firm's consent come one after the other."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('smdih-consent-' || $1::text, 0))", str(firm_id)
    )


async def current_consent(connection: Connection, firm_id: int, *, hold: bool = False) -> Consent | None:
    """`hold`: it cannot be ended before this transaction is."""
    query = _CONSENT_ROWS + "WHERE firm_id = $1 AND ended IS NULL"
    row = await connection.fetchrow(query + " FOR SHARE" if hold else query, firm_id)
    return None if row is None else _consent(row)


async def ended_consents(connection: Connection, firm_id: int, *, limit: int) -> list[Consent]:
    """Newest first."""
    rows = await connection.fetch(
        _CONSENT_ROWS + "WHERE firm_id = $1 AND ended IS NOT NULL ORDER BY ended DESC, id LIMIT $2",
        firm_id,
        limit,
    )
    return [_consent(row) for row in rows]


async def end_consent(connection: Connection, firm_id: int, *, ended: datetime, by: int, replaced: bool) -> bool:
    """End the one in force; False where there is none."""
    status = await connection.fetchval(
        "UPDATE consent SET ended = $2, ended_by = $3, replaced = $4 WHERE firm_id = $1 AND ended IS NULL RETURNING 1",
        firm_id,
        ended,
        by,
        replaced,
    )
    return status is not None


async def add_consent(
    connection: Connection, consent: Consent, *, request_id: str, request_sha256: bytes, correlation_id: str
) -> None:
    await connection.execute(
        """
        INSERT INTO consent (id, firm_id, shared, machine_ids, severity_min, valid_from, valid_until, note, given,
            given_by, request_id, request_sha256, correlation_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        """,
        consent.id,
        consent.firm_id,
        sorted(consent.shared),
        sorted(consent.machine_ids),
        int(consent.severity_min),
        consent.valid_from,
        consent.valid_until,
        consent.note,
        consent.given,
        consent.given_by,
        request_id or None,
        request_sha256 if request_id else None,
        correlation_id,
    )


async def consent_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[Consent, bytes] | None:
    """The consent that was given with this request, and the digest of the request's content."""
    row = await connection.fetchrow(_CONSENT_ROWS + "WHERE firm_id = $1 AND request_id = $2", firm_id, request_id)
    return None if row is None else (_consent(row), row["request_sha256"])


def _consent(row: Row) -> Consent:
    return Consent(
        id=row["id"],
        firm_id=row["firm_id"],
        shared=frozenset(SharedItem(item) for item in row["shared"]),
        machine_ids=frozenset(row["machine_ids"]),
        severity_min=Severity(row["severity_min"]),
        valid_from=row["valid_from"],
        valid_until=row["valid_until"],
        note=row["note"],
        given=row["given"],
        given_by=row["given_by"],
        ended=row["ended"],
        ended_by=row["ended_by"] or 0,
        replaced=row["replaced"],
    )
