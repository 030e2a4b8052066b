-- What an award's project has to show by a day, as a figure of the firm's machines; and the signed evidence that showed it.
CREATE TABLE milestone (
    award_id text NOT NULL REFERENCES award (id),
    id text NOT NULL,
    title text NOT NULL,
    measure text NOT NULL,
    machine_id bigint,                -- NULL: any machine of the firm
    comparison text NOT NULL CONSTRAINT milestone_comparison_check CHECK (comparison IN ('at_least', 'at_most')),
    threshold text NOT NULL,          -- decimal text
    days_min int NOT NULL CHECK (days_min > 0),
    coverage_min text NOT NULL,       -- decimal text from 0 to 1
    due date NOT NULL,
    set_at timestamptz NOT NULL,
    set_by bigint NOT NULL,
    PRIMARY KEY (award_id, id)
);

CREATE TABLE milestone_evidence (
    award_id text NOT NULL,
    milestone_id text NOT NULL,
    statement_id text NOT NULL,
    evidence jsonb NOT NULL,          -- as it was given out: statement, key and signature
    value text NOT NULL,
    recorded timestamptz NOT NULL,
    recorded_by bigint NOT NULL,
    CONSTRAINT milestone_evidence_pkey PRIMARY KEY (award_id, milestone_id),
    -- One statement shows one milestone of one award.
    CONSTRAINT milestone_evidence_statement_id_key UNIQUE (statement_id),
    FOREIGN KEY (award_id, milestone_id) REFERENCES milestone (award_id, id)
);
CREATE TRIGGER milestone_evidence_append BEFORE UPDATE OR DELETE ON milestone_evidence FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER milestone_evidence_truncate BEFORE TRUNCATE ON milestone_evidence EXECUTE FUNCTION refuse_change();
