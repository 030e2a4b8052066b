-- Why a need was closed, how long it is kept open without an offer, and what it was last tried against.

ALTER TABLE need
    ADD COLUMN close_reason text NOT NULL DEFAULT '',
    ADD COLUMN close_note text NOT NULL DEFAULT '',
    ADD COLUMN expires timestamptz NOT NULL DEFAULT now() + interval '180 days',
    -- Number of the provider change, and quarter, that it was last ranked against; -1: of none.
    ADD COLUMN tried_change bigint NOT NULL DEFAULT -1,
    ADD COLUMN tried_quarter date NOT NULL DEFAULT '0001-01-01',
    -- When a round last found no place for it.
    ADD COLUMN round_missed timestamptz;
CREATE INDEX need_to_try_idx ON need (tried_change, opened, id) WHERE state = 'open' AND offers = 0 AND NOT waits;
CREATE INDEX need_expires_idx ON need (expires) WHERE state = 'open';

-- Proposals of partners were counted as offers.
UPDATE need n SET offers = 0, no_offer_reason = 'OFFERS_ENDED' WHERE state = 'open' AND offers > 0 AND NOT EXISTS
    (SELECT FROM offer o WHERE o.need_id = n.id AND o.attempt = n.attempt AND o.origin <> 'partner');
