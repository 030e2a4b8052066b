-- Rounds that place many needs at once, and proposals of partners for needs that they are shown.

ALTER TABLE need
    -- It gets no offers before the next round.
    ADD COLUMN waits boolean NOT NULL DEFAULT false,
    -- Partners may see its text and propose themselves.
    ADD COLUMN shown boolean NOT NULL DEFAULT false;
CREATE INDEX need_shown_idx ON need (opened DESC, id DESC) WHERE state = 'open' AND shown;

-- What a need was searched with, as little-endian float32, so that a round need not compute it again.
CREATE TABLE need_vector (
    need_id text PRIMARY KEY REFERENCES need,
    vector bytea NOT NULL,
    model text NOT NULL
);

CREATE TABLE round (
    id text PRIMARY KEY,
    state text NOT NULL CONSTRAINT round_state_check CHECK (state IN ('running', 'done')),
    started timestamptz NOT NULL,
    started_by bigint,                 -- NULL: by schedule
    ended timestamptz,
    offers int NOT NULL DEFAULT 0,
    from_safety_net int NOT NULL DEFAULT 0,
    unplaced int NOT NULL DEFAULT 0,   -- needs that nobody could take
    blocking_pairs int NOT NULL DEFAULT 0,
    ranker_version text NOT NULL DEFAULT '',
    correlation_id text NOT NULL,
    CONSTRAINT round_ended_check CHECK ((state = 'done') = (ended IS NOT NULL))
);
CREATE INDEX round_started_idx ON round (started DESC, id DESC);
CREATE INDEX round_running_idx ON round (started) WHERE state = 'running';

ALTER TABLE offer
    ADD COLUMN origin text NOT NULL DEFAULT 'hub' CONSTRAINT offer_origin_check CHECK (origin IN ('hub', 'round', 'partner')),
    ADD COLUMN round_id text REFERENCES round,
    -- A place of the provider is reserved for it until it is decided or lapses; its id is that of the match it would be.
    ADD COLUMN holds_place boolean NOT NULL DEFAULT false,
    -- Of the partner to the firm.
    ADD COLUMN message text NOT NULL DEFAULT '';
