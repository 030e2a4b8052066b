"""Co-investors' pledges spent by the Method of Equal Shares: nobody's pledge pays for a project it did not choose.

A supporter values a project by its cost. Projects are bought in order of the least share of its cost that any
supporter must pay, supporters paying alike as far as their pledges go; arXiv 2502.11797 gives the guarantee
(justified representation up to one project). The method spends no pledge on what its supporters cannot afford
together, so a call declares how to complete it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from heapq import heapify, heappop, heappush
from typing import Any

from services.funding.rules.exact import InvalidFact, gbp
from services.funding.selection import input_hash

PLEDGES_FORMAT = "smdih-pledges-certificate/1"


class Completion(StrEnum):
    """What happens with projects that their supporters cannot pay alone."""

    NONE = "none"
    TOP_UP = "top_up"


@dataclass(frozen=True, kw_only=True)
class Project:
    """A project and the match it still needs."""

    id: str
    cost_p: int


@dataclass(frozen=True, kw_only=True)
class CoInvestor:
    """A co-investor's whole pledge and the projects it would pay for."""

    id: str
    pledge_p: int
    supports: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class PledgeRules:
    """What the call declared: the completion, and the pot for topping up (0 without one)."""

    call: str
    completion: Completion
    top_up_p: int = 0


class _Purse:
    """What every co-investor has left, in whole pence, and who supports what, in order of ids."""

    def __init__(self, projects: Sequence[Project], investors: Sequence[CoInvestor]) -> None:
        ordered = sorted(investors, key=lambda investor: investor.id)
        self.left_p = {investor.id: investor.pledge_p for investor in ordered}
        self.supporters = {
            project.id: [investor.id for investor in ordered if project.id in investor.supports] for project in projects
        }

    def price(self, project: Project) -> Fraction | None:
        """Least share of the cost such that supporters paying up to it each raise the whole; None if they cannot."""
        cap = self._cap(project)
        return None if cap is None else cap / project.cost_p

    def buy(self, project: Project) -> dict[str, int]:
        """Take equal payments; pence that do not divide fall to the first in order of ids who are not at their end."""
        cap = self._cap(project)
        assert cap is not None, "only an affordable project is bought"
        payments = {id_: min(self.left_p[id_], int(cap)) for id_ in self.supporters[project.id]}
        missing_p = project.cost_p - sum(payments.values())
        for id_, paid_p in payments.items():
            if missing_p and self.left_p[id_] > paid_p:
                payments[id_] += 1
                missing_p -= 1
        return self._pay(payments)

    def raised(self, project: Project) -> int:
        """All that the supporters have left."""
        return sum(self.left_p[id_] for id_ in self.supporters[project.id])

    def take_all(self, project: Project) -> dict[str, int]:
        """Everything the supporters have left."""
        return self._pay({id_: self.left_p[id_] for id_ in self.supporters[project.id]})

    def _cap(self, project: Project) -> Fraction | None:
        """Highest payment of one supporter; those with less pay all they have."""
        missing_p = project.cost_p
        purses = sorted(self.left_p[id_] for id_ in self.supporters[project.id])
        for position, purse_p in enumerate(purses):
            payers = len(purses) - position
            if purse_p * payers >= missing_p:
                return Fraction(missing_p, payers)
            missing_p -= purse_p
        return None

    def _pay(self, payments: Mapping[str, int]) -> dict[str, int]:
        for id_, paid_p in payments.items():
            self.left_p[id_] -= paid_p
        return {id_: paid_p for id_, paid_p in payments.items() if paid_p}


def equal_shares(
    rules: PledgeRules, projects: Sequence[Project], investors: Sequence[CoInvestor], *, parameter_version: str
) -> dict[str, Any]:
    """Spend the pledges; returns the certificate as a JSON document, purchases in their order.

    Raises:
        InvalidFact: double ids, a project without cost, or a top-up pot that the completion does not use.
    """
    given = pledges_input(rules, projects, investors)
    purse = _Purse(projects, investors)
    purchases = list(_buy_affordable(purse, projects))
    bought = {purchase["project"] for purchase in purchases}
    if rules.completion is Completion.TOP_UP:
        rest = [project for project in projects if project.id not in bought]
        purchases += _top_up(purse, rest, rules.top_up_p)
    return {
        "format": PLEDGES_FORMAT,
        "call": rules.call,
        "parameter_version": parameter_version,
        "input_hash": input_hash(given),
        "purchases": purchases,
        "left_p": purse.left_p,
        "reasons": _reasons(purse, projects, purchases),
    }


