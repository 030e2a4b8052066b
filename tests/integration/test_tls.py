"""Processes in production mode: everything by TLS, services known by their certificates, rotation while telemetry flows."""

import asyncio
import os
import ssl
import sys
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

from localstack.certificates import Authority, Pair
from localstack.hub import Hub
from localstack.secured import database_by_tls
from localstack.servers import ROOT, Servers, named_in_environment
from services.common.settings import Settings
from smdih_client.telemetry import TelemetryClient
from smdih_client.tls import Tls, open_channel
from tests.polling import eventually

SIGNALS = ["temperature"]


@dataclass
class Secured:
    hub: Hub
    authority: Authority
    service: Pair
    gateway: Tls
    operator: httpx.AsyncClient
    anomaly: httpx.AsyncClient
    machine: dict[str, Any]
    device_key: str


@pytest_asyncio.fixture(scope="module")
async def authority(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Authority]:
    """Of all certificates here, that of the database too."""
    if named_in_environment() is not None:
        pytest.skip("the database named in the environment is not ours to guard")
    made = Authority(Path(tmp_path_factory.mktemp("authority")))
    async with database_by_tls(servers.database_dsn, made.issue(["database"], addresses=["127.0.0.1"])):
        yield made


@pytest_asyncio.fixture(scope="module")
async def secured(
    authority: Authority, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Secured]:
    folder = Path(tmp_path_factory.mktemp("tls"))
    service, gateway = authority.issue(["anomaly"]), authority.issue(["gateway-1"])
    hub = Hub(
        Servers(settings.kafka_bootstrap, settings.database_dsn),
        folder / "hub",
        topic_prefix=settings.kafka_topic_prefix,
        roles=("door", "anomaly"),
        environment={
            "SMDIH_PRODUCTION": "true",
            "SMDIH_DATABASE_CA_FILE": str(authority.file),
            "SMDIH_TLS_CERTIFICATE": str(service.certificate),
            "SMDIH_TLS_KEY": str(service.key),
            "SMDIH_TLS_CLIENT_CA": str(authority.file),
            "SMDIH_TLS_CA": str(authority.file),
        },
        ca=authority.file,
    )
    trust = ssl.create_default_context(cafile=authority.file)
    try:
        await hub.start()
        clients = [
            httpx.AsyncClient(
                base_url=hub.processes[name].http,
                headers={"Authorization": f"Bearer {hub.operator_key}"},
                verify=trust,
                timeout=30,
            )
            for name in ("door", "anomaly")
        ]
        made: list[dict[str, Any]] = []
        for path, body in (
            ("firms", {"name": "acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}),
            ("sites", {"firm_id": 1, "slug": "leeds", "name": "Leeds"}),
            (
                "machines",
                {
                    "site_id": 1,
                    "path": "press",
                    "name": "Press",
                    "kind": "press",
                    "signals": [{"name": name, "unit": "degC"} for name in SIGNALS],
                },
            ),
            ("credentials", {"role": "device", "firm_id": 1}),
        ):
            answer = await clients[0].post(f"/v1/{path}", json=body)
            assert answer.status_code == 201, answer.text
            made.append(answer.json())
        yield Secured(
            hub,
            authority,
            service,
            Tls(authority.file, gateway.certificate, gateway.key),
            clients[0],
            clients[1],
            made[2],
            made[3]["key"],
        )
        for client in clients:
            await client.aclose()
    finally:
        await hub.stop()


async def test_telemetry_flows_while_the_certificate_is_rotated(secured: Secured) -> None:
    """The client's stream stands through the rotation, and a client that comes afterwards meets the new certificate."""
    target = secured.hub.processes["door"].grpc

    async def served() -> str:
        trust = ssl.create_default_context(cafile=secured.authority.file)
        trust.load_cert_chain(str(secured.gateway.certificate), str(secured.gateway.key))
        host, _, port = target.partition(":")
        _, writer = await asyncio.open_connection(host, int(port), ssl=trust)
        number: str = writer.get_extra_info("peercert")["serialNumber"]
        writer.transport.abort()
        return number

    async with TelemetryClient(target, secured.device_key, source="s", credentials=secured.gateway) as client:

        async def send() -> None:
            for _ in range(20):
                await client.send(secured.machine["path"], [time.time_ns() // 1000], [[1.0]], signals=SIGNALS)
            await client.flush()

        await send()
        before = await served()
        secured.service.replace_by(secured.authority.issue(["anomaly"]))

        async def rotated() -> bool:
            return await served() != before

        await eventually(rotated, deadline_s=20)
        await send()
        assert (client.totals.acknowledged, client.totals.reconnects) == (40, 0)
    async with TelemetryClient(target, secured.device_key, source="t", credentials=secured.gateway) as client:
        await client.send(secured.machine["path"], [time.time_ns() // 1000], [[2.0]], signals=SIGNALS)
        await client.flush()
    assert (await secured.operator.get("/metrics")).status_code == 404
    async with httpx.AsyncClient() as inside:
        metrics = (await inside.get(f"{secured.hub.processes['door'].probes}/metrics")).text
    assert 'smdih_tls_certificate_expires_timestamp_seconds{file="certificate"}' in metrics


async def test_a_service_calls_another_by_mutual_tls(secured: Secured) -> None:
    """The alarm service asks ingest for samples: 503 would say that ingest did not let it in."""
    rule = {"machine_id": secured.machine["id"], "signal_id": secured.machine["signals"][0]["id"], "kind": "above"}
    firm = await secured.operator.post("/v1/credentials", json={"role": "firm", "firm_id": 1})
    key = {"Authorization": f"Bearer {firm.json()['key']}"}

    async def answered() -> httpx.Response:
        return await secured.anomaly.post("/v1/rules/preview", json=rule | {"name": "hot", "limit": 5.0}, headers=key)

    await eventually(answered_with(answered, 200), deadline_s=20)


def answered_with(ask: Any, status: int) -> Any:
    async def check() -> bool:
        answer = await ask()
        assert answer.status_code in (status, 401, 404), answer.text  # 401, 404: it has not heard of them yet
        return bool(answer.status_code == status)

    return check


async def test_the_services_certificate_is_of_no_use_elsewhere(secured: Secured) -> None:
    from smdih.ingest.v1 import registry_pb2, registry_pb2_grpc

    stolen = Tls(secured.authority.file, secured.service.certificate, secured.service.key)
    metadata = (("authorization", f"Bearer {secured.hub.operator_key}"),)
    for shown, expected in (
        (stolen, grpc.StatusCode.PERMISSION_DENIED),
        (Tls(secured.authority.file), grpc.StatusCode.UNAVAILABLE),
        (None, grpc.StatusCode.UNAVAILABLE),
    ):
        async with open_channel(secured.hub.processes["door"].grpc, shown) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await registry_pb2_grpc.RegistryServiceStub(channel).ListMachines(
                    registry_pb2.ListMachinesRequest(firm_id=1), metadata=metadata, timeout=10
                )
            assert refused.value.code() is expected


async def test_the_database_is_reached_by_tls_and_known_by_its_authority_and_name(
    secured: Secured, settings: Settings, tmp_path: Path
) -> None:
    connection = await asyncpg.connect(settings.database_dsn)
    try:
        query = (
            "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
            "WHERE datname = current_database() AND application_name LIKE 'smdih-%'"
        )
        rows = await connection.fetch(query)
    finally:
        await connection.close()
    assert [row["ssl"] for row in rows] == [True] * len(rows)
    assert rows

    async def reach(authority: Authority, dsn: str) -> None:
        given = Settings(kafka_bootstrap="k:1", database_dsn=dsn, database_ca_file=str(authority.file), production=True)
        await (await asyncpg.connect(given.database_dsn, timeout=10)).close()

    await reach(secured.authority, settings.database_dsn)
    for authority, dsn in (
        (Authority(tmp_path, "another"), settings.database_dsn),
        (secured.authority, settings.database_dsn.replace("127.0.0.1", "localhost")),
    ):
        with pytest.raises(ssl.SSLCertVerificationError):
            await reach(authority, dsn)


@pytest.mark.parametrize(
    ("module", "role", "named"),
    [
        ("services.ingest.main", "historian", "SMDIH_DATABASE_CA_FILE"),
        ("services.ingest.main", "mqtt", "SMDIH_MQTT_TLS"),
        ("services.funding.main", "api", "SMDIH_TLS_CERTIFICATE"),
    ],
)
async def test_a_start_without_tls_in_production_is_refused(
    settings: Settings, module: str, role: str, named: str
) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, role),
        cwd=ROOT,
        env=os.environ
        | {
            "SMDIH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
            "SMDIH_KAFKA_TOPIC_PREFIX": settings.kafka_topic_prefix,
            "SMDIH_DATABASE_DSN": settings.database_dsn,
            "SMDIH_PRODUCTION": "true",
            "SMDIH_DATABASE_IN_THE_CLEAR": str(named != "SMDIH_DATABASE_CA_FILE"),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 1
    assert named in said.decode()
    assert settings.database_dsn not in said.decode()
