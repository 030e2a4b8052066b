-- Bookings end with the match that they were made for.
CREATE INDEX booking_match_id_idx ON booking (match_id) WHERE match_id IS NOT NULL AND state IN ('confirmed', 'offered', 'waiting');
