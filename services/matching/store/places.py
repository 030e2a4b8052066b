"""Places of providers in a quarter: reserved, confirmed, released. Nothing here ever promises a place twice.

Every function takes many at once and may be repeated: the same id gets the same answer. Locks are taken in one order,
the count of changes, places, quarters, each by id, so that calls never wait for each other in a circle. The last word is
the database's: `provider_quarter_capacity_check` refuses what the code would get wrong.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum

from services.common.database import Connection
from services.matching.store.providers import next_provider_change

Quarter = tuple[str, date]


@dataclass(frozen=True)
class Ask:
    """A place that is wanted; `id` is that of the match it is for, or of the match that an offer would become."""

    id: str
    provider_id: str
    quarter: date
    expires: datetime


class Held(StrEnum):
    """The answer to an ask."""

    HELD = "held"
    FULL = "full"
    # It was held and given back.
    RELEASED = "released"
    # The id stands for a place elsewhere.
    ELSEWHERE = "elsewhere"


class Why(StrEnum):
    """A place was given back."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"


async def reserve(connection: Connection, asks: Sequence[Ask]) -> dict[str, Held]:
    """Hold a place for each ask, in their order, as long as places are left. The indexes learn of it."""
    quarters = sorted({(ask.provider_id, ask.quarter) for ask in asks})
    change = await next_provider_change(connection, len(quarters))
    free = await _lock_quarters(connection, quarters)
    known = await _known(connection, [ask.id for ask in asks])
    answers: dict[str, Held] = {}
    new: list[Ask] = []
    for ask in asks:
        if ask.id in answers:
            continue
        if ask.id in known:
            answers[ask.id] = known[ask.id].answer(ask)
            continue
        left = free[ask.provider_id, ask.quarter]
        if left is not None and left <= 0:
            answers[ask.id] = Held.FULL
            continue
        if left is not None:
            free[ask.provider_id, ask.quarter] = left - 1
        answers[ask.id] = Held.HELD
        new.append(ask)
    await connection.execute(
        "INSERT INTO place (id, provider_id, quarter, state, expires) SELECT id, provider_id, quarter, 'reserved', expires "
        "FROM unnest($1::text[], $2::text[], $3::date[], $4::timestamptz[]) AS new (id, provider_id, quarter, expires)",
        [ask.id for ask in new],
        [ask.provider_id for ask in new],
        [ask.quarter for ask in new],
        [ask.expires for ask in new],
    )
    await _count(connection, [(ask.provider_id, ask.quarter) for ask in new], +1, change=change)
    return answers


async def confirm(connection: Connection, ids: Collection[str]) -> set[str]:
    """Keep reserved places for good; returns those that are confirmed now, by this call or before."""
    rows = await connection.fetch(
        "WITH held AS (SELECT id FROM place WHERE id = ANY($1::text[]) ORDER BY id FOR NO KEY UPDATE) "
        "UPDATE place SET state = 'confirmed', expires = NULL FROM held "
        "WHERE place.id = held.id AND state IN ('reserved', 'confirmed') RETURNING place.id",
        list(ids),
    )
    return {row["id"] for row in rows}


async def extend(connection: Connection, ids: Collection[str], expires: datetime) -> None:
    """Keep reserved places until another time."""
    await connection.execute(
        "WITH held AS (SELECT id FROM place WHERE id = ANY($1::text[]) ORDER BY id FOR NO KEY UPDATE) "
        "UPDATE place SET expires = $2 FROM held WHERE place.id = held.id AND state = 'reserved'",
        list(ids),
        expires,
    )


async def release(connection: Connection, ids: Collection[str], why: Why) -> set[str]:
    """Give places back, each once; returns those given back by this call. A confirmed place does not expire."""
    if not await _known(connection, ids):
        return set()
    # As many numbers as there may be providers: what is known may have grown once the lock is had.
    change = await next_provider_change(connection, len(set(ids)))
    rows = await connection.fetch(
        "WITH held AS (SELECT id FROM place WHERE id = ANY($1::text[]) ORDER BY id FOR NO KEY UPDATE) "
        "UPDATE place SET state = 'released', expires = NULL, why = $2 FROM held WHERE place.id = held.id "
        "AND (state = 'reserved' OR (state = 'confirmed' AND $2 = 'cancelled')) "
        "RETURNING place.id, place.provider_id, place.quarter",
        list(ids),
        why,
    )
    quarters = [(row["provider_id"], row["quarter"]) for row in rows]
    await connection.execute(
        "SELECT FROM provider_quarter WHERE (provider_id, quarter) IN "
        "(SELECT * FROM unnest($1::text[], $2::date[])) ORDER BY provider_id, quarter FOR NO KEY UPDATE",
        [provider_id for provider_id, _ in quarters],
        [quarter for _, quarter in quarters],
    )
    await _count(connection, quarters, -1, change=change)
    return {row["id"] for row in rows}


