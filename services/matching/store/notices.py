"""SQL of notices."""

from collections.abc import Sequence
from datetime import datetime

import asyncpg

from services.common.database import Connection, all_firms_within
from services.matching.notices import Notice, NoticeKind

Row = asyncpg.Record

_NOTICE_ROWS = (
    "SELECT id, firm_id, partner_id, kind, subject_id, text, act_by, made, read, read_by, correlation_id FROM notice "
)


async def add_notices(connection: Connection, notices: Sequence[Notice]) -> None:
    """What was told already is not told again."""
    async with all_firms_within(connection):  # each is for the other side
        await connection.executemany(
            "INSERT INTO notice (id, firm_id, partner_id, kind, subject_id, text, act_by, made, correlation_id) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (id) DO NOTHING",
            [
                (
                    notice.id,
                    notice.firm_id,
                    notice.partner_id,
                    notice.kind,
                    notice.subject_id,
                    notice.text,
                    notice.act_by,
                    notice.made,
                    notice.correlation_id,
                )
                for notice in notices
            ],
        )


async def list_notices(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    unread: bool,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Notice]:
    """Newest first, of the one side whose id is given. Kinds that only a later release knows are left to it."""
    made, notice_id = before or (None, "")
    rows = await connection.fetch(
        _NOTICE_ROWS + "WHERE firm_id = $1 AND partner_id = $2 AND (NOT $3 OR read IS NULL) AND kind = ANY($7::text[]) "
        "AND ($4::timestamptz IS NULL OR (made, id) < ($4, $5)) ORDER BY made DESC, id DESC LIMIT $6",
        firm_id,
        partner_id,
        unread,
        made,
        notice_id,
        limit,
        list(NoticeKind),
    )
    return [_notice(row) for row in rows]


async def mark_read(
    connection: Connection, notice_id: str, *, firm_id: int, partner_id: int, read: datetime, by: int
) -> Notice | None:
    """None where that side has no such notice. The first time it was read stays."""
    row = await connection.fetchrow(
        "UPDATE notice SET read = coalesce(read, $4), read_by = coalesce(read_by, $5) "
        "WHERE id = $1 AND firm_id = $2 AND partner_id = $3 RETURNING id, firm_id, partner_id, kind, subject_id, text, "
        "act_by, made, read, read_by, correlation_id",
        notice_id,
        firm_id,
        partner_id,
        read,
        by,
    )
    return None if row is None else _notice(row)


async def forget(connection: Connection, *, made_before: datetime, limit: int) -> int:
    """Returns how many were forgotten."""
    rows = await connection.fetch(
        "DELETE FROM notice WHERE id IN (SELECT id FROM notice WHERE made < $1 ORDER BY made LIMIT $2) RETURNING id",
        made_before,
        limit,
    )
    return len(rows)


def _notice(row: Row) -> Notice:
    return Notice(
        id=row["id"],
        kind=NoticeKind(row["kind"]),
        subject_id=row["subject_id"],
        text=row["text"],
        made=row["made"],
        correlation_id=row["correlation_id"],
        firm_id=row["firm_id"],
        partner_id=row["partner_id"],
        act_by=row["act_by"],
        read=row["read"],
    )
