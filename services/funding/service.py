"""What people and programs can do with the fund: one method a use case, each in one transaction."""

import asyncio
import dataclasses
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import asyncpg
from prometheus_client import Counter, Gauge

from services.common import outbox, topics
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Forbidden, HubError, Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.funding import checks, ledger, programme, store
from services.funding.domain import (
    PLEDGES_PER_APPLICATION_MAX,
    TITLE_CHARACTERS_MAX,
    WAIVERS_NEEDED,
    Application,
    ApplicationState,
    Assessment,
    Award,
    Call,
    CallState,
    Cost,
    Declaration,
    Pledge,
    checked_amount,
    checked_costs,
    checked_declaration,
    checked_rate,
    checked_request_id,
    checked_text,
    checked_times,
    is_id,
    uk_day,
)
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer, TrialBalance
from services.funding.parameters import ParameterTable
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition
from smdih.funding.v1 import events_pb2

log = get_logger(__name__)

T = TypeVar("T")
PAGE_SIZE = 50
PAGE_SIZE_MAX = 100
INT64_MAX = 2**63 - 1
WATCH_INTERVAL_S = 5
# It reads every transfer there is.
TRIAL_BALANCE_INTERVAL_S = 300

# Decisions made, by result (awarded, rejected).
decisions_total = Counter("smdih_funding_decisions_total", "Decisions on applications", ["result"])
# Decisions that a rule did not allow, by the rule's code.
refusals_total = Counter("smdih_funding_refusals_total", "Awards refused by a rule", ["reason"])
# The fund's money by kind of account, as the ledger has it.
balance_pence = Gauge("smdih_funding_balance_pence", "Balance of all accounts of a kind", ["account"])
# Zero when the ledger is in order: total of all balances, and accounts whose balance is not what their transfers make.
trial_balance_pence = Gauge("smdih_funding_trial_balance_pence", "Total of all balances; must be zero")
disagreeing_accounts = Gauge(
    "smdih_funding_disagreeing_accounts", "Accounts whose balance differs from their transfers; must be zero"
)

