-- Rows of one firm are found by nobody who works for another: not even by a statement that forgot to ask for the firm.
-- Owners pass (migrations, backups), services do not: they work in roles that own nothing.

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'audit', 'claim_code', 'credential', 'firm_quota', 'firm_use', 'machine',
        'quarantine', 'retention', 'signal', 'signal_proposal', 'site',
        'source_head']
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY firm ON %I USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()))', name
        );
    END LOOP;
END
$$;

ALTER TABLE firm ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON firm USING ((SELECT sees_all_firms()) OR id = (SELECT scoped_firm()));

-- Parts of something that is a firm's go with it.
DO $$
DECLARE
    part record;
BEGIN
    FOR part IN
        SELECT * FROM (VALUES
            ('credential_seen', 'credential_id', 'credential', 'id'),
            ('kpi_setting', 'machine_id', 'machine', 'id'),
            ('machine_seen', 'machine_id', 'machine', 'id'),
            ('room_read', 'signal_id', 'signal', 'id')
        ) AS parts (name, key, whole, whole_key)
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', part.name);
        EXECUTE format(
            'CREATE POLICY firm ON %1$I USING ((SELECT sees_all_firms()) OR EXISTS (SELECT FROM %3$I AS whole WHERE whole.%4$I = %1$I.%2$I))',
            part.name, part.key, part.whole, part.whole_key
        );
    END LOOP;
END
$$;

-- Keys that nobody has are refused in nobody's name; a firm is told of those that begin like one of its own.
ALTER TABLE refusal ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON refusal USING (
    (SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm())
    OR (firm_id = 0 AND subject IN (SELECT prefix FROM credential))
);

-- A site's tariff is its firm's; a region's is everybody's.
ALTER TABLE tariff ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON tariff USING (
    (SELECT sees_all_firms()) OR site_id IS NULL OR EXISTS (SELECT FROM site AS whole WHERE whole.id = tariff.site_id)
);

-- Frames and rollups are written by COPY, which row-level security refuses: people reach them through this view only.
CREATE OR REPLACE VIEW samples WITH (security_barrier) AS
    SELECT s.id AS signal_id, f.ts, f.values[s.position % 200 + 1] AS value
    FROM signal s JOIN frame f ON f.machine_id = s.machine_id AND f.first_position = s.position / 200 * 200
    WHERE s.firm_id = (SELECT scoped_firm()) AND f.values[s.position % 200 + 1] IS NOT NULL;
GRANT USAGE ON SCHEMA ingest TO smdih_reader;
GRANT SELECT ON samples TO smdih_reader;

-- Chunks are dropped by their owner only; the service may, of these tables.
CREATE FUNCTION drop_stored(store text, newer_than timestamptz, older_than timestamptz) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    IF store NOT IN ('frame', 'rollup_1m', 'rollup_1h') THEN
        RAISE EXCEPTION '% holds no telemetry', store;
    END IF;
    RETURN (
        SELECT count(*) FROM public.drop_chunks(
            format('%I.%I', current_schema(), store)::regclass,
            older_than => drop_stored.older_than, newer_than => drop_stored.newer_than
        )
    );
END
$$;
REVOKE EXECUTE ON FUNCTION drop_stored FROM PUBLIC;
