"""Decisions on applications: waivers of the ratio, awards and rejections."""

import uuid
from collections.abc import Callable

from prometheus_client import Counter

from services.common import outbox, topics
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, HubError
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.common.messages import message_of
from services.funding import application_store, award_store, checks, ledger
from services.funding.domain import WAIVERS_NEEDED, Application, ApplicationState, Award, checked_text, uk_day
from services.funding.judging import Judge, View, application_of, audit_application, call_of, there
from services.funding.ledger import Account, AccountKind, Purpose, Transfer
from services.funding.parameters import ParameterTable
from services.funding.permissions import Action, check_may
from services.funding.pledge_money import post_pledges, release_pledges
from services.funding.requests import understood
from smdih.funding.v1 import events_pb2

log = get_logger(__name__)

# Decisions made, by result (awarded, rejected).
decisions_total = Counter("smdih_funding_decisions_total", "Decisions on applications", ["result"])
# Decisions that a rule did not allow, by the rule's code.
refusals_total = Counter("smdih_funding_refusals_total", "Awards refused by a rule", ["reason"])


class DecisionService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self, pool: Pool, *, judge: Judge, table: ParameterTable, clock: Clock, kick: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._judge = judge
        self._table = table
        self._clock = clock
        # Tells the outbox relay that there is something.
        self._kick = kick

    async def waive_ratio(self, caller: Caller, application_id: str, *, reason: str) -> View:
        """One operator's word that this award may go below the programme's ratio; WAIVERS_NEEDED different ones are needed."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            check_may(caller, application, Action.WAIVE_RATIO)
            await application_store.add_waiver(
                connection,
                application.id,
                credential_id=caller.credential_id,
                reason=reason,
                now_us=self._clock.now_us(),
            )
            await audit_application(connection, self._clock, caller, "ratio_waived", application, {"reason": reason})
            log.info("ratio waived", application_id=application.id, credential_id=caller.credential_id)
            return await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id))
            )

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
            application = await application_of(connection, caller, application_id, lock=True)
            if application.state is wanted:
                return await self._judge.view(connection, application)
            if application.state in (ApplicationState.AWARDED, ApplicationState.REJECTED):
                raise Conflict(f"The application is {application.state} already.", reason="ALREADY_DECIDED")
            check_may(caller, application, Action.DECIDE)
            with correlated(application.correlation_id):
                if award:
                    try:
                        await self._award(connection, caller, application)
                    except HubError as error:
                        refusals_total.labels(error.reason).inc()
                        raise
                else:
                    await release_pledges(connection, self._clock, caller, application)
                await application_store.set_decided(
                    connection, application.id, state=wanted, reason=reason, now_us=self._clock.now_us()
                )
                await audit_application(
                    connection, self._clock, caller, f"application_{wanted}", application, {"reason": reason}
                )
            view = await self._judge.view(
                connection, there(await application_store.application_of(connection, application.id))
            )
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
        call = await call_of(connection, application.call_id)
        assessment = await self._judge.assess_application(connection, application, call)
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
        await post_pledges(
            connection,
            self._clock,
            caller,
            call,
            [pledge for pledge in application.pledges if pledge.confirmed_us is not None],
            request_id=f"application:{application.id}:awarded",
            kind="application_awarded",
            purpose=Purpose.PLEDGE_COMMITTED,
            before=(grant,),
        )
        await award_store.add_award(connection, award)
        await outbox.write(connection, topics.AWARDS, key=award.id, value=_award_event(award))


def _award_event(award: Award) -> bytes:
    return events_pb2.AwardEvent(
        event_id=f"{award.id}:awarded",
        changed_us=award.awarded_us,
        award=message_of(events_pb2.Award, award),
        change=events_pb2.AWARD_CHANGE_AWARDED,
    ).SerializeToString()
