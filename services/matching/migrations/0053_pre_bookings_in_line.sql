-- The line of a session ends when it begins.
CREATE INDEX booking_waiting_idx ON booking (session_id, number) WHERE state = 'waiting';
