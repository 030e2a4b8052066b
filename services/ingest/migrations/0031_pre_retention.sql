-- How long a firm's data are kept; NULL: as long as the hub keeps everybody's. On hold nothing is removed.
CREATE TABLE retention (
    firm_id bigint PRIMARY KEY REFERENCES firm,
    raw_days int CHECK (raw_days > 0),
    minute_days int CHECK (minute_days > 0),
    hour_days int CHECK (hour_days > 0),
    is_on_hold boolean NOT NULL,
    reason text NOT NULL,
    changed timestamptz NOT NULL DEFAULT now(),
    changed_by bigint NOT NULL
);

-- What was removed when.
CREATE TABLE retention_run (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    started timestamptz NOT NULL,
    finished timestamptz,
    chunks_dropped int NOT NULL DEFAULT 0,
    rows_removed bigint NOT NULL DEFAULT 0,
    problem text
);

CREATE FUNCTION total(counts int[]) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(sum(n), 0)::bigint FROM unnest(counts) AS n
$$;

-- Buckets outlive the frames that they were made from: what is stored counts up to its end, the frames only behind it.
CREATE OR REPLACE FUNCTION buckets_1m(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    WITH newest AS MATERIALIZED (
        SELECT coalesce(greatest(
            (SELECT public.time_bucket(INTERVAL '1 minute', f.ts) FROM frame f
             WHERE f.machine_id = machine AND f.first_position = first_pos ORDER BY f.ts DESC LIMIT 1),
            (SELECT c.ts + INTERVAL '1 minute' FROM rollup_1m c
             WHERE c.machine_id = machine AND c.first_position = first_pos ORDER BY c.ts DESC LIMIT 1)), 'infinity') AS opened
    )
    SELECT r.ts, r.counts, r.sums, r.mins, r.maxs, r.lasts FROM rollup_1m r, newest
    WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < least(to_ts, newest.opened)
    UNION ALL
    SELECT b.* FROM newest, buckets_from_frames(machine, first_pos, greatest(from_ts, newest.opened), to_ts, INTERVAL '1 minute') b
$$;

CREATE OR REPLACE FUNCTION buckets_1h(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    WITH newest AS MATERIALIZED (
        SELECT coalesce(greatest(
            (SELECT public.time_bucket(INTERVAL '1 hour', f.ts) FROM frame f
             WHERE f.machine_id = machine AND f.first_position = first_pos ORDER BY f.ts DESC LIMIT 1),
            (SELECT c.ts + INTERVAL '1 hour' FROM rollup_1h c
             WHERE c.machine_id = machine AND c.first_position = first_pos ORDER BY c.ts DESC LIMIT 1)), 'infinity') AS opened
    )
    SELECT r.ts, r.counts, r.sums, r.mins, r.maxs, r.lasts FROM rollup_1h r, newest
    WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < least(to_ts, newest.opened)
    UNION ALL
    SELECT b.* FROM newest, buckets_from_frames(machine, first_pos, greatest(from_ts, newest.opened), to_ts, INTERVAL '1 hour') b
$$;
