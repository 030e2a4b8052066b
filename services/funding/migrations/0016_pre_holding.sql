-- Who owns how much of whom among the firms of the hub, and what follows from it: more than half, or a dominant influence, makes both
-- one enterprise with all others that hang together so.
CREATE TABLE holding (
    owner_firm_id bigint NOT NULL,
    owned_firm_id bigint NOT NULL,
    percent text NOT NULL,             -- exact, as stated; the higher of capital and votes
    dominant_influence boolean NOT NULL,
    relation text NOT NULL CONSTRAINT holding_relation_check CHECK (relation IN ('linked', 'partner', 'autonomous')),
    -- The rules that the relation was judged by, when it was stated.
    parameters_version text NOT NULL,
    source text NOT NULL,
    recorded timestamptz NOT NULL,
    recorded_by bigint NOT NULL,
    PRIMARY KEY (owner_firm_id, owned_firm_id),
    CONSTRAINT holding_owner_owned_check CHECK (owner_firm_id <> owned_firm_id)
);
CREATE INDEX holding_owned_firm_id_idx ON holding (owned_firm_id);

-- The firm and all that are one enterprise with it, by holdings and by the groups that operators declared.
CREATE FUNCTION kin_of(firm bigint) RETURNS SETOF bigint LANGUAGE sql STABLE AS $$
    WITH RECURSIVE kin (firm_id) AS (
        SELECT firm
        UNION
        SELECT near.firm_id FROM kin CROSS JOIN LATERAL (
            SELECT other.firm_id FROM firm_group own JOIN firm_group other ON other.group_id = own.group_id
            WHERE own.firm_id = kin.firm_id
            UNION ALL
            SELECT owned_firm_id FROM holding WHERE owner_firm_id = kin.firm_id AND relation = 'linked'
            UNION ALL
            SELECT owner_firm_id FROM holding WHERE owned_firm_id = kin.firm_id AND relation = 'linked'
        ) near
    )
    SELECT firm_id FROM kin
$$;
