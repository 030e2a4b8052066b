-- Two finite values may have a sum that no float8 holds, and sum() then raises: one such minute would stop the historian for good.
-- Values beyond 1e280 count as that in sums; least, greatest and last are as they were sent.
CREATE OR REPLACE FUNCTION buckets_from_frames(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz, width interval)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    SELECT bucket, array_agg(n ORDER BY i), array_agg(s ORDER BY i), array_agg(lo ORDER BY i), array_agg(hi ORDER BY i),
           array_agg(la ORDER BY i)
    FROM (
        SELECT public.time_bucket(width, f.ts) AS bucket, u.i, count(u.v)::int AS n,
               coalesce(sum(least(greatest(u.v, -1e280), 1e280)) FILTER (WHERE u.v IS NOT NULL), 0) AS s,
               min(u.v) AS lo, max(u.v) AS hi, (array_agg(u.v ORDER BY f.ts DESC) FILTER (WHERE u.v IS NOT NULL))[1] AS la
        FROM frame f, unnest(f.values) WITH ORDINALITY AS u (v, i)
        WHERE f.machine_id = machine AND f.first_position = first_pos AND f.ts >= from_ts AND f.ts < to_ts
        GROUP BY bucket, u.i
    ) AS cells
    GROUP BY bucket
$$;
