-- The notifier looks once at every change of an alarm, whenever that was committed. Those of before it has looked at, but for what
-- came after its last look.
ALTER TABLE alarm_change ADD COLUMN planned boolean NOT NULL DEFAULT true;
ALTER TABLE alarm_change ALTER COLUMN planned SET DEFAULT false;
UPDATE alarm_change SET planned = false WHERE changed > (SELECT planned - interval '1 minute' FROM delivery_plan);
CREATE INDEX alarm_change_unplanned_index ON alarm_change (id) WHERE NOT planned;

-- Steps of escalations whose time is to come. The table delivery_plan and the index alarm_change_changed_index are only for the
-- release before.
CREATE TABLE escalation_due (
    alarm_id text NOT NULL REFERENCES alarm (id),
    escalation_id text NOT NULL REFERENCES escalation (id),
    step int NOT NULL,
    firm_id bigint NOT NULL,
    due timestamptz NOT NULL,
    PRIMARY KEY (alarm_id, escalation_id, step)
);
CREATE INDEX escalation_due_due_index ON escalation_due (due);
ALTER TABLE escalation_due ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON escalation_due USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()));
INSERT INTO escalation_due (alarm_id, escalation_id, step, firm_id, due)
    SELECT DISTINCT a.id, e.id, s.step, e.firm_id, a.raised + make_interval(secs => s.after_s)
    FROM escalation e JOIN escalation_step s ON s.escalation_id = e.id
    JOIN alarm a ON a.firm_id = e.firm_id AND a.raised >= e.made AND a.raised > now() - interval '8 days'
        AND a.raised + make_interval(secs => s.after_s) > (SELECT planned - interval '1 minute' FROM delivery_plan)
        AND a.severity >= e.severity_min AND (e.site = '' OR split_part(a.machine_path, '/', 2) = e.site)
    WHERE NOT e.removed AND s.after_s > 0 AND a.ended IS NULL AND NOT a.acknowledged;

-- The same alarm may come back on the list more than once: that a message is planned once stands in its id.
DROP INDEX delivery_alarm_id_transition_contact_id_key;
CREATE INDEX delivery_alarm_id_index ON delivery (alarm_id) WHERE alarm_id IS NOT NULL;
