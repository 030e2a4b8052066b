-- How far each door has come in each partition, by its own numbers, and what was missing on the way. Written by the historian in
-- the transaction of the position.
CREATE TABLE door_numbers (
    topic text NOT NULL,
    partition int NOT NULL,
    door text NOT NULL,                    -- one life of one door process
    next_number bigint NOT NULL,
    missing bigint NOT NULL DEFAULT 0,     -- acknowledged batches that never came; must be 0
    noted timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (topic, partition, door)
) WITH (fillfactor = 50);
