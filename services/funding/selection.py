"""What an allocation is about: applications, a call's declared limits, reasons; and the ranking itself (ALLOC-1)."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from typing import Any

from services.funding.rules.exact import InvalidFact, gbp

APPLICATIONS_MAX = 20_000


class Method(StrEnum):
    """How a call spends its budget; declared before it opens."""

    TOP_DOWN_SKIP = "top_down_skip"
    TOP_DOWN_STOP = "top_down_stop"
    PORTFOLIO = "portfolio"


class Reason(StrEnum):
    """Why an application was or was not funded."""

    FUNDED = "FUNDED"
    BELOW_THRESHOLD = "BELOW_THRESHOLD"
    ASKS_MORE_THAN_LEFT = "ASKS_MORE_THAN_LEFT"
    RANKED_BELOW_LINE = "RANKED_BELOW_LINE"
    OVER_CEILING = "OVER_CEILING"
    MFA_LIMIT = "MFA_LIMIT"
    BREAKS_SHARE = "BREAKS_SHARE"
    ADDS_NOTHING = "ADDS_NOTHING"


class AllocationInfeasible(Exception):
    """No selection keeps every floor, ceiling and share that the call declared."""

    REASON = "ALLOCATION_INFEASIBLE"


class AllocationUnproven(Exception):
    """The solver reached its limit before it proved an optimum; nothing may be decided on that."""

    REASON = "ALLOCATION_UNPROVEN"


@dataclass(frozen=True, kw_only=True)
class Application:
    """One assessed application. ``mean`` is the exact mean in percent points; ``pots`` name what it counts towards,
    such as ``region:north-west``, ``size:micro`` or ``first-time``. ``headroom_p`` is what its enterprise may still be given
    as minimal financial assistance, by what this application declares; None: no such limit."""

    id: str
    firm: str
    request_p: int
    mean: Fraction
    submitted_at: datetime
    pots: frozenset[str] = frozenset()
    enterprise: str = ""
    headroom_p: int | None = None


@dataclass(frozen=True, kw_only=True)
class Quota:
    """A limit on what one pot receives: pence, or a share of all money awarded. None: no such limit."""

    pot: str
    floor_p: int | None = None
    ceiling_p: int | None = None
    share_min: Fraction | None = None
    share_max: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a call declared about its money; the threshold in percent points is inclusive."""

    id: str
    budget_p: int
    threshold: Fraction
    method: Method
    quotas: tuple[Quota, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a method chose among the applications at or above the threshold, and its proof.

    ``bound`` is an upper bound of ``sum(mean x pence)``; ``multipliers`` (budget first, then the linear limits in their
    canonical order) let anyone derive a bound of their own; both None for a ranking.
    """

    chosen: frozenset[str]
    reasons: Mapping[str, tuple[Reason, str]]
    bound: Fraction | None = None
    multipliers: tuple[Fraction, ...] | None = None
    tie_break_proven: bool = True


def rank_key(application: Application) -> tuple[Fraction, int, datetime, str]:
    """Highest exact mean first; ties by lower request, earlier submission, id (ALLOC-1)."""
    return -application.mean, application.request_p, application.submitted_at, application.id


def rooms_of(passing: Sequence[Application]) -> dict[str, int]:
    """What each enterprise may still be given: applications of one share it, and where they declare differently the least holds."""
    rooms: dict[str, int] = {}
    for application in passing:
        if application.headroom_p is not None:
            least = rooms.get(application.enterprise, application.headroom_p)
            rooms[application.enterprise] = min(least, application.headroom_p)
    return rooms


def select_top_down(call: Call, passing: Sequence[Application]) -> Selection:
    """Fund in rank order; what does not fit is skipped, or ends the list, as the call declared. Ceilings are kept. What its
    enterprise may not be given is always skipped: there is money for those below it.

    Raises:
        InvalidFact: a floor or a share, which a ranking cannot promise.
    """
    if any(quota.floor_p or quota.share_min is not None or quota.share_max is not None for quota in call.quotas):
        raise InvalidFact("floors and shares need the portfolio method")
    ceilings = {quota.pot: quota.ceiling_p for quota in call.quotas if quota.ceiling_p is not None}
    left_p, room_p, enterprise_p = call.budget_p, dict(ceilings), rooms_of(passing)
    chosen: set[str] = set()
    reasons: dict[str, tuple[Reason, str]] = {}
    stopped_by = None
    for application in passing:
        ask = f"asks for {gbp(application.request_p)}"
        full = sorted(pot for pot in application.pots if room_p.get(pot, left_p) < application.request_p)
        if stopped_by is not None:
            reasons[application.id] = (Reason.RANKED_BELOW_LINE, f"Ranked below {stopped_by}, which ended the list.")
            continue
        if application.request_p > left_p:
            reasons[application.id] = (Reason.ASKS_MORE_THAN_LEFT, f"It {ask}; {gbp(left_p)} was left at its rank.")
        elif full:
            text = f"It {ask}; {gbp(room_p[full[0]])} was left under the ceiling of {full[0]}."
            reasons[application.id] = (Reason.OVER_CEILING, text)
        elif application.request_p > enterprise_p.get(application.enterprise, left_p):
            room = gbp(enterprise_p[application.enterprise])
            text = f"It {ask}; at its rank {room} was left of the assistance that its enterprise may be given."
            reasons[application.id] = (Reason.MFA_LIMIT, text)
            continue
        else:
            reasons[application.id] = (Reason.FUNDED, f"Exact mean {application.mean}; it {ask}.")
            chosen.add(application.id)
            left_p -= application.request_p
            for pot in application.pots & room_p.keys():
                room_p[pot] -= application.request_p
            if application.enterprise in enterprise_p:
                enterprise_p[application.enterprise] -= application.request_p
            continue
        if call.method is Method.TOP_DOWN_STOP:
            stopped_by = application.id
    return Selection(chosen=frozenset(chosen), reasons=reasons)


def allocation_input(call: Call, applications: Sequence[Application]) -> dict[str, Any]:
    """The decision's whole input as JSON in canonical order: the same facts always give the same text.

    Raises:
        InvalidFact: as for ``allocate``.
    """
    if len(applications) > APPLICATIONS_MAX:
        raise InvalidFact(f"{len(applications)} applications; at most {APPLICATIONS_MAX} are decided at once")
    if len({application.id for application in applications}) != len(applications):
        raise InvalidFact("two applications have the same id")
    if any(application.request_p <= 0 for application in applications):
        raise InvalidFact("an application asks for nothing")
    if len({quota.pot for quota in call.quotas}) != len(call.quotas):
        raise InvalidFact("two quotas name the same pot")
    return {
        "call": {
            "id": call.id,
            "budget_p": call.budget_p,
            "threshold": str(call.threshold),
            "method": call.method.value,
            "quotas": [
                {
                    "pot": quota.pot,
                    "floor_p": quota.floor_p,
                    "ceiling_p": quota.ceiling_p,
                    "share_min": None if quota.share_min is None else str(quota.share_min),
                    "share_max": None if quota.share_max is None else str(quota.share_max),
                }
                for quota in sorted(call.quotas, key=lambda quota: quota.pot)
            ],
        },
        "applications": [
            {
                "id": application.id,
                "firm": application.firm,
                "request_p": application.request_p,
                "mean": str(application.mean),
                "submitted_at": application.submitted_at.isoformat(),
                "pots": sorted(application.pots),
                "enterprise": application.enterprise,
                "headroom_p": application.headroom_p,
            }
            for application in sorted(applications, key=lambda application: application.id)
        ],
    }


def input_hash(given: Mapping[str, Any]) -> str:
    """Hash of the canonical input."""
    return hashlib.sha256(json.dumps(given, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
