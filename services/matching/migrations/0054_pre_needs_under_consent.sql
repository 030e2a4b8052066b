-- Open needs end with the consent that they were made under.
CREATE INDEX need_under_consent_idx ON need (firm_id) WHERE state = 'open' AND consent_id IS NOT NULL;
