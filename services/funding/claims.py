"""The use cases of claims: sent by the firm, decided by one operator, paid by another."""

import dataclasses
import uuid
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from prometheus_client import Counter

from services.common.clock import Clock, from_us
from services.common.database import Connection
from services.common.errors import Conflict, Forbidden, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.funding import agreement_store as store
from services.funding.agreement import (
    CLAIMS_PER_AWARD_MAX,
    Agreement,
    AgreementState,
    Claim,
    ClaimState,
    CostLine,
    Decision,
    checked_lines,
)
from services.funding.agreement_changes import AgreementChanges, agreement_seen_by, check_state
from services.funding.domain import checked_date, checked_request_id, checked_text, uk_day
from services.funding.ledger import Purpose
from services.funding.milestone import MILESTONES_MAX
from services.funding.milestones import MilestoneService, check_claimable
from services.funding.parameters import ParameterTable
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.claims import ClaimFacts, decide_claim, timing
from services.funding.rules.exact import decimal
from smdih.funding.v1 import events_pb2

log = get_logger(__name__)

# Claims by what became of them (paid, lapsed, rejected).
claims_total = Counter("smdih_funding_claims_total", "Claims that were settled", ["result"])
# Public money released to firms.
paid_pence_total = Counter("smdih_funding_paid_pence_total", "Grant money released by payments")


class ClaimService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self, *, changes: AgreementChanges, milestones: MilestoneService, table: ParameterTable, clock: Clock
    ) -> None:
        self._changes = changes
        self._milestones = milestones
        self._table = table
        self._clock = clock

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
                # When nothing was spent since the last claim, the final one still releases what is held.
                costs=checked_lines(tuple(costs), least=0 if is_final else 1),
                is_final=is_final,
                state=ClaimState.SUBMITTED,
                submitted_us=now_us,
                submitted_on=self._changes.today(),
            )
        content = content_sha256(dataclasses.replace(claim, id="", submitted_us=0, submitted_on=date.min))
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            first = await store.claim_by_request(connection, award_id, request_id)
            if first is not None:
                check_same(first, content)
                return agreement
            check_state(agreement, AgreementState.ACCEPTED)
            _check_claim(agreement, claim)
            decision = self._judge(agreement, claim)
            if decision.code == "CLAIM_EARLY":
                raise Conflict(decision.reasons[0], reason=decision.code)
            for milestone_id, one in evidence:
                await self._milestones.show_within(connection, caller, agreement, milestone_id, one)
            claim = dataclasses.replace(claim, number=len(agreement.claims) + 1)
            await store.add_claim(connection, agreement, claim, request_id=request_id, content_sha256=content)
            detail: dict[str, str | int] = {"claim_id": claim.id, "defrayed_pence": claim.defrayed_pence}
            await self._changes.audit(connection, caller, "claim_submitted", agreement, detail)
            log.info("claim submitted", award_id=award_id, claim_id=claim.id, defrayed_pence=claim.defrayed_pence)
            return await agreement_seen_by(connection, caller, award_id)

    async def decide_claim(
        self, caller: Caller, award_id: str, claim_id: str, *, accept: bool, reason: str
    ) -> Agreement:
        """Accept what the rule makes of a claim, or reject it. Moves no money yet. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
            claim = _claim(agreement, claim_id)
            if claim.state is not ClaimState.SUBMITTED:
                if (claim.state is not ClaimState.REJECTED) != accept:
                    raise Conflict(f"The claim is {claim.state} already.", reason="ALREADY_DECIDED")
                return agreement
            check_state(agreement, AgreementState.ACCEPTED)
            decision, state = None, ClaimState.REJECTED
            if accept:
                _check_turn(agreement, claim)
                await check_claimable(connection, award_id, claim)
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
            decided = await agreement_seen_by(connection, caller, award_id)
            detail: dict[str, str | int] = {"claim_id": claim.id, "reason": reason}
            if decision is not None:
                detail |= {"payable_pence": decision.payable_pence, "code": decision.code}
            elif until := correct_until(decided, claim.period_end, self._table):
                detail["correct_until"] = until.isoformat()
            await self._changes.audit(connection, caller, f"claim_{state}", agreement, detail)
        if state is not ClaimState.DECIDED:
            claims_total.labels(state).inc()
        with correlated(decided.award.correlation_id):
            log.info("claim decided", award_id=award_id, claim_id=claim.id, state=state)
        return decided

    async def settle_claim(
        self, caller: Caller, award_id: str, claim_id: str, *, release: bool, reason: str
    ) -> Agreement:
        """The second person: release the money, or send the claim back to be decided anew. A repeated release gets the first
        answer. The final claim completes the agreement: what was held is paid, what is left returns to the call."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with self._changes.changing(caller, award_id) as (connection, agreement):
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
                await self._changes.audit(
                    connection, caller, "claim_returned", agreement, {"claim_id": claim.id, "reason": reason}
                )
                return await agreement_seen_by(connection, caller, award_id)
            if agreement.assistance_confirmed_us is None:
                raise Conflict(
                    "The firm has not confirmed its assistance in writing; no confirmation, no payment.",
                    reason="ASSISTANCE_UNCONFIRMED",
                )
            paid_pence = await self._pay(connection, caller, agreement, claim, reason)
            paid = await agreement_seen_by(connection, caller, award_id)
            await self._changes.publish(connection, paid, events_pb2.AWARD_CHANGE_PAID, f"paid:{claim.id}")
        claims_total.labels(ClaimState.PAID).inc()
        paid_pence_total.inc(paid_pence)
        with correlated(paid.award.correlation_id):
            log.info("claim paid", award_id=award_id, claim_id=claim.id, paid_pence=paid_pence)
        return paid

    async def _pay(
        self, connection: Connection, caller: Caller, agreement: Agreement, claim: Claim, reason: str
    ) -> int:
        """Returns how much was paid."""
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
        await self._changes.post(connection, caller, agreement, f"claim:{claim.id}:paid", "claim_paid", claim.id, moves)
        detail: dict[str, str | int] = {"claim_id": claim.id, "paid_pence": decision.payable_pence, "reason": reason}
        await self._changes.audit(connection, caller, "claim_paid", agreement, detail)
        return decision.payable_pence

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
                correct_until=correct_until(agreement, claim.period_end, self._table),
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


def correct_until(agreement: Agreement, period_end: date, table: ParameterTable) -> date | None:
    """Last day for a claim that corrects a rejected one of the same period; None where none came in time and was rejected."""
    until = None
    for claim in agreement.claims:
        if claim.state is not ClaimState.REJECTED or claim.period_end != period_end:
            continue
        parameters = table.at(claim.submitted_on)
        late, _ = timing(
            period_end=period_end,
            submitted=claim.submitted_on,
            is_final=claim.is_final,
            correct_until=until,
            parameters=parameters,
        )
        if late is None:
            assert claim.decided_us is not None, "rejected by a decision"
            rejected_on = uk_day(from_us(claim.decided_us))
            until = rejected_on + timedelta(days=parameters.whole("claim.correction_days_max"))
    return until


def _claim(agreement: Agreement, claim_id: str) -> Claim:
    for claim in agreement.claims:
        if claim.id == claim_id:
            return claim
    raise NotFound("This award has no such claim.", reason="CLAIM_UNKNOWN")


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
