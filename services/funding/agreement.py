"""What becomes of an award: the firm accepts the offer, claims what it has paid, is paid its part, and the rest goes back."""

from dataclasses import dataclass
from datetime import date, timedelta
from enum import StrEnum
from fractions import Fraction

from services.funding.domain import Award, Cost, CostCategory, Refused, checked_amount, checked_text
from services.funding.rules.calendar import add_months

CLAIMS_PER_AWARD_MAX = 120
PROJECT_YEARS_MAX = 10
COST_LINES_MAX = 200
EVIDENCE_CHARACTERS_MAX = 200


class AgreementState(StrEnum):
    # The award is made, the firm has not answered.
    OFFERED = "offered"
    ACCEPTED = "accepted"
    # The final claim is paid with its reports.
    COMPLETE = "complete"
    # The final claim or its reports did not come in time.
    LAPSED = "lapsed"
    WITHDRAWN = "withdrawn"


class ClaimState(StrEnum):
    SUBMITTED = "submitted"
    # One operator has accepted it; a second has to release the money.
    DECIDED = "decided"
    PAID = "paid"
    # Came too late: its days cannot be claimed again.
    LAPSED = "lapsed"
    # Refused by a person: its days and invoices may be claimed again.
    REJECTED = "rejected"


OPEN_CLAIMS = (ClaimState.SUBMITTED, ClaimState.DECIDED)


@dataclass(frozen=True, kw_only=True)
class CostLine:
    """A cost that was incurred, invoiced and paid in the period, and the paper that shows it."""

    category: CostCategory
    amount_pence: int
    # Such as the number of the invoice; one paper is claimed once.
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the rule made of a claim. `held_pence`: all that is held after it, what earlier claims left included."""

    claimed_grant_pence: int
    payable_pence: int
    held_pence: int
    over_grant_pence: int
    business_pence: int
    days_after_period_end: int
    code: str
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Claim:
    id: str
    number: int
    period_start: date
    period_end: date
    costs: tuple[CostLine, ...]
    is_final: bool
    state: ClaimState
    submitted_us: int
    submitted_on: date
    decided_us: int | None = None
    decided_by: int | None = None
    decision: Decision | None = None
    decision_reason: str = ""
    paid_us: int | None = None
    paid_by: int | None = None

    @property
    def defrayed_pence(self) -> int:
        return sum(line.amount_pence for line in self.costs)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """An award with all that has happened to it since; the figures are the ledger's."""

    award: Award
    # What the grant was awarded for.
    costs: tuple[Cost, ...]
    state: AgreementState
    retention_rate: str
    project_start: date | None
    project_end: date | None
    accepted_us: int | None
    assistance_confirmed_us: int | None
    assistance_elsewhere_pence: int | None
    final_report: str
    accountant_report: str
    ended_us: int | None
    end_reason: str
    paid_pence: int
    held_pence: int
    restored_pence: int
    recovered_pence: int
    business_paid_pence: int
    claims: tuple[Claim, ...] = ()

    @property
    def first_open_day(self) -> date:
        """No claim but rejected ones has this day of the project or a later one; the final claim needs at least one of them."""
        assert self.project_start is not None, "an accepted agreement has its dates"
        claimed = [claim.period_end for claim in self.claims if claim.state is not ClaimState.REJECTED]
        return max(claimed) + timedelta(days=1) if claimed else self.project_start

    @property
    def award_rate(self) -> Fraction:
        """The grant's part of the eligible costs."""
        return Fraction(self.award.grant_pence, sum(cost.amount_pence for cost in self.costs))

    @property
    def grant_pence(self) -> int:
        """What the grant is after reductions."""
        return self.award.grant_pence - self.restored_pence

    @property
    def left_pence(self) -> int:
        """Promised, and neither paid nor held nor given back."""
        return self.award.grant_pence - self.paid_pence - self.held_pence - self.restored_pence

    @property
    def business_left_pence(self) -> int:
        return self.award.co_investment_pence - self.business_paid_pence


def checked_lines(lines: tuple[CostLine, ...], *, least: int = 1) -> tuple[CostLine, ...]:
    """Raises Refused for too few or too many, amounts out of range, or a line without a paper of its own."""
    if len(lines) < least:
        raise Refused("costs: at least one is needed; only a final claim may have none.", "COSTS_MISSING")
    if len(lines) > COST_LINES_MAX:
        raise Refused(f"costs: at most {COST_LINES_MAX} lines are taken.", "COSTS_INVALID")
    for line in lines:
        checked_amount(f"costs of {line.category}", line.amount_pence)
    checked_amount("the sum of the costs", sum(line.amount_pence for line in lines), least=0)
    papers = [checked_text("evidence", line.evidence, EVIDENCE_CHARACTERS_MAX) for line in lines]
    if len(set(papers)) < len(papers):
        raise Refused("costs: a paper stands there twice; add its amounts up or name its lines.", "EVIDENCE_REPEATED")
    return tuple(
        CostLine(category=line.category, amount_pence=line.amount_pence, evidence=paper)
        for line, paper in zip(lines, papers, strict=True)
    )


def checked_project(start: date, end: date, *, awarded_on: date, start_days_max: int) -> None:
    """Raises Refused unless the project starts on or soon after the day of the award, and ends afterwards."""
    days = (start - awarded_on).days
    if not 0 <= days <= start_days_max:
        raise Refused(
            f"project_start is from the day of the award, {awarded_on.isoformat()}, to {start_days_max} days later.",
            "PROJECT_START_OUT_OF_RANGE",
        )
    check_end(end, earliest=start, start=start)


def check_end(end: date, *, earliest: date, start: date) -> None:
    """Raises Refused unless the project ends on the earliest day or later, and within PROJECT_YEARS_MAX of its start."""
    latest = add_months(start, 12 * PROJECT_YEARS_MAX)
    if not earliest <= end <= latest:
        raise Refused(
            f"project_end is from {earliest.isoformat()} to {latest.isoformat()}, {PROJECT_YEARS_MAX} years after the start.",
            "PROJECT_END_OUT_OF_RANGE",
        )
