-- During a rolling upgrade the historian of the release before still writes items without a path, and nothing would replay them.
-- Only what looks like a path: a machine that was named by its id has none.
CREATE FUNCTION path_in_detail(detail text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT coalesce(lower(substring(detail FROM 'no machine ''([^'']{1,255})'';')), '')
$$;

CREATE FUNCTION fill_quarantine_path() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    NEW.machine_path := path_in_detail(NEW.detail);
    RETURN NEW;
END
$$;
CREATE TRIGGER quarantine_without_path BEFORE INSERT OR UPDATE ON quarantine FOR EACH ROW
    WHEN (NEW.machine_id = 0 AND NEW.reason = 'UNKNOWN_MACHINE' AND NEW.machine_path = '' AND NEW.replayed IS NULL
        AND NEW.detail LIKE '%no machine ''%/%'';%')
    EXECUTE FUNCTION fill_quarantine_path();

-- What came during an upgrade that is over.
UPDATE quarantine SET machine_path = path_in_detail(detail)
WHERE machine_id = 0 AND reason = 'UNKNOWN_MACHINE' AND machine_path = '' AND replayed IS NULL
    AND detail LIKE '%no machine ''%/%'';%';
