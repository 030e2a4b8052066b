CREATE EXTENSION IF NOT EXISTS timescaledb WITH SCHEMA public;

-- Registry ------------------------------------------------------------------------------------------------------------

CREATE TABLE firm (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL,
    slug text NOT NULL CONSTRAINT firm_slug_key UNIQUE,
    sic text NOT NULL,
    region text NOT NULL,
    size text NOT NULL CHECK (size IN ('micro', 'small', 'medium', 'large')),
    created timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE partner (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text NOT NULL CONSTRAINT partner_name_key UNIQUE,
    region text NOT NULL,
    created timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE site (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    firm_id bigint NOT NULL REFERENCES firm,
    slug text NOT NULL,
    name text NOT NULL,
    timezone text NOT NULL,
    created timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT site_firm_id_slug_key UNIQUE (firm_id, slug)
);

CREATE TABLE machine (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    firm_id bigint NOT NULL REFERENCES firm,
    site_id bigint NOT NULL REFERENCES site,
    path text NOT NULL CONSTRAINT machine_path_key UNIQUE,
    name text NOT NULL,
    kind text NOT NULL,
    created timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX machine_firm_id_idx ON machine (firm_id, id);

CREATE TABLE signal (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    firm_id bigint NOT NULL REFERENCES firm,
    machine_id bigint NOT NULL REFERENCES machine,
    position int NOT NULL CHECK (position >= 0),   -- appended only, never reused
    name text NOT NULL,
    unit text NOT NULL,
    range_min float8,
    range_max float8,
    CONSTRAINT signal_machine_id_position_key UNIQUE (machine_id, position),
    CONSTRAINT signal_machine_id_name_key UNIQUE (machine_id, name),
    CONSTRAINT signal_range_check CHECK (range_min < range_max)
);

CREATE TABLE credential (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    prefix text NOT NULL,
    sha256 bytea NOT NULL CONSTRAINT credential_sha256_key UNIQUE,
    role text NOT NULL CHECK (role IN ('device', 'firm', 'partner', 'operator')),
    firm_id bigint REFERENCES firm,
    partner_id bigint REFERENCES partner,
    label text NOT NULL,
    valid_from timestamptz NOT NULL,
    valid_to timestamptz,
    revoked timestamptz,
    created timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT credential_belongs_check CHECK (
        (role IN ('device', 'firm')) = (firm_id IS NOT NULL) AND (role = 'partner') = (partner_id IS NOT NULL)
    )
);

-- Telemetry -----------------------------------------------------------------------------------------------------------

-- One row a frame: one machine, one time, the values of one run of 200 signal positions (so that a row stays below
-- PostgreSQL's out-of-line limit); NULL: no value.
CREATE TABLE frame (
    machine_id bigint NOT NULL,
    first_position int NOT NULL,
    ts timestamptz NOT NULL,
    values float8[] NOT NULL
);
SELECT public.create_hypertable('frame', public.by_range('ts', INTERVAL '7 days'), create_default_indexes => false);
CREATE UNIQUE INDEX frame_machine_id_first_position_ts_key ON frame (machine_id, first_position, ts);

-- Closed buckets. The bucket that holds a machine's newest frame is open: the views below compute it from the frames.
CREATE TABLE rollup_1m (
    machine_id bigint NOT NULL,
    first_position int NOT NULL,
    ts timestamptz NOT NULL,
    counts int[] NOT NULL,
    sums float8[] NOT NULL,
    mins float8[] NOT NULL,
    maxs float8[] NOT NULL,
    lasts float8[] NOT NULL
);
SELECT public.create_hypertable('rollup_1m', public.by_range('ts', INTERVAL '30 days'), create_default_indexes => false);
CREATE UNIQUE INDEX rollup_1m_machine_id_first_position_ts_key ON rollup_1m (machine_id, first_position, ts);

CREATE TABLE rollup_1h (LIKE rollup_1m);
SELECT public.create_hypertable('rollup_1h', public.by_range('ts', INTERVAL '365 days'), create_default_indexes => false);
CREATE UNIQUE INDEX rollup_1h_machine_id_first_position_ts_key ON rollup_1h (machine_id, first_position, ts);

-- Merge of two deliveries of one frame: the first argument wins where it has a value.
CREATE FUNCTION merged(wins float8[], other float8[]) RETURNS float8[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT array_agg(coalesce(w, o) ORDER BY i) FROM unnest(wins, other) WITH ORDINALITY AS both_arrays (w, o, i)
$$;

-- The buckets of one machine and channel group over a time range, made from its frames.
CREATE FUNCTION buckets_from_frames(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz, width interval)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    SELECT bucket, array_agg(n ORDER BY i), array_agg(s ORDER BY i), array_agg(lo ORDER BY i), array_agg(hi ORDER BY i),
           array_agg(la ORDER BY i)
    FROM (
        SELECT public.time_bucket(width, f.ts) AS bucket, u.i, count(u.v)::int AS n, coalesce(sum(u.v), 0) AS s,
               min(u.v) AS lo, max(u.v) AS hi, (array_agg(u.v ORDER BY f.ts DESC) FILTER (WHERE u.v IS NOT NULL))[1] AS la
        FROM frame f, unnest(f.values) WITH ORDINALITY AS u (v, i)
        WHERE f.machine_id = machine AND f.first_position = first_pos AND f.ts >= from_ts AND f.ts < to_ts
        GROUP BY bucket, u.i
    ) AS cells
    GROUP BY bucket
$$;

-- How far each sender has come, so that what it sends again is recognised.
CREATE TABLE source_head (
    firm_id bigint NOT NULL,
    source text NOT NULL,
    partition int NOT NULL,
    sequence numeric(20) NOT NULL,
    PRIMARY KEY (partition, firm_id, source)
);

CREATE TABLE quarantine (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    credential_id bigint NOT NULL,
    source text NOT NULL,
    door text NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL,
    samples bigint NOT NULL,
    received timestamptz NOT NULL,
    correlation_id text NOT NULL,
    batch bytea,
    raw bytea,
    replayed timestamptz
);
CREATE INDEX quarantine_firm_id_received_idx ON quarantine (firm_id, received DESC, id);

-- For people and dashboards: narrow rows, of the firm named by the setting smdih.firm_id only. Nobody but the services
-- has rights on the tables below it.
CREATE VIEW samples WITH (security_barrier) AS
    SELECT s.id AS signal_id, f.ts, f.values[s.position % 200 + 1] AS value
    FROM signal s JOIN frame f ON f.machine_id = s.machine_id AND f.first_position = s.position / 200 * 200
    WHERE s.firm_id = NULLIF(current_setting('smdih.firm_id', true), '')::bigint
      AND f.values[s.position % 200 + 1] IS NOT NULL;

-- All buckets over a time range: the closed ones as stored, the open one made from its frames.
CREATE FUNCTION buckets_1m(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    WITH newest AS MATERIALIZED (
        SELECT public.time_bucket(INTERVAL '1 minute', f.ts) AS opened FROM frame f
        WHERE f.machine_id = machine AND f.first_position = first_pos ORDER BY f.ts DESC LIMIT 1
    )
    SELECT r.ts, r.counts, r.sums, r.mins, r.maxs, r.lasts FROM rollup_1m r, newest
    WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < least(to_ts, newest.opened)
    UNION ALL
    SELECT b.* FROM newest, buckets_from_frames(machine, first_pos, greatest(from_ts, newest.opened), to_ts, INTERVAL '1 minute') b
$$;

CREATE FUNCTION buckets_1h(machine bigint, first_pos int, from_ts timestamptz, to_ts timestamptz)
RETURNS TABLE (ts timestamptz, counts int[], sums float8[], mins float8[], maxs float8[], lasts float8[])
LANGUAGE sql STABLE AS $$
    WITH newest AS MATERIALIZED (
        SELECT public.time_bucket(INTERVAL '1 hour', f.ts) AS opened FROM frame f
        WHERE f.machine_id = machine AND f.first_position = first_pos ORDER BY f.ts DESC LIMIT 1
    )
    SELECT r.ts, r.counts, r.sums, r.mins, r.maxs, r.lasts FROM rollup_1h r, newest
    WHERE r.machine_id = machine AND r.first_position = first_pos AND r.ts >= from_ts AND r.ts < least(to_ts, newest.opened)
    UNION ALL
    SELECT b.* FROM newest, buckets_from_frames(machine, first_pos, greatest(from_ts, newest.opened), to_ts, INTERVAL '1 hour') b
$$;
