-- Rows of one firm are found by nobody who works for another: not even by a statement that forgot to ask for the firm.
-- Owners pass (migrations, backups), services do not: they work in roles that own nothing.

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY[
        'alarm', 'contact', 'delivery', 'escalation', 'maintenance_window', 'rule',
        'suppression', 'tuning']
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
            ('alarm_change', 'alarm_id', 'alarm', 'id'),
            ('rating', 'alarm_id', 'alarm', 'id'),
            ('escalation_step', 'escalation_id', 'escalation', 'id')
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
