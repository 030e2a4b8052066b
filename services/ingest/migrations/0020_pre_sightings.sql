-- What the doors have seen lately, written in batches: for "why is there no data?".

-- The newest good batch of each machine.
CREATE TABLE machine_seen (
    machine_id bigint PRIMARY KEY,
    received timestamptz NOT NULL,    -- when a door took it
    newest timestamptz NOT NULL,      -- the time that its last row bears
    credential_id bigint NOT NULL,
    source text NOT NULL,
    door text NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE credential_seen (
    credential_id bigint PRIMARY KEY,
    used timestamptz NOT NULL
) WITH (fillfactor = 50);

-- One row for all refusals of a kind. 0: not known (a key that nobody issued has no firm and no credential).
CREATE TABLE refusal (
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL,
    credential_id bigint NOT NULL,
    subject text NOT NULL,            -- the machine as the sender named it, or the first characters of an unknown key
    reason text NOT NULL,
    source text NOT NULL,
    door text NOT NULL,
    times bigint NOT NULL,
    samples bigint NOT NULL,
    first timestamptz NOT NULL,
    last timestamptz NOT NULL,
    example text NOT NULL,
    clock_off_us bigint NOT NULL,     -- of the last sample outside the window of times: its time less the door's
    PRIMARY KEY (firm_id, machine_id, credential_id, subject, reason)
) WITH (fillfactor = 50);
CREATE INDEX refusal_firm_id_last_idx ON refusal (firm_id, last DESC);

CREATE INDEX credential_firm_id_idx ON credential (firm_id);
