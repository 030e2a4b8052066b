-- Providers, what their quarters hold, consents, needs, offers and matches.

-- Counts the changes of providers. The row lock puts them in an order that readers can follow without missing one, which a
-- sequence cannot: its numbers become visible out of order.
CREATE TABLE provider_change (
    one boolean PRIMARY KEY DEFAULT true CONSTRAINT provider_change_one_check CHECK (one),
    number bigint NOT NULL
);
INSERT INTO provider_change (number) VALUES (0);

CREATE TABLE provider (
    id text PRIMARY KEY,
    kind text NOT NULL CONSTRAINT provider_kind_check CHECK (kind IN ('expert', 'facility', 'workshop', 'course')),
    partner_id bigint NOT NULL,
    title text NOT NULL,
    text text NOT NULL,
    region text NOT NULL,
    region_bound boolean NOT NULL,
    regions_served text[] NOT NULL,
    sic_divisions text[] NOT NULL,
    sic_excluded text[] NOT NULL,
    sizes_served text[] NOT NULL,
    skills text[] NOT NULL,
    capacity_per_quarter int,          -- NULL: no limit, for courses only
    lead_days int NOT NULL CONSTRAINT provider_lead_days_check CHECK (lead_days >= 0),
    conflict_firm_ids bigint[] NOT NULL,
    expires_on date,
    active boolean NOT NULL,
    change bigint NOT NULL,            -- number of the last change, see provider_change
    changed timestamptz NOT NULL,
    -- Of title and text, as little-endian float32, and the model that made it; NULL until an index has computed it.
    vector bytea,
    vector_model text,
    CONSTRAINT provider_capacity_per_quarter_check CHECK ((kind = 'course') = (capacity_per_quarter IS NULL) AND capacity_per_quarter >= 1)
);
CREATE UNIQUE INDEX provider_change_key ON provider (change);
CREATE INDEX provider_partner_id_idx ON provider (partner_id, id);

-- Places of a provider in one calendar quarter. The check is the last word on over-commitment, whatever the code does.
CREATE TABLE provider_quarter (
    provider_id text NOT NULL REFERENCES provider,
    quarter date NOT NULL,             -- its first day
    capacity int,                      -- NULL: no limit
    taken int NOT NULL CONSTRAINT provider_quarter_taken_check CHECK (taken >= 0),
    PRIMARY KEY (provider_id, quarter),
    CONSTRAINT provider_quarter_capacity_check CHECK (taken <= capacity)
);

CREATE TABLE consent (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    shared text[] NOT NULL,
    machine_ids bigint[] NOT NULL,     -- empty: all
    severity_min int NOT NULL,
    valid_from timestamptz NOT NULL,
    valid_until timestamptz,
    note text NOT NULL,
    given timestamptz NOT NULL,
    given_by bigint NOT NULL,
    ended timestamptz,
    ended_by bigint,
    replaced boolean NOT NULL DEFAULT false,
    request_id text,
    request_sha256 bytea,
    correlation_id text NOT NULL,
    CONSTRAINT consent_ended_check CHECK ((ended IS NULL) = (ended_by IS NULL))
);
-- One consent of a firm is in force at a time; the others are its history.
CREATE UNIQUE INDEX consent_firm_id_key ON consent (firm_id) WHERE ended IS NULL;
CREATE INDEX consent_firm_id_given_idx ON consent (firm_id, given DESC);
CREATE UNIQUE INDEX consent_firm_id_request_id_key ON consent (firm_id, request_id);

