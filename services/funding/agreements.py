"""What people can do with an award: accept it, claim, decide, release the money, give back. One method a use case, each in one
transaction.

Every change locks the agreement first and posts to the ledger last. What a claim earns is the rule's word alone
(`rules.claims`); who decides it and who releases the money are two persons.
"""

import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

from prometheus_client import Counter

from services.common import outbox, topics
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Forbidden, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.funding import agreement_store as store
from services.funding import ledger
from services.funding.agreement import (
    CLAIMS_PER_AWARD_MAX,
    OPEN_CLAIMS,
    Agreement,
    AgreementState,
    Claim,
    ClaimState,
    CostLine,
    Decision,
    checked_lines,
    checked_project,
)
from services.funding.award_store import audit, given_to
from services.funding.checks import GROUP, Given
from services.funding.domain import checked_amount, checked_date, checked_request_id, checked_text, is_id, uk_day
from services.funding.ledger import PROGRAMME, Account, AccountKind, Event, Purpose, Transfer
from services.funding.milestone import MILESTONES_MAX
from services.funding.milestones import MilestoneService, check_due_are_met
from services.funding.parameters import ParameterTable
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.assistance import Assistance, AssistanceCheck, AssistanceKind, mfa_check
from services.funding.rules.calendar import add_months
from services.funding.rules.claims import ClaimFacts, decide_claim, payable_before_completion
from services.funding.rules.exact import decimal, gbp, rate_text
from services.funding.rules.match import FundRatio, fund_ratio
from smdih.funding.v1 import events_pb2

log = get_logger(__name__)

# Claims by what became of them (paid, lapsed, rejected).
claims_total = Counter("smdih_funding_claims_total", "Claims that were settled", ["result"])
# Public money released to firms.
paid_pence_total = Counter("smdih_funding_paid_pence_total", "Grant money released by payments")


@dataclass(frozen=True, kw_only=True)
class FundView:
    """The whole fund as the ledger has it. Promised includes what is held and paid; paid is what was not recovered."""

    programme_pence: int
    unallotted_pence: int
    unpromised_pence: int
    public_promised_pence: int
    public_held_pence: int
    public_paid_pence: int
    public_recovered_pence: int
    business_promised_pence: int
    business_paid_pence: int
    on_promises: FundRatio
    on_payments: FundRatio


