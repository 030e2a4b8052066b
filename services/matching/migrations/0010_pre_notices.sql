-- What a firm or a partner is told of things that happened while it was not there. Kept for 400 days.
CREATE TABLE notice (
    id text PRIMARY KEY,               -- derived from what happened, so that it is told once
    firm_id bigint NOT NULL DEFAULT 0, -- 0: for a partner
    partner_id bigint NOT NULL DEFAULT 0,
    kind text NOT NULL,
    subject_id text NOT NULL,          -- booking, need or match, as the kind says
    text text NOT NULL,
    act_by timestamptz,
    made timestamptz NOT NULL,
    read timestamptz,
    read_by bigint,
    correlation_id text NOT NULL,
    CONSTRAINT notice_side_check CHECK ((firm_id = 0) <> (partner_id = 0))
);
CREATE INDEX notice_side_made_idx ON notice (firm_id, partner_id, made DESC, id DESC);
CREATE INDEX notice_side_unread_idx ON notice (firm_id, partner_id, made DESC, id DESC) WHERE read IS NULL;
CREATE INDEX notice_made_idx ON notice (made);
