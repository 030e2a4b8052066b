"""SQL of sessions and bookings. Whatever changes seats or the line does so while holding the session."""

from datetime import date, datetime

import asyncpg

from services.common.database import Connection
from services.matching.sessions import Booking, BookingState, Session, SessionState

Row = asyncpg.Record


async def lock_session(connection: Connection, session_id: str) -> Session | None:
    # Two statements: the second sees what those who held it before have done to its bookings.
    await connection.execute("SELECT FROM session WHERE id = $1 FOR NO KEY UPDATE", session_id)
    return await session(connection, session_id)


async def session(connection: Connection, session_id: str) -> Session | None:
    row = await connection.fetchrow(f"{_SESSIONS} WHERE s.id = $1", session_id)
    return None if row is None else _session(row)


async def list_sessions(
    connection: Connection,
    *,
    provider_id: str,
    starts_from: datetime,
    live_on: date | None,
    after: tuple[datetime, str] | None,
    limit: int,
) -> list[Session]:
    """In order of time. "": of all providers. `live_on`: only open ones of those that may be offered on that day."""
    starts, session_id = after or (None, "")
    rows = await connection.fetch(
        f"{_SESSIONS} WHERE ($1 = '' OR s.provider_id = $1) AND s.starts >= $2 "
        "AND ($3::date IS NULL OR (s.state = 'open' AND p.active AND (p.offered_until IS NULL OR p.offered_until > $3))) "
        "AND ($4::timestamptz IS NULL OR (s.starts, s.id) > ($4, $5)) ORDER BY s.starts, s.id LIMIT $6",
        provider_id,
        starts_from,
        live_on,
        starts,
        session_id,
        limit,
    )
    return [_session(row) for row in rows]


async def put_session(connection: Connection, session: Session) -> None:
    """Create it, or replace what a partner may change."""
    await connection.execute(
        """
        INSERT INTO session AS s (id, provider_id, title, place, starts, ends, seats, confirm_within, state, cancel_reason,
            sequence, changed)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
        ON CONFLICT (id) DO UPDATE SET title = excluded.title, place = excluded.place, starts = excluded.starts,
            ends = excluded.ends, seats = excluded.seats, confirm_within = excluded.confirm_within, state = excluded.state,
            cancel_reason = excluded.cancel_reason, sequence = excluded.sequence, changed = excluded.changed
        WHERE s.provider_id = excluded.provider_id
        """,
        session.id,
        session.provider_id,
        session.title,
        session.place,
        session.starts,
        session.ends,
        session.seats,
        session.confirm_within,
        session.state,
        session.cancel_reason,
        session.sequence,
        session.changed,
    )


async def count_seats(connection: Connection, session_id: str, by: int) -> None:
    """Take seats, or give them back. The database refuses more than there are."""
    await connection.execute("UPDATE session SET taken = taken + $2 WHERE id = $1", session_id, by)


async def add_booking(connection: Connection, booking: Booking, *, request_id: str) -> None:
    await connection.execute(
        "INSERT INTO booking (id, session_id, firm_id, partner_id, match_id, state, booked, booked_by, changed, request_id, "
        "correlation_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $7, $9, $10)",
        booking.id,
        booking.session_id,
        booking.firm_id,
        booking.partner_id,
        booking.match_id or None,
        booking.state,
        booking.booked,
        booking.booked_by,
        request_id or None,
        booking.correlation_id,
    )


async def change_booking(
    connection: Connection,
    booking_id: str,
    state: BookingState,
    *,
    changed: datetime,
    confirm_by: datetime | None = None,
    reason: str = "",
) -> None:
    await connection.execute(
        "UPDATE booking SET state = $2, changed = $3, confirm_by = $4, end_reason = $5, sequence = sequence + 1 WHERE id = $1",
        booking_id,
        state,
        changed,
        confirm_by,
        reason,
    )


async def keep_until_start(connection: Connection, session_id: str) -> None:
    """Seats that are offered are kept no longer than until the session begins."""
    await connection.execute(
        "UPDATE booking SET confirm_by = least(confirm_by, s.starts) FROM session s "
        "WHERE s.id = $1 AND session_id = s.id AND booking.state = 'offered'",
        session_id,
    )


async def booking(connection: Connection, booking_id: str) -> Booking | None:
    row = await connection.fetchrow(f"{_BOOKINGS} WHERE b.id = $1", booking_id)
    return None if row is None else _booking(row)


async def booking_by_request(connection: Connection, firm_id: int, request_id: str) -> Booking | None:
    row = await connection.fetchrow(f"{_BOOKINGS} WHERE b.firm_id = $1 AND b.request_id = $2", firm_id, request_id)
    return None if row is None else _booking(row)


async def bookings_of_firm(connection: Connection, session_id: str, firm_id: int) -> int:
    """How many that have a seat or wait for one."""
    found: int = await connection.fetchval(
        "SELECT count(*) FROM booking WHERE session_id = $1 AND firm_id = $2 AND state IN ('confirmed', 'offered', 'waiting')",
        session_id,
        firm_id,
    )
    return found


async def standing_bookings(connection: Connection, session_id: str) -> list[Booking]:
    """Those that have a seat or wait for one, in the order they came."""
    rows = await connection.fetch(
        f"{_BOOKINGS} WHERE b.session_id = $1 AND b.state IN ('confirmed', 'offered', 'waiting') ORDER BY b.number",
        session_id,
    )
    return [_booking(row) for row in rows]


