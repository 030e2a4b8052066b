"""Business money beside public money: match of a project, programme ratio, adoption grant (MATCH-1 to MATCH-3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.eligibility import is_manufacturer
from services.funding.rules.exact import gbp, percent, rate_text, share


class PledgeKind(StrEnum):
    """What is pledged: money, or goods and time."""

    CASH = "cash"
    IN_KIND = "in_kind"


@dataclass(frozen=True, kw_only=True)
class Pledge:
    """One co-investor's promise towards a project; ``public``: the money comes from a public body."""

    kind: PledgeKind
    public: bool
    amount_p: int
    confirmed: bool


@dataclass(frozen=True, kw_only=True)
class MatchCheck:
    """Confirmed private match against what the grant leaves uncovered; ``code`` is MATCH_SHORTFALL if it falls short.

    ``public_same_costs_p`` is confirmed public money, which is never match and enters the intensity check instead;
    ``public_unconfirmed_p`` would, once confirmed.
    """

    required_p: int
    counted_p: int
    shortfall_p: int
    ok: bool
    public_same_costs_p: int
    public_unconfirmed_p: int
    code: str | None
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FundRatio:
    """Business money per pound of public money; ``ratio`` None while there is no public money."""

    ratio: Fraction | None
    met: bool
    reasons: tuple[str, ...]
    code: None = None


@dataclass(frozen=True, kw_only=True)
class AdoptionGrant:
    """Grant of an adoption call; ``code`` is NOT_MANUFACTURING or NOT_SME when the firm is not eligible."""

    eligible: bool
    grant_p: int
    match_p: int
    code: str | None
    reasons: tuple[str, ...]


def match_check(*, eligible_p: int, grant_p: int, pledges: Sequence[Pledge], in_kind_allowed: bool) -> MatchCheck:
    """Only confirmed private cash counts, and in-kind if the call admits it (MATCH-1)."""
    required_p = max(0, eligible_p - grant_p)
    confirmed = [pledge for pledge in pledges if pledge.confirmed]
    counted_p = sum(
        pledge.amount_p
        for pledge in confirmed
        if not pledge.public and (pledge.kind is PledgeKind.CASH or in_kind_allowed)
    )
    public_p = sum(pledge.amount_p for pledge in confirmed if pledge.public)
    public_unconfirmed_p = sum(pledge.amount_p for pledge in pledges if pledge.public) - public_p
    shortfall_p = max(0, required_p - counted_p)
    reasons = [
        f"{gbp(eligible_p)} less the grant of {gbp(grant_p)} leaves {gbp(required_p)} to match; "
        f"{gbp(counted_p)} counts, {gbp(shortfall_p)} is missing."
    ]
    if public_p:
        reasons.append(f"{gbp(public_p)} is public money: never match, and part of the public money for these costs.")
    return MatchCheck(
        required_p=required_p,
        counted_p=counted_p,
        shortfall_p=shortfall_p,
        ok=shortfall_p == 0,
        public_same_costs_p=public_p,
        public_unconfirmed_p=public_unconfirmed_p,
        code="MATCH_SHORTFALL" if shortfall_p else None,
        reasons=tuple(reasons),
    )


def fund_ratio(*, public_p: int, business_p: int, target: Fraction) -> FundRatio:
    """Whether business money is at least ``target`` times public money, on exact values; nothing asks for nothing."""
    met = business_p >= target * public_p
    return FundRatio(
        ratio=Fraction(business_p, public_p) if public_p else None,
        met=met,
        reasons=(
            f"{gbp(business_p)} of business money beside {gbp(public_p)} of public money "
            f"{'meets' if met else 'misses'} {rate_text(target)} to 1.",
        ),
    )


def adoption_grant(
    *, sic: str, is_sme: bool, eligible_p: int, rate: Fraction, max_grant_p: int, parameters: ParametersAt
) -> AdoptionGrant:
    """The call's rate of cost, rounded down, up to its maximum, for a manufacturer that is an SME (MATCH-3)."""
    if not is_manufacturer(sic, parameters):
        return _no_adoption_grant("NOT_MANUFACTURING", f"SIC {sic} is not manufacturing.")
    if not is_sme:
        return _no_adoption_grant("NOT_SME", "The firm is large.")
    grant_p = min(share(eligible_p, rate), max_grant_p)
    return AdoptionGrant(
        eligible=True,
        grant_p=grant_p,
        match_p=eligible_p - grant_p,
        code=None,
        reasons=(
            f"{percent(rate)} of {gbp(eligible_p)}, rounded down and at most {gbp(max_grant_p)}, is {gbp(grant_p)}.",
        ),
    )


def _no_adoption_grant(code: str, reason: str) -> AdoptionGrant:
    return AdoptionGrant(eligible=False, grant_p=0, match_p=0, code=code, reasons=(reason,))
