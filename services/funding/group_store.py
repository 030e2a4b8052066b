"""Groups of firms in the database. Every function works in the caller's transaction."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import asyncpg

from services.common.clock import from_us
from services.common.database import Connection, all_firms_within
from services.common.errors import Conflict
from services.funding.rules.size import Relation


class InOtherGroup(Conflict):
    """One of these firms is in another group; take it out there first."""

    REASON = "FIRM_IN_OTHER_GROUP"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Firms that are one enterprise, and what that rests on."""

    id: str
    source: str
    firm_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Holding:
    """What one firm owns of another: the higher of capital and votes, in percent, exact."""

    owner_firm_id: int
    owned_firm_id: int
    percent: str
    dominant_influence: bool
    relation: Relation
    source: str


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


async def kin_of(connection: Connection, firm_id: int) -> frozenset[int]:
    """The firm and all that are one enterprise with it, by declared groups and by holdings."""
    async with all_firms_within(connection):  # what is recorded of the others is theirs
        return frozenset(row[0] for row in await connection.fetch("SELECT kin_of($1)", firm_id))


async def set_holding(
    connection: Connection, holding: Holding, *, parameters_version: str, credential_id: int, now_us: int
) -> None:
    """In place of what was stated of the two before."""
    await connection.execute(
        "INSERT INTO holding (owner_firm_id, owned_firm_id, percent, dominant_influence, relation, parameters_version, source, "
        "recorded, recorded_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (owner_firm_id, owned_firm_id) "
        "DO UPDATE SET percent = $3, dominant_influence = $4, relation = $5, parameters_version = $6, source = $7, "
        "recorded = $8, recorded_by = $9",
        holding.owner_firm_id,
        holding.owned_firm_id,
        holding.percent,
        holding.dominant_influence,
        holding.relation,
        parameters_version,
        holding.source,
        from_us(now_us),
        credential_id,
    )


async def remove_holding(connection: Connection, owner_firm_id: int, owned_firm_id: int) -> None:
    await connection.execute(
        "DELETE FROM holding WHERE owner_firm_id = $1 AND owned_firm_id = $2", owner_firm_id, owned_firm_id
    )


async def holdings_of(connection: Connection, firm_ids: Collection[int]) -> list[Holding]:
    """All that one of the firms has a part in, owning or owned."""
    async with all_firms_within(connection):  # firms of an enterprise see what makes them one
        rows = await connection.fetch(
            "SELECT owner_firm_id, owned_firm_id, percent, dominant_influence, relation, source FROM holding "
            "WHERE owner_firm_id = ANY($1) OR owned_firm_id = ANY($1) ORDER BY owner_firm_id, owned_firm_id",
            list(firm_ids),
        )
    return [Holding(**{**dict(row), "relation": Relation(row["relation"])}) for row in rows]


async def groups_of(connection: Connection, firm_ids: Collection[int]) -> list[str]:
    """Ids of the declared groups that the firms are in."""
    async with all_firms_within(connection):  # as for holdings
        rows = await connection.fetch(
            "SELECT DISTINCT group_id FROM firm_group WHERE firm_id = ANY($1) ORDER BY group_id", list(firm_ids)
        )
    return [row["group_id"] for row in rows]
