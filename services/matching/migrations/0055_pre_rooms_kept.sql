-- Rooms are forgotten long after their end.
CREATE INDEX room_ended_idx ON room (ended) WHERE ended IS NOT NULL;