async def first_waiting(connection: Connection, session_id: str) -> Booking | None:
    row = await connection.fetchrow(
        f"{_BOOKINGS} WHERE b.session_id = $1 AND b.state = 'waiting' ORDER BY b.number LIMIT 1", session_id
    )
    return None if row is None else _booking(row)


async def list_bookings(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    provider_id: str,
    session_id: str,
    state: BookingState | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Booking]:
    """Newest first. 0 and "": of all."""
    booked, booking_id = before or (None, "")
    rows = await connection.fetch(
        f"{_BOOKINGS} WHERE ($1::bigint = 0 OR b.firm_id = $1) AND ($2::bigint = 0 OR b.partner_id = $2) "
        "AND ($3 = '' OR s.provider_id = $3) AND ($4 = '' OR b.session_id = $4) AND ($5::text IS NULL OR b.state = $5) "
        "AND ($6::timestamptz IS NULL OR (b.booked, b.id) < ($6, $7)) ORDER BY b.booked DESC, b.id DESC LIMIT $8",
        firm_id,
        partner_id,
        provider_id,
        session_id,
        state,
        booked,
        booking_id,
        limit,
    )
    return [_booking(row) for row in rows]


async def due_bookings(connection: Connection, *, now: datetime, limit: int) -> list[tuple[str, str]]:
    """(booking, session) of offered seats that were not confirmed in time, and of those that wait for what has begun."""
    rows = await connection.fetch(
        "(SELECT id, session_id FROM booking WHERE state = 'offered' AND confirm_by <= $1 ORDER BY confirm_by, id LIMIT $2) "
        "UNION ALL (SELECT b.id, b.session_id FROM booking b JOIN session s ON s.id = b.session_id "
        "WHERE b.state = 'waiting' AND s.starts <= $1 ORDER BY b.number LIMIT $2)",
        now,
        limit,
    )
    return [(row["id"], row["session_id"]) for row in rows]


async def bookings_of_ended_matches(connection: Connection, *, now: datetime, limit: int) -> list[tuple[str, str]]:
    """(booking, session) of those that stand, for what has not begun, and whose match came to nothing."""
    rows = await connection.fetch(
        "SELECT b.id, b.session_id FROM session s JOIN booking b ON b.session_id = s.id JOIN match m ON m.id = b.match_id "
        "WHERE s.starts > $1 AND b.state IN ('confirmed', 'offered', 'waiting') AND m.state IN ('cancelled', 'expired') "
        "ORDER BY b.number LIMIT $2",
        now,
        limit,
    )
    return [(row["id"], row["session_id"]) for row in rows]


async def over_booked(connection: Connection) -> list[str]:
    """Sessions whose count is not that of their bookings, or is beyond their seats. Must be empty."""
    rows = await connection.fetch(
        "SELECT s.id FROM session s WHERE s.taken > s.seats OR s.taken <> "
        "(SELECT count(*) FROM booking b WHERE b.session_id = s.id AND b.state IN ('confirmed', 'offered'))"
    )
    return [row["id"] for row in rows]


_SESSIONS = (
    "SELECT s.id, s.provider_id, s.title, s.place, s.starts, s.ends, s.seats, s.taken, s.confirm_within, s.state, "
    "s.cancel_reason, s.sequence, s.changed, p.partner_id, (SELECT count(*) FROM booking b WHERE b.session_id = s.id AND "
    "b.state = 'waiting') AS waiting "
    "FROM session s JOIN provider p ON p.id = s.provider_id"
)
_BOOKINGS = (
    "SELECT b.id, b.session_id, b.firm_id, b.partner_id, s.provider_id, b.match_id, b.state, b.number, b.confirm_by, b.end_reason, "
    "b.sequence, b.booked, b.booked_by, b.changed, b.request_id, b.correlation_id, CASE WHEN b.state = 'waiting' THEN "
    "(SELECT count(*) FROM booking w WHERE w.session_id = b.session_id AND w.state = 'waiting' AND w.number <= b.number) "
    "ELSE 0 END AS in_line FROM booking b JOIN session s ON s.id = b.session_id"
)


def _session(row: Row) -> Session:
    return Session(
        id=row["id"],
        provider_id=row["provider_id"],
        partner_id=row["partner_id"],
        title=row["title"],
        place=row["place"],
        starts=row["starts"],
        ends=row["ends"],
        seats=row["seats"],
        taken=row["taken"],
        waiting=row["waiting"],
        confirm_within=row["confirm_within"],
        state=SessionState(row["state"]),
        cancel_reason=row["cancel_reason"],
        sequence=row["sequence"],
        changed=row["changed"],
    )


def _booking(row: Row) -> Booking:
    return Booking(
        id=row["id"],
        session_id=row["session_id"],
        firm_id=row["firm_id"],
        partner_id=row["partner_id"],
        provider_id=row["provider_id"],
        match_id=row["match_id"] or "",
        state=BookingState(row["state"]),
        in_line=row["in_line"],
        confirm_by=row["confirm_by"],
        end_reason=row["end_reason"],
        sequence=row["sequence"],
        booked=row["booked"],
        booked_by=row["booked_by"],
        changed=row["changed"],
        correlation_id=row["correlation_id"],
    )
