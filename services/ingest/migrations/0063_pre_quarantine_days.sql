-- A replayed item gives its room back: what was in it is stored, or stands in quarantine as an item of its own.
UPDATE quarantine SET batch = NULL, raw = NULL WHERE replayed IS NOT NULL AND coalesce(batch, raw) IS NOT NULL;

-- What stands in quarantine, by firm and day of receipt. Triggers count, so that it is what is in the table, whoever writes there.
CREATE TABLE quarantine_day (
    firm_id bigint NOT NULL,
    day date NOT NULL,
    bytes bigint NOT NULL,
    PRIMARY KEY (firm_id, day)
);
ALTER TABLE quarantine_day ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON quarantine_day USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()));

CREATE FUNCTION count_quarantine() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO quarantine_day AS d (firm_id, day, bytes)
        SELECT firm_id, (received AT TIME ZONE 'UTC')::date, -sum(quarantine_bytes(batch, raw)) FROM gone GROUP BY 1, 2 ORDER BY 1, 2
        ON CONFLICT (firm_id, day) DO UPDATE SET bytes = d.bytes + excluded.bytes;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO quarantine_day AS d (firm_id, day, bytes)
        SELECT firm_id, (received AT TIME ZONE 'UTC')::date, sum(quarantine_bytes(batch, raw)) FROM came GROUP BY 1, 2 ORDER BY 1, 2
        ON CONFLICT (firm_id, day) DO UPDATE SET bytes = d.bytes + excluded.bytes;
    ELSE
        DELETE FROM quarantine_day AS d WHERE d.bytes = 0 AND d.firm_id IN (SELECT g.firm_id FROM gone g);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER quarantine_came AFTER INSERT ON quarantine REFERENCING NEW TABLE AS came
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantine();
CREATE TRIGGER quarantine_changed AFTER UPDATE ON quarantine REFERENCING OLD TABLE AS gone NEW TABLE AS came
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantine();
CREATE TRIGGER quarantine_went AFTER DELETE ON quarantine REFERENCING OLD TABLE AS gone
    FOR EACH STATEMENT EXECUTE FUNCTION count_quarantine();

INSERT INTO quarantine_day (firm_id, day, bytes)
SELECT firm_id, (received AT TIME ZONE 'UTC')::date, sum(quarantine_bytes(batch, raw)) FROM quarantine GROUP BY 1, 2;

-- From here on only what was refused is noted there; the release before still counts in `bytes`, which nobody reads any more.
ALTER TABLE quarantine_use ALTER COLUMN bytes SET DEFAULT 0;
