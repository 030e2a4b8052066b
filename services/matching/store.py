"""SQL of matching. Every function works inside the caller's transaction."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import asyncpg

from services.common.database import Connection
from services.matching.consents import Consent, Severity, SharedItem
from services.matching.domain import Kind, Size, Source, Urgency
from services.matching.needs import Lapse, Match, Need, NeedState, Offer, OfferState
from services.matching.providers import ProviderRecord

Row = asyncpg.Record

# --- providers -----------------------------------------------------------------------------------------------------


async def next_provider_change(connection: Connection) -> int:
    """Number of the change that this transaction makes; to be had before a provider is locked.

    Providers change one after the other, so that numbers become visible in their order and whoever reads "all after N" misses
    none.
    """
    number: int = await connection.fetchval("UPDATE provider_change SET number = number + 1 WHERE one RETURNING number")
    return number


async def lock_provider(connection: Connection, provider_id: str) -> ProviderRecord | None:
    row = await connection.fetchrow("SELECT *, 0 AS taken FROM provider WHERE id = $1 FOR NO KEY UPDATE", provider_id)
    return None if row is None else _provider(row)


async def put_provider(connection: Connection, provider: ProviderRecord) -> None:
    """Create or replace. A vector of other text is dropped."""
    await connection.execute(
        """
        INSERT INTO provider AS p (
            id, kind, partner_id, title, text, region, region_bound, regions_served, sic_divisions, sic_excluded,
            sizes_served, skills, capacity_per_quarter, lead_days, conflict_firm_ids, expires_on, active, change, changed)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19)
        ON CONFLICT (id) DO UPDATE SET
            kind = excluded.kind, partner_id = excluded.partner_id, title = excluded.title, text = excluded.text,
            region = excluded.region, region_bound = excluded.region_bound, regions_served = excluded.regions_served,
            sic_divisions = excluded.sic_divisions, sic_excluded = excluded.sic_excluded,
            sizes_served = excluded.sizes_served, skills = excluded.skills,
            capacity_per_quarter = excluded.capacity_per_quarter, lead_days = excluded.lead_days,
            conflict_firm_ids = excluded.conflict_firm_ids, expires_on = excluded.expires_on, active = excluded.active,
            change = excluded.change, changed = excluded.changed,
            vector = CASE WHEN (p.title, p.text) = (excluded.title, excluded.text) THEN p.vector END
        """,
        provider.id,
        provider.kind,
        provider.partner_id,
        provider.title,
        provider.text,
        provider.region,
        provider.region_bound,
        provider.regions_served,
        provider.sic_divisions,
        provider.sic_excluded,
        provider.sizes_served,
        provider.skills,
        provider.capacity_per_quarter,
        provider.lead_days,
        provider.conflict_firm_ids,
        provider.expires_on,
        provider.active,
        provider.change,
        provider.changed,
    )


async def set_quarter_capacities(
    connection: Connection, provider_id: str, capacity: int | None, *, since: date
) -> None:
    """Carry a new capacity into the quarters that have begun to fill. What is promised stays promised: a smaller capacity than
    is taken means no more places."""
    await connection.execute(
        "UPDATE provider_quarter SET capacity = CASE WHEN $2::int IS NULL THEN NULL ELSE greatest($2, taken) END "
        "WHERE provider_id = $1 AND quarter >= $3",
        provider_id,
        capacity,
        since,
    )


async def provider(connection: Connection, provider_id: str, *, quarter: date) -> ProviderRecord | None:
    row = await connection.fetchrow(f"{_PROVIDERS} WHERE p.id = $2", quarter, provider_id)
    return None if row is None else _provider(row)


async def list_providers(
    connection: Connection,
    *,
    quarter: date,
    partner_id: int,
    kind: Kind | None,
    live_on: date | None,
    after: str,
    limit: int,
) -> list[ProviderRecord]:
    """In order of id. `live_on`: only those that may be offered on that day."""
    rows = await connection.fetch(
        f"{_PROVIDERS} WHERE p.id > $2 AND ($3::bigint = 0 OR p.partner_id = $3) AND ($4::text IS NULL OR p.kind = $4) "
        "AND ($5::date IS NULL OR (p.active AND (p.expires_on IS NULL OR p.expires_on > $5))) ORDER BY p.id LIMIT $6",
        quarter,
        after,
        partner_id,
        kind,
        live_on,
        limit,
    )
    return [_provider(row) for row in rows]


@dataclass(frozen=True)
class ChangedProvider:
    provider: ProviderRecord
    # None: not computed yet, or by another model.
    vector: bytes | None


async def changed_providers(
    connection: Connection, *, after: int, quarter: date, vector_model: str, limit: int
) -> list[ChangedProvider]:
    """Those whose last change has a number above `after`, in order of change; `taken` is that of the quarter."""
    rows = await connection.fetch(
        "SELECT p.*, coalesce(q.taken, 0) AS taken, CASE WHEN p.vector_model = $2 THEN p.vector END AS usable_vector "
        "FROM provider p LEFT JOIN provider_quarter q ON q.provider_id = p.id AND q.quarter = $4 "
        "WHERE p.change > $1 ORDER BY p.change LIMIT $3",
        after,
        vector_model,
        limit,
        quarter,
    )
    return [ChangedProvider(_provider(row), row["usable_vector"]) for row in rows]


async def keep_vectors(
    connection: Connection, vectors: Sequence[tuple[ProviderRecord, bytes]], *, vector_model: str
) -> None:
    """Store what was computed from the providers' texts; one whose text has changed since keeps none."""
    await connection.executemany(
        "UPDATE provider SET vector = $4, vector_model = $5 WHERE id = $1 AND title = $2 AND text = $3",
        [(provider.id, provider.title, provider.text, vector, vector_model) for provider, vector in vectors],
    )


