"""Changes after the award: the firm asks, an operator approves or refuses, and what is approved takes effect at once."""

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

import asyncpg
from pydantic import TypeAdapter

from services.common.clock import Clock, from_us, to_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.funding import agreement_store, ledger
from services.funding.agreement import OPEN_CLAIMS, Agreement, AgreementState, check_end
from services.funding.award_store import audit
from services.funding.domain import (
    Cost,
    Refused,
    checked_amount,
    checked_costs,
    checked_date,
    checked_request_id,
    checked_text,
    is_id,
)
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.exact import gbp

log = get_logger(__name__)

_CHANGE_REQUEST_ROWS = (
    "SELECT id, request_id, content_sha256, award_id, kind, project_end, costs, reduction_pence, reason, state, requested, "
    "requested_by, decided, decided_by, decision_reason FROM change_request "
)
CHANGES_MAX = 50

_costs = TypeAdapter(tuple[Cost, ...])


class ChangeKind(StrEnum):
    # Another last day of the project.
    TIME = "time"
    # Money between cost categories; the sum stays.
    COSTS = "costs"
    # Less grant than was awarded; the rest returns to the call.
    REDUCTION = "reduction"
    # Scope, partners, people: recorded, without an effect on money or dates.
    OTHER = "other"


class ChangeState(StrEnum):
    REQUESTED = "requested"
    APPROVED = "approved"
    REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change request. Which of the fields is set follows from the kind."""

    id: str
    kind: ChangeKind
    reason: str
    project_end: date | None = None
    costs: tuple[Cost, ...] | None = None
    reduction_pence: int | None = None
    state: ChangeState = ChangeState.REQUESTED
    requested_us: int = 0
    decided_us: int | None = None
    decision_reason: str = ""


class ChangeOpen(Conflict):
    """Another change request of this award is not decided yet; one at a time."""

    REASON = "CHANGE_OPEN"


class ChangeService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def get(self, caller: Caller, award_id: str) -> list[Change]:
        """Oldest first."""
        async with transaction(self._pool) as connection:
            await _agreement(connection, caller, award_id)
            return await _changes(connection, award_id)

    async def request(
        self,
        caller: Caller,
        award_id: str,
        *,
        request_id: str,
        kind: ChangeKind,
        reason: str,
        project_end: str = "",
        costs: Sequence[Cost] = (),
        reduction_pence: int = 0,
    ) -> list[Change]:
        """The firm asks. What cannot take effect is refused at once."""
        caller.require(Role.FIRM)
        with understood():
            checked_request_id(request_id)
            change = Change(
                id=uuid.uuid4().hex,
                kind=kind,
                reason=checked_text("reason", reason),
                project_end=checked_date("project_end", project_end) if project_end else None,
                costs=checked_costs(tuple(costs)) if costs else None,
                reduction_pence=checked_amount("reduction_pence", reduction_pence) if reduction_pence else None,
                requested_us=self._clock.now_us(),
            )
        told = {
            ChangeKind.TIME: change.project_end is not None,
            ChangeKind.COSTS: change.costs is not None,
            ChangeKind.REDUCTION: change.reduction_pence is not None,
        }
        if any(is_there != (of_kind is kind) for of_kind, is_there in told.items()):
            raise Invalid(
                "time needs project_end, costs needs costs, reduction needs reduction_pence, and nothing else.",
                reason="CHANGE_INVALID",
            )
        content = content_sha256(dataclasses.replace(change, id="", requested_us=0))
        async with transaction(self._pool) as connection:
            agreement = await _locked(connection, caller, award_id)
            first = await connection.fetchval(
                "SELECT content_sha256 FROM change_request WHERE award_id = $1 AND request_id = $2",
                award_id,
                request_id,
            )
            if first is None:
                _check_possible(agreement, change)
                there = await _changes(connection, award_id)
                if len(there) >= CHANGES_MAX:
                    raise Conflict(f"An award has at most {CHANGES_MAX} change requests.", reason="TOO_MANY_CHANGES")
                if any(one.state is ChangeState.REQUESTED for one in there):
                    raise ChangeOpen()
                await _add(connection, award_id, change, caller, request_id=request_id, content=content)
                await self._audit(connection, caller, "change_requested", agreement, change)
            else:
                check_same(first, content)
            return await _changes(connection, award_id)

    async def decide(
        self, caller: Caller, award_id: str, change_id: str, *, approve: bool, reason: str
    ) -> list[Change]:
        """An operator's word; an approved change takes effect in the same transaction. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        wanted = ChangeState.APPROVED if approve else ChangeState.REFUSED
        async with transaction(self._pool) as connection:
            agreement = await _locked(connection, caller, award_id)
            change = next((one for one in await _changes(connection, award_id) if one.id == change_id), None)
            if change is None:
                raise NotFound("This award has no such change request.", reason="CHANGE_UNKNOWN")
            if change.state is not ChangeState.REQUESTED:
                if change.state is not wanted:
                    raise Conflict(f"The change request is {change.state} already.", reason="ALREADY_DECIDED")
                return await _changes(connection, award_id)
            with correlated(agreement.award.correlation_id):
                if approve:
                    _check_possible(agreement, change)
                    await self._take_effect(connection, caller, agreement, change)
                await connection.execute(
                    "UPDATE change_request SET state = $2, decided = $3, decided_by = $4, decision_reason = $5 WHERE id = $1",
                    change.id,
                    wanted,
                    from_us(self._clock.now_us()),
                    caller.credential_id,
                    reason,
                )
                await self._audit(connection, caller, f"change_{wanted}", agreement, change)
            log.info("change decided", award_id=award_id, change_id=change.id, state=wanted)
            return await _changes(connection, award_id)

    async def _take_effect(self, connection: Connection, caller: Caller, agreement: Agreement, change: Change) -> None:
        award = agreement.award
        if change.project_end is not None:
            await connection.execute(
                "UPDATE agreement SET project_end = $2 WHERE award_id = $1", award.id, change.project_end
            )
        if change.costs is not None:
            await connection.execute(
                "UPDATE agreement SET costs = $2 WHERE award_id = $1", award.id, _costs.dump_json(change.costs).decode()
            )
        if change.reduction_pence is not None:
            restored = Transfer(
                debit=Account(award.call_id, AccountKind.PUBLIC_COMMITTED),
                credit=Account(award.call_id, AccountKind.PUBLIC_BUDGET),
                amount_pence=change.reduction_pence,
                purpose=Purpose.GRANT_RESTORED,
                subject_id=f"{award.id}/change:{change.id}",
            )
            event = Event(
                request_id=f"award:{award.id}:change:{change.id}",
                kind="grant_reduced",
                transfers=(restored,),
                credential_id=caller.credential_id,
            )
            await ledger.post(connection, self._clock, event)

    async def _audit(
        self, connection: Connection, caller: Caller, action: str, agreement: Agreement, change: Change
    ) -> None:
        award = agreement.award
        await audit(
            connection,
            action,
            credential_id=caller.credential_id,
            now_us=self._clock.now_us(),
            call_id=award.call_id,
            application_id=award.application_id,
            detail={
                "award_id": award.id,
                "change_id": change.id,
                "kind": change.kind,
                "reduction_pence": change.reduction_pence or 0,
            },
        )


