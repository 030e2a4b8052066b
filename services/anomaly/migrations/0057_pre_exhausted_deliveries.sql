-- Deliveries whose tries are over are looked for before each message; among 50,000 that are due there are hardly any.
CREATE INDEX delivery_exhausted_index ON delivery (due) WHERE state = 'pending' AND attempts >= 12;