async def bookable_providers(
    connection: Connection, provider_ids: Sequence[str], *, quarter: date, today: date
) -> dict[str, ProviderRecord]:
    """Those of the providers that may be offered today and have a place left in the quarter, by id."""
    rows = await connection.fetch(
        f"{_PROVIDERS} WHERE p.id = ANY($2::text[]) AND p.active AND (p.expires_on IS NULL OR p.expires_on > $3) "
        "AND (q.capacity IS NULL OR q.taken < q.capacity)",
        quarter,
        provider_ids,
        today,
    )
    return {row["id"]: _provider(row) for row in rows}


async def take_place(connection: Connection, provider_id: str, *, quarter: date, change: int) -> bool:
    """Take one place of the quarter; False when none is left. Waits for others who are taking one of the same provider.

    `change` is the number by which the indexes learn of it."""
    await connection.execute(
        "INSERT INTO provider_quarter (provider_id, quarter, capacity, taken) "
        "SELECT id, $2, capacity_per_quarter, 0 FROM provider WHERE id = $1 ON CONFLICT DO NOTHING",
        provider_id,
        quarter,
    )
    taken = await connection.fetchval(
        "UPDATE provider_quarter SET taken = taken + 1 "
        "WHERE provider_id = $1 AND quarter = $2 AND (capacity IS NULL OR taken < capacity) RETURNING taken",
        provider_id,
        quarter,
    )
    if taken is None:
        return False
    await connection.execute("UPDATE provider SET change = $2 WHERE id = $1", provider_id, change)
    return True


_PROVIDERS = (
    "SELECT p.*, coalesce(q.taken, 0) AS taken FROM provider p "
    "LEFT JOIN provider_quarter q ON q.provider_id = p.id AND q.quarter = $1"
)


def _provider(row: Row) -> ProviderRecord:
    return ProviderRecord(
        id=row["id"],
        kind=Kind(row["kind"]),
        partner_id=row["partner_id"],
        title=row["title"],
        text=row["text"],
        region=row["region"],
        region_bound=row["region_bound"],
        regions_served=tuple(row["regions_served"]),
        sic_divisions=tuple(row["sic_divisions"]),
        sic_excluded=tuple(row["sic_excluded"]),
        sizes_served=tuple(Size(size) for size in row["sizes_served"]),
        skills=tuple(row["skills"]),
        capacity_per_quarter=row["capacity_per_quarter"],
        lead_days=row["lead_days"],
        conflict_firm_ids=tuple(row["conflict_firm_ids"]),
        expires_on=row["expires_on"],
        active=row["active"],
        change=row["change"],
        changed=row["changed"],
        taken=row["taken"],
    )


# --- consents ------------------------------------------------------------------------------------------------------


