"""SQL of needs and the alarms behind them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import asyncpg

from services.common.database import Connection
from services.matching.domain import Source, Urgency
from services.matching.needs import CloseReason, Need, NeedState, NoOffer

Row = asyncpg.Record


async def add_need(
    connection: Connection, need: Need, *, expires: datetime, request_id: str = "", request_sha256: bytes = b""
) -> None:
    await connection.execute(
        """
        INSERT INTO need (id, firm_id, source, state, text, urgency, sic, region, size, machine_id, consent_id, offers,
            no_offer_reason, opened, opened_by, request_id, request_sha256, correlation_id,
            waits, shown, esco_skills, expires)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22)
        """,
        need.id,
        need.firm_id,
        need.source,
        need.state,
        need.text,
        need.urgency,
        need.sic,
        need.region,
        need.size,
        need.machine_id,
        need.consent_id or None,
        need.offers,
        need.no_offer_reason,
        need.opened,
        need.opened_by,
        request_id or None,
        request_sha256 if request_id else None,
        need.correlation_id,
        need.waits,
        need.shown,
        need.esco_skills,
        expires,
    )


async def keep_vectors(connection: Connection, vectors: Mapping[str, bytes], *, model: str) -> None:
    """Store what needs were searched with, by need."""
    await connection.executemany(
        "INSERT INTO need_vector (need_id, vector, model) VALUES ($1, $2, $3) "
        "ON CONFLICT (need_id) DO UPDATE SET vector = excluded.vector, model = excluded.model",
        [(need_id, vector, model) for need_id, vector in vectors.items()],
    )


async def lock_requests(connection: Connection, firm_id: int, request_id: str) -> None:
    """Two calls with one request id come one after the other, so the second sees what the first made."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('smdih-request-' || $1::text || '/' || $2, 0))",
        str(firm_id),
        request_id,
    )


async def need_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[Need, bytes] | None:
    row = await connection.fetchrow(f"{NEEDS} WHERE n.firm_id = $1 AND n.request_id = $2", firm_id, request_id)
    return None if row is None else (need_of_row(row), row["request_sha256"])


async def need(connection: Connection, need_id: str) -> Need | None:
    row = await connection.fetchrow(f"{NEEDS} WHERE n.id = $1", need_id)
    return None if row is None else need_of_row(row)


async def lock_need(connection: Connection, need_id: str) -> Need | None:
    """Whatever is decided about a need's offers is decided while holding the need, always before its provider."""
    row = await connection.fetchrow(f"{NEEDS} WHERE n.id = $1 FOR NO KEY UPDATE OF n", need_id)
    return None if row is None else need_of_row(row)


async def list_needs(
    connection: Connection,
    *,
    firm_id: int,
    state: NeedState | None,
    machine_id: int,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Need]:
    """Newest first; `before`: those after this one in that order. Firm 0: all firms."""
    opened, need_id = before or (None, "")
    rows = await connection.fetch(
        f"{NEEDS} WHERE ($1::bigint = 0 OR n.firm_id = $1) AND ($2::text IS NULL OR n.state = $2) "
        "AND ($3::bigint = 0 OR n.machine_id = $3) AND ($4::timestamptz IS NULL OR (n.opened, n.id) < ($4, $5)) "
        "ORDER BY n.opened DESC, n.id DESC LIMIT $6",
        firm_id,
        state,
        machine_id,
        opened,
        need_id,
        limit,
    )
    return [need_of_row(row) for row in rows]


async def match_need(connection: Connection, need_id: str, *, ended: datetime) -> None:
    await connection.execute("UPDATE need SET state = 'matched', ended = $2 WHERE id = $1", need_id, ended)


async def close_need(
    connection: Connection, need_id: str, reason: CloseReason, *, note: str = "", ended: datetime
) -> None:
    await connection.execute(
        "UPDATE need SET state = 'closed', ended = $2, close_reason = $3, close_note = $4 WHERE id = $1",
        need_id,
        ended,
        reason,
        note,
    )


async def seek_again(connection: Connection, need_id: str, why: NoOffer, *, expires: datetime) -> bool:
    """It is open and gets offers of a new attempt; False, and nothing changes, where its machine has another open need."""
    sought = await connection.fetchval(
        "UPDATE need n SET state = 'open', ended = NULL, attempt = attempt + 1, offers = 0, no_offer_reason = $2, "
        "expires = $3, tried_change = -1 WHERE id = $1 AND (source <> 'anomaly' OR NOT EXISTS (SELECT FROM need o "
        "WHERE o.machine_id = n.machine_id AND o.source = 'anomaly' AND o.state = 'open' AND o.id <> n.id)) RETURNING 1",
        need_id,
        why,
        expires,
    )
    return sought is not None


