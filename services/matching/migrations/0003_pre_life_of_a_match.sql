-- What becomes of a match: engaged, finished, scored by both sides, cancelled or expired; and the place it holds meanwhile.

-- One promised place of a provider's quarter. `taken` of the quarter counts those that are not released.
CREATE TABLE place (
    id text PRIMARY KEY,               -- of the match that holds it
    provider_id text NOT NULL,
    quarter date NOT NULL,
    state text NOT NULL CONSTRAINT place_state_check CHECK (state IN ('reserved', 'confirmed', 'released')),
    expires timestamptz,               -- a reserved place is released then
    why text NOT NULL DEFAULT '',      -- it was released: cancelled or expired
    CONSTRAINT place_provider_id_quarter_fkey FOREIGN KEY (provider_id, quarter) REFERENCES provider_quarter,
    CONSTRAINT place_expires_check CHECK ((state = 'reserved') = (expires IS NOT NULL)),
    CONSTRAINT place_why_check CHECK ((state = 'released') = (why <> ''))
);
CREATE INDEX place_provider_id_quarter_idx ON place (provider_id, quarter) WHERE state <> 'released';
CREATE INDEX place_expires_idx ON place (expires, id) WHERE state = 'reserved';

ALTER TABLE match
    ADD COLUMN state text NOT NULL DEFAULT 'accepted' CONSTRAINT match_state_check
        CHECK (state IN ('accepted', 'engaged', 'finished', 'closed', 'cancelled', 'expired')),
    ADD COLUMN engage_by timestamptz,
    ADD COLUMN engaged timestamptz,
    ADD COLUMN finished timestamptz,
    ADD COLUMN result text NOT NULL DEFAULT '' CONSTRAINT match_result_check CHECK (result IN ('', 'solved', 'partly', 'not_solved')),
    ADD COLUMN result_note text NOT NULL DEFAULT '',
    ADD COLUMN scores_until timestamptz,
    ADD COLUMN ended timestamptz,
    ADD COLUMN ended_by bigint,        -- NULL: the hub
    ADD COLUMN end_reason text NOT NULL DEFAULT '',
    ADD CONSTRAINT match_finished_check CHECK ((state IN ('finished', 'closed')) = (finished IS NOT NULL)),
    ADD CONSTRAINT match_ended_check CHECK ((state IN ('closed', 'cancelled', 'expired')) = (ended IS NOT NULL));
-- Matches of the release before begin their time to engage now.
UPDATE match SET engage_by = now() + interval '180 days';
INSERT INTO place (id, provider_id, quarter, state, expires)
    SELECT id, provider_id, quarter, 'reserved', engage_by FROM match;
-- A need may be matched again after a match that came to nothing.
ALTER TABLE match DROP CONSTRAINT match_need_id_key;
CREATE UNIQUE INDEX match_need_id_standing_key ON match (need_id) WHERE state NOT IN ('cancelled', 'expired');
CREATE INDEX match_need_id_idx ON match (need_id);
CREATE INDEX match_provider_id_idx ON match (provider_id);
CREATE INDEX match_scores_until_idx ON match (scores_until) WHERE state = 'finished';
CREATE INDEX match_accepted_idx ON match (accepted DESC, id DESC);
CREATE INDEX match_firm_id_accepted_idx ON match (firm_id, accepted DESC, id DESC);
CREATE INDEX match_partner_id_accepted_idx ON match (partner_id, accepted DESC, id DESC);

CREATE TABLE match_score (
    match_id text NOT NULL REFERENCES match,
    side text NOT NULL CONSTRAINT match_score_side_check CHECK (side IN ('firm', 'partner')),
    points int NOT NULL CONSTRAINT match_score_points_check CHECK (points BETWEEN 1 AND 5),
    comment text NOT NULL,
    scored timestamptz NOT NULL,
    scored_by bigint NOT NULL,
    PRIMARY KEY (match_id, side)
);

-- What firms have scored, one score a firm: the newest. The ranker reads it here.
ALTER TABLE provider
    ADD COLUMN outcome_firms int NOT NULL DEFAULT 0,
    ADD COLUMN outcome_points int NOT NULL DEFAULT 0;

-- A need that is open again gets offers of a new attempt.
ALTER TABLE need ADD COLUMN attempt int NOT NULL DEFAULT 1;
ALTER TABLE offer
    ADD COLUMN attempt int NOT NULL DEFAULT 1,
    DROP CONSTRAINT offer_need_id_provider_id_key,
    ADD CONSTRAINT offer_need_id_provider_id_attempt_key UNIQUE (need_id, provider_id, attempt),
    DROP CONSTRAINT offer_state_check,
    ADD CONSTRAINT offer_state_check CHECK (state IN ('made', 'accepted', 'declined', 'lapsed', 'cancelled'));
