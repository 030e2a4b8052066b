-- A match that was cancelled or has expired carries no application any more. A need has one match at a time, so one that was followed
-- by another had ended before.
ALTER TABLE match ADD COLUMN ended timestamptz;
CREATE INDEX match_need_id_idx ON match (need_id);
UPDATE match SET ended = later.accepted FROM match AS later
    WHERE later.need_id = match.need_id AND later.firm_id = match.firm_id AND later.accepted > match.accepted;
