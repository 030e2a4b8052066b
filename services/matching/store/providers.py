"""SQL of providers and of the places in their quarters."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import asyncpg

from services.common.database import Connection, all_firms_within
from services.matching.domain import Assesses, Kind, Size
from services.matching.providers import Evidence, ProviderRecord

Row = asyncpg.Record


async def next_provider_change(connection: Connection, providers: int = 1) -> int:
    """Number of the change that this transaction makes; to be had before a provider is locked. For several providers it is the
    last of as many numbers, one for each.

    Providers change one after the other, so that numbers become visible in their order and whoever reads "all after N" misses
    none.
    """
    number: int = await connection.fetchval(
        "UPDATE provider_change SET number = number + $1 WHERE one RETURNING number", providers
    )
    return number


async def lock_provider(connection: Connection, provider_id: str) -> ProviderRecord | None:
    row = await connection.fetchrow(_OUTSIDE_A_QUARTER + "WHERE id = $1 FOR NO KEY UPDATE", provider_id)
    return None if row is None else _provider(row)


async def put_provider(connection: Connection, provider: ProviderRecord) -> None:
    """Create or replace. A vector of other text is dropped."""
    await connection.execute(
        """
        INSERT INTO provider AS p (
            id, kind, partner_id, title, text, region, region_bound, regions_served, sic_divisions, sic_excluded,
            sizes_served, skills, capacity_per_quarter, lead_days, conflict_firm_ids, expires_on, active, change, changed,
            assesses, conflict_organisations, esco_skills, evidence, review_on, offered_until)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22,
            $23::text::jsonb, $24, $25)
        ON CONFLICT (id) DO UPDATE SET
            kind = excluded.kind, partner_id = excluded.partner_id, title = excluded.title, text = excluded.text,
            region = excluded.region, region_bound = excluded.region_bound, regions_served = excluded.regions_served,
            sic_divisions = excluded.sic_divisions, sic_excluded = excluded.sic_excluded,
            sizes_served = excluded.sizes_served, skills = excluded.skills,
            capacity_per_quarter = excluded.capacity_per_quarter, lead_days = excluded.lead_days,
            conflict_firm_ids = excluded.conflict_firm_ids, expires_on = excluded.expires_on, active = excluded.active,
            change = excluded.change, changed = excluded.changed, assesses = excluded.assesses,
            conflict_organisations = excluded.conflict_organisations, esco_skills = excluded.esco_skills,
            evidence = excluded.evidence, review_on = excluded.review_on, offered_until = excluded.offered_until,
            vector = CASE WHEN (p.title, p.text) = (excluded.title, excluded.text) THEN p.vector END
        """,
        provider.id,
        provider.kind,
        provider.partner_id,
        provider.title,
        provider.text,
        provider.region,
        provider.region_bound,
        provider.regions_served,
        provider.sic_divisions,
        provider.sic_excluded,
        provider.sizes_served,
        provider.skills,
        provider.capacity_per_quarter,
        provider.lead_days,
        provider.conflict_firm_ids,
        provider.expires_on,
        provider.active,
        provider.change,
        provider.changed,
        provider.assesses,
        provider.conflict_organisations,
        provider.esco_skills,
        json.dumps([_evidence_row(each) for each in provider.evidence]),
        provider.review_on,
        provider.offered_until,
    )


async def set_quarter_capacities(
    connection: Connection, provider_id: str, capacity: int | None, *, since: date
) -> None:
    """Carry a new capacity into the quarters that have begun to fill. What is promised stays promised: a smaller capacity than
    is taken means no more places, also not those that are given back above it."""
    await connection.execute(
        "UPDATE provider_quarter SET capacity = CASE WHEN $2::int IS NULL THEN NULL ELSE greatest($2, taken) END "
        "WHERE provider_id = $1 AND quarter >= $3",
        provider_id,
        capacity,
        since,
    )


async def provider(connection: Connection, provider_id: str, *, quarter: date) -> ProviderRecord | None:
    row = await connection.fetchrow(f"{_PROVIDERS} WHERE p.id = $2", quarter, provider_id)
    return None if row is None else _provider(row)


async def list_providers(
    connection: Connection,
    *,
    quarter: date,
    partner_id: int,
    kind: Kind | None,
    live_on: date | None,
    after: str,
    limit: int,
) -> list[ProviderRecord]:
    """In order of id. `live_on`: only those that may be offered on that day."""
    rows = await connection.fetch(
        f"{_PROVIDERS} WHERE p.id > $2 AND ($3::bigint = 0 OR p.partner_id = $3) AND ($4::text IS NULL OR p.kind = $4) "
        "AND ($5::date IS NULL OR (p.active AND (p.offered_until IS NULL OR p.offered_until > $5))) ORDER BY p.id LIMIT $6",
        quarter,
        after,
        partner_id,
        kind,
        live_on,
        limit,
    )
    return [_provider(row) for row in rows]


async def live_providers(connection: Connection, *, quarter: date, today: date) -> list[ProviderRecord]:
    """All that may be offered today, with the places taken in the quarter."""
    rows = await connection.fetch(
        f"{_PROVIDERS} WHERE p.active AND (p.offered_until IS NULL OR p.offered_until > $2)", quarter, today
    )
    return [_provider(row) for row in rows]


async def ending_providers(
    connection: Connection, *, after: date, until: date, after_id: str, limit: int
) -> list[ProviderRecord]:
    """Active ones that are not offered any more from a day in (after, until] on, in order of id; places taken are not looked up."""
    rows = await connection.fetch(
        _OUTSIDE_A_QUARTER
        + "WHERE active AND offered_until > $1 AND offered_until <= $2 AND id > $3 ORDER BY id LIMIT $4",
        after,
        until,
        after_id,
        limit,
    )
    return [_provider(row) for row in rows]


async def providers_by_id(connection: Connection, provider_ids: Sequence[str]) -> dict[str, ProviderRecord]:
    """Withdrawn ones too; places taken are not looked up."""
    rows = await connection.fetch(_OUTSIDE_A_QUARTER + "WHERE id = ANY($1::text[])", list(provider_ids))
    return {row["id"]: _provider(row) for row in rows}


@dataclass(frozen=True)
class ChangedProvider:
    provider: ProviderRecord
    # None: not computed yet, or by another model.
    vector: bytes | None


async def changed_providers(
    connection: Connection, *, after: int, quarter: date, vector_model: str, limit: int
) -> list[ChangedProvider]:
    """Those whose last change has a number above `after`, in order of change; `taken` is that of the quarter."""
    rows = await connection.fetch(
        "SELECT p.id, p.kind, p.partner_id, p.title, p.text, p.region, p.region_bound, p.regions_served, p.sic_divisions, "
        "p.sic_excluded, p.sizes_served, p.skills, p.capacity_per_quarter, p.lead_days, p.conflict_firm_ids, "
        "p.expires_on, p.active, p.change, p.changed, p.assesses, p.conflict_organisations, "
        "p.outcome_firms, p.outcome_points, p.esco_skills, p.evidence, p.review_on, p.offered_until, coalesce(q.taken, 0) "
        "AS taken, CASE WHEN p.vector_model = $2 THEN p.vector END AS usable_vector "
        "FROM provider p LEFT JOIN provider_quarter q ON q.provider_id = p.id AND q.quarter = $4 "
        "WHERE p.change > $1 ORDER BY p.change LIMIT $3",
        after,
        vector_model,
        limit,
        quarter,
    )
    return [ChangedProvider(_provider(row), row["usable_vector"]) for row in rows]


async def keep_vectors(
    connection: Connection, vectors: Sequence[tuple[ProviderRecord, bytes]], *, vector_model: str
) -> None:
    """Store what was computed from the providers' texts; one whose text has changed since keeps none."""
    await connection.executemany(
        "UPDATE provider SET vector = $4, vector_model = $5 WHERE id = $1 AND title = $2 AND text = $3",
        [(provider.id, provider.title, provider.text, vector, vector_model) for provider, vector in vectors],
    )


