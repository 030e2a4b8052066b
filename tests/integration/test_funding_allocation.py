"""From proposed assessors to decided applications: the fund in one loop with a real matching service behind its gRPC."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio

from services.common.clock import from_us
from services.common.database import transaction
from services.common.kafka import Publisher
from services.common.settings import Settings
from services.funding import call_store, checker, matches
from services.funding.assessor_finder import Question
from services.funding.domain import SUPPORTERS_PER_APPLICATION_MAX, Match, uk_day
from smdih.funding.v1 import review_pb2, review_pb2_grpc
from tests.integration.funding_world import ALL_KEYS, ASSESSORS, SECOND, World, running_world
from tests.integration.matching_hub import FIRM


@pytest_asyncio.fixture(scope="module")
async def world(settings: Settings, publisher: Publisher) -> AsyncIterator[World]:
    async with running_world(settings, publisher) as running:
        yield running


def checked_by_command(file: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(checker.__file__), str(file)], capture_output=True, text=True)
    return done.returncode, done.stdout


async def test_assessors_come_from_matching_without_those_who_have_a_conflict(world: World) -> None:
    call_id = await world.call(100_00)
    made = await world.submitted(call_id, FIRM)
    path = f"/v1/applications/{made}/assessors"
    proposal = await world.done("GET", f"{path}?count=10")
    assert {one["provider_id"] for one in proposal["assessors"]} == set(ASSESSORS)
    assert all(one["reasons"] for one in proposal["assessors"])
    assert {one["provider_id"]: one["codes"] for one in proposal["excluded"]} == {"kin": ["CONFLICT_OF_INTEREST"]}
    await world.refused(409, "CONFLICT_OF_INTEREST", "POST", path, {"provider_ids": ["gears", "kin"]})
    await world.refused(409, "ASSESSOR_NOT_PROPOSED", "POST", path, {"provider_ids": ["nobody"]})
    for odd in ([], ["\x00"], ["a", "b", "c", "d", "e", "f"]):
        await world.refused(400, "PROVIDER_IDS_INVALID", "POST", path, {"provider_ids": odd})
    for _ in range(2):  # the second is a repeat
        judged = await world.done("POST", path, {"provider_ids": ["gears", "oil"]})
        assert [one["provider_id"] for one in judged["reviews"]] == ["gears", "oil"]
    assert judged["verdict"]["code"] == "TOO_FEW_ASSESSORS"
    for who in ("firm", "partner", "device"):
        await world.refused(403, "FORBIDDEN", "GET", path, who=who)
        await world.refused(403, "FORBIDDEN", "POST", path, {"provider_ids": ["gears"]}, who=who)
        await world.refused(403, "FORBIDDEN", "GET", f"/v1/applications/{made}/reviews", who=who)
    await world.refused(401, "UNAUTHENTICATED", "GET", path, who="")
    # A group's other firm is in it as well.
    async with world.pool.acquire() as connection:
        await connection.execute("INSERT INTO enterprise_group VALUES ('g', 'filing', now(), 1)")
        await connection.execute("INSERT INTO firm_group VALUES ($1, 'g', now(), 1), (101, 'g', now(), 1)", FIRM)
    sister = await world.submitted(call_id, 101)
    excluded = (await world.done("GET", f"/v1/applications/{sister}/assessors"))["excluded"]
    assert [one["provider_id"] for one in excluded] == ["kin"]
    await world.pool.execute("DELETE FROM firm_group")


@pytest.mark.parametrize("before", [150, 350])
async def test_however_many_take_part_each_conflict_counts(world: World, before: int) -> None:
    """The applicant's own id is the last of a large group's, and a partner's name the last of many."""
    strangers = range(1_000, 1_000 + before)
    of_firm = Question(text="gears", sic="", region="", firm_ids=[*strangers, FIRM], organisations=[])
    found = await world.finder.propose(ALL_KEYS["operator"], of_firm, count=10)
    assert {one.provider_id for one in found.assessors} == set(ASSESSORS)
    assert [one.provider_id for one in found.excluded] == ["kin"]
    names = [*(f"Capital {number}" for number in strangers), "university"]
    of_partner = Question(text="gears", sic="", region="", firm_ids=[], organisations=names)
    assert (await world.finder.propose(ALL_KEYS["operator"], of_partner, count=10)).assessors == ()