_LIVE = (ApplicationState.DRAFT, ApplicationState.SUBMITTED)
_PAGE_TOKEN = re.compile(r"(\d{1,18})-([A-Za-z0-9._:-]{1,100})", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class View:
    """An application with what the rules say about it today; after the decision the award says what they said."""

    application: Application
    assessment: Assessment | None


class FundingService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self, pool: Pool, *, table: ParameterTable, directory: Directory, clock: Clock, kick: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._table = table
        self._directory = directory
        self._clock = clock
        # Tells the outbox relay that there is something.
        self._kick = kick

    async def open_programme(self) -> None:
        """Before anything else: the programme has the public money that the parameters of the day say."""
        public_pence = self._table.at(uk_day(from_us(self._clock.now_us()))).whole("programme.public_p")
        async with transaction(self._pool) as connection:
            await programme.open_programme(connection, self._clock, public_pence=public_pence)

    # Calls

    async def create_call(
        self,
        caller: Caller,
        *,
        request_id: str,
        title: str,
        budget_pence: int,
        opens_us: int,
        closes_us: int,
        category: Category,
        size_definition: Definition,
        rate_max: str,
        in_kind_allowed: bool,
    ) -> Call:
        caller.require(Role.OPERATOR)
        now_us = self._clock.now_us()
        with understood():
            checked_request_id(request_id)
            checked_times(opens_us, closes_us)
            call = Call(
                id=uuid.uuid4().hex,
                title=checked_text("title", title, TITLE_CHARACTERS_MAX),
                budget_pence=checked_amount("budget_pence", budget_pence),
                opens_us=opens_us,
                closes_us=closes_us,
                category=category,
                size_definition=size_definition,
                rate_max=checked_rate("rate_max", rate_max) if rate_max else "",
                in_kind_allowed=in_kind_allowed,
                created_us=now_us,
            )
        content = content_sha256(dataclasses.replace(call, id="", created_us=0))
        async with transaction(self._pool) as connection:
            if not await store.add_call(connection, call, request_id=request_id, content_sha256=content):
                first_content, first = _there(await store.call_by_request(connection, request_id))
                check_same(first_content, content)
                return first
            await ledger.open_accounts(connection, call.id)
            await programme.allot(
                connection,
                self._clock,
                call_id=call.id,
                budget_pence=call.budget_pence,
                credential_id=caller.credential_id,
            )
            await store.audit(
                connection,
                "call_created",
                credential_id=caller.credential_id,
                now_us=now_us,
                call_id=call.id,
                detail={"title": call.title, "budget_pence": call.budget_pence},
            )
        log.info("call created", call_id=call.id, budget_pence=call.budget_pence)
        return call

    async def get_call(self, caller: Caller, call_id: str) -> Call:
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await _call(connection, call_id)

    async def list_calls(self, caller: Caller, *, page_size: int, page_token: str) -> tuple[list[Call], str]:
        """A page, newest first, and the token of the next one (empty: there is none)."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        limit, after = _page(page_size, page_token)
        async with transaction(self._pool) as connection:
            found = await store.calls(connection, after=after, limit=limit + 1)
        return found[:limit], _next(found, limit)

    def state_of(self, call: Call) -> CallState:
        return call.state_at(self._clock.now_us())

    # Before an application

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
            call = await _call(connection, call_id)
            if caller.role is Role.FIRM:
                facts = dataclasses.replace(facts, given=await store.given_to(connection, caller.firm_id))
            return await self._assess(connection, facts, call)

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
            match = await store.match_of(connection, match_id) if is_id(match_id) else None
            if match is None or (caller.role is not Role.OPERATOR and match.firm_id != caller.firm_id):
                raise NotFound(
                    "No such match of this firm is known here. If the offer was accepted just now, it may take a moment: "
                    "send again.",
                    reason="MATCH_UNKNOWN",
                )
            call = await _call(connection, call_id)
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
            )
            content = content_sha256(dataclasses.replace(application, id="", created_us=0))
            first = await store.application_by_request(connection, match.firm_id, request_id)
            if first is None:
                self._check_open(call)
                application = dataclasses.replace(application, sic=self._sic(match.firm_id))
                # Facts that no rule can read are refused now, not at the decision.
                await self._assess_application(connection, application, call)
                if await store.add_application(connection, application, request_id=request_id, content_sha256=content):
                    await self._audit(connection, caller, "application_created", application, {"match_id": match.id})
                    log.info("application created", application_id=application.id, match_id=match.id)
                    return await self._view(connection, application, call)
                first = _there(await store.application_by_request(connection, match.firm_id, request_id))
            first_content, application_id = first
            check_same(first_content, content)
            return await self._view(connection, _there(await store.application_of(connection, application_id)), call)

    async def get_application(self, caller: Caller, application_id: str) -> View:
        async with transaction(self._pool) as connection:
            application = await _application(connection, caller, application_id)
            return await self._view(connection, application)

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
        limit, after = _page(page_size, page_token)
        async with transaction(self._pool) as connection:
            found = await store.applications(
                connection,
                firm_id=firm_id or None,
                call_id=call_id or None,
                state=state,
                after=after,
                limit=limit + 1,
            )
        return found[:limit], _next(found, limit)

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
            application = await _application(connection, caller, application_id, lock=True)
            first = await store.pledge_by_request(connection, application.id, request_id)
            if first is not None:
                check_same(first[0], content)
                return first[1]
            _check_state(application, *_LIVE)
            if len(application.pledges) >= PLEDGES_PER_APPLICATION_MAX:
                raise Conflict(
                    f"An application has at most {PLEDGES_PER_APPLICATION_MAX} pledges.", reason="TOO_MANY_PLEDGES"
                )
            await store.add_pledge(connection, pledge, request_id=request_id, content_sha256=content)
            await self._audit(
                connection, caller, "pledge_added", application, {"pledge_id": pledge.id, "pence": amount_pence}
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
            application = await _application(connection, caller, application_id, lock=True)
            pledge = next((item for item in application.pledges if item.id == pledge_id), None)
            if pledge is None:
                raise NotFound("This application has no such pledge.", reason="PLEDGE_UNKNOWN")
            if pledge.confirmed_us is not None:
                return pledge
            _check_state(application, *_LIVE)
            await store.set_confirmed(connection, pledge.id, evidence=evidence, now_us=now_us)
            call = await _call(connection, application.call_id)
            with correlated(application.correlation_id):
                await self._post_pledges(
                    connection,
                    caller,
                    call,
                    [pledge],
                    request_id=f"pledge:{pledge.id}:confirmed",
                    kind="pledge_confirmed",
                    purpose=Purpose.PLEDGE_CONFIRMED,
                )
            await self._audit(
                connection,
                caller,
                "pledge_confirmed",
                application,
                {"pledge_id": pledge.id, "pence": pledge.amount_pence, "evidence": evidence},
            )
        log.info("pledge confirmed", application_id=application_id, pledge_id=pledge_id)
        return dataclasses.replace(pledge, confirmed_us=now_us, evidence=evidence)

    async def submit(self, caller: Caller, application_id: str) -> View:
        """Fix the grant asked for. Match and programme ratio are judged at the decision. A repeat gets the first answer."""
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            application = await _application(connection, caller, application_id, lock=True)
            call = await _call(connection, application.call_id)
            if application.state is ApplicationState.DRAFT:
                self._check_open(call)
                assessment = await self._assess_application(connection, application, call)
                for finding in assessment.against:
                    if finding.rule not in (checks.MATCH, checks.RATIO):
                        raise Conflict(finding.text, reason=finding.code)
                await store.set_submitted(connection, application.id, grant_pence=assessment.grant_pence, now_us=now_us)
                await self._audit(
                    connection, caller, "application_submitted", application, {"grant_pence": assessment.grant_pence}
                )
                log.info("application submitted", application_id=application.id, grant_pence=assessment.grant_pence)
            elif application.state is ApplicationState.WITHDRAWN:
                _check_state(application, ApplicationState.DRAFT)
            return await self._view(connection, _there(await store.application_of(connection, application.id)), call)

    async def withdraw(self, caller: Caller, application_id: str) -> View:
        """Give an application up before the decision; confirmed pledges are released. A repeat gets the first answer."""
        async with transaction(self._pool) as connection:
            application = await _application(connection, caller, application_id, lock=True)
            if application.state is not ApplicationState.WITHDRAWN:
                _check_state(application, *_LIVE)
                await self._release_pledges(connection, caller, application)
                await store.set_withdrawn(connection, application.id)
                await self._audit(connection, caller, "application_withdrawn", application, {})
                log.info("application withdrawn", application_id=application.id)
            return await self._view(connection, _there(await store.application_of(connection, application.id)))

    # Decisions

    async def waive_ratio(self, caller: Caller, application_id: str, *, reason: str) -> View:
        """One operator's word that this award may go below the programme's ratio; WAIVERS_NEEDED different ones are needed."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            application = await _application(connection, caller, application_id, lock=True)
            _check_state(application, ApplicationState.SUBMITTED)
            await store.add_waiver(
                connection,
                application.id,
                credential_id=caller.credential_id,
                reason=reason,
                now_us=self._clock.now_us(),
            )
            await self._audit(connection, caller, "ratio_waived", application, {"reason": reason})
            log.info("ratio waived", application_id=application.id, credential_id=caller.credential_id)
            return await self._view(connection, _there(await store.application_of(connection, application.id)))

    async def decide(self, caller: Caller, application_id: str, *, award: bool, reason: str) -> View:
        """Award or reject, once. A repeat gets the first answer; the other decision afterwards is a Conflict.

        An award checks every rule again while nobody else can post, and then commits the grant, the pledges, the award and its
        event together or not at all.
        """
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        wanted = ApplicationState.AWARDED if award else ApplicationState.REJECTED
        request_correlation_id = current_correlation_id()
        async with transaction(self._pool) as connection:
            application = await _application(connection, caller, application_id, lock=True)
            if application.state is wanted:
                return await self._view(connection, application)
            if application.state in (ApplicationState.AWARDED, ApplicationState.REJECTED):
                raise Conflict(f"The application is {application.state} already.", reason="ALREADY_DECIDED")
            _check_state(application, ApplicationState.SUBMITTED)
            with correlated(application.correlation_id):
                if award:
                    try:
                        await self._award(connection, caller, application)
                    except HubError as error:
                        refusals_total.labels(error.reason).inc()
                        raise
                else:
                    await self._release_pledges(connection, caller, application)
                await store.set_decided(
                    connection, application.id, state=wanted, reason=reason, now_us=self._clock.now_us()
                )
                await self._audit(connection, caller, f"application_{wanted}", application, {"reason": reason})
            view = await self._view(connection, _there(await store.application_of(connection, application.id)))
        self._kick()
        decisions_total.labels(wanted).inc()
        with correlated(application.correlation_id):
            log.info(
                "application decided",
                application_id=application.id,
                result=wanted,
                grant_pence=application.grant_pence,
                request_correlation_id=request_correlation_id,
            )
        return view

    async def _award(self, connection: Connection, caller: Caller, application: Application) -> None:
        # From here on what the ledger says cannot change under us.
        await ledger.lock(connection)
        call = await _call(connection, application.call_id)
        assessment = await self._assess_application(connection, application, call)
        for finding in assessment.against:
            if finding.rule == checks.RATIO and application.ratio_waivers >= WAIVERS_NEEDED:
                continue
            raise Conflict(finding.text, reason=finding.code)
        now_us = self._clock.now_us()
        award = Award(
            id=uuid.uuid4().hex,
            application_id=application.id,
            call_id=call.id,
            firm_id=application.firm_id,
            match_id=application.match_id,
            grant_pence=assessment.grant_pence,
            co_investment_pence=assessment.match_counted_pence,
            awarded_us=now_us,
            awarded_on=uk_day(from_us(now_us)),
            parameters_version=self._table.version,
            database_entry_due=assessment.database_entry_due,
            findings=assessment.findings,
            correlation_id=application.correlation_id,
        )
        grant = Transfer(
            debit=Account(call.id, AccountKind.PUBLIC_BUDGET),
            credit=Account(call.id, AccountKind.PUBLIC_COMMITTED),
            amount_pence=award.grant_pence,
            purpose=Purpose.GRANT_COMMITTED,
            subject_id=application.id,
        )
        await self._post_pledges(
            connection,
            caller,
            call,
            [pledge for pledge in application.pledges if pledge.confirmed_us is not None],
            request_id=f"application:{application.id}:awarded",
            kind="application_awarded",
            purpose=Purpose.PLEDGE_COMMITTED,
            before=(grant,),
        )
        await store.add_award(connection, award)
        await outbox.write(connection, topics.AWARDS, key=award.id, value=_award_event(award))

    async def _release_pledges(self, connection: Connection, caller: Caller, application: Application) -> None:
        call = await _call(connection, application.call_id)
        with correlated(application.correlation_id):
            await self._post_pledges(
                connection,
                caller,
                call,
                [pledge for pledge in application.pledges if pledge.confirmed_us is not None],
                request_id=f"application:{application.id}:released",
                kind="pledges_released",
                purpose=Purpose.PLEDGE_RELEASED,
            )

    async def _post_pledges(
        self,
        connection: Connection,
        caller: Caller,
        call: Call,
        pledges: Sequence[Pledge],
        *,
        request_id: str,
        kind: str,
        purpose: Purpose,
        before: tuple[Transfer, ...] = (),
    ) -> None:
        """Move the business money of the pledges as the purpose says, after the transfers of `before`, as one event."""
        debit, credit = _PLEDGE_PATHS[purpose]
        transfers = before + tuple(
            Transfer(
                debit=Account(call.id, debit),
                credit=Account(call.id, credit),
                amount_pence=checks.counted_pence(pledge, call),
                purpose=purpose,
                subject_id=pledge.id,
            )
            for pledge in pledges
            if checks.counted_pence(pledge, call)
        )
        if transfers:
            await ledger.post(
                connection,
                self._clock,
                Event(request_id=request_id, kind=kind, transfers=transfers, credential_id=caller.credential_id),
            )

    # The ledger

    async def trial_balance(self, caller: Caller) -> TrialBalance:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await ledger.trial_balance(connection)

    async def observe_balances(self) -> None:
        """Set the gauges of the fund's money from the running balances."""
        async with transaction(self._pool) as connection:
            running = await ledger.balances(connection)
        for kind in AccountKind:
            balance_pence.labels(kind).set(running[kind])
        trial_balance_pence.set(sum(running.values()))

    async def observe_trial_balance(self) -> None:
        """Add every transfer up, and say aloud when a balance is something else.

        The line about the head is the note, outside the database, that shows a past rewritten whole.
        """
        async with transaction(self._pool) as connection:
            trial = await ledger.trial_balance(connection)
        disagreeing_accounts.set(sum(not account.agrees for account in trial.accounts))
        if trial.in_order:
            log.info("ledger is in order", events=trial.events, head_hash=trial.head_hash)
        else:
            log.error("ledger is not in order", total_pence=trial.total_pence, events=trial.events)

    # What the use cases share

    async def _view(self, connection: Connection, application: Application, call: Call | None = None) -> View:
        if application.state not in _LIVE:
            return View(application=application, assessment=None)
        call = call or await _call(connection, application.call_id)
        assessment = await self._assess_application(connection, application, call)
        return View(application=application, assessment=assessment)

    async def _assess_application(self, connection: Connection, application: Application, call: Call) -> Assessment:
        facts = checks.Facts(
            sic=application.sic,
            declaration=application.declaration,
            eligible_pence=application.eligible_pence,
            requested_pence=application.grant_pence or application.requested_pence,
            other_public_pence=application.other_public_pence,
            pledges=application.pledges,
            given=await store.given_to(connection, application.firm_id),
        )
        return await self._assess(connection, facts, call)

    async def _assess(self, connection: Connection, facts: checks.Facts, call: Call) -> Assessment:
        of_call, of_fund = await ledger.balances(connection, call.id), await ledger.balances(connection)
        fund = checks.Fund(
            left_pence=of_call[AccountKind.PUBLIC_BUDGET],
            public_committed_pence=ledger.public_promised(of_fund),
            business_committed_pence=ledger.business_promised(of_fund),
        )
        with understood():
            return checks.assess(facts, call, fund, self._table, uk_day(from_us(self._clock.now_us())))

    def _check_open(self, call: Call) -> None:
        state = self.state_of(call)
        if state is not CallState.OPEN:
            raise Conflict(
                f"The call is {state}: it is open from {from_us(call.opens_us).isoformat()} to "
                f"{from_us(call.closes_us).isoformat()}.",
                reason="CALL_NOT_OPEN",
            )

    def _sic(self, firm_id: int) -> str:
        firm = self._directory.firms.get(firm_id)
        if firm is None:
            raise TryAgain("The firm is not known here yet; send again.", reason="FIRM_UNKNOWN", retry_after_s=1)
        if not firm.sic:
            raise Invalid("The firm's SIC code is not on record; ask an operator to add it.", reason="SIC_MISSING")
        return str(firm.sic)

    async def _audit(
        self,
        connection: Connection,
        caller: Caller,
        action: str,
        application: Application,
        detail: dict[str, str | int],
    ) -> None:
        with correlated(application.correlation_id):
            await store.audit(
                connection,
                action,
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
                call_id=application.call_id,
                application_id=application.id,
                detail=detail,
            )


async def watch(service: FundingService) -> None:
    """Look at the running balances often and at the whole ledger now and then, until cancelled."""
    next_trial_s = 0.0
    while True:
        try:
            await service.observe_balances()
            if time.monotonic() >= next_trial_s:
                await service.observe_trial_balance()
                next_trial_s = time.monotonic() + TRIAL_BALANCE_INTERVAL_S
        except (TryAgain, asyncpg.PostgresError) as error:
            log.warning("ledger cannot be observed", error=repr(error))
        await asyncio.sleep(WATCH_INTERVAL_S)


_PLEDGE_PATHS = {
    Purpose.PLEDGE_CONFIRMED: (AccountKind.CO_INVESTMENT_SOURCE, AccountKind.CO_INVESTMENT_PLEDGED),
    Purpose.PLEDGE_COMMITTED: (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_COMMITTED),
    Purpose.PLEDGE_RELEASED: (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_SOURCE),
}


async def _call(connection: Connection, call_id: str) -> Call:
    call = await store.call_of(connection, call_id) if is_id(call_id) else None
    if call is None:
        raise NotFound("There is no such call.", reason="CALL_UNKNOWN")
    return call


async def _application(
    connection: Connection, caller: Caller, application_id: str, *, lock: bool = False
) -> Application:
    if caller.role not in (Role.FIRM, Role.OPERATOR):
        raise Forbidden("Applications are for the firm's own key and for operators.")
    found = await store.application_of(connection, application_id, lock=lock) if is_id(application_id) else None
    if found is None or (caller.role is Role.FIRM and found.firm_id != caller.firm_id):
        raise NotFound("There is no such application, or this key may not see it.", reason="APPLICATION_UNKNOWN")
    return found


def _check_state(application: Application, *states: ApplicationState) -> None:
    if application.state not in states:
        raise Conflict(
            f"The application is {application.state}; this is for one that is {' or '.join(states)}.",
            reason=f"APPLICATION_{application.state.upper()}",
        )


def _there(found: T | None) -> T:
    assert found is not None, "the row that this transaction has just met"
    return found


def _page(page_size: int, page_token: str) -> tuple[int, store.Place | None]:
    if not 0 <= page_size <= PAGE_SIZE_MAX:
        raise Invalid(f"page_size is at most {PAGE_SIZE_MAX}; 0 means {PAGE_SIZE}.", reason="PAGE_SIZE_OUT_OF_RANGE")
    if not page_token:
        return page_size or PAGE_SIZE, None
    found = _PAGE_TOKEN.fullmatch(page_token)
    if found is None or int(found[1]) > _PAGE_TIME_US_MAX:
        raise Invalid("page_token is not one that was given here.", reason="PAGE_TOKEN_INVALID")
    return page_size or PAGE_SIZE, store.Place(int(found[1]), found[2])


# The year 2100: no token of ours says more, and any later time would not be one for the database.
_PAGE_TIME_US_MAX = 4_102_444_800_000_000


def _next(found: Sequence[Application] | Sequence[Call], limit: int) -> str:
    return f"{found[limit - 1].created_us}-{found[limit - 1].id}" if len(found) > limit else ""


def _award_event(award: Award) -> bytes:
    return events_pb2.AwardEvent(
        event_id=f"{award.id}:awarded",
        changed_us=award.awarded_us,
        award=events_pb2.Award(
            id=award.id,
            application_id=award.application_id,
            call_id=award.call_id,
            firm_id=award.firm_id,
            match_id=award.match_id,
            grant_pence=award.grant_pence,
            co_investment_pence=award.co_investment_pence,
            awarded_us=award.awarded_us,
            parameters_version=award.parameters_version,
            correlation_id=award.correlation_id,
        ),
        change=events_pb2.AWARD_CHANGE_AWARDED,
    ).SerializeToString()
