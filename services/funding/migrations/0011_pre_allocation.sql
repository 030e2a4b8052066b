-- Who is funded from a call's budget: proposed by one person with a certificate, confirmed by another, carried out by decisions.
CREATE TABLE allocation (
    id text PRIMARY KEY,
    call_id text NOT NULL REFERENCES call (id),
    state text NOT NULL DEFAULT 'proposed' CONSTRAINT allocation_state_check CHECK (state IN ('proposed', 'confirmed')),
    -- The two documents as text, since their bytes are what is hashed.
    input text NOT NULL,
    certificate text NOT NULL,
    certificate_sha256 bytea NOT NULL,
    left_out jsonb NOT NULL,          -- by application: why it was not ranked at all
    problems jsonb NOT NULL,          -- what the independent checker found; empty: the certificate holds
    proof text NOT NULL,
    created timestamptz NOT NULL,
    created_by bigint NOT NULL,
    confirmed timestamptz,
    confirmed_by bigint,
    confirmed_reason text,
    CONSTRAINT allocation_certificate_sha256_check CHECK (certificate_sha256 = sha256(certificate::bytea)),
    CONSTRAINT allocation_confirmed_check CHECK (
        (state = 'confirmed') = (confirmed IS NOT NULL) AND (confirmed IS NULL) = (confirmed_by IS NULL)
        AND (confirmed IS NULL) = (confirmed_reason IS NULL)),
    -- Two persons, and only what the checker agrees with.
    CONSTRAINT allocation_confirmed_by_check CHECK (confirmed_by <> created_by),
    CONSTRAINT allocation_checked_check CHECK (state = 'proposed' OR problems = '[]')
);
CREATE INDEX allocation_call_id_created_idx ON allocation (call_id, created, id);
CREATE TRIGGER allocation_fixed BEFORE UPDATE ON allocation FOR EACH ROW
    WHEN ((OLD.id, OLD.call_id, OLD.input, OLD.certificate, OLD.left_out, OLD.problems, OLD.created, OLD.created_by)
        IS DISTINCT FROM
          (NEW.id, NEW.call_id, NEW.input, NEW.certificate, NEW.left_out, NEW.problems, NEW.created, NEW.created_by)
        OR OLD.state = 'confirmed')
    EXECUTE FUNCTION refuse_change();
CREATE TRIGGER allocation_kept BEFORE DELETE ON allocation FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER allocation_truncate BEFORE TRUNCATE ON allocation EXECUTE FUNCTION refuse_change();
