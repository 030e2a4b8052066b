"""How a gateway comes to its key, and how keys end."""

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
import pytest
import pytest_asyncio

from localstack.servers import ROOT, Servers
from services.common.settings import Settings
from services.ingest.registry import claimcodes
from services.ingest.registry.claims import WRONG_ATTEMPTS_MAX
from smdih.ingest.v1 import (
    claim_pb2,
    claim_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
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
