-- Scores of firms bear on rankings once their match is closed.
UPDATE provider p SET (outcome_firms, outcome_points) = (
    SELECT count(*), coalesce(sum(points), 0) FROM (
        SELECT DISTINCT ON (m.firm_id) s.points FROM match m JOIN match_score s ON s.match_id = m.id
        WHERE m.provider_id = p.id AND m.state = 'closed' AND s.side = 'firm' ORDER BY m.firm_id, s.scored DESC, m.id
    ) AS newest
) WHERE outcome_firms > 0;
