-- What Grafana's shop-floor dashboard reads, and nothing else: narrow rows, filtered by firm. Its logins get the role smdih_reader.
-- A login named smdih_firm_<id> sees that firm, whatever it sets; any other sees the firm that its setting smdih.firm_id names,
-- or all of them where that is 'all' (ALTER ROLE ... SET smdih.firm_id), or nothing.
CREATE SCHEMA IF NOT EXISTS shopfloor;

DO $$
BEGIN
    CREATE ROLE smdih_reader NOLOGIN;
EXCEPTION
    WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END
$$;

-- The firm whose rows may be read; 0: all; NULL: none.
CREATE OR REPLACE FUNCTION shopfloor.reader_firm() RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN session_user ~ '^smdih_firm_' THEN substring(session_user FROM '^smdih_firm_([0-9]{1,18})$')::bigint
        WHEN current_setting('smdih.firm_id', true) = 'all' THEN 0
        WHEN current_setting('smdih.firm_id', true) ~ '^[0-9]{1,18}$' THEN current_setting('smdih.firm_id', true)::bigint
    END
$$;

CREATE VIEW shopfloor.firm WITH (security_barrier) AS
    SELECT f.id AS firm_id, f.name FROM firm f
    WHERE (SELECT shopfloor.reader_firm()) IN (0, f.id);

CREATE VIEW shopfloor.machine WITH (security_barrier) AS
    SELECT m.id AS machine_id, m.firm_id, m.path, m.name, m.kind, s.name AS site, s.timezone, seen.received, seen.newest
    FROM machine m JOIN site s ON s.id = m.site_id LEFT JOIN machine_seen seen ON seen.machine_id = m.id
    WHERE (SELECT shopfloor.reader_firm()) IN (0, m.firm_id);

CREATE VIEW shopfloor.signal WITH (security_barrier) AS
    SELECT s.id AS signal_id, s.machine_id, s.firm_id, s.name, s.unit FROM signal s
    WHERE (SELECT shopfloor.reader_firm()) IN (0, s.firm_id);

-- Closed minutes; the one that is still open is not here.
CREATE VIEW shopfloor.minute WITH (security_barrier) AS
    SELECT s.id AS signal_id, s.machine_id, s.firm_id, r.ts, r.counts[p.i] AS samples, r.sums[p.i] / r.counts[p.i] AS mean,
           r.mins[p.i] AS min, r.maxs[p.i] AS max, r.lasts[p.i] AS last
    FROM signal s
    CROSS JOIN LATERAL (SELECT s.position % 200 + 1 AS i, s.position / 200 * 200 AS first) AS p
    JOIN rollup_1m r ON r.machine_id = s.machine_id AND r.first_position = p.first
    WHERE (SELECT shopfloor.reader_firm()) IN (0, s.firm_id) AND r.counts[p.i] > 0;

CREATE VIEW shopfloor.latest WITH (security_barrier) AS
    SELECT s.id AS signal_id, s.machine_id, s.firm_id, s.name, s.unit, newest.ts, newest.value
    FROM signal s
    CROSS JOIN LATERAL (SELECT s.position % 200 + 1 AS i, s.position / 200 * 200 AS first) AS p
    CROSS JOIN LATERAL (
        SELECT f.ts, f.values[p.i] AS value FROM frame f
        WHERE f.machine_id = s.machine_id AND f.first_position = p.first AND f.values[p.i] IS NOT NULL
        ORDER BY f.ts DESC LIMIT 1
    ) AS newest
    WHERE (SELECT shopfloor.reader_firm()) IN (0, s.firm_id);

-- The signals that figures are made of: as the settings say, else the only one of its kind, as in docs/kpi.md.
CREATE VIEW shopfloor.role WITH (security_barrier) AS
    WITH setting AS (
        SELECT DISTINCT ON (machine_id) machine_id, settings FROM kpi_setting ORDER BY machine_id, revision DESC
    ), asked (role, units) AS (
        VALUES ('power', ARRAY['W', 'kW', 'MW']), ('energy', ARRAY['Wh', 'kWh', 'MWh']), ('total_count', NULL), ('good_count', NULL)
    )
    SELECT m.id AS machine_id, m.firm_id, asked.role, s.id AS signal_id,
           CASE s.unit WHEN 'W' THEN 0.001 WHEN 'Wh' THEN 0.001 WHEN 'MW' THEN 1000 WHEN 'MWh' THEN 1000 ELSE 1 END::float8 AS factor,
           (setting.settings ->> 'off_below')::float8 AS off_below, (setting.settings ->> 'working_from')::float8 AS working_from,
           (setting.settings ->> 'ideal_cycle_s')::float8 AS ideal_cycle_s
    FROM machine m
    CROSS JOIN asked
    LEFT JOIN setting ON setting.machine_id = m.id
    CROSS JOIN LATERAL (
        SELECT (setting.settings ->> (asked.role || '_signal_id'))::bigint AS id
    ) AS said
    JOIN signal s ON s.machine_id = m.id AND (
        s.id = said.id
        OR coalesce(said.id, 0) = 0 AND s.unit = ANY (asked.units)
            AND (SELECT count(*) FROM signal o WHERE o.machine_id = m.id AND o.unit = ANY (asked.units)) = 1
    )
    WHERE (SELECT shopfloor.reader_firm()) IN (0, m.firm_id);

DO $$
BEGIN
    GRANT USAGE ON SCHEMA shopfloor TO smdih_reader;
    GRANT SELECT ON ALL TABLES IN SCHEMA shopfloor TO smdih_reader;
EXCEPTION
    WHEN undefined_object THEN NULL;
END
$$;
