-- Where a firm wants to be told of alarms.
CREATE TABLE contact (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    name text NOT NULL,
    kind text NOT NULL CHECK (kind IN ('webhook', 'email')),
    address text NOT NULL,
    secret text NOT NULL,                 -- what webhooks are signed with; empty for email
    removed boolean NOT NULL DEFAULT false,
    made timestamptz NOT NULL,
    actor text NOT NULL,
    credential_id bigint NOT NULL
);
CREATE INDEX contact_firm_id_index ON contact (firm_id, made DESC, id DESC);

-- Who is told of which alarms, and who next when nobody acknowledges. A change makes a new row and removes the one before.
CREATE TABLE escalation (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    name text NOT NULL,
    site text NOT NULL,                   -- slug of a site; empty: every site
    severity_min smallint NOT NULL CHECK (severity_min BETWEEN 1 AND 3),
    tell_changes boolean NOT NULL,        -- also tell when somebody acknowledged it and when it is over
    removed boolean NOT NULL DEFAULT false,
    made timestamptz NOT NULL,
    actor text NOT NULL,
    credential_id bigint NOT NULL
);
CREATE INDEX escalation_firm_id_index ON escalation (firm_id, made DESC, id DESC);

CREATE TABLE escalation_step (
    escalation_id text NOT NULL REFERENCES escalation (id),
    step int NOT NULL,
    after_s int NOT NULL CHECK (after_s >= 0),
    contact_id text NOT NULL REFERENCES contact (id),
    PRIMARY KEY (escalation_id, step, contact_id)
);

-- One message to one contact. A notifier claims it by moving `due` on, sends, and notes the outcome: one that dies between is
-- followed by another after that time.
CREATE TABLE delivery (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    alarm_id text REFERENCES alarm (id),  -- NULL: a trial
    transition text NOT NULL,             -- raised, escalated_N, acknowledged, returned, cleared, back_on_list, trial_...
    contact_id text NOT NULL REFERENCES contact (id),
    tell_changes boolean NOT NULL,
    correlation_id text NOT NULL,
    state text NOT NULL CHECK (state IN ('pending', 'sent', 'dead')),
    attempts int NOT NULL DEFAULT 0,
    due timestamptz NOT NULL,
    made timestamptz NOT NULL,
    finished timestamptz,
    last_error text NOT NULL DEFAULT ''
);
CREATE UNIQUE INDEX delivery_alarm_id_transition_contact_id_key ON delivery (coalesce(alarm_id, ''), transition, contact_id);
CREATE INDEX delivery_pending_index ON delivery (due) WHERE state = 'pending';
CREATE INDEX delivery_finished_index ON delivery (finished) WHERE state = 'sent';
CREATE INDEX delivery_firm_id_made_index ON delivery (firm_id, made DESC, id DESC);

-- How far deliveries have been planned.
CREATE TABLE delivery_plan (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    planned timestamptz NOT NULL
);
INSERT INTO delivery_plan (planned) VALUES (now());
CREATE INDEX alarm_change_changed_index ON alarm_change (changed);
