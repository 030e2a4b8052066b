"""A firm's quotas: what it may send, and how many signals it may have."""

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.settings import Settings
from services.ingest.domain import QUOTA_BURST_S, QUOTA_SAMPLES_PER_S_DEFAULT, QUOTA_SIGNALS_DEFAULT
from smdih.ingest.v1 import (
    quota_pb2,
    quota_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from smdih_client import TelemetryClient
from tests.integration.registry_hub import FirmAtHub, RegistryHub, running, set_quota
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


async def test_a_firm_over_its_rate_is_told_when_to_send_again_and_others_are_not(
    hub: RegistryHub, firm: FirmAtHub
) -> None:
    machine = await firm.machine()
    frames = [{"ts": int(time.time() * 1000) - n * 1000, "values": {"current": n}} for n in range(100)]
    body = {"batches": [{"machine": machine["path"], "frames": frames}]}
    await set_quota(firm, samples_per_s=1)

    async def refused() -> bool:
        answer = await firm.device.post("/v1/telemetry", json=body)
        if answer.status_code == 200:
            return False
        assert (answer.status_code, answer.json()["reason"]) == (429, "QUOTA_SAMPLES")
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        return True

    await eventually(refused)
    lines = await firm.device.post("/api/v2/write", content=f"{machine['path']} current=1".encode())
    assert (lines.status_code, lines.json()["reason"]) == (429, "QUOTA_SAMPLES")
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await telemetry_pb2_grpc.TelemetryServiceStub(channel).SendBatches(
                telemetry_pb2.SendBatchesRequest(batches=[telemetry_pb2.Batch(machine_id=machine["id"])]),
                metadata=(("authorization", f"Bearer {firm.device_key}"),),
            )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    told = {str(name): str(value) for name, value in caught.value.trailing_metadata()}
    assert (told["reason"], int(told["retry-after"]) >= 1) == ("QUOTA_SAMPLES", True)
    assert "QUOTA_SAMPLES" in [one["cause"] for one in (await firm.diagnosis(machine["id"]))["causes"]]
    assert (await firm.device.get("/v1/quarantine")).json()["items"] == []  # the sender still has it
    metrics = (await firm.device.get("/metrics")).text
    assert 'smdih_ingest_door_refusals_total{reason="QUOTA_SAMPLES"}' in metrics
    assert 'smdih_ingest_door_samples_total{door="http",outcome="refused"}' in metrics

    other = await hub.firm()
    assert (await other.send((await other.machine())["path"])).status_code == 200
    await set_quota(firm)  # the default again

    async def taken() -> bool:
        return (await firm.device.post("/v1/telemetry", json=body)).status_code == 200

    await eventually(taken)


async def test_a_client_over_the_quota_loses_nothing(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine(signals=[{"name": "v"}])
    await set_quota(firm, samples_per_s=100)

    async def in_force() -> bool:
        return (await firm.send(machine["id"], {"v": 1})).status_code == 200

    await eventually(in_force)
    rows, start_us = 100 * QUOTA_BURST_S // 10, (int(time.time()) - 86_400) * 1_000_000
    async with TelemetryClient(hub.grpc, firm.device_key, source="eager") as client:
        for number in range(11):
            at = start_us + np.arange(number * rows, (number + 1) * rows) * 1_000_000
            await client.send(machine["id"], at, np.full((rows, 1), 1.5))
            await asyncio.sleep(0.05)  # a message each, so that the bucket is asked each time
        while not client.totals.reconnects and client.totals.acknowledged < client.totals.sent:
            await asyncio.sleep(0.05)
        await set_quota(firm, samples_per_s=100_000)
        async with asyncio.timeout(30):
            await client.flush()
        assert client.totals.acknowledged == client.totals.sent == 11 * rows
        assert client.totals.quarantined == 0


async def test_quota_and_use_are_shown_and_changed_by_operators_only(hub: RegistryHub, firm: FirmAtHub) -> None:
    path = f"/v1/firms/{firm.id}/quota"
    shown = (await firm.admin.get(path)).json()
    assert (shown["samples_per_s"], shown["signals"]) == (QUOTA_SAMPLES_PER_S_DEFAULT, QUOTA_SIGNALS_DEFAULT)
    assert shown["set_by_operator"] == {"samples_per_s": None, "signals": None, "stored_days": None}
    assert {name for name, used in shown["use"].items() if used} == set()
    assert {"signals", "quarantine_bytes", "quarantine_refused_samples"} <= set(shown["use"])
    machine = await firm.machine()
    at_ms = int(time.time() * 1000) - 5000
    await firm.send(machine["id"], ts=at_ms)

    async def used() -> bool:
        use = (await firm.admin.get(path)).json()["use"]
        return bool(use["samples_per_s"] > 0 and use["oldest_sample_us"] == at_ms * 1000)

    await eventually(used)
    assert (await firm.admin.get(path)).json()["use"]["signals"] == 2

    assert (await firm.admin.put(path, json={"signals": 10})).status_code == 403
    assert (await (await hub.firm()).admin.get(path)).status_code == 404
    assert (await firm.device.get(path)).status_code == 403
    assert (await hub.client("").get(path)).status_code == 401
    assert (await firm.operator.get("/v1/firms/99999999/quota")).status_code == 404
    for bad in ({"signals": 0}, {"samples_per_s": -1}, {"stored_days": 10**6}, {"stored_days": 6}):
        assert (await firm.operator.put(path, json=bad)).status_code == 400
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        stub = quota_pb2_grpc.QuotaServiceStub(channel)
        key = hub.hub.operator_key
        as_operator = (("authorization", f"Bearer {key}"),)
        await stub.SetQuota(quota_pb2.SetQuotaRequest(firm_id=firm.id, stored_days=30), metadata=as_operator)
        quota = await stub.GetQuota(quota_pb2.GetQuotaRequest(firm_id=firm.id), metadata=as_operator)
        assert (quota.stored_days, quota.signals, quota.used_signals) == (30, QUOTA_SIGNALS_DEFAULT, 2)


async def test_signals_over_the_quota_are_refused_also_when_made_at_the_same_time(firm: FirmAtHub) -> None:
    await set_quota(firm, signals=5)
    machine = await firm.machine()

    async def add(name: str) -> int:
        body = {"signals": [{"name": name}]}
        return (await firm.admin.post(f"/v1/machines/{machine['id']}/signals", json=body)).status_code

    answers = await asyncio.gather(*(add(f"s{number}") for number in range(8)))
    assert sorted(answers) == [201] * 3 + [409] * 5
    answer = await firm.admin.post(
        "/v1/machines",
        json={"site_id": firm.site_id, "path": "m2", "name": "m2", "kind": "k", "signals": [{"name": "a"}]},
    )
    assert (answer.status_code, answer.json()["reason"]) == (409, "QUOTA_SIGNALS")
    await firm.machine("empty", signals=[])
    assert (await set_quota(firm, signals=6))["use"]["signals"] == 5
