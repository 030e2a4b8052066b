-- What a call declares beyond budget, times and rates, and what an application says beyond costs and declaration: read and written
-- as a whole, so one document each. The form is checked before it is stored.
ALTER TABLE call ADD COLUMN terms jsonb NOT NULL DEFAULT '{}';
ALTER TABLE application ADD COLUMN content jsonb NOT NULL DEFAULT '{}';
