"""From a closed call to its decisions: one person has the budget allocated, a checker agrees, a second person confirms.

What is confirmed is carried out by the decisions that there are anyway, one application after the other, each with every rule
checked again. An interruption is safe: whoever confirms again goes on where it stopped.
"""

import asyncio
import functools
import hashlib
import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Forbidden, HubError, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import allocation_store, application_store, award_store, checks, group_store, ledger
from services.funding.allocation_store import StoredAllocation
from services.funding.award_store import Note
from services.funding.checker import check_allocation
from services.funding.decisions import DecisionService
from services.funding.domain import ApplicationState, Call, CallState, ProposalState, checked_text, is_id, uk_day
from services.funding.judging import Judge, call_of, there
from services.funding.ledger import AccountKind
from services.funding.parameters import ParameterTable
from services.funding.requests import understood
from services.funding.reviewing import REJECTING
from services.funding.reviews import PanelRow, ReviewService
from services.funding.rules.exact import decimal
from services.funding.selection import Application, Quota, allocation_input
from services.funding.selection import Call as DeclaredCall
from services.funding.terms import pots_of

log = get_logger(__name__)

SOLVER_TIMEOUT_S = 180
DECISIONS_PER_REQUEST_MAX = 200
NAMED_MAX = 10
# Rules that an allocation keeps by itself, or that only the whole of its awards can keep.
_LEFT_TO_ALLOCATION = (checks.BUDGET, checks.RATIO)


@dataclass(frozen=True, kw_only=True)
class Why:
    """Why an application is funded or not."""

    application_id: str
    funded: bool
    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Carried:
    """An allocation and how far it is carried out. `refused`: by application, the rule that did not allow the award."""

    allocation: StoredAllocation
    pending: tuple[str, ...]
    refused: Mapping[str, str]

    @property
    def state(self) -> ProposalState:
        return ProposalState.CONFIRMED if self.allocation.confirmed else ProposalState.PROPOSED

    @functools.cached_property
    def input(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.allocation.input)
        return found

    @functools.cached_property
    def certificate(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.allocation.certificate)
        return found

    @property
    def reasons(self) -> list[Why]:
        """One for every application, those left out included."""
        chosen = set(self.certificate["chosen"])
        reasons = self.certificate["reasons"] | self.allocation.left_out
        return [
            Why(application_id=id_, funded=id_ in chosen, code=reason["code"], text=reason["text"])
            for id_, reason in sorted(reasons.items())
        ]


