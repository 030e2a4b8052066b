"""Allocation: the answer is the best one, the same every time, and its certificate cannot be bent."""

import ast
import copy
import json
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.funding import checker, pledges_checker
from services.funding.allocation import (
    AllocationInfeasible,
    Application,
    Call,
    Method,
    Quota,
    allocate,
    allocation_input,
)
from services.funding.checker import check_allocation
from services.funding.pledges import CoInvestor, Completion, PledgeRules, Project, equal_shares, pledges_input
from services.funding.pledges_checker import check_pledges
from services.funding.rules.exact import InvalidFact

OPENING = datetime(2026, 3, 1, tzinfo=UTC)


def application(
    number: int,
    request_p: int,
    mean: Fraction | int,
    *pots: str,
    firm: str | None = None,
    headroom: tuple[str, int] | None = None,
) -> Application:
    return Application(
        id=f"A{number:04d}",
        firm=firm or f"F{number:04d}",
        request_p=request_p,
        mean=Fraction(mean),
        submitted_at=OPENING + timedelta(minutes=number),
        pots=frozenset(pots),
        enterprise=headroom[0] if headroom else "",
        headroom_p=headroom[1] if headroom else None,
    )


def call(method: Method, budget_p: int, *quotas: Quota, threshold: int = 70) -> Call:
    return Call(id="C1", budget_p=budget_p, threshold=Fraction(threshold), method=method, quotas=quotas)


def decide(declared: Call, applications: list[Application]) -> dict[str, Any]:
    """Allocate, and let the independent checker confirm it."""
    certificate = allocate(declared, applications, parameter_version="version")
    verdict = check_allocation(allocation_input(declared, applications), certificate)
    assert verdict.holds, verdict.problems
    return certificate


def codes(certificate: dict[str, Any]) -> list[str]:
    return [certificate["reasons"][id_]["code"] for id_ in sorted(certificate["reasons"])]


# Ranking


@pytest.mark.parametrize(("budget_p", "funded"), [(299, 2), (300, 3), (301, 3), (0, 0)])
def test_a_budget_equal_to_the_sum_funds_all(budget_p: int, funded: int) -> None:
    applications = [application(n, 100, 80) for n in range(3)]
    for method in Method:
        assert len(decide(call(method, budget_p), applications)["chosen"]) == funded


@pytest.mark.parametrize(("mean", "code"), [(Fraction(209, 3), "BELOW_THRESHOLD"), (Fraction(70), "FUNDED")])
def test_the_threshold_is_on_the_exact_mean(mean: Fraction, code: str) -> None:
    for method in Method:
        assert codes(decide(call(method, 1_000), [application(1, 100, mean)])) == [code]


def test_ties_go_to_the_lower_request_then_the_earlier_then_the_id() -> None:
    first, second = application(1, 100, 80), application(2, 99, 80)
    assert decide(call(Method.TOP_DOWN_SKIP, 100), [first, second])["chosen"] == ["A0002"]
    late = Application(**{**vars(first), "submitted_at": OPENING + timedelta(days=1)})
    other = Application(**{**vars(second), "request_p": 100})
    assert decide(call(Method.TOP_DOWN_SKIP, 100), [late, other])["chosen"] == ["A0002"]
    same = Application(**{**vars(other), "submitted_at": late.submitted_at})
    assert decide(call(Method.TOP_DOWN_SKIP, 100), [same, late])["chosen"] == ["A0001"]


def test_skipping_and_stopping_differ_and_say_why() -> None:
    applications = [application(1, 60, 90), application(2, 50, 85), application(3, 40, 80), application(4, 1, 60)]
    skip = decide(call(Method.TOP_DOWN_SKIP, 100), applications)
    assert codes(skip) == ["FUNDED", "ASKS_MORE_THAN_LEFT", "FUNDED", "BELOW_THRESHOLD"]
    stop = decide(call(Method.TOP_DOWN_STOP, 100), applications)
    assert codes(stop) == ["FUNDED", "ASKS_MORE_THAN_LEFT", "RANKED_BELOW_LINE", "BELOW_THRESHOLD"]


@pytest.mark.parametrize(("ceiling_p", "code"), [(199, "OVER_CEILING"), (200, "FUNDED"), (201, "FUNDED")])
def test_a_ranking_keeps_ceilings(ceiling_p: int, code: str) -> None:
    applications = [application(1, 100, 90, "region:wales"), application(2, 100, 80, "region:wales")]
    declared = call(Method.TOP_DOWN_SKIP, 1_000, Quota(pot="region:wales", ceiling_p=ceiling_p))
    assert codes(decide(declared, applications)) == ["FUNDED", code]


