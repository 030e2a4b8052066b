-- The ledger writes what many ask for at once in one call, one transaction and one flush: `post_events`. And what one row after the
-- other was checked by foreign keys is checked once a statement, set by set, by the triggers that work on the statement anyway:
-- row by row those checks took most of the time of a post.

-- Events are one line without forks by the primary key and `advance_head`: each must follow the newest one and its hash.
ALTER TABLE ledger_event DROP CONSTRAINT ledger_event_previous_hash_fkey;
ALTER TABLE ledger_event DROP CONSTRAINT ledger_event_previous_hash_key;
ALTER TABLE ledger_event DROP CONSTRAINT ledger_event_hash_key;
-- `move_balances` refuses transfers of events and accounts that are not there; neither can be removed.
ALTER TABLE ledger_transfer DROP CONSTRAINT ledger_transfer_event_sequence_fkey;
ALTER TABLE ledger_transfer DROP CONSTRAINT ledger_transfer_debit_account_fkey;
ALTER TABLE ledger_transfer DROP CONSTRAINT ledger_transfer_credit_account_fkey;

CREATE OR REPLACE FUNCTION move_balances() RETURNS trigger LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    complete boolean;
BEGIN
    WITH change AS (
        SELECT account, sum(pence)::bigint AS pence
        FROM (SELECT debit_account AS account, -amount_pence AS pence FROM added
              UNION ALL SELECT credit_account, amount_pence FROM added) AS sides
        GROUP BY account),
    moved AS (
        UPDATE ledger_account a SET balance_pence = a.balance_pence + change.pence
        FROM change WHERE a.id = change.account RETURNING 1)
    SELECT (SELECT count(*) FROM change) = (SELECT count(*) FROM moved)
        AND NOT EXISTS (SELECT FROM added WHERE (SELECT e.sequence FROM ledger_event e WHERE e.sequence = added.event_sequence) IS NULL)
        INTO complete;
    IF NOT complete THEN
        RAISE EXCEPTION 'a transfer names an event or account that is not there'
            USING ERRCODE = 'foreign_key_violation', CONSTRAINT = 'ledger_transfer_accounts_fkey';
    END IF;
    RETURN NULL;
END $$;

-- Writes events in their order, each with all its transfers or not at all, and says of each what became of it: posted; repeated
-- (of an event that is there with the same content, whose place is given); reused (there with another content); overdrawn; or
-- unknown_account. What is refused changes nothing, and those behind it are judged without it.
-- Accounts are named once, transfers name them by their place from 1. `hashed` is what an event's hash is made of, from its third
-- part on; sequence and hash of the event before are put in front here, as only the one whose turn it is knows them.
-- The settings keep a plan that was made while the tables were small from reading them whole when they are large; what cannot be had
-- without is then priced so high that it would be compiled (JIT) each time.
CREATE FUNCTION post_events(
    request_ids text[], contents bytea[], kinds text[], credential_ids bigint[], correlation_ids text[], hashed text[],
    transfer_counts int[], account_calls text[], account_kinds text[],
    debits int[], credits int[], amounts bigint[], purposes text[], subjects text[], recorded_at timestamptz
) RETURNS TABLE (outcome text, event_sequence bigint, event_hash bytea) LANGUAGE plpgsql
    SET search_path FROM CURRENT SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    head ledger_head;
    known_contents bytea[]; known_sequences bigint[]; known_hashes bytea[];
    account_ids int[]; balances bigint[]; tentative bigint[]; sources boolean[];
    outcomes text[]; sequences bigint[]; previous_hashes bytea[]; hashes bytea[];
    transfer_events bigint[]; positions int[];
    first int := 1; behind int; verdict text;