async def bookable_providers(
    connection: Connection, provider_ids: Sequence[str], *, quarter: date, today: date
) -> dict[str, ProviderRecord]:
    """Those of the providers that may be offered today and have a place left in the quarter, by id."""
    rows = await connection.fetch(
        f"{_PROVIDERS} WHERE p.id = ANY($2::text[]) AND p.active AND (p.offered_until IS NULL OR p.offered_until > $3) "
        "AND (q.capacity IS NULL OR q.taken < q.capacity)",
        quarter,
        provider_ids,
        today,
    )
    return {row["id"]: _provider(row) for row in rows}


async def set_outcomes(connection: Connection, provider_id: str, *, change: int) -> None:
    """Count anew what firms have scored in closed matches: of each firm the newest score, so that nobody counts twice."""
    async with all_firms_within(connection):  # what each of them scored counts
        await connection.execute(
            """
            UPDATE provider SET (outcome_firms, outcome_points) = (
                SELECT count(*), coalesce(sum(points), 0) FROM (
                    SELECT DISTINCT ON (m.firm_id) s.points FROM match m JOIN match_score s ON s.match_id = m.id
                    WHERE m.provider_id = $1 AND m.state = 'closed' AND s.side = 'firm' ORDER BY m.firm_id, s.scored DESC, m.id
                ) AS newest
            ), change = $2 WHERE id = $1
            """,
            provider_id,
            change,
        )


