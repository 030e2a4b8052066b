-- Records that retention had deleted before they were taken in, where the consumer goes on without them (the anomaly worker). It is
-- counted with the position, so that neither a crash nor a new process forgets it; set it to 0 once people know.
ALTER TABLE position ADD COLUMN records_lost bigint NOT NULL DEFAULT 0;
