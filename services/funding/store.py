"""Calls, applications, pledges and awards in the database: SQL in, domain types out. Every function works in the caller's
transaction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.errors import Conflict
from services.common.logs import current_correlation_id
from services.funding.checks import Given
from services.funding.domain import (
    Application,
    ApplicationState,
    Award,
    Call,
    Cost,
    Declaration,
    Finding,
    Match,
    Pledge,
)
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition

_costs = TypeAdapter(tuple[Cost, ...])
_declaration = TypeAdapter(Declaration)
_findings = TypeAdapter(tuple[Finding, ...])
_detail = TypeAdapter(dict[str, str | int])


class MatchInUse(Conflict):
    """This match has an application that is not rejected or withdrawn; use that one, or withdraw it first."""

    REASON = "MATCH_IN_USE"


@dataclass(frozen=True)
class Place:
    """Where a page ended: the next one starts behind it."""

    created_us: int
    id: str


# Matches


async def add_match(connection: Connection, match: Match) -> bool:
    """False when it is known already."""
    done = await connection.execute(
        "INSERT INTO match (id, event_id, firm_id, need_id, offer_id, provider_id, provider_title, accepted, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (id) DO NOTHING",
        match.id,
        match.event_id,
        match.firm_id,
        match.need_id,
        match.offer_id,
        match.provider_id,
        match.provider_title,
        from_us(match.accepted_us),
        match.correlation_id,
    )
    return done == "INSERT 0 1"


async def match_of(connection: Connection, match_id: str) -> Match | None:
    row = await connection.fetchrow("SELECT * FROM match WHERE id = $1", match_id)
    if row is None:
        return None
    fields = dict(row)
    return Match(accepted_us=to_us(fields.pop("accepted")), **fields)


# Calls

_CALL = (
    "SELECT c.*, a.committed_pence FROM call c CROSS JOIN LATERAL ("
    "  SELECT sum(balance_pence)::bigint AS committed_pence FROM ledger_account WHERE call_id = c.id "
    "  AND kind IN ('public_committed', 'public_held', 'public_paid', 'public_recovered')) a "
)


async def add_call(connection: Connection, call: Call, *, request_id: str, content_sha256: bytes) -> bool:
    """False when there is one of that request id already."""
    done = await connection.execute(
        "INSERT INTO call (id, request_id, content_sha256, title, budget_pence, opens, closes, category, size_definition, "
        "rate_max, in_kind_allowed, created) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) "
        "ON CONFLICT (request_id) DO NOTHING",
        call.id,
        request_id,
        content_sha256,
        call.title,
        call.budget_pence,
        from_us(call.opens_us),
        from_us(call.closes_us),
        call.category,
        call.size_definition,
        call.rate_max,
        call.in_kind_allowed,
        from_us(call.created_us),
    )
    return done == "INSERT 0 1"


async def call_by_request(connection: Connection, request_id: str) -> tuple[bytes, Call] | None:
    row = await connection.fetchrow(_CALL + "WHERE c.request_id = $1", request_id)
    return None if row is None else (row["content_sha256"], _call(row))


async def call_of(connection: Connection, call_id: str) -> Call | None:
    row = await connection.fetchrow(_CALL + "WHERE c.id = $1", call_id)
    return None if row is None else _call(row)


async def calls(connection: Connection, *, after: Place | None, limit: int) -> list[Call]:
    """Newest first."""
    rows = await connection.fetch(
        _CALL
        + "WHERE $1::timestamptz IS NULL OR (c.created, c.id) < ($1, $2) ORDER BY c.created DESC, c.id DESC LIMIT $3",
        from_us(after.created_us) if after else None,
        after.id if after else None,
        limit,
    )
    return [_call(row) for row in rows]


def _call(row: asyncpg.Record) -> Call:
    return Call(
        id=row["id"],
        title=row["title"],
        budget_pence=row["budget_pence"],
        opens_us=to_us(row["opens"]),
        closes_us=to_us(row["closes"]),
        category=Category(row["category"]),
        size_definition=Definition(row["size_definition"]),
        rate_max=row["rate_max"],
        in_kind_allowed=row["in_kind_allowed"],
        created_us=to_us(row["created"]),
        committed_pence=row["committed_pence"],
    )


# Applications


async def add_application(
    connection: Connection, application: Application, *, request_id: str, content_sha256: bytes
) -> bool:
    """False when the firm has one of that request id already. Raises MatchInUse."""
    try:
        done = await connection.execute(
            "INSERT INTO application (id, request_id, content_sha256, call_id, match_id, firm_id, state, costs, declaration, "
            "sic, requested_pence, other_public_pence, created, correlation_id) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14) "
            "ON CONFLICT (firm_id, request_id) DO NOTHING",
            application.id,
            request_id,
            content_sha256,
            application.call_id,
            application.match_id,
            application.firm_id,
            application.state,
            _costs.dump_json(application.costs).decode(),
            _declaration.dump_json(application.declaration).decode(),
            application.sic,
            application.requested_pence,
            application.other_public_pence,
            from_us(application.created_us),
            application.correlation_id,
        )
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == "application_match_id_live_key":
            raise MatchInUse() from error
        raise
    return done == "INSERT 0 1"


async def application_by_request(connection: Connection, firm_id: int, request_id: str) -> tuple[bytes, str] | None:
    """Content and id of the application that the firm made by this request."""
    row = await connection.fetchrow(
        "SELECT content_sha256, id FROM application WHERE firm_id = $1 AND request_id = $2", firm_id, request_id
    )
    return None if row is None else (row["content_sha256"], row["id"])


_APPLICATION = "SELECT * FROM application WHERE id = $1"
_APPLICATION_LOCKED = "SELECT * FROM application WHERE id = $1 FOR NO KEY UPDATE"


async def application_of(connection: Connection, application_id: str, *, lock: bool = False) -> Application | None:
    """The whole application; with `lock` nobody else changes it until the transaction ends."""
    row = await connection.fetchrow(_APPLICATION_LOCKED if lock else _APPLICATION, application_id)
    if row is None:
        return None
    pledges = await connection.fetch(
        "SELECT * FROM pledge WHERE application_id = $1 ORDER BY added, id", application_id
    )
    award = await connection.fetchrow("SELECT * FROM award WHERE application_id = $1", application_id)
    waivers = await connection.fetchval("SELECT count(*) FROM ratio_waiver WHERE application_id = $1", application_id)
    return _application(
        row,
        pledges=[_pledge(item) for item in pledges],
        award=None if award is None else _award(award),
        ratio_waivers=waivers,
    )


async def applications(
    connection: Connection,
    *,
    firm_id: int | None,
    call_id: str | None,
    state: ApplicationState | None,
    after: Place | None,
    limit: int,
) -> list[Application]:
    """Newest first, without pledges."""
    rows = await connection.fetch(
        "SELECT * FROM application WHERE ($1::bigint IS NULL OR firm_id = $1) AND ($2::text IS NULL OR call_id = $2) "
        "AND ($3::text IS NULL OR state = $3) AND ($4::timestamptz IS NULL OR (created, id) < ($4, $5)) "
        "ORDER BY created DESC, id DESC LIMIT $6",
        firm_id,
        call_id,
        state,
        from_us(after.created_us) if after else None,
        after.id if after else None,
        limit,
    )
    return [_application(row, pledges=(), award=None, ratio_waivers=0) for row in rows]


async def set_submitted(connection: Connection, application_id: str, *, grant_pence: int, now_us: int) -> None:
    await connection.execute(
        "UPDATE application SET state = 'submitted', grant_pence = $2, submitted = $3 WHERE id = $1",
        application_id,
        grant_pence,
        from_us(now_us),
    )


async def set_withdrawn(connection: Connection, application_id: str) -> None:
    await connection.execute("UPDATE application SET state = 'withdrawn' WHERE id = $1", application_id)


async def set_decided(
    connection: Connection, application_id: str, *, state: ApplicationState, reason: str, now_us: int
) -> None:
    await connection.execute(
        "UPDATE application SET state = $2, decision_reason = $3, decided = $4 WHERE id = $1",
        application_id,
        state,
        reason,
        from_us(now_us),
    )


def _application(
    row: asyncpg.Record, *, pledges: Sequence[Pledge], award: Award | None, ratio_waivers: int
) -> Application:
    return Application(
        id=row["id"],
        call_id=row["call_id"],
        match_id=row["match_id"],
        firm_id=row["firm_id"],
        state=ApplicationState(row["state"]),
        costs=_costs.validate_json(row["costs"]),
        declaration=_declaration.validate_json(row["declaration"]),
        sic=row["sic"],
        requested_pence=row["requested_pence"],
        other_public_pence=row["other_public_pence"],
        grant_pence=row["grant_pence"],
        created_us=to_us(row["created"]),
        submitted_us=row["submitted"] and to_us(row["submitted"]),
        decided_us=row["decided"] and to_us(row["decided"]),
        decision_reason=row["decision_reason"] or "",
        correlation_id=row["correlation_id"],
        pledges=tuple(pledges),
        award=award,
        ratio_waivers=ratio_waivers,
    )


# Pledges and waivers


async def add_pledge(connection: Connection, pledge: Pledge, *, request_id: str, content_sha256: bytes) -> None:
    await connection.execute(
        "INSERT INTO pledge (id, request_id, content_sha256, application_id, co_investor, kind, public_body, amount_pence, "
        "added) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        pledge.id,
        request_id,
        content_sha256,
        pledge.application_id,
        pledge.co_investor,
        pledge.kind,
        pledge.public_body,
        pledge.amount_pence,
        from_us(pledge.added_us),
    )


async def pledge_by_request(
    connection: Connection, application_id: str, request_id: str
) -> tuple[bytes, Pledge] | None:
    row = await connection.fetchrow(
        "SELECT * FROM pledge WHERE application_id = $1 AND request_id = $2", application_id, request_id
    )
    return None if row is None else (row["content_sha256"], _pledge(row))


async def set_confirmed(connection: Connection, pledge_id: str, *, evidence: str, now_us: int) -> None:
    await connection.execute(
        "UPDATE pledge SET confirmed = $2, evidence = $3 WHERE id = $1", pledge_id, from_us(now_us), evidence
    )


async def add_waiver(
    connection: Connection, application_id: str, *, credential_id: int, reason: str, now_us: int
) -> None:
    await connection.execute(
        "INSERT INTO ratio_waiver (application_id, credential_id, reason, waived) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT (application_id, credential_id) DO NOTHING",
        application_id,
        credential_id,
        reason,
        from_us(now_us),
    )


def _pledge(row: asyncpg.Record) -> Pledge:
    return Pledge(
        id=row["id"],
        application_id=row["application_id"],
        co_investor=row["co_investor"],
        kind=PledgeKind(row["kind"]),
        public_body=row["public_body"],
        amount_pence=row["amount_pence"],
        added_us=to_us(row["added"]),
        confirmed_us=row["confirmed"] and to_us(row["confirmed"]),
        evidence=row["evidence"] or "",
    )


# Awards and audit


async def add_award(connection: Connection, award: Award) -> None:
    await connection.execute(
        "INSERT INTO award (id, application_id, call_id, firm_id, match_id, grant_pence, co_investment_pence, awarded, "
        "awarded_on, parameters_version, database_entry_due, findings, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
        award.id,
        award.application_id,
        award.call_id,
        award.firm_id,
        award.match_id,
        award.grant_pence,
        award.co_investment_pence,
        from_us(award.awarded_us),
        award.awarded_on,
        award.parameters_version,
        award.database_entry_due,
        _findings.dump_json(award.findings).decode(),
        award.correlation_id,
    )


async def given_to(connection: Connection, firm_id: int) -> list[Given]:
    """What this fund has awarded to the firm; of an award that has ended, what it came to."""
    rows = await connection.fetch(
        "SELECT w.awarded_on, w.grant_pence - coalesce(g.restored_pence, 0) AS grant_pence "
        "FROM award w LEFT JOIN agreement g ON g.award_id = w.id WHERE w.firm_id = $1",
        firm_id,
    )
    return [Given(on=row["awarded_on"], amount_pence=row["grant_pence"]) for row in rows]


def _award(row: asyncpg.Record) -> Award:
    fields: dict[str, Any] = dict(row)
    findings = _findings.validate_json(fields.pop("findings"))
    return Award(awarded_us=to_us(fields.pop("awarded")), findings=findings, **fields)


async def audit(
    connection: Connection,
    action: str,
    *,
    credential_id: int,
    now_us: int,
    call_id: str,
    application_id: str | None = None,
    detail: Mapping[str, str | int],
) -> None:
    """Who did what. Append-only, in the transaction of what was done."""
    await connection.execute(
        "INSERT INTO audit (at, credential_id, action, call_id, application_id, detail, correlation_id) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        from_us(now_us),
        credential_id,
        action,
        call_id,
        application_id,
        _detail.dump_json(dict(detail)).decode(),
        current_correlation_id(),
    )
