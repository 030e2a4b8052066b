-- The credential that a rotated one takes over from.
ALTER TABLE credential ADD COLUMN replaces bigint REFERENCES credential;
CREATE INDEX credential_replaces_idx ON credential (replaces) WHERE replaces IS NOT NULL;

-- Codes that a new gateway exchanges for a key of its own. Of a code only the first characters can be read here.
CREATE TABLE claim_code (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lookup text NOT NULL CONSTRAINT claim_code_lookup_key UNIQUE,
    salt bytea NOT NULL,
    digest bytea NOT NULL,            -- scrypt of the rest of the code
    firm_id bigint NOT NULL REFERENCES firm,
    site_id bigint REFERENCES site,
    machine_id bigint REFERENCES machine,
    label text NOT NULL,
    created timestamptz NOT NULL,
    created_by bigint NOT NULL,
    expires timestamptz NOT NULL,
    key_valid_days int,
    wrong_attempts int NOT NULL DEFAULT 0,
    used timestamptz,
    request_sha256 bytea,
    credential_id bigint REFERENCES credential,
    key_salt bytea                    -- kept for some minutes after use, so that a repeat gets the same key
);
CREATE INDEX claim_code_firm_id_idx ON claim_code (firm_id, id);
