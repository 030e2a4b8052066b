"""Applications before the decision: pre-check, draft, pledges, submission, withdrawal."""

import dataclasses
import uuid
from collections.abc import Sequence

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.funding import application_store, award_store, call_store, checks, matches
from services.funding.domain import (
    PLEDGES_PER_APPLICATION_MAX,
    SUPPORTERS_PER_APPLICATION_MAX,
    TITLE_CHARACTERS_MAX,
    Application,
    ApplicationState,
    Assessment,
    Call,
    CallState,
    Content,
    Cost,
    Declaration,
    Match,
    Pledge,
    checked_amount,
    checked_costs,
    checked_declaration,
    checked_request_id,
    checked_text,
    is_id,
)
from services.funding.judging import (
    Judge,
    View,
    application_of,
    audit_application,
    call_of,
    there,
)
from services.funding.ledger import Purpose
from services.funding.paging import next_token, page
from services.funding.permissions import Action, check_may
from services.funding.pledge_money import post_pledges, release_pledges
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.match import PledgeKind
from services.funding.terms import MACHINES_MAX, checked_content

log = get_logger(__name__)

INT64_MAX = 2**63 - 1
NO_CONTENT = Content()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prefill:
    """What an application need not ask: the firm, the match, its machines, and what it declared last time."""

    call: Call
    match: Match
    firm_name: str
    sic: str
    region: str
    # Id and path.
    machines: Sequence[tuple[int, str]]
    declaration: Declaration | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolPayment:
    """What one co-investor of a call's pool pays for an application."""

    pool_pledge_id: str
    co_investor: str
    amount_pence: int
    evidence: str


