-- Experts who assess applications, and organisations whose applications they must not judge.

ALTER TABLE provider
    ADD COLUMN assesses text NOT NULL DEFAULT 'no'
        CONSTRAINT provider_assesses_check CHECK (assesses IN ('no', 'also', 'only') AND (assesses = 'no' OR kind = 'expert')),
    ADD COLUMN conflict_organisations text[] NOT NULL DEFAULT '{}';
CREATE INDEX match_firm_id_provider_id_idx ON match (firm_id, provider_id);
