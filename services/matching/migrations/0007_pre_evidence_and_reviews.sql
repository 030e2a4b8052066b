-- What stands behind a profile, and until when it holds.
ALTER TABLE provider
    ADD COLUMN esco_skills text[] NOT NULL DEFAULT '{}',
    ADD COLUMN evidence jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN review_on date,
    -- First day on which it is not offered: it has expired, its review is due, or a document that it needs has run out.
    ADD COLUMN offered_until date;
UPDATE provider SET offered_until = expires_on;
