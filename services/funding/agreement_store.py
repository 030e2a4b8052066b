"""Agreements and claims in the database: SQL in, domain types out. Every function works in the caller's transaction."""

from dataclasses import dataclass
from datetime import date
from typing import Any

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.errors import Conflict
from services.funding.agreement import Agreement, AgreementState, Claim, ClaimState, CostLine, Decision
from services.funding.domain import Award, Content, Cost, Finding

_CLAIM_ROWS = (
    "SELECT id, request_id, content_sha256, award_id, number, period_start, period_end, costs, is_final, state, submitted, "
    "submitted_on, decided, decided_by, decision, decision_reason, parameters_version, paid, paid_by FROM claim "
)


_award_costs = TypeAdapter(tuple[Cost, ...])
_content = TypeAdapter(Content)
_findings = TypeAdapter(tuple[Finding, ...])
_lines = TypeAdapter(tuple[CostLine, ...])
_decision = TypeAdapter(Decision)


class EvidenceUsed(Conflict):
    """One of these papers is in an earlier claim of this firm; one cost is never paid twice."""

    REASON = "EVIDENCE_USED"


class PeriodOverlaps(Conflict):
    """A claim for some of these days is there already; claim the days after it."""

    REASON = "CLAIM_PERIOD_OVERLAPS"


async def agreement_of(connection: Connection, award_id: str) -> Agreement | None:
    """The whole agreement; None when there is no such award."""
    row = await connection.fetchrow(
        "SELECT w.id, w.application_id, w.call_id, w.firm_id, w.match_id, w.grant_pence, w.co_investment_pence, "
        "w.awarded, w.awarded_on, w.parameters_version, w.database_entry_due, w.findings, w.correlation_id, p.costs, "
        "p.content, g.costs AS changed_costs, g.award_id, g.state, g.retention_rate, g.project_start, "
        "g.project_end, g.accepted, g.assistance_confirmed, g.assistance_elsewhere_pence, g.final_report, "
        "g.accountant_report, g.ended, g.end_reason, "
        "g.paid_pence, g.held_pence, g.restored_pence, g.recovered_pence, g.business_paid_pence "
        "FROM award w JOIN application p ON p.id = w.application_id LEFT JOIN agreement g ON g.award_id = w.id "
        "WHERE w.id = $1",
        award_id,
    )
    if row is None:
        return None
    claims = await connection.fetch(_CLAIM_ROWS + "WHERE award_id = $1 ORDER BY number", award_id)
    return Agreement(
        award=_award(row),
        costs=_project_costs(row),
        # Without a row nobody has answered the offer.
        state=AgreementState(row["state"] or AgreementState.OFFERED),
        retention_rate=row["retention_rate"] or "",
        project_start=row["project_start"],
        project_end=row["project_end"],
        accepted_us=row["accepted"] and to_us(row["accepted"]),
        assistance_confirmed_us=row["assistance_confirmed"] and to_us(row["assistance_confirmed"]),
        assistance_elsewhere_pence=row["assistance_elsewhere_pence"],
        final_report=row["final_report"] or "",
        accountant_report=row["accountant_report"] or "",
        ended_us=row["ended"] and to_us(row["ended"]),
        end_reason=row["end_reason"] or "",
        paid_pence=row["paid_pence"] or 0,
        held_pence=row["held_pence"] or 0,
        restored_pence=row["restored_pence"] or 0,
        recovered_pence=row["recovered_pence"] or 0,
        business_paid_pence=row["business_paid_pence"] or 0,
        claims=tuple(_claim(claim) for claim in claims),
    )


def _project_costs(row: asyncpg.Record) -> tuple[Cost, ...]:
    """As they were changed last, else the applicant's and its partners' of the application."""
    if row["changed_costs"]:
        return _award_costs.validate_json(row["changed_costs"])
    content = _content.validate_json(row["content"])
    return _award_costs.validate_json(row["costs"]) + tuple(
        cost for partner in content.partners for cost in partner.costs
    )


async def lock_agreement(
    connection: Connection, award: Award, *, retention_rate: str, before_completion_pence_max: int
) -> None:
    """Nobody else changes it until the transaction ends; makes the row at the first time."""
    await connection.execute(
        "INSERT INTO agreement (award_id, grant_pence, co_investment_pence, retention_rate, before_completion_pence_max) "
        "VALUES ($1, $2, $3, $4, $5) ON CONFLICT (award_id) DO NOTHING",
        award.id,
        award.grant_pence,
        award.co_investment_pence,
        retention_rate,
        before_completion_pence_max,
    )
    await connection.execute("SELECT FROM agreement WHERE award_id = $1 FOR NO KEY UPDATE", award.id)


