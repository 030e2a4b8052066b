-- Machines that were sent old history, and since when: retention spares their rows for a while. Written by the historian with the
-- history; forgotten by retention, after which newly sent history counts as newly loaded.
CREATE TABLE history_loaded (
    machine_id bigint PRIMARY KEY,
    loaded timestamptz NOT NULL
);
ALTER TABLE history_loaded ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON history_loaded USING (
    (SELECT sees_all_firms()) OR EXISTS (SELECT FROM machine AS whole WHERE whole.id = history_loaded.machine_id)
);

-- Until now the age of the machine stood for it.
INSERT INTO history_loaded (machine_id, loaded) SELECT id, created FROM machine WHERE created > now() - INTERVAL '30 days';

-- As few days as a rule may say: fewer would remove what is still arriving late.
UPDATE firm_quota SET stored_days = 7 WHERE stored_days < 7;
