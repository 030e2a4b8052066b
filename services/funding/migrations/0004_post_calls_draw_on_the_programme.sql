-- No call has a source of its own any more. Not validated: the calls from before are taken over when the service starts, which
-- brings their sources to zero.
ALTER TABLE ledger_account ADD CONSTRAINT ledger_account_call_source_check
    CHECK (kind <> 'public_source' OR call_id = 'programme' OR balance_pence = 0) NOT VALID;