def test_applications_of_one_enterprise_share_what_it_may_still_be_given() -> None:
    """The second would be refused at its award, when others have been rejected for want of money."""
    applications = [
        application(1, 60, 90, headroom=("kin", 100)),
        application(2, 60, 88, headroom=("kin", 110)),
        application(3, 50, 85),
        application(4, 40, 80, headroom=("kin", 100)),
        application(5, 100, 75),
    ]
    skip = decide(call(Method.TOP_DOWN_SKIP, 250), applications)
    assert codes(skip) == ["FUNDED", "MFA_LIMIT", "FUNDED", "FUNDED", "FUNDED"]
    assert "GBP 0.40 was left of the assistance" in skip["reasons"]["A0002"]["text"]
    # It ends no list: there is money for those below it.
    stop = decide(call(Method.TOP_DOWN_STOP, 249), applications)
    assert codes(stop) == ["FUNDED", "MFA_LIMIT", "FUNDED", "FUNDED", "ASKS_MORE_THAN_LEFT"]
    best = decide(call(Method.PORTFOLIO, 1_000), applications)
    assert codes(best) == ["FUNDED", "MFA_LIMIT", "FUNDED", "FUNDED", "FUNDED"]
    # Where they declare differently the least holds, to the penny.
    two = [application(1, 50, 90, headroom=("kin", 101)), application(2, 51, 80, headroom=("kin", 100))]
    for method in Method:
        certificate = decide(call(method, 1_000), two)
        assert codes(certificate) == ["FUNDED", "MFA_LIMIT"]
        bent = {**certificate, "chosen": ["A0001", "A0002"]}
        problems = check_allocation(allocation_input(call(method, 1_000), two), bent).problems
        assert "enterprise kin is over what it may still be given" in problems


def test_a_ranking_cannot_promise_a_floor() -> None:
    with pytest.raises(InvalidFact):
        decide(call(Method.TOP_DOWN_SKIP, 1, Quota(pot="x", floor_p=1)), [])


# Portfolio


def test_a_portfolio_keeps_floors_shares_and_ceilings() -> None:
    applications = [
        application(1, 100, 90, "region:wales"),
        application(2, 100, 89, "region:wales"),
        application(3, 100, 71, "region:north", "size:micro"),
        application(4, 100, 72, "region:north"),
    ]
    floor = call(Method.PORTFOLIO, 200, Quota(pot="region:north", floor_p=100))
    assert decide(floor, applications)["chosen"] == ["A0001", "A0004"]
    ceiling = call(Method.PORTFOLIO, 200, Quota(pot="region:wales", ceiling_p=199))
    assert decide(ceiling, applications)["chosen"] == ["A0001", "A0004"]
    share = call(Method.PORTFOLIO, 200, Quota(pot="size:micro", share_min=Fraction(1, 2)))
    assert decide(share, applications)["chosen"] == ["A0001", "A0003"]
    most = call(Method.PORTFOLIO, 400, Quota(pot="region:wales", share_max=Fraction(1, 3)))
    assert decide(most, applications)["chosen"] == ["A0001", "A0003", "A0004"]


def test_equal_scores_prefer_more_firms_then_lower_ids() -> None:
    applications = [
        application(1, 100, 80, firm="one"),
        application(2, 100, 80, firm="one"),
        application(3, 100, 80, firm="two"),
        application(4, 100, 80, firm="three"),
    ]
    certificate = decide(call(Method.PORTFOLIO, 200), applications)
    assert (certificate["chosen"], certificate["objective"]["firms"]) == (["A0001", "A0003"], 2)


def test_many_equal_applications_are_settled_by_their_ids() -> None:
    applications = [application(n, 2_000_000, 80) for n in range(200)]
    certificate = decide(call(Method.PORTFOLIO, 100_000_000), applications)
    assert certificate["chosen"] == [f"A{n:04d}" for n in range(50)]
    assert certificate["tie_break_proven"] is True


def test_a_score_counts_by_the_money_it_moves_and_not_by_the_head() -> None:
    applications = [application(1, 1_000, 90), *(application(n, 100, 71) for n in range(2, 11))]
    assert decide(call(Method.PORTFOLIO, 1_000), applications)["chosen"] == ["A0001"]


