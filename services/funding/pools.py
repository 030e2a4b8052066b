"""Co-investors' own money for a call, spread over the projects they chose by the Method of Equal Shares.

Nobody's money pays for a project it did not choose. What the method buys becomes confirmed pledges of the applications, by the use
cases there are anyway; so the allocation of the budget afterwards finds their match in place.
"""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Forbidden, HubError, Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import application_store, award_store, pool_store
from services.funding.applications import ApplicationService, PoolPayment
from services.funding.award_store import Note
from services.funding.domain import (
    SUPPORTERS_PER_APPLICATION_MAX,
    TEXT_CHARACTERS_MAX,
    TITLE_CHARACTERS_MAX,
    ApplicationState,
    CallState,
    ProposalState,
    checked_amount,
    checked_request_id,
    checked_text,
    is_id,
)
from services.funding.judging import Judge, call_of, there
from services.funding.parameters import ParameterTable
from services.funding.pledges import CoInvestor, Completion, PledgeRules, Project, equal_shares, pledges_input
from services.funding.pledges_checker import check_pledges
from services.funding.pool_store import PoolPledge, Spread
from services.funding.requests import check_same, content_sha256, understood
from services.funding.reviewing import REJECTING
from services.funding.reviews import ReviewService

log = get_logger(__name__)

