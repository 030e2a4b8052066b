-- Rows of one firm are found by nobody who works for another: not even by a statement that forgot to ask for the firm.
-- Owners pass (migrations, backups), services do not: they work in roles that own nothing.

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'application', 'award', 'claimed_evidence', 'firm_group', 'match']
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', name);
        EXECUTE format(
            'CREATE POLICY firm ON %I USING ((SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm()))', name
        );
    END LOOP;
END
$$;

-- Parts of something that is a firm's go with it.
DO $$
DECLARE
    part record;
BEGIN
    FOR part IN
        SELECT * FROM (VALUES
            ('agreement', 'award_id', 'award', 'id'),
            ('change_request', 'award_id', 'award', 'id'),
            ('claim', 'award_id', 'award', 'id'),
            ('impact_report', 'award_id', 'award', 'id'),
            ('milestone', 'award_id', 'award', 'id'),
            ('milestone_document', 'award_id', 'award', 'id'),
            ('milestone_evidence', 'award_id', 'award', 'id'),
            ('subsidy_entry', 'award_id', 'award', 'id'),
            ('pledge', 'application_id', 'application', 'id'),
            ('ratio_waiver', 'application_id', 'application', 'id'),
            ('review', 'application_id', 'application', 'id'),
            ('moderation', 'application_id', 'application', 'id')
        ) AS parts (name, key, whole, whole_key)
    LOOP
        EXECUTE format('ALTER TABLE %I ENABLE ROW LEVEL SECURITY', part.name);
        EXECUTE format(
            'CREATE POLICY firm ON %1$I USING ((SELECT sees_all_firms()) OR EXISTS (SELECT FROM %3$I AS whole WHERE whole.%4$I = %1$I.%2$I))',
            part.name, part.key, part.whole, part.whole_key
        );
    END LOOP;
END
$$;

-- Everybody's deeds are recorded; a firm reads those about its own applications.
ALTER TABLE audit ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON audit FOR SELECT USING (
    (SELECT sees_all_firms()) OR EXISTS (SELECT FROM application AS whole WHERE whole.id = audit.application_id)
);
CREATE POLICY recorded ON audit FOR INSERT WITH CHECK (true);

-- These hold the figures of many firms side by side: for those who decide.
ALTER TABLE allocation ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON allocation USING ((SELECT sees_all_firms()));
ALTER TABLE pool_spread ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON pool_spread USING ((SELECT sees_all_firms()));

-- Who owns a part of whom concerns both.
ALTER TABLE holding ENABLE ROW LEVEL SECURITY;
CREATE POLICY firm ON holding USING (
    (SELECT sees_all_firms()) OR (SELECT scoped_firm()) IN (owner_firm_id, owned_firm_id)
);
