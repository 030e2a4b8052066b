"""A firm lends signals to an engaged expert: matching records it, ingest enforces it, every read is logged."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.clock import SystemClock
from services.common.errors import TryAgain
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.common.settings import Settings
from services.ingest.queries.rooms import Rooms
from smdih.ingest.v1.rooms_pb2 import ListRoomReadsRequest
from smdih.ingest.v1.rooms_pb2_grpc import RoomReadServiceStub
from smdih.matching.v1 import events_pb2, rooms_pb2, rooms_pb2_grpc
from tests.integration.stored_plant import StoredPlant, stored_plant
from tests.oidc import AUDIENCE, ISSUER, running_provider
from tests.polling import eventually

MINUTE_US, DAY_US = 60_000_000, 86_400_000_000
RECALL_S_MAX = 1.0


@dataclass
class World:
    plant: StoredPlant
    matching: dict[str, httpx.AsyncClient]
    # The same keys at the ingest door.
    door: dict[str, httpx.AsyncClient]
    machine: dict[str, Any]
    start_us: int
    keys: dict[str, str]

    @property
    def signals(self) -> list[int]:
        return [signal["id"] for signal in self.machine["signals"]]

    async def ok(self, who: str, method: str, path: str, json: Any = None) -> Any:
        answer = await self.matching[who].request(method, path, json=json)
        assert answer.status_code < 300, answer.text
        return answer.json()

    async def engaged(self) -> str:
        opened = await self.ok("firm", "POST", "/v1/needs", {"text": "Our press draws more current than it did."})
        offer = opened["offers"][0]
        match = (await self.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept"))["match"]
        await self.ok("partner", "POST", f"/v1/matches/{match['id']}/engage")
        match_id: str = match["id"]
        return match_id

    def body(self, match_id: str, **fields: Any) -> dict[str, Any]:
        return {
            "match_id": match_id,
            "signals": [{"machine_id": self.machine["id"], "signal_ids": self.signals[:2]}],
            "purpose": "Find out why the press draws more current.",
            "data_from_us": self.start_us,
            "data_until_us": self.start_us + 10 * MINUTE_US,
            "closes_us": time.time_ns() // 1000 + DAY_US,
            **fields,
        }

    async def open_room(self, match_id: str, **fields: Any) -> dict[str, Any]:
        room: dict[str, Any] = await self.ok("firm", "POST", "/v1/rooms", self.body(match_id, **fields))
        return room

    async def read(self, who: str, signal: int, from_minute: float = 0, to_minute: float = 10) -> httpx.Response:
        """Samples of one signal, minutes counted from the start of the data."""
        query = (
            f"from_us={self.start_us + int(from_minute * MINUTE_US)}&to_us={self.start_us + int(to_minute * MINUTE_US)}"
        )
        return await self.door[who].get(f"/v1/signals/{signal}/history?{query}&page_size=10000")

    async def may_read(self, signal: int) -> bool:
        return (await self.read("partner", signal)).status_code == 200


@pytest_asyncio.fixture(scope="module")
async def world(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    folder = Path(tmp_path_factory.mktemp("hub"))
    async with (
        running_provider() as people,
        stored_plant(
            servers,
            settings,
            folder,
            roles=("door", "matching"),
            environment={
                "SMDIH_OIDC_ISSUER": ISSUER,
                "SMDIH_OIDC_AUDIENCE": AUDIENCE,
                "SMDIH_OIDC_KEYS": people.address,
            },
        ) as plant,
    ):
        machine = await plant.machine(
            "press-1", [{"name": name, "unit": "A"} for name in ("current", "speed", "secret")]
        )
        start_us = (time.time_ns() // 1_000_000_000 - 3600) // 60 * MINUTE_US
        times = start_us + np.arange(1800) * 1_000_000
        await plant.store(machine, times, np.random.default_rng(1).normal(20, 3, (1800, 3)))
        partners = [
            (await plant.operator.post("/v1/partners", json={"name": name, "region": "Northern Ireland"})).json()["id"]
            for name in ("University", "Other")
        ]
        keys = {
            "firm": plant.firm_key,
            "other_firm": plant.stranger.headers["authorization"].split()[1],
            "partner": await plant.key("partner", partner_id=partners[0]),
            "other_partner": await plant.key("partner", partner_id=partners[1]),
            # They come as themselves, by token.
            "expert": people.token(sub="e", smdih_role="provider", smdih_provider_id="press-expert"),
            "other_expert": people.token(sub="o", smdih_role="provider", smdih_provider_id="welder"),
            "operator": plant.hub.operator_key,
        }
        urls = {name: plant.hub.processes[name].http for name in ("matching", "door")}
        clients = {
            name: {
                who: httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
                for who, key in keys.items()
            }
            for name, url in urls.items()
        }
        made = World(plant, clients["matching"], clients["door"], machine, start_us, keys)
        expert = {"kind": "expert", "title": "Press expert", "text": "Current of presses.", "capacity_per_quarter": 50}
        await made.ok("partner", "PUT", "/v1/providers/press-expert", expert)
        try:
            yield made
        finally:
            for each in (*clients["matching"].values(), *clients["door"].values()):
                await each.aclose()


async def test_exactly_the_lent_signals_of_exactly_the_lent_time_may_be_read_and_each_read_is_logged(
    world: World,
) -> None:
    match_id = await world.engaged()
    current, speed, secret = world.signals
    assert (await world.read("partner", current)).status_code == 404
    room = await world.open_room(match_id)
    await eventually(lambda: world.may_read(current), deadline_s=5)
    assert len((await world.read("partner", current)).json()["samples"]) == 600
    for who, signal, start, end, status in [
        ("partner", speed, 2, 3, 200),
        ("partner", secret, 0, 10, 404),
        ("partner", current, 0, 11, 403),
        ("partner", current, -1, 5, 403),
        ("other_partner", current, 0, 10, 404),
        ("other_firm", current, 0, 10, 404),
    ]:
        answer = await world.read(who, signal, start, end)
        assert answer.status_code == status, (who, signal, start, end, answer.text)
    # The other ways to read know of the room too.
    for path in ("plot?", "buckets?width_s=60&", "export?"):
        for signal, minutes, status in ((speed, 10, 200), (speed, 11, 403), (secret, 10, 404)):
            query = f"signal_id={current}&signal_id={signal}&from_us={world.start_us}&to_us={world.start_us + minutes * MINUTE_US}"
            answer = await world.door["partner"].get(f"/v1/{path}{query}")
            assert answer.status_code == status, (path, signal, minutes, answer.text)
            if path == "export?" and status == 200:
                assert len(answer.text.splitlines()) == 601
    details = await world.ok("partner", "GET", f"/v1/rooms/{room['id']}")
    assert [(each["name"], each["unit"]) for each in details["signals"]] == [("current", "A"), ("speed", "A")]
    # Both see the log: a row for each signal, minute and key, however often it was read.
    for _ in range(20):
        await world.read("partner", current)
    firm_log, expert_log = [
        (await world.door[who].get(f"/v1/rooms/{room['id']}/reads")).json()["reads"] for who in ("firm", "partner")
    ]
    assert firm_log == expert_log
    assert {each["signal_id"] for each in firm_log} == {current, speed}
    assert sum(each["reads"] for each in firm_log if each["signal_id"] == current) >= 22
    assert len(firm_log) <= 4
    assert min(each["data_from_us"] for each in firm_log) == world.start_us
    for who, status in (("other_firm", 404), ("other_partner", 404), ("operator", 200)):
        assert (await world.door[who].get(f"/v1/rooms/{room['id']}/reads")).status_code == status
    assert (await world.door["firm"].get("/v1/rooms/nonsense/reads")).status_code == 404
    async with httpx.AsyncClient(base_url=world.plant.hub.processes["door"].http) as keyless:
        bare = await keyless.get(f"/v1/rooms/{room['id']}/reads")
    assert bare.status_code == 401


async def test_an_expert_who_comes_by_token_reads_what_was_lent_for_its_own_match_and_no_other(world: World) -> None:
    current, _, secret = world.signals
    for other in (await world.ok("firm", "GET", "/v1/rooms?state=open"))["rooms"]:
        await world.ok("firm", "POST", f"/v1/rooms/{other['id']}/recall")
    room = await world.open_room(await world.engaged())
    await eventually(lambda: world.may_read(current), deadline_s=5)
    for who, signal, status in [
        ("expert", current, 200),
        ("expert", secret, 404),
        ("other_expert", current, 404),
    ]:
        assert (await world.read(who, signal)).status_code == status, (who, signal)
    reads = (await world.door["expert"].get(f"/v1/rooms/{room['id']}/reads")).json()["reads"]
    assert {each["signal_id"] for each in reads if each["credential_id"] < 0} == {current}
    assert (await world.ok("expert", "GET", f"/v1/rooms/{room['id']}"))["signals"]
    assert room["id"] in {each["id"] for each in (await world.ok("expert", "GET", "/v1/rooms"))["rooms"]}
    assert (await world.ok("other_expert", "GET", "/v1/rooms"))["rooms"] == []
    for path, clients in ((f"/v1/rooms/{room['id']}", world.matching), (f"/v1/rooms/{room['id']}/reads", world.door)):
        assert (await clients["other_expert"].get(path)).status_code == 404
    # What belongs to the firm stays the firm's.
    assert (await world.matching["expert"].post(f"/v1/rooms/{room['id']}/recall")).status_code == 403
    assert (await world.matching["expert"].post("/v1/rooms", json=world.body(room["match_id"]))).status_code == 403
    await world.ok("firm", "POST", f"/v1/rooms/{room['id']}/recall")

    async def is_over() -> bool:
        return (await world.read("expert", current)).status_code == 404

    await eventually(is_over, deadline_s=5)


async def test_a_recall_takes_effect_within_a_second(world: World) -> None:
    match_id = await world.engaged()
    for _ in range(3):
        room = await world.open_room(match_id)
        await eventually(lambda: world.may_read(world.signals[0]), deadline_s=5)
        for other in (await world.ok("firm", "GET", "/v1/rooms?state=open"))["rooms"]:
            if other["id"] != room["id"]:
                await world.ok("firm", "POST", f"/v1/rooms/{other['id']}/recall")
        recalled = await world.ok("firm", "POST", f"/v1/rooms/{room['id']}/recall", {"reason": "found it"})
        began = time.monotonic()
        assert (recalled["state"], recalled["end_reason"]) == ("recalled", "found it")
        while await world.may_read(world.signals[0]):
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < RECALL_S_MAX
        assert await world.ok("firm", "POST", f"/v1/rooms/{room['id']}/recall") == recalled
        assert (await world.ok("partner", "GET", f"/v1/rooms/{room['id']}"))["signals"] == []


async def test_a_recall_ends_an_export_that_runs(world: World) -> None:
    match_id = await world.engaged()
    long = await world.plant.machine("press-long", [{"name": name, "unit": "A"} for name in ("one", "two")])
    rows = 300_000
    times = world.start_us + np.arange(rows) * 1_000
    await world.plant.store(long, times, np.random.default_rng(1).normal(20, 3, (rows, 2)), rollups=False)
    one, two = [signal["id"] for signal in long["signals"]]
    lent = [{"machine_id": long["id"], "signal_ids": [one, two]}]
    room = await world.open_room(match_id, signals=lent)
    await eventually(lambda: world.may_read(one), deadline_s=5)
    query = f"signal_id={one}&signal_id={two}&from_us={world.start_us}&to_us={world.start_us + 10 * MINUTE_US}&layout=narrow"
    async with world.door["partner"].stream("GET", f"/v1/export?{query}") as answer:
        chunks = answer.aiter_raw()
        got = len(await anext(chunks))
        await world.ok("firm", "POST", f"/v1/rooms/{room['id']}/recall")

        async def is_over() -> bool:
            return not await world.may_read(one)

        await eventually(is_over, deadline_s=5)

        async def rest() -> None:
            nonlocal got
            async for chunk in chunks:
                got += len(chunk)

        with pytest.raises(httpx.RemoteProtocolError):
            await rest()
    whole = await world.door["firm"].get(f"/v1/export?{query}")
    assert got < len(whole.content)


async def test_what_is_lent_is_not_read_while_it_cannot_be_known(settings: Settings) -> None:
    """A recall could have been missed; the other reads go on."""
    cluster, fresh_s_max = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix), 3.0
    rooms = Rooms(cluster, clock=SystemClock(), fresh_s_max=fresh_s_max)
    partner = Caller(credential_id=1, role=Role.PARTNER, partner_id=1)

    async def known() -> bool:
        try:
            rooms.grants(partner)
        except TryAgain:
            return False
        return True

    with pytest.raises(TryAgain) as refused:
        rooms.grants(partner)
    assert refused.value.reason == "ROOMS_UNKNOWN"
    following = asyncio.create_task(rooms.run())
    await eventually(known, deadline_s=10)
    # The broker's answers keep it known, though nothing new comes.
    for _ in range(30):
        await asyncio.sleep(0.1)
        assert await known()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)

    async def unknown() -> bool:
        return not await known()

    await eventually(unknown, deadline_s=2 * fresh_s_max)
    assert rooms.grants(Caller(credential_id=2, role=Role.FIRM, firm_id=1)) == []


async def test_the_log_of_a_room_comes_page_by_page(world: World) -> None:
    room = await world.open_room(await world.engaged())
    path = f"/v1/rooms/{room['id']}/reads"
    await eventually(lambda: world.may_read(world.signals[0]), deadline_s=5)
    await world.plant.database.execute(
        "INSERT INTO room_read (room_id, signal_id, credential_id, minute, reads, data_from, data_until) "
        "SELECT $1, $2, key, date_trunc('minute', now()) - n * interval '1 minute', 1, now(), now() "
        "FROM generate_series(1, 600) n, (VALUES (-5), (7)) AS k (key)",
        room["id"],
        world.signals[0],
    )
    seen: list[tuple[int, int, int]] = []
    token, pages = "", 0
    while True:
        page = (await world.door["firm"].get(f"{path}?page_size=500&page_token={token}")).json()
        seen += [(each["minute_us"], each["signal_id"], each["credential_id"]) for each in page["reads"]]
        token, pages = page["next_page_token"], pages + 1
        if not token:
            break
    assert pages == 3
    assert len(seen) == len(set(seen)) >= 1201
    assert [minute for minute, _, _ in seen] == sorted((minute for minute, _, _ in seen), reverse=True)
    for odd in ("x", "1.2", "9999999999999999.1.1" + "0" * 30):
        assert (await world.door["firm"].get(f"{path}?page_token={odd}")).status_code == 400
    await world.ok("firm", "POST", f"/v1/rooms/{room['id']}/recall")


async def test_a_room_ends_with_its_time_and_with_its_match(world: World) -> None:
    match_id = await world.engaged()
    current = world.signals[0]
    short = await world.open_room(match_id, closes_us=time.time_ns() // 1000 + 2_000_000)
    await eventually(lambda: world.may_read(current), deadline_s=2)

    async def closed() -> bool:
        return not await world.may_read(current)

    await eventually(closed, deadline_s=5)

    async def expired() -> bool:
        return bool((await world.ok("firm", "GET", f"/v1/rooms/{short['id']}"))["room"]["state"] == "expired")

    await eventually(expired)
    lent = await world.open_room(match_id)
    await eventually(lambda: world.may_read(current), deadline_s=5)
    await world.ok("partner", "POST", f"/v1/matches/{match_id}/finish", {"result": "solved"})
    await eventually(closed, deadline_s=2)
    assert (await world.ok("firm", "GET", f"/v1/rooms/{lent['id']}"))["room"]["state"] == "match_ended"
    refused = await world.matching["firm"].post("/v1/rooms", json=world.body(match_id))
    assert (refused.status_code, refused.json()["reason"]) == (409, "MATCH_FINISHED")


async def test_only_the_firm_lends_its_own_signals_to_an_engaged_match(world: World) -> None:
    match_id = await world.engaged()
    machine = world.machine["id"]
    calls: list[tuple[str, dict[str, Any], int, str]] = [
        ("partner", {}, 403, "FORBIDDEN"),
        ("operator", {}, 403, "FORBIDDEN"),
        ("other_firm", {}, 404, "UNKNOWN_MACHINE"),
        ("firm", {"match_id": "0" * 32}, 404, "NOT_FOUND"),
        ("firm", {"match_id": "x"}, 404, "NOT_FOUND"),
        ("firm", {"signals": []}, 400, "SIGNALS_MISSING"),
        ("firm", {"signals": [{"machine_id": machine, "signal_ids": []}]}, 400, "SIGNALS_MISSING"),
        ("firm", {"signals": [{"machine_id": machine, "signal_ids": [2**62]}]}, 404, "UNKNOWN_SIGNAL"),
        ("firm", {"signals": [{"machine_id": machine, "signal_ids": [1] * 501}]}, 400, "TOO_MANY"),
        ("firm", {"purpose": " "}, 400, "PURPOSE_MISSING"),
        ("firm", {"closes_us": 1}, 400, "BAD_TIME"),
        ("firm", {"closes_us": time.time_ns() // 1000 + 93 * DAY_US}, 400, "BAD_TIME"),
        ("firm", {"data_until_us": 1}, 400, "EMPTY_PERIOD"),
    ]
    for who, fields, status, reason in calls:
        answer = await world.matching[who].post("/v1/rooms", json={**world.body(match_id), **fields})
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), (who, fields, answer.text)
    body = world.body(match_id, request_id="lend-1")
    rooms = await asyncio.gather(*(world.ok("firm", "POST", "/v1/rooms", body) for _ in range(4)))
    assert len({room["id"] for room in rooms}) == 1
    other = await world.matching["firm"].post("/v1/rooms", json={**body, "purpose": "Something else."})
    assert (other.status_code, other.json()["reason"]) == (409, "REQUEST_ID_REUSED")
    room_id = rooms[0]["id"]
    for who, status in (("other_firm", 404), ("other_partner", 404)):
        assert (await world.matching[who].get(f"/v1/rooms/{room_id}")).status_code == status
    for who, status in (("other_firm", 404), ("partner", 403), ("operator", 200)):
        assert (await world.matching[who].post(f"/v1/rooms/{room_id}/recall")).status_code == status


async def test_rooms_by_grpc_and_across_a_restart_of_the_door(world: World) -> None:
    match_id = await world.engaged()
    pb = rooms_pb2

    def key(who: str) -> Any:
        return (("authorization", f"Bearer {world.keys[who]}"),)

    async with grpc.aio.insecure_channel(world.plant.hub.processes["matching"].grpc) as channel:
        stub = rooms_pb2_grpc.RoomServiceStub(channel)
        body = world.body(match_id)
        opened = await stub.OpenRoom(
            pb.OpenRoomRequest(
                match_id=match_id,
                signals=[pb.MachineSignals(machine_id=world.machine["id"], signal_ids=world.signals[:1])],
                purpose=body["purpose"],
                data_from_us=body["data_from_us"],
                closes_us=body["closes_us"],
            ),
            metadata=key("firm"),
        )
        assert opened.room.state == events_pb2.ROOM_STATE_OPEN
        assert opened.room.data_until_us == opened.room.closes_us
        got = await stub.GetRoom(pb.GetRoomRequest(room_id=opened.room.id), metadata=key("partner"))
        assert [signal.name for signal in got.signals] == ["current"]
        listed = await stub.ListRooms(pb.ListRoomsRequest(page_size=1), metadata=key("partner"))
        assert [room.id for room in listed.rooms] == [opened.room.id]
        await eventually(lambda: world.may_read(world.signals[0]), deadline_s=5)
        async with grpc.aio.insecure_channel(world.plant.hub.processes["door"].grpc) as door:
            reads, asked = RoomReadServiceStub(door), ListRoomReadsRequest(room_id=opened.room.id)
            [read] = (await reads.ListRoomReads(asked, metadata=key("firm"))).reads
            assert (read.signal_id, read.data_from_us) == (world.signals[0], world.start_us)
            assert read.reads >= 1
            assert read.minute_us % MINUTE_US == 0
            assert [read] == list((await reads.ListRoomReads(asked, metadata=key("partner"))).reads)
            for who in ("other_firm", "other_partner"):
                with pytest.raises(grpc.aio.AioRpcError) as unseen:
                    await reads.ListRoomReads(asked, metadata=key(who))
                assert unseen.value.code() is grpc.StatusCode.NOT_FOUND
            with pytest.raises(grpc.aio.AioRpcError) as nobody:
                await reads.ListRoomReads(asked)
            assert nobody.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await world.plant.database.execute(
            "INSERT INTO room_read (room_id, signal_id, credential_id, minute, reads, data_from, data_until) "
            "VALUES ($1, $2, 7, now() - interval '401 days', 1, now(), now())",
            opened.room.id,
            world.signals[0],
        )
        world.plant.hub.kill("door")

        async def readable_again() -> bool:
            try:
                return await world.may_read(world.signals[0])
            except httpx.TransportError:
                return False

        await eventually(readable_again, deadline_s=90)

        async def old_reads_are_forgotten() -> bool:
            log = (await world.door["firm"].get(f"/v1/rooms/{opened.room.id}/reads")).json()["reads"]
            return bool(log) and 7 not in {each["credential_id"] for each in log}

        await eventually(old_reads_are_forgotten)
        recalled = await stub.RecallRoom(pb.RecallRoomRequest(room_id=opened.room.id), metadata=key("firm"))
        assert recalled.room.state == events_pb2.ROOM_STATE_RECALLED
