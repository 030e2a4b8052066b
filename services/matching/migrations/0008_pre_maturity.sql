-- Data-maturity self-assessments; a need may be opened from one.
CREATE TABLE maturity_assessment (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    version text NOT NULL,
    answers json NOT NULL,
    share float8 NOT NULL CONSTRAINT maturity_assessment_share_check CHECK (share BETWEEN 0 AND 1),
    level text NOT NULL,
    topics json NOT NULL,
    need_draft text NOT NULL,
    taken timestamptz NOT NULL,
    taken_by bigint NOT NULL,
    need_id text REFERENCES need,
    request_id text,
    request_sha256 bytea,
    correlation_id text NOT NULL
);
CREATE UNIQUE INDEX maturity_assessment_firm_id_request_id_key ON maturity_assessment (firm_id, request_id);
CREATE INDEX maturity_assessment_firm_id_taken_idx ON maturity_assessment (firm_id, taken DESC, id DESC);
ALTER TABLE need
    DROP CONSTRAINT need_source_check,
    ADD CONSTRAINT need_source_check CHECK (source IN ('firm', 'anomaly', 'maturity'));
