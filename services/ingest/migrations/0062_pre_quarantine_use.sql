-- What an item takes; its own row counts too.
CREATE FUNCTION quarantine_bytes(batch bytea, raw bytea) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT 500 + coalesce(octet_length(batch), 0)::bigint + coalesce(octet_length(raw), 0)
$$;

-- What each firm has in quarantine, and what was refused there because it was full. Written by the historian with the items, and by
-- retention.
CREATE TABLE quarantine_use (
    firm_id bigint PRIMARY KEY,
    bytes bigint NOT NULL,
    refused_items bigint NOT NULL DEFAULT 0,
    refused_samples bigint NOT NULL DEFAULT 0,
    refused_last timestamptz
);
ALTER TABLE quarantine_use ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON quarantine_use USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()));

INSERT INTO quarantine_use (firm_id, bytes) SELECT firm_id, sum(quarantine_bytes(batch, raw)) FROM quarantine GROUP BY firm_id;