async def test_an_assessor_declares_answers_and_scores_once(world: World) -> None:
    made = await world.submitted(await world.call(100_00), FIRM)
    invited = {"provider_ids": list(ASSESSORS)}
    reviews = (await world.done("POST", f"/v1/applications/{made}/assessors", invited))["reviews"]
    listed = await world.done("GET", "/v1/reviews?state=invited&page_size=100", who="partner")
    assert {one["id"] for one in reviews} <= {one["id"] for one in listed["reviews"]}
    assert (await world.done("GET", "/v1/reviews", who="other_partner"))["reviews"] == []
    first, second, third, fourth = (f"/v1/reviews/{one['id']}" for one in reviews)
    task = await world.done("GET", first, who="partner")
    assert (task["firm_name"], task["grant_pence"]) == ("=Firm 1", 40_00)
    assert "declaration" not in json.dumps(task)
    score = {"percent": "72.5", "in_scope": True, "justification": "sound plan"}
    await world.refused(409, "REVIEW_INVITED", "POST", f"{first}/score", score, who="partner")
    declared = {"no_conflict": False, "declaration": "my brother owns it"}
    await world.refused(400, "CONFLICT_NOT_EXCLUDED", "POST", f"{first}/accept", declared, who="partner")
    for one in reviews[:3]:
        await world.accepted(one["id"])
    declined = {"declined_as": "conflict", "reason": "my brother owns it"}
    await world.done("POST", f"{fourth}/decline", declined, who="partner")
    await world.refused(409, "REVIEW_DECLINED", "POST", f"{fourth}/score", score, who="partner")
    for bad in ("100.01", "-1", "7e1", "72.555", "", "NaN"):
        await world.refused(400, "SCORE_INVALID", "POST", f"{first}/score", {**score, "percent": bad}, who="partner")
    for _ in range(2):
        assert (await world.done("POST", f"{first}/score", score, who="partner"))["review"]["percent"] == "72.5"
    await world.refused(409, "ALREADY_SCORED", "POST", f"{first}/score", {**score, "percent": "90"}, who="partner")
    for who in ("other_partner",):
        await world.refused(404, "REVIEW_UNKNOWN", "GET", first, who=who)
        await world.refused(404, "REVIEW_UNKNOWN", "POST", f"{first}/score", score, who=who)
    for who in ("firm", "device"):
        await world.refused(403, "FORBIDDEN", "GET", first, who=who)
        await world.refused(403, "FORBIDDEN", "GET", "/v1/reviews", who=who)
    await world.refused(403, "FORBIDDEN", "POST", f"{second}/score", score, who="operator")
    await world.refused(403, "FORBIDDEN", "POST", f"{second}/take-back", {"reason": "x"}, who="partner")
    # A partner that turns out to put money in has a part in it.
    promise = {"request_id": "uni", "co_investor": "university", "kind": "cash", "amount_pence": 1_00}
    await world.done("POST", f"/v1/applications/{made}/pledges", promise)
    await world.refused(409, "CONFLICT_OF_INTEREST", "POST", f"{second}/score", score, who="partner")
    judged = await world.done("POST", f"{third}/take-back", {"reason": "left the university"})
    assert [one["state"] for one in judged["reviews"]] == ["scored", "accepted", "withdrawn", "declined"]