async def lock_award(connection: Connection, award_id: str) -> None:
    """The same for what needs no figures of the agreement, and whether or not it has been answered."""
    await connection.execute("SELECT FROM agreement WHERE award_id = $1 FOR NO KEY UPDATE", award_id)
    # Without an answer there is no agreement yet.
    await connection.execute("SELECT FROM award WHERE id = $1 FOR NO KEY UPDATE", award_id)


async def set_accepted(connection: Connection, award_id: str, *, start: date, end: date, now_us: int) -> None:
    await connection.execute(
        "UPDATE agreement SET state = 'accepted', project_start = $2, project_end = $3, accepted = $4 WHERE award_id = $1",
        award_id,
        start,
        end,
        from_us(now_us),
    )


async def set_assistance_confirmed(
    connection: Connection, award_id: str, *, elsewhere_pence: int, statement: str, credential_id: int, now_us: int
) -> None:
    await connection.execute(
        "UPDATE agreement SET assistance_confirmed = $2, assistance_confirmed_by = $3, assistance_elsewhere_pence = $4, "
        "assistance_statement = $5 WHERE award_id = $1",
        award_id,
        from_us(now_us),
        credential_id,
        elsewhere_pence,
        statement,
    )


async def set_reports(connection: Connection, award_id: str, *, final_report: str, accountant_report: str) -> None:
    await connection.execute(
        "UPDATE agreement SET final_report = $2, accountant_report = $3 WHERE award_id = $1",
        award_id,
        final_report,
        accountant_report,
    )


async def set_ended(connection: Connection, award_id: str, *, state: AgreementState, reason: str, now_us: int) -> None:
    await connection.execute(
        "UPDATE agreement SET state = $2, end_reason = $3, ended = $4 WHERE award_id = $1",
        award_id,
        state,
        reason,
        from_us(now_us),
    )


async def claim_by_request(connection: Connection, award_id: str, request_id: str) -> bytes | None:
    """Content of the claim that was made by this request."""
    content: bytes | None = await connection.fetchval(
        "SELECT content_sha256 FROM claim WHERE award_id = $1 AND request_id = $2", award_id, request_id
    )
    return content


async def add_claim(
    connection: Connection, agreement: Agreement, claim: Claim, *, request_id: str, content_sha256: bytes
) -> None:
    """Raises PeriodOverlaps or EvidenceUsed."""
    try:
        await connection.execute(
            "INSERT INTO claim (id, request_id, content_sha256, award_id, number, period_start, period_end, costs, is_final, "
            "state, submitted, submitted_on) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
            claim.id,
            request_id,
            content_sha256,
            agreement.award.id,
            claim.number,
            claim.period_start,
            claim.period_end,
            _lines.dump_json(claim.costs).decode(),
            claim.is_final,
            claim.state,
            from_us(claim.submitted_us),
            claim.submitted_on,
        )
        await connection.execute(
            "INSERT INTO claimed_evidence (firm_id, evidence, claim_id) SELECT $1, unnest($2::text[]), $3",
            agreement.award.firm_id,
            sorted(line.evidence for line in claim.costs),
            claim.id,
        )
    except asyncpg.ExclusionViolationError as error:
        raise PeriodOverlaps() from error
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == "claimed_evidence_pkey":
            raise EvidenceUsed() from error
        raise


async def set_claim_decided(
    connection: Connection,
    claim_id: str,
    *,
    state: ClaimState,
    decision: Decision | None,
    reason: str,
    parameters_version: str,
    credential_id: int,
    now_us: int,
) -> None:
    await connection.execute(
        "UPDATE claim SET state = $2, decision = $3, decision_reason = $4, parameters_version = $5, decided_by = $6, "
        "decided = $7 WHERE id = $1",
        claim_id,
        state,
        _decision.dump_json(decision).decode() if decision else None,
        reason,
        parameters_version,
        credential_id,
        from_us(now_us),
    )
    if state is ClaimState.REJECTED:
        await connection.execute("DELETE FROM claimed_evidence WHERE claim_id = $1", claim_id)


async def set_claim_returned(connection: Connection, claim_id: str, *, reason: str) -> None:
    await connection.execute(
        "UPDATE claim SET state = 'submitted', decision = NULL, decided = NULL, decided_by = NULL, decision_reason = $2 "
        "WHERE id = $1",
        claim_id,
        reason,
    )


