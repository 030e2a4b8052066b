"""Duties before and after a subsidy: entry in the public database (TR-1, MFA-7) and mandatory referral (REF-1)."""

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

from services.funding.parameters import ParametersAt
from services.funding.rules.calendar import add_months
from services.funding.rules.exact import InvalidFact, gbp


class Route(StrEnum):
    """Under which heading of the Subsidy Control Act the money is given."""

    MFA = "MFA"
    SCHEME = "SCHEME"
    STANDALONE = "STANDALONE"


@dataclass(frozen=True, kw_only=True)
class DatabaseEntry:
    """Whether the award needs its own entry, and its last day (None if none is needed or nothing is confirmed yet)."""

    database_entry_required: bool
    entry_due_by: date | None
    reasons: tuple[str, ...]
    code: None = None


@dataclass(frozen=True, kw_only=True)
class Referral:
    """Whether the subsidy must go to the Subsidy Advice Unit before it is given; ``code`` is REFERRAL_REQUIRED then."""

    required: bool
    threshold_p: int
    cumulated_p: int
    code: str | None
    reasons: tuple[str, ...]


def database_entry(
    *, route: Route, scheme_in_database: bool, amount_p: int, decision_confirmed: date | None, parameters: ParametersAt
) -> DatabaseEntry:
    """Every standalone subsidy is entered; MFA and awards under an entered scheme only above their limits.

    An award under a scheme that is not in the database is entered like a standalone one.
    """
    if route is Route.MFA:
        free_p = parameters.whole("mfa.no_database_entry_p_max")
    elif route is Route.SCHEME and scheme_in_database:
        free_p = parameters.whole("transparency.scheme_award_p_max")
    else:
        free_p = None
    required = free_p is None or amount_p > free_p
    if free_p is None:
        reason = "A subsidy without an entered scheme is always entered."
    else:
        reason = f"{gbp(amount_p)} is {'above' if required else 'not above'} {gbp(free_p)}."
    due = None
    if required and decision_confirmed is not None:
        due = add_months(decision_confirmed, parameters.whole("transparency.months"))
    return DatabaseEntry(database_entry_required=required, entry_due_by=due, reasons=(reason,))


def referral(
    *, amount_p: int, related_p: int = 0, sectors: AbstractSet[str] = frozenset(), parameters: ParametersAt
) -> Referral:
    """Mandatory referral strictly above the threshold of the day, related subsidies included (REF-1).

    Raises:
        InvalidFact: a sector that the rule does not name.
    """
    unknown = sectors - parameters.words("referral.sensitive_sectors")
    if unknown:
        raise InvalidFact(f"not a sensitive sector: {', '.join(sorted(unknown))}")
    name = "referral.mandatory_sensitive_above_p" if sectors else "referral.mandatory_above_p"
    threshold_p, cumulated_p = parameters.whole(name), amount_p + related_p
    required = cumulated_p > threshold_p
    return Referral(
        required=required,
        threshold_p=threshold_p,
        cumulated_p=cumulated_p,
        code="REFERRAL_REQUIRED" if required else None,
        reasons=(
            f"{gbp(cumulated_p)} with related subsidies is {'above' if required else 'not above'} {gbp(threshold_p)}"
            f"{' (' + ', '.join(sorted(sectors)) + ')' if sectors else ''}.",
        ),
    )
