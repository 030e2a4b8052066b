-- A pledge that was stated wrongly is taken back; it stays on record, and counts no more.
ALTER TABLE pledge ADD COLUMN taken_back timestamptz;
