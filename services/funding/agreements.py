"""The use cases of awards after the decision: accepted, reported on, ended, money taken back."""

from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import agreement_store as store
from services.funding import ledger
from services.funding.agreement import (
    OPEN_CLAIMS,
    Agreement,
    AgreementState,
    checked_project,
)
from services.funding.agreement_changes import AgreementChanges, agreement_seen_by, check_state
from services.funding.award_store import given_to
from services.funding.checks import GROUP, Given
from services.funding.claims import correct_until
from services.funding.domain import checked_amount, checked_date, checked_request_id, checked_text
from services.funding.ledger import Purpose
from services.funding.parameters import ParameterTable
from services.funding.requests import understood
from services.funding.rules.assistance import Assistance, AssistanceCheck, AssistanceKind, mfa_check
from services.funding.rules.calendar import add_months
from services.funding.rules.exact import gbp
from smdih.funding.v1 import events_pb2

log = get_logger(__name__)


class AgreementService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, changes: AgreementChanges, table: ParameterTable, clock: Clock) -> None:
        self._pool = pool
        self._changes = changes
        self._table = table
        self._clock = clock

    async def get_agreement(self, caller: Caller, award_id: str) -> Agreement:
        async with transaction(self._pool) as connection:
            return await agreement_seen_by(connection, caller, award_id)

    # The firm's part

    async def accept(self, caller: Caller, award_id: str, *, project_start: str, project_end: str) -> Agreement:
        """The firm takes the offer and says when the project runs. A repeat gets the first answer."""
        caller.require(Role.FIRM)
        with understood():
            start, end = checked_date("project_start", project_start), checked_date("project_end", project_end)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            if agreement.state is AgreementState.ACCEPTED:
                if (agreement.project_start, agreement.project_end) != (start, end):
                    raise Conflict("The offer is accepted already, with other dates.", reason="ALREADY_ACCEPTED")
            else:
                check_state(agreement, AgreementState.OFFERED)
                award = agreement.award
                days = self._table.at(award.awarded_on).whole("project.start_days_after_award_max")
                with understood():
                    checked_project(start, end, awarded_on=award.awarded_on, start_days_max=days)
                # Calls from before have no accounts for payments.
                await ledger.open_accounts(connection, award.call_id)
                await store.set_accepted(connection, award.id, start=start, end=end, now_us=self._clock.now_us())
                await self._changes.audit(
                    connection,
                    caller,
                    "offer_accepted",
                    agreement,
                    {"project_start": str(start), "project_end": str(end)},
                )
                await self._changes.publish(connection, agreement, events_pb2.AWARD_CHANGE_ACCEPTED, "accepted")
            return await agreement_seen_by(connection, caller, award_id)

    async def confirm_assistance(
        self, caller: Caller, award_id: str, *, elsewhere_pence: int, statement: str
    ) -> Agreement:
        """The firm's written word on what others gave its group in the window; before it nothing is paid (MFA-5).

        What this fund gave the firm is known and added. Refused with MFA_LIMIT when the grant does not fit beside it. A repeat
        gets the first answer.
        """
        caller.require(Role.FIRM)
        with understood():
            checked_amount("elsewhere_pence", elsewhere_pence, least=0)
            statement = checked_text("statement", statement)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            if agreement.assistance_confirmed_us is not None:
                if agreement.assistance_elsewhere_pence != elsewhere_pence:
                    raise Conflict(
                        "The assistance is confirmed already, with another figure.", reason="ALREADY_CONFIRMED"
                    )
                return agreement
            check_state(agreement, AgreementState.ACCEPTED)
            check = await self._assistance(connection, agreement, elsewhere_pence)
            if check.code is not None:
                raise Conflict(" ".join(check.reasons), reason=check.code)
            await store.set_assistance_confirmed(
                connection,
                award_id,
                elsewhere_pence=elsewhere_pence,
                statement=statement,
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
            )
            detail = {"elsewhere_pence": elsewhere_pence, "grant_pence": agreement.grant_pence}
            await self._changes.audit(connection, caller, "assistance_confirmed", agreement, detail)
            return await agreement_seen_by(connection, caller, award_id)

    # The operators' part

    async def record_reports(
        self, caller: Caller, award_id: str, *, final_report: str, accountant_report: str
    ) -> Agreement:
        """The final report and the independent accountant's report have been received; where they are kept."""
        caller.require(Role.OPERATOR)
        with understood():
            final_report = checked_text("final_report", final_report)
            accountant_report = checked_text("accountant_report", accountant_report)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            check_state(agreement, AgreementState.ACCEPTED)
            await store.set_reports(
                connection, award_id, final_report=final_report, accountant_report=accountant_report
            )
            detail: dict[str, str | int] = {"final_report": final_report, "accountant_report": accountant_report}
            await self._changes.audit(connection, caller, "reports_recorded", agreement, detail)
            return await agreement_seen_by(connection, caller, award_id)

    # The ends

    async def withdraw(self, caller: Caller, award_id: str, *, reason: str) -> Agreement:
        """The firm or an operator gives the rest of an award up; what is not paid returns. A repeat gets the first answer."""
        return await self._end(caller, award_id, AgreementState.WITHDRAWN, reason=reason)

    async def close(self, caller: Caller, award_id: str, *, reason: str) -> Agreement:
        """The final claim did not come in time: what is not paid, the retention too, returns. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        return await self._end(caller, award_id, AgreementState.LAPSED, reason=reason)

    async def _end(self, caller: Caller, award_id: str, state: AgreementState, *, reason: str) -> Agreement:
        with understood():
            reason = checked_text("reason", reason)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            if agreement.state is state:
                return agreement
            if state is AgreementState.LAPSED:
                check_state(agreement, AgreementState.ACCEPTED)
                self._check_over(agreement)
            else:
                check_state(agreement, AgreementState.OFFERED, AgreementState.ACCEPTED)
            if any(claim.state in OPEN_CLAIMS for claim in agreement.claims):
                raise Conflict("A claim is still open; it has to be paid or rejected first.", reason="CLAIM_OPEN")
            await ledger.open_accounts(connection, agreement.award.call_id)
            await store.set_ended(connection, award_id, state=state, reason=reason, now_us=self._clock.now_us())
            moves = [
                (Purpose.GRANT_RESTORED, agreement.left_pence),
                (Purpose.HELD_RESTORED, agreement.held_pence),
                (Purpose.BUSINESS_RESTORED, agreement.business_left_pence),
            ]
            await self._changes.post(
                connection, caller, agreement, f"award:{award_id}:ended", f"award_{state}", "end", moves
            )
            await self._changes.audit(connection, caller, f"award_{state}", agreement, {"reason": reason})
            ended = await agreement_seen_by(connection, caller, award_id)
            await self._changes.publish(connection, ended, events_pb2.AWARD_CHANGE_ENDED, "ended")
            log.info("award ended", award_id=award_id, state=state)
        return ended

    async def recover(
        self, caller: Caller, award_id: str, *, request_id: str, amount_pence: int, reason: str
    ) -> Agreement:
        """Paid money came back from the firm: a new transfer, never a correction of the old one."""
        caller.require(Role.OPERATOR)
        with understood():
            checked_request_id(request_id)
            checked_amount("amount_pence", amount_pence)
            reason = checked_text("reason", reason)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            name = f"award:{award_id}:recovered:{request_id}"
            moves = [(Purpose.GRANT_RECOVERED, amount_pence)]
            known = await ledger.is_posted(connection, name)
            left_pence = agreement.paid_pence - agreement.recovered_pence
            if not known and amount_pence > left_pence:
                raise Conflict(f"{gbp(left_pence)} is paid and not recovered.", reason="RECOVERY_OVER_PAID")
            await self._changes.post(connection, caller, agreement, name, "grant_recovered", request_id, moves)
            if known:
                return agreement
            detail: dict[str, str | int] = {"amount_pence": amount_pence, "reason": reason}
            await self._changes.audit(connection, caller, "grant_recovered", agreement, detail)
            recovered = await agreement_seen_by(connection, caller, award_id)
            await self._changes.publish(
                connection, recovered, events_pb2.AWARD_CHANGE_RECOVERED, f"recovered:{request_id}"
            )
        return recovered

    # What the use cases share

    async def _assistance(self, connection: Connection, agreement: Agreement, elsewhere_pence: int) -> AssistanceCheck:
        """The grant beside what others gave the group, as it says, and what this fund gave it, as it knows itself."""
        award = agreement.award
        here = await given_to(connection, award.firm_id)
        here.remove(Given(on=award.awarded_on, amount_pence=agreement.grant_pence))
        amounts = [(item.on, item.amount_pence) for item in here] + [(award.awarded_on, elsewhere_pence)]
        return mfa_check(
            award_date=award.awarded_on,
            proposed_p=agreement.grant_pence,
            history=[
                Assistance(given_on=on, amount=pence, kind=AssistanceKind.MFA, enterprise=GROUP)
                for on, pence in amounts
            ],
            enterprise_group={GROUP},
            table=self._table,
        )

    def _check_over(self, agreement: Agreement) -> None:
        assert agreement.project_end is not None, "an accepted agreement has its dates"
        months = self._table.at(agreement.project_end).whole("claim.final_months_after_end")
        last_day = add_months(agreement.project_end, months)
        last_day = max(last_day, correct_until(agreement, agreement.project_end, self._table) or last_day)
        if self._changes.today() <= last_day:
            raise Conflict(
                f"The firm may send its final claim until {last_day.isoformat()}; close it afterwards.",
                reason="CLOSE_EARLY",
            )
