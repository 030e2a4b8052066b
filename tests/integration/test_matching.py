"""Matching on real servers: from an alarm or a firm's words to offers and a match."""

import asyncio
import functools
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio

from services.common.clock import from_us
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.matching.needs import quarter_of
from services.matching.store import needs as needs_store
from services.matching.store.needs import Tried
from services.matching.text import stored
from smdih.matching.v1 import events_pb2, matching_pb2
from tests.integration.matching_hub import (
    FIRM,
    KEYS,
    OTHER_FIRM,
    OTHER_PARTNER,
    PARTNER,
    PROVIDERS,
    SHARE_ALL,
    Hub,
    bearer,
    events_of,
    machine_id,
    offers_of,
    open_need,
    publish_world,
    running_hub,
    told,
)
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    yield one_hub
    one_hub.clock.shift = timedelta(0)


async def test_a_place_taken_is_told_in_the_next_offers(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    first = await open_need(hub)
    await hub.ok("firm", "POST", f"/v1/offers/{first['offers'][0]['id']}/accept")

    async def told() -> bool:
        return "It has 2 of 3 places free this quarter." in (await open_need(hub))["offers"][0]["reasons"]

    await eventually(told, deadline_s=5)
    # A new quarter: all places are free again.
    hub.clock.shift = timedelta(days=95)

    async def free_again() -> bool:
        return "It has 3 of 3 places free this quarter." in (await open_need(hub))["offers"][0]["reasons"]

    await eventually(free_again, deadline_s=5)


async def test_twenty_at_once_never_take_more_than_three_places(hub: Hub) -> None:
    await hub.put_providers("forming")
    opened = [await open_need(hub, f"Pressings split at the corner, order {number}.") for number in range(20)]
    offers = [each["offers"][0]["id"] for each in opened]
    # Each twice, so that repeats race as well.
    calls = [hub.call("firm", "POST", f"/v1/offers/{offer}/accept") for offer in (*offers, *offers)]
    answers = await asyncio.gather(*calls)
    won = [answer.json()["match"]["id"] for answer in answers if answer.status_code == 200]
    lost = [answer.json() for answer in answers if answer.status_code != 200]
    assert len(set(won)) == 3
    assert len(won) == 6
    assert {(answer["status"], answer["reason"]) for answer in lost} == {(409, "CAPACITY_FULL")}
    row = await hub.pool.fetchrow("SELECT taken, capacity FROM provider_quarter WHERE provider_id = 'forming'")
    assert row is not None
    assert (row["taken"], row["capacity"]) == (3, 3)
    assert await hub.pool.fetchval("SELECT count(*) FROM match WHERE provider_id = 'forming'") == 3
    with pytest.raises(asyncpg.CheckViolationError, match="provider_quarter_capacity_check"):
        await hub.pool.execute("UPDATE provider_quarter SET taken = taken + 1 WHERE provider_id = 'forming'")
    # A smaller capacity keeps what is promised and gives no more; a larger one gives places again.
    await hub.put_providers("forming", capacity_per_quarter=1)
    assert (await open_need(hub))["need"]["no_offer_reason"] == "ALL_FULL"
    # Nor does a place that is given back above it.
    await hub.ok("firm", "POST", f"/v1/matches/{won[0]}/cancel", {"reason": "solved it", "close_need": True})
    assert (await open_need(hub))["need"]["no_offer_reason"] == "ALL_FULL"
    await hub.put_providers("forming", capacity_per_quarter=3)
    await hub.matched("forming")


async def test_a_need_is_matched_once_whichever_offers_are_accepted_together(hub: Hub) -> None:
    await hub.put_providers()
    offers = (await open_need(hub))["offers"]
    assert len(offers) >= 2
    answers = await asyncio.gather(*(hub.call("firm", "POST", f"/v1/offers/{each['id']}/accept") for each in offers))
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * (len(offers) - 1)
    assert {answer.json()["reason"] for answer in answers if answer.status_code == 409} == {"OFFER_LAPSED"}


async def test_a_full_provider_is_not_offered_and_a_course_is_the_safety_net(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", capacity_per_quarter=1)
    taken = (await hub.ok("partner", "GET", "/v1/providers/gear-rigs"))["taken_this_quarter"]
    await hub.put_providers("gear-rigs", capacity_per_quarter=taken + 1)
    first = await open_need(hub)
    await hub.ok("firm", "POST", f"/v1/offers/{first['offers'][0]['id']}/accept")
    nobody = await open_need(hub)
    assert (nobody["offers"], nobody["need"]["no_offer_reason"]) == ([], "ALL_FULL")
    await hub.put_providers("iot-basics")
    assert [offer["provider_id"] for offer in (await open_need(hub))["offers"]] == ["iot-basics"]

    async def offered_afterwards() -> bool:
        return bool(await offers_of(hub, nobody["need"]["id"]))

    await eventually(offered_afterwards)
    need = await hub.ok("firm", "GET", f"/v1/needs/{nobody['need']['id']}")
    assert (need["offers"], need["no_offer_reason"]) == (1, "")


async def test_a_need_without_any_provider_says_so_and_gets_offers_once_there_is_one(hub: Hub) -> None:
    # More than are tried again at once, so that none waits behind the others.
    needs = [
        await open_need(hub, f"Gears whine, case {number}.", machine_id=machine_id(FIRM, 9)) for number in range(25)
    ]
    assert {(each["need"]["offers"], each["need"]["no_offer_reason"]) for each in needs} == {(0, "NO_PROVIDER")}

    async def all_tried() -> bool:
        """Nobody is tried again before something has changed."""
        against = Tried(hub.index.change, quarter_of(from_us(hub.clock.now_us()).date()))
        async with hub.pool.acquire() as connection:
            return await needs_store.needs_to_try(connection, against, limit=1) == []

    await eventually(all_tried)
    # What it was searched with is used again, not its text.
    first = needs[0]["need"]["id"]
    vector = await hub.index.compute(lambda ranker: ranker.question(PROVIDERS["gear-rigs"]["text"]))
    await hub.pool.execute("UPDATE need_vector SET vector = $2 WHERE need_id = $1", first, stored(vector))
    await hub.put_providers("gear-rigs", region_bound=True, region="Scotland", regions_served=[])
    opened = await open_need(hub)
    assert (opened["offers"], opened["need"]["no_offer_reason"]) == ([], "NONE_FITS")
    await hub.put_providers("gear-rigs")

    async def all_offered() -> bool:
        return all(need["offers"] == 1 for need in await hub.needs_of(machine_id(FIRM, 9)))

    await eventually(all_offered)
    [near], [far] = [await offers_of(hub, need_id) for need_id in (first, needs[1]["need"]["id"])]
    assert near["parts"]["meaning"] > far["parts"]["meaning"] + 0.3
    await eventually(all_tried)


async def test_offers_that_run_out_unanswered_close_the_need_and_its_firm_is_told(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    opened = await open_need(hub)
    need_id, (first, second) = opened["need"]["id"], opened["offers"]
    await hub.ok("partner", "POST", f"/v1/providers/{first['provider_id']}/withdraw")

    async def states(*expected: tuple[str, str]) -> bool:
        found = [(offer["state"], offer["decision_reason"]) for offer in await offers_of(hub, need_id)]
        return found == list(expected)

    await eventually(functools.partial(states, ("lapsed", "PROVIDER_GONE"), ("made", "")))
    hub.clock.shift = timedelta(days=14, seconds=1)
    await eventually(functools.partial(states, ("lapsed", "PROVIDER_GONE"), ("lapsed", "EXPIRED")))
    refused = await hub.call("firm", "POST", f"/v1/offers/{second['id']}/accept")
    assert (refused.status_code, refused.json()["reason"]) == (409, "OFFER_LAPSED")
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["state"], need["close_reason"]) == ("closed", "NOT_ANSWERED")
    assert await told(hub, need_id) == ["need_closed"]

    async def published() -> bool:
        changes = [event.change for event in await events_of(cluster, need_id)]
        return changes.count(events_pb2.OFFER_CHANGE_LAPSED) == 2

    await eventually(published)


async def offered(hub: Hub, need_id: str) -> set[str]:
    """Providers whose offers stand."""
    return {each["provider_id"] for each in await offers_of(hub, need_id) if each["state"] == "made"}


async def test_a_declined_offer_keeps_its_reason_and_the_firms_last_no_closes_the_need(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    opened = await open_need(hub)
    first, second = opened["offers"]
    assert (await hub.call("firm", "POST", f"/v1/offers/{first['id']}/decline", {"reason": " "})).status_code == 400
    declined = await hub.ok("firm", "POST", f"/v1/offers/{first['id']}/decline", {"reason": "too far away"})
    assert (declined["state"], declined["decision_reason"]) == ("declined", "too far away")
    repeated = await hub.ok("firm", "POST", f"/v1/offers/{first['id']}/decline", {"reason": "again"})
    assert repeated["decision_reason"] == "too far away"
    assert (await hub.call("firm", "POST", f"/v1/offers/{first['id']}/accept")).json()["reason"] == "OFFER_DECLINED"
    assert (await hub.ok("firm", "GET", f"/v1/needs/{opened['need']['id']}"))["state"] == "open"
    await hub.ok("firm", "POST", f"/v1/offers/{second['id']}/decline", {"reason": "no time"})
    need = await hub.ok("firm", "GET", f"/v1/needs/{opened['need']['id']}")
    assert (need["state"], need["close_reason"], need["close_note"]) == ("closed", "DECLINED", "")
    assert await told(hub, need["id"]) == ["need_closed"]


async def test_a_need_whose_last_offer_others_end_stays_open_and_gets_others(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    opened = await open_need(hub)
    need_id, [offer] = opened["need"]["id"], opened["offers"]
    # The partner says no for its provider, without learning who asked.
    by_partner = await hub.ok("partner", "POST", f"/v1/offers/{offer['id']}/decline", {"reason": "no time"})
    assert (by_partner["state"], by_partner["firm_id"]) == ("declined", 0)
    assert await told(hub, need_id) == ["offers_ended"]

    async def nobody_else() -> bool:
        need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
        return (need["state"], need["offers"], need["no_offer_reason"]) == ("open", 0, "NONE_FITS")

    await eventually(nobody_else)
    await hub.put_providers("iot-basics")

    async def by(provider_id: str) -> bool:
        return await offered(hub, need_id) == {provider_id}

    await eventually(functools.partial(by, "iot-basics"))
    # Withdrawn: the hub looks on, and who declined is not asked again.
    await hub.put_providers("dashboards")
    await hub.ok("partner", "POST", "/v1/providers/iot-basics/withdraw")
    await eventually(functools.partial(by, "dashboards"))
    assert await told(hub, need_id) == ["offers_made", "offers_ended"] * 2
    [last] = [each for each in await offers_of(hub, need_id) if each["state"] == "made"]
    await hub.ok("firm", "POST", f"/v1/offers/{last['id']}/accept")


async def test_offers_that_are_all_full_lapse_and_others_follow(hub: Hub) -> None:
    expert = {**PROVIDERS["forming"], "region": "East Midlands", "capacity_per_quarter": 1}
    for number in range(5):
        await hub.ok("partner", "PUT", f"/v1/providers/full-{number}", expert)
    opened = await open_need(hub, "Our pressings split.")
    need_id = opened["need"]["id"]
    assert len(opened["offers"]) == 5
    for each in opened["offers"]:
        await hub.matched(each["provider_id"], "Our pressings split.", "other_firm")
    for number, each in enumerate(opened["offers"]):
        full = await hub.call("firm", "POST", f"/v1/offers/{each['id']}/accept")
        assert (full.status_code, full.json()["reason"]) == (409, "CAPACITY_FULL")
        if number == 0:  # the firm need not find out one by one
            assert {(one["state"], one["decision_reason"]) for one in await offers_of(hub, need_id)} == {
                ("lapsed", "FULL")
            }
    again = await hub.call("firm", "POST", f"/v1/offers/{opened['offers'][0]['id']}/accept")
    assert again.json()["reason"] == "CAPACITY_FULL"
    assert (await offers_of(hub, need_id))[0]["decision_reason"] == "FULL"

    async def all_full() -> bool:
        return bool((await hub.ok("firm", "GET", f"/v1/needs/{need_id}"))["no_offer_reason"] == "ALL_FULL")

    await eventually(all_full)
    assert "offers_ended" in await told(hub, need_id)
    # One has a place again: it may be offered once more.
    await hub.ok("partner", "PUT", "/v1/providers/full-3", {**expert, "capacity_per_quarter": 2})

    async def has_place() -> bool:
        return await offered(hub, need_id) == {"full-3"}

    await eventually(has_place)
    [offer] = [each for each in await offers_of(hub, need_id) if each["state"] == "made"]
    await hub.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept")


async def test_a_firm_closes_its_need_with_a_reason(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    opened = await open_need(hub)
    need_id, path = opened["need"]["id"], f"/v1/needs/{opened['need']['id']}/close"
    for who, body, status in (
        ("other_firm", {"reason": "spite"}, 404),
        ("partner", {"reason": "spite"}, 403),
        ("firm", {"reason": " "}, 400),
        ("firm", {"reason": "x" * 501}, 400),
    ):
        assert (await hub.call(who, "POST", path, body)).status_code == status
    closed = await hub.ok("firm", "POST", path, {"reason": "A false alarm."})
    assert (closed["state"], closed["close_reason"], closed["close_note"]) == ("closed", "BY_FIRM", "A false alarm.")
    assert await hub.ok("firm", "POST", path, {"reason": "again"}) == closed
    states = {(each["state"], each["decision_reason"]) for each in await offers_of(hub, need_id)}
    assert states == {("lapsed", "NEED_CLOSED")}
    assert await told(hub, need_id) == ["need_closed"]
    match = await hub.matched("gear-rigs")
    matched = await hub.call("firm", "POST", f"/v1/needs/{match['need_id']}/close", {"reason": "solved it"})
    assert (matched.status_code, matched.json()["reason"]) == (409, "NEED_MATCHED")
    # By gRPC, also one that nobody was offered for.
    await hub.withdraw_all()
    waiting = await open_need(hub)
    request = matching_pb2.CloseNeedRequest(need_id=waiting["need"]["id"], reason="solved it")
    answer = await hub.stub.CloseNeed(request, metadata=bearer("firm"))
    assert (answer.need.state, answer.need.close_note) == (matching_pb2.NEED_STATE_CLOSED, "solved it")


async def test_a_need_that_nobody_could_be_offered_for_is_closed_in_the_end(hub: Hub) -> None:
    need_id = (await open_need(hub))["need"]["id"]
    hub.clock.shift = timedelta(days=180, seconds=1)

    async def closed() -> bool:
        return bool((await hub.ok("firm", "GET", f"/v1/needs/{need_id}"))["close_reason"] == "EXPIRED")

    await eventually(closed)
    assert await told(hub, need_id) == ["need_closed"]


async def test_a_repeated_request_opens_no_second_need(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    body = {"text": "Our gears whine.", "request_id": "order-66"}
    answers = await asyncio.gather(*(hub.ok("firm", "POST", "/v1/needs", body) for _ in range(5)))
    assert len({answer["need"]["id"] for answer in answers}) == 1
    assert len({answer["offers"][0]["id"] for answer in answers}) == 1
    other = await hub.call("firm", "POST", "/v1/needs", {**body, "text": "Something else."})
    assert (other.status_code, other.json()["reason"]) == (409, "REQUEST_ID_REUSED")
    # Another firm's request of the same id is another request.
    await hub.ok("other_firm", "POST", "/v1/needs", {**body, "text": "Something else."})
    consent = {"shared": ["fault"], "request_id": "agreed-1"}
    first, again = [await hub.ok("firm", "POST", "/v1/consents", consent) for _ in range(2)]
    assert first == again
    other = await hub.call("firm", "POST", "/v1/consents", {**consent, "shared": SHARE_ALL})
    assert (other.status_code, other.json()["reason"]) == (409, "REQUEST_ID_REUSED")


async def test_a_provider_keeps_its_partner_once_it_has_been_offered(hub: Hub) -> None:
    theirs = {**PROVIDERS["forming"], "partner_id": OTHER_PARTNER}
    await hub.ok("partner", "PUT", "/v1/providers/moving", PROVIDERS["forming"])
    moved = await hub.ok("operator", "PUT", "/v1/providers/moving", theirs)
    assert moved["partner_id"] == OTHER_PARTNER
    await open_need(hub, "Our pressings split at the corner.")
    back = {**theirs, "partner_id": PARTNER}
    refused = await hub.call("operator", "PUT", "/v1/providers/moving", back)
    assert (refused.status_code, refused.json()["reason"]) == (409, "PROVIDER_IN_USE")
    assert (await hub.ok("operator", "PUT", "/v1/providers/moving", theirs))["partner_id"] == OTHER_PARTNER


async def test_things_of_other_firms_and_partners_are_not_there(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    opened = await open_need(hub, machine_id=machine_id(FIRM, 6))
    need_id, offer_id = opened["need"]["id"], opened["offers"][0]["id"]
    absent: list[tuple[str, str, str, Any]] = [
        ("other_firm", "GET", f"/v1/needs/{need_id}", None),
        ("other_firm", "GET", f"/v1/needs/{need_id}/offers", None),
        ("other_firm", "POST", f"/v1/offers/{offer_id}/accept", None),
        ("other_firm", "POST", f"/v1/offers/{offer_id}/decline", {"reason": "spite"}),
        ("other_partner", "GET", f"/v1/needs/{need_id}/offers", None),
        ("other_partner", "POST", f"/v1/offers/{offer_id}/decline", {"reason": "spite"}),
        ("other_partner", "POST", "/v1/providers/gear-rigs/withdraw", None),
        ("firm", "GET", "/v1/needs/" + "0" * 32, None),
        ("firm", "POST", "/v1/offers/nonsense/accept", None),
        ("firm", "GET", "/v1/needs/%00", None),
        ("firm", "GET", "/v1/providers/%F0%9F%92%A9", None),
        ("firm", "POST", "/v1/needs", {"text": "x", "machine_id": machine_id(OTHER_FIRM, 0)}),
        ("firm", "POST", "/v1/consents", {"shared": ["fault"], "machine_ids": [machine_id(OTHER_FIRM, 0)]}),
        ("operator", "POST", "/v1/needs", {"text": "x", "firm_id": 999}),
    ]
    for who, method, path, body in absent:
        response = await hub.call(who, method, path, body)
        assert response.status_code == 404, (who, method, path, response.text)
    forbidden: list[tuple[str, str, str, Any]] = [
        ("device", "GET", "/v1/needs", None),
        ("partner", "POST", f"/v1/offers/{offer_id}/accept", None),
        ("partner", "GET", f"/v1/needs/{need_id}", None),
        ("firm", "PUT", "/v1/providers/mine", PROVIDERS["forming"]),
        ("firm", "GET", f"/v1/needs?firm_id={OTHER_FIRM}", None),
        ("other_partner", "PUT", "/v1/providers/gear-rigs", PROVIDERS["gear-rigs"]),
        ("partner", "PUT", "/v1/providers/theirs", {**PROVIDERS["forming"], "partner_id": 2}),
    ]
    for who, method, path, body in forbidden:
        response = await hub.call(who, method, path, body)
        assert response.status_code == 403, (who, method, path, response.text)
    assert (await hub.call("", "GET", "/v1/needs")).status_code == 401
    # A partner sees what is asked of its provider, and by whom only once it is a match.
    mine = next(
        each
        for each in (await hub.ok("partner", "GET", "/v1/offers?page_size=500"))["offers"]
        if each["id"] == offer_id
    )
    assert (mine["firm_id"], mine["machine_id"], mine["need_text"]) == (0, 0, opened["need"]["text"])
    await hub.ok("firm", "POST", f"/v1/offers/{offer_id}/accept")
    [mine] = await offers_of(hub, need_id, who="partner")
    assert (mine["firm_id"], mine["machine_id"]) == (FIRM, machine_id(FIRM, 6))
    assert need_id not in {each["id"] for each in (await hub.ok("other_firm", "GET", "/v1/needs"))["needs"]}


@pytest.mark.parametrize(
    ("who", "method", "path", "body", "reason"),
    [
        ("firm", "POST", "/v1/needs", {"text": ""}, "TEXT_MISSING"),
        ("firm", "POST", "/v1/needs", {"text": " \u200b?! "}, "TEXT_MISSING"),
        ("firm", "POST", "/v1/needs", {"text": "x" * 4001}, "TEXT_TOO_LONG"),
        ("firm", "POST", "/v1/needs", {"text": "a\x00b"}, "NOT_TEXT"),
        ("firm", "POST", "/v1/needs", {"text": "x", "urgency": "panic"}, "INVALID"),
        ("firm", "POST", "/v1/needs", {"text": "x", "surprise": 1}, "INVALID"),
        ("firm", "POST", "/v1/needs", {"text": "x", "machine_id": 2**63}, "INVALID"),
        ("firm", "POST", "/v1/needs", {"text": "x", "request_id": "a b"}, "BAD_REQUEST_ID"),
        ("operator", "POST", "/v1/needs", {"text": "x"}, "FIRM_MISSING"),
        ("firm", "GET", "/v1/needs?page_size=501", None, "BAD_PAGE_SIZE"),
        ("firm", "GET", "/v1/needs?page_token=nonsense", None, "BAD_PAGE_TOKEN"),
        ("firm", "GET", "/v1/offers?page_token=1.2", None, "BAD_PAGE_TOKEN"),
        ("firm", "GET", "/v1/providers?page_token=%00", None, "BAD_PAGE_TOKEN"),
        ("firm", "GET", "/v1/needs?state=lost", None, "INVALID"),
        ("firm", "POST", "/v1/consents", {"shared": []}, "FAULT_NOT_SHARED"),
        ("firm", "POST", "/v1/consents", {"shared": ["everything"]}, "INVALID"),
        ("firm", "POST", "/v1/consents", {"shared": ["fault"], "severity_min": "x"}, "BAD_SEVERITY_MIN"),
        ("firm", "POST", "/v1/consents", {"shared": ["fault"], "from_us": 2**62}, "BAD_TIME"),
        ("firm", "POST", "/v1/consents", {"shared": ["fault"], "from_us": 5, "until_us": 5}, "EMPTY_PERIOD"),
        ("operator", "POST", "/v1/consents", {"shared": ["fault"], "firm_id": 1}, "NOTE_MISSING"),
        ("partner", "PUT", "/v1/providers/a%20b", PROVIDERS["forming"], "BAD_ID"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "title": " "}, "TITLE_MISSING"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "kind": "oracle"}, "INVALID"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "capacity_per_quarter": 0}, "BAD_CAPACITY"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "sic_divisions": ["abc"]}, "BAD_SIC_DIVISION"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "skills": ["s"] * 51}, "TOO_MANY"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "lead_days": -1}, "BAD_LEAD_DAYS"),
        ("partner", "PUT", "/v1/providers/x", {**PROVIDERS["forming"], "expires_on": "soon"}, "INVALID"),
    ],
)
async def test_bad_input_is_refused_with_its_reason(
    one_hub: Hub, who: str, method: str, path: str, body: Any, reason: str
) -> None:
    response = await one_hub.call(who, method, path, body)
    assert (response.status_code, response.json()["reason"]) == (400, reason), response.text


async def test_lists_go_page_by_page(hub: Hub) -> None:
    await hub.put_providers()
    for number in range(5):
        await open_need(hub, f"Gears whine, case {number}.", machine_id=machine_id(FIRM, 7))
    texts, token, pages = [], "", 0
    while True:
        page = await hub.ok("firm", "GET", f"/v1/needs?machine_id={machine_id(FIRM, 7)}&page_size=2&page_token={token}")
        texts += [need["text"] for need in page["needs"]]
        token, pages = page["next_page_token"], pages + 1
        if not token:
            break
    assert pages == 3
    assert texts == [f"Gears whine, case {number}." for number in (4, 3, 2, 1, 0)]
    first = await hub.ok("firm", "GET", "/v1/providers?page_size=3")
    rest = await hub.ok("firm", "GET", f"/v1/providers?page_size=3&page_token={first['next_page_token']}")
    assert [each["id"] for each in first["providers"] + rest["providers"]] == sorted(PROVIDERS)
    offers = await hub.ok("firm", "GET", "/v1/offers?state=made&page_size=7")
    more = await hub.ok("firm", "GET", f"/v1/offers?state=made&page_token={offers['next_page_token']}")
    assert not {each["id"] for each in offers["offers"]} & {each["id"] for each in more["offers"]}


async def test_the_same_by_grpc(hub: Hub) -> None:
    pb = matching_pb2

    def key(who: str) -> Any:
        return (("authorization", f"Bearer {KEYS[who]}"), ("x-correlation-id", "by-grpc"))

    provider = pb.Provider(
        id="vibration",
        kind=events_pb2.PROVIDER_KIND_EXPERT,
        title="Vibration analyst",
        text="Finds worn bearings and gears by their vibration.",
        region="Wales",
        capacity_per_quarter=1,
    )
    put = await hub.stub.PutProvider(pb.PutProviderRequest(provider=provider), metadata=key("partner"))
    assert put.provider.active
    assert put.provider.partner_id == 1
    given = await hub.stub.GiveConsent(
        pb.GiveConsentRequest(shared=[pb.SHARED_ITEM_FAULT, pb.SHARED_ITEM_PROFILE]), metadata=key("firm")
    )
    assert list(given.consent.shared) == [pb.SHARED_ITEM_FAULT, pb.SHARED_ITEM_PROFILE]
    found = await hub.stub.GetConsent(pb.GetConsentRequest(), metadata=key("firm"))
    assert found.current == given.consent
    revoked = await hub.stub.RevokeConsent(pb.RevokeConsentRequest(), metadata=key("firm"))
    assert revoked.consent.ended_us
    opened = await hub.stub.OpenNeed(
        pb.OpenNeedRequest(text="The spindle shakes.", urgency=pb.URGENCY_HIGH), metadata=key("firm")
    )
    assert opened.need.correlation_id == "by-grpc"
    assert opened.need.state == pb.NEED_STATE_OPEN
    [offer] = opened.offers
    assert offer.offer.provider_id == "vibration"
    listed = await hub.stub.ListOffers(pb.ListOffersRequest(need_id=opened.need.id), metadata=key("firm"))
    assert listed.offers[0] == offer
    accepted = await hub.stub.AcceptOffer(pb.AcceptOfferRequest(offer_id=offer.offer.id), metadata=key("firm"))
    assert accepted.offer.state == pb.OFFER_STATE_ACCEPTED
    assert accepted.match.need_id == opened.need.id
    needs = await hub.stub.ListNeeds(pb.ListNeedsRequest(state=pb.NEED_STATE_MATCHED), metadata=key("firm"))
    assert opened.need.id in {need.id for need in needs.needs}
    got = await hub.stub.GetNeed(pb.GetNeedRequest(need_id=opened.need.id), metadata=key("firm"))
    assert got.need.match_id == accepted.match.id
    second = await hub.stub.OpenNeed(pb.OpenNeedRequest(text="It shakes again."), metadata=key("firm"))
    assert (len(second.offers), second.need.no_offer_reason) == (0, "ALL_FULL")
    provider.capacity_per_quarter = 2
    await hub.stub.PutProvider(pb.PutProviderRequest(provider=provider), metadata=key("partner"))
    third = await hub.stub.OpenNeed(pb.OpenNeedRequest(text="And again."), metadata=key("firm"))
    declined = await hub.stub.DeclineOffer(
        pb.DeclineOfferRequest(offer_id=third.offers[0].offer.id, reason="solved it"), metadata=key("firm")
    )
    assert (declined.offer.state, declined.offer.decision_reason) == (pb.OFFER_STATE_DECLINED, "solved it")
    providers = await hub.stub.ListProviders(pb.ListProvidersRequest(), metadata=key("firm"))
    assert [each.id for each in providers.providers] == ["vibration"]
    assert providers.providers[0].taken_this_quarter == 1
    withdrawn = await hub.stub.WithdrawProvider(
        pb.WithdrawProviderRequest(provider_id="vibration"), metadata=key("partner")
    )
    assert not withdrawn.provider.active
    known = await hub.stub.GetProvider(pb.GetProviderRequest(provider_id="vibration"), metadata=key("partner"))
    assert known.provider == withdrawn.provider
    for call, request, code, reason in [
        (hub.stub.GetNeed, pb.GetNeedRequest(need_id=opened.need.id), grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
        (hub.stub.OpenNeed, pb.OpenNeedRequest(), grpc.StatusCode.INVALID_ARGUMENT, "TEXT_MISSING"),
        (hub.stub.OpenNeed, pb.OpenNeedRequest(text="x", urgency=9), grpc.StatusCode.INVALID_ARGUMENT, "BAD_URGENCY"),  # type: ignore[arg-type]
        (hub.stub.ListNeeds, pb.ListNeedsRequest(firm_id=-1), grpc.StatusCode.PERMISSION_DENIED, "FORBIDDEN"),
        (hub.stub.ListNeeds, pb.ListNeedsRequest(page_size=-1), grpc.StatusCode.INVALID_ARGUMENT, "BAD_PAGE_SIZE"),
        (
            hub.stub.GiveConsent,
            pb.GiveConsentRequest(shared=[pb.SHARED_ITEM_FAULT], until_us=-(2**62)),
            grpc.StatusCode.INVALID_ARGUMENT,
            "BAD_TIME",
        ),
        (
            hub.stub.PutProvider,
            pb.PutProviderRequest(provider=provider),
            grpc.StatusCode.PERMISSION_DENIED,
            "FORBIDDEN",
        ),
    ]:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request, metadata=key("other_firm"))  # type: ignore[operator]
        assert refused.value.code() is code
        assert dict(refused.value.trailing_metadata() or ())["reason"] == reason


async def test_another_replica_sees_a_changed_provider_within_a_second(hub: Hub, settings: Settings) -> None:
    async with running_hub(settings, publishing=False, taking_alarms=False, upkeep_runs=False) as replica:
        await hub.put_providers("gear-rigs")
        deadline = asyncio.get_running_loop().time() + 1

        async def seen() -> bool:
            return replica.index.change == hub.index.change

        await eventually(seen, deadline_s=1)
        assert asyncio.get_running_loop().time() < deadline
        offers = (await open_need(replica))["offers"]
        assert [offer["provider_id"] for offer in offers] == ["gear-rigs"]
