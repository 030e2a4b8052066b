"""Applications, pledges and waivers in the database: SQL in, domain types out. Every function works in the caller's
transaction."""

from collections.abc import Sequence

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.errors import Conflict
from services.funding.award_store import award_from
from services.funding.domain import Application, ApplicationState, Award, Content, Cost, Declaration, Match, Pledge
from services.funding.paging import Place
from services.funding.rules.match import PledgeKind

_APPLICATION_ROWS = (
    "SELECT id, request_id, content_sha256, call_id, match_id, firm_id, state, costs, declaration, sic, requested_pence, "
    "other_public_pence, grant_pence, created, submitted, decided, decision_reason, correlation_id, content FROM "
    "application "
)
_PLEDGE_ROWS = (
    "SELECT id, request_id, content_sha256, application_id, co_investor, kind, public_body, amount_pence, added, confirmed, "
    "evidence FROM pledge "
)
_AWARD_ROWS = (
    "SELECT id, application_id, call_id, firm_id, match_id, grant_pence, co_investment_pence, awarded, awarded_on, "
    "parameters_version, database_entry_due, findings, correlation_id FROM award "
)

_costs = TypeAdapter(tuple[Cost, ...])
_declaration = TypeAdapter(Declaration)
_content = TypeAdapter(Content)


class MatchInUse(Conflict):
    """This match has an application that is not rejected or withdrawn; use that one, or withdraw it first."""

    REASON = "MATCH_IN_USE"


# Applications


async def add_application(
    connection: Connection, application: Application, *, request_id: str, content_sha256: bytes
) -> bool:
    """False when the firm has one of that request id already. Raises MatchInUse."""
    try:
        done = await connection.execute(
            "INSERT INTO application (id, request_id, content_sha256, call_id, match_id, firm_id, state, costs, declaration, "
            "sic, requested_pence, other_public_pence, created, correlation_id, content) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15) "
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
            _content.dump_json(application.content).decode(),
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


_PLEDGES_STANDING = _PLEDGE_ROWS + "WHERE application_id = $1 AND taken_back IS NULL ORDER BY added, id"
_APPLICATION = _APPLICATION_ROWS + "WHERE id = $1"
_APPLICATION_LOCKED = _APPLICATION_ROWS + "WHERE id = $1 FOR NO KEY UPDATE"


async def application_of(connection: Connection, application_id: str, *, lock: bool = False) -> Application | None:
    """The whole application; with `lock` nobody else changes it until the transaction ends."""
    row = await connection.fetchrow(_APPLICATION_LOCKED if lock else _APPLICATION, application_id)
    if row is None:
        return None
    pledges = await connection.fetch(_PLEDGES_STANDING, application_id)
    award = await connection.fetchrow(_AWARD_ROWS + "WHERE application_id = $1", application_id)
    waivers = await connection.fetchval("SELECT count(*) FROM ratio_waiver WHERE application_id = $1", application_id)
    return _application(
        row,
        pledges=[_pledge(item) for item in pledges],
        award=None if award is None else award_from(award),
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
        _APPLICATION_ROWS + "WHERE ($1::bigint IS NULL OR firm_id = $1) AND ($2::text IS NULL OR call_id = $2) "
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


async def newest_of(connection: Connection, firm_id: int) -> Application | None:
    """The firm's newest application, without pledges."""
    row = await connection.fetchrow(
        _APPLICATION_ROWS + "WHERE firm_id = $1 ORDER BY created DESC, id DESC LIMIT 1", firm_id
    )
    return None if row is None else _application(row, pledges=(), award=None, ratio_waivers=0)


async def submitted_of(connection: Connection, call_id: str, *, limit: int) -> list[Application]:
    """All of a call that were submitted and not withdrawn, in order of submission, without pledges."""
    rows = await connection.fetch(
        _APPLICATION_ROWS + "WHERE call_id = $1 AND state IN ('submitted', 'awarded', 'rejected') "
        "ORDER BY submitted, id LIMIT $2",
        call_id,
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


async def live_of_match(connection: Connection, match_id: str) -> Application | None:
    """The application on the match that waits to be submitted or decided."""
    found = await connection.fetchval(
        "SELECT id FROM application WHERE match_id = $1 AND state IN ('draft', 'submitted')", match_id
    )
    return None if found is None else await application_of(connection, found)


async def without_match(connection: Connection, match: Match) -> Application | None:
    """The newest live application whose match for the same need as this one's has ended; held until the transaction ends."""
    found = await connection.fetchval(
        "SELECT p.id FROM application p JOIN match m ON m.id = p.match_id "
        "WHERE m.need_id = $1 AND m.firm_id = $2 AND m.ended IS NOT NULL AND p.state IN ('draft', 'submitted') "
        "ORDER BY p.created DESC, p.id DESC LIMIT 1 FOR NO KEY UPDATE OF p",
        match.need_id,
        match.firm_id,
    )
    return None if found is None else await application_of(connection, found)


async def set_match(connection: Connection, application_id: str, match_id: str) -> None:
    """Raises MatchInUse."""
    try:
        await connection.execute("UPDATE application SET match_id = $2 WHERE id = $1", application_id, match_id)
    except asyncpg.UniqueViolationError as error:
        raise MatchInUse() from error


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
        content=_content.validate_json(row["content"]),
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
        _PLEDGE_ROWS + "WHERE application_id = $1 AND request_id = $2", application_id, request_id
    )
    return None if row is None else (row["content_sha256"], _pledge(row))


async def set_confirmed(connection: Connection, pledge_id: str, *, evidence: str, now_us: int) -> None:
    await connection.execute(
        "UPDATE pledge SET confirmed = $2, evidence = $3 WHERE id = $1", pledge_id, from_us(now_us), evidence
    )


async def is_taken_back(connection: Connection, application_id: str, pledge_id: str) -> bool:
    found = await connection.fetchval(
        "SELECT taken_back IS NOT NULL FROM pledge WHERE application_id = $1 AND id = $2", application_id, pledge_id
    )
    return bool(found)


async def set_taken_back(connection: Connection, pledge_id: str, *, now_us: int) -> None:
    await connection.execute("UPDATE pledge SET taken_back = $2 WHERE id = $1", pledge_id, from_us(now_us))


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
