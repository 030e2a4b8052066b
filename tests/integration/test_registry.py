"""The registry as firms and operators meet it."""

import asyncio
import os
import stat
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import ROOT, Servers
from services.common.settings import Settings
from services.ingest.domain import QUOTA_BURST_S, QUOTA_SAMPLES_PER_S_DEFAULT, QUOTA_SIGNALS_DEFAULT
from services.ingest.registry import claimcodes
from services.ingest.registry.claims import WRONG_ATTEMPTS_MAX
from smdih.ingest.v1 import (
    claim_pb2,
    claim_pb2_grpc,
    proposal_pb2,
    proposal_pb2_grpc,
    quota_pb2,
    quota_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from smdih_client import Refused, TelemetryClient
from smdih_client.claim import claim
from tests.integration.registry_hub import FirmAtHub, RegistryHub, created, running
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


async def set_quota(firm: FirmAtHub, **quota: int) -> dict[str, Any]:
    answer = await firm.operator.put(f"/v1/firms/{firm.id}/quota", json=quota)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


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


async def claim_code(firm: FirmAtHub, **fields: Any) -> dict[str, Any]:
    return await created(firm.admin, "/v1/claim-codes", {"label": "gateway 7", **fields})


async def exchange(hub: RegistryHub, code: str, request_id: str = "a-gateway-s-request-1") -> httpx.Response:
    while True:
        answer = await hub.client("").post("/v1/claims", json={"code": code, "request_id": request_id})
        if answer.status_code != 429:
            return answer
        await asyncio.sleep(0.5)  # the door takes a few a second, as it says


async def test_a_code_gives_one_gateway_a_key_and_a_repeat_gets_the_same(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    made = await claim_code(firm, machine_id=machine["id"], key_valid_days=30)
    typed = made["code"].lower().replace("-", " ")
    first = await exchange(hub, typed)
    assert first.status_code == 201, first.text
    assert (first.json()["site"], first.json()["machine"]) == (f"{firm.slug}/leeds", machine["path"])
    assert (await firm.send(machine["path"], key=first.json()["key"])).status_code == 200
    assert (await exchange(hub, made["code"])).json() == first.json()
    other = await exchange(hub, made["code"], "another-gateways-request")
    assert (other.status_code, other.json()["reason"]) == (409, "CLAIM_USED")

    (listed,) = (await firm.admin.get("/v1/claim-codes")).json()["claim_codes"]
    assert (listed["state"], listed["credential_id"]) == ("used", first.json()["credential_id"])
    keys = {one["id"]: one for one in (await firm.admin.get("/v1/credentials")).json()["credentials"]}
    key = keys[first.json()["credential_id"]]
    assert (key["role"], key["label"], key["state"]) == ("device", "gateway 7", "valid")
    assert key["last_used_us"]
    assert 29.9 < (key["valid_to_us"] - key["valid_from_us"]) / 86_400e6 <= 30
    audit = (await firm.admin.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in audit][:2] == ["claim code exchanged", "claim code made"]


async def test_neither_code_nor_key_stands_anywhere(hub: RegistryHub, firm: FirmAtHub, dsn: str) -> None:
    """A copy of the database does not let anybody in, and after the time for repeats nothing of the key's making is left."""
    made = await claim_code(firm)
    code = made["code"].replace("-", "")
    key = (await exchange(hub, code)).json()["key"]
    connection = await asyncpg.connect(dsn)
    try:
        for table in ("claim_code", "credential", "audit", "outbox", "refusal"):
            rows = await connection.fetch(f"SELECT to_json(t)::text AS row FROM ingest.{table} t")
            for row in rows:
                assert code[4:] not in row["row"]
                assert key.rpartition("_")[2][4:] not in row["row"]
        await connection.execute(
            "UPDATE ingest.claim_code SET used = used - interval '11 minutes' WHERE id = $1", made["id"]
        )
    finally:
        await connection.close()
    assert (await exchange(hub, code)).json()["reason"] == "CLAIM_USED"


async def test_a_code_is_locked_after_a_few_wrong_tries(hub: RegistryHub, firm: FirmAtHub) -> None:
    code = (await claim_code(firm))["code"].replace("-", "")
    wrong = claimcodes.new_code()
    wrong = code[:4] + wrong[4:11]
    wrong = next(wrong + last for last in claimcodes.ALPHABET if _is_code(wrong + last))
    for _ in range(WRONG_ATTEMPTS_MAX):
        answer = await exchange(hub, wrong)
        assert (answer.status_code, answer.json()["reason"]) == (404, "CLAIM_UNKNOWN")
    assert (await exchange(hub, code)).json()["reason"] == "CLAIM_LOCKED"
    assert (await firm.admin.get("/v1/claim-codes")).json()["claim_codes"][0]["state"] == "locked"
    assert (await firm.admin.get("/v1/audit")).json()["entries"][0]["action"] == "claim code locked"


def _is_code(code: str) -> bool:
    try:
        return claimcodes.read(code) == code
    except claimcodes.Mistyped:
        return False


async def test_codes_that_are_mistyped_expired_or_cancelled(hub: RegistryHub, firm: FirmAtHub) -> None:
    code = (await claim_code(firm))["code"]
    swapped = code[:-1] + ("0" if code[-1] != "0" else "1")
    assert (await exchange(hub, swapped)).json()["reason"] == "CLAIM_MISTYPED"
    assert (await exchange(hub, "short")).json()["reason"] == "CLAIM_MISTYPED"
    assert (await exchange(hub, code, "short")).status_code == 400
    brief = await claim_code(firm, expires_in_s=1)

    async def expired() -> bool:
        codes = (await firm.admin.get("/v1/claim-codes")).json()["claim_codes"]
        return any(one["id"] == brief["id"] and one["state"] == "expired" for one in codes)

    await eventually(expired)
    assert (await exchange(hub, brief["code"])).json()["reason"] == "CLAIM_EXPIRED"
    cancelled = await claim_code(firm)
    assert (await firm.admin.delete(f"/v1/claim-codes/{cancelled['id']}")).status_code == 204
    assert (await exchange(hub, cancelled["code"])).json()["reason"] == "CLAIM_EXPIRED"


async def test_only_the_firm_makes_codes_for_what_is_its_own(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    machine = await other.machine()
    for body, status in (
        ({"firm_id": other.id}, 403),
        ({"machine_id": machine["id"]}, 404),
        ({"site_id": other.site_id}, 404),
        ({"expires_in_s": 10**9}, 400),
        ({"key_valid_days": -1}, 400),
        ({"label": "\x07"}, 400),
    ):
        answer = await firm.admin.post("/v1/claim-codes", json=body)
        assert (answer.status_code, body) == (status, body)
    assert (await firm.device.post("/v1/claim-codes", json={})).status_code == 403
    assert (await firm.operator.post("/v1/claim-codes", json={})).status_code == 400
    assert (await hub.client("").post("/v1/claim-codes", json={})).status_code == 401
    made = await claim_code(other)
    assert (await firm.admin.delete(f"/v1/claim-codes/{made['id']}")).status_code == 404
    assert (await firm.admin.get("/v1/claim-codes", params={"firm_id": other.id})).status_code == 403
    assert (await firm.admin.get("/v1/audit", params={"firm_id": other.id})).status_code == 403
    assert (await firm.device.get("/v1/audit")).status_code == 403


async def test_many_exchanges_at_once_are_slowed_and_one_code_makes_one_key(hub: RegistryHub, firm: FirmAtHub) -> None:
    code = (await claim_code(firm))["code"]

    async def one(number: int) -> httpx.Response:
        body = {"code": code, "request_id": f"racing-gateway-{number:04}"}
        return await hub.client("").post("/v1/claims", json=body)

    answers = await asyncio.gather(*(one(number) for number in range(40)))
    assert sum(answer.status_code == 201 for answer in answers) == 1
    assert any(answer.status_code == 429 for answer in answers)
    assert {answer.status_code for answer in answers} == {201, 409, 429}


async def test_the_gateways_command_keeps_its_key_to_itself(hub: RegistryHub, firm: FirmAtHub, tmp_path: Path) -> None:
    machine = await firm.machine()
    code = (await claim_code(firm))["code"]
    key_file = tmp_path / "smdih.key"

    async def run(code: str) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "smdih_client", "claim", code, "--target", hub.grpc, "--key-file", str(key_file)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
        )
        said, _ = await process.communicate()
        return process.returncode or 0, said.decode()

    status, said = await run("0000-0000-0001")
    assert (status, "CLAIM_MISTYPED" in said) == (1, True)
    assert not key_file.exists()
    status, said = await run(code)
    assert status == 0, said
    key = key_file.read_text().strip()
    assert key not in said
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["smdih.key"]
    assert (await firm.send(machine["path"], key=key)).status_code == 200
    status, said = await run(code)
    assert (status, "exists already" in said) == (1, True)

    # The answer to a first call was lost, and the gateway switched off: the second call is the same request.
    code = (await claim_code(firm))["code"]
    again = tmp_path / "again.key"
    (tmp_path / "again.key.request").write_text("request-before-the-power-cut")
    before = (await exchange(hub, code, "request-before-the-power-cut")).json()["key"]
    claimed = await claim(code, target=hub.grpc, key_file=again)
    assert again.read_text().strip() == before
    assert claimed.site == firm.slug


async def test_a_key_is_rotated_with_an_overlap(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    path = f"/v1/credentials/{firm.device_credential_id}"
    rotated = await created(firm.admin, f"{path}/rotate", {"overlap_s": 2})
    for key in (firm.device_key, rotated["key"]):
        assert (await firm.send(machine["path"], key=key)).status_code == 200
    again = await firm.admin.post(f"{path}/rotate", json={})
    assert (again.status_code, again.json()["reason"]) == (409, "ALREADY_ROTATED")

    async def ended() -> bool:
        return (await firm.send(machine["path"])).status_code == 401

    await eventually(ended)
    assert (await firm.send(machine["path"])).json()["reason"] == "KEY_EXPIRED"
    assert (await firm.send(machine["path"], key=rotated["key"])).status_code == 200
    assert (await firm.admin.post(f"{path}/rotate", json={})).json()["reason"] == "KEY_EXPIRED"
    keys = {one["id"]: one for one in (await firm.admin.get("/v1/credentials")).json()["credentials"]}
    assert keys[firm.device_credential_id]["state"] == "expired"
    assert keys[rotated["id"]]["replaces"] == firm.device_credential_id
    assert all("sha256" not in one and "key" not in one for one in keys.values())
    page = (await firm.admin.get("/v1/credentials", params={"page_size": 1})).json()
    assert len(page["credentials"]) == 1
    rest = await firm.admin.get("/v1/credentials", params={"page_token": page["next_page_token"]})
    assert len(rest.json()["credentials"]) == len(keys) - 1

    assert (await firm.admin.delete(f"/v1/credentials/{rotated['id']}")).status_code == 204

    async def revoked() -> bool:
        return (await firm.send(machine["path"], key=rotated["key"])).status_code == 401

    await eventually(revoked)
    assert (await firm.admin.post(f"/v1/credentials/{rotated['id']}/rotate", json={})).json()["reason"] == "KEY_REVOKED"
    assert [one["action"] for one in (await firm.admin.get("/v1/audit")).json()["entries"]][:2] == [
        "key revoked",
        "key rotated",
    ]


async def test_a_key_that_is_rotated_again_has_the_length_that_the_first_one_was_made_for(firm: FirmAtHub) -> None:
    day_us = 86_400_000_000
    soon_us = time.time_ns() // 1000 + 30 * day_us
    for made, length_us in (({}, 0), ({"valid_to_us": soon_us}, 30 * day_us)):
        first = (await created(firm.admin, "/v1/credentials", {"role": "device", "label": "gateway"} | made))["id"]
        lost = (await created(firm.admin, f"/v1/credentials/{first}/rotate", {}))["id"]
        # The lost one was itself rotated before it was lost.
        after = (await created(firm.admin, f"/v1/credentials/{lost}/rotate", {}))["id"]
        assert (await firm.admin.delete(f"/v1/credentials/{lost}")).status_code == 204
        again = (await created(firm.admin, f"/v1/credentials/{first}/rotate", {}))["id"]
        keys = {one["id"]: one for one in (await firm.admin.get("/v1/credentials")).json()["credentials"]}
        for credential in (after, again):
            one = keys[credential]
            length = (one["valid_to_us"] or one["valid_from_us"]) - one["valid_from_us"]
            assert length == pytest.approx(length_us, abs=60_000_000)
        assert keys[first]["valid_to_us"] > 0


async def test_keys_of_others_are_neither_seen_nor_touched(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    path = f"/v1/credentials/{other.device_credential_id}"
    assert (await firm.admin.post(f"{path}/rotate", json={})).status_code == 404
    assert (await firm.admin.delete(path)).status_code == 404
    assert (await other.send((await other.machine())["path"])).status_code == 200
    assert (await firm.admin.get("/v1/credentials", params={"firm_id": other.id})).status_code == 403
    for client in (firm.device, hub.client("")):
        assert (await client.get("/v1/credentials")).status_code in (401, 403)
        assert (await client.post(f"{path}/rotate", json={})).status_code in (401, 403)
    assert (await firm.operator.post(f"{path}/rotate", json={"overlap_s": -1})).status_code == 400
    seen = {one["firm_id"] for one in (await firm.operator.get("/v1/credentials")).json()["credentials"]}
    assert {0, firm.id, other.id} <= seen
    assert {one["firm_id"] for one in (await firm.admin.get("/v1/credentials")).json()["credentials"]} == {firm.id}


async def test_claims_and_credentials_by_grpc(hub: RegistryHub, firm: FirmAtHub) -> None:
    as_operator = (("authorization", f"Bearer {hub.hub.operator_key}"),)
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        claims, registry = claim_pb2_grpc.ClaimServiceStub(channel), registry_pb2_grpc.RegistryServiceStub(channel)
        made = await claims.CreateClaimCode(claim_pb2.CreateClaimCodeRequest(firm_id=firm.id), metadata=as_operator)
        request = claim_pb2.ExchangeClaimCodeRequest(code=made.code, request_id="grpc-gateway-request")
        claimed = await claims.ExchangeClaimCode(request)
        assert (await claims.ExchangeClaimCode(request)).key == claimed.key
        for call, why in (
            (claims.CreateClaimCode(claim_pb2.CreateClaimCodeRequest(firm_id=firm.id)), "UNAUTHENTICATED"),
            (
                claims.ExchangeClaimCode(claim_pb2.ExchangeClaimCodeRequest(code="x", request_id="y" * 16)),
                "CLAIM_MISTYPED",
            ),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert dict(refused.value.trailing_metadata() or ())["reason"] == why
        rotated = await registry.RotateCredential(
            registry_pb2.RotateCredentialRequest(credential_id=claimed.credential_id, overlap_s=0), metadata=as_operator
        )
        listed = await registry.ListCredentials(
            registry_pb2.ListCredentialsRequest(firm_id=firm.id), metadata=as_operator
        )
        states = {one.credential.id: one.state for one in listed.credentials}
        assert (states[claimed.credential_id], states[rotated.credential.id]) == ("expired", "valid")
        assert not any(one.credential.sha256 for one in listed.credentials)
        malformed: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/smdih.ingest.v1.ClaimService/ExchangeClaimCode"
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await malformed(b"\xff\xff")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


TABLE = """machine,machine_name,kind,signal,unit,range_min,range_max
leeds/line-1/saw,Saw,saw,speed,1/min,0,9000
leeds/line-1/saw,,,current,A,,
leeds/drill,Drill,drill,,,,
"""


async def import_table(
    firm: FirmAtHub, text: str | bytes, *, preview: bool = False, client: httpx.AsyncClient | None = None
) -> httpx.Response:
    return await (client or firm.admin).post(
        f"/v1/firms/{firm.id}/machines.csv",
        content=text,
        params={"preview": "true"} if preview else {},
        headers={"Content-Type": "text/csv"},
    )


async def machines_of(firm: FirmAtHub) -> dict[str, dict[str, Any]]:
    found = (await firm.admin.get("/v1/machines", params={"page_size": 1000})).json()["machines"]
    return {machine["path"]: machine for machine in found}


async def test_a_table_is_looked_at_imported_and_imported_again_without_a_change(firm: FirmAtHub) -> None:
    preview = await import_table(firm, TABLE, preview=True)
    assert preview.status_code == 200, preview.text
    assert (preview.json()["applied"], preview.json()["machines_created"], preview.json()["signals_created"]) == (
        False,
        2,
        2,
    )
    assert await machines_of(firm) == {}

    done = await import_table(firm, TABLE)
    assert done.json() == preview.json() | {"preview": False, "applied": True}
    saw = (await machines_of(firm))[f"{firm.slug}/leeds/line-1/saw"]
    assert (saw["name"], saw["kind"]) == ("Saw", "saw")
    assert [(s["name"], s["unit"], s.get("range_max")) for s in saw["signals"]] == [
        ("speed", "1/min", 9000),
        ("current", "A", None),
    ]
    assert (await firm.send(saw["path"], {"speed": 100, "current": 3})).json()["accepted"] == 2

    again = (await import_table(firm, TABLE)).json()
    assert {one["action"] for one in again["lines"]} == {"same"}
    assert (again["machines_changed"], again["signals_created"]) == (0, 0)
    entries = (await firm.admin.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in entries].count("table of machines imported") == 1

    exported = await firm.admin.get(f"/v1/firms/{firm.id}/machines.csv")
    assert exported.headers["content-type"].startswith("text/csv")
    same = (await import_table(firm, exported.content)).json()
    assert {one["action"] for one in same["lines"]} == {"same"}


async def test_a_table_changes_what_differs_and_the_door_knows_it(firm: FirmAtHub) -> None:
    await import_table(firm, TABLE)
    text = (
        TABLE.replace("0,9000", "0,12000").replace("Drill,drill", "Bench drill,drill") + "leeds/drill,,,torque,Nm,,\n"
    )
    changed = (await import_table(firm, text)).json()
    assert [one["action"] for one in changed["lines"]] == ["change", "same", "change", "create"]
    assert (changed["machines_changed"], changed["signals_changed"], changed["signals_created"]) == (2, 1, 1)
    path = f"{firm.slug}/leeds/line-1/saw"

    async def wider() -> bool:
        return (await firm.send(path, {"speed": 10_000})).status_code == 200

    await eventually(wider)
    drill = (await machines_of(firm))[f"{firm.slug}/leeds/drill"]
    assert (drill["name"], [signal["name"] for signal in drill["signals"]]) == ("Bench drill", ["torque"])
    assert (await firm.send(drill["path"], {"torque": 5})).json()["accepted"] == 1


async def test_one_bad_line_refuses_the_table_and_nothing_is_changed(firm: FirmAtHub) -> None:
    refused = await import_table(firm, TABLE + "hull/saw,,saw,speed,,,\nleeds/drill,,,a+b,,,\n")
    assert (refused.status_code, refused.json()["reason"], refused.json()["applied"]) == (422, "IMPORT_REFUSED", False)
    assert {one["line"]: one["reason"] for one in refused.json()["lines"] if one["action"] == "refuse"} == {
        5: "UNKNOWN_SITE",
        6: "BAD_NAME",
    }
    assert await machines_of(firm) == {}
    await set_quota(firm, signals=1)
    for preview in (True, False):
        over = await import_table(firm, TABLE, preview=preview)
        assert (over.status_code, over.json()["reason"]) == (409, "QUOTA_SIGNALS")
    assert await machines_of(firm) == {}


async def test_the_same_table_twice_at_the_same_time_makes_it_once(firm: FirmAtHub) -> None:
    answers = await asyncio.gather(*(import_table(firm, TABLE) for _ in range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(answer.json()["machines_created"] for answer in answers) == 2
    assert len((await machines_of(firm))[f"{firm.slug}/leeds/line-1/saw"]["signals"]) == 2


async def test_a_large_table_is_imported_while_the_door_goes_on_answering(firm: FirmAtHub) -> None:
    lines = [f"leeds/hall-{n // 1000}/m-{n},,robot,s{k},V,," for n in range(2000) for k in range(10)]
    body = TABLE.splitlines()[0] + "\n" + "\n".join(lines)
    importing = asyncio.create_task(import_table(firm, body))
    slowest_s = 0.0
    while not importing.done():
        asked = time.monotonic()
        assert (await firm.device.get("/livez")).status_code == 200
        slowest_s = max(slowest_s, time.monotonic() - asked)
        await asyncio.sleep(0.02)
    done = (await importing).json()
    assert (done["machines_created"], done["signals_created"]) == (2000, 20_000)
    assert slowest_s < 2
    assert (await firm.send(f"{firm.slug}/leeds/hall-1/m-1999", {"s9": 1})).status_code == 200
    assert (await import_table(firm, body + "\nleeds/hall-0/m-0,,,s10,,,")).json()["reason"] == "BAD_TABLE"


async def test_tables_of_others_are_neither_read_nor_written(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    path = f"/v1/firms/{firm.id}/machines.csv"
    for client, status in ((other.admin, 404), (firm.device, 403), (hub.client(""), 401)):
        assert (await client.get(path)).status_code == status
        assert (await import_table(firm, TABLE, client=client)).status_code == status
    assert (await firm.operator.get("/v1/firms/99999999/machines.csv")).status_code == 404
    assert (await firm.operator.get(path)).status_code == 200
    template = await firm.device.get("/v1/templates/machines.csv")
    assert (await import_table(firm, template.content, preview=True)).json()["signals_created"] == 2
    multipart = await firm.admin.post(path, files={"file": ("m.csv", TABLE)})
    assert (multipart.status_code, multipart.json()["reason"]) == (400, "BAD_TABLE")
    # A path that leads into another firm is a path of this firm, and there is no such site.
    foreign = await import_table(firm, TABLE.replace("leeds/drill", f"{other.slug}/leeds/drill"))
    assert foreign.json()["lines"][2]["reason"] == "UNKNOWN_SITE"


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


async def test_firms_and_sites_are_listed_for_those_who_may_see_them(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    assert [one["id"] for one in (await firm.admin.get("/v1/firms")).json()["firms"]] == [firm.id]
    assert [one["id"] for one in (await firm.admin.get("/v1/sites")).json()["sites"]] == [firm.site_id]
    seen: list[int] = []
    token = ""
    while True:
        page = (await firm.operator.get("/v1/firms", params={"page_size": 2, "page_token": token})).json()
        seen += [one["id"] for one in page["firms"]]
        token = page["next_page_token"]
        if not token:
            break
    assert seen == sorted(set(seen))
    assert {firm.id, other.id} <= set(seen)
    sites = (await firm.operator.get("/v1/sites", params={"firm_id": other.id})).json()["sites"]
    assert [(one["id"], one["slug"]) for one in sites] == [(other.site_id, "leeds")]
    assert (await firm.admin.get("/v1/sites", params={"firm_id": other.id})).status_code == 403
    for path in ("/v1/firms", "/v1/sites"):
        assert (await firm.device.get(path)).status_code == 403
        assert (await hub.client("").get(path)).status_code == 401


async def test_names_are_checked_and_every_change_leaves_one_entry(firm: FirmAtHub) -> None:
    machine = await firm.machine()
    signals = f"/v1/machines/{machine['id']}/signals"
    for names in (["Temperature"], ["a", "A"]):
        refused = await firm.admin.post(signals, json={"signals": [{"name": name} for name in names]})
        assert (refused.status_code, refused.json()["reason"]) == (400, "BAD_NAME")
    same = await firm.admin.post(signals, json={"signals": [{"name": "temperature"}]})
    assert (same.status_code, same.json()["reason"]) == (409, "ALREADY_EXISTS")
    body = {"site_id": firm.site_id, "name": "x", "kind": "press"}
    for path in ("unknown", "a/null", "/".join(["x" * 63] * 4) + "y", "Press", ""):
        refused = await firm.admin.post("/v1/machines", json=body | {"path": path})
        assert (refused.status_code, refused.json()["reason"]) == (400, "BAD_NAME")
    await created(firm.admin, signals, {"signals": [{"name": "speed"}]})
    entries = (await firm.admin.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in entries] == [
        *("signals added", "machine registered", "key issued", "key issued", "site registered", "firm registered"),
    ]
    assert all(one["firm_id"] == firm.id and one["credential_id"] and one["correlation_id"] for one in entries)


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


async def test_an_open_stream_ends_when_its_key_does(hub: RegistryHub, firm: FirmAtHub) -> None:
    machine = await firm.machine()
    rotated = await created(firm.admin, f"/v1/credentials/{firm.device_credential_id}/rotate", {"overlap_s": 2})
    at_us = (int(time.time()) - 60) * 1_000_000

    async def send_until_refused(key: str) -> str:
        client = TelemetryClient(hub.grpc, key, source="long-lived")
        try:
            async with asyncio.timeout(20), client:
                for number in range(10_000):
                    await client.send(machine["id"], [at_us + number], [[20.0, 1.0]])
                    await client.flush()
                    if number == 3:
                        await firm.admin.delete(f"/v1/credentials/{rotated['id']}")
                    await asyncio.sleep(0.02)
        except Refused as refused:
            assert client.totals.reconnects == 0  # it was the open stream that ended
            return refused.reason
        return "never refused"

    ends = await asyncio.gather(send_until_refused(rotated["key"]), send_until_refused(firm.device_key))
    assert list(ends) == ["KEY_REVOKED", "KEY_EXPIRED"]


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