class AgreementService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self,
        pool: Pool,
        *,
        milestones: MilestoneService,
        table: ParameterTable,
        clock: Clock,
        kick: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._milestones = milestones
        self._table = table
        self._clock = clock
        # Tells the outbox relay that there is something.
        self._kick = kick

    async def get_agreement(self, caller: Caller, award_id: str) -> Agreement:
        async with transaction(self._pool) as connection:
            return await _agreement(connection, caller, award_id)

    async def get_fund(self, caller: Caller) -> FundView:
        """The programme's figures, with business money per public money on promises and on payments."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            all_of, own = await ledger.balances(connection), await ledger.balances(connection, PROGRAMME)
        target = self._table.at(self._today()).exact("programme.business_per_public")
        promised, business = ledger.public_promised(all_of), ledger.business_promised(all_of)
        paid, business_paid = all_of[AccountKind.PUBLIC_PAID], all_of[AccountKind.CO_INVESTMENT_PAID]
        return FundView(
            programme_pence=-own[AccountKind.PUBLIC_SOURCE],
            unallotted_pence=own[AccountKind.PROGRAMME_BUDGET],
            unpromised_pence=all_of[AccountKind.PUBLIC_BUDGET],
            public_promised_pence=promised,
            public_held_pence=all_of[AccountKind.PUBLIC_HELD],
            public_paid_pence=paid,
            public_recovered_pence=all_of[AccountKind.PUBLIC_RECOVERED],
            business_promised_pence=business,
            business_paid_pence=business_paid,
            on_promises=fund_ratio(public_p=promised, business_p=business, target=target),
            on_payments=fund_ratio(public_p=paid, business_p=business_paid, target=target),
        )

    # The firm's part

    async def accept(self, caller: Caller, award_id: str, *, project_start: str, project_end: str) -> Agreement:
        """The firm takes the offer and says when the project runs. A repeat gets the first answer."""
        caller.require(Role.FIRM)
        with understood():
            start, end = checked_date("project_start", project_start), checked_date("project_end", project_end)
        async with self._changing(caller, award_id) as (connection, agreement):
            if agreement.state is AgreementState.ACCEPTED:
                if (agreement.project_start, agreement.project_end) != (start, end):
                    raise Conflict("The offer is accepted already, with other dates.", reason="ALREADY_ACCEPTED")
            else:
                _check_state(agreement, AgreementState.OFFERED)
                award = agreement.award
                days = self._table.at(award.awarded_on).whole("project.start_days_after_award_max")
                with understood():
                    checked_project(start, end, awarded_on=award.awarded_on, start_days_max=days)
                # Calls from before have no accounts for payments.
                await ledger.open_accounts(connection, award.call_id)
                await store.set_accepted(connection, award.id, start=start, end=end, now_us=self._clock.now_us())
                await self._audit(
                    connection,
                    caller,
                    "offer_accepted",
                    agreement,
                    {"project_start": str(start), "project_end": str(end)},
                )
                await self._publish(connection, agreement, events_pb2.AWARD_CHANGE_ACCEPTED, "accepted")
            return await _agreement(connection, caller, award_id)

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
        async with self._changing(caller, award_id) as (connection, agreement):
            if agreement.assistance_confirmed_us is not None:
                if agreement.assistance_elsewhere_pence != elsewhere_pence:
                    raise Conflict(
                        "The assistance is confirmed already, with another figure.", reason="ALREADY_CONFIRMED"
                    )
                return agreement
            _check_state(agreement, AgreementState.ACCEPTED)
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
            await self._audit(connection, caller, "assistance_confirmed", agreement, detail)
            return await _agreement(connection, caller, award_id)

    async def submit_claim(
        self,
        caller: Caller,
        award_id: str,
        *,
        request_id: str,
        period_start: str,
        period_end: str,
        costs: Sequence[CostLine],
        is_final: bool,
        evidence: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> Agreement:
        """Costs of a period that has ended, each with its paper; with them signed evidence of milestones, by their ids. The day it
        comes is the day that counts for lateness."""
        caller.require(Role.FIRM)
        if len(evidence) > MILESTONES_MAX:
            raise Invalid(f"A claim shows at most {MILESTONES_MAX} milestones.", reason="TOO_MUCH_EVIDENCE")
        now_us = self._clock.now_us()
        with understood():
            checked_request_id(request_id)
            claim = Claim(
                id=uuid.uuid4().hex,
                number=0,
                period_start=checked_date("period_start", period_start),
                period_end=checked_date("period_end", period_end),
                costs=checked_lines(tuple(costs)),
                is_final=is_final,
                state=ClaimState.SUBMITTED,
                submitted_us=now_us,
                submitted_on=self._today(),
            )
        content = content_sha256(dataclasses.replace(claim, id="", submitted_us=0, submitted_on=date.min))
        async with self._changing(caller, award_id) as (connection, agreement):
            first = await store.claim_by_request(connection, award_id, request_id)
            if first is not None:
                check_same(first, content)
                return agreement
            _check_state(agreement, AgreementState.ACCEPTED)
            _check_claim(agreement, claim)
            decision = self._judge(agreement, claim)
            if decision.code == "CLAIM_EARLY":
                raise Conflict(decision.reasons[0], reason=decision.code)
            for milestone_id, one in evidence:
                await self._milestones.show_within(connection, caller, agreement, milestone_id, one)
            claim = dataclasses.replace(claim, number=len(agreement.claims) + 1)
            await store.add_claim(connection, agreement, claim, request_id=request_id, content_sha256=content)
            detail: dict[str, str | int] = {"claim_id": claim.id, "defrayed_pence": claim.defrayed_pence}
            await self._audit(connection, caller, "claim_submitted", agreement, detail)
            log.info("claim submitted", award_id=award_id, claim_id=claim.id, defrayed_pence=claim.defrayed_pence)
            return await _agreement(connection, caller, award_id)

    # The operators' part

    async def decide_claim(
        self, caller: Caller, award_id: str, claim_id: str, *, accept: bool, reason: str
    ) -> Agreement:
        """Accept what the rule makes of a claim, or reject it. Moves no money yet. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with self._changing(caller, award_id) as (connection, agreement):
            claim = _claim(agreement, claim_id)
            if claim.state is not ClaimState.SUBMITTED:
                if (claim.state is not ClaimState.REJECTED) != accept:
                    raise Conflict(f"The claim is {claim.state} already.", reason="ALREADY_DECIDED")
                return agreement
            _check_state(agreement, AgreementState.ACCEPTED)
            decision, state = None, ClaimState.REJECTED
            if accept:
                _check_turn(agreement, claim)
                await check_due_are_met(connection, award_id, claim.period_end)
                decision = self._judge(agreement, claim)
                state = ClaimState.LAPSED if decision.code else ClaimState.DECIDED
                if (
                    claim.is_final
                    and not decision.code
                    and not (agreement.final_report and agreement.accountant_report)
                ):
                    raise Conflict(
                        "The final report and the accountant's report are not on record yet; record them first.",
                        reason="REPORTS_MISSING",
                    )
            await store.set_claim_decided(
                connection,
                claim.id,
                state=state,
                decision=decision,
                reason=reason,
                parameters_version=self._table.version,
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
            )
            detail: dict[str, str | int] = {"claim_id": claim.id, "reason": reason}
            if decision is not None:
                detail |= {"payable_pence": decision.payable_pence, "code": decision.code}
            await self._audit(connection, caller, f"claim_{state}", agreement, detail)
            if state is not ClaimState.DECIDED:
                claims_total.labels(state).inc()
            log.info("claim decided", award_id=award_id, claim_id=claim.id, state=state)
            return await _agreement(connection, caller, award_id)

    async def settle_claim(
        self, caller: Caller, award_id: str, claim_id: str, *, release: bool, reason: str
    ) -> Agreement:
        """The second person: release the money, or send the claim back to be decided anew. A repeated release gets the first
        answer. The final claim completes the agreement: what was held is paid, what is left returns to the call."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with self._changing(caller, award_id) as (connection, agreement):
            claim = _claim(agreement, claim_id)
            if claim.state is ClaimState.PAID and release:
                return agreement
            if claim.state is not ClaimState.DECIDED:
                raise Conflict(f"The claim is {claim.state}, not decided.", reason=f"CLAIM_{claim.state.upper()}")
            if claim.decided_by == caller.credential_id:
                raise Forbidden(
                    "Who decided the claim does not release its money; another operator has to.", reason="SECOND_PERSON"
                )
            if not release:
                await store.set_claim_returned(connection, claim.id, reason=reason)
                await self._audit(
                    connection, caller, "claim_returned", agreement, {"claim_id": claim.id, "reason": reason}
                )
                return await _agreement(connection, caller, award_id)
            if agreement.assistance_confirmed_us is None:
                raise Conflict(
                    "The firm has not confirmed its assistance in writing; no confirmation, no payment.",
                    reason="ASSISTANCE_UNCONFIRMED",
                )
            await self._pay(connection, caller, agreement, claim, reason)
            paid = await _agreement(connection, caller, award_id)
            await self._publish(connection, paid, events_pb2.AWARD_CHANGE_PAID, f"paid:{claim.id}")
        return paid

    async def _pay(
        self, connection: Connection, caller: Caller, agreement: Agreement, claim: Claim, reason: str
    ) -> None:
        decision = claim.decision
        assert decision is not None, "a decided claim has its decision"
        now_us = self._clock.now_us()
        if claim.is_final:
            # Before the money: until then the database refuses more than the unretained part.
            await store.set_ended(
                connection, agreement.award.id, state=AgreementState.COMPLETE, reason=reason, now_us=now_us
            )
        await store.set_claim_paid(connection, claim.id, credential_id=caller.credential_id, now_us=now_us)
        released_pence = max(0, agreement.held_pence - decision.held_pence)
        held_pence = max(0, decision.held_pence - agreement.held_pence)
        fresh_pence = decision.payable_pence - released_pence
        moves = [
            (Purpose.CLAIM_PAID, fresh_pence),
            (Purpose.CLAIM_HELD, held_pence),
            (Purpose.HELD_PAID, released_pence),
            (Purpose.BUSINESS_PAID, decision.business_pence),
        ]
        if claim.is_final:
            moves += [
                (Purpose.GRANT_RESTORED, agreement.left_pence - fresh_pence - held_pence),
                (Purpose.BUSINESS_RESTORED, agreement.business_left_pence - decision.business_pence),
            ]
        await self._post(connection, caller, agreement, f"claim:{claim.id}:paid", "claim_paid", claim.id, moves)
        detail: dict[str, str | int] = {"claim_id": claim.id, "paid_pence": decision.payable_pence, "reason": reason}
        await self._audit(connection, caller, "claim_paid", agreement, detail)
        claims_total.labels(ClaimState.PAID).inc()
        paid_pence_total.inc(decision.payable_pence)
        log.info("claim paid", award_id=agreement.award.id, claim_id=claim.id, paid_pence=decision.payable_pence)

    async def record_reports(
        self, caller: Caller, award_id: str, *, final_report: str, accountant_report: str
    ) -> Agreement:
        """The final report and the independent accountant's report have been received; where they are kept."""
        caller.require(Role.OPERATOR)
        with understood():
            final_report = checked_text("final_report", final_report)
            accountant_report = checked_text("accountant_report", accountant_report)
        async with self._changing(caller, award_id) as (connection, agreement):
            _check_state(agreement, AgreementState.ACCEPTED)
            await store.set_reports(
                connection, award_id, final_report=final_report, accountant_report=accountant_report
            )
            detail: dict[str, str | int] = {"final_report": final_report, "accountant_report": accountant_report}
            await self._audit(connection, caller, "reports_recorded", agreement, detail)
            return await _agreement(connection, caller, award_id)

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
        async with self._changing(caller, award_id) as (connection, agreement):
            if agreement.state is state:
                return agreement
            if state is AgreementState.LAPSED:
                _check_state(agreement, AgreementState.ACCEPTED)
                self._check_over(agreement)
            else:
                _check_state(agreement, AgreementState.OFFERED, AgreementState.ACCEPTED)
            if any(claim.state in OPEN_CLAIMS for claim in agreement.claims):
                raise Conflict("A claim is still open; it has to be paid or rejected first.", reason="CLAIM_OPEN")
            await ledger.open_accounts(connection, agreement.award.call_id)
            await store.set_ended(connection, award_id, state=state, reason=reason, now_us=self._clock.now_us())
            moves = [
                (Purpose.GRANT_RESTORED, agreement.left_pence),
                (Purpose.HELD_RESTORED, agreement.held_pence),
                (Purpose.BUSINESS_RESTORED, agreement.business_left_pence),
            ]
            await self._post(connection, caller, agreement, f"award:{award_id}:ended", f"award_{state}", "end", moves)
            await self._audit(connection, caller, f"award_{state}", agreement, {"reason": reason})
            ended = await _agreement(connection, caller, award_id)
            await self._publish(connection, ended, events_pb2.AWARD_CHANGE_ENDED, "ended")
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
        async with self._changing(caller, award_id) as (connection, agreement):
            name = f"award:{award_id}:recovered:{request_id}"
            moves = [(Purpose.GRANT_RECOVERED, amount_pence)]
            known = await ledger.is_posted(connection, name)
            left_pence = agreement.paid_pence - agreement.recovered_pence
            if not known and amount_pence > left_pence:
                raise Conflict(f"{gbp(left_pence)} is paid and not recovered.", reason="RECOVERY_OVER_PAID")
            await self._post(connection, caller, agreement, name, "grant_recovered", request_id, moves)
            if known:
                return agreement
            detail: dict[str, str | int] = {"amount_pence": amount_pence, "reason": reason}
            await self._audit(connection, caller, "grant_recovered", agreement, detail)
            recovered = await _agreement(connection, caller, award_id)
            await self._publish(connection, recovered, events_pb2.AWARD_CHANGE_RECOVERED, f"recovered:{request_id}")
        return recovered

    # What the use cases share

    @asynccontextmanager
    async def _changing(self, caller: Caller, award_id: str) -> AsyncIterator[tuple[Connection, Agreement]]:
        """A transaction in which nobody else changes the agreement, under the correlation id of the award."""
        async with transaction(self._pool) as connection:
            award = (await _agreement(connection, caller, award_id)).award
            retention = self._table.at(award.awarded_on).exact("claim.retention_rate")
            with correlated(award.correlation_id):
                await store.lock_agreement(
                    connection,
                    award,
                    retention_rate=rate_text(retention),
                    before_completion_pence_max=payable_before_completion(award.grant_pence, retention),
                )
                yield connection, await _agreement(connection, caller, award_id)
        self._kick()

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

    def _judge(self, agreement: Agreement, claim: Claim) -> Decision:
        ruled = decide_claim(
            ClaimFacts(
                max_grant_p=agreement.grant_pence,
                award_rate=agreement.award_rate,
                retention_rate=decimal(agreement.retention_rate),
                paid_so_far_p=agreement.paid_pence,
                held_so_far_p=agreement.held_pence,
                defrayed_costs_p=claim.defrayed_pence,
                is_final=claim.is_final,
                final_report_received=bool(agreement.final_report),
                iar_received=bool(agreement.accountant_report),
                period_end=claim.period_end,
                submitted=claim.submitted_on,
            ),
            self._table.at(claim.submitted_on),
        )
        # What the firm and its co-investors have paid of these costs themselves.
        own_pence = claim.defrayed_pence - ruled.claimed_grant_p if ruled.accepted else 0
        return Decision(
            claimed_grant_pence=ruled.claimed_grant_p,
            payable_pence=ruled.payable_now_p,
            held_pence=ruled.held_p,
            over_grant_pence=ruled.unpaid_over_grant_p,
            business_pence=min(own_pence, agreement.business_left_pence),
            days_after_period_end=ruled.days_after_period_end,
            code=ruled.code or "",
            reasons=ruled.reasons,
        )

    def _check_over(self, agreement: Agreement) -> None:
        assert agreement.project_end is not None, "an accepted agreement has its dates"
        months = self._table.at(agreement.project_end).whole("claim.final_months_after_end")
        last_day = add_months(agreement.project_end, months)
        if self._today() <= last_day:
            raise Conflict(
                f"The firm may send its final claim until {last_day.isoformat()}; close it afterwards.",
                reason="CLOSE_EARLY",
            )

    async def _post(
        self,
        connection: Connection,
        caller: Caller,
        agreement: Agreement,
        request_id: str,
        kind: str,
        cause: str,
        moves: Sequence[tuple[Purpose, int]],
    ) -> None:
        call_id = agreement.award.call_id
        transfers = tuple(
            Transfer(
                debit=Account(call_id, _PATHS[purpose][0]),
                credit=Account(call_id, _PATHS[purpose][1]),
                amount_pence=pence,
                purpose=purpose,
                subject_id=f"{agreement.award.id}/{cause}",
            )
            for purpose, pence in moves
            if pence
        )
        if transfers:
            event = Event(request_id=request_id, kind=kind, transfers=transfers, credential_id=caller.credential_id)
            await ledger.post(connection, self._clock, event)

    async def _audit(
        self, connection: Connection, caller: Caller, action: str, agreement: Agreement, detail: Mapping[str, str | int]
    ) -> None:
        await audit(
            connection,
            action,
            credential_id=caller.credential_id,
            now_us=self._clock.now_us(),
            call_id=agreement.award.call_id,
            application_id=agreement.award.application_id,
            detail={"award_id": agreement.award.id, **detail},
        )

    async def _publish(
        self, connection: Connection, agreement: Agreement, change: events_pb2.AwardChange.ValueType, cause: str
    ) -> None:
        award = agreement.award
        event = events_pb2.AwardEvent(
            event_id=f"{award.id}:{cause}",
            changed_us=self._clock.now_us(),
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
            change=change,
            paid_pence=agreement.paid_pence,
            held_pence=agreement.held_pence,
            recovered_pence=agreement.recovered_pence,
            restored_pence=agreement.restored_pence,
        )
        await outbox.write(connection, topics.AWARDS, key=award.id, value=event.SerializeToString())

    def _today(self) -> date:
        return uk_day(from_us(self._clock.now_us()))


