"""What firms and partners are told of things that happened while they were not there."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest_asyncio

from services.common.kafka import Publisher
from services.common.settings import Settings
from services.matching.service.notices import KEPT_FOR
from smdih.matching.v1 import notices_pb2, notices_pb2_grpc
from tests.integration.matching_hub import (
    FIRM,
    Hub,
    bearer,
    machine_id,
    publish_world,
    refused_by_grpc,
    running_hub,
)
from tests.polling import eventually

GEARS = "Our gears whine and the oil is full of debris."


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    await one_hub.pool.execute("DELETE FROM notice")
    yield one_hub
    one_hub.clock.shift = timedelta(0)


async def told(hub: Hub, who: str, query: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await hub.ok(who, "GET", f"/v1/notices{query}"))["notices"]
    return found


async def session(hub: Hub, session_id: str) -> None:
    starts_us = hub.clock.now_us() + 20 * 86_400_000_000
    body = {"provider_id": "dashboards", "title": "Dashboards", "starts_us": starts_us, "ends_us": starts_us + 1}
    await hub.ok("partner", "PUT", f"/v1/sessions/{session_id}", {**body, "seats": 1, "confirm_within_s": 3600})


async def book(hub: Hub, session_id: str, who: str) -> str:
    booked: str = (await hub.ok(who, "POST", "/v1/bookings", {"session_id": session_id}))["id"]
    return booked


async def test_who_moves_up_the_line_is_told_of_the_seat_and_of_its_loss(hub: Hub) -> None:
    await hub.put_providers("dashboards")
    await session(hub, "told-1")
    first, second = await book(hub, "told-1", "firm"), await book(hub, "told-1", "other_firm")
    assert await told(hub, "firm") == await told(hub, "other_firm") == []
    await hub.ok("firm", "POST", f"/v1/bookings/{first}/cancel")
    [seat] = await told(hub, "other_firm", "?unread=true")
    assert (seat["kind"], seat["subject_id"], seat["read_us"]) == ("seat_offered", second, None)
    booking = await hub.ok("other_firm", "GET", f"/v1/bookings/{second}")
    assert (seat["act_by_us"], seat["correlation_id"]) == (booking["confirm_by_us"], booking["correlation_id"])
    assert seat["text"].startswith('A seat at "Dashboards" on ')
    assert "Confirm it by" in seat["text"]
    # Who gave the seat back did it itself.
    assert await told(hub, "firm") == []
    hub.clock.shift = timedelta(hours=1, seconds=1)

    async def lost() -> bool:
        return [each["kind"] for each in await told(hub, "other_firm")] == ["seat_lost", "seat_offered"]

    await eventually(lost)


async def test_a_booking_that_the_partner_ends_is_told_with_its_reason(hub: Hub) -> None:
    await hub.put_providers("dashboards")
    for session_id in ("told-2", "told-3"):
        await session(hub, session_id)
    one, two = await book(hub, "told-2", "firm"), await book(hub, "told-3", "firm")
    await hub.ok("partner", "POST", f"/v1/bookings/{one}/cancel", {"reason": "the room is smaller"})
    await hub.ok("partner", "POST", "/v1/sessions/told-3/cancel", {"reason": "the trainer is ill"})
    by_booking = {each["subject_id"]: each for each in await told(hub, "firm")}
    assert {booking: each["kind"] for booking, each in by_booking.items()} == {
        one: "booking_cancelled",
        two: "booking_cancelled",
    }
    assert by_booking[one]["text"].endswith("was cancelled: the room is smaller")
    assert by_booking[two]["text"].endswith("was cancelled: the trainer is ill")


async def test_offers_that_come_later_and_what_becomes_of_matches_are_told_to_the_side_that_was_not_there(
    hub: Hub,
) -> None:
    # What the firm asked for itself and got at once is no news.
    await hub.put_providers("gear-rigs")
    opened = await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS})
    assert opened["offers"]
    assert await told(hub, "firm") == []
    match = (await hub.ok("firm", "POST", f"/v1/offers/{opened['offers'][0]['id']}/accept"))["match"]
    [accepted] = await told(hub, "partner")
    assert (accepted["kind"], accepted["subject_id"], accepted["act_by_us"]) == (
        "offer_accepted",
        match["id"],
        match["engage_by_us"],
    )
    assert "Acme" not in accepted["text"]
    # Cancelled by the partner: the firm is told, and of the new offers.
    await hub.put_providers("forming")
    await hub.ok("partner", "POST", f"/v1/matches/{match['id']}/cancel", {"reason": "Our rig is down."})

    async def offered_again() -> bool:
        return [each["kind"] for each in await told(hub, "firm")] == ["offers_made", "match_cancelled"]

    await eventually(offered_again)
    again, ended = await told(hub, "firm")
    assert "has ended: Our rig is down. Your need is open again" in ended["text"]
    assert (again["subject_id"], again["text"].startswith("An offer waits")) == (opened["need"]["id"], True)
    assert [each["kind"] for each in await told(hub, "partner")] == ["offer_accepted"]
    # A need that waits for a round, and one that a machine raised.
    await hub.put_providers("iot-basics")
    waiting = await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS, "wait_for_round": True})
    await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "told"})
    assert await hub.matching.rounds.carry_out()
    assert (await told(hub, "firm"))[0]["subject_id"] == waiting["need"]["id"]
    await hub.ok("firm", "POST", "/v1/consents", {"shared": ["fault"]})
    machine = machine_id(FIRM, 7)
    await hub.raise_alarm("told-alarm", machine)

    async def told_of_alarm() -> bool:
        needs = await hub.needs_of(machine)
        return bool(needs) and (await told(hub, "firm"))[0]["subject_id"] == needs[0]["id"]

    await eventually(told_of_alarm)
    # Proposed by a partner.
    need_id = (await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS, "show_to_partners": True}))["need"]["id"]
    expert = {"kind": "expert", "title": "Gear noise", "text": "Finds whining gears.", "capacity_per_quarter": 1}
    await hub.ok("partner", "PUT", "/v1/providers/told-expert", expert)
    for _ in range(2):  # the second is a repeat
        await hub.ok("partner", "POST", f"/v1/desk/needs/{need_id}/propose", {"provider_id": "told-expert"})
    assert [each["subject_id"] for each in await told(hub, "firm")].count(need_id) == 1
    # Nobody engages: both are told.
    third = (await hub.ok("firm", "GET", f"/v1/needs/{need_id}/offers"))["offers"][-1]
    match = (await hub.ok("firm", "POST", f"/v1/offers/{third['id']}/accept"))["match"]
    hub.clock.shift = timedelta(days=181)

    async def expired() -> bool:
        firm, partner = await told(hub, "firm"), await told(hub, "partner")
        return all(
            ("match_expired", match["id"]) in {(n["kind"], n["subject_id"]) for n in of} for of in (firm, partner)
        )

    await eventually(expired)


async def test_notices_are_read_page_by_page_by_their_side_only_and_by_grpc(hub: Hub) -> None:
    notices, pb = notices_pb2_grpc.NoticeServiceStub(hub.channel), notices_pb2
    await hub.put_providers("dashboards")
    for number in range(3):
        await session(hub, f"told-page-{number}")
        booking = await book(hub, f"told-page-{number}", "firm")
        await hub.ok("partner", "POST", f"/v1/bookings/{booking}/cancel", {"reason": "moved"})
    pages, token = [], ""
    while True:
        page = await hub.ok("firm", "GET", f"/v1/notices?page_size=2&page_token={token}")
        pages.append([each["id"] for each in page["notices"]])
        token = page["next_page_token"]
        if not token:
            break
    assert [len(page) for page in pages] == [2, 1]
    # What a later release tells, while both run.
    await hub.pool.execute(
        "INSERT INTO notice (id, firm_id, kind, subject_id, text, made, correlation_id) VALUES "
        "(repeat('f', 32), $1, 'of_tomorrow', '', '', now(), '')",
        FIRM,
    )
    assert len(await told(hub, "firm")) == 3
    newest = pages[0][0]
    for _ in range(2):  # the second is a repeat
        read = await hub.ok("firm", "POST", f"/v1/notices/{newest}/read")
    assert read["read_us"] > 0
    unread = await notices.ListNotices(pb.ListNoticesRequest(unread=True), metadata=bearer("firm"))
    assert [each.id for each in unread.notices] == [*pages[0][1:], *pages[1]]
    assert {each.kind for each in unread.notices} == {pb.NOTICE_KIND_BOOKING_CANCELLED}
    mark = pb.MarkNoticeReadRequest(notice_id=pages[1][0])
    marked = (await notices.MarkNoticeRead(mark, metadata=bearer("firm"))).notice
    assert (marked.id, marked.read_us > 0, marked.text.endswith("cancelled: moved")) == (pages[1][0], True, True)
    assert await told(hub, "other_firm") == await told(hub, "partner") == []
    for who, status in (("other_firm", 404), ("partner", 404), ("operator", 403), ("device", 403), ("", 401)):
        assert (await hub.call(who, "POST", f"/v1/notices/{newest}/read")).status_code == status
    for who, code in (("other_firm", "NOT_FOUND"), ("operator", "PERMISSION_DENIED"), ("", "UNAUTHENTICATED")):
        assert await refused_by_grpc(notices.MarkNoticeRead, mark, who) == code
    for who, status in (("operator", 403), ("device", 403), ("", 401)):
        assert (await hub.call(who, "GET", "/v1/notices")).status_code == status
    assert (await hub.call("firm", "POST", "/v1/notices/nonsense/read")).status_code == 404
    assert (await hub.call("firm", "GET", "/v1/notices?page_token=x")).json()["reason"] == "BAD_PAGE_TOKEN"
    hub.clock.shift = KEPT_FOR + timedelta(days=1)

    async def forgotten() -> bool:
        return not await told(hub, "firm")

    await eventually(forgotten)