async def held_quarter(connection: Connection, place_id: str) -> date | None:
    """The quarter of a place that is reserved or confirmed; None where there is none."""
    found: date | None = await connection.fetchval(
        "SELECT quarter FROM place WHERE id = $1 AND state <> 'released'", place_id
    )
    return found


async def due(connection: Connection, *, now: datetime, limit: int) -> list[str]:
    """Ids of reserved places whose time has run out, the oldest first."""
    rows = await connection.fetch(
        "SELECT id FROM place WHERE state = 'reserved' AND expires <= $1 ORDER BY expires, id LIMIT $2", now, limit
    )
    return [row["id"] for row in rows]


async def mismatches(connection: Connection) -> list[Quarter]:
    """Quarters whose count is not that of their places, or is beyond their capacity. Must be empty."""
    rows = await connection.fetch(
        "SELECT q.provider_id, q.quarter FROM provider_quarter q WHERE q.taken > q.capacity OR q.taken <> "
        "(SELECT count(*) FROM place p WHERE (p.provider_id, p.quarter) = (q.provider_id, q.quarter) AND p.state <> 'released')"
    )
    return [(row["provider_id"], row["quarter"]) for row in rows]


@dataclass(frozen=True)
class _Place:
    provider_id: str
    quarter: date
    released: bool

    def answer(self, ask: Ask) -> Held:
        if (self.provider_id, self.quarter) != (ask.provider_id, ask.quarter):
            return Held.ELSEWHERE
        return Held.RELEASED if self.released else Held.HELD


async def _known(connection: Connection, ids: Collection[str]) -> Mapping[str, _Place]:
    rows = await connection.fetch(
        "SELECT id, provider_id, quarter, state FROM place WHERE id = ANY($1::text[])", list(ids)
    )
    return {row["id"]: _Place(row["provider_id"], row["quarter"], row["state"] == "released") for row in rows}


async def _lock_quarters(connection: Connection, quarters: Sequence[Quarter]) -> dict[Quarter, int | None]:
    """Places left of each, None for no limit; nobody else changes them until the transaction ends."""
    columns = [provider_id for provider_id, _ in quarters], [quarter for _, quarter in quarters]
    await connection.execute(
        "INSERT INTO provider_quarter (provider_id, quarter, capacity, taken) "
        "SELECT p.id, asked.quarter, p.capacity_per_quarter, 0 FROM unnest($1::text[], $2::date[]) AS asked (id, quarter) "
        "JOIN provider p ON p.id = asked.id ORDER BY p.id, asked.quarter ON CONFLICT DO NOTHING",
        *columns,
    )
    rows = await connection.fetch(
        "SELECT provider_id, quarter, capacity - taken AS free FROM provider_quarter WHERE (provider_id, quarter) IN "
        "(SELECT * FROM unnest($1::text[], $2::date[])) ORDER BY provider_id, quarter FOR NO KEY UPDATE",
        *columns,
    )
    return {(row["provider_id"], row["quarter"]): row["free"] for row in rows}


async def _count(connection: Connection, quarters: Sequence[Quarter], by: int, *, change: int) -> None:
    """Add to what is taken; the providers changed with this number and those below it."""
    if not quarters:
        return
    await connection.execute(
        # What is given back under a capacity that was lowered meanwhile is nobody else's; see set_quarter_capacities.
        "UPDATE provider_quarter q SET taken = q.taken + $3 * n.places, capacity = CASE WHEN $3 > 0 OR q.capacity IS NULL "
        "THEN q.capacity ELSE greatest(p.capacity_per_quarter, q.taken - n.places) END FROM provider p, "
        "(SELECT id, quarter, count(*) AS places FROM unnest($1::text[], $2::date[]) AS t (id, quarter) GROUP BY id, quarter) n "
        "WHERE (q.provider_id, q.quarter) = (n.id, n.quarter) AND p.id = n.id",
        [provider_id for provider_id, _ in quarters],
        [quarter for _, quarter in quarters],
        by,
    )
    await connection.execute(
        "UPDATE provider SET change = $2 - t.number + 1 FROM unnest($1::text[]) WITH ORDINALITY AS t (id, number) "
        "WHERE provider.id = t.id",
        sorted({provider_id for provider_id, _ in quarters}),
        change,
    )
