-- Reads through rooms are forgotten when they are old.
CREATE INDEX room_read_minute_idx ON room_read (minute);