_PATHS = {
    Purpose.CLAIM_PAID: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_PAID),
    Purpose.CLAIM_HELD: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_HELD),
    Purpose.HELD_PAID: (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_PAID),
    Purpose.HELD_RESTORED: (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_BUDGET),
    Purpose.GRANT_RESTORED: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_BUDGET),
    Purpose.GRANT_RECOVERED: (AccountKind.PUBLIC_PAID, AccountKind.PUBLIC_RECOVERED),
    Purpose.BUSINESS_PAID: (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_PAID),
    Purpose.BUSINESS_RESTORED: (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_SOURCE),
}


async def _agreement(connection: Connection, caller: Caller, award_id: str) -> Agreement:
    caller.require(Role.FIRM, Role.OPERATOR)
    found = await store.agreement_of(connection, award_id) if is_id(award_id) else None
    if found is None or (caller.role is Role.FIRM and found.award.firm_id != caller.firm_id):
        raise NotFound("There is no such award, or this key may not see it.", reason="AWARD_UNKNOWN")
    return found


def _claim(agreement: Agreement, claim_id: str) -> Claim:
    for claim in agreement.claims:
        if claim.id == claim_id:
            return claim
    raise NotFound("This award has no such claim.", reason="CLAIM_UNKNOWN")


def _check_state(agreement: Agreement, *states: AgreementState) -> None:
    if agreement.state not in states:
        raise Conflict(
            f"The award is {agreement.state}; this is for one that is {' or '.join(states)}.",
            reason=f"AWARD_{agreement.state.upper()}",
        )


