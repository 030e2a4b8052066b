"""Why is there no data? Each cause, made as it happens, and the answer that a person gets."""

import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.clock import SystemClock
from services.common.database import create_pool
from services.common.errors import TryAgain
from services.common.settings import Settings
from services.ingest.diagnosis.sightings import Sightings, SightingsWriter
from services.ingest.domain import Sender
from smdih.ingest.v1 import diagnosis_pb2, diagnosis_pb2_grpc
from tests.integration.registry_hub import FirmAtHub, RegistryHub, created, running
from tests.integration.wire import Wire
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def hub(
    servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RegistryHub]:
    async with running(servers, settings, tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest_asyncio.fixture
async def firm(hub: RegistryHub) -> FirmAtHub:
    return await hub.firm()


def causes(diagnosis: dict[str, Any]) -> list[str]:
    return [one["cause"] for one in diagnosis["causes"]]


async def test_a_machine_that_never_sent_and_one_whose_data_flows(firm: FirmAtHub) -> None:
    machine = await firm.machine()
    before = await firm.diagnosis(machine["id"])
    assert before["verdict"] == "NEVER_SENT"
    assert machine["path"] in before["next_step"]
    assert before["last_received_us"] is None
    assert before["signals"][0] == {
        "signal_id": machine["signals"][0]["id"],
        "name": "temperature",
        "unit": "degC",
        "last_us": None,
        "value": None,
    }

    sent_ms = int(time.time() * 1000)
    assert (await firm.send(machine["id"], ts=sent_ms)).status_code == 200

    async def flows() -> bool:
        return bool((await firm.diagnosis(machine["id"]))["last_stored_time_us"] == sent_ms * 1000)

    await eventually(flows)
    after = await firm.diagnosis(machine["id"])
    assert (after["verdict"], after["waiting_records"], after["source"]) == ("FLOWING", 0, "gateway-1")
    assert [(one["name"], one["last_us"], one["value"]) for one in after["signals"]] == [
        ("temperature", sent_ms * 1000, 21.5),
        ("current", None, None),
    ]
    used = {one["credential_id"]: one["last_used_us"] for one in after["credentials"]}
    assert used[firm.device_credential_id] > (sent_ms - 1000) * 1000


@pytest.mark.parametrize(
    ("frame", "cause", "words"),
    [
        ({"values": {"temperatur": 20}}, "UNKNOWN_SIGNAL", "'temperatur'"),
        ({"values": {"temperature": 900}}, "OUT_OF_RANGE", "instrument"),
        ({"values": {}}, "EMPTY_BATCH", "no values"),
        ({"ts": 1_764_000_000}, "WRONG_TIME_UNIT", "seconds"),
        ({"ts": int((time.time() + 7200) * 1000)}, "CLOCK_AHEAD", "hour"),
        ({"ts": 946_684_800_000}, "CLOCK_BEHIND", "26 years"),
        ({"values": {"temperature": "hot"}}, "WRONG_TYPE", "'hot'"),
    ],
)
async def test_what_is_put_aside_explains_the_silence(
    firm: FirmAtHub, frame: dict[str, Any], cause: str, words: str
) -> None:
    machine = await firm.machine()
    for _ in range(3):
        await firm.send(machine["path"], **frame)
    found = await firm.diagnosis(machine["id"])
    assert found["verdict"] == cause
    assert words in found["text"]
    assert found["next_step"]
    assert found["causes"][0]["times"] == 3
    assert found["causes"][0]["credential_id"] == firm.device_credential_id


async def test_good_data_after_a_refusal_ends_the_trouble_and_a_part_refused_is_said(firm: FirmAtHub) -> None:
    machine = await firm.machine()
    await firm.send(machine["id"], {"temperature": 900})
    await firm.send(machine["id"], {"temperature": 20, "current": 3, "speed": 1})
    found = await firm.diagnosis(machine["id"])
    assert found["verdict"] == "PARTLY_REFUSED"
    assert set(causes(found)) >= {"UNKNOWN_SIGNAL", "OUT_OF_RANGE"}


async def test_a_gateway_that_names_the_machine_wrongly_is_found(firm: FirmAtHub) -> None:
    machine = await firm.machine("press-1")
    await firm.send(f"{firm.slug}/leeds/pres-1")
    await firm.send(f"{firm.slug}/leeds/quite-another")
    found = await firm.diagnosis(machine["id"])
    assert causes(found)[:2] == ["UNKNOWN_MACHINE", "UNKNOWN_MACHINE"]
    assert "pres-1" in found["text"]
    assert "looks like" in found["text"]


async def test_a_body_that_cannot_be_read_and_a_wrong_setting_are_told_to_the_firm(firm: FirmAtHub) -> None:
    machine = await firm.machine()
    await firm.device.post("/v1/telemetry", content=b"{")
    await firm.device.post("/api/v2/write?precision=minutes", content=b"m a=1")
    assert {"MALFORMED", "INVALID"} <= set(causes(await firm.diagnosis(machine["id"])))
    listed = (await firm.admin.get("/v1/refusals")).json()["refusals"]
    assert {one["reason"] for one in listed} == {"MALFORMED", "INVALID"}
    first = (await firm.admin.get("/v1/refusals", params={"page_size": 1})).json()
    rest = (await firm.admin.get("/v1/refusals", params={"page_token": first["next_page_token"]})).json()
    assert [*first["refusals"], *rest["refusals"]] == listed
    assert rest["next_page_token"] == ""


async def test_keys_that_are_revoked_expired_too_early_or_mistyped(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    assert (await firm.send(machine["id"])).status_code == 200
    await firm.admin.delete(f"/v1/credentials/{firm.device_credential_id}")

    async def refused() -> bool:
        return (await firm.send(machine["id"])).status_code == 401

    await eventually(refused)
    found = await firm.diagnosis(machine["id"])
    assert found["verdict"] == "KEY_REVOKED"
    assert found["causes"][0]["credential_id"] == firm.device_credential_id

    other = await firm.machine("press-2")
    now_us = time.time_ns() // 1000
    ask = {"role": "device", "firm_id": firm.id, "label": "press 2"}
    early = await created(firm.operator, "/v1/credentials", ask | {"valid_from_us": now_us + 3_600_000_000})
    assert (await firm.send(other["id"], key=early["key"])).json()["reason"] == "KEY_NOT_YET_VALID"
    assert "KEY_NOT_YET_VALID" in causes(await firm.diagnosis(other["id"]))
    late = await created(
        firm.operator, "/v1/credentials", ask | {"valid_from_us": now_us - 7_200_000_000, "valid_to_us": now_us - 1}
    )
    assert (await firm.send(other["id"], key=late["key"])).json()["reason"] == "KEY_EXPIRED"
    assert causes(await firm.diagnosis(other["id"]))[0] == "KEY_EXPIRED"
    assert (await firm.send(other["id"], key=late["key"][:-1] + "!")).status_code == 401
    assert (await firm.send(other["id"], key=early["key"][:-1])).json()["reason"] == "UNAUTHENTICATED"
    found = await firm.diagnosis(other["id"])
    assert found["verdict"] == "KEY_UNKNOWN"
    assert found["causes"][0]["example"] == ""
    assert "NO_VALID_KEY" not in causes(found)  # the firm's own admin key is valid
    nobodys = (await firm.operator.get("/v1/refusals")).json()["refusals"]
    assert {one["subject"] for one in nobodys if one["firm_id"] == 0} >= {early["prefix"]}
    assert early["key"] not in (await firm.operator.get("/v1/refusals")).text


async def test_acknowledged_data_that_waits_for_the_historian(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    await firm.send(machine["id"], ts=int((time.time() - 60) * 1000))

    async def stored() -> bool:
        return (await firm.diagnosis(machine["id"]))["last_stored_time_us"] is not None

    await eventually(stored)
    assert (await firm.diagnosis(machine["id"]))["verdict"] == "FLOWING"
    await hub.hub.pause("historian")
    try:
        assert (await firm.send(machine["id"])).status_code == 200
        found = await firm.diagnosis(machine["id"])
        assert found["verdict"] == "NOT_STORED_YET"
        assert found["waiting_records"] >= 1
        assert "Nothing is lost" in found["next_step"]
    finally:
        hub.hub.resume("historian")
        await hub.hub.wait_ready("historian")


async def test_refusals_survive_the_door_and_count_on(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    await firm.send(machine["id"], {"temperature": 900})

    async def written() -> bool:
        return bool((await firm.admin.get("/v1/refusals")).json()["refusals"])

    await eventually(written)
    hub.hub.kill("door")

    async def again() -> bool:
        try:
            return (await firm.send(machine["id"], {"temperature": 901})).status_code == 422
        except httpx.TransportError:
            return False

    await eventually(again)
    (cause,) = [one for one in (await firm.diagnosis(machine["id"]))["causes"] if one["cause"] == "OUT_OF_RANGE"]
    assert (cause["times"], cause["samples"]) == (2, 2)


async def test_only_its_firm_and_operators_may_ask(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    other = await hub.firm()
    path = f"/v1/machines/{machine['id']}/diagnosis"
    assert (await firm.operator.get(path)).status_code == 200
    assert (await firm.device.get(path)).status_code == 200
    assert (await other.admin.get(path)).status_code == 404
    assert (await other.admin.get("/v1/refusals", params={"firm_id": firm.id})).status_code == 403
    assert (await firm.device.get("/v1/refusals")).status_code == 403
    assert (await hub.client("").get(path)).status_code == 401
    assert (await firm.admin.get("/v1/machines/99999999/diagnosis")).status_code == 404


async def test_the_same_by_grpc(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    await firm.send(machine["id"], {"temperature": 900})
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        stub = diagnosis_pb2_grpc.DiagnosisServiceStub(channel)
        request = diagnosis_pb2.DiagnoseMachineRequest(machine_id=machine["id"])
        answer = await stub.DiagnoseMachine(request, metadata=(("authorization", f"Bearer {firm.device_key}"),))
        assert answer.causes[0].cause == "OUT_OF_RANGE"
        assert answer.causes[0].times == 1
        assert not answer.HasField("last_received_us")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.DiagnoseMachine(request)
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_what_a_door_has_noted_is_written_when_it_stops(hub: RegistryHub, firm: FirmAtHub, dsn: str) -> None:
    machine = await firm.machine()
    assert (await firm.send(machine["id"])).status_code == 200
    await hub.hub.pause("door")
    try:
        connection = await asyncpg.connect(dsn)
        source = await connection.fetchval(
            "SELECT source FROM ingest.machine_seen WHERE machine_id = $1", machine["id"]
        )
        await connection.close()
        assert source == "gateway-1"
    finally:
        hub.hub.resume("door")
        await hub.hub.wait_ready("door")


async def test_notes_wait_while_the_database_is_away(firm: FirmAtHub, dsn: str) -> None:
    machine = await firm.machine()
    wire = Wire(dsn)
    await wire.mend()
    pool = await create_pool(wire.dsn, schema="ingest", size_max=1)
    notes = Sightings(SystemClock())
    writer = SightingsWriter(pool, notes, SystemClock())
    sender = Sender(firm.id, firm.device_credential_id, "cut-off", "http", "c")

    def refuse() -> None:
        notes.refused(sender, "OUT_OF_RANGE", "x", machine_id=machine["id"], samples=2)

    try:
        refuse()
        await wire.cut()
        with pytest.raises(TryAgain):
            await writer.write()
        refuse()
        await wire.mend()
        await writer.write()
    finally:
        await wire.cut()
        pool.terminate()
    (cause,) = [one for one in (await firm.diagnosis(machine["id"]))["causes"] if one["cause"] == "OUT_OF_RANGE"]
    assert (cause["times"], cause["samples"]) == (2, 4)