async def test_a_partners_program_assesses_by_grpc(world: World) -> None:
    made = await world.submitted(await world.call(100_00, scope="Gears that report themselves."), FIRM)
    invited = {"provider_ids": ["gears", "oil"]}
    ids = [one["id"] for one in (await world.done("POST", f"/v1/applications/{made}/assessors", invited))["reviews"]]

    def bearer(who: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {ALL_KEYS[who]}"),)

    async def refused(code: grpc.StatusCode, reason: str, asked: Any) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asked
        assert (error.value.code(), dict(error.value.trailing_metadata())["reason"]) == (code, reason)

    reviews = review_pb2_grpc.ReviewServiceStub(world.channel)
    listed = await reviews.ListReviews(
        review_pb2.ListReviewsRequest(state=review_pb2.REVIEW_STATE_INVITED), metadata=bearer("partner")
    )
    assert set(ids) <= {one.id for one in listed.reviews}
    task = (await reviews.GetReview(review_pb2.GetReviewRequest(review_id=ids[0]), metadata=bearer("partner"))).task
    assert (task.scope, task.grant_pence, task.costs[0].amount_pence) == (
        "Gears that report themselves.",
        40_00,
        100_00,
    )
    accept = review_pb2.AcceptReviewRequest(review_id=ids[0], no_conflict=True, declaration="none. Dr X")
    await reviews.AcceptReview(accept, metadata=bearer("partner"))
    score = review_pb2.ScoreReviewRequest(review_id=ids[0], percent="81.25", in_scope=True, justification="sound")
    scored = (await reviews.ScoreReview(score, metadata=bearer("partner"))).task.review
    assert (scored.state, scored.percent, scored.in_scope) == (review_pb2.REVIEW_STATE_SCORED, "81.25", True)
    decline = review_pb2.DeclineReviewRequest(review_id=ids[1], reason="abroad")
    await refused(
        grpc.StatusCode.INVALID_ARGUMENT,
        "DECLINED_AS_MISSING",
        reviews.DeclineReview(decline, metadata=bearer("partner")),
    )
    decline.declined_as = review_pb2.DECLINED_AS_NO_TIME
    declined = (await reviews.DeclineReview(decline, metadata=bearer("partner"))).task.review
    assert declined.state == review_pb2.REVIEW_STATE_DECLINED
    get = review_pb2.GetReviewRequest(review_id=ids[0])
    await refused(grpc.StatusCode.NOT_FOUND, "REVIEW_UNKNOWN", reviews.GetReview(get, metadata=bearer("other_partner")))
    await refused(grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN", reviews.GetReview(get, metadata=bearer("firm")))
    await refused(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", reviews.GetReview(get))


async def test_means_are_exact_ties_share_a_rank_and_wide_scores_wait_for_a_person(world: World) -> None:
    call_id = await world.call(1_000_00)
    best, tied, low, wide = [await world.submitted(call_id, firm_id) for firm_id in (FIRM, 101, 102, 103)]
    await world.scored(best, "80", "75", "70")
    await world.scored(tied, "74", "76", "75")
    # 69.99 and two thirds: a rounded mean would show 70 and pass.
    await world.scored(low, "69.99", "70", "70")
    await world.scored(wide, "95", "64.99", "80")
    rows = (await world.done("GET", f"/v1/calls/{call_id}/panel"))["rows"]
    assert [(row["application_id"], row["rank"], row["tied"]) for row in rows[1:3]] == sorted(
        [(best, 2, True), (tied, 2, True)], key=lambda row: [one["application_id"] for one in rows].index(row[0])
    )
    seen = {row["application_id"]: row["verdict"] for row in rows}
    assert (seen[low]["mean"], seen[low]["mean_shown"], seen[low]["code"]) == (
        "20999/300",
        "69.99",
        "BELOW_THRESHOLD",
    )
    assert (seen[wide]["spread"], seen[wide]["code"], rows[0]["application_id"]) == (
        "30.01",
        "MODERATION_NEEDED",
        wide,
    )
    stands = {"outcome": "stands", "reason": "the low score misread the budget; the panel keeps it"}
    path = f"/v1/applications/{wide}/moderate"
    for who in ("firm", "partner"):
        await world.refused(403, "FORBIDDEN", "POST", path, stands, who=who)
    assert (await world.done("POST", path, stands))["verdict"]["code"] == ""
    reopened = await world.done("POST", path, {**stands, "outcome": "reopened"})
    assert {one["state"] for one in reopened["reviews"]} == {"accepted"}
    await world.refused(409, "NOT_SCORED", "POST", path, stands)
    sheet = await world.ask("GET", f"/v1/calls/{call_id}/panel.csv")
    assert sheet.headers["content-type"].startswith("text/csv")
    assert "'=Firm 101" in sheet.text
    assert "20999/300,69.99" in sheet.text
    page = await world.ask("GET", f"/v1/calls/{call_id}/panel.html")
    assert page.text.count('<tr class="tied">') == 2
    for ending in ("", ".csv", ".html"):
        await world.refused(403, "FORBIDDEN", "GET", f"/v1/calls/{call_id}/panel{ending}", who="partner")
        await world.refused(404, "CALL_UNKNOWN", "GET", f"/v1/calls/none/panel{ending}")


async def test_a_closed_call_is_allocated_checked_confirmed_by_a_second_person_and_decided(
    world: World, tmp_path: Path
) -> None:
    call_id = await world.call(80_00, method="top_down_skip", limits=[{"pot": "region:wales", "ceiling_pence": 40_00}])
    first = await world.submitted(call_id, FIRM, 40_00)
    wales = await world.submitted(call_id, 102, 40_00)
    more_wales = await world.submitted(call_id, 103, 30_00)
    low = await world.submitted(call_id, 101, 10_00)
    outside = await world.submitted(call_id, 101, 10_00)
    unmatched = await world.submitted(call_id, 101, 10_00, pledge=False)
    path = f"/v1/calls/{call_id}/allocations"
    await world.refused(409, "CALL_NOT_CLOSED", "POST", path)
    for made, scores, scope in (
        (first, ("80", "81", "82"), True),
        (wales, ("79", "79", "79"), True),
        (more_wales, ("78", "78", "78"), True),
        (low, ("60", "61", "62"), True),
        (outside, ("90", "90", "90"), False),
    ):
        await world.scored(made, *scores, in_scope=scope)
    world.close_calls()
    assert "TOO_FEW_ASSESSORS" in await world.refused(409, "NOT_ASSESSED", "POST", path)
    await world.scored(unmatched, "99", "99", "99")
    stale = await world.done("POST", path)
    for who in ("firm", "partner", "device"):
        await world.refused(403, "FORBIDDEN", "POST", path, who=who)
        await world.refused(403, "FORBIDDEN", "GET", f"/v1/allocations/{stale['id']}", who=who)
        await world.refused(
            403, "FORBIDDEN", "POST", f"/v1/allocations/{stale['id']}/confirm", {"reason": "x"}, who=who
        )
    # What is confirmed is what was seen: a budget that moved since makes it stale.
    move = {"request_id": "less", "change_pence": -1, "reason": "correction"}
    await world.done("POST", f"/v1/calls/{call_id}/budget", move)
    confirm = {"reason": "panel of 3 November"}
    await world.refused(409, "ALLOCATION_STALE", "POST", f"/v1/allocations/{stale['id']}/confirm", confirm, who=SECOND)
    await world.done("POST", f"/v1/calls/{call_id}/budget", {**move, "request_id": "back", "change_pence": 1})
    run = await world.done("POST", path)
    assert {one["application_id"]: one["code"] for one in run["reasons"]} == {
        first: "FUNDED",
        wales: "FUNDED",
        more_wales: "ASKS_MORE_THAN_LEFT",
        low: "BELOW_THRESHOLD",
        outside: "OUT_OF_SCOPE",
        unmatched: "MATCH_SHORTFALL",
    }
    assert (run["spent_pence"], run["left_pence"], run["checker_agrees"], run["checker_proof"]) == (
        80_00,
        0,
        True,
        "ranking",
    )
    where = f"/v1/allocations/{run['id']}"
    await world.refused(403, "SECOND_PERSON", "POST", f"{where}/confirm", confirm)
    assert {await world.state(made) for made in (first, low)} == {("submitted", "")}
    done = await world.done("POST", f"{where}/confirm", confirm, who=SECOND)
    assert (done["state"], done["pending"], done["refused"]) == ("confirmed", [], {})
    assert [await world.state(made) for made in (first, wales, more_wales, low, outside, unmatched)] == [
        ("awarded", "FUNDED"),
        ("awarded", "FUNDED"),
        ("rejected", "ASKS_MORE_THAN_LEFT"),
        ("rejected", "BELOW_THRESHOLD"),
        ("rejected", "OUT_OF_SCOPE"),
        # A rule that people may still see met: the decision is theirs.
        ("submitted", ""),
    ]
    assert (await world.done("POST", f"{where}/confirm", confirm, who=SECOND))["pending"] == []
    # Anyone with the two documents repeats the check with a program that knows nothing of the fund.
    documents = await world.done("GET", f"{where}/documents")
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(documents))
    assert checked_by_command(file) == (0, "holds; proof by ranking\n")
    documents["certificate"]["chosen"] = documents["certificate"]["chosen"][:1]
    file.write_text(json.dumps(documents))
    assert checked_by_command(file)[0] == 1
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await world.pool.execute("UPDATE allocation SET certificate = '{}' WHERE id = $1", run["id"])
    await world.refused(404, "ALLOCATION_UNKNOWN", "GET", "/v1/allocations/none")


async def test_a_declared_portfolio_is_solved_to_the_proven_optimum_and_the_same_again(world: World) -> None:
    limits = [{"pot": "region:wales", "floor_pence": 20_00}, {"pot": "size:micro", "share_min": "0.50"}]
    call_id = await world.call(60_00, method="portfolio", limits=limits)
    made = [await world.submitted(call_id, firm_id, 20_00) for firm_id in (FIRM, 101, 101, 102, 103)]
    for one, score in zip(made, ("95", "90", "85", "80", "75"), strict=True):
        await world.scored(one, score, score, score)
    world.close_calls()
    runs = [await world.done("POST", f"/v1/calls/{call_id}/allocations", who=who) for who in ("operator", SECOND)]
    funded = [{one["application_id"] for one in run["reasons"] if one["funded"]} for run in runs]
    # By rank alone the third would win over the first of Wales.
    assert funded == [{made[0], made[1], made[3]}] * 2
    assert runs[0]["certificate_sha256"] == runs[1]["certificate_sha256"]
    assert (runs[0]["checker_agrees"], runs[0]["checker_proof"]) == (True, "exhaustion")
    done = await world.done("POST", f"/v1/allocations/{runs[0]['id']}/confirm", {"reason": "yes"}, who=SECOND)
    assert done["pending"] == []
    # What was confirmed last does not decide again: there is nothing left to decide.
    await world.refused(
        409, "ALLOCATION_STALE", "POST", f"/v1/allocations/{runs[1]['id']}/confirm", {"reason": "no"}, who="operator"
    )


async def test_what_an_enterprise_may_still_be_given_is_shared_by_its_applications(world: World) -> None:
    """The second would be refused at its award, after the third had been rejected for want of money."""
    call_id = await world.call(80_00)
    size = {"headcount": "9", "turnover_minor": 1, "balance_minor": 1, "period_start": "2026-01-01"}
    group = {"firm_ids": [102, 103], "source": "filing of 3 November"}
    await world.done("PUT", "/v1/groups/welsh", group)
    left = (await world.done("GET", "/v1/assistance?firm_id=102"))["headroom_pence"]
    given_on = uk_day(from_us(world.clock.now_us())).isoformat()
    given = [{"given_on": given_on, "amount_pence": left - 60_00, "kind": "MFA"}]
    declared = {"size": size, "uk_registered": True, "earlier_assistance": given}
    first = await world.submitted(call_id, 102, declaration=declared)
    sister = await world.submitted(call_id, 103, declaration=declared)
    third = await world.submitted(call_id, 101)
    for made, score in ((first, "90"), (sister, "85"), (third, "80")):
        await world.scored(made, score, score, score)
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/allocations")
    why = {one["application_id"]: (one["code"], one["text"]) for one in run["reasons"]}
    assert {made: code for made, (code, _) in why.items()} == {first: "FUNDED", sister: "MFA_LIMIT", third: "FUNDED"}
    assert "GBP 20.00 was left of the assistance that its enterprise may be given" in why[sister][1]
    confirm = {"reason": "panel"}
    done = await world.done("POST", f"/v1/allocations/{run['id']}/confirm", confirm, who=SECOND)
    assert (done["pending"], done["refused"]) == ([], {})
    assert [await world.state(made) for made in (first, sister, third)] == [
        ("awarded", "FUNDED"),
        ("rejected", "MFA_LIMIT"),
        ("awarded", "FUNDED"),
    ]
    await world.done("PUT", "/v1/groups/welsh", {**group, "firm_ids": []})


async def test_nobody_is_rejected_for_want_of_money_while_an_award_is_refused(world: World) -> None:
    call_id = await world.call(40_00)
    # 49.00 of business money beside 40.00: below the programme's ratio, which is judged at the award.
    costs = [{"category": "labour", "amount_pence": 89_00}]
    thin = await world.submitted(call_id, FIRM, pledge=False, costs=costs)

    async def pledged(application_id: str, pence: int) -> None:
        promise = {"request_id": "p", "co_investor": "Northgate", "kind": "cash", "amount_pence": pence}
        path = f"/v1/applications/{application_id}/pledges"
        made = await world.done("POST", path, promise)
        await world.done("POST", f"{path}/{made['id']}/confirm", {"evidence": "letter"})

    await pledged(thin, 49_00)
    second, low = await world.submitted(call_id, 101), await world.submitted(call_id, 101)
    for made, score in ((thin, "90"), (second, "80"), (low, "60")):
        await world.scored(made, score, score, score)
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/allocations")
    confirm = ("POST", f"/v1/allocations/{run['id']}/confirm", {"reason": "panel"})
    done = await world.done(*confirm, who=SECOND)
    assert (done["refused"], set(done["pending"])) == ({thin: "FUND_RATIO"}, {thin, second})
    assert [await world.state(made) for made in (thin, second, low)] == [
        ("submitted", ""),
        ("submitted", ""),
        ("rejected", "BELOW_THRESHOLD"),
    ]
    # The money is there for another run, or for the first once it may be awarded.
    again = await world.done("POST", f"/v1/calls/{call_id}/allocations")
    assert {one["application_id"] for one in again["reasons"]} == {thin, second}
    for who in ("operator", SECOND):
        await world.done("POST", f"/v1/applications/{thin}/waive-ratio", {"reason": "first of a series"}, who=who)
    assert (await world.done(*confirm, who=SECOND))["pending"] == []
    assert [await world.state(made) for made in (thin, second)] == [
        ("awarded", "FUNDED"),
        ("rejected", "ASKS_MORE_THAN_LEFT"),
    ]
    # Business money again, so that the tests after this one meet a fund in its ratio.
    more = await world.submitted(await world.call(1_00), 101, 1_00, pledge=False)
    await pledged(more, 100_00)
    await world.done("POST", f"/v1/applications/{more}/decide", {"award": True, "reason": "good"})


async def test_who_was_left_out_for_another_reason_makes_an_allocation_stale(world: World) -> None:
    call_id = await world.call(80_00)
    made = await world.submitted(call_id, FIRM, pledge=False)
    await world.scored(made, "90", "90", "90", in_scope=False)
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/allocations")
    assert [one["code"] for one in run["reasons"]] == ["OUT_OF_SCOPE"]
    # What would be rejected for its scope is in scope after all, and its match is missing: that is for people.
    path = f"/v1/applications/{made}"
    await world.done("POST", f"{path}/moderate", {"outcome": "reopened", "reason": "the scope was read wrongly"})
    score = {"percent": "90", "in_scope": True, "justification": "sound plan"}
    for review in (await world.done("GET", f"{path}/reviews"))["reviews"]:
        await world.done("POST", f"/v1/reviews/{review['id']}/score", score, who="partner")
    where = f"/v1/allocations/{run['id']}/confirm"
    await world.refused(409, "ALLOCATION_STALE", "POST", where, {"reason": "panel"}, who=SECOND)
    assert await world.state(made) == ("submitted", "")


async def test_who_is_the_new_provider_of_a_project_does_not_judge_it(world: World) -> None:
    made = await world.submitted(await world.call(100_00), FIRM)
    await world.scored(made, "80", "81", "82")
    async with transaction(world.pool) as connection:
        old = await call_store.match_of(connection, f"match-{world.matches}")
        assert old is not None
        await matches.end(connection, world.clock, replace(old, ended_us=world.clock.now_us()))
        await matches.begin(connection, world.clock, replace(old, id="match-of-gears", provider_id="gears"))
    seen = await world.done("GET", f"/v1/applications/{made}/reviews")
    assert {one["provider_id"]: one["state"] for one in seen["reviews"]} == {
        "gears": "withdrawn",
        "vibration": "scored",
        "oil": "scored",
    }
    assert (await world.done("GET", f"/v1/applications/{made}"))["match_id"] == "match-of-gears"
    actions = [one["action"] for one in (await world.done("GET", f"/v1/audit?application_id={made}"))["entries"]]
    assert actions[:3] == ["assessor_taken_back", "match_replaced", "match_ended"]


async def test_an_operator_puts_an_application_on_another_match_where_the_need_was_closed(world: World) -> None:
    call_id = await world.call(100_00)
    made = await world.submitted(call_id, FIRM)
    async with transaction(world.pool) as connection:
        old = await call_store.match_of(connection, f"match-{world.matches}")
        assert old is not None
        names = {"other need": FIRM, "of another firm": 101, "ended": FIRM, "used": FIRM}
        fresh = {
            name: replace(old, id=f"{made}-{number}", need_id=f"{made}-{number}", firm_id=firm_id)
            for number, (name, firm_id) in enumerate(names.items())
        }
        for match in fresh.values():
            await matches.begin(connection, world.clock, match)
        await matches.end(connection, world.clock, replace(fresh["ended"], ended_us=world.clock.now_us()))
        await connection.execute(
            "INSERT INTO application (id, request_id, content_sha256, call_id, match_id, firm_id, state, costs, declaration, sic, "
            "requested_pence, other_public_pence, created, correlation_id, content) SELECT id || '-2', id || '-2', content_sha256, "
            "call_id, $2, firm_id, 'draft', costs, declaration, sic, requested_pence, other_public_pence, created, "
            "correlation_id, content FROM application WHERE id = $1",
            made,
            fresh["used"].id,
        )
    path = f"/v1/applications/{made}/match"

    def to(name: str) -> dict[str, str]:
        return {"match_id": fresh[name].id, "reason": "the laboratory closed the need"}

    await world.refused(409, "MATCH_STANDS", "POST", path, to("other need"))
    async with transaction(world.pool) as connection:
        await matches.end(connection, world.clock, replace(old, ended_us=world.clock.now_us()))
    for who in ("firm", "partner"):
        await world.refused(403, "FORBIDDEN", "POST", path, to("other need"), who=who)
    await world.refused(404, "MATCH_UNKNOWN", "POST", path, to("of another firm"))
    await world.refused(409, "MATCH_ENDED", "POST", path, to("ended"))
    await world.refused(409, "MATCH_IN_USE", "POST", path, to("used"))
    for _ in range(2):  # the second is a repeat
        seen = await world.done("POST", path, to("other need"))
        assert (seen["match_id"], seen["assessment"]["eligible"]) == (fresh["other need"].id, True)


async def test_limits_that_cannot_be_kept_decide_nothing_and_say_which(world: World) -> None:
    call_id = await world.call(60_00, method="portfolio", limits=[{"pot": "region:scotland", "floor_pence": 1}])
    await world.scored(await world.submitted(call_id, FIRM, 20_00), "95", "95", "95")
    world.close_calls()
    detail = await world.refused(409, "ALLOCATION_INFEASIBLE", "POST", f"/v1/calls/{call_id}/allocations")
    assert "region:scotland asks for GBP 0.00, below its floor of GBP 0.01" in detail


@pytest.mark.parametrize(
    ("terms", "reason"),
    [
        ({"limits": [{"pot": "region:wales", "floor_pence": 1}]}, "LIMIT_NEEDS_PORTFOLIO"),
        ({"limits": [{"pot": "planet:mars", "ceiling_pence": 1}]}, "LIMIT_INVALID"),
        ({"limits": [{"pot": "first-time", "ceiling_pence": 1}] * 2}, "LIMIT_INVALID"),
        (
            {
                "method": "portfolio",
                "limits": [{"pot": f"region:{one}", "floor_pence": 50_01} for one in ("wales", "scotland")],
            },
            "LIMIT_INVALID",
        ),
        ({"limits": [{"pot": "first-time", "ceiling_pence": 100_01}]}, "LIMIT_INVALID"),
        ({"questions": [{"id": "Bad Id", "text": "?", "kind": "text"}]}, "QUESTION_INVALID"),
        ({"questions": [{"id": "a", "text": "?", "kind": "choice", "choices": ["x"]}]}, "QUESTION_INVALID"),
        ({"questions": [{"id": "a", "text": "?", "kind": "whole_number", "least": 2, "most": 1}]}, "QUESTION_INVALID"),
        ({"adoption_max_pence": -1}, "AMOUNT_OUT_OF_RANGE"),
    ],
)
async def test_terms_that_make_no_sense_are_refused(world: World, terms: Any, reason: str) -> None:
    now_us = world.clock.now_us()
    body = {"request_id": f"bad-{now_us}", "title": "x", "budget_pence": 100_00, "opens_us": now_us, "terms": terms}
    body |= {"closes_us": now_us + 1, "category": "feasibility", "size_definition": "COMPANIES_ACT_2006"}
    await world.refused(400, reason, "POST", "/v1/calls", body)


async def test_an_application_answers_the_questions_of_its_call_in_their_form(world: World) -> None:
    questions = [
        {"id": "plan", "text": "What will you do?", "kind": "text", "characters_max": 20},
        {"id": "jobs", "text": "How many jobs?", "kind": "whole_number", "least": 0, "most": 500},
        {"id": "site", "text": "Where?", "kind": "choice", "choices": ["at home", "abroad"]},
        {"id": "new", "text": "First digital project?", "kind": "yes_no", "required": False},
        {"id": "start", "text": "When?", "kind": "date", "required": False},
    ]
    call_id = await world.call(100_00, questions=questions, scope="Machines that report themselves.")
    good = {"plan": "Measure oil debris", "jobs": "3", "site": "at home", "new": "yes", "start": "2026-12-01"}
    document = {"name": "plan.pdf", "sha256": "a" * 64, "size_bytes": 10, "media_type": "application/pdf"}
    more: dict[str, Any] = {"answers": good, "attachments": [document], "machine_ids": [100, 101]}
    made = await world.submitted(call_id, FIRM, **more)
    seen = await world.done("GET", f"/v1/applications/{made}")
    assert dict(seen["content"]["answers"]) == good
    assert seen["content"]["attachments"] == [document]
    assert seen["content"]["machine_ids"] == [100, 101]
    known = await world.done(
        "GET", f"/v1/applications/prefill?call_id={call_id}&match_id={seen['match_id']}", who="firm"
    )
    assert (known["sic"], known["region"], known["call"]["terms"]["questions"][0]["id"]) == (
        "25.62",
        "East Midlands",
        "plan",
    )
    assert known["declaration"]["size"]["headcount"] == "9"
    for who, reason in (("other_firm", "MATCH_UNKNOWN"), ("partner", "FORBIDDEN")):
        where = f"/v1/applications/prefill?call_id={call_id}&match_id={seen['match_id']}"
        await world.refused(404 if reason == "MATCH_UNKNOWN" else 403, reason, "GET", where, who=who)
    assert (await world.done("GET", f"/v1/calls/{call_id}"))["terms"]["scope"] == "Machines that report themselves."
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"answers": {**good, "plan": ""}}, 400, "ANSWER_MISSING"),
        ({"answers": {**good, "plan": "x" * 21}}, 400, "TEXT_TOO_LONG"),
        ({"answers": {**good, "jobs": "501"}}, 400, "ANSWER_INVALID"),
        ({"answers": {**good, "jobs": "3.5"}}, 400, "ANSWER_INVALID"),
        ({"answers": {**good, "site": "the moon"}}, 400, "ANSWER_INVALID"),
        ({"answers": {**good, "new": "maybe"}}, 400, "ANSWER_INVALID"),
        ({"answers": {**good, "start": "soon"}}, 400, "DATE_INVALID"),
        ({"answers": {**good, "else": "x"}}, 400, "ANSWER_UNKNOWN"),
        ({**more, "attachments": [{**document, "sha256": "A" * 64}]}, 400, "ATTACHMENT_INVALID"),
        ({**more, "machine_ids": [200]}, 404, "MACHINE_UNKNOWN"),
        ({**more, "machine_ids": [2**63]}, 404, "MACHINE_UNKNOWN"),
    ]
    for number, (change, status, reason) in enumerate(wrong):
        world.matches += 1
        name = f"wrong-{number}"
        async with transaction(world.pool) as connection:
            match = Match(
                id=name, event_id=name, firm_id=FIRM, need_id=name, offer_id=name, provider_id="p", provider_title="t",
                accepted_us=1, correlation_id="c",
            )  # fmt: skip
            await call_store.add_match(connection, match)
        size = {"headcount": "9", "turnover_minor": 1, "balance_minor": 1, "period_start": "2026-01-01"}
        body = {"request_id": name, "call_id": call_id, "match_id": name, **more, **change}
        body |= {"declaration": {"size": size, "uk_registered": True}}
        body |= {"costs": [{"category": "labour", "amount_pence": 1_00}]}
        await world.refused(status, reason, "POST", "/v1/applications", body)


