-- What a round proposed, newest first.
CREATE INDEX offer_round_idx ON offer (round_id, made DESC, id DESC) WHERE round_id IS NOT NULL;
