-- What a firm may use; NULL: the default of the hub.
CREATE TABLE firm_quota (
    firm_id bigint PRIMARY KEY REFERENCES firm,
    samples_per_s bigint CHECK (samples_per_s > 0),
    signals bigint CHECK (signals > 0),
    stored_days int CHECK (stored_days > 0),
    changed timestamptz NOT NULL
);

-- What each door took of each firm lately; a row is news for some seconds only.
CREATE TABLE firm_use (
    firm_id bigint NOT NULL,
    door text NOT NULL,
    samples_per_s float8 NOT NULL,
    at timestamptz NOT NULL,
    PRIMARY KEY (firm_id, door)
) WITH (fillfactor = 50);

CREATE INDEX signal_firm_id_idx ON signal (firm_id);

-- Who changed what in the registry; written once, in the transaction of the change.
CREATE TABLE audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    firm_id bigint NOT NULL,          -- 0: no firm's
    credential_id bigint NOT NULL,    -- who did it; 0: nobody with a key
    action text NOT NULL,
    detail text NOT NULL,
    correlation_id text NOT NULL
);
CREATE INDEX audit_firm_id_id_idx ON audit (firm_id, id DESC);
