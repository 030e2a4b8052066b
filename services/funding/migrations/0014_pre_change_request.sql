-- What a firm asks to change after the award, and what an operator made of it.
CREATE TABLE change_request (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    award_id text NOT NULL REFERENCES agreement (award_id),
    kind text NOT NULL CONSTRAINT change_request_kind_check CHECK (kind IN ('time', 'costs', 'reduction', 'other')),
    project_end date,
    costs jsonb,
    reduction_pence bigint CHECK (reduction_pence > 0),
    reason text NOT NULL,
    state text NOT NULL DEFAULT 'requested' CONSTRAINT change_request_state_check
        CHECK (state IN ('requested', 'approved', 'refused')),
    requested timestamptz NOT NULL,
    requested_by bigint NOT NULL,
    decided timestamptz,
    decided_by bigint,
    decision_reason text,
    CONSTRAINT change_request_award_id_request_id_key UNIQUE (award_id, request_id),
    CONSTRAINT change_request_kind_fields_check CHECK (
        (kind = 'time') = (project_end IS NOT NULL) AND (kind = 'costs') = (costs IS NOT NULL)
        AND (kind = 'reduction') = (reduction_pence IS NOT NULL)),
    CONSTRAINT change_request_decided_check CHECK (
        (state = 'requested') = (decided IS NULL) AND (decided IS NULL) = (decided_by IS NULL)
        AND (decided IS NULL) = (decision_reason IS NULL))
);
-- One at a time: what is decided is what was asked for with the agreement as it stands.
CREATE UNIQUE INDEX change_request_award_id_open_key ON change_request (award_id) WHERE state = 'requested';
CREATE TRIGGER change_request_settled BEFORE UPDATE ON change_request FOR EACH ROW
    WHEN (OLD.state <> 'requested') EXECUTE FUNCTION refuse_change();
CREATE TRIGGER change_request_kept BEFORE DELETE ON change_request FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER change_request_truncate BEFORE TRUNCATE ON change_request EXECUTE FUNCTION refuse_change();

-- The costs as they were changed last; NULL: as in the application. Their sum never changes.
ALTER TABLE agreement ADD COLUMN costs jsonb;
