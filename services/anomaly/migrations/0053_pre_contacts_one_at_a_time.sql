-- A contact gets one message at a time, and none for a while after it failed.
ALTER TABLE contact ADD COLUMN failures int NOT NULL DEFAULT 0;        -- tries in a row
ALTER TABLE contact ADD COLUMN free timestamptz NOT NULL DEFAULT 'epoch';  -- nothing is sent to it before
ALTER TABLE delivery ADD COLUMN urgency smallint NOT NULL DEFAULT 2;   -- the alarm's severity, or above all: a trial
CREATE INDEX delivery_contact_id_urgency_due_index ON delivery (contact_id, urgency DESC, due) WHERE state = 'pending';
CREATE INDEX delivery_unsent_index ON delivery (state, made) WHERE state <> 'sent';
-- Nobody can send these again.
DELETE FROM delivery d USING contact c WHERE c.id = d.contact_id AND c.removed AND d.state <> 'sent';
