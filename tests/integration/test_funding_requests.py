"""What the fund makes of requests: pre-checks, repeats, pages, values that make no sense, and things of others."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from tests.integration.funding_hub import (
    DAY_US,
    FIRM,
    OTHER_FIRM,
    PROCESSES,
    SOFTWARE_FIRM,
    Hub,
    application_body,
    call_body,
    declaration,
    pledge_body,
    running_fund,
)


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, cluster: Cluster, publisher: Publisher) -> AsyncIterator[Hub]:
    async with running_fund(settings, cluster, publisher) as running:
        yield running


async def test_a_pre_check_says_yes_or_no_with_every_reason_and_stores_nothing(hub: Hub) -> None:
    call = await hub.call(size_definition="EU_2003_361", budget_pence=30_000_00)
    size = {"headcount": "60", "turnover_minor": 900_000_000, "balance_minor": 700_000_000}
    body = {"call_id": call["id"], "declaration": declaration(size=size), "planned_cost_pence": 100_000_00}
    seen = await hub.done("POST", "/v1/pre-check", body, who="firm")
    assert (seen["eligible"], seen["size"], seen["max_grant_pence"]) == (True, "medium", 30_000_00)
    assert [finding["rule"] for finding in seen["findings"]][:5] == ["ELIG-1", "SME", "INT-5", "MFA-1", "BUDGET"]
    parent = {
        "percent": "51.00",
        "upstream": True,
        "investor": "company",
        "headcount": "190",
        "turnover_minor": 4_500_000_000,
        "balance_minor": 3_800_000_000,
    }
    owned = {**body, "declaration": declaration(size={**size, "relations": [parent]}, insolvent=True), "sic": "62.01"}
    seen = await hub.done("POST", "/v1/pre-check", owned, who="partner")
    assert (seen["eligible"], seen["size"], seen["max_grant_pence"]) == (False, "large", 0)
    assert seen["findings"][0]["code"] == "NOT_MANUFACTURING"
    assert "insolvent" in seen["findings"][0]["text"]


async def test_the_same_request_id_gets_the_first_answer_and_other_content_is_refused(hub: Hub) -> None:
    body = call_body()
    calls = await asyncio.gather(*(hub.done("POST", "/v1/calls", body, process=n % PROCESSES) for n in range(6)))
    assert len({call["id"] for call in calls}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", "/v1/calls", {**body, "budget_pence": 1})

    body = application_body(calls[0]["id"], await hub.match())
    made = await asyncio.gather(
        *(hub.done("POST", "/v1/applications", body, who="firm", process=n % PROCESSES) for n in range(6))
    )
    assert len({one["id"] for one in made}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", "/v1/applications", {**body, "requested_pence": 7}, who="firm")
    # Another firm's request of the same name is its own.
    others = application_body(calls[0]["id"], await hub.match(OTHER_FIRM), request_id=body["request_id"])
    assert (await hub.done("POST", "/v1/applications", others, who="other"))["id"] != made[0]["id"]

    path = f"/v1/applications/{made[0]['id']}/pledges"
    body = pledge_body(100)
    pledges = await asyncio.gather(*(hub.done("POST", path, body, who="firm") for _ in range(6)))
    assert len({pledge["id"] for pledge in pledges}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", path, {**body, "amount_pence": 101}, who="firm")
    confirm = f"{path}/{pledges[0]['id']}/confirm"
    confirmed = await asyncio.gather(*(hub.done("POST", confirm, {"evidence": "letter"}) for _ in range(6)))
    assert len({pledge["confirmed_us"] for pledge in confirmed}) == 1
    await hub.trial_balance()


async def test_a_firm_neither_sees_nor_touches_what_is_anothers(hub: Hub) -> None:
    call = await hub.call()
    mine = await hub.application(call["id"])
    pledge = await hub.pledge(mine["id"], 5_00, confirm=False)
    path = f"/v1/applications/{mine['id']}"
    for method, where, body in (
        ("GET", path, None),
        ("POST", f"{path}/pledges", pledge_body(1)),
        ("POST", f"{path}/submit", None),
        ("POST", f"{path}/withdraw", None),
    ):
        await hub.refused(404, "APPLICATION_UNKNOWN", method, where, body, who="other")
        await hub.refused(403, "FORBIDDEN", method, where, body, who="device")
        await hub.refused(403, "FORBIDDEN", method, where, body, who="partner")
        await hub.refused(401, "UNAUTHENTICATED", method, where, body, who="")
    for where, body in (
        (f"{path}/decide", {"award": True, "reason": "mine"}),
        (f"{path}/pledges/{pledge['id']}/confirm", {"evidence": "trust me"}),
        (f"{path}/waive-ratio", {"reason": "mine"}),
        ("/v1/calls", call_body()),
    ):
        await hub.refused(403, "FORBIDDEN", "POST", where, body, who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", "/v1/ledger/trial-balance", who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", f"/v1/applications?firm_id={FIRM}", who="other")
    listed = await hub.done("GET", "/v1/applications?page_size=100", who="other")
    assert {one["firm_id"] for one in listed["applications"]} <= {OTHER_FIRM}
    body = application_body(call["id"], await hub.match(FIRM))
    detail = await hub.refused(404, "MATCH_UNKNOWN", "POST", "/v1/applications", body, who="other")
    assert "may take a moment" in detail


async def test_pages_follow_each_other_without_gap_or_repeat(hub: Hub) -> None:
    call = await hub.call()
    made = [(await hub.application(call["id"]))["id"] for _ in range(5)]
    seen: list[str] = []
    token = ""
    while True:
        where = f"/v1/applications?call_id={call['id']}&page_size=2&page_token={token}"
        page = await hub.done("GET", where, who="firm")
        seen += [one["id"] for one in page["applications"]]
        token = page["next_page_token"]
        if not token:
            break
    assert seen == made[::-1]


HUGE = 2**63


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget_pence": 0}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": -1}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": HUGE - 1}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": HUGE}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": 10.0}, "INVALID"),
        ({"budget_pence": "10"}, "INVALID"),
        ({"title": " "}, "TITLE_MISSING"),
        ({"title": "a\x00b"}, "TEXT_UNPRINTABLE"),
        ({"title": "x" * 201}, "TEXT_TOO_LONG"),
        ({"opens_us": HUGE}, "TIME_OUT_OF_RANGE"),
        ({"closes_us": 1_000_000_000_000_000}, "CLOSES_BEFORE_OPENS"),
        ({"category": "CATEGORY_X"}, "INVALID"),
        ({"rate_max": "1.01"}, "RATE_INVALID"),
        ({"rate_max": "1e-3"}, "RATE_INVALID"),
        ({"rate_max": "0." + "3" * 5_000}, "RATE_INVALID"),
        ({"request_id": ""}, "REQUEST_ID_INVALID"),
        ({"request_id": "a b"}, "REQUEST_ID_INVALID"),
        ({"state": "open"}, "INVALID"),
    ],
)
async def test_a_call_that_makes_no_sense_is_refused_with_a_reason(
    hub: Hub, changes: dict[str, Any], reason: str
) -> None:
    await hub.refused(400, reason, "POST", "/v1/calls", call_body(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"costs": []}, "COSTS_MISSING"),
        ({"costs": [{"category": "travel", "amount_pence": 1}] * 2}, "COSTS_INVALID"),
        ({"costs": [{"category": "travel", "amount_pence": HUGE}]}, "AMOUNT_OUT_OF_RANGE"),
        (
            {"costs": [{"category": one, "amount_pence": 100_000_000_000} for one in ("travel", "labour")]},
            "AMOUNT_OUT_OF_RANGE",
        ),
        ({"requested_pence": -1}, "AMOUNT_OUT_OF_RANGE"),
        ({"other_public_pence": HUGE}, "AMOUNT_OUT_OF_RANGE"),
        ({"declaration": declaration(size={**declaration()["size"], "headcount": "9" * 5_000})}, "DECIMAL_INVALID"),
        ({"declaration": declaration(size={**declaration()["size"], "headcount": "many"})}, "DECIMAL_INVALID"),
        ({"declaration": declaration(size={**declaration()["size"], "turnover_minor": HUGE})}, "AMOUNT_OUT_OF_RANGE"),
        ({"declaration": declaration(size={**declaration()["size"], "period_start": ""})}, "INVALID_FACT"),
        (
            {"declaration": declaration(size={**declaration()["size"], "period_start": "1999-01-01"})},
            "PARAMETER_MISSING",
        ),
        ({"declaration": declaration(size={**declaration()["size"], "period_start": "2026-02-30"})}, "DATE_INVALID"),
        (
            {"declaration": declaration(earlier_assistance=[{"given_on": "soon", "amount_pence": 1, "kind": "MFA"}])},
            "DATE_INVALID",
        ),
    ],
)
async def test_an_application_that_makes_no_sense_is_refused_with_a_reason(
    hub: Hub, changes: dict[str, Any], reason: str
) -> None:
    call = await hub.call()
    body = application_body(call["id"], await hub.match(), **changes)
    await hub.refused(400, reason, "POST", "/v1/applications", body, who="firm")


@pytest.mark.parametrize("odd", ["nothing", "%00", "a%20b", "x" * 300, "%F0%9F%94%A5", "'; DROP TABLE call; --"])
async def test_an_odd_id_is_simply_not_found(hub: Hub, odd: str) -> None:
    for where in (f"/v1/calls/{odd}", f"/v1/applications/{odd}"):
        answer = await hub.ask("GET", where)
        assert answer.status_code == 404, answer.text
    decision = {"award": True, "reason": "x"}
    assert (await hub.ask("POST", f"/v1/applications/{odd}/decide", decision)).status_code == 404
    body = application_body("nothing", await hub.match())
    await hub.refused(404, "CALL_UNKNOWN", "POST", "/v1/applications", body, who="firm")
    for where, reason in (
        ("?page_token=%00", "PAGE_TOKEN_INVALID"),
        ("?page_token=999999999999999999-a", "PAGE_TOKEN_INVALID"),
        ("?page_size=101", "PAGE_SIZE_OUT_OF_RANGE"),
        (f"?firm_id={HUGE}", "FIRM_ID_INVALID"),
    ):
        await hub.refused(400, reason, "GET", f"/v1/applications{where}")


async def test_a_call_takes_applications_only_between_its_times(hub: Hub) -> None:
    now_us = time.time_ns() // 1000
    announced = await hub.call(opens_us=now_us + DAY_US, closes_us=now_us + 2 * DAY_US)
    closed = await hub.call(opens_us=now_us - 2 * DAY_US, closes_us=now_us - DAY_US)
    assert (announced["state"], closed["state"]) == ("announced", "closed")
    match_id = await hub.match()
    for call in (announced, closed):
        body = application_body(call["id"], match_id)
        await hub.refused(409, "CALL_NOT_OPEN", "POST", "/v1/applications", body, who="firm")


async def test_asking_for_more_than_a_rule_allows_is_refused_on_submission(hub: Hub) -> None:
    call = await hub.call(rate_max="0.40")
    for changes, reason in (
        ({"requested_pence": 40_000_01}, "INTENSITY_EXCEEDED"),
        ({"requested_pence": 0, "other_public_pence": 40_000_00}, "NOTHING_TO_GRANT"),
        ({"declaration": declaration(uk_registered=False)}, "NOT_UK_REGISTERED"),
        (
            {
                "declaration": declaration(
                    earlier_assistance=[{"given_on": "2026-05-01", "amount_pence": 315_000_00, "kind": "SAFA"}]
                )
            },
            "MFA_LIMIT",
        ),
    ):
        made = await hub.application(call["id"], OTHER_FIRM, **changes)
        await hub.refused(409, reason, "POST", f"/v1/applications/{made['id']}/submit", who="other")
    made = await hub.application(call["id"], SOFTWARE_FIRM)
    detail = await hub.refused(409, "NOT_MANUFACTURING", "POST", f"/v1/applications/{made['id']}/submit")
    assert "62.01" in detail
    small = await hub.call(budget_pence=39_999_99)
    made = await hub.application(small["id"], OTHER_FIRM)
    await hub.refused(409, "BUDGET_EXHAUSTED", "POST", f"/v1/applications/{made['id']}/submit", who="other")
