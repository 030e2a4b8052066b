-- Keys of a firm are counted at each new one, and those that ended are looked for each minute.
CREATE INDEX credential_firm_id_in_use_idx ON credential (firm_id) WHERE revoked IS NULL;
CREATE INDEX credential_valid_to_in_use_idx ON credential (valid_to) WHERE revoked IS NULL AND valid_to IS NOT NULL;
