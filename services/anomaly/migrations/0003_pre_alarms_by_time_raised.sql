-- Alarms of the last minutes, of all firms.
CREATE INDEX alarm_raised_index ON alarm (raised);
