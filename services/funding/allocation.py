"""Who is funded from a call's budget, with a certificate that anyone can check.

``allocate`` ranks top-down by exact mean, or solves the portfolio that the call declared (``pledges`` spends
co-investors' money). Everything is exact: pence and fractions, canonical input order, and the same answer every time.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from services.funding.rules.exact import fixed_down
from services.funding.selection import (
    AllocationInfeasible,
    AllocationUnproven,
    Application,
    Call,
    Method,
    Quota,
    Reason,
    Selection,
    allocation_input,
    input_hash,
    rank_key,
    select_top_down,
)

__all__ = [
    "AllocationInfeasible",
    "AllocationUnproven",
    "Application",
    "Call",
    "Method",
    "Quota",
    "Reason",
    "allocate",
    "allocation_input",
    "input_hash",
]

CERTIFICATE_FORMAT = "smdih-allocation-certificate/2"


def allocate(call: Call, applications: Sequence[Application], *, parameter_version: str) -> dict[str, Any]:
    """Decide a call; returns the certificate as a JSON document.

    Raises:
        InvalidFact: double ids, a request of nothing, more than ``APPLICATIONS_MAX``, or limits the method cannot keep.
        AllocationInfeasible: the declared portfolio cannot be met.
        AllocationUnproven: the solver stopped at its limit without a proof.
    """
    given = allocation_input(call, applications)
    ranked = sorted(applications, key=rank_key)
    passing = [application for application in ranked if application.mean >= call.threshold]
    selection = _select(call, passing)
    reasons = dict(selection.reasons)
    for application in ranked:
        if application.mean < call.threshold:
            text = f"The exact mean {application.mean} is below the threshold of {fixed_down(call.threshold)}."
            reasons[application.id] = (Reason.BELOW_THRESHOLD, text)
    funded = [application for application in ranked if application.id in selection.chosen]
    assert reasons.keys() == {application.id for application in applications}, "one reason for every application"
    return {
        "format": CERTIFICATE_FORMAT,
        "call": call.id,
        "method": call.method.value,
        "parameter_version": parameter_version,
        "input_hash": input_hash(given),
        "chosen": sorted(selection.chosen),
        "objective": _objective(funded, ranked),
        "bound": None if selection.bound is None else str(selection.bound),
        "multipliers": None if selection.multipliers is None else [str(each) for each in selection.multipliers],
        "tie_break_proven": selection.tie_break_proven,
        "spend_p": _spend(call, funded),
        "reasons": {id_: {"code": code.value, "text": text} for id_, (code, text) in sorted(reasons.items())},
    }


def _select(call: Call, passing: Sequence[Application]) -> Selection:
    if call.method is not Method.PORTFOLIO:
        return select_top_down(call, passing)
    # Here, because the solver's library takes a second to load and a ranking does without it.
    from services.funding.portfolio import select_portfolio

    return select_portfolio(call, passing)


def _objective(funded: Sequence[Application], every: Sequence[Application]) -> dict[str, Any]:
    """The three objectives in their order; ids are counted by their position among all ids, from 1."""
    position = {id_: number for number, id_ in enumerate(sorted(application.id for application in every), start=1)}
    return {
        "score_pence": str(sum((application.mean * application.request_p for application in funded), Fraction(0))),
        "firms": len({application.firm for application in funded}),
        "id_positions": sum(position[application.id] for application in funded),
    }


def _spend(call: Call, funded: Sequence[Application]) -> dict[str, Any]:
    pots = {quota.pot for quota in call.quotas}.union(*(application.pots for application in funded))
    total_p = sum(application.request_p for application in funded)
    by_pot = {pot: sum(each.request_p for each in funded if pot in each.pots) for pot in sorted(pots)}
    return {"total": total_p, "left": call.budget_p - total_p, "pots": by_pot}
