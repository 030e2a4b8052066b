-- The fund: calls, applications with their pledges, decisions, and the ledger that every figure of money is read from.

-- What must never be rewritten is refused here, whoever asks; only a superuser who disables triggers gets past, and the
-- hash chain shows it.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% is append-only, % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'integrity_constraint_violation';
END $$;

-- A running figure moves only as the effect of an insert into the ledger, never by a statement of its own.
CREATE FUNCTION refuse_direct_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND pg_trigger_depth() > 1 THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION '% follows the ledger, % is refused', TG_TABLE_NAME, TG_OP USING ERRCODE = 'integrity_constraint_violation';
END $$;

-- Matches -------------------------------------------------------------------------------------------------------------

-- Accepted offers, as the matching service published them. An application needs one.
CREATE TABLE match (
    id text PRIMARY KEY,
    event_id text NOT NULL,
    firm_id bigint NOT NULL,
    need_id text NOT NULL,
    offer_id text NOT NULL,
    provider_id text NOT NULL,
    provider_title text NOT NULL,
    accepted timestamptz NOT NULL,
    correlation_id text NOT NULL
);

-- Calls and applications ----------------------------------------------------------------------------------------------

-- The state of a call is not stored: it follows from opens, closes and the time.
CREATE TABLE call (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    title text NOT NULL,
    budget_pence bigint NOT NULL CONSTRAINT call_budget_pence_check CHECK (budget_pence > 0),
    opens timestamptz NOT NULL,
    closes timestamptz NOT NULL,
    category text NOT NULL,
    size_definition text NOT NULL,
    rate_max text NOT NULL,           -- decimal text; '': the lawful rate alone
    in_kind_allowed boolean NOT NULL,
    created timestamptz NOT NULL,
    CONSTRAINT call_request_id_key UNIQUE (request_id),
    CONSTRAINT call_opens_closes_check CHECK (opens < closes)
);
CREATE INDEX call_created_id_idx ON call (created, id);

CREATE TABLE application (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    call_id text NOT NULL REFERENCES call (id),
    match_id text NOT NULL REFERENCES match (id),
    firm_id bigint NOT NULL,
    state text NOT NULL CONSTRAINT application_state_check
        CHECK (state IN ('draft', 'submitted', 'awarded', 'rejected', 'withdrawn')),
    costs jsonb NOT NULL,
    declaration jsonb NOT NULL,
    sic text NOT NULL,
    requested_pence bigint NOT NULL CHECK (requested_pence >= 0),
    other_public_pence bigint NOT NULL CHECK (other_public_pence >= 0),
    grant_pence bigint CHECK (grant_pence > 0),  -- fixed on submission
    created timestamptz NOT NULL,
    submitted timestamptz,
    decided timestamptz,
    decision_reason text,
    correlation_id text NOT NULL,
    CONSTRAINT application_firm_id_request_id_key UNIQUE (firm_id, request_id),
    CONSTRAINT application_grant_pence_state_check
        CHECK (state IN ('draft', 'withdrawn') OR (grant_pence IS NOT NULL AND submitted IS NOT NULL)),
    CONSTRAINT application_decided_state_check CHECK ((state IN ('awarded', 'rejected')) = (decided IS NOT NULL))
);
-- One cost is never paid twice: a match carries one application at a time.
CREATE UNIQUE INDEX application_match_id_live_key ON application (match_id) WHERE state IN ('draft', 'submitted', 'awarded');
CREATE INDEX application_created_id_idx ON application (created, id);
CREATE INDEX application_firm_id_created_id_idx ON application (firm_id, created, id);

CREATE TABLE pledge (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    application_id text NOT NULL REFERENCES application (id),
    co_investor text NOT NULL,
    kind text NOT NULL CONSTRAINT pledge_kind_check CHECK (kind IN ('cash', 'in_kind')),
    public_body boolean NOT NULL,
    amount_pence bigint NOT NULL CONSTRAINT pledge_amount_pence_check CHECK (amount_pence > 0),
    added timestamptz NOT NULL,
    confirmed timestamptz,
    evidence text,
    CONSTRAINT pledge_application_id_request_id_key UNIQUE (application_id, request_id),
    CONSTRAINT pledge_confirmed_evidence_check CHECK ((confirmed IS NULL) = (evidence IS NULL))
);

