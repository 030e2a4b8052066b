-- Second facet of an alarm: why it is off the operator's list. Sum of 1 shelved, 2 by design (maintenance), 4 out of service;
-- 0: on the list. An alarm that returned to normal while suppressed keeps the sum: it never needed a response.
ALTER TABLE alarm ADD COLUMN suppression smallint NOT NULL DEFAULT 0 CHECK (suppression BETWEEN 0 AND 7);
ALTER TABLE alarm ADD COLUMN assignee text NOT NULL DEFAULT '';  -- empty: nobody
CREATE INDEX alarm_firm_id_raised_index ON alarm (firm_id, raised);

ALTER TABLE alarm_change ADD COLUMN detail text NOT NULL DEFAULT '';  -- to whom, until when
ALTER TABLE alarm_change DROP CONSTRAINT alarm_change_change_check;
ALTER TABLE alarm_change ADD CONSTRAINT alarm_change_change_check CHECK (change IN (
    'raised', 'acknowledged', 'returned', 'cleared', 'commented', 'assigned', 'shelved', 'unshelved',
    'taken_out_of_service', 'returned_to_service', 'suppressed', 'unsuppressed'));

-- What people have taken off the list: a source of alarms (one signal of a machine), not one alarm.
CREATE TABLE suppression (
    machine_id bigint NOT NULL,
    position int NOT NULL,
    kind text NOT NULL CHECK (kind IN ('shelved', 'out_of_service')),
    firm_id bigint NOT NULL,
    alarm_id text NOT NULL,               -- the alarm on which it was done; its history has the beginning and the end
    one_shot boolean NOT NULL,            -- ends when the condition next returns to normal
    began timestamptz NOT NULL,
    ends timestamptz CHECK ((ends IS NULL) = (kind = 'out_of_service')),
    reason text NOT NULL,
    actor text NOT NULL,
    credential_id bigint NOT NULL,
    PRIMARY KEY (machine_id, position, kind)
);
CREATE INDEX suppression_ends_index ON suppression (ends) WHERE ends IS NOT NULL;

-- Maintenance of machines: their alarms are suppressed by design meanwhile. Rows are never removed.
CREATE TABLE maintenance_window (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL,
    starts timestamptz NOT NULL,
    ends timestamptz NOT NULL CHECK (ends > starts),
    reason text NOT NULL,
    actor text NOT NULL,
    credential_id bigint NOT NULL,
    made timestamptz NOT NULL,
    ended timestamptz,                    -- by a person, before its time
    ended_actor text NOT NULL DEFAULT '',
    ended_credential_id bigint NOT NULL DEFAULT 0,
    ended_reason text NOT NULL DEFAULT ''
);
-- The same window asked for again is the same window.
CREATE UNIQUE INDEX maintenance_window_machine_id_starts_ends_key ON maintenance_window (machine_id, starts, ends)
    WHERE ended IS NULL;
CREATE INDEX maintenance_window_firm_id_starts_index ON maintenance_window (firm_id, starts DESC, id DESC);
CREATE INDEX maintenance_window_machine_id_ends_index ON maintenance_window (machine_id, ends) WHERE ended IS NULL;