def _buy_affordable(purse: _Purse, projects: Sequence[Project]) -> list[dict[str, Any]]:
    """Prices only rise as purses empty, so a stale price at the top of the heap is looked up again before it counts."""
    by_id = {project.id: project for project in projects}
    heap = [(Fraction(0), project.cost_p, project.id) for project in projects]
    heapify(heap)
    purchases: list[dict[str, Any]] = []
    while heap:
        stale, cost_p, id_ = heappop(heap)
        price = purse.price(by_id[id_])
        if price is None:
            continue
        if price > stale:
            heappush(heap, (price, cost_p, id_))
            continue
        purchases.append({"project": id_, "payments_p": purse.buy(by_id[id_]), "top_up_p": 0})
    return purchases


def _top_up(purse: _Purse, projects: Sequence[Project], pot_p: int) -> list[dict[str, Any]]:
    """Supporters give all they have left, the pot the rest: least missing share first, then lower cost, then id."""
    waiting, purchases = list(projects), list[dict[str, Any]]()
    while True:
        offers = [
            (Fraction(missing_p, project.cost_p), project.cost_p, project.id, project)
            for project in waiting
            if purse.raised(project) and (missing_p := project.cost_p - purse.raised(project)) <= pot_p
        ]
        if not offers:
            return purchases
        project = min(offers, key=lambda offer: offer[:3])[3]
        payments = purse.take_all(project)
        top_up_p = project.cost_p - sum(payments.values())
        pot_p -= top_up_p
        waiting.remove(project)
        purchases.append({"project": project.id, "payments_p": payments, "top_up_p": top_up_p})


def _reasons(purse: _Purse, projects: Sequence[Project], purchases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    bought = {purchase["project"]: purchase for purchase in purchases}
    reasons = {}
    for project in sorted(projects, key=lambda project: project.id):
        purchase = bought.get(project.id)
        if purchase is not None:
            payers = len(purchase["payments_p"])
            code, text = "FUNDED", f"{payers} co-investors pay {gbp(project.cost_p - purchase['top_up_p'])}."
            if purchase["top_up_p"]:
                code, text = "FUNDED_WITH_TOP_UP", f"{text[:-1]}, the pot {gbp(purchase['top_up_p'])}."
        elif not purse.supporters[project.id]:
            code, text = "NO_SUPPORTER", "No co-investor chose it."
        else:
            left = f"its supporters have {gbp(purse.raised(project))} left"
            code, text = "NOT_AFFORDABLE", f"It needs {gbp(project.cost_p)}; {left}."
        reasons[project.id] = {"code": code, "text": text}
    return reasons


def pledges_input(rules: PledgeRules, projects: Sequence[Project], investors: Sequence[CoInvestor]) -> dict[str, Any]:
    """The whole input as JSON in canonical order.

    Raises:
        InvalidFact: as for ``equal_shares``.
    """
    for name, ids in (
        ("projects", [project.id for project in projects]),
        ("co-investors", [investor.id for investor in investors]),
    ):
        if len(set(ids)) != len(ids):
            raise InvalidFact(f"two {name} have the same id")
    if any(project.cost_p <= 0 for project in projects) or any(investor.pledge_p < 0 for investor in investors):
        raise InvalidFact("a project costs nothing, or a pledge is negative")
    if rules.top_up_p and rules.completion is Completion.NONE:
        raise InvalidFact("a top-up pot needs the top-up completion")
    return {
        "call": rules.call,
        "completion": rules.completion.value,
        "top_up_p": rules.top_up_p,
        "projects": {project.id: project.cost_p for project in projects},
        "investors": {
            investor.id: {"pledge_p": investor.pledge_p, "supports": sorted(investor.supports)}
            for investor in investors
        },
    }
