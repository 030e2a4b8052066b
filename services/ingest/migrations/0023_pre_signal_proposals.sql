-- What happens to signals that a machine does not have: their samples go to quarantine, and with 'propose' the signal is
-- proposed to the firm as well.
ALTER TABLE firm ADD COLUMN unknown_signals text NOT NULL DEFAULT 'refuse'
    CONSTRAINT firm_unknown_signals_check CHECK (unknown_signals IN ('refuse', 'propose'));

CREATE TABLE signal_proposal (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    firm_id bigint NOT NULL,
    machine_id bigint NOT NULL REFERENCES machine,
    name text NOT NULL,
    samples bigint NOT NULL,
    first timestamptz NOT NULL,
    last timestamptz NOT NULL,
    example float8 NOT NULL,          -- the last value seen
    lowest float8 NOT NULL,
    highest float8 NOT NULL,
    whole boolean NOT NULL,           -- every value was a whole number
    source text NOT NULL,
    dismissed timestamptz,
    CONSTRAINT signal_proposal_machine_id_name_key UNIQUE (machine_id, name)
);
CREATE INDEX signal_proposal_firm_id_idx ON signal_proposal (firm_id, id);

-- The machine that the samples were meant for, where it was known: what was mended for a machine is replayed for it.
ALTER TABLE quarantine ADD COLUMN machine_id bigint NOT NULL DEFAULT 0;
CREATE INDEX quarantine_waiting_idx ON quarantine (firm_id, machine_id, reason, received, id) WHERE replayed IS NULL;
