-- Whose rows the current work may touch, as row-level policies and views ask it: the setting smdih.firm_id holds a firm's id or
-- 'all'; without it there is nothing to see. A login named smdih_firm_<id> is that firm's, whatever it sets.

CREATE FUNCTION sees_all_firms() RETURNS boolean LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT coalesce(current_setting('smdih.firm_id', true) = 'all', false) AND session_user !~ '^smdih_firm_'
$$;

CREATE FUNCTION scoped_firm() RETURNS bigint LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT CASE
        WHEN session_user ~ '^smdih_firm_' THEN substring(session_user FROM '^smdih_firm_([0-9]{1,18})$')::bigint
        WHEN current_setting('smdih.firm_id', true) ~ '^[0-9]{1,18}$' THEN current_setting('smdih.firm_id', true)::bigint
    END
$$;
