"""Dates of workshops and slots of facilities: seats, the line for them, calendar files."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition
from icalendar import Calendar

from services.common import topics
from services.common.clock import from_us, to_us
from services.common.errors import Forbidden, NotFound
from services.common.identity import Caller, Role
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.matching.sessions import BookingState, SessionState
from services.matching.store import sessions as sessions_store
from smdih.matching.v1 import events_pb2, sessions_pb2
from tests.integration.matching_hub import KEYS, PROVIDERS, Hub, publish_world, refused_by_grpc, running_hub
from tests.polling import eventually

LONDON = ZoneInfo("Europe/London")


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        await running.put_providers()
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    yield one_hub
    async with one_hub.pool.acquire() as connection:
        assert await sessions_store.over_booked(connection) == []
    one_hub.clock.shift = timedelta(0)


def body(hub: Hub, *, days: int = 20, seats: int = 2, **fields: Any) -> dict[str, Any]:
    starts_us = hub.clock.now_us() // 60_000_000 * 60_000_000 + days * 86_400_000_000
    return {
        "provider_id": "dashboards",
        "title": "Spreadsheets to dashboards",
        "place": "Room 4, Exeter",
        "starts_us": starts_us,
        "ends_us": starts_us + 6 * 3_600_000_000,
        "seats": seats,
        **fields,
    }


async def put(hub: Hub, session_id: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await hub.ok("partner", "PUT", f"/v1/sessions/{session_id}", body(hub, **fields))
    return found


async def book(hub: Hub, session_id: str, who: str = "firm", **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = await hub.ok(who, "POST", "/v1/bookings", {"session_id": session_id, **fields})
    return found


async def state_of(hub: Hub, booking: dict[str, Any]) -> str:
    found: str = (await hub.ok("operator", "GET", f"/v1/bookings/{booking['id']}"))["state"]
    return found


async def test_a_freed_seat_goes_to_the_first_in_line_who_has_a_deadline(hub: Hub) -> None:
    await put(hub, "day-1", seats=2, confirm_within_s=3600)
    first, second = await book(hub, "day-1"), await book(hub, "day-1", "other_firm")
    third, fourth, fifth = [await book(hub, "day-1", "other_firm") for _ in range(3)]
    assert [each["state"] for each in (first, second, third)] == ["confirmed", "confirmed", "waiting"]
    assert [each["in_line"] for each in (third, fourth, fifth)] == [1, 2, 3]
    await hub.ok("firm", "POST", f"/v1/bookings/{first['id']}/cancel")
    assert [await state_of(hub, each) for each in (first, third, fourth)] == ["cancelled", "offered", "waiting"]
    offered = await hub.ok("other_firm", "GET", f"/v1/bookings/{third['id']}")
    assert 0 < offered["confirm_by_us"] - hub.clock.now_us() <= 3_600_000_000
    # Who comes now stands behind those in line.
    late = await book(hub, "day-1")
    assert (late["state"], late["in_line"]) == ("waiting", 3)
    confirmed = await hub.ok("other_firm", "POST", f"/v1/bookings/{third['id']}/confirm")
    assert (confirmed["state"], confirmed["confirm_by_us"]) == ("confirmed", None)
    assert await hub.ok("other_firm", "POST", f"/v1/bookings/{third['id']}/confirm") == confirmed
    await hub.ok("partner", "POST", f"/v1/bookings/{second['id']}/cancel", {"reason": "double booking"})
    assert await state_of(hub, fourth) == "offered"
    hub.clock.shift = timedelta(hours=1, seconds=1)

    async def passed_on() -> bool:
        return [await state_of(hub, each) for each in (fourth, fifth)] == ["expired", "offered"]

    await eventually(passed_on)
    refused = await hub.call("other_firm", "POST", f"/v1/bookings/{fourth['id']}/confirm")
    assert (refused.status_code, refused.json()["reason"]) == (409, "BOOKING_EXPIRED")
    session = await hub.ok("firm", "GET", "/v1/sessions/day-1")
    assert (session["taken"], session["waiting"]) == (2, 1)
    # More seats: the line moves up.
    await hub.ok("partner", "PUT", "/v1/sessions/day-1", {**_put_of(session), "seats": 5})
    assert await state_of(hub, late) == "offered"
    fewer = await hub.call("partner", "PUT", "/v1/sessions/day-1", {**_put_of(session), "seats": 2})
    assert (fewer.status_code, fewer.json()["reason"]) == (409, "SEATS_TAKEN")


async def told(hub: Hub, booking: dict[str, Any], who: str = "firm") -> list[dict[str, Any]]:
    found = (await hub.ok(who, "GET", "/v1/notices?page_size=500"))["notices"]
    return [each for each in found if each["subject_id"] == booking["id"]]


async def test_who_booked_a_session_that_is_moved_is_told_and_no_seat_is_kept_beyond_its_beginning(
    hub: Hub, cluster: Cluster
) -> None:
    session = await put(hub, "moved", seats=1, confirm_within_s=30 * 86_400)
    first, second, third = await book(hub, "moved"), await book(hub, "moved", "other_firm"), await book(hub, "moved")
    await hub.ok("firm", "POST", f"/v1/bookings/{first['id']}/cancel")
    assert await state_of(hub, second) == "offered"
    earlier = session["starts_us"] - 10 * 86_400_000_000
    moved = {**_put_of(session), "starts_us": earlier, "place": "Room 5, Bath"}
    await hub.ok("partner", "PUT", "/v1/sessions/moved", moved)
    assert (await hub.ok("other_firm", "GET", f"/v1/bookings/{second['id']}"))["confirm_by_us"] == earlier
    for who, booking, act_by in (("other_firm", second, earlier), ("firm", third, earlier)):
        notice = (await told(hub, booking, who))[0]
        assert (notice["kind"], notice["act_by_us"]) == ("session_moved", act_by)
        assert "Room 5, Bath" in notice["text"]
    assert await told(hub, first) == []
    # More seats alone are no move.
    await hub.ok("partner", "PUT", "/v1/sessions/moved", {**moved, "seats": 2})
    assert [each["kind"] for each in await told(hub, third)] == ["seat_offered", "session_moved"]

    async def published() -> bool:
        events = [event for event in await booking_events(cluster) if event.booking_id == second["id"]]
        assert len({event.event_id for event in events}) == len(events)
        return [(event.starts_us, event.state) for event in events[-1:]] == [
            (earlier, events_pb2.BOOKING_STATE_OFFERED)
        ]

    await eventually(published)


async def booking_events(cluster: Cluster) -> list[events_pb2.BookingEvent]:
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        name = cluster.name(topics.BOOKINGS)
        partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name) or {0}]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        await consumer.seek_to_beginning(*partitions)
        events: list[events_pb2.BookingEvent] = []
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                for records in (await consumer.getmany(partition, timeout_ms=200)).values():
                    events += [events_pb2.BookingEvent.FromString(record.value) for record in records]
        return events
    finally:
        await consumer.stop()


async def test_the_line_ends_when_the_session_begins(hub: Hub) -> None:
    await put(hub, "begun", seats=1, days=2)
    confirmed = await book(hub, "begun", "other_firm")
    waiting = await book(hub, "begun")
    assert waiting["state"] == "waiting"
    hub.clock.shift = timedelta(days=2, minutes=1)

    async def ended() -> bool:
        return await state_of(hub, waiting) == "expired"

    await eventually(ended)
    assert [each["kind"] for each in await told(hub, waiting)] == ["no_seat"]
    # Who took part did: nobody takes that back afterwards.
    for who, path in (("partner", "sessions/begun"), ("other_firm", f"bookings/{confirmed['id']}")):
        late = await hub.call(who, "POST", f"/v1/{path}/cancel", {"reason": "nobody came"})
        assert (late.status_code, late.json()["reason"]) == (409, "SESSION_BEGUN")
    again = await hub.ok("other_firm", "POST", f"/v1/bookings/{confirmed['id']}/confirm")
    assert again["state"] == "confirmed"


async def test_a_booking_made_for_a_match_ends_with_it_and_its_seat_goes_to_the_line(hub: Hub) -> None:
    await put(hub, "for-a-match", provider_id="gear-rigs", seats=1, days=1000)
    match = await hub.matched("gear-rigs")
    mine = await hub.ok("firm", "POST", "/v1/bookings", {"session_id": "for-a-match", "match_id": match["id"]})
    waiting = await book(hub, "for-a-match", "other_firm")
    assert (mine["state"], waiting["state"]) == ("confirmed", "waiting")
    await hub.ok("firm", "POST", f"/v1/matches/{match['id']}/cancel", {"reason": "solved it", "close_need": True})

    async def passed_on() -> bool:
        return await state_of(hub, waiting) == "offered"

    await eventually(passed_on)
    ended = await hub.ok("firm", "GET", f"/v1/bookings/{mine['id']}")
    assert (ended["state"], ended["end_reason"]) == ("cancelled", "MATCH_ENDED")
    [notice] = await told(hub, mine)
    assert (notice["kind"], "its match has ended" in notice["text"]) == ("booking_cancelled", True)


async def test_firms_are_not_shown_sessions_of_providers_that_are_not_offered_any_more(hub: Hub) -> None:
    day = from_us(hub.clock.now_us()).date()
    until = (day + timedelta(days=5)).isoformat()
    provider = {**PROVIDERS["dashboards"], "review_on": until}
    await hub.ok("partner", "PUT", "/v1/providers/reviewed", provider)
    await put(hub, "reviewed", provider_id="reviewed")

    async def listed(who: str) -> bool:
        return "reviewed" in {each["id"] for each in (await hub.ok(who, "GET", "/v1/sessions"))["sessions"]}

    assert await listed("firm")
    hub.clock.shift = timedelta(days=6)
    assert not await listed("firm")
    assert await listed("partner")
    assert (await hub.call("firm", "POST", "/v1/bookings", {"session_id": "reviewed"})).status_code == 409


def _put_of(session: dict[str, Any]) -> dict[str, Any]:
    names = ("provider_id", "title", "place", "starts_us", "ends_us", "seats", "confirm_within_s")
    return {name: session[name] for name in names}


async def test_seats_are_never_overbooked_whatever_comes_at_once(hub: Hub) -> None:
    await put(hub, "rush", seats=5)
    # Ten requests, each sent three times, from both firms.
    calls = [
        hub.call(who, "POST", "/v1/bookings", {"session_id": "rush", "request_id": f"rush-{number}"})
        for who in ("firm", "other_firm")
        for number in range(10)
        for _ in range(3)
    ]
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {201}
    bookings = {answer.json()["id"]: answer.json() for answer in answers}
    assert len(bookings) == 20
    assert Counter(each["state"] for each in bookings.values()) == {"confirmed": 5, "waiting": 15}
    # Cancelling, confirming and booking at once.
    confirmed = [each for each in bookings.values() if each["state"] == "confirmed"]
    owner = {each["id"]: "firm" if each["firm_id"] == 1 else "other_firm" for each in bookings.values()}
    moves = [
        hub.call(owner[each["id"]], "POST", f"/v1/bookings/{each['id']}/cancel") for each in (*confirmed, *confirmed)
    ]
    moves += [hub.call(owner[booking_id], "POST", f"/v1/bookings/{booking_id}/confirm") for booking_id in bookings]
    assert {answer.status_code for answer in await asyncio.gather(*moves)} <= {200, 409}
    assert (await hub.ok("partner", "GET", "/v1/sessions/rush"))["taken"] == 5
    with pytest.raises(asyncpg.CheckViolationError, match="session_seats_taken_check"):
        await hub.pool.execute("UPDATE session SET taken = taken + 1 WHERE id = 'rush'")
    eleventh = await hub.call("firm", "POST", "/v1/bookings", {"session_id": "rush"})
    while eleventh.status_code == 201:
        eleventh = await hub.call("firm", "POST", "/v1/bookings", {"session_id": "rush"})
    assert eleventh.json()["reason"] == "TOO_MANY_BOOKINGS"
    reused = await hub.call("firm", "POST", "/v1/bookings", {"session_id": "day-1", "request_id": "rush-0"})
    assert (reused.status_code, reused.json()["reason"]) == (409, "REQUEST_ID_REUSED")


async def test_calendar_files_keep_their_id_and_count_changes(hub: Hub) -> None:
    async def event(path: str, who: str = "firm") -> Any:
        response = await hub.call(who, "GET", path)
        assert response.headers["content-type"] == "text/calendar; charset=utf-8; method=PUBLISH"
        calendar = Calendar.from_ical(response.content)
        assert calendar["method"] == "PUBLISH"
        [zone] = calendar.walk("VTIMEZONE")
        assert zone["tzid"] == "Europe/London"
        return calendar.walk("VEVENT")[0]

    starts = datetime.now(UTC).replace(month=7, day=10, hour=8, minute=0, second=0, microsecond=0) + timedelta(days=365)
    times = {"starts_us": to_us(starts), "ends_us": to_us(starts) + 7_200_000_000}
    await put(hub, "july", provider_id="gear-rigs", seats=1, **times)
    booking = await book(hub, "july")
    first, mine = (
        await event("/v1/sessions/july/calendar.ics"),
        await event(f"/v1/bookings/{booking['id']}/calendar.ics"),
    )
    assert first["uid"] == "session-july@smdih"
    assert (first["sequence"], first["status"], first["location"]) == (0, "CONFIRMED", "Room 4, Exeter")
    # 8:00 UTC is 9:00 in London in summer, and is written so.
    assert first["dtstart"].params["TZID"] == "Europe/London"
    assert first["dtstart"].dt.hour == 9
    assert first["dtstart"].dt == starts.astimezone(LONDON)
    assert (mine["uid"], mine["status"]) == (f"booking-{booking['id']}@smdih", "CONFIRMED")
    again = await hub.call("firm", "GET", "/v1/sessions/july/calendar.ics")
    assert again.content == (await hub.call("partner", "GET", "/v1/sessions/july/calendar.ics")).content
    moved = {name: value + 86_400_000_000 for name, value in times.items()}
    await put(hub, "july", provider_id="gear-rigs", seats=1, **moved)
    later = await event("/v1/sessions/july/calendar.ics")
    assert (later["uid"], later["sequence"]) == (first["uid"], 1)
    assert (await event(f"/v1/bookings/{booking['id']}/calendar.ics"))["sequence"] == mine["sequence"] + 1
    # More seats are no change of the calendar's.
    await put(hub, "july", provider_id="gear-rigs", seats=2, **moved)
    assert (await event("/v1/providers/gear-rigs/calendar.ics"))["sequence"] == 1
    await hub.ok("partner", "POST", "/v1/sessions/july/cancel", {"reason": "rig broken"})
    gone, ended = (
        await event("/v1/sessions/july/calendar.ics"),
        await event(f"/v1/bookings/{booking['id']}/calendar.ics"),
    )
    assert (gone["sequence"], gone["status"], ended["status"]) == (2, "CANCELLED", "CANCELLED")
    assert ended["sequence"] > mine["sequence"] + 1
    ended_booking = await hub.ok("firm", "GET", f"/v1/bookings/{booking['id']}")
    assert (ended_booking["state"], ended_booking["end_reason"]) == ("cancelled", "SESSION_CANCELLED")
    refused = await hub.call("firm", "POST", "/v1/bookings", {"session_id": "july"})
    assert (refused.status_code, refused.json()["reason"]) == (409, "SESSION_CANCELLED")


async def test_only_who_may_does_it_and_others_see_nothing(hub: Hub) -> None:
    await put(hub, "mine")
    booking = await book(hub, "mine")
    calls: list[tuple[str, str, str, Any, int]] = [
        ("other_partner", "PUT", "/v1/sessions/mine", body(hub), 404),
        ("other_partner", "POST", "/v1/sessions/mine/cancel", {"reason": "spite"}, 404),
        ("firm", "PUT", "/v1/sessions/mine", body(hub), 403),
        ("firm", "POST", "/v1/sessions/mine/cancel", {"reason": "x"}, 403),
        ("partner", "POST", "/v1/bookings", {"session_id": "mine"}, 403),
        ("firm", "POST", "/v1/bookings", {"session_id": "mine", "firm_id": 2}, 403),
        ("device", "GET", "/v1/sessions", None, 403),
        ("", "GET", "/v1/sessions", None, 401),
    ]
    for action in ("", "/calendar.ics"):
        calls += [
            (who, "GET", f"/v1/bookings/{booking['id']}{action}", None, 404) for who in ("other_firm", "other_partner")
        ]
        calls.append(("device", "GET", f"/v1/bookings/{booking['id']}{action}", None, 403))
    for action in ("confirm", "cancel"):
        calls.append(("other_firm", "POST", f"/v1/bookings/{booking['id']}/{action}", None, 404))
    for who, method, path, sent, status in calls:
        answer = await hub.call(who, method, path, sent)
        assert answer.status_code == status, (who, method, path, answer.text)
    for who, seen in (
        ("firm", True),
        ("partner", True),
        ("operator", True),
        ("other_firm", False),
        ("other_partner", False),
    ):
        listed = (await hub.ok(who, "GET", "/v1/bookings?session_id=mine"))["bookings"]
        assert (booking["id"] in {each["id"] for each in listed}) is seen


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"seats": 0}, "BAD_SEATS"),
        ({"seats": 1001}, "BAD_SEATS"),
        ({"title": " "}, "TITLE_MISSING"),
        ({"days": -1}, "BAD_TIME"),
        ({"days": 2000}, "BAD_TIME"),
        ({"ends_us": 1}, "BAD_TIME"),
        ({"starts_us": 2**62}, "BAD_TIME"),
        ({"confirm_within_s": 1}, "INVALID"),
        ({"provider_id": "forming"}, "NO_SESSIONS"),
    ],
)
async def test_a_bad_session_is_refused_with_its_reason(hub: Hub, fields: dict[str, Any], reason: str) -> None:
    answer = await hub.call("partner", "PUT", "/v1/sessions/bad", body(hub, **fields))
    assert (answer.status_code, answer.json()["reason"]) == (400, reason)


async def test_sessions_and_bookings_by_grpc(hub: Hub) -> None:
    pb = sessions_pb2

    def key(who: str) -> Any:
        return (("authorization", f"Bearer {KEYS[who]}"),)

    starts_us = hub.clock.now_us() + 86_400_000_000
    slot = pb.Session(
        id="slot-1", provider_id="gear-rigs", title="Rig 2", starts_us=starts_us, ends_us=starts_us + 1, seats=1
    )
    stored = await hub.sessions.PutSession(pb.PutSessionRequest(session=slot), metadata=key("partner"))
    assert stored.session.confirm_within_s == 172_800
    match = await hub.matched("gear-rigs")
    booked = await hub.sessions.Book(
        pb.BookRequest(session_id="slot-1", match_id=match["id"], request_id="slot"), metadata=key("firm")
    )
    assert booked.booking.state == events_pb2.BOOKING_STATE_CONFIRMED
    waiting = await hub.sessions.Book(pb.BookRequest(session_id="slot-1"), metadata=key("other_firm"))
    assert waiting.booking.in_line == 1
    cancelled = await hub.sessions.CancelBooking(
        pb.CancelBookingRequest(booking_id=booked.booking.id), metadata=key("firm")
    )
    assert cancelled.booking.state == events_pb2.BOOKING_STATE_CANCELLED
    confirmed = await hub.sessions.ConfirmBooking(
        pb.ConfirmBookingRequest(booking_id=waiting.booking.id), metadata=key("other_firm")
    )
    assert confirmed.booking.state == events_pb2.BOOKING_STATE_CONFIRMED
    listed = await hub.sessions.ListBookings(
        pb.ListBookingsRequest(session_id="slot-1", state=events_pb2.BOOKING_STATE_CONFIRMED), metadata=key("partner")
    )
    assert [each.id for each in listed.bookings] == [waiting.booking.id]
    sessions = await hub.sessions.ListSessions(pb.ListSessionsRequest(provider_id="gear-rigs"), metadata=key("firm"))
    assert "slot-1" in {each.id for each in sessions.sessions}
    session = pb.GetSessionRequest(session_id="slot-1")
    got = (await hub.sessions.GetSession(session, metadata=key("firm"))).session
    assert (got.title, got.starts_us, got.taken, got.confirm_within_s) == ("Rig 2", starts_us, 1, 172_800)
    nowhere = pb.GetSessionRequest(session_id="\0")
    assert await refused_by_grpc(hub.sessions.GetSession, nowhere, "firm") == "NOT_FOUND"
    booking = pb.GetBookingRequest(booking_id=waiting.booking.id)
    for who in ("other_firm", "partner", "operator"):
        assert (await hub.sessions.GetBooking(booking, metadata=key(who))).booking == listed.bookings[0]
    for who, status in (
        ("firm", "NOT_FOUND"),
        ("other_partner", "NOT_FOUND"),
        ("device", "PERMISSION_DENIED"),
        ("", "UNAUTHENTICATED"),
    ):
        assert await refused_by_grpc(hub.sessions.GetBooking, booking, who) == status
    file = await hub.sessions.GetCalendar(
        pb.GetCalendarRequest(booking_id=waiting.booking.id), metadata=key("other_firm")
    )
    assert file.file_name == f"booking-{waiting.booking.id}.ics"
    assert file.content.startswith(b"BEGIN:VCALENDAR")
    gone = await hub.sessions.CancelSession(
        pb.CancelSessionRequest(session_id="slot-1", reason="rig broken"), metadata=key("partner")
    )
    assert (gone.session.cancelled, gone.session.taken) == (True, 0)
    other = await hub.call("other_firm", "POST", "/v1/bookings", {"session_id": "mine", "match_id": match["id"]})
    assert other.status_code == 404


async def test_a_provider_that_comes_as_itself_looks_after_its_own_dates_and_no_others(hub: Hub) -> None:
    sessions = hub.matching.sessions
    organiser = Caller(-1, Role.PROVIDER, provider_id="dashboards")
    other = Caller(-2, Role.PROVIDER, provider_id="gear-rigs")
    assessor = Caller(-3, Role.ASSESSOR, provider_id="dashboards")
    await put(hub, "day-own", seats=1)
    before = await sessions.get_session(organiser, "day-own")
    with pytest.raises(NotFound):
        await sessions.put_session(other, replace(before, seats=2))
    with pytest.raises(Forbidden):
        await sessions.put_session(assessor, replace(before, seats=2))
    assert (await sessions.put_session(organiser, replace(before, seats=2))).seats == 2
    first, second = await book(hub, "day-own"), await book(hub, "day-own", "other_firm")

    async def seen_by(who: Caller) -> set[str]:
        found, _ = await sessions.list_bookings(who, session_id="day-own", state=None, page_size=0, page_token="")
        return {each.id for each in found}

    assert await seen_by(organiser) == {first["id"], second["id"]}
    assert await seen_by(other) == set()
    with pytest.raises(NotFound):
        await sessions.get_booking(other, first["id"])
    with pytest.raises(NotFound):
        await sessions.cancel_booking(other, first["id"], "mine now")
    ended = await sessions.cancel_booking(organiser, first["id"], "it is for beginners")
    assert (ended.state, ended.end_reason) == (BookingState.CANCELLED, "it is for beginners")
    with pytest.raises(NotFound):
        await sessions.cancel_session(other, "day-own", "mine now")
    assert (await sessions.cancel_session(organiser, "day-own", "flooded")).state is SessionState.CANCELLED
    assert await state_of(hub, second) == "cancelled"
