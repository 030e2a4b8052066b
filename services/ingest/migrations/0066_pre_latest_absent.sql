-- As before, but the signals in `absent` (by place) are looked for in the newest frames only: whoever asks knows that a short while
-- ago nothing was to be found of them, and looking for what is nowhere is what takes long.
CREATE FUNCTION latest_values(machine bigint, first_pos int, width int, absent int[])
RETURNS TABLE (i int, ts timestamptz, v float8) LANGUAGE sql STABLE AS $$
    WITH newest AS MATERIALIZED (
        SELECT DISTINCT ON (u.i) u.i, f.ts, u.v FROM (
            SELECT f.ts, f.values FROM frame f WHERE f.machine_id = machine AND f.first_position = first_pos
            ORDER BY f.ts DESC LIMIT 100
        ) AS f, unnest(f.values) WITH ORDINALITY AS u (v, i) WHERE u.v IS NOT NULL ORDER BY u.i, f.ts DESC
    ),
    in_minute AS MATERIALIZED (
        SELECT DISTINCT ON (u.i) u.i, f.ts, u.v FROM (
            SELECT f.ts, f.values FROM frame f WHERE f.machine_id = machine AND f.first_position = first_pos
            AND f.ts >= (SELECT public.time_bucket(INTERVAL '1 minute', max(n.ts)) FROM newest n)
            AND (SELECT count(*) FROM newest n WHERE n.i <> ALL (absent)) < width - cardinality(absent)
            ORDER BY f.ts DESC OFFSET 100 LIMIT 6000
        ) AS f, unnest(f.values) WITH ORDINALITY AS u (v, i)
        WHERE u.v IS NOT NULL AND u.i <> ALL (absent) AND u.i NOT IN (SELECT n.i FROM newest n) ORDER BY u.i, f.ts DESC
    ),
    in_frames AS MATERIALIZED (SELECT n.i, n.ts, n.v FROM newest n UNION ALL SELECT m.i, m.ts, m.v FROM in_minute m),
    minutes AS MATERIALIZED (
        SELECT u.i, max(r.ts) AS ts FROM (
            SELECT r.ts, r.counts FROM rollup_1m r WHERE r.machine_id = machine AND r.first_position = first_pos
            AND (SELECT count(*) FROM in_frames s WHERE s.i <> ALL (absent)) < width - cardinality(absent)
            ORDER BY r.ts DESC LIMIT 60
        ) AS r, unnest(r.counts) WITH ORDINALITY AS u (n, i)
        WHERE u.n > 0 AND u.i <> ALL (absent) AND u.i NOT IN (SELECT s.i FROM in_frames s) GROUP BY u.i
    ),
    hours AS MATERIALIZED (
        SELECT u.i, max(r.ts) AS ts FROM (
            SELECT r.ts, r.counts FROM rollup_1h r WHERE r.machine_id = machine AND r.first_position = first_pos
            AND (SELECT count(*) FROM in_frames s WHERE s.i <> ALL (absent)) + (SELECT count(*) FROM minutes)
                < width - cardinality(absent)
            ORDER BY r.ts DESC LIMIT 744
        ) AS r, unnest(r.counts) WITH ORDINALITY AS u (n, i)
        WHERE u.n > 0 AND u.i <> ALL (absent) AND u.i NOT IN (SELECT s.i FROM in_frames s UNION ALL SELECT m.i FROM minutes m) GROUP BY u.i
    ),
    buckets AS (
        SELECT m.i, m.ts AS minute, NULL::timestamptz AS hour FROM minutes m
        UNION ALL
        SELECT h.i, m.ts, h.ts FROM hours h LEFT JOIN LATERAL (
            SELECT r.ts FROM rollup_1m r WHERE r.machine_id = machine AND r.first_position = first_pos
            AND r.ts >= h.ts AND r.ts < h.ts + INTERVAL '1 hour' AND r.counts[h.i] > 0 ORDER BY r.ts DESC LIMIT 1
        ) AS m ON true
    )
    SELECT s.i::int, s.ts, s.v FROM in_frames s WHERE s.i <= width
    UNION ALL
    SELECT b.i::int, found.ts, found.v FROM buckets b, LATERAL (
        SELECT one.ts, one.v FROM (
            (SELECT 1 AS choice, f.ts, f.values[b.i] AS v FROM frame f
             WHERE f.machine_id = machine AND f.first_position = first_pos
             AND f.ts >= b.minute AND f.ts < b.minute + INTERVAL '1 minute' AND f.values[b.i] IS NOT NULL
             ORDER BY f.ts DESC LIMIT 1)
            UNION ALL
            SELECT 2, r.ts, r.lasts[b.i] FROM rollup_1m r
            WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts = b.minute
            UNION ALL
            SELECT 3, r.ts, r.lasts[b.i] FROM rollup_1h r
            WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts = b.hour
        ) AS one ORDER BY one.choice LIMIT 1
    ) AS found WHERE b.i <= width
$$;

CREATE OR REPLACE FUNCTION latest_values(machine bigint, first_pos int, width int)
RETURNS TABLE (i int, ts timestamptz, v float8) LANGUAGE sql STABLE AS $$
    SELECT l.i, l.ts, l.v FROM latest_values(machine, first_pos, width, '{}') l
$$;
