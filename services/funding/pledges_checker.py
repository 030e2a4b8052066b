"""Independent check of how pledges were spent: standard library and two JSON documents, nothing of the method itself.

Walks the purchases in their order with its own purses and confirms the promises that co-investors were given.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

Price = tuple[Fraction, int, str]


def check_pledges(given: Mapping[str, Any], certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Every contradiction between the input and the certificate, none if it holds.

    Promises: only supporters pay, nobody more than the pledge, each project exactly its cost, supporters alike to a
    penny unless at their end, always the cheapest project next, nothing affordable left out, the top-up pot kept.
    """
    try:
        return tuple(_problems(given, certificate))
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        return (f"malformed: {type(error).__name__} {error}",)


def _problems(given: Mapping[str, Any], certificate: Mapping[str, Any]) -> Iterator[str]:
    text = json.dumps(given, sort_keys=True, separators=(",", ":"))
    if certificate["input_hash"] != hashlib.sha256(text.encode()).hexdigest():
        yield "the certificate was made from another input"
    costs: Mapping[str, int] = given["projects"]
    purses = {id_: investor["pledge_p"] for id_, investor in given["investors"].items()}
    backers: dict[str, list[str]] = {id_: [] for id_ in costs}
    for id_, investor in given["investors"].items():
        for project in investor["supports"]:
            if project in backers:
                backers[project].append(id_)
    waiting, known = set(costs), {id_: (Fraction(0), cost, id_) for id_, cost in costs.items()}
    pot_p, topping_up = given["top_up_p"], False
    for purchase in certificate["purchases"]:
        id_, payments, top_up_p = purchase["project"], purchase["payments_p"], purchase["top_up_p"]
        if id_ not in waiting:
            yield f"{id_}: bought twice, or not a project"
            return
        if not payments.keys() <= set(backers[id_]):
            yield f"{id_}: somebody pays who did not choose it"
            return
        if sum(payments.values()) + top_up_p != costs[id_] or min([top_up_p, *payments.values()]) < 0:
            yield f"{id_}: the payments are not its cost"
        if not topping_up and _cheapest(waiting, costs, backers, purses, known) is None:
            topping_up = True
        if topping_up:
            yield from _topped_up(purchase, waiting, costs, backers, purses, pot_p)
        else:
            if top_up_p:
                yield f"{id_}: topped up while a project was affordable without"
            if _cheapest(waiting, costs, backers, purses, known) != id_:
                yield f"{id_}: another project was cheaper for its supporters"
            yield from _alike(id_, payments, backers[id_], purses)
        for payer, paid_p in payments.items():
            purses[payer] -= paid_p
            if purses[payer] < 0:
                yield f"{payer}: pays more than the pledge"
        pot_p -= top_up_p
        waiting.remove(id_)
    if pot_p < 0:
        yield "more is topped up than the pot holds"
    left_out = _cheapest(waiting, costs, backers, purses, known)
    if left_out is not None:
        yield f"{left_out}: its supporters could still pay for it"
    if certificate["left_p"] != purses:
        yield "what is left of the pledges does not add up"
    funded = {id_ for id_, reason in certificate["reasons"].items() if reason["code"].startswith("FUNDED")}
    if certificate["reasons"].keys() != costs.keys() or funded != costs.keys() - waiting:
        yield "the reasons do not fit the purchases"


def _cheapest(
    waiting: set[str],
    costs: Mapping[str, int],
    backers: Mapping[str, list[str]],
    purses: Mapping[str, int],
    known: dict[str, Price],
) -> str | None:
    """The next project by price, cost and id; ``known`` prices are lower bounds, as purses only empty."""
    best: Price | None = None
    for id_ in sorted(waiting, key=lambda each: known[each]):
        if best is not None and known[id_] >= best:
            break
        price = _price(costs[id_], [purses[backer] for backer in backers[id_]])
        if price is None:
            continue
        known[id_] = (price, costs[id_], id_)
        best = known[id_] if best is None else min(best, known[id_])
    return None if best is None else best[2]


def _price(cost_p: int, purses: list[int]) -> Fraction | None:
    """Least share ``r`` with ``sum(min(purse, r x cost)) = cost``: settle who is at their end until nobody new is."""
    if sum(purses) < cost_p:
        return None
    spent, open_purses = 0, list(purses)
    while True:
        cap = Fraction(cost_p - spent, len(open_purses))
        ended = [purse for purse in open_purses if purse < cap]
        if not ended:
            return cap / cost_p
        spent += sum(ended)
        open_purses = [purse for purse in open_purses if purse >= cap]


def _alike(id_: str, payments: Mapping[str, int], backers: list[str], purses: Mapping[str, int]) -> Iterator[str]:
    """Supporters pay the same to a penny, less only if that is all they have."""
    highest = max(payments.values(), default=0)
    for backer in backers:
        paid_p = payments.get(backer, 0)
        if paid_p < highest - 1 and paid_p != purses[backer]:
            yield f"{id_}: {backer} pays {paid_p} pence beside {highest} and has more"


def _topped_up(
    purchase: Mapping[str, Any],
    waiting: set[str],
    costs: Mapping[str, int],
    backers: Mapping[str, list[str]],
    purses: Mapping[str, int],
    pot_p: int,
) -> Iterator[str]:
    """Supporters give all they have, and no project with a smaller missing share fits the pot."""
    raised = {id_: sum(purses[backer] for backer in backers[id_]) for id_ in waiting}
    offers = [
        (Fraction(costs[id_] - raised[id_], costs[id_]), costs[id_], id_)
        for id_ in waiting
        if raised[id_] and costs[id_] - raised[id_] <= pot_p
    ]
    id_ = purchase["project"]
    if not offers or min(offers)[2] != id_:
        yield f"{id_}: not next in the order of topping up"
    if sum(purchase["payments_p"].values()) != raised[id_]:
        yield f"{id_}: topped up before its supporters gave all they have"
