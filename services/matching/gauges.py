"""How needs, offers, matches and places stand, counted in the database for those who watch."""

from collections import Counter as Count
from datetime import timedelta

from prometheus_client import Gauge

from services.common.clock import Clock, today
from services.common.database import Pool, transaction

INTERVAL_S = 15.0

# All of these are counted in the database, so each process of the service shows the same.
needs = Gauge("smdih_matching_needs", "In the database: needs", ["state"])
needs_waiting = Gauge("smdih_matching_needs_waiting", "In the database: open needs without an offer")
need_waiting_seconds = Gauge(
    "smdih_matching_need_waiting_seconds", "In the database: how long an open need has had no offer, at most"
)
offers_open = Gauge("smdih_matching_offers_open", "In the database: offers that nobody has answered yet")
matches = Gauge("smdih_matching_matches_current", "In the database: matches", ["state"])
# Places of this quarter at active providers that have a limit.
places = Gauge("smdih_matching_places", "In the database: places of this quarter", ["state"])
bookings_waiting = Gauge("smdih_matching_bookings_waiting", "In the database: bookings that wait for a seat")

NEED_STATES = ("open", "matched", "closed")
MATCH_STATES = ("accepted", "engaged", "finished", "closed", "cancelled", "expired")


class LifeGauges:
    def __init__(self, pool: Pool, clock: Clock, *, need_lifetime: timedelta) -> None:
        self._pool = pool
        self._clock = clock
        self._need_lifetime = need_lifetime

    async def measure(self) -> None:
        """Raises TryAgain."""
        async with transaction(self._pool) as connection:
            of_needs = await connection.fetch("SELECT state, count(*) AS n FROM need GROUP BY state")
            waiting = await connection.fetchrow(
                # A need expires so long after it was opened, or after its last offer ended.
                "SELECT count(*) AS n, coalesce(extract(epoch FROM now() - (min(expires) - $1::interval)), 0)::float8 AS longest "
                "FROM need WHERE state = 'open' AND offers = 0",
                self._need_lifetime,
            )
            open_offers = await connection.fetchval("SELECT count(*) FROM offer WHERE state = 'made'")
            of_matches = await connection.fetch("SELECT state, count(*) AS n FROM match GROUP BY state")
            quarter = today(self._clock)
            of_places = await connection.fetchrow(
                "SELECT coalesce(sum(q.taken), 0)::bigint AS taken, coalesce(sum(greatest("
                "coalesce(q.capacity, p.capacity_per_quarter) - coalesce(q.taken, 0), 0)), 0)::bigint AS free "
                "FROM provider p LEFT JOIN provider_quarter q "
                "ON q.provider_id = p.id AND q.quarter = date_trunc('quarter', $1::date)::date "
                "WHERE p.active AND p.capacity_per_quarter IS NOT NULL",
                quarter,
            )
            seats = await connection.fetchval("SELECT count(*) FROM booking WHERE state = 'waiting'")
        assert waiting is not None
        assert of_places is not None
        for gauge, states, rows in ((needs, NEED_STATES, of_needs), (matches, MATCH_STATES, of_matches)):
            counts = Count({row["state"]: row["n"] for row in rows})
            for state in states:
                gauge.labels(state).set(counts[state])
        needs_waiting.set(waiting["n"])
        need_waiting_seconds.set(waiting["longest"])
        offers_open.set(open_offers)
        places.labels("taken").set(of_places["taken"])
        places.labels("free").set(of_places["free"])
        bookings_waiting.set(seats)
