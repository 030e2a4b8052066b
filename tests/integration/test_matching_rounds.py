"""Rounds over waiting needs, and the desk where partners propose themselves."""

import asyncio
import functools
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio

from services.common.clock import from_us
from services.common.kafka import Publisher
from services.common.outbox import OutboxRelay
from services.common.settings import Settings
from services.matching.index import ProviderIndex
from services.matching.needs import Limits
from services.matching.ranking import Ranker
from services.matching.rounds import Outcome
from services.matching.service.rounds import CHUNK_NEEDS, Rounds
from services.matching.store import places as places_store
from services.matching.store import rounds as rounds_store
from smdih.matching.v1 import matching_pb2, rounds_pb2, rounds_pb2_grpc
from tests.integration.matching_hub import (
    FIRM,
    KEYS,
    OTHER_FIRM,
    PROVIDERS,
    Hub,
    bearer,
    publish_world,
    refused_by_grpc,
    running_hub,
)
from tests.polling import eventually

GEARS = "Our gears whine and the oil is full of debris."


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings, limits=Limits(round_every=timedelta(days=1))) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    yield one_hub
    async with one_hub.pool.acquire() as connection:
        assert await places_store.mismatches(connection) == []
    one_hub.clock.shift = timedelta(0)


async def wait_for_round(hub: Hub, text: str = GEARS, *, who: str = "firm", **fields: Any) -> str:
    opened = await hub.ok(who, "POST", "/v1/needs", {"text": text, "wait_for_round": True, **fields})
    assert (opened["offers"], opened["need"]["no_offer_reason"]) == ([], "WAITS_FOR_ROUND")
    need_id: str = opened["need"]["id"]
    return need_id


async def run_round(hub: Hub, round_id: str) -> dict[str, Any]:
    begun = await hub.ok("operator", "POST", "/v1/rounds", {"round_id": round_id})
    assert begun["state"] == "running"
    assert await hub.matching.rounds.carry_out()
    done: dict[str, Any] = await hub.ok("operator", "GET", f"/v1/rounds/{round_id}")
    assert (done["state"], done["blocking_pairs"]) == ("done", 0)
    return done


async def only_offer(hub: Hub, need_id: str) -> dict[str, Any]:
    [offer] = (await hub.ok("firm", "GET", f"/v1/needs/{need_id}/offers"))["offers"]
    found: dict[str, Any] = offer
    return found


async def taken(hub: Hub, provider_id: str) -> int:
    found: int = (await hub.ok("partner", "GET", f"/v1/providers/{provider_id}"))["taken_this_quarter"]
    return found


async def test_a_round_gives_every_waiting_need_one_offer_within_live_capacity(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    needs = [await wait_for_round(hub, f"{GEARS} Stand {number}.") for number in range(6)]
    done = await run_round(hub, "first")
    assert (done["offers"], done["from_safety_net"], done["unplaced"]) == (6, 3, 0)
    offers = [await only_offer(hub, need_id) for need_id in needs]
    assert Counter(each["provider_id"] for each in offers) == {"gear-rigs": 3, "iot-basics": 3}
    assert {(each["origin"], each["round_id"]) for each in offers} == {("round", "first")}
    # Who lost gets what is next best for it.
    assert {(each["provider_id"], each["rank"]) for each in offers} == {("gear-rigs", 1), ("iot-basics", 2)}
    by_provider = {each["provider_id"]: each for each in offers}
    assert "It was chosen in round first: nobody fits better." in by_provider["gear-rigs"]["reasons"]
    assert any("a workshop or course helps meanwhile" in reason for reason in by_provider["iot-basics"]["reasons"])
    for each in offers:
        assert each["score"] == pytest.approx(sum(each["parts"].values()))
    # The places are held until the offers are answered: nobody else gets them, and accepting takes no second one.
    assert await taken(hub, "gear-rigs") == 3
    late = await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS})
    assert "gear-rigs" not in {each["provider_id"] for each in late["offers"]}
    accepted, declined, lapsing = [each for each in offers if each["provider_id"] == "gear-rigs"]
    match = (await hub.ok("firm", "POST", f"/v1/offers/{accepted['id']}/accept"))["match"]
    assert await taken(hub, "gear-rigs") == 3
    expires = await hub.pool.fetchval("SELECT expires FROM place WHERE id = $1", match["id"])
    assert expires > from_us(hub.clock.now_us()) + timedelta(days=179)
    await hub.ok("firm", "POST", f"/v1/offers/{declined['id']}/decline", {"reason": "too far"})
    assert await taken(hub, "gear-rigs") == 2
    hub.clock.shift = timedelta(days=14, seconds=1)

    async def lapsed() -> bool:
        return bool((await only_offer(hub, lapsing["need_id"]))["state"] == "lapsed")

    await eventually(lapsed)
    assert await hub.pool.fetchval("SELECT taken FROM provider_quarter WHERE provider_id = 'gear-rigs'") == 1


