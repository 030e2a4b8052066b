-- Of what came for a machine that is not registered: its path, in lower case. Of what is there already the path stands in the detail.
ALTER TABLE quarantine ADD COLUMN machine_path text NOT NULL DEFAULT '';
UPDATE quarantine SET machine_path = coalesce(lower(substring(detail FROM 'no machine ''([^'']{1,255})'';')), '')
WHERE machine_id = 0 AND reason = 'UNKNOWN_MACHINE' AND replayed IS NULL;

DROP INDEX quarantine_waiting_idx;
CREATE INDEX quarantine_waiting_idx ON quarantine (firm_id, machine_id, reason, machine_path, received, id) WHERE replayed IS NULL;
