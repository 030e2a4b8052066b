-- What becomes of an award: the firm accepts the offer, claims in arrears, is paid, and the rest goes back.

ALTER TABLE ledger_account DROP CONSTRAINT ledger_account_kind_check;
ALTER TABLE ledger_account ADD CONSTRAINT ledger_account_kind_check CHECK (
    CASE WHEN call_id = 'programme' THEN kind IN ('public_source', 'programme_budget')
    ELSE kind IN (
        'public_source', 'public_budget', 'public_committed', 'public_held', 'public_paid', 'public_recovered',
        'co_investment_source', 'co_investment_pledged', 'co_investment_committed', 'co_investment_paid') END);

-- An award without a row is an offer that nobody has answered yet. The figures follow the ledger; the checks hold whatever
-- the code does: nothing without the firm's word on its assistance, never more than the grant, the retention until the end.
CREATE TABLE agreement (
    award_id text PRIMARY KEY REFERENCES award (id),
    grant_pence bigint NOT NULL,
    co_investment_pence bigint NOT NULL,
    retention_rate text NOT NULL,
    before_completion_pence_max bigint NOT NULL,
    state text NOT NULL DEFAULT 'offered' CONSTRAINT agreement_state_check
        CHECK (state IN ('offered', 'accepted', 'complete', 'lapsed', 'withdrawn')),
    project_start date,
    project_end date,
    accepted timestamptz,
    assistance_confirmed timestamptz,
    assistance_confirmed_by bigint,
    assistance_elsewhere_pence bigint,
    assistance_statement text,
    final_report text,
    accountant_report text,
    ended timestamptz,
    end_reason text,
    paid_pence bigint NOT NULL DEFAULT 0 CHECK (paid_pence >= 0),
    held_pence bigint NOT NULL DEFAULT 0 CHECK (held_pence >= 0),
    restored_pence bigint NOT NULL DEFAULT 0 CHECK (restored_pence >= 0),
    recovered_pence bigint NOT NULL DEFAULT 0 CHECK (recovered_pence >= 0),
    business_paid_pence bigint NOT NULL DEFAULT 0 CHECK (business_paid_pence >= 0),
    CONSTRAINT agreement_grant_pence_check CHECK (paid_pence + held_pence + restored_pence <= grant_pence),
    CONSTRAINT agreement_before_completion_check CHECK (state = 'complete' OR paid_pence <= before_completion_pence_max),
    CONSTRAINT agreement_recovered_of_paid_check CHECK (recovered_pence <= paid_pence),
    CONSTRAINT agreement_business_of_co_investment_check CHECK (business_paid_pence <= co_investment_pence),
    CONSTRAINT agreement_assistance_check CHECK (paid_pence = 0 OR assistance_confirmed IS NOT NULL),
    CONSTRAINT agreement_complete_check CHECK (state <> 'complete' OR (final_report IS NOT NULL AND accountant_report IS NOT NULL)),
    CONSTRAINT agreement_project_check CHECK (project_start <= project_end),
    CONSTRAINT agreement_accepted_check
        CHECK (state IN ('offered', 'withdrawn') OR (accepted IS NOT NULL AND project_start IS NOT NULL AND project_end IS NOT NULL)),
    CONSTRAINT agreement_ended_check CHECK ((state IN ('complete', 'lapsed', 'withdrawn')) = (ended IS NOT NULL))
);

CREATE TABLE claim (
    id text PRIMARY KEY,
    request_id text NOT NULL,
    content_sha256 bytea NOT NULL,
    award_id text NOT NULL REFERENCES agreement (award_id),
    number int NOT NULL,
    period_start date NOT NULL,
    period_end date NOT NULL,
    costs jsonb NOT NULL,
    is_final boolean NOT NULL,
    state text NOT NULL CONSTRAINT claim_state_check CHECK (state IN ('submitted', 'decided', 'paid', 'lapsed', 'rejected')),
    submitted timestamptz NOT NULL,
    submitted_on date NOT NULL,
    decided timestamptz,
    decided_by bigint,
    decision jsonb,
    decision_reason text,
    parameters_version text,
    paid timestamptz,
    paid_by bigint,
    CONSTRAINT claim_award_id_request_id_key UNIQUE (award_id, request_id),
    CONSTRAINT claim_award_id_number_key UNIQUE (award_id, number),
    CONSTRAINT claim_period_check CHECK (period_start <= period_end),
    CONSTRAINT claim_decided_check CHECK ((state = 'submitted') = (decided IS NULL) AND (decided IS NULL) = (decided_by IS NULL)),
    CONSTRAINT claim_decision_check CHECK (state NOT IN ('decided', 'paid', 'lapsed') OR decision IS NOT NULL),
    CONSTRAINT claim_paid_check CHECK ((state = 'paid') = (paid IS NOT NULL) AND (paid IS NULL) = (paid_by IS NULL)),
    -- Two persons: who decided the claim does not release the money.
    CONSTRAINT claim_paid_by_check CHECK (paid_by <> decided_by)
);
-- What one decision counts as paid and held must not change before it is carried out.
CREATE UNIQUE INDEX claim_award_id_decided_key ON claim (award_id) WHERE state = 'decided';

