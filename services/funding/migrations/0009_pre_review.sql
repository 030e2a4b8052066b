-- Assessment: who judges which application, with which score, and what people made of scores that differ widely.

CREATE TABLE review (
    id text PRIMARY KEY,
    application_id text NOT NULL REFERENCES application (id),
    provider_id text NOT NULL,
    partner_id bigint NOT NULL,
    name text NOT NULL,
    reasons jsonb NOT NULL,           -- why the matching service proposed this assessor
    ranker_version text NOT NULL,
    state text NOT NULL DEFAULT 'invited' CONSTRAINT review_state_check
        CHECK (state IN ('invited', 'accepted', 'declined', 'scored', 'withdrawn')),
    invited timestamptz NOT NULL,
    invited_by bigint NOT NULL,
    answered timestamptz,
    answered_by bigint,
    declined_as text CONSTRAINT review_declined_as_check CHECK (declined_as IN ('conflict', 'not_my_field', 'no_time', 'other')),
    answer text,                      -- the declaration that there is no conflict, or why the assessor declines
    percent text,                     -- decimal text from 0 to 100
    in_scope boolean,
    justification text,
    scored timestamptz,
    CONSTRAINT review_application_id_provider_id_key UNIQUE (application_id, provider_id),
    CONSTRAINT review_answered_check CHECK (state IN ('invited', 'withdrawn') OR (answered IS NOT NULL AND answer IS NOT NULL)),
    CONSTRAINT review_declined_check CHECK ((state = 'declined') = (declined_as IS NOT NULL)),
    CONSTRAINT review_scored_check CHECK (
        (state = 'scored') = (percent IS NOT NULL) AND (percent IS NULL) = (in_scope IS NULL)
        AND (percent IS NULL) = (justification IS NULL) AND (percent IS NULL) = (scored IS NULL))
);
CREATE INDEX review_partner_id_invited_idx ON review (partner_id, invited, id);

-- A person looked at scores that differ widely: they stand, or the assessors are asked again. `scores` are those looked at.
CREATE TABLE moderation (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    application_id text NOT NULL REFERENCES application (id),
    at timestamptz NOT NULL,
    credential_id bigint NOT NULL,
    outcome text NOT NULL CONSTRAINT moderation_outcome_check CHECK (outcome IN ('stands', 'reopened')),
    reason text NOT NULL,
    scores jsonb NOT NULL
);
CREATE INDEX moderation_application_id_idx ON moderation (application_id, id);
CREATE TRIGGER moderation_append BEFORE UPDATE OR DELETE ON moderation FOR EACH ROW EXECUTE FUNCTION refuse_change();
CREATE TRIGGER moderation_truncate BEFORE TRUNCATE ON moderation EXECUTE FUNCTION refuse_change();
