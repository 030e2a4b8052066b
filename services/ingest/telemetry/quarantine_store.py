"""SQL of the quarantine."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

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
    # Not of a page, which would be as large as all of them.
    batch: bytes | None = None


_LISTED = (
    "SELECT id, firm_id, credential_id, source, door, reason, detail, samples, received, replayed FROM quarantine "
)
_QUARANTINED = _LISTED.replace("replayed FROM", "replayed, batch FROM")


async def quarantine_page(
    connection: Connection, firm_id: int, before: tuple[datetime, str] | None, limit: int
) -> list[Quarantined]:
    """Newest first; `before` is (received, id) of the last item of the page before. firm_id 0: all firms."""
    at, item_id = before or (None, "")
    rows = await connection.fetch(
        _LISTED + "WHERE ($1::bigint = 0 OR firm_id = $1) AND ($2::timestamptz IS NULL OR (received, id) < ($2, $3)) "
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


@dataclass(frozen=True)
class Waiting:
    """What waits of a firm for one reason: of a machine, or (machine_id 0) of a path that was not registered."""

    firm_id: int
    machine_id: int
    machine_path: str
    reason: str


async def waiting(connection: Connection, of: Waiting, after: tuple[datetime, str], limit: int) -> list[Quarantined]:
    """Items that have not been replayed, oldest first, above `after` (received, id)."""
    rows = await connection.fetch(
        _QUARANTINED
        + "WHERE firm_id = $1 AND machine_id = $2 AND reason = $3 AND machine_path = $4 AND replayed IS NULL "
        "AND (received, id) > ($5, $6) AND batch IS NOT NULL ORDER BY received, id LIMIT $7",
        *(of.firm_id, of.machine_id, of.reason, of.machine_path, *after, limit),
    )
    return [Quarantined(**dict(row)) for row in rows]


async def count_waiting(connection: Connection, of: Waiting, limit: int) -> int:
    found: int = await connection.fetchval(
        "SELECT count(*) FROM (SELECT 1 FROM quarantine WHERE firm_id = $1 AND machine_id = $2 AND reason = $3 "
        "AND machine_path = $4 AND replayed IS NULL LIMIT $5) AS counted",
        *(of.firm_id, of.machine_id, of.reason, of.machine_path, limit),
    )
    return found


async def position(connection: Connection, topic: str) -> int:
    """How far the topic (one partition) has been stored."""
    found: int | None = await connection.fetchval(
        "SELECT next_offset FROM position WHERE topic = $1 AND partition = 0", topic
    )
    return found or 0
