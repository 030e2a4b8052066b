"""SQL of retention: rules, what is to go, how much there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.ingest.domain import CHANNEL_GROUP
from services.ingest.retention.rules import ChunkSize, Rule, Store

LOCK_NAME = "smdih-ingest-retention"
RULES_LOCK_NAME = "smdih-ingest-retention-rules"


@dataclass(frozen=True)
class Group:
    """A channel group of a machine."""

    machine_id: int
    first_position: int


@dataclass(frozen=True)
class Run:
    started: datetime
    # None: it is running, or was cut off.
    finished: datetime | None
    chunks_dropped: int
    rows_removed: int
    problem: str | None


async def try_lock(connection: Connection) -> bool:
    """One process at a time; the lock lasts as long as the connection, or until `unlock`."""
    locked: bool = await connection.fetchval("SELECT pg_try_advisory_lock(hashtext($1))", LOCK_NAME)
    return locked


async def unlock(connection: Connection) -> None:
    await connection.execute("SELECT pg_advisory_unlock(hashtext($1))", LOCK_NAME)


async def rules(connection: Connection) -> dict[int, Rule]:
    """Of the firms that have anything of their own: a rule, or a quota of stored days."""
    rows = await connection.fetch(
        "SELECT firm_id, r.raw_days, r.minute_days, r.hour_days, coalesce(r.is_on_hold, false) AS is_on_hold, "
        "coalesce(r.reason, '') AS reason, q.stored_days AS quota_days "
        "FROM retention r FULL JOIN firm_quota q USING (firm_id) WHERE r.firm_id IS NOT NULL OR q.stored_days IS NOT NULL"
    )
    return {row["firm_id"]: Rule(**{name: value for name, value in row.items() if name != "firm_id"}) for row in rows}


async def keep_rules(connection: Connection) -> None:
    """Until the end of the transaction no rule is set: what was decided before it holds for what is removed in it."""
    await connection.execute("SELECT pg_advisory_xact_lock_shared(hashtext($1))", RULES_LOCK_NAME)


async def set_rule(connection: Connection, firm_id: int, rule: Rule, changed_by: int) -> None:
    """Waits for the step of removal that is running; the next one goes by this rule."""
    await connection.execute("SELECT pg_advisory_xact_lock(hashtext($1))", RULES_LOCK_NAME)
    await connection.execute(
        "INSERT INTO retention (firm_id, raw_days, minute_days, hour_days, is_on_hold, reason, changed_by) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (firm_id) DO UPDATE SET raw_days = excluded.raw_days, "
        "minute_days = excluded.minute_days, hour_days = excluded.hour_days, is_on_hold = excluded.is_on_hold, "
        "reason = excluded.reason, changed = now(), changed_by = excluded.changed_by",
        *(firm_id, rule.raw_days, rule.minute_days, rule.hour_days, rule.is_on_hold, rule.reason, changed_by),
    )


async def firm_ids(connection: Connection) -> list[int]:
    return [row["id"] for row in await connection.fetch("SELECT id FROM firm ORDER BY id")]


async def groups_page(connection: Connection, firm_id: int, after_machine_id: int, machines: int) -> list[Group]:
    """The channel groups of the firm's next machines, in order; firm_id 0: of all machines."""
    rows = await connection.fetch(
        "SELECT m.id, g.first_position FROM ("
        "  SELECT id FROM machine WHERE ($1 = 0 OR firm_id = $1) AND id > $2 ORDER BY id LIMIT $3"
        ") AS m, LATERAL (SELECT coalesce(max(position), 0) AS last FROM signal WHERE machine_id = m.id) AS s, "
        "generate_series(0, s.last / $4 * $4, $4) AS g (first_position) ORDER BY m.id, g.first_position",
        *(firm_id, after_machine_id, machines, CHANNEL_GROUP),
    )
    return [Group(row["id"], row["first_position"]) for row in rows]


