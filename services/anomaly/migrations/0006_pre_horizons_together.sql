-- move_horizon for all partitions whose records are taken together: one question in place of one a partition. Rows are locked in the
-- same order as by whoever makes a tuning.
CREATE FUNCTION move_horizons(numbers int[], wanted bigint[], known bigint[])
RETURNS TABLE (number int, horizon bigint, tuning_id bigint, from_offset bigint) LANGUAGE plpgsql AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM FROM horizon h WHERE h.partition = ANY(numbers) ORDER BY h.partition FOR UPDATE;
    UPDATE horizon h SET next_offset = greatest(h.next_offset, w.wanted)
        FROM unnest(numbers, move_horizons.wanted) AS w (number, wanted) WHERE h.partition = w.number;
    RETURN QUERY SELECT w.number, h.next_offset, s.tuning_id, s.from_offset
        FROM unnest(numbers, move_horizons.known) AS w (number, known) JOIN horizon h ON h.partition = w.number
        LEFT JOIN tuning_start s ON s.partition = w.number AND s.tuning_id > w.known;
END
$$;
