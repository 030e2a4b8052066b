"""What came for signals and machines that nobody had registered, and what becomes of it."""

import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.settings import Settings
from smdih.ingest.v1 import (
    proposal_pb2,
    proposal_pb2_grpc,
)
from tests.integration.registry_hub import FirmAtHub, RegistryHub, import_table, running
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


async def propose(firm: FirmAtHub) -> None:
    answer = await firm.admin.put(f"/v1/firms/{firm.id}/unknown-signals", json={"policy": "propose"})
    assert answer.json() == {"policy": "propose"}


async def proposals_of(firm: FirmAtHub, **params: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await firm.admin.get("/v1/signal-proposals", params=params)).json()["proposals"]
    return found


async def frames_of(firm: FirmAtHub, dsn: str, machine_id: int) -> list[list[float | None]]:
    connection = await asyncpg.connect(dsn)
    try:
        rows = await connection.fetch("SELECT values FROM ingest.frame WHERE machine_id = $1 ORDER BY ts", machine_id)
    finally:
        await connection.close()
    return [row["values"] for row in rows]


async def test_unknown_signals_are_proposed_and_accepted_with_what_waits(firm: FirmAtHub, dsn: str) -> None:
    machine = await firm.machine(signals=[{"name": "current", "unit": "A"}])
    start_ms = int(time.time() * 1000) - 60_000
    await firm.send(machine["path"], {"current": 1, "spindle_temp_c": 20.5, "door": 0}, ts=start_ms)
    assert await proposals_of(firm) == []  # the firm has not asked for them
    await propose(firm)

    async def proposed() -> bool:
        await firm.send(machine["path"], {"current": 2, "spindle_temp_c": 21.5, "door": 1}, ts=start_ms + 1000)
        return len(await proposals_of(firm)) == 2

    await eventually(proposed)
    await firm.send(machine["path"], {"spindle_temp_c": 22.5, "a/b": 1}, ts=start_ms + 2000)
    by_name = {one["name"]: one for one in await proposals_of(firm, machine_id=machine["id"])}
    assert set(by_name) == {"spindle_temp_c", "door"}
    temperature, door = by_name["spindle_temp_c"], by_name["door"]
    assert (temperature["guessed_unit"], temperature["guessed_kind"]) == ("degC", "measure")
    assert (temperature["example"], temperature["highest"], temperature["lowest"]) == (22.5, 22.5, 21.5)
    assert (door["guessed_unit"], door["guessed_kind"], door["machine"]) == ("", "switch", machine["path"])

    accepted = await firm.admin.post(
        f"/v1/signal-proposals/{temperature['id']}/accept", json={"unit": "degC", "range_max": 200}
    )
    assert accepted.status_code == 200, accepted.text
    signals = accepted.json()["machine"]["signals"]
    assert [(one["name"], one["unit"]) for one in signals] == [("current", "A"), ("spindle_temp_c", "degC")]
    assert accepted.json()["replayed"]["is_complete"]
    assert [one["name"] for one in await proposals_of(firm)] == ["door"]

    async def stored() -> bool:
        return await frames_of(firm, dsn, machine["id"]) == [[1.0, 20.5], [2.0, 21.5], [None, 22.5]]

    await eventually(stored)
    accepted = await firm.admin.post(f"/v1/signal-proposals/{door['id']}/accept", json={})
    assert accepted.json()["replayed"]["accepted"] >= 2

    async def all_stored() -> bool:
        return await frames_of(firm, dsn, machine["id"]) == [[1.0, 20.5, 0.0], [2.0, 21.5, 1.0], [None, 22.5]]

    await eventually(all_stored)
    assert await proposals_of(firm) == []
    waiting = [one for one in (await firm.admin.get("/v1/quarantine")).json()["items"] if not one["replayed_us"]]
    assert {one["detail"].split("'")[1] for one in waiting} == {"a/b"}
    again = await firm.admin.post(f"/v1/signal-proposals/{door['id']}/accept", json={})
    assert again.status_code == 404
    actions = [one["action"] for one in (await firm.admin.get("/v1/audit")).json()["entries"]]
    assert actions.count("signal proposal accepted") == 2
    # Replayed history does not make the machine look alive, or its clock wrong.
    assert (await firm.diagnosis(machine["id"]))["source"] == "gateway-1"


