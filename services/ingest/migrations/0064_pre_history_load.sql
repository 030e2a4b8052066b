-- History that machines were sent, by the day on which it came: retention spares what is not older than the oldest of it for a while.
-- Written by the historian with the history, forgotten by retention.
CREATE TABLE history_load (
    machine_id bigint NOT NULL,
    day date NOT NULL,
    loaded timestamptz NOT NULL,
    oldest timestamptz NOT NULL,
    PRIMARY KEY (machine_id, day)
);
ALTER TABLE history_load ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON history_load USING (
    (SELECT sees_all_firms()) OR EXISTS (SELECT FROM machine AS whole WHERE whole.id = history_load.machine_id)
);

-- How far that reaches back was not noted. Only the release before writes history_loaded from here on, and nobody reads it.
INSERT INTO history_load (machine_id, day, loaded, oldest)
SELECT machine_id, (loaded AT TIME ZONE 'UTC')::date, loaded, '1970-01-01' FROM history_loaded;
