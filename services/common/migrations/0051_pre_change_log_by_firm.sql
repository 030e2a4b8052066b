-- What a firm did is shown to nobody who works for another; everybody's deeds are recorded.
DO $$
BEGIN
    IF to_regclass('change_log') IS NOT NULL THEN
        ALTER TABLE change_log ENABLE ROW LEVEL SECURITY;
        CREATE POLICY firm ON change_log FOR SELECT USING (
            (SELECT sees_all_firms()) OR firm_id = (SELECT scoped_firm())
        );
        CREATE POLICY recorded ON change_log FOR INSERT WITH CHECK (true);
    END IF;
END
$$;