CREATE TABLE need (
    id text PRIMARY KEY,
    firm_id bigint NOT NULL,
    source text NOT NULL CONSTRAINT need_source_check CHECK (source IN ('firm', 'anomaly')),
    state text NOT NULL CONSTRAINT need_state_check CHECK (state IN ('open', 'matched', 'closed')),
    text text NOT NULL,
    urgency text NOT NULL,
    sic text NOT NULL,
    region text NOT NULL,
    size text NOT NULL,
    machine_id bigint NOT NULL,        -- 0: none
    consent_id text REFERENCES consent,
    offers int NOT NULL,
    no_offer_reason text NOT NULL,
    opened timestamptz NOT NULL,
    opened_by bigint NOT NULL,
    ended timestamptz,
    request_id text,
    request_sha256 bytea,
    correlation_id text NOT NULL,
    CONSTRAINT need_ended_check CHECK ((state = 'open') = (ended IS NULL)),
    -- A need without offers says why.
    CONSTRAINT need_no_offer_reason_check CHECK (offers > 0 OR no_offer_reason <> '')
);
CREATE UNIQUE INDEX need_firm_id_request_id_key ON need (firm_id, request_id);
CREATE INDEX need_opened_idx ON need (opened DESC, id);
CREATE INDEX need_firm_id_opened_idx ON need (firm_id, opened DESC, id);
-- Ten alarms of one machine are one need.
CREATE UNIQUE INDEX need_machine_id_open_key ON need (machine_id) WHERE source = 'anomaly' AND state = 'open';
CREATE INDEX need_machine_id_idx ON need (machine_id) WHERE source = 'anomaly';
CREATE INDEX need_without_offers_idx ON need (opened) WHERE state = 'open' AND offers = 0;

-- Alarms behind a need: the one that opened it and those that joined it.
CREATE TABLE need_alarm (
    alarm_id text PRIMARY KEY,
    need_id text NOT NULL REFERENCES need,
    number bigint GENERATED ALWAYS AS IDENTITY,
    raised timestamptz NOT NULL        -- time of the alarm
);
CREATE INDEX need_alarm_need_id_idx ON need_alarm (need_id, number);

CREATE TABLE offer (
    id text PRIMARY KEY,
    need_id text NOT NULL REFERENCES need,
    firm_id bigint NOT NULL,
    provider_id text NOT NULL REFERENCES provider,
    -- As they were when the offer was made.
    partner_id bigint NOT NULL,
    provider_title text NOT NULL,
    provider_kind text NOT NULL,
    rank int NOT NULL,
    score float8 NOT NULL,
    parts json NOT NULL,               -- not jsonb: their order is kept
    reasons text[] NOT NULL,
    ranker_version text NOT NULL,
    state text NOT NULL CONSTRAINT offer_state_check CHECK (state IN ('made', 'accepted', 'declined', 'lapsed')),
    made timestamptz NOT NULL,
    expires timestamptz NOT NULL,
    decided timestamptz,
    decided_by bigint,                 -- NULL: the hub
    decision_reason text NOT NULL DEFAULT '',
    CONSTRAINT offer_need_id_provider_id_key UNIQUE (need_id, provider_id),
    CONSTRAINT offer_decided_check CHECK ((state = 'made') = (decided IS NULL))
);
CREATE INDEX offer_firm_id_idx ON offer (firm_id, made DESC, id);
CREATE INDEX offer_partner_id_idx ON offer (partner_id, made DESC, id);
CREATE INDEX offer_made_idx ON offer (made DESC, id);
CREATE INDEX offer_open_idx ON offer (expires) WHERE state = 'made';
CREATE INDEX offer_provider_id_open_idx ON offer (provider_id) WHERE state = 'made';
-- A need is matched once.
CREATE UNIQUE INDEX offer_need_id_accepted_key ON offer (need_id) WHERE state = 'accepted';

CREATE TABLE match (
    id text PRIMARY KEY,
    need_id text NOT NULL REFERENCES need,
    offer_id text NOT NULL REFERENCES offer,
    firm_id bigint NOT NULL,
    provider_id text NOT NULL REFERENCES provider,
    partner_id bigint NOT NULL,
    quarter date NOT NULL,
    accepted timestamptz NOT NULL,
    accepted_by bigint NOT NULL,
    correlation_id text NOT NULL,
    CONSTRAINT match_need_id_key UNIQUE (need_id),
    CONSTRAINT match_offer_id_key UNIQUE (offer_id)
);
