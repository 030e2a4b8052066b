"""SQL of the fairness report."""

from datetime import datetime
from typing import Literal

from services.common.database import Connection
from services.matching.fairness import GroupFigures

_FIGURES = """
    SELECT grouped AS "group", count(*)::int AS needs, avg(offers)::float8 AS offers_mean,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM first_made - opened)::float8) AS first_offer_s_median,
        avg((accepted > 0)::int)::float8 AS matched_share, avg((offers = 0)::int)::float8 AS without_offer_share,
        avg((answered = 0)::int)::float8 AS unanswered_share, avg(accepted_rank)::float8 AS accepted_rank_mean
    FROM (
        SELECT CASE $3 WHEN 'size' THEN n.size ELSE n.region END AS grouped, n.opened, count(o.id) AS offers,
            min(o.made) AS first_made, count(*) FILTER (WHERE o.state IN ('accepted', 'cancelled')) AS accepted,
            count(*) FILTER (WHERE o.state IN ('accepted', 'declined', 'cancelled')) AS answered,
            min(o.rank) FILTER (WHERE o.state = 'accepted') AS accepted_rank
        FROM need n LEFT JOIN offer o ON o.need_id = n.id
        WHERE n.opened >= $1 AND n.opened < $2
        GROUP BY n.id
    ) AS each
    GROUP BY grouped ORDER BY grouped
"""


async def figures(
    connection: Connection, by: Literal["size", "region"], *, opened_from: datetime, opened_until: datetime
) -> list[GroupFigures]:
    """In order of group; "" is for needs that do not say."""
    rows = await connection.fetch(_FIGURES, opened_from, opened_until, by)
    return [GroupFigures(**dict(row)) for row in rows]