async def test_as_many_as_may_choose_an_application_pay_it_whole(world: World) -> None:
    call_id = await world.call(1_000_00)
    loved = await world.submitted(call_id, FIRM, 40_00, pledge=False)
    path = f"/v1/calls/{call_id}/pool-pledges"
    body = {"co_investor": "Ash", "amount_pence": 1_00, "supports": [loved], "evidence": "letter"}
    for number in range(SUPPORTERS_PER_APPLICATION_MAX):
        await world.done("POST", path, {**body, "request_id": f"ash-{number}", "co_investor": f"Ash {number}"})
    # One more could not be paid beside them, and would leave the match a little short for good.
    why = await world.refused(409, "TOO_MANY_SUPPORTERS", "POST", path, {**body, "request_id": "more"})
    assert loved in why
    own = {"kind": "cash", "amount_pence": 1, "co_investor": "Beech"}
    for number in range(2):
        await world.done("POST", f"/v1/applications/{loved}/pledges", {**own, "request_id": f"own-{number}"})
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/pool-spreads")
    (purchase,) = run["certificate"]["purchases"]
    assert len(purchase["payments_p"]) == SUPPORTERS_PER_APPLICATION_MAX
    where = f"/v1/pool-spreads/{run['id']}/confirm"
    for _ in range(2):  # the second is a repeat
        done = await world.done("POST", where, {"reason": "agreed"}, who=SECOND)
        assert done["refused"] == {}
    seen = await world.done("GET", f"/v1/applications/{loved}")
    assert seen["assessment"]["match_counted_pence"] == 60_00
    assert len(seen["pledges"]) == SUPPORTERS_PER_APPLICATION_MAX + 2
    # All of it is one event of the ledger, and so is its award.
    awarded = await world.done("POST", f"/v1/applications/{loved}/decide", {"award": True, "reason": "best"})
    assert awarded["award"]["co_investment_pence"] == 60_00
    async with world.pool.acquire() as connection:
        kinds = await connection.fetch(
            "SELECT e.kind, count(*) AS transfers FROM ledger_event e JOIN ledger_transfer t ON t.event_sequence = e.sequence "
            "WHERE e.request_id LIKE 'pool:' || $1 || ':%' OR e.request_id = 'application:' || $2 || ':awarded' "
            "GROUP BY e.sequence, e.kind ORDER BY e.sequence",
            run["id"],
            loved,
        )
    assert [tuple(row) for row in kinds] == [
        ("pool_paid", SUPPORTERS_PER_APPLICATION_MAX),
        ("application_awarded", SUPPORTERS_PER_APPLICATION_MAX + 1),
    ]


