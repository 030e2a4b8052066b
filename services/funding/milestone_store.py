"""Milestones and their evidence in the database. Every function works in the caller's transaction."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import asyncpg

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.errors import Conflict
from services.funding.milestone import Comparison, Milestone


class StatementUsed(Conflict):
    """This evidence has shown another milestone already; one statement shows one."""

    REASON = "EVIDENCE_USED"


async def milestones_of(connection: Connection, award_id: str) -> list[Milestone]:
    """In the order in which they are due."""
    rows = await connection.fetch(
        "SELECT m.award_id, m.id, m.title, m.measure, m.machine_id, m.comparison, m.threshold, m.days_min, "
        "m.coverage_min, m.due, m.set_at, m.set_by, e.recorded, e.value, e.statement_id, d.reference, d.sha256, d.sent "
        "FROM milestone m "
        "LEFT JOIN milestone_evidence e ON e.award_id = m.award_id AND e.milestone_id = m.id "
        "LEFT JOIN LATERAL (SELECT reference, sha256, sent FROM milestone_document "
        "  WHERE award_id = m.award_id AND milestone_id = m.id ORDER BY number DESC LIMIT 1) d ON true "
        "WHERE m.award_id = $1 ORDER BY m.due, m.id",
        award_id,
    )
    return [
        Milestone(
            id=row["id"],
            title=row["title"],
            measure=row["measure"],
            machine_id=row["machine_id"],
            comparison=Comparison(row["comparison"]) if row["comparison"] else None,
            threshold=row["threshold"],
            days_min=row["days_min"] or 0,
            coverage_min=row["coverage_min"],
            due=row["due"],
            met_us=row["recorded"] and to_us(row["recorded"]),
            value=row["value"] or "",
            statement_id=row["statement_id"] or "",
            document=row["reference"] or "",
            document_sha256=row["sha256"] or "",
            document_sent_us=row["sent"] and to_us(row["sent"]),
        )
        for row in rows
    ]


async def set_milestones(
    connection: Connection,
    award_id: str,
    milestones: Sequence[Milestone],
    *,
    keep: Collection[str],
    credential_id: int,
    now_us: int,
) -> None:
    """These in place of all there were but the ones to keep."""
    await connection.execute(
        "DELETE FROM milestone WHERE award_id = $1 AND id <> ALL($2::text[])", award_id, list(keep)
    )
    await connection.executemany(
        "INSERT INTO milestone (award_id, id, title, measure, machine_id, comparison, threshold, days_min, coverage_min, "
        "due, set_at, set_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
        [
            (
                award_id,
                one.id,
                one.title,
                one.measure,
                one.machine_id,
                one.comparison,
                one.threshold,
                one.days_min or None,
                one.coverage_min,
                one.due,
                from_us(now_us),
                credential_id,
            )
            for one in milestones
        ],
    )


async def add_document(
    connection: Connection,
    award_id: str,
    milestone_id: str,
    *,
    reference: str,
    sha256: str,
    credential_id: int,
    now_us: int,
    documents_max: int,
) -> None:
    """The award must be held. Raises Conflict past `documents_max`."""
    number = await connection.fetchval(
        "SELECT count(*) FROM milestone_document WHERE award_id = $1 AND milestone_id = $2", award_id, milestone_id
    )
    if number >= documents_max:
        raise Conflict(f"A milestone takes at most {documents_max} documents.", reason="TOO_MANY_DOCUMENTS")
    await connection.execute(
        "INSERT INTO milestone_document (award_id, milestone_id, number, reference, sha256, sent, sent_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        award_id,
        milestone_id,
        number + 1,
        reference,
        sha256,
        from_us(now_us),
        credential_id,
    )


async def add_evidence(
    connection: Connection,
    award_id: str,
    milestone_id: str,
    *,
    statement_id: str,
    evidence: Mapping[str, Any],
    value: str,
    credential_id: int,
    now_us: int,
) -> None:
    """Raises StatementUsed."""
    try:
        await connection.execute(
            "INSERT INTO milestone_evidence (award_id, milestone_id, statement_id, evidence, value, recorded, recorded_by) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7)",
            award_id,
            milestone_id,
            statement_id,
            json.dumps(evidence),
            value,
            from_us(now_us),
            credential_id,
        )
    except asyncpg.UniqueViolationError as error:
        raise StatementUsed() from error