async def test_an_offer_of_a_round_keeps_its_place_over_the_end_of_a_quarter(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", capacity_per_quarter=1)
    offer = await _placed(hub, await wait_for_round(hub), "turn-of-quarter")
    await hub.pool.execute("UPDATE offer SET expires = expires + interval '300 days' WHERE id = $1", offer["id"])
    await hub.pool.execute("UPDATE place SET expires = expires + interval '300 days' WHERE state = 'reserved'")
    hub.clock.shift = timedelta(days=95)
    match = (await hub.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept"))["match"]
    assert match["quarter"] == (await hub.pool.fetchval("SELECT min(quarter) FROM place")).isoformat()
    assert await hub.pool.fetchval("SELECT count(*) FROM place WHERE state <> 'released'") == 1


async def _placed(hub: Hub, need_id: str, round_id: str) -> dict[str, Any]:
    await run_round(hub, round_id)
    return await only_offer(hub, need_id)


async def test_a_repeated_round_is_the_first_one_and_only_operators_run_them(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    need_id = await wait_for_round(hub)
    done = await run_round(hub, "again")
    assert await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "again"}) == done
    assert not await hub.matching.rounds.carry_out()
    assert (await only_offer(hub, need_id))["state"] == "made"
    assert "again" in {each["id"] for each in (await hub.ok("operator", "GET", "/v1/rounds"))["rounds"]}
    for who, status in (("firm", 403), ("partner", 403), ("device", 403), ("", 401)):
        for method, path in (("POST", "/v1/rounds"), ("GET", "/v1/rounds"), ("GET", "/v1/rounds/again")):
            body = {"round_id": "theirs"} if method == "POST" else None
            assert (await hub.call(who, method, path, body)).status_code == status
    bad = await hub.call("operator", "POST", "/v1/rounds", {"round_id": "a b"})
    assert (bad.status_code, bad.json()["reason"]) == (400, "BAD_ROUND_ID")
    assert (await hub.call("operator", "GET", "/v1/rounds/none")).status_code == 404


async def test_rounds_by_grpc_and_their_offers_answered_by_both_sides(hub: Hub) -> None:
    rounds = rounds_pb2_grpc.RoundServiceStub(hub.channel)
    pb = rounds_pb2
    await hub.put_providers("gear-rigs", capacity_per_quarter=2)
    needs = [await wait_for_round(hub, f"{GEARS} Line {number}.") for number in range(2)]
    start = pb.StartRoundRequest(round_id="by-wire")
    begun = (await rounds.StartRound(start, metadata=bearer("operator"))).round
    assert (begun.id, begun.state, begun.ended_us) == ("by-wire", pb.ROUND_STATE_RUNNING, 0)
    assert await hub.matching.rounds.carry_out()
    done = (await rounds.GetRound(pb.GetRoundRequest(round_id="by-wire"), metadata=bearer("operator"))).round
    assert (done.state, done.offers, done.unplaced, done.blocking_pairs) == (pb.ROUND_STATE_DONE, 2, 0, 0)
    assert done.ended_us >= done.started_us > 0
    assert (await rounds.StartRound(start, metadata=bearer("operator"))).round == done
    listed = await rounds.ListRounds(pb.ListRoundsRequest(), metadata=bearer("operator"))
    assert listed.rounds[0] == done
    # Everybody sees their own of its offers, by gRPC as by HTTP.
    asked = matching_pb2.ListOffersRequest(round_id="by-wire")
    for who, seen in (("operator", 2), ("firm", 2), ("partner", 2), ("other_firm", 0), ("other_partner", 0)):
        found = (await hub.stub.ListOffers(asked, metadata=bearer(who))).offers
        assert {each.offer.need_id for each in found} == (set(needs) if seen else set()), who
        assert {each.round_id for each in found} == ({"by-wire"} if seen else set())
        by_http = (await hub.ok(who, "GET", "/v1/offers?round_id=by-wire"))["offers"]
        assert [each["id"] for each in by_http] == [each.offer.id for each in found]
        if who == "partner":
            assert {each.offer.firm_id for each in found} == {0}
    of_other = matching_pb2.ListOffersRequest(round_id="other", need_id=needs[0])
    assert not (await hub.stub.ListOffers(of_other, metadata=bearer("firm"))).offers
    # The firm takes the one, the partner declines the other.
    one, other = [(await only_offer(hub, need_id))["id"] for need_id in needs]
    accept = matching_pb2.AcceptOfferRequest(offer_id=one)
    assert await refused_by_grpc(hub.stub.AcceptOffer, accept, "partner") == "PERMISSION_DENIED"
    assert await refused_by_grpc(hub.stub.AcceptOffer, accept, "other_firm") == "NOT_FOUND"
    accepted = await hub.stub.AcceptOffer(accept, metadata=bearer("firm"))
    assert (accepted.match.need_id, accepted.offer.round_id) == (needs[0], "by-wire")
    decline = matching_pb2.DeclineOfferRequest(offer_id=other, reason="our rig is down")
    assert await refused_by_grpc(hub.stub.DeclineOffer, decline, "other_partner") == "NOT_FOUND"
    declined = await hub.stub.DeclineOffer(decline, metadata=bearer("partner"))
    assert (declined.offer.state, declined.offer.decision_reason) == (
        matching_pb2.OFFER_STATE_DECLINED,
        "our rig is down",
    )
    assert await taken(hub, "gear-rigs") == 1


async def test_rounds_by_grpc_are_for_operators_and_odd_ids_are_refused(hub: Hub) -> None:
    rounds = rounds_pb2_grpc.RoundServiceStub(hub.channel)
    pb = rounds_pb2
    calls: list[tuple[Any, Any]] = [
        (rounds.StartRound, pb.StartRoundRequest(round_id="not-allowed")),
        (rounds.GetRound, pb.GetRoundRequest(round_id="first")),
        (rounds.ListRounds, pb.ListRoundsRequest()),
    ]
    for call, request in calls:
        for who in ("firm", "partner", "device"):
            assert await refused_by_grpc(call, request, who) == "PERMISSION_DENIED"
        assert await refused_by_grpc(call, request, "") == "UNAUTHENTICATED"
    for odd in ("", "a b", "x" * 65, "\0"):
        assert (
            await refused_by_grpc(rounds.StartRound, pb.StartRoundRequest(round_id=odd), "operator")
            == "INVALID_ARGUMENT"
        )
        assert await refused_by_grpc(rounds.GetRound, pb.GetRoundRequest(round_id=odd), "operator") == "NOT_FOUND"
    odd_round = matching_pb2.ListOffersRequest(round_id="\0")
    assert await refused_by_grpc(hub.stub.ListOffers, odd_round, "operator") == "NOT_FOUND"


async def test_one_firm_does_not_fill_a_round(hub: Hub) -> None:
    await hub.pool.executemany(
        "INSERT INTO need (id, firm_id, source, state, text, urgency, sic, region, size, machine_id, offers, "
        "no_offer_reason, opened, opened_by, correlation_id, waits) "
        "VALUES ($1, 1, 'firm', 'open', $2, 'normal', '', '', '', 0, 0, 'WAITS_FOR_ROUND', now(), 0, '', true)",
        [(uuid.uuid4().hex, GEARS) for _ in range(49)],
    )
    last = await wait_for_round(hub, request_id="last")
    body = {"text": GEARS, "wait_for_round": True}
    refused = await hub.call("firm", "POST", "/v1/needs", body)
    assert (refused.status_code, refused.json()["reason"]) == (409, "TOO_MANY_NEEDS")
    # A repeat opens none, and other firms have their own count.
    assert await wait_for_round(hub, request_id="last") == last
    await wait_for_round(hub, who="other_firm")
    await hub.ok("firm", "POST", f"/v1/needs/{last}/close", {"reason": "solved it"})
    await hub.ok("firm", "POST", "/v1/needs", body)


async def test_a_need_nobody_can_take_says_so_and_is_tried_again_by_itself(hub: Hub) -> None:
    need_id = await wait_for_round(hub)
    assert (await run_round(hub, "nobody"))["unplaced"] == 1
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["offers"], need["no_offer_reason"], need["wait_for_round"]) == (0, "NO_PROVIDER", False)
    await hub.put_providers("gear-rigs")

    async def offered() -> bool:
        return bool((await hub.ok("firm", "GET", f"/v1/needs/{need_id}"))["offers"])

    await eventually(offered)


