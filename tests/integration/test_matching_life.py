"""What becomes of a match: engaged, finished, scored, cancelled, expired; and its place meanwhile."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.common import topics
from services.common.clock import from_us
from services.common.database import transaction
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.matching.messages import room_event
from services.matching.rooms import Room, RoomState
from services.matching.service.rooms import end_room
from services.matching.store import places as places_store
from services.matching.store import rooms as rooms_store
from smdih.matching.v1 import events_pb2, matching_pb2
from tests.integration.matching_hub import FIRM, KEYS, PARTNER, Hub, publish_world, running_hub
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    await one_hub.put_providers("gear-rigs", "forming", capacity_per_quarter=20)
    yield one_hub
    async with one_hub.pool.acquire() as connection:
        assert await places_store.mismatches(connection) == []
    one_hub.clock.shift = timedelta(0)


async def taken(hub: Hub, provider_id: str) -> int:
    found: int = (await hub.ok("partner", "GET", f"/v1/providers/{provider_id}"))["taken_this_quarter"]
    return found


async def told(hub: Hub, who: str, match: dict[str, Any]) -> list[tuple[str, int | None]]:
    """What a side was told of the match, newest first, and by when it is to act."""
    found = (await hub.ok(who, "GET", "/v1/notices?page_size=500"))["notices"]
    return [(each["kind"], each["act_by_us"]) for each in found if each["subject_id"] == match["id"]]


async def match_events(cluster: Cluster, match_id: str) -> list[events_pb2.MatchEvent]:
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partition = TopicPartition(cluster.name(topics.MATCHES), 0)
        consumer.assign([partition])
        end = (await consumer.end_offsets([partition]))[partition]
        await consumer.seek_to_beginning(partition)
        events: list[events_pb2.MatchEvent] = []
        while await consumer.position(partition) < end:
            for records in (await consumer.getmany(partition, timeout_ms=200)).values():
                events += [events_pb2.MatchEvent.FromString(record.value) for record in records]
        return [event for event in events if event.match_id == match_id]
    finally:
        await consumer.stop()


async def test_a_match_is_engaged_finished_scored_by_both_and_closed(hub: Hub, cluster: Cluster) -> None:
    match = await hub.matched("gear-rigs")
    path = f"/v1/matches/{match['id']}"
    assert (match["state"], match["scores"]) == ("accepted", [])
    early = await hub.call("firm", "POST", f"{path}/finish", {"result": "solved"})
    assert (early.status_code, early.json()["reason"]) == (409, "MATCH_ACCEPTED")
    engaged = await hub.ok("partner", "POST", f"{path}/engage")
    assert engaged["state"] == "engaged"
    assert await hub.ok("firm", "POST", f"{path}/engage") == engaged
    assert (await hub.call("firm", "POST", f"{path}/score", {"points": 4})).json()["reason"] == "MATCH_ENGAGED"
    finished = await hub.ok("firm", "POST", f"{path}/finish", {"result": "solved", "note": "New bearings."})
    assert (finished["state"], finished["result"], finished["result_note"]) == ("finished", "solved", "New bearings.")
    assert await hub.ok("partner", "POST", f"{path}/finish", {"result": "solved"}) == finished
    other = await hub.call("partner", "POST", f"{path}/finish", {"result": "partly"})
    assert other.json()["reason"] == "MATCH_FINISHED"
    assert await told(hub, "firm", match) == [("match_finished", finished["scores_until_us"]), ("match_engaged", None)]
    assert await told(hub, "partner", match) == [
        ("match_finished", finished["scores_until_us"]),
        ("offer_accepted", match["engage_by_us"]),
    ]
    # The firm has the last word on what its need came to.
    for result in ("partly", "solved"):
        corrected = await hub.ok("firm", "POST", f"{path}/finish", {"result": result, "note": "New bearings."})
    assert (corrected["result"], corrected["scores_until_us"]) == ("solved", finished["scores_until_us"])
    await hub.ok("firm", "POST", f"{path}/score", {"points": 2, "comment": "slow"})
    scored = await hub.ok("firm", "POST", f"{path}/score", {"points": 5, "comment": "good after all"})
    assert [(each["side"], each["points"], each["comment"]) for each in scored["scores"]] == [
        ("firm", 5, "good after all")
    ]
    # The partner does not see it while it may still change its own.
    scored = await hub.ok("partner", "POST", f"{path}/score", {"points": 3})
    assert [(each["side"], each["points"]) for each in scored["scores"]] == [("partner", 3)]
    assert (await hub.call("operator", "POST", f"{path}/score", {"points": 3})).status_code == 403
    hub.clock.shift = timedelta(days=30, seconds=1)

    async def closed() -> bool:
        return bool((await hub.ok("partner", "GET", path))["state"] == "closed")

    await eventually(closed)
    assert [each["points"] for each in (await hub.ok("partner", "GET", path))["scores"]] == [5, 3]
    late = await hub.call("firm", "POST", f"{path}/score", {"points": 1})
    assert (late.status_code, late.json()["reason"]) == (409, "MATCH_CLOSED")

    async def published() -> bool:
        return len(await match_events(cluster, match["id"])) == 6

    await eventually(published)
    events = await match_events(cluster, match["id"])
    assert [event.change for event in events] == [
        events_pb2.MATCH_CHANGE_ACCEPTED,
        events_pb2.MATCH_CHANGE_ENGAGED,
        *[events_pb2.MATCH_CHANGE_FINISHED] * 3,
        events_pb2.MATCH_CHANGE_CLOSED,
    ]
    assert [event.result for event in events[2:5]] == [
        events_pb2.RESULT_SOLVED,
        events_pb2.RESULT_PARTLY,
        events_pb2.RESULT_SOLVED,
    ]
    assert len({event.event_id for event in events}) == 6
    assert {event.correlation_id for event in events} == {match["correlation_id"]}


async def test_scores_of_firms_bear_a_little_on_rankings_once_their_matches_are_closed(hub: Hub) -> None:
    async def parts() -> tuple[float, list[str]]:
        opened = await hub.ok("firm", "POST", "/v1/needs", {"text": "Our pressings split at the corner."})
        offer = next(each for each in opened["offers"] if each["provider_id"] == "forming")
        assert offer["score"] == pytest.approx(sum(offer["parts"].values()))
        return offer["parts"]["outcomes"], offer["reasons"]

    async def scored(who: str) -> dict[str, Any]:
        match = await hub.matched("forming", "Our pressings split.", who)
        await hub.ok(who, "POST", f"/v1/matches/{match['id']}/engage")
        await hub.ok(who, "POST", f"/v1/matches/{match['id']}/finish", {"result": "not_solved"})
        await hub.ok(who, "POST", f"/v1/matches/{match['id']}/score", {"points": 1})
        # What a provider thinks of its own work moves nothing.
        await hub.ok("partner", "POST", f"/v1/matches/{match['id']}/score", {"points": 5})
        return match

    async def all_closed() -> bool:
        matches = (await hub.ok("partner", "GET", "/v1/matches?state=finished"))["matches"]
        return not any(each["provider_id"] == "forming" for each in matches)

    for who in ("firm", "firm", "other_firm"):
        match = await scored(who)
    await hub.index.refresh()
    assert (await parts())[0] == 0  # the partner would read there what it is not shown yet
    hub.clock.shift = timedelta(days=31)
    await eventually(all_closed)
    await hub.index.refresh()
    assert (await parts())[0] == 0  # two firms: too few not to tell what one has said
    await hub.pool.execute("UPDATE match SET firm_id = 3 WHERE id = $1", match["id"])
    await scored("other_firm")
    hub.clock.shift = timedelta(days=62)

    async def counted() -> bool:
        # Three firms with the lowest score, however many matches: 0.08 x (0.75 x 8 / 11 - 0.75).
        return bool((await parts())[0] == pytest.approx(-0.016364))

    await eventually(counted, deadline_s=5)
    assert "3 firms have scored its work, 1.0 of 5 on average." in (await parts())[1]


@pytest.mark.parametrize("who", ["firm", "partner", "operator"])
async def test_a_cancelled_match_gives_its_place_back_once_and_the_need_gets_new_offers(hub: Hub, who: str) -> None:
    before = await taken(hub, "gear-rigs")
    match = await hub.matched("gear-rigs")
    path, need_path = f"/v1/matches/{match['id']}", f"/v1/needs/{match['need_id']}"
    await hub.ok("firm", "POST", f"{path}/engage")
    assert await taken(hub, "gear-rigs") == before + 1
    assert (await hub.call(who, "POST", f"{path}/cancel", {"reason": " "})).json()["reason"] == "REASON_MISSING"
    answers = await asyncio.gather(
        *(hub.ok(who, "POST", f"{path}/cancel", {"reason": f"ill, told {number} times"}) for number in range(5))
    )
    assert {answer["state"] for answer in answers} == {"cancelled"}
    assert len({answer["end_reason"] for answer in answers}) == 1
    assert await taken(hub, "gear-rigs") == before

    async def offered_again() -> bool:
        need = await hub.ok("firm", "GET", need_path)
        return bool(need["state"] == "open" and need["offers"] > 0)

    await eventually(offered_again)
    offers = (await hub.ok("firm", "GET", f"{need_path}/offers"))["offers"]
    assert {(each["provider_id"], each["state"]) for each in offers} >= {
        ("gear-rigs", "cancelled"),
        ("forming", "made"),
    }
    assert ("gear-rigs", "made") not in {(each["provider_id"], each["state"]) for each in offers}
    fresh = next(each for each in offers if each["state"] == "made")
    again = (await hub.ok("firm", "POST", f"/v1/offers/{fresh['id']}/accept"))["match"]
    assert (await hub.ok("firm", "GET", need_path))["match_id"] == again["id"] != match["id"]
    gone = await hub.call("firm", "POST", f"{path}/engage")
    assert (gone.status_code, gone.json()["reason"]) == (409, "MATCH_CANCELLED")
    await hub.ok("firm", "POST", f"/v1/matches/{again['id']}/cancel", {"reason": "solved it", "close_need": True})
    assert (await hub.ok("firm", "GET", need_path))["state"] == "closed"


async def test_what_nobody_engages_in_time_expires_and_engaging_races_with_it(hub: Hub) -> None:
    waiting, kept = await hub.matched("gear-rigs"), await hub.matched("gear-rigs")
    await hub.ok("firm", "POST", f"/v1/matches/{kept['id']}/engage")
    quarter = await hub.pool.fetchval("SELECT taken FROM provider_quarter WHERE provider_id = 'gear-rigs'")
    hub.clock.shift = timedelta(days=181)

    async def expired() -> bool:
        return bool((await hub.ok("firm", "GET", f"/v1/matches/{waiting['id']}"))["state"] == "expired")

    await eventually(expired)
    assert (await hub.ok("firm", "GET", f"/v1/matches/{kept['id']}"))["state"] == "engaged"
    assert await hub.pool.fetchval("SELECT taken FROM provider_quarter WHERE provider_id = 'gear-rigs'") == quarter - 1
    late = await hub.call("partner", "POST", f"/v1/matches/{waiting['id']}/engage")
    assert late.json()["reason"] == "MATCH_EXPIRED"


async def test_a_room_that_ended_long_ago_is_forgotten_here_and_in_its_topic(hub: Hub, cluster: Cluster) -> None:
    match = await hub.matched("gear-rigs")
    long_ago = from_us(hub.clock.now_us()) - timedelta(days=401)
    room = Room(
        id=uuid.uuid4().hex,
        match_id=match["id"],
        firm_id=FIRM,
        partner_id=PARTNER,
        provider_id="gear-rigs",
        machine_ids=(1,),
        signal_ids=(1,),
        purpose="Long ago.",
        data_from=long_ago - timedelta(days=2),
        data_until=long_ago,
        opens=long_ago - timedelta(days=1),
        closes=long_ago,
        opened_by=1,
        correlation_id="",
    )
    ended = replace(room, state=RoomState.EXPIRED, ended=long_ago)
    async with transaction(hub.pool) as connection:
        await rooms_store.add_room(connection, room, request_id="", request_sha256=b"")
        await end_room(connection, ended, by=None)
    values: list[bytes | None] = []
    async with AIOKafkaConsumer(
        cluster.name(topics.ROOMS), bootstrap_servers=cluster.bootstrap, group_id=None, auto_offset_reset="earliest"
    ) as consumer:

        async def forgotten() -> bool:
            for records in (await consumer.getmany(timeout_ms=200)).values():
                values.extend(record.value for record in records if record.key == room.id.encode())
            return len(values) == 2

        await eventually(forgotten)
    assert values == [room_event(ended), None]
    async with transaction(hub.pool) as connection:
        assert await rooms_store.room(connection, room.id) is None


async def test_matches_of_others_are_not_there(hub: Hub) -> None:
    match = await hub.matched("gear-rigs")
    path = f"/v1/matches/{match['id']}"
    posts: list[tuple[str, dict[str, Any] | None]] = [
        ("engage", None),
        ("finish", {"result": "solved"}),
        ("score", {"points": 1}),
        ("cancel", {"reason": "spite"}),
    ]
    for who, status in (("other_firm", 404), ("other_partner", 404), ("device", 403), ("", 401)):
        assert (await hub.call(who, "GET", path)).status_code == status
        for action, body in posts:
            assert (await hub.call(who, "POST", f"{path}/{action}", body)).status_code == status
    for who in ("other_firm", "other_partner"):
        listed = (await hub.ok(who, "GET", "/v1/matches"))["matches"]
        assert match["id"] not in {each["id"] for each in listed}
    assert (await hub.call("firm", "GET", "/v1/matches/nonsense")).status_code == 404
    await hub.ok("firm", "POST", f"{path}/engage")
    await hub.ok("firm", "POST", f"{path}/finish", {"result": "solved"})
    for points in (0, 6):
        bad = await hub.call("firm", "POST", f"{path}/score", {"points": points})
        assert (bad.status_code, bad.json()["reason"]) == (400, "BAD_POINTS")
    long = await hub.call("firm", "POST", f"{path}/score", {"points": 3, "comment": "x" * 501})
    assert long.json()["reason"] == "TEXT_TOO_LONG"


async def test_the_life_of_a_match_by_grpc(hub: Hub) -> None:
    pb = matching_pb2

    def key(who: str) -> Any:
        return (("authorization", f"Bearer {KEYS[who]}"),)

    match = await hub.matched("forming", "Our pressings split.")
    got = await hub.stub.GetMatch(pb.GetMatchRequest(match_id=match["id"]), metadata=key("partner"))
    assert got.match.state == pb.MATCH_STATE_ACCEPTED
    engaged = await hub.stub.EngageMatch(pb.EngageMatchRequest(match_id=match["id"]), metadata=key("partner"))
    assert engaged.match.engaged_us
    finished = await hub.stub.FinishMatch(
        pb.FinishMatchRequest(match_id=match["id"], result=events_pb2.RESULT_PARTLY), metadata=key("partner")
    )
    assert finished.match.result == events_pb2.RESULT_PARTLY
    scored = await hub.stub.ScoreMatch(
        pb.ScoreMatchRequest(match_id=match["id"], points=4, comment="open people"), metadata=key("partner")
    )
    assert [(score.side, score.points) for score in scored.match.scores] == [(pb.SIDE_PARTNER, 4)]
    second = await hub.matched("gear-rigs")
    cancelled = await hub.stub.CancelMatch(
        pb.CancelMatchRequest(match_id=second["id"], reason="ill", close_need=True), metadata=key("partner")
    )
    assert cancelled.match.state == pb.MATCH_STATE_CANCELLED
    listed = await hub.stub.ListMatches(
        pb.ListMatchesRequest(state=pb.MATCH_STATE_FINISHED, page_size=1), metadata=key("partner")
    )
    assert [each.id for each in listed.matches] == [match["id"]]
