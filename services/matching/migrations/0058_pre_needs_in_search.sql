-- A firm has a number of open needs without offers at most.
CREATE INDEX need_in_search_idx ON need (firm_id) WHERE state = 'open' AND offers = 0 AND consent_id IS NULL;
