-- In every service's schema: events on their way out, and how far each topic has been taken in.

CREATE TABLE outbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    topic text NOT NULL,
    key bytea NOT NULL,
    value bytea,                      -- NULL: a tombstone
    correlation_id text NOT NULL,
    created timestamptz NOT NULL DEFAULT now()
);

-- The position lives with the effects: both change in one transaction, or neither.
CREATE TABLE position (
    topic text NOT NULL,
    partition int NOT NULL,
    next_offset bigint NOT NULL CHECK (next_offset >= 0),
    PRIMARY KEY (topic, partition)
);