-- One invoice is claimed once, over all projects of a firm.
CREATE TABLE claimed_evidence (
    firm_id bigint NOT NULL,
    evidence text NOT NULL,
    claim_id text NOT NULL REFERENCES claim (id),
    CONSTRAINT claimed_evidence_pkey PRIMARY KEY (firm_id, evidence)
);
CREATE INDEX claimed_evidence_claim_id_idx ON claimed_evidence (claim_id);

-- No day of a project is claimed twice. The lock makes those that come at once look one after the other.
CREATE FUNCTION refuse_overlap() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    PERFORM FROM agreement WHERE award_id = NEW.award_id FOR NO KEY UPDATE;
    IF EXISTS (
        SELECT FROM claim WHERE award_id = NEW.award_id AND state <> 'rejected'
        AND period_start <= NEW.period_end AND period_end >= NEW.period_start
    ) THEN
        RAISE EXCEPTION 'a claim for some of these days is there' USING ERRCODE = 'exclusion_violation', CONSTRAINT = 'claim_period_overlap';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER claim_overlap BEFORE INSERT ON claim FOR EACH ROW EXECUTE FUNCTION refuse_overlap();

-- What is paid, or has lapsed or been refused, stays so.
CREATE TRIGGER claim_settled BEFORE UPDATE ON claim FOR EACH ROW
    WHEN (OLD.state IN ('paid', 'lapsed', 'rejected')) EXECUTE FUNCTION refuse_change();
CREATE TRIGGER claim_kept BEFORE DELETE ON claim FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER claim_truncate BEFORE TRUNCATE ON claim EXECUTE FUNCTION refuse_change();
CREATE TRIGGER agreement_kept BEFORE DELETE ON agreement FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER agreement_truncate BEFORE TRUNCATE ON agreement EXECUTE FUNCTION refuse_change();
CREATE TRIGGER agreement_figures_guard BEFORE UPDATE ON agreement FOR EACH ROW
    WHEN ((OLD.award_id, OLD.grant_pence, OLD.co_investment_pence, OLD.before_completion_pence_max, OLD.paid_pence, OLD.held_pence,
           OLD.restored_pence, OLD.recovered_pence, OLD.business_paid_pence)
        IS DISTINCT FROM
          (NEW.award_id, NEW.grant_pence, NEW.co_investment_pence, NEW.before_completion_pence_max, NEW.paid_pence, NEW.held_pence,
           NEW.restored_pence, NEW.recovered_pence, NEW.business_paid_pence))
    EXECUTE FUNCTION refuse_direct_change();

-- The subject of these transfers is the award's id, with what caused it behind a stroke.
CREATE FUNCTION move_agreement() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE agreement g SET
        paid_pence = g.paid_pence + change.paid,
        held_pence = g.held_pence + change.held,
        restored_pence = g.restored_pence + change.restored,
        recovered_pence = g.recovered_pence + change.recovered,
        business_paid_pence = g.business_paid_pence + change.business_paid
    FROM (
        SELECT split_part(subject_id, '/', 1) AS award_id,
            coalesce(sum(amount_pence) FILTER (WHERE purpose IN ('claim_paid', 'held_paid')), 0)::bigint AS paid,
            (coalesce(sum(amount_pence) FILTER (WHERE purpose = 'claim_held'), 0)
                - coalesce(sum(amount_pence) FILTER (WHERE purpose IN ('held_paid', 'held_restored')), 0))::bigint AS held,
            coalesce(sum(amount_pence) FILTER (WHERE purpose IN ('grant_restored', 'held_restored')), 0)::bigint AS restored,
            coalesce(sum(amount_pence) FILTER (WHERE purpose = 'grant_recovered'), 0)::bigint AS recovered,
            coalesce(sum(amount_pence) FILTER (WHERE purpose = 'business_paid'), 0)::bigint AS business_paid
        FROM added
        WHERE purpose IN ('claim_paid', 'claim_held', 'held_paid', 'held_restored', 'grant_restored', 'grant_recovered', 'business_paid')
        GROUP BY 1) AS change
    WHERE g.award_id = change.award_id;
    RETURN NULL;
END $$;
CREATE TRIGGER ledger_transfer_move_agreement AFTER INSERT ON ledger_transfer
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION move_agreement();