async def chunks_before(
    connection: Connection, store: Store, cutoff_us: int, created_before: datetime
) -> list[tuple[datetime, datetime]]:
    """Ranges of the chunks that lie before the cutoff wholly and were made before that time, oldest first."""
    rows = await connection.fetch(
        "SELECT range_start, range_end FROM timescaledb_information.chunks WHERE hypertable_schema = current_schema() "
        "AND hypertable_name = $1 AND range_end <= $2 AND chunk_creation_time < $3 ORDER BY range_end",
        *(store.table, from_us(cutoff_us), created_before),
    )
    return [(row["range_start"], row["range_end"]) for row in rows]


_HOLDS_LOADED = """
SELECT EXISTS (SELECT FROM history_load h WHERE h.oldest < $2 AND EXISTS (
    SELECT FROM {table} t WHERE t.machine_id = h.machine_id AND t.ts >= h.oldest AND t.ts >= $1 AND t.ts < $2
))
"""


async def holds_loaded(connection: Connection, store: Store, start: datetime, end: datetime) -> bool:
    """Whether a range holds rows of machines whose loaded history reaches back to them.

    Until the transaction ends nothing more is written to it.
    """
    await connection.execute("SELECT lock_stored($1, $2, $3)", store.table, start, end)
    found: bool = await connection.fetchval(_HOLDS_LOADED.format(table=store.table), start, end)
    return found


async def settled_until(connection: Connection, machine_id: int, cutoff: datetime) -> datetime:
    """The cutoff, or the hour of the oldest history that was loaded a short while ago, if that is before it."""
    found: datetime = await connection.fetchval(
        "SELECT least($2::timestamptz, public.time_bucket(INTERVAL '1 hour', (SELECT min(oldest) FROM history_load "
        "WHERE machine_id = $1)))",
        *(machine_id, cutoff),
    )
    return found


async def drop_chunks(connection: Connection, store: Store, start: datetime, end: datetime) -> int:
    """Those of a range."""
    dropped: int = await connection.fetchval("SELECT drop_stored($1, $2, $3)", store.table, start, end)
    return dropped


_CLOSE = """
INSERT INTO {table} (machine_id, first_position, ts, counts, sums, mins, maxs, lasts)
SELECT g.machine_id, g.first_position, b.ts, b.counts, b.sums, b.mins, b.maxs, b.lasts
FROM unnest($1::bigint[], $2::int[]) AS g (machine_id, first_position),
LATERAL (
    SELECT f.ts FROM frame f WHERE f.machine_id = g.machine_id AND f.first_position = g.first_position ORDER BY f.ts DESC LIMIT 1
) AS newest,
LATERAL (SELECT public.time_bucket({width}, newest.ts) AS ts) AS open,
LATERAL buckets_from_frames(g.machine_id, g.first_position, open.ts, open.ts + {width}, {width}) AS b
WHERE newest.ts < $3
ON CONFLICT (machine_id, first_position, ts) DO UPDATE SET
    counts = excluded.counts, sums = excluded.sums, mins = excluded.mins, maxs = excluded.maxs, lasts = excluded.lasts
WHERE total(excluded.counts) >= total({table}.counts)
"""


async def close_buckets(connection: Connection, groups: Sequence[Group], cutoff: datetime) -> None:
    """Store the open buckets of those whose frames all lie before the cutoff: they are made from frames that are about to go."""
    machine_ids, first_positions = [g.machine_id for g in groups], [g.first_position for g in groups]
    for table, width in (("rollup_1m", "INTERVAL '1 minute'"), ("rollup_1h", "INTERVAL '1 hour'")):
        await connection.execute(_CLOSE.format(table=table, width=width), machine_ids, first_positions, cutoff)


_REMOVE = """
WITH bound AS (
    SELECT coalesce((
        SELECT ts FROM {table} WHERE machine_id = $1 AND first_position = $2 AND ts < $3 ORDER BY ts OFFSET $4 LIMIT 1
    ), $3) AS ts
)
DELETE FROM {table} t USING bound WHERE t.machine_id = $1 AND t.first_position = $2 AND t.ts < bound.ts AND t.ts < $3
AND NOT EXISTS (SELECT FROM history_load h WHERE h.machine_id = $1 AND t.ts >= public.time_bucket(INTERVAL '1 hour', h.oldest))
"""