async def test_what_was_mended_for_a_machine_is_replayed_in_one_call(firm: FirmAtHub, dsn: str) -> None:
    machine = await firm.machine()
    start_ms = int(time.time() * 1000) - 600_000
    for number in range(120):
        await firm.send(machine["path"], {"temperature": 301 + number}, ts=start_ms + number * 1000)
    table = "machine,signal,unit,range_min,range_max\nleeds/press-1,temperature,degC,-50,400\n"
    assert (await import_table(firm, table)).json()["signals_changed"] == 1

    async def wider() -> bool:
        return (await firm.send(machine["path"], {"temperature": 399}, ts=start_ms - 1000)).status_code == 200

    await eventually(wider)
    replayed = (await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json={"reason": "OUT_OF_RANGE"})).json()
    assert replayed["is_complete"]
    assert replayed["accepted"] in (100, 101)  # with the probe above, if that was too early
    assert replayed["left"] == replayed["quarantined"] == 20  # those above 400 are wrong still

    async def stored() -> bool:
        return len(await frames_of(firm, dsn, machine["id"])) == 101

    await eventually(stored)
    again = (await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json={"reason": "OUT_OF_RANGE"})).json()
    assert (again["items"], again["accepted"], again["left"], again["next_page_token"]) == (20, 0, 20, "")
    # Behind one of them: those before it are not sent again.
    items = (await firm.admin.get("/v1/quarantine")).json()["items"]
    waiting = [one for one in items if one["replayed_us"] is None and one["reason"] == "OUT_OF_RANGE"]
    body = {"reason": "OUT_OF_RANGE", "page_token": f"{waiting[5]['received_us']}.{waiting[5]['id']}"}
    rest = (await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json=body)).json()
    assert (rest["items"], rest["left"]) == (5, 20)
    body["page_token"] = "x"
    assert (await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json=body)).status_code == 400


async def test_dismissed_proposals_stay_away_and_those_of_others_are_not_touched(
    hub: RegistryHub, firm: FirmAtHub
) -> None:
    machine = await firm.machine()
    await propose(firm)

    async def proposed() -> bool:
        await firm.send(machine["path"], {"speed": 5})
        return bool(await proposals_of(firm))

    await eventually(proposed)
    (one,) = await proposals_of(firm)
    path = f"/v1/signal-proposals/{one['id']}"
    other = await hub.firm()
    assert await proposals_of(other) == []
    for client, status in ((other.admin, 404), (firm.device, 403), (hub.client(""), 401)):
        assert (await client.post(f"{path}/accept", json={})).status_code == status
        assert (await client.post(f"{path}/dismiss")).status_code == status
        assert (await client.post(f"/v1/machines/{machine['id']}/replay", json={"reason": "x"})).status_code == status
        policy = f"/v1/firms/{firm.id}/unknown-signals"
        assert (await client.get(policy)).status_code == status
        assert (await client.put(policy, json={"policy": "refuse"})).status_code == status
    assert (await other.admin.get("/v1/signal-proposals", params={"firm_id": firm.id})).status_code == 403
    bad = await firm.admin.put(f"/v1/firms/{firm.id}/unknown-signals", json={"policy": "guess"})
    assert bad.status_code == 400
    assert (await firm.admin.post(f"{path}/accept", json={"range_min": 5, "range_max": 1})).status_code == 400

    assert (await firm.admin.post(f"{path}/dismiss")).status_code == 204
    await firm.send(machine["path"], {"speed": 6})
    assert await proposals_of(firm) == []
    (again,) = await proposals_of(firm, dismissed=True)
    assert (again["id"], again["example"]) == (one["id"], 6)


async def test_what_came_before_a_machine_was_registered_is_replayed_when_it_is(firm: FirmAtHub, dsn: str) -> None:
    start_ms = int(time.time() * 1000) - 60_000
    for number in range(3):
        await firm.send(f"{firm.slug}/leeds/Late", {"current": number}, ts=start_ms + number * 1000)
        await firm.send(f"{firm.slug}/leeds/other", {"current": number}, ts=start_ms + number * 1000)
    # A gateway that nobody has registered sends on and on; what is meant stands behind more than a call looks at.
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "ingest,public"})

    async def flooded() -> bool:
        columns = "firm_id, credential_id, source, door, reason, detail, samples, correlation_id, batch, machine_path"
        done = await connection.execute(
            f"INSERT INTO quarantine (id, received, {columns}) SELECT q.id || n, q.received - INTERVAL '1 hour', {columns} FROM "
            "(SELECT * FROM quarantine WHERE firm_id = $1 AND detail LIKE '%/other%' LIMIT 1) AS q, generate_series(1, 50050) AS n",
            firm.id,
        )
        return str(done) == "INSERT 0 50050"

    try:
        await eventually(flooded)
    finally:
        await connection.close()
    machine = await firm.machine("late")
    found = await firm.diagnosis(machine["id"])
    assert found["verdict"] == "REGISTERED_LATER"
    replay = await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json={"reason": "UNKNOWN_MACHINE"})
    assert replay.json() == {
        "items": 3,
        "accepted": 3,
        "quarantined": 0,
        "left": 0,
        "is_complete": True,
        "next_page_token": "",
    }

    async def stored() -> bool:
        return await frames_of(firm, dsn, machine["id"]) == [[None, 0.0], [None, 1.0], [None, 2.0]]

    await eventually(stored)