_OUTSIDE_A_QUARTER = (
    "SELECT id, kind, partner_id, title, text, region, region_bound, regions_served, sic_divisions, sic_excluded, "
    "sizes_served, skills, capacity_per_quarter, lead_days, conflict_firm_ids, expires_on, active, change, changed, "
    "assesses, conflict_organisations, outcome_firms, outcome_points, esco_skills, evidence, review_on, offered_until, "
    "0 AS taken FROM provider "
)
_PROVIDERS = (
    "SELECT p.id, p.kind, p.partner_id, p.title, p.text, p.region, p.region_bound, p.regions_served, p.sic_divisions, "
    "p.sic_excluded, p.sizes_served, p.skills, p.capacity_per_quarter, p.lead_days, p.conflict_firm_ids, p.expires_on, "
    "p.active, p.change, p.changed, p.assesses, p.conflict_organisations, p.outcome_firms, "
    "p.outcome_points, p.esco_skills, p.evidence, p.review_on, p.offered_until, "
    "coalesce(q.taken, 0) AS taken FROM provider p "
    "LEFT JOIN provider_quarter q ON q.provider_id = p.id AND q.quarter = $1"
)


def _provider(row: Row) -> ProviderRecord:
    return ProviderRecord(
        id=row["id"],
        kind=Kind(row["kind"]),
        partner_id=row["partner_id"],
        title=row["title"],
        text=row["text"],
        region=row["region"],
        region_bound=row["region_bound"],
        regions_served=tuple(row["regions_served"]),
        sic_divisions=tuple(row["sic_divisions"]),
        sic_excluded=tuple(row["sic_excluded"]),
        sizes_served=tuple(Size(size) for size in row["sizes_served"]),
        skills=tuple(row["skills"]),
        capacity_per_quarter=row["capacity_per_quarter"],
        lead_days=row["lead_days"],
        assesses=Assesses(row["assesses"]),
        conflict_organisations=tuple(row["conflict_organisations"]),
        esco_skills=tuple(row["esco_skills"]),
        evidence=tuple(_evidence(each) for each in json.loads(row["evidence"])),
        review_on=row["review_on"],
        outcome_firms=row["outcome_firms"],
        outcome_points=row["outcome_points"],
        conflict_firm_ids=tuple(row["conflict_firm_ids"]),
        expires_on=row["expires_on"],
        active=row["active"],
        change=row["change"],
        changed=row["changed"],
        taken=row["taken"],
    )


def _evidence_row(evidence: Evidence) -> dict[str, Any]:
    expires_on = None if evidence.expires_on is None else evidence.expires_on.isoformat()
    return {
        "title": evidence.title,
        "reference": evidence.reference,
        "sha256": evidence.sha256,
        "expires_on": expires_on,
        "required": evidence.required,
    }


def _evidence(row: dict[str, Any]) -> Evidence:
    expires_on = None if row["expires_on"] is None else date.fromisoformat(row["expires_on"])
    return Evidence(**{**row, "expires_on": expires_on})
