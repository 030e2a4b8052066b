-- Dates of workshops and slots of facilities, and who takes part.

CREATE TABLE session (
    id text PRIMARY KEY,
    provider_id text NOT NULL REFERENCES provider,
    title text NOT NULL,
    place text NOT NULL,               -- where it is, or how to join
    starts timestamptz NOT NULL,
    ends timestamptz NOT NULL,
    seats int NOT NULL CONSTRAINT session_seats_check CHECK (seats >= 1),
    -- Seats of bookings that are confirmed or offered. The check is the last word on over-booking, whatever the code does.
    taken int NOT NULL DEFAULT 0 CONSTRAINT session_taken_check CHECK (taken >= 0),
    confirm_within interval NOT NULL,
    state text NOT NULL CONSTRAINT session_state_check CHECK (state IN ('open', 'cancelled')),
    cancel_reason text NOT NULL DEFAULT '',
    sequence int NOT NULL DEFAULT 0,   -- counts up with each change that a calendar shows
    changed timestamptz NOT NULL,
    CONSTRAINT session_ends_check CHECK (ends > starts),
    CONSTRAINT session_seats_taken_check CHECK (taken <= seats)
);
CREATE INDEX session_provider_id_starts_idx ON session (provider_id, starts, id);
CREATE INDEX session_starts_idx ON session (starts, id);

CREATE TABLE booking (
    id text PRIMARY KEY,
    session_id text NOT NULL REFERENCES session,
    firm_id bigint NOT NULL,
    partner_id bigint NOT NULL,
    match_id text REFERENCES match,
    state text NOT NULL CONSTRAINT booking_state_check CHECK (state IN ('confirmed', 'waiting', 'offered', 'cancelled', 'expired')),
    number bigint GENERATED ALWAYS AS IDENTITY,  -- the order of the waiting list
    confirm_by timestamptz,            -- an offered seat goes to the next in line then
    end_reason text NOT NULL DEFAULT '',
    sequence int NOT NULL DEFAULT 0,
    booked timestamptz NOT NULL,
    booked_by bigint NOT NULL,
    changed timestamptz NOT NULL,
    request_id text,
    correlation_id text NOT NULL,
    CONSTRAINT booking_confirm_by_check CHECK ((state = 'offered') = (confirm_by IS NOT NULL))
);
CREATE UNIQUE INDEX booking_firm_id_request_id_key ON booking (firm_id, request_id);
CREATE INDEX booking_session_id_idx ON booking (session_id, number);
CREATE INDEX booking_firm_id_idx ON booking (firm_id, booked DESC, id DESC);
CREATE INDEX booking_partner_id_idx ON booking (partner_id, booked DESC, id DESC);
CREATE INDEX booking_booked_idx ON booking (booked DESC, id DESC);
CREATE INDEX booking_confirm_by_idx ON booking (confirm_by) WHERE state = 'offered';