async def lock_firm_consents(connection: Connection, firm_id: int) -> None:
    """Changes of one firm's consent come one after the other."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('smdih-consent-' || $1::text, 0))", str(firm_id)
    )


async def current_consent(connection: Connection, firm_id: int, *, hold: bool = False) -> Consent | None:
    """`hold`: it cannot be ended before this transaction is."""
    query = "SELECT * FROM consent WHERE firm_id = $1 AND ended IS NULL"
    row = await connection.fetchrow(query + " FOR SHARE" if hold else query, firm_id)
    return None if row is None else _consent(row)


async def ended_consents(connection: Connection, firm_id: int, *, limit: int) -> list[Consent]:
    """Newest first."""
    rows = await connection.fetch(
        "SELECT * FROM consent WHERE firm_id = $1 AND ended IS NOT NULL ORDER BY ended DESC, id LIMIT $2",
        firm_id,
        limit,
    )
    return [_consent(row) for row in rows]


async def end_consent(connection: Connection, firm_id: int, *, ended: datetime, by: int, replaced: bool) -> bool:
    """End the one in force; False where there is none."""
    status = await connection.fetchval(
        "UPDATE consent SET ended = $2, ended_by = $3, replaced = $4 WHERE firm_id = $1 AND ended IS NULL RETURNING 1",
        firm_id,
        ended,
        by,
        replaced,
    )
    return status is not None


async def add_consent(
    connection: Connection, consent: Consent, *, request_id: str, request_sha256: bytes, correlation_id: str
) -> None:
    await connection.execute(
        """
        INSERT INTO consent (id, firm_id, shared, machine_ids, severity_min, valid_from, valid_until, note, given,
            given_by, request_id, request_sha256, correlation_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        """,
        consent.id,
        consent.firm_id,
        sorted(consent.shared),
        sorted(consent.machine_ids),
        int(consent.severity_min),
        consent.valid_from,
        consent.valid_until,
        consent.note,
        consent.given,
        consent.given_by,
        request_id or None,
        request_sha256 if request_id else None,
        correlation_id,
    )


async def consent_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[Consent, bytes] | None:
    """The consent that was given with this request, and the digest of the request's content."""
    row = await connection.fetchrow("SELECT * FROM consent WHERE firm_id = $1 AND request_id = $2", firm_id, request_id)
    return None if row is None else (_consent(row), row["request_sha256"])


def _consent(row: Row) -> Consent:
    return Consent(
        id=row["id"],
        firm_id=row["firm_id"],
        shared=frozenset(SharedItem(item) for item in row["shared"]),
        machine_ids=frozenset(row["machine_ids"]),
        severity_min=Severity(row["severity_min"]),
        valid_from=row["valid_from"],
        valid_until=row["valid_until"],
        note=row["note"],
        given=row["given"],
        given_by=row["given_by"],
        ended=row["ended"],
        ended_by=row["ended_by"] or 0,
        replaced=row["replaced"],
    )


# --- needs ---------------------------------------------------------------------------------------------------------


async def add_need(connection: Connection, need: Need, *, request_id: str = "", request_sha256: bytes = b"") -> None:
    await connection.execute(
        """
        INSERT INTO need (id, firm_id, source, state, text, urgency, sic, region, size, machine_id, consent_id, offers,
            no_offer_reason, opened, opened_by, request_id, request_sha256, correlation_id)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
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
    )


async def lock_requests(connection: Connection, firm_id: int, request_id: str) -> None:
    """Two calls with one request id come one after the other, so the second sees what the first made."""
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('smdih-request-' || $1::text || '/' || $2, 0))",
        str(firm_id),
        request_id,
    )


async def need_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[Need, bytes] | None:
    row = await connection.fetchrow(f"{_NEEDS} WHERE n.firm_id = $1 AND n.request_id = $2", firm_id, request_id)
    return None if row is None else (_need(row), row["request_sha256"])


async def need(connection: Connection, need_id: str) -> Need | None:
    row = await connection.fetchrow(f"{_NEEDS} WHERE n.id = $1", need_id)
    return None if row is None else _need(row)


async def lock_need(connection: Connection, need_id: str) -> Need | None:
    """Whatever is decided about a need's offers is decided while holding the need, always before its provider."""
    row = await connection.fetchrow(f"{_NEEDS} WHERE n.id = $1 FOR NO KEY UPDATE OF n", need_id)
    return None if row is None else _need(row)


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
        f"{_NEEDS} WHERE ($1::bigint = 0 OR n.firm_id = $1) AND ($2::text IS NULL OR n.state = $2) "
        "AND ($3::bigint = 0 OR n.machine_id = $3) AND ($4::timestamptz IS NULL OR (n.opened, n.id) < ($4, $5)) "
        "ORDER BY n.opened DESC, n.id DESC LIMIT $6",
        firm_id,
        state,
        machine_id,
        opened,
        need_id,
        limit,
    )
    return [_need(row) for row in rows]


async def end_need(connection: Connection, need_id: str, state: NeedState, *, ended: datetime) -> None:
    await connection.execute("UPDATE need SET state = $2, ended = $3 WHERE id = $1", need_id, state, ended)


async def set_need_offers(connection: Connection, need_id: str, offers: int, *, no_offer_reason: str) -> None:
    await connection.execute(
        "UPDATE need SET offers = $2, no_offer_reason = $3 WHERE id = $1", need_id, offers, no_offer_reason
    )


async def lock_needs_without_offers(
    connection: Connection, *, after: tuple[datetime, str] | None, limit: int
) -> list[Need]:
    """Open needs that nobody could be offered for yet, the oldest first; those that another process works on are left out."""
    opened, need_id = after or (None, "")
    rows = await connection.fetch(
        f"{_NEEDS} WHERE n.state = 'open' AND n.offers = 0 AND ($1::timestamptz IS NULL OR (n.opened, n.id) > ($1, $2)) "
        "ORDER BY n.opened, n.id LIMIT $3 FOR NO KEY UPDATE OF n SKIP LOCKED",
        opened,
        need_id,
        limit,
    )
    return [_need(row) for row in rows]


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
    """The machine's need from alarms that is open, or that had an alarm since then: a further alarm belongs to it."""
    found: str | None = await connection.fetchval(
        """
        SELECT n.id FROM need n
        WHERE n.machine_id = $1 AND n.source = 'anomaly'
          AND (n.state = 'open' OR EXISTS (SELECT FROM need_alarm a WHERE a.need_id = n.id AND a.raised > $2))
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


_NEEDS = (
    "SELECT n.*, m.id AS match_id, "
    "ARRAY(SELECT a.alarm_id FROM need_alarm a WHERE a.need_id = n.id ORDER BY a.number) AS alarm_ids "
    "FROM need n LEFT JOIN match m ON m.need_id = n.id"
)


def _need(row: Row) -> Need:
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
    )


# --- offers and matches --------------------------------------------------------------------------------------------


async def add_offers(connection: Connection, offers: Sequence[Offer]) -> None:
    await connection.executemany(
        """
        INSERT INTO offer (id, need_id, firm_id, provider_id, partner_id, provider_title, provider_kind, rank, score,
            parts, reasons, ranker_version, state, made, expires)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)
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
            )
            for offer in offers
        ],
    )


