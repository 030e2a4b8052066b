"""Whether the rollups say what the frames under them say: the only place where a sample that was counted twice can be seen.

The frames themselves have a unique key, so a second copy of one never stands beside the first.
"""

from collections.abc import Sequence
from typing import Any

from chaos.stage import Outcome

# Buckets that more may come into are not judged. Sums are of eighths: exact.
_COMPARED = """
WITH newest AS (
    SELECT machine_id, date_trunc('{unit}', max(ts)) AS open FROM ingest.frame WHERE machine_id = ANY($1) GROUP BY machine_id
), raw AS (
    SELECT f.machine_id, f.first_position + u.i AS position, date_trunc('{unit}', f.ts) AS ts, count(u.v) AS n, sum(u.v) AS total,
           min(u.v) AS least, max(u.v) AS most, public.last(u.v, f.ts) AS newest
    FROM ingest.frame f, unnest(f.values) WITH ORDINALITY AS u (v, i)
    WHERE f.machine_id = ANY($1) AND u.v IS NOT NULL GROUP BY 1, 2, 3
), rolled AS (
    SELECT r.machine_id, r.first_position + u.i AS position, r.ts, u.n, u.total, u.least, u.most, u.newest
    FROM ingest.{table} r, unnest(r.counts, r.sums, r.mins, r.maxs, r.lasts) WITH ORDINALITY AS u (n, total, least, most, newest, i)
    WHERE r.machine_id = ANY($1) AND u.n > 0
)
SELECT count(*) AS cells,
       count(*) FILTER (WHERE (raw.n, raw.total, raw.least, raw.most, raw.newest)
           IS DISTINCT FROM (rolled.n::bigint, rolled.total, rolled.least, rolled.most, rolled.newest)) AS different,
       coalesce(sum(greatest(rolled.n - coalesce(raw.n, 0), 0)), 0)::bigint AS twice
FROM raw FULL JOIN rolled USING (machine_id, position, ts) JOIN newest USING (machine_id)
WHERE ts < newest.open
"""
_TABLES = {"minute": "rollup_1m", "hour": "rollup_1h"}
# One more in the oldest bucket of one machine: what a frame that was taken twice would leave behind.
_COUNT_ONE_TWICE = """
UPDATE ingest.{table} SET counts[1] = counts[1] + 1
WHERE (machine_id, first_position, ts) = (
    SELECT machine_id, first_position, ts FROM ingest.{table} WHERE machine_id = ANY($1) AND counts[1] > 0 ORDER BY ts LIMIT 1
)
"""


async def judge(database: Any, machine_ids: Sequence[int], outcome: Outcome) -> None:
    """Compare count, sum, least, greatest and last of every signal in every closed minute and hour."""
    for unit, table in _TABLES.items():
        compared = _COMPARED.format(unit=unit, table=table)
        found = await database.fetchrow(compared, machine_ids)
        name = f"{unit}_cells"
        outcome.detail[name] = outcome.detail.get(name, 0) + found["cells"]
        outcome.duplicated += found["twice"]
        if found["different"]:
            outcome.broken.append(f"{found['different']} of {found['cells']} cells of the {unit}s are not right")
        if not found["cells"]:
            continue
        transaction = database.transaction()
        await transaction.start()
        try:
            await database.execute(_COUNT_ONE_TWICE.format(table=table), machine_ids)
            seen = await database.fetchrow(compared, machine_ids)
            if seen["twice"] != found["twice"] + 1:
                outcome.broken.append(f"the judge does not see a sample counted twice in {table}")
        finally:
            await transaction.rollback()
