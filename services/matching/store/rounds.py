"""SQL of rounds and of the needs that wait for one."""

from collections.abc import Mapping, Sequence
from datetime import datetime

import asyncpg

from services.common.database import Connection
from services.matching.needs import Need, NoOffer
from services.matching.rounds import Round, RoundState
from services.matching.store.needs import NEEDS, need_of_row

Row = asyncpg.Record

_ROUND_ROWS = (
    "SELECT id, state, started, started_by, ended, offers, from_safety_net, unplaced, blocking_pairs, ranker_version, "
    "correlation_id FROM round "
)


async def begin_round(
    connection: Connection, round_id: str, *, started: datetime, by: int | None, correlation_id: str
) -> bool:
    """False where there is one of this id already."""
    made = await connection.fetchval(
        "INSERT INTO round (id, state, started, started_by, correlation_id) VALUES ($1, 'running', $2, $3, $4) "
        "ON CONFLICT DO NOTHING RETURNING 1",
        round_id,
        started,
        by,
        correlation_id,
    )
    return made is not None


async def round_by_id(connection: Connection, round_id: str) -> Round | None:
    row = await connection.fetchrow(_ROUND_ROWS + "WHERE id = $1", round_id)
    return None if row is None else _round(row)


async def list_rounds(connection: Connection, *, limit: int) -> list[Round]:
    """Newest first."""
    rows = await connection.fetch(_ROUND_ROWS + "ORDER BY started DESC, id DESC LIMIT $1", limit)
    return [_round(row) for row in rows]


async def lock_rounds(connection: Connection) -> bool:
    """Only one process computes rounds at a time; False where another does. Until the transaction ends."""
    locked: bool = await connection.fetchval("SELECT pg_try_advisory_xact_lock(hashtext('smdih-matching-rounds'))")
    return locked


async def next_running_round(connection: Connection) -> Round | None:
    row = await connection.fetchrow(_ROUND_ROWS + "WHERE state = 'running' ORDER BY started, id LIMIT 1")
    return None if row is None else _round(row)


async def count_in_round(
    connection: Connection, round_id: str, *, offers: int = 0, from_safety_net: int = 0, blocking_pairs: int = 0
) -> None:
    """Of each of its passes."""
    await connection.execute(
        "UPDATE round SET offers = offers + $2, from_safety_net = from_safety_net + $3, "
        "blocking_pairs = blocking_pairs + $4 WHERE id = $1",
        round_id,
        offers,
        from_safety_net,
        blocking_pairs,
    )


async def end_round(
    connection: Connection, round_id: str, *, ended: datetime, unplaced: int, ranker_version: str
) -> None:
    await connection.execute(
        "UPDATE round SET state = 'done', ended = $2, unplaced = $3, ranker_version = $4 WHERE id = $1",
        round_id,
        ended,
        unplaced,
        ranker_version,
    )


async def any_waiting(connection: Connection) -> bool:
    found: bool = await connection.fetchval("SELECT EXISTS (SELECT FROM need WHERE state = 'open' AND offers = 0)")
    return found


async def waiting_needs(connection: Connection, *, opened_by: datetime, limit: int) -> list[Need]:
    """Open needs without offers: those that no round was in vain for first, the oldest first."""
    rows = await connection.fetch(
        f"{NEEDS} WHERE n.state = 'open' AND n.offers = 0 AND n.opened <= $1 "
        "ORDER BY n.round_missed NULLS FIRST, n.opened, n.id LIMIT $2",
        opened_by,
        limit,
    )
    return [need_of_row(row) for row in rows]


async def lock_waiting(connection: Connection, need_ids: Sequence[str]) -> dict[str, Need]:
    """Those of the needs that are still open and without offers, held; by id."""
    rows = await connection.fetch(
        f"{NEEDS} WHERE n.id = ANY($1::text[]) AND n.state = 'open' AND n.offers = 0 "
        "ORDER BY n.id FOR NO KEY UPDATE OF n",
        list(need_ids),
    )
    return {row["id"]: need_of_row(row) for row in rows}


async def set_placed(connection: Connection, need_ids: Sequence[str]) -> None:
    """Each has one offer now."""
    await connection.execute(
        "UPDATE need SET offers = 1, no_offer_reason = '', waits = false WHERE id = ANY($1::text[])", list(need_ids)
    )


async def set_unplaced(connection: Connection, unplaced: Mapping[str, NoOffer], *, now: datetime) -> None:
    """The round has come and gone: offers may be made at any time from now on. The next round takes others first."""
    await connection.execute(
        "UPDATE need SET no_offer_reason = t.why, waits = false, round_missed = $3 "
        "FROM unnest($1::text[], $2::text[]) AS t (id, why) WHERE need.id = t.id AND state = 'open' AND offers = 0",
        list(unplaced),
        list(unplaced.values()),
        now,
    )


def _round(row: Row) -> Round:
    return Round(
        id=row["id"],
        state=RoundState(row["state"]),
        started=row["started"],
        ended=row["ended"],
        offers=row["offers"],
        from_safety_net=row["from_safety_net"],
        unplaced=row["unplaced"],
        blocking_pairs=row["blocking_pairs"],
        ranker_version=row["ranker_version"],
        correlation_id=row["correlation_id"],
    )