async def offer(connection: Connection, offer_id: str) -> Offer | None:
    row = await connection.fetchrow(f"{_OFFERS} WHERE o.id = $1", offer_id)
    return None if row is None else _offer(row)


async def offers_of_need(connection: Connection, need_id: str) -> list[Offer]:
    """Best first."""
    return [_offer(row) for row in await connection.fetch(f"{_OFFERS} WHERE o.need_id = $1 ORDER BY o.rank", need_id)]


async def list_offers(
    connection: Connection,
    *,
    firm_id: int,
    partner_id: int,
    state: OfferState | None,
    before: tuple[datetime, str] | None,
    limit: int,
) -> list[Offer]:
    """Newest first. 0: of all firms, of all partners."""
    made, offer_id = before or (None, "")
    rows = await connection.fetch(
        f"{_OFFERS} WHERE ($1::bigint = 0 OR o.firm_id = $1) AND ($2::bigint = 0 OR o.partner_id = $2) "
        "AND ($3::text IS NULL OR o.state = $3) AND ($4::timestamptz IS NULL OR (o.made, o.id) < ($4, $5)) "
        "ORDER BY o.made DESC, o.id DESC LIMIT $6",
        firm_id,
        partner_id,
        state,
        made,
        offer_id,
        limit,
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
        "WHERE NOT p.active OR p.expires_on <= $1 LIMIT $2",
        today,
        limit,
    )
    due = {row["id"]: DueLapse(row["id"], row["need_id"], Lapse.PROVIDER_GONE) for row in gone}
    due |= {row["id"]: DueLapse(row["id"], row["need_id"], Lapse.EXPIRED) for row in expired}
    return list(due.values())


async def add_match(connection: Connection, match: Match) -> None:
    await connection.execute(
        "INSERT INTO match (id, need_id, offer_id, firm_id, provider_id, partner_id, quarter, accepted, accepted_by, "
        "correlation_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        match.id,
        match.need_id,
        match.offer_id,
        match.firm_id,
        match.provider_id,
        match.partner_id,
        match.quarter,
        match.accepted,
        match.accepted_by,
        match.correlation_id,
    )


async def match_of_offer(connection: Connection, offer_id: str) -> Match | None:
    row = await connection.fetchrow("SELECT * FROM match WHERE offer_id = $1", offer_id)
    return None if row is None else Match(**dict(row))


_OFFERS = (
    "SELECT o.*, n.text AS need_text, n.machine_id, n.correlation_id, m.id AS match_id, "
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
    )