async def test_a_round_begins_by_itself_once_a_day_while_needs_wait(hub: Hub) -> None:
    async def scheduled() -> int:
        found: int = await hub.pool.fetchval("SELECT count(*) FROM round WHERE id LIKE 'scheduled-%'")
        return found

    before = await scheduled()
    await hub.matching.rounds.start_scheduled()
    assert await scheduled() == before  # nobody waits
    await hub.put_providers("iot-basics")
    need_id = await wait_for_round(hub)
    await hub.matching.rounds.start_scheduled()
    assert await scheduled() == before  # the first to wait has no round of its own, before others come
    hub.clock.shift = timedelta(days=1)
    await asyncio.gather(*(hub.matching.rounds.start_scheduled() for _ in range(5)))
    assert await scheduled() == before + 1
    assert await hub.matching.rounds.carry_out()
    assert (await only_offer(hub, need_id))["provider_id"] == "iot-basics"


async def test_a_round_that_is_cut_off_is_finished_by_whoever_comes_next(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", capacity_per_quarter=700)
    await hub.put_providers("iot-basics")
    count = 2 * CHUNK_NEEDS + 100
    vector = await hub.index.compute(lambda ranker: ranker.question(GEARS).astype("<f4").tobytes())
    ids = [uuid.uuid4().hex for _ in range(count)]
    await hub.pool.executemany(
        "INSERT INTO need (id, firm_id, source, state, text, urgency, sic, region, size, machine_id, offers, "
        "no_offer_reason, opened, opened_by, correlation_id, waits) "
        "VALUES ($1, 1, 'firm', 'open', $2, 'normal', '', '', '', 0, 0, 'WAITS_FOR_ROUND', now(), 0, '', true)",
        [(need_id, GEARS) for need_id in ids],
    )
    await hub.pool.executemany(
        "INSERT INTO need_vector (need_id, vector, model) VALUES ($1, $2, $3)",
        [(need_id, vector, hub.index.model_id) for need_id in ids],
    )
    await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "cut-off"})
    running = asyncio.create_task(hub.matching.rounds.carry_out())

    async def some_stored() -> bool:
        return bool(await hub.pool.fetchval("SELECT offers > 0 FROM round WHERE id = 'cut-off'"))

    await eventually(some_stored, deadline_s=60)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    # Two at once: one of them does it.
    await asyncio.gather(*(hub.matching.rounds.carry_out() for _ in range(2)))
    done = await hub.ok("operator", "GET", "/v1/rounds/cut-off")
    assert (done["state"], done["offers"], done["from_safety_net"]) == ("done", count, count - 700)
    rows = await hub.pool.fetch(
        "SELECT provider_id, count(*) FROM offer WHERE round_id = 'cut-off' GROUP BY provider_id"
    )
    assert {row["provider_id"]: row["count"] for row in rows} == {"gear-rigs": 700, "iot-basics": count - 700}
    assert await hub.pool.fetchval("SELECT count(DISTINCT need_id) FROM offer WHERE round_id = 'cut-off'") == count


