"""SQL of the audit: who changed what in the registry."""

from dataclasses import dataclass
from datetime import datetime

from services.common.clock import from_us
from services.common.database import Connection
from services.common.logs import current_correlation_id


@dataclass(frozen=True)
class Entry:
    """`credential_id` 0: nobody with a key (a claim code was exchanged)."""

    id: int
    at: datetime
    firm_id: int
    credential_id: int
    action: str
    detail: str
    correlation_id: str


async def note(
    connection: Connection, now_us: int, *, firm_id: int, credential_id: int, action: str, detail: str
) -> None:
    """Write an entry in the transaction of the change. Keys and codes never stand in `detail`."""
    await connection.execute(
        "INSERT INTO audit (at, firm_id, credential_id, action, detail, correlation_id) VALUES ($1, $2, $3, $4, $5, $6)",
        *(from_us(now_us), firm_id, credential_id, action, detail, current_correlation_id()),
    )


async def page(connection: Connection, firm_id: int, before: int, limit: int) -> list[Entry]:
    """Newest first, below the id `before` (0: from the newest). firm_id 0: all."""
    rows = await connection.fetch(
        "SELECT id, at, firm_id, credential_id, action, detail, correlation_id FROM audit "
        "WHERE ($1::bigint = 0 OR firm_id = $1) AND ($2::bigint = 0 OR id < $2) ORDER BY id DESC LIMIT $3",
        *(firm_id, before, limit),
    )
    return [Entry(**dict(row)) for row in rows]
