"""SQL of settings, tariffs and carbon factors: rows are added, the newest counts."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import asyncpg

from services.common.database import Connection
from services.common.errors import Conflict
from services.ingest.kpi.calendar import span_of
from services.ingest.kpi.settings import KpiSettings
from services.ingest.kpi.tariff import CarbonFactor, Rate, Tariff

# Prices may be below 0; four decimals are what suppliers write.
_PRICE = re.compile(r"-?[0-9]{1,4}(\.[0-9]{1,4})?")


async def settings_of(connection: Connection, machine_id: int) -> tuple[int, KpiSettings]:
    """The newest revision; 0 and what holds unless said otherwise, if there is none."""
    row = await connection.fetchrow(
        "SELECT revision, settings FROM kpi_setting WHERE machine_id = $1 ORDER BY revision DESC LIMIT 1", machine_id
    )
    return (0, KpiSettings()) if row is None else (row["revision"], KpiSettings.from_json(json.loads(row["settings"])))


async def add_settings(connection: Connection, machine_id: int, settings: KpiSettings, changed_by: int) -> int:
    """The new revision. Raises Conflict when another change came first."""
    try:
        revision: int = await connection.fetchval(
            "INSERT INTO kpi_setting (machine_id, revision, settings, changed_by) "
            "SELECT $1, coalesce(max(revision), 0) + 1, $2, $3 FROM kpi_setting WHERE machine_id = $1 RETURNING revision",
            *(machine_id, json.dumps(settings.as_json()), changed_by),
        )
    except asyncpg.UniqueViolationError as error:
        raise Conflict("Somebody else is changing these settings; read them and try again.") from error
    return revision


async def tariffs(connection: Connection, site_id: int, region: str) -> list[Tariff]:
    """Of the site, else of its region; in order of date, of each date the newest row."""
    for column, value in (("site_id", site_id), ("region", region)):
        rows = await connection.fetch(_TARIFFS[column], value)
        if rows:
            return [_tariff(row, is_assumed=column == "region") for row in rows]
    return []


_TARIFFS = {
    "site_id": "SELECT DISTINCT ON (valid_from) id, valid_from, rates, source, confirmed_by FROM tariff "
    "WHERE site_id = $1 ORDER BY valid_from, id DESC",
    "region": "SELECT DISTINCT ON (valid_from) id, valid_from, rates, source, confirmed_by FROM tariff "
    "WHERE region = $1 ORDER BY valid_from, id DESC",
}


async def add_tariff(
    connection: Connection,
    *,
    site_id: int | None,
    region: str | None,
    valid_from: date,
    rates: Sequence[Mapping[str, Any]],
    source: str,
    confirmed_by: str | None,
    created_by: int,
) -> int:
    added: int = await connection.fetchval(
        "INSERT INTO tariff (site_id, region, valid_from, rates, source, confirmed_by, created_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
        *(site_id, region, valid_from, json.dumps(rates), source, confirmed_by, created_by),
    )
    return added


def rate_of(stored: Mapping[str, Any]) -> Rate:
    """Raises ValueError for times or prices that are none."""
    if not _PRICE.fullmatch(stored["pence_per_kwh"]):
        raise ValueError(f"{stored['pence_per_kwh']!r} is no price in pence such as 24.73")
    spans = None
    if (stored["from"] is None) != (stored["to"] is None):
        raise ValueError("from and to: both or none")
    if stored["from"] is not None:
        spans = [span_of(stored["days"], stored["from"], stored["to"])]
    return Rate(stored["name"], Decimal(stored["pence_per_kwh"]), spans)


def _tariff(row: asyncpg.Record, *, is_assumed: bool) -> Tariff:
    rates = [rate_of(rate) for rate in json.loads(row["rates"])]
    return Tariff(row["id"], row["valid_from"], rates, row["source"], is_assumed, row["confirmed_by"])


async def carbon_factors(connection: Connection, region: str | None = None) -> list[CarbonFactor]:
    """Of each region and year the newest row; of one region if given."""
    rows = await connection.fetch(
        "SELECT DISTINCT ON (region, year) id, region, year, kg_per_kwh, source, sure, confirmed_by FROM carbon_factor "
        "WHERE $1::text IS NULL OR region = $1 ORDER BY region, year, id DESC",
        region,
    )
    return [CarbonFactor(**dict(row)) for row in rows]


async def add_carbon_factor(
    connection: Connection,
    *,
    region: str,
    year: int,
    kg_per_kwh: Decimal,
    source: str,
    sure: str,
    confirmed_by: str | None,
    created_by: int,
) -> int:
    added: int = await connection.fetchval(
        "INSERT INTO carbon_factor (region, year, kg_per_kwh, source, sure, confirmed_by, created_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
        *(region, year, kg_per_kwh, source, sure, confirmed_by, created_by),
    )
    return added


async def sample_count(
    connection: Connection, machine_id: int, first_position: int, start: datetime, end: datetime
) -> int:
    """Samples of a channel group over whole minutes: from the hours inside, and the minutes at both ends."""
    count: int = await connection.fetchval(
        """
        WITH inner_hours AS (
            SELECT least(public.time_bucket('1 hour', $3::timestamptz + interval '59 minutes 59.999999 seconds'), $4) AS a,
                   greatest(public.time_bucket('1 hour', $4::timestamptz), $3) AS b
        ), hours AS (SELECT a, greatest(a, b) AS b FROM inner_hours)
        SELECT coalesce(sum(n), 0)::bigint FROM (
            SELECT counts FROM hours, buckets_1h($1, $2, hours.a, hours.b)
            UNION ALL SELECT counts FROM hours, buckets_1m($1, $2, $3, hours.a)
            UNION ALL SELECT counts FROM hours, buckets_1m($1, $2, hours.b, $4)
        ) AS parts, unnest(parts.counts) AS n
        """,
        *(machine_id, first_position, start, end),
    )
    return count


async def minute_count(
    connection: Connection, machine_id: int, first_position: int, start: datetime, end: datetime
) -> int:
    """Minutes that hold a frame."""
    count: int = await connection.fetchval(
        "SELECT count(*) FROM buckets_1m($1, $2, $3, $4)", machine_id, first_position, start, end
    )
    return count