async def test_a_proposal_takes_a_need_out_of_no_round_and_its_end_closes_none(hub: Hub) -> None:
    expert = {**PROVIDERS["forming"], "capacity_per_quarter": 9}
    for name in ("one", "two"):
        await hub.ok("partner", "PUT", f"/v1/providers/poor-{name}", expert)
    need_id = await wait_for_round(hub, show_to_partners=True)

    async def propose(provider_id: str) -> str:
        offer = await hub.ok("partner", "POST", f"/v1/desk/needs/{need_id}/propose", {"provider_id": provider_id})
        offer_id: str = offer["id"]
        return offer_id

    one, two = await propose("poor-one"), await propose("poor-two")
    await hub.ok("firm", "POST", f"/v1/offers/{one}/decline", {"reason": "does not fit"})
    await hub.ok("partner", "POST", f"/v1/offers/{two}/decline", {"reason": "no time"})
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["state"], need["offers"], need["wait_for_round"]) == ("open", 0, True)
    await hub.put_providers("gear-rigs")
    await run_round(hub, "after-proposals")
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["state"], need["offers"]) == ("open", 1)
    [placed] = [each for each in await offers_of(hub, need_id) if each["state"] == "made"]
    assert (placed["provider_id"], placed["origin"]) == ("gear-rigs", "round")


