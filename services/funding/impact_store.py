"""Impact reports in the database. Every function works in the caller's transaction."""

from dataclasses import dataclass
from datetime import date

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.funding.impact import Figures, ImpactKind, Report

_IMPACT_REPORT_ROWS = (
    "SELECT award_id, kind, version, year_ending, figures, uncertainty_percent, method, reported, reported_by FROM "
    "impact_report "
)

_figures = TypeAdapter(Figures)


@dataclass(frozen=True, kw_only=True)
class Project:
    """An accepted award, and the newest form of each kind."""

    award_id: str
    firm_id: int
    project_start: date
    project_end: date
    baseline: Report | None
    follow_up: Report | None


async def add_report(connection: Connection, award_id: str, report: Report, *, credential_id: int) -> None:
    await connection.execute(
        "INSERT INTO impact_report (award_id, kind, version, year_ending, figures, uncertainty_percent, method, reported, "
        "reported_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        award_id,
        report.kind,
        report.version,
        report.year_ending,
        _figures.dump_json(report.figures).decode(),
        report.uncertainty_percent,
        report.method,
        from_us(report.reported_us),
        credential_id,
    )


async def reports_of(connection: Connection, award_id: str) -> list[Report]:
    """Oldest first."""
    rows = await connection.fetch(
        _IMPACT_REPORT_ROWS + "WHERE award_id = $1 ORDER BY reported, kind, version", award_id
    )
    return [_report(row) for row in rows]


async def projects(connection: Connection, *, limit: int) -> list[Project]:
    """Accepted awards that were not given up, in order of their end."""
    awards = await connection.fetch(
        "SELECT w.id, w.firm_id, g.project_start, g.project_end FROM award w JOIN agreement g ON g.award_id = w.id "
        "WHERE g.state IN ('accepted', 'complete', 'lapsed') ORDER BY g.project_end, w.id LIMIT $1",
        limit,
    )
    rows = await connection.fetch(
        "SELECT DISTINCT ON (award_id, kind) * FROM impact_report WHERE award_id = ANY($1::text[]) "
        "ORDER BY award_id, kind, version DESC",
        [award["id"] for award in awards],
    )
    newest = {(row["award_id"], row["kind"]): _report(row) for row in rows}
    return [
        Project(
            award_id=award["id"],
            firm_id=award["firm_id"],
            project_start=award["project_start"],
            project_end=award["project_end"],
            baseline=newest.get((award["id"], ImpactKind.BASELINE)),
            follow_up=newest.get((award["id"], ImpactKind.FOLLOW_UP)),
        )
        for award in awards
    ]


def _report(row: asyncpg.Record) -> Report:
    return Report(
        kind=ImpactKind(row["kind"]),
        version=row["version"],
        year_ending=row["year_ending"],
        figures=_figures.validate_json(row["figures"]),
        uncertainty_percent=row["uncertainty_percent"],
        method=row["method"],
        reported_us=to_us(row["reported"]),
    )
