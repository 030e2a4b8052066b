"""Minimal financial assistance, and de minimis aid for goods trade in Northern Ireland (MFA-1 to MFA-9)."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

from services.funding.parameters import ParameterTable
from services.funding.rules.calendar import add_months, financial_year_start, rolling_years_start
from services.funding.rules.exact import eur, gbp


class AssistanceKind(StrEnum):
    """Under which rule earlier public money was given."""

    MFA = "MFA"
    SPEI = "SPEI"
    SAFA = "SAFA"
    DE_MINIMIS = "DE_MINIMIS"
    SUBSIDY_SCHEME = "SUBSIDY_SCHEME"
    OTHER = "OTHER"


COUNTS_TOWARDS_MFA = frozenset(
    {AssistanceKind.MFA, AssistanceKind.SPEI, AssistanceKind.SAFA, AssistanceKind.DE_MINIMIS}
)


@dataclass(frozen=True, kw_only=True)
class Assistance:
    """One earlier award: gross cash, or gross cash equivalent for free services, in minor units of the rule."""

    given_on: date
    amount: int
    kind: AssistanceKind
    enterprise: str


@dataclass(frozen=True, kw_only=True)
class AssistanceCheck:
    """A proposed award against the limit of its window.

    ``max_offer`` is how much of the proposal fits in the headroom. ``code`` is MFA_LIMIT or DE_MINIMIS_LIMIT when the
    whole does not. Amounts in pence for MFA, in euro cents for de minimis.
    """

    window_start: date
    counted: int
    total: int
    headroom: int
    allowed: bool
    max_offer: int
    database_entry_required: bool
    code: str | None
    reasons: tuple[str, ...]


def mfa_window_start(award_date: date, table: ParameterTable) -> date:
    """1 April, two financial years before the one of the award (MFA-2)."""
    years = table.at(award_date).whole("mfa.full_financial_years_before")
    return add_months(financial_year_start(award_date), -12 * years)


def mfa_check(
    *,
    award_date: date,
    proposed_p: int,
    history: Sequence[Assistance],
    enterprise_group: AbstractSet[str],
    table: ParameterTable,
) -> AssistanceCheck:
    """Whether the group's assistance in the window with the proposed award stays within the limit (MFA-1 to 4, 6, 7).

    What was given on the first day of the window or on the day of the award counts; later awards do not.
    """
    parameters = table.at(award_date)
    window_start = mfa_window_start(award_date, table)
    counted_p = sum(
        item.amount
        for item in history
        if item.kind in COUNTS_TOWARDS_MFA
        and item.enterprise in enterprise_group
        and window_start <= item.given_on <= award_date
    )
    limit_p, entry_above_p = parameters.whole("mfa.limit_p"), parameters.whole("mfa.no_database_entry_p_max")
    total_p, headroom_p = counted_p + proposed_p, max(0, limit_p - counted_p)
    allowed = total_p <= limit_p
    verdict = (
        f"With {gbp(proposed_p)} the total is {gbp(total_p)}, "
        f"{'within' if allowed else 'over'} the limit of {gbp(limit_p)}; {gbp(headroom_p)} was free before it."
    )
    return AssistanceCheck(
        window_start=window_start,
        counted=counted_p,
        total=total_p,
        headroom=headroom_p,
        allowed=allowed,
        max_offer=min(proposed_p, headroom_p),
        database_entry_required=proposed_p > entry_above_p,
        code=None if allowed else "MFA_LIMIT",
        reasons=(
            f"The group was given {gbp(counted_p)} that counts from {window_start.isoformat()} to "
            f"{award_date.isoformat()}.",
            verdict,
        ),
    )


def ni_de_minimis_check(
    *,
    award_date: date,
    proposed_c: int,
    history: Sequence[Assistance],
    single_undertaking: AbstractSet[str],
    table: ParameterTable,
) -> AssistanceCheck:
    """De minimis aid of a single undertaking over the rolling three years that end on the day of the award (MFA-9)."""
    parameters = table.at(award_date)
    window_start = rolling_years_start(award_date, parameters.whole("ni_de_minimis.rolling_years"))
    counted_c = sum(
        item.amount
        for item in history
        if item.kind is AssistanceKind.DE_MINIMIS
        and item.enterprise in single_undertaking
        and window_start <= item.given_on <= award_date
    )
    limit_c = parameters.whole("ni_de_minimis.limit_c")
    total_c, headroom_c = counted_c + proposed_c, max(0, limit_c - counted_c)
    allowed = total_c <= limit_c
    return AssistanceCheck(
        window_start=window_start,
        counted=counted_c,
        total=total_c,
        headroom=headroom_c,
        allowed=allowed,
        max_offer=min(proposed_c, headroom_c),
        database_entry_required=False,
        code=None if allowed else "DE_MINIMIS_LIMIT",
        reasons=(
            f"{eur(counted_c)} of de minimis aid counts from {window_start.isoformat()} to {award_date.isoformat()}.",
            f"With {eur(proposed_c)} the total is {eur(total_c)}, "
            f"{'within' if allowed else 'over'} the limit of {eur(limit_c)}.",
        ),
    )
