"""Payment of a claim: lateness, rate, the grant's ceiling and the retention (CLAIM-1 to CLAIM-3)."""

from dataclasses import dataclass
from datetime import date
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.calendar import add_months
from services.funding.rules.exact import gbp, percent, share


@dataclass(frozen=True, kw_only=True)
class ClaimFacts:
    """A claim for costs paid in a period that ended on ``period_end``, and what earlier claims left behind.

    ``held_so_far_p`` is due from earlier claims and not paid. ``iar_received``: the independent accountant's report.
    The period of a final claim ends with the project. ``correct_until``: a claim for the same period came in time and was
    rejected, and one that corrects it is in time up to that day.
    """

    max_grant_p: int
    award_rate: Fraction
    retention_rate: Fraction
    paid_so_far_p: int
    held_so_far_p: int
    defrayed_costs_p: int
    is_final: bool
    final_report_received: bool
    iar_received: bool
    period_end: date
    submitted: date
    correct_until: date | None = None


@dataclass(frozen=True, kw_only=True)
class ClaimDecision:
    """What a claim earns now and later.

    ``claimed_grant_p`` is the rate on the costs, before any limit. ``held_p`` is all that is due but not payable yet,
    what earlier claims left included. ``unpaid_over_grant_p`` is the part of this claim that no limit of the grant
    leaves room for. ``code`` is CLAIM_LATE or CLAIM_EARLY when nothing is accepted; what was held before stays held.
    """

    accepted: bool
    claimed_grant_p: int
    payable_now_p: int
    held_p: int
    unpaid_over_grant_p: int
    days_after_period_end: int
    code: str | None
    reasons: tuple[str, ...]


def payable_before_completion(max_grant_p: int, retention_rate: Fraction) -> int:
    """The part of a grant that may be paid before the project is complete."""
    return share(max_grant_p, 1 - retention_rate)


def decide_claim(claim: ClaimFacts, parameters: ParametersAt) -> ClaimDecision:
    """Judge one claim: paid and held never pass the grant, paid before completion never passes its unretained part.

    Completion is a final claim with the final report and the accountant's report; it releases what was held.
    """
    claimed_p = share(claim.defrayed_costs_p, claim.award_rate)
    days = (claim.submitted - claim.period_end).days
    code, when = timing(
        period_end=claim.period_end,
        submitted=claim.submitted,
        is_final=claim.is_final,
        correct_until=claim.correct_until,
        parameters=parameters,
    )
    if code is not None:
        return ClaimDecision(
            accepted=False,
            claimed_grant_p=claimed_p,
            payable_now_p=0,
            held_p=claim.held_so_far_p,
            unpaid_over_grant_p=0,
            days_after_period_end=days,
            code=code,
            reasons=(when,),
        )
    room_p = max(0, claim.max_grant_p - claim.paid_so_far_p - claim.held_so_far_p)
    due_p = claim.held_so_far_p + min(claimed_p, room_p)
    complete = claim.is_final and claim.final_report_received and claim.iar_received
    ceiling_p = claim.max_grant_p if complete else payable_before_completion(claim.max_grant_p, claim.retention_rate)
    payable_p = min(due_p, max(0, ceiling_p - claim.paid_so_far_p))
    over_p = claimed_p - min(claimed_p, room_p)
    return ClaimDecision(
        accepted=True,
        claimed_grant_p=claimed_p,
        payable_now_p=payable_p,
        held_p=due_p - payable_p,
        unpaid_over_grant_p=over_p,
        days_after_period_end=days,
        code=None,
        reasons=(
            when,
            f"{percent(claim.award_rate)} of {gbp(claim.defrayed_costs_p)}, rounded down, is {gbp(claimed_p)}; "
            f"{gbp(claim.held_so_far_p)} was held before.",
            f"{'On completion' if complete else 'Before completion'} at most {gbp(ceiling_p)} may be paid in all and "
            f"{gbp(claim.paid_so_far_p)} is paid: {gbp(payable_p)} is payable now, {gbp(due_p - payable_p)} is held, "
            f"{gbp(over_p)} is over the grant of {gbp(claim.max_grant_p)}.",
        ),
    )


def timing(
    *, period_end: date, submitted: date, is_final: bool, correct_until: date | None, parameters: ParametersAt
) -> tuple[str | None, str]:
    """Code and sentence on when the claim came: the day of the limit is in; a final claim has months, not days."""
    days = (submitted - period_end).days
    if days < 0:
        return "CLAIM_EARLY", f"Claims are made in arrears; the period ends on {period_end.isoformat()}."
    if is_final:
        months = parameters.whole("claim.final_months_after_end")
        last_day = add_months(period_end, months)
        rule = f"the final claim is due by {last_day.isoformat()}, {months} months after the project's end"
        late = submitted > last_day
    else:
        days_max = parameters.whole("claim.days_after_period_max")
        rule = f"a claim is due within {days_max} days of the period's end"
        late = days > days_max
    if late and correct_until is not None:
        rule = f"{rule}; one that corrects a claim which came in time and was rejected, by {correct_until.isoformat()}"
        late = submitted > correct_until
    if late:
        return "CLAIM_LATE", f"Received on day {days}: {rule}, and the funder need not pay a later one."
    return None, f"Received on day {days}: {rule}."
