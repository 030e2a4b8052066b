-- Records below next_offset may be scored with the tunings known when it was moved there; a tuning made later takes effect at
-- next_offset or behind. So how a record is scored depends on its offset only, also in a replay.
CREATE TABLE horizon (
    partition int PRIMARY KEY,
    next_offset bigint NOT NULL CHECK (next_offset >= 0)
);

-- What people change about scoring. Rows are only ever added; their ids are in the order of their commits (one advisory lock).
CREATE TABLE tuning (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('threshold', 'relearn', 'rule')),
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL,
    position int,                         -- as of an alarm; NULL: the whole machine
    threshold_offset double precision CHECK ((kind = 'threshold') = (threshold_offset IS NOT NULL)),
    rule_id text NOT NULL DEFAULT '',
    rule jsonb,                           -- NULL for a rule: it is no longer evaluated
    cause text NOT NULL,                  -- rated, rating_withdrawn, reset, sensor_changed, rule_written, rule_stopped
    alarm_id text NOT NULL DEFAULT '',    -- the alarm that was rated
    reason text NOT NULL,
    made timestamptz NOT NULL,
    actor text NOT NULL,
    credential_id bigint NOT NULL
);
CREATE INDEX tuning_machine_id_position_index ON tuning (machine_id, position, id);
CREATE INDEX tuning_rule_id_index ON tuning (rule_id, id) WHERE rule_id <> '';

-- From which record of each partition on it holds. A machine is in one partition; the rows of the others never matter.
CREATE TABLE tuning_start (
    partition int NOT NULL,
    tuning_id bigint NOT NULL REFERENCES tuning (id),
    from_offset bigint NOT NULL,
    PRIMARY KEY (partition, tuning_id)
);
CREATE INDEX tuning_start_partition_from_offset_index ON tuning_start (partition, from_offset);

-- What people say of an alarm now.
CREATE TABLE rating (
    alarm_id text PRIMARY KEY REFERENCES alarm (id),
    machine_id bigint NOT NULL,
    position int NOT NULL,
    useful boolean NOT NULL,
    counts boolean NOT NULL DEFAULT true  -- false: from before the threshold was last reset
);
CREATE INDEX rating_machine_id_position_index ON rating (machine_id, position);

-- Rules that firms write themselves. Each version stays in tuning.
CREATE TABLE rule (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL,
    version int NOT NULL CHECK (version > 0),
    enabled boolean NOT NULL,
    rule jsonb NOT NULL,
    made timestamptz NOT NULL,
    changed timestamptz NOT NULL
);
CREATE INDEX rule_firm_id_made_index ON rule (firm_id, made DESC, id DESC);

ALTER TABLE alarm ADD COLUMN rule_id text NOT NULL DEFAULT '';  -- empty: found by the detector
ALTER TABLE alarm ADD COLUMN rule_version int NOT NULL DEFAULT 0;
ALTER TABLE alarm ADD COLUMN figures jsonb NOT NULL DEFAULT '{}';  -- what the explanation is made of, to draw it
-- State of the machine's rules, as of the same record as the detector's.
ALTER TABLE detector_state ADD COLUMN rules bytea NOT NULL DEFAULT '';

-- Moves the horizon of a partition to at least `wanted` and returns it with the tunings made after `known`. In one call: a
-- statement of its own sees what was committed while the lock was waited for. Losing the move in a crash of the server is
-- harmless (whatever was stored on the strength of it is behind it in the log), so nobody waits for the disk.
CREATE FUNCTION move_horizon(number int, wanted bigint, known bigint)
RETURNS TABLE (horizon bigint, tuning_id bigint, from_offset bigint) LANGUAGE plpgsql AS $$
DECLARE
    moved bigint;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    UPDATE horizon h SET next_offset = greatest(h.next_offset, wanted) WHERE h.partition = number RETURNING h.next_offset INTO moved;
    RETURN QUERY SELECT moved, s.tuning_id, s.from_offset FROM (SELECT 1) AS one
        LEFT JOIN tuning_start s ON s.partition = number AND s.tuning_id > known;
END
$$;
