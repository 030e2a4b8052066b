-- What a project changed: the firm's yearly figures before it and after it. A correction is another row; the newest counts.
CREATE TABLE impact_report (
    award_id text NOT NULL REFERENCES award (id),
    kind text NOT NULL CONSTRAINT impact_report_kind_check CHECK (kind IN ('baseline', 'follow_up')),
    version int NOT NULL CHECK (version > 0),
    year_ending date NOT NULL,
    figures jsonb NOT NULL,
    uncertainty_percent text NOT NULL,
    method text NOT NULL,
    reported timestamptz NOT NULL,
    reported_by bigint NOT NULL,
    PRIMARY KEY (award_id, kind, version)
);
CREATE TRIGGER impact_report_append BEFORE UPDATE OR DELETE ON impact_report FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER impact_report_truncate BEFORE TRUNCATE ON impact_report EXECUTE FUNCTION refuse_change();
