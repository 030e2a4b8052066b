-- Loaded history is noted in the transaction that stores it. Who looks whether a chunk holds any lets those end first that write into
-- it: else it would be dropped with what they acknowledge.
CREATE FUNCTION lock_stored(store text, newer_than timestamptz, older_than timestamptz) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
DECLARE
    chunk regclass;
BEGIN
    IF store NOT IN ('frame', 'rollup_1m', 'rollup_1h') THEN
        RAISE EXCEPTION '% holds no telemetry', store;
    END IF;
    FOR chunk IN
        SELECT public.show_chunks(
            format('%I.%I', current_schema(), store)::regclass,
            older_than => lock_stored.older_than, newer_than => lock_stored.newer_than
        )
    LOOP
        EXECUTE format('LOCK TABLE %s IN SHARE MODE', chunk);
    END LOOP;
END
$$;
REVOKE EXECUTE ON FUNCTION lock_stored FROM PUBLIC;