async def test_a_proposal_that_lapsed_does_not_shut_its_provider_out(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    placed, proposed = [await wait_for_round(hub, f"{GEARS} {n}.", show_to_partners=True) for n in range(2)]

    async def propose(need_id: str) -> dict[str, Any]:
        path = f"/v1/desk/needs/{need_id}/propose"
        offer: dict[str, Any] = await hub.ok("partner", "POST", path, {"provider_id": "gear-rigs"})
        return offer

    async def lapsed(need_id: str) -> bool:
        return bool((await only_offer(hub, need_id))["state"] == "lapsed")

    # Its provider is withdrawn, and comes back.
    await propose(placed)
    await hub.ok("partner", "POST", "/v1/providers/gear-rigs/withdraw")
    await eventually(functools.partial(lapsed, placed))
    await hub.put_providers("gear-rigs")
    # Its time runs out.
    first = await propose(proposed)
    hub.clock.shift = timedelta(days=14, seconds=1)
    await eventually(functools.partial(lapsed, proposed))
    again = await propose(proposed)
    assert again["state"] == "made"
    assert again["id"] != first["id"]
    await run_round(hub, "after-lapse")
    offers = {each["state"]: each for each in await offers_of(hub, placed)}
    assert (offers["made"]["provider_id"], offers["made"]["origin"]) == ("gear-rigs", "round")


class Meanwhile:
    """The index, with something that happens while a round is computed."""

    def __init__(self, index: ProviderIndex, happens: Callable[[], Awaitable[object]]) -> None:
        self._index = index
        self._happens = happens
        self._passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._index, name)

    def __len__(self) -> int:
        return len(self._index)

    async def compute(self, work: Callable[[Ranker], Any]) -> Any:
        answer = await self._index.compute(work)
        if isinstance(answer, Outcome):
            await self._happens()
            # The first pass was not stable.
            self._passes += 1
            return replace(answer, blocking_pairs=2 if self._passes == 1 else 0)
        return answer


