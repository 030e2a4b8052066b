"""Eligible cost of labour, overhead and capital usage (COST-1), each rounded down to the penny (R-ROUND)."""

from dataclasses import dataclass
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.exact import InvalidFact, gbp, percent, share


@dataclass(frozen=True, kw_only=True)
class Cost:
    """An eligible cost with its arithmetic."""

    eligible_p: int
    reasons: tuple[str, ...]
    code: None = None


def labour(*, gross_yearly_p: int, working_days: int, days: Fraction) -> Cost:
    """Gross yearly cost of a person / working days in the year x days on the project; nothing without working days.

    Raises:
        InvalidFact: more days on the project than working days.
    """
    if working_days == 0:
        return Cost(eligible_p=0, reasons=("No working days in the year are stated, so no day rate follows.",))
    if days > working_days:
        raise InvalidFact(f"{days} days on the project are more than {working_days} working days")
    eligible_p = share(gross_yearly_p, days / working_days)
    reason = f"{gbp(gross_yearly_p)} over {working_days} working days, for {days} days, is {gbp(eligible_p)}."
    return Cost(eligible_p=eligible_p, reasons=(reason,))


def overhead(*, labour_p: int, parameters: ParametersAt) -> Cost:
    """The default rate on labour."""
    rate = parameters.exact("costs.overhead_rate")
    eligible_p = share(labour_p, rate)
    return Cost(eligible_p=eligible_p, reasons=(f"{percent(rate)} of labour of {gbp(labour_p)} is {gbp(eligible_p)}.",))


def capital_usage(*, value_p: int, residual_p: int, utilisation: Fraction) -> Cost:
    """(value - residual value) x the share of use by the project.

    Raises:
        InvalidFact: used for more than its whole life, or worth more afterwards.
    """
    if utilisation > 1 or residual_p > value_p:
        raise InvalidFact("utilisation is at most 1 and the residual value at most the value")
    eligible_p = share(value_p - residual_p, utilisation)
    reason = f"{percent(utilisation)} of {gbp(value_p)} less {gbp(residual_p)} is {gbp(eligible_p)}."
    return Cost(eligible_p=eligible_p, reasons=(reason,))