async def test_what_the_release_before_set_aside_during_an_upgrade_is_replayed(firm: FirmAtHub, dsn: str) -> None:
    """It knows nothing of the column for the path."""
    start_ms = int(time.time() * 1000) - 60_000
    await firm.send(f"{firm.slug}/leeds/Early", {"current": 1}, ts=start_ms)
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "ingest,public"})

    async def written_as_before() -> bool:
        columns = "firm_id, credential_id, source, door, reason, detail, samples, correlation_id, batch, received"
        done = await connection.execute(
            f"WITH gone AS (DELETE FROM quarantine WHERE firm_id = $1 RETURNING id, {columns}) "
            f"INSERT INTO quarantine (id, {columns}) SELECT id || '-before', {columns} FROM gone",
            firm.id,
        )
        return str(done) == "INSERT 0 1"

    try:
        await eventually(written_as_before)
        path = await connection.fetchval("SELECT machine_path FROM quarantine WHERE firm_id = $1", firm.id)
        assert path == f"{firm.slug}/leeds/early"
    finally:
        await connection.close()
    machine = await firm.machine("early")
    replay = await firm.admin.post(f"/v1/machines/{machine['id']}/replay", json={"reason": "UNKNOWN_MACHINE"})
    assert (replay.json()["items"], replay.json()["accepted"], replay.json()["left"]) == (1, 1, 0)


async def test_proposals_by_grpc(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    as_operator = (("authorization", f"Bearer {hub.hub.operator_key}"),)
    as_device = (("authorization", f"Bearer {firm.device_key}"),)
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        stub = proposal_pb2_grpc.ProposalServiceStub(channel)
        policy = proposal_pb2.SetUnknownSignalPolicyRequest(firm_id=firm.id, propose=True)
        ask = proposal_pb2.ListSignalProposalsRequest(machine_id=machine["id"])
        for call in (
            stub.SetUnknownSignalPolicy(policy, metadata=as_device),
            stub.ListSignalProposals(ask, metadata=as_device),
            stub.AcceptSignalProposal(proposal_pb2.AcceptSignalProposalRequest(id=1), metadata=as_device),
            stub.DismissSignalProposal(proposal_pb2.DismissSignalProposalRequest(id=1), metadata=as_device),
            stub.ReplayMachine(proposal_pb2.ReplayMachineRequest(machine_id=machine["id"]), metadata=as_device),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        await stub.SetUnknownSignalPolicy(policy, metadata=as_operator)

        async def proposed() -> bool:
            await firm.send(machine["path"], {"motor_rpm": 900, "door": 1})
            return len((await stub.ListSignalProposals(ask, metadata=as_operator)).proposals) == 2

        await eventually(proposed)
        by_name = {one.name: one for one in (await stub.ListSignalProposals(ask, metadata=as_operator)).proposals}
        assert (by_name["motor_rpm"].guessed_unit, by_name["motor_rpm"].guessed_kind) == ("1/min", "whole")
        done = await stub.AcceptSignalProposal(
            proposal_pb2.AcceptSignalProposalRequest(id=by_name["motor_rpm"].id, unit="1/min", range_max=5000),
            metadata=as_operator,
        )
        assert done.machine.signals[-1].range_max == 5000
        assert (done.replayed.accepted >= 1, done.replayed.complete) == (True, True)
        await stub.DismissSignalProposal(
            proposal_pb2.DismissSignalProposalRequest(id=by_name["door"].id), metadata=as_operator
        )
        assert not (await stub.ListSignalProposals(ask, metadata=as_operator)).proposals
