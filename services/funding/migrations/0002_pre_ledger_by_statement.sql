-- The ledger's triggers work on all rows of a statement at once. Row by row, a batch of a thousand transfers updated the same two
-- balances two thousand times in one transaction, and each update had to walk past all versions before it.

DROP TRIGGER ledger_event_advance ON ledger_event;
DROP TRIGGER ledger_transfer_move ON ledger_transfer;

CREATE OR REPLACE FUNCTION advance_head() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    head ledger_head;
BEGIN
    SELECT * INTO head FROM ledger_head FOR UPDATE;
    IF EXISTS (
        SELECT FROM (
            SELECT sequence, previous_hash,
                lag(sequence, 1, head.sequence) OVER in_line AS sequence_before,
                lag(hash, 1, head.hash) OVER in_line AS hash_before
            FROM added WINDOW in_line AS (ORDER BY sequence)) AS line
        WHERE sequence <> sequence_before + 1 OR previous_hash IS DISTINCT FROM hash_before
    ) THEN
        RAISE EXCEPTION 'an event does not follow the newest event' USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    UPDATE ledger_head SET sequence = newest.sequence, hash = newest.hash
        FROM (SELECT sequence, hash FROM added ORDER BY sequence DESC LIMIT 1) AS newest;
    RETURN NULL;
END $$;

-- What all transfers of the statement together do to each account is checked, and stored, once.
CREATE OR REPLACE FUNCTION move_balances() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE ledger_account a SET balance_pence = a.balance_pence + change.pence
        FROM (SELECT account, sum(pence)::bigint AS pence
              FROM (SELECT debit_account AS account, -amount_pence AS pence FROM added
                    UNION ALL SELECT credit_account, amount_pence FROM added) AS sides
              GROUP BY account) AS change
        WHERE a.id = change.account;
    RETURN NULL;
END $$;

CREATE TRIGGER ledger_event_advance AFTER INSERT ON ledger_event
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION advance_head();
CREATE TRIGGER ledger_transfer_move AFTER INSERT ON ledger_transfer
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION move_balances();