async def remove_rows(connection: Connection, store: Store, group: Group, cutoff: datetime, limit: int) -> int:
    """Remove at most `limit` of the group's rows before the cutoff, oldest first; how many there were."""
    status = await connection.execute(
        _REMOVE.format(table=store.table), group.machine_id, group.first_position, cutoff, limit
    )
    return int(status.rpartition(" ")[2])


async def remove_quarantined(connection: Connection, firm_id: int, cutoff: datetime, limit: int) -> int:
    """Remove at most `limit` of the firm's items received before the cutoff; how many there were."""
    status = await connection.execute(
        "DELETE FROM quarantine WHERE id = ANY(ARRAY("
        "  SELECT id FROM quarantine WHERE firm_id = $1 AND received < $2 ORDER BY received LIMIT $3"
        "))",
        *(firm_id, cutoff, limit),
    )
    return int(status.rpartition(" ")[2])


async def begin_run(connection: Connection, now_us: int, settled_before: datetime) -> int:
    """Also forgets what history was loaded before that time, runs older than a year, and doors that wrote their last record
    long before the message log forgot it.
    """
    await connection.execute("DELETE FROM history_load WHERE loaded < $1", settled_before)
    await connection.execute(
        "DELETE FROM door_numbers WHERE missing = 0 AND noted < $1::timestamptz - INTERVAL '30 days'", from_us(now_us)
    )
    await connection.execute(
        "DELETE FROM retention_run WHERE started < $1::timestamptz - INTERVAL '1 year'", from_us(now_us)
    )
    run_id: int = await connection.fetchval(
        "INSERT INTO retention_run (started) VALUES ($1) RETURNING id", from_us(now_us)
    )
    return run_id


async def note_run(
    connection: Connection, run_id: int, *, chunks: int, rows: int, finished_us: int | None, problem: str | None
) -> None:
    await connection.execute(
        "UPDATE retention_run SET chunks_dropped = $2, rows_removed = $3, finished = $4, problem = $5 WHERE id = $1",
        *(run_id, chunks, rows, None if finished_us is None else from_us(finished_us), problem),
    )


async def last_runs(connection: Connection, limit: int) -> list[Run]:
    rows = await connection.fetch(
        "SELECT started, finished, chunks_dropped, rows_removed, problem FROM retention_run ORDER BY id DESC LIMIT $1",
        limit,
    )
    return [Run(**dict(row)) for row in rows]


async def chunk_sizes(connection: Connection, store: Store) -> list[ChunkSize]:
    rows = await connection.fetch(
        "SELECT range_start, range_end, pg_total_relation_size(format('%I.%I', chunk_schema, chunk_name)::regclass) AS size "
        "FROM timescaledb_information.chunks WHERE hypertable_schema = current_schema() AND hypertable_name = $1",
        store.table,
    )
    return [ChunkSize(to_us(row["range_start"]), to_us(row["range_end"]), row["size"]) for row in rows]


async def quarantine_size(connection: Connection, since: datetime) -> tuple[int, int]:
    """Bytes of the quarantine's table, and how many of those that stand there came since the beginning of that day."""
    row = await connection.fetchrow(
        "SELECT pg_total_relation_size('quarantine') AS size, coalesce((SELECT sum(bytes) FROM quarantine_day "
        "WHERE day >= ($1::timestamptz AT TIME ZONE 'UTC')::date), 0)::bigint AS came",
        since,
    )
    assert row is not None
    return row["size"], row["came"]


async def first_machine_us(connection: Connection) -> int | None:
    """When the hub began to have something to store."""
    created: datetime | None = await connection.fetchval("SELECT min(created) FROM machine")
    return None if created is None else to_us(created)


async def database_bytes(connection: Connection) -> int:
    size: int = await connection.fetchval("SELECT pg_database_size(current_database())")
    return size
