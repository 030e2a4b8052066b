-- Which firms are one enterprise (under common control): the limit of minimal financial assistance is theirs together.
CREATE TABLE firm_group (
    firm_id bigint PRIMARY KEY,
    group_id text NOT NULL,
    recorded timestamptz NOT NULL,
    recorded_by bigint NOT NULL
);
CREATE INDEX firm_group_group_id_idx ON firm_group (group_id);

-- What a group rests on, such as the filing that shows the control; kept when a group is given up, with no firms.
CREATE TABLE enterprise_group (
    id text PRIMARY KEY,
    source text NOT NULL,
    recorded timestamptz NOT NULL,
    recorded_by bigint NOT NULL
);
ALTER TABLE firm_group ADD CONSTRAINT firm_group_group_id_fkey FOREIGN KEY (group_id) REFERENCES enterprise_group (id);