def _check_claim(agreement: Agreement, claim: Claim) -> None:
    """Raises Conflict unless the claim's days, costs and place in the row fit the agreement."""
    start, end = agreement.project_start, agreement.project_end
    assert start is not None, "an accepted agreement has its dates"
    assert end is not None, "an accepted agreement has its dates"
    if not start <= claim.period_start <= claim.period_end <= end:
        raise Conflict(
            f"The project runs from {start.isoformat()} to {end.isoformat()}, and a period lies within it.",
            reason="CLAIM_PERIOD_OUTSIDE",
        )
    if claim.is_final != (claim.period_end == end):
        raise Conflict("The final claim is the one whose period ends with the project.", reason="CLAIM_NOT_FINAL")
    if len(agreement.claims) >= CLAIMS_PER_AWARD_MAX:
        raise Conflict(f"An award has at most {CLAIMS_PER_AWARD_MAX} claims.", reason="TOO_MANY_CLAIMS")
    unknown = {line.category for line in claim.costs} - {cost.category for cost in agreement.costs}
    if unknown:
        raise Conflict(
            f"The grant was awarded without costs of {' and '.join(sorted(unknown))}.", reason="CATEGORY_NOT_AWARDED"
        )


def _check_turn(agreement: Agreement, claim: Claim) -> None:
    """Raises Conflict while another claim has to be settled first: what is paid and held decides what is payable."""
    for other in agreement.claims:
        earlier = claim.is_final or other.number < claim.number
        waits = other.state is ClaimState.DECIDED or (other.state is ClaimState.SUBMITTED and earlier)
        if other.id != claim.id and waits:
            raise Conflict(f"Claim {other.number} has to be settled first.", reason="CLAIM_OUT_OF_TURN")
