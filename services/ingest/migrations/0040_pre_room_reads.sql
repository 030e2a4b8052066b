-- Who read which signals through a room, a row a minute.
CREATE TABLE room_read (
    room_id text NOT NULL,
    signal_id bigint NOT NULL,
    credential_id bigint NOT NULL,
    minute timestamptz NOT NULL,
    reads bigint NOT NULL,
    -- The least and the greatest time of the samples that were asked for.
    data_from timestamptz NOT NULL,
    data_until timestamptz NOT NULL,
    PRIMARY KEY (room_id, minute, signal_id, credential_id)
);
