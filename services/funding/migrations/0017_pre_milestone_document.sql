-- Milestones that no machine can show: the firm sends a document, an operator looks at it and confirms.
ALTER TABLE milestone
    ALTER COLUMN comparison DROP NOT NULL,
    ALTER COLUMN days_min DROP NOT NULL,
    -- Either a figure of machines with all that belongs to it, or a document.
    ADD CONSTRAINT milestone_measure_check CHECK ((measure = '') = (comparison IS NULL) AND (measure = '') = (days_min IS NULL));

-- What the firm sent, the newest counts; kept elsewhere.
CREATE TABLE milestone_document (
    award_id text NOT NULL,
    milestone_id text NOT NULL,
    number int NOT NULL,
    reference text NOT NULL,
    sha256 text NOT NULL,
    sent timestamptz NOT NULL,
    sent_by bigint NOT NULL,
    PRIMARY KEY (award_id, milestone_id, number),
    FOREIGN KEY (award_id, milestone_id) REFERENCES milestone (award_id, id)
);
CREATE TRIGGER milestone_document_append BEFORE UPDATE OR DELETE ON milestone_document FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER milestone_document_truncate BEFORE TRUNCATE ON milestone_document EXECUTE FUNCTION refuse_change();
