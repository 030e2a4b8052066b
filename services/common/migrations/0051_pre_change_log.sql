-- In every service's schema: what people and partners tried to change through the doors, and what came of it. Append-only.

CREATE TABLE change_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    role text NOT NULL,
    credential_id bigint NOT NULL,    -- below 0: a person with a token
    shown text NOT NULL,              -- first characters of the key, or the token's subject
    firm_id bigint NOT NULL,          -- whose key it is; 0: no firm's
    partner_id bigint NOT NULL,
    provider_id text NOT NULL,
    action text NOT NULL,             -- method and route, or the full name of the call
    ids jsonb NOT NULL,               -- what was named, and what was made
    outcome text NOT NULL,            -- OK, or the reason of the refusal
    correlation_id text NOT NULL,
    address text NOT NULL
);
CREATE INDEX change_log_firm_id_idx ON change_log (firm_id, id);
CREATE INDEX change_log_credential_id_idx ON change_log (credential_id, id);

CREATE FUNCTION refuse_change_of_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the change log is append-only' USING ERRCODE = 'integrity_constraint_violation';
END $$;
CREATE TRIGGER change_log_append BEFORE UPDATE OR DELETE ON change_log FOR EACH ROW EXECUTE FUNCTION refuse_change_of_log();
CREATE TRIGGER change_log_truncate BEFORE TRUNCATE ON change_log EXECUTE FUNCTION refuse_change_of_log();

-- Like every table with a firm: found by nobody who works for another.
ALTER TABLE change_log ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON change_log USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()));
