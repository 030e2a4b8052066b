-- The hours of one machine and channel group over a time range, made from its closed minutes: sixty rows an hour where the frames
-- may be thousands.
CREATE FUNCTION hours_from_minutes(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    SELECT bucket, array_agg(n ORDER BY i), array_agg(s ORDER BY i), array_agg(lo ORDER BY i), array_agg(hi ORDER BY i),
           array_agg(la ORDER BY i)
    FROM (
        SELECT public.time_bucket(INTERVAL '1 hour', r.ts) AS bucket, u.i, sum(u.n)::int AS n, sum(u.s) AS s,
               min(u.lo) AS lo, max(u.hi) AS hi, (array_agg(u.la ORDER BY r.ts DESC) FILTER (WHERE u.n > 0))[1] AS la
        FROM rollup_1m r, unnest(r.counts, r.sums, r.mins, r.maxs, r.lasts) WITH ORDINALITY AS u (n, s, lo, hi, la, i)
        WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < to_ts
        GROUP BY bucket, u.i
    ) AS cells
    GROUP BY bucket
$$;