async def try_anew(connection: Connection, need_id: str) -> None:
    """It waits for offers, and a proposal for it has ended: whose that was may be offered again, unless somebody declined it."""
    await connection.execute("UPDATE need SET attempt = attempt + 1, tried_change = -1 WHERE id = $1", need_id)


async def due_expiries(connection: Connection, *, now: datetime, limit: int) -> list[str]:
    """Ids of open needs that had no offer for as long as needs are kept open."""
    rows = await connection.fetch(
        "SELECT n.id FROM need n WHERE n.state = 'open' AND n.expires <= $1 AND NOT EXISTS "
        "(SELECT FROM offer o WHERE o.need_id = n.id AND o.state = 'made') ORDER BY n.expires, n.id LIMIT $2",
        now,
        limit,
    )
    return [row["id"] for row in rows]


async def vectors(connection: Connection, need_ids: Sequence[str], *, model: str) -> dict[str, bytes]:
    """What the needs were searched with, where it was by this model."""
    rows = await connection.fetch(
        "SELECT need_id, vector FROM need_vector WHERE need_id = ANY($1::text[]) AND model = $2", list(need_ids), model
    )
    return {row["need_id"]: row["vector"] for row in rows}


async def set_shown(connection: Connection, need_id: str, *, shown: bool) -> None:
    await connection.execute("UPDATE need SET shown = $2 WHERE id = $1", need_id, shown)


async def shown_needs(
    connection: Connection,
    *,
    region: str,
    opened_by: datetime,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Need]:
    """Open needs that partners may see: those of the region, and others opened by then. Newest first. "" is every region."""
    opened, need_id = before or (None, "")
    rows = await connection.fetch(
        f"{NEEDS} WHERE n.state = 'open' AND n.shown AND ($1 = '' OR lower(n.region) = lower($1) OR n.opened <= $2) "
        "AND ($3::timestamptz IS NULL OR (n.opened, n.id) < ($3, $4)) ORDER BY n.opened DESC, n.id DESC LIMIT $5",
        region,
        opened_by,
        opened,
        need_id,
        limit,
    )
    return [need_of_row(row) for row in rows]


@dataclass(frozen=True)
class Tried:
    """What a need without offers was ranked against: another try makes sense once providers or quarter have changed."""

    change: int
    quarter: date


async def set_need_offers(
    connection: Connection, need_id: str, offers: int, *, no_offer_reason: str, tried: Tried
) -> None:
    await connection.execute(
        "UPDATE need SET offers = $2, no_offer_reason = $3, tried_change = $4, tried_quarter = $5 WHERE id = $1",
        need_id,
        offers,
        no_offer_reason,
        tried.change,
        tried.quarter,
    )


async def needs_to_try(connection: Connection, against: Tried, *, limit: int) -> list[Need]:
    """Open needs without offers that were not ranked against this yet, those that were tried longest ago first."""
    rows = await connection.fetch(
        f"{NEEDS} WHERE n.state = 'open' AND n.offers = 0 AND NOT n.waits "
        "AND (n.tried_change < $1 OR n.tried_quarter < $2) ORDER BY n.tried_change, n.opened, n.id LIMIT $3",
        against.change,
        against.quarter,
        limit,
    )
    return [need_of_row(row) for row in rows]


async def hide_alarm_needs(connection: Connection, firm_id: int) -> None:
    """Partners see none of the firm's needs that were made from alarms, also when their matches end."""
    await connection.execute(
        "UPDATE need SET shown = false WHERE firm_id = $1 AND consent_id IS NOT NULL AND shown", firm_id
    )


async def unshared_needs(connection: Connection, *, firm_id: int, now: datetime, limit: int) -> list[str]:
    """Ids of open needs made under a consent whose firm has none in force that covers the machine and lets as much through. Firm
    0: of all firms."""
    rows = await connection.fetch(
        "SELECT n.id FROM need n WHERE n.state = 'open' AND n.consent_id IS NOT NULL "  # noqa: S608
        f"AND ($2::bigint = 0 OR n.firm_id = $2) AND NOT {shared(at='$1')} LIMIT $3",
        now,
        firm_id,
        limit,
    )
    return [row["id"] for row in rows]


