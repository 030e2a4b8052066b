-- What Grafana's shop-floor dashboard reads of alarms; whose they are is decided as in the other views of the schema shopfloor.
CREATE SCHEMA IF NOT EXISTS shopfloor;

DO $$
BEGIN
    CREATE ROLE smdih_reader NOLOGIN;
EXCEPTION
    WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END
$$;

CREATE OR REPLACE FUNCTION shopfloor.reader_firm() RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN session_user ~ '^smdih_firm_' THEN substring(session_user FROM '^smdih_firm_([0-9]{1,18})$')::bigint
        WHEN current_setting('smdih.firm_id', true) = 'all' THEN 0
        WHEN current_setting('smdih.firm_id', true) ~ '^[0-9]{1,18}$' THEN current_setting('smdih.firm_id', true)::bigint
    END
$$;

-- Those that are on the list: not shelved, not in maintenance, not out of service.
CREATE VIEW shopfloor.alarm WITH (security_barrier) AS
    SELECT a.id AS alarm_id, a.firm_id, a.machine_id, a.machine_path, a.signal_name, a.unit, a.value, a.started, a.ended,
           CASE a.severity WHEN 1 THEN 'low' WHEN 2 THEN 'medium' ELSE 'high' END AS severity, a.explanation, a.acknowledged
    FROM alarm a
    WHERE (SELECT shopfloor.reader_firm()) IN (0, a.firm_id) AND a.suppression = 0;

DO $$
BEGIN
    GRANT USAGE ON SCHEMA shopfloor TO smdih_reader;
    GRANT SELECT ON shopfloor.alarm TO smdih_reader;
EXCEPTION
    WHEN undefined_object THEN NULL;
END
$$;
