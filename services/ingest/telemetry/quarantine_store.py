"""SQL of the quarantine."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.common.clock import from_us
from services.common.database import Connection
from services.common.errors import NotFound


@dataclass(frozen=True)
class Quarantined:
    id: str
    firm_id: int
    credential_id: int
    source: str
    door: str
    reason: str
    detail: str
    samples: int
    received: datetime
    replayed: datetime | None
    batch: bytes | None
    raw: bytes | None


_QUARANTINED = """
SELECT id, firm_id, credential_id, source, door, reason, detail, samples, received, replayed, batch, raw FROM quarantine
"""


async def quarantine_page(
    connection: Connection, firm_id: int, before: tuple[int, str] | None, limit: int
) -> list[Quarantined]:
    """Newest first; `before` is (received_us, id) of the last item of the page before. firm_id 0: all firms."""
    at, item_id = (from_us(before[0]), before[1]) if before else (None, "")
    rows = await connection.fetch(
        _QUARANTINED
        + "WHERE ($1::bigint = 0 OR firm_id = $1) AND ($2::timestamptz IS NULL OR (received, id) < ($2, $3)) "
        "ORDER BY received DESC, id DESC LIMIT $4",
        *(firm_id, at, item_id, limit),
    )
    return [Quarantined(**dict(row)) for row in rows]


async def quarantined_item(connection: Connection, item_id: str) -> Quarantined:
    """Raises NotFound."""
    row = await connection.fetchrow(
        _QUARANTINED + "WHERE id = $1",
        item_id,
    )
    if row is None:
        raise NotFound(f"There is no item {item_id!r} in quarantine (it may take a moment to arrive there).")
    return Quarantined(**dict(row))


async def mark_replayed(connection: Connection, item_ids: Sequence[str]) -> None:
    """Their content goes, and so gives its room back: it is stored, or stands in quarantine as items of their own."""
    await connection.execute(
        "UPDATE quarantine SET replayed = now(), batch = NULL, raw = NULL WHERE id = ANY($1::text[])", list(item_ids)
    )


async def waiting(
    connection: Connection,
    machine_id: int,
    firm_id: int,
    reason: str,
    after: tuple[datetime, str] | None,
    limit: int,
) -> list[Quarantined]:
    """Items of a machine that have not been replayed, oldest first, above `after` (received, id)."""
    at, item_id = after or (None, "")
    rows = await connection.fetch(
        _QUARANTINED + "WHERE machine_id = $1 AND reason = $2 AND replayed IS NULL AND batch IS NOT NULL "
        "AND ($3::timestamptz IS NULL OR (received, id) > ($3, $4)) AND firm_id = $6 ORDER BY received, id LIMIT $5",
        *(machine_id, reason, at, item_id, limit, firm_id),
    )
    return [Quarantined(**dict(row)) for row in rows]


async def count_waiting(connection: Connection, machine_id: int, firm_id: int, reason: str, limit: int) -> int:
    found: int = await connection.fetchval(
        "SELECT count(*) FROM (SELECT 1 FROM quarantine WHERE machine_id = $1 AND reason = $2 "
        "AND replayed IS NULL AND firm_id = $4 LIMIT $3) AS counted",
        *(machine_id, reason, limit, firm_id),
    )
    return found


async def position(connection: Connection, topic: str) -> int:
    """How far the topic (one partition) has been stored."""
    found: int | None = await connection.fetchval(
        "SELECT next_offset FROM position WHERE topic = $1 AND partition = 0", topic
    )
    return found or 0