class ApplicationService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, judge: Judge, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._judge = judge
        self._directory = directory
        self._clock = clock

    async def pre_check(
        self,
        caller: Caller,
        *,
        call_id: str,
        declaration: Declaration,
        sic: str,
        planned_cost_pence: int,
        requested_pence: int,
        other_public_pence: int,
    ) -> Assessment:
        """Whether a firm may apply, the most that it could be granted, and why. Stores nothing."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        firm = self._directory.firms.get(caller.firm_id) if caller.role is Role.FIRM else None
        with understood():
            facts = checks.Facts(
                sic=checked_text("sic", sic or (firm.sic if firm else ""), 20),
                declaration=checked_declaration(declaration),
                eligible_pence=checked_amount("planned_cost_pence", planned_cost_pence),
                requested_pence=checked_amount("requested_pence", requested_pence, least=0),
                other_public_pence=checked_amount("other_public_pence", other_public_pence, least=0),
            )
        async with transaction(self._pool) as connection:
            call = await call_of(connection, call_id)
            if caller.role is Role.FIRM:
                facts = dataclasses.replace(facts, given=await award_store.given_to(connection, caller.firm_id))
            return await self._judge.assess(connection, facts, call)

    # Applications

    async def create_application(
        self,
        caller: Caller,
        *,
        request_id: str,
        call_id: str,
        match_id: str,
        costs: Sequence[Cost],
        declaration: Declaration,
        requested_pence: int,
        other_public_pence: int,
        content: Content = NO_CONTENT,
    ) -> View:
        caller.require(Role.FIRM, Role.OPERATOR)
        now_us = self._clock.now_us()
        with understood():
            checked_request_id(request_id)
            costs = checked_costs(tuple(costs))
            checked_declaration(declaration)
            checked_amount("requested_pence", requested_pence, least=0)
            checked_amount("other_public_pence", other_public_pence, least=0)
        async with transaction(self._pool) as connection:
            match = await _match(connection, caller, match_id)
            call = await call_of(connection, call_id)
            with understood():
                content = checked_content(content, call.terms)
            self._check_machines(match.firm_id, content)
            application = Application(
                id=uuid.uuid4().hex,
                call_id=call.id,
                match_id=match.id,
                firm_id=match.firm_id,
                state=ApplicationState.DRAFT,
                costs=costs,
                declaration=declaration,
                sic="",
                requested_pence=requested_pence,
                other_public_pence=other_public_pence,
                grant_pence=None,
                created_us=now_us,
                submitted_us=None,
                decided_us=None,
                decision_reason="",
                correlation_id=match.correlation_id,
                content=content,
            )
            hashed = content_sha256(dataclasses.replace(application, id="", created_us=0))
            first = await application_store.application_by_request(connection, match.firm_id, request_id)
            if first is None:
                self._check_open(call)
                _check_stands(match)
                application = dataclasses.replace(application, sic=self._sic(match.firm_id))
                # Facts that no rule can read are refused now, not at the decision.
                await self._judge.assess_application(connection, application, call)
                if await application_store.add_application(
                    connection, application, request_id=request_id, content_sha256=hashed
                ):
                    await audit_application(
                        connection, self._clock, caller, "application_created", application, {"match_id": match.id}
                    )
                    log.info("application created", application_id=application.id, match_id=match.id)
                    return await self._judge.view(connection, application, call)
                first = there(await application_store.application_by_request(connection, match.firm_id, request_id))
            first_content, application_id = first
            check_same(first_content, hashed)
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application_id)), call
            )

    async def prefill(self, caller: Caller, *, call_id: str, match_id: str) -> Prefill:
        """What the hub knows already, so that the form asks for the rest only. Stores nothing."""
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            call = await call_of(connection, call_id)
            match = await _match(connection, caller, match_id)
            _check_stands(match)
            last = await application_store.newest_of(connection, match.firm_id)
        firm = self._directory.firms.get(match.firm_id)
        return Prefill(
            call=call,
            match=match,
            firm_name=firm.name if firm else "",
            sic=firm.sic if firm else "",
            region=firm.region if firm else "",
            machines=[(machine.id, machine.path) for machine in self._directory.machines_of(firm, limit=MACHINES_MAX)]
            if firm
            else [],
            declaration=last.declaration if last else None,
        )

    async def get_application(self, caller: Caller, application_id: str) -> View:
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id)
            return await self._judge.view(connection, application)

    async def list_applications(
        self,
        caller: Caller,
        *,
        firm_id: int,
        call_id: str,
        state: ApplicationState | None,
        page_size: int,
        page_token: str,
    ) -> tuple[list[Application], str]:
        """A page, newest first, without pledges, and the token of the next one. Firms get their own only."""
        caller.require(Role.FIRM, Role.OPERATOR)
        if not 0 <= firm_id <= INT64_MAX:
            raise Invalid("firm_id is not the id of a firm.", reason="FIRM_ID_INVALID")
        firm_id = caller.firm_or(firm_id)
        if call_id and not is_id(call_id):
            raise NotFound("There is no such call.", reason="CALL_UNKNOWN")
        limit, after = page(page_size, page_token)
        async with transaction(self._pool) as connection:
            found = await application_store.applications(
                connection,
                firm_id=firm_id or None,
                call_id=call_id or None,
                state=state,
                after=after,
                limit=limit + 1,
            )
        return found[:limit], next_token(found, limit)

    async def add_pledge(
        self,
        caller: Caller,
        application_id: str,
        *,
        request_id: str,
        co_investor: str,
        kind: PledgeKind,
        public_body: bool,
        amount_pence: int,
    ) -> Pledge:
        with understood():
            checked_request_id(request_id)
            pledge = Pledge(
                id=uuid.uuid4().hex,
                application_id=application_id,
                co_investor=checked_text("co_investor", co_investor, TITLE_CHARACTERS_MAX),
                kind=kind,
                public_body=public_body,
                amount_pence=checked_amount("amount_pence", amount_pence),
                added_us=self._clock.now_us(),
            )
        content = content_sha256(dataclasses.replace(pledge, id="", added_us=0))
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            first = await application_store.pledge_by_request(connection, application.id, request_id)
            if first is not None:
                check_same(first[0], content)
                return first[1]
            check_may(caller, application, Action.ADD_PLEDGE)
            if len(application.pledges) >= PLEDGES_PER_APPLICATION_MAX:
                raise Conflict(
                    f"An application has at most {PLEDGES_PER_APPLICATION_MAX} pledges.", reason="TOO_MANY_PLEDGES"
                )
            await application_store.add_pledge(connection, pledge, request_id=request_id, content_sha256=content)
            await audit_application(
                connection,
                self._clock,
                caller,
                "pledge_added",
                application,
                {"pledge_id": pledge.id, "pence": amount_pence},
            )
        log.info("pledge added", application_id=application_id, pledge_id=pledge.id, kind=kind)
        return pledge

    async def confirm_pledge(self, caller: Caller, application_id: str, pledge_id: str, *, evidence: str) -> Pledge:
        """The co-investor stands by it: business money enters the ledger. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            evidence = checked_text("evidence", evidence)
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            pledge = next((item for item in application.pledges if item.id == pledge_id), None)
            if pledge is None:
                raise NotFound("This application has no such pledge.", reason="PLEDGE_UNKNOWN")
            if pledge.confirmed_us is not None:
                return pledge
            check_may(caller, application, Action.CONFIRM_PLEDGE)
            await application_store.set_confirmed(connection, pledge.id, evidence=evidence, now_us=now_us)
            await self._post(
                connection,
                caller,
                application,
                [pledge],
                "pledge_confirmed",
                Purpose.PLEDGE_CONFIRMED,
                request_id=f"pledge:{pledge.id}:confirmed",
            )
            await audit_application(
                connection,
                self._clock,
                caller,
                "pledge_confirmed",
                application,
                {"pledge_id": pledge.id, "pence": pledge.amount_pence, "evidence": evidence},
            )
        log.info("pledge confirmed", application_id=application_id, pledge_id=pledge_id)
        return dataclasses.replace(pledge, confirmed_us=now_us, evidence=evidence)

    async def take_pledge_back(self, caller: Caller, application_id: str, pledge_id: str, *, reason: str) -> View:
        """It was stated wrongly, or the co-investor does not stand by it: it counts no more, as private or as public money. Once
        confirmed, only operators take it back, and its money leaves the ledger. A repeat gets the first answer."""
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            pledge = next((item for item in application.pledges if item.id == pledge_id), None)
            if pledge is not None:
                check_may(caller, application, Action.TAKE_PLEDGE_BACK)
                await self._take_back(connection, caller, application, pledge, reason)
            elif not is_id(pledge_id) or not await application_store.is_taken_back(
                connection, application.id, pledge_id
            ):
                raise NotFound("This application has no such pledge.", reason="PLEDGE_UNKNOWN")
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id))
            )

    async def _take_back(
        self, connection: Connection, caller: Caller, application: Application, pledge: Pledge, reason: str
    ) -> None:
        if pledge.confirmed_us is not None:
            if caller.role is not Role.OPERATOR:
                raise Conflict("The pledge is confirmed; ask an operator to take it back.", reason="PLEDGE_CONFIRMED")
            await self._post(
                connection,
                caller,
                application,
                [pledge],
                "pledge_released",
                Purpose.PLEDGE_RELEASED,
                request_id=f"pledge:{pledge.id}:released",
            )
        await application_store.set_taken_back(connection, pledge.id, now_us=self._clock.now_us())
        detail: dict[str, str | int] = {"pledge_id": pledge.id, "pence": pledge.amount_pence, "reason": reason}
        await audit_application(connection, self._clock, caller, "pledge_taken_back", application, detail)
        log.info("pledge taken back", application_id=application.id, pledge_id=pledge.id)

    async def add_pool_payments(
        self, caller: Caller, application_id: str, *, spread_id: str, payments: Sequence[PoolPayment]
    ) -> None:
        """What co-investors of the call's pool pay for the application becomes confirmed pledges, all of it or nothing. A repeat
        changes nothing."""
        caller.require(Role.OPERATOR)
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            pledges = []
            for payment in payments:
                request_id = f"pool:{spread_id}:{payment.pool_pledge_id}"
                if await application_store.pledge_by_request(connection, application.id, request_id):
                    continue
                pledge = Pledge(
                    id=uuid.uuid4().hex,
                    application_id=application.id,
                    co_investor=payment.co_investor,
                    kind=PledgeKind.CASH,
                    public_body=False,
                    amount_pence=payment.amount_pence,
                    added_us=now_us,
                )
                content = content_sha256(dataclasses.replace(pledge, id="", added_us=0))
                await application_store.add_pledge(connection, pledge, request_id=request_id, content_sha256=content)
                await application_store.set_confirmed(connection, pledge.id, evidence=payment.evidence, now_us=now_us)
                pledges.append(pledge)
            if not pledges:
                return
            check_may(caller, application, Action.CONFIRM_PLEDGE)
            if len(application.pledges) + len(pledges) > PLEDGES_PER_APPLICATION_MAX + SUPPORTERS_PER_APPLICATION_MAX:
                raise Conflict("More pay for this application than it takes.", reason="TOO_MANY_PLEDGES")
            await self._post(
                connection,
                caller,
                application,
                pledges,
                "pool_paid",
                Purpose.PLEDGE_CONFIRMED,
                request_id=f"pool:{spread_id}:{application.id}:confirmed",
            )
            detail: dict[str, str | int] = {"spread_id": spread_id, "pledges": len(pledges)}
            detail["pence"] = sum(pledge.amount_pence for pledge in pledges)
            await audit_application(connection, self._clock, caller, "pool_paid", application, detail)
        log.info("pool paid", application_id=application_id, spread_id=spread_id, pledges=len(pledges))

    async def _post(
        self,
        connection: Connection,
        caller: Caller,
        application: Application,
        pledges: Sequence[Pledge],
        kind: str,
        purpose: Purpose,
        *,
        request_id: str,
    ) -> None:
        """Post the pledges' money under the application's correlation id."""
        call = await call_of(connection, application.call_id)
        with correlated(application.correlation_id):
            await post_pledges(
                connection, self._clock, caller, call, pledges, request_id=request_id, kind=kind, purpose=purpose
            )

    async def submit(self, caller: Caller, application_id: str) -> View:
        """Fix the grant asked for. Match and programme ratio are judged at the decision. A repeat gets the first answer."""
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            call = await call_of(connection, application.call_id)
            if application.state is ApplicationState.DRAFT:
                self._check_open(call)
                assessment = await self._judge.assess_application(connection, application, call)
                for finding in assessment.against:
                    if finding.rule not in (checks.MATCH, checks.RATIO):
                        raise Conflict(finding.text, reason=finding.code)
                await application_store.set_submitted(
                    connection, application.id, grant_pence=assessment.grant_pence, now_us=now_us
                )
                await audit_application(
                    connection,
                    self._clock,
                    caller,
                    "application_submitted",
                    application,
                    {"grant_pence": assessment.grant_pence},
                )
                log.info("application submitted", application_id=application.id, grant_pence=assessment.grant_pence)
            elif application.state is ApplicationState.WITHDRAWN:
                check_may(caller, application, Action.SUBMIT)
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id)), call
            )

    async def replace_match(self, caller: Caller, application_id: str, *, match_id: str, reason: str) -> View:
        """An application that has lost its match goes on with another one of the firm, where the need was closed with the match. A
        repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            if application.match_id != match_id:
                check_may(caller, application, Action.REPLACE_MATCH)
                before = there(await call_store.match_of(connection, application.match_id))
                if before.ended_us is None:
                    raise Conflict("The application's match stands; it goes on with that.", reason="MATCH_STANDS")
                match = await _match(connection, caller, match_id)
                if match.firm_id != application.firm_id:
                    raise NotFound("The firm of the application has no such match.", reason="MATCH_UNKNOWN")
                _check_stands(match)
                with correlated(application.correlation_id):
                    await matches.replace(connection, self._clock, caller, application, match, reason=reason)
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id))
            )

    async def withdraw(self, caller: Caller, application_id: str) -> View:
        """Give an application up before the decision; confirmed pledges are released. A repeat gets the first answer."""
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            if application.state is not ApplicationState.WITHDRAWN:
                check_may(caller, application, Action.WITHDRAW)
                await release_pledges(connection, self._clock, caller, application)
                await application_store.set_withdrawn(connection, application.id)
                await audit_application(connection, self._clock, caller, "application_withdrawn", application, {})
                log.info("application withdrawn", application_id=application.id)
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id))
            )

    def _check_open(self, call: Call) -> None:
        state = call.state_at(self._clock.now_us())
        if state is not CallState.OPEN:
            raise Conflict(
                f"The call is {state}: it is open from {from_us(call.opens_us).isoformat()} to "
                f"{from_us(call.closes_us).isoformat()}.",
                reason="CALL_NOT_OPEN",
            )

    def _check_machines(self, firm_id: int, content: Content) -> None:
        for machine_id in content.machine_ids:
            machine = self._directory.machines.get(machine_id)
            if machine is None or machine.firm_id != firm_id:
                raise NotFound(f"This firm has no machine {machine_id}.", reason="MACHINE_UNKNOWN")

    def _sic(self, firm_id: int) -> str:
        firm = self._directory.firms.get(firm_id)
        if firm is None:
            raise TryAgain("The firm is not known here yet; send again.", reason="FIRM_UNKNOWN", retry_after_s=1)
        if not firm.sic:
            raise Invalid("The firm's SIC code is not on record; ask an operator to add it.", reason="SIC_MISSING")
        return str(firm.sic)


def _check_stands(match: Match) -> None:
    if ended := checks.match_ended(match):
        raise Conflict(f"{ended} Accept another offer and apply for that match.", reason=checks.MATCH_ENDED)


async def _match(connection: Connection, caller: Caller, match_id: str) -> Match:
    found = await call_store.match_of(connection, match_id) if is_id(match_id) else None
    if found is None or (caller.role is not Role.OPERATOR and found.firm_id != caller.firm_id):
        raise NotFound(
            "No such match of this firm is known here. If the offer was accepted just now, it may take a moment: "
            "send again.",
            reason="MATCH_UNKNOWN",
        )
    return found
