"""How well a firm's alarms serve the people who must respond (the measures of ISA-18.2), over those that are not suppressed."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from prometheus_client import Gauge

from services.anomaly.domain import MICROSECONDS, Severity
from services.anomaly.service import check_role
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller

FLOOD_S = 600
# More in FLOOD_S than one person can respond to.
FLOOD_ALARMS = 10
CHATTER_S = 60
CHATTER_ACTIVATIONS = 3
STALE_S = 24 * 3600
SOURCES_MAX = 10
HOURS_DEFAULT = 24
HOURS_MAX = 7 * 24
GAUGE_INTERVAL_S = 15.0
QUANTILES = (0.5, 0.9, 0.99, 1.0)

# Alarms of the last 10 minutes a firm, over the firms that had any: quantiles; 1.0 is the firm with the most.
firm_alarms = Gauge("smdih_anomaly_firm_alarms_10_minutes", "Alarms of a firm in the last 10 minutes", ["quantile"])
# Firms with more than 10 alarms in the last 10 minutes.
firms_flooded = Gauge("smdih_anomaly_firms_flooded", "Firms with more than 10 alarms in the last 10 minutes")
# Alarms whose condition lasts, of all firms; and of these the ones that have stood for more than 24 hours.
alarms_active = Gauge("smdih_anomaly_alarms_active", "In the database: alarms whose condition lasts", ["severity"])
alarms_stale = Gauge("smdih_anomaly_alarms_stale", "In the database: alarms that last for more than 24 hours")
# Whose condition lasts, but which are kept from the list: shelved, in maintenance, out of service.
alarms_suppressed = Gauge("smdih_anomaly_alarms_suppressed", "In the database: lasting alarms kept from the list")
# Samples' records that retention deleted before the worker came to them.
records_lost = Gauge("smdih_anomaly_records_lost", "In the database: records gone before they were scored; must be 0")


@dataclass(frozen=True, kw_only=True)
class SourceMeasure:
    """A signal of a machine."""

    machine_id: int
    machine_path: str
    signal_name: str
    alarms: int
    share: float  # of the firm's alarms


@dataclass(frozen=True, kw_only=True)
class Measures:
    hours: int
    alarms: int
    alarms_by_severity: tuple[int, int, int]  # low, medium, high
    alarms_10_minutes: int  # the last ones
    flooded: bool
    alarms_10_minutes_max: int  # of the 10-minute intervals of the clock
    flooded_intervals: int
    chattering: Sequence[SourceMeasure]  # three activations within a minute; the worst first, at most SOURCES_MAX
    stale: int  # active for more than 24 h
    worst_sources: Sequence[SourceMeasure]  # at most SOURCES_MAX
    worst_sources_share: float


class MeasureService:
    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def measures(self, caller: Caller, *, firm_id: int, hours: int) -> Measures:
        """Of one firm, over the last `hours` (0: HOURS_DEFAULT). Raises Invalid when an operator names no firm."""
        check_role(caller)
        firm_id = caller.firm_or(firm_id)
        if not 0 < firm_id < 2**63:
            raise Invalid("Say in firm_id whose alarms are to be measured.", reason="FIRM_MISSING")
        if not 0 <= hours <= HOURS_MAX:
            raise Invalid(f"hours is 1 to {HOURS_MAX}, or 0 for {HOURS_DEFAULT}.")
        async with transaction(self._pool) as connection:
            return await _measure(connection, firm_id, hours or HOURS_DEFAULT, self._clock.now_us())


class FloodGauge:
    """Keeps the gauges up to date. No label names a firm: there may be thousands."""

    def __init__(self, pool: Pool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def measure(self) -> None:
        """Raises TryAgain."""
        async with transaction(self._pool) as connection:
            row = await connection.fetchrow(
                "SELECT percentile_disc($2::float8[]) WITHIN GROUP (ORDER BY n) AS quantiles, "
                "count(*) FILTER (WHERE n > $3) AS flooded FROM (SELECT count(*) AS n FROM alarm "
                "WHERE raised > $1 AND suppression = 0 GROUP BY firm_id) AS firm",
                from_us(self._clock.now_us() - FLOOD_S * MICROSECONDS),
                list(QUANTILES),
                FLOOD_ALARMS,
            )
            now_us = self._clock.now_us()
            active = await connection.fetch(
                "SELECT severity, count(*) FILTER (WHERE suppression = 0) AS n, "
                "count(*) FILTER (WHERE suppression <> 0) AS hidden, "
                "count(*) FILTER (WHERE suppression = 0 AND started < $1) AS stale "
                "FROM alarm WHERE ended IS NULL AND NOT cleared GROUP BY severity",
                from_us(now_us - STALE_S * MICROSECONDS),
            )
            lost = await connection.fetchval("SELECT coalesce(sum(records_lost), 0)::bigint FROM position")
        assert row is not None
        records_lost.set(lost)
        counts = {found["severity"]: found["n"] for found in active}
        for severity in Severity:
            alarms_active.labels(severity.name.lower()).set(counts.get(severity, 0))
        alarms_stale.set(sum(found["stale"] for found in active))
        alarms_suppressed.set(sum(found["hidden"] for found in active))
        for quantile, count in zip(QUANTILES, row["quantiles"] or [0] * len(QUANTILES), strict=True):
            firm_alarms.labels(str(quantile)).set(count)
        firms_flooded.set(row["flooded"])


async def _measure(connection: Connection, firm_id: int, hours: int, now_us: int) -> Measures:
    since = from_us(now_us - hours * 3600 * MICROSECONDS)
    totals = await connection.fetchrow(
        "SELECT count(*) AS alarms, count(*) FILTER (WHERE severity = 1) AS low, count(*) FILTER (WHERE severity = 2) AS medium, "
        "count(*) FILTER (WHERE severity = 3) AS high, count(*) FILTER (WHERE raised > $3) AS latest "
        "FROM alarm WHERE firm_id = $1 AND raised > $2 AND suppression = 0",
        firm_id,
        since,
        from_us(now_us - FLOOD_S * MICROSECONDS),
    )
    intervals = await connection.fetchrow(
        "SELECT coalesce(max(n), 0) AS most, count(*) FILTER (WHERE n > $4) AS flooded FROM (SELECT count(*) AS n FROM alarm "
        "WHERE firm_id = $1 AND raised > $2 AND suppression = 0 GROUP BY floor(extract(epoch FROM raised) / $3)) AS interval",
        firm_id,
        since,
        FLOOD_S,
        FLOOD_ALARMS,
    )
    assert totals is not None
    assert intervals is not None
    alarms = totals["alarms"]
    worst = await connection.fetch(
        "SELECT machine_id, max(machine_path) AS machine_path, max(signal_name) AS signal_name, count(*) AS n FROM alarm "
        "WHERE firm_id = $1 AND raised > $2 AND suppression = 0 GROUP BY machine_id, position "
        "ORDER BY n DESC, machine_id, position LIMIT $3",
        firm_id,
        since,
        SOURCES_MAX,
    )
    chattering = await connection.fetch(
        "SELECT machine_id, max(machine_path) AS machine_path, max(signal_name) AS signal_name, count(*) AS n FROM ("
        "SELECT machine_id, position, machine_path, signal_name, started, lag(started, $3) OVER source AS earlier FROM alarm "
        "WHERE firm_id = $1 AND raised > $2 AND suppression = 0 "
        "WINDOW source AS (PARTITION BY machine_id, position ORDER BY started)) AS activation "
        "GROUP BY machine_id, position HAVING bool_or(started - earlier < $4) ORDER BY n DESC, machine_id, position LIMIT $5",
        firm_id,
        since,
        CHATTER_ACTIVATIONS - 1,
        from_us(CHATTER_S * MICROSECONDS) - from_us(0),
        SOURCES_MAX,
    )
    stale = await connection.fetchval(
        "SELECT count(*) FROM alarm WHERE firm_id = $1 AND ended IS NULL AND NOT cleared AND suppression = 0 AND started < $2",
        firm_id,
        from_us(now_us - STALE_S * MICROSECONDS),
    )
    return Measures(
        hours=hours,
        alarms=alarms,
        alarms_by_severity=(totals["low"], totals["medium"], totals["high"]),
        alarms_10_minutes=totals["latest"],
        flooded=totals["latest"] > FLOOD_ALARMS,
        alarms_10_minutes_max=intervals["most"],
        flooded_intervals=intervals["flooded"],
        chattering=[_source(row, alarms) for row in chattering],
        stale=stale,
        worst_sources=[_source(row, alarms) for row in worst],
        worst_sources_share=sum(row["n"] for row in worst) / alarms if alarms else 0.0,
    )


def _source(row: asyncpg.Record, alarms: int) -> SourceMeasure:
    return SourceMeasure(
        machine_id=row["machine_id"],
        machine_path=row["machine_path"],
        signal_name=row["signal_name"],
        alarms=row["n"],
        share=row["n"] / alarms,
    )
