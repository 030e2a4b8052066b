"""Groups of firms in the database. Every function works in the caller's transaction."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from services.common.clock import from_us
from services.common.database import Connection, all_firms_within
from services.common.errors import Conflict


class InOtherGroup(Conflict):
    """One of these firms is in another group; take it out there first."""

    REASON = "FIRM_IN_OTHER_GROUP"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Firms that are one enterprise, and what that rests on."""

    id: str
    source: str
    firm_ids: tuple[int, ...]


async def set_group(
    connection: Connection, group_id: str, *, source: str, firm_ids: Sequence[int], credential_id: int, now_us: int
) -> None:
    """The group has these firms from now on. Raises InOtherGroup."""
    await connection.execute(
        "INSERT INTO enterprise_group (id, source, recorded, recorded_by) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT (id) DO UPDATE SET source = $2, recorded = $3, recorded_by = $4",
        group_id,
        source,
        from_us(now_us),
        credential_id,
    )
    await connection.execute("DELETE FROM firm_group WHERE group_id = $1", group_id)
    try:
        await connection.execute(
            "INSERT INTO firm_group (firm_id, group_id, recorded, recorded_by) SELECT unnest($1::bigint[]), $2, $3, $4",
            firm_ids,
            group_id,
            from_us(now_us),
            credential_id,
        )
    except asyncpg.UniqueViolationError as error:
        raise InOtherGroup() from error


async def group_of(connection: Connection, group_id: str) -> Group | None:
    row = await connection.fetchrow(
        "SELECT g.id, g.source, coalesce(array_agg(f.firm_id ORDER BY f.firm_id) FILTER (WHERE f.firm_id IS NOT NULL), '{}') "
        "AS firm_ids FROM enterprise_group g LEFT JOIN firm_group f ON f.group_id = g.id WHERE g.id = $1 GROUP BY g.id",
        group_id,
    )
    return None if row is None else Group(id=row["id"], source=row["source"], firm_ids=tuple(row["firm_ids"]))


async def sisters_of(connection: Connection, firm_id: int) -> frozenset[int]:
    """The firm and the others of its group."""
    async with all_firms_within(connection):  # the others' membership is theirs
        rows = await connection.fetch(
            "SELECT other.firm_id FROM firm_group own JOIN firm_group other ON other.group_id = own.group_id "
            "WHERE own.firm_id = $1",
            firm_id,
        )
    return frozenset(row["firm_id"] for row in rows) | {firm_id}
