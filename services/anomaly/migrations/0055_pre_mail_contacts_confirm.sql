-- A mail address is told of alarms once whoever reads it has given its code to the firm; those from before are taken to have.
-- The code stands in `secret` until then.
ALTER TABLE contact ADD COLUMN confirmed boolean NOT NULL DEFAULT true;
ALTER TABLE contact ADD COLUMN codes_tried int NOT NULL DEFAULT 0;
CREATE INDEX delivery_trial_index ON delivery (firm_id, made) WHERE alarm_id IS NULL;
