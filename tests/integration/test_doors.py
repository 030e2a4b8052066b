"""Limits of the doors and the change log, on a running door with small limits."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio

from localstack.hub import Hub
from localstack.servers import Servers
from services.common import audit
from services.common.audit import ChangeLog
from services.common.clock import SystemClock
from services.common.database import create_pool, transaction
from services.common.identity import Caller, Role
from services.common.rpc import MESSAGE_BYTES_MAX
from services.common.settings import Settings
from smdih.ingest.v1 import (
    query_pb2,
    query_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from tests.oidc import AUDIENCE, ISSUER, Provider, running_provider
from tests.polling import eventually

PER_S, BURST_S, STREAMS, FAILURES = 5, 4, 3, 10


@dataclass
class Doors:
    hub: Hub
    provider: Provider
    operator: httpx.AsyncClient
    firm_id: int
    site_id: int

    async def key(self, role: str = "firm") -> str:
        body = {"role": role, "firm_id": self.firm_id}
        made: str = (await self.operator.post("/v1/credentials", json=body)).json()["key"]
        return made

    def client(self, bearer: str) -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {bearer}"}
        return httpx.AsyncClient(base_url=self.hub.processes["door"].http, headers=headers, timeout=30)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.hub.processes["door"].grpc)

    async def log(self, **wanted: Any) -> list[dict[str, Any]]:
        answer = await self.operator.get("/v1/change-log", params={"page_size": 1000, **wanted})
        assert answer.status_code == 200, answer.text
        found: list[dict[str, Any]] = answer.json()["entries"]
        return found


@pytest_asyncio.fixture(scope="module")
async def doors(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    async with running_provider() as provider:
        hub = Hub(
            Servers(settings.kafka_bootstrap, settings.database_dsn),
            Path(tmp_path_factory.mktemp("hub")),
            topic_prefix=settings.kafka_topic_prefix,
            roles=("door",),
            environment={
                "SMDIH_OIDC_ISSUER": ISSUER,
                "SMDIH_OIDC_AUDIENCE": AUDIENCE,
                "SMDIH_OIDC_KEYS": provider.address,
                "SMDIH_LIMIT_REQUESTS_PER_S": str(PER_S),
                "SMDIH_LIMIT_BURST_S": str(BURST_S),
                "SMDIH_LIMIT_STREAMS": str(STREAMS),
                "SMDIH_LIMIT_FAILURES_PER_MINUTE": str(FAILURES),
            },
        )
        try:
            await hub.start()
            headers = {"Authorization": f"Bearer {hub.operator_key}"}
            async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=30) as operator:
                body = {"name": "acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}
                firm = (await operator.post("/v1/firms", json=body)).json()
                site = await operator.post("/v1/sites", json={"firm_id": firm["id"], "slug": "leeds", "name": "Leeds"})
                yield Doors(hub, provider, operator, firm["id"], site.json()["id"])
        finally:
            await hub.stop()


def metadata(bearer: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {bearer}"),)


async def list_machines(stub: Any, bearer: str) -> None:
    await stub.ListMachines(registry_pb2.ListMachinesRequest(), metadata=metadata(bearer), timeout=10)


async def until_refused(stub: Any, bearer: str) -> None:
    for _ in range(PER_S * BURST_S * 3):
        await list_machines(stub, bearer)


UNREAD = (("POST", "/v1/machines"), ("PUT", "/v1/firms/1/quota"), ("POST", "/v1/telemetry"), ("POST", "/write"))


async def answer_to_head(doors: Doors, method: str, path: str, bearer: str, *, length: str) -> tuple[int, str]:
    """Status and body of the answer to a request whose body is announced and never sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", doors.hub.processes["door"].http_port)
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: hub\r\nContent-Type: application/json\r\nAuthorization: Bearer {bearer}\r\n"
    )
    writer.write(f"{head}{length}\r\n\r\n".encode())
    try:
        async with asyncio.timeout(5):
            status = int((await reader.readline()).split()[1])
            return status, (await reader.readuntil(b"}")).decode()
    finally:
        writer.close()