BEGIN
    -- Its turn first: what is read after this cannot change until the transaction ends.
    SELECT * INTO head FROM ledger_head FOR UPDATE;
    SELECT array_agg(e.content_sha256 ORDER BY asked.number), array_agg(e.sequence ORDER BY asked.number),
            array_agg(e.hash ORDER BY asked.number)
        INTO known_contents, known_sequences, known_hashes
        FROM unnest(request_ids) WITH ORDINALITY AS asked (id, number) LEFT JOIN ledger_event e ON e.request_id = asked.id;
    SELECT array_agg(a.id ORDER BY named.number), array_agg(a.balance_pence ORDER BY named.number),
            array_agg(a.kind IN ('public_source', 'co_investment_source') ORDER BY named.number)
        INTO account_ids, balances, sources
        FROM unnest(account_calls, account_kinds) WITH ORDINALITY AS named (call_id, kind, number)
        LEFT JOIN ledger_account a ON a.call_id = named.call_id AND a.kind = named.kind;
    -- Filled first: an array that begins to be written at a later place begins there.
    outcomes := array_fill(NULL::text, ARRAY[cardinality(request_ids)]);
    sequences := array_fill(NULL::bigint, ARRAY[cardinality(request_ids)]);
    previous_hashes := array_fill(NULL::bytea, ARRAY[cardinality(request_ids)]);
    hashes := previous_hashes;
    transfer_events := array_fill(NULL::bigint, ARRAY[cardinality(debits)]);
    positions := array_fill(NULL::int, ARRAY[cardinality(debits)]);
    FOR i IN 1 .. cardinality(request_ids) LOOP
        behind := first + transfer_counts[i];
        IF known_sequences[i] IS NOT NULL THEN
            outcomes[i] := CASE WHEN known_contents[i] = contents[i] THEN 'repeated' ELSE 'reused' END;
            sequences[i] := known_sequences[i];
            hashes[i] := known_hashes[i];
        ELSE
            verdict := 'posted';
            tentative := balances;
            FOR t IN first .. behind - 1 LOOP
                tentative[debits[t]] := tentative[debits[t]] - amounts[t];
                tentative[credits[t]] := tentative[credits[t]] + amounts[t];
            END LOOP;
            FOR t IN first .. behind - 1 LOOP
                IF account_ids[debits[t]] IS NULL OR account_ids[credits[t]] IS NULL THEN
                    verdict := 'unknown_account';
                    EXIT;
                ELSIF (NOT sources[debits[t]] AND tentative[debits[t]] < 0) OR (sources[credits[t]] AND tentative[credits[t]] > 0) THEN
                    verdict := 'overdrawn';
                END IF;
            END LOOP;
            outcomes[i] := verdict;
            IF verdict = 'posted' THEN
                balances := tentative;
                previous_hashes[i] := head.hash;
                head.sequence := head.sequence + 1;
                head.hash := sha256(convert_to(
                    '[' || head.sequence || ',"' || encode(head.hash, 'hex') || '",' || hashed[i], 'UTF8'));
                sequences[i] := head.sequence;
                hashes[i] := head.hash;
                FOR t IN first .. behind - 1 LOOP
                    transfer_events[t] := head.sequence;
                    positions[t] := t - first;
                END LOOP;
            END IF;
        END IF;
        first := behind;
    END LOOP;
    INSERT INTO ledger_event
        (sequence, request_id, content_sha256, kind, recorded, credential_id, correlation_id, previous_hash, hash)
        SELECT e.sequence, e.request_id, e.content, e.kind, recorded_at, e.credential_id, e.correlation_id, e.previous_hash, e.hash
        FROM unnest(sequences, request_ids, contents, kinds, credential_ids, correlation_ids, previous_hashes, hashes, outcomes)
            AS e (sequence, request_id, content, kind, credential_id, correlation_id, previous_hash, hash, outcome)
        WHERE e.outcome = 'posted';
    IF FOUND THEN
        INSERT INTO ledger_transfer
            (event_sequence, position, debit_account, credit_account, amount_pence, purpose, subject_id)
            SELECT t.event, t.position, account_ids[t.debit], account_ids[t.credit], t.amount, t.purpose, t.subject
            FROM unnest(transfer_events, positions, debits, credits, amounts, purposes, subjects)
                AS t (event, position, debit, credit, amount, purpose, subject)
            WHERE t.event IS NOT NULL;
    END IF;
    RETURN QUERY SELECT * FROM unnest(outcomes, sequences, hashes);
END $$;
