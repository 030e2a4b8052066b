-- When dumps of the database ended, so that somebody is told when none comes any more. The first row is no dump: from its time on one
-- is waited for.
CREATE TABLE backup_run (
    finished timestamptz NOT NULL DEFAULT now(),
    bytes bigint NOT NULL,
    sha256 text NOT NULL
);
INSERT INTO backup_run (bytes, sha256) VALUES (0, '');

-- The login of the backup may read everything and write nothing but this.
CREATE FUNCTION note_backup(size bigint, digest text) RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = ingest, pg_temp AS $$
    INSERT INTO backup_run (bytes, sha256) VALUES (size, digest)
$$;
REVOKE ALL ON FUNCTION note_backup(bigint, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION note_backup(bigint, text) TO pg_read_all_data;
GRANT USAGE ON SCHEMA ingest TO pg_read_all_data;