def _check_possible(agreement: Agreement, change: Change) -> None:
    """Raises Conflict when the change does not fit the agreement as it stands."""
    if agreement.state is not AgreementState.ACCEPTED:
        raise Conflict(
            f"The award is {agreement.state}; changes are for one that is accepted.",
            reason=f"AWARD_{agreement.state.upper()}",
        )
    if any(claim.state in OPEN_CLAIMS for claim in agreement.claims):
        raise Conflict("A claim is still open; it has to be paid or rejected first.", reason="CLAIM_OPEN")
    if change.project_end is not None:
        assert agreement.project_start is not None, "an accepted agreement has its dates"
        try:
            # The final claim is for the days up to the end; without one left, what is held could never be paid.
            check_end(change.project_end, earliest=agreement.first_open_day, start=agreement.project_start)
        except Refused as error:
            raise Conflict(str(error), reason=error.reason) from error
    if change.costs is not None:
        total = sum(cost.amount_pence for cost in agreement.costs)
        if sum(cost.amount_pence for cost in change.costs) != total:
            raise Conflict(f"The costs come to {gbp(total)} in sum, as awarded.", reason="COSTS_SUM_CHANGED")
    if change.reduction_pence is not None and change.reduction_pence >= agreement.left_pence:
        raise Conflict(
            f"{gbp(agreement.left_pence)} is neither paid nor held; a reduction is less than that.",
            reason="REDUCTION_TOO_LARGE",
        )


async def _agreement(connection: Connection, caller: Caller, award_id: str) -> Agreement:
    caller.require(Role.FIRM, Role.OPERATOR)
    found = await agreement_store.agreement_of(connection, award_id) if is_id(award_id) else None
    if found is None or (caller.role is Role.FIRM and found.award.firm_id != caller.firm_id):
        raise NotFound("There is no such award, or this key may not see it.", reason="AWARD_UNKNOWN")
    return found


async def _locked(connection: Connection, caller: Caller, award_id: str) -> Agreement:
    await _agreement(connection, caller, award_id)
    await agreement_store.lock_award(connection, award_id)
    return await _agreement(connection, caller, award_id)


async def _changes(connection: Connection, award_id: str) -> list[Change]:
    rows = await connection.fetch(_CHANGE_REQUEST_ROWS + "WHERE award_id = $1 ORDER BY requested, id", award_id)
    return [_change(row) for row in rows]


def _change(row: asyncpg.Record) -> Change:
    return Change(
        id=row["id"],
        kind=ChangeKind(row["kind"]),
        reason=row["reason"],
        project_end=row["project_end"],
        costs=_costs.validate_json(row["costs"]) if row["costs"] else None,
        reduction_pence=row["reduction_pence"],
        state=ChangeState(row["state"]),
        requested_us=to_us(row["requested"]),
        decided_us=row["decided"] and to_us(row["decided"]),
        decision_reason=row["decision_reason"] or "",
    )


async def _add(
    connection: Connection, award_id: str, change: Change, caller: Caller, *, request_id: str, content: bytes
) -> None:
    await connection.execute(
        "INSERT INTO change_request (id, request_id, content_sha256, award_id, kind, project_end, costs, reduction_pence, "
        "reason, requested, requested_by) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        change.id,
        request_id,
        content,
        award_id,
        change.kind,
        change.project_end,
        _costs.dump_json(change.costs).decode() if change.costs else None,
        change.reduction_pence,
        change.reason,
        from_us(change.requested_us),
        caller.credential_id,
    )