async def test_a_provider_withdrawn_while_a_round_computes_is_not_offered_by_it(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    need_id = await wait_for_round(hub)

    async def withdraw() -> None:
        await hub.ok("partner", "POST", "/v1/providers/gear-rigs/withdraw")

    index: Any = Meanwhile(hub.index, withdraw)
    relay = OutboxRelay(hub.pool, hub.publisher, schema="matching")
    rounds = Rounds(hub.pool, index, relay, hub.matching.offers, clock=hub.clock, limits=Limits())
    await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "withdrawn"})
    assert await rounds.carry_out()
    offer = await only_offer(hub, need_id)
    assert (offer["provider_id"], offer["state"]) == ("iot-basics", "made")
    # A later pass does not make up for one that was not stable.
    assert (await hub.ok("operator", "GET", "/v1/rounds/withdrawn"))["blocking_pairs"] == 2


async def test_a_round_tells_a_full_hub_from_one_without_help_and_takes_new_needs_first(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", capacity_per_quarter=1, conflict_firm_ids=[OTHER_FIRM])
    needs = [await wait_for_round(hub, f"{GEARS} Line {number}.") for number in range(2)]
    stranger = await wait_for_round(hub, who="other_firm")
    assert (await run_round(hub, "full"))["unplaced"] == 2
    reasons = [(await hub.ok("operator", "GET", f"/v1/needs/{each}"))["no_offer_reason"] for each in (*needs, stranger)]
    assert sorted(reasons) == ["", "ALL_FULL", "NONE_FITS"], reasons
    newer = await wait_for_round(hub, "Newer.")
    async with hub.pool.acquire() as connection:
        waiting = await rounds_store.waiting_needs(connection, opened_by=from_us(hub.clock.now_us()), limit=1)
    assert [each.id for each in waiting] == [newer]


async def offers_of(hub: Hub, need_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await hub.ok("firm", "GET", f"/v1/needs/{need_id}/offers"))["offers"]
    return found


async def test_partners_see_their_regions_needs_first_and_propose_themselves(hub: Hub) -> None:
    await hub.put_providers("dashboards")
    hidden = (await hub.ok("firm", "POST", "/v1/needs", {"text": "Secret."}))["need"]["id"]
    shown = (await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS, "show_to_partners": True}))["need"]["id"]

    async def seen_by(who: str) -> set[str]:
        found = (await hub.ok(who, "GET", "/v1/desk/needs"))["needs"]
        assert all((each["firm_id"], each["machine_id"], each["opened_by"]) == (0, 0, 0) for each in found)
        return {each["id"] for each in found} & {hidden, shown}

    # The firm is in the East Midlands, as is the one partner; the other is in Scotland.
    assert await seen_by("partner") == await seen_by("operator") == {shown}
    assert await seen_by("other_partner") == set()
    scottish = {"kind": "expert", "title": "Gear noise", "text": "Finds whining gears.", "capacity_per_quarter": 2}
    await hub.ok("other_partner", "PUT", "/v1/providers/scottish", scottish)
    await hub.ok("partner", "PUT", "/v1/providers/local", scottish)
    path = f"/v1/desk/needs/{shown}/propose"
    early = await hub.call("other_partner", "POST", path, {"provider_id": "scottish"})
    assert early.status_code == 404
    proposed = await hub.ok("partner", "POST", path, {"provider_id": "local", "message": "We can come on Monday."})
    assert (proposed["origin"], proposed["state"], proposed["firm_id"]) == ("partner", "made", 0)
    assert await hub.ok("partner", "POST", path, {"provider_id": "local", "message": "again"}) == proposed
    hub.clock.shift = timedelta(days=3, seconds=1)
    assert await seen_by("other_partner") == {shown}
    await hub.ok("other_partner", "POST", path, {"provider_id": "scottish"})
    offers = (await hub.ok("firm", "GET", f"/v1/needs/{shown}/offers"))["offers"]
    assert [(each["provider_id"], each["origin"], each["rank"]) for each in offers] == [
        ("dashboards", "hub", 1),
        ("local", "partner", 2),
        ("scottish", "partner", 3),
    ]
    assert offers[1]["message"] == "We can come on Monday."
    await hub.ok("firm", "POST", f"/v1/needs/{shown}/show", {"shown": False})
    assert await seen_by("partner") == set()
    match = (await hub.ok("firm", "POST", f"/v1/offers/{offers[1]['id']}/accept"))["match"]
    assert match["provider_id"] == "local"