async def test_a_body_is_not_read_before_its_sender_is_known(doors: Doors) -> None:
    length = "Content-Length: 4000000"
    for method, path in UNREAD:
        status, told = await answer_to_head(doors, method, path, "smdih_firm_wrong", length=length)
        assert (status, '"UNAUTHENTICATED"' in told) == (401, True), (path, told)
    operator = doors.hub.operator_key
    for path in ("/v1/telemetry", "/write"):
        assert (await answer_to_head(doors, "POST", path, operator, length=length))[0] == 403, path
    # What needs no key takes little; and a body that does not say how long it is ends at the limit all the same.
    assert (await answer_to_head(doors, "POST", "/v1/claims", "", length="Content-Length: 100000"))[0] == 413
    async with doors.client(await doors.key()) as client:

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(90):
                yield b" " * 50_000

        answer = await client.post("/v1/machines", content=endless(), headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["reason"]) == (413, "TOO_LARGE")


async def test_a_message_is_not_read_before_its_sender_is_known(doors: Doors) -> None:
    async with doors.channel() as channel:
        # As a stream, because a client that says it has one message waits until it is sent.
        call: Any = channel.stream_stream("/smdih.ingest.v1.RegistryService/CreateMachine")
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await call(metadata=metadata("smdih_firm_wrong"), timeout=5).read()
        assert told.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(told.value.trailing_metadata() or ())["reason"] == "UNAUTHENTICATED"


async def test_a_key_that_asks_too_often_is_told_when_to_come_again(doors: Doors) -> None:
    """By whichever door; another key is not touched, and after the time given it goes on."""
    greedy, modest = await doors.key(), await doors.key()
    async with doors.client(greedy) as client, doors.client(modest) as other, doors.channel() as channel:
        answers = [await client.get("/v1/machines") for _ in range(PER_S * BURST_S * 3)]
        refused = [one for one in answers if one.status_code == 429]
        assert sum(one.status_code == 200 for one in answers) >= PER_S * BURST_S
        assert refused
        assert refused[0].json()["reason"] == "LIMIT_REQUESTS"
        wait_s = int(refused[0].headers["retry-after"])
        assert 1 <= wait_s <= 2
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await until_refused(stub, greedy)
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(told.value.trailing_metadata() or ())
        assert trailing["reason"] == "LIMIT_REQUESTS"
        assert int(str(trailing["retry-after"])) >= 1
        assert (await other.get("/v1/machines")).status_code == 200
        await list_machines(stub, modest)

        async def goes_on() -> bool:
            return (await client.get("/v1/machines")).status_code == 200

        await eventually(goes_on)