def test_a_floor_beyond_the_demand_is_named() -> None:
    declared = call(Method.PORTFOLIO, 1_000, Quota(pot="region:wales", floor_p=101))
    with pytest.raises(AllocationInfeasible, match="region:wales"):
        decide(declared, [application(1, 100, 90, "region:wales")])


def test_an_empty_call_decides_nothing() -> None:
    for method in Method:
        assert decide(call(method, 100), [])["chosen"] == []


@pytest.mark.parametrize(
    "applications",
    [[application(1, 1, 80), application(1, 2, 80)], [application(1, 0, 80)]],
)
def test_bad_applications_are_refused(applications: list[Application]) -> None:
    with pytest.raises(InvalidFact):
        decide(call(Method.PORTFOLIO, 1), applications)


small_applications = st.lists(
    st.tuples(
        st.integers(1, 12),
        st.fractions(60, 100, max_denominator=5),
        st.sampled_from([(), ("region:wales",), ("size:micro",), ("region:wales", "size:micro")]),
        st.integers(0, 4),
        st.none() | st.integers(3, 25),
    ),
    max_size=8,
).map(
    lambda rows: [
        application(n, p, m, *pots, firm=f"F{f}", headroom=None if room is None else (f"E{f // 2}", room))
        for n, (p, m, pots, f, room) in enumerate(rows)
    ]
)


def shared_rooms_kept(passing: list[Application], chosen: list[Application]) -> bool:
    limited = [each for each in passing if each.headroom_p is not None]
    return all(
        sum(other.request_p for other in chosen if other.enterprise == each.enterprise) <= (each.headroom_p or 0)
        for each in limited
    )


@settings(max_examples=60)
@given(
    applications=small_applications,
    budget_p=st.integers(0, 60),
    floor_p=st.integers(0, 6),
    ceiling_p=st.integers(6, 40),
    share_min=st.fractions(0, Fraction(1, 2), max_denominator=4),
)
def test_no_selection_of_a_small_call_is_better(
    applications: list[Application], budget_p: int, floor_p: int, ceiling_p: int, share_min: Fraction
) -> None:
    """Against every selection there is, in all three objectives."""
    quotas = (
        Quota(pot="region:wales", floor_p=floor_p, ceiling_p=ceiling_p),
        Quota(pot="size:micro", share_min=share_min),
    )
    declared = call(Method.PORTFOLIO, budget_p, *quotas)
    passing = [each for each in applications if each.mean >= 70]
    best: tuple[Fraction, int, int] | None = None
    for taken in product((False, True), repeat=len(passing)):
        chosen = [each for each, take in zip(passing, taken, strict=True) if take]
        total_p = sum(each.request_p for each in chosen)
        wales_p = sum(each.request_p for each in chosen if "region:wales" in each.pots)
        micro_p = sum(each.request_p for each in chosen if "size:micro" in each.pots)
        rooms_kept = shared_rooms_kept(passing, chosen)
        if rooms_kept and total_p <= budget_p and floor_p <= wales_p <= ceiling_p and micro_p >= share_min * total_p:
            score = sum((each.mean * each.request_p for each in chosen), Fraction(0))
            positions = sum(applications.index(each) + 1 for each in chosen)
            value = (score, len({each.firm for each in chosen}), -positions)
            best = value if best is None else max(best, value)
    if best is None:
        with pytest.raises(AllocationInfeasible):
            decide(declared, applications)
        return
    objective = decide(declared, applications)["objective"]
    assert (Fraction(objective["score_pence"]), objective["firms"], -objective["id_positions"]) == best


@settings(max_examples=60)
@given(applications=small_applications, budget_p=st.integers(0, 60), seed=st.integers(0, 99))
def test_the_order_of_the_input_never_matters(applications: list[Application], budget_p: int, seed: int) -> None:
    shuffled = random.Random(seed).sample(applications, len(applications))
    for method in Method:
        declared = call(method, budget_p)
        assert decide(declared, applications) == decide(declared, shuffled)