async def test_proposals_respect_filters_owners_and_roles(hub: Hub) -> None:
    await hub.put_providers("dashboards")
    need_id = (await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS, "show_to_partners": True}))["need"]["id"]
    path = f"/v1/desk/needs/{need_id}/propose"
    expert = {"kind": "expert", "title": "Gear noise", "text": "Finds whining gears.", "capacity_per_quarter": 1}
    await hub.ok("partner", "PUT", "/v1/providers/biased", {**expert, "conflict_firm_ids": [FIRM]})
    await hub.ok("partner", "PUT", "/v1/providers/slow", {**expert, "lead_days": 300})
    both = {**expert, "lead_days": 300, "conflict_firm_ids": [FIRM]}
    await hub.ok("partner", "PUT", "/v1/providers/slow-and-biased", both)
    await hub.ok("partner", "PUT", "/v1/providers/gone", expert)
    await hub.ok("partner", "POST", "/v1/providers/gone/withdraw")
    refused: list[tuple[str, str, int, str]] = [
        ("partner", "biased", 409, "NOT_SUITABLE"),
        ("partner", "slow", 409, "NOT_SUITABLE"),
        ("partner", "gone", 409, "NOT_BOOKABLE"),
        ("partner", "nobody", 404, "NOT_FOUND"),
        ("other_partner", "biased", 404, "NOT_FOUND"),
        ("firm", "biased", 403, "FORBIDDEN"),
        ("device", "biased", 403, "FORBIDDEN"),
        ("", "biased", 401, "UNAUTHENTICATED"),
    ]
    for who, provider_id, status, reason in refused:
        answer = await hub.call(who, "POST", path, {"provider_id": provider_id})
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), (who, provider_id, answer.text)
    # Whatever the reason, it is told in the same words: a difference would tell whose need it is.
    answers = [
        await hub.call("partner", "POST", path, {"provider_id": name}) for name in ("biased", "slow", "slow-and-biased")
    ]
    assert len({answer.json()["detail"] for answer in answers}) == 1
    assert (await hub.call("other_firm", "POST", f"/v1/needs/{need_id}/show", {"shown": False})).status_code == 404
    assert (await hub.call("firm", "GET", "/v1/desk/needs")).status_code == 403
    # By gRPC.
    key = (("authorization", f"Bearer {KEYS['partner']}"),)
    await hub.ok("partner", "PUT", "/v1/providers/good", expert)
    listed = await hub.stub.ListShownNeeds(matching_pb2.ListShownNeedsRequest(), metadata=key)
    assert need_id in {need.id for need in listed.needs}
    proposed = await hub.stub.ProposeProvider(
        matching_pb2.ProposeProviderRequest(need_id=need_id, provider_id="good", message="Hello"), metadata=key
    )
    assert (proposed.offer.origin, proposed.offer.message) == (matching_pb2.OFFER_ORIGIN_PARTNER, "Hello")
    hidden = await hub.stub.ShowNeed(
        matching_pb2.ShowNeedRequest(need_id=need_id), metadata=(("authorization", f"Bearer {KEYS['firm']}"),)
    )
    assert not hidden.need.shown_to_partners
    with pytest.raises(grpc.aio.AioRpcError) as gone:
        await hub.stub.ProposeProvider(
            matching_pb2.ProposeProviderRequest(need_id=need_id, provider_id="slow"), metadata=key
        )
    assert gone.value.code() is grpc.StatusCode.NOT_FOUND
