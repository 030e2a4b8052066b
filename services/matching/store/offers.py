"""SQL of offers."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import asyncpg

from services.common.database import Connection
from services.matching.domain import Kind
from services.matching.needs import Lapse, Offer, OfferState, Origin
from services.matching.store.needs import shared

Row = asyncpg.Record


async def add_offers(connection: Connection, offers: Sequence[Offer]) -> None:
    await connection.executemany(
        """
        INSERT INTO offer (id, need_id, firm_id, provider_id, partner_id, provider_title, provider_kind, rank, score,
            parts, reasons, ranker_version, state, made, expires, attempt,
            origin, round_id, holds_place, message)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20)
        """,
        [
            (
                offer.id,
                offer.need_id,
                offer.firm_id,
                offer.provider_id,
                offer.partner_id,
                offer.provider_title,
                offer.provider_kind,
                offer.rank,
                offer.score,
                json.dumps(dict(offer.parts)),
                offer.reasons,
                offer.ranker_version,
                offer.state,
                offer.made,
                offer.expires,
                offer.attempt,
                offer.origin,
                offer.round_id or None,
                offer.holds_place,
                offer.message,
            )
            for offer in offers
        ],
    )


async def offer(connection: Connection, offer_id: str) -> Offer | None:
    row = await connection.fetchrow(f"{_OFFERS} WHERE o.id = $1", offer_id)
    return None if row is None else _offer(row)


async def offers_of_need(connection: Connection, need_id: str) -> list[Offer]:
    """Those of the last attempt first, the best first."""
    return [
        _offer(row)
        for row in await connection.fetch(f"{_OFFERS} WHERE o.need_id = $1 ORDER BY o.attempt DESC, o.rank", need_id)
    ]


async def list_offers(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    provider_id: str = "",
    state: OfferState | None,
    round_id: str,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Offer]:
    """Newest first. 0 or "": of all firms, partners, providers, of all rounds and of none."""
    made, offer_id = before or (None, "")
    rows = await connection.fetch(
        f"{_OFFERS} WHERE ($1::bigint = 0 OR o.firm_id = $1) AND ($2::bigint = 0 OR o.partner_id = $2) "
        "AND ($8 = '' OR o.provider_id = $8) "
        "AND ($3::text IS NULL OR o.state = $3) AND ($4::timestamptz IS NULL OR (o.made, o.id) < ($4, $5)) "
        "AND ($7 = '' OR o.round_id = $7) ORDER BY o.made DESC, o.id DESC LIMIT $6",
        firm_id,
        partner_id,
        state,
        made,
        offer_id,
        limit,
        round_id,
        provider_id,
    )
    return [_offer(row) for row in rows]


async def decide_offer(
    connection: Connection, offer_id: str, state: OfferState, *, decided: datetime, by: int | None, reason: str
) -> None:
    await connection.execute(
        "UPDATE offer SET state = $2, decided = $3, decided_by = $4, decision_reason = $5 WHERE id = $1",
        offer_id,
        state,
        decided,
        by,
        reason,
    )


@dataclass(frozen=True)
class DueLapse:
    offer_id: str
    need_id: str
    why: Lapse


async def due_lapses(connection: Connection, *, now: datetime, today: date, limit: int) -> list[DueLapse]:
    """Open offers whose time has run out or whose provider is not to be had any more."""
    # Two questions rather than one with OR: each has its index, and this is asked every second.
    expired = await connection.fetch(
        "SELECT id, need_id FROM offer WHERE state = 'made' AND expires <= $1 ORDER BY expires, id LIMIT $2", now, limit
    )
    gone = await connection.fetch(
        "SELECT o.id, o.need_id FROM provider p JOIN offer o ON o.provider_id = p.id AND o.state = 'made' "
        "WHERE NOT p.active OR p.offered_until <= $1 LIMIT $2",
        today,
        limit,
    )
    due = {row["id"]: DueLapse(row["id"], row["need_id"], Lapse.PROVIDER_GONE) for row in gone}
    due |= {row["id"]: DueLapse(row["id"], row["need_id"], Lapse.EXPIRED) for row in expired}
    return list(due.values())


async def providers_out(connection: Connection, need_ids: Sequence[str]) -> dict[str, set[str]]:
    """Providers that a need is not to be offered now, by need: declined, their match came to nothing, or they are offered."""
    rows = await connection.fetch(
        "SELECT o.need_id, o.provider_id FROM offer o JOIN need n ON n.id = o.need_id WHERE o.need_id = ANY($1::text[]) "
        "AND (o.state IN ('declined', 'cancelled', 'made') OR o.attempt = n.attempt)",
        list(need_ids),
    )
    found: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        found[row["need_id"]].add(row["provider_id"])
    return found


_OFFERS = (
    "SELECT o.id, o.need_id, o.firm_id, o.provider_id, o.partner_id, o.provider_title, o.provider_kind, o.rank, "  # noqa: S608
    "o.score, "
    "o.parts, o.reasons, o.ranker_version, o.state, o.made, o.expires, o.decided, o.decided_by, o.decision_reason, "
    "o.attempt, o.origin, o.round_id, o.holds_place, o.message, n.text AS need_text, n.machine_id, n.correlation_id, m.id "
    f"AS match_id, n.consent_id IS NOT NULL AND (n.close_reason = 'CONSENT_ENDED' OR NOT {shared(at='now()')}) AS unshared, "
    "(SELECT a.alarm_id FROM need_alarm a WHERE a.need_id = n.id ORDER BY a.number LIMIT 1) AS alarm_id "
    "FROM offer o JOIN need n ON n.id = o.need_id LEFT JOIN match m ON m.offer_id = o.id"
)


def _offer(row: Row) -> Offer:
    parts: dict[str, Any] = json.loads(row["parts"])
    return Offer(
        id=row["id"],
        need_id=row["need_id"],
        firm_id=row["firm_id"],
        provider_id=row["provider_id"],
        partner_id=row["partner_id"],
        provider_title=row["provider_title"],
        provider_kind=Kind(row["provider_kind"]),
        rank=row["rank"],
        score=row["score"],
        parts={name: float(points) for name, points in parts.items()},
        reasons=tuple(row["reasons"]),
        ranker_version=row["ranker_version"],
        made=row["made"],
        expires=row["expires"],
        need_text=row["need_text"],
        machine_id=row["machine_id"],
        alarm_id=row["alarm_id"] or "",
        correlation_id=row["correlation_id"],
        state=OfferState(row["state"]),
        decided=row["decided"],
        decision_reason=row["decision_reason"],
        match_id=row["match_id"] or "",
        attempt=row["attempt"],
        origin=Origin(row["origin"]),
        round_id=row["round_id"] or "",
        holds_place=row["holds_place"],
        message=row["message"],
        unshared=row["unshared"],
    )