class AllocationService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self,
        pool: Pool,
        *,
        judge: Judge,
        reviews: ReviewService,
        decisions: DecisionService,
        table: ParameterTable,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._judge = judge
        self._reviews = reviews
        self._decisions = decisions
        self._table = table
        self._clock = clock

    async def run(self, caller: Caller, call_id: str) -> Carried:
        """Allocate what the closed call has left among its assessed applications, and have the result checked. Decides nothing."""
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            given, left_out = await self._facts(connection, call_id)
        certificate = await self._solved(given)
        # A checker that shares no code with the solver, on what will be stored.
        checked = await asyncio.to_thread(check_allocation, given, json.loads(certificate))
        allocation = StoredAllocation(
            id=uuid.uuid4().hex,
            call_id=call_id,
            confirmed=False,
            input=_canonical(given),
            certificate=certificate,
            certificate_sha256=hashlib.sha256(certificate.encode()).digest(),
            left_out=left_out,
            problems=checked.problems,
            proof=checked.proof,
            created_us=self._clock.now_us(),
            created_by=caller.credential_id,
        )
        async with transaction(self._pool) as connection:
            await allocation_store.add_allocation(connection, allocation)
            detail: dict[str, str | int] = {
                "allocation_id": allocation.id,
                "certificate_sha256": allocation.certificate_sha256.hex(),
                "applications": len(given["applications"]),
            }
            note = Note(action="allocation_proposed", call_id=call_id, detail=detail)
            await award_store.audit_note(connection, caller.credential_id, note, now_us=self._clock.now_us())
            if checked.problems:
                log.error("certificate does not hold", allocation_id=allocation.id, problems=checked.problems[:3])
            return await self._carried(connection, allocation)

    async def get(self, caller: Caller, allocation_id: str) -> Carried:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await self._carried(connection, await _allocation(connection, allocation_id))

    async def confirm(self, caller: Caller, allocation_id: str, *, reason: str) -> Carried:
        """A second person confirms, and up to DECISIONS_PER_REQUEST_MAX applications are decided; ask again until none is pending.
        While an award is refused nobody is rejected for want of room.

        Refused with ALLOCATION_STALE when the facts are not those any more that were allocated.
        """
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            allocation = await _allocation(connection, allocation_id, lock=True)
            if not allocation.confirmed:
                await self._check_confirmable(connection, caller, allocation)
                await allocation_store.set_confirmed(
                    connection,
                    allocation.id,
                    credential_id=caller.credential_id,
                    reason=reason,
                    now_us=self._clock.now_us(),
                )
                detail: dict[str, str | int] = {
                    "allocation_id": allocation.id,
                    "certificate_sha256": allocation.certificate_sha256.hex(),
                    "reason": reason,
                }
                note = Note(action="allocation_confirmed", call_id=allocation.call_id, detail=detail)
                await award_store.audit_note(connection, caller.credential_id, note, now_us=self._clock.now_us())
                log.info("allocation confirmed", allocation_id=allocation.id)
        return await self._carry_out(caller, allocation_id)

    async def _check_confirmable(self, connection: Connection, caller: Caller, allocation: StoredAllocation) -> None:
        if allocation.created_by == caller.credential_id:
            raise Forbidden(
                "Who proposed the allocation does not confirm it; another operator has to.", reason="SECOND_PERSON"
            )
        given, left_out = await self._facts(connection, allocation.call_id)
        if _canonical(given) != allocation.input or _codes(left_out) != _codes(allocation.left_out):
            raise Conflict(
                "Applications, scores or budget have changed since; run the allocation again.",
                reason="ALLOCATION_STALE",
            )
        checked = await asyncio.to_thread(check_allocation, given, json.loads(allocation.certificate))
        if not checked.holds or allocation.problems:
            raise Conflict(
                "The independent checker does not agree with the certificate: "
                + "; ".join((*allocation.problems, *checked.problems)[:3]),
                reason="CERTIFICATE_DOES_NOT_HOLD",
            )

    async def _carry_out(self, caller: Caller, allocation_id: str) -> Carried:
        async with transaction(self._pool) as connection:
            allocation = await _allocation(connection, allocation_id)
            carried = await self._carried(connection, allocation)
        refused: dict[str, str] = {}
        chosen = set(carried.certificate["chosen"])
        for application_id in carried.pending[:DECISIONS_PER_REQUEST_MAX]:
            text = _reason(carried, application_id)
            if refused and not text.startswith(REJECTING) and application_id not in chosen:
                break  # the money of an award that was refused may be theirs
            try:
                await self._decisions.decide(caller, application_id, award=application_id in chosen, reason=text)
            except TryAgain:
                raise
            except HubError as error:
                refused[application_id] = error.reason
                log.warning("allocated award refused", application_id=application_id, reason=error.reason)
        async with transaction(self._pool) as connection:
            after = await self._carried(connection, allocation)
        return Carried(allocation=allocation, pending=after.pending, refused=refused)

    async def _carried(self, connection: Connection, allocation: StoredAllocation) -> Carried:
        """Awards come first, then who is rejected for itself, then who for want of room, each in the order of the ids; what the
        rules left out waits for people."""
        open_ids = await allocation_store.submitted_ids(connection, allocation.call_id)
        certificate = json.loads(allocation.certificate)
        chosen = set(certificate["chosen"])
        reasons = certificate["reasons"] | allocation.left_out
        # Whatever becomes of the others; all further reasons come from the room that the chosen ones take.
        rejected = [one for one, why in reasons.items() if why["code"] in REJECTING]
        ids = [*sorted(chosen), *sorted(rejected), *sorted(certificate["reasons"].keys() - chosen - set(rejected))]
        return Carried(allocation=allocation, pending=tuple(one for one in ids if one in open_ids), refused={})

    async def _facts(self, connection: Connection, call_id: str) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
        """The input of the allocation as a document, and what is not part of it with the reason."""
        call = await call_of(connection, call_id)
        if call.state_at(self._clock.now_us()) is not CallState.CLOSED:
            raise Conflict("A call is allocated once it is closed.", reason="CALL_NOT_CLOSED")
        rows = [
            row
            for row in await self._reviews.panel_rows(connection, call.id)
            if row.application.state is ApplicationState.SUBMITTED
        ]
        waiting = [row for row in rows if not row.verdict.decided]
        if waiting:
            named = "; ".join(f"{row.application.id}: {row.verdict.code}" for row in waiting[:NAMED_MAX])
            raise Conflict(f"{len(waiting)} applications are not assessed yet ({named}).", reason="NOT_ASSESSED")
        applications, left_out = [], dict[str, dict[str, str]]()
        for row in rows:
            found = await self._application(connection, call, row)
            if isinstance(found, Application):
                applications.append(found)
            else:
                left_out[row.application.id] = found
        declared = await self._declared(connection, call)
        return allocation_input(declared, applications), left_out

    async def _application(self, connection: Connection, call: Call, row: PanelRow) -> Application | dict[str, str]:
        if row.verdict.code == "OUT_OF_SCOPE":
            return {"code": row.verdict.code, "text": row.verdict.text}
        application = there(await application_store.application_of(connection, row.application.id))
        assessment = await self._judge.assess_application(connection, application, call)
        for finding in assessment.against:
            if finding.rule not in _LEFT_TO_ALLOCATION:
                return {"code": finding.code, "text": finding.text}
        assert application.grant_pence is not None, "fixed on submission"
        assert application.submitted_us is not None, "submitted"
        assert assessment.size is not None, "computed from the declaration"
        given = await award_store.given_to(connection, application.firm_id)
        return Application(
            id=application.id,
            firm=str(application.firm_id),
            request_p=application.grant_pence,
            mean=there(row.verdict.mean),
            submitted_at=from_us(application.submitted_us),
            pots=pots_of(region=row.region, size=assessment.size, first_time=not given),
            enterprise=str(min(await group_store.kin_of(connection, application.firm_id))),
            headroom_p=assessment.headroom_pence,
        )

    async def _declared(self, connection: Connection, call: Call) -> DeclaredCall:
        parameters = self._table.at(uk_day(from_us(self._clock.now_us())))
        left = await ledger.balances(connection, call.id)
        return DeclaredCall(
            id=call.id,
            budget_p=left[AccountKind.PUBLIC_BUDGET],
            threshold=parameters.exact("assessment.threshold_percent"),
            method=call.terms.method,
            quotas=tuple(
                Quota(
                    pot=limit.pot,
                    floor_p=limit.floor_pence,
                    ceiling_p=limit.ceiling_pence,
                    share_min=_share(limit.share_min),
                    share_max=_share(limit.share_max),
                )
                for limit in call.terms.limits
            ),
        )

    async def _solved(self, given: Mapping[str, Any]) -> str:
        """The certificate as text, by a process of its own."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "services.funding.allocate", self._table.version),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(SOLVER_TIMEOUT_S):
                output, _ = await process.communicate(_canonical(given).encode())
        except TimeoutError as error:
            raise Conflict(
                f"The allocation was not proven within {SOLVER_TIMEOUT_S} s; nothing was decided.",
                reason="ALLOCATION_UNPROVEN",
            ) from error
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode == 0:
            return output.decode()
        if process.returncode == 3:
            refusal = json.loads(output)
            raise Conflict(str(refusal["text"]), reason=str(refusal["reason"]))
        raise TryAgain("The solver failed; nothing was decided, send again.", retry_after_s=1)


def _reason(carried: Carried, application_id: str) -> str:
    reason = carried.certificate["reasons"].get(application_id) or carried.allocation.left_out[application_id]
    return f"{reason['code']}: {reason['text']}"[:2_000]


def _codes(left_out: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Who was left out and why; the sentences name the day."""
    return {id_: why["code"] for id_, why in left_out.items()}


def _share(text: str | None) -> Fraction | None:
    return None if text is None else decimal(text)


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


async def _allocation(connection: Connection, allocation_id: str, *, lock: bool = False) -> StoredAllocation:
    found = await allocation_store.allocation_of(connection, allocation_id, lock=lock) if is_id(allocation_id) else None
    if found is None:
        raise NotFound("There is no such allocation.", reason="ALLOCATION_UNKNOWN")
    return found
