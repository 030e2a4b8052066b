-- Terms of ESCO that a firm asks for, by their address.
ALTER TABLE need ADD COLUMN esco_skills text[] NOT NULL DEFAULT '{}';