async def set_claim_paid(connection: Connection, claim_id: str, *, credential_id: int, now_us: int) -> None:
    await connection.execute(
        "UPDATE claim SET state = 'paid', paid = $2, paid_by = $3 WHERE id = $1",
        claim_id,
        from_us(now_us),
        credential_id,
    )


def _award(row: asyncpg.Record) -> Award:
    names = (
        *("id", "application_id", "call_id", "firm_id", "match_id", "grant_pence", "co_investment_pence"),
        *("awarded_on", "parameters_version", "database_entry_due", "correlation_id"),
    )
    fields: dict[str, Any] = {name: row[name] for name in names}
    return Award(awarded_us=to_us(row["awarded"]), findings=_findings.validate_json(row["findings"]), **fields)


def _claim(row: asyncpg.Record) -> Claim:
    return Claim(
        id=row["id"],
        number=row["number"],
        period_start=row["period_start"],
        period_end=row["period_end"],
        costs=_lines.validate_json(row["costs"]),
        is_final=row["is_final"],
        state=ClaimState(row["state"]),
        submitted_us=to_us(row["submitted"]),
        submitted_on=row["submitted_on"],
        decided_us=row["decided"] and to_us(row["decided"]),
        decided_by=row["decided_by"],
        decision=_decision.validate_json(row["decision"]) if row["decision"] else None,
        decision_reason=row["decision_reason"] or "",
        paid_us=row["paid"] and to_us(row["paid"]),
        paid_by=row["paid_by"],
    )


# Open data


@dataclass(frozen=True, kw_only=True)
class PublicAward:
    """What everybody may know of an award."""

    id: str
    firm_id: int
    call_id: str
    call_title: str
    grant_pence: int
    co_investment_pence: int
    # Less what was recovered.
    paid_pence: int
    awarded_us: int
    awarded_on: date
    project_start: date | None
    project_end: date | None


@dataclass(frozen=True, kw_only=True)
class EntryDue:
    """An award that has to be in the public subsidy database by a day, and is not yet."""

    award_id: str
    firm_id: int
    grant_pence: int
    awarded_on: date
    due: date


async def public_awards(connection: Connection, *, after_us: int, after_id: str, limit: int) -> list[PublicAward]:
    """Oldest first, so that a page once read stays the same; without awards given up before anything was paid."""
    rows = await connection.fetch(
        "SELECT w.id, w.firm_id, w.call_id, c.title AS call_title, w.grant_pence, w.co_investment_pence, "
        "  coalesce(g.paid_pence - g.recovered_pence, 0) AS paid_pence, w.awarded, w.awarded_on, g.project_start, "
        "  g.project_end "
        "FROM award w JOIN call c ON c.id = w.call_id "
        "LEFT JOIN agreement g ON g.award_id = w.id "
        "WHERE (w.awarded, w.id) > ($1, $2) AND coalesce(g.restored_pence, 0) < w.grant_pence "
        "ORDER BY w.awarded, w.id LIMIT $3",
        from_us(after_us),
        after_id,
        limit,
    )
    found = []
    for row in rows:
        fields = dict(row)
        found.append(PublicAward(awarded_us=to_us(fields.pop("awarded")), **fields))
    return found


async def entries_due(connection: Connection, *, limit: int) -> list[EntryDue]:
    """The most urgent first."""
    rows = await connection.fetch(
        "SELECT w.id AS award_id, w.firm_id, w.grant_pence, w.awarded_on, w.database_entry_due AS due "
        "FROM award w LEFT JOIN agreement g ON g.award_id = w.id "
        "WHERE w.database_entry_due IS NOT NULL AND coalesce(g.restored_pence, 0) < w.grant_pence "
        "AND NOT EXISTS (SELECT FROM subsidy_entry e WHERE e.award_id = w.id) "
        "ORDER BY w.database_entry_due, w.id LIMIT $1",
        limit,
    )
    return [EntryDue(**dict(row)) for row in rows]


async def add_entry(connection: Connection, award_id: str, *, reference: str, credential_id: int, now_us: int) -> bool:
    """False when there is one already."""
    done = await connection.execute(
        "INSERT INTO subsidy_entry (award_id, reference, entered, entered_by) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT (award_id) DO NOTHING",
        award_id,
        reference,
        from_us(now_us),
        credential_id,
    )
    return done == "INSERT 0 1"
