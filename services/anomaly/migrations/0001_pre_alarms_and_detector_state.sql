CREATE TABLE alarm (
    id text PRIMARY KEY,                  -- derived from machine, position and start
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL,
    position int NOT NULL,                -- of the signal in the machine; below 0: several signals together
    signal_id bigint NOT NULL,            -- 0: several signals together, or not known when it was raised
    machine_path text NOT NULL,
    machine_kind text NOT NULL,
    signal_name text NOT NULL,
    unit text NOT NULL,
    started timestamptz NOT NULL,         -- time of the sample, not of the hub
    ended timestamptz,                    -- NULL: the condition lasts
    severity smallint NOT NULL CHECK (severity BETWEEN 1 AND 3),
    component text NOT NULL,
    explanation text NOT NULL,
    value double precision NOT NULL,
    score double precision NOT NULL,
    shares jsonb NOT NULL,
    correlation_id text NOT NULL,
    episode_id text NOT NULL,             -- id of the episode's first alarm
    acknowledged boolean NOT NULL DEFAULT false,
    cleared boolean NOT NULL DEFAULT false,
    raised timestamptz NOT NULL           -- when the hub noticed
);
CREATE INDEX alarm_started_id_index ON alarm (started DESC, id DESC);
CREATE INDEX alarm_firm_id_started_id_index ON alarm (firm_id, started DESC, id DESC);
CREATE INDEX alarm_machine_id_started_id_index ON alarm (machine_id, started DESC, id DESC);
CREATE INDEX alarm_active_index ON alarm (machine_id) WHERE ended IS NULL;

-- Who did what, when; rows are only ever added.
CREATE TABLE alarm_change (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id text NOT NULL,
    alarm_id text NOT NULL REFERENCES alarm (id),
    change text NOT NULL CHECK (change IN ('raised', 'acknowledged', 'returned', 'cleared')),
    changed timestamptz NOT NULL,
    actor text NOT NULL,                  -- "detector", or the role of the key
    credential_id bigint NOT NULL,        -- 0: the detector
    comment text NOT NULL,
    CONSTRAINT alarm_change_event_id_key UNIQUE (event_id)
);
CREATE INDEX alarm_change_alarm_id_index ON alarm_change (alarm_id, id);

-- What the detector knows of each machine, as of the record before next_offset. The partition's position (table position) is never
-- past a record that some machine's row has not taken in.
CREATE TABLE detector_state (
    partition int NOT NULL,
    machine_id bigint NOT NULL,
    channel_group int NOT NULL,
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    state bytea NOT NULL,
    PRIMARY KEY (partition, machine_id, channel_group)
);
-- Floats do not compress; and rows are rewritten all the time, so dead ones must go early.
ALTER TABLE detector_state ALTER COLUMN state SET STORAGE EXTERNAL;
ALTER TABLE detector_state SET (autovacuum_vacuum_scale_factor = 0.05, toast.autovacuum_vacuum_scale_factor = 0.05);