def large_call(count: int, seed: int = 3) -> tuple[Call, list[Application]]:
    """Requests to the penny, three to five assessors, twelve regions with floors and ceilings, two shares."""
    chance = random.Random(seed)
    regions = [f"region:{number:02d}" for number in range(12)]
    applications = []
    for number in range(count):
        assessors, quality = chance.choice([3, 4, 5]), chance.gauss(68, 12)
        scores = [max(0, min(100, round(chance.gauss(quality, 6)))) for _ in range(assessors)]
        pots = [chance.choice(regions), "size:" + chance.choice(["micro", "small", "medium"])]
        pots += ["first-time"] if chance.random() < 0.5 else []
        request_p = chance.randint(500_000, 24_500_000)
        applications.append(application(number, request_p, Fraction(sum(scores), assessors), *pots))
    budget_p = 2_000_000 * count
    quotas = [Quota(pot=pot, floor_p=budget_p // 20, ceiling_p=budget_p // 9) for pot in regions]
    quotas.append(Quota(pot="size:micro", share_min=Fraction("0.35")))
    quotas.append(Quota(pot="first-time", share_min=Fraction("0.45")))
    return call(Method.PORTFOLIO, budget_p, *quotas), applications


def test_a_thousand_applications_are_decided_to_the_penny_and_repeat_bit_for_bit() -> None:
    declared, applications = large_call(1_000)
    started = time.process_time()
    certificate = decide(declared, applications)
    assert time.process_time() - started < 20, "a few seconds are usual; the benchmark holds the tight limit"
    assert certificate["bound"] == certificate["objective"]["score_pence"]
    assert certificate["tie_break_proven"] is True
    assert json.dumps(certificate) == json.dumps(decide(declared, applications[::-1]))


# The checker


def test_the_checkers_share_no_code_with_what_they_check() -> None:
    for module in (checker, pledges_checker):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = [
            name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        ]
        assert not [name for name in names if name.split(".")[0] in {"services", "ortools"}]


def test_a_small_portfolio_is_proven_by_exhaustion_and_a_large_one_bounded() -> None:
    for count, proof in ((12, "exhaustion"), (1_000, "bound")):
        declared, applications = (
            large_call(count) if count > 100 else (call(Method.PORTFOLIO, 60_000_000), large_call(30)[1])
        )
        certificate = allocate(declared, applications, parameter_version="version")
        verdict = check_allocation(allocation_input(declared, applications), certificate)
        assert (verdict.holds, verdict.proof) == (True, proof)
        assert verdict.gap is not None
        assert verdict.gap < Fraction(1, 1_000)


def change(path: str, to: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(certificate: dict[str, Any]) -> None:
        *outer, last = path.split("/")
        place = certificate
        for name in outer:
            place = place[name]
        place[last] = to(place[last])

    return apply


def drop_one(certificate: dict[str, Any]) -> None:
    """Leave the first award out and make every figure fit again."""
    rebuilt(certificate, certificate["chosen"][1:])


def swap_one(certificate: dict[str, Any]) -> None:
    """Replace an award by the cheapest refused application."""
    refused = [
        id_
        for id_ in certificate["reasons"]
        if certificate["reasons"][id_]["code"] not in ("FUNDED", "BELOW_THRESHOLD")
    ]
    cheapest = min(refused, key=lambda id_: BY_ID[id_].request_p)
    dearer = next(id_ for id_ in certificate["chosen"] if BY_ID[id_].request_p > BY_ID[cheapest].request_p)
    rebuilt(certificate, sorted({*certificate["chosen"], cheapest} - {dearer}))


DECLARED, APPLICATIONS = call(Method.PORTFOLIO, 60_000_000), large_call(30)[1]
BY_ID = {each.id: each for each in APPLICATIONS}


def rebuilt(certificate: dict[str, Any], chosen: list[str]) -> None:
    funded = [BY_ID[id_] for id_ in chosen]
    total_p = sum(each.request_p for each in funded)
    score = sum((each.mean * each.request_p for each in funded), Fraction(0))
    pots = {pot for each in funded for pot in each.pots}
    certificate["chosen"] = chosen
    certificate["objective"] = {
        "score_pence": str(score),
        "firms": len(funded),
        "id_positions": sum(int(each.id[1:]) + 1 for each in funded),
    }
    certificate["bound"] = str(score)
    by_pot = {pot: sum(each.request_p for each in funded if pot in each.pots) for pot in pots}
    certificate["spend_p"] = {"total": total_p, "left": DECLARED.budget_p - total_p, "pots": by_pot}
    for id_, reason in certificate["reasons"].items():
        if reason["code"] != "BELOW_THRESHOLD":
            reason["code"] = "FUNDED" if id_ in chosen else "ASKS_MORE_THAN_LEFT"


TAMPERINGS = {
    "format": change("format", lambda _: "other/1"),
    "input hash": change("input_hash", lambda text: text[::-1]),
    "method": change("method", lambda _: "top_down_skip"),
    "call": change("call", lambda _: "C2"),
    "parameter version": change("parameter_version", lambda _: ""),
    "one award less": change("chosen", lambda ids: ids[1:]),
    "an award twice": change("chosen", lambda ids: [ids[0], *ids]),
    "an unknown award": change("chosen", lambda ids: [*ids, "A9999"]),
    "everything awarded": change("chosen", lambda _: sorted(BY_ID)),
    "objective": change("objective/score_pence", lambda text: str(Fraction(text) + 1)),
    "firms": change("objective/firms", lambda count: count + 1),
    "id positions": change("objective/id_positions", lambda total: total - 1),
    "bound above": change("bound", lambda text: str(Fraction(text) + 1)),
    "bound missing": change("bound", lambda _: None),
    "spend": change("spend_p/total", lambda pence: pence - 1),
    "left": change("spend_p/left", lambda pence: pence + 1),
    "pots": change("spend_p/pots", lambda pots: {**pots, "first-time": 1}),
    "a reason less": change("reasons", lambda reasons: dict(list(reasons.items())[1:])),
    "reasons gone": change("reasons", lambda _: {}),
    "all funded": change("reasons", lambda reasons: {id_: {"code": "FUNDED"} for id_ in reasons}),
    "all over a ceiling": change("reasons", lambda reasons: {id_: {"code": "OVER_CEILING"} for id_ in reasons}),
    "multipliers": change("multipliers", lambda _: ["0"] * 7),
    "negative multipliers": change("multipliers", lambda prices: ["-1" for _ in prices]),
    "a lighter selection with fitting figures": drop_one,
    "another selection with fitting figures": swap_one,
}


@pytest.mark.parametrize("tampering", TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_a_tampered_certificate_is_refused(tampering: Callable[[dict[str, Any]], None]) -> None:
    certificate = decide(DECLARED, APPLICATIONS)
    bent = copy.deepcopy(certificate)
    tampering(bent)
    assert bent != certificate
    assert not check_allocation(allocation_input(DECLARED, APPLICATIONS), bent).holds


@pytest.mark.parametrize("method", [Method.TOP_DOWN_SKIP, Method.TOP_DOWN_STOP])
def test_a_ranking_with_an_award_moved_is_refused(method: Method) -> None:
    declared = call(method, DECLARED.budget_p)
    for tampering in (drop_one, swap_one):
        bent = copy.deepcopy(decide(declared, APPLICATIONS))
        tampering(bent)
        bent["bound"] = None
        assert not check_allocation(allocation_input(declared, APPLICATIONS), bent).holds


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"input": {}}', "not json", "[" * 100_000])
def test_what_is_no_allocation_is_told_in_a_line(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    for path in (file, tmp_path / "none"):
        assert checker.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_changed_input_or_no_document_is_refused() -> None:
    certificate = decide(DECLARED, APPLICATIONS)
    given_input = allocation_input(DECLARED, APPLICATIONS)
    given_input["applications"][0]["request_p"] += 1
    assert not check_allocation(given_input, certificate).holds
    for nonsense in ({}, {"chosen": 1}, {"chosen": None}):
        assert not check_allocation(given_input, nonsense).holds
        assert not check_allocation(nonsense, certificate).holds


# Pledges


def spend(
    costs_p: dict[str, int], investors: dict[str, tuple[int, str]], top_up_p: int | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Input and certificate; an investor is a pledge and the letters of the projects it supports."""
    rules = PledgeRules(
        call="C1", completion=Completion.NONE if top_up_p is None else Completion.TOP_UP, top_up_p=top_up_p or 0
    )
    projects = [Project(id=id_, cost_p=cost_p) for id_, cost_p in costs_p.items()]
    backers = [CoInvestor(id=id_, pledge_p=p, supports=frozenset(names)) for id_, (p, names) in investors.items()]
    certificate = equal_shares(rules, projects, backers, parameter_version="version")
    given_input = pledges_input(rules, projects, backers)
    assert check_pledges(given_input, certificate) == ()
    return given_input, certificate


def test_supporters_pay_alike_and_pence_that_do_not_divide_fall_in_order_of_ids() -> None:
    _, certificate = spend({"P": 100}, {"x": (50, "P"), "y": (50, "P"), "z": (50, "P")})
    assert certificate["purchases"] == [{"project": "P", "payments_p": {"x": 34, "y": 33, "z": 33}, "top_up_p": 0}]


def test_a_small_pledge_is_used_up_and_the_rest_pay_alike() -> None:
    _, certificate = spend({"P": 100}, {"x": (10, "P"), "y": (50, "P"), "z": (50, "P")})
    assert certificate["purchases"][0]["payments_p"] == {"x": 10, "y": 45, "z": 45}


@pytest.mark.parametrize(("pledge_p", "code"), [(49, "NOT_AFFORDABLE"), (50, "FUNDED"), (51, "FUNDED")])
def test_a_project_is_bought_when_its_supporters_can_pay_it(pledge_p: int, code: str) -> None:
    _, certificate = spend({"P": 100, "Q": 1}, {"x": (50, "P"), "y": (pledge_p, "P"), "rich": (10**6, "")})
    assert certificate["reasons"]["P"]["code"] == code
    assert certificate["reasons"]["Q"]["code"] == "NO_SUPPORTER"
    assert certificate["left_p"]["rich"] == 10**6


def test_a_group_with_one_wish_gets_its_share() -> None:
    """Three investors want P, Q and R; one wants S: its pledge is not outvoted."""
    _, certificate = spend(
        {"P": 90, "Q": 90, "R": 90, "S": 60}, {"a": (60, "PQR"), "b": (60, "PQR"), "c": (60, "PQR"), "d": (60, "S")}
    )
    assert [purchase["project"] for purchase in certificate["purchases"]] == ["P", "Q", "S"]


@pytest.mark.parametrize(("top_up_p", "codes_"), [(9, ["NOT_AFFORDABLE"]), (10, ["FUNDED_WITH_TOP_UP"])])
def test_a_declared_pot_completes_what_supporters_cannot_pay(top_up_p: int, codes_: list[str]) -> None:
    _, certificate = spend({"P": 100}, {"x": (90, "P")}, top_up_p)
    assert [reason["code"] for reason in certificate["reasons"].values()] == codes_


@settings(max_examples=100)
@given(
    costs_p=st.lists(st.integers(1, 40), min_size=1, max_size=7),
    investors=st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 6))), max_size=6),
    top_up_p=st.none() | st.integers(0, 30),
)
def test_every_spending_of_pledges_keeps_its_promises(
    costs_p: list[int], investors: list[tuple[int, set[int]]], top_up_p: int | None
) -> None:
    names = "PQRSTUV"
    backers = {f"i{n}": (p, "".join(names[s] for s in wishes)) for n, (p, wishes) in enumerate(investors)}
    spend({names[n]: cost_p for n, cost_p in enumerate(costs_p)}, backers, top_up_p)


PLEDGE_TAMPERINGS: dict[str, Callable[[dict[str, Any]], None]] = {
    "hash": change("input_hash", lambda text: text[::-1]),
    "order": change("purchases", lambda purchases: purchases[::-1]),
    "twice": change("purchases", lambda purchases: [*purchases, purchases[0]]),
    "left out": change("purchases", lambda purchases: purchases[:-1]),
    "left": change("left_p", lambda left: {id_: pence + 1 for id_, pence in left.items()}),
    "reasons": change("reasons", lambda _: {}),
    "pot": lambda certificate: certificate["purchases"][0].update(top_up_p=1),
    "a stranger pays": lambda certificate: certificate["purchases"][0]["payments_p"].update(d=0),
    "one pays for the other": lambda certificate: certificate["purchases"][0]["payments_p"].update(a=60, b=0, c=30),
}


@pytest.mark.parametrize("tampering", PLEDGE_TAMPERINGS.values(), ids=PLEDGE_TAMPERINGS.keys())
def test_a_tampered_spending_of_pledges_is_refused(tampering: Callable[[dict[str, Any]], None]) -> None:
    given_input, certificate = spend(
        {"P": 90, "Q": 90, "S": 60}, {"a": (60, "PQ"), "b": (60, "PQ"), "c": (60, "PQ"), "d": (60, "S")}
    )
    tampering(certificate)
    assert check_pledges(given_input, certificate)


def test_a_pot_that_the_completion_does_not_use_is_refused() -> None:
    with pytest.raises(InvalidFact):
        pledges_input(PledgeRules(call="C", completion=Completion.NONE, top_up_p=1), [], [])
