-- Money that a co-investor puts into a call as a whole, for the projects it chose; and how it was spread over them.
CREATE TABLE pool_pledge (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    call_id text NOT NULL REFERENCES call (id),
    co_investor text NOT NULL,
    amount_pence bigint NOT NULL CHECK (amount_pence > 0),
    supports text[] NOT NULL,         -- applications
    evidence text NOT NULL,           -- what the confirmation rests on
    added timestamptz NOT NULL,
    added_by bigint NOT NULL,
    CONSTRAINT pool_pledge_call_id_request_id_key UNIQUE (call_id, request_id)
);
CREATE INDEX pool_pledge_call_id_idx ON pool_pledge (call_id, added, id);
CREATE TRIGGER pool_pledge_append BEFORE UPDATE OR DELETE ON pool_pledge FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER pool_pledge_truncate BEFORE TRUNCATE ON pool_pledge EXECUTE FUNCTION refuse_change();

CREATE TABLE pool_spread (
    id text PRIMARY KEY,
    call_id text NOT NULL REFERENCES call (id),
    state text NOT NULL DEFAULT 'proposed' CONSTRAINT pool_spread_state_check CHECK (state IN ('proposed', 'confirmed')),
    input text NOT NULL,
    certificate text NOT NULL,
    problems jsonb NOT NULL,          -- what the independent checker found
    created timestamptz NOT NULL,
    created_by bigint NOT NULL,
    confirmed timestamptz,
    confirmed_by bigint,
    confirmed_reason text,
    CONSTRAINT pool_spread_confirmed_check CHECK ((state = 'confirmed') = (confirmed IS NOT NULL)),
    CONSTRAINT pool_spread_confirmed_by_check CHECK (confirmed_by <> created_by),
    CONSTRAINT pool_spread_checked_check CHECK (state = 'proposed' OR problems = '[]')
);
-- A co-investor's money is spread once.
CREATE UNIQUE INDEX pool_spread_call_id_confirmed_key ON pool_spread (call_id) WHERE state = 'confirmed';
CREATE TRIGGER pool_spread_fixed BEFORE UPDATE ON pool_spread FOR EACH ROW
    WHEN ((OLD.id, OLD.call_id, OLD.input, OLD.certificate, OLD.problems, OLD.created, OLD.created_by)
        IS DISTINCT FROM (NEW.id, NEW.call_id, NEW.input, NEW.certificate, NEW.problems, NEW.created, NEW.created_by)
        OR OLD.state = 'confirmed')
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER pool_spread_kept BEFORE DELETE ON pool_spread FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER pool_spread_truncate BEFORE TRUNCATE ON pool_spread EXECUTE FUNCTION refuse_change();
