"""Independent check of an allocation's certificate: standard library and the two JSON documents, nothing of the solver.

A reader who trusts neither the solver nor the service runs this on the published input and certificate. Every figure
is derived again; the optimum of a portfolio is proven by exhaustion where few applications are in doubt, else bounded
exactly.

Command: ``python services/funding/checker.py FILE``, where the file has ``input`` and ``certificate`` as the fund gives them out;
exit code 0 if the certificate holds, 1 if it does not, 2 if there is none in the file.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from math import lcm
from typing import Any

EXHAUSTION_STEPS_MAX = 400_000
# The first had no limits of enterprises.
FORMATS = ("smdih-allocation-certificate/1", "smdih-allocation-certificate/2")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Outcome of a check: every contradiction found, none if the certificate holds.

    ``proof`` says how good the selection was shown to be without the solver: ``ranking`` (it follows from the order),
    ``exhaustion`` (no selection is better), ``none`` (the documents contradict themselves) or ``bound`` (none is
    better by more than ``gap``, as a share of the objective).
    """

    problems: tuple[str, ...]
    proof: str
    gap: Fraction | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts the certificate."""
        return not self.problems


@dataclass(frozen=True)
class _Case:
    """The documents, opened: applications by id, exact means, who is chosen."""

    call: Mapping[str, Any]
    certificate: Mapping[str, Any]
    by_id: Mapping[str, Mapping[str, Any]]
    mean: Mapping[str, Fraction]
    chosen: frozenset[str]
    # What each enterprise may still be given; none in what was decided before this was a limit.
    rooms: Mapping[str, int]

    @property
    def passing(self) -> list[str]:
        threshold = Fraction(self.call["threshold"])
        return [id_ for id_ in sorted(self.by_id) if self.mean[id_] >= threshold]

    def cost(self, ids: Sequence[str] | frozenset[str] | set[str], pot: str | None = None) -> int:
        return sum(self.by_id[i]["request_p"] for i in ids if pot is None or pot in self.by_id[i]["pots"])

    def of_enterprises(self, ids: Sequence[str] | frozenset[str] | set[str]) -> dict[str, int]:
        """What those with a limit get together."""
        sums: dict[str, int] = {}
        for id_ in ids:
            enterprise = self.by_id[id_].get("enterprise", "")
            if enterprise in self.rooms:
                sums[enterprise] = sums.get(enterprise, 0) + self.by_id[id_]["request_p"]
        return sums

    def score(self, ids: Sequence[str] | frozenset[str] | set[str]) -> Fraction:
        return sum((self.mean[i] * self.by_id[i]["request_p"] for i in ids), Fraction(0))


def check_allocation(given: Mapping[str, Any], certificate: Mapping[str, Any]) -> Verdict:
    """Check a certificate against the input it claims to decide; both as JSON documents.

    A malformed document is a problem in the verdict, not an exception.
    """
    try:
        case = _open(given, certificate)
        problems = [*_identity(given, case), *_limits_kept(case, case.chosen), *_figures(case)]
        if case.call["method"] == "portfolio":
            portfolio_problems, proof, gap = _portfolio(case)
            return Verdict(problems=(*problems, *portfolio_problems), proof=proof, gap=gap)
        return Verdict(problems=(*problems, *_ranking(case)), proof="ranking")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
        return Verdict(problems=(f"malformed: {type(error).__name__} {error}",), proof="none")


def _open(given: Mapping[str, Any], certificate: Mapping[str, Any]) -> _Case:
    by_id = {application["id"]: application for application in given["applications"]}
    chosen = frozenset(certificate["chosen"])
    if len(by_id) != len(given["applications"]) or len(chosen) != len(certificate["chosen"]):
        raise ValueError("an id stands twice")
    if not chosen <= by_id.keys():
        raise ValueError(f"chosen but not among the applications: {sorted(chosen - by_id.keys())}")
    mean = {id_: Fraction(application["mean"]) for id_, application in by_id.items()}
    return _Case(given["call"], certificate, by_id, mean, chosen, _rooms(given["call"], by_id, mean))


def _rooms(
    call: Mapping[str, Any], by_id: Mapping[str, Mapping[str, Any]], mean: Mapping[str, Fraction]
) -> dict[str, int]:
    """The least that the applications of an enterprise leave, among those that reach the threshold."""
    headrooms: dict[str, list[int]] = {}
    for id_, application in by_id.items():
        if application.get("headroom_p") is not None and mean[id_] >= Fraction(call["threshold"]):
            headrooms.setdefault(application["enterprise"], []).append(application["headroom_p"])
    return {enterprise: min(each) for enterprise, each in headrooms.items()}


def _digest(document: object) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _identity(given: Mapping[str, Any], case: _Case) -> Iterator[str]:
    if case.certificate["format"] not in FORMATS:
        yield "the certificate has another format"
    if case.certificate["input_hash"] != _digest(given):
        yield "the certificate was made from another input"
    if (case.certificate["call"], case.certificate["method"]) != (case.call["id"], case.call["method"]):
        yield "the certificate names another call or method"
    if not case.certificate["parameter_version"]:
        yield "the certificate names no parameter version"


def _limits_kept(case: _Case, ids: Sequence[str] | frozenset[str] | set[str]) -> Iterator[str]:
    """Every limit of the call that these applications together would break."""
    total_p = case.cost(ids)
    if total_p > case.call["budget_p"]:
        yield f"{total_p} pence are over the budget of {case.call['budget_p']}"
    for quota in case.call["quotas"]:
        pot, inside_p = quota["pot"], case.cost(ids, quota["pot"])
        if quota["ceiling_p"] is not None and inside_p > quota["ceiling_p"]:
            yield f"{pot} is over its ceiling"
        if quota["floor_p"] is not None and inside_p < quota["floor_p"]:
            yield f"{pot} is below its floor"
        if quota["share_min"] is not None and inside_p < Fraction(quota["share_min"]) * total_p:
            yield f"{pot} is below its smallest share"
        if quota["share_max"] is not None and inside_p > Fraction(quota["share_max"]) * total_p:
            yield f"{pot} is above its largest share"
    for enterprise, pence in sorted(case.of_enterprises(ids).items()):
        if pence > case.rooms[enterprise]:
            yield f"enterprise {enterprise} is over what it may still be given"


def _figures(case: _Case) -> Iterator[str]:
    """Spend, objectives, and one fitting reason for every application."""
    certificate, total_p = case.certificate, case.cost(case.chosen)
    spend = certificate["spend_p"]
    if (spend["total"], spend["left"]) != (total_p, case.call["budget_p"] - total_p):
        yield "the money spent or left is not the sum of the awards"
    pots = {pot for id_ in case.chosen for pot in case.by_id[id_]["pots"]} | {q["pot"] for q in case.call["quotas"]}
    if spend["pots"] != {pot: case.cost(case.chosen, pot) for pot in pots}:
        yield "the spend per pot is not the sum of its awards"
    objective, ids = certificate["objective"], sorted(case.by_id)
    if Fraction(objective["score_pence"]) != case.score(case.chosen):
        yield "the objective is not the sum of mean x pence"
    if objective["firms"] != len({case.by_id[id_]["firm"] for id_ in case.chosen}):
        yield "the number of firms is wrong"
    if objective["id_positions"] != sum(number for number, id_ in enumerate(ids, start=1) if id_ in case.chosen):
        yield "the sum of id positions is wrong"
    if sorted(certificate["reasons"]) != ids:
        yield "not every application has one reason"
        return
    threshold = Fraction(case.call["threshold"])
    for id_ in ids:
        code = certificate["reasons"][id_]["code"]
        if (code == "FUNDED") != (id_ in case.chosen) or (code == "BELOW_THRESHOLD") != (case.mean[id_] < threshold):
            yield f"{id_}: {code} does not fit"


def _ranking(case: _Case) -> Iterator[str]:
    """In rank order each application is judged by the awards above it; in stop mode the first refusal ends the list."""

    def rank(id_: str) -> tuple[Fraction, int, datetime, str]:
        application = case.by_id[id_]
        return -case.mean[id_], application["request_p"], datetime.fromisoformat(application["submitted_at"]), id_

    above: list[str] = []
    ended = False
    for id_ in sorted(case.passing, key=rank):
        because = "RANKED_BELOW_LINE" if ended else _kept_out(case, above, id_)
        fits = because is None
        code = case.certificate["reasons"].get(id_, {}).get("code")
        if fits != (id_ in case.chosen):
            yield f"{id_}: {'fits at its rank and is not funded' if fits else 'is funded and does not fit at its rank'}"
        elif not fits and code != because:
            yield f"{id_}: {code} where {because} is the reason"
        if id_ in case.chosen:
            above.append(id_)
        # There is money for those below one whose enterprise may not be given more.
        ended = ended or (because not in (None, "MFA_LIMIT") and case.call["method"] == "top_down_stop")


def _kept_out(case: _Case, above: Sequence[str], id_: str) -> str | None:
    """The first limit that an application breaks at its rank."""
    ids = [*above, id_]
    if case.cost(ids) > case.call["budget_p"]:
        return "ASKS_MORE_THAN_LEFT"
    for quota in case.call["quotas"]:
        inside = quota["pot"] in case.by_id[id_]["pots"]
        if inside and quota["ceiling_p"] is not None and case.cost(ids, quota["pot"]) > quota["ceiling_p"]:
            return "OVER_CEILING"
    enterprise = case.by_id[id_].get("enterprise", "")
    if enterprise in case.rooms and case.of_enterprises(ids)[enterprise] > case.rooms[enterprise]:
        return "MFA_LIMIT"
    return None


def _portfolio(case: _Case) -> tuple[list[str], str, Fraction | None]:
    """Threshold, bound and refusals, the quality of the proof, and the gap it leaves."""
    problems = [f"{id_}: funded below the threshold" for id_ in sorted(case.chosen - set(case.passing))]
    score, bound = case.score(case.chosen), Fraction(case.certificate["bound"])
    if bound != score:
        problems.append("the claimed bound is not the objective: no optimum is claimed")
    problems += _refusals(case)
    derived, worths, rows = _derived_bound(case)
    if score > derived:
        problems.append("the objective is above what the multipliers allow")
        return problems, "none", None
    gap = derived - score
    better = _exhaust(worths, rows, gap)
    if better is None:
        return problems, "bound", gap / score if score else Fraction(0)
    if better:
        problems.append("a better selection exists")
    return problems, "exhaustion", Fraction(0)


def _refusals(case: _Case) -> Iterator[str]:
    """Each refused application must break the kind of limit its reason names if it is added."""
    breaks: Mapping[str, Callable[[str], bool]] = {
        "ASKS_MORE_THAN_LEFT": lambda problem: "budget" in problem,
        "OVER_CEILING": lambda problem: "ceiling" in problem,
        "BREAKS_SHARE": lambda problem: "share" in problem,
        "MFA_LIMIT": lambda problem: problem.startswith("enterprise "),
    }
    for id_ in case.passing:
        code = case.certificate["reasons"].get(id_, {}).get("code")
        if id_ in case.chosen or (code == "ADDS_NOTHING" and case.mean[id_] == 0):
            continue
        kind = breaks.get(code)
        if kind is None or not any(kind(problem) for problem in _limits_kept(case, case.chosen | {id_})):
            yield f"{id_}: {code} is not what keeps it out"


Row = tuple[dict[str, int], int, Fraction]


def _derived_bound(case: _Case) -> tuple[Fraction, dict[str, Fraction], list[Row]]:
    """Bound of every selection from the certificate's prices of the limits, whatever their origin.

    With ``sum(a x) <= b`` and a price ``p >= 0``, ``sum(w x) <= sum(p b) + sum(max(0, w - p a))``. Limits come budget
    first, then per pot in order: ceiling, floor, smallest share, largest share; then each enterprise that asks for more than
    it may still be given.
    """
    rows: list[tuple[dict[str, int], int]] = []
    ask = {id_: case.by_id[id_]["request_p"] for id_ in case.passing}
    rows.append((ask, case.call["budget_p"]))
    for quota in sorted(case.call["quotas"], key=lambda quota: str(quota["pot"])):
        inside = {id_: amount if quota["pot"] in case.by_id[id_]["pots"] else 0 for id_, amount in ask.items()}
        if quota["ceiling_p"] is not None:
            rows.append((inside, quota["ceiling_p"]))
        if quota["floor_p"] is not None:
            rows.append(({id_: -amount for id_, amount in inside.items()}, -quota["floor_p"]))
        if quota["share_min"] is not None:
            top, under = Fraction(quota["share_min"]).as_integer_ratio()
            rows.append(({id_: top * ask[id_] - under * inside[id_] for id_ in ask}, 0))
        if quota["share_max"] is not None:
            top, under = Fraction(quota["share_max"]).as_integer_ratio()
            rows.append(({id_: under * inside[id_] - top * ask[id_] for id_ in ask}, 0))
    for enterprise, pence in sorted(case.of_enterprises(case.passing).items()):
        if pence > case.rooms[enterprise]:
            theirs = {id_: amount for id_, amount in ask.items() if case.by_id[id_].get("enterprise", "") == enterprise}
            rows.append((theirs, case.rooms[enterprise]))
    prices = [Fraction(price) for price in case.certificate["multipliers"]]
    if len(prices) != len(rows) or any(price < 0 for price in prices):
        raise ValueError("one non-negative multiplier per limit is needed")
    worths = {
        id_: case.mean[id_] * ask[id_]
        - sum((p * use.get(id_, 0) for (use, _), p in zip(rows, prices, strict=True) if p), Fraction(0))
        for id_ in ask
    }
    derived = sum((p * most for (_, most), p in zip(rows, prices, strict=True)), Fraction(0))
    derived += sum((worth for worth in worths.values() if worth > 0), Fraction(0))
    return derived, worths, [(use, most, price) for (use, most), price in zip(rows, prices, strict=True)]


def _exhaust(worths: Mapping[str, Fraction], rows: Sequence[Row], gap: Fraction) -> bool | None:
    """Whether a selection beats the certificate's; None if that takes more than ``EXHAUSTION_STEPS_MAX`` steps.

    Start from all of positive worth; each departure loses its worth against the bound, so only those whose losses stay
    below the gap can lead to something better.
    """
    scale = lcm(gap.denominator, *(w.denominator for w in worths.values()), *(p.denominator for _, _, p in rows))
    whole_gap, prices = int(gap * scale), [int(price * scale) for _, _, price in rows]
    doubtful = sorted((abs(int(worth * scale)), id_) for id_, worth in worths.items() if abs(worth) < gap)
    changes = {
        id_: [(row, -use[id_] if worths[id_] > 0 else use[id_]) for row, (use, _, _) in enumerate(rows) if use.get(id_)]
        for _, id_ in doubtful
    }
    full = [most - sum(use.get(id_, 0) for id_, worth in worths.items() if worth > 0) for use, most, _ in rows]
    stack: list[tuple[int, int, list[int]]] = [(0, 0, full)]
    steps = 0
    while stack:
        first, lost, slack = stack.pop()
        if min(slack) >= 0 and lost + sum(p * left for p, left in zip(prices, slack, strict=True)) < whole_gap:
            return True
        for index in range(first, len(doubtful)):
            loss, id_ = doubtful[index]
            if lost + loss >= whole_gap:
                break
            steps += 1
            if steps > EXHAUSTION_STEPS_MAX:
                return None
            room = slack.copy()
            for row, change in changes[id_]:
                room[row] -= change
            stack.append((index + 1, lost + loss, room))
    return False


def main(arguments: Sequence[str]) -> int:
    """Check one file and say the verdict."""
    if len(arguments) != 1:
        sys.stderr.write("usage: checker.py FILE\n")
        return 2
    try:
        with open(arguments[0], encoding="utf-8") as file:
            document = json.load(file)
        given, certificate = document["input"], document["certificate"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        sys.stderr.write(f"{arguments[0]}: not the documents of an allocation ({type(error).__name__})\n")
        return 2
    verdict = check_allocation(given, certificate)
    for problem in verdict.problems:
        sys.stdout.write(f"{problem}\n")
    gap = "" if verdict.gap is None else f", gap at most {float(verdict.gap):.6%}"
    sys.stdout.write(f"{'holds' if verdict.holds else 'DOES NOT HOLD'}; proof by {verdict.proof}{gap}\n")
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