-- Below the programme's ratio of business to public money two different operators must have waived it.
CREATE TABLE ratio_waiver (
    application_id text NOT NULL REFERENCES application (id),
    credential_id bigint NOT NULL,
    reason text NOT NULL,
    waived timestamptz NOT NULL,
    PRIMARY KEY (application_id, credential_id)
);

CREATE TABLE award (
    id text PRIMARY KEY,
    application_id text NOT NULL CONSTRAINT award_application_id_key UNIQUE REFERENCES application (id),
    call_id text NOT NULL REFERENCES call (id),
    firm_id bigint NOT NULL,
    match_id text NOT NULL REFERENCES match (id),
    grant_pence bigint NOT NULL CHECK (grant_pence > 0),
    co_investment_pence bigint NOT NULL CHECK (co_investment_pence >= 0),
    awarded timestamptz NOT NULL,
    awarded_on date NOT NULL,         -- the day in the United Kingdom, by which the rules count
    parameters_version text NOT NULL,
    database_entry_due date,          -- NULL: no entry in the subsidy database is needed
    findings jsonb NOT NULL,          -- what was checked, with its figures
    correlation_id text NOT NULL
);
CREATE INDEX award_firm_id_idx ON award (firm_id);

-- Who did what, when and why.
CREATE TABLE audit (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL,
    credential_id bigint NOT NULL,
    action text NOT NULL,
    call_id text NOT NULL REFERENCES call (id),
    application_id text REFERENCES application (id),
    detail jsonb NOT NULL,
    correlation_id text NOT NULL
);
CREATE INDEX audit_application_id_idx ON audit (application_id);

-- The ledger ----------------------------------------------------------------------------------------------------------

-- Balance = credits - debits. A source is where money comes from, so it is never above zero; every other account holds
-- money and is never below: that check is what makes overspending impossible, however many decide at once.
CREATE TABLE ledger_account (
    id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    call_id text NOT NULL REFERENCES call (id),
    kind text NOT NULL CONSTRAINT ledger_account_kind_check CHECK (kind IN (
        'public_source', 'public_budget', 'public_committed',
        'co_investment_source', 'co_investment_pledged', 'co_investment_committed')),
    balance_pence bigint NOT NULL DEFAULT 0,
    CONSTRAINT ledger_account_call_id_kind_key UNIQUE (call_id, kind),
    CONSTRAINT ledger_account_balance_pence_check CHECK (
        CASE WHEN kind IN ('public_source', 'co_investment_source') THEN balance_pence <= 0 ELSE balance_pence >= 0 END)
);

-- One thing that happened to the money, with one or more transfers. `hash` covers the event, its transfers and the hash
-- before it. The foreign key and the unique key make the events one line without forks; a repeat is known by request_id.
CREATE TABLE ledger_event (
    sequence bigint PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    kind text NOT NULL,
    recorded timestamptz NOT NULL,
    credential_id bigint NOT NULL,
    correlation_id text NOT NULL,
    previous_hash bytea,
    hash bytea NOT NULL CHECK (length(hash) = 32),
    CONSTRAINT ledger_event_request_id_key UNIQUE (request_id),
    CONSTRAINT ledger_event_hash_key UNIQUE (hash),
    CONSTRAINT ledger_event_previous_hash_key UNIQUE (previous_hash),
    CONSTRAINT ledger_event_previous_hash_fkey FOREIGN KEY (previous_hash) REFERENCES ledger_event (hash),
    CONSTRAINT ledger_event_previous_hash_check CHECK ((sequence = 0) = (previous_hash IS NULL))
);

