-- Rooms: signals that a firm lends to the partner of an engaged match, for a time and a purpose.
CREATE TABLE room (
    id text PRIMARY KEY,
    match_id text NOT NULL REFERENCES match,
    firm_id bigint NOT NULL,
    partner_id bigint NOT NULL,
    provider_id text NOT NULL,
    machine_ids bigint[] NOT NULL,
    signal_ids bigint[] NOT NULL,
    purpose text NOT NULL,
    -- Samples of this time may be read.
    data_from timestamptz NOT NULL,
    data_until timestamptz NOT NULL,
    -- They may be read from then until then.
    opens timestamptz NOT NULL,
    closes timestamptz NOT NULL,
    state text NOT NULL CONSTRAINT room_state_check CHECK (state IN ('open', 'recalled', 'expired', 'match_ended')),
    opened_by bigint NOT NULL,
    ended timestamptz,
    ended_by bigint,                   -- NULL: the hub
    end_reason text NOT NULL DEFAULT '',
    request_id text,
    request_sha256 bytea,
    correlation_id text NOT NULL,
    CONSTRAINT room_closes_check CHECK (closes > opens),
    CONSTRAINT room_data_until_check CHECK (data_until > data_from),
    CONSTRAINT room_ended_check CHECK ((state = 'open') = (ended IS NULL))
);
CREATE UNIQUE INDEX room_firm_id_request_id_key ON room (firm_id, request_id);
CREATE INDEX room_match_id_idx ON room (match_id);
CREATE INDEX room_firm_id_opens_idx ON room (firm_id, opens DESC, id DESC);
CREATE INDEX room_partner_id_opens_idx ON room (partner_id, opens DESC, id DESC);
CREATE INDEX room_opens_idx ON room (opens DESC, id DESC);
CREATE INDEX room_closes_idx ON room (closes) WHERE state = 'open';