async def test_an_address_without_a_good_key_is_slowed_but_not_its_neighbours(doors: Doors) -> None:
    good = await doors.key()
    async with doors.client("smdih_firm_wrong") as bad, doors.client(good) as client, doors.channel() as channel:
        answers = [await bad.get("/v1/machines") for _ in range(FAILURES * 2)]
        assert {one.status_code for one in answers} == {401, 429}
        assert answers[-1].json()["reason"] == "LIMIT_FAILURES"
        assert int(answers[-1].headers["retry-after"]) >= 1
        # They come from the same address.
        assert (await client.get("/v1/machines")).status_code == 200
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        codes = set()
        for _ in range(FAILURES * 2):
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await list_machines(stub, doors.provider.token(aud="elsewhere"))
            codes.add(told.value.code())
        assert codes == {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        await list_machines(stub, good)


async def test_open_streams_of_a_key_are_counted(doors: Doors) -> None:
    device = await doors.key("device")
    body = {"site_id": doors.site_id, "path": "p", "name": "p", "kind": "press", "signals": [{"name": "t", "unit": ""}]}
    machine = (await doors.operator.post("/v1/machines", json=body)).json()
    batch = telemetry_pb2.Batch(machine_id=machine["id"], times_us=[time.time_ns() // 1000], values=[1.0], sequence=1)
    request = telemetry_pb2.StreamBatchesRequest(source="s", batches=[batch])
    async with doors.channel() as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        streams = [stub.StreamBatches(metadata=metadata(device)) for _ in range(STREAMS)]
        for stream in streams:
            await stream.write(request)
            await stream.read()
        # Nothing is written: the answer may come first, and a client whose write meets it tells of that instead.
        one_more = stub.StreamBatches(metadata=metadata(device))
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await one_more.read()
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(told.value.trailing_metadata() or ())["reason"] == "LIMIT_STREAMS"
        with pytest.raises(grpc.aio.AioRpcError) as told:  # what a call has sent is held as well
            await stub.CheckBatches(telemetry_pb2.CheckBatchesRequest(batches=[batch]), metadata=metadata(device))
        assert dict(told.value.trailing_metadata() or ())["reason"] == "LIMIT_STREAMS"
        await streams[0].done_writing()
        while await streams[0].read() is not grpc.aio.EOF:
            pass
        again = stub.StreamBatches(metadata=metadata(device))
        await again.write(request)
        answer: Any = await again.read()
        assert answer.acknowledged_batches == 1
        for stream in (*streams, again):
            stream.cancel()


async def test_what_is_too_large_is_refused_before_it_is_read(doors: Doors) -> None:
    key = await doors.key()
    async with doors.client(key) as client, doors.channel() as channel:
        answer = await client.post("/v1/machines", content=b"{" + b" " * (5 * 1024 * 1024))
        assert (answer.status_code, answer.json()["reason"]) == (413, "TOO_LARGE")
        stub = query_pb2_grpc.QueryServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await stub.Latest(
                large_request(),
                metadata=metadata(key),
                timeout=10,
            )
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    reader, writer = await asyncio.open_connection("127.0.0.1", doors.hub.processes["door"].http_port)
    writer.write(b"GET /livez HTTP/1.1\r\nX-Long: " + b"x" * 1_000_000)
    assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()


def large_request() -> query_pb2.LatestRequest:
    """Longer than a message may be, by a field that nobody knows."""
    made = query_pb2.LatestRequest()
    size = MESSAGE_BYTES_MAX + 1
    length = b""
    while size > 0x7F:
        length, size = length + bytes((size & 0x7F | 0x80,)), size >> 7
    made.MergeFromString(b"\x9a\x06" + length + bytes((size,)) + bytes(MESSAGE_BYTES_MAX + 1))
    return made


# The change log ---------------------------------------------------------------------------------------------------------


async def test_changes_are_noted_with_who_what_and_outcome_and_without_secrets(doors: Doors, dsn: str) -> None:
    firm_key = await doors.key()
    alice = doors.provider.token(sub="alice")
    slug = "noted"
    body = {"name": slug, "slug": slug, "sic": "25.62", "region": "Wales", "size": "small"}
    async with doors.client(firm_key) as firm, doors.client(alice) as person, doors.channel() as channel:
        made = (await person.post("/v1/firms", json=body, headers={"X-Correlation-Id": "thread-1"})).json()
        assert (await firm.post("/v1/firms", json=body)).status_code == 403
        issued = (await firm.post("/v1/credentials", json={"role": "device", "label": "secret words"})).json()
        assert (await firm.get("/v1/machines")).status_code == 200
        # Telemetry is none, whoever sends it.
        assert (await firm.post("/write", content=b"")).status_code == 204
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        await stub.RevokeCredential(
            registry_pb2.RevokeCredentialRequest(credential_id=issued["id"]), metadata=metadata(firm_key)
        )
        await list_machines(stub, firm_key)
    entries = await doors.log()
    revoked, credential, refused, firm_made = (
        {name: one[name] for name in ("role", "action", "ids", "outcome", "firm_id")} for one in entries[:4]
    )
    assert firm_made == {
        "role": "operator",
        "action": "POST /v1/firms",
        "ids": {"id": made["id"]},
        "outcome": "OK",
        "firm_id": 0,
    }
    assert (entries[3]["shown"], entries[3]["correlation_id"]) == ("alice", "thread-1")
    assert entries[3]["credential_id"] < 0
    assert (refused["role"], refused["outcome"], refused["ids"]) == ("firm", "FORBIDDEN", {})
    assert (credential["outcome"], credential["ids"]) == ("OK", {"id": issued["id"]})
    assert (revoked["action"], revoked["ids"]) == (
        "/smdih.ingest.v1.RegistryService/RevokeCredential",
        {"credential_id": issued["id"]},
    )
    assert entries[0]["shown"] == firm_key[: len(entries[0]["shown"])]
    assert len(entries[0]["shown"]) < 20
    assert entries[0]["address"].endswith("127.0.0.1")
    assert all(one["firm_id"] == doors.firm_id for one in await doors.log(firm_id=doors.firm_id))
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT to_json(c)::text AS row FROM ingest.change_log c")
        for secret in (firm_key, issued["key"], alice, "secret words", doors.hub.operator_key):
            assert not any(secret in row["row"] for row in rows)
        for statement in ("DELETE FROM", "TRUNCATE", "UPDATE"):
            change = " SET outcome = 'OK'" if statement == "UPDATE" else ""
            with pytest.raises(asyncpg.IntegrityConstraintViolationError):
                await connection.execute(f"{statement} ingest.change_log{change}")
    finally:
        await connection.close()


async def test_the_change_log_is_for_operators_and_comes_in_pages(doors: Doors) -> None:
    for _ in range(3):
        await doors.key()
    async with doors.client(await doors.key()) as firm:
        assert (await firm.get("/v1/change-log")).status_code == 403
    every = [one["id"] for one in await doors.log()]
    paged: list[int] = []
    token = ""
    while True:
        page = (await doors.operator.get("/v1/change-log", params={"page_size": 2, "page_token": token})).json()
        paged += [one["id"] for one in page["entries"]]
        token = page["next_page_token"]
        if not token:
            break
    assert paged == every == sorted(every, reverse=True)
    for bad in ({"page_size": -1}, {"page_token": "x"}, {"firm_id": 2**70}):
        assert (await doors.operator.get("/v1/change-log", params=bad)).status_code == 400


async def test_an_entry_that_cannot_be_kept_does_not_stand_before_the_others(settings: Settings) -> None:
    """The subject of a token may be any text; and whatever else the database refuses costs one entry."""
    pool = await create_pool(settings.database_dsn, schema="funding", size_max=2)
    changes = ChangeLog(pool, clock=SystemClock())
    odd = Caller(credential_id=-7, role=Role.OPERATOR, subject="a\x00b\ud800")
    too_large = Caller(credential_id=2**70, role=Role.OPERATOR)

    async def note(caller: Caller, shown: str) -> None:
        await changes.note(caller, shown=shown, action="POST /odd", ids={}, outcome="OK", address="a")

    noting = [asyncio.create_task(note(*one)) for one in ((odd, odd.subject), (too_large, "x"), (odd, "after"))]
    await asyncio.sleep(0)
    writing = asyncio.create_task(changes.run())
    try:
        async with asyncio.timeout(audit.WAIT_S):
            await asyncio.gather(*noting)
        async with transaction(pool) as reading:
            rows = await reading.fetch("SELECT shown FROM change_log WHERE action = 'POST /odd' ORDER BY id")
        assert [row["shown"] for row in rows] == ["a?b?", "after"]
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await pool.close()


async def test_entries_wait_for_a_database_that_is_away_and_the_caller_does_not(settings: Settings) -> None:
    """Here the database is one that does not let us write for a while."""
    pool = await create_pool(settings.database_dsn, schema="matching", size_max=2)
    changes = ChangeLog(pool, clock=SystemClock())
    caller = Caller(credential_id=5, role=Role.FIRM, firm_id=9)
    writing = asyncio.create_task(changes.run())
    try:
        async with pool.acquire() as connection:
            blocked = connection.transaction()
            await blocked.start()
            await connection.execute("LOCK TABLE change_log IN EXCLUSIVE MODE")
            started = time.monotonic()
            await changes.note(caller, shown="s", action="POST /x", ids={"need_id": "n"}, outcome="OK", address="a")
            assert audit.WAIT_S * 0.9 < time.monotonic() - started < audit.WAIT_S + 5
            await blocked.rollback()

        async def kept() -> bool:
            async with transaction(pool) as reading:
                row = await reading.fetchrow("SELECT ids, firm_id FROM change_log")
            return row is not None and (json.loads(row["ids"]), row["firm_id"]) == ({"need_id": "n"}, 9)

        await eventually(kept)
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await pool.close()