POOL_PLEDGES_MAX = 500
SUPPORTS_MAX = 2_000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A spread, and the payments that could not be made pledges when it was carried out, by application."""

    spread: Spread
    refused: Mapping[str, str]

    @property
    def state(self) -> ProposalState:
        return ProposalState.CONFIRMED if self.spread.confirmed else ProposalState.PROPOSED

    @property
    def input(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.spread.input)
        return found

    @property
    def certificate(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.spread.certificate)
        return found


class PoolService:
    """The use cases, all for operators. Each raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self,
        pool: Pool,
        *,
        applications: ApplicationService,
        reviews: ReviewService,
        judge: Judge,
        table: ParameterTable,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._applications = applications
        self._reviews = reviews
        self._judge = judge
        self._table = table
        self._clock = clock

    async def add(
        self,
        caller: Caller,
        call_id: str,
        *,
        request_id: str,
        co_investor: str,
        amount_pence: int,
        supports: Sequence[str],
        evidence: str,
    ) -> list[PoolPledge]:
        """A co-investor's money, confirmed by evidence, for the applications that it chose. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            checked_request_id(request_id)
            pledge = PoolPledge(
                id=uuid.uuid4().hex,
                call_id=call_id,
                co_investor=checked_text("co_investor", co_investor, TITLE_CHARACTERS_MAX),
                amount_pence=checked_amount("amount_pence", amount_pence),
                supports=tuple(sorted(set(supports))),
                evidence=checked_text("evidence", evidence),
                added_us=self._clock.now_us(),
            )
        if not 1 <= len(pledge.supports) <= SUPPORTS_MAX or not all(is_id(one) for one in pledge.supports):
            raise Invalid(f"supports: 1 to {SUPPORTS_MAX} ids of applications.", reason="SUPPORTS_INVALID")
        content = content_sha256(dataclasses.replace(pledge, id="", added_us=0))
        async with transaction(self._pool) as connection:
            call = await call_of(connection, call_id)
            await pool_store.lock_call(connection, call.id)
            first = await pool_store.content_of(connection, call.id, request_id)
            if first is not None:
                check_same(first, content)
                return await pool_store.pledges_of(connection, call.id)
            await _check_not_spread(connection, call.id)
            unknown = set(pledge.supports) - await pool_store.of_call(connection, call.id, pledge.supports)
            if unknown:
                raise NotFound(
                    f"The call has no application {min(unknown)} that may still be chosen.",
                    reason="APPLICATION_UNKNOWN",
                )
            if len(await pool_store.pledges_of(connection, call.id)) >= POOL_PLEDGES_MAX:
                raise Conflict(f"A call has at most {POOL_PLEDGES_MAX} of them.", reason="TOO_MANY_PLEDGES")
            full = await pool_store.chosen_by(
                connection, call.id, pledge.supports, least=SUPPORTERS_PER_APPLICATION_MAX
            )
            if full:
                raise Conflict(
                    f"Application {min(full)} is chosen by {SUPPORTERS_PER_APPLICATION_MAX} co-investors already, the most there "
                    "can be; leave it out.",
                    reason="TOO_MANY_SUPPORTERS",
                )
            await pool_store.add_pledge(
                connection, pledge, request_id=request_id, content_sha256=content, credential_id=caller.credential_id
            )
            detail: dict[str, str | int] = {"pool_pledge_id": pledge.id, "pence": amount_pence, "evidence": evidence}
            await self._note(connection, caller, "pool_pledge_added", call.id, detail)
            return await pool_store.pledges_of(connection, call.id)

    async def list(self, caller: Caller, call_id: str) -> list[PoolPledge]:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            call = await call_of(connection, call_id)
            return await pool_store.pledges_of(connection, call.id)

    async def spread(self, caller: Caller, call_id: str) -> Outcome:
        """Who pays for what, once the call is closed; a checker looks at it, and nothing is moved."""
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            await _check_not_spread(connection, (await call_of(connection, call_id)).id)
            rules, projects, investors = await self._facts(connection, call_id)
        certificate = await asyncio.to_thread(
            equal_shares, rules, projects, investors, parameter_version=self._table.version
        )
        given = pledges_input(rules, projects, investors)
        spread = Spread(
            id=uuid.uuid4().hex,
            call_id=call_id,
            confirmed=False,
            input=_canonical(given),
            certificate=_canonical(certificate),
            problems=await asyncio.to_thread(check_pledges, given, certificate),
            created_us=self._clock.now_us(),
            created_by=caller.credential_id,
        )
        async with transaction(self._pool) as connection:
            await pool_store.add_spread(connection, spread)
            detail: dict[str, str | int] = {"spread_id": spread.id, "projects": len(projects)}
            await self._note(connection, caller, "pool_spread_proposed", call_id, detail)
        return Outcome(spread=spread, refused={})

    async def get(self, caller: Caller, spread_id: str) -> Outcome:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return Outcome(spread=await _spread(connection, spread_id), refused={})

    async def confirm(self, caller: Caller, spread_id: str, *, reason: str) -> Outcome:
        """A second person confirms, and the payments become confirmed pledges; again is safe, and goes on where it stopped."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            spread = await _spread(connection, spread_id)
            await pool_store.lock_call(connection, spread.call_id)
            spread = await _spread(connection, spread_id)
            if not spread.confirmed:
                await _check_not_spread(connection, spread.call_id)
                if spread.created_by == caller.credential_id:
                    raise Forbidden(
                        "Who proposed the spread does not confirm it; another operator has to.", reason="SECOND_PERSON"
                    )
                rules, projects, investors = await self._facts(connection, spread.call_id)
                if _canonical(pledges_input(rules, projects, investors)) != spread.input:
                    raise Conflict(
                        "Applications or pledges have changed since; spread the money again.", reason="SPREAD_STALE"
                    )
                if spread.problems:
                    raise Conflict("; ".join(spread.problems[:3]), reason="CERTIFICATE_DOES_NOT_HOLD")
                await pool_store.set_confirmed(
                    connection,
                    spread.id,
                    credential_id=caller.credential_id,
                    reason=reason,
                    now_us=self._clock.now_us(),
                )
                detail: dict[str, str | int] = {"spread_id": spread.id, "reason": reason}
                await self._note(connection, caller, "pool_spread_confirmed", spread.call_id, detail)
            names = {one.id: one for one in await pool_store.pledges_of(connection, spread.call_id)}
        return await self._carry_out(caller, spread_id, names)

    async def _carry_out(self, caller: Caller, spread_id: str, names: Mapping[str, PoolPledge]) -> Outcome:
        outcome = await self.get(caller, spread_id)
        refused: dict[str, str] = {}
        for purchase in outcome.certificate["purchases"]:
            application_id = purchase["project"]
            payments = [
                PoolPayment(
                    pool_pledge_id=pledge_id,
                    co_investor=names[pledge_id].co_investor,
                    amount_pence=pence,
                    evidence=f"{names[pledge_id].evidence}; spread {spread_id}"[:TEXT_CHARACTERS_MAX],
                )
                for pledge_id, pence in sorted(purchase["payments_p"].items())
            ]
            try:
                await self._applications.add_pool_payments(
                    caller, application_id, spread_id=spread_id, payments=payments
                )
            except TryAgain:
                raise
            except HubError as error:
                refused[application_id] = error.reason
        return Outcome(spread=outcome.spread, refused=refused)

    async def _facts(
        self, connection: Connection, call_id: str
    ) -> tuple[PledgeRules, Sequence[Project], Sequence[CoInvestor]]:
        """Projects are the submitted applications whose match is not complete; their cost is what is missing. Those that did not
        pass their assessment are none: what was paid for them would come back when the rest is spread."""
        call = await call_of(connection, call_id)
        if call.state_at(self._clock.now_us()) is not CallState.CLOSED:
            raise Conflict("A call's pool is spread once it is closed.", reason="CALL_NOT_CLOSED")
        projects = []
        for row in await self._reviews.panel_rows(connection, call.id):
            if row.application.state is not ApplicationState.SUBMITTED or row.verdict.code in REJECTING:
                continue
            application = there(await application_store.application_of(connection, row.application.id))
            assessment = await self._judge.assess_application(connection, application, call)
            missing = assessment.match_required_pence - assessment.match_counted_pence
            if missing > 0:
                projects.append(Project(id=application.id, cost_p=missing))
        known = {project.id for project in projects}
        crowded = await pool_store.chosen_by(
            connection, call.id, sorted(known), least=SUPPORTERS_PER_APPLICATION_MAX + 1
        )
        if crowded:
            raise Conflict(
                f"Application {min(crowded)} was chosen by more than {SUPPORTERS_PER_APPLICATION_MAX} co-investors, more than can "
                "pay for one; pledge to it directly until its match is complete.",
                reason="TOO_MANY_SUPPORTERS",
            )
        investors = [
            CoInvestor(id=one.id, pledge_p=one.amount_pence, supports=frozenset(one.supports) & known)
            for one in await pool_store.pledges_of(connection, call.id)
        ]
        return PledgeRules(call=call.id, completion=Completion.NONE), projects, investors

    async def _note(
        self, connection: Connection, caller: Caller, action: str, call_id: str, detail: Mapping[str, str | int]
    ) -> None:
        note = Note(action=action, call_id=call_id, detail=detail)
        await award_store.audit_note(connection, caller.credential_id, note, now_us=self._clock.now_us())


async def _check_not_spread(connection: Connection, call_id: str) -> None:
    if await pool_store.is_spread(connection, call_id):
        raise Conflict("The call's pool has been spread already.", reason="POOL_SPREAD")


async def _spread(connection: Connection, spread_id: str) -> Spread:
    found = await pool_store.spread_of(connection, spread_id) if is_id(spread_id) else None
    if found is None:
        raise NotFound("There is no such spread.", reason="SPREAD_UNKNOWN")
    return found


def _canonical(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"))
