-- Entries that were made in the public subsidy database; which awards need one, and by when, stands with the award.
CREATE TABLE subsidy_entry (
    award_id text PRIMARY KEY REFERENCES award (id),
    reference text NOT NULL,
    entered timestamptz NOT NULL,
    entered_by bigint NOT NULL
);
CREATE TRIGGER subsidy_entry_append BEFORE UPDATE OR DELETE ON subsidy_entry FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER subsidy_entry_truncate BEFORE TRUNCATE ON subsidy_entry EXECUTE FUNCTION refuse_change();
CREATE INDEX award_database_entry_due_idx ON award (database_entry_due, id) WHERE database_entry_due IS NOT NULL;
CREATE INDEX award_awarded_id_idx ON award (awarded, id);