async def test_no_co_investor_pays_for_an_application_that_did_not_pass(world: World) -> None:
    call_id = await world.call(1_000_00)
    weak = await world.submitted(call_id, FIRM, 20_00, pledge=False)
    good = await world.submitted(call_id, 101, 40_00, pledge=False)
    await world.scored(weak, "60", "61", "62")
    body = {"request_id": "a", "co_investor": "Ash", "amount_pence": 60_00, "supports": [weak, good], "evidence": "x"}
    await world.done("POST", f"/v1/calls/{call_id}/pool-pledges", body)
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/pool-spreads")
    # The cheaper one would have come first, and its money back only when everything is spread.
    assert [one["project"] for one in run["certificate"]["purchases"]] == [good]
    assert run["input"]["projects"].keys() == {good}


async def test_co_investors_pay_alike_for_what_they_chose_and_for_nothing_else(world: World) -> None:
    call_id = await world.call(1_000_00)
    # Each of the three still needs 60.00 of match.
    loved, liked, alone = [await world.submitted(call_id, firm_id, 40_00, pledge=False) for firm_id in (FIRM, 101, 102)]
    path = f"/v1/calls/{call_id}/pool-pledges"
    for name, pence, supports in (
        ("Ash", 50_01, [loved, liked]),
        ("Beech", 80_00, [loved, liked]),
        ("Cedar", 59_99, [alone]),
    ):
        body = {
            "request_id": name,
            "co_investor": name,
            "amount_pence": pence,
            "supports": supports,
            "evidence": "letter",
        }
        for _ in range(2):  # the second is a repeat
            listed = await world.done("POST", path, body)
        await world.refused(409, "REQUEST_ID_REUSED", "POST", path, {**body, "amount_pence": pence + 1})
    assert [one["co_investor"] for one in listed["pledges"]] == ["Ash", "Beech", "Cedar"]
    wrong = {"request_id": "w", "co_investor": "W", "amount_pence": 1, "supports": ["none"], "evidence": "x"}
    await world.refused(404, "APPLICATION_UNKNOWN", "POST", path, wrong)
    await world.refused(400, "SUPPORTS_INVALID", "POST", path, {**wrong, "supports": []})
    for who in ("firm", "partner"):
        await world.refused(403, "FORBIDDEN", "POST", path, wrong, who=who)
        await world.refused(403, "FORBIDDEN", "GET", path, who=who)
        await world.refused(403, "FORBIDDEN", "POST", f"/v1/calls/{call_id}/pool-spreads", who=who)
    await world.refused(409, "CALL_NOT_CLOSED", "POST", f"/v1/calls/{call_id}/pool-spreads")
    world.close_calls()
    run = await world.done("POST", f"/v1/calls/{call_id}/pool-spreads")
    assert run["checker_agrees"]
    paid = {one["project"]: sorted(one["payments_p"].values()) for one in run["certificate"]["purchases"]}
    # The first is paid half and half; of the second Ash has 20.01 left, and Beech pays the rest. A penny short is not enough.
    assert sorted(paid.values()) == [[20_01, 39_99], [30_00, 30_00]]
    assert paid.keys() == {loved, liked}
    assert run["certificate"]["reasons"][alone]["code"] == "NOT_AFFORDABLE"
    where = f"/v1/pool-spreads/{run['id']}"
    await world.refused(403, "SECOND_PERSON", "POST", f"{where}/confirm", {"reason": "x"})
    await world.refused(403, "FORBIDDEN", "POST", f"{where}/confirm", {"reason": "x"}, who="partner")
    for _ in range(2):
        done = await world.done("POST", f"{where}/confirm", {"reason": "agreed"}, who=SECOND)
        assert (done["state"], done["refused"]) == ("confirmed", {})
    for made, counted in ((loved, 60_00), (liked, 60_00), (alone, 0)):
        assert (await world.done("GET", f"/v1/applications/{made}"))["assessment"]["match_counted_pence"] == counted
    await world.refused(409, "POOL_SPREAD", "POST", f"/v1/calls/{call_id}/pool-spreads")
    await world.refused(404, "SPREAD_UNKNOWN", "GET", "/v1/pool-spreads/none")
    trial = await world.done("GET", "/v1/ledger/trial-balance")
    assert (trial["total_pence"], trial["in_order"]) == (0, True)
