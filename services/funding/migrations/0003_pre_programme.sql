-- The programme's public money, from which the calls are given their budgets. Its two accounts belong to no call: money enters
-- through its source, by an entry that the service makes from the dated parameter programme.public_p, and leaves for the calls.
-- What is not allotted yet cannot go below zero, so all budgets together never pass what the programme was given.

ALTER TABLE ledger_account DROP CONSTRAINT ledger_account_call_id_fkey;
ALTER TABLE ledger_account ADD COLUMN call_reference text GENERATED ALWAYS AS (nullif(call_id, 'programme')) STORED
    CONSTRAINT ledger_account_call_reference_fkey REFERENCES call (id);
ALTER TABLE ledger_account DROP CONSTRAINT ledger_account_kind_check;
ALTER TABLE ledger_account ADD CONSTRAINT ledger_account_kind_check CHECK (
    CASE WHEN call_id = 'programme' THEN kind IN ('public_source', 'programme_budget')
    ELSE kind IN (
        'public_source', 'public_budget', 'public_committed',
        'co_investment_source', 'co_investment_pledged', 'co_investment_committed') END);
INSERT INTO ledger_account (call_id, kind) VALUES ('programme', 'public_source'), ('programme', 'programme_budget');

-- What is done to the programme as a whole has no call.
ALTER TABLE audit ALTER COLUMN call_id DROP NOT NULL;
