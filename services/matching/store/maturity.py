"""SQL of data-maturity self-assessments."""

import json

import asyncpg

from services.common.database import Connection
from services.matching.maturity import Assessment, Scoring, Topic

Row = asyncpg.Record

_MATURITY_ASSESSMENT_ROWS = (
    "SELECT id, firm_id, version, answers, share, level, topics, need_draft, taken, taken_by, need_id, request_id, "
    "request_sha256, correlation_id FROM maturity_assessment "
)


async def add_assessment(
    connection: Connection,
    assessment: Assessment,
    *,
    by: int,
    request_id: str,
    request_sha256: bytes,
    correlation_id: str,
) -> None:
    await connection.execute(
        "INSERT INTO maturity_assessment (id, firm_id, version, answers, share, level, topics, need_draft, taken, taken_by, "
        "request_id, request_sha256, correlation_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        assessment.id,
        assessment.firm_id,
        assessment.version,
        json.dumps(dict(assessment.answers)),
        assessment.scoring.share,
        assessment.scoring.level,
        json.dumps(dict(assessment.scoring.topics)),
        assessment.need_draft,
        assessment.taken,
        by,
        request_id or None,
        request_sha256 if request_id else None,
        correlation_id,
    )


async def assessment(connection: Connection, assessment_id: str, *, hold: bool = False) -> Assessment | None:
    """`hold`: nobody else opens a need from it until the transaction ends."""
    query = _MATURITY_ASSESSMENT_ROWS + "WHERE id = $1"
    row = await connection.fetchrow(query + " FOR NO KEY UPDATE" if hold else query, assessment_id)
    return None if row is None else _assessment(row)


async def assessment_by_request(
    connection: Connection, firm_id: int, request_id: str
) -> tuple[Assessment, bytes] | None:
    row = await connection.fetchrow(
        _MATURITY_ASSESSMENT_ROWS + "WHERE firm_id = $1 AND request_id = $2", firm_id, request_id
    )
    return None if row is None else (_assessment(row), row["request_sha256"])


async def assessments_of_firm(connection: Connection, firm_id: int, *, limit: int) -> list[Assessment]:
    """Newest first."""
    rows = await connection.fetch(
        _MATURITY_ASSESSMENT_ROWS + "WHERE firm_id = $1 ORDER BY taken DESC, id DESC LIMIT $2", firm_id, limit
    )
    return [_assessment(row) for row in rows]


async def set_need(connection: Connection, assessment_id: str, need_id: str) -> None:
    await connection.execute("UPDATE maturity_assessment SET need_id = $2 WHERE id = $1", assessment_id, need_id)


def _assessment(row: Row) -> Assessment:
    topics: dict[str, float] = json.loads(row["topics"])
    return Assessment(
        id=row["id"],
        firm_id=row["firm_id"],
        version=row["version"],
        answers=json.loads(row["answers"]),
        scoring=Scoring(
            share=row["share"], level=row["level"], topics={Topic(name): share for name, share in topics.items()}
        ),
        need_draft=row["need_draft"],
        taken=row["taken"],
        need_id=row["need_id"] or "",
    )
