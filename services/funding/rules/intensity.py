"""How much public money a cost may carry: rate by size and category, cumulation, research share (INT-1 to INT-5)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.exact import InvalidFact, fixed_up, gbp, percent, share
from services.funding.rules.size import Size


class Category(StrEnum):
    """Research category of the costs."""

    FEASIBILITY = "feasibility"
    INDUSTRIAL_RESEARCH = "industrial_research"
    EXPERIMENTAL_DEVELOPMENT = "experimental_development"


class Organisation(StrEnum):
    """Kind of applicant: only businesses are capped by size; academics enter their full economic cost."""

    BUSINESS = "business"
    RESEARCH = "research_organisation"
    ACADEMIC = "academic"


@dataclass(frozen=True, kw_only=True)
class CostFacts:
    """Eligible costs of one applicant and the public money already on them.

    ``call_rate`` is the call's own maximum rate, if it has one. Public money for other costs is stated for the record
    only.
    """

    organisation: Organisation
    size: Size | None
    category: Category | None
    eligible_p: int
    other_public_same_costs_p: int = 0
    other_public_other_costs_p: int = 0
    call_rate: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class GrantCap:
    """Highest grant for the costs; ``min_match_p`` is what the grant leaves uncovered (MATCH-1)."""

    max_rate: Fraction
    max_grant_p: int
    min_match_p: int
    reasons: tuple[str, ...]
    code: None = None


@dataclass(frozen=True, kw_only=True)
class GrantRequest:
    """A request against its cap; ``code`` is INTENSITY_EXCEEDED when it is a penny or more over."""

    allowed: bool
    max_grant_p: int
    excess_p: int
    code: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Consortium:
    """Research share of a project, as a rate rounded up, and the sum of the partners' caps.

    ``max_grant_p`` None: a business among the partners states no size or category, so that its cap is not known.
    ``code`` is RESEARCH_SHARE_EXCEEDED when the rounded share passes the call's limit.
    """

    research_share: str
    allowed: bool
    max_grant_p: int | None
    code: str | None
    reasons: tuple[str, ...]


def max_rate(facts: CostFacts, parameters: ParametersAt) -> Fraction:
    """The lawful rate, or the call's if lower: a call never raises a cap (INT-1 to INT-3).

    Raises:
        InvalidFact: a business without size or category.
    """
    if facts.organisation is Organisation.BUSINESS:
        if facts.size is None or facts.category is None:
            raise InvalidFact("a business needs its size and the research category")
        lawful = parameters.exact(f"intensity.{facts.category}.{facts.size}")
    elif facts.organisation is Organisation.ACADEMIC:
        lawful = parameters.exact("intensity.academic")
    else:
        lawful = parameters.exact("intensity.research_organisation")
    return lawful if facts.call_rate is None else min(lawful, facts.call_rate)


def grant_cap(facts: CostFacts, parameters: ParametersAt) -> GrantCap:
    """``floor(rate x eligible) - other public money for the same costs``, never below zero (INT-5, R-ROUND)."""
    rate = max_rate(facts, parameters)
    public_p = share(facts.eligible_p, rate)
    grant_p = max(0, public_p - facts.other_public_same_costs_p)
    reasons = [f"{percent(rate)} of {gbp(facts.eligible_p)}, rounded down to the penny, is {gbp(public_p)}."]
    if facts.other_public_same_costs_p:
        reasons.append(
            f"{gbp(facts.other_public_same_costs_p)} of public money is already given for the same costs; "
            f"{gbp(grant_p)} is left."
        )
    if facts.other_public_other_costs_p:
        reasons.append(f"{gbp(facts.other_public_other_costs_p)} of public money for other costs does not count.")
    return GrantCap(max_rate=rate, max_grant_p=grant_p, min_match_p=facts.eligible_p - grant_p, reasons=tuple(reasons))


def grant_request(facts: CostFacts, requested_p: int, parameters: ParametersAt) -> GrantRequest:
    """Whether a request stays within the cap; equal is allowed."""
    cap = grant_cap(facts, parameters)
    excess_p = max(0, requested_p - cap.max_grant_p)
    verdict = (
        f"{gbp(requested_p)} is {gbp(excess_p)} over the cap of {gbp(cap.max_grant_p)}."
        if excess_p
        else f"{gbp(requested_p)} is within the cap of {gbp(cap.max_grant_p)}."
    )
    return GrantRequest(
        allowed=excess_p == 0,
        max_grant_p=cap.max_grant_p,
        excess_p=excess_p,
        code="INTENSITY_EXCEEDED" if excess_p else None,
        reasons=(*cap.reasons, verdict),
    )


def consortium(partners: Sequence[CostFacts], research_share_max: Fraction, parameters: ParametersAt) -> Consortium:
    """Research partners' share of all eligible costs, rounded up to two decimals, against the limit (INT-4).

    A limit above 1 is in percent points and so is the answer; else both are rates. Without costs the share is zero.
    """
    total_p = sum(partner.eligible_p for partner in partners)
    research_p = sum(p.eligible_p for p in partners if p.organisation is not Organisation.BUSINESS)
    unit = 100 if research_share_max > 1 else 1
    rounded = fixed_up(Fraction(research_p * unit, total_p) if total_p else Fraction(0))
    allowed = Fraction(rounded) <= research_share_max
    known = all(
        partner.organisation is not Organisation.BUSINESS or (partner.size and partner.category) for partner in partners
    )
    caps = [grant_cap(partner, parameters) for partner in partners] if known else []
    limit = percent(research_share_max / unit)
    return Consortium(
        research_share=rounded,
        allowed=allowed,
        max_grant_p=sum(cap.max_grant_p for cap in caps) if known else None,
        code=None if allowed else "RESEARCH_SHARE_EXCEEDED",
        reasons=(
            f"Research partners hold {gbp(research_p)} of {gbp(total_p)}: {percent(Fraction(rounded) / unit)}, "
            f"rounded up, {'within' if allowed else 'over'} the limit of {limit}.",
            *(reason for cap in caps for reason in cap.reasons),
        ),
    )