async def is_shared(connection: Connection, need_id: str, *, now: datetime) -> bool:
    """Whether it was made under no consent, or under one that still covers it or was followed by one that does."""
    found: bool = await connection.fetchval(
        f"SELECT n.consent_id IS NULL OR {shared(at='$1')} FROM need n WHERE n.id = $2",  # noqa: S608
        now,
        need_id,
    )
    return found


def shared(*, at: str) -> str:
    """SQL for: the consent that is in force then covers the need `n`, and lets as much through as the one it was made under."""
    return (
        "EXISTS (SELECT FROM consent c JOIN consent g ON g.id = n.consent_id WHERE c.firm_id = n.firm_id "
        f"AND c.ended IS NULL AND c.valid_from <= {at} AND (c.valid_until IS NULL OR c.valid_until > {at}) "
        "AND (c.machine_ids = '{}' OR n.machine_id = ANY(c.machine_ids)) "
        "AND array_remove(g.shared, 'partners') <@ c.shared)"
    )


async def lock_machines(connection: Connection, machine_ids: Collection[int]) -> None:
    """Alarms of one machine are taken in one after the other, whichever process has them; in order of id, against deadlock."""
    for machine_id in sorted(machine_ids):
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('smdih-machine-' || $1::text, 0))", str(machine_id)
        )


async def known_alarms(connection: Connection, alarm_ids: Collection[str]) -> set[str]:
    rows = await connection.fetch("SELECT alarm_id FROM need_alarm WHERE alarm_id = ANY($1::text[])", list(alarm_ids))
    return {row["alarm_id"] for row in rows}


async def need_of_fault(connection: Connection, machine_id: int, *, since: datetime) -> str | None:
    """The machine's need from alarms that is open, or that had an alarm since then and before it ended: a further alarm belongs to
    it. A matched one ends with its work. One that ended with a consent is none: under another the fault opens a need anew."""
    found: str | None = await connection.fetchval(
        """
        SELECT n.id FROM need n LEFT JOIN match m ON m.need_id = n.id AND m.state NOT IN ('cancelled', 'expired')
        WHERE n.machine_id = $1 AND n.source = 'anomaly'
          AND (n.state = 'open' OR n.close_reason <> 'CONSENT_ENDED'
               AND EXISTS (SELECT FROM need_alarm a WHERE a.need_id = n.id AND a.raised > $2
                   AND a.raised <= coalesce(CASE n.state WHEN 'closed' THEN n.ended ELSE m.finished END, 'infinity')))
        ORDER BY n.state = 'open' DESC, n.opened DESC LIMIT 1
        """,
        machine_id,
        since,
    )
    return found


async def attach_alarm(connection: Connection, need_id: str, alarm_id: str, *, raised: datetime) -> None:
    await connection.execute(
        "INSERT INTO need_alarm (alarm_id, need_id, raised) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        alarm_id,
        need_id,
        raised,
    )


NEEDS = (
    "SELECT n.id, n.firm_id, n.source, n.state, n.text, n.urgency, n.sic, n.region, n.size, n.machine_id, n.consent_id, "
    "n.offers, n.no_offer_reason, n.opened, n.opened_by, n.ended, n.request_id, n.request_sha256, n.correlation_id, "
    "n.attempt, n.waits, n.shown, n.esco_skills, n.close_reason, n.close_note, m.id AS match_id, "
    "ARRAY(SELECT a.alarm_id FROM need_alarm a WHERE a.need_id = n.id ORDER BY a.number) AS alarm_ids "
    "FROM need n LEFT JOIN match m ON m.need_id = n.id AND m.state NOT IN ('cancelled', 'expired')"
)


def need_of_row(row: Row) -> Need:
    return Need(
        id=row["id"],
        firm_id=row["firm_id"],
        source=Source(row["source"]),
        text=row["text"],
        urgency=Urgency(row["urgency"]),
        sic=row["sic"],
        region=row["region"],
        size=row["size"],
        machine_id=row["machine_id"],
        opened=row["opened"],
        opened_by=row["opened_by"],
        correlation_id=row["correlation_id"],
        state=NeedState(row["state"]),
        alarm_ids=tuple(row["alarm_ids"]),
        consent_id=row["consent_id"] or "",
        offers=row["offers"],
        no_offer_reason=row["no_offer_reason"],
        match_id=row["match_id"] or "",
        ended=row["ended"],
        close_reason=row["close_reason"],
        close_note=row["close_note"],
        attempt=row["attempt"],
        waits=row["waits"],
        shown=row["shown"],
        esco_skills=tuple(row["esco_skills"]),
    )
