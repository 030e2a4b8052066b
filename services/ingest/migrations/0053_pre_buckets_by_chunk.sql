-- A bucket that is made anew among many others looked into every chunk of its source. With bounds that are constants in the
-- statement, lo <= ts < hi, the planner leaves out the chunks beside them.
CREATE FUNCTION buckets_from_frames(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz, width interval,
                                    lo timestamptz, hi timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    SELECT bucket, array_agg(n ORDER BY i), array_agg(s ORDER BY i), array_agg(lowest ORDER BY i), array_agg(highest ORDER BY i),
           array_agg(la ORDER BY i)
    FROM (
        SELECT public.time_bucket(width, f.ts) AS bucket, u.i, count(u.v)::int AS n,
               coalesce(sum(least(greatest(u.v, -1e280), 1e280)) FILTER (WHERE u.v IS NOT NULL), 0) AS s,
               min(u.v) AS lowest, max(u.v) AS highest,
               (array_agg(u.v ORDER BY f.ts DESC) FILTER (WHERE u.v IS NOT NULL))[1] AS la
        FROM frame f, unnest(f.values) WITH ORDINALITY AS u (v, i)
        WHERE f.machine_id = machine AND f.first_position = first_pos AND f.ts >= from_ts AND f.ts < to_ts
          AND f.ts >= lo AND f.ts < hi
        GROUP BY bucket, u.i
    ) AS cells
    GROUP BY bucket
$$;

CREATE FUNCTION hours_from_minutes(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz, lo timestamptz, hi timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    SELECT bucket, array_agg(n ORDER BY i), array_agg(s ORDER BY i), array_agg(lowest ORDER BY i), array_agg(highest ORDER BY i),
           array_agg(la ORDER BY i)
    FROM (
        SELECT public.time_bucket(INTERVAL '1 hour', r.ts) AS bucket, u.i, sum(u.n)::int AS n, sum(u.s) AS s,
               min(u.lowest) AS lowest, max(u.highest) AS highest,
               (array_agg(u.la ORDER BY r.ts DESC) FILTER (WHERE u.n > 0))[1] AS la
        FROM rollup_1m r, unnest(r.counts, r.sums, r.mins, r.maxs, r.lasts) WITH ORDINALITY AS u (n, s, lowest, highest, la, i)
        WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < to_ts
          AND r.ts >= lo AND r.ts < hi
        GROUP BY bucket, u.i
    ) AS cells
    GROUP BY bucket
$$;