-- One row moves one amount from the debited to the credited account. Both sides are in the one row, so a transfer that does
-- not balance cannot be written down; with one row a side a deferred check would have to add them up, and could be missed.
CREATE TABLE ledger_transfer (
    event_sequence bigint NOT NULL REFERENCES ledger_event (sequence),
    position smallint NOT NULL CHECK (position >= 0),
    debit_account int NOT NULL REFERENCES ledger_account (id),
    credit_account int NOT NULL REFERENCES ledger_account (id),
    amount_pence bigint NOT NULL CONSTRAINT ledger_transfer_amount_pence_check CHECK (amount_pence > 0),
    purpose text NOT NULL,
    subject_id text NOT NULL,
    PRIMARY KEY (event_sequence, position),
    CONSTRAINT ledger_transfer_accounts_check CHECK (debit_account <> credit_account),
    -- A pledge is taken in once, an award committed once: by the database's word, not only by the code's.
    CONSTRAINT ledger_transfer_purpose_subject_id_key UNIQUE (purpose, subject_id)
);

-- The newest event. Whoever posts locks this row first, before any account: so locks come in one order and events in one line.
CREATE TABLE ledger_head (
    id boolean PRIMARY KEY DEFAULT true CHECK (id),
    sequence bigint NOT NULL,
    hash bytea NOT NULL
);

CREATE FUNCTION advance_head() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE ledger_head SET sequence = NEW.sequence, hash = NEW.hash
        WHERE sequence = NEW.sequence - 1 AND hash = NEW.previous_hash;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'event % does not follow the newest event', NEW.sequence USING ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE FUNCTION move_balances() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    -- By account id, lower first.
    IF NEW.debit_account < NEW.credit_account THEN
        UPDATE ledger_account SET balance_pence = balance_pence - NEW.amount_pence WHERE id = NEW.debit_account;
        UPDATE ledger_account SET balance_pence = balance_pence + NEW.amount_pence WHERE id = NEW.credit_account;
    ELSE
        UPDATE ledger_account SET balance_pence = balance_pence + NEW.amount_pence WHERE id = NEW.credit_account;
        UPDATE ledger_account SET balance_pence = balance_pence - NEW.amount_pence WHERE id = NEW.debit_account;
    END IF;
    RETURN NULL;
END $$;

INSERT INTO ledger_event (sequence, request_id, content_sha256, kind, recorded, credential_id, correlation_id, hash)
    SELECT 0, 'genesis', hash, 'genesis', '1970-01-01T00:00:00Z', 0, 'genesis', hash
    FROM (SELECT sha256('smdih funding ledger'::bytea) AS hash) AS genesis;
INSERT INTO ledger_head (sequence, hash) SELECT sequence, hash FROM ledger_event;

CREATE TRIGGER ledger_event_advance AFTER INSERT ON ledger_event FOR EACH ROW EXECUTE FUNCTION advance_head();
CREATE TRIGGER ledger_transfer_move AFTER INSERT ON ledger_transfer FOR EACH ROW EXECUTE FUNCTION move_balances();

CREATE TRIGGER ledger_head_guard BEFORE INSERT OR UPDATE OR DELETE ON ledger_head FOR EACH ROW EXECUTE FUNCTION refuse_direct_change();
CREATE TRIGGER ledger_head_truncate BEFORE TRUNCATE ON ledger_head EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_account_guard BEFORE UPDATE OR DELETE ON ledger_account FOR EACH ROW EXECUTE FUNCTION refuse_direct_change();
CREATE TRIGGER ledger_account_truncate BEFORE TRUNCATE ON ledger_account EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_event_append BEFORE UPDATE OR DELETE ON ledger_event FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_event_truncate BEFORE TRUNCATE ON ledger_event EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_transfer_append BEFORE UPDATE OR DELETE ON ledger_transfer FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER ledger_transfer_truncate BEFORE TRUNCATE ON ledger_transfer EXECUTE FUNCTION refuse_change();
CREATE TRIGGER award_append BEFORE UPDATE OR DELETE ON award FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER award_truncate BEFORE TRUNCATE ON award EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_append BEFORE UPDATE OR DELETE ON audit FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER audit_truncate BEFORE TRUNCATE ON audit EXECUTE FUNCTION refuse_change();
