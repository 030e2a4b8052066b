"""SQL of quotas and their use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from services.common.clock import from_us
from services.common.database import Connection
from services.common.errors import NotFound

# What a door said longer ago says nothing about now: three of its intervals.
USE_IS_NEWS_S = 15
MACHINES_LOOKED_AT = 200


@dataclass(frozen=True)
class Quota:
    """What a firm may use; None: the default."""

    samples_per_s: int | None
    signals: int | None
    stored_days: int | None


@dataclass(frozen=True)
class Use:
    """What a firm uses now. `oldest`: time of its oldest stored sample, from the MACHINES_LOOKED_AT oldest machines."""

    samples_per_s: float
    signals: int
    machines: int
    oldest: datetime | None
    # What stands in quarantine, and what was refused there because it was full.
    quarantine_bytes: int
    quarantine_refused_samples: int


@dataclass(frozen=True)
class Others:
    """What a firm sends through other doors, and how many they are."""

    samples_per_s: float
    doors: int


async def quota_of(connection: Connection, firm_id: int) -> Quota:
    """Raises NotFound."""
    row = await connection.fetchrow(
        "SELECT q.samples_per_s, q.signals, q.stored_days FROM firm f LEFT JOIN firm_quota q ON q.firm_id = f.id "
        "WHERE f.id = $1",
        firm_id,
    )
    if row is None:
        raise NotFound(f"There is no firm {firm_id}.")
    return Quota(**dict(row))


async def change_quota(connection: Connection, firm_id: int, quota: Quota, now_us: int) -> None:
    await connection.execute(
        "INSERT INTO firm_quota (firm_id, samples_per_s, signals, stored_days, changed) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (firm_id) DO UPDATE SET samples_per_s = excluded.samples_per_s, signals = excluded.signals, "
        "stored_days = excluded.stored_days, changed = excluded.changed",
        *(firm_id, quota.samples_per_s, quota.signals, quota.stored_days, from_us(now_us)),
    )


async def use_of(connection: Connection, firm_id: int, now_us: int) -> Use:
    row = await connection.fetchrow(
        "SELECT (SELECT coalesce(sum(samples_per_s), 0) FROM firm_use WHERE firm_id = $1 AND at > $2) AS samples_per_s, "
        "(SELECT count(*) FROM signal WHERE firm_id = $1) AS signals, "
        "(SELECT count(*) FROM machine WHERE firm_id = $1) AS machines, "
        "(SELECT min(f.ts) FROM (SELECT id FROM machine WHERE firm_id = $1 ORDER BY id LIMIT $3) m, LATERAL "
        " (SELECT ts FROM frame WHERE machine_id = m.id AND first_position = 0 ORDER BY ts LIMIT 1) f) AS oldest, "
        "coalesce((SELECT sum(bytes) FROM quarantine_day WHERE firm_id = $1), 0)::bigint AS quarantine_bytes, "
        "coalesce((SELECT refused_samples FROM quarantine_use WHERE firm_id = $1), 0) AS quarantine_refused_samples",
        *(firm_id, from_us(now_us) - timedelta(seconds=USE_IS_NEWS_S), MACHINES_LOOKED_AT),
    )
    assert row is not None
    return Use(**dict(row))


async def write_use(connection: Connection, door: str, rates: Mapping[int, float], now_us: int) -> None:
    firms = sorted(rates)
    await connection.execute(
        "INSERT INTO firm_use (firm_id, door, samples_per_s, at) "
        "SELECT firm_id, $1, rate, $4 FROM unnest($2::bigint[], $3::float8[]) AS told (firm_id, rate) "
        "ON CONFLICT (firm_id, door) DO UPDATE SET samples_per_s = excluded.samples_per_s, at = excluded.at",
        *(door, firms, [rates[firm_id] for firm_id in firms], from_us(now_us)),
    )
    await connection.execute(
        "DELETE FROM firm_use WHERE at < $1", from_us(now_us) - timedelta(seconds=USE_IS_NEWS_S * 10)
    )


async def use_of_others(connection: Connection, door: str, firm_ids: Sequence[int], now_us: int) -> dict[int, Others]:
    rows = await connection.fetch(
        "SELECT firm_id, sum(samples_per_s) AS samples_per_s, count(*) AS doors FROM firm_use "
        "WHERE firm_id = ANY($1::bigint[]) AND door <> $2 AND at > $3 AND samples_per_s > 0 GROUP BY firm_id",
        *(list(firm_ids), door, from_us(now_us) - timedelta(seconds=USE_IS_NEWS_S)),
    )
    return {row["firm_id"]: Others(row["samples_per_s"], row["doors"]) for row in rows}
