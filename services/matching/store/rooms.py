"""SQL of rooms."""

from datetime import datetime

import asyncpg

from services.common.database import Connection
from services.matching.rooms import Room, RoomState

Row = asyncpg.Record

_ROOM_ROWS = (
    "SELECT id, match_id, firm_id, partner_id, provider_id, machine_ids, signal_ids, purpose, data_from, data_until, opens, "
    "closes, state, opened_by, ended, ended_by, end_reason, request_id, request_sha256, correlation_id FROM room "
)


async def add_room(connection: Connection, room: Room, *, request_id: str, request_sha256: bytes) -> None:
    await connection.execute(
        "INSERT INTO room (id, match_id, firm_id, partner_id, provider_id, signal_ids, purpose, data_from, data_until, opens, "
        "closes, state, opened_by, request_id, request_sha256, correlation_id, machine_ids) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17)",
        room.id,
        room.match_id,
        room.firm_id,
        room.partner_id,
        room.provider_id,
        room.signal_ids,
        room.purpose,
        room.data_from,
        room.data_until,
        room.opens,
        room.closes,
        room.state,
        room.opened_by,
        request_id or None,
        request_sha256 if request_id else None,
        room.correlation_id,
        room.machine_ids,
    )


async def room(connection: Connection, room_id: str, *, hold: bool = False) -> Room | None:
    """`hold`: nobody else changes it until the transaction ends."""
    query = _ROOM_ROWS + "WHERE id = $1"
    row = await connection.fetchrow(query + " FOR NO KEY UPDATE" if hold else query, room_id)
    return None if row is None else _room(row)


async def room_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[Room, bytes] | None:
    row = await connection.fetchrow(_ROOM_ROWS + "WHERE firm_id = $1 AND request_id = $2", firm_id, request_id)
    return None if row is None else (_room(row), row["request_sha256"])


async def open_rooms_of_match(connection: Connection, match_id: str) -> list[Room]:
    """Held, in order of id."""
    rows = await connection.fetch(
        _ROOM_ROWS + "WHERE match_id = $1 AND state = 'open' ORDER BY id FOR NO KEY UPDATE", match_id
    )
    return [_room(row) for row in rows]


async def list_rooms(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    provider_id: str,
    state: RoomState | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Room]:
    """Newest first. 0 and "": of all."""
    opens, room_id = before or (None, "")
    rows = await connection.fetch(
        _ROOM_ROWS + "WHERE ($1::bigint = 0 OR firm_id = $1) AND ($2::bigint = 0 OR partner_id = $2) "
        "AND ($3 = '' OR provider_id = $3) AND ($4::text IS NULL OR state = $4) "
        "AND ($5::timestamptz IS NULL OR (opens, id) < ($5, $6)) ORDER BY opens DESC, id DESC LIMIT $7",
        firm_id,
        partner_id,
        provider_id,
        state,
        opens,
        room_id,
        limit,
    )
    return [_room(row) for row in rows]


async def all_rooms(connection: Connection) -> list[Room]:
    return [_room(row) for row in await connection.fetch(_ROOM_ROWS + "ORDER BY opens, id")]


async def end_room(connection: Connection, room: Room, *, by: int | None) -> None:
    """Store its end; it must be held."""
    await connection.execute(
        "UPDATE room SET state = $2, ended = $3, ended_by = $4, end_reason = $5 WHERE id = $1",
        room.id,
        room.state,
        room.ended,
        by,
        room.end_reason,
    )


async def due_rooms(connection: Connection, *, now: datetime, limit: int) -> list[str]:
    """Ids of open rooms whose time is over."""
    rows = await connection.fetch(
        "SELECT id FROM room WHERE state = 'open' AND closes <= $1 ORDER BY closes, id LIMIT $2", now, limit
    )
    return [row["id"] for row in rows]


async def forget(connection: Connection, *, ended_before: datetime, limit: int) -> list[str]:
    """Returns the ids of those that were forgotten."""
    rows = await connection.fetch(
        "DELETE FROM room WHERE id IN (SELECT id FROM room WHERE ended < $1 ORDER BY ended LIMIT $2) RETURNING id",
        ended_before,
        limit,
    )
    return [row["id"] for row in rows]


def _room(row: Row) -> Room:
    return Room(
        id=row["id"],
        match_id=row["match_id"],
        firm_id=row["firm_id"],
        partner_id=row["partner_id"],
        provider_id=row["provider_id"],
        machine_ids=tuple(row["machine_ids"]),
        signal_ids=tuple(row["signal_ids"]),
        purpose=row["purpose"],
        data_from=row["data_from"],
        data_until=row["data_until"],
        opens=row["opens"],
        closes=row["closes"],
        opened_by=row["opened_by"],
        correlation_id=row["correlation_id"],
        state=RoomState(row["state"]),
        ended=row["ended"],
        end_reason=row["end_reason"],
    )
